"""Do MLPs write newer directions than attention, and does attention amplify more? Layer by layer.

A layer has two matrices that write the residual stream: W_O of attention, W_out of the MLP. Both
halves of the claim [1] are a difference of the two, above 0 where the claim is right:

    newness         G_rel of what W_O writes, minus that of W_out      (column g_write)
    amplification   net share of energy in gains, W_O minus W_out      (column amplification)

Both measures are 0 at chance for any shape and 1 for a pure gain (formulas: ``matrices``), so no
noise differs between them; the raw alignment that a paper may have meant does not have this, and
is no part of a contrast. A layer counts where both changes are above the rounding floor.

Each difference d_l is taken raw and minus the same of control fine-tunes, with layers counted
equally or by what behaviour owes to them (weights w_l from attribution). Raw, it says how this
fine-tune differs from noise; only the rest after a control can say anything of the domain.

    mean            sum_l w_l d_l, the w_l summing to 1
    p_value         signs of the w_l d_l flipped at random, two-sided; exact up to 14 layers
    p_block         the same for blocks of b = n^(1/3) neighbouring layers flipped as one
    interval        mean +- t s, 95 %, s the error of a circular block bootstrap [2] in closed
                    form: e_l = n w_l (d_l - mean), B_j = mean of e_j .. e_(j+b-1) around the
                    circle, s^2 = b/n mean_j(B_j^2) m / (m - 1); Student's t with m - 1 degrees of
                    freedom, m = 1 / (b sum w_l^2) blocks of equal weight
    detectable      s (t_(1 - level/2) + t_power): the smallest difference that would have shown

With b = 1 and equal weights the interval is Student's own. Quantiles of drawn bootstrap means cover
less where layers are few (8 layers, correlation 0.6 between neighbours: 75 % against 84 %).

[1] arXiv:2510.09359; [2] Politis and Romano 1992, Kuensch 1989 for blocks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
from jaxtyping import Float
from scipy import stats

from tvlens.tables import Table

from .nulls import SignFlip, above_rounding, sign_flip_test

Claim = Literal["newness", "amplification"]
Values = Float[np.ndarray, " layer"]

ATTENTION, MLP = "W_O", "W_out"
WRITES = (ATTENTION, MLP)
"""The matrices that write the residual stream."""
LEVEL = 0.05
"""Level of the tests; the intervals have one less this."""
POWER = 0.8
"""Chance of showing a difference of the size ``detectable``."""
RAW, CONTROLS = "raw", "minus controls"
EQUAL, BY_SCORE = "none", "weight_ig"
SUPPORTED, NOT_SUPPORTED, CANNOT_TELL = "supported", "not supported", "cannot tell"
TOO_FEW = f"{CANNOT_TELL}: too few layers"
NOTHING_MEASURED = "no layer has both W_O and W_out above the rounding floor"
NOTHING_SCORED = "no layer that is measured has a score"


class Measure(NamedTuple):
    """What a claim compares.

    Attributes:
        column: Column of the table ``weights``.
        words: The measure of the difference.
        claim: The claim in words.
        smallest: A true difference below this is no support.
    """

    column: str
    words: str
    claim: str
    smallest: float


MEASURES: dict[Claim, Measure] = {
    # a twentieth of the way from chance to a pure gain
    "newness": Measure(
        "g_write", "G_rel of writes, W_O minus W_out", "MLP writes are newer than attention's", 0.05
    ),
    # the share of its energy that a label needs
    "amplification": Measure(
        "amplification",
        "net energy share of gains, W_O minus W_out",
        "Attention amplifies more than the MLP",
        0.10,
    ),
}
_NUMBERS = ("attention", "mlp", "mean", "ci_low", "ci_high", "p_value", "p_floor")
CONTRASTS_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("base", "tuned", "claim", "measure")),
        *((name, pa.string()) for name in ("against", "weighting")),
        *((name, pa.int32()) for name in ("n_layers", "controls")),
        *((name, pa.float64()) for name in _NUMBERS),
        ("block", pa.int32()),
        *((name, pa.float64()) for name in ("p_block", "p_block_floor")),
        *((name, pa.float64()) for name in ("detectable", "level", "power", "smallest")),
        *((name, pa.string()) for name in ("verdict", "why", "sentence")),
        ("headline", pa.bool_()),
        ("layers", pa.list_(pa.int32())),
        *(
            (name, pa.list_(pa.float64()))
            for name in ("attention_by_layer", "mlp_by_layer", "weight_by_layer")
        ),
    ]
)
"""One row a contrast x ``against`` x ``weighting``.

    claim, measure      newness or amplification, and what is compared
    against             ``raw``; ``minus NAME`` of a control; ``minus controls``: their mean
    weighting           ``none``: layers alike; ``weight_ig``: by mean |weight_ig| of both matrices
    n_layers, controls  layers that count; control fine-tunes subtracted
    attention, mlp      weighted means over layers, less those of the controls; mean: their
                        difference, in units of the measure (0 chance, 1 a pure gain)
    ci_low, ci_high     95 %, neighbouring layers taken together
    p_value, p_floor    sign flips of layers, and the smallest p that they can reach
    block, p_block, ..  neighbouring layers that are flipped as one, and the same two of them
    detectable          smallest difference shown with ``power`` at ``level``
    smallest            smallest difference that supports the claim
    verdict, why        supported, not supported, cannot tell, cannot tell: too few layers
    sentence            to be quoted; ``headline``: in the two rows that the answer quotes
    layers, *_by_layer  the values that went in, less the controls'; weights sum to 1
"""


@dataclass(frozen=True, eq=False)
class Contrast:
    """A measure of attention and of the MLP over the layers of a model.

    Attributes:
        claim: What is asked.
        layers: Their numbers.
        attention: The measure of W_O, less that of the controls.
        mlp: The same of W_out.
        weights: What each layer counts, summing to 1.
        against: What was subtracted, ``raw`` for nothing.
        controls: Number of control fine-tunes in that.
        weighting: What the weights are.
    """

    claim: Claim
    layers: tuple[int, ...]
    attention: Values
    mlp: Values
    weights: Values
    against: str = RAW
    controls: int = 0
    weighting: str = EQUAL

    @property
    def differences(self) -> Values:
        """Attention minus MLP."""
        return self.attention - self.mlp

    @property
    def mean(self) -> float:
        """The weighted mean difference, NaN of no layer."""
        return float(self.differences @ self.weights) if len(self.layers) else float("nan")

    @property
    def block(self) -> int:
        """Neighbouring layers that are taken as one."""
        return max(1, round(len(self.layers) ** (1 / 3)))

    def flips(self, block: int, *, seed: int) -> SignFlip:
        """Sign flips of the weighted differences, ``block`` neighbours as one."""
        terms = self.differences * self.weights
        return sign_flip_test(np.add.reduceat(terms, np.arange(0, len(terms), block)), seed=seed)


class Spread(NamedTuple):
    """How sure a mean over layers is.

    Attributes:
        error: Standard error.
        freedom: Degrees of freedom of Student's t.
    """

    error: float
    freedom: float

    @property
    def half_interval(self) -> float:
        """Half of the 95 % interval."""
        return float(self.error * stats.t.ppf(1 - LEVEL / 2, self.freedom))

    @property
    def detectable(self) -> float:
        """The smallest true difference that shows with ``POWER`` at ``LEVEL``."""
        return float(self.half_interval + self.error * stats.t.ppf(POWER, self.freedom))


def spread(differences: Values, weights: Values, block: int) -> Spread | None:
    """The error of the weighted mean by a circular block bootstrap (module docstring).

    None where fewer than two blocks' worth of layers are left: nothing has a spread.
    """
    count = len(differences)
    blocks = 1 / (block * float(weights @ weights)) if count else 0.0
    if blocks <= 1 + 1e-9:
        return None
    around = (np.arange(count)[:, None] + np.arange(block)) % count
    terms = count * weights * (differences - differences @ weights)
    of_blocks = terms[around].mean(1)
    variance = block / count * float((of_blocks**2).mean()) * blocks / (blocks - 1)
    return Spread(variance**0.5, blocks - 1)


@dataclass(frozen=True, eq=False)
class Judgement:
    """A contrast with its tests.

    Attributes:
        contrast: What was judged; it has at least one layer.
        flips: Sign flips of layers.
        blocks: Sign flips of blocks.
        spread: Error of the mean, None where it has none.
    """

    contrast: Contrast
    flips: SignFlip
    blocks: SignFlip
    spread: Spread | None

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the mean; the whole line where there is no spread."""
        half = self.spread.half_interval if self.spread is not None else np.inf
        return self.contrast.mean - half, self.contrast.mean + half

    @property
    def significant(self) -> bool:
        """Whether layers, blocks as far as they can tell, and the interval all exclude 0."""
        low, high = self.interval
        held = self.blocks.p_floor > LEVEL or self.blocks.p_value <= LEVEL
        return self.flips.p_value <= LEVEL and held and low * high > 0


def judged(contrast: Contrast, *, seed: int) -> Judgement | None:
    """The tests of a contrast, None of no layer."""
    if not contrast.layers:
        return None
    return Judgement(
        contrast,
        contrast.flips(1, seed=seed),
        contrast.flips(contrast.block, seed=seed),
        spread(contrast.differences, contrast.weights, contrast.block),
    )


def verdict_of(found: Judgement) -> tuple[str, str]:
    """The verdict, and why.

    Supported: significant, on the claim's side, and at least ``smallest``. Not supported:
    significant on the other side, or the interval ends below ``smallest``. The rest cannot be told.
    """
    smallest, mean = MEASURES[found.contrast.claim].smallest, found.contrast.mean
    if found.flips.p_floor > LEVEL:
        return TOO_FEW, f"p cannot fall below {found.flips.p_floor:.2g}"
    if found.significant and mean < 0:
        return NOT_SUPPORTED, "the difference is significant and goes the other way"
    if found.interval[1] < smallest:
        return NOT_SUPPORTED, f"a difference of {smallest:g} is ruled out"
    if found.significant and mean >= smallest:
        return SUPPORTED, "significant, also with neighbouring layers taken together"
    if found.significant:
        return CANNOT_TELL, f"there is a difference, but it may be below {smallest:g}"
    if found.flips.p_value <= LEVEL:
        return CANNOT_TELL, "significant only if neighbouring layers are independent"
    return CANNOT_TELL, _would_have_shown(found)


def _would_have_shown(found: Judgement) -> str:
    if found.spread is None:
        return "so few layers hold all the weight that the difference has no spread"
    return (
        f"{found.spread.detectable:.2g} is the smallest difference that would have shown, with "
        f"{100 * POWER:.0f} % power at the {100 * LEVEL:.0f} % level"
    )


def contrasts_table(
    weights: pd.DataFrame, controls: Sequence[pd.DataFrame] = (), *, seed: int = 0
) -> Table:
    """Both contrasts, layers counted alike: raw, minus each control, minus their mean.

    Args:
        weights: Frame of the table ``weights`` of one pair.
        controls: The same for control fine-tunes of the same base.
        seed: Of the sign flips, where there are too many layers to enumerate.
    """
    names = {name: str(weights[name].iloc[0]) for name in ("base", "tuned")}
    found = []
    for claim in MEASURES:
        own, others = _by_layer(weights, claim), [_by_layer(one, claim) for one in controls]
        found.append(_contrast(claim, own))
        if len(others) > 1:
            for frame, other in zip(controls, others, strict=True):
                against = f"minus {frame['tuned'].iloc[0]}"
                found.append(_contrast(claim, own - other, against, 1))
        if others:
            mean = sum(others[1:], start=others[0]) / len(others)
            found.append(_contrast(claim, own - mean, CONTROLS, len(others)))
    quoted = CONTROLS if controls else RAW
    return _table([_row(one, names, seed=seed, quoted=quoted) for one in found])


def with_weighted(table: Table, importance: Mapping[int, float], *, seed: int = 0) -> Table:
    """The unweighted rows of a pair's contrasts, and the same with layers counted by importance.

    Args:
        table: Contrasts of one pair; weighted rows in it are made anew.
        importance: What behaviour owes to each layer's two matrices, at least 0; what is absent
            does not count.
        seed: Of the sign flips.
    """
    rows = [row for row in table.data.to_pylist() if row["weighting"] == EQUAL]
    weighted = [_row(_weighted(row, importance), row, seed=seed, quoted=None) for row in rows]
    return _table([*rows, *weighted])


def _weighted(row: Mapping[str, Any], importance: Mapping[int, float]) -> Contrast:
    """The contrast of a row with layers weighted, those without weight left out."""
    raw = np.array([importance.get(layer, 0.0) for layer in row["layers"]])
    kept = raw > 0
    return Contrast(
        row["claim"],
        tuple(np.array(row["layers"], dtype=int)[kept].tolist()),
        np.array(row["attention_by_layer"])[kept],
        np.array(row["mlp_by_layer"])[kept],
        raw[kept] / raw.sum() if kept.any() else raw[kept],
        row["against"],
        row["controls"],
        BY_SCORE,
    )


def _by_layer(weights: pd.DataFrame, claim: Claim) -> pd.DataFrame:
    """Columns W_O and W_out by layer, where both are known and above the rounding floor."""
    rows = weights[(weights["kind"] == "matrix") & weights["part"].isin(WRITES)]
    sizes = (rows[name].to_numpy(float) for name in ("delta_norm", "snr"))
    rows = rows[above_rounding(*sizes)]
    values = rows.pivot_table(index="layer", columns="part", values=MEASURES[claim].column)
    return values.reindex(columns=list(WRITES)).dropna()


def _contrast(
    claim: Claim, values: pd.DataFrame, against: str = RAW, controls: int = 0
) -> Contrast:
    """A contrast of the layers that have a value, counted alike."""
    values = values.dropna()
    return Contrast(
        claim,
        tuple(int(layer) for layer in values.index),
        values[ATTENTION].to_numpy(float),
        values[MLP].to_numpy(float),
        np.full(len(values), 1 / max(1, len(values))),
        against,
        controls,
    )


def _row(
    contrast: Contrast, names: Mapping[str, Any], *, seed: int, quoted: str | None
) -> dict[str, Any]:
    """The columns of ``CONTRASTS_SCHEMA``."""
    known = {
        **{name: names[name] for name in ("base", "tuned")},
        **{name: getattr(contrast, name) for name in ("claim", "against", "weighting", "controls")},
        "measure": MEASURES[contrast.claim].words,
        "smallest": MEASURES[contrast.claim].smallest,
        "n_layers": len(contrast.layers),
        "level": LEVEL,
        "power": POWER,
        "headline": contrast.against == quoted,
        "layers": list(contrast.layers),
        "attention_by_layer": contrast.attention.tolist(),
        "mlp_by_layer": contrast.mlp.tolist(),
        "weight_by_layer": contrast.weights.tolist(),
    }
    found = judged(contrast, seed=seed)
    if found is None:
        why = NOTHING_SCORED if contrast.weighting == BY_SCORE else NOTHING_MEASURED
        sentence = f"{MEASURES[contrast.claim].claim}: {TOO_FEW} ({why})."
        return {**known, "verdict": TOO_FEW, "why": why, "sentence": sentence}
    verdict, why = verdict_of(found)
    return {
        **known,
        **_numbers(found),
        "verdict": verdict,
        "why": why,
        "sentence": _sentence(found, verdict, why),
    }


def _numbers(found: Judgement) -> dict[str, Any]:
    contrast, known = found.contrast, found.spread
    low, high = found.interval if known is not None else (None, None)
    return {
        "attention": float(contrast.attention @ contrast.weights),
        "mlp": float(contrast.mlp @ contrast.weights),
        "mean": contrast.mean,
        "ci_low": low,
        "ci_high": high,
        "p_value": found.flips.p_value,
        "p_floor": found.flips.p_floor,
        "block": contrast.block,
        "p_block": found.blocks.p_value,
        "p_block_floor": found.blocks.p_floor,
        "detectable": known.detectable if known is not None else None,
    }


def _sentence(found: Judgement, verdict: str, why: str) -> str:
    """What a reader may quote."""
    contrast, (low, high) = found.contrast, found.interval
    measure = MEASURES[contrast.claim]
    bounds = f", 95 % interval {low:+.3f} to {high:+.3f}" if np.isfinite(high) else ""
    counted = "" if contrast.weighting == EQUAL else f" counted by {contrast.weighting}"
    scope = "" if contrast.controls else "; without a control this says nothing about the domain"
    return (
        f"{measure.claim}: {verdict} ({measure.words}{_less(contrast)}: {contrast.mean:+.3f}"
        f"{bounds}, over {len(contrast.layers)} layers{counted}; p = {found.flips.p_value:.2g}, "
        f"smallest possible {found.flips.p_floor:.2g}; {why}{scope})."
    )


def _less(contrast: Contrast) -> str:
    """What was subtracted, in words."""
    if contrast.against != CONTROLS:
        return "" if contrast.against == RAW else f", {contrast.against}"
    many = contrast.controls > 1
    return f", minus the mean of {contrast.controls} controls" if many else ", minus the control"


def _table(rows: Sequence[Mapping[str, Any]]) -> Table:
    columns = {name: [row.get(name) for row in rows] for name in CONTRASTS_SCHEMA.names}
    return Table.of("contrasts", CONTRASTS_SCHEMA, columns)
