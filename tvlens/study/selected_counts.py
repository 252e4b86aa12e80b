"""How many components of each group a selection takes, from shapes alone."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from tvlens.attribution.nodes import NODES
from tvlens.attribution.sampling import Group
from tvlens.attribution.series import group_of
from tvlens.components import Component, Kind, key_columns
from tvlens.selection import Selection
from tvlens.weights.layout import Layout
from tvlens.weights.matching import Pair

SINGLE = ("component", "site", "index", "kv_index")
"""Columns that tell components of one kind, layer and part apart."""


class Pieces(NamedTuple):
    """Components of one kind, layer and part, numbered from 0 where the kind is numbered."""

    kind: Kind
    layer: int | None
    part: str | None
    count: int | None = None

    @property
    def size(self) -> int:
        """How many they are."""
        return 1 if self.count is None else self.count

    def components(self, most: int) -> list[Component]:
        """The first of them, ``most`` at most."""
        numbers = [None] if self.count is None else range(min(most, self.count))
        return [Component(self.kind, self.layer, index, self.part) for index in numbers]


def weight_pieces(pair: Pair) -> list[Pieces]:
    """All that is scored in weight space; a tied W_U is one of its own."""
    layout = pair.layout
    found = [Pieces(c.kind, c.layer, c.part) for c in pair.components]
    found += [Pieces("embedding", None, "W_U")] * layout.tied
    fine: list[tuple[Kind, int]] = [
        ("head", layout.n_heads),
        ("kv_head", layout.n_kv_heads),
        ("neuron", layout.d_mlp),
    ]
    for layer in range(layout.n_layers):
        found += [Pieces(kind, layer, None, count) for kind, count in fine]
    return found


def activation_pieces(layout: Layout, parts: Sequence[str]) -> list[Pieces]:
    """All that is scored of some activations."""
    counts = {"head": layout.n_heads, "kv_head": layout.n_kv_heads, "neuron": layout.d_mlp}
    return [
        Pieces(cut.kind, layer, cut.part, counts.get(cut.kind))
        for cut, _ in (NODES[part] for part in parts)
        for layer in (range(layout.n_layers) if cut.layered else [None])
    ]


def selected_counts(pieces: Iterable[Pieces], only: Selection, pair: Pair) -> Counter[Group]:
    """How many components of each group are selected.

    A 70B has millions of neurons: they are looked at one by one only where the selection tells
    them apart.
    """
    apart = not only.columns.isdisjoint(SINGLE)
    heads_per_kv = pair.layout.n_heads // max(1, pair.layout.n_kv_heads)
    found: Counter[Group] = Counter()
    for piece in pieces:
        components = piece.components(piece.size if apart else 1)
        rows = _rows(components, pair, heads_per_kv)
        accepted = sum(map(only.accepts, rows))
        found[group_of(components[0])] += accepted if apart else accepted * piece.size
    return found


def _rows(
    components: list[Component], pair: Pair, heads_per_kv: int
) -> Iterable[dict[str, object]]:
    kv_heads = {"head": lambda index: index // heads_per_kv, "kv_head": lambda index: index}
    kv_index = [kv_heads.get(c.kind, lambda index: None)(c.index) for c in components]
    columns = key_columns(components, kv_index=kv_index)
    same = {"base": pair.base_name, "tuned": pair.tuned_name}
    for row in zip(*columns.values(), strict=True):
        named = dict(zip(columns, row, strict=True))
        tied = pair.layout.tied and named["part"] in ("W_E", "W_U")
        yield {**named, **same, "tied": tied}
