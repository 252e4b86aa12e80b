"""Selections by what a study found: labels, scores and sizes as further columns of the key.

    label == "new_write"                          by the table labels
    kind == "head" and score > 0.05               by the mean score over prompts, table attribution
    kind == "neuron", with top = 20               the 20 of these with the largest |score|

A piece has the values that the tables hold of it. A head's slice of W_O has the label of its OV
circuit and its slice of W_Q that of its QK; what query heads share (W_K, W_V) has a label only as
a matrix. Scores of heads and neurons sum over parts, so all parts of one have its score and count
as one of the top. A tied embedding has the sum of the scores of its two uses. Where a table has no
row for a piece its value is missing: it equals nothing and is not ranked.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pandas as pd

from tvlens.components import DISJOINT_KINDS, Component
from tvlens.errors import SelectionError, StudyError
from tvlens.selection import KEY_TYPES, ColumnType, Selection, parse_selection
from tvlens.tables import Table
from tvlens.weights.provenance import BaseRecord
from tvlens.weights.slices import FINE_KINDS, Kept, chosen, pieces

from .weighting import Key, mean_scores

FOUND_IN = {"label": "labels", "score": "attribution", "relative_delta": "weights"}
"""The columns that a study adds, and the table of each."""
FOUND_TYPES: Mapping[str, ColumnType] = {
    **KEY_TYPES,
    "label": "text",
    "score": "number",
    "relative_delta": "number",
}
"""All columns that a selection may name beside a study."""
METHOD = "weight_ig"
"""The scores that sum to the change of the metric, and of which every component has one."""
SCORED = (*DISJOINT_KINDS, "head", "kv_head", "neuron")
"""Kinds that have scores."""
EVERYTHING = "component != None"
IN_TOP = "in_top"
_MAKES = {"labels": "decompose", "weights": "decompose", "attribution": "attribute"}
"""The command that makes a table."""
_CIRCUITS = {"W_O": "OV", "W_Q": "QK"}
"""Whose label a head's slice of a matrix has."""


class Chosen(NamedTuple):
    """A selection that was looked up.

    Attributes:
        text: As it was asked for.
        kept: What it keeps of each component: a part for edits, vectors and merges.
        notes: What was not ranked and how ties were broken, in sentences.
    """

    text: str
    kept: dict[Component, Kept]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Findings:
    """What a study says of the pieces of one tuning vector.

    Attributes:
        tuned: What its tables call the fine-tune.
        columns: The values by column; a column is absent where its table is.
    """

    tuned: str
    columns: Mapping[str, Mapping[Key, Any]] = field(repr=False)

    def of(self, piece: Component) -> dict[str, object]:
        """The values of one piece by column, None where a table has none."""
        keys = {"label": _labelled(piece), "score": scored(piece), "relative_delta": piece}
        return {name: values.get(keys[name]) for name, values in self.columns.items()}


@dataclass(frozen=True)
class _Ranked:
    """Findings with a column that says what is among the top."""

    found: Findings
    best: frozenset[Component]

    def of(self, piece: Component) -> dict[str, object]:
        return {**self.found.of(piece), IN_TOP: scored(piece) in self.best}


def scored(piece: Component) -> Component:
    """What has the score of a piece: of a head or neuron the whole site."""
    return piece._replace(part=None) if piece.kind in FINE_KINDS else piece


def _labelled(piece: Component) -> Component:
    """What has the label of a piece: of a head the circuit that the slice is a factor of."""
    if piece.kind != "head":
        return piece
    return piece._replace(part=_CIRCUITS.get(piece.part or "", piece.part))


def findings(
    tuned: str,
    *,
    labels: Table | None = None,
    attribution: Table | None = None,
    weights: Table | None = None,
) -> Findings:
    """What the tables of a study say of one fine-tune; None where a table does not exist.

    Raises:
        StudyError: A table holds nothing of this fine-tune.
    """
    columns: dict[str, Mapping[Key, Any]] = {}
    if labels is not None:
        columns["label"] = _values(labels, tuned, "label")
    if attribution is not None:
        columns["score"] = mean_scores(attribution, tuned=tuned, method=METHOD, kinds=SCORED)
    if weights is not None:
        columns["relative_delta"] = _values(weights, tuned, "relative_delta")
    for name, values in columns.items():
        if not values:
            raise StudyError(f"the table {FOUND_IN[name]!r} of the study says nothing of {tuned}.")
    return Findings(tuned, columns)


def _values(table: Table, tuned: str, column: str) -> dict[Key, Any]:
    """A column by component; missing values are left out."""
    frame = table.to_frame()
    frame = frame[(frame["tuned"] == tuned) & frame[column].notna()]
    layers, indices = (
        [None if pd.isna(value) else int(value) for value in frame[name]]
        for name in ("layer", "index")
    )
    keys = zip(frame["kind"], layers, indices, frame["part"], strict=True)
    return dict(zip(keys, frame[column].tolist(), strict=True))


def with_tied(found: Findings) -> Findings:
    """The same for a model whose unembedding is its embedding: one score for both uses."""
    scores = found.columns.get("score", {})
    uses: list[Key] = [("embedding", None, None, part) for part in ("W_E", "W_U")]
    if not any(use in scores for use in uses):
        return found
    both = {**scores, uses[0]: sum(scores.get(use, 0.0) for use in uses)}
    return Findings(found.tuned, {**found.columns, "score": both})


def selected(text: str, base: BaseRecord, found: Findings, *, top: int | None = None) -> Chosen:
    """Look a selection up in what a study found.

    Args:
        text: An expression over the key, ``label``, ``score`` and ``relative_delta``, or a list
            of sites; empty for every component.
        base: The base of the vector that is selected from.
        found: What the study says.
        top: Keep only so many of these, those with the largest |score|.

    Raises:
        SelectionError: It cannot be read, selects nothing, or has nothing to rank.
        StudyError: The study lacks the table of a column.
    """
    found = with_tied(found) if base.layout.tied else found
    asked = parse_found(text, top=top)
    _require_tables(asked, found, top)
    _refuse_labels(asked, found)
    names = {"base": base.name, "tuned": found.tuned}
    if top is None:
        return Chosen(text, chosen(asked, base.layout, **names, beside=found.of))
    among = dict.fromkeys(map(scored, pieces(asked, base.layout, **names, beside=found.of)))
    best, notes = _best(list(among), found, top)
    marked = parse_selection(f"({asked.text}) and {IN_TOP}", {**FOUND_TYPES, IN_TOP: "flag"})
    kept = chosen(marked, base.layout, **names, beside=_Ranked(found, frozenset(best)).of)
    return Chosen(_worded(text, top), kept, notes)


def parse_found(text: str, *, top: int | None = None) -> Selection:
    """Read a selection that may name what a study found.

    Raises:
        SelectionError: It cannot be read, or it is a list and is to be ranked.
    """
    asked = parse_selection(text or EVERYTHING, FOUND_TYPES)
    if top is not None and asked.tree is None:
        raise SelectionError(
            f"the list {text!r} is a choice already, of pieces that overlap; nothing is ranked.",
            hint='Rank what an expression selects, such as kind == "head".',
        )
    return asked


def _worded(text: str, top: int) -> str:
    of = f" of {text}" if text else ""
    return f"the top {top} by |score|{of}"


def _require_tables(asked: Selection, found: Findings, top: int | None) -> None:
    for name, table in FOUND_IN.items():
        wanted = name in asked.columns or (name == "score" and top is not None)
        if wanted and name not in found.columns:
            raise StudyError(
                f"the study has no table {table!r}, which holds {name}.",
                hint=f"Add it to the study with `tvlens {_MAKES[table]}`.",
            )


def _refuse_labels(asked: Selection, found: Findings) -> None:
    """A label that no component has is a slip."""
    known = {*map(str, found.columns.get("label", {}).values())}
    for label in asked.literals("label") - {None}:
        if label not in known:
            raise SelectionError(
                f"the study labels nothing {label!r}; it has {', '.join(sorted(known))}."
            )


def _best(
    among: Sequence[Component], found: Findings, top: int
) -> tuple[list[Component], tuple[str, ...]]:
    """The ``top`` of some pieces by |score|, in model order where these are equal; what to say."""
    scores = found.columns["score"]
    sizes = {one: abs(float(scores[one])) for one in among if one in scores}
    ranked = sorted((one for one in sizes if sizes[one] > 0), key=lambda one: -sizes[one])
    if not ranked:
        raise SelectionError(
            f"nothing of the {len(among)} selected has a {METHOD} score that is not zero.",
            hint="Scores belong to matrices, norms, biases, embeddings, heads, kv heads, neurons.",
        )
    best, notes = ranked[:top], []
    if missing := [one for one in among if one not in sizes]:
        notes.append(
            f"{len(missing)} of {len(among)} selected components, such as {missing[0]}, have no "
            f"{METHOD} score and were not ranked."
        )
    if len(best) < top:
        notes.append(f"only {len(best)} components have a score that is not zero, not {top}.")
    tied = [one for one in ranked[top:] if sizes[one] == sizes[best[-1]]]
    if tied:
        notes.append(
            f"{len(tied)} more have the same |score| as {best[-1]}, the last of the {top}; those "
            "that come first in the model were taken."
        )
    return best, tuple(notes)
