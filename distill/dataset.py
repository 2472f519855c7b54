"""A filtered dataset as a folder that `datasets.load_dataset` reads, and its way to the Hub.

    datasets/NAME-FINGERPRINT/   README.md (the card)   filter.json   filter.md   manifest.json
        data/train-00000-of-00001.parquet   prompt | completion | id | answer | source | teacher | tokens
        all/train-00000-of-00001.parquet    every trace as it was, source, teacher, reason

`prompt` and `completion` are lists of {role, content}; the prompt is the question alone, as one user message. Of new
questions there is a column `question` in their place. Traces of test problems have `test` for `train` everywhere, so
that nothing that reads training data finds them.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from data.preparation import clean
from distill import report, traces
from distill.problems import id_of
from distill.selection import KEPT, Decision, new_question, question_of
from storage import folder

CARD, JSON, MARKDOWN = "README.md", "filter.json", "filter.md"
BATCH = 1024  # rows written at a time

Row = Mapping[str, Any]


def write(path: Path, rows: Iterable[tuple[Row, Decision]], about: Mapping[str, Any]) -> None:
    """Write the folder, all of it or nothing; `rows` have `source` and `teacher` beside a trace's columns.

    Raises:
        OSError: the disk is full, or `path` is there.
    """
    file = f"{about['split']}-00000-of-00001.parquet"
    with folder.write(path) as temporary, contextlib.ExitStack() as held:
        kept = held.enter_context(_Table(temporary / "data" / file, _kept_schema(about["task"])))
        every = held.enter_context(_Table(temporary / "all" / file, _every_schema()))
        make = _solution if about["task"] == "solve" else _question
        for row, decision in rows:
            every.add({**row, "reason": decision.reason})
            if decision.reason == KEPT:
                kept.add(make(row, decision))
        held.close()
        (temporary / JSON).write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        (temporary / MARKDOWN).write_text(report.markdown(about), encoding="utf-8")
        (temporary / CARD).write_text(report.card(about, with_all=True), encoding="utf-8")


def _solution(row: Row, decision: Decision) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": question_of(row)}],
        "completion": [{"role": "assistant", "content": clean.normalise(row["text"]).strip()}],
        **{name: row[name] for name in ("id", "source", "teacher", "tokens")},
        "answer": decision.answer,
    }


def _question(row: Row, decision: Decision) -> dict[str, Any]:
    question = new_question(row["text"])
    about = {name: row[name] for name in ("source", "teacher", "tokens")}
    return {"id": id_of(question), "question": question, "answer": None, **about}


def _kept_schema(task: str) -> Any:
    import pyarrow

    text = pyarrow.string()
    message = pyarrow.list_(pyarrow.struct([("role", text), ("content", text)]))
    what = [("prompt", message), ("completion", message)] if task == "solve" else []
    other = [("question", text)] if task == "write" else []
    return pyarrow.schema([*what, ("id", text), *other, ("answer", text), ("source", text), ("teacher", text),
                           ("tokens", pyarrow.int32())])  # fmt: skip


def _every_schema() -> Any:
    import pyarrow

    schema = pyarrow.schema(list(traces.schema()))
    for name in ("source", "teacher", "reason"):
        schema = schema.append(pyarrow.field(name, pyarrow.string()))
    return schema


class _Table:
    """A parquet file that grows row by row."""

    def __init__(self, path: Path, schema: Any):
        import pyarrow.parquet

        path.parent.mkdir()
        self._schema, self._rows = schema, []
        self._writer = pyarrow.parquet.ParquetWriter(path, schema, compression="zstd")

    def add(self, row: Row) -> None:
        self._rows.append(row)
        if len(self._rows) == BATCH:
            self._flush()

    def _flush(self) -> None:
        import pyarrow

        self._writer.write_table(pyarrow.Table.from_pylist(self._rows, self._schema))
        self._rows = []

    def __enter__(self) -> "_Table":
        return self

    def __exit__(self, *error: Any) -> None:
        if error[0] is None:
            self._flush()
        self._writer.close()


@contextlib.contextmanager
def public(path: Path, with_all: bool, target: Path | None = None) -> Iterator[Path]:
    """The folder as it goes to the Hub: without the traces that were not kept, unless `with_all`, and with a card that
    says so. It is made anew at `target` and stays there, or without one beside `path` and goes afterwards."""
    made = target or path.with_name(f".public-{path.name}")
    if made.exists():
        folder.remove(made)
    about = json.loads((path / JSON).read_text(encoding="utf-8"))
    with folder.write(made) as temporary:
        for name in folder.sums(path):
            if name == CARD or (name.startswith("all/") and not with_all):
                continue
            (temporary / name).parent.mkdir(exist_ok=True)
            try:
                os.link(path / name, temporary / name)
            except OSError:  # a file system without further names
                shutil.copyfile(path / name, temporary / name)
        (temporary / CARD).write_text(report.card(about, with_all), encoding="utf-8")
    try:
        yield made
    finally:
        if target is None:
            folder.remove(made)


def upload(path: Path, name: str, with_all: bool, private: bool) -> str:
    """Upload the dataset as one commit; returns its address. Whatever the Hub's client raises, it raises."""
    import huggingface_hub

    about = json.loads((path / JSON).read_text(encoding="utf-8"))
    hub = huggingface_hub.HfApi()
    address = hub.create_repo(name, repo_type="dataset", private=private, exist_ok=True)
    message = f"{about['name']}-{about['fingerprint']}: {about['reasons'][KEPT]:,} rows"
    with public(path, with_all) as tree:
        # what an earlier upload left, `all` above everything, must not stay behind
        stale = [f"{part}/*" for part in ("data", "all")]
        hub.upload_folder(repo_id=name, repo_type="dataset", folder_path=tree, delete_patterns=stale,
                          commit_message=message)  # fmt: skip
    return str(address)
