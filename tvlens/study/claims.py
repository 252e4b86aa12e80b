"""The paper's claims and their verdicts, by the rules of docs/claims.md.

A claim that behaviour *depends on the tuning vector* is judged by the gain D of the tuned model
over the base, over each random vector as long (at dose 1) and over each control fine-tune, paired
over items, in the direction that is good for the metric:

    supported       every interval of D above 0, and D over the base at least ``smallest``
    not supported   some interval of D ends below ``smallest``
    cannot tell     the rest

The claims on what MLP and attention write take the verdicts of ``contrasts``; that on a small
subspace of the representations is judged in ``subspace_claim``.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa

from tvlens.evaluation.intervals import Comparison, Values, comparison
from tvlens.evaluation.measures import MEASURES
from tvlens.tables import Table

from .store import Study
from .subspace_claim import CLAIM, subspace_rows

SUPPORTED, NOT_SUPPORTED, CANNOT_TELL = "supported", "not supported", "cannot tell"
NOT_TESTED = "not tested"
DEPENDS: Mapping[str, tuple[str, ...]] = {
    "instruction following depends on the tuning vector": ("instructions",),
    "generation quality depends on the tuning vector": ("generation",),
    "the domain's skill depends on the tuning vector": (
        *("loss", "choice", "choice_generated", "exact", "lm_eval"),
    ),
}
"""Claims by the kinds of task that test them."""
QUALITY = ("chrf", "rouge_l")
"""Measures of generation that say how good it is; the others say what it is like."""
SMALLEST: Mapping[str, float] = {"share": 0.05, "nats/token": 0.05, "nats": 0.1, "0 to 100": 2.0}
"""The smallest difference that supports a claim, by unit."""
VERDICTS_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("claim", "base", "tuned", "task", "measure", "unit")),
        *((name, pa.float64()) for name in ("value", "ci_low", "ci_high")),
        ("control", pa.string()),
        *((name, pa.float64()) for name in ("control_value", "control_low", "control_high")),
        ("smallest", pa.float64()),
        *((name, pa.string()) for name in ("verdict", "why", "command")),
    ]
)
"""One row a claim x task.

    value, ci_*      the gain over the base, good direction, in ``unit``; of a contrast its mean; of
                     the subspace its rank as a share of d_model
    control          over what the gain is smallest, and that gain with its interval; of the
                     subspace the random vector over whose rank its own is largest, and the ratio
"""


class Gain(NamedTuple):
    """The gain over one comparison, in the good direction."""

    over: str
    value: float
    low: float
    high: float


def verdicts_table(study: Study) -> Table:
    """Every claim that the study's tables can judge, and those that they cannot."""
    rows = [
        *(*_headline_rows(study), *_behaviour_rows(study)),
        *(*_combined_rows(study), *subspace_rows(study)),
    ]
    judged = {row["claim"] for row in rows}
    rows += [
        {"claim": claim, "verdict": NOT_TESTED, "why": why}
        for claim, why in _untested(study).items()
        if claim not in judged
    ]
    command = study.plan.command
    columns = {
        name: [row.get(name) if name != "command" else command for row in rows]
        for name in VERDICTS_SCHEMA.names
    }
    return Table.of("verdicts", VERDICTS_SCHEMA, columns)


def _untested(study: Study) -> dict[str, str]:
    """Why each claim that a run decides would go without a verdict."""
    if "evaluation_items" not in study.tables:
        why = "nothing was swept"
    elif _is_whole(study):
        why = "no task of this study tests it"
    else:
        why = "a part was swept, or from tuned"
    return {**dict.fromkeys(DEPENDS, why), CLAIM: "no representations were compared"}


def _headline_rows(study: Study) -> Iterator[dict[str, Any]]:
    if "contrasts" not in study.tables:
        return
    for row in study.contrasts.where(headline=True).data.to_pylist():
        if row["weighting"] != "none":
            continue
        kept = ("claim", "base", "tuned", "measure", "ci_low", "ci_high", "smallest", "verdict")
        against = None if row["against"] == "raw" else row["against"]
        named = {name: row.get(name) for name in (*kept, "why")}
        yield {**named, "value": row.get("mean"), "control": against}


def _combined_rows(study: Study) -> Iterator[dict[str, Any]]:
    from .combination_claims import COMBINING, combined_rows

    if "combination_gains" not in study.tables:
        why = "this study combines no vectors: tvlens combine"
        yield {"claim": COMBINING, "verdict": NOT_TESTED, "why": why}
        return
    rows = list(combined_rows(study.table("combination_gains").to_frame()))
    why = "no task has a good direction and is elsewhere, or of every domain by one measure"
    yield from rows or [{"claim": COMBINING, "verdict": NOT_TESTED, "why": why}]


def _is_whole(study: Study) -> bool:
    """Whether the study has swept whole tuning vectors, from the base on."""
    swept = "evaluation_items" in study.tables
    return swept and study.plan.rest == "base" and study.plan.is_whole


def _behaviour_rows(study: Study) -> Iterator[dict[str, Any]]:
    if not _is_whole(study):
        return
    items = study.table("evaluation_items").to_frame()
    primary = study.table("evaluation").to_frame()
    primary = primary[primary["primary"].fillna(False).astype(bool) & primary["control"].isna()]
    for tuned in study.plan.names:
        for row in primary[primary["model"] == tuned].to_dict("records"):
            claim = next((c for c, kinds in DEPENDS.items() if row["kind"] in kinds), None)
            measure = MEASURES[str(row["measure"])]
            quality = row["kind"] != "generation" or measure.name in QUALITY
            if claim is None or not quality or not measure.better or row["split"] == "held_out":
                continue
            of_task = items[(items["task"] == row["task"]) & (items["measure"] == measure.name)]
            named = {"claim": claim, "tuned": tuned, "task": row["task"]}
            gains = _gains(of_task, tuned, str(row["against"]), measure.name, study.plan.seed)
            yield {**named, "measure": measure.name, "unit": measure.unit, **judged(gains, measure)}


def _gains(items: pd.DataFrame, tuned: str, base: str, measure: str, seed: int) -> list[Gain]:
    """The tuned model against the base, then against all that was put in the vector's place."""
    at_one = items["control"].notna() & (items["control"] != "tuning") & (items["scale"] == 1.0)
    others = [base, *items[at_one]["model"].unique()]
    mine = _values(items, tuned)
    sign = -1.0 if MEASURES[measure].better == "lower" else 1.0
    found = []
    for name in others:
        one: Comparison = comparison(
            mine, _values(items, str(name)), MEASURES[measure].transform, seed=seed
        )
        ends = sorted((sign * one.low, sign * one.high))
        found.append(Gain(str(name), sign * one.difference, *ends))
    return found


def _values(items: pd.DataFrame, model: str) -> Values:
    rows = items[items["model"] == model].sort_values("item", kind="stable")
    return Values(
        rows["item"].to_numpy(dtype=np.int64),
        rows["value"].to_numpy(dtype=float),
        rows["weight"].to_numpy(dtype=float),
    )


def judged(gains: list[Gain], measure: Any) -> dict[str, Any]:
    """The verdict's columns: the first gain is over the base, the others over controls."""
    base, controls = gains[0], gains[1:]
    smallest = SMALLEST.get(measure.unit, 0.05)
    known = {"value": base.value, "ci_low": base.low, "ci_high": base.high, "smallest": smallest}
    if not controls:
        why = "nothing was put in the vector's place at dose 1"
        return {**known, "verdict": CANNOT_TELL, "why": why}
    least = min(controls, key=lambda gain: gain.value)
    known |= {
        "control": least.over,
        "control_value": least.value,
        "control_low": least.low,
        "control_high": least.high,
    }
    verdict, why = _verdict(gains, smallest)
    return {**known, "verdict": verdict, "why": why}


def _verdict(gains: list[Gain], smallest: float) -> tuple[str, str]:
    small = [gain.over for gain in gains if gain.high < smallest]
    if small:
        return NOT_SUPPORTED, f"surely less than {smallest:g} better than {small[0]}"
    open_ = [gain.over for gain in gains if not gain.low > 0]
    if open_:
        return CANNOT_TELL, f"not surely better than {open_[0]}"
    if gains[0].value < smallest:
        return CANNOT_TELL, f"better, by less than {smallest:g}"
    return SUPPORTED, "better than the base and than all that stood in the vector's place"
