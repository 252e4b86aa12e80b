"""What of an effect is carried by gains of what was there, by rewiring, and by new directions.

The rows of ``geometric_part`` in the attribution table, added up over groups of components and
averaged over prompts. For a group with mean effect M and parts M_p (they sum to M),

    share = M_p / M                     of the effect; parts may have either sign, so a share may be
                                        below 0 or above 1, and all of a group sum to 1
    energy = sum |D^p|^2 / sum |D|^2    of what was written, from the columns ``e_*``

and the parts together in three bands:

    gains      global, scale                     more or less of what was there
    rewired    within, reroute                   existing directions, joined in another way
    new        new_read, new_write, new_both     directions outside the top quarter

By this measure most of any change is new, noise included (three quarters of its energy), so a
share says something beside its energy: new directions that hold 0.75 of the energy and 0.5 of the
effect work less than what else was written. Groups: attention and MLP, every kind of matrix, heads,
kv heads and neurons, and the components of each label. The last question, whether new directions
carry more of the MLP's effect than of attention's, is the causal form of the claim that
``contrasts`` asks of weights alone.

Intervals are 95 % percentiles of a bootstrap over prompts, of the ratio of means. Where a group's
effect is not surely different from 0 its shares mean nothing and are null.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
from jaxtyping import Float

from tvlens.components import ATTENTION_PARTS, MLP_PARTS
from tvlens.tables import Table

from .parts import PARTS

BANDS = {
    "gains": ("global", "scale"),
    "rewired": ("within", "reroute"),
    "new": ("new_read", "new_write", "new_both"),
}
"""Parts that are one answer to "new, or more of the same?"."""
PLACES = ("attention", "MLP")
CLAIMS = {
    ("attention", "MLP"): "New directions carry more of the MLP's effect than of attention's",
    ("W_O", "W_out"): "New directions carry more of the effect of W_out than of that of W_O",
}
"""What is compared, and what is claimed of it."""
FEWEST = 6
"""Prompts below which an interval says nothing: five agree by chance one time in 16."""
METHOD = "weight_ig"
RESAMPLES = 1_000
_ENDS = (0.025, 0.975)

SHARES_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("base", "tuned", "metric", "unit")),
        *((name, pa.string()) for name in ("level", "of", "geometric_part")),
        *((name, pa.int32()) for name in ("components", "n")),
        *((name, pa.float64()) for name in ("effect", "whole", "share", "ci_low", "ci_high")),
        ("energy", pa.float64()),
        *((name, pa.string()) for name in ("verdict", "sentence")),
    ]
)
"""One row a group and part or band.

    level            place, matrix, kind, label, or contrast: the MLP's share less attention's
    of               attention, MLP, W_O, head, ``new_write matrix`` ...
    geometric_part   a part, or one of the bands gains, rewired, new
    components, n    how many components, over how many prompts
    effect, whole    mean over prompts of the part and of all parts, in the metric's unit
    share            effect / whole with its interval; of a contrast the difference of two shares
    energy           the share of what was written, null where no column tells
    verdict, ...     of the contrast: supported, not supported, cannot tell, and why
"""


@dataclass(frozen=True, eq=False)
class Group:
    """The parts of some components' effects.

    Attributes:
        level: What kind of group.
        of: Its name.
        components: How many components.
        effects: By part, a mean over components' sums for every prompt; one number where only the
            mean over prompts is known (neurons).
        energies: Share of the squared length by part, as far as it is known.
    """

    level: str
    of: str
    components: int
    effects: Mapping[str, Float[np.ndarray, " prompt"]]
    energies: Mapping[str, float]

    @property
    def whole(self) -> Float[np.ndarray, " prompt"]:
        """The effect of every prompt."""
        return np.sum([*self.effects.values()], axis=0)

    def effect(self, name: str) -> Float[np.ndarray, " prompt"]:
        """The effect of a part or a band."""
        found = [self.effects[part] for part in BANDS.get(name, (name,)) if part in self.effects]
        return np.sum(found, axis=0) if found else np.zeros_like(self.whole)

    def energy(self, name: str) -> float | None:
        """The share of the squared length of a part or a band."""
        if not self.energies:
            return None
        return sum(self.energies.get(part, 0.0) for part in BANDS.get(name, (name,)))


class Share(NamedTuple):
    """A ratio of means with its interval; None where it means nothing."""

    value: float | None = None
    low: float | None = None
    high: float | None = None


def shares_table(
    attribution: Table,
    *,
    weights: Table | None = None,
    labels: Table | None = None,
    seed: int = 0,
) -> Table:
    """The shares of every group of one fine-tune's components, and the contrast.

    Args:
        attribution: Its rows, those with a ``geometric_part`` among them; without there is no row.
        weights: Its weights table, for energies.
        labels: Its labels table, for groups by label.
        seed: Of the bootstrap.
    """
    frame = attribution.where(method=METHOD).to_frame()
    frame = frame[frame["geometric_part"].notna()]
    if frame.empty:
        return Table.of("shares", SHARES_SCHEMA, {})
    names = {name: frame[name].iloc[0] for name in ("base", "tuned", "metric", "unit")}
    lengths = None if weights is None else weights.to_frame()
    groups = [*_groups(frame, lengths), *_labelled(frame, labels, lengths)]
    rows = [{**names, **row} for group in groups for row in _rows(group, seed)]
    by_name = {group.of: group for group in groups if group.level in ("place", "matrix")}
    for pair in CLAIMS:
        if {*pair} <= by_name.keys():
            one, other = (by_name[name] for name in pair)
            rows.append({**names, **_contrast(one, other, seed)})
    columns = {name: [row.get(name) for row in rows] for name in SHARES_SCHEMA.names}
    return Table.of("shares", SHARES_SCHEMA, columns)


def _groups(frame: pd.DataFrame, weights: pd.DataFrame | None) -> Iterator[Group]:
    """Places, matrices of one name, kinds."""
    matrices = frame[frame["kind"] == "matrix"]
    for place, parts in zip(PLACES, (ATTENTION_PARTS, MLP_PARTS), strict=True):
        yield from _group("place", place, matrices[matrices["part"].isin(parts)], weights)
    for part in matrices["part"].dropna().unique():
        yield from _group("matrix", str(part), matrices[matrices["part"] == part], weights)
    for kind in ("head", "kv_head", "neuron"):
        yield from _group("kind", kind, frame[frame["kind"] == kind], weights)


def _labelled(
    frame: pd.DataFrame, labels: Table | None, weights: pd.DataFrame | None
) -> Iterator[Group]:
    """Matrices by their label, heads by that of OV, neurons by that of their write vector."""
    if labels is None:
        return
    known = labels.to_frame()
    for kind, part in (("matrix", None), ("head", "OV"), ("neuron", "W_out")):
        own = known[(known["kind"] == kind) & ((known["part"] == part) | (part is None))]
        column = "component" if kind == "matrix" else "site"
        of_kind = frame[frame["kind"] == kind]
        for label, rows in own.groupby("label", sort=True):
            chosen = of_kind[of_kind[column].isin(rows[column])]
            yield from _group("label", f"{label} {kind}", chosen, weights)


def _group(
    level: str, of: str, rows: pd.DataFrame, weights: pd.DataFrame | None
) -> Iterator[Group]:
    """The group of some rows, nothing of no rows.

    Neurons have rows of a mean over prompts, which alone hold all of them.
    """
    rows = rows[rows["prompt"].isna() == (rows["kind"] == "neuron")]
    if rows.empty:
        return
    sums = rows.assign(prompt=rows["prompt"].fillna(-1)).pivot_table(
        index="geometric_part", columns="prompt", values="score", aggfunc="sum"
    )
    effects = {part: sums.loc[part].to_numpy(float) for part in PARTS if part in sums.index}
    components = rows["component"].unique()
    yield Group(level, of, len(components), effects, _energies(rows, weights))


def _energies(rows: pd.DataFrame, weights: pd.DataFrame | None) -> dict[str, float]:
    """Shares of the squared length by part; of matrices and heads, whose columns tell."""
    if weights is None or not set(rows["kind"]) <= {"matrix", "head", "kv_head"}:
        return {}
    column = "component" if set(rows["kind"]) == {"matrix"} else "site"
    own = weights[weights["kind"].isin(rows["kind"]) & weights[column].isin(rows[column])]
    own = own[own["e_global"].notna() & ~own["part"].isin(("OV", "QK"))]
    squares = own["delta_norm"].to_numpy(float) ** 2
    if not squares.sum() > 0:
        return {}
    return {
        part: float((own[f"e_{part}"].fillna(0.0).to_numpy(float) * squares).sum() / squares.sum())
        for part in PARTS
        if f"e_{part}" in own.columns
    }


def _rows(group: Group, seed: int) -> Iterator[dict[str, object]]:
    """A row of each part and of each band."""
    for name in (*group.effects, *BANDS):
        effect = group.effect(name)
        found = _share(effect, group.whole, seed)
        yield {
            "level": group.level,
            "of": group.of,
            "geometric_part": name,
            "components": group.components,
            "n": len(effect) if len(effect) > 1 else None,
            "effect": float(effect.mean()),
            "whole": float(group.whole.mean()),
            "share": found.value,
            "ci_low": found.low,
            "ci_high": found.high,
            "energy": group.energy(name),
        }


def _share(
    part: Float[np.ndarray, " prompt"], whole: Float[np.ndarray, " prompt"], seed: int
) -> Share:
    """mean(part) / mean(whole); without an interval of too few prompts, or where there are none."""
    total = float(whole.mean())
    if len(whole) < FEWEST:
        return Share(float(part.mean()) / total) if total else Share()
    means = _drawn(whole, seed)
    if not _surely_not_zero(means):
        return Share()
    ratios = _drawn(part, seed) / means
    low, high = np.quantile(ratios, _ENDS)
    return Share(float(part.mean()) / total, float(low), float(high))


def _drawn(values: Float[np.ndarray, " prompt"], seed: int) -> Float[np.ndarray, " draw"]:
    """Means over prompts drawn with replacement; the same prompts for the same seed."""
    chosen = np.random.default_rng(seed).integers(0, len(values), (RESAMPLES, len(values)))
    return values[chosen].mean(axis=1)


def _surely_not_zero(means: Float[np.ndarray, " draw"]) -> bool:
    low, high = np.quantile(means, _ENDS)
    return bool(low * high > 0)


def _contrast(attention: Group, mlp: Group, seed: int) -> dict[str, object]:
    """The MLP's share of new directions less attention's, over the same prompts."""
    prompts = len(attention.whole)
    row: dict[str, object] = {
        "level": "contrast",
        "of": f"{mlp.of} minus {attention.of}",
        "geometric_part": "new",
        "components": attention.components + mlp.components,
        "n": prompts,
    }
    said = [_said(group, seed) for group in (mlp, attention)]
    shares = [_share(group.effect("new"), group.whole, seed) for group in (mlp, attention)]
    claim = CLAIMS[attention.of, mlp.of]
    if prompts < FEWEST or any(share.value is None for share in shares):
        why = "the effect of one of the two is not surely different from 0 on these prompts"
        if prompts < FEWEST:
            why = f"{prompts} prompts are too few for an interval"
        return {**row, **_verdict(claim, "cannot tell", said, None, why)}
    ratios = [_drawn(g.effect("new"), seed) / _drawn(g.whole, seed) for g in (mlp, attention)]
    low, high = (float(end) for end in np.quantile(ratios[0] - ratios[1], _ENDS))
    first, second = (share.value or 0.0 for share in shares)
    found = Share(first - second, low, high)
    verdict = "supported" if low > 0 else "not supported" if high < 0 else "cannot tell"
    why = {
        "supported": "the interval lies above 0",
        "not supported": "the interval lies below 0",
        "cannot tell": "the interval holds 0",
    }[verdict]
    numbers = {"share": found.value, "ci_low": low, "ci_high": high}
    return {**row, **numbers, **_verdict(claim, verdict, said, found, why)}


def _verdict(
    claim: str, verdict: str, said: Sequence[str], found: Share | None, why: str
) -> dict[str, object]:
    difference = ""
    if found is not None and found.value is not None:
        difference = (
            f"; difference {found.value:+.2f}, 95 % interval over prompts {found.low:+.2f} to "
            f"{found.high:+.2f}"
        )
    sentence = f"{claim}: {verdict} ({' against '.join(said)}{difference}; {why})."
    return {"verdict": verdict, "sentence": sentence}


def _said(group: Group, seed: int) -> str:
    """A group's share of new directions beside their share of what was written."""
    found, energy = _share(group.effect("new"), group.whole, seed), group.energy("new")
    share = "no share" if found.value is None else f"{found.value:.2f}"
    if found.low is not None:
        share += f" [{found.low:.2f}, {found.high:.2f}]"
    beside = "" if energy is None else f" from {energy:.2f} of its squared length"
    return f"{group.of} {share}{beside}"
