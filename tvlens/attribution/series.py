"""Attribution rows as matrices, scores [component, prompt], and the agreement of their ranks."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import stats

from tvlens.components import Component
from tvlens.tables import Table

SAME_QUESTION = {
    "weight_first_order_base": "exact_weight_insert",
    "weight_first_order_tuned": "exact_weight_remove",
    "weight_ig": "exact_weight_path",
    **{
        f"{within}_{estimator}": "exact_activation"
        for within in ("cross_model", "activation")
        for estimator in ("first_order", "qk_fix", "atp_star", "ig_inputs", "ig")
    },
    "edge_first_order": "exact_edge",
    "edge_ig_inputs": "exact_edge",
}
"""The exact method that asks what an estimate estimates."""
Series = tuple[str, str, str]
"""Method, direction, and the model where it was asked."""
CUT_BY_PART = ("head", "kv_head", "neuron")
"""Kinds whose activations are ranked part by part: a query is not compared with an output."""
CIRCUITS = ("OV", "QK")
"""Parts of heads that divide attention between query heads in weight space."""
FEWEST = 3
"""Components below which a rank correlation says nothing."""
RESAMPLES = 1_000
"""Bootstrap draws; the interval's ends move by a few hundredths at most between seeds."""
_KEY = ("kind", "layer", "index", "part")


def scores_by_series(table: Table) -> dict[Series, pd.DataFrame]:
    """Scores [component, prompt] of every series, from rows that have a prompt."""
    frame = whole_rows(table.to_frame())
    frame = frame[frame["prompt"].notna()]
    frame = frame.assign(key=keys(frame))
    return {
        (str(series[0]), str(series[1]), str(series[2])): rows.drop_duplicates(
            ["key", "prompt"]
        ).pivot(index="key", columns="prompt", values="score")
        for series, rows in frame.groupby(["method", "direction", "at"], sort=False)
    }


def whole_rows(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of whole components of their own: no geometric part, no share of a circuit.

    Circuits divide attention once more by query head, so adding them to heads counts it twice.
    """
    shared = (frame["space"] == "weight") & frame["part"].isin(CIRCUITS)
    return frame[frame["geometric_part"].isna() & ~shared]


def of_method(scores: Mapping[Series, pd.DataFrame], method: str) -> pd.DataFrame | None:
    """The scores of a weight method, which has one direction."""
    return next((frame for (name, *_), frame in scores.items() if name == method), None)


def group_of(component: Component) -> tuple[str, str | None]:
    """Kind, and the activation's name where components of one kind have several."""
    return component.kind, component.part if component.kind in CUT_BY_PART else None


def keys(frame: pd.DataFrame) -> pd.Series:
    """The component of every row."""
    columns = [frame[name].astype(object).where(frame[name].notna(), None) for name in _KEY]
    rows, known = list(zip(*columns, strict=True)), {}
    for row in dict.fromkeys(rows):  # a component has a row for every prompt and method
        kind, layer, index, part = row
        known[row] = Component(kind, _whole(layer), _whole(index), part)
    return pd.Series([known[row] for row in rows], index=frame.index, dtype=object)


def _whole(number: Any) -> int | None:
    return None if number is None else int(number)


def spearman(x: ArrayLike, y: ArrayLike) -> float | None:
    """Spearman's rho; None for fewer than three values or where one side is constant."""
    first, second = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if len(first) < FEWEST or np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    return float(np.corrcoef(stats.rankdata(first), stats.rankdata(second))[0, 1])


def rank_agreement(
    x: ArrayLike, y: ArrayLike, *, seed: int = 0
) -> tuple[float | None, float | None, float | None]:
    """Spearman's rho and its 95 % interval over values drawn with replacement."""
    rho = spearman(x, y)
    if rho is None:
        return None, None, None
    values = [np.asarray(side, dtype=float) for side in (x, y)]
    count = len(values[0])
    drawn = np.random.default_rng(seed).integers(0, count, (RESAMPLES, count))
    ranks = [stats.rankdata(side[drawn], axis=1) for side in values]
    centred = [r - r.mean(axis=1, keepdims=True) for r in ranks]
    size = np.sqrt((centred[0] ** 2).sum(1) * (centred[1] ** 2).sum(1))
    found = (centred[0] * centred[1]).sum(1)[size > 0] / size[size > 0]
    low, high = np.quantile(found, (0.025, 0.975))
    return rho, float(low), float(high)
