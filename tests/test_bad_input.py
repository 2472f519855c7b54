"""Bad input of every kind: what is wrong is named with what to do, the exit code is as documented, nothing is lost.

One small run is made, stopped half-way. Each case copies its folder, spoils one thing, and calls an entry as a user
would. Whatever lay in the folder must be there afterwards, wherever it was moved.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import re
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import generate
import multigpu_train
from data import embedded, inspect, prepare, publish, sources
from storage import folder
from tokenizer import train as train_tokenizer

FINISHED, FAILED, WRONG = 0, 1, 2  # the documented exit codes of the entries
GROWING = ("metrics.jsonl", "report.html", "config.yaml", "outcome.json", ".lock")  # of a run, which goes on in them
NEWEST, OLDER = "step-00000006", "step-00000003"


class Case(NamedTuple):
    """A fault, and what its user gets to know."""

    name: str
    entry: str
    spoil: Callable[[], None]  # called in the copied folder
    code: int
    says: tuple[str, ...]  # regular expressions, all of which the output matches
    arguments: tuple[str, ...] = ()


ENTRIES: dict[str, tuple[Callable[[], int], tuple[str, ...]]] = {
    "train": (multigpu_train.main, ("--config", "run.yaml")),
    "prepare": (prepare.main, ("--config", "run.yaml")),
    "tokenizer": (train_tokenizer.main, ("--out", "made")),
    "generate": (generate.main, ("--max-new-tokens", "2", "Once")),
    "inspect": (inspect.main, ()),
    "publish": (publish.main, ()),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A corpus in each format, a tokenizer, and a run of it, stopped after its second checkpoint."""
    import pyarrow
    import pyarrow.parquet

    home = tmp_path_factory.mktemp("whole")
    texts = [f"{text} {number}" for number, text in enumerate(embedded.documents("stories", "train", 120, seed=0))]
    with contextlib.chdir(home):
        Path("corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        Path("corpus.txt").write_text("\n<|endoftext|>\n".join(texts))
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), "corpus.parquet", row_group_size=40)
        Path("run.yaml").write_text(
            "run: {name: x, folder: runs}\n"
            "parallel: {device: cpu, precision: fp32, cpu_threads: 1}\n"
            "model: {n_layers: 1, d_model: 16, n_heads: 2, n_kv_heads: 1, d_ff: 32, window: 16}\n"
            "tokenizer: {vocab_size: 1024}\n"
            "data: {shards: shards, sources: {stories: {from: 'jsonl:corpus.jsonl'}}}\n"
            "optimizer: {newton_schulz: fp32}\n"
            "phases:\n"
            "  - {name: only, context: 64, data: {stories: 1}, tokens: 8192, batch_tokens: 1024}\n"
            "checkpoint: {every_steps: 3, keep: 100}\n"
            "evaluation: {every_steps: null, tokens: 500, final_tokens: 500, bigram_floor: false}\n"
            "watch: {wandb: 'off', sample_tokens: 2}\n"
        )
        assert call("train", "run.stop_after_steps=6") == 75
    assert sorted(path.name for path in (home / "runs/x/checkpoints").iterdir()) == [OLDER, NEWEST]
    return home


def call(entry: str, *arguments: str) -> int:
    """The exit code of an entry, called with arguments as from a shell."""
    main, always = ENTRIES[entry]
    before, handlers = sys.argv, {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGPIPE)}
    sys.argv = [f"{entry}.py", *always, *arguments]
    try:
        return main()
    except SystemExit as ending:  # argparse's
        return int(ending.code or 0)
    finally:
        sys.argv = before
        for number, handler in handlers.items():
            signal.signal(number, handler)


# What can happen to a file, and where the files are


def cut(path: str) -> Callable[[], None]:
    """Its second half is missing."""
    return lambda: edit(path, lambda data: data[: len(data) // 2])


def flip(path: str) -> Callable[[], None]:
    """One bit in its middle has turned."""

    def flipped(data: bytes) -> bytes:
        middle = len(data) // 2
        return data[:middle] + bytes([data[middle] ^ 16]) + data[middle + 1 :]

    return lambda: edit(path, flipped)


def put(path: str, content: str | bytes) -> Callable[[], None]:
    """It holds something else."""
    data = content.encode() if isinstance(content, str) else content
    return lambda: edit(path, lambda _: data)


def gone(path: str) -> Callable[[], None]:
    return lambda: find(path).unlink()


def linked(path: str) -> Callable[[], None]:
    """It is a link to its content, out of the folder."""

    def spoil() -> None:
        inside, outside = find(path), Path("elsewhere").absolute()
        inside.rename(outside)
        inside.symlink_to(outside)

    return spoil


def vouched(spoil: Callable[[], None], place: str) -> Callable[[], None]:
    """The fault was there before the manifest was written, so that sizes and sums hold: another program made it."""

    def spoiled() -> None:
        spoil()
        path = find(place)
        (path / folder.MANIFEST).unlink()
        with folder.write(path.with_name("again")) as temporary:
            shutil.copytree(path, temporary, dirs_exist_ok=True)
        shutil.rmtree(path)
        path.with_name("again").rename(path)

    return spoiled


def another_tokenizer(path: str) -> None:
    from tokenizer import Tokenizer

    Tokenizer.train(["quite other words", "than those of the corpus"] * 20, 1024).save(path)


def both(*faults: Callable[[], None]) -> Callable[[], None]:
    return lambda: [fault() for fault in faults] and None


def nothing() -> None:
    """The fault is in the arguments."""


def edit(path: str, change: Callable[[bytes], bytes]) -> None:
    file = find(path)
    file.write_bytes(change(file.read_bytes() if file.is_file() else b""))


def find(path: str) -> Path:
    """The one file or folder that a pattern names, or a new one."""
    found = list(Path().glob(path))
    assert len(found) <= 1, found
    return found[0] if found else Path(path)


PICKLE = pickle.dumps({"text": "a story", "weights": [1.0] * 64})
WEIGHTS = f"runs/x/checkpoints/{NEWEST}/model.safetensors"
MANIFEST = f"runs/x/checkpoints/{NEWEST}/manifest.json"
CHECKPOINT = f"runs/x/checkpoints/{NEWEST}"
TOKENS = "shards/stories-*/train-00000.tokens"
FALLS_BACK = (rf"skipped .*{NEWEST}", r"step 8\b")
REMADE = ("WARNING", r"moved to .*broken-1", "prepared again")
DATA = "data.sources.stories"


def config(name: str, content: str | bytes, *says: str) -> Case:
    return Case(f"config: {name}", "train", put("run.yaml", content), WRONG, ("1 problem|problems", *says))


def override(name: str, argument: str, *says: str) -> Case:
    key = re.escape(argument.partition("=")[0])
    return Case(f"config: {name}", "train", nothing, WRONG, (rf"{key}\b.*\(it is", *says), (argument,))


def corpus(name: str, content: str | bytes, *says: str, code: int = FAILED) -> Case:
    return Case(f"data: {name}", "prepare", put("corpus.jsonl", content), code, says)


def row(**fields: object) -> str:
    return json.dumps(fields) + "\n"


STORIES = "".join(row(text=f"Once upon a time there were {number} mice, and all was well.") for number in range(90))

CASES = [
    # the config
    Case("config: no file", "train", gone("run.yaml"), WRONG, (r"run\.yaml", "readable YAML file")),
    Case("config: a folder", "train", both(gone("run.yaml"), lambda: Path("run.yaml").mkdir()), WRONG,
         (r"run\.yaml", "readable YAML file")),
    config("empty", "", r"data: this key is required", r"phases: this key is required"),
    config("not YAML", "run: {name: x", r"run\.yaml", "valid YAML"),
    config("NUL bytes", b"run: {name: x}\0\0", r"run\.yaml", "valid YAML"),
    config("latin-1", "run: {name: größer}".encode("latin-1"), r"run\.yaml", "valid YAML"),
    config("a pickle", PICKLE, r"run\.yaml", "valid YAML"),
    config("a list", "[1, 2]", r"run\.yaml", "YAML file of sections"),
    config("a key twice", "run: {name: x, name: y}", "'name' is given twice"),
    config("too deep", "[" * 20_000, r"run\.yaml", "valid YAML"),
    config("a tag that runs code", "run: !!python/object/apply:os.system [true]", r"run\.yaml", "valid YAML"),
    Case("config: an unknown section", "train", nothing, WRONG, ("optimser: .*did you mean optimizer",),
         ("optimser.clip=1",)),
    override("an unknown key", "optimizer.learning=1", "no such key"),
    override("a word for a number", "phases.0.tokens=many", "valid integer"),
    override("a switch for a number", "model.n_layers=true", "no switch"),
    override("a negative rate", "optimizer.muon_lr=-0.1", "greater than 0"),
    override("not a number", "optimizer.adamw_lr=.nan", "finite"),
    override("no end", "optimizer.clip=.inf", "finite"),
    override("impossible heads", "model.n_heads=3", "n_kv_heads|d_model|divi"),
    override("no phases", "phases=[]", "at least 1"),
    override("a name that is a path", "run.name=../x", "names a folder"),
    override("a runs folder that is a file", "run.folder=corpus.txt/runs", "is a file"),
    override("a shards folder that is a file", "data.shards=corpus.txt", "is a file"),
    override("a missing corpus", f"{DATA}.from=jsonl:none.jsonl", "no such file"),
    Case("config: the home of nobody", "train", nothing, WRONG, (rf"{DATA}: name files", "home directory"),
         (f"{DATA}.from=jsonl:~nobody-at-all/x.jsonl",)),
    Case("config: a name too long", "train", nothing, WRONG, (rf"{DATA}: name files", "too long"),
         (f"{DATA}.from=jsonl:" + "x" * 300,)),
    override("a folder as corpus", f"{DATA}.from=jsonl:shards", "this is a folder"),
    override("a corpus of no kind", f"{DATA}.from=csv:corpus.jsonl", "KIND:REST"),
    override("a phase of another source", "phases.0.data.novels=1", r"there are: stories"),
    override("weights that are not there", "run.init_from=runs/none", "existing run")._replace(
        spoil=lambda: shutil.rmtree("runs/x/checkpoints")),
    Case("config: a secret", "train", nothing, WRONG, (r"run\.name: .*\(hidden\)", "HF_TOKEN"),
         ("run.name=hf_" + "a" * 30,)),
    Case("config: NUL and half a character", "train", nothing, WRONG,
         (r"watch\.sample_prompts\.0: leave out NUL", r"tokenizer\.path: leave out NUL"),
         ('watch.sample_prompts=["\\ud800"]', 'tokenizer.path="a\\0b"')),
    Case("config: an entry that is no number", "train", nothing, WRONG, ("phases is a list",), ("phases.²=1",)),
    Case("config: a link to nowhere as runs", "train", lambda: Path("link").symlink_to("unmounted"), WRONG,
         (r"run\.folder: link is a link to unmounted, which is not there",), ("run.folder=link",)),
    Case("config: a link to nowhere as shards", "train", lambda: Path("link").symlink_to("unmounted"), WRONG,
         (r"data\.shards: link is a link to unmounted",), ("data.shards=link/shards",)),
    Case("config: a file for checkpoints", "train",
         lambda: (shutil.move("runs/x/checkpoints", "kept"), put("runs/x/checkpoints", "mine")()), WRONG,
         (r"run\.name: runs/x/checkpoints is a file, where a run keeps a folder",)),
    Case("config: a folder for metrics", "train", lambda: (gone("runs/x/metrics.jsonl")(),
         Path("runs/x/metrics.jsonl").mkdir()), WRONG, (r"metrics\.jsonl is a folder, where a run keeps a file",)),
    Case("config: weights of another tokenizer", "train", lambda: another_tokenizer("other"), WRONG,
         ("trained with another tokenizer", r"run\.allow=\[tokenizer\]"),
         ("run.name=new", "run.init_from=runs/x", "tokenizer.path=other", "model.vocab_size=1024")),
    Case("config: more than the machine holds", "train", nothing, FAILED,
         ("out of memory", "micro_batch", "--dry-run"),
         ("run.name=huge", "model.d_model=100000", "model.d_ff=4000000")),
    Case("config: no value", "train", nothing, WRONG, ("write an override as section.key=value",), ("optimizer.clip",)),
    Case("config: beyond a list", "train", nothing, WRONG, (r"phases\.7", "entries 0 to 0"), ("phases.7.tokens=1",)),
    Case("config: three at once", "train", nothing, WRONG, ("3 problems", "muon_lr", "n_layers", "no such key"),
         ("optimizer.muon_lr=-1", "model.n_layers=0", "watch.colour=red")),
    # documents
    corpus("empty", "", r"no training documents in jsonl:corpus\.jsonl", "name a file"),
    corpus("blank lines", "\n\n \n", r"no training documents in jsonl:corpus\.jsonl", "name a file"),
    corpus("a pickle", PICKLE, r"corpus\.jsonl:1", "malformed|bad"),
    corpus("UTF-16", STORIES.encode("utf-16"), r"corpus\.jsonl:1", "mend"),
    corpus("compressed, and damaged", b"\x1f\x8b\x08\0" + bytes(range(256)) * 4, r"corpus\.jsonl cannot be read",
           "get it again", code=WRONG),
    corpus("one JSON array", json.dumps([{"text": "a"}] * 9), r"corpus\.jsonl:1", "mend"),
    corpus("another field", STORIES.replace('"text"', '"story"'), r"corpus\.jsonl:1", "story", "mend"),
    corpus("numbers for text", row(text=5) * 9, r"corpus\.jsonl:1", "mend"),
    corpus("a line cut short", STORIES + '{"text": "Once upon', "1 bad_json", r"quarantine\.jsonl", code=FINISHED),
    corpus("a line with NUL bytes", STORIES + "\0\0\0\n", "1 bad_json", r"quarantine\.jsonl", code=FINISHED),
    corpus("a line of latin-1", STORIES.encode() + '{"text": "größer"}\n'.encode("latin-1"), "1 bad_utf8",
           r"quarantine\.jsonl", code=FINISHED),
    corpus("half a surrogate", STORIES + '{"text": "\\ud800"}\n', "1 (bad_utf8|not_text)", code=FINISHED),
    corpus("a name that is no text", STORIES + '{"\\ud800": 1}\n', "1 missing_field",
           r"quarantine\.jsonl", code=FINISHED),
    corpus("a huge line", STORIES + row(text="x" * 2_000_000), "1 too_long", r"quarantine\.jsonl", code=FINISHED),
    Case("data: a link to nowhere", "prepare", both(gone("corpus.jsonl"),
         lambda: Path("corpus.jsonl").symlink_to("/nowhere")), WRONG, (r"corpus\.jsonl", "no such file")),
    *(Case(f"data: parquet, {name}", "prepare", fault, FAILED, (r"corpus\.parquet", "parquet"),
           (f"{DATA}.from=parquet:corpus.parquet",))
      for name, fault in (("cut short", cut("corpus.parquet")), ("a bit flipped", flip("corpus.parquet")),
                          ("empty", put("corpus.parquet", "")), ("a pickle", put("corpus.parquet", PICKLE)))),
    Case("data: parquet without the column", "prepare", nothing, FAILED, (r"corpus\.parquet", "no column 'story'"),
         (f"{DATA}.from=parquet:corpus.parquet", f"{DATA}.field=story")),
    Case("data: text that is not UTF-8", "prepare", put("corpus.txt", "größer".encode("latin-1")), FAILED,
         (r"corpus\.txt:1", "mend"), (f"{DATA}.from=text:corpus.txt",)),
    Case("data: questions without questions", "prepare", put("exam.jsonl", row(answer=4)), FAILED,
         (r"data\.evaluation_sets\.exam", r"exam\.jsonl:1", "question"),
         ("data.evaluation_sets={exam: {from: 'jsonl:exam.jsonl', field: question}}",)),
    # tokenizers
    *(Case(f"tokenizer: {name}", "train", put("other/tokenizer.json", content) if content is not None else nothing,
           WRONG, (r"other.*tokenizer\.json|other", says), ("tokenizer.path=other", "run.name=new"))
      for name, content, says in (
          ("missing", None, "does not exist"), ("empty", "", "tokenizer"),
          ("cut short", '{"model": {"type"', "tokenizer"), ("another JSON", '{"a": 1}', "tokenizer"),
          ("a list", "[]", "tokenizer"), ("a pickle", PICKLE, "cannot be read"),
          ("UTF-16", '{"model": {}}'.encode("utf-16"), "cannot be read"))),
    Case("tokenizer: more entries than the model", "train", nothing, WRONG, (r"model\.vocab_size", "at least the"),
         ("tokenizer.path=runs/x/checkpoints/step-00000003/tokenizer", "model.vocab_size=100", "run.name=new")),
    Case("tokenizer: ours, a bit flipped", "prepare", flip("shards/tokenizer-*/tokenizer.json"), FINISHED, REMADE),
    Case("tokenizer: text that is not UTF-8", "tokenizer", put("corpus.txt", "größer".encode("latin-1")), WRONG,
         (r"corpus\.txt is not UTF-8",), ("--from", "text:corpus.txt")),
    Case("tokenizer: no documents", "tokenizer", put("corpus.jsonl", "nonsense\n"), WRONG, ("no documents", "not JSON"),
         ("--from", "jsonl:corpus.jsonl")),
    Case("tokenizer: a line that nests too deep", "tokenizer", 
         put("deep.jsonl", row(text="Once upon a time") * 20 + "[" * 100_000 + "\n"), FINISHED, ("1 rows: not JSON",),
         ("--from", "jsonl:deep.jsonl", "--vocab-size", "1024")),
    Case("tokenizer: no file", "tokenizer", nothing, WRONG, (r"none\.txt: no such file",), ("--from", "text:none.txt")),
    Case("tokenizer: too few entries", "tokenizer", nothing, WRONG, ("vocab_size is 300: choose 1,024 to 50,257",),
         ("--from", "text:corpus.txt", "--vocab-size", "300")),
    Case("tokenizer: a place that is taken", "tokenizer", put("made", "mine"), WRONG, ("made exists already",),
         ("--from", "text:corpus.txt")),
    # shards
    *(Case(f"shards: {name}", "train", fault, FINISHED, REMADE)
      for name, fault in (
          ("cut short", cut(TOKENS)), ("a bit flipped", flip(TOKENS)), ("one missing", gone(TOKENS)),
          ("empty", put(TOKENS, "")), ("a link out of the folder", linked(TOKENS)),
          ("no description", gone("shards/stories-*/dataset.json")),
          ("no manifest", gone("shards/stories-*/manifest.json")),
          ("an empty manifest", put("shards/stories-*/manifest.json", "")),
          ("a manifest of another type", put("shards/stories-*/manifest.json", "[1]")),
          ("a manifest cut short", cut("shards/stories-*/manifest.json")))),
    Case("shards: shown when cut short", "inspect", both(cut(TOKENS), lambda: find("shards/stories-*").rename("s")),
         FAILED, (r"train-00000\.tokens has \d+ bytes",), ("s",)),
    Case("shards: shown when none are", "inspect", nothing, FAILED, ("nowhere is not a folder",), ("nowhere",)),
    Case("shards: published when a bit is flipped", "publish",
         both(flip(TOKENS), lambda: find("shards/stories-*").rename("s")), FAILED, (r"train-00000\.tokens", "whole"),
         ("s", "me/stories")),
    Case("shards: a tokenizer published", "publish", lambda: find("shards/tokenizer-*").rename("t"), FAILED,
         ("t holds no shards", r"data\.prepare"), ("t", "me/stories")),
    # checkpoints
    *(Case(f"checkpoint: {name}", "train", fault, FINISHED, FALLS_BACK)
      for name, fault in (
          ("cut short", cut(WEIGHTS)), ("a bit flipped", flip(WEIGHTS)), ("empty", put(WEIGHTS, "")),
          ("a pickle for weights", put(WEIGHTS, PICKLE)), ("weights missing", gone(WEIGHTS)),
          ("a link out of the folder", linked(WEIGHTS)), ("no manifest", gone(MANIFEST)),
          ("an empty manifest", put(MANIFEST, "")), ("a manifest of NUL bytes", put(MANIFEST, bytes(600))),
          ("a manifest of another type", put(MANIFEST, '{"files": 3}')),
          ("an optimizer state cut short", cut(f"{CHECKPOINT}/optimizer.safetensors")),
          ("a file too many", put(f"{CHECKPOINT}/notes.txt", "mine")))),
    *(Case(f"checkpoint: {name}, vouched for", "train", vouched(fault, CHECKPOINT), WRONG, (says,))
      for name, fault, says in (
          ("a pickle for weights", put(WEIGHTS, PICKLE), r"model\.safetensors cannot be read .*safetensors files only"),
          ("no weights", gone(WEIGHTS), r"model\.safetensors cannot be read"),
          ("an empty optimizer state", put(f"{CHECKPOINT}/optimizer.safetensors", ""), r"optimizer\.safetensors"),
          ("an empty state", put(f"{CHECKPOINT}/state.json", ""), r"state\.json is not what this version writes"),
          ("a state of another type", put(f"{CHECKPOINT}/state.json", "[]"), r"state\.json is not what this"),
          ("a state with words", put(f"{CHECKPOINT}/state.json", '{"seed": "a", "step": "six"}'), r"state\.json"),
          ("no tokenizer", gone(f"{CHECKPOINT}/tokenizer/tokenizer.json"), r"tokenizer\.json does not exist"),
          ("a config that is no YAML", put(f"{CHECKPOINT}/config.yaml", "run: {"), r"config\.yaml"),
          ("a model of another version", put(f"{CHECKPOINT}/model.json", '{"width": 9}'), r"model\.json is not what"),
          ("another model", put(f"{CHECKPOINT}/model.json", "{}"), r"model\.d_model: 256 there, 16 in the config"))),
    Case("checkpoint: another model asked for", "train", nothing, WRONG, (NEWEST, "another run", "nothing can", "d_ff"),
         ("model.d_ff=48",)),
    Case("checkpoint: another seed asked for", "train", nothing, WRONG, (NEWEST, r"run\.allow=\[order\]"),
         ("run.seed=5",)),
    Case("checkpoint: another rate asked for", "train", nothing, WRONG, (NEWEST, r"run\.allow=\[schedule\]"),
         ("optimizer.muon_lr=0.5",)),
    Case("checkpoint: other documents", "train", put("corpus.jsonl", STORIES), WRONG,
         (NEWEST, r"run\.allow=\[(data|tokenizer)\]")),
    Case("checkpoint: none is whole", "train", both(cut(WEIGHTS), cut(WEIGHTS.replace(NEWEST, OLDER))), FINISHED,
         (rf"skipped .*{NEWEST}", rf"skipped .*{OLDER}", "from the beginning")),
    # generation
    *(Case(f"generate: {name}", "generate", fault, FAILED, says, ("--checkpoint", place))
      for name, fault, place, says in (
          ("no such run", nothing, "runs/none", ("runs/none is not a folder", "name a run")),
          ("a file", nothing, "corpus.txt", (r"corpus\.txt is not a folder",)),
          ("an empty run", lambda: Path("runs/y").mkdir(), "runs/y", ("runs/y has no checkpoint",)),
          ("a checkpoint cut short", cut(WEIGHTS), CHECKPOINT, (r"model\.safetensors has",)),
          ("a pickle for weights", vouched(put(WEIGHTS, PICKLE), CHECKPOINT), CHECKPOINT, ("safetensors files only",)),
          ("a tokenizer that is none", vouched(put(f"{CHECKPOINT}/tokenizer/tokenizer.json", "{}"), CHECKPOINT),
           CHECKPOINT, (r"tokenizer\.json",)),
          ("a model that is none", vouched(put(f"{CHECKPOINT}/model.json", "{"), CHECKPOINT), CHECKPOINT,
           (r"model\.json",)),
          ("a shape that does not fit", vouched(lambda: edit(f"{CHECKPOINT}/model.json", lambda data: data.replace(
              b'"d_ff": 32', b'"d_ff": 33')), CHECKPOINT), CHECKPOINT, ("do not fit together",)),
          ("a stock folder with a pickle", lambda: (
              put("stock/config.json", '{"model_type": "llama"}')(), put("stock/pytorch_model.bin", PICKLE)()),
           "stock", (r"stock",)))),
]  # fmt: skip


def test_there_are_enough_of_them():
    assert len(CASES) >= 60 and max(Counter(case.name for case in CASES).values()) == 1


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input(case, whole, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(sources, "LONGEST_ROW", 1_000_000)
    home = tmp_path / "home"
    shutil.copytree(whole, home)
    monkeypatch.chdir(home)
    (home / "other").mkdir()
    (home / "stock").mkdir()
    case.spoil()
    before = contents(home)
    code = call(case.entry, *case.arguments)
    told = "".join(capfd.readouterr())
    assert code == case.code, told
    for words in case.says:
        assert re.search(words, told), f"{words!r} is not in:\n{told}"
    assert "Traceback" not in told
    if code == WRONG:
        assert Path("runs/x/config.yaml").read_bytes() == (whole / "runs/x/config.yaml").read_bytes()
    lost = before - contents(home)
    assert not lost, f"lost: {lost}"
    assert not [path for path in home.rglob("*") if ".tmp-" in path.name], "something half-written is left"
    if case.code == WRONG and case.entry == "train" and "run.name=new" in case.arguments:
        assert not list(home.glob("runs/new/metrics.jsonl")), "a run was begun"


def contents(home: Path) -> Counter[str]:
    """The sums of all files, whatever their names, but for those that a resumed run writes on in."""
    return Counter(digest for path in plain_files(home) if (digest := sum_of(path)))


def plain_files(home: Path) -> Iterator[Path]:
    for parent, _, names in os.walk(home):
        for name in names:
            if name not in GROWING or "checkpoints" in parent:
                yield Path(parent, name)


def sum_of(path: Path) -> str | None:
    if path.is_symlink() and not path.exists():
        return None
    return hashlib.sha256(path.read_bytes()).hexdigest()
