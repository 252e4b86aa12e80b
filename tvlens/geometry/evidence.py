"""Evidence for a label: how much of a component's change is a gain, how much is structure, where.

A frame of evidence has one row a component. Five candidate parts of the energy |D|^2 compete:

    gain        along the component's own base weights
    within      structured, in directions that the base already uses
    new_write   structured, writes directions that stand in no relation to the base's
    new_read    the same for reads
    between     structured, but too few directions to tell the two apart

``share_*`` is the part's share, ``p_*`` a p-value that still needs its false discovery rate, and
``sure_*`` true where another rule has already established the part (spikes above the edge).
``remark`` is a sentence for the reason of what stays unresolved.
Structure alone is no finding: every gradient update has it. Hence a new part needs an alignment
whose upper bound is below NEW_HI, and a claim needs ``contrasts``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import Tensor

from tvlens.components import KEY_COLUMNS, READING_PARTS, Side

Keys = Mapping[str, Any]
"""Which components a frame is about: the key, ``tied``, and the measures of the gate."""
GATE_COLUMNS = ("delta_norm", "snr", "gain", "kappa")
"""Measures that the gate and the reasons need."""
MINS = 0.10
"""Least structured share of the energy: 30 times the largest significant gain that ordinary
fine-tunes on general text show (a true but empty effect of kappa^2 = .003)."""
GAIN_Z = 4.0
"""A whole matrix has no peers, so its gain must be 4 isotropic deviations out (p = 6e-5)."""
GAIN_COSINE = 0.5
"""A spike is a gain of base directions when its two sides meet W with half of its full effect."""
NEW_HI = 0.5
"""Alignment halfway between chance (0) and a pure gain (1): below it new, above it rewired."""
DEVIATIONS = 2.0
"""Width of the bounds on an alignment: about 95 %."""
Z95 = 1.959964
"""Half width of a 95 % interval in standard deviations."""

BY_PEERS = "own versus heads of other kv groups; sign-flip edge"
NO_PEERS = "sign-flip edge alone: too few heads of other kv groups to test a gain against"
NO_GAIN_TEST = "No gain could be tested."

PARTS = ("gain", "within", "new_write", "new_read", "between")
STRUCTURED = PARTS[1:]
TEST_COLUMNS = (
    *KEY_COLUMNS,
    "tied",
    "side",
    "statistic",
    "null",
    "effect",
    "ci_low",
    "ci_high",
    "p_value",
    "p_floor",
    "draws",
    "k",
)


Rows = dict[str, Any]
"""Columns of equal length, lists of texts and arrays of numbers: some rows of a frame to come."""


@dataclass(frozen=True, eq=False)
class Evidence:
    """What is known about some components before the false discovery rate is settled.

    Frames are made when all is known: one for each of thousands of matrices would cost more than
    what is in it.

    Attributes:
        components: Rows of the frame, in order.
        statistics: Rows of the tests, in order.
    """

    components: Sequence[Rows]
    statistics: Sequence[Rows]

    @cached_property
    def frame(self) -> pd.DataFrame:
        """One row a component (module docstring)."""
        return _frame_of(self.components)

    @cached_property
    def tests(self) -> pd.DataFrame:
        """One row a statistic of a component, columns ``TEST_COLUMNS``."""
        found = _frame_of(self.statistics)
        return found if len(found.columns) else pd.DataFrame(columns=list(TEST_COLUMNS))


def _frame_of(parts: Sequence[Rows]) -> pd.DataFrame:
    if len(parts) == 1:
        return pd.DataFrame(parts[0])
    names = parts[0] if parts else ()
    return pd.DataFrame({name: _joined([part[name] for part in parts]) for name in names})


def _joined(columns: Sequence[Any]) -> Any:
    if all(isinstance(column, np.ndarray) for column in columns):
        return np.concatenate(columns)
    return [value for column in columns for value in column]


def _column(values: Any, count: int) -> Any:
    """A column of a component each, from one or from a value that all share."""
    if isinstance(values, Tensor):
        return values.numpy()
    if isinstance(values, list) or (isinstance(values, np.ndarray) and values.ndim):
        return values
    is_text = isinstance(values, str) or values is None
    return [values] * count if is_text else np.full(count, values)


def evidence_rows(keys: Keys, **columns: Any) -> Rows:
    """Rows of evidence; what is not given is absent (NaN shares, nothing sure)."""
    values: dict[str, Any] = {
        **keys,
        "alignment": np.nan,
        "alignment_se": np.nan,
        "spikes": 0,
        "decided_by": "no test",
        "remark": "",
    }
    for part in PARTS:
        values |= {f"share_{part}": 0.0, f"p_{part}": np.nan, f"sure_{part}": False}
    count = len(keys["component"])
    return {name: _column(column, count) for name, column in (values | columns).items()}


def statistic_rows(
    keys: Keys,
    statistic: str,
    *,
    side: str,
    null: str,
    effect: Any,
    half_interval: Any = np.nan,
    p_value: Any = np.nan,
    k: int | None = None,
) -> Rows:
    """Rows of the table of tests for one statistic; analytic nulls reach any p and draw nothing."""
    middle = np.asarray(effect, dtype=float)
    values = {
        **{name: keys[name] for name in (*KEY_COLUMNS, "tied")},
        "side": side,
        "statistic": statistic,
        "null": null,
        "effect": middle,
        "ci_low": middle - half_interval,
        "ci_high": middle + half_interval,
        "p_value": np.asarray(p_value, dtype=float),
        "p_floor": 0.0,
        "draws": 0,
        "k": k,
    }
    return {name: _column(column, len(middle)) for name, column in values.items()}


def untested(keys: Keys) -> Evidence:
    """Components of which nothing is known but their measures."""
    return Evidence([evidence_rows(keys)], [])


def placed(
    share: Float[np.ndarray, " component"],
    aligned: Float[np.ndarray, " component"],
    error: Float[np.ndarray, " component"],
    part: str,
) -> dict[str, np.ndarray]:
    """Where a structured share belongs, by the bounds of its alignment with the base."""
    new = aligned + DEVIATIONS * error < NEW_HI
    within = aligned - DEVIATIONS * error > NEW_HI
    where = {f"new_{residual_side(part)}": new, "within": within, "between": ~new & ~within}
    return {f"share_{name}": np.where(mask, share, 0.0) for name, mask in where.items()}


def residual_side(part: str) -> Side:
    """The side of a matrix that is the residual stream."""
    return "read" if part in READING_PARTS else "write"


def joined_evidence(parts: Sequence[Evidence]) -> Evidence:
    """The evidence of several groups of components, in order."""
    return Evidence(
        [rows for part in parts for rows in part.components],
        [rows for part in parts for rows in part.statistics],
    )


def replaced(evidence: Evidence, newer: Evidence) -> Evidence:
    """Evidence in which components that stand by themselves have newer rows; the order stays.

    Raises:
        ValueError: A component has no older row of its own, or there are tests of it already.
    """
    rows = {c: part for part in newer.components for c in part["component"]}
    newest = {c: _row(rows[c], rows[c]["component"].index(c)) for c in rows}
    told = {c for part in evidence.statistics for c in part["component"]}
    alone = {part["component"][0] for part in evidence.components if len(part["component"]) == 1}
    if wrong := [c for c in newest if c in told or c not in alone]:
        raise ValueError(f"the evidence about {wrong[0]} cannot be replaced: it is not untested.")
    parts = [newest.get(part["component"][0], part) for part in evidence.components]
    return Evidence(parts, [*evidence.statistics, *newer.statistics])


def _row(rows: Rows, place: int) -> Rows:
    return {name: column[place : place + 1] for name, column in rows.items()}
