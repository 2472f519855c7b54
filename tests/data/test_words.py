"""A word is letters with their marks, in every script: documents are compared, and counted, by whole words."""

import random
import sys
import unicodedata

import pytest

from data.preparation import words
from data.preparation.contamination import Questions
from data.preparation.filters import FilterSection, fault
from data.preparation.near_duplicates import shingles, similarity
from data.preparation.words import spaced_words_of, words_of
from evaluation.facts import Question
from tests.data.test_near_duplicates import assert_agree, brute_force, found_by_index
from tests.data.test_prepare import config, documents_in, prepared, small_tokenizer, write_texts  # noqa: F401

SENTENCES = {  # which have a space between all words, and nothing else between them
    "Hindi": "लड़का कल बाज़ार जाता है और वहाँ फल लेता है फिर घर आता है और माता को देता है",
    "Bengali": "ছেলেটি প্রতিদিন সকালে স্কুলে যায় এবং বিকেলে মাঠে বন্ধুদের সঙ্গে খেলা করে",
    "Punjabi": "ਮੁੰਡਾ ਹਰ ਰੋਜ਼ ਸਵੇਰੇ ਸਕੂਲ ਜਾਂਦਾ ਹੈ ਅਤੇ ਸ਼ਾਮ ਨੂੰ ਦੋਸਤਾਂ ਨਾਲ ਖੇਡਦਾ ਹੈ",
    "Gujarati": "છોકરો દરરોજ સવારે શાળાએ જાય છે અને સાંજે મિત્રો સાથે મેદાનમાં રમે છે",
    "Tamil": "சிறுவன் தினமும் காலையில் பள்ளிக்குச் செல்கிறான் மாலையில் நண்பர்களுடன் விளையாடுகிறான்",
    "Telugu": "అబ్బాయి ప్రతిరోజూ ఉదయం బడికి వెళ్తాడు సాయంత్రం స్నేహితులతో ఆడుకుంటాడు",
    "Malayalam": "കുട്ടി എല്ലാ ദിവസവും രാവിലെ സ്കൂളിൽ പോകുന്നു വൈകുന്നേരം കൂട്ടുകാരോടൊപ്പം കളിക്കുന്നു",
    "Sinhala": "ළමයා සෑම දිනකම උදේ පාසලට යයි සවස ශ්\u200dරී ලංකාවේ මිතුරන් සමඟ සෙල්ලම් කරයි",
    "Arabic": "ذَهَبَ الوَلَدُ إِلَى المَدْرَسَةِ صَبَاحًا ثُمَّ رَجَعَ إِلَى البَيْتِ مَسَاءً",
    "Persian": "او می\u200cخواهد کتاب\u200cهای خود را به خانه ببرد",
    "Hebrew": "הַיֶּלֶד הוֹלֵךְ לְבֵית הַסֵּפֶר בַּבֹּקֶר וְחוֹזֵר הַבַּיְתָה בָּעֶרֶב",
    "Yoruba": unicodedata.normalize("NFD", "ọmọ náà lọ sí ilé ẹ̀kọ́ ní òwúrọ̀ ó sì padà wá sílé ní ìrọ̀lẹ́"),
    "Vietnamese": unicodedata.normalize("NFD", "cậu bé đi học vào buổi sáng và trở về nhà vào buổi tối"),
    "Greek": unicodedata.normalize("NFD", "τὸ παιδίον ἔρχεται εἰς τὴν οἰκίαν καὶ ἐσθίει τὸν ἄρτον"),
    "Dhivehi": "ކުޑަކުއްޖާ ކޮންމެ ދުވަހަކު ހެނދުނު ސްކޫލަށް ދެއެވެ",
    "Korean": unicodedata.normalize("NFD", "소년은 매일 아침 학교에 가고 저녁에 집으로 돌아온다"),
}  # fmt: skip
# Code points of letters, and of marks that are written on them.
SPACED = {
    "Devanagari": ("\u0915\u0939", "\u093e\u094c"), "Bengali": ("\u0995\u09b9", "\u09be\u09cc"),
    "Gurmukhi": ("\u0a15\u0a39", "\u0a3e\u0a4c"), "Tamil": ("\u0b95\u0bb9", "\u0bbe\u0bcc"),
    "Telugu": ("\u0c15\u0c39", "\u0c3e\u0c4c"), "Sinhala": ("\u0d9a\u0dc6", "\u0dcf\u0ddf"),
    "Arabic": ("\u0628\u063a", "\u064b\u0652"), "Hebrew": ("\u05d0\u05ea", "\u05b0\u05bc"),
    "Thaana": ("\u0780\u07a5", "\u07a6\u07b0"), "Latin": ("az", "\u0316\u0326"), 
    "Adlam": ("\U0001e922\U0001e943", "\U0001e944\U0001e94a"),
}  # fmt: skip
UNSPACED = {
    "Thai": ("\u0e01\u0e2e", "\u0e34\u0e3a"), "Lao": ("\u0e81\u0eae", "\u0eb4\u0ebc"),
    "Khmer": ("\u1780\u17a2", "\u17b6\u17c5"), "Myanmar": ("\u1000\u1020", "\u102b\u1032"),
    "Javanese": ("\ua98f\ua9b2", "\ua9b4\ua9bc"), "kana, decomposed": ("\u304b\u3068", "\u3099\u3099"),
    "Chinese, with variants": ("\u5929\u5b57", "\ufe00\ufe02"),
}  # fmt: skip


def assigned(ends: str) -> list[str]:
    return [chr(code) for code in range(ord(ends[0]), ord(ends[1]) + 1) if unicodedata.category(chr(code)) != "Cn"]


def written(script: tuple[str, str], seed: int, count: int) -> list[str]:
    """Different words of two letters, a mark on each: there are few letters, so that the marks tell the words apart."""
    draw, found = random.Random(seed), {}
    letters, marks = assigned(script[0])[:9], assigned(script[1])
    while len(found) < count:
        found["".join(draw.choice(letters) + draw.choice(marks) for _ in range(2))] = None
    return list(found)


def remarked(text: str, script: tuple[str, str], seed: int) -> str:
    """The same letters with other marks."""
    draw, marks = random.Random(seed), assigned(script[1])
    return "".join(draw.choice([mark for mark in marks if mark != sign]) if sign in marks else sign for sign in text)


@pytest.mark.parametrize("sentence", SENTENCES.values(), ids=SENTENCES)
def test_newcomer_a_word_is_letters_with_their_marks(sentence):
    assert words_of(sentence) == spaced_words_of(sentence) == sentence.split()
    assert words_of(f"«{sentence.replace(' ', ', ')}»! 12") == [*sentence.split(), "12"]


@pytest.mark.parametrize("script", UNSPACED.values(), ids=UNSPACED)
def test_newcomer_without_spaces_a_letter_with_its_marks_is_a_word(script):
    drawn = random.Random(1).choices(assigned(script[0]), k=50)
    marked = [letter + random.Random(1).choice(assigned(script[1])) for letter in drawn]
    assert words_of("".join(drawn + marked)) == drawn + marked


def test_every_mark_belongs_to_its_letter_and_none_is_a_word():
    marks = [chr(code) for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code))[0] == "M"]
    assert words_of(" ".join(f"a{mark}b" for mark in marks)) == [f"a{mark}b" for mark in marks]
    assert words_of(" ".join(marks)) == spaced_words_of(" ".join(marks)) == []


def test_what_has_no_marks_is_cut_as_ever():
    text = "Don't pay $1,250.50 for x2 or snake_case; 人々は東京へ行った。ราคา 5"
    assert words_of(text) == [
        "Don", "t", "pay", "1,250.50", "for", "x", "2", "or", "snake_case", *"人々は東京へ行った", *"ราคา", "5",
    ]  # fmt: skip


@pytest.mark.parametrize("script", SPACED.values(), ids=SPACED)
def test_newcomer_near_duplicates_are_found_as_by_brute_force_in_every_script(script):
    """The reference cuts words at spaces."""
    vocabulary, draw = written(script, 1, 300), random.Random(2)
    texts: list[str] = []
    for _ in range(120):
        text = draw.choices(vocabulary, k=60)
        if texts and draw.random() < 0.5:
            text = draw.choice(texts).split()
            for _ in range(draw.randrange(1, 12)):
                text[draw.randrange(60)] = draw.choice(vocabulary)
        texts.append(" ".join(text))
    assert_agree(found_by_index(texts, 0.7), brute_force(texts, 0.7, str.split))


@pytest.mark.parametrize("script", [script for script in [*SPACED.values(), *UNSPACED.values()]
                                    if len(assigned(script[1])) > 1])  # a single mark has no other in its place
def test_newcomer_texts_that_differ_in_marks_alone_are_different(script):
    """Copies are found, and questions in the text around them, but none of other words."""
    between = " " if script in SPACED.values() else ""
    *before, question, after = (between.join(written(script, seed, 14)) for seed in range(8))
    other = remarked(question, script, 9)
    one, copy, different = shingles([question, question, other])
    assert similarity(one, copy) == 1 and similarity(one, different) < 0.1
    questions = Questions({"exam": [question]})
    assert questions.held_by(between.join([*before, question, after])) == "exam"
    assert questions.held_by(between.join([*before, other, after])) is None


HINDI = [  # a boy or a girl, fruit or flowers, for the mother or the friend
    "लड़का कल बाज़ार जाता है और वहाँ फल लेता है फिर घर आता है और माता को देता है",
    "लड़की कल बाज़ार जाती है और वहाँ फूल लेती है फिर घर आती है और मीता को देती है",
    "लड़के कल बाज़ार जाते हैं और वहाँ फल लेते हैं फिर घर आते हैं और मोती को देते हैं",
]


def test_newcomer_different_hindi_sentences_are_kept(tmp_path, small_tokenizer):  # noqa: F811
    exam = write_texts(tmp_path / "exam.jsonl", [HINDI[2]])
    source = {"from": write_texts(tmp_path / "a.jsonl", [*HINDI, f"{HINDI[0]}।"])}
    config_ = config(tmp_path, {"a": source}, small_tokenizer, valid_fraction=0, near_duplicates=0.8,
                     evaluation_sets={"exam": {"from": exam, "field": "text"}})  # fmt: skip
    result, _ = prepared(config_)
    assert documents_in(result, "a", "train") == HINDI[:2]
    assert result.describe("a")["dropped"] == {"in_evaluation_exam": 1, "near_duplicate": 1}


def test_newcomer_filters_count_marks_with_their_letters():
    rules = FilterSection(min_words=19, max_words=19, min_word_length=2.5, max_symbols=0.05)
    assert fault(HINDI[0], rules) is None
    assert fault(HINDI[0], FilterSection(max_words=18)) == "too_many_words"
    assert fault("❤️❤️❤️ a" + " ☀️" * 9, FilterSection(max_symbols=0.5)) == "too_many_symbols"


def test_newcomer_an_answer_with_other_marks_is_another():
    question = Question("own", "q", "?", ("लड़की",))
    assert question.is_answered_by("वह लड़की है।") and not question.is_answered_by("वह लड़का है।")


def test_the_ranges_that_are_looked_through_hold_all_marks():
    held = {code for part in words._WITH_MARKS for code in part}
    assert all(code in held for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code))[0] == "M")
