"""Every command of the README runs. Long ones run shrunk: the same command with overrides, in folders of their own.

A command that is added to the README without a line here fails the first test.
"""

import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from data.embedded.problems import ORDER

ROOT = Path(__file__).resolve().parent.parent
BLOCKS = re.findall(r"```(bash|python)\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
COMMANDS = [line for language, block in BLOCKS if language == "bash" for line in block.strip().splitlines()]
SNIPPETS = [block for language, block in BLOCKS if language == "python"]

TRAIN = "accelerate launch multigpu_train.py"
SMALL_DEFAULT = [
    "model.n_layers=2", "model.d_model=32", "model.d_ff=64", "watch.sample_tokens=5", "evaluation.every_steps=null",
    "evaluation.final_tokens=2000", "evaluation.word_problems=4", "evaluation.recall=2",
    "data.sources.stories.documents=80", "data.sources.problems.documents=200", "data.sources.recall.documents=12",
    *(f"phases.{phase}.{key}" for phase in range(3) for key in ("tokens=8192", "batch_tokens=4096", "micro_batch=4")),
]  # fmt: skip
SMALL_TINYSTORIES = [
    "model.n_layers=2", "model.d_model=32", "model.d_ff=64", "tokenizer.vocab_size=1024", "watch.sample_tokens=5",
    "evaluation.final_tokens=2000", "data.sources.tinystories.documents=200", "data.sources.textbooks.documents=20",
    *(f"phases.{phase}.{key}" for phase in range(3) for key in ("tokens=8192", "batch_tokens=4096")),
]  # fmt: skip
OVERRIDES = {  # what shrinks a command of the README; None: another test runs it
    "make train": SMALL_DEFAULT,
    "make test": None,  # this is it
    "source .venv/bin/activate": None,  # the commands run with the environment's own python
    TRAIN: SMALL_DEFAULT,
    f"{TRAIN} --config configs/tinystories-cpu.yaml": SMALL_TINYSTORIES,
    "python multigpu_train.py --config configs/tinystories-cpu.yaml --dry-run": [],
    f"{TRAIN} --config configs/tinystories-cpu.yaml run.name=my-text 'data.sources.*={{from: \"jsonl:PATH\"}}'": SMALL_TINYSTORIES,  # noqa: E501
    f"{TRAIN} run.name=mine 'data.sources={{mine: {{from: \"jsonl:PATH\"}}}}' 'phases.*.data={{mine: 1}}' 'phases.*.probes=[]'": [  # noqa: E501
        override for override in SMALL_DEFAULT if not override.startswith("data.sources.")
    ],
    "python multigpu_train.py --config configs/flow-1b.yaml --dry-run": [],
    "python -m data.prepare --config configs/tinystories-cpu.yaml": SMALL_TINYSTORIES,
    "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 multigpu_train.py run.name=two": SMALL_DEFAULT,  # noqa: E501
    'python generate.py --checkpoint runs/default "Once upon a time"': [],
    'python generate.py --checkpoint runs/default --temperature 0.7 --top-p 0.9 --max-new-tokens 60 "One day" "The dog"': [],  # noqa: E501
    "python generate.py --checkpoint runs/default --temperature 0 $'First Tom has 5 apples. Next Tom buys 4. Last Tom gives away 2. How many apples does Tom have?\\n'": [],  # noqa: E501
    "python -m observe.report runs/default": [],
    "python -m data.inspect shards/NAME-FINGERPRINT": [],
    "python -m data.publish shards/NAME-FINGERPRINT OWNER/NAME --dry-run": [],
    "python -m tokenizer.train --from jsonl:../shared/data/tinystories/train.jsonl --vocab-size 4096 --out runs/my-tokenizer": [],  # noqa: E501
}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """The project's files in a folder of their own, so that commands write there."""
    target = tmp_path_factory.mktemp("readme") / "slms"
    ignore = shutil.ignore_patterns(".git", ".venv", "runs", "shards", "__pycache__", ".*_cache", "wandb")
    shutil.copytree(ROOT, target, ignore=ignore)
    return target


def localised(text: str, real_data: Path) -> str:
    """The command or config with the real text's place on this machine."""
    text = text.replace("jsonl:PATH", f"jsonl:{real_data}/tinystories/valid.jsonl")
    return text.replace("../shared/data", str(real_data))


def test_every_command_is_known():
    assert set(COMMANDS) == set(OVERRIDES)


@pytest.mark.timeout(900)
def test_every_command_runs_in_order(checkout, run, real_data):
    config = checkout / "configs" / "tinystories-cpu.yaml"
    config.write_text(localised(config.read_text(), real_data))
    for command in COMMANDS:
        overrides = OVERRIDES[command]
        if overrides is None:
            continue
        if command == "make train":  # without the installation, which test_makefile.py looks at
            command = TRAIN
        some = next((path.name for path in checkout.glob("shards/[a-z]*-*") if "tokenizer" not in path.name), "none")
        command = localised(command, real_data).replace("NAME-FINGERPRINT", some)
        parts = shlex.split(command.replace("$'", "'").replace("\\n'", "\n'"))  # as bash reads $'...\n'
        given = {part.partition("=")[0] for part in parts}
        environment = dict(part.split("=", 1) for part in parts if part.startswith("ACCELERATE_USE_CPU="))
        parts = [part for part in parts if not part.startswith("ACCELERATE_USE_CPU=")]
        parts += [override for override in overrides if override.partition("=")[0] not in given]
        binaries = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        finished = run(*parts, cwd=checkout, timeout=600, PATH=binaries, WANDB_MODE="offline", **environment)
        assert finished.returncode == 0, f"{command}\n{finished.stdout}\n{finished.stderr}"
    assert (checkout / "runs" / "default" / "report.html").stat().st_size > 10_000
    for snippet in SNIPPETS:
        finished = run(sys.executable, "-c", snippet + "\nprint(model.config == config)", cwd=checkout)
        assert finished.stdout.strip() == "True", finished.stderr


def test_the_word_problem_is_told_as_the_corpus_tells_them():
    """In other words the model has never seen one, and answers wrongly."""
    (question,) = (command.split("$'")[1] for command in COMMANDS if "How many" in command)
    *told, ask = re.findall(r"(\w+)[^.?]*[.?]", question)
    assert told == ["First", *ORDER[-(len(told) - 1) :]] and ask == "How"
