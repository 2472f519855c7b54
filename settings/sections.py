"""The section base class, the YAML reader with overrides, and validation that reports all problems at once.

pydantic finds wrong types, unknown keys and numbers out of range, all in one pass; `Section.problems()` adds what
only several keys, or the file system, can tell. The second kind is asked for even when the first kind was found: keys
that are wrong are replaced by their defaults for that purpose, and whatever they alone cause is not reported twice.
"""

import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import pydantic
import yaml

EXIT_CODE = 2  # of every entry, when its config is wrong


@dataclasses.dataclass(frozen=True)
class Problem:
    """One thing wrong with a config: the dotted key, the value found there, and what would be right."""

    key: str
    value: object
    remedy: str

    def __str__(self) -> str:
        return f"{self.key}: {self.remedy} (it is {self.value!r})"

    def under(self, prefix: str) -> "Problem":
        """The same problem, seen from the section that holds this one under `prefix`."""
        return dataclasses.replace(self, key=f"{prefix}.{self.key}" if prefix else self.key)


class ConfigError(Exception):
    """Everything that is wrong with a config. `str()` of it is the report; entries print it and exit with 2."""

    def __init__(self, problems: Sequence[Problem]):
        self.problems = list(problems)
        count = f"{len(self.problems)} problem{'s' if len(self.problems) != 1 else ''}"
        super().__init__("\n".join([f"the config has {count}:", *(f"  {problem}" for problem in self.problems)]))


class Section(pydantic.BaseModel):
    """One section of the config: typed keys with defaults, nothing unknown, nothing changed after validation."""

    model_config = pydantic.ConfigDict(
        extra="forbid", frozen=True, populate_by_name=True, protected_namespaces=(), allow_inf_nan=False
    )

    def problems(self) -> list[Problem]:
        """What is wrong across keys or in the file system; keys are relative to this section."""
        return []


S = TypeVar("S", bound=Section)


def read(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The config file as nested dicts, with `section.key=value` overrides laid over it (values are YAML).

    A numeric part of a key names an entry of a list: `phases.0.tokens=1000`.

    Raises:
        ConfigError: the file is missing, is not YAML or not a mapping, or an override has no `=` or no such place.
    """
    problems = []
    raw: dict[str, Any] = {}
    try:
        loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        if isinstance(loaded, dict):
            raw = loaded
        elif loaded is not None:
            problems.append(Problem("--config", str(path), "name a YAML file of sections (`section:` with keys below)"))
    except OSError as error:
        problems.append(Problem("--config", str(path), f"name a readable YAML file ({error.strerror})"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        problems.append(Problem("--config", str(path), f"name a valid YAML file ({error})".replace("\n", " ")))
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            problems.append(Problem(override, override, "write an override as section.key=value"))
            continue
        try:
            _lay_over(raw, key.split("."), yaml.safe_load(text))
        except yaml.YAMLError:
            problems.append(Problem(key, text, "give a value that is valid YAML"))
        except (KeyError, IndexError, ValueError, TypeError) as error:
            problems.append(Problem(key, text, f"override a key that exists ({error})"))
    if problems:
        raise ConfigError(problems)
    return raw


def _lay_over(raw: Any, parts: list[str], value: Any) -> None:
    *parents, last = parts
    place = raw
    for part in parents:
        if isinstance(place, list):
            place = place[int(part)]
        else:
            if place.get(part) is None:
                place[part] = {}
            place = place[part]
    if isinstance(place, list):
        place[int(last)] = value
    elif isinstance(place, dict):
        place[last] = value
    else:
        raise TypeError(f"{'.'.join(parents)} holds a single value, not keys")


def validate(section: type[S], raw: dict[str, Any]) -> S:
    """`raw` as a validated `section`.

    Raises:
        ConfigError: with every problem found, those of single keys first, then those across keys.
    """
    try:
        valid = section.model_validate(raw)
        problems = []
    except pydantic.ValidationError as error:
        problems = [_from_pydantic(detail) for detail in error.errors()]
        valid = _validate_repaired(section, raw, error)
    if valid is not None:
        wrong = {problem.key for problem in problems}
        problems += [problem for problem in _cross_problems(valid, "") if problem.key not in wrong]
    if problems:
        raise ConfigError(problems)
    return valid


def as_plain(section: Section) -> dict[str, Any]:
    """The resolved section as plain YAML types, every default written out."""
    return section.model_dump(mode="json", by_alias=True)


def _from_pydantic(detail: Any) -> Problem:
    key = ".".join(str(part) for part in detail["loc"]) or "config"
    if detail["type"] == "extra_forbidden":
        return Problem(key, detail["input"], "there is no such key: correct its name or remove it")
    if detail["type"] == "unexpected_keyword_argument":
        return Problem(key, detail["input"], "there is no such key: correct its name or remove it")
    if detail["type"] in ("missing", "missing_argument"):
        return Problem(key, None, "this key is required")
    message = detail["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return Problem(key, detail["input"], message)


def _validate_repaired(section: type[S], raw: dict[str, Any], error: pydantic.ValidationError) -> S | None:
    """`raw` without its wrong keys, if what is left is valid, so that the cross checks can still be made."""
    repaired = copy.deepcopy(raw)
    for _ in range(20):  # removing a key can leave its parent incomplete, which the next round removes
        locations = {_existing(repaired, detail["loc"]) for detail in error.errors()}
        for location in sorted(locations, key=lambda parts: [str(part) for part in parts], reverse=True):
            if not location:
                return None
            _remove(repaired, location)
        try:
            return section.model_validate(repaired)
        except pydantic.ValidationError as again:
            error = again
    return None


def _existing(raw: Any, location: tuple) -> tuple:
    """The longest part of `location` that is really in `raw` (pydantic may add names of union members, or miss keys)."""
    found = []
    for part in location:
        if isinstance(raw, dict) and part in raw or isinstance(raw, list) and isinstance(part, int) and part < len(raw):
            raw = raw[part]
            found.append(part)
        else:
            break
    return tuple(found)


def _remove(raw: Any, location: tuple) -> None:
    *parents, last = location
    try:
        for part in parents:
            raw = raw[part]
        del raw[last]
    except (KeyError, IndexError):
        pass  # an enclosing key was removed before


def _cross_problems(value: Any, prefix: str) -> list[Problem]:
    found: list[Problem] = []
    if isinstance(value, Section):
        found += [problem.under(prefix) for problem in value.problems()]
        children = {field.alias or name: getattr(value, name) for name, field in type(value).model_fields.items()}
    elif isinstance(value, dict):
        children = value
    elif isinstance(value, list | tuple):
        children = dict(enumerate(value))
    else:
        children = {}
    for name, child in children.items():
        found += _cross_problems(child, f"{prefix}.{name}" if prefix else str(name))
    return found
