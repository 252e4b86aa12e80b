"""The key that every table shares: which part of a model a row is about.

A component is a *kind* with numbers: ``Component("head", 3, 7, "W_O")`` is the output matrix of
query head 7 in layer 3 and prints as ``L3H7.W_O``. Labels are for people; no code parses one.

Kinds: ``head`` (query heads: W_Q, W_O), ``kv_head`` (W_K, W_V), ``kv_group`` (a kv head with its
query heads), ``neuron``, ``matrix``, ``norm``, ``bias``, ``embedding``, ``node`` (an activation
that is neither a head nor a neuron), ``direction``, ``edge``. Rows of matrix, norm, bias and
embedding cut the parameters into disjoint pieces; heads, kv heads and neurons are finer cuts of
the same matrices and must never be added to them.
"""

from typing import Literal, NamedTuple, get_args

Kind = Literal[
    "head",
    "kv_head",
    "kv_group",
    "neuron",
    "matrix",
    "norm",
    "bias",
    "embedding",
    "node",
    "direction",
    "edge",
]
Side = Literal["read", "write"]
"""A side of a matrix: its input or its output."""
KINDS: tuple[str, ...] = get_args(Kind)
DISJOINT_KINDS: tuple[str, ...] = ("matrix", "norm", "bias", "embedding")

ATTENTION_PARTS = ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O", "OV", "QK")
MLP_PARTS = ("W_gate", "W_in", "W_out", "b_gate", "b_in", "b_out")
READING_PARTS = ("W_Q", "W_K", "W_V", "W_gate", "W_in", "W_U", "QK")
WRITING_PARTS = ("W_O", "W_out", "W_E", "OV")
KNOWN_PARTS = frozenset((*ATTENTION_PARTS, *MLP_PARTS, "W_E", "W_U", "W_pos"))
"""Parts whose orientation is that of the key; a family without a table must use other words."""
_LETTER = {"head": "H", "kv_head": "K", "kv_group": "G", "neuron": "N"}


class Component(NamedTuple):
    """One part of a model.

    Attributes:
        kind: One of ``KINDS``.
        layer: Block number, None for embeddings and the final norm.
        index: Head, kv head or neuron number; None where the kind has none.
        part: ``W_Q`` ... ``W_U`` for weights, the activation's name for nodes, a norm's
            ``ln1.w``, both ends of an edge (``L3H7.result->L5.mlp_in``, with the layer of the
            second), None for the whole site, or the tensor's own name in a family without a
            table.
    """

    kind: Kind
    layer: int | None = None
    index: int | None = None
    part: str | None = None

    @property
    def site(self) -> str:
        """The thing the part belongs to (``L3H7``, ``L3.mlp``): weights join attribution here."""
        if self.kind == "edge":
            return self.part or ""
        where = "" if self.layer is None else f"L{self.layer}"
        if self.kind in _LETTER:
            return f"{where}{_LETTER[self.kind]}{self.index}"
        owner = _owner(self)
        return f"{where}.{owner}" if where and owner else where or owner

    def __str__(self) -> str:
        """The label for people, such as ``L3H7.W_O`` or ``L3.ln2.w``."""
        if self.part is None:
            return self.site
        if self.kind == "edge":
            return self.part
        if self.kind in _LETTER or (self.kind == "embedding" and self.site != self.part):
            return f"{self.site}.{self.part}"
        return self.part if self.layer is None else f"L{self.layer}.{self.part}"


def _owner(component: Component) -> str:
    part = component.part or ""
    if component.kind == "embedding":
        owners = {"W_E": "embed", "W_U": "unembed", "W_pos": "pos_embed"}
        return owners.get(part, part or "embed")
    if component.kind == "norm" or part.startswith("ln"):
        return part.rpartition(".")[0] or part
    if part in (*ATTENTION_PARTS, "attn_out"):
        return "attn"
    return "mlp" if part in (*MLP_PARTS, "mlp_out") else part


KEY_COLUMNS = ("component", "site", "kind", "layer", "index", "kv_index", "expert", "rank", "part")
"""The columns every component table starts with; ``base``, ``tuned``, ``tied`` follow."""


def key_columns(
    components: list[Component], *, kv_index: list[int | None] | None = None
) -> dict[str, list[object]]:
    """The key columns of ``components``, in order, ready for a table."""
    count = len(components)
    return {
        "component": [str(c) for c in components],
        "site": [c.site for c in components],
        "kind": [c.kind for c in components],
        "layer": [c.layer for c in components],
        "index": [c.index for c in components],
        "kv_index": list(kv_index) if kv_index is not None else [None] * count,
        "expert": [None] * count,
        "rank": [None] * count,
        "part": [c.part for c in components],
    }


class Pieces(NamedTuple):
    """Consecutively numbered heads, kv heads or neurons of one part of a layer.

    Attributes:
        kind: ``head``, ``kv_head`` or ``neuron``.
        layer: Block number.
        part: ``W_O``, ``OV``, ...
        count: How many, numbered from 0.
    """

    kind: Kind
    layer: int | None
    part: str
    count: int


def columns_of_pieces(
    pieces: Pieces, *, kv_index: list[int] | None = None
) -> dict[str, list[object]]:
    """The key columns of ``pieces``: what ``key_columns`` gives, without a component each."""
    kind, layer, part, count = pieces
    stem = f"{'' if layer is None else f'L{layer}'}{_LETTER[kind]}"
    constants = {"kind": kind, "layer": layer, "expert": None, "rank": None, "part": part}
    columns: dict[str, list[object]] = {
        "component": [f"{stem}{index}.{part}" for index in range(count)],
        "site": [f"{stem}{index}" for index in range(count)],
        "index": list(range(count)),
        "kv_index": list(kv_index) if kv_index is not None else [None] * count,
        **{name: [value] * count for name, value in constants.items()},
    }
    return {name: columns[name] for name in KEY_COLUMNS}
