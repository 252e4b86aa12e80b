"""Means over items with their intervals, and paired comparisons of two models on the same items.

A measure has values v with weights w, some items several of them. Its value is

    t( sum w v / sum w )        t: nothing, or exp for a perplexity

its 95 % interval the percentiles of a bootstrap that draws whole items, so that constraints of
one prompt stay together. Two models are compared on the same draws of the same items (paired); for
one true-or-false value an item the p-value is McNemar's exact one [1], two-sided: of the items on
which the two differ, were as many won as lost? Otherwise it is the share of draws beyond zero,
doubled.

[1] McNemar 1947, Psychometrika 12, 153-157; exact form: a binomial test at 1/2.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.stats import binomtest

DRAWS = 1000  # percentile ends are then stable to about 2 % of the interval's width
Transform = Callable[[np.ndarray], np.ndarray]
Test = Literal["mcnemar", "paired_bootstrap"]


class Values(NamedTuple):
    """The values of one measure of one model on one task.

    Attributes:
        items: Number of the item each belongs to, sorted.
        values: The values.
        weights: How much each counts.
    """

    items: Int[np.ndarray, " value"]
    values: Float[np.ndarray, " value"]
    weights: Float[np.ndarray, " value"]


class Interval(NamedTuple):
    """A value, the ends of its 95 % interval, and how many items it is of."""

    value: float
    low: float
    high: float
    n: int


class Comparison(NamedTuple):
    """How far a model is from another on the same items.

    Attributes:
        difference: Its value minus the other's.
        low: Lower end of the 95 % interval.
        high: Upper end.
        p_value: Of no difference, two-sided.
        test: What it comes from.
    """

    difference: float
    low: float
    high: float
    p_value: float
    test: Test


def interval(found: Values, transform: Transform | None = None, *, seed: int = 0) -> Interval:
    """The value of a measure with its interval; NaN ends for fewer than two items."""
    sums, weights = _by_item(found)
    n = len(sums)
    if n == 0:
        return Interval(float("nan"), float("nan"), float("nan"), 0)
    drawn = _draws(sums, weights, transform, seed) if n > 1 else np.full(2, np.nan)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return Interval(float(_mean(sums, weights, transform)), float(low), float(high), n)


def comparison(
    mine: Values, other: Values, transform: Transform | None = None, *, seed: int = 0
) -> Comparison:
    """``mine`` minus ``other``.

    Raises:
        ValueError: They are not of the same items.
    """
    if not np.array_equal(mine.items, other.items):
        raise ValueError("two models can be compared on the same items alone.")
    (here, here_weights), (there, there_weights) = _by_item(mine), _by_item(other)
    difference = _mean(here, here_weights, transform) - _mean(there, there_weights, transform)
    if len(here) < 2:
        unknown = float("nan")
        return Comparison(float(difference), unknown, unknown, unknown, "paired_bootstrap")
    drawn = _draws(here, here_weights, transform, seed) - _draws(
        there, there_weights, transform, seed
    )
    low, high = np.quantile(drawn, (0.025, 0.975))
    if _true_or_false(mine) and _true_or_false(other):
        return Comparison(
            float(difference), float(low), float(high), mcnemar(mine.values, other.values),
            "mcnemar",
        )  # fmt: skip
    beyond = min((drawn <= 0).sum(), (drawn >= 0).sum())
    p = min(1.0, 2.0 * (1 + beyond) / (1 + len(drawn)))
    return Comparison(float(difference), float(low), float(high), float(p), "paired_bootstrap")


def mcnemar(mine: Float[np.ndarray, " item"], other: Float[np.ndarray, " item"]) -> float:
    """McNemar's exact two-sided p-value of two rows of 0 and 1; 1 where they never differ."""
    won, lost = int(((mine == 1) & (other == 0)).sum()), int(((mine == 0) & (other == 1)).sum())
    return float(binomtest(won, won + lost, 0.5).pvalue) if won + lost else 1.0


def _by_item(found: Values) -> tuple[np.ndarray, np.ndarray]:
    """Sum of weight times value, and of weight, of every item."""
    _, place = np.unique(found.items, return_inverse=True)
    sums, weights = (
        np.bincount(place, weights=column) if len(place) else np.zeros(0)
        for column in (found.weights * found.values, found.weights)
    )
    return sums, weights


def _mean(sums: np.ndarray, weights: np.ndarray, transform: Transform | None) -> np.ndarray:
    mean = np.asarray(sums.sum(-1) / weights.sum(-1))
    return mean if transform is None else np.asarray(transform(mean))


def _draws(
    sums: np.ndarray, weights: np.ndarray, transform: Transform | None, seed: int
) -> np.ndarray:
    chosen = np.random.default_rng(seed).integers(0, len(sums), (DRAWS, len(sums)))
    return _mean(sums[chosen], weights[chosen], transform)


def _true_or_false(found: Values) -> bool:
    once = len(np.unique(found.items)) == len(found.items)
    return once and bool(np.isin(found.values, (0, 1)).all() and (found.weights == 1).all())


class Sampled(NamedTuple):
    """A measure's value and its values on the bootstrap's draws of items.

    Two of the same items under the same seed share their draws, so that sums of them are paired.

    Attributes:
        items: The items, sorted; of an average over tasks those of all.
        value: The value.
        draws: The value on each draw; NaN for fewer than two items.
    """

    items: Int[np.ndarray, " item"]
    value: float
    draws: Float[np.ndarray, " draw"]

    @property
    def interval(self) -> Interval:
        """The value with its 95 % interval."""
        low, high = np.quantile(self.draws, (0.025, 0.975))
        return Interval(self.value, float(low), float(high), len(self.items))


def sampled(found: Values, transform: Transform | None = None, *, seed: int = 0) -> Sampled:
    """The value of a measure with its draws; what ``interval`` says, kept for sums."""
    sums, weights = _by_item(found)
    draws = np.full(DRAWS, np.nan)
    if len(sums) > 1:
        draws = _draws(sums, weights, transform, seed)
    value = float(_mean(sums, weights, transform)) if len(sums) else float("nan")
    return Sampled(np.unique(found.items), value, draws)


def summed(terms: Sequence[tuple[float, Sampled]]) -> Sampled:
    """Sum of factor times measure, all on the same items: paired, draw by draw.

    Raises:
        ValueError: There is no term, or they are not of the same items.
    """
    if not terms or any(not np.array_equal(terms[0][1].items, one.items) for _, one in terms):
        raise ValueError("only measures of the same items can be summed.")
    value = sum(factor * one.value for factor, one in terms)
    draws = np.sum([factor * one.draws for factor, one in terms], axis=0)
    return Sampled(terms[0][1].items, float(value), draws)


def averaged(parts: Sequence[tuple[float, Sampled]]) -> Sampled:
    """Sum of weight times measure over tasks whose items have nothing to do with each other.

    Raises:
        ValueError: There is no part.
    """
    if not parts:
        raise ValueError("an average needs at least one task.")
    value = sum(weight * one.value for weight, one in parts)
    draws = np.sum([weight * one.draws for weight, one in parts], axis=0)
    return Sampled(np.concatenate([one.items for _, one in parts]), float(value), draws)
