"""One form for each text, and the hash of that form, which decides what is a duplicate and what is held out.

Both decisions depend on the document alone: not on its file, its place in it, or how many documents there are. Where
they hold out nothing, a document's end can be held out instead; where that is cut is decided here too.
"""

import hashlib
import re
import unicodedata
from typing import Literal

LEAST = 32  # characters on either side of a cut: less tells nothing of a model
_BREAKS = tuple(map(re.compile, (r"\n(?:[^\S\n]*\n)+", r"\n", r"\s+")))  # paragraphs, lines, words
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all of Unicode's Cc but newline and tab


def normalise(text: str) -> str:
    """`text` in NFC with \\n line ends, without control characters (but \\n and \\t) and without trailing white space.

    Normalising twice changes nothing.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return unicodedata.normalize("NFC", _CONTROL.sub("", text)).rstrip()


def key_of(text: str) -> bytes:
    """16 bytes that tell a normalised text from any other: equal for exact duplicates only."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def split_of(text: str, valid_fraction: float) -> Literal["train", "valid"]:
    """The side of a normalised text; a larger `valid_fraction` only adds to the documents held out by a smaller."""
    return "valid" if int.from_bytes(key_of(text)[:8], "big") < valid_fraction * 2**64 else "train"


def part_of(text: str, parts: int) -> int:
    """Which of `parts` equal parts, from 0, a normalised text belongs to; independent of its side."""
    return int.from_bytes(key_of(text)[8:], "big") % parts


def place_of_cut(text: str, characters: int) -> int | None:
    """Where a normalised text is cut so that about `characters` of it, up to twice as many, lie behind the cut: where a
    paragraph begins, else a line, else a word; anywhere in a text without spaces. None: it is too short to be cut."""
    begin = len(text) - len(text.lstrip())
    size = min(max(characters, LEAST), (len(text) - begin) // 2)
    if size < LEAST:
        return None
    earliest, latest = max(begin + LEAST, len(text) - 2 * size), len(text) - size
    for pattern in _BREAKS:
        if places := [found.end() for found in pattern.finditer(text, earliest, latest)]:
            return places[-1]
    while latest > earliest and unicodedata.category(text[latest])[0] == "M":  # marks stay with their letter
        latest -= 1
    return latest


def cut_at(text: str, place: int) -> tuple[str, str]:
    """What lies before and behind a cut, each a normalised text."""
    return text[:place].rstrip(), text[place:].lstrip("\n")
