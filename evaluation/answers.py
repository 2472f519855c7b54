"""What counts as a correct answer to a word problem: the number after "####", compared exactly."""

import re
from fractions import Fraction

# A line "#### N": an optional sign and dollar, thousands by comma or none, an optional fraction, nothing else after it.
_FINAL = re.compile(
    r"^[ \t]*####[ \t]*(?P<sign>-?)\$?(?P<late_sign>-?)(?P<whole>\d{1,3}(?:,\d{3})+|\d+)(?P<rest>\.\d+)?[ \t]*$",
    re.MULTILINE | re.ASCII,
)


def extract_answer(text: str) -> Fraction | None:
    """The number of the first line "#### N" in `text`, or None where no line is exactly that.

    Accepts "#### 7", "#### -1,234.50", "#### $5" and "#### -$5"; not "#### 7 apples", "#### 1,23" or "#### 7.".
    """
    for match in _FINAL.finditer(text):
        if match["sign"] and match["late_sign"]:
            continue
        number = Fraction(match["whole"].replace(",", "") + (match["rest"] or ""))
        return -number if match["sign"] or match["late_sign"] else number
    return None


def is_correct(text: str, answer: int | Fraction) -> bool:
    """Whether `text` gives exactly `answer`."""
    return extract_answer(text) == Fraction(answer)
