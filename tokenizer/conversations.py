"""Conversations as token ids, by the chat template that a tokenizer brings along: ours, ChatML, Qwen3's, any other.

A template is rendered once for each sequence of roles, with marks in place of the contents, and cut at these marks. The
pieces between are the template's own text, in which special tokens count; the contents are text that anybody may have
written, in which they do not: nobody can forge a turn. What an assistant says, and the special token that ends its
turn, is marked as trained; a prompt ends exactly where the first trained token stands, so that a model is asked in the
very form in which it was taught.

A message is {"role": "system" | "user" | "assistant", "content": text}, as everywhere in this field.
"""

import hashlib
import itertools
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tokenizer.bpe import Tokenizer, TokenizerError

if TYPE_CHECKING:
    import jinja2

Message = dict[str, str]
_MOST_TOLD = 20  # roles that a message names
_MARK = re.compile("\ue000([0-9]+)\ue001")  # in place of a content: characters that no template and no tokenizer knows
_NAMED_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")  # of tokenizer_config.json, for the template


class TemplateRefusal(ValueError):
    """The template has no form for such a conversation: the roles, or their order, are not what it knows."""


def begun(start: Sequence[int], ids: Sequence[int]) -> list[int]:
    """The ids of a conversation behind what begins every text, of which a template may have written its own."""
    return list(ids) if list(ids[: len(start)]) == list(start) else [*start, *ids]


class ChatFormat:
    """How conversations are written for one tokenizer.

    Attributes:
        fingerprint: sha256 (hex) of the template; with the tokenizer's, equal ones mean equal ids and masks.
        end_of_turn: id of the special token that ends what an assistant says.
        stop_ids: where generated answers end: that token, and the end of text.
        writes_begin: whether the template itself begins with the token that begins a text.

    Raises:
        TokenizerError: the tokenizer has no chat template, or one that cannot be used.
    """

    def __init__(self, tokenizer: Tokenizer):
        template = tokenizer.chat_template
        if not template:
            raise TokenizerError("the tokenizer has no chat template, so it cannot write conversations: use one that "
                                 "has (ours all do), or add `chat_template` to its tokenizer_config.json")  # fmt: skip
        self._tokenizer = tokenizer
        self._special = set(tokenizer.special_tokens.values())
        self._template = _compiled(template)
        self._named = tokenizer.named_tokens(_NAMED_TOKENS)
        self._pieces: dict[tuple[str, ...], list[list[int]]] = {}
        self.fingerprint = hashlib.sha256(template.encode()).hexdigest()
        try:
            beginning, *_, ending = self._pieces_of(("user", "assistant"))
        except TemplateRefusal as error:
            raise TokenizerError(f"the tokenizer's chat template cannot be used: {error}") from error
        self.end_of_turn = ending[self._end_of(ending)]
        self.stop_ids = sorted({self.end_of_turn, tokenizer.end_of_text})
        self.writes_begin = beginning[:1] == [tokenizer.begin_of_text]

    def encode(self, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
        """(ids, mask) of a conversation; the mask is 1 where an assistant speaks or ends its turn.

        Raises:
            TemplateRefusal: the template has no form for these roles in this order.
        """
        (encoded,) = self.encode_batch([messages])
        return encoded

    def encode_batch(self, conversations: Sequence[Sequence[Message]]) -> list[tuple[list[int], list[int]]]:
        """`encode` of each, on all cores."""
        contents = [message["content"] for messages in conversations for message in messages]
        encoded = iter(self._tokenizer.encode_batch(contents))
        return [self._joined(messages, list(itertools.islice(encoded, len(messages)))) for messages in conversations]

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The ids after which an assistant's answer to `messages` begins.

        Raises:
            TemplateRefusal: the template has no form for these roles with an answer behind them.
        """
        ids, _ = self.encode([*messages, {"role": "assistant", "content": ""}])
        after = self._pieces_of((*(message["role"] for message in messages), "assistant"))[-1]
        return ids[: len(ids) - len(after)]

    def accepts(self, roles: Sequence[str]) -> str | None:
        """Why the template has no form for these roles in this order; None if it has one."""
        try:
            self._pieces_of(tuple(roles))
        except TemplateRefusal as error:
            return str(error)
        return None

    def _joined(self, messages: Sequence[Message], contents: list[list[int]]) -> tuple[list[int], list[int]]:
        first, *after = self._pieces_of(tuple(message["role"] for message in messages))
        ids, mask = list(first), [0] * len(first)
        for message, content, piece in zip(messages, contents, after, strict=True):
            speaks = int(message["role"] == "assistant")
            trained = self._end_of(piece) + 1 if speaks else 0
            ids += content + piece
            mask += [speaks] * (len(content) + trained) + [0] * (len(piece) - trained)
        return ids, mask

    def _pieces_of(self, roles: tuple[str, ...]) -> list[list[int]]:
        """Ids of the template's own text: before the first content, between each two, and after the last."""
        if roles in self._pieces:
            return self._pieces[roles]
        marks = [f"\ue000{number}\ue001" for number in range(len(roles))]
        messages = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
        told = ", ".join(roles[:_MOST_TOLD]) + (", ..." if len(roles) > _MOST_TOLD else "")
        try:
            text = self._template.render(messages=messages, add_generation_prompt=False, **self._named)
        except Exception as error:  # whatever a template raises, or makes Jinja raise
            raise TemplateRefusal(f"it does not take the roles {told}: {error}") from error
        pieces = _MARK.split(text)  # at once: cut one by one, a row of very many turns would take hours
        if pieces[1::2] != [str(number) for number in range(len(roles))]:
            raise TemplateRefusal(f"it does not write each content of the roles {told} once and in order")
        ids = {piece: self._tokenizer.encode(piece, allow_special=True) for piece in set(pieces[::2])}
        encoded = [ids[piece] for piece in pieces[::2]]
        for role, piece in zip(roles, encoded[1:], strict=True):
            if role == "assistant" and self._end_of(piece) is None:
                raise TemplateRefusal("no special token ends an assistant's turn, so a model could not learn to stop")
        self._pieces[roles] = encoded
        return encoded

    def _end_of(self, piece: list[int]) -> int | None:
        """Where in the text after an assistant's content its turn ends."""
        return next((place for place, token in enumerate(piece) if token in self._special), None)


def _compiled(template: str) -> "jinja2.Template":
    """The template, in the environment that `transformers` gives its templates."""
    import jinja2
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """{% generation %} marks what an assistant says; here it only stands for what is inside."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.globals["raise_exception"] = refuse
    try:
        return environment.from_string(template)
    except jinja2.TemplateError as error:
        raise TokenizerError(f"its chat template is no Jinja template: {error}") from error
