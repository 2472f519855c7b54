"""However a source is cut into pieces, they give every row once, in order, with its place in the file."""

import json
import random

import pyarrow
import pyarrow.parquet
import pytest

from data import sources
from data.sources import BadRow

LINES = [json.dumps({"text": f"row {n} " + "word " * (n % 7)}) for n in range(60)]
LINES[5] = LINES[41] = "{no json"
LINES[20] = ""


def rows_of(source: str, count=None) -> list:
    """All rows of all pieces; bad ones as (reason, place in the file)."""
    found, before, place = [], 0, None
    for piece in sources.pieces(source, "train", count, seed=3):
        before = 0 if piece.place != place else before
        place = piece.place
        for row in sources.read_piece(piece):
            found.append((row.reason, row.line + before) if isinstance(row, BadRow) else row)
        before += sources.lines_of(piece)
    return found


@pytest.fixture(params=[1, 2, 10, 33, 64, 100, 999, 10**9])
def piece_bytes(request, monkeypatch) -> int:
    monkeypatch.setattr(sources, "PIECE_BYTES", request.param)
    monkeypatch.setattr(sources, "PIECE_DOCUMENTS", max(1, request.param // 10))
    return request.param


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("last", [True, False])
def test_json_lines(tmp_path, piece_bytes, ending, last):
    path = tmp_path / "a.jsonl"
    path.write_bytes((ending.join(LINES) + (ending if last else "")).encode())
    found = rows_of(f"jsonl:{path}")
    assert [row for row in found if isinstance(row, tuple)] == [("bad_json", 6), ("bad_json", 42)]
    texts = [json.loads(line)["text"] for line in LINES if "row" in line]
    assert [row for row in found if isinstance(row, str)] == texts


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_text(tmp_path, piece_bytes, ending):
    draw = random.Random(4)
    documents = [ending.join("line " * draw.randrange(4) + str(n) for _ in range(draw.randrange(1, 6)))
                 for n in range(40)]  # fmt: skip
    documents[9:12] = [f"{ending}after a blank line {n}" for n in range(3)]
    documents[7] = f"x<|endoftext|>{ending}<|endoftext|>x"  # not lines that are exactly the separator
    data = f"{ending}<|endoftext|>{ending}".join(documents).encode()
    (tmp_path / "a.txt").write_bytes(data)
    (tmp_path / "b.txt").write_bytes(b"<|endoftext|>\nfirst\n<|endoftext|>\n<|endoftext|>\n\xff\n<|endoftext|>\nend")
    found = rows_of(f"text:{tmp_path}/?.txt")
    assert [row.rstrip("\r\n") for row in found[:40]] == documents
    assert found[40:] == ["first\n", ("bad_utf8", 5), "end"]


def test_parquet(tmp_path, piece_bytes):
    path = tmp_path / "a.parquet"
    texts = [f"row {n}" for n in range(50)]
    texts[33] = None
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=7)
    expected = [("missing_field", 34) if text is None else text for text in texts]
    assert rows_of(f"parquet:{path}") == expected


def test_embedded(piece_bytes):
    whole = list(sources.documents("embedded:stories", count=30, seed=3))
    assert rows_of("embedded:stories", count=30) == whole


@pytest.mark.parametrize("kind", ["jsonl", "text", "parquet"])
def test_newcomer_small_files_are_put_together_in_their_order(tmp_path, kind, piece_bytes):
    for number in range(40):
        path, texts = tmp_path / f"{number:02d}", [f"file {number}", "word " * (number % 9)]
        if kind == "parquet":
            pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=1)
        else:
            lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
            path.write_text(lines if kind == "jsonl" else "\n<|endoftext|>\n".join(texts))
    apart = sources.pieces(f"{kind}:{tmp_path}/*", "train", None, 0)
    groups = sources.together(apart)
    assert [piece for group in groups for piece in group] == apart
    for group in groups:
        assert len(group) == 1 or sum(max(piece.size, sources.OPENING) for piece in group) <= piece_bytes
    assert len(groups) == (1 if piece_bytes == 10**9 else len(apart))
    assert len(sources.together([*apart, *sources.pieces(f"{kind}:{tmp_path}/*", "valid", None, 0)])) == 2 * len(groups)


def test_empty_files_have_no_rows(tmp_path, piece_bytes):
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).touch()
    assert rows_of(f"jsonl:{tmp_path}/*.jsonl") == []


def test_a_line_or_document_that_is_too_long_is_a_bad_row(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "LONGEST_ROW", 1000)
    (tmp_path / "a.jsonl").write_text("\n".join([LINES[0], '{"text": "' + "x" * 5000 + '"}', LINES[1]]))
    found = rows_of(f"jsonl:{tmp_path}/a.jsonl")
    assert found[1] == ("too_long", 2) and len(found) == 3
    (tmp_path / "a.txt").write_text("one\n<|endoftext|>\n" + "long line\n" * 500 + "<|endoftext|>\ntwo\n")
    found = rows_of(f"text:{tmp_path}/a.txt")
    assert found == ["one\n", ("too_long", 3), "two\n"]
