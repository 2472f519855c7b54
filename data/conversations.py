"""Rows of conversations, in the shapes in which data sets publish them -> one text a conversation -> its messages.

    messages                                      [{role, content}], as most have them
    conversations                                 [{from, value}], as ShareGPT has them, or {role, content}
    prompt, completion                            texts, or lists of messages
    instruction, input | context, output | response     as Alpaca and Dolly have them
    question, answer                              as GSM8K has them; its <<48/2=24>> marks for a calculator are left out

Through the stages of preparation a conversation is one text: before each content stand a control character, the role
and another control character. Normalised documents hold no such characters (data/preparation/clean.py), so no content
can forge a turn, and a text is a conversation exactly if it begins with one. Contents are normalised and without white
space at either end; what follows the last answer is left out.
"""

import re
from collections.abc import Container, Sequence
from typing import TYPE_CHECKING, Any

from data.preparation import clean

if TYPE_CHECKING:
    from tokenizer.conversations import Message

VERSION = 1  # raise it whenever the same rows would give other conversations
TURN, SAYS = "\x1e", "\x1f"  # record and unit separator
COLUMNS = (
    "messages", "conversations", "prompt", "completion", "system", "instruction", "input", "context", "output",
    "response", "question", "answer",
)  # fmt: skip
# A row is of the first of these whose columns it has; with those that may stand beside them, besides a `system`.
SHAPES = {
    ("messages",): (), ("conversations",): (), ("prompt", "completion"): (),
    ("instruction", "output"): ("input", "context"), ("instruction", "response"): ("input", "context"),
    ("question", "answer"): (),
}  # fmt: skip
ROLES = {
    "system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
    "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
}  # fmt: skip
_CALCULATOR = re.compile(r"<<[^<>\n]*=[^<>\n]*>>")


class NoConversation(ValueError):
    """A row that is none: `reason` is one word to count by, the message is for people."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


def of_row(row: Any) -> str:
    """The conversation of a row, as one text.

    Raises:
        NoConversation: no known shape, a role or content that is none, nobody who asks, or no answer.
    """
    messages = [(role, clean.normalise(content).strip()) for role, content in _turns(row)]
    while messages and messages[-1][0] != "assistant":
        messages.pop()  # which nobody answers
    messages = [(role, content) for role, content in messages if content or role != "system"]
    for number, (role, content) in enumerate(messages, start=1):
        if not content:
            raise NoConversation("empty_turn", f"turn {number}, of the {role}, is empty")
    roles = [role for role, _ in messages]
    if "assistant" not in roles:
        raise NoConversation("no_answer", "nobody answers: the last turn must be an assistant's")
    if "user" not in roles:
        raise NoConversation("no_question", "no turn is a user's")
    return "".join(f"{TURN}{role}{SAYS}{content}" for role, content in messages)


def needed(there: Sequence[str], never_null: Container[str]) -> list[str]:
    """Of the columns that a table has, those that its rows are made of: not those that a row would be made of if it
    had none of what every row has.

    Args:
        never_null: columns that have a value in every row.
    """
    wanted = {"system"}
    for shape, beside in SHAPES.items():
        wanted.update(shape, beside)
        if all(name in there and name in never_null for name in shape):
            return [name for name in there if name in wanted]
    return list(there)


def is_conversation(text: str) -> bool:
    """Whether this is the text of a conversation, and no plain document."""
    return text.startswith(TURN)


def messages_of(text: str) -> list["Message"]:
    """What `of_row` has made one text of."""
    turns = (turn.split(SAYS, 1) for turn in text.split(TURN)[1:])
    return [{"role": role, "content": content} for role, content in turns]


def contents_of(text: str) -> str:
    """All that is said, one turn a paragraph; a plain document is what it is."""
    return "\n\n".join(message["content"] for message in messages_of(text)) if is_conversation(text) else text


def question_of(text: str) -> str:
    """What decides on which side a text lies: of a conversation the first user's turn, so that no two answers to one
    question lie on both sides; of a plain document all of it."""
    if not is_conversation(text):
        return text
    return next(message["content"] for message in messages_of(text) if message["role"] == "user")


def answers_of(text: str) -> list[str]:
    """What the assistant says in a conversation."""
    return [message["content"] for message in messages_of(text) if message["role"] == "assistant"]


def _turns(row: Any) -> list[tuple[str, str]]:
    """(role, content) of each turn of a row of any known shape; columns that are null count as missing."""
    if not isinstance(row, dict):
        raise NoConversation("not_text", f"a row is an object, this is a {type(row).__name__}")
    row = {name: row[name] for name in COLUMNS if row.get(name) is not None}
    for name in ("messages", "conversations"):
        if name in row:
            turns = _messages(row[name], name)
            return turns if turns[:1] and turns[0][0] == "system" else _system(row) + turns
    if "completion" in row and "prompt" in row:
        return _side(row, "prompt", "user") + _side(row, "completion", "assistant")
    answer = next((name for name in ("output", "response") if name in row), None)
    if "instruction" in row and answer:
        more = next((name for name in ("input", "context") if name in row), None)
        asked = _text(row, "instruction").strip()
        if more and (given := _text(row, more).strip()):
            asked = f"{asked}\n\n{given}"
        return _system(row) + [("user", asked), ("assistant", _text(row, answer))]
    if "question" in row and "answer" in row:
        asked, answered = _text(row, "question"), _CALCULATOR.sub("", _text(row, "answer"))
        return _system(row) + [("user", asked), ("assistant", answered)]
    raise NoConversation(
        "missing_field", "no conversation: it needs messages, conversations, prompt and completion, instruction and "
        f"output or response, or question and answer; it has {', '.join(row) or 'none of them'}"
    )  # fmt: skip


def _system(row: dict[str, Any]) -> list[tuple[str, str]]:
    return [("system", _text(row, "system"))] if "system" in row else []


def _side(row: dict[str, Any], name: str, role: str) -> list[tuple[str, str]]:
    if isinstance(row[name], str | bytes):
        return (_system(row) if role == "user" else []) + [(role, _text(row, name))]
    return _messages(row[name], name)


def _messages(given: Any, name: str) -> list[tuple[str, str]]:
    if not isinstance(given, Sequence) or isinstance(given, str | bytes):
        raise NoConversation("not_text", f"{name!r} is a {type(given).__name__}, not a list of messages")
    return [_message(message, f"{name}[{number}]") for number, message in enumerate(given)]


def _message(message: Any, where: str) -> tuple[str, str]:
    if not isinstance(message, dict):
        raise NoConversation("not_text", f"{where} is a {type(message).__name__}, not a message")
    named = message.get("role", message.get("from"))
    named = _text({where: named}, where) if isinstance(named, bytes) else named
    role = ROLES.get(named.lower()) if isinstance(named, str) else None
    if role is None:
        raise NoConversation("unknown_role", f"{where} has the role {named!r}: system, user and assistant are known")
    content = message.get("content", message.get("value"))
    if isinstance(content, list):  # of parts, where others than text are possible
        parts = [part.get("text") if isinstance(part, dict) else part for part in content]
        if all(isinstance(part, str | bytes) for part in parts):
            content = "".join(_text({where: part}, where) for part in parts)
    return role, _text({where: content}, where)


def _text(row: dict[str, Any], name: str) -> str:
    value = row[name]
    if not isinstance(value, str | bytes):
        raise NoConversation("not_text", f"{name} is a {type(value).__name__}, not text")
    try:
        if isinstance(value, bytes):
            return value.decode()
        value.encode()
    except UnicodeError as error:
        raise NoConversation("bad_utf8", f"{name}: {error}") from error
    return value
