"""generate.py: wrong arguments are named, with exit code 2, a closed pipe is no error to talk about, and a conversation
is asked in the form in which it was taught, as much of it as fits."""

import signal
import subprocess
import sys

import pytest

import checkpoints
from checkpoints import checkpoint
from generate import INTERRUPTED, _Conversation
from models import ModelConfig, build_model
from models.inference.decoding import Sampling, generate
from tests import stock_llama, warm
from tokenizer import Tokenizer
from tokenizer.conversations import ChatFormat


def save(folder, context=64, tokenizer=None, **state):
    """A run whose model knows nothing."""
    tokenizer = tokenizer or Tokenizer.train(["the quick brown fox"], 1024)
    shape = ModelConfig(vocab_size=tokenizer.vocab_size, context=context, n_layers=1, d_model=16, n_heads=2, d_ff=16)
    weights = {name: tensor.contiguous() for name, tensor in build_model(shape).state_dict().items()}
    checkpoint.save(
        folder / "checkpoints", checkpoints.RunState(seed=1, **state), model=weights, optimizer={}, model_config=shape,
        run_config={}, tokenizer=tokenizer
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("run"))


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [(["--device", "banana", "a"], "--device banana"),
     (["--device", "meta", "a"], "--device meta"), (["--seed", str(2**70), "a"], "--seed"),
     ([b"\xff"], "not UTF-8"), (["--temperature", "1e-40", "a"], "--temperature"),
     (["--temperature", "nan", "a"], "--temperature"), (["--stop", "two words", "a"], "--stop"),
     (["word " * 100], "context of 64"), (["--chat", "a"], "leave the prompts out"), ([], "name a prompt, or --chat"),
     (["--system", "be kind", "a"], "add --chat"), (["--context", "1", "a"], "--context 1")],
)  # fmt: skip
def test_wrong_arguments(run_folder, arguments, remedy):
    command = [sys.executable, "generate.py", "--checkpoint", run_folder, *arguments]
    done = warm.run(*command)
    assert done.returncode == 2, done.stderr
    assert remedy in done.stderr and "Traceback" not in done.stderr


def test_whoever_closes_the_pipe_has_seen_enough(run_folder):
    command = [sys.executable, "generate.py", "--checkpoint", run_folder, "--max-new-tokens", "60", "the"]
    process = warm.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(1)
    process.stdout.close()
    assert process.stderr.read() == b""
    process.wait(60)


@pytest.mark.parametrize("weights", ["fp32", "bf16", "int8"])
def test_smaller_weights_write_as_well(run_folder, weights):
    command = [sys.executable, "generate.py", "--checkpoint", run_folder, "--weights", weights, "--max-new-tokens", "5"]
    done = warm.run(*command, "the quick")
    assert done.returncode == 0 and done.stdout.startswith("the quick"), done.stderr


def test_ids_that_only_pad_the_vocabulary_are_never_drawn(tmp_path):
    """Of a model that knows nothing, whose vocabulary was made a multiple of 64."""
    tokenizer = Tokenizer.train(["the quick brown fox"], 1024)
    shape = ModelConfig(vocab_size=8192, context=256, n_layers=1, d_model=16, n_heads=2, d_ff=16)
    weights = {name: tensor.contiguous() for name, tensor in build_model(shape).state_dict().items()}
    checkpoint.save(
        tmp_path / "checkpoints", checkpoints.RunState(seed=1), model=weights, optimizer={}, model_config=shape,
        run_config={}, tokenizer=tokenizer
    )  # fmt: skip
    command = [sys.executable, "generate.py", "--checkpoint", tmp_path, "--max-new-tokens", "100", "the", "quick"]
    done = warm.run(*command)
    assert done.returncode == 0, done.stderr


# Conversations


def chat(folder, *arguments, **options):
    command = [sys.executable, "generate.py", "--checkpoint", folder, "--chat", *arguments]
    return warm.run(*command, **options)


def test_a_conversation_from_a_pipe_is_answered_line_by_line(run_folder):
    """By what decoding gives for the template's own prompt with all that was said before."""
    options = ("--system", "be kind", "--max-new-tokens", "6", "--seed", "3")
    done = chat(run_folder, *options, input="the fox\nquick?\n\nno\n")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    model, tokenizer, _ = checkpoints.load_model(run_folder)
    said, expected = [("system", "be kind")], []
    for turn, text in enumerate(("the fox", "quick?")):
        said.append(("user", text))
        ends = [tokenizer.end_of_text, tokenizer.token_id("<|end|>")]
        ids = [tokenizer.end_of_text]
        for role, content in said:
            ids += [tokenizer.token_id(f"<|{role}|>"), *tokenizer.encode(content), ends[1]]
        ids.append(tokenizer.token_id("<|assistant|>"))
        never = [token for token in tokenizer.special_tokens.values() if token not in ends]
        (new,) = generate(model, [ids], 6, ends, Sampling(), entries=tokenizer.vocab_size, seeds=[3 + turn],
                          never=never)  # fmt: skip
        expected.append(tokenizer.decode(new))
        said.append(("assistant", expected[-1]))
    assert done.stdout == "".join(f"{answer}\n" for answer in expected)


def test_what_is_oldest_leaves_a_conversation_that_no_longer_fits(capsys):
    """In whole exchanges, the system's turn never, and it is said once; what fits by no means is not asked."""
    tokenizer = Tokenizer.train(["the quick brown fox"], 1024)
    format = ChatFormat(tokenizer)
    conversation = _Conversation(format, [tokenizer.end_of_text], 200, 60, "be kind")
    said = []
    for turn in range(12):
        user, assistant = f"question {turn} " * 3, f"answer {turn} " * turn
        ids = conversation.ask(user)
        said.append({"role": "user", "content": user})
        whole = [[tokenizer.end_of_text, *format.prompt([{"role": "system", "content": "be kind"}, *said[2 * first :]])]
                 for first in range(turn + 1)]  # fmt: skip
        assert ids == next((prompt for prompt in whole if len(prompt) <= 140), whole[-1])
        conversation.answered(assistant)
        said.append({"role": "assistant", "content": assistant})
    assert len(whole[0]) > 900 and capsys.readouterr().err.count("oldest is left out") == 1
    assert conversation.ask("x" * 300) is None and "write less" in capsys.readouterr().err
    assert conversation.ask("x" * 150) is not None, "there is room for a short answer"


def test_who_cannot_chat_says_why(run_folder, tmp_path):
    trained = Tokenizer.train(["the quick brown fox"], 1024)
    for template, told, code, system in (
        ("", "no chat template", 1, ()),
        ("{{ raise_exception('no system turn') if messages[0]['role'] == 'system' }}{% for m in messages %}"
         "{{ m['content'] + '<|end|>' }}{% endfor %}", "no system turn", 2, ("--system", "x")),
    ):  # fmt: skip
        tokenizer = Tokenizer(trained._marked.to_str(), {"chat_template": template})
        done = chat(save(tmp_path / str(code), tokenizer=tokenizer), *system, input="hello\n")
        assert done.returncode == code and told in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_ctrl_c_ends_an_answer_and_then_the_conversation(tmp_path):
    command = [sys.executable, "generate.py", "--checkpoint", save(tmp_path, context=100_000), "--chat",
               "--max-new-tokens", "90000", "--top-k", "400"]  # fmt: skip
    process = warm.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    for message in (b"tell me all\n", b"and then?\n"):
        process.stdin.write(message)
        process.stdin.flush()
        assert process.stdout.read(20)
        process.send_signal(signal.SIGINT)
        while b"[ended]" not in process.stderr.readline(8):
            pass
    process.send_signal(signal.SIGINT)
    process.stdin.flush()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == INTERRUPTED and b"Traceback" not in errors


def test_newcomer_a_stock_llama_is_prompted_and_read_as_transformers_does(tmp_path):
    """From the token that its tokenizer puts before a text; with the space between prompt and continuation."""
    transformers = pytest.importorskip("transformers")
    import torch

    stock_llama.save_model(tmp_path)
    stock_llama.save_tokenizer(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    prompts = ["One day", "Once upon a time there", "What is"]
    expected = []
    never = [0, 1, 3, *range(len(tokenizer), 300)]  # marks that end nothing; ids that only pad the vocabulary
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        assert ids[0, 0] == 1
        written = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False,
                                  pad_token_id=2, suppress_tokens=never)  # fmt: skip
        expected.append(tokenizer.decode(written[0], skip_special_tokens=True))
    assert any(text[len(prompt)] == " " for text, prompt in zip(expected, prompts, strict=True))
    command = [sys.executable, "generate.py", "--checkpoint", tmp_path, "--temperature", "0", "--max-new-tokens", "9"]
    for asked, told in ((prompts, expected), (prompts[:1], expected[:1])):
        done = warm.run(*command, *asked)
        assert done.returncode == 0, done.stderr
        assert done.stdout == ("".join(f"{text}\n\n" for text in told) if len(told) > 1 else f"{told[0]}\n")


def test_special_tokens_that_a_checkpoint_does_not_hold_are_never_written(tmp_path):
    """Of a model that knows nothing, whose tokens are all as likely: one is a stop by name, and ends the text."""
    tokenizer = Tokenizer.train(["a"], 1024)
    run = save(tmp_path, 256, tokenizer, special_tokens=[0, 4])
    command = [sys.executable, "generate.py", "--checkpoint", run, "--max-new-tokens", "240", "a", "b", "c", "d"]
    out = warm.run(*command).stdout
    assert "<|assistant|>" in out and out.replace("<|assistant|>", "").count("<|") == 0
