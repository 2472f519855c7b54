"""Every command of the README runs. Long ones run shrunk: the same command with overrides, in folders of their own. Of
the commands of one program the first runs as it stands, the others without its launcher, and warm (tests/warm.py).

A command that is added to the README without a line here fails the first test.
"""

import functools
import json
import math
import os
import re
import shlex
import shutil
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from data.embedded import documents
from data.embedded.problems import ORDER
from tests import warm

ROOT = Path(__file__).resolve().parent.parent
BLOCKS = re.findall(r"```(bash|python)\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
COMMANDS = [line for language, block in BLOCKS if language == "bash" for line in block.strip().splitlines()]
SNIPPETS = [block for language, block in BLOCKS if language == "python"]

TRAIN = "accelerate launch multigpu_train.py"
SMALL_DEFAULT = [
    "model.n_layers=2", "model.d_model=32", "model.d_ff=64", "watch.sample_tokens=5", "evaluation.every_steps=null",
    "evaluation.final_tokens=2000", "evaluation.word_problems=4", "evaluation.recall=2",
    "data.sources.stories.documents=80", "data.sources.problems.documents=200", "data.sources.recall.documents=12",
    *(f"phases.{phase}.{key}" for phase in range(3) for key in ("tokens=4096", "batch_tokens=2048", "micro_batch=4")),
]  # fmt: skip
SMALL_TINYSTORIES = [
    "model.n_layers=2", "model.d_model=32", "model.d_ff=64", "tokenizer.vocab_size=1024", "watch.sample_tokens=5",
    "evaluation.final_tokens=2000", "data.sources.tinystories.documents=200", "data.sources.textbooks.documents=20",
    *(f"phases.{phase}.{key}" for phase in range(3) for key in ("tokens=4096", "batch_tokens=2048")),
]  # fmt: skip
SMALL_CHAT = [
    "model.n_layers=2", "model.d_model=32", "model.d_ff=64", "watch.sample_tokens=5", "evaluation.final_tokens=2000",
    "data.sources.talk.documents=200", "data.sources.textbooks.documents=20", "phases.0.tokens=4096",
    "phases.0.batch_tokens=2048",
]  # fmt: skip
SMALL_TUTOR = [
    "model.n_layers=2", "model.d_model=32", "model.d_ff=64", "watch.sample_tokens=5", "evaluation.final_tokens=2000",
    "evaluation.word_problems=4", "phases.*.tokens=4096", "phases.*.batch_tokens=2048",
]  # fmt: skip
SMALL_JOB = [
    "problems.count=30", "job.samples=2", "job.chunk=15", "teacher.engine=endpoint", "teacher.url=SERVER",
    "teacher.allow=[seed, top_k, min_p]", "problems.evaluation_sets.gsm8k.split=test",
]  # fmt: skip
SMALL_STUDENT = [
    "run.init_from=null", "tokenizer.path=TOKENIZER", "model.vocab_size=null", "model.n_layers=2", "model.d_model=32",
    "model.n_heads=4", "model.n_kv_heads=2", "model.head_dim=8", "model.d_ff=64", "phases.0.tokens=4096",
    "phases.0.batch_tokens=2048", "watch.sample_tokens=5", "evaluation.final_tokens=2000",
    "data.sources.replay={from: \"jsonl:PATH\", documents: 50}",
]  # fmt: skip
OVERRIDES = {  # what shrinks a command of the README; None: another test runs it
    "make train": SMALL_DEFAULT,
    "make test": None,  # this is it
    "source .venv/bin/activate": None,  # the commands run with the environment's own python
    TRAIN: SMALL_DEFAULT,
    f"{TRAIN} --config configs/tinystories-cpu.yaml": SMALL_TINYSTORIES,
    "python multigpu_train.py --config configs/tinystories-cpu.yaml --dry-run": [],
    f"{TRAIN} --config configs/tinystories-cpu.yaml run.name=my-text 'data.sources.*={{from: \"jsonl:PATH\"}}'": SMALL_TINYSTORIES,  # noqa: E501
    f"{TRAIN} run.name=mine 'data.sources={{mine: {{from: \"text:input.txt\"}}}}' 'phases.*.data={{mine: 1}}' 'phases.*.probes=[]'": [  # noqa: E501
        override for override in SMALL_DEFAULT if not override.startswith("data.sources.")
    ],
    "python multigpu_train.py --config configs/flow-1b.yaml --dry-run": [],
    "python -m data.prepare --config configs/tinystories-cpu.yaml": SMALL_TINYSTORIES,
    "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 multigpu_train.py run.name=two": SMALL_DEFAULT,  # noqa: E501
    'python generate.py --checkpoint runs/default "Once upon a time"': [],
    'python generate.py --checkpoint runs/default --temperature 0.7 --top-p 0.9 --max-new-tokens 60 "One day" "The dog"': [],  # noqa: E501
    "python generate.py --checkpoint runs/default --temperature 0 $'First Tom has 5 apples. Next Tom buys 4. Last Tom gives away 2. How many apples does Tom have?\\n'": [],  # noqa: E501
    "python convert.py --checkpoint runs/default --to coreml --out exports/default": [],
    'python -m export.mil exports/default --prompt "Once upon a time"': ["--max-new-tokens=5", "--precision=fp32"],
    "python convert.py --checkpoint runs/default --to hf --out exports/default-hf": [],
    "python convert.py --checkpoint runs/default --to gguf --out exports/default-gguf": [],
    "python convert.py --checkpoint runs/default --to mlx --out exports/default-mlx": [],
    f"{TRAIN} --config configs/chat.yaml": SMALL_CHAT,
    "python generate.py --checkpoint runs/chat --chat": [],
    "python -m evaluation.chat --checkpoint runs/chat --data jsonl:../shared/data/chat/dolly_15k.jsonl": ["--limit=8", "--max-new-tokens=8"],  # noqa: E501
    "accelerate launch -m distill.generate --config configs/distill/gsm8k.yaml --preview": SMALL_JOB,
    "accelerate launch -m distill.generate --config configs/distill/gsm8k.yaml": SMALL_JOB,
    "python -m distill.filter traces/gsm8k-FINGERPRINT --out gsm8k --evaluation-set gsm8k=hub:openai/gsm8k/main:question": [],  # noqa: E501
    f"{TRAIN} --config configs/qwen3-0.6b-gsm8k.yaml data.sources.gsm8k.from=parquet:datasets/gsm8k-FINGERPRINT/data/*.parquet": SMALL_STUDENT,  # noqa: E501
    "python -m evaluation.gsm8k --checkpoint runs/qwen3-0.6b-gsm8k --baseline hub:Qwen/Qwen3-0.6B-Base --data hub:openai/gsm8k/main --split dev": ["--limit=4", "--max-new-tokens=8"],  # noqa: E501
    f"{TRAIN} --config configs/tutor.yaml": SMALL_TUTOR,
    "python -m evaluation.facts --checkpoint runs/tutor": ["--max-new-tokens=8"],
    "python -m observe.report runs/default": [],
    "python -m data.inspect shards/NAME-FINGERPRINT": [],
    "python -m data.publish shards/NAME-FINGERPRINT OWNER/NAME --dry-run": [],
    "python -m tokenizer.train --from jsonl:../shared/data/tinystories/train.jsonl --vocab-size 4096 --out runs/my-tokenizer": [],  # noqa: E501
}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """The project's files in a folder of their own, so that commands write there."""
    target = tmp_path_factory.mktemp("readme") / "slms"
    made = ("runs", "shards", "traces", "datasets", "wandb", ".*")
    ignore = shutil.ignore_patterns("__pycache__", *made)
    shutil.copytree(ROOT, target, ignore=ignore)
    (target / "input.txt").write_text("\n\n".join(documents("stories", "train", 400, seed=1)))  # of one's own
    return target


def localised(text: str, real_data: Path, split: str = "train") -> str:
    """The command or config with the real text's place on this machine, and runs of ours for models of the Hub."""
    text = text.replace("jsonl:PATH", f"jsonl:{real_data}/tinystories/valid.jsonl")
    text = text.replace("hub:openai/gsm8k/main", f"jsonl:{real_data}/gsm8k/{split}.jsonl")
    text = text.replace("hub:Qwen/Qwen3-0.6B-Base", "runs/default")
    return text.replace("../shared/data", str(real_data))


@pytest.fixture
def teacher(real_data) -> Iterator[str]:
    """The address of a server that solves GSM8K's training problems as people did."""
    lines = (real_data / "gsm8k" / "train.jsonl").read_text().splitlines()
    solutions = {row["question"].strip(): row["answer"] for row in map(json.loads, lines)}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][-1]["content"]
            message = {"role": "assistant", "content": solutions.get(asked.strip(), "#### 0")}
            usage = {"prompt_tokens": 9, "completion_tokens": 9, "total_tokens": 18}
            body = json.dumps({"choices": [{"message": message, "finish_reason": "stop"}], "usage": usage}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()


def test_every_command_is_known():
    assert set(COMMANDS) == set(OVERRIDES)


@pytest.mark.timeout(900)
def test_every_command_runs_in_order(checkout, run, real_data, teacher):
    for name in ("tinystories-cpu", "chat", "distill/gsm8k", "qwen3-0.6b-gsm8k"):
        config = checkout / "configs" / f"{name}.yaml"
        exam = ('hub:openai/gsm8k/main", field', f'jsonl:{real_data}/gsm8k/test.jsonl", field')
        config.write_text(localised(config.read_text().replace(*exam), real_data))
    begun: list[list[str]] = []
    for command in COMMANDS:
        overrides = OVERRIDES[command]
        if overrides is None:
            continue
        if command == "make train":  # without the installation, which test_makefile.py looks at
            command = TRAIN
        some = next((path.name for path in checkout.glob("shards/[a-z]*-*") if "tokenizer" not in path.name), "none")
        command = localised(command, real_data, "test" if "distill.filter" in command else "train")
        command = command.replace("NAME-FINGERPRINT", some)
        if "tokenizer.train" in command:
            command = command.replace("train.jsonl", "valid.jsonl")  # a sixth of the text
        for folder in ("traces", "datasets"):
            made = next((path.name for path in checkout.glob(f"{folder}/gsm8k-????????????")), "none")
            command = command.replace(f"{folder}/gsm8k-FINGERPRINT", f"{folder}/{made}")
        tokenizer = next((str(path) for path in checkout.glob("shards/tokenizer-*/")), "none")
        places = {"SERVER": teacher, "TOKENIZER": tokenizer, "jsonl:PATH": f"jsonl:{real_data}/tinystories/valid.jsonl"}
        overrides = [functools.reduce(lambda text, pair: text.replace(*pair), places.items(), override)
                     for override in overrides]  # fmt: skip
        parts = shlex.split(command.replace("$'", "'").replace("\\n'", "\n'"))  # as bash reads $'...\n'
        given = {part.partition("=")[0] for part in parts}
        environment = dict(part.split("=", 1) for part in parts if part.startswith("ACCELERATE_USE_CPU="))
        parts = [part for part in parts if not part.startswith("ACCELERATE_USE_CPU=")]
        parts += [override for override in overrides if override.partition("=")[0] not in given]
        binaries = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        program = [part for part in parts if part.endswith(".py")] or parts[parts.index("-m") : parts.index("-m") + 2]
        program += ["--dry-run"] * ("--dry-run" in parts)
        if program[-1] == "multigpu_train.py":
            parts += ["parallel.cpu_threads=1", *(["watch.wandb=off"] if begun else [])]
        if program in begun and "--multi_gpu" not in parts:  # what its first imports need is known
            script = [part for part in parts[1:] if part != "launch"]
            finished = warm.run(sys.executable, *script, cwd=checkout, PATH=binaries, WANDB_MODE="offline")
        else:
            finished = run(*parts, cwd=checkout, timeout=600, PATH=binaries, WANDB_MODE="offline", **environment)
        begun.append(program)
        assert finished.returncode == 0, f"{command}\n{finished.stdout}\n{finished.stderr}"
    assert (checkout / "runs" / "default" / "report.html").stat().st_size > 10_000
    mine = map(json.loads, (checkout / "runs" / "mine" / "metrics.jsonl").read_text().splitlines())
    losses = [row["val_loss"] for row in mine if row["kind"] == "validation"]  # on the end of the one text
    assert len(losses) == 3 and all(map(math.isfinite, losses))
    for snippet in SNIPPETS:
        finished = run(sys.executable, "-c", snippet + "\nprint(model.config == config)", cwd=checkout)
        assert finished.stdout.strip() == "True", finished.stderr


def test_the_word_problem_is_told_as_the_corpus_tells_them():
    """In other words the model has never seen one, and answers wrongly."""
    (question,) = (command.split("$'")[1] for command in COMMANDS if "How many" in command)
    *told, ask = re.findall(r"(\w+)[^.?]*[.?]", question)
    assert told == ["First", *ORDER[-(len(told) - 1) :]] and ask == "How"
