"""Documents that hold a question of an evaluation set are found: as it is, with other numbers, within other text."""

import json
import random
import re
import unicodedata

import pytest

from data.preparation.contamination import Questions, masked_words

QUESTION = (
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. "
    "How many clips did Natalia sell altogether in April and May?"
)
WALK = "Anna walks 3 miles to school every day for 20 days. How far does Zoë walk in total?"
CHINESE = "小明每天走12公里去学校，一个星期他一共走多少公里？"
QUESTIONS = Questions({
    "math": [QUESTION, "What is seven times eight?", "Why?"],
    "other": ["Name the largest planet."],
    "walks": [unicodedata.normalize("NFD", WALK), CHINESE],
})  # fmt: skip


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (QUESTION, "math"),
        (QUESTION.upper() + "\n#### 72", "math"),
        (QUESTION.replace("48", "1,350.5"), "math"),
        (QUESTION.replace("48", "forty"), "math"),
        ("A story first. " * 40 + QUESTION + " And more after it." * 40, "math"),
        (QUESTION.replace("clips", "pens").replace("Natalia", "Ann"), None),
        ("She asked: what is 9 times 11? He did not know.", "math"),
        ("why", "math"),
        ("Why? Nobody knows why.", None),
        ("name the largest planet of all", "other"),
        ("In April and May the friends of Natalia sold pens.", None),
        ("", None),
        (WALK, "walks"),
        (WALK.replace("3", "twenty-three").replace("20", "one hundred and five"), "walks"),
        (WALK.replace("3", "½").replace("20", "1 200"), "walks"),
        ("what is 1/2 times two billion and six", "math"),
        (CHINESE, "walks"),
        ("今天天气很好。我们去学校。" + CHINESE.replace("12", "15") + "答案是105。", "walks"),
        ("今天天气很好。我们去学校，答案是105。", None),
    ],
)
def test_questions_are_found(text, name, tmp_path):
    assert QUESTIONS.held_by(text) == name
    QUESTIONS.save(tmp_path / "questions.json")
    assert Questions.load(tmp_path / "questions.json").held_by(text) == name


def test_masked_words():
    assert masked_words("It costs $1,250.50 and five cents, x2") == ["it", "costs", "0", "and", "0", "cents", "x", "0"]
    assert masked_words("and one hundred and five, a hundred and more") == ["and", "0", "a", "0", "and", "more"]


def test_real_questions_in_real_text(real_data):
    """Every planted test question of GSM8K is found, verbatim and with other numbers; no training question is taken
    for one, nor a story."""
    def rows(path, field, count):
        with open(real_data / path, encoding="utf-8") as file:
            return [json.loads(line)[field] for _, line in zip(range(count), file, strict=False)]

    test = rows("gsm8k/test.jsonl", "question", 10_000)
    questions = Questions({"gsm8k": test})
    stories = rows("tinystories/train.jsonl", "text", 600)
    draw = random.Random(5)
    for question in test[::3]:
        story = draw.choice(stories)
        assert questions.held_by(f"{story}\n{question}\n{story}") == "gsm8k"
        assert questions.held_by(re.sub(r"\d+", lambda _: str(draw.randrange(2, 999)), question)) == "gsm8k"
    assert not any(questions.held_by(story) for story in stories)
    train = rows("gsm8k/train.jsonl", "question", 1500)
    assert sum(questions.held_by(question) is not None for question in train) < 0.01 * len(train)
