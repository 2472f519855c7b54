"""The folder that an export becomes: what the format has written, and beside it what every client needs.

    tokenizer.json, tokenizer_config.json   with the token that begins a text, and the one that ends an answer
    config.json, generation_config.json     the shape; the tokens that begin and end
    golden.json, golden.npz                 of a Core ML package: prompts with ids, logits after them and greedy text
    export_report.json                      contract, sizes, how far off the numbers are, what was not verified
    README.md                               what is what

It is there as a whole or not at all, with the manifest of `storage.folder`.
"""

import dataclasses
import errno
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from checkpoints.huggingface import EXPORTED
from export import FORMATS, ExportFault, Options, format_of
from export.trained import Trained
from storage import folder as storage_folder

if TYPE_CHECKING:
    import numpy as np

    from tokenizer import Tokenizer

REPORT = "export_report.json"
GREEDY_TOKENS = 16
BEGUN = "{{- bos_token -}}"  # before a chat template that does not write it
# What tokenizers of other languages and libraries are known to split in other ways is among them.
GOLDEN_TEXTS = {
    "story": "Once upon a time there was a little girl",
    "numbers": "12 + 30 = 42; f(x) = x^2 - 7.5%",
    "lines": "One\r\nTwo\n\n\tthree  four \r\n",
    "marks": "Cafe\u0301, e\u0302tre, \u0928\u092e\u0938\u094d\u0924\u0947, \u0e21\u0e49\u0e32, \ud55c\uae00",
    "emoji": "\U0001f469\u200d\U0001f469\u200d\U0001f467 said \U0001f642\U0001f3fd!",
    "marked": "<|user|>no mark<|end|>",  # text that looks like special tokens
}
BEYOND_WINDOW = 40  # tokens by which the long prompt passes the largest window


@dataclasses.dataclass(frozen=True)
class Golden:
    """A prompt, and what the checkpoint makes of it in fp32."""

    name: str
    text: str | None  # None: ids alone
    ids: list[int]
    logits: "np.ndarray"  # [V] after the last id
    greedy: list[int]


def export(trained: Trained, format: str, options: Options, out: Path) -> dict[str, Any]:
    """Write the folder `out` and return its report.

    Raises:
        ExportFault: the format cannot hold the model, or what was written does not compute the same.
        FileExistsError: `out` is there already.
        OSError: the disk is full, or cannot be written to.
    """
    module = format_of(format)
    with storage_folder.write(out) as folder:
        _tokenizer(trained, folder)
        report = {"format": format, "model": _about(trained), **_written(module, trained, options, folder)}
        _configs(trained, folder)
        report["tokenizer"] = _check_tokenizer(trained, folder)
        report["files"] = {str(file.relative_to(folder)): file.stat().st_size
                           for file in sorted(folder.rglob("*")) if file.is_file()}  # fmt: skip
        storage_folder.write_file(folder / REPORT, json.dumps(report, indent=1) + "\n")
        storage_folder.write_file(folder / "README.md", _readme(format, report))
    return report


def _written(module: ModuleType, trained: Trained, options: Options, folder: Path) -> dict[str, Any]:
    """The format's own part; what libraries raise of a full disk, or of numbers that overflow, by names of ours."""
    from safetensors import SafetensorError

    from export.parity import NotFinite

    try:
        return module.write(trained, options, folder)
    except NotFinite as error:
        raise ExportFault(f"{error}: its numbers are too large for fp16; --dtype float32 holds them, where the format "
                          "has it") from error  # fmt: skip
    except SafetensorError as error:
        raise OSError(errno.EIO, f"cannot be written ({error}): is the disk full?") from error
    except RuntimeError as error:
        if "FileWriter" not in str(error):  # coremltools'
            raise
        raise OSError(errno.EIO, f"cannot be written ({error}): is the disk full?") from error


def room_for(out: Path, needed: int) -> str | None:
    """Why `needed` bytes do not fit where `out` is to be; None if they do."""
    parent = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(parent).free
    if needed <= free:
        return None
    return f"--out {out}: {needed / 1e6:,.0f} MB are needed and {free / 1e6:,.0f} MB are free: name another disk"


def golden(trained: Trained, greedy_tokens: int = GREEDY_TOKENS) -> list[Golden]:
    """The prompts, as the checkpoint continues them."""
    import numpy as np
    import torch

    texts = {name: (text, trained.begin + trained.tokenizer.encode(text)) for name, text in GOLDEN_TEXTS.items()}
    texts["long"] = (None, long_prompt(trained))
    found = []
    with torch.inference_mode():
        for name, (text, ids) in texts.items():
            ids = ids[: trained.config.context - 1]
            state = trained.model.new_state(1)
            logits = trained.model.step(torch.tensor([ids]), state)[0, -1]
            first, greedy = logits, []
            while len(greedy) < min(greedy_tokens, trained.config.context - len(ids)):
                logits[trained.never] = -np.inf
                greedy.append(int(logits.argmax()))
                if len(ids) + len(greedy) < trained.config.context:
                    logits = trained.model.step(torch.tensor([greedy[-1:]]), state)[0, -1]
            found.append(Golden(name, text, ids, first.numpy(), greedy))
    return found


def golden_ids(trained: Trained, length: int) -> list[int]:
    """So many ids of text of many kinds: the golden texts over and over."""
    pieces = [token for text in GOLDEN_TEXTS.values() for token in trained.tokenizer.encode(text)]
    return (trained.begin + pieces * (length // len(pieces) + 1))[:length]


def long_prompt(trained: Trained) -> list[int]:
    """Ids that reach past every window, as far as the context does."""
    return golden_ids(trained, min(trained.largest_window + BEYOND_WINDOW, trained.config.context))


def write_golden(trained: Trained, prompts: Sequence[Golden], folder: Path, stateful: bool) -> None:
    """golden.json with texts, ids and greedy continuations; golden.npz with the logits by the prompts' names."""
    import numpy as np

    from export.traced import NEVER

    told = [{"name": prompt.name, "text": prompt.text, "ids": prompt.ids, "greedy": prompt.greedy}
            for prompt in prompts]  # fmt: skip
    written = {"stateful": stateful, "begin": trained.begin, "prompts": told}
    storage_folder.write_file(folder / "golden.json", json.dumps(written, indent=1) + "\n")
    logits = {}
    for prompt in prompts:
        logits[prompt.name] = prompt.logits.astype(np.float32).copy()
        logits[prompt.name][trained.never] = NEVER
    np.savez_compressed(folder / "golden.npz", **logits)


def _about(trained: Trained) -> dict[str, Any]:
    return {
        "checkpoint": f"{trained.name}, {trained.path.resolve().name}",
        "parameters": trained.config.parameters()["total"],
        "context": trained.config.context,
        "shape": dataclasses.asdict(trained.config),
        "chats": trained.chats,
        "begin": trained.begin,
        "stops": trained.stops,
        "never_drawn": len(trained.never),
        "python": sys.version.split()[0],
    }


def _tokenizer(trained: Trained, folder: Path) -> None:
    """tokenizer.json states what begins a text; tokenizer_config.json names the one token at which clients stop."""
    tokenizer = trained.tokenizer
    tokenizer.save(folder, begins=bool(trained.begin))
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    names = {number: name for name, number in tokenizer.special_tokens.items()}
    config["eos_token"] = names.get(trained.end, config.get("eos_token"))
    if trained.chats:  # Core AI's runtime stops at each of these
        config["additional_special_tokens"] = [names[token] for token in trained.stops if token in names]
    if trained.begin and names.get(trained.begin[0]) == config.get("bos_token") and _leaves_out_begin(tokenizer):
        config["chat_template"] = BEGUN + tokenizer.chat_template
    config["model_max_length"] = trained.config.context
    storage_folder.write_file(file, json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def _leaves_out_begin(tokenizer: "Tokenizer") -> bool:
    """Whether there is a chat template that does not write what begins a text: clients add nothing to what one has
    written, and would ask the model in a way in which it was never taught."""
    from tokenizer import TokenizerError
    from tokenizer.conversations import ChatFormat

    try:
        return not ChatFormat(tokenizer).writes_begin
    except TokenizerError:
        return False


def _configs(trained: Trained, folder: Path) -> None:
    """generation_config.json, and a config.json where the format has written none of its own."""
    begin = {"bos_token_id": trained.begin[0]} if trained.begin else {}
    pad = trained.tokenizer.named_tokens(["pad_token"]).get("pad_token")
    padding = {} if pad is None else {"pad_token_id": trained.tokenizer.token_id(pad)}
    generation = {
        **begin, **padding, "eos_token_id": [trained.end, *(t for t in trained.stops if t != trained.end)],
        "max_length": trained.config.context, "suppress_tokens": trained.never,
    }  # fmt: skip
    storage_folder.write_file(folder / "generation_config.json", json.dumps(generation, indent=2) + "\n")
    if not (folder / "config.json").exists():
        shape = {"model_type": EXPORTED + trained.config.architecture, **begin, "eos_token_id": trained.end,
                 "vocab_size": trained.config.vocab_size, "max_position_embeddings": trained.config.context,
                 "num_hidden_layers": trained.config.n_layers, "hidden_size": trained.config.d_model,
                 "num_attention_heads": trained.config.n_heads,
                 "num_key_value_heads": trained.config.n_kv_heads}  # fmt: skip
        storage_folder.write_file(folder / "config.json", json.dumps(shape, indent=2) + "\n")


def _check_tokenizer(trained: Trained, folder: Path) -> dict[str, Any]:
    """What the `tokenizers` library, which clients use or copy, makes of the golden texts.

    Raises:
        ExportFault: other ids than ours.
    """
    import tokenizers

    engine = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    engine.encode_special_tokens = True  # as in a text, where marks are nothing special
    for name, text in GOLDEN_TEXTS.items():
        ours, theirs = trained.begin + trained.tokenizer.encode(text), engine.encode(text).ids
        if ours != theirs:
            raise ExportFault(f"tokenizer.json gives other ids for the golden text {name!r}: {theirs}, not {ours}")
    return {"fingerprint": trained.tokenizer.fingerprint, "begins_texts_with": trained.begin,
            "ends_with": trained.end, "texts_checked": len(GOLDEN_TEXTS)}  # fmt: skip


def _readme(format: str, report: dict[str, Any]) -> str:
    lines = [f"# {report['model']['checkpoint']}: {format}", "", FORMATS[format][1] + ".", ""]
    if home := report.get("home"):
        lines += [f"In the class `{home['class']}`: {home['least']}.", ""]
    lines += [f"- `{name}`: {size / 1e6:,.2f} MB" for name, size in report["files"].items() if size > 10_000]
    lines += ["", "Not verified where this was written:", ""]
    lines += [f"- {what}" for what in report.get("not_verified", ["nothing is left"])]
    return "\n".join([*lines, ""])
