"""Labels: what a component's tuning vector is, or that it cannot be told.

    unchanged    not one number differs
    unresolved   below rounding, or not enough significant structure: the default
    amplified, attenuated, flipped   a gain of the own base weights (> 0, >= -1, < -1)
    rewired      structured, in directions that the base already uses
    new_read, new_write              structured, in directions unrelated to the base's
    mixed        several significant parts, none with two thirds of the structured energy

A part counts if it is significant (q <= Q over all components above the rounding floor, or a
spike above the sign-flip edge); the significant parts together must hold MINS of the energy.
A label about structure needs more above rounding than a gain does (SNR_OF_STRUCTURE).
new_write is no evidence for a claim on its own: after every fine-tune most of what is structured
is unaligned with the base. The headline is therefore a contrast of MLP and attention
(``contrasts``).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
from jaxtyping import Bool, Float

from tvlens.components import Component
from tvlens.errors import StudyError
from tvlens.tables import Table, keyed_schema
from tvlens.threads import one_thread

from .blocks import Ask, Findings, Progress, findings_of_blocks, joined_findings
from .contrasts import WRITES, contrasts_table
from .evidence import MINS, PARTS, Evidence, replaced
from .norm_evidence import norm_evidence
from .nulls import SNR, SNR_OF_STRUCTURE, above_rounding, benjamini_hochberg
from .own_classifiers import Classifier, called_by, resolved_classifier
from .own_measures import Given, measured, resolved_measures, with_measures
from .reading import Inputs, Pair

Q = 0.05
"""False discovery rate of a labelled part."""
TOP = 2 / 3
"""Share of the structured energy that one part must hold to name the component."""

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
ROUNDING_FLOOR = "rounding floor"
"""What decided where a change is too close to rounding."""
LATER_KINDS = ("bias",)
REASON_COLUMNS = (
    *("kind", "gain", "snr", "delta_norm", "resolved", "readable", "winner"),
    *("structured_share", "dominance", "share_gain", "alignment", "alignment_se"),
    *("spikes", "remark", "decided_by"),
)
"""What labels and their reasons are made from, beside the counted shares."""

Row = dict[Any, Any]
"""One record of the evidence frame."""


@dataclass(frozen=True, eq=False)
class Labels:
    """What ``classify`` found.

    Attributes:
        tests: Component x side x statistic x null.
        labels: One row a component.
        contrasts: MLP against attention, with verdicts and the sentences to quote.
        measures: What the user's own measures found; None where there are none.
    """

    tests: Table
    labels: Table
    contrasts: Table
    measures: Table | None = None

    def where(self, **equal: object) -> Table:
        """The labels whose columns equal the given values."""
        return self.labels.where(**equal)

    def _repr_html_(self) -> str:
        quoted = self.contrasts.where(headline=True).to_frame()["sentence"]
        return f"<p>{' '.join(quoted)}</p>{self.labels._repr_html_()}"


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
    """Evidence with ``significant_*``: sure already, or by BH; and how far above rounding.

    BH runs over the components of one kind and part that are above the rounding floor
    (``resolved``); ``readable`` are those far enough above it for a label about structure.
    """
    frame = frame.copy()
    size, snr = frame["delta_norm"].to_numpy(float), frame["snr"].to_numpy(float)
    frame["resolved"] = above_rounding(size, snr)
    frame["readable"] = above_rounding(size, snr, least=SNR_OF_STRUCTURE)
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
    is_gain = part == "gain" and row["dominance"] >= TOP
    if not is_gain and not row["readable"]:
        return "unresolved"
    if part == "between" or row["dominance"] < TOP:
        return "mixed"
    return {"gain": _gain_label(row["gain"]), "within": "rewired"}.get(part, part)


def _is_unreadable(row: Row) -> bool:
    """Whether structure was found, but too close to rounding to say more."""
    return row["winner"] >= 0 and not row["readable"]


def _why_unresolved(row: Row) -> str:
    if not row["resolved"]:
        return (
            f"The change has {row['snr']:.2g} times the energy of rounding; "
            f"{SNR:g} times are needed to say more."
        )
    if _is_unreadable(row):
        return (
            f"The change has {row['snr']:.2g} times the energy of rounding; "
            f"{SNR_OF_STRUCTURE:g} times are needed to say where its structure lies."
        )
    if row["kind"] in LATER_KINDS:
        return (
            f"The change is {row['delta_norm']:.3g} long; {row['kind']} components are not "
            "classified yet."
        )
    remark = f" {row['remark']}" if row["remark"] else ""
    return (
        f"Significant parts hold {row['structured_share']:.2g} of the energy of the change, "
        f"{MINS:.2g} are needed; the rest cannot be told from noise.{remark}"
    )


def _why_structured(row: Row) -> str:
    share = f"{row['structured_share']:.0%} of the energy of the change is structured, "
    inside = f"{row['dominance']:.0%} of that "
    aligned = ""
    if row["alignment"] == row["alignment"]:  # not NaN
        aligned = f" (alignment {row['alignment']:.2f} +- {row['alignment_se']:.2f}, gain is 1)"
    if row["kind"] == "norm" and row["label"] == "rewired":
        return f"{share}{inside}in single channels ({row['spikes']:g} of them)."
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
    near = not row["resolved"] or (row["label"] == "unresolved" and _is_unreadable(row))
    return ROUNDING_FLOOR if near else str(row["decided_by"])


def _records(frame: pd.DataFrame, names: Sequence[str]) -> Iterator[Row]:
    """Some columns as one record a row: ``to_dict("records")``, many times faster."""
    columns = [frame[name].tolist() for name in names]
    return (dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True))


def _named(row: Row) -> tuple[str, str, str]:
    """Label, reason and what decided of one record."""
    row["label"] = _label(row)
    return row["label"], _reason(row), _decided_by(row)


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
    rows = _records(out, [*REASON_COLUMNS, *(f"counted_{part}" for part in PARTS)])
    calls, names = list(map(_named, rows)), ("label", "label_reason", "decided_by")
    return out.assign(**{name: [call[i] for call in calls] for i, name in enumerate(names)})


def adjusted_tests(tests: pd.DataFrame, below: pd.Series) -> pd.DataFrame:
    """The tests of components above the floor, BH within kind, part, statistic and null.

    Args:
        tests: Rows of evidence.
        below: The components that are not above the floor, most often none.
    """
    tests = tests[~tests["component"].isin(below)].copy() if len(below) else tests.copy()
    family = [tests["kind"], tests["part"].fillna(""), tests["statistic"], tests["null"]]
    p_values = pd.to_numeric(tests["p_value"]).groupby(family)
    tests["q_value"] = p_values.transform(lambda p: benjamini_hochberg(p.to_numpy(float)))
    tests["m"] = p_values.transform("count")
    return tests


def _write_matrices(pair: Pair) -> list[list[Component]]:
    """W_O and W_out of every block, all that the contrasts need of a control."""
    return [[c for c in block if c.part in WRITES] for block in pair.blocks()]


def classify(
    pair: Pair,
    weights: Table,
    *,
    controls: Sequence[Pair] = (),
    covariances: Inputs | None = None,
    classifier: str | Classifier | None = None,
    measures: Sequence[Given] = (),
    seed: int = 0,
) -> Labels:
    """Label every matrix, head (OV) and neuron of a pair; reads the tensors again, block by block.

    ``decompose_and_classify`` does both at once and takes every base spectrum only once.

    Args:
        pair: Base and tuned checkpoint.
        weights: Its table from ``decompose``.
        controls: Pairs of the same base with control fine-tunes; the contrasts subtract them.
        covariances: What the base's matrices read (``tvlens.covariances``): more rows of tests,
            against the covariance-matched null.
        classifier: Your own, evidence to labels (``own_classifiers``); ``labelled`` where None.
        measures: Your own numbers of a component (``own_measures``).
        seed: Seed of the one sign-flip draw a matrix and of the contrasts' flips.

    Raises:
        StudyError: ``weights`` is of another pair, or ``covariances`` of another base.
        ExtensionError: The classifier or a measure gives something else than it must.
    """
    own, wanted = resolved_classifier(classifier), resolved_measures(measures)
    frame = weights.to_frame()
    known = set(frame["component"])
    if missing := [c for block in pair.blocks() for c in block if str(c) not in known]:
        raise StudyError(
            f"the weights table has no row {str(missing[0])!r} of the pair.",
            hint="Pass decompose(pair) of the same pair.",
        )
    (found,), others = _examined([pair], controls, covariances=covariances, seed=seed)
    table = measured(pair, wanted) if wanted else None
    return labels_of(found, frame, others, classifier=own, measures=table, seed=seed)


@dataclass(frozen=True, eq=False)
class Geometry:
    """All that geometry finds of a pair.

    Attributes:
        weights: The table ``weights``.
        labels: Tests, labels and contrasts.
    """

    weights: Table
    labels: Labels


def decompose_and_classify(
    pairs: Sequence[Pair],
    *,
    controls: Sequence[Pair] = (),
    covariances: Inputs | None = None,
    classifier: str | Classifier | None = None,
    measures: Sequence[Given] = (),
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Geometry]:
    """Tables and labels of several fine-tunes in one pass over the blocks of their base.

    The base's singular directions are taken once, so each further fine-tune costs less than the
    first. Pairs of other bases may be among them; nothing is shared then.

    Args:
        pairs: Base and each fine-tune.
        controls: Pairs of the same base with control fine-tunes; the contrasts subtract them.
        covariances: As for ``classify``, of the base of all pairs.
        classifier: As for ``classify``.
        measures: As for ``classify``.
        seed: Seed of the one sign-flip draw a matrix and of the contrasts' flips.
        progress: Called after every block.

    Raises:
        StudyError: ``covariances`` is of another base.
        ExtensionError: The classifier or a measure gives something else than it must.
    """
    own, wanted = resolved_classifier(classifier), resolved_measures(measures)
    found, others = _examined(
        pairs, controls, covariances=covariances, seed=seed, progress=progress
    )
    made = []
    for pair, one in zip(pairs, found, strict=True):
        table, frame = measured(pair, wanted) if wanted else None, one.weights.to_frame()
        labels = labels_of(one, frame, others, classifier=own, measures=table, seed=seed)
        made.append(Geometry(one.weights, labels))
    return made


def _examined(
    pairs: Sequence[Pair],
    controls: Sequence[Pair],
    *,
    covariances: Inputs | None = None,
    seed: int,
    progress: Progress | None = None,
) -> tuple[list[Findings], list[pd.DataFrame]]:
    """The findings of the pairs, and the frames of the controls' writing matrices."""
    plans = [(pair, pair.blocks(), seed) for pair in pairs]
    plans += [(control, _write_matrices(control), None) for control in controls]
    total = max((len(blocks) for _, blocks, _ in plans), default=0)
    wanted = [
        [i for i, (_, blocks, _) in enumerate(plans) if len(blocks) > number and blocks[number]]
        for number in range(total)
    ]
    asks = [
        [
            Ask(plans[i][0], plans[i][1][number], seed=plans[i][2], covariances=covariances)
            for i in some
        ]
        for number, some in enumerate(wanted)
    ]
    parts: list[list[Findings]] = [[] for _ in plans]
    for some, found in zip(wanted, findings_of_blocks(asks, progress), strict=True):
        for i, one in zip(some, found, strict=True):
            parts[i].append(one)
    joined = [joined_findings(part) for part in parts if part]
    return joined[: len(pairs)], [one.weights.to_frame() for one in joined[len(pairs) :]]


@one_thread()
def labels_of(
    found: Findings,
    weights: pd.DataFrame,
    controls: Sequence[pd.DataFrame] = (),
    *,
    classifier: Classifier | None = None,
    measures: Table | None = None,
    seed: int = 0,
) -> Labels:
    """The labels of a pair from what was found of all of its components.

    Args:
        found: Findings with evidence.
        weights: Frame of the table ``weights``.
        controls: The same for control fine-tunes.
        classifier: The user's own; ``labelled`` where None.
        measures: The table of the user's own measures.
        seed: Seed of the contrasts' flips.

    Raises:
        ExtensionError: The classifier gives something else than labels.
    """
    evidence = _settled(found)
    rows = with_q_values(evidence.frame)
    calls = labelled(rows)
    if classifier is not None and classifier is not labelled:
        given = with_measures(weights, measures, taken=list(rows.columns))
        calls = called_by(classifier, rows, calls, given)
    tests = adjusted_tests(evidence.tests, rows.loc[~rows["resolved"], "component"])
    names = {name: weights[name].iloc[0] for name in ("base", "tuned")}
    return Labels(
        tests=_table("tests", TESTS_SCHEMA, tests, names, order="effect"),
        labels=_table("labels", LABELS_SCHEMA, calls, names, order="structured_share"),
        contrasts=contrasts_table(weights, controls, seed=seed),
        measures=measures,
    )


def _settled(found: Findings) -> Evidence:
    """The evidence with what needs all layers at once: norms are held against each other."""
    if found.evidence is None:
        raise ValueError("labels need findings with evidence: give Ask a seed.")
    if not found.norms:
        return found.evidence
    return replaced(found.evidence, norm_evidence(found.norms))


def _table(
    name: str, schema: pa.Schema, frame: pd.DataFrame, names: Mapping[str, str], *, order: str
) -> Table:
    """The columns of ``schema`` from a frame and the names of its pair."""
    own = {field.name: frame[field.name].array for field in schema if field.name in frame}
    both = {column: [value] * len(frame) for column, value in names.items()}
    return Table.of(name, schema, {**own, **both}, order=order)
