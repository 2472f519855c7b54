"""The third stage of preparation: the documents of one piece -> their tokens, in a folder of their own.

By any number of processes at once; `data/shards.py` joins the pieces to shards.
"""

import functools
import json
from pathlib import Path

from data import conversations, shards
from data.preparation.read_pieces import batches
from data.preparation.select_documents import kept
from storage import folder
from tokenizer import Tokenizer
from tokenizer.conversations import ChatFormat


def write_tokens(
    table: Path, answers: bytes, cut: int | None, tokenizer: Path, masked: bool, path: Path
) -> None:
    """Write the documents of a table that stay as one shard a side to the folder `path`, unless that is done.

    Args:
        answers: what became of each row (select_documents.py).
        cut: where the row that is cut, if one is.
        masked: the documents are conversations.
    """
    if path.exists():
        if not folder.verify(path):
            return
        folder.remove(path)
    encoder = _tokenizer(tokenizer)
    dtype = shards.token_dtype(encoder.vocab_size)
    with folder.write(path, tidy=False) as temporary:
        writers = {split: shards.SplitWriter(temporary, split, dtype, encoder.end_of_text, masked)
                   for split in shards.SPLITS}  # fmt: skip
        refused = 0
        for batch in batches(kept(table, answers, cut), lambda document: document[1]):
            if masked:
                refused += _write_conversations(batch, tokenizer, writers)
                continue
            for (side, text), tokens in zip(batch, encoder.encode_batch([text for _, text in batch]), strict=True):
                writers[side].write(text, tokens)
        counts = {split: writer.close() for split, writer in writers.items()}
        about = {"splits": counts, "refused": refused}
        (temporary / shards.DESCRIPTION).write_text(json.dumps(about), encoding="utf-8")


def _write_conversations(batch: list[tuple[str, str]], tokenizer: Path, writers: dict[str, shards.SplitWriter]) -> int:
    """Write (side, conversation) of each; returns how many have roles for which the chat template has no form."""
    chat, begin = _chat_format(tokenizer), _tokenizer(tokenizer).begin_of_text
    told = [(side, text, conversations.messages_of(text)) for side, text in batch]
    taken = [part for part in told if chat.accepts([message["role"] for message in part[2]]) is None]
    encoded = chat.encode_batch([messages for _, _, messages in taken])
    for (side, text, messages), (tokens, mask) in zip(taken, encoded, strict=True):
        said = "".join(message["content"] for message in messages)
        answers = "".join(conversations.answers_of(text))
        first = int(tokens[0] == begin)  # which is read before every document, so that it is not stored
        writers[side].write_conversation(said, tokens[first:], mask[first:], answers)
    return len(told) - len(taken)


@functools.cache
def _tokenizer(path: Path) -> Tokenizer:
    return Tokenizer.load(path)


@functools.cache
def _chat_format(path: Path) -> ChatFormat:
    return ChatFormat(_tokenizer(path))
