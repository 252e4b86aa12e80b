"""The verdict on "combining tuning vectors of domains improves generalisation".

By the rule of docs/claims.md, from the gains D of the chosen combination on the judging items
(``combination_gains``), each with its 95 % interval:

    not supported   some interval of D ends below ``smallest``
    supported       every interval lies above 0, something stood in a vector's place, and D over
                    the base and every fine-tune is at least ``smallest``
    cannot tell     the rest
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import pandas as pd

from .claims import CANNOT_TELL, NOT_SUPPORTED, SMALLEST, SUPPORTED

COMBINING = "combining tuning vectors of domains improves generalisation"
STOOD_IN = ("random", "control")
MUST_BE_LARGE = ("base", "fine-tune")
"""Over these a gain has to be as large as ``smallest``; over the others it has to be sure."""


class CombinedGain(NamedTuple):
    """The gain of a combination over one comparison, in the good direction."""

    kind: str
    over: str
    value: float
    low: float
    high: float


def combined_rows(gains: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """One row of verdicts for each task elsewhere and each mean over domains.

    Args:
        gains: The table ``combination_gains``.
    """
    for (_, task, measure), rows in gains.groupby(["scope", "task", "measure"], sort=False):
        first = rows.iloc[0]
        compared = rows[rows["over"].notna()]
        known = [
            CombinedGain(*row)
            for row in zip(
                *(compared[name] for name in ("kind", "over", "gain", "ci_low", "ci_high")),
                strict=True,
            )
        ]
        named = {"claim": COMBINING, "task": task, "measure": measure, "unit": first["unit"]}
        model = first["model"] if isinstance(first["model"], str) else None
        yield {**named, "tuned": model, **judged_combination(known, str(first["unit"]))}


def judged_combination(gains: Sequence[CombinedGain], unit: str) -> dict[str, Any]:
    """The verdict's columns: ``value`` is the gain over the base, ``control`` what leaves least.

    Args:
        gains: Over the base first; none where a task has no items to choose or to judge on.
        unit: Of the gains.
    """
    smallest = SMALLEST.get(unit, 0.05)
    if not gains:
        why = "a task lacks items of choose or of judge"
        return {"smallest": smallest, "verdict": CANNOT_TELL, "why": why}
    base, least = gains[0], min(gains[1:] or gains, key=lambda gain: gain.value)
    verdict, why = _verdict(gains, smallest)
    return {
        **{"value": base.value, "ci_low": base.low, "ci_high": base.high},
        **{"control": least.over, "control_value": least.value},
        **{"control_low": least.low, "control_high": least.high},
        **{"smallest": smallest, "verdict": verdict, "why": why},
    }


def _verdict(gains: Sequence[CombinedGain], smallest: float) -> tuple[str, str]:
    small = [gain.over for gain in gains if gain.high < smallest]
    if small:
        return NOT_SUPPORTED, f"surely less than {smallest:g} better than {small[0]}"
    if not any(gain.kind in STOOD_IN for gain in gains):
        return CANNOT_TELL, "nothing stood in a vector's place"
    unsure = [gain.over for gain in gains if not gain.low > 0]
    if unsure:
        return CANNOT_TELL, f"not surely better than {unsure[0]}"
    weak = [g.over for g in gains if g.kind in MUST_BE_LARGE and g.value < smallest]
    if weak:
        return CANNOT_TELL, f"better than {weak[0]}, by less than {smallest:g}"
    return SUPPORTED, "better than the base, each vector alone, and all that stood in their places"
