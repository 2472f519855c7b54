"""What is wrong with a text that a teacher wrote, as far as the text itself tells; and the equations that it goes by.

    markup   marks that open, close or forge a turn, in any template that is known here, or special tokens spelled out
    loops    the same words, or the same line, again and again
    script   letters of another script than the question's

Marks are found in capitals or not, in full-width signs, as HTML entities, and with invisible characters between their
letters; a turn that is opened in plain words is found where its role stands alone on a line or before a colon at its
beginning ("assistant", "User: ..."), and so are a few set phrases by which a text gives orders to whoever reads it
("ignore all previous instructions"). Not found: orders in other words, roles in the middle of a line, marks with spaces
in them, and marks of templates that look like none of these. Such a row is only text to a student: the conversation's
own marks are special tokens, which a text cannot forge (tokenizer/conversations.py).
"""

import collections
import functools
import html
import re
import unicodedata
from collections.abc import Iterator
from fractions import Fraction

from data.preparation.words import words_of

LOOP_WORDS, LOOP_TIMES, LINE_TIMES = 8, 3, 4
_INVISIBLE = re.compile("[\u00ad\u034f\u061c\u115f\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufe00-\ufe0f\ufeff]")
_MARKS = re.compile(
    r"<\|[^|<>\n]{1,40}\|>"  # <|user|>, <|im_start|>, <|eot_id|>, and in full width <｜User｜>
    r"|\[/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS|gMASK|BOS|EOS|CLS|SEP|PAD|UNK|MASK)\]"
    r"|<</?SYS>>"
    r"|</?(?:s|bos|eos|pad|unk|mask|sop|eop)>"
    r"|</?(?:start|end)_of_(?:turn|text|image)>|<end_of_utterance>|<extra_id_\d+>|<0x[0-9A-F]{2}>"
    r"|</?(?:think|thinking|thought|reasoning|reflection|tool_call|tool_response|tools|function_calls?)>",
    re.IGNORECASE,
)
_ROLES = re.compile(
    r"^[ \t>#*_]*(?:(?:user|assistant|system|human|ai|instruction|response)[ \t*_]*:|(?:question|problem)[ \t*_]*:"
    r"|(?:user|assistant|system|human)[ \t*_]*$|begin[ \t]+(?:input|conversation)\b)",
    re.IGNORECASE | re.MULTILINE,
)
_ORDERS = re.compile(
    r"\b(?:ignore|disregard|forget|override)\s+(?:all\s+|any\s+)?(?:of\s+)?(?:the\s+|your\s+|my\s+|these\s+|those\s+)?"
    r"(?:previous|prior|above|preceding|earlier|foregoing|system)\s+(?:instructions?|prompts?|messages?|directions?|rules)",
    re.IGNORECASE,
)


def has_marks(text: str) -> bool:
    """Whether marks of a template, or orders to whoever reads it, stand in `text`, which may be a question."""
    plain = _plain(text)
    return bool(_MARKS.search(plain) or _ORDERS.search(plain))


def opens_a_turn(text: str) -> bool:
    """Whether an answer goes on as somebody else, in plain words."""
    return bool(_ROLES.search(_plain(text)))


def _plain(text: str) -> str:
    """As it would look to a careless reader: entities resolved, one form for each sign, nothing invisible."""
    return _INVISIBLE.sub("", unicodedata.normalize("NFKC", html.unescape(text)))


def has_loops(text: str) -> bool:
    """Whether 8 words in a row come up at least 3 times, or a line with words in it 4 times."""
    lines = collections.Counter(line.strip() for line in text.splitlines())
    if any(count >= LINE_TIMES and words_of(line) for line, count in lines.items()):
        return True
    words = words_of(text.lower())
    runs = collections.Counter(zip(*(words[start:] for start in range(LOOP_WORDS)), strict=False))
    return max(runs.values(), default=0) >= LOOP_TIMES


_LETTERS = re.compile(r"[^\W\d_]+")
_EAST_ASIAN = {"CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", "HANGUL", "BOPOMOFO"}
_NO_SCRIPT = {"MODIFIER", "COMBINING", "FEMININE", "MASCULINE", ""}
_SYMBOL = {"LATIN": 3, "GREEK": 1}  # letters in a row that are read as a unit or a variable in any script: km, x, π


def has_foreign_letters(text: str, question: str) -> bool:
    """Whether `text` has words in a script in which the question has no letter; units and variables count as signs.

    The scripts of one East Asian language are one script here. A question without letters allows all.
    """
    known = {script for script, _ in _scripts(question)}
    return bool(known) and any(
        script not in known and length > _SYMBOL.get(script, 0) for script, length in _scripts(text)
    )


def _scripts(text: str) -> Iterator[tuple[str, int]]:
    """(script, letters) of each run of letters of one script."""
    for word in _LETTERS.findall(unicodedata.normalize("NFKC", text)):
        script, length = "", 0
        for letter in word:
            here = _script_of(letter)
            if here != script:
                if script:
                    yield script, length
                script, length = here, 0
            length += 1
        if script:
            yield script, length


@functools.cache
def _script_of(letter: str) -> str:
    """The first word of a letter's name, which is its script: LATIN, CYRILLIC, HAN for all of East Asia, ..."""
    script = unicodedata.name(letter, "").partition(" ")[0]
    return "" if script in _NO_SCRIPT else "HAN" if script in _EAST_ASIAN else script


_NUMBER = r"(?:\d+(?:\.\d+)?|\.\d+)"
_OPERAND = r"\(*+-?(?:\d++(?:\.\d++)?+|\.\d++)%?\)*+"
# Begins at no place inside what could be an equation, and gives nothing back: the time grows with the text, not faster.
_EQUATION = re.compile(rf"(?<![\d.(])(?<![\d)%][-+*/]){_OPERAND}(?:[-+*/]{_OPERAND})++=-?{_NUMBER}")
_TO_PLAIN = [
    (re.compile(r"<<[^<>\n]*>>"), ""),  # GSM8K's notes for a calculator, beside what they repeat
    (re.compile(r"^[ \t]*(?:[-*•][ \t]+|\d+[.)][ \t]+)", re.MULTILINE), ""),  # list marks
    (re.compile(r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}"), r"(\1)/(\2)"),
    (re.compile(r"\\times|\\cdot|\*(?!\*)(?<!\*\*)|[×·∙⋅✕]|(?<=[\d) ])[xX](?=[ \d($])"), " * "),
    (re.compile(r"\\div|÷|∕"), "/"),
    (re.compile(r"[−–]"), "-"),
    (re.compile(r"(?<=\d),(?=\d{3}(?!\d))"), ""),
    (re.compile(r"[-/](?=[^\W\d_])"), " "),  # a 120-page book, 60 miles/hour
    # bold, LaTeX, words and units
    (re.compile(r"\*\*|\\(?:text|mathrm|left|right)|\\[(),;!\[\]]|[^\W\d_]+|[^\d\s.()+\-*/=%,:;?!]"), " "),
    (re.compile(r"(?<!\d)\.(?!\d)|(?<=\d)\.(?!\d)|(?<!\d),|,(?!\d)"), " ; "),  # of a sentence
    (re.compile(r"[ \t]+"), " "),  # before what looks for spaces beside a sign, which would go back and forth in them
    (re.compile(r" ?\n ?="), "="),
    (re.compile(r" ?([-+*/=()%]) ?"), r"\1"),
    (re.compile(r"\(\)"), ""),
]


def equations(text: str) -> tuple[str, ...]:
    """Every "a op b = c" of `text` in order, written one way: numbers exact, no units, no spaces.

    Two traces for one problem with the same sequence are the same path of reasoning (rejection sampling fine-tuning,
    arXiv 2308.01825, where a path is told from another by its list of equations). Operands are not put in order: to
    add them the other way round is another path there.
    """
    plain = unicodedata.normalize("NFKC", text)
    for pattern, replacement in _TO_PLAIN:
        plain = pattern.sub(replacement, plain)
    return tuple(_exact(equation) for equation in _EQUATION.findall(plain))


def _exact(equation: str) -> str:
    """48.0 + .5 = 48.50 -> 48+1/2=97/2; brackets around one number go, and one that only opens."""
    while equation.startswith("(") and equation.count("(") > equation.count(")"):
        equation = equation[1:]
    tight = re.sub(rf"\((-?{_NUMBER}%?)\)", r"\1", equation)
    return re.sub(_NUMBER, lambda match: str(Fraction(match[0])), tight)
