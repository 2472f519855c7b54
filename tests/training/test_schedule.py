"""The learning rate: each shape at the points that define it, and as a function of nothing but progress."""

import itertools
import math

import pytest

from settings import ConfigError, validate
from training.schedule import ScheduleSection, multiplier

SHAPES = ("cosine", "cosine_restarts", "wsd", "linear", "constant")
GRID = [step / 2000 for step in range(2001)]


def schedule(shape: str, **keys: float) -> ScheduleSection:
    return validate(ScheduleSection, {"shape": shape, **keys})


def curve(section: ScheduleSection) -> list[float]:
    return [multiplier(section, progress) for progress in GRID]


@pytest.mark.parametrize(
    ("shape", "keys", "points"),
    [
        ("cosine", {"warmup": 0.2, "final": 0.1},
         {0: 0, 0.1: 0.5, 0.2: 1, 0.4: 0.1 + 0.9 * 0.5 * (1 + math.sqrt(0.5)), 0.6: 0.55, 1: 0.1}),
        ("cosine", {"warmup": 0, "final": 0}, {0: 1, 0.5: 0.5, 2 / 3: 0.25, 1: 0}),
        ("linear", {"warmup": 0.5, "final": 0.2}, {0: 0, 0.25: 0.5, 0.5: 1, 0.75: 0.6, 1: 0.2}),
        ("linear", {"warmup": 0, "final": 0}, {0: 1, 0.3: 0.7, 1: 0}),
        ("wsd", {"warmup": 0.1, "decay": 0.4, "final": 0.5},
         {0: 0, 0.05: 0.5, 0.1: 1, 0.35: 1, 0.6: 1, 0.8: 0.75, 1: 0.5}),
        ("wsd", {"warmup": 0.5, "decay": 0.5, "final": 0}, {0.25: 0.5, 0.5: 1, 0.75: 0.5, 1: 0}),
        ("wsd", {"warmup": 0, "decay": 1, "final": 0}, {0: 1, 0.5: 0.5, 1: 0}),
        ("constant", {"warmup": 0.1, "final": 0.3}, {0: 0, 0.05: 0.5, 0.1: 1, 0.5: 1, 1: 1}),
        ("cosine_restarts", {"warmup": 0.5, "cycles": 2, "final": 0.1},
         {0.25: 0.5, 0.5: 1, 0.625: 0.55, 0.75: 1, 0.875: 0.55, 1: 0.1}),
        ("cosine_restarts", {"warmup": 0, "cycles": 4, "final": 0},
         {0: 1, 0.125: 0.5, 0.25: 1, 0.5: 1, 0.875: 0.5, 1: 0}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("peak", [1.0, 0.25, 3.0])
def test_values_at_the_points_that_define_the_shape(shape, keys, points, peak):
    section = schedule(shape, peak=peak, **keys)
    for progress, value in points.items():
        assert multiplier(section, progress) == pytest.approx(peak * value, abs=1e-12), progress


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("warmup", [0.0, 0.02, 0.5])
def test_rises_in_the_warmup_and_never_after_it(shape, warmup):
    values = curve(schedule(shape, warmup=warmup, final=0.1, decay=0.3, peak=2.0))
    top = GRID.index(warmup)
    assert all(a < b for a, b in itertools.pairwise(values[: top + 1]))
    assert all(a >= b for a, b in itertools.pairwise(values[top:]))
    assert max(values) == pytest.approx(2.0) and values[top] == pytest.approx(2.0)
    assert min(values[top:]) == values[-1] == pytest.approx(2.0 if shape == "constant" else 0.2)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("warmup", [0.0, 0.1])
def test_has_no_jumps(shape, warmup):
    values = curve(schedule(shape, warmup=warmup, final=0.0, decay=0.25))
    steepest = max(10 if warmup else 0, 4, math.pi / 2 / (1 - warmup))  # of warm-up, of wsd's decay, of the cosine
    assert max(abs(a - b) for a, b in itertools.pairwise(values)) <= 1.01 * steepest / 2000


@pytest.mark.parametrize("cycles", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("warmup", [0.0, 0.1])
def test_restarts_once_less_than_there_are_cycles(cycles, warmup):
    values = curve(schedule("cosine_restarts", warmup=warmup, cycles=cycles, final=0.1))
    jumps = [index for index, (a, b) in enumerate(itertools.pairwise(values)) if b - a > 0.5]
    assert len(jumps) == cycles - 1
    for number, index in enumerate(jumps, 1):
        assert GRID[index] == pytest.approx(warmup + (1 - warmup) * number / cycles, abs=1 / 1000)
        assert values[index] < 0.11 and values[index + 1] > 0.99
    assert values[-1] == pytest.approx(0.1)
    starts = [GRID.index(warmup), *(index + 1 for index in jumps), len(values)]
    for start, end in itertools.pairwise(starts):
        assert all(a >= b for a, b in itertools.pairwise(values[start:end]))


def test_one_cycle_is_the_cosine():
    keys = {"warmup": 0.1, "final": 0.2}
    assert curve(schedule("cosine_restarts", cycles=1, **keys)) == curve(schedule("cosine", **keys))


@pytest.mark.parametrize("shape", SHAPES)
def test_is_a_pure_function(shape):
    section = schedule(shape, warmup=0.1, cycles=3)
    forwards = curve(section)
    assert [multiplier(section, progress) for progress in reversed(GRID)] == forwards[::-1]
    assert curve(schedule(shape, warmup=0.1, cycles=3)) == forwards


@pytest.mark.parametrize("shape", SHAPES)
def test_progress_beyond_the_phase_is_its_edge(shape):
    section = schedule(shape, warmup=0.1)
    assert multiplier(section, -0.5) == multiplier(section, 0)
    assert multiplier(section, 1.0000001) == multiplier(section, 7) == multiplier(section, 1)


def test_a_decay_that_would_overlap_the_warmup_is_refused():
    with pytest.raises(ConfigError, match="decay: use at most 0.7"):
        schedule("wsd", warmup=0.3, decay=0.8)
    assert schedule("cosine", warmup=0.3, decay=0.8)
    for percent in range(100):
        assert schedule("wsd", warmup=percent / 100, decay=(100 - percent) / 100)
