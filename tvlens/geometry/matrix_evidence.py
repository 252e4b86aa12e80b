"""Evidence about whole matrices: gain against the isotropic null, structure by spikes."""

from dataclasses import dataclass

import numpy as np
import torch
from einops import einsum
from jaxtyping import Float, Float64
from scipy import stats
from torch import Tensor

from tvlens.components import KNOWN_PARTS

from .changes import Change, Remainder, product, transposed
from .evidence import (
    GAIN_COSINE,
    GAIN_Z,
    STRUCTURED,
    Z95,
    Evidence,
    Keys,
    evidence_rows,
    placed,
    residual_side,
    statistic_rows,
)
from .matrices import Basis, Products, Seen, alignment, products_of, self_alignment
from .nulls import Signs, cosine_spread, unit_alignment_spread
from .spikes import Spikes, spikes_above_edge

CANCELS = 1e-4
"""Share of the energy left by a gain below which its Gram is taken anew, not by subtraction."""


@dataclass(frozen=True, eq=False)
class MatrixChange:
    """A matrix, its change, and what has been measured of the two.

    Attributes:
        base: Base weights.
        change: Tuning vector.
        basis: ``spectral_basis(base)``.
        found: ``seen(basis, change)``.
        products: ``products_of(basis, change)``, None where they have not been taken.
        part: Which matrix it is.
        signs: Of the one draw for its noise edge.
    """

    base: Float[Tensor, "d_in d_out"]
    change: Change
    basis: Basis
    found: Seen
    products: Products | None
    part: str
    signs: Signs


@dataclass(frozen=True, eq=False)
class MatrixStructure:
    """The structured rest of a matrix's change.

    Attributes:
        share: Share of the change's energy in spikes that are no gains.
        aligned: Their energy-weighted G_rel on the residual side, NaN where that is unknown.
        error: Its standard error at chance.
        spikes: Their number.
    """

    share: float
    aligned: float
    error: float
    spikes: int


def relative_alignment(
    coordinates: Float[Tensor, "direction vector"],
    total: Float[Tensor, " vector"],
    basis: Basis,
    d_model: int,
) -> Float64[Tensor, " vector"]:
    """G_rel of vectors of energy ``total`` from their coordinates along one side of ``basis``."""
    energies = transposed(coordinates).square()
    rank = basis.rank.expand(len(energies))
    return alignment(energies, total, rank, d_model) / self_alignment(basis, d_model)


def structure_of(
    shares: Float64[Tensor, " spike"],
    vectors: Float64[Tensor, "d_model spike"],
    basis: Basis,
    part: str,
) -> MatrixStructure:
    """Spikes that are no gains, by their alignment on the residual side."""
    if not len(shares):
        return MatrixStructure(0.0, np.nan, np.nan, 0)
    if part not in KNOWN_PARTS:  # which side would be the residual stream?
        return MatrixStructure(float(shares.sum()), np.nan, np.nan, len(shares))
    weight, d_model = shares / shares.sum(), len(vectors)
    coordinates = basis.coordinates(vectors, residual_side(part))
    relative = relative_alignment(coordinates, vectors.square().sum(0), basis, d_model)
    spread = unit_alignment_spread(d_model) / abs(float(self_alignment(basis, d_model)))
    error = float(weight.square().sum().sqrt()) * spread
    return MatrixStructure(
        float(shares.sum()), float((weight * relative).sum()), error, len(shares)
    )


def gain_cosines(
    read: Float64[Tensor, "d_in triplet"],
    write: Float64[Tensor, "d_out triplet"],
    base: Float[Tensor, "d_in d_out"],
) -> Float64[Tensor, " triplet"]:
    """u'Wv / sqrt(|W'u| |Wv|): 1 where a triplet scales a direction of W, -1 where one shrinks."""
    from_read, onto_write = product(transposed(base), read), product(base, write)
    through = einsum(from_read, write, "d_out triplet, d_out triplet -> triplet")
    size = (from_read.norm(dim=0) * onto_write.norm(dim=0)).sqrt()
    return through / size.clamp(min=torch.finfo(torch.float64).tiny)


def _spikes(one: MatrixChange, gain: float, left: float) -> Spikes:
    """Spikes of the change less its global gain, of which the share ``left`` remains."""
    rest = Remainder(one.base, one.change, torch.full((1, 1), gain, dtype=torch.float64))
    total = float(one.found.total) * left
    found = one.products or products_of(one.basis, one.change)
    grams = None
    if left > CANCELS:
        both = found.cross + transposed(found.cross)
        grams = both.mul_(-gain).add_(found.own).add_(one.basis.gram, alpha=gain**2)
    return spikes_above_edge(rest, total, signs=one.signs, products=grams)


def matrix_structure(one: MatrixChange, gain: float, left: float) -> MatrixStructure:
    """Spikes of the change less its global gain that are no gains of base directions."""
    if left <= 0:
        return MatrixStructure(0.0, np.nan, np.nan, 0)
    spikes = _spikes(one, gain, left)
    plain = gain_cosines(spikes.read, spikes.write, one.base).abs() <= GAIN_COSINE
    vectors = (spikes.write if residual_side(one.part) == "write" else spikes.read)[:, plain]
    return structure_of(spikes.shares[plain], vectors, one.basis, one.part)


@dataclass(frozen=True, eq=False)
class MatrixGain:
    """The part of a matrix's change that scales the base or its directions.

    Attributes:
        gain: <D, W> / |W|^2.
        kappa: Cosine of D and W.
        scale: Share in gains of single directions, beyond the global one, less chance.
        scale_spread: Its standard deviation under isotropic noise.
    """

    gain: float
    kappa: float
    scale: float
    scale_spread: float

    @property
    def share(self) -> float:
        """Share of the energy in gains."""
        return self.kappa**2 + max(0.0, self.scale)


def matrix_gain(found: Seen, basis: Basis, size: int) -> MatrixGain:
    """Global and single gains of a matrix; chance is r / (m n) +- sqrt(2 r) / (m n)."""
    channels, total, values = found.channels, found.total, basis.values
    inner, energy = (channels * values).sum(), values.square().sum()
    kappa = float(inner / (energy * total).sqrt())
    rank = float(basis.rank)
    scale = float(channels.square().sum() / total) - kappa**2 - rank / size
    return MatrixGain(float(inner / energy), kappa, scale, (2 * rank) ** 0.5 / size)


def matrix_evidence(keys: Keys, one: MatrixChange, left: float) -> Evidence:
    """Gain against the isotropic null with an effect floor; structure by spikes above the edge.

    Args:
        keys: The component's.
        one: Its base and change.
        left: Share of the change's energy that its global gain leaves.
    """
    own = matrix_gain(one.found, one.basis, one.base.numel())
    rest = matrix_structure(one, own.gain, left)
    return whole_evidence(keys, own, rest, shape=(one.base.shape[0], one.base.shape[1]))


def whole_evidence(
    keys: Keys, own: MatrixGain, rest: MatrixStructure, *, shape: tuple[int, int]
) -> Evidence:
    """Evidence from the gains and the structure of one matrix."""
    spread, part = cosine_spread(*shape), str(keys["part"][0])
    p_kappa = 2 * stats.norm.sf(abs(own.kappa) / spread)
    p_scale = stats.norm.sf(own.scale / own.scale_spread)
    limit = stats.norm.sf(GAIN_Z)
    share = rest.share * (1 - own.kappa**2)
    where = placed(np.array([share]), np.array([rest.aligned]), np.array([rest.error]), part)
    rows = evidence_rows(
        keys,
        share_gain=own.share,
        sure_gain=bool(p_kappa < 2 * limit or p_scale < limit),
        **where,
        **{f"sure_{name}": rest.spikes > 0 for name in STRUCTURED},
        alignment=rest.aligned,
        alignment_se=rest.error,
        spikes=rest.spikes,
        decided_by="isotropic null with an effect floor; sign-flip edge",
    )
    tests = [
        statistic_rows(keys, "kappa", side="both", null="isotropic", effect=[own.kappa],
                  half_interval=Z95 * spread, p_value=p_kappa),
        statistic_rows(keys, "e_scale", side="both", null="isotropic", effect=[own.scale],
                  half_interval=Z95 * own.scale_spread, p_value=p_scale),
    ]  # fmt: skip
    if not np.isnan(rest.aligned):
        z = rest.aligned / rest.error
        tests.append(
            statistic_rows(keys, "g_rel_of_spikes", side=residual_side(part), null="isotropic",
                      effect=[rest.aligned], half_interval=Z95 * rest.error,
                      p_value=2 * stats.norm.sf(abs(z)), k=rest.spikes)
        )  # fmt: skip
    return Evidence([rows], tests)
