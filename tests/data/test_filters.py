"""Each filter drops what it names, and nothing when it is off."""

import pytest

from data.preparation.filters import FilterSection, fault
from settings import ConfigError, validate

ENGLISH = "The little dog ran to the river, and the children laughed because the water was cold."
GERMAN = "Der kleine Hund lief zum Fluss, und die Kinder lachten, weil das Wasser so kalt war."


@pytest.mark.parametrize(
    ("rules", "text", "reason"),
    [
        ({"min_words": 4}, "only three words", "too_few_words"),
        ({"min_words": 3}, "only three words", None),
        ({"max_words": 2}, "only three words", "too_many_words"),
        ({"min_word_length": 3}, "a b c d", "odd_words"),
        ({"max_word_length": 10}, "x" * 40, "odd_words"),
        ({"min_word_length": 3, "max_word_length": 10}, ENGLISH, None),
        ({"max_symbols": 0.2}, "@@@ ### {{{ }}} a", "too_many_symbols"),
        ({"max_symbols": 0.05}, ENGLISH, None),
        ({"max_repeated_lines": 0.3}, "buy now\n" * 5 + "really", "repeated_lines"),
        ({"max_repeated_lines": 0.3}, "one\ntwo\n\n\nthree", None),
        ({"languages": ["en"]}, GERMAN, "other_language"),
        ({"languages": ["en"]}, ENGLISH, None),
        ({"languages": ["fr", "de"]}, GERMAN, None),
        ({}, "@@@@", None),
    ],
)
def test_rules(rules, text, reason):
    assert fault(text, validate(FilterSection, rules)) == reason


@pytest.mark.parametrize(
    ("rules", "told"),
    [
        ({"languages": ["english"]}, "ISO 639-1"),
        ({"min_words": 5, "max_words": 4}, "use at least min_words"),
        ({"max_symbols": 2}, "less than 1"),
    ],
)
def test_wrong_rules_are_reported(rules, told):
    with pytest.raises(ConfigError, match=told):
        validate(FilterSection, rules)
