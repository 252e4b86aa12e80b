"""Labels: what a component's tuning vector is, or that it cannot be told.

    unchanged    not one number differs
    unresolved   below rounding, or not enough significant structure: the default
    amplified, attenuated, flipped   a gain of the own base weights (> 0, >= -1, < -1)
    rewired      structured, in directions that the base already uses
    new_read, new_write              structured, in directions unrelated to the base's
    mixed        several significant parts, none with two thirds of the structured energy

A part counts if it is significant (q <= Q over all components above the rounding floor, or a
spike above the sign-flip edge); the significant parts together must hold MINS of the energy.
new_write is no evidence for a claim on its own: after every fine-tune most of what is structured
is unaligned with the base. The headline is therefore a contrast between MLP and attention.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
from jaxtyping import Bool, Float
from scipy import stats

from tvlens.components import Component, key_columns
from tvlens.errors import StudyError
from tvlens.memory import release_freed
from tvlens.tables import Table, keyed_schema
from tvlens.threads import one_thread

from .decompose import (
    NEURON_PARTS,
    WEIGHTS_SCHEMA,
    Pair,
    Slice,
    factors_of_circuit,
    kv_index_of,
    layer_of_block,
    matrices_by_part,
    read_block,
    weights_of_block,
)
from .evidence import (
    NO_PEERS,
    PARTS,
    Evidence,
    evidence_frame,
    head_evidence,
    joined_evidence,
    matrix_evidence,
    neuron_evidence,
    with_weights,
)
from .matrices import Basis, spectral_basis
from .nulls import SNR, above_rounding, benjamini_hochberg, sign_flip_test

Q = 0.05
"""False discovery rate of a labelled part."""
MINS = 0.10
"""Least structured share of the energy: 30 times the largest significant gain that ordinary
fine-tunes on general text show (a true but empty effect of kappa^2 = .003)."""
TOP = 2 / 3
"""Share of the structured energy that one part must hold to name the component."""
SMALLEST_CLAIM = 0.05
"""Difference in G_rel between MLP and attention that 30 layers can see with 80 % power."""
CLAIM_P = 0.05
"""Level of the headline test."""

TESTS_SCHEMA = keyed_schema(
    *((name, pa.string()) for name in ("side", "statistic", "null")),
    *(
        (name, pa.float64())
        for name in ("effect", "ci_low", "ci_high", "p_value", "p_floor", "q_value")
    ),
    *((name, pa.int32()) for name in ("m", "draws", "k")),
)
LABELS_SCHEMA = keyed_schema(
    *((name, pa.string()) for name in ("label", "label_reason", "decided_by")),
    *(
        (name, pa.float64())
        for name in ("share_new", "share_amplified", "structured_share", "dominance")
    ),
)
GATE_COLUMNS = ("delta_norm", "snr", "gain", "kappa")
LATER_KINDS = ("norm", "bias", "embedding")

Row = dict[Any, Any]
"""One record of the evidence frame."""

Classifier = Callable[[pd.DataFrame], pd.DataFrame]
"""Evidence, one row a component, to the same rows with the columns of ``LABELS_SCHEMA``."""


@dataclass(frozen=True, eq=False)
class Labels:
    """What ``classify`` found.

    Attributes:
        tests: Component x side x statistic x null.
        labels: One row a component.
        headline: The paired contrast of MLP and attention writes, with its verdict as a sentence.
    """

    tests: Table
    labels: Table
    headline: dict[str, object]

    def where(self, **equal: object) -> Table:
        """The labels whose columns equal the given values."""
        return self.labels.where(**equal)

    def _repr_html_(self) -> str:
        return f"<p>{self.headline['sentence']}</p>{self.labels._repr_html_()}"


class Decision(NamedTuple):
    """Which part names each component.

    Attributes:
        winner: Index of the largest significant part, -1 where nothing is resolved.
        structured: Share of the energy in all significant parts.
        dominance: Share of the largest part in that.
    """

    winner: np.ndarray
    structured: np.ndarray
    dominance: np.ndarray


def decide(
    shares: Float[np.ndarray, "part component"], significant: Bool[np.ndarray, "part component"]
) -> Decision:
    """The rule that every kind shares: enough significant energy, then the largest part."""
    counted = np.where(significant & (shares > 0), shares, 0.0)
    structured = counted.sum(0)
    with np.errstate(invalid="ignore"):
        dominance = np.where(structured > 0, counted.max(0) / structured, np.nan)
    winner = np.where(structured >= MINS, counted.argmax(0), -1)
    return Decision(winner, structured, dominance)


def with_q_values(frame: pd.DataFrame) -> pd.DataFrame:
    """Evidence with ``significant_*``: sure already, or by BH.

    BH runs over the components of one kind and part that are above the rounding floor.
    """
    frame = frame.copy()
    frame["resolved"] = above_rounding(
        frame["delta_norm"].to_numpy(float), frame["snr"].to_numpy(float)
    )
    for part in PARTS:
        p_values = frame[f"p_{part}"].where(frame["resolved"])
        groups = p_values.groupby([frame["kind"], frame["part"].fillna("")])
        q_values = groups.transform(lambda p: benjamini_hochberg(p.to_numpy(float)))
        frame[f"q_{part}"] = q_values
        frame[f"significant_{part}"] = (q_values <= Q) | frame[f"sure_{part}"].astype(bool)
    return frame


def _gain_label(gain: float) -> str:
    if gain > 0:
        return "amplified"
    return "flipped" if gain < -1 else "attenuated"


def _label(row: Row) -> str:
    """The label of one component from its gate and decision."""
    if row["delta_norm"] == 0:
        return "unchanged"
    if not row["resolved"] or row["winner"] < 0:
        return "unresolved"
    part = PARTS[int(row["winner"])]
    if part == "between" or row["dominance"] < TOP:
        return "mixed"
    return {"gain": _gain_label(row["gain"]), "within": "rewired"}.get(part, part)


def _why_unresolved(row: Row) -> str:
    if not row["resolved"]:
        return (
            f"The change has {row['snr']:.2g} times the energy of rounding; "
            f"{SNR:g} times are needed to say more."
        )
    if row["kind"] in LATER_KINDS:
        return (
            f"The change is {row['delta_norm']:.3g} long; {row['kind']} components are not "
            "classified yet."
        )
    untested = " No gain could be tested." if row["decided_by"] == NO_PEERS else ""
    return (
        f"Significant parts hold {row['structured_share']:.2g} of the energy of the change, "
        f"{MINS:.2g} are needed; the rest cannot be told from noise.{untested}"
    )


def _why_structured(row: Row) -> str:
    share = f"{row['structured_share']:.0%} of the energy of the change is structured, "
    inside = f"{row['dominance']:.0%} of that "
    aligned = ""
    if row["alignment"] == row["alignment"]:  # not NaN
        aligned = f" (alignment {row['alignment']:.2f} +- {row['alignment_se']:.2f}, gain is 1)"
    if row["label"] == "rewired":
        return f"{share}{inside}where the base already reads or writes{aligned}."
    if row["label"] == "mixed":
        parts = ", ".join(f"{name} {row[f'counted_{name}']:.2f}" for name in PARTS)
        torn = "no one kind holds two thirds of it"
        if row["dominance"] >= TOP:
            torn = "which cannot be told new from existing"
        return f"{share}{torn}: {parts}{aligned}."
    return f"{share}{inside}in directions unrelated to the base's{aligned}."


def _reason(row: Row) -> str:
    """One plain sentence with the numbers that decided."""
    if row["label"] == "unchanged":
        return "Not one number differs from the base."
    if row["label"] == "unresolved":
        return _why_unresolved(row)
    if row["label"] in ("amplified", "attenuated", "flipped"):
        return (
            f"{row['share_gain']:.0%} of the energy of the change is a gain of the base weights, "
            f"{row['gain']:+.3g} on average; {row['structured_share']:.0%} is significant in all."
        )
    return _why_structured(row)


def _decided_by(row: Row) -> str:
    if row["label"] == "unchanged":
        return "equality"
    return str(row["decided_by"]) if row["resolved"] else "rounding floor"


def labelled(frame: pd.DataFrame) -> pd.DataFrame:
    """The shipped classifier: evidence with q values to labels with reasons."""
    shares = np.stack([frame[f"share_{part}"].to_numpy(float) for part in PARTS])
    significant = np.stack([frame[f"significant_{part}"].to_numpy(bool) for part in PARTS])
    decision = decide(shares, significant)
    out = frame.assign(
        winner=decision.winner,
        structured_share=decision.structured,
        dominance=decision.dominance,
        share_amplified=frame["share_gain"],
        share_new=frame["share_new_write"] + frame["share_new_read"],
    )
    for part, counted in zip(PARTS, np.where(significant, shares, 0.0), strict=True):
        out[f"counted_{part}"] = counted
    rows = out.to_dict("records")
    for row in rows:
        row["label"] = _label(row)
        row["label_reason"] = _reason(row)
        row["decided_by"] = _decided_by(row)
    for name in ("label", "label_reason", "decided_by"):
        out[name] = [row[name] for row in rows]
    return out


def _testable(weight: Slice) -> bool:
    """Whether there is a change, and a base to hold it against."""
    return bool(weight.delta.any()) and bool(weight.base.any())


def evidence_of_block(
    pair: Pair, block: Sequence[Component], kappa: pd.Series, *, seed: int
) -> Evidence:
    """Evidence for the disjoint components, the heads (OV) and the neurons of one block."""
    weights = read_block(pair, block)
    parts, layer, group = matrices_by_part(weights), layer_of_block(weights), kv_index_of(pair)
    seed = seed + 1000 * (0 if layer is None else layer + 1)  # another draw in every layer
    bases = {part: spectral_basis(w.base) for part, w in parts.items() if _testable(w)}
    found: list[Evidence] = []
    for one, weight in weights.items():
        if one.kind == "matrix" and one.part in bases:
            basis = bases[one.part]
            found.append(matrix_evidence(one, weight.base, weight.delta, basis, seed=seed))
        else:
            found.append(_untested([one]))
    if "W_V" in parts and "W_O" in parts:
        heads = [Component("head", layer, head, "OV") for head in range(len(group))]
        value, output = factors_of_circuit(parts, "OV", group)
        own = kappa.loc[[str(head) for head in heads]].to_numpy(float)
        found.append(head_evidence(heads, value, output, group, own, seed=seed))
    for part in NEURON_PARTS:
        if part in parts:
            found.append(_neurons(parts[part], layer, part, bases.get(part), seed=seed))
    return joined_evidence(found)


def _untested(components: Sequence[Component]) -> Evidence:
    return Evidence(evidence_frame(components), pd.DataFrame())


def _neurons(
    weight: Slice, layer: int | None, part: str, basis: Basis | None, *, seed: int
) -> Evidence:
    count = weight.base.shape[0] if part == "W_out" else weight.base.shape[1]
    components = [Component("neuron", layer, index, part) for index in range(count)]
    if basis is None:
        return _untested(components)
    return neuron_evidence(components, weight.base, weight.delta, basis, seed=seed)


def _keyed(
    frame: pd.DataFrame, pair: Pair, kv_of_head: list[int], tied: pd.Series
) -> dict[str, Any]:
    """Key columns of the components of a frame."""
    components = list(frame["component"])
    kv_index = [kv_of_head[c.index] if c.kind == "head" else None for c in components]
    labels = [str(component) for component in components]
    return {
        **key_columns(components, kv_index=kv_index),
        "base": [pair.base_name] * len(components),
        "tuned": [pair.tuned_name] * len(components),
        "tied": tied.loc[labels].to_list(),
    }


def adjusted_tests(tests: pd.DataFrame, resolved: set[Component]) -> pd.DataFrame:
    """The tests of components above the floor, BH within kind, part, statistic and null."""
    tests = tests[[component in resolved for component in tests["component"]]].copy()
    family = [
        [c.kind for c in tests["component"]],
        [c.part or "" for c in tests["component"]],
        tests["statistic"],
        tests["null"],
    ]
    p_values = pd.to_numeric(tests["p_value"]).groupby(family)
    tests["q_value"] = p_values.transform(lambda p: benjamini_hochberg(p.to_numpy(float)))
    tests["m"] = p_values.transform("count")
    return tests


def _paired_difference(weights: pd.DataFrame) -> pd.Series:
    """G_rel on the write side of W_out minus that of W_O, by layer; absent where one is null."""
    matrices = weights[weights["kind"] == "matrix"]
    by_layer = matrices.pivot_table(index="layer", columns="part", values="g_write")
    if not {"W_out", "W_O"} <= set(by_layer.columns):
        return pd.Series(dtype=float)
    return (by_layer["W_out"] - by_layer["W_O"]).dropna()


def _verdict(mean: float, half: float, p_value: float, p_floor: float) -> tuple[str, str]:
    """Verdict and its reason; the claim is that MLPs write less along the base (mean < 0)."""
    if p_floor > CLAIM_P:
        return "cannot tell", f"with so few layers p cannot fall below {p_floor:.2g}"
    if p_value <= CLAIM_P:
        if mean < 0:
            return "supported", "MLP writes are less aligned with the base than attention writes"
        return "not supported", "MLP writes are more aligned with the base than attention writes"
    if mean - half > -SMALLEST_CLAIM:
        return "not supported", f"a difference of -{SMALLEST_CLAIM} would have been seen"
    return "cannot tell", "the difference is within its own uncertainty"


def headline(
    weights: pd.DataFrame, controls: Sequence[pd.DataFrame] = (), *, seed: int = 0
) -> dict[str, object]:
    """The contrast: does the MLP write newer directions than attention, layer by layer?

    Args:
        weights: Frame of the table ``weights``.
        controls: The same for control fine-tunes; their mean contrast is subtracted.
        seed: Seed of the sign flips, where there are too many layers to enumerate.
    """
    by_layer = _paired_difference(weights)
    others = [_paired_difference(control) for control in controls]
    if others:
        by_layer = (by_layer - sum(others) / len(others)).dropna()  # aligned by layer
    difference = by_layer.to_numpy(float)
    count = len(difference)
    measure = "G_rel write side, W_out minus W_O" + (", minus control" if others else "")
    known: dict[str, object] = {"measure": measure, "n_layers": count, "controls": len(others)}
    if count == 0:
        return {**known, "verdict": "cannot tell", "sentence": "Cannot tell: nothing to compare."}
    test = sign_flip_test(difference, seed=seed)
    half = np.inf
    if count > 1:
        half = float(stats.t.ppf(0.975, count - 1) * difference.std(ddof=1) / np.sqrt(count))
    verdict, why = _verdict(test.mean, half, test.p_value, test.p_floor)
    scope = "" if others else " Without a control this says nothing about the domain."
    sentence = (
        f"MLP newer than attention: {verdict} (mean difference {test.mean:+.3f} +- {half:.3f} over "
        f"{count} layers, p = {test.p_value:.3g}, smallest possible {test.p_floor:.2g}; "
        f"{why}).{scope}"
    )
    return {
        **known,
        "mean": test.mean,
        "half_interval": half if count > 1 else None,
        "p_value": test.p_value,
        "p_floor": test.p_floor,
        "draws": test.draws,
        "verdict": verdict,
        "sentence": sentence,
    }


def _write_matrices(pair: Pair) -> pd.DataFrame:
    """Rows of W_O and W_out of a control, all that its contrast needs."""
    blocks = [[c for c in block if c.part in ("W_O", "W_out")] for block in pair.blocks()]
    found = []
    for block in filter(None, blocks):
        found.append(weights_of_block(pair, block).to_frame())
        release_freed()
    return pd.concat(found) if found else pd.DataFrame(columns=list(WEIGHTS_SCHEMA.names))


@one_thread()
def classify(
    pair: Pair,
    weights: Table,
    *,
    controls: Sequence[Pair] = (),
    classifier: Classifier | None = None,
    seed: int = 0,
) -> Labels:
    """Label every matrix, head (OV) and neuron of a pair; reads the tensors again, block by block.

    Args:
        pair: Base and tuned checkpoint.
        weights: Its table from ``decompose``.
        controls: Pairs of the same base with control fine-tunes; the headline subtracts them.
        classifier: Evidence to labels; ``labelled`` where None.
        seed: Seed of the one sign-flip draw a matrix and of the headline's flips.

    Raises:
        StudyError: ``weights`` is of another pair.
    """
    frame = weights.to_frame().set_index("component")
    blocks = [block for block in pair.blocks() if block]
    if missing := [c for block in blocks for c in block if str(c) not in frame.index]:
        raise StudyError(
            f"the weights table has no row {str(missing[0])!r} of the pair.",
            hint="Pass decompose(pair) of the same pair.",
        )
    kappa = frame["kappa"]
    found = []
    for block in blocks:
        found.append(evidence_of_block(pair, block, kappa, seed=seed))
        release_freed()
    evidence = joined_evidence(found)
    gate = {name: frame[name].astype(float) for name in GATE_COLUMNS}
    rows = with_q_values(with_weights(evidence.frame, gate))
    calls = (classifier or labelled)(rows)
    resolved = set(rows.loc[rows["resolved"], "component"])
    tests = adjusted_tests(evidence.tests, resolved)
    kv_of_head = kv_index_of(pair).tolist()
    return Labels(
        tests=_table("tests", TESTS_SCHEMA, tests, _keyed(tests, pair, kv_of_head, frame["tied"])),
        labels=_table(
            "labels", LABELS_SCHEMA, calls, _keyed(calls, pair, kv_of_head, frame["tied"])
        ),
        headline=headline(
            frame.reset_index(), [_write_matrices(control) for control in controls], seed=seed
        ),
    )


def _whole_numbers(column: pd.Series) -> list[int | None]:
    return [None if pd.isna(value) else int(value) for value in column]


def _table(name: str, schema: pa.Schema, frame: pd.DataFrame, keys: dict[str, Any]) -> Table:
    """The columns of ``schema`` from the frame and its keys."""
    own = {
        field.name: _whole_numbers(frame[field.name])
        if field.type == pa.int32()
        else frame[field.name].to_list()
        for field in schema
        if field.name in frame and field.name not in keys
    }
    order = {"labels": "structured_share", "tests": "effect"}[name]
    return Table.of(name, schema, {**own, **keys}, order=order)
