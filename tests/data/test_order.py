"""The order of samples: permutations that are permutations, and mixtures with the shares that they were asked for."""

import itertools
from collections import Counter

import numpy as np
import pytest

from data.order import PERIOD, Mixture, mix, permuted


def permutation(size: int, key: int) -> list[int]:
    return [permuted(index, size, key) for index in range(size)]


# --- mix


def test_mix_tells_its_arguments_apart():
    arguments = [(), *itertools.product(range(4), repeat=1), *itertools.product(range(4), repeat=2)]
    arguments += [*itertools.product(range(4), repeat=3), (2**63,), (2**64 - 1,), (0, 2**63)]
    values = {mix(*each) for each in arguments}
    assert len(values) == len(arguments)
    assert all(0 <= value < 2**64 for value in values)


def test_mix_turns_about_half_of_the_bits():
    turned = [bin(mix(n) ^ mix(n ^ (1 << bit))).count("1") for n in range(20) for bit in range(0, 64, 7)]
    assert 30 < np.mean(turned) < 34 and min(turned) > 12


# --- permuted


@pytest.mark.parametrize("size", [*range(1, 40), 63, 64, 65, 127, 128, 129, 255, 256, 257, 1000, 1023, 1025, 4097])
def test_every_index_comes_once(size):
    for key in (0, 1, mix(1234, size)):
        assert sorted(permutation(size, key)) == list(range(size))


@pytest.mark.parametrize("size", [50, 256, 1000])
def test_another_key_is_another_order(size):
    orders = [permutation(size, key) for key in range(10)]
    for one, other in itertools.combinations(orders, 2):
        assert sum(a == b for a, b in zip(one, other, strict=True)) < size / 5
    assert all(sum(index == place for index, place in enumerate(order)) < size / 5 for order in orders)


@pytest.mark.parametrize("size", [2, 3, 10])
def test_every_place_is_about_as_likely(size):
    trials = 400 * size
    places = Counter(permuted(0, size, mix(seed)) for seed in range(trials))
    assert all(320 < places[place] < 480 for place in range(size))  # 400 expected, 4 standard deviations


def test_neighbours_do_not_stay_neighbours():
    order = permutation(1000, 7)
    assert sum(abs(a - b) == 1 for a, b in itertools.pairwise(order)) < 15  # 2 expected


def test_sizes_that_no_table_could_hold():
    size = 10**12 + 39
    places = [permuted(index, size, 5) for index in (*range(300), *range(size - 300, size))]
    assert len(set(places)) == 600 and min(places) >= 0 and max(places) < size
    assert 0.4 < np.mean(places) / size < 0.6


def test_the_order_is_part_of_every_run_and_never_changes():
    """Were these values to change, a resumed run would see other samples than the unbroken one."""
    assert (mix(), mix(0), mix(1, 2, 3)) == (0x9E3779B97F4A7C15, 0x6E789E6AA1B965F4, 0xF35A47EA57D4D82F)
    assert permutation(10, 7) == [1, 0, 3, 5, 6, 7, 9, 2, 8, 4]
    assert [permuted(n, 10**9, mix(1234, 0, 0, 0)) for n in range(3)] == [525716006, 621455970, 885697355]
    mixture = Mixture.of({"b": 0.5, "a": 0.3, "c": 0.2}, period=10)
    located = [mixture.locate(sample) for sample in range(12)]
    assert " ".join(name + str(ordinal) for name, ordinal in located) == "b0 a0 c0 b1 a1 b2 b3 c1 a2 b4 b5 a3"


# --- mixtures

WEIGHTS = [{"a": 1.0}, {"a": 1, "b": 1}, {"b": 0.8, "a": 0.2}, {"a": 0.8, "b": 0.15, "c": 0.05}, {"a": 0.29, "b": 0.71},
           {"x": 1, "y": 2, "z": 4}, {"a": 999.0, "b": 1.0}, {str(n): n + 1 for n in range(40)},
           {"a": 1 / 3, "b": 1 / 3, "c": 1 / 3}]  # fmt: skip


@pytest.mark.parametrize("weights", WEIGHTS, ids=lambda weights: str(len(weights)))
def test_shares_are_exact_over_a_period(weights):
    mixture = Mixture.of(weights)
    for first in (0, PERIOD, 7 * PERIOD):
        found = Counter(mixture.locate(sample)[0] for sample in range(first, first + PERIOD))
        assert found.total() == PERIOD
        for name, weight in weights.items():
            assert abs(found[name] - PERIOD * weight / sum(weights.values())) < 1
            assert found[name] >= 1, "no source that was asked for is left out"


@pytest.mark.parametrize("weights", WEIGHTS, ids=lambda weights: str(len(weights)))
def test_locate_is_what_counting_along_would_find(weights):
    mixture = Mixture.of(weights)
    seen: Counter[str] = Counter()
    for sample in range(2 * PERIOD + PERIOD // 2):
        name, ordinal = mixture.locate(sample)
        assert ordinal == seen[name]
        seen[name] += 1


@pytest.mark.parametrize("weights", WEIGHTS, ids=lambda weights: str(len(weights)))
def test_sources_are_interleaved_evenly(weights):
    mixture, total = Mixture.of(weights), sum(weights.values())
    seen: Counter[str] = Counter()
    for sample in range(PERIOD):
        seen[mixture.locate(sample)[0]] += 1
        for name, weight in weights.items():
            assert abs(seen[name] - (sample + 1) * weight / total) < 2 + len(weights) / 20


def test_only_the_ratio_of_the_weights_counts_and_not_their_order():
    one, other = Mixture.of({"a": 0.2, "b": 0.8}), Mixture.of({"b": 400, "a": 100})
    assert [one.locate(n) for n in range(2500)] == [other.locate(n) for n in range(2500)]


def test_far_samples_cost_no_more():
    mixture = Mixture.of({"a": 0.25, "b": 0.75})
    name, ordinal = mixture.locate(10**15)
    assert ordinal == 10**15 * {"a": 1, "b": 3}[name] // 4
