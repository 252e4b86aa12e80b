"""Means, intervals and comparisons, worked by hand or drawn many times."""

import math

import numpy as np
import pytest

from tvlens.evaluation.intervals import (
    Values,
    averaged,
    comparison,
    interval,
    mcnemar,
    sampled,
    summed,
)


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


def spread(seed, n=30, shift=0.0):
    rng = np.random.default_rng(seed)
    return Values(np.arange(n), rng.normal(shift, 1, n), rng.uniform(0.5, 2, n))


def test_sums_of_sampled_measures_are_the_interval_and_the_paired_comparison():
    mine, other = spread(1), spread(2, shift=0.5)
    first, second = (sampled(one, np.exp, seed=3) for one in (mine, other))
    assert first.interval == interval(mine, np.exp, seed=3)
    apart = summed([(1.0, first), (-1.0, second)]).interval
    wanted = comparison(mine, other, np.exp, seed=3)
    assert apart[:3] == pytest.approx(wanted[:3], abs=1e-12)
    assert apart.n == 30
    nothing = summed([(1.0, first), (-2.0, first), (1.0, first)]).interval
    assert nothing[:3] == pytest.approx((0.0, 0.0, 0.0), abs=1e-12)


def test_only_measures_of_the_same_items_are_summed():
    first, second = sampled(spread(1)), sampled(spread(2, n=20), seed=1)
    with pytest.raises(ValueError, match="same items"):
        summed([(1.0, first), (1.0, second)])
    with pytest.raises(ValueError, match="same items"):
        summed([])
    with pytest.raises(ValueError, match="at least one task"):
        averaged([])
    both = averaged([(0.25, first), (0.75, second)])
    assert both.value == pytest.approx(0.25 * first.value + 0.75 * second.value)
    assert both.interval.n == 50
    assert both.interval.low < both.value < both.interval.high


def test_one_item_or_none_has_no_interval():
    one = sampled(Values(np.array([4]), np.array([2.0]), np.array([1.0]))).interval
    assert one.value == 2.0
    assert np.isnan(one.low)
    none = sampled(Values(np.zeros(0, dtype=np.int64), np.zeros(0), np.zeros(0))).interval
    assert np.isnan(none.value)
    assert none.n == 0
