"""The verdict on "fine-tuning changes a small subspace", by the rule of docs/claims.md.

With r the effective rank of the difference of the residual streams over d_model, block by block,
and q = r over that of a random vector as long, medians over blocks with a bootstrap over them:

    supported       r ends at or below ``SMALL`` and every q at or below ``BELOW``
    not supported   r lies above ``SMALL``, or one q above ``BELOW``
    cannot tell     the rest, and where blocks, tokens or random vectors are too few
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from tvlens.evaluation.intervals import DRAWS
from tvlens.evaluation.similarity import FEW_TOKENS, ROUNDED, TOKENS_PER_DIMENSION, UNCHANGED
from tvlens.geometry.contrasts import CANNOT_TELL, NOT_SUPPORTED, SUPPORTED

from .representing import RANDOM, at_stream
from .store import Study

CLAIM = "fine-tuning changes a small subspace of the representations"
MEASURE = "effective_rank_share"
SMALL = 0.1
"""The largest share of the dimensions that is called small."""
BELOW = 0.5
"""The largest share of a random vector's rank that is called below it."""
LEAST_BLOCKS = 4
"""With fewer a bootstrap of a median means nothing."""


class Median(NamedTuple):
    """A median over blocks and the ends of its 95 % interval."""

    value: float
    low: float
    high: float


class Beside(NamedTuple):
    """The fine-tune's rank over that of something in its vector's place, q of the rule."""

    model: str
    ratio: Median


def subspace_rows(study: Study) -> Iterator[dict[str, Any]]:
    """The rows of ``verdicts`` on this claim, one a fine-tune; none without representations."""
    if "representations" not in study.tables:
        return
    frame = study.table("representations").to_frame()
    facts = study.manifest.get("facts", {})
    for names, rows in frame.groupby(["base", "tuned"], sort=False):
        base, tuned = map(str, names)  # type: ignore[call-overload]
        named = {"claim": CLAIM, "base": base, "tuned": tuned, "measure": MEASURE}
        task = facts.get(tuned, {}).get("represent", {}).get("texts")
        found = judged_rank(at_stream(rows, MEASURE), seed=study.plan.seed)
        yield {**named, "task": task, "unit": "share of d_model", **found}


def judged_rank(rows: pd.DataFrame, *, seed: int = 0) -> dict[str, Any]:
    """The verdict's columns of one fine-tune.

    Args:
        rows: Rows of ``effective_rank_share`` of the residual stream: ``model``, ``control``,
            ``layer``, ``value``, ``status``.
        seed: Seed of the bootstrap.
    """
    changed = rows[~rows["status"].isin((UNCHANGED, ROUNDED))]
    own = changed[changed["control"].isna()].set_index("layer")
    if len(own) < LEAST_BLOCKS:
        why = f"{len(own)} blocks changed by more than rounding; {LEAST_BLOCKS} are needed"
        return {"verdict": CANNOT_TELL, "why": why}
    share = median(own["value"].to_numpy(), seed=seed)
    others = changed[changed["control"].notna()]
    random = _beside(own["value"], others[others["control"] == RANDOM], seed)
    controls = _beside(own["value"], others[others["control"] != RANDOM], seed)
    known: dict[str, Any] = dict(zip(("value", "ci_low", "ci_high"), share, strict=True))
    if random:
        most = max(random, key=lambda one: one.ratio.value)
        ends = ("control_value", "control_low", "control_high")
        known |= {"control": most.model, **dict(zip(ends, most.ratio, strict=True))}
    verdict, why = _verdict(share, random, few=bool((own["status"] == FEW_TOKENS).any()))
    return {**known, "verdict": verdict, "why": "; ".join([why, *map(_domain, controls)])}


def median(values: np.ndarray, *, seed: int = 0) -> Median:
    """The median with the percentiles of a bootstrap over ``values``."""
    chosen = np.random.default_rng(seed).integers(0, len(values), (DRAWS, len(values)))
    low, high = np.quantile(np.median(values[chosen], axis=1), (0.025, 0.975))
    return Median(float(np.median(values)), float(low), float(high))


def _beside(own: pd.Series, others: pd.DataFrame, seed: int) -> list[Beside]:
    """Every other model that changed ``LEAST_BLOCKS`` of the same blocks, block by block."""
    found = []
    for model, rows in others.groupby("model", sort=False):
        ratio = (own / rows.set_index("layer")["value"]).dropna()
        if len(ratio) >= LEAST_BLOCKS:
            found.append(Beside(str(model), median(ratio.to_numpy(), seed=seed)))
    return found


def _verdict(share: Median, random: list[Beside], *, few: bool) -> tuple[str, str]:
    if few:
        return CANNOT_TELL, f"fewer than {TOKENS_PER_DIMENSION} tokens for each dimension"
    if not random:
        return CANNOT_TELL, "no random vector was put in the tuning vector's place"
    if share.low > SMALL:
        return NOT_SUPPORTED, f"surely more than {SMALL:g} of the dimensions"
    if above := [one.model for one in random if one.ratio.low > BELOW]:
        return NOT_SUPPORTED, f"surely more than {BELOW:g} of the rank of {above[0]}"
    if share.high > SMALL:
        return CANNOT_TELL, f"not surely at most {SMALL:g} of the dimensions"
    if open_ := [one.model for one in random if one.ratio.high > BELOW]:
        return CANNOT_TELL, f"not surely at most {BELOW:g} of the rank of {open_[0]}"
    return SUPPORTED, "few dimensions, and fewer than random vectors as long"


def _domain(control: Beside) -> str:
    ratio = f"{control.ratio.value:.2g} of the rank of {control.model}"
    if control.ratio.high < 1:
        return f"surely below the control: {ratio}"
    return f"not surely below the control, so not about the domain: {ratio}"
