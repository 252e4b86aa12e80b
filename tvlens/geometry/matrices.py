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

Energy shares do not know a gain from an attenuation. The net share does:

    amplification = sum_i C_ii |C_ii| / |D|^2

Chance is 0 whatever the shape (noise has C_ii of both signs), a pure gain 1, a pure attenuation -1.
Functions take any number of leading component axes, so all heads of a layer go at once.

Only the shorter side's directions are kept. With that side last, V comes from W' W, and U = W V / S
is never formed: C = S^-1 V' (W' D) V and |D V|^2 = diag(V' D' D V), so three products of the two
matrices, as small as their shorter side, hold every measure.
"""

from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float, Float64
from torch import Tensor

from tvlens.components import Side

from .changes import (
    Change,
    Factored,
    cross_and_gram,
    energies_of_gram,
    gram,
    product,
    singular_energies,
    transposed,
    turned,
)
from .eigen import eigenpairs

K_FRACTION = 0.25
"""Share of a side's dimensions called existing in e_*: a convention, the same for every matrix."""
RANK_TOLERANCE = 1e-5
"""Singular values below this share of the largest are null: the Gram in float64 gives the singular
vectors there with an error of 1e-16 / tolerance^2 = 1e-6 in energy, and float32 weights hold
nothing smaller."""


@dataclass(frozen=True, eq=False)
class Basis:
    """Singular directions of a base matrix, largest first; those that are null are zero.

    Attributes:
        tall: The matrix with its shorter side last.
        turned: Whether that exchanged its sides, so that the shorter side is the read side.
        gram: Products of the columns of ``tall``.
        values: Singular values, 0 for null directions.
        short: Directions of the shorter side.
    """

    tall: Float[Tensor, "*component long short"]
    turned: bool
    gram: Float64[Tensor, "*component short short"]
    values: Float64[Tensor, "*component direction"]
    short: Float64[Tensor, "*component short direction"]

    @property
    def rank(self) -> Float64[Tensor, "*component"]:
        """Number of directions that are not null."""
        return (self.values > 0).double().sum(-1)

    @property
    def inverse(self) -> Float64[Tensor, "*component direction"]:
        """1 / singular value, 0 for null directions."""
        return torch.where(self.values > 0, 1 / self.values, 0)

    @property
    def long(self) -> Float64[Tensor, "*component long direction"]:
        """Directions of the longer side, formed now."""
        return product(self.tall, self.short) * rearrange(self.inverse, "... a -> ... 1 a")

    def of(self, index: int) -> "Basis":
        """The directions of one of several components."""
        sides = (self.tall[index], self.turned, self.gram[index])
        return Basis(*sides, self.values[index], self.short[index])

    @property
    def read(self) -> Float64[Tensor, "*component d_in direction"]:
        """U, directions that the matrix reads."""
        return self.short if self.turned else self.long

    @property
    def write(self) -> Float64[Tensor, "*component d_out direction"]:
        """V, directions that the matrix writes."""
        return self.long if self.turned else self.short

    def coordinates(
        self, vectors: Float[Tensor, "*given d k"], side: Side
    ) -> Float[Tensor, "*component direction k"]:
        """The coordinates of a few vectors of one side along its directions.

        Those of the shorter side are in the precision of the vectors.
        """
        if (side == "read") == self.turned:
            return transposed(self.short).to(vectors.dtype) @ vectors
        onto_short = product(transposed(self.tall), vectors)
        return rearrange(self.inverse, "... a -> ... a 1") * (transposed(self.short) @ onto_short)


@dataclass(frozen=True, eq=False)
class Seen:
    """A change in the directions of its base: of C = U' D V no more is formed than is asked for.

    Attributes:
        from_read: C = ``from_read @ onto_write``.
        onto_write: The other factor.
        read: |row|^2 of U' D, one number a direction.
        write: |column|^2 of D V, one number a direction.
        total: |D|^2.
    """

    from_read: Float64[Tensor, "*component direction inner"]
    onto_write: Float64[Tensor, "*component inner direction"]
    read: Float64[Tensor, "*component direction"]
    write: Float64[Tensor, "*component direction"]
    total: Float64[Tensor, "*component"]

    @property
    def channels(self) -> Float64[Tensor, "*component direction"]:
        """C_ii: how much the change adds to each singular value of the base, to first order."""
        return (self.from_read * transposed(self.onto_write)).sum(-1)

    def corner(self, k_read: int, k_write: int) -> Float64[Tensor, "*component k_read k_write"]:
        """C of the first directions of both sides."""
        return self.from_read[..., :k_read, :] @ self.onto_write[..., :k_write]


@dataclass(frozen=True, eq=False)
class EnergySplit:
    """Shares of |D|^2 that sum to 1 (module docstring)."""

    whole: Float[Tensor, "*component"]
    scale: Float[Tensor, "*component"]
    existing: Float[Tensor, "*component"]
    new_read: Float[Tensor, "*component"]
    new_write: Float[Tensor, "*component"]
    new_both: Float[Tensor, "*component"]


def directions_of_gram(
    products: Float64[Tensor, "*component short short"],
) -> tuple[Float64[Tensor, "*component direction"], Float64[Tensor, "*component short direction"]]:
    """Singular values and directions, largest first, of what has this Gram matrix; null is zero."""
    energies, short = eigenpairs(products)
    values = energies.clamp(min=0).sqrt()
    values = torch.where(values > RANK_TOLERANCE * values[..., :1], values, 0)
    kept = rearrange(values > 0, "... direction -> ... 1 direction")
    return values, torch.where(kept, short, 0)


def spectral_basis(matrix: Float[Tensor, "*component d_in d_out"]) -> Basis:
    """Singular directions through the smaller Gram matrix in float64 (4 times faster than SVD)."""
    is_wide = matrix.shape[-2] < matrix.shape[-1]
    tall = transposed(matrix) if is_wide else matrix
    products = gram(tall)
    return Basis(tall, is_wide, products, *directions_of_gram(products))


@dataclass(frozen=True, eq=False)
class Products:
    """What the measures of a change need of it, both as small as the shorter side.

    Attributes:
        cross: W' D, the shorter side last.
        own: D' D.
    """

    cross: Float64[Tensor, "*component short short"]
    own: Float64[Tensor, "*component short short"]


def products_of(basis: Basis, delta: Change) -> Products:
    """The products of a change with its base and with itself."""
    tall = turned(delta) if basis.turned else delta
    return Products(*cross_and_gram(basis.tall, tall))


def seen(basis: Basis, delta: Change, products: Products | None = None) -> Seen:
    """A change in the directions of its base; dense ones through ``products_of`` them."""
    if isinstance(delta, Factored):
        found = _seen_factors(basis, delta.turned if basis.turned else delta)
    else:
        found = seen_products(basis, products or products_of(basis, delta))
    if basis.turned:
        sides = transposed(found.onto_write), transposed(found.from_read)
        return Seen(*sides, found.write, found.read, found.total)
    return found


def seen_products(basis: Basis, products: Products) -> Seen:
    """A change in the directions of its base, the shorter side last, from products alone."""
    short, inverse = basis.short, rearrange(basis.inverse, "... a -> ... a 1")
    from_long = inverse * (transposed(short) @ products.cross)
    onto_short = (short * (products.own @ short)).sum(-2).clamp(min=0)
    total = products.own.diagonal(dim1=-2, dim2=-1).sum(-1)
    return Seen(from_long, short, from_long.square().sum(-1), onto_short, total)


def _seen_factors(basis: Basis, delta: Factored) -> Seen:
    """The same through the factors: C = (U' L) (R V)."""
    left, right = delta.left.double(), delta.right.double()
    side: Side = "write" if basis.turned else "read"
    from_long, onto_short = basis.coordinates(left, side), right @ basis.short
    inner, outer = transposed(left) @ left, right @ transposed(right)
    return Seen(
        from_long,
        onto_short,
        ((from_long @ outer) * from_long).sum(-1).clamp(min=0),
        ((inner @ onto_short) * onto_short).sum(-2).clamp(min=0),
        (inner * outer).sum((-2, -1)).clamp(min=0),
    )


def delta_energies(
    delta: Change, products: Products | None = None
) -> Float64[Tensor, "*component direction"]:
    """Squared singular values of a change, largest first."""
    if products is None or isinstance(delta, Factored):
        return singular_energies(delta)
    return energies_of_gram(products.own)


def effective_rank(
    energies: Float[Tensor, "*component direction"],
) -> Float[Tensor, "*component"]:
    """exp of the entropy of p_i = s_i^2 / sum s^2; NaN for a zero matrix."""
    share = energies / energies.sum(-1, keepdim=True)
    return torch.exp(-torch.xlogy(share, share).sum(-1))


def stable_rank(energies: Float[Tensor, "*component direction"]) -> Float[Tensor, "*component"]:
    """|D|^2 over its largest squared singular value; NaN for a zero matrix."""
    return energies.sum(-1) / energies.amax(-1)


def kept_directions(basis: Basis, shape: tuple[int, int]) -> tuple[int, int]:
    """k_read and k_write: how many directions of each side of a matrix are called existing."""
    rank = int(basis.rank.amin())
    k_read, k_write = (max(1, min(int(K_FRACTION * d), rank)) for d in shape)
    return k_read, k_write


def energy_split(basis: Basis, found: Seen, *, k_read: int, k_write: int) -> EnergySplit:
    """Split the energy of a change over gains and existing and new directions."""
    diagonal, total = found.channels, found.total
    base_energy = basis.values.square().sum(-1)
    gain = (diagonal * basis.values).sum(-1) / base_energy
    channel = diagonal - rearrange(gain, "... -> ... 1") * basis.values
    read_rest, write_rest = found.read - diagonal.square(), found.write - diagonal.square()
    existing = found.corner(k_read, k_write).square().sum((-2, -1))
    existing = existing - diagonal[..., : min(k_read, k_write)].square().sum(-1)
    new_write = read_rest[..., :k_read].sum(-1) - existing
    new_read = write_rest[..., :k_write].sum(-1) - existing
    new_both = total - diagonal.square().sum(-1) - existing - new_write - new_read
    parts = (gain.square() * base_energy, channel.square().sum(-1), existing, new_read, new_write)
    return EnergySplit(*(part.clamp(min=0) / total for part in (*parts, new_both)))


def amplification(basis: Basis, found: Seen) -> Float[Tensor, "*component"]:
    """Share of the energy in gains of single directions less that in attenuations.

    NaN where the base has no direction that could be amplified.
    """
    share = (found.channels * found.channels.abs()).sum(-1) / found.total
    return torch.where(basis.rank > 0, share, torch.nan)


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


@dataclass(frozen=True, eq=False)
class SideAlignment:
    """G_rel and G_self of both sides of a matrix."""

    g_read: Float[Tensor, "*component"]
    g_write: Float[Tensor, "*component"]
    g_self_read: Float[Tensor, "*component"]
    g_self_write: Float[Tensor, "*component"]


def side_alignment(basis: Basis, found: Seen, *, d_read: int, d_write: int) -> SideAlignment:
    """Alignment of both sides; ``d_read`` and ``d_write`` are the full dimensions.

    They exceed the tensor's own where it is the core of a larger matrix (heads.py).
    """
    self_read, self_write = self_alignment(basis, d_read), self_alignment(basis, d_write)
    return SideAlignment(
        g_read=alignment(found.read, found.total, basis.rank, d_read) / self_read,
        g_write=alignment(found.write, found.total, basis.rank, d_write) / self_write,
        g_self_read=self_read,
        g_self_write=self_write,
    )


@dataclass(frozen=True, eq=False)
class RowSpace:
    """What the d_model Grams of a base and its delta tell about the d_model side."""

    g: Float[Tensor, ""]
    g_self: Float[Tensor, ""]
    base_energies: Float[Tensor, " d_model"]
    delta_energies: Float[Tensor, " d_model"]


def row_space(
    base_gram: Float64[Tensor, "d_model d_model"], delta_gram: Float64[Tensor, "d_model d_model"]
) -> RowSpace:
    """Alignment and spectra on the d_model side of a tall matrix, from Grams alone."""
    energies, vectors = eigenpairs(base_gram)
    energies = energies.clamp(min=0)
    kept = energies > RANK_TOLERANCE**2 * energies[0]
    rank = kept.double().sum()
    along = (vectors * (delta_gram @ vectors)).sum(0) * kept
    total, d_model = delta_gram.trace(), len(base_gram)
    g_self = alignment(energies * kept, (energies * kept).sum(), rank, d_model)
    return RowSpace(
        g=alignment(along, total, rank, d_model) / g_self,
        g_self=g_self,
        base_energies=energies,
        delta_energies=energies_of_gram(delta_gram),
    )
