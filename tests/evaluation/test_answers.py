"""What counts as a correct answer: strictly, as a reader would see it, and as lm-eval does, to the letter."""

import collections
import json
import random
import re
from fractions import Fraction

import pytest

from evaluation.answers import RULES, extract_answer, gold_answer, is_correct, matches


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


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        # after "####": the last with a number, whatever else stands in its line
        ("#### 18", 18), ("so #### 18 apples", 18), ("#### **18**", 18), ("#### $18.00.", 18), ("#### 3\n#### 4", 4),
        ("#### 4\n#### nothing", 4), ("#### 3 * 6 = 18 apples for 2", 18),
        ("**####** 7", 7), ("#### 1,234", 1234),
        # in the last \boxed{} with balanced braces
        (r"\boxed{18}", 18), (r"so $\boxed{\$1{,}234.50}$, 3 times", Fraction("1234.5")),
        (r"\boxed{\frac{3}{4}}", "3/4"),
        (r"\boxed{18\text{ dollars}} 5", 18), (r"\boxed{x^{2} = 16} and 5", 16), (r"\boxed{3} or \boxed{4}", 4),
        (r"\boxed{5} then \boxed{6", 5), (r"\boxed{7}\boxed{}", 7),
        ("#### 5\n\\boxed{6}", 5),
        # after "the answer is"
        ("The answer is 18. It took 3 steps.", 18), ("the final answer is: **18** eggs", 18),
        ("Answer: 18\n2 more", 18),
        ("The answer is $1,200.", 1200), ("The answer is 3 + 4 = 7 apples, not 8", 7), ("The answer is 3.5.", "7/2"),
        ("**Answer:** 18. Then 3.", 18), ("The answer is 3. No, the answer is 4. 9", 4),
        ("Answer: 16 - 3 = 13 eggs. 13 * 2 = 26", 26),  # a solution, not an answer
        ("The answer is:\n\n18", 18),
        # the last number
        ("She has 3, then 4.", 4), ("it costs $5.", 5), ("-5 degrees", -5),
        ("it is \u22125", -5), ("-$5", -5), ("$-5", -5),
        ("5-10", 10), ("(4)-3", 3), ("x-2", 2), ("1/2 of it", "1/2"), ("5/0", 0),
        (".5", "1/2"), ("1,2,3", 3), ("50%", 50),
        ("1\\,000", 1000), ("2**3", 3), ("16*3", 3), ("- 5 apples", 5),
        ("5kg", 5), ("€ 7", 7), ("12,345,678.5 m", "24691357/2"),
    ],
)  # fmt: skip
def test_flexible_takes_what_a_reader_would(text, answer):
    assert extract_answer(text, "flexible") == Fraction(answer)
    assert is_correct(text, Fraction(answer), "flexible")


@pytest.mark.parametrize("text", ["", "no number", "####", r"\boxed{}", "H2O", "x_1", "v3.5.2", "9" * 5000])
def test_flexible_finds_no_number_where_there_is_none(text):
    assert extract_answer(text, "flexible") is None
    assert not is_correct(text, 2, "flexible")


@pytest.mark.parametrize(
    ("rule", "text", "answer", "right"),
    [  # what lm-eval's comparison of texts does, right or not
        ("lm_eval_strict", "#### 18", 18, True), ("lm_eval_strict", "#### 18.", 18, True),
        ("lm_eval_strict", "#### 18.0", 18, False), ("lm_eval_strict", "#### $18", 18, False),
        ("lm_eval_strict", "#### 1,234", 1234, True), ("lm_eval_strict", "so #### 18 apples", 18, True),
        ("lm_eval_strict", "####18", 18, False), ("lm_eval_strict", "#### 3\n#### 4", 3, True),
        ("lm_eval_strict", "18", 18, False), ("lm_eval_strict", "#### -5", -5, True),
        ("lm_eval_flexible", "it is $29.00", 29, False), ("lm_eval_flexible", "it is $29", 29, True),
        ("lm_eval_flexible", "it is 18.", 18, True), ("lm_eval_flexible", "18 of 20", 18, False),
        ("lm_eval_flexible", "5-10", 10, False), ("lm_eval_flexible", "18 ...", 18, False),
        ("lm_eval_flexible", "0.5", Fraction(1, 2), True), ("lm_eval_flexible", "none", 0, False),
        ("lm_eval_flexible", "a 7", "Take 3 + 4 = <<3+4=7>>7.\n#### 7", True),
    ],
)  # fmt: skip
def test_lm_evals_rules_compare_texts(rule, text, answer, right):
    assert is_correct(text, answer, rule) is right


def test_a_rule_that_does_not_exist_is_named():
    with pytest.raises(ValueError, match="no rule 'best'"):
        extract_answer("#### 7", "best")


@pytest.mark.parametrize("text", ["7", "Sum: 3+4\n#### 7", " $7 ", "#### 7.0"])
def test_a_right_solution_holds_its_number(text):
    assert gold_answer(text) == 7
    assert is_correct("#### 7", text) and not is_correct("#### 8", text)


@pytest.mark.parametrize("text", ["", "seven", "It is 7", "#### 7 apples"])
def test_a_right_solution_without_a_number_is_refused(text):
    with pytest.raises(ValueError, match="ends with a line"):
        gold_answer(text)


def _lm_eval_accepts(rule, text, gold):
    """lm-evaluation-harness's RegexFilter, take_first and exact_match for its task gsm8k, step by step."""
    pattern, select = {
        "lm_eval_strict": (r"#### (\-?[0-9\.\,]+)", 0), "lm_eval_flexible": (r"(-?[$0-9.,]{2,})|(-?[0-9]+)", -1)
    }[rule]  # fmt: skip
    found = re.findall(pattern, text)
    said = "[invalid]"
    if found:
        said = found[select]
        if isinstance(said, tuple):
            said = [group for group in said if group][0]
        said = said.strip()
    for ignored in (",", r"\$", "(?s).*#### ", r"\.$"):
        said, gold = re.sub(ignored, "", said), re.sub(ignored, "", gold)
    return said.lower() == gold.lower()


def _mutated(chance, text, number):
    """A solution as a model might spell it: its last line, its number, or a character somewhere changed."""
    body, _, _ = text.rpartition("####")
    spelled = chance.choice(
        ["{}", "{}.", "${}", "{}.0", "{}.00", "**{}**", "-{}", "{} apples", "{},", "{}1", "\\boxed{{{}}}"]
    )
    ending = chance.choice(
        ["#### {}", "####{}", "The answer is {}", "{}", "#### {}\n#### 7", "", "so #### {} in all.", "= {}"]
    )
    mutated = body + ending.format(spelled.format(chance.choice([number, f"{int(number):,}", number.lstrip("-")])))
    for _ in range(chance.randrange(3)):
        place = chance.randrange(len(mutated) + 1)
        mutated = mutated[:place] + chance.choice("0 7,.$-#\n*x") + mutated[place + chance.randrange(2) :]
    return mutated


def test_every_gold_answer_and_mutated_ones_are_judged_as_lm_eval_judges_them(real_data):
    golds = [json.loads(line)["answer"] for split in ("train", "test")
             for line in (real_data / "gsm8k" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]  # fmt: skip
    assert len(golds) == 8792
    for gold in golds:
        number = gold_answer(gold)
        for rule in RULES:
            said = extract_answer(gold, rule)
            assert matches(said, gold, rule) and matches(said, number, rule), gold
            assert not matches(said, number + 1, rule), gold
        assert _lm_eval_accepts("lm_eval_strict", gold, gold) and _lm_eval_accepts("lm_eval_flexible", gold, gold)
    chance = random.Random(13)
    verdicts = collections.Counter()
    for gold in chance.choices(golds, k=4000):
        text = _mutated(chance, gold, str(gold_answer(gold)))
        for rule in ("lm_eval_strict", "lm_eval_flexible"):
            expected = _lm_eval_accepts(rule, text, gold)
            assert is_correct(text, gold, rule) is expected, (rule, text)
            assert is_correct(text, gold_answer(gold), rule) is expected, (rule, text)
            verdicts[rule, expected] += 1
    assert min(verdicts.values()) > 400, verdicts  # both verdicts are put to the test


def test_the_flexible_rule_accepts_the_right_number_however_it_is_spelled():
    chance = random.Random(4)
    spellings = ["#### {}", "#### **{}** apples.", "The answer is ${}.", r"Thus \boxed{{{}}}.", "**Answer:** {}",
                 "{} in all", "= {}"]  # fmt: skip
    for _ in range(2000):
        number = Fraction(chance.randrange(-(10**6), 10**6), chance.choice([1, 1, 1, 2, 4, 10]))
        written = f"{float(number):,}" if chance.random() < 0.5 else str(float(number))
        text = f"First 3 + 4 = 7.\n{chance.choice(spellings).format(written.removesuffix('.0'))}"
        assert is_correct(text, number, "flexible"), text
        assert not is_correct(text, number + 1, "flexible"), text
