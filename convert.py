"""Take a trained model to other programs: python convert.py --checkpoint runs/x --to coreml --out FOLDER

The folder holds the model in the format asked for, its tokenizer, and export_report.json, which says
how far its numbers are from the checkpoint's; it appears as a whole or not at all. Exit codes: 0 done and checked,
1 the checkpoint cannot be used, or what was written does not compute the same, or the disk is full, 2 wrong arguments,
130 and 143 ended by Ctrl-C or SIGTERM, with nothing left behind.
"""

import argparse
import signal
import sys
from pathlib import Path

from export import FORMATS, ExportFault, MissingPackage, Options, format_of
from machine import process

CHOICES = {
    "io": ("swift", "stateless"),
    "quantize": ("none", "int8", "int4", "palette4", "q8_0"),
    "dtype": ("float32", "float16"),
}


def main() -> int:
    """Load, write, check; one line for whatever is wrong."""
    arguments = _parse()
    for number in (signal.SIGTERM, signal.SIGINT):  # an end that clears away what is half-written
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    process.prepare()
    from checkpoints import CheckpointError, locate, read_shape
    from export import bundle, trained

    out = arguments.out
    try:
        module = format_of(arguments.to)
        try:
            path = locate(arguments.checkpoint)
        except OSError as error:
            return _failed(f"--checkpoint {arguments.checkpoint} cannot be read: {error.strerror or error}")
        own = read_shape(path).context
        if arguments.context is not None and arguments.context > own:
            return _wrong(f"--context {arguments.context}: the model's own context is {own}: use at most that")
        model = trained.load(path, arguments.context or getattr(module, "DEFAULT_CONTEXT", None))
        if problems := module.problems(model, arguments.options):
            return _wrong("; ".join(problems))
        if problem := bundle.room_for(out, module.room(model, arguments.options)):
            return _failed(problem)
        report = bundle.export(model, arguments.to, arguments.options, out)
    except CheckpointError as error:
        return _failed(str(error))
    except MissingPackage as error:
        return _wrong(f"--to {arguments.to}: {error}")
    except ExportFault as error:
        return _failed(f"{arguments.checkpoint}: {error}")
    except OSError as error:
        return _failed(f"--out {out}: {error.strerror or f'cannot be written ({error}): is the disk full?'}")
    module.tell(report, out)
    return 0


def _wrong(problem: str) -> int:
    print(problem, file=sys.stderr)
    return 2


def _failed(problem: str) -> int:
    print(problem, file=sys.stderr)
    return 1


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True,
                        help="a run's folder, a checkpoint, a Hugging Face folder, or hub:OWNER/NAME")  # fmt: skip
    formats = "; ".join(f"{name}: {what}" for name, (_, what) in FORMATS.items())
    parser.add_argument("--to", required=True, choices=FORMATS, help=formats)
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="is made; never overwritten")
    parser.add_argument("--context", type=int, metavar="TOKENS", help="at most (default: the "
                        "model's own; coreai: 1024 at most)")  # fmt: skip
    parser.add_argument("--io", choices=CHOICES["io"], help="coreml: swift: with states, as swift-transformers loads "
                        "it; stateless: the whole text every time (default: swift)")  # fmt: skip
    parser.add_argument("--quantize", choices=CHOICES["quantize"], help="weights in fewer bits: coreml: int8; for GPUs "
                        "int4, for Neural Engines palette4; gguf: q8_0 (default: none)")  # fmt: skip
    parser.add_argument("--dtype", choices=CHOICES["dtype"], help="of weights that are not quantised (hf: default "
                        "float32; gguf, mlx: default float16)")  # fmt: skip
    parser.add_argument("--hub", metavar="OWNER/NAME", help="where the folder will lie on the Hub, for clients that "
                        "look its tokenizer up")  # fmt: skip
    arguments = parser.parse_args()
    given = {name: getattr(arguments, name) for name in ("io", "quantize", "dtype", "hub")}
    problems = [problem for name, value in given.items() if (problem := _unknown(arguments.to, name, value))]
    if arguments.context is not None and arguments.context < 2:
        problems.append(f"--context {arguments.context}: use 2 or more")
    try:
        if arguments.out.exists() or arguments.out.is_symlink():
            problems.append(f"--out {arguments.out} exists already: name another, or remove it")
        elif any(parent.exists() and not parent.is_dir() for parent in arguments.out.parents):
            problems.append(f"--out {arguments.out} lies in a file: name a folder")
        elif "checkpoints" in arguments.out.absolute().parent.parts:
            problems.append(f"--out {arguments.out} lies among a run's checkpoints, and would be taken for one: name "
                            "another folder")  # fmt: skip
    except OSError as error:
        problems.append(f"--out {arguments.out} cannot be made: {error.strerror}")
    if arguments.hub is not None and (arguments.hub.count("/") != 1 or not all(arguments.hub.split("/"))):
        problems.append(f"--hub {arguments.hub}: write OWNER/NAME")
    if problems:
        parser.error("; ".join(problems))
    arguments.options = Options(**given)
    return arguments


def _unknown(to: str, name: str, value: str | None) -> str | None:
    """Why the format `to` does not take the option; None if it does, or nothing was given."""
    known = format_of(to).OPTIONS
    choices = known.get(name)
    if value is None or (name in known and (choices is None or value in choices)):
        return None
    return f"--{name} {value}: --to {to} has {' and '.join(choices) if choices else 'no such option'}"


if __name__ == "__main__":
    sys.exit(main())
