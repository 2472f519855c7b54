"""The section base class, and validation that reports all problems at once.

pydantic finds wrong types, unknown keys and numbers out of range, all in one pass; `Section.problems()` adds what
only several keys, or the file system, can tell. The second kind is asked for even when the first kind was found: a
second pass puts defaults or empty values in place of what is wrong, and reports nothing at those keys again.
"""

import dataclasses
import difflib
from collections.abc import Sequence
from typing import Any, TypeVar, get_args, get_origin

import pydantic

from settings import secrets

EXIT_CODE = 2  # of every entry, when its config is wrong
_FORGIVE = object()  # validation context of the second pass


@dataclasses.dataclass(frozen=True)
class Problem:
    """One thing wrong with a config: the dotted key, the value found there, and what would be right."""

    key: str
    value: object
    remedy: str

    def __str__(self) -> str:
        value = "(hidden)" if secrets.looks_secret(self.key, self.value) else repr(self.value)
        return secrets.masked(f"{self.key}: {self.remedy} (it is {value})")

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
        """What is wrong across keys or in the file system; keys are relative to this section.

        It is also asked when some keys are wrong: these then hold their defaults or, where required, an empty value.
        """
        return []

    @pydantic.model_validator(mode="before")
    @classmethod
    def _forgive_keys(cls, raw: Any, info: pydantic.ValidationInfo) -> Any:
        if info.context is not _FORGIVE or isinstance(raw, cls):
            return raw
        given = raw if isinstance(raw, dict) else {}
        names = {name: field.alias or name for name, field in cls.model_fields.items()}
        missing = {names[name]: _blank(field) for name, field in cls.model_fields.items() if field.is_required()}
        return missing | {key: value for key, value in given.items() if key in names or key in names.values()}

    @pydantic.field_validator("*", mode="wrap")
    @classmethod
    def _forgive_value(cls, value: Any, check: Any, info: pydantic.ValidationInfo) -> Any:
        field = cls.model_fields[info.field_name]
        try:
            if isinstance(value, bool) and not _takes_booleans(field.annotation):
                raise ValueError(f"should not be {str(value).lower()}: this is no switch")
            return check(value)
        except ValueError:  # pydantic's own is one
            if info.context is not _FORGIVE:
                raise
            return _blank(field)


def _takes_booleans(annotation: Any) -> bool:
    return annotation in (bool, Any) or bool in get_args(annotation)


def _blank(field: Any) -> Any:
    """What stands in for a wrong value of a field: its default, or the least of its type."""
    if not field.is_required():
        return field.get_default(call_default_factory=True)
    kind = get_origin(field.annotation) or field.annotation
    if isinstance(kind, type) and issubclass(kind, Section):
        return kind.model_validate({}, context=_FORGIVE)
    return {int: 1, float: 1.0}.get(kind, kind() if kind in (str, list, dict) else None)


S = TypeVar("S", bound=Section)


def validate(section: type[S], raw: dict[str, Any]) -> S:
    """`raw` as a validated `section`.

    Raises:
        ConfigError: with every problem found, those of single keys first, then those across keys.
    """
    try:
        valid = section.model_validate(raw)
        problems = []
    except pydantic.ValidationError as error:
        problems = _from_pydantic(error, section, raw)
        valid = section.model_validate(raw, context=_FORGIVE)
    wrong = [problem.key for problem in problems]
    for problem in _cross_problems(valid, ""):
        if not any(f"{problem.key}.".startswith(f"{key}.") for key in wrong):
            problems.append(problem)
    if problems:
        raise ConfigError(problems)
    return valid


def as_plain(section: Section) -> dict[str, Any]:
    """The resolved section as plain YAML types, every default written out."""
    return section.model_dump(mode="json", by_alias=True)


def differences(before: Any, after: Any, key: str = "") -> list[tuple[str, Any, Any]]:
    """(key, value before, value after) of all that is not equal in two plain configs; None where one has none."""
    if isinstance(before, dict) and isinstance(after, dict):
        names = {**before, **after}
        pairs = [(str(name), before.get(name), after.get(name)) for name in names]
    elif isinstance(before, list) and isinstance(after, list) and any(isinstance(x, dict) for x in before + after):
        longest = max(len(before), len(after))
        padded = [values + [None] * (longest - len(values)) for values in (before, after)]
        pairs = [(str(place), *pair) for place, pair in enumerate(zip(*padded, strict=True))]
    else:
        return [(key, before, after)] if before != after else []
    return [found for name, one, other in pairs for found in differences(one, other, f"{key}.{name}" if key else name)]


def _from_pydantic(error: pydantic.ValidationError, section: type[Section], raw: Any) -> list[Problem]:
    """One problem for each wrong key; the members of a union complain one by one, and are heard as one."""
    remedies: dict[str, tuple[object, list[str]]] = {}
    for detail in error.errors(include_url=False, include_context=False):
        location = detail["loc"]
        if detail["type"] != "missing":
            location = location[: _depth(raw, location)]
        key = ".".join(str(part) for part in location) or "config"
        value, found = remedies.setdefault(key, (None if detail["type"] == "missing" else detail["input"], []))
        found.append(_remedy(detail["type"], detail["msg"], key.rpartition(".")[2], _keys(section, location)))
    return [Problem(key, value, " or ".join(found)) for key, (value, found) in remedies.items()]


def _remedy(kind: str, message: str, key: str, keys: list[str]) -> str:
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(key, keys, n=1)
        return f"there is no such key: {f'did you mean {near[0]}?' if near else 'correct its name or remove it'}"
    if kind == "missing":
        return "this key is required"
    if kind == "model_type":
        return "write keys and values here"
    return message.removeprefix("Value error, ").removeprefix("Input ")


def _keys(kind: Any, location: tuple[str | int, ...]) -> list[str]:
    """The keys that may stand where the last part of `location` does, below a section or a list or dict of them."""
    if isinstance(kind, type) and issubclass(kind, Section):
        fields = {field.alias or name: field.annotation for name, field in kind.model_fields.items()}
        if len(location) <= 1:
            return list(fields)
        return _keys(fields.get(str(location[0])), location[1:])
    members = get_args(kind)
    return _keys(members[-1], location[1:]) if members and len(location) > 1 else []


def _depth(raw: Any, location: tuple[str | int, ...]) -> int:
    """How much of `location` is really in `raw`: pydantic adds the names of union members."""
    for depth, part in enumerate(location):
        if isinstance(raw, dict) and part in raw or isinstance(raw, list) and isinstance(part, int) and part < len(raw):
            raw = raw[part]
        else:
            return depth
    return len(location)


def _cross_problems(value: Any, prefix: str) -> list[Problem]:
    found: list[Problem] = []
    if isinstance(value, Section):
        try:
            found += [problem.under(prefix) for problem in value.problems()]
        except (OSError, RuntimeError, ValueError) as error:  # a name too long, a closed folder, ~ of nobody
            path = getattr(error, "filename", None)
            found.append(Problem(prefix, path, f"name files and folders that can be looked at ({error})"))
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
