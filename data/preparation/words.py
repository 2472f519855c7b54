"""What a word is wherever documents are compared or counted by their words: for near-duplicates, decontamination and
the filters.

A letter keeps the marks that are written on it (vowel signs, accents, tones), in every script: without them words of
Hindi, Tamil or vocalised Arabic fall apart into consonants, which other words share. A number is a word, and so is what
is left of letters between numbers and other signs. In scripts that put no spaces between words (Chinese, Japanese,
Thai, ...) every letter, with its marks, counts as a word.
"""

import itertools
import re
import unicodedata

_WITH_MARKS = (range(0x300, 0x20000), range(0xE0100, 0xE01F0))  # code points: looking through all takes 0.2 s
# Zero width (non-)joiner: they choose the form of the letters beside them, within words of Persian, Sinhala and others.
_JOINERS = "\u200c\u200d"


def _marks() -> str:
    """All combining marks, as the inside of a regular expression's character class."""
    codes = (code for code in itertools.chain(*_WITH_MARKS) if unicodedata.category(chr(code))[0] == "M")
    found = []
    for _, run in itertools.groupby(enumerate(codes), lambda pair: pair[1] - pair[0]):
        run = [code for _, code in run]
        found.append(f"{chr(run[0])}-{chr(run[-1])}")
    return "".join(found) + _JOINERS


_UNSPACED = "".join((
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff",  # Thai, Lao; Myanmar; Khmer
    "\u1950-\u19df\u1a20-\u1aaf\uaa60-\uaadf\ua9e0-\ua9ff",  # the Tai scripts, more of Myanmar
    "\u1b00-\u1b7f\ua980-\ua9df",  # Balinese, Javanese
    "\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\uff66-\uff9f\U0001b000-\U0001b16f",  # kana
    "\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff\ua000-\ua4cf",  # Chinese characters; Yi
))  # fmt: skip
_MARK = rf"(?=[^\x00-\u02ff])[{_marks()}]"  # looks at the code point first, which is quicker than the class
_LETTER = rf"[^\W\d{_UNSPACED}]"
_WORD = re.compile(rf"\d+(?:[.,]\d+)*|{_LETTER}+(?:(?:{_MARK})+{_LETTER}*)*|(?=\w)[{_UNSPACED}](?:{_MARK})*")
_SPACED = re.compile(rf"\w+(?:(?:{_MARK})+\w*)*")
MARKED_LETTER = rf"\w(?:{_MARK})*"  # a letter or digit and what is written on it, as a regular expression


def words_of(text: str) -> list[str]:
    """The words of `text`, in order, as they are written."""
    return _WORD.findall(text)


def spaced_words_of(text: str) -> list[str]:
    """The runs of letters and digits of `text` with their marks: in scripts without spaces, whole clauses."""
    return _SPACED.findall(text)
