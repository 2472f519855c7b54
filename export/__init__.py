"""Trained models in the formats of other programs. `FORMATS` is the list; a format is a module of this folder with

    OPTIONS: the names of convert.py's options that it knows, each with the choices it has; None: anything
    DEFAULT_CONTEXT: where it should be shorter than the model's own; may be left out
    problems(trained, options) -> what is impossible about it, a sentence each, before anything is written
    room(trained, options) -> bytes that writing it takes
    write(trained, options, folder) -> the report, a dict for export_report.json; raises ExportFault
    tell(report, out): print what was made, and what was not checked
"""

import dataclasses
from importlib import import_module
from types import ModuleType

FORMATS = {  # name: (module, what it is for)
    "coreml": ("export.coreml", "a .mlpackage for iOS 18 and macOS 15, checked here without a Mac"),
    "coreai": ("export.coreai", "an .aimodel for iOS 27 and macOS 27, run here by Apple's runtime"),
    "hf": ("export.huggingface", "a Hugging Face folder in the stock class that computes the same"),
    "gguf": ("export.gguf", "a GGUF file for llama.cpp and the apps that run it, on iPhones too"),
    "mlx": ("export.mlx", "a folder for mlx-lm and MLX Swift"),
}


class ExportFault(RuntimeError):
    """What was written is not what the checkpoint computes, or cannot be written; the message says where."""


class MissingPackage(ImportError):
    """A format needs a Python package that is not installed."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What convert.py was asked for, beside the checkpoint and the folder; None: the format's own default."""

    io: str | None = None  # coreml: swift | stateless
    quantize: str | None = None  # none | coreml: int8, int4, palette4 | gguf: q8_0
    dtype: str | None = None  # of weights that are not quantised, beside coreml: float32 | float16
    hub: str | None = None  # OWNER/NAME under which the folder will be on the Hub


def format_of(name: str) -> ModuleType:
    """The module of a format, imported now."""
    return import_module(FORMATS[name][0])
