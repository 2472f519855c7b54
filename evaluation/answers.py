"""What counts as a correct answer to a word problem, by four rules.

    strict             the first line that is exactly "#### N"; for choosing what is trained on
    flexible           the number that a reader would take: after the last "####", in the last \\boxed{}, after the last
                       "the answer is", else the last number; bold, units, currencies and full stops do not matter
    lm_eval_strict     the two filters of lm-evaluation-harness's gsm8k task, for figures that compare with others'.
    lm_eval_flexible   They compare texts, not numbers: 18.0 is not 18, and $29.00 is not 29.

Text is cut nowhere here: whoever asks gives the answer alone, without a question that the model went on to invent.
"""

import re
from collections.abc import Iterator
from fractions import Fraction
from typing import Literal, get_args

Rule = Literal["strict", "flexible", "lm_eval_strict", "lm_eval_flexible"]
RULES: tuple[Rule, ...] = get_args(Rule)

# A line "#### N": an optional sign and dollar, thousands by comma or none, an optional fraction, nothing else after it.
_FINAL = re.compile(
    r"^[ \t]*####[ \t]*(?P<sign>-?)\$?(?P<late_sign>-?)(?P<whole>\d{1,3}(?:,\d{3})+|\d+)(?P<rest>\.\d+)?[ \t]*$",
    re.MULTILINE | re.ASCII,
)

# A number in running text. A minus is a sign only where nothing stands before it: "5-10" ends with 10.
_NUMBER = re.compile(
    r"""(?:(?<![\w)\]}.])(?P<sign>-))?  (?:[$€£][ ]?)?  (?P<late_sign>(?<=[$€£])-)?
        (?<![A-Za-z0-9_])(?<![0-9]\.)
        (?P<number> (?:[0-9]{1,3}(?:,[0-9]{3})+(?!,?[0-9]) | [0-9]+) (?:\.[0-9]+)? | \.[0-9]+)
        (?:/(?P<under>0*[1-9][0-9]*)(?![0-9/]|\.[0-9]))?""",
    re.VERBOSE,
)
_MARKED = re.compile(r"####([^\n]*)")
_SAID = re.compile(r"\banswer[ \t]*(?:(?P<verb>is)[ \t]*:?|[:=])[ \t]*(?=(?P<rest>[^\n]*))", re.IGNORECASE)
_CALCULATION = re.compile(r"\s*[-+*/×÷=]")
_SENTENCE_END = re.compile(r"[.!?;](?=\s|$)")
_BOXED = "\\boxed{"
_PLAIN = (  # what stands between a number and plain text: LaTeX, Markdown, and signs of Unicode
    (re.compile("\u2212"), "-"),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\[,!;: ]"), ""),
    (re.compile(r"\\([$%])"), r"\1"),
    (re.compile(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}"), r"\1/\2"),
    (re.compile(r"\\(?:text|textbf|mathbf|mathrm|mbox)\{([^{}]*)\}"), r" \1 "),
    (re.compile(r"(?<!\d)\*\*|\*\*(?!\d)|__|`"), ""),  # 2**3 is no bold
)

_LM_EVAL = {  # regular expression, and which of its matches counts
    "lm_eval_strict": (re.compile(r"#### (\-?[0-9\.\,]+)"), 0),
    "lm_eval_flexible": (re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)"), -1),
}
_LM_EVAL_IGNORED = (re.compile(","), re.compile(r"\$"), re.compile(r"(?s).*#### "), re.compile(r"\.$"))


def extract_answer(text: str, rule: Rule = "strict") -> Fraction | str | None:
    """The answer that `text` gives by `rule`, or None where it gives none.

    strict accepts "#### 7", "#### -1,234.50", "#### $5" and "#### -$5"; not "#### 7 apples", "#### 1,23" or "#### 7.".
    The rules of lm-eval give the text that lm-eval compares; the others give the number, exactly.

    Source: gsm8k.yaml of https://github.com/EleutherAI/lm-evaluation-harness, version 3.0 of the task.

    Raises:
        ValueError: there is no such rule.
    """
    if rule == "strict":
        return _strict(text)
    if rule == "flexible":
        return _flexible(text)
    if rule not in _LM_EVAL:
        raise ValueError(f"there is no rule {rule!r} for answers: use one of {', '.join(RULES)}")
    return _lm_eval(text, rule)


def is_correct(text: str, answer: int | Fraction | str, rule: Rule = "strict") -> bool:
    """Whether `text` gives exactly `answer` by `rule`.

    Args:
        answer: the number, or the text of a right solution, which ends with "#### N" or is the number alone.
    """
    return matches(extract_answer(text, rule), answer, rule)


def matches(extracted: Fraction | str | None, answer: int | Fraction | str, rule: Rule = "strict") -> bool:
    """Whether what `extract_answer` gave by `rule` is `answer`."""
    if extracted is None:
        return False
    if rule in _LM_EVAL:
        return extracted == _lm_eval_form(answer if isinstance(answer, str) else _written(Fraction(answer)))
    return extracted == (gold_answer(answer) if isinstance(answer, str) else Fraction(answer))


def gold_answer(text: str) -> Fraction:
    """The number of a right solution: after its "####", or the text is the number.

    Raises:
        ValueError: it has none.
    """
    found = _strict(text)
    if found is None:
        found = _strict(f"#### {text.strip()}")
    if found is None:
        raise ValueError('an answer ends with a line "#### N", or is a number alone')
    return found


def _strict(text: str) -> Fraction | None:
    for match in _FINAL.finditer(text):
        if match["sign"] and match["late_sign"]:
            continue
        number = _exact(match["whole"].replace(",", "") + (match["rest"] or ""))
        if number is not None:
            return -number if match["sign"] or match["late_sign"] else number
    return None


def _flexible(text: str) -> Fraction | None:
    for pattern, plain in _PLAIN:
        text = pattern.sub(plain, text)
    marked = (_first_result(match[1]) for match in reversed(list(_MARKED.finditer(text))))
    boxed = (_first_result(content) for content in _boxed(text))
    said = (_said(match) for match in reversed(list(_SAID.finditer(text))))
    for place in (marked, boxed, said):
        found = next((number for number in place if number is not None), None)
        if found is not None:
            return found
    return next(reversed(list(_numbers(text))), None)


def _said(match: re.Match[str]) -> Fraction | None:
    """The number of "the answer is so and so." or of "Answer: N"; a solution that stands behind "Answer:" is none."""
    sentence = _SENTENCE_END.split(match["rest"])[0]
    number = _NUMBER.match(sentence)
    if match["verb"] or (number and not _CALCULATION.match(sentence, number.end())):
        return _first_result(sentence)
    return None


def _first_result(text: str) -> Fraction | None:
    """The first number of `text`, behind its last "=" if there is a number there."""
    _, equals, behind = text.rpartition("=")
    result = next(_numbers(behind), None) if equals else None
    return next(_numbers(text), None) if result is None else result


def _numbers(text: str) -> Iterator[Fraction]:
    for match in _NUMBER.finditer(text):
        number = _exact(match["number"].replace(",", ""))
        under = _exact(match["under"] or "1")
        if number is not None and under is not None:
            yield -number / under if match["sign"] or match["late_sign"] else number / under


def _boxed(text: str) -> Iterator[str]:
    """What stands in each \\boxed{} whose braces are balanced, the last one first."""
    start = text.rfind(_BOXED)
    while start >= 0:
        depth = 1
        for place in range(start + len(_BOXED), len(text)):
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            if depth == 0:
                yield text[start + len(_BOXED) : place]
                break
        start = text.rfind(_BOXED, 0, start)


def _exact(digits: str) -> Fraction | None:
    try:
        return Fraction(digits)
    except ValueError:  # thousands of digits, which Python does not read: no answer to anything
        return None


def _lm_eval(text: str, rule: Rule) -> str | None:
    pattern, which = _LM_EVAL[rule]
    found = [next(group for group in match.groups() if group) for match in pattern.finditer(text)]
    return _lm_eval_form(found[which].strip()) if found else None


def _lm_eval_form(text: str) -> str:
    """A text as lm-eval's exact_match compares it, with the regexes_to_ignore of the task."""
    for ignored in _LM_EVAL_IGNORED:
        text = ignored.sub("", text)
    return text.lower()


def _written(number: Fraction) -> str:
    """A number as an answer writes it: whole or decimal where it has such a form."""
    if number.denominator == 1:
        return str(number.numerator)
    as_float = float(number)
    return repr(as_float) if Fraction(repr(as_float)) == number else str(number)
