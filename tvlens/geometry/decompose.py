"""The table ``weights``: the measures of every component of a pair, block by block.

Rows: every matrix, norm, bias and embedding (disjoint); every query head (W_Q, W_O, OV, QK), kv
head (W_K, W_V) and neuron (W_gate, W_in, W_out), which are finer cuts of the same matrices.

The new side of e_* is named by what it touches. On a matrix that reads the residual stream (W_Q,
W_K, W_V, W_gate, W_in) a new write lives in head or neuron coordinates, so it counts as
``e_reroute`` and ``e_new_write`` is null; on one that writes it (W_O, W_out) a new read does, and
``e_new_read`` is null. OV has both. Both sides of QK read: ``e_new_read`` holds both, its
``g_read`` is the query side, its ``g_write`` the key side. OV and QK have k = d_head, their full
rank, and ``e_new_both`` is null there: a product of small changes has none to first order. The
e_* that are not null sum to 1. Where a family normalises queries and keys before they meet there
is no QK row: W_Q W_K' is not the form that its attention computes. Embeddings go through their
d_model Gram: spectra and the alignment of the d_model side only. A part whose orientation is
unknown (a family without a table) has no measure of one side: g_*, k_*, e_reroute, e_new_read and
e_new_write are null, and the rest of the e_* is what they would hold.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import pyarrow as pa
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from tvlens.components import KNOWN_PARTS, READING_PARTS, WRITING_PARTS, Component, key_columns
from tvlens.memory import release_freed
from tvlens.tables import Table, concatenated, keyed_schema
from tvlens.threads import one_thread

from .heads import CircuitCores, Factor, circuit_cores, kv_index_of_heads, slices_of_heads
from .matrices import (
    K_FRACTION,
    Basis,
    EnergySplit,
    effective_rank,
    energy_split,
    row_space,
    side_alignment,
    singular_energies,
    spectral_basis,
    stable_rank,
    transposed,
)
from .neurons import rows_of_neurons, vector_measures

BASIC_COLUMNS = (
    "base_norm",
    "delta_norm",
    "relative_delta",
    "cos_base_tuned",
    "gain",
    "residual",
    "kappa",
    "snr",
    "floor_norm",
    "equal_fraction",
)
SPLIT_COLUMNS = (
    "e_global",
    "e_scale",
    "e_within",
    "e_reroute",
    "e_new_read",
    "e_new_write",
    "e_new_both",
)
SPECTRAL_COLUMNS = (
    "g_write",
    "g_read",
    "effective_rank_delta",
    "effective_rank_base",
    "stable_rank_delta",
    "stable_rank_base",
)
WEIGHTS_SCHEMA = keyed_schema(
    *((name, pa.float64()) for name in BASIC_COLUMNS),
    ("base_dtype", pa.string()),
    ("tuned_dtype", pa.string()),
    *((name, pa.float64()) for name in SPLIT_COLUMNS),
    ("k_read", pa.int32()),
    ("k_write", pa.int32()),
    *((name, pa.float64()) for name in SPECTRAL_COLUMNS),
    ("intruders", pa.int32()),
    ("g_self_write", pa.float64()),
    ("g_self_read", pa.float64()),
)
SIDED_COLUMNS = (
    *("e_reroute", "e_new_read", "e_new_write", "k_read", "k_write"),
    *("g_write", "g_read", "g_self_write", "g_self_read"),
)
"""Columns that mean nothing where it is unknown which side of a matrix is its input."""
KV_PARTS = ("W_K", "W_V")
HEAD_PARTS = ("W_Q", "W_K", "W_V", "W_O")
NEURON_PARTS = ("W_gate", "W_in", "W_out")

Progress = Callable[[int, int], None]
"""Called as ``progress(blocks done, blocks in all)``."""
Columns = dict[str, Sequence[object] | Tensor]


@runtime_checkable
class Weight(Protocol):
    """What geometry reads of one component: float32 tensors in the orientation x @ W."""

    @property
    def base(self) -> Tensor:
        """Base weights."""
        ...

    @property
    def floor(self) -> Tensor | None:
        """Expected rounding energy per entry, None for adapters."""
        ...

    @property
    def equal_fraction(self) -> float:
        """Share of entries that are the same number in both checkpoints."""
        ...

    @property
    def base_dtype(self) -> object:
        """Stored dtype of the base."""
        ...

    @property
    def tuned_dtype(self) -> object:
        """Stored dtype of the tuned model."""
        ...

    @property
    def tied(self) -> bool:
        """Whether the tensor is shared with another component."""
        ...

    def dense_delta(self) -> Tensor:
        """The tuning vector as a dense tensor."""
        ...


@runtime_checkable
class Layout(Protocol):
    """What no tensor's shape tells about the attention."""

    @property
    def n_heads(self) -> int:
        """Query heads in a layer."""
        ...

    @property
    def n_kv_heads(self) -> int:
        """Key and value heads in a layer."""
        ...

    @property
    def qk_norm(self) -> str:
        """What queries and keys are normalised over, empty where they are not."""
        ...


@runtime_checkable
class Pair(Protocol):
    """What geometry needs of a pair of checkpoints; ``weights.pair`` has the real one."""

    @property
    def base_name(self) -> str:
        """Name of the base in tables."""
        ...

    @property
    def tuned_name(self) -> str:
        """Name of the tuned model in tables."""
        ...

    @property
    def layout(self) -> Layout:
        """Numbers of the model."""
        ...

    def blocks(self) -> list[list[Component]]:
        """The disjoint components, one list a layer and one for what has no layer."""
        ...

    def read(self, component: Component) -> Weight:
        """Base weights and tuning vector of one component."""
        ...


@dataclass(frozen=True, eq=False)
class Slice:
    """A component's weight as tensors, read once.

    Attributes:
        base: Base weights.
        delta: Tuning vector.
        floor: Expected rounding energy per entry, None for adapters.
        equal_fraction: Share of entries that are the same number in both checkpoints.
        dtypes: Stored dtypes of base and tuned.
        tied: Whether the tensor is shared with another component.
    """

    base: Float[Tensor, "..."]
    delta: Float[Tensor, "..."]
    floor: Float[Tensor, "..."] | None
    equal_fraction: float
    dtypes: tuple[str, str]
    tied: bool


def read_slice(pair: Pair, component: Component) -> Slice:
    """The weight of a component with its tuning vector dense."""
    weight = pair.read(component)
    dtypes = (str(weight.base_dtype), str(weight.tuned_dtype))
    return Slice(
        base=weight.base,
        delta=weight.dense_delta(),
        floor=weight.floor,
        equal_fraction=weight.equal_fraction,
        dtypes=(dtypes[0].removeprefix("torch."), dtypes[1].removeprefix("torch.")),
        tied=bool(weight.tied),
    )


def factor_of_heads(weight: Slice, part: str, n_heads: int) -> Factor:
    """A matrix of an attention layer, one slice a head."""
    floor = None if weight.floor is None else slices_of_heads(weight.floor, part, n_heads)
    base, delta = (slices_of_heads(w, part, n_heads) for w in (weight.base, weight.delta))
    return Factor(base, delta, floor)


def read_block(pair: Pair, block: Sequence[Component]) -> dict[Component, Slice]:
    """All weights of a block."""
    return {component: read_slice(pair, component) for component in block}


def matrices_by_part(weights: Mapping[Component, Slice]) -> dict[str, Slice]:
    """The matrices of a block by their part."""
    return {c.part or "": weight for c, weight in weights.items() if c.kind == "matrix"}


def _vector_columns(
    base: Float[Tensor, "component entry"],
    delta: Float[Tensor, "component entry"],
    floor_energy: Float[Tensor, " component"] | None,
) -> Columns:
    return {**vector_measures(base, delta, floor_energy).columns()}


def _own_columns(weight: Slice, rows: Callable[[Tensor], Tensor]) -> Columns:
    """Basic measures of the pieces that ``rows`` cuts a weight into, one piece a row."""
    floor = None if weight.floor is None else rows(weight.floor).double().sum(1)
    delta = rows(weight.delta)
    columns = _vector_columns(rows(weight.base), delta, floor)
    return {**columns, "equal_fraction": (delta == 0).double().mean(1)}


def named_split(split: EnergySplit, part: str) -> Columns:
    """The parts of an energy split by their column names (module docstring)."""
    columns: Columns = {"e_global": split.whole, "e_scale": split.scale, "e_within": split.existing}
    if part == "OV":
        return {**columns, "e_new_read": split.new_read, "e_new_write": split.new_write}
    if part == "QK":
        return {**columns, "e_new_read": split.new_read + split.new_write}
    columns["e_new_both"] = split.new_both
    if part in WRITING_PARTS:
        return {**columns, "e_reroute": split.new_read, "e_new_write": split.new_write}
    return {**columns, "e_reroute": split.new_write, "e_new_read": split.new_read}


def _spectral_columns(
    basis: Basis, delta: Float[Tensor, "component a b"], *, d_read: int, d_write: int
) -> Columns:
    sides = side_alignment(basis, delta, d_read=d_read, d_write=d_write)
    base_energies, delta_energies = basis.values.square(), singular_energies(delta)
    return {
        "g_read": sides.g_read,
        "g_write": sides.g_write,
        "g_self_read": sides.g_self_read,
        "g_self_write": sides.g_self_write,
        "effective_rank_delta": effective_rank(delta_energies),
        "effective_rank_base": effective_rank(base_energies),
        "stable_rank_delta": stable_rank(delta_energies),
        "stable_rank_base": stable_rank(base_energies),
    }


def _matrix_columns(
    base: Float[Tensor, "component d_in d_out"],
    delta: Float[Tensor, "component d_in d_out"],
    part: str,
) -> Columns:
    """Spectral measures of whole matrices or of one factor of each head."""
    basis = spectral_basis(base)
    d_in, d_out = base.shape[1:]
    rank = int(basis.rank.amin())
    k_read, k_write = (max(1, min(int(K_FRACTION * d), rank)) for d in (d_in, d_out))
    split = energy_split(basis, delta, k_read=k_read, k_write=k_write)
    count = base.shape[0]
    columns = _spectral_columns(basis, delta, d_read=d_in, d_write=d_out)
    ks: Columns = {"k_read": [k_read] * count, "k_write": [k_write] * count}
    return {**columns, **named_split(split, part), **ks}


def _circuit_columns(cores: CircuitCores, part: str, *, d_model: int, d_head: int) -> Columns:
    """All measures of OV or QK from their cores."""
    flat = [rearrange(core, "head a b -> head (a b)") for core in (cores.base, cores.delta)]
    columns = _vector_columns(flat[0], flat[1], cores.floor_energy)
    basis = spectral_basis(cores.base)
    columns |= _spectral_columns(basis, cores.delta, d_read=d_model, d_write=d_model)
    if d_head >= d_model:  # every direction exists already: nothing can be new
        return columns
    split = energy_split(basis, cores.delta, k_read=d_head, k_write=d_head)
    ks = [d_head] * cores.base.shape[0]
    return {**columns, **named_split(split, part), "k_read": ks, "k_write": ks}


def _as_list(values: Sequence[object] | Tensor) -> Sequence[object]:
    return values.tolist() if isinstance(values, Tensor) else values


@dataclass(frozen=True, eq=False)
class _Writer:
    """Turns measures into rows of the weights table of one pair."""

    base: str
    tuned: str

    def table(
        self,
        components: list[Component],
        columns: Columns,
        *,
        weight: Slice | None = None,
        kv_index: list[int] | None = None,
    ) -> Table:
        """Rows of components that were all cut from ``weight`` (None: from several)."""
        count = len(components)
        both = {"base": [self.base] * count, "tuned": [self.tuned] * count}
        tied = weight is not None and weight.tied
        values = {name: _as_list(column) for name, column in columns.items()}
        if weight is not None:
            values["base_dtype"] = [weight.dtypes[0]] * count
            values["tuned_dtype"] = [weight.dtypes[1]] * count
        keys = key_columns(components, kv_index=None if kv_index is None else [*kv_index])
        everything = {**keys, **both, "tied": [tied] * count, **values}
        return Table.of("weights", WEIGHTS_SCHEMA, everything, order="relative_delta")


def _embedding_columns(weight: Slice, part: str) -> Columns:
    base, delta = weight.base, weight.delta
    if part == "W_U":
        base, delta = transposed(base), transposed(delta)
    side = "read" if part in READING_PARTS else "write"
    space = row_space(base, delta)
    return {
        f"g_{side}": [float(space.g)],
        f"g_self_{side}": [float(space.g_self)],
        "effective_rank_delta": [float(effective_rank(space.delta_energies))],
        "effective_rank_base": [float(effective_rank(space.base_energies))],
        "stable_rank_delta": [float(stable_rank(space.delta_energies))],
        "stable_rank_base": [float(stable_rank(space.base_energies))],
    }


def _flat(tensor: Float[Tensor, "..."]) -> Float[Tensor, "1 entry"]:
    return rearrange(tensor.flatten(), "entry -> 1 entry")


def _whole_table(writer: _Writer, component: Component, weight: Slice) -> Table:
    """The row of one disjoint component."""
    columns = {**_own_columns(weight, _flat), "equal_fraction": [weight.equal_fraction]}
    part = component.part or ""
    if component.kind == "matrix":
        batch = [rearrange(w, "d_in d_out -> 1 d_in d_out") for w in (weight.base, weight.delta)]
        columns |= _matrix_columns(batch[0], batch[1], part)
    elif component.kind == "embedding":
        columns |= _embedding_columns(weight, part)
    if part not in KNOWN_PARTS:
        columns = {name: values for name, values in columns.items() if name not in SIDED_COLUMNS}
    return writer.table([component], columns, weight=weight)


def _factor_table(
    writer: _Writer, layer: int | None, part: str, weight: Slice, kv_index: Int[Tensor, " head"]
) -> Table:
    """Rows of the slices of one attention matrix."""
    n_heads = int(kv_index.max()) + 1 if part in KV_PARTS else len(kv_index)
    factor = factor_of_heads(weight, part, n_heads)

    def rows(matrix: Float[Tensor, "d_in d_out"]) -> Float[Tensor, "head entry"]:
        return rearrange(slices_of_heads(matrix, part, n_heads), "head a b -> head (a b)")

    columns = _own_columns(weight, rows) | _matrix_columns(factor.base, factor.delta, part)
    kind = "kv_head" if part in KV_PARTS else "head"
    components = [Component(kind, layer, head, part) for head in range(n_heads)]
    own_kv = list(range(n_heads)) if part in KV_PARTS else kv_index.tolist()
    return writer.table(components, columns, weight=weight, kv_index=own_kv)


def factors_of_circuit(
    parts: Mapping[str, Slice], circuit: str, kv_index: Int[Tensor, " head"]
) -> tuple[Factor, Factor]:
    """Left and right factor of OV or QK, one slice a query head."""
    n_heads, n_kv_heads = len(kv_index), int(kv_index.max()) + 1
    if circuit == "OV":
        value = factor_of_heads(parts["W_V"], "W_V", n_kv_heads).of_heads(kv_index)
        return value, factor_of_heads(parts["W_O"], "W_O", n_heads)
    key = factor_of_heads(parts["W_K"], "W_K", n_kv_heads).of_heads(kv_index)
    return factor_of_heads(parts["W_Q"], "W_Q", n_heads), key.swapped


def _circuit_table(
    writer: _Writer,
    layer: int | None,
    circuit: str,
    parts: Mapping[str, Slice],
    kv_index: Int[Tensor, " head"],
) -> Table:
    left, right = factors_of_circuit(parts, circuit, kv_index)
    d_model, d_head = left.base.shape[1:]
    cores = circuit_cores(left, right)
    columns = _circuit_columns(cores, circuit, d_model=d_model, d_head=d_head)
    components = [Component("head", layer, head, circuit) for head in range(len(kv_index))]
    return writer.table(components, columns, kv_index=kv_index.tolist())


def _neuron_table(writer: _Writer, layer: int | None, part: str, weight: Slice) -> Table:
    def rows(matrix: Float[Tensor, "d_in d_out"]) -> Float[Tensor, "neuron d_model"]:
        return rows_of_neurons(matrix, part)

    columns = _own_columns(weight, rows)
    components = [Component("neuron", layer, i, part) for i in range(len(rows(weight.base)))]
    return writer.table(components, columns, weight=weight)


def layer_of_block(weights: Mapping[Component, Slice]) -> int | None:
    """The layer that a block's matrices belong to, None for embeddings and the final norm."""
    return next((c.layer for c in weights if c.kind == "matrix"), None)


def kv_index_of(pair: Pair) -> Int[Tensor, " head"]:
    """The kv head that each query head of a pair reads."""
    return kv_index_of_heads(pair.layout.n_heads, pair.layout.n_kv_heads)


def circuits_of(layout: Layout) -> dict[str, tuple[str, str]]:
    """The circuits of a model's heads and the factors each needs (module docstring)."""
    bilinear = {} if layout.qk_norm else {"QK": ("W_Q", "W_K")}
    return {"OV": ("W_V", "W_O"), **bilinear}


def weights_of_block(pair: Pair, block: Sequence[Component]) -> Table:
    """The rows of one block: its disjoint components, then heads, then neurons."""
    writer = _Writer(pair.base_name, pair.tuned_name)
    weights = read_block(pair, block)
    parts, layer, kv_index = matrices_by_part(weights), layer_of_block(weights), kv_index_of(pair)
    tables = [_whole_table(writer, component, weight) for component, weight in weights.items()]
    for part in HEAD_PARTS:
        if part in parts:
            tables.append(_factor_table(writer, layer, part, parts[part], kv_index))
    for circuit, needed in circuits_of(pair.layout).items():
        if all(part in parts for part in needed):
            tables.append(_circuit_table(writer, layer, circuit, parts, kv_index))
    for part in NEURON_PARTS:
        if part in parts:
            tables.append(_neuron_table(writer, layer, part, parts[part]))
    return concatenated("weights", tables, order="relative_delta")


@one_thread()
def decompose(pair: Pair, progress: Progress | None = None) -> Table:
    """The table ``weights`` of a pair; memory is one block, however large the checkpoint is."""
    blocks = [block for block in pair.blocks() if block]
    tables: list[Table] = []
    for done, block in enumerate(blocks, start=1):
        tables.append(weights_of_block(pair, block))
        release_freed()
        if progress is not None:
            progress(done, len(blocks))
    return concatenated("weights", tables, order="relative_delta")
