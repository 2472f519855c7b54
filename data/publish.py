"""Shards -> the Hub: `python -m data.publish shards/NAME-FINGERPRINT OWNER/NAME [--private] [--dry-run]`.

Uploads a verified folder of shards as a data set, with its tokenizer if that lies beside it and a card that says where
the text is from, how much there is, and what was dropped and why. Paths of this machine stay here, and so does
quarantine.jsonl. The login is the Hub's own (HF_TOKEN, or `hf auth login`); --dry-run writes the card to the terminal
and uploads nothing. Exit codes: 0 uploaded, 1 the folder or the Hub refused, 2 wrong arguments.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data import shards, sources
from machine import process
from storage import folder

_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
TOKENIZER = "tokenizer"  # its folder in the data set


def main(arguments: list[str] | None = None) -> int:
    """Verify, write the card, upload."""
    parser = argparse.ArgumentParser(
        prog="python -m data.publish", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("name", help="OWNER/NAME of the data set")
    parser.add_argument("--private", action="store_true", help="for a new data set: only for its owner")
    parser.add_argument("--license", default="other", help="of the text, for the card (other)")
    parser.add_argument("--dry-run", action="store_true", help="print the card, upload nothing")
    args = parser.parse_args(arguments)
    if not _NAME.fullmatch(args.name):
        parser.error(f"{args.name!r} is no data set: write OWNER/NAME")
    if problems := folder.verify(args.folder):
        print("\n".join([*problems, "prepare it again: what is published must be whole"]), file=sys.stderr)
        return 1
    try:
        about = json.loads((args.folder / shards.DESCRIPTION).read_text(encoding="utf-8"))
        text = card(about, args.name, args.license)
    except (OSError, ValueError, KeyError) as error:
        print(f"{args.folder} holds no shards ({error!r}): name a folder that data.prepare made", file=sys.stderr)
        return 1
    if args.dry_run:
        print(text)
        return 0
    try:
        address = upload(args.folder, about, args.name, text, args.private)
    except Exception as error:  # noqa: BLE001  whatever the Hub's client raises, nobody wants its traceback
        print(f"{args.name} was not uploaded: {error}\nLog in with `hf auth login` or set HF_TOKEN; the same command "
              "goes on with what is missing", file=sys.stderr)  # fmt: skip
        return 1
    print(address)
    return 0


def upload(path: Path, about: dict[str, Any], name: str, text: str, private: bool) -> str:
    """Upload the folder, its tokenizer and its card; returns the data set's address."""
    import huggingface_hub

    from tokenizer import Tokenizer

    fitting = (candidate for candidate in shards.tokenizers_beside(path)
               if Tokenizer.load(candidate).fingerprint == about["tokenizer_fingerprint"])  # fmt: skip
    tokenizer = next(fitting, None)
    hub = huggingface_hub.HfApi()
    address = hub.create_repo(name, repo_type="dataset", private=private, exist_ok=True)
    message = f"{about['name']}: {about['splits']['train']['tokens']:,} training tokens"
    with _public(path, about) as public:
        hub.upload_folder(repo_id=name, repo_type="dataset", folder_path=public, commit_message=message)
    if tokenizer is not None:
        hub.upload_folder(repo_id=name, repo_type="dataset", folder_path=tokenizer, path_in_repo=TOKENIZER,
                          commit_message="the tokenizer of these tokens")  # fmt: skip
    hub.upload_file(repo_id=name, repo_type="dataset", path_or_fileobj=text.encode(), path_in_repo="README.md",
                    commit_message="card")  # fmt: skip
    return str(address)


@contextlib.contextmanager
def _public(path: Path, about: dict[str, Any]) -> Iterator[Path]:
    """The folder as everybody may see it, with a manifest of its own; the tokens are in it as further names."""
    public = path.with_name(f".public-{path.name}")
    if public.exists():  # of a try that was killed
        folder.remove(public)
    described = {**about, "source": _from(about["source"]), "valid_source": _from(about["valid_source"])}
    with folder.write(public) as temporary:
        for file in path.iterdir():
            if file.name == shards.DESCRIPTION:
                (temporary / file.name).write_text(json.dumps(described, indent=1), encoding="utf-8")
            elif file.name not in (folder.MANIFEST, shards.QUARANTINE):
                try:
                    os.link(file, temporary / file.name)
                except OSError:  # a file system without further names
                    shutil.copyfile(file, temporary / file.name)
    try:
        yield public
    finally:
        folder.remove(public)


def _from(source: str | None) -> str | None:
    """A source without the path of local files."""
    if source is None:
        return None
    kind, rest = sources.parse(source)
    is_public = kind == "embedded" or (kind == "hub" and rest[0] not in "/.~" and not Path(rest).is_dir())
    return source if is_public else f"local {'data set' if kind == 'hub' else f'{kind} files'}"


def card(about: dict[str, Any], name: str, license_: str) -> str:
    """The data set's README.md."""
    rows = [f"| {split} | {counts['documents']:,} | {counts['tokens']:,} | {counts['bytes']:,} |"
            for split, counts in about["splits"].items()]  # fmt: skip
    dropped = [f"- {count:,} {reason}" for reason, count in about["dropped"].items()] or ["- nothing"]
    return "\n".join(
        [
            "---",
            f"license: {license_}",
            "tags: [tokenized]",
            "---",
            f"# {name.partition('/')[2]}",
            "",
            f"Tokens of {_from(about['source'])}: raw little-endian {about['dtype']}, every document followed by "
            f"end-of-text ({about['end_of_text']}); `*.lengths` has the tokens of each document as int64. "
            "`manifest.json` has every file's size and sha256.",
            "",
            "| split | documents | tokens | bytes of text |",
            "| --- | --- | --- | --- |",
            *rows,
            *(["", f"{told[0].upper()}{told[1:]}."] if (told := shards.end_held_out(about)) else []),
            "",
            f"Vocabulary of {about['vocab_size']:,}; tokenizer fingerprint `{about['tokenizer_fingerprint']}`.",
            "",
            "Left out:",
            "",
            *dropped,
            "",
        ]
    )


if __name__ == "__main__":
    process.outlive_readers()
    sys.exit(main())
