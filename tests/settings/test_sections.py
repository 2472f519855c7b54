"""Everything wrong with a config comes out in one report, each with its key, its value and what would be right."""

import copy
from typing import Literal

import pydantic
import pytest

from settings import ConfigError, Problem, Section, as_plain, read, validate


class Engine(Section):
    """Cylinders must divide the bolts."""

    bolts: int = pydantic.Field(12, ge=1)
    cylinders: int = pydantic.Field(4, ge=1)
    rate: float = pydantic.Field(0.5, gt=0)
    fuel: Literal["petrol", "diesel"] = "petrol"
    turbo: bool = False
    hoses: int | Literal["auto"] = "auto"
    span: tuple[float, float] = (0.0, 1.0)

    def problems(self) -> list[Problem]:
        if self.bolts % self.cylinders:
            return [Problem("cylinders", self.cylinders, f"use a divisor of bolts ({self.bolts})")]
        return []


class Leg(Section):
    """A part of the journey: all of it must be said."""

    from_: str = pydantic.Field(alias="from")
    to: str = pydantic.Field(min_length=1)
    km: int = pydantic.Field(ge=1)
    stops: dict[str, float] = pydantic.Field(min_length=1)
    engine: Engine = Engine()

    def problems(self) -> list[Problem]:
        return [Problem("to", self.to, "go somewhere else than you are")] if self.to == self.from_ else []


class Tolls(Section):
    """A section that must be there."""

    prices: dict[str, int]


class Journey(Section):
    """Nested, listed and named sections."""

    name: str = "trip"
    engine: Engine = Engine()
    tolls: Tolls
    legs: list[Leg] = pydantic.Field(min_length=1)
    cars: dict[str, Engine] = {}

    def problems(self) -> list[Problem]:
        return [
            Problem(f"legs.{number}.stops.{stop}", stop, "name a stop that has a price")
            for number, leg in enumerate(self.legs)
            for stop in leg.stops
            if self.tolls.prices and stop not in self.tolls.prices
        ]


LEG = {"from": "A", "to": "B", "km": 3, "stops": {"inn": 1.0}}
GOOD = {"tolls": {"prices": {"inn": 2}}, "legs": [LEG, {**LEG, "from": "B", "to": "C", "stops": {"inn": 2.0}}]}
GOOD["cars"] = {"red": {"bolts": 8}}


def with_(**changes) -> dict:
    """GOOD with values put at dotted keys (`__` for a dot); ... takes a key away."""
    raw = copy.deepcopy(GOOD)
    for key, value in changes.items():
        *parents, last = [int(part) if part.isdigit() else part for part in key.split("__")]
        place = raw
        for part in parents:
            place = place.setdefault(part, {}) if isinstance(place, dict) else place[part]
        if value is ...:
            del place[last]
        else:
            place[last] = value
    return raw


def problems(raw: dict, section=Journey) -> dict[str, Problem]:
    with pytest.raises(ConfigError) as error:
        validate(section, raw)
    found = {problem.key: problem for problem in error.value.problems}
    assert len(found) == len(error.value.problems), "a key was reported twice"
    for problem in found.values():
        assert problem.remedy and str(problem) in str(error.value)
    return found


def test_a_good_config_is_typed_and_has_its_defaults():
    valid = validate(Journey, GOOD)
    assert valid.legs[1].from_ == "B" and valid.cars["red"].bolts == 8 and valid.engine == Engine()
    assert validate(Journey, with_(engine__rate="3e-4")).engine.rate == 3e-4  # what YAML takes for a word
    assert validate(Journey, as_plain(valid)) == valid
    assert as_plain(valid)["legs"][0]["engine"]["span"] == [0.0, 1.0]
    with pytest.raises(pydantic.ValidationError):
        valid.engine.bolts = 9


@pytest.mark.parametrize(
    ("changes", "key", "value", "remedy"),
    [
        ({"engin": {}}, "engin", {}, "no such key"),
        ({"legs__1__too": 1}, "legs.1.too", 1, "no such key"),
        ({"cars__red__wheels": 4}, "cars.red.wheels", 4, "no such key"),
        ({"legs__0__to": ...}, "legs.0.to", None, "required"),
        ({"tolls": ...}, "tolls", None, "required"),
        ({"legs": []}, "legs", [], "at least 1 item"),
        ({"legs": None}, "legs", None, "valid list"),
        ({"legs__1": "home"}, "legs.1", "home", "keys and values"),
        ({"legs__1__stops": {}}, "legs.1.stops", {}, "at least 1"),
        ({"engine": 7}, "engine", 7, "keys and values"),
        ({"engine__rate": -0.1}, "engine.rate", -0.1, "greater than 0"),
        ({"engine__rate": "fast"}, "engine.rate", "fast", "valid number"),
        ({"engine__rate": float("nan")}, "engine.rate", ..., "finite"),
        ({"engine__rate": float("inf")}, "engine.rate", float("inf"), "finite"),
        ({"engine__rate": None}, "engine.rate", None, "valid number"),
        ({"legs__0__stops__inn": float("-inf")}, "legs.0.stops.inn", float("-inf"), "finite"),
        ({"engine__span": [0, float("nan")]}, "engine.span.1", ..., "finite"),
        ({"engine__span": [0]}, "engine.span.1", None, "required"),
        ({"engine__span": [0, 1, 2]}, "engine.span", [0, 1, 2], "at most 2"),
        ({"engine__bolts": 2.5}, "engine.bolts", 2.5, "valid integer"),
        ({"engine__bolts": [2]}, "engine.bolts", [2], "valid integer"),
        ({"engine__bolts": True}, "engine.bolts", True, "no switch"),
        ({"engine__hoses": False}, "engine.hoses", False, "no switch"),
        ({"engine__turbo": "often"}, "engine.turbo", "often", "valid boolean"),
        ({"engine__fuel": "coal"}, "engine.fuel", "coal", "'petrol' or 'diesel'"),
        ({"engine__hoses": "many"}, "engine.hoses", "many", "valid integer"),
        ({"name": 3}, "name", 3, "valid string"),
        ({"engine__cylinders": 5}, "engine.cylinders", 5, "divisor of bolts (12)"),
        ({"legs__1__to": "B"}, "legs.1.to", "B", "somewhere else"),
        ({"legs__1__engine": {"cylinders": 7}}, "legs.1.engine.cylinders", 7, "divisor of bolts (12)"),
        ({"cars__red__cylinders": 3}, "cars.red.cylinders", 3, "divisor of bolts (8)"),
        ({"legs__1__stops__pub": 1}, "legs.1.stops.pub", "pub", "that has a price"),
    ],
)
def test_one_problem(changes, key, value, remedy):
    found = problems(with_(**changes))
    assert list(found) == [key]
    assert value is ... or found[key].value == value
    assert remedy in found[key].remedy


def test_the_members_of_a_union_speak_as_one():
    (problem,) = problems(with_(engine__hoses="many")).values()
    assert "integer" in problem.remedy and "'auto'" in problem.remedy


def test_all_problems_come_in_one_report():
    raw = with_(engin=1, engine__rate=-1, engine__cylinders=5, legs__0__km="far", legs__1__to="B", cars__red__bolts=0)
    found = problems(raw)
    assert set(found) == {"engin", "engine.rate", "engine.cylinders", "legs.0.km", "legs.1.to", "cars.red.bolts"}
    with pytest.raises(ConfigError, match="^the config has 6 problems:\n"):
        validate(Journey, raw)
    with pytest.raises(ConfigError, match="^the config has 1 problem:\n  engin: .*it is 1"):
        validate(Journey, with_(engin=1))


@pytest.mark.parametrize(
    "broken",
    [{"tolls": ...}, {"legs__0__to": ...}, {"legs__0__km": "x"}, {"legs__0": None}, {"legs__0": {}}, {"name": []},
     {"legs__0__engine": 3}, {"legs__0__stops": {}}, {"cars__red": 1}, {"extra": 1}, {"engine__rate": -1}],
)  # fmt: skip
def test_checks_across_keys_are_made_whatever_else_is_wrong(broken):
    raw = with_(engine__cylinders=5, legs__1__to="B", legs__1__engine={"cylinders": 7}, **broken)
    assert {"engine.cylinders", "legs.1.to", "legs.1.engine.cylinders"} < set(problems(raw))


def test_checks_of_the_whole_are_made_with_the_right_places():
    """The first leg is broken, and the second is still the second."""
    found = problems(with_(legs__0__to=..., legs__1__stops__pub=1, legs__1__to="B"))
    assert set(found) == {"legs.0.to", "legs.1.stops.pub", "legs.1.to"}


@pytest.mark.parametrize(
    "changes",
    [{"engine__bolts": "x"}, {"engine__cylinders": "x"}, {"engine": []}, {"tolls__prices": 3}, {"tolls": {}},
     {"legs": 3}, {"legs__0__from": 3, "legs__0__to": ""}],
)  # fmt: skip
def test_what_a_wrong_key_causes_is_not_reported_again(changes):
    wrong = {key.replace("__", ".") for key, value in changes.items()} - {"tolls"} | (
        {"tolls.prices"} if changes == {"tolls": {}} else set()
    )
    assert set(problems(with_(**changes))) == wrong


def test_a_config_that_is_empty_or_no_mapping():
    assert set(problems({})) == {"tolls", "legs"}
    assert set(problems([])) == {"config"}


# --- reading


def read_text(tmp_path, text, *overrides):
    path = tmp_path / "c.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read(path, overrides)


def reading_problems(path, *overrides):
    with pytest.raises(ConfigError) as error:
        read(path, overrides)
    return error.value.problems


TEXT = "a: {b: 1, c: [x, y]}\nlegs: [{km: 1}, {km: 2}]\nnothing:\n"


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("a.b=2", lambda raw: raw["a"].update(b=2)),
        ("a.b=", lambda raw: raw["a"].update(b=None)),
        ("a.b=null", lambda raw: raw["a"].update(b=None)),
        ("a.b=x=y", lambda raw: raw["a"].update(b="x=y")),
        ("a.b=[1, {k: 2}]", lambda raw: raw["a"].update(b=[1, {"k": 2}])),
        ("a.b='3'", lambda raw: raw["a"].update(b="3")),
        ("a.new=1.5e-4", lambda raw: raw["a"].update(new=0.00015)),
        ("a.new.deep.er=1", lambda raw: raw["a"].update(new={"deep": {"er": 1}})),
        ("nothing.x=1", lambda raw: raw.update(nothing={"x": 1})),
        ("new=1", lambda raw: raw.update(new=1)),
        ("a.c.1=z", lambda raw: raw["a"].update(c=["x", "z"])),
        ("legs.1.km=5", lambda raw: raw["legs"][1].update(km=5)),
        ("legs.-1.km=5", lambda raw: raw["legs"][1].update(km=5)),
        ("legs.0={}", lambda raw: raw["legs"].__setitem__(0, {})),
        ("legs=[]", lambda raw: raw.update(legs=[])),
        ("legs.*.km=5", lambda raw: [leg.update(km=5) for leg in raw["legs"]]),
        ("legs.*.new.deep=5", lambda raw: [leg.update(new={"deep": 5}) for leg in raw["legs"]]),
        ("a.*=5", lambda raw: raw["a"].update(b=5, c=5)),
    ],
)
def test_an_override(tmp_path, override, changed):
    expected = read_text(tmp_path, TEXT)
    changed(expected)
    assert read_text(tmp_path, TEXT, override) == expected


def test_overrides_are_laid_over_in_turn(tmp_path):
    assert read_text(tmp_path, TEXT, "a={}", "a.b=1", "a.b=2")["a"] == {"b": 2}


@pytest.mark.parametrize(
    ("override", "key", "remedy"),
    [
        ("a.b", "a.b", "section.key=value"),
        ("--lr", "--lr", "section.key=value"),
        ("=3", "=3", "section.key=value"),
        ("", "", "section.key=value"),
        ("a.b.c=1", "a.b.c", "a.b holds a single value"),
        ("a.b.c.d.e=1", "a.b.c.d.e", "a.b holds a single value"),
        ("legs.2.km=1", "legs.2.km", "legs has the entries 0 to 1"),
        ("legs.-3={}", "legs.-3", "legs has the entries 0 to 1"),
        ("legs.first.km=1", "legs.first.km", "legs is a list: name its entries 0 to 1"),
        ("legs.first=1", "legs.first", "legs is a list"),
        ("nothing.*.x=1", "nothing.*.x", "nothing has no entries for * to name"),
        ("a.b.*=1", "a.b.*", "a.b has no entries for * to name"),
        ("a.*.x=1", "a.*.x", "a.b holds a single value"),
        ("a.b=[1", "a.b", "valid YAML"),
        ("a.b={x: 1, x: 2}", "a.b", "'x' is given twice"),
        ("a.b=!!python/object/apply:os.getcwd []", "a.b", "valid YAML"),
    ],
)
def test_a_wrong_override(tmp_path, override, key, remedy):
    read_text(tmp_path, TEXT)
    (problem,) = reading_problems(tmp_path / "c.yaml", override)
    assert problem.key == key and remedy in problem.remedy
    assert "\n" not in str(problem)


def test_all_wrong_overrides_and_the_file_come_at_once(tmp_path):
    found = reading_problems(tmp_path / "none.yaml", "a", "b=[", "c=1", "d.e=1")
    assert [problem.key for problem in found] == ["--config", "a", "b"]


@pytest.mark.parametrize(
    ("content", "remedy"),
    [(b"- a\n- b\n", "sections"), (b"text", "sections"), (b"3", "sections"), (b"a: [1", "valid YAML"),
     (b"a: 1\n\tb: 2", "valid YAML"), (b"\xff\xfe\x00", "valid YAML"), (b"a: \x00", "valid YAML"),
     (b"a: {b: 1}\nc: 2\na: {d: 1}", "'a' is given twice"), (b"a: {b: 1, b: 2}", "'b' is given twice"),
     (b"a: !!python/object/apply:os.system [ls]", "valid YAML"), (b"a: 1\n---\nb: 2", "valid YAML"),
     (b"? [1]\n: 2", "valid YAML"), (b"a: " + b"[" * 3000, "valid YAML")],
)  # fmt: skip
def test_a_file_that_is_no_config(tmp_path, content, remedy):
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    (problem,) = reading_problems(path)
    assert (problem.key, problem.value) == ("--config", str(path))
    assert remedy in problem.remedy and "\n" not in str(problem)


def test_a_file_that_cannot_be_read(tmp_path):
    for path, reason in (tmp_path / "none.yaml", "No such file"), (tmp_path, "Is a directory"):
        (problem,) = reading_problems(path)
        assert problem.value == str(path) and reason in problem.remedy


def test_an_empty_file_holds_nothing(tmp_path):
    for text in "", "# only a comment\n", "\ufeff", "---\n":
        assert read_text(tmp_path, text) == {}


@pytest.mark.parametrize(
    ("text", "value"),
    [("off", "off"), ("no", "no"), ("on", "on"), ("y", "y"), ("true", True), ("False", False), ("~", None), ("", None),
     ("1", 1), ("-7", -7), ("1_000", 1000), ("0x10", 16), ("0", 0), ("3e-4", "3e-4"),
     ("1.0e-6", 1e-6), ("-1.5", -1.5), (".5", 0.5), (".inf", float("inf")),
     ("2024-01-31", "2024-01-31"), ("1.2.3", "1.2.3"), (".", "."), ("-", [None]),
     ("'off'", "off"), ("'1'", "1"), ("jsonl:a/*.jsonl", "jsonl:a/*.jsonl"), ("-inf", "-inf")],
)  # fmt: skip
def test_values_mean_what_people_mean(tmp_path, text, value):
    found = read_text(tmp_path, f"a: {text}" if text != "-" else "a:\n-")["a"]
    assert found == value and type(found) is type(value)


def test_merge_keys_and_anchors_still_work(tmp_path):
    text = "base: &base {b: 1, c: 2}\nuse: {<<: *base, c: 3}\n"
    assert read_text(tmp_path, text)["use"] == {"b": 1, "c": 3}
