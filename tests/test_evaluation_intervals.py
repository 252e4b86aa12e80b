"""Means, intervals and comparisons, worked by hand or drawn many times."""

import math

import numpy as np
import pytest

from tvlens.evaluation.intervals import Values, comparison, interval, mcnemar


def values(numbers, items=None, weights=None):
    numbers = np.array(numbers, dtype=float)
    return Values(
        np.arange(len(numbers)) if items is None else np.array(items),
        numbers,
        np.ones(len(numbers)) if weights is None else np.array(weights, dtype=float),
    )


def test_a_mean_is_weighted_and_then_transformed():
    found = interval(values([1.0, 3.0], weights=[3, 1]), np.exp)
    assert found.value == pytest.approx(math.exp(1.5))  # (3 * 1 + 1 * 3) / 4
    assert found.low <= found.value <= found.high
    assert found.n == 2


def test_values_of_one_item_are_drawn_together():
    """Ten items of four equal values each are as uncertain as ten, not as forty."""
    rng = np.random.default_rng(0)
    numbers = rng.normal(size=10)
    alone = interval(values(numbers))
    fourfold = interval(values(np.repeat(numbers, 4), items=np.repeat(np.arange(10), 4)))
    assert fourfold == pytest.approx(alone)
    apart = interval(values(np.repeat(numbers, 4)))
    assert apart.high - apart.low < 0.7 * (alone.high - alone.low)


def test_one_item_has_no_interval_and_none_has_no_value():
    assert np.isnan(interval(values([2.0])).low)
    assert np.isnan(interval(values([])).value)
    assert interval(values([])).n == 0


def test_pairing_removes_what_items_share():
    """Items differ by 10, models by 0.1: unpaired that is lost, paired it is not."""
    rng = np.random.default_rng(1)
    base = rng.normal(scale=10.0, size=50)
    found = comparison(values(base + 0.1 + rng.normal(scale=0.05, size=50)), values(base))
    assert found.difference == pytest.approx(0.1, abs=0.03)
    assert 0 < found.low < found.difference < found.high
    assert found.p_value < 0.01
    assert found.test == "paired_bootstrap"
    swapped = comparison(values(base), values(base + 0.1))
    assert swapped.difference == pytest.approx(-0.1)


def test_the_p_value_of_no_difference_is_rarely_small():
    rng = np.random.default_rng(2)
    small = 0
    for _ in range(100):
        first, second = rng.normal(size=(2, 40))
        small += comparison(values(first), values(second)).p_value < 0.05
    assert small <= 12  # nominal 5, binomial sd 2.2


def test_true_or_false_is_compared_by_mcnemar():
    won, lost, same = 8, 1, 11
    mine = values([1] * won + [0] * lost + [1] * same)
    other = values([0] * won + [1] * lost + [1] * same)
    found = comparison(mine, other)
    assert found.test == "mcnemar"
    # P(at most 1 of 9, or at least 8) with a fair coin: 2 (1 + 9) / 512
    assert found.p_value == pytest.approx(20 / 512)
    assert found.difference == pytest.approx(7 / 20)
    assert mcnemar(mine.values, mine.values) == 1.0


def test_several_truths_of_one_item_are_not_compared_by_mcnemar():
    items = np.repeat(np.arange(5), 2)
    found = comparison(values([1, 0] * 5, items=items), values([0, 0] * 5, items=items))
    assert found.test == "paired_bootstrap"
    assert found.difference == pytest.approx(0.5)


def test_other_items_are_refused():
    with pytest.raises(ValueError, match="same items"):
        comparison(values([1.0, 2.0]), values([1.0, 2.0], items=[0, 2]))
