"""Filters by language and quality: which documents are not worth training on, by rules that the config sets.

Each rule is off until it is given. A document that breaks several is counted under the first.
"""

import re
from collections.abc import Callable
from typing import Any

import pydantic

from data.preparation.words import MARKED_LETTER, spaced_words_of
from settings import Problem, Section

_PLAIN = re.compile(rf"(?:{MARKED_LETTER}|[\s.,;:!?'\"()\-–—‘’“”…])+")
LANGUAGE_CHARACTERS = 2000  # of a document that are enough to tell its language


class FilterSection(Section):
    """What a document must be to be kept; null or empty: anything."""

    languages: list[str] = []  # ISO 639-1 codes, e.g. [en, de]
    min_words: int | None = pydantic.Field(None, ge=1)
    max_words: int | None = pydantic.Field(None, ge=1)
    min_word_length: float | None = pydantic.Field(None, gt=0)  # mean, in characters
    max_word_length: float | None = pydantic.Field(None, gt=0)
    # share of the characters that are no letter (with its marks), digit, white space or common punctuation
    max_symbols: float | None = pydantic.Field(None, ge=0, lt=1)
    max_repeated_lines: float | None = pydantic.Field(None, ge=0, lt=1)  # share of the lines that came before in it

    def problems(self) -> list[Problem]:
        found = []
        if unknown := sorted(set(self.languages) - _known_languages()) if self.languages else []:
            remedy = "use ISO 639-1 codes of two letters, such as en, de, fr"
            found.append(Problem("languages", unknown, remedy))
        for low, high in (("min_words", "max_words"), ("min_word_length", "max_word_length")):
            least, most = getattr(self, low), getattr(self, high)
            if least is not None and most is not None and least > most:
                found.append(Problem(high, most, f"use at least {low} ({least})"))
        return found


def fault(text: str, rules: FilterSection) -> str | None:
    """The rule that a normalised text breaks, as one word to count by; None if it may stay."""
    return next((name for name, breaks in _RULES.items() if breaks(text, rules)), None)


def _too_few_words(text: str, rules: FilterSection) -> bool:
    return rules.min_words is not None and len(spaced_words_of(text)) < rules.min_words


def _too_many_words(text: str, rules: FilterSection) -> bool:
    return rules.max_words is not None and len(spaced_words_of(text)) > rules.max_words


def _odd_words(text: str, rules: FilterSection) -> bool:
    if rules.min_word_length is None and rules.max_word_length is None:
        return False
    words = spaced_words_of(text)
    mean = sum(map(len, words)) / len(words) if words else 0.0
    return not (rules.min_word_length or 0.0) <= mean <= (rules.max_word_length or float("inf"))


def _too_many_symbols(text: str, rules: FilterSection) -> bool:
    if rules.max_symbols is None:
        return False
    return 1 - sum(map(len, _PLAIN.findall(text))) / max(len(text), 1) > rules.max_symbols


def _repeats_lines(text: str, rules: FilterSection) -> bool:
    if rules.max_repeated_lines is None:
        return False
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    return len(lines) - len(set(lines)) > rules.max_repeated_lines * len(lines)


def _other_language(text: str, rules: FilterSection) -> bool:
    return bool(rules.languages) and _identifier().classify(text[:LANGUAGE_CHARACTERS])[0] not in rules.languages


_RULES: dict[str, Callable[[str, FilterSection], bool]] = {
    "too_few_words": _too_few_words,
    "too_many_words": _too_many_words,
    "odd_words": _odd_words,
    "too_many_symbols": _too_many_symbols,
    "repeated_lines": _repeats_lines,
    "other_language": _other_language,
}


def _known_languages() -> set[str]:
    return {label for label, _ in _identifier().rank("a")}


def _identifier() -> Any:
    import py3langid  # naive Bayes over byte n-grams; its model of 97 languages comes with it

    return py3langid
