"""`Tokenizer`: a thin class over `tokenizers.Tokenizer` that other rooms use for every tokenizer, ours or foreign.

Ours are byte-level BPE (Sennrich et al. 2016, https://arxiv.org/abs/1508.07909; over bytes as in GPT-2): every byte is
in the vocabulary, so any UTF-8 text comes back exactly. What this class adds to the library: text never turns into
special ids unless asked to, the token that begins a text, a fingerprint for shards and checkpoints, and folders that
`transformers` loads.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from storage import folder as storage_folder
from tokenizer import chat

MIN_VOCAB, MAX_VOCAB = 1_024, 50_257
TOKENIZER_FILE, CONFIG_FILE, TEMPLATE_FILE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
HUB = "hub:"

# Qwen2's pattern, to the letter: digits split singly, which helps small models with arithmetic, and stock llama.cpp
# knows it under the name "qwen2", which a GGUF export needs.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# While it learns, a run that the pattern leaves whole (a line of Chinese, DNA, emoji, spaces) is cut after so many
# characters: the library's time grows with the square of a run's length. Words and sentences are shorter.
LONGEST_RUN = 256
LEARNING_SPLIT = SPLIT.replace("+", f"{{1,{LONGEST_RUN}}}").replace("*", f"{{0,{LONGEST_RUN}}}")
MIN_FREQUENCY = 2  # a pair seen once is an accident of the corpus, and its token would hardly be trained
MAX_TOKEN_BYTES = 32  # otherwise one file of long rules or indents spends the vocabulary on runs of "-" or spaces

END_OF_TEXT_NAMES = (
    chat.END_OF_TEXT, "<|end_of_text|>", "<|endofdocument|>", "<end_of_text>", "<｜end▁of▁sentence｜>", "</s>", "<eos>",
    "<|eos|>", "[EOS]", "<|im_end|>", "<|eot_id|>", "<end_of_turn>", "[SEP]",
)  # fmt: skip

_BEFORE = 16  # tokens before a continuation that it is decoded with

logger = logging.getLogger(__name__)


class TokenizerError(ValueError):
    """A tokenizer that cannot be found, read, trained or trusted; the message says what would be right."""


class Tokenizer:
    """Byte-level BPE of our own, or any tokenizer that the `tokenizers` library reads.

    Attributes:
        vocab_size: the highest id plus one; for our own tokenizers that is the count of entries.
        end_of_text: id of the token that separates documents ("<|endoftext|>" in ours).
        end_of_text_token: its name.
        begin_of_text: id of the token that stands before a text's first: the one that the tokenizer's post-processor
            puts there, or its config asks for by `add_bos_token`; where it declares none, the end of text, after which
            our models learn that a text begins. `encode` never adds it.
        declares_begin: whether it declares one.
        fingerprint: sha256 (hex) of the canonical tokenizer.json; equal fingerprints mean equal ids for every text.
            That a text begins after the end of another one, as `save` states it, is no part of it.
        chat_template: the Jinja template of its conversations, or None.
    """

    def __init__(self, tokenizer_json: str, config: dict[str, Any] | None = None):
        """From the text of a tokenizer.json and, where there is one, its tokenizer_config.json.

        Raises:
            TokenizerError: not a tokenizer.json, no end-of-text token, or special tokens that plain text can forge.
        """
        definition = _parse(tokenizer_json)
        engine = _engine(definition)
        self.end_of_text_token = _find_end_of_text(engine, definition, config or {})
        self.end_of_text: int = engine.token_to_id(self.end_of_text_token)
        _settle(definition, self.end_of_text_token, self.end_of_text)
        begin = _find_begin_of_text(engine, config or {})
        self.declares_begin = begin is not None
        self.begin_of_text: int = self.end_of_text if begin is None else begin
        self._states_begin = self._without_statement(definition)
        # Two engines, since whether special tokens are recognised is a state of the engine and not of a call.
        self._marked, self._plain = _engine(definition), _engine(definition)
        self._plain.encode_special_tokens = True
        special = [token["content"] for token in definition["added_tokens"] if token["special"]]
        self._special = {token: self._marked.token_to_id(token) for token in special}
        _refuse_forgeable(self._plain, self._special, definition["model"].get("unk_token"))
        self.vocab_size: int = max(engine.get_vocab().values()) + 1
        canonical = json.dumps(json.loads(self._marked.to_str()), sort_keys=True, separators=(",", ":"))
        self.fingerprint = hashlib.sha256(canonical.encode()).hexdigest()
        declared = {key: value for key, value in (config or {}).items() if value is not None}
        self._config = {**chat.default_config(self._special, self.end_of_text_token), **declared}

    @classmethod
    def load(cls, source: str | Path) -> "Tokenizer":
        """The tokenizer at `source`: a folder with a tokenizer.json, such a file, or "hub:OWNER/NAME".

        From the Hub it is downloaded once, with the Hub's own login and cache; later loads work offline.

        Raises:
            TokenizerError: nothing there, not a tokenizer, or one that `__init__` refuses.
        """
        path = _from_hub(str(source)) if str(source).startswith(HUB) else Path(source)
        file = path / TOKENIZER_FILE if path.is_dir() else path
        try:
            tokenizer_json = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            found = "cannot be read" if file.exists() else "does not exist"
            raise TokenizerError(
                f"{file} {found}: name a folder with a {TOKENIZER_FILE}, such a file, or {HUB}OWNER/NAME"
            ) from error
        try:
            return cls(tokenizer_json, _read_config(path) if path.is_dir() else None)
        except TokenizerError as error:
            raise TokenizerError(f"{file}: {error}") from error

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Learn `vocab_size` entries (special tokens and the 256 bytes included) from `texts`; deterministic, and in
        time about proportional to their length.

        A corpus with too few repeated pairs gives fewer; a warning then says how many, and so does `vocab_size`.

        Raises:
            TokenizerError: `vocab_size` is not within 1,024 to 50,257.
            UnicodeEncodeError: a text holds a lone surrogate.
        """
        if not MIN_VOCAB <= vocab_size <= MAX_VOCAB:
            raise TokenizerError(f"vocab_size is {vocab_size:,}: choose {MIN_VOCAB:,} to {MAX_VOCAB:,}")
        engine = tokenizers.Tokenizer(models.BPE())
        engine.pre_tokenizer = _byte_level(LEARNING_SPLIT)
        engine.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=MIN_FREQUENCY,
            max_token_length=MAX_TOKEN_BYTES,
            special_tokens=[AddedToken(token, special=True, normalized=False) for token in chat.SPECIAL_TOKENS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        engine.train_from_iterator(texts, trainer)
        engine.pre_tokenizer = _byte_level(SPLIT)
        trained = cls(engine.to_str())
        trained.declares_begin = trained._states_begin = True
        if trained.vocab_size < vocab_size:
            logger.warning(
                "the text repeats too little for %s tokens: the tokenizer has %s", f"{vocab_size:,}",
                f"{trained.vocab_size:,}",
            )  # fmt: skip
        return trained

    def save(self, folder: str | Path, begins: bool = False) -> None:
        """Write tokenizer.json and tokenizer_config.json into `folder`, as `transformers.AutoTokenizer` reads them.

        `begins`: where the tokenizer declares no beginning of text, state the end of text as one, so that whoever loads
        it beside a model of ours puts it before a text, as we do. Our own tokenizers always state it.
        """
        states = self._states_begin or (begins and not self.declares_begin)
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        # This class in `transformers` takes tokenizer.json as it is; the model-specific ones rebuild parts of it.
        # "auto_map" would have it run code from the Hub.
        kept = {key: value for key, value in self._config.items() if key not in ("auto_map", "tokenizer_class")}
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,  # the default of older versions: decoding would drop spaces
            **kept,
        }
        if states:
            config.pop("add_bos_token", None)  # of older versions, which would put the token of another name there
            if "bos_token" not in (self.chat_template or ""):  # which would write another text with one
                config.setdefault("bos_token", self.end_of_text_token)
        tokenizer_json = json.dumps(self._definition(states), indent=2, ensure_ascii=False)
        storage_folder.write_file(folder / TOKENIZER_FILE, tokenizer_json)
        storage_folder.write_file(folder / CONFIG_FILE, json.dumps(config, indent=2, ensure_ascii=False) + "\n")

    def _definition(self, states_begin: bool) -> dict[str, Any]:
        """The tokenizer.json, with or without the statement that a text begins after the end of another one."""
        definition = json.loads(self._marked.to_str())
        if states_begin:
            own, statement = definition["post_processor"], self._statement()
            definition["post_processor"] = (
                statement if own is None else {"type": "Sequence", "processors": [own, statement]}
            )
        return definition

    def _statement(self) -> dict[str, Any]:
        """The post-processor that puts the end of text before every text, as tokenizer.json has it."""
        name = self.end_of_text_token
        single, second = (
            [{"SpecialToken": {"id": name, "type_id": number}}, {"Sequence": {"id": letter, "type_id": number}}]
            for number, letter in enumerate("AB")
        )
        special = {name: {"id": name, "ids": [self.end_of_text], "tokens": [name]}}
        return {"type": "TemplateProcessing", "single": single, "pair": single + second, "special_tokens": special}

    def _without_statement(self, definition: dict[str, Any]) -> bool:
        """Take that post-processor out of `definition`; whether it was there."""
        found, statement = definition.get("post_processor"), self._statement()
        if found == statement:
            definition["post_processor"] = None
            return True
        processors = (found or {}).get("processors") or []
        if len(processors) == 2 and processors[1] == statement:
            definition["post_processor"] = processors[0]
            return True
        return False

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Ids of `text`; nothing is added at either end.

        Special tokens spelled out in `text` are ordinary text, unless `allow_special`: only for text that the program
        itself wrote, such as a rendered chat prompt. In a document or a user's message they would be a forgery.

        Raises:
            ValueError: `text` holds a lone surrogate, which no UTF-8 text can.
        """
        engine = self._marked if allow_special else self._plain
        try:
            return engine.encode(text, add_special_tokens=False).ids
        except TypeError as error:
            raise _not_text([text]) from error

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each of `texts`, on all cores; special tokens spelled out in them stay ordinary text."""
        try:
            return [encoding.ids for encoding in self._plain.encode_batch_fast(list(texts), add_special_tokens=False)]
        except TypeError as error:
            raise _not_text(texts) from error

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """The text of `ids`; bytes that are not UTF-8, such as half a character, become U+FFFD.

        Raises:
            ValueError: an id outside 0 to vocab_size - 1.
        """
        ids = [int(token) for token in ids]
        wrong = next((token for token in ids if not 0 <= token < self.vocab_size), None)
        if wrong is not None:  # the library would drop it silently
            raise ValueError(f"{wrong} is no token id of this tokenizer: they go from 0 to {self.vocab_size - 1}")
        return self._plain.decode(ids, skip_special_tokens=skip_special)

    def continuation(self, before: Sequence[int], ids: Iterable[int]) -> str:
        """The text of `ids` as it goes on behind the ids `before`: decoded together with them, for many tokenizers
        leave out the space with which a text's first token begins."""
        special = set(self._special.values())
        head = [token for token in before if token not in special][-_BEFORE:]
        said, whole = self.decode(head), self.decode([*head, *ids])
        return whole[len(os.path.commonprefix([said, whole])) :]

    def token_id(self, token: str) -> int | None:
        """The id of a vocabulary entry by its name, such as "<|end|>"; None if there is none."""
        return self._plain.token_to_id(token)

    def is_lossless(self, texts: Iterable[str]) -> bool:
        """Whether every one of `texts` comes back exactly. Always so for ours; foreign tokenizers may lose spaces,
        case or rare characters, and then perplexity and bits per byte are those of another text."""
        return all(self.decode(self.encode(text)) == text for text in texts)

    @property
    def special_tokens(self) -> dict[str, int]:
        """Ids of the special tokens by name."""
        return dict(self._special)

    @property
    def definition(self) -> dict[str, Any]:
        """Its tokenizer.json, as `save` writes it."""
        return self._definition(self._states_begin)

    def named_tokens(self, names: Sequence[str]) -> dict[str, str]:
        """What tokenizer_config.json calls by these names ("bos_token"): a token's text, of those that it has."""
        found = {name: self._config.get(name) for name in names}
        texts = {name: token.get("content") if isinstance(token, dict) else token for name, token in found.items()}
        return {name: text for name, text in texts.items() if text}

    @property
    def chat_template(self) -> str | None:
        template = self._config.get("chat_template")
        if isinstance(template, list):  # several, by name, in older folders
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        return template

    def __reduce__(self) -> tuple[Any, ...]:
        # Pickling the engines themselves would lose `encode_special_tokens`: special ids forged in worker processes.
        return Tokenizer, (json.dumps(self._definition(self._states_begin)), self._config)

    def __repr__(self) -> str:
        return (
            f"Tokenizer(vocab_size={self.vocab_size}, end_of_text={self.end_of_text_token!r} ({self.end_of_text}), "
            f"fingerprint={self.fingerprint[:12]})"
        )


def _byte_level(split: str) -> pre_tokenizers.PreTokenizer:
    """Cuts text by the pattern `split`, and writes each part as its bytes."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _parse(tokenizer_json: str) -> dict[str, Any]:
    try:
        definition = json.loads(tokenizer_json)
    except ValueError as error:
        raise TokenizerError(f"not JSON ({error}): a {TOKENIZER_FILE} of the `tokenizers` library is needed") from error
    if not isinstance(definition, dict) or not isinstance(definition.get("model"), dict):
        raise TokenizerError(f'no {TOKENIZER_FILE} of the `tokenizers` library: it has no "model"')
    # Settings of somebody's training or serving that would cut, pad or shuffle documents here.
    definition["truncation"] = definition["padding"] = None
    if "dropout" in definition["model"]:
        definition["model"]["dropout"] = None
    definition["added_tokens"] = definition.get("added_tokens") or []
    return definition


def _engine(definition: dict[str, Any]) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(definition))
    except Exception as error:  # the library raises Exception itself
        raise TokenizerError(f"the `tokenizers` library cannot read it: {error}") from error


def _find_end_of_text(engine: tokenizers.Tokenizer, definition: dict[str, Any], config: dict[str, Any]) -> str:
    """The name of the token that ends a document: a known name among the special tokens, else the "eos_token" of the
    config (of a chat model: the end of a turn), else a known name anywhere in the vocabulary."""
    special = {token["content"] for token in definition["added_tokens"] if token.get("special")}
    declared = config.get("eos_token")
    declared = declared.get("content") if isinstance(declared, dict) else declared
    candidates = [name for name in END_OF_TEXT_NAMES if name in special]
    candidates += [name for name in (declared, *END_OF_TEXT_NAMES) if name and engine.token_to_id(name) is not None]
    if not candidates:
        looked_for = " ".join(END_OF_TEXT_NAMES) + (f" {declared}" if declared else "")
        raise TokenizerError(f'no end-of-text token: it needs one of {looked_for}, or "eos_token" in {CONFIG_FILE}')
    return candidates[0]


def _find_begin_of_text(engine: tokenizers.Tokenizer, config: dict[str, Any]) -> int | None:
    """The token that the post-processor puts right before a text, or that the config asks for; None if neither does."""
    encoding = engine.encode("a", add_special_tokens=True)
    plain = next((place for place, mark in enumerate(encoding.special_tokens_mask) if not mark), 0)
    if plain:
        return encoding.ids[plain - 1]
    declared = config.get("bos_token") if config.get("add_bos_token") else None
    declared = declared.get("content") if isinstance(declared, dict) else declared
    return engine.token_to_id(declared) if declared else None


def _settle(definition: dict[str, Any], end_of_text: str, end_of_text_id: int) -> None:
    """Make the end-of-text token special where it is not, so that text cannot spell it."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    for token in definition["added_tokens"]:
        token["special"] = token.get("special", False) or token["content"] == end_of_text
    if end_of_text not in (token["content"] for token in definition["added_tokens"]):
        definition["added_tokens"].append({"id": end_of_text_id, "content": end_of_text, **flags, "special": True})
        definition["added_tokens"].sort(key=lambda token: token["id"])


def _refuse_forgeable(plain: tokenizers.Tokenizer, special: dict[str, int], unknown: str | None) -> None:
    """Some models (Unigram, whole-word ones) reach special tokens from ordinary text all the same."""
    forbidden = {token: number for token, number in special.items() if token != unknown}
    spelled = [text for token in forbidden for text in (token, f"a {token} b", f"a{token}b")]
    reached = {number for encoding in plain.encode_batch(spelled, add_special_tokens=False) for number in encoding.ids}
    forged = [token for token, number in forbidden.items() if number in reached]
    if forged:
        raise TokenizerError(
            f"ordinary text that spells {' '.join(forged[:4])} would become that special token, so that a document "
            "could end itself or forge a role: choose a byte-level BPE tokenizer"
        )


def _read_config(folder: Path) -> dict[str, Any] | None:
    config, template = None, folder / TEMPLATE_FILE
    if (folder / CONFIG_FILE).exists():
        try:
            config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        except ValueError as error:
            raise TokenizerError(f"{folder / CONFIG_FILE} is not JSON ({error})") from error
        if not isinstance(config, dict):
            raise TokenizerError(f"{folder / CONFIG_FILE} holds no JSON object")
    if template.exists():
        config = {**(config or {}), "chat_template": template.read_text(encoding="utf-8")}
    return config


def _from_hub(source: str) -> Path:
    import huggingface_hub  # lazily: only runs whose config names the Hub need it

    name = source.removeprefix(HUB)
    if name.count("/") != 1 or not all(name.split("/")):
        raise TokenizerError(f"{source}: write a tokenizer of the Hub as {HUB}OWNER/NAME")
    try:
        return Path(
            huggingface_hub.snapshot_download(name, allow_patterns=[TOKENIZER_FILE, CONFIG_FILE, TEMPLATE_FILE])
        )
    except Exception as error:  # its errors share no base class: HTTP, cache, validation, connection
        reason = str(error).strip().splitlines()[0]
        raise TokenizerError(
            f"{source} could not be loaded from the Hub or its cache ({type(error).__name__}: {reason}): check the "
            "name, the network, and the login (`hf auth login` or HF_TOKEN) if it is private"
        ) from error


def _not_text(texts: Sequence[str]) -> ValueError:
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            return ValueError(f"text {number} is {type(text).__name__}, not str")
        place = next((i for i, character in enumerate(text) if "\ud800" <= character <= "\udfff"), None)
        if place is not None:
            return ValueError(f"text {number} has a lone surrogate ({text[place]!a} at {place}), which is not UTF-8")
    return ValueError("not text that the tokenizer can read")
