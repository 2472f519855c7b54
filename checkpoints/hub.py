"""Stock models of the Hugging Face Hub: `hub:OWNER/NAME` becomes a local folder, downloaded once into the Hub's own
cache, with the Hub's own login. Only what is data comes along: shape, safetensors, tokenizer; never a pickle or code.
"""

import re
from pathlib import Path

from checkpoints.checkpoint import CheckpointError

HUB = "hub:"
FORM = f"{HUB}OWNER/NAME"
WANTED = (
    "config.json", "generation_config.json", "*.safetensors", "model.safetensors.index.json", "tokenizer.json",
    "tokenizer_config.json", "chat_template.jinja",
)  # fmt: skip
NOT_WANTED = ("*/*", "consolidated*")  # other forms of a model in folders below; and the same weights once more
_NAME = re.compile(rf"{HUB}[\w.-]+/[\w.-]+")


def is_name(path: str | Path) -> bool:
    """Whether `path` is meant to name a model of the Hub."""
    return str(path).startswith(HUB)


def is_well_formed(path: str | Path) -> bool:
    """Whether it does so in the way that there is."""
    return _NAME.fullmatch(str(path)) is not None


def download(path: str | Path, only_cached: bool = False) -> Path:
    """The local folder of the model that `path` names, as it now is on the Hub; without a network, as it last was.

    Args:
        only_cached: do not ask the Hub: another process has just downloaded it.

    Raises:
        CheckpointError: no such form or name, no access, or neither network nor cache.
    """
    if not is_well_formed(path):
        raise CheckpointError(f"{path}: write a model of the Hub as {FORM}")
    import huggingface_hub  # lazily: only runs that name the Hub need it

    try:
        folder = huggingface_hub.snapshot_download(
            str(path).removeprefix(HUB), allow_patterns=list(WANTED), ignore_patterns=list(NOT_WANTED),
            local_files_only=only_cached,
        )  # fmt: skip
    except Exception as error:  # its errors share no base class: HTTP, cache, validation, connection
        reason = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise CheckpointError(
            f"{path} could not be loaded from the Hub or its cache ({type(error).__name__}: {reason}): check the name, "
            "the network, and the login (`hf auth login` or HF_TOKEN) if it is private; without a network, name a "
            "local folder with config.json, *.safetensors and tokenizer.json"
        ) from error
    if not (Path(folder) / "config.json").is_file():
        raise CheckpointError(f"{path} has no config.json on the Hub, or only some of its files are in the cache: name "
                              "a model in the form that transformers saves")  # fmt: skip
    return Path(folder)
