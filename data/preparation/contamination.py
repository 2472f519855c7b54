"""Decontamination: does a document hold a question that the model will be examined with?

Questions and documents are compared as words in lower case with every number replaced by one sign, whether it is in
digits (1,200, 1 200, 1/2) or spelled out in English (one hundred and five), so that a question with other numbers is
found like the question itself. A document holds a question when half of the question's n-grams of 8 words occur in it;
a question of 4 to 7 words must occur whole, a shorter one must be the whole document.
"""

import collections
import json
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path

from data import sources
from data.preparation.words import words_of

NGRAM, SHORTEST = 8, 4  # words
CONTAINED = 0.5  # share of a question's n-grams
_SCALES = {"hundred", "thousand", "million", "billion", "trillion"}
_NUMBER_WORDS = _SCALES | {
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "dozen",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
    "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety",
}  # fmt: skip


def masked_words(text: str) -> list[str]:
    """The words of `text` in lower case and NFKC, each number, of however many words, as 0."""
    masked: list[str] = []
    words = words_of(unicodedata.normalize("NFKC", text).lower())
    for before, word, after in zip(["", *words], words, [*words[1:], ""], strict=False):
        if _is_number(word):
            if masked[-1:] != ["0"]:
                masked.append("0")
        elif not (word == "and" and before in _SCALES and _is_number(after)):
            masked.append(word)
    return masked


def _is_number(word: str) -> bool:
    return word[:1].isdecimal() or word in _NUMBER_WORDS


def _ngrams(words: list[str], length: int) -> set[str]:
    return {" ".join(words[start : start + length]) for start in range(len(words) - length + 1)}


def read_questions(key: str, source: str, field: str, split: sources.Split) -> list[str]:
    """All questions of an evaluation set: one that cannot be read would be looked for in no document.

    Args:
        key: what asked for them, to be named in errors.

    Raises:
        sources.SourceError: a row holds no question, or there is none.
    """
    with sources.named_by(key):
        rows = list(sources.documents(source, field, split))
    bad = next((row for row in rows if isinstance(row, sources.BadRow)), None)
    blank = sum(isinstance(row, str) and not row.strip() for row in rows)
    if bad is not None or blank or not rows:
        why = f"{bad.where}: {bad.detail}" if bad else f"{source} is empty"
        why = f"{blank:,} of {len(rows):,} are blank" if blank and not bad else why
        raise sources.SourceError(f"{key}: every row must hold a question ({why}): mend it, or name another field")
    return rows


class Questions:
    """The questions of all evaluation sets, ready to be looked for."""

    def __init__(self, sets: Mapping[str, Iterable[str]]):
        self._names: list[str] = []  # of the set, by question
        self._sizes: list[int] = []  # n-grams, by question
        self._where: dict[int, dict[str, list[int]]] = collections.defaultdict(dict)  # length -> n-gram -> questions
        self._whole: dict[str, str] = {}  # of the shortest: all words -> name of the set
        for name, texts in sets.items():
            for text in texts:
                self._add(name, masked_words(text))

    def _add(self, name: str, words: list[str]) -> None:
        if not words:
            return
        if len(words) < SHORTEST:
            self._whole.setdefault(" ".join(words), name)
            return
        length = min(len(words), NGRAM)
        ngrams = _ngrams(words, length)
        for ngram in ngrams:
            self._where[length].setdefault(ngram, []).append(len(self._names))
        self._names.append(name)
        self._sizes.append(len(ngrams))

    def held_by(self, text: str) -> str | None:
        """The name of the set of which `text` holds a question; None if it holds none."""
        words = masked_words(text)
        if len(words) < SHORTEST:
            return self._whole.get(" ".join(words))
        for length, where in self._where.items():
            hits: collections.Counter[int] = collections.Counter()
            for ngram in _ngrams(words, length) & where.keys():
                hits.update(where[ngram])
            for question, count in hits.items():
                if count >= CONTAINED * self._sizes[question]:
                    return self._names[question]
        return None

    def save(self, path: Path) -> None:
        """Write them for other processes."""
        path.write_text(json.dumps([self._names, self._sizes, self._where, self._whole]), encoding="utf-8")

    @staticmethod
    def load(path: Path) -> "Questions":
        """What `save` wrote."""
        found = Questions({})
        found._names, found._sizes, where, found._whole = json.loads(path.read_text(encoding="utf-8"))
        found._where = {int(length): ngrams for length, ngrams in where.items()}
        return found
