"""Published weights through the whole road: decoding equal to `transformers`', then job, filter and evaluation."""

import json
import os
import sys
from pathlib import Path

import pytest

PROBLEMS = 200
PROMPTS, NEW_TOKENS = 32, 48

pytestmark = pytest.mark.campaign


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory) -> Path:
    from tests.distill import published_weights

    return published_weights.made(tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="module")
def questions(real_data) -> list[str]:
    lines = (real_data / "gsm8k" / "train.jsonl").read_text().splitlines()
    return [json.loads(line)["question"].strip() for line in lines[:PROMPTS]]


def test_greedy_answers_of_real_weights_equal_those_of_transformers(smollm2, questions):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from checkpoints import load_model
    from models.inference.decoding import generate
    from models.inference.sampling import Sampling
    from tokenizer.conversations import ChatFormat

    theirs, their_tokenizer = AutoModelForCausalLM.from_pretrained(smollm2), AutoTokenizer.from_pretrained(smollm2)
    model, tokenizer, _ = load_model(smollm2)
    chat = ChatFormat(tokenizer)
    asked = [[{"role": "user", "content": question}] for question in questions]
    prompts = [chat.prompt(messages) for messages in asked]
    for messages, prompt in zip(asked, prompts, strict=True):
        assert their_tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"] == prompt
    ours = generate(model, prompts, NEW_TOKENS, chat.stop_ids, Sampling(temperature=0.0), entries=tokenizer.vocab_size)
    assert len({tuple(ids) for ids in ours}) == PROMPTS and all(len(ids) > 3 for ids in ours)
    for prompt, ids in zip(prompts, ours, strict=True):
        with torch.no_grad():
            whole = theirs.generate(torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False,
                                    eos_token_id=chat.stop_ids, pad_token_id=tokenizer.end_of_text)  # fmt: skip
        new = whole[0, len(prompt) :].tolist()
        assert [token for token in new if token not in chat.stop_ids] == ids


def test_real_weights_go_through_job_filter_and_evaluation(smollm2, real_data, run, tmp_path):
    gsm8k = real_data / "gsm8k"
    config = Path(__file__).resolve().parents[2] / "configs" / "distill" / "gsm8k.yaml"
    shared = {"cwd": config.parents[2], "timeout": 3600, "ACCELERATE_USE_CPU": "true"}
    finished = run(
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", os.cpu_count(),
        "--module", "distill.generate", "--config", config, f"problems.from=jsonl:{gsm8k / 'train.jsonl'}",
        f'problems.evaluation_sets={{gsm8k: {{from: "jsonl:{gsm8k / "test.jsonl"}", field: question}}}}',
        f"problems.count={PROBLEMS}", "job.samples=1", "job.chunk=25", f"job.folder={tmp_path / 'traces'}",
        f"teacher.model={smollm2}", "teacher.context=1024", "sampling.max_new_tokens=256", **shared,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stdout + finished.stderr
    (traces,) = (tmp_path / "traces").glob("gsm8k-*")

    from distill import traces as stored

    rows = list(stored.read(traces))
    assert len({(row["id"], row["sample"]) for row in rows}) == len(rows) == PROBLEMS
    assert sum(row["finish"] == "stop" for row in rows) >= 0.9 * PROBLEMS
    finished = run(sys.executable, "-m", "distill.filter", traces, "--out", "real", "--folder", tmp_path / "datasets",
                   "--evaluation-set", f"gsm8k=jsonl:{gsm8k / 'test.jsonl'}:question", **shared)  # fmt: skip
    kept = list((tmp_path / "datasets").glob("real-*/filter.json"))
    assert finished.returncode == (0 if kept else 1), finished.stdout + finished.stderr
    if kept:  # a model of this size may solve none
        assert sum(json.loads(kept[0].read_text())["reasons"].values()) == PROBLEMS
    finished = run(sys.executable, "-m", "evaluation.gsm8k", "--checkpoint", smollm2, "--data",
                   f"jsonl:{gsm8k / 'test.jsonl'}", "--split", "test", "--limit", PROBLEMS, "--max-new-tokens", "256",
                   "--json", tmp_path / "exam.json", **shared)  # fmt: skip
    assert finished.returncode == 0, finished.stdout + finished.stderr
    found = json.loads((tmp_path / "exam.json").read_text())
    assert found["problems"] == len(found["items"]) == PROBLEMS
    accuracy = found["greedy"]["zero-shot chat"]["scores"]["flexible"]["accuracy"]
    assert 0 <= accuracy < 0.15  # it is known to solve some of a hundred
    print(finished.stdout)
