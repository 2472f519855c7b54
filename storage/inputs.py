"""The files that people bring: found by a path or a pattern, read through their compression, and known for what they
are when they are not what their name says (a Git LFS pointer, an error page, an archive).

Compression is told by a file's first bytes, not by its name: a browser unpacks what it saves as `x.gz`, and no text
begins with any of these bytes. A stream takes some hundred kilobytes of memory, however large the file is.
"""

import contextlib
import glob
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

PACKED_TO = 3  # times smaller, about, is text that is compressed
HEAD = 512  # bytes by which a file is known
# By their first bytes. pyarrow reads these as streams, several members or frames behind one another included; what it
# does not read, Python does (xz).
COMPRESSIONS = {
    b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"\x04\x22\x4d\x18": "lz4", b"\xfd7zXZ\0": "xz",
}  # fmt: skip
_BZIP2 = re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)")  # of a file with content, and of an empty one
_SKIPPABLE = re.compile(rb"[\x50-\x5f]\x2a\x4d\x18")  # a zstd frame of no content, with which some writers begin
ARCHIVES = {b"PK\x03\x04": "zip archive", b"7z\xbc\xaf\x27\x1c": "7z archive", b"Rar!": "rar archive"}
# What a page may be called that is one on purpose has a name of its own: pages and code are corpora too.
_NAMES_OF_TEXT = {"", ".txt", ".text", ".jsonl", ".json", ".ndjson", ".parquet", ".gz", ".zst", ".bz2", ".xz", ".lz4"}
_LFS = re.compile(rb"version https?://[\w.-]+/(spec/v|v/)\d+\r?\n(?s:.*\n)?oid \w+:[0-9a-f]+\r?\n")
_ANNEX = re.compile(rb"/annex/objects/[\w-]+--\S+\s*")
_PAGE = re.compile(rb"\s*(<(\?xml|!--).*?>\s*)*<(!doctype\s+html|html)\b", re.IGNORECASE | re.DOTALL)
_ERROR = re.compile(  # what stores answer in place of a file: S3 and its like, the Hub, GitHub
    rb"\s*(<\?xml[^>]*\?>\s*)?<Error>\s*<Code>.*|(404: Not Found|Entry not found|Repository not found"
    rb"|Invalid username or password\.?|Access to (model|dataset) \S+ is restricted.*)\s*", re.DOTALL
)  # fmt: skip
_DOWNLOAD = (
    "download the file itself (on the Hub the address with /resolve/ in place of /blob/, on GitHub the raw one; logged "
    "in where it is gated)"
)


def find(pattern: str) -> list[Path]:
    """The files of a path or pattern (`*`, `?`, `[..]`, `**` for folders at any depth), sorted. Each name in it that
    is there as it stands is that, whatever signs it holds; only another is a pattern."""
    path = Path(pattern).expanduser()
    base = Path(path.anchor) if path.anchor else Path()
    return sorted({found for found in _matches(base, path.relative_to(base).parts) if found.is_file()})


def _matches(base: Path, names: tuple[str, ...]) -> Iterator[Path]:
    if not names:
        yield base
        return
    name, *others = names
    if os.path.lexists(base / name):
        yield from _matches(base / name, tuple(others))
    elif glob.has_magic(name):
        folders_only = os.sep if others else ""
        if name == "**" and others:
            yield from _matches(base, tuple(others))
        for found in glob.iglob(name + folders_only, root_dir=base, recursive=True):
            yield from _matches(base / found, tuple(others))


def compression(path: Path) -> str | None:
    """How a file is compressed: gzip, zstd, bz2, lz4 or xz; None if it is not. Raises OSError."""
    with open(path, "rb") as file:
        return _compression_of(file.read(16))


def _compression_of(begins: bytes) -> str | None:
    if _BZIP2.match(begins):
        return "bz2"
    if _SKIPPABLE.match(begins):
        return "zstd"
    return next((name for magic, name in COMPRESSIONS.items() if begins.startswith(magic)), None)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[BinaryIO]:
    """The content of a file as a stream of bytes, unpacked on the way; it can be sought in unless it is compressed.

    Raises:
        OSError: it cannot be read; while it is read also: it is cut short or damaged.
    """
    with open(path, "rb") as file:
        packed = _compression_of(file.peek(16)[:16])
        if packed is None:
            yield file
            return
    if packed == "xz":
        import lzma

        with lzma.open(path) as file:
            try:
                yield file
            except (lzma.LZMAError, EOFError) as error:
                raise OSError(str(error)) from error
    else:
        import pyarrow

        with pyarrow.input_stream(str(path), compression=packed) as stream, io.BufferedReader(stream, 2**18) as file:
            yield file


def text_bytes(path: Path) -> int:
    """How many bytes of text a file holds: exact, unless it is compressed. Raises OSError."""
    return path.stat().st_size * (1 if compression(path) is None else PACKED_TO)


def fault(path: Path) -> str | None:
    """Why a file is no corpus, with what to do, as far as its first bytes tell; None if nothing speaks against it."""
    if not os.access(path, os.R_OK):
        return f"make {path} readable"
    try:
        with reading(path) as file:
            head = file.read(HEAD)
    except OSError as error:
        return f"{path} cannot be read ({error}): get it again, whole"
    if archive := next((name for magic, name in ARCHIVES.items() if head.startswith(magic)), None):
        return f"unpack {path}: it is a {archive}, in which there may be many files"
    if head[257:262] == b"ustar":
        return f"unpack {path}: it is a tar archive, in which there may be many files"
    if _LFS.match(head):
        return (f"{path} is a Git LFS pointer, not the file it stands for: run `git lfs pull` in its repository, or "
                + _DOWNLOAD)  # fmt: skip
    if _ANNEX.fullmatch(head):
        return f"{path} is a git-annex pointer, not the file it stands for: run `git annex get` on it"
    if _ERROR.fullmatch(head):
        said = " ".join(head.decode(errors="replace").split())[:80]
        return f"{path} holds what a server said in place of the file ({said}): {_DOWNLOAD}"
    named = Path(path.name.partition("?")[0]).suffix.lower()  # of x.jsonl?download=true
    if _PAGE.match(head.removeprefix(b"\xef\xbb\xbf")) and named in _NAMES_OF_TEXT:
        return f"{path} is a web page (HTML), not a corpus: {_DOWNLOAD}; a page that is one is named .html"
    return None
