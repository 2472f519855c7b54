"""What counts as a correct answer: exactly the number after "####", and nothing that merely resembles it."""

from fractions import Fraction

import pytest

from evaluation.answers import extract_answer, is_correct


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("#### 7", 7),
        ("She has 3+4=7.\n#### 7", 7),
        ("####7", 7),
        ("#### 7  \nand more", 7),
        ("#### 0", 0),
        ("#### -12", -12),
        ("#### $5", 5),
        ("#### -$5", -5),
        ("#### $-5", -5),
        ("#### 1,234", 1234),
        ("#### 12,345,678.50", Fraction("12345678.5")),
        ("#### 1234567", 1234567),
        ("#### 0.1", Fraction(1, 10)),
        ("#### 3\n#### 4", 3),
        ("#### nothing\n#### 4", 4),
    ],
)
def test_reads_the_first_line_that_is_an_answer(text, answer):
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    "text",
    ["", "7", "The answer is 7.", "### 7", "#### ", "#### 7 apples", "#### 7.", "#### 1,23", "#### 12,34,567",
     "#### .5", "#### -$-5", "#### --5", "#### 3/4", "#### 1e3", "#### ٣", "so #### 7"],
)  # fmt: skip
def test_refuses_what_is_not_exactly_an_answer(text):
    assert extract_answer(text) is None
    assert not is_correct(text, 7)


def test_compares_exactly():
    assert is_correct("#### 1,000.0", 1000)
    assert is_correct("#### 0.1", Fraction(1, 10))
    assert not is_correct("#### 0.1", Fraction(1, 3))
    assert not is_correct("#### 70", 7)
