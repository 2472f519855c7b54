"""A config file and its command-line overrides, as nested dicts.

YAML as people mean it: only `true` and `false` are booleans (`off` and `no` are words), a date is text, and a key that
is given twice is a mistake instead of a silent choice of the last.
"""

import re
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from settings import secrets
from settings.sections import ConfigError, Problem, S, validate

_TAG = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the rules above."""

    yaml_implicit_resolvers = {
        first: [(tag, form) for tag, form in forms if tag.removeprefix(_TAG) not in ("bool", "timestamp")]
        for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == _TAG + "merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable):  # if it is not, the parent says so
                if key in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"{key!r} is given twice", key_node.start_mark)
                seen.add(key)
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver(_TAG + "bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))


def read(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The config file as nested dicts, with `section.key=value` overrides laid over it (values are YAML).

    A numeric part of a key names an entry of a list, `*` every entry that is there: `phases.0.tokens=1000`,
    `data.sources.*.from=jsonl:mine.jsonl`.

    Raises:
        ConfigError: the file is missing, is not YAML or not a mapping, or an override has no `=` or no such place.
    """
    raw, problems = _read(path, overrides)
    if problems:
        raise ConfigError(problems)
    return raw


def load(
    section: type[S], path: str | Path, overrides: Sequence[str] = (), only: Sequence[str] | None = None
) -> S:
    """The config file with its overrides as a validated `section`; of the file's keys, `only` these are looked at.

    Raises:
        ConfigError: with everything that is wrong, in the overrides and in the sections.
    """
    raw, problems = _read(path, overrides)
    if any(problem.key == "--config" for problem in problems):
        raise ConfigError(problems)
    try:
        valid = validate(section, raw if only is None else {key: raw[key] for key in only if key in raw})
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(problems)
    return valid


def _read(path: str | Path, overrides: Sequence[str]) -> tuple[dict[str, Any], list[Problem]]:
    """What could be read, and what could not."""
    problems = []
    raw: dict[str, Any] = {}
    try:
        loaded = _load(Path(path).read_text(encoding="utf-8"))
        if isinstance(loaded, dict):
            raw = loaded
        elif loaded is not None:
            problems.append(Problem("--config", str(path), "name a YAML file of sections (`section:` with keys below)"))
    except OSError as error:
        problems.append(Problem("--config", str(path), f"name a readable YAML file ({error.strerror})"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        problems.append(Problem("--config", str(path), f"name a valid YAML file ({_one_line(error)})"))
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            problems.append(Problem(override, override, "write an override as section.key=value"))
            continue
        try:
            value = _load(text)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            problems.append(Problem(key, text, f"give a value that is valid YAML ({_one_line(error)})"))
            continue
        try:
            _lay_over(raw, key.split("."), value)
        except TypeError as error:
            problems.append(Problem(key, text, f"override a key that exists ({error})"))
    problems += [Problem(key, "(hidden)", secrets.REMEDY) for key in secrets.find(raw)]
    remedy = "leave out NUL and halves of surrogate pairs: no file and no model takes them"
    problems += [Problem(key, text, remedy) for key, text in _no_text(raw)]
    return raw, problems


def _no_text(raw: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """The dotted keys, and values, of strings that neither a path nor a prompt can hold."""
    if isinstance(raw, str):
        if any(character == "\0" or "\ud800" <= character <= "\udfff" for character in raw):
            yield key, raw
    elif isinstance(raw, dict | list):
        for name, value in raw.items() if isinstance(raw, dict) else enumerate(raw):
            yield from _no_text(value, f"{key}.{name}" if key else str(name))


def _load(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)  # noqa: S506, a safe loader


def _lay_over(place: Any, parts: list[str], value: Any, above: str = "") -> None:
    """Put `value` where `parts` lead from `place`, which is called `above` in messages."""
    part, *rest = parts
    if part == "*":
        entries = range(len(place)) if isinstance(place, list) else list(place) if isinstance(place, dict) else ()
        if not entries:
            raise TypeError(f"{above or 'the config'} has no entries for * to name")
        for entry in entries:
            _lay_over(place, [str(entry), *rest], value, above)
        return
    if isinstance(place, list):
        if not re.fullmatch("-?[0-9]+", part):
            raise TypeError(f"{above} is a list: name its entries 0 to {len(place) - 1}, or * for all of them")
        part = int(part)
        if not -len(place) <= part < len(place):
            raise TypeError(f"{above} has the entries 0 to {len(place) - 1}")
    elif not isinstance(place, dict):
        raise TypeError(f"{above} holds a single value, not keys")
    if not rest:
        place[part] = value
        return
    if isinstance(place, dict) and place.get(part) is None:
        place[part] = {}
    _lay_over(place[part], rest, value, f"{above}.{part}" if above else str(part))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
