"""Files are found, read through their compression, and known for what they are."""

import bz2
import gzip
import io
import lzma

import pyarrow
import pytest

from storage import inputs

TEXT = "".join(f"line {number}: größer\n" for number in range(20_000)).encode()


def packed(codec: str, data: bytes) -> bytes:
    stream = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(stream, codec) as file:
        file.write(data)
    return stream.getvalue().to_pybytes()


PACK = {
    "gzip": gzip.compress, "xz": lzma.compress, "bz2": bz2.compress,
    "zstd": lambda data: packed("zstd", data), "lz4": lambda data: packed("lz4", data), None: bytes,
}  # fmt: skip


@pytest.mark.parametrize("how", PACK)
@pytest.mark.parametrize("name", ["corpus.txt", "corpus.gz"])
def test_newcomer_compression_is_told_by_content_and_members_are_joined(tmp_path, how, name):
    path = tmp_path / name
    path.write_bytes(PACK[how](TEXT) + PACK[how](TEXT))
    assert inputs.compression(path) == how and inputs.fault(path) is None
    with inputs.reading(path) as file:
        first = file.readline()
        assert first + file.read() == TEXT + TEXT
    path.write_bytes(PACK[how](b""))
    with inputs.reading(path) as file:
        assert file.read() == b""


@pytest.mark.parametrize(("how", "damage"), [(how, "cut") for how in PACK if how] + [
    (how, "flip") for how in ("gzip", "bz2", "xz")  # which hold a sum of their content; of the others some files do
])
def test_newcomer_a_damaged_stream_is_an_error_and_no_short_corpus(tmp_path, how, damage):
    data = bytearray(PACK[how](TEXT))
    if damage == "cut":
        del data[-len(data) // 3 :]
    else:
        data[len(data) // 2 : len(data) // 2 + 8] = bytes(8)
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(OSError), inputs.reading(tmp_path / "a") as file:  # noqa: PT011  each codec has its own words
        while file.read(2**16):
            pass


def test_newcomer_a_path_is_found_as_it_stands_before_it_is_a_pattern(tmp_path):
    names = ["[en] books/a.txt", "[en] books/b.txt", "e/c.txt", "what?/[1]/a.txt", "1/a.txt", "x*/deep/er/a.txt",
             "xy/a.txt", ".hidden/a.txt"]  # fmt: skip
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)

    def found(pattern: str) -> list[str]:
        return [str(path.relative_to(tmp_path)) for path in inputs.find(f"{tmp_path}/{pattern}")]

    assert found("[en] books/*.txt") == names[:2]
    assert found("[en] books/a.txt") == names[:1]
    assert found("what?/[1]/*") == names[3:4]
    assert found("*/[1]/*.txt") == names[3:4]  # behind a pattern too
    assert found("x*/**/*.txt") == names[5:6]  # that folder, not also xy
    assert found("x?/*.txt") == names[6:7]
    assert found("[a-e]/*.txt") == names[2:3]  # nothing is called so: a pattern
    assert found("**/a.txt") == sorted(name for name in names if name.endswith("a.txt") and name[0] != ".")
    assert found("**") == sorted(name for name in names if name[0] != ".")
    assert found("no/*.txt") == found("e") == []


def test_patterns_are_those_of_glob(tmp_path, monkeypatch):
    import glob
    from pathlib import Path

    for name in ("a/1.txt", "a/b/2.txt", "a/b/c/3.txt", "d/4.jsonl", "5.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    monkeypatch.chdir(tmp_path)
    for pattern in ("*.txt", "**/*.txt", "a/**", "./a/*/*", "*/*.[jt]*", "a/**/c/**/*.txt", "../*/a/1.txt", "5.txt"):
        expected = {Path(name) for name in glob.glob(pattern, recursive=True)}
        assert inputs.find(pattern) == sorted(path for path in expected if path.is_file()), pattern


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"6a" * 32 + b"\nsize 146946961\n"


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", POINTER, "Git LFS pointer.*git lfs pull"),
        ("a.parquet", POINTER.replace(b"\n", b"\r\n"), "Git LFS pointer"),
        ("a.jsonl.gz", b"<!DOCTYPE html>\n<html>", r"web page \(HTML\).*/resolve/"),
        ("a.jsonl?download=true", b"\xef\xbb\xbf \n<HTML lang=en>", "web page"),
        ("a.txt", b'<?xml version="1.0"?>\n<!-- x -->\n<!doctype HTML PUBLIC>', "web page"),
        ("a.txt", gzip.compress(b"<html><body>Sign in", mtime=0), "web page"),
        ("a.jsonl", b"Entry not found", "a server said.*Entry not found.*download"),
        ("a.jsonl", b"404: Not Found", "a server said"),
        ("a.json", b'<?xml version="1.0"?><Error><Code>AccessDenied</Code>', "a server said.*AccessDenied"),
        ("a.txt", b"/annex/objects/SHA256E-s123--abc.txt\n", "git annex get"),
        ("a.txt", b"PK\x03\x04....", "unpack .*zip archive"),
        ("a.gz", gzip.compress(bytes(257) + b"ustar  ", mtime=0), "unpack .*tar archive"),
        ("page.html", b"<!DOCTYPE html>\n<html>", None),  # named for what it is
        ("story.txt", b"version https is a story about <html> tags.\nEntry not found, it said.", None),
        ("story.txt", POINTER[:30], None),
        ("empty.txt", b"", None),
    ],
)
def test_newcomer_what_stands_in_for_a_file_is_named(tmp_path, name, content, says):
    import re

    path = tmp_path / name
    path.write_bytes(content)
    fault = inputs.fault(path)
    assert (fault is None) if says is None else (re.search(says, fault) and str(path) in fault and "\n" not in fault)


def test_a_stream_stays_small(tmp_path):
    """Of a file that unpacks to much more than is asked for, little is unpacked."""
    path = tmp_path / "bomb.gz"
    path.write_bytes(gzip.compress(bytes(200_000_000), compresslevel=1))
    before = pyarrow.total_allocated_bytes()
    with inputs.reading(path) as file:
        assert isinstance(file, io.BufferedIOBase) and file.read(10) == bytes(10)
        assert pyarrow.total_allocated_bytes() - before < 2_000_000
