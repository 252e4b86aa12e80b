"""What of a tuning vector an edit lets in, as it is asked for: with words, and beside a study.

    select, top    pieces: by the key, and by labels, scores and sizes that a study found
    parts          geometric parts of every matrix's change
    along          new directions that a study found

``study`` must be one of the same two models: their files' hashes are compared with its manifest,
and its tables are read under the name that they have there. What is asked for is refused before
models are loaded where that can be known without them (``check_request``).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tvlens.components import Component, Kind
from tvlens.errors import SelectionError, StudyError
from tvlens.selection import KEY_TYPES, ColumnType, parse_selection
from tvlens.tables import Table

from .plan import WHOLE_WAY
from .store import Study, existing_study

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from tvlens.compose.combining import Merge
    from tvlens.compose.portions import Portion
    from tvlens.compose.selecting import Chosen
    from tvlens.weights.delta import Delta
    from tvlens.weights.layout import Layout
    from tvlens.weights.matching import Pair
    from tvlens.weights.provenance import BaseRecord, Input
    from tvlens.weights.slices import Kept

DIRECTION_TYPES: Mapping[str, ColumnType] = {
    **KEY_TYPES,
    **{"label": "text", "stands_out": "flag"},
    **dict.fromkeys(("strength", "share", "gain_cosine", "g_rel", "novelty"), "number"),
    **dict.fromkeys(("max_cos", "q_value"), "number"),
}
"""Columns of the table ``directions`` that a choice of them may name."""


class Request(NamedTuple):
    """What is asked for; nothing for the whole vector.

    Attributes:
        select: An expression or a list of sites.
        top: So many of what is selected, by |score|.
        parts: Names of geometric parts, divided by commas.
        along: Directions: an expression over their table, or a list.
        study: Folder of the study that is asked.
    """

    select: str = ""
    top: int | None = None
    parts: str = ""
    along: str = ""
    study: str | None = None

    @property
    def text(self) -> str:
        """The same for people, empty for the whole vector."""
        of = f" of {self.select}" if self.select else ""
        words = (
            f"the top {self.top} by |score|{of}" if self.top else self.select,
            f"the parts {self.parts}" if self.parts else "",
            f"along {self.along}" if self.along else "",
        )
        return "; ".join(word for word in words if word)


@dataclass(frozen=True)
class Cut:
    """What of a tuning vector an edit lets in.

    Attributes:
        part: What is kept of each component, None for everything.
        portion: What is taken of each change, None for the change itself.
        notes: What a reader should know, in sentences.
    """

    part: "Mapping[Component, Kept] | None" = None
    portion: "Portion | None" = field(default=None, repr=False)
    notes: tuple[str, ...] = ()

    def of(
        self, component: Component, base: "Float[Tensor, '...']", delta: "Delta"
    ) -> "Delta | None":
        """What is let in of one component's change; None where that is nothing."""
        from tvlens.weights.vector import restricted

        taken = delta if self.portion is None else self.portion.of(component, base, delta)
        if taken is None or self.part is None:
            return taken
        return restricted(taken, self.part[component]) if component in self.part else None


def check_request(asked: Request) -> None:
    """Find what can be refused before any model is read.

    Raises:
        SelectionError: A selection, a part's name or a choice of directions cannot be read.
        StudyError: There is no such study, one is needed, or two ways of choosing exclude
            each other.
    """
    if asked.top is not None and asked.top < 1:
        raise StudyError(f"--top takes a number from 1, got {asked.top}.")
    if asked.along and (asked.select or asked.top or asked.parts):
        raise StudyError(
            "--along names directions of their own matrices, so nothing else is chosen with it.",
            hint="Leave --select, --top and --parts out.",
        )
    if asked.parts:
        from tvlens.compose.portions import geometric_parts

        geometric_parts(asked.parts)
    if asked.study is not None:
        _check_found(asked, asked.study)
        return
    for option, value in (("--top", asked.top), ("--along", asked.along)):
        if value:
            raise StudyError(
                f"{option} reads what a study found.", hint="Say which: --study FOLDER."
            )
    _check_key(asked.select)


def _check_found(asked: Request, study: str) -> None:
    """Read what is asked for beside a study, which must be there."""
    existing_study(Path(study))
    if asked.along:
        parse_selection(asked.along, DIRECTION_TYPES)
    elif asked.select or asked.top:
        from tvlens.compose.selecting import parse_found

        parse_found(asked.select, top=asked.top)


def _check_key(select: str) -> None:
    """Read a selection that no study stands beside; say where one could be read with it."""
    if not select:
        return
    try:
        parse_selection(select)
    except SelectionError as error:
        from tvlens.compose.selecting import FOUND_IN, FOUND_TYPES

        try:
            names = parse_selection(select, FOUND_TYPES).columns & FOUND_IN.keys()
        except SelectionError:
            raise error from None
        raise SelectionError(
            f"{', '.join(sorted(names))} in the selection {select!r} is what a study found.",
            hint="Say which study: --study FOLDER.",
        ) from error


def cut_of(asked: Request, pair: "Pair", *, canonical: bool = False) -> Cut:
    """Look up what is asked for in a pair and, where there is one, in the study of it.

    Args:
        asked: What is asked for, checked by ``check_request``.
        pair: The two models.
        canonical: Whether the pair is read in the base's coordinates.

    Raises:
        SelectionError: It selects nothing, or names what is not there.
        StudyError: The study is of other models, or lacks a table.
    """
    from tvlens.compose.portions import geometric_parts
    from tvlens.weights.vector import base_record, inputs_of, kept_by

    portion = geometric_parts(asked.parts) if asked.parts else None
    record = base_record(pair, {})
    if asked.study is None:
        kept = kept_by(asked.select, record, pair.tuned_name) if asked.select else None
        return Cut(kept, portion)
    study = existing_study(Path(asked.study))
    tuned = name_in(study, inputs_of(pair), canonical=canonical)
    if asked.along:
        return _along(asked.along, study, tuned, pair.layout)
    if not (asked.select or asked.top):
        return Cut(None, portion)
    chosen = looked_up(study, tuned, record, asked.select, top=asked.top)
    return Cut(chosen.kept, portion, chosen.notes)


def chosen_merge(found: "Merge", asked: Request) -> "Merge":
    """A merge with only what a study's findings select of each vector.

    The choice becomes factors of 0 and 1, which a merged folder keeps beside its weights, so that
    it can be checked without the study.

    Raises:
        SelectionError: It selects nothing, or names what is not there.
        StudyError: The study is of other models, lacks a table, or the vectors are weighed too.
    """
    from tvlens.compose.weighting import kept_shares

    study, terms, notes = existing_study(Path(str(asked.study))), [], []
    for term in found.terms:
        if term.shares is not None:
            raise StudyError("--study chooses what --weigh weighs already.", hint="Leave one out.")
        tuned = name_in(study, term.vector.inputs)
        chosen = looked_up(study, tuned, term.vector.base, asked.select, top=asked.top)
        terms.append(replace(term, shares=kept_shares(chosen.kept)))
        notes += chosen.notes
    return replace(found, terms=tuple(terms), part=asked.text, remarks=tuple(notes))


def looked_up(
    study: Study, tuned: str, base: "BaseRecord", select: str, *, top: int | None
) -> "Chosen":
    """A selection looked up in the tables of a study.

    Args:
        study: The study.
        tuned: What its tables call the fine-tune.
        base: The base of the vector that is selected from.
        select: The selection; empty for everything.
        top: So many of it, by |score|; None for all.

    Raises:
        SelectionError: It cannot be read, selects nothing, or has nothing to rank.
        StudyError: The study lacks the table of a column.
    """
    from tvlens.compose.selecting import FOUND_IN, findings, parse_found, selected

    columns = parse_found(select, top=top).columns | ({"score"} if top else set())
    wanted = [table for name, table in FOUND_IN.items() if name in columns]
    tables = {name: study.table(name) for name in wanted if name in study.tables}
    return selected(select, base, findings(tuned, **tables), top=top)


def name_in(study: Study, inputs: "Sequence[Input]", *, canonical: bool = False) -> str:
    """What the tables of a study call a fine-tune.

    Args:
        study: The study.
        inputs: What the tuning vector was made from, a base and a fine-tune.
        canonical: Whether the fine-tune is read in the base's coordinates.

    Raises:
        StudyError: The study is of other models, or of other coordinates of them.
    """
    known, ours = study.manifest["inputs"], [one.sha256() for one in inputs]
    for step in study.plan.steps:
        names = step.base_name, step.tuned_name.removesuffix(WHOLE_WAY)
        if [known.get(name) for name in names] == ours:
            break
    else:
        of = ", ".join(f"{s.base} -> {s.tuned}" for s in study.plan.steps)
        asked = " -> ".join(one.name for one in inputs)
        raise StudyError(
            f"{study.folder} is no study of {asked}: it is one of {of}.",
            hint="Give the study of these two models; their files are compared, not their names.",
        )
    if study.plan.canonical != canonical:
        how = "the base's" if study.plan.canonical else "the stored"
        raise StudyError(
            f"{study.folder} measured the weights in {how} coordinates, and this is a vector in "
            "others.",
            hint="Run `tvlens decompose` with --canonical or without, as here.",
        )
    return step.tuned_name


def _along(text: str, study: Study, tuned: str, layout: "Layout") -> Cut:
    """The change along directions that a study found."""
    import torch

    from tvlens.compose.portions import Along

    rows, vectors = chosen_directions(text, study.table("directions"), tuned), {}
    stored = study.direction_vectors
    for row in rows:
        vectors.setdefault(_owner(row), []).append(stored[f"{row['vector']}.write"])
    stacked = {owner: torch.stack(own) for owner, own in vectors.items()}
    circuits = [row["component"] for row in rows if row["part"] == "OV"]
    notes = () if not circuits else (
        f"of OV circuits, such as {circuits[0]}, what W_O changes along a direction is let in, and "
        "nothing of what W_V changes.",
    )  # fmt: skip
    return Cut(None, Along(stacked, layout, text=f"along {text}"), notes)


def chosen_directions(text: str, table: Table, tuned: str) -> list[dict[str, Any]]:
    """The rows of ``directions`` that a choice names.

    Args:
        text: An expression over the table's key, ``label``, ``strength`` and other measures, or
            a list of directions such as ``L5.W_out.d0`` or of the sites that write them.
        table: The table.
        tuned: The fine-tune.

    Raises:
        SelectionError: It cannot be read, names a direction that is not there, or chooses none.
    """
    asked = parse_selection(text, DIRECTION_TYPES)
    rows = table.where(tuned=tuned).data.to_pylist()
    known = {name for row in rows for name in (row["component"], row["site"])}
    if unknown := [name for name in asked.names if name not in known]:
        raise SelectionError(
            f"the study found no direction {unknown[0]!r} of {tuned}; it has for example "
            f"{', '.join(row['component'] for row in rows[:3]) or 'none'}."
        )
    found = [row for row in rows if asked.accepts(row)]
    if not found:
        raise SelectionError(f"{text!r} chooses none of the {len(rows)} directions of {tuned}.")
    return found


def _owner(row: Mapping[str, Any]) -> Component:
    """The matrix, or the slice of one, that writes a direction."""
    part = "W_O" if row["part"] == "OV" else row["part"]
    kind: Kind = "matrix" if row["index"] is None else "head"
    return Component(
        "neuron" if row["kind"] == "neuron" else kind, row["layer"], row["index"], part
    )
