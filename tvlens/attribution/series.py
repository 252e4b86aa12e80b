"""Attribution rows as matrices: scores [component, prompt] by method and direction."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from tvlens.components import Component
from tvlens.tables import Table

SAME_QUESTION = {
    "weight_first_order_base": "exact_weight_insert",
    "weight_first_order_tuned": "exact_weight_remove",
    "weight_ig": "exact_weight_path",
    "cross_model_first_order": "exact_activation",
    "cross_model_ig": "exact_activation",
    "activation_first_order": "exact_activation",
}
"""The exact method that asks what an estimate estimates."""
Series = tuple[str, str]
"""Method and direction."""
_KEY = ("kind", "layer", "index", "part")


def scores_by_series(table: Table) -> dict[Series, pd.DataFrame]:
    """Scores [component, prompt] of every method and direction, from rows that have a prompt."""
    frame = table.to_frame()
    frame = frame[frame["prompt"].notna()]
    frame = frame.assign(key=keys(frame))
    return {
        (str(series[0]), str(series[1])): rows.drop_duplicates(["key", "prompt"]).pivot(
            index="key", columns="prompt", values="score"
        )
        for series, rows in frame.groupby(["method", "direction"], sort=False)
    }


def of_method(scores: Mapping[Series, pd.DataFrame], method: str) -> pd.DataFrame | None:
    """The scores of a weight method, which has one direction."""
    return next((frame for (name, _), frame in scores.items() if name == method), None)


def keys(frame: pd.DataFrame) -> pd.Series:
    """The component of every row."""
    columns = [frame[name].astype(object).where(frame[name].notna(), None) for name in _KEY]
    components = [
        Component(kind, _whole(layer), _whole(index), part)
        for kind, layer, index, part in zip(*columns, strict=True)
    ]
    return pd.Series(components, index=frame.index, dtype=object)


def _whole(number: Any) -> int | None:
    return None if number is None else int(number)
