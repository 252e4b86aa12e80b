"""The columns of the table ``weights``: the measures of a component as rows of a table."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, Literal

import pyarrow as pa
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from tvlens.components import (
    READING_PARTS,
    WRITING_PARTS,
)
from tvlens.tables import Table, keyed_schema

from .changes import Change, Factored, cross, energies_of_gram, gram, transposed, turned
from .heads import CircuitCores
from .matrices import (
    Basis,
    EnergySplit,
    Products,
    Seen,
    amplification,
    delta_energies,
    effective_rank,
    energy_split,
    kept_directions,
    row_space,
    side_alignment,
    spectral_basis,
    stable_rank,
)
from .neurons import Sums, joined_sums, sums_of_rows, vector_measures
from .nulls import Signs
from .reading import Slice, Weight, slice_of
from .spikes import flipped_gram

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
    ("amplification", pa.float64()),
)
SIDED_COLUMNS = (
    *("e_reroute", "e_new_read", "e_new_write", "k_read", "k_write"),
    *("g_write", "g_read", "g_self_write", "g_self_read"),
)
"""Columns that mean nothing where it is unknown which side of a matrix is its input."""
KV_PARTS = ("W_K", "W_V")
HEAD_PARTS = ("W_Q", "W_K", "W_V", "W_O")
NEURON_PARTS = ("W_gate", "W_in", "W_out")

Spectra = Literal["both", "delta", "none"]
"""Whose singular values are taken: of base and tuning vector, which places the one in the other;
of the tuning vector alone; of neither."""
Columns = dict[str, Any]
"""Lists or tensors, one value a component."""


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


def pieces_of(weight: Slice, part: str) -> Sums:
    """The sums of a weight at its finest cut: neurons, single columns of heads, rows."""
    base, change, floor = weight.base, weight.change, weight.floor
    if base.dim() != 2 and not isinstance(change, Factored):
        return sums_of_rows(_flat(base), _flat(change), None if floor is None else _flat(floor))
    if part in (*NEURON_PARTS, *HEAD_PARTS) and part not in WRITING_PARTS:
        floor = None if floor is None else transposed(floor)
        return sums_of_rows(transposed(base), turned(change), floor)
    return sums_of_rows(base, change, floor)


def _flat(tensor: Float[Tensor, "..."]) -> Float[Tensor, "1 entry"]:
    return rearrange(tensor.flatten(), "entry -> 1 entry")


def spectral_columns(
    delta: Change, products: Products | None = None, *, basis: Basis | None = None
) -> Columns:
    """The ranks of a tuning vector and, where it is known, of its base."""
    columns = ranks("delta", delta_energies(delta, products))
    return columns if basis is None else columns | ranks("base", basis.values.square())


def placed_columns(basis: Basis, found: Seen, part: str, *, shape: tuple[int, int]) -> Columns:
    """Where a tuning vector lies in its base; ``shape`` is that of the whole matrix."""
    sides = side_alignment(basis, found, d_read=shape[0], d_write=shape[1])
    k_read, k_write = kept_directions(basis, shape)
    split = energy_split(basis, found, k_read=k_read, k_write=k_write)
    count = basis.values.shape[:-1].numel()
    ks: Columns = {"k_read": [k_read] * count, "k_write": [k_write] * count}
    own: Columns = {"amplification": amplification(basis, found)}
    return {**vars(sides), **named_split(split, part), **ks, **own}


def circuit_columns(cores: CircuitCores, part: str, *, d_model: int, d_head: int) -> Columns:
    """All measures of OV or QK from their cores."""
    flat = [rearrange(core, "head a b -> head (a b)") for core in (cores.base, cores.delta)]
    columns: Columns = {**vector_measures(flat[0], flat[1], cores.floor_energy).columns()}
    corner = min(d_head, *cores.base.shape[1:])  # the base comes first in its spans
    basis = spectral_basis(cores.base[:, :corner, :corner])
    columns |= spectral_columns(cores.delta, basis=basis)
    found = _seen_in_corner(basis, cores.delta)
    columns |= vars(side_alignment(basis, found, d_read=d_model, d_write=d_model))
    columns["amplification"] = amplification(basis, found)
    if d_head >= d_model:  # every direction exists already: nothing can be new
        return columns
    split = energy_split(basis, found, k_read=d_head, k_write=d_head)
    ks = [d_head] * cores.base.shape[0]
    return {**columns, **named_split(split, part), "k_read": ks, "k_write": ks}


def _seen_in_corner(basis: Basis, core: Float[Tensor, "head left right"]) -> Seen:
    """A change of which the base's own spans hold only the first rows and columns."""
    size = basis.values.shape[-1]
    from_read = transposed(basis.read) @ core[:, :size]
    onto_write = core[:, :, :size] @ basis.write
    energies = from_read.square().sum(2), onto_write.square().sum(1), core.square().sum((1, 2))
    return Seen(from_read[:, :, :size], basis.write, *energies)


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """An embedding, measured a few tokens at a time.

    Attributes:
        columns: Its measures.
        weight: Its first piece, which knows the dtypes.
        sums: Those of every token.
        grams: Of the change and the base; for evidence also of the two, and of the change with
            other signs.
    """

    columns: Columns
    weight: Slice
    sums: Sums
    grams: Sequence[Float[Tensor, "d_model d_model"]]


@dataclass(frozen=True)
class Tokens:
    """What is to be measured of an embedding, a few tokens at a time.

    Attributes:
        slabs: Its pieces.
        spectra: Whose singular values.
        seed: Seed of the draw of signs; None where no evidence is wanted.
    """

    slabs: Iterable[Weight]
    spectra: Spectra
    seed: int | None = None


def vocabulary(
    slabs: Iterable[Weight], part: str, spectra: Spectra, *, seed: int | None = None
) -> Vocabulary:
    """The measures of one embedding, see ``vocabularies``."""
    return vocabularies([Tokens(slabs, spectra, seed)], part)[0]


def vocabularies(asked: Sequence[Tokens], part: str) -> list[Vocabulary]:
    """The measures of an embedding in several pairs from its pieces.

    Memory is a piece and the d_model Grams of each. Pairs whose pieces hold the same base share
    its Grams.

    Args:
        asked: The embedding in each pair.
        part: Which embedding it is.
    """
    adding = [_Adding(one.spectra, one.seed, part) for one in asked]
    for pieces in zip_longest(*(one.slabs for one in asked)):
        known = _Known()
        for one, weight in zip(adding, pieces, strict=True):
            if weight is not None:
                one.add(slice_of(weight), known)
    return [one.found() for one in adding]


@dataclass(frozen=True)
class _Known:
    """What pairs have had of the same tokens.

    Attributes:
        grams: Bases with their Gram matrices.
        draws: Signs by their seed.
    """

    grams: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    draws: dict[int, Signs] = field(default_factory=dict)

    def gram(self, base: Tensor) -> Tensor:
        """The Gram of some tokens of a base."""
        for other, products in self.grams:
            if torch.equal(other, base):
                return products
        self.grams.append((base, gram(base)))
        return self.grams[-1][1]

    def signs(self, seed: int, shape: tuple[int, ...]) -> Tensor:
        """The draw of a seed."""
        return self.draws.setdefault(seed, Signs(seed)).of(shape)


@dataclass
class _Adding:
    """Sums over the tokens of an embedding so far."""

    spectra: Spectra
    seed: int | None
    part: str
    first: Slice | None = None
    sums: list[Sums] = field(default_factory=list)
    grams: list[Tensor] = field(default_factory=list)

    def add(self, weight: Slice, known: _Known) -> None:
        """Add some tokens."""
        self.first = self.first or weight
        base, change = weight.base, weight.change
        if self.part == "W_U":
            base, change = transposed(base), turned(change)
        self.sums.append(sums_of_rows(base, change, _token_rows(weight.floor, self.part)))
        made = [] if self.spectra == "none" else [gram(change)]
        if self.spectra == "both":
            made.append(known.gram(base))
        if self.seed is not None:
            signs = known.signs(self.seed + len(self.sums), tuple(change.shape))
            made += [cross(base, change), flipped_gram(change, signs)]
        olds = self.grams or [torch.zeros_like(one) for one in made]
        self.grams = [old.add_(new) for old, new in zip(olds, made, strict=True)]

    def found(self) -> Vocabulary:
        """The measures of all tokens."""
        if self.first is None:
            raise ValueError("an embedding needs at least one piece.")
        tokens = joined_sums(self.sums)
        columns: Columns = {**tokens.grouped(1).columns()}
        columns |= _gram_columns(self.grams, self.part)
        return Vocabulary(columns, self.first, tokens, self.grams)


def _token_rows(floor: Tensor | None, part: str) -> Tensor | None:
    return transposed(floor) if floor is not None and part == "W_U" else floor


def _gram_columns(grams: Sequence[Tensor], part: str) -> Columns:
    if len(grams) < 2:
        return {} if not grams else ranks("delta", energies_of_gram(grams[0]))
    side = "read" if part in READING_PARTS else "write"
    space = row_space(grams[1], grams[0])
    sides: Columns = {f"g_{side}": [float(space.g)], f"g_self_{side}": [float(space.g_self)]}
    spectra = ranks("delta", space.delta_energies) | ranks("base", space.base_energies)
    return sides | spectra


def ranks(of: str, energies: Float[Tensor, "*component direction"]) -> Columns:
    """Effective and stable rank of spectra ``of`` the ``base`` or the ``delta``."""
    return {
        f"effective_rank_{of}": effective_rank(energies),
        f"stable_rank_{of}": stable_rank(energies),
    }


@dataclass(frozen=True)
class Writer:
    """Turns measures into rows of the weights table of one pair.

    Attributes:
        base: The base's name.
        tuned: The tuned model's name.
    """

    base: str
    tuned: str

    def table(
        self, keys: Mapping[str, Sequence[object]], columns: Columns, weight: Slice | None
    ) -> Table:
        """Rows of components that were all cut from ``weight`` (None: from several)."""
        count = len(keys["component"])
        values: dict[str, Any] = {
            name: torch.atleast_1d(column).numpy() if isinstance(column, Tensor) else column
            for name, column in columns.items()
        }
        if weight is not None:
            values["base_dtype"] = [weight.dtypes[0]] * count
            values["tuned_dtype"] = [weight.dtypes[1]] * count
        tied = [weight is not None and weight.tied] * count
        both = {"base": [self.base] * count, "tuned": [self.tuned] * count, "tied": tied}
        all_columns = {**keys, **both, **values}
        return Table.of("weights", WEIGHTS_SCHEMA, all_columns, order="relative_delta")
