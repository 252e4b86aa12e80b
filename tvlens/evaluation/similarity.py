"""How alike the activations of two models are, and in which directions they differ, from moments.

Of the activations x_t of the base and y_t of the other model at the same n tokens, d_t = y_t - x_t,
C_x, C_y, C_d their covariances about the means, C_yx the crossed one, and l the eigenvalues of C_d:

    cka                   |C_yx|_F^2 / (|C_x|_F |C_y|_F)            linear and centred [1]
    relative_change       sqrt(mean |d|^2 / mean |x|^2)
    mean_share            |mean d|^2 / mean |d|^2                   of one shift at all tokens
    effective_rank        exp(- sum p_i ln p_i),  p_i = l_i / sum l                              [2]
    effective_rank_share  the same over the width of the activation
    participation         (sum l)^2 / sum l^2
    directions_90         the fewest leading l that hold 90 % of sum l
    effective_rank_base   the effective rank of C_x
    overlap               |Q_d' Q_x|_F^2 / k, Q the k leading eigenvectors; chance k / width

The mean of d is apart: it is one direction and counts in ``mean_share`` alone. CKA is 1 where the
two differ by a rotation and a scale, a cosine is not. Ranks are of the sample: none exceeds n - 1.

A difference of exactly nothing is ``unchanged``: its ranks are 0, shares of it are NaN. One whose
part about its mean is below ``ROUNDING`` of the activation's length has the ranks of float32's
rounding (``rounding``): a change of a bias alone moves every token alike.

[1] Kornblith et al. 2019, arXiv:1905.00414, section 3, HSIC of linear kernels. [2] Roy and
Vetterli 2007, "The effective rank", there of singular values; here of eigenvalues of covariances.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from einops import einsum, rearrange
from jaxtyping import Float64, Int
from torch import Tensor

from tvlens.geometry.matrices import effective_rank

UNITS: Mapping[str, str] = {
    "cosine": "",
    "cka": "",
    "relative_change": "",
    "mean_share": "share",
    "effective_rank": "directions",
    "effective_rank_share": "share",
    "participation": "directions",
    "directions_90": "directions",
    "effective_rank_base": "directions",
    "overlap": "share",
}
"""Every measure with its unit; ``cosine`` is the mean over tokens and is not made of moments."""
K_SHARE = 0.1
"""Leading directions that are compared, of all: what the rule in docs/claims.md calls small."""
HELD = 0.9
RANK_TOLERANCE = 1e-9
"""Eigenvalues below this share of the largest are rounding of float32 activations: 1e-7 of their
length in each direction, of a difference of 0.3 % of their length."""
ROUNDING = 1e-6
"""A difference below this share of the activation's length is rounding of float32."""
TOKENS_PER_DIMENSION = 4
"""With so many independent tokens the participation ratio of noise, width / (1 + width / n) on
average, is a fifth too low; with fewer no rank is believed."""
UNCHANGED, ROUNDED, FEW_TOKENS, OK = "unchanged", "rounding", "few_tokens", "ok"


@dataclass(frozen=True, eq=False)
class Moments:
    """Moments of one activation of two models over tokens, head by head where it has heads.

    Attributes:
        count: Tokens.
        mean_base: Mean of x.
        mean_change: Mean of d.
        base: C_x.
        change: C_d.
        cross: C_dx, rows those of d.
    """

    count: int
    mean_base: Float64[Tensor, "index width"]
    mean_change: Float64[Tensor, "index width"]
    base: Float64[Tensor, "index width width"]
    change: Float64[Tensor, "index width width"]
    cross: Float64[Tensor, "index width width"]

    @property
    def energy_base(self) -> Float64[Tensor, " index"]:
        """Mean of |x|^2."""
        return _trace(self.base) + self.mean_base.square().sum(-1)

    @property
    def energy_change(self) -> Float64[Tensor, " index"]:
        """Mean of |d|^2."""
        return _trace(self.change) + self.mean_change.square().sum(-1)


@dataclass(frozen=True, eq=False)
class Similarity:
    """The measures of one activation.

    Attributes:
        values: By measure, one for each head, or one.
        k: How many directions ``overlap`` compares.
        shares: p_i, largest first.
        status: ``ok``, ``few_tokens``, ``rounding`` or ``unchanged``, one for each head.
    """

    values: Mapping[str, Float64[Tensor, " index"]] = field(repr=False)
    k: Int[Tensor, " index"]
    shares: Float64[Tensor, "index direction"]
    status: tuple[str, ...]


class Directions(NamedTuple):
    """Eigenvalues, largest first and none below zero, and eigenvectors."""

    values: Float64[Tensor, "index direction"]
    vectors: Float64[Tensor, "index width direction"]


def similarity(moments: Moments) -> Similarity:
    """Every measure that moments give; see the module for the formulas."""
    base, change = directions(moments.base), directions(moments.change)
    total = change.values.sum(-1)
    nothing = total == 0
    rank, width = effective_rank(change.values), base.values.shape[-1]
    k = _compared(base.values, change.values)
    energy = moments.energy_change
    values = {
        "cka": linear_cka(moments),
        "relative_change": (energy / moments.energy_base).sqrt(),
        "mean_share": moments.mean_change.square().sum(-1) / energy,
        "effective_rank": torch.where(nothing, 0.0, rank),
        "effective_rank_share": torch.where(nothing, 0.0, rank / width),
        "participation": torch.where(nothing, 0.0, total.square() / change.values.square().sum(-1)),
        "directions_90": torch.where(nothing, 0, directions_holding(change.values, HELD)).double(),
        "effective_rank_base": effective_rank(base.values),
        "overlap": overlap(change.vectors, base.vectors, k),
    }
    shares = change.values / rearrange(total, "index -> index 1")
    return Similarity(values, k, shares, tuple(_statuses(moments)))


def linear_cka(moments: Moments) -> Float64[Tensor, " index"]:
    """Linear centred kernel alignment of base and other model; NaN where one is constant."""
    both = moments.base + moments.cross
    other = both + moments.cross.mT + moments.change
    sizes = moments.base.square().sum((-2, -1)) * other.square().sum((-2, -1))
    return both.square().sum((-2, -1)) / sizes.sqrt()


def directions(covariance: Float64[Tensor, "index width width"]) -> Directions:
    """Principal directions of a covariance."""
    values, vectors = torch.linalg.eigh(covariance)
    return Directions(values.clamp(min=0).flip(-1), vectors.flip(-1))


def directions_holding(
    values: Float64[Tensor, "index direction"], share: float
) -> Int[Tensor, " index"]:
    """The fewest leading eigenvalues whose sum is at least ``share`` of all."""
    wanted = share * values.sum(-1, keepdim=True)
    return (values.cumsum(-1) < wanted).sum(-1) + 1


def overlap(
    first: Float64[Tensor, "index width direction"],
    second: Float64[Tensor, "index width direction"],
    k: Int[Tensor, " index"],
) -> Float64[Tensor, " index"]:
    """Mean squared cosine of the principal angles of the ``k`` leading directions of each.

    1 for the same subspace, k / width on average for random ones; NaN where ``k`` is 0.
    """
    most = int(k.max()) if len(k) else 0
    cosines = einsum(
        first[..., :most],
        second[..., :most],
        "index width direction, index width other -> index direction other",
    )
    counted = torch.arange(most, device=k.device) < rearrange(k, "index -> index 1")
    counted = counted.to(cosines.dtype)
    return einsum(
        cosines.square(),
        counted,
        counted,
        "index direction other, index direction, index other -> index",
    ) / k.to(cosines.dtype)


def enough_tokens(tokens: int, width: int) -> bool:
    """Whether so many tokens can tell a high rank from a low one."""
    return tokens >= TOKENS_PER_DIMENSION * width


def _compared(
    base: Float64[Tensor, "index direction"], change: Float64[Tensor, "index direction"]
) -> Int[Tensor, " index"]:
    """A tenth of the directions, and no more than either side has."""
    most = max(1, math.ceil(K_SHARE * base.shape[-1]))
    ranks = [
        ((values > RANK_TOLERANCE * values[:, :1]) & (values > 0)).sum(-1)
        for values in (base, change)
    ]
    return torch.minimum(*ranks).clamp(max=most)


def _statuses(moments: Moments) -> list[str]:
    few = not enough_tokens(moments.count, moments.base.shape[-1])
    found, energies = [], moments.energy_change
    about = (_trace(moments.change).clamp(min=0) / moments.energy_base).sqrt()
    for energy, share in zip(energies.tolist(), about.tolist(), strict=True):
        if energy == 0:
            found.append(UNCHANGED)
        elif share < ROUNDING:
            found.append(ROUNDED)
        else:
            found.append(FEW_TOKENS if few else OK)
    return found


def _trace(matrices: Float64[Tensor, "index width width"]) -> Float64[Tensor, " index"]:
    return matrices.diagonal(dim1=-2, dim2=-1).sum(-1)
