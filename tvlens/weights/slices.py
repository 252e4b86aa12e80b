"""Heads, kv heads, kv groups and neurons as slices of canonical matrices, and what selects them.

A canonical matrix multiplies from the right (``x @ W``), so what *reads* the residual stream
(W_Q, W_K, W_V, W_gate, W_in) holds one head or neuron in neighbouring columns, and what *writes*
it (W_O, W_out) in neighbouring rows. A bias that is added to such columns is cut with them, as in
attribution: ``L3H7`` is its slices of W_Q, of b_Q where there is one, and of W_O.

An expression speaks about a set of pieces that covers every parameter once. The pieces are the
disjoint components; those that a kind named in the expression cuts finer are replaced by their
heads, kv heads, kv groups or neurons. So ``not`` is a true complement: ``not site == "L3H7"`` is
everything but that head. An expression that names two kinds which share a parameter
(``matrix`` and ``head``) has no such set and is refused.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor

from tvlens.components import Component, Kind
from tvlens.errors import SelectionError
from tvlens.selection import Selection

from .layout import Layout

FINE_KINDS: tuple[Kind, ...] = ("head", "kv_head", "kv_group", "neuron")
CUT_KINDS: tuple[Kind, ...] = (*FINE_KINDS, "matrix", "bias")
"""The kinds that can share a parameter with another kind."""
QUERY_PARTS, KV_PARTS = ("W_Q", "b_Q", "W_O"), ("W_K", "b_K", "W_V", "b_V")
NEURON_PARTS = ("W_gate", "W_in", "W_out", "b_gate", "b_in")
WRITING_PARTS = ("W_O", "W_out")
"""Cut along their input axis; every other part along its output axis."""


class Cut(NamedTuple):
    """How a kind cuts one component into equal slices.

    Attributes:
        kind: ``head``, ``kv_head``, ``kv_group`` or ``neuron``.
        count: Number of slices.
        width: Rows or columns of one slice.
    """

    kind: Kind
    count: int
    width: int


@dataclass(frozen=True, eq=False)
class Kept:
    """What a selection keeps of one component.

    Attributes:
        axis: The axis that is cut, None where the whole component is kept.
        entries: Which indices of that axis are kept.
    """

    axis: int | None = None
    entries: Bool[Tensor, " entry"] | None = None


WHOLE = Kept()


def cuts(layout: Layout, component: Component) -> list[Cut]:
    """The ways in which a component of a disjoint kind is cut finer, none for a norm."""
    part = str(component.part)
    if part in QUERY_PARTS:
        share = layout.n_heads // layout.n_kv_heads
        heads = Cut("head", layout.n_heads, layout.d_head)
        return [heads, Cut("kv_group", layout.n_kv_heads, share * layout.d_head)]
    if part in KV_PARTS:
        kinds: tuple[Kind, ...] = ("kv_head", "kv_group")
        return [Cut(kind, layout.n_kv_heads, layout.d_head) for kind in kinds]
    return [Cut("neuron", layout.d_mlp, 1)] if part in NEURON_PARTS else []


def cut_axis(layout: Layout, component: Component) -> int:
    """The axis of the canonical tensor that heads or neurons divide."""
    return 0 if component.part in WRITING_PARTS else len(layout.shape(component)) - 1


Beside = Callable[[Component], Mapping[str, object]]
"""Further columns of a piece, such as its label in a study."""


def chosen(
    selection: Selection,
    layout: Layout,
    *,
    base: str = "",
    tuned: str = "",
    beside: Beside | None = None,
) -> dict[Component, Kept]:
    """What ``selection`` keeps of each component; components it keeps nothing of are left out.

    Args:
        selection: The selection.
        layout: The model's components.
        base: What the column ``base`` holds.
        tuned: What the column ``tuned`` holds.
        beside: What columns that are not the key's hold.

    Raises:
        SelectionError: It selects nothing, names a site that the model lacks, or names kinds
            that overlap.
    """
    rows = _Rows(layout, selection.columns, {"base": base, "tuned": tuned}, beside)
    kinds = _checked_kinds(selection, rows)
    found: dict[Component, Kept] = {}
    for component in layout.components():
        kept = _kept(selection, rows, component, kinds)
        if kept is not None:
            found[component] = kept
    if not found:
        raise SelectionError(
            f"the selection {selection.text!r} selects nothing of this model.",
            hint="Columns and values are those of the tables, such as L3H7.W_O.",
        )
    return found


def pieces(
    selection: Selection,
    layout: Layout,
    *,
    base: str = "",
    tuned: str = "",
    beside: Beside | None = None,
) -> Iterator[Component]:
    """The pieces that ``selection`` accepts, in model order; arguments and errors of ``chosen``.

    Of a list, whose names overlap, these are a component and each of its slices that is named.
    """
    rows = _Rows(layout, selection.columns, {"base": base, "tuned": tuned}, beside)
    kinds = _checked_kinds(selection, rows)
    for component in layout.components():
        finer = _finer(selection, layout, component, kinds)
        whole = [component] if selection.tree is None or not finer else []
        for piece in (*whole, *(p for cut in finer for p in _pieces(component, cut))):
            if selection.accepts(rows.of(piece)):
                yield piece


def _checked_kinds(selection: Selection, rows: "_Rows") -> frozenset[Kind]:
    """The kinds that a selection speaks of; what it names must be there."""
    layout = rows.layout
    _refuse_unknown(selection.names, sites(layout) if selection.names else ())
    parts = [str(part) for part in selection.literals("part") if part is not None]
    _refuse_unknown(parts, [*dict.fromkeys(str(c.part) for c in layout.components())])
    return _kinds_named(selection, rows)


def _finer(
    selection: Selection, layout: Layout, component: Component, kinds: frozenset[Kind]
) -> list[Cut]:
    """The ways in which a selection sees a component cut: a list in all of them."""
    a_list = selection.tree is None
    return [cut for cut in cuts(layout, component) if a_list or cut.kind in kinds]


def sites(layout: Layout) -> dict[str, set[Kind]]:
    """Every site and every component by the name that tables print, with its kinds."""
    rows, found = _Rows(layout, frozenset({"site", "component"}), {}), {}
    for component in layout.components():
        finer = (p for cut in cuts(layout, component) for p in _pieces(component, cut))
        for piece in (component, *finer):
            row = rows.of(piece)
            for name in (str(row["site"]), str(row["component"])):
                found.setdefault(name, set()).add(piece.kind)
    return found


@dataclass(frozen=True)
class _Rows:
    """The key's row of a component, of the columns that are asked for."""

    layout: Layout
    columns: frozenset[str]
    constants: Mapping[str, str]
    beside: Beside | None = None

    def of(self, component: Component) -> dict[str, object]:
        """The values by column."""
        row: dict[str, object] = {
            "kind": component.kind,
            "layer": component.layer,
            "index": component.index,
            "kv_index": self._kv_index(component),
            "expert": None,
            "rank": None,
            "part": component.part,
            "tied": self.layout.tied and component.part == "W_E",
            **self.constants,
        }
        if "site" in self.columns:
            row["site"] = component.site
        if "component" in self.columns:
            row["component"] = str(component)
        if self.beside is not None:
            row.update(self.beside(component))
        return row

    def _kv_index(self, component: Component) -> int | None:
        if component.kind == "head" and component.index is not None:
            return component.index // (self.layout.n_heads // self.layout.n_kv_heads)
        return component.index if component.kind == "kv_head" else None


def _pieces(component: Component, cut: Cut) -> Iterator[Component]:
    for index in range(cut.count):
        yield Component(cut.kind, component.layer, index, component.part)


def _refuse_unknown(names: Iterable[str], known: Collection[str]) -> None:
    if unknown := [name for name in names if name not in known]:
        raise SelectionError(
            f"this model has no {unknown[0]!r}; it has for example {', '.join([*known][:3])} and "
            f"{len(known) - 3} others.",
            hint="A list names sites such as L3H7,L5N120; an expression compares columns.",
        )


def _kinds_named(selection: Selection, rows: _Rows) -> frozenset[Kind]:
    """The kinds that an expression speaks of, by name or by what only they have.

    Raises:
        SelectionError: ``index`` without a kind, or two kinds that share a parameter.
    """
    named = set(selection.literals("kind"))
    texts = {*selection.literals("site"), *selection.literals("component")} - {None}
    if texts:
        known = sites(rows.layout)
        _refuse_unknown(map(str, texts), known)
        named |= {kind for text in texts for kind in known[str(text)]}
    if "kv_index" in selection.columns and not named & {*FINE_KINDS}:
        named |= {"head", "kv_head"}
    if "index" in selection.columns and not named & {*FINE_KINDS}:
        raise SelectionError(
            f"the selection {selection.text!r} uses index, which heads, kv heads, kv groups and "
            "neurons each count anew.",
            hint='Name the kind too, such as kind == "head" and index == 7.',
        )
    kinds: frozenset[Kind] = frozenset(kind for kind in CUT_KINDS if kind in named)
    if selection.tree is not None:
        _refuse_overlap(selection, rows.layout, kinds)
    return kinds


def _refuse_overlap(selection: Selection, layout: Layout, kinds: frozenset[Kind]) -> None:
    for component in layout.components():
        over = [c.kind for c in cuts(layout, component) if c.kind in kinds]
        if component.kind in kinds and over:
            over.append(component.kind)
        if len(over) > 1:
            raise SelectionError(
                f"the selection {selection.text!r} names the kinds {' and '.join(over)}, which "
                f"share {component}.",
                hint="Select by one of them, or give a list of sites, which is their union.",
            )


def _kept(
    selection: Selection, rows: _Rows, component: Component, kinds: frozenset[Kind]
) -> Kept | None:
    """A list keeps the union over all kinds; an expression looks at its one set of pieces."""
    a_list = selection.tree is None
    finer = _finer(selection, rows.layout, component, kinds)
    if (a_list or not finer) and selection.accepts(rows.of(component)):
        return WHOLE
    if not finer:
        return None
    axis = cut_axis(rows.layout, component)
    entries = torch.zeros(rows.layout.shape(component)[axis], dtype=torch.bool)
    for cut in finer:
        for index, piece in enumerate(_pieces(component, cut)):
            if selection.accepts(rows.of(piece)):
                entries[index * cut.width : (index + 1) * cut.width] = True
    if bool(entries.all()):
        return WHOLE
    return Kept(axis, entries) if bool(entries.any()) else None
