"""Measures of matrices: where a tuning vector lies relative to the base's singular directions.

With W = U S V' (x @ W reads along U and writes along V), D the tuning vector, C = U' D V:

    e_global    <D, W>^2 / (|D|^2 |W|^2)             one gain for the whole matrix
    e_scale     sum_i C_ii^2 / |D|^2 - e_global      gains of single directions, all of them
    the rest    split by the top k_read directions of U and the top k_write of V:
    existing    existing read to existing write      (column e_within)
    new_read    new read to existing write
    new_write   existing read to new write
    new_both    new to new

The six sum to 1. G is the k-free alignment of one side, a Gini of the energies over the base
directions i = 1..d in order of their singular value:

    G = sum_i (1 - (2 i - 1) / d) e_i / sum_i e_i;   G_self = G(S^2);   G_rel = G / G_self

Chance is 0 and a pure gain is 1 for G_rel. The d - r null directions of W are tied: they share
the mean weight -r/d, whatever order an algorithm returns them in.
Functions take any number of leading component axes, so all heads of a layer go at once.
"""

from dataclasses import dataclass

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

K_FRACTION = 0.25
"""Share of a side's dimensions called existing in e_*: a convention, the same for every matrix."""
RANK_TOLERANCE = 1e-5
"""Singular values below this share of the largest are null: the Gram in float64 gives the singular
vectors there with an error of 1e-16 / tolerance^2 = 1e-6 in energy, and float32 weights hold
nothing smaller."""


@dataclass(frozen=True, eq=False)
class Basis:
    """Singular directions, largest first; the columns of null directions are zero.

    Attributes:
        read: U, directions that the matrix reads.
        values: Singular values, 0 for null directions.
        write: V, directions that the matrix writes.
    """

    read: Float[Tensor, "*component d_in direction"]
    values: Float[Tensor, "*component direction"]
    write: Float[Tensor, "*component d_out direction"]

    @property
    def rank(self) -> Float[Tensor, "*component"]:
        """Number of directions that are not null."""
        return (self.values > 0).double().sum(-1)


@dataclass(frozen=True, eq=False)
class EnergySplit:
    """Shares of |D|^2 that sum to 1 (module docstring)."""

    whole: Float[Tensor, "*component"]
    scale: Float[Tensor, "*component"]
    existing: Float[Tensor, "*component"]
    new_read: Float[Tensor, "*component"]
    new_write: Float[Tensor, "*component"]
    new_both: Float[Tensor, "*component"]


def transposed(matrix: Float[Tensor, "*component a b"]) -> Float[Tensor, "*component b a"]:
    """The matrices with their two sides exchanged."""
    return rearrange(matrix, "... a b -> ... b a")


def spectral_basis(matrix: Float[Tensor, "*component d_in d_out"]) -> Basis:
    """Singular directions through the smaller Gram matrix in float64 (4 times faster than SVD)."""
    matrix = matrix.double()
    if matrix.shape[-2] < matrix.shape[-1]:
        swapped = spectral_basis(transposed(matrix))
        return Basis(swapped.write, swapped.values, swapped.read)
    energies, vectors = torch.linalg.eigh(einsum(matrix, matrix, "... i a, ... i b -> ... a b"))
    values, write = energies.clamp(min=0).sqrt().flip(-1), vectors.flip(-1)
    values = torch.where(values > RANK_TOLERANCE * values[..., :1], values, 0)
    kept = rearrange(values > 0, "... direction -> ... 1 direction")
    divisor = rearrange(values.clamp(min=torch.finfo(torch.float64).tiny), "... a -> ... 1 a")
    read = einsum(matrix, write, "... i a, ... a direction -> ... i direction") / divisor
    return Basis(torch.where(kept, read, 0), values, torch.where(kept, write, 0))


def singular_energies(
    matrix: Float[Tensor, "*component d_in d_out"],
) -> Float[Tensor, "*component direction"]:
    """Squared singular values, largest first, through the smaller Gram matrix in float64."""
    matrix = matrix.double()
    if matrix.shape[-2] < matrix.shape[-1]:
        matrix = transposed(matrix)
    gram = einsum(matrix, matrix, "... i a, ... i b -> ... a b")
    return torch.linalg.eigvalsh(gram).clamp(min=0).flip(-1)


def effective_rank(
    energies: Float[Tensor, "*component direction"],
) -> Float[Tensor, "*component"]:
    """exp of the entropy of p_i = s_i^2 / sum s^2; NaN for a zero matrix."""
    share = energies / energies.sum(-1, keepdim=True)
    return torch.exp(-torch.xlogy(share, share).sum(-1))


def stable_rank(energies: Float[Tensor, "*component direction"]) -> Float[Tensor, "*component"]:
    """|D|^2 over its largest squared singular value; NaN for a zero matrix."""
    return energies.sum(-1) / energies.amax(-1)


def energy_split(
    basis: Basis, delta: Float[Tensor, "*component d_in d_out"], *, k_read: int, k_write: int
) -> EnergySplit:
    """Split the energy of ``delta`` over gains and existing and new directions."""
    delta = delta.double()
    from_read = einsum(basis.read, delta, "... i u, ... i o -> ... u o")
    onto_write = einsum(delta, basis.write, "... i o, ... o v -> ... i v")
    core = einsum(from_read, basis.write, "... u o, ... o v -> ... u v")
    diagonal = core.diagonal(dim1=-2, dim2=-1)
    total = delta.square().sum((-2, -1))
    base_energy = basis.values.square().sum(-1)
    gain = (diagonal * basis.values).sum(-1) / base_energy
    channel = diagonal - rearrange(gain, "... -> ... 1") * basis.values
    read_rest = from_read.square().sum(-1) - diagonal.square()
    write_rest = onto_write.square().sum(-2) - diagonal.square()
    existing = core[..., :k_read, :k_write].square().sum((-2, -1))
    existing = existing - diagonal[..., : min(k_read, k_write)].square().sum(-1)
    new_write = read_rest[..., :k_read].sum(-1) - existing
    new_read = write_rest[..., :k_write].sum(-1) - existing
    new_both = total - diagonal.square().sum(-1) - existing - new_write - new_read
    parts = (gain.square() * base_energy, channel.square().sum(-1), existing, new_read, new_write)
    return EnergySplit(*(part.clamp(min=0) / total for part in (*parts, new_both)))


def alignment(
    energies: Float[Tensor, "*component direction"],
    total: Float[Tensor, "*component"],
    rank: Float[Tensor, "*component"],
    dimension: int,
) -> Float[Tensor, "*component"]:
    """G of energies along the base directions of a side of ``dimension`` (module docstring).

    Energy of ``total`` that is missing from ``energies`` lies in the null directions.
    """
    order = torch.arange(1, energies.shape[-1] + 1, dtype=torch.float64, device=energies.device)
    weighted = (energies * (1 - (2 * order - 1) / dimension)).sum(-1)
    null_energy = (total - energies.sum(-1)).clamp(min=0)
    return (weighted - null_energy * rank / dimension) / total


def self_alignment(basis: Basis, dimension: int) -> Float[Tensor, "*component"]:
    """G of the base itself on a side of ``dimension``: what a pure gain would show."""
    energies = basis.values.square()
    return alignment(energies, energies.sum(-1), basis.rank, dimension)


def channel_gains(
    basis: Basis, delta: Float[Tensor, "*component d_in d_out"]
) -> Float[Tensor, "*component direction"]:
    """C_ii: how much ``delta`` adds to each singular value of the base, to first order."""
    onto_write = einsum(delta.double(), basis.write, "... i o, ... o v -> ... i v")
    return (basis.read * onto_write).sum(-2)


@dataclass(frozen=True, eq=False)
class SideAlignment:
    """G_rel and G_self of both sides of a matrix."""

    g_read: Float[Tensor, "*component"]
    g_write: Float[Tensor, "*component"]
    g_self_read: Float[Tensor, "*component"]
    g_self_write: Float[Tensor, "*component"]


def side_alignment(
    basis: Basis, delta: Float[Tensor, "*component d_in d_out"], *, d_read: int, d_write: int
) -> SideAlignment:
    """Alignment of both sides; ``d_read`` and ``d_write`` are the full dimensions.

    They exceed the tensor's own where it is the core of a larger matrix (heads.py).
    """
    delta = delta.double()
    total = delta.square().sum((-2, -1))
    read = einsum(basis.read, delta, "... i u, ... i o -> ... u o").square().sum(-1)
    write = einsum(delta, basis.write, "... i o, ... o v -> ... i v").square().sum(-2)
    self_read, self_write = self_alignment(basis, d_read), self_alignment(basis, d_write)
    return SideAlignment(
        g_read=alignment(read, total, basis.rank, d_read) / self_read,
        g_write=alignment(write, total, basis.rank, d_write) / self_write,
        g_self_read=self_read,
        g_self_write=self_write,
    )


def gram_of_rows(rows: Float[Tensor, "row d_model"]) -> Float[Tensor, "d_model d_model"]:
    """R' R in float64, a slab of rows at a time: how an embedding is measured without its SVD."""
    gram = rows.new_zeros((rows.shape[1], rows.shape[1]), dtype=torch.float64)
    for slab in rows.split(8192):  # 8192 rows of 4096 numbers are 256 MB in float64
        gram += einsum(slab.double(), slab.double(), "row a, row b -> a b")
    return gram


@dataclass(frozen=True, eq=False)
class RowSpace:
    """What the d_model Grams of a base and its delta tell about the d_model side."""

    g: Float[Tensor, ""]
    g_self: Float[Tensor, ""]
    base_energies: Float[Tensor, " d_model"]
    delta_energies: Float[Tensor, " d_model"]


def row_space(base: Float[Tensor, "row d_model"], delta: Float[Tensor, "row d_model"]) -> RowSpace:
    """Alignment and spectra on the d_model side of a tall matrix, from Grams alone."""
    delta_gram = gram_of_rows(delta)
    energies, vectors = torch.linalg.eigh(gram_of_rows(base))
    energies, vectors = energies.clamp(min=0).flip(-1), vectors.flip(-1)
    kept = energies > RANK_TOLERANCE**2 * energies[0]
    rank = kept.double().sum()
    along = einsum(vectors, delta_gram, vectors, "a v, a b, b v -> v") * kept
    total, d_model = delta_gram.trace(), base.shape[1]
    g_self = alignment(energies * kept, (energies * kept).sum(), rank, d_model)
    return RowSpace(
        g=alignment(along, total, rank, d_model) / g_self,
        g_self=g_self,
        base_energies=energies,
        delta_energies=torch.linalg.eigvalsh(delta_gram).clamp(min=0).flip(-1),
    )
