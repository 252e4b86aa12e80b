"""Null models: what a tuning vector looks like when it carries no structure.

    rounding        snr = |d|^2 over the expected rounding energy; below SNR nothing is said, below
                    SNR_OF_STRUCTURE nothing but a gain
    sign flip       singular values of D with the sign of every entry drawn anew: keeps magnitudes,
                    kills structure; one draw, because over 8 draws its edge varies by 0.5 to 0.8 %
    own vs others   a component's change against its own base weights, compared with the base
                    weights of its peers in the same layer: also right where weights and updates
                    share preferred directions, which an isotropic null calls significant
    isotropic       only for whole matrices, which have no peers, and never without an effect floor

Rows are always the *changes* of a component and columns the *base weights* it is held against, so
one strongly changed component does not disturb the test of the others.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from einops import einsum, rearrange, reduce
from jaxtyping import Bool, Float, Float64, Int
from scipy import stats
from torch import Tensor

from .changes import (
    Change,
    Factored,
    energy,
    gram,
    own_products,
    product,
    slabs,
    transposed,
    written_rows,
)
from .heads import Factor, change_of_heads
from .offsets import over_offsets

SNR = 4.0
"""Least energy over rounding energy: at 4 the rounding holds a fifth of the observed energy."""
SNR_OF_STRUCTURE = 24.0
"""The same for labels about structure: at 12 k^2 entries move by k of their spacings (root mean
square), and below k^2 = 2 what a coarse format kept of a change depends on where weights are
small. Three fine-tunes of relative length .002 stored in bfloat16 had heads of up to 19.6."""
EDGE_MARGIN = 1.02
"""Over the sign-flip edge: three times its spread (0.5 to 0.8 %) between draws."""
HEADS_AT_ONCE = 2**22
"""Entries of heads written out in one step: 32 MiB in float64."""
SIGN_DRAWS = 20_000
"""Up to so many sign patterns are enumerated (14 pairs); of more, so many are drawn: the standard
error of p = .05 is .0015."""


def above_rounding(
    delta_norm: Float[np.ndarray, " component"],
    snr: Float[np.ndarray, " component"],
    *,
    least: float = SNR,
) -> Bool[np.ndarray, " component"]:
    """Whether a change can be told from rounding; an adapter has no snr and passes."""
    return (delta_norm > 0) & (np.isnan(snr) | (snr >= least))


def random_signs(shape: tuple[int, ...], *, seed: int) -> Int[Tensor, "*shape"]:
    """1 and -1 with equal chance."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, shape, generator=generator, dtype=torch.int8).mul_(2).sub_(1)


@dataclass(frozen=True)
class Signs:
    """The signs of a seed, drawn once for every shape that needs them.

    Attributes:
        seed: The seed.
        drawn: What has been drawn; nobody writes into it.
    """

    seed: int
    drawn: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    def of(self, shape: tuple[int, ...]) -> Int[Tensor, "*shape"]:
        """``random_signs`` of a shape."""
        if shape not in self.drawn:
            self.drawn[shape] = random_signs(shape, seed=self.seed)
        return self.drawn[shape]


def noise_edge(delta: Change, *, seed: int) -> Float[Tensor, "*component"]:
    """Largest singular value that entries of these magnitudes reach without structure.

    The larger of the iid edge |D| / sqrt(mn) (sqrt m + sqrt n) and one sign-flip draw, plus 2 %.
    Components go a few at a time, so that of a change in factors no more is written out.
    """
    signs = random_signs(tuple(delta.shape), seed=seed)
    if signs.dim() == 2:
        return _edge_of(written_rows(delta, 0, delta.shape[0]), signs)
    heads = torch.arange(len(signs))
    step = max(1, HEADS_AT_ONCE // (signs.shape[1] * signs.shape[2]))
    parts = [change_of_heads(delta, some) for some in heads.split(step)]
    edges = [
        _edge_of(written_rows(part, 0, part.shape[-2]), own)
        for part, own in zip(parts, signs.split(step), strict=True)
    ]
    return torch.cat(edges)


def _edge_of(
    delta: Float64[Tensor, "*component a b"], signs: Int[Tensor, "*component a b"]
) -> Float64[Tensor, "*component"]:
    flipped = delta * signs
    products = gram(transposed(flipped) if flipped.shape[-2] < flipped.shape[-1] else flipped)
    largest = torch.linalg.eigvalsh(products)[..., -1]
    return edge(delta.square().sum((-2, -1)), largest, (delta.shape[-2], delta.shape[-1]))


def edge(
    total: Float64[Tensor, "*component"],
    flipped: Float64[Tensor, "*component"],
    shape: tuple[int, int],
) -> Float64[Tensor, "*component"]:
    """The edge from the energy of a change and the largest one after the signs were drawn."""
    rows, columns = shape
    iid = total.sqrt() * (rows**0.5 + columns**0.5) / (rows * columns) ** 0.5
    return EDGE_MARGIN * torch.maximum(iid, flipped.clamp(min=0).sqrt())


def benjamini_hochberg(p_values: Float[np.ndarray, " test"]) -> Float[np.ndarray, " test"]:
    """q values; NaN (not tested) stays NaN and does not count."""
    q_values = np.full(p_values.shape, np.nan)
    tested = ~np.isnan(p_values)
    if tested.any():
        q_values[tested] = stats.false_discovery_control(p_values[tested])
    return q_values


@dataclass(frozen=True, eq=False)
class OwnVersusOthers:
    """A component's statistic on its own base weights against those of its peers.

    Attributes:
        effect: Own value minus the mean over peers.
        standard_error: Moderated standard error of ``effect``.
        freedom: Degrees of freedom of the t statistic.
        others: Number of peers.
    """

    effect: Float[np.ndarray, " component"]
    standard_error: Float[np.ndarray, " component"]
    freedom: float
    others: int

    @property
    def t(self) -> Float[np.ndarray, " component"]:
        """The moderated t statistic."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return self.effect / self.standard_error

    def p_two_sided(self) -> Float[np.ndarray, " component"]:
        """Own differs from others."""
        return 2 * stats.t.sf(np.abs(self.t), self.freedom)

    def p_greater(self) -> Float[np.ndarray, " component"]:
        """Own exceeds others."""
        return stats.t.sf(self.t, self.freedom)

    def half_interval(self) -> Float[np.ndarray, " component"]:
        """Half the 95 % interval of ``effect``."""
        return stats.t.ppf(0.975, self.freedom) * self.standard_error


def own_versus_others(
    values: Float[np.ndarray, "head other_head"],
    group: Int[np.ndarray, " head"],
    *,
    alike: float = 0.0,
) -> OwnVersusOthers | None:
    """Moderated t of the diagonal against the columns of other kv groups.

    The variance over peers is shrunk to the layer's median, which is brought to the mean of its
    chi-square distribution. Heads that share a kv head share weights, so they are no peers, and
    peers of one kv head tell less than independent ones (Satterthwaite's degrees of freedom).
    None where fewer than two peers are left: nothing is testable.

    Args:
        values: One row a head's change, one column the base weights it is held against.
        group: The kv head of each.
        alike: Correlation of a row's values at two heads of one kv group under noise.
    """
    peers, groups = group[:, None] != group[None, :], len(np.unique(group)) - 1
    return own_versus_peers(np.diag(values), values, peers, groups=groups, alike=alike)


def own_versus_peers(
    own: Float[np.ndarray, " component"],
    values: Float[np.ndarray, "component peer"],
    peers: Bool[np.ndarray, "component peer"],
    *,
    typical: Bool[np.ndarray, " component"] | None = None,
    least: float = 0.0,
    groups: int = 0,
    alike: float = 0.0,
) -> OwnVersusOthers | None:
    """Moderated t of own values against those with peers; None where one has fewer than two.

    Args:
        own: A component's statistic on its own base weights.
        values: The same on those of others.
        peers: Which of them are peers.
        typical: Components whose spread enters the median; all where None.
        least: Variance below which no value of the statistic varies.
        groups: Number of groups that peers fall into; every peer is its own where 0.
        alike: Correlation of values within a group under noise.
    """
    counts = peers.sum(1)
    others = int(counts.min())
    if others < 2:  # one peer has no spread to compare with
        return None
    of_mean, freedom = _of_correlated_peers(others, groups or others, alike)
    mean = np.where(peers, values, 0).sum(1) / counts
    spread = (np.where(peers, values - mean[:, None], 0) ** 2).sum(1) / counts / (1 - of_mean)
    median = np.median(spread if typical is None or not typical.any() else spread[typical])
    prior, expected = max(2.0, freedom), median * freedom / stats.chi2.median(freedom)
    moderated = np.maximum(least, (prior * expected + freedom * spread) / (prior + freedom))
    error = np.sqrt(moderated * (1 + of_mean))
    return OwnVersusOthers(own - mean, error, prior + freedom, others)


def _of_correlated_peers(others: int, groups: int, alike: float) -> tuple[float, float]:
    """Variance of the mean of peers in units of one peer's, and their degrees of freedom.

    Args:
        others: Number of peers, in ``groups`` of equal size.
        groups: Number of their groups.
        alike: Correlation within a group.
    """
    size = others / groups
    between, within = 1 + (size - 1) * alike, 1 - alike
    first = (groups - 1) * between + groups * (size - 1) * within
    second = (groups - 1) * between**2 + groups * (size - 1) * within**2
    return between / others, first**2 / second


@dataclass(frozen=True, eq=False)
class NeuronGain:
    """cos(change, own base weights) less its mean over all neurons of the layer, and its spread."""

    effect: Float[Tensor, " neuron"]
    spread: Float[Tensor, " neuron"]


@dataclass(frozen=True, eq=False)
class Peers:
    """The directions of all neurons of a layer: what one of them is compared with.

    Attributes:
        centre: Their mean.
        covariance: Their covariance.
    """

    centre: Float64[Tensor, " d_model"]
    covariance: Float64[Tensor, "d_model d_model"]


def peers_of(base: Float[Tensor, "neuron d_model"]) -> Peers:
    """Mean and covariance of the directions of all rows; a row of zeros has the direction zero.

    The covariance is summed from products in float32, as whatever uses it multiplies.
    """
    count, d_model = base.shape
    inverse, centre = base.new_zeros((count, 1)).double(), base.new_zeros(d_model).double()
    for start, stop in slabs(base.shape):
        rows = base[start:stop].double()
        length = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        inverse[start:stop] = torch.where(length > 0, 1 / length, 0)
        centre += (transposed(rows) @ inverse[start:stop, 0]) / count
    covariance = base.new_zeros((d_model, d_model)).double()
    for start, stop in slabs(base.shape):
        directions = (base[start:stop] * inverse[start:stop]).sub_(centre)
        covariance += own_products(directions.float()).double()
    return Peers(centre, covariance / count)


def neuron_gain(peers: Peers, change: Change, cosine: Float64[Tensor, " neuron"]) -> NeuronGain:
    """Own against all others, in closed form: exact mean and variance over the layer's neurons.

    Args:
        peers: ``peers_of`` the base.
        change: Changes, one row a neuron.
        cosine: Of each neuron's change with its own base weights, 0 for an unchanged neuron.
    """
    length, variance = _length_and_variance(peers, change)
    centre = rearrange(peers.centre, "d_model -> d_model 1")
    inverse = torch.where(length > 0, 1 / length, 0)
    mean = rearrange(product(change, centre), "neuron 1 -> neuron") * inverse
    return NeuronGain(cosine - mean, (variance.clamp(min=0).sqrt() * inverse))


def _length_and_variance(
    peers: Peers, change: Change
) -> tuple[Float64[Tensor, " neuron"], Float64[Tensor, " neuron"]]:
    """|d| and d' Cov d of every row d, the latter in float32: a sum without a difference."""
    if isinstance(change, Factored):
        left, right = change.left.double(), change.right.double()
        forms = (right @ transposed(right), right @ peers.covariance @ transposed(right))
        energy, variance = (((left @ form) * left).sum(1) for form in forms)
        return energy.clamp(min=0).sqrt(), variance
    covariance, parts = peers.covariance.float(), []
    for start, stop in slabs(change.shape):
        length = torch.linalg.vector_norm(change[start:stop], dim=1, dtype=torch.float64)
        unit = rearrange(length, "row -> row 1").float().clamp(min=torch.finfo(torch.float32).tiny)
        rows = change[start:stop].float() / unit
        variance = ((rows @ covariance) * rows).sum(1).double() * length.square()
        parts.append(torch.stack([length, variance]))
    length, variance = torch.cat(parts, dim=1)
    return length, variance


@dataclass(frozen=True, eq=False)
class FactorSwap:
    """First-order gain of a circuit when the changes of head h meet the base weights of head g.

    Attributes:
        z: In units of its spread under independent noise in both factors.
        correlation: Of two columns of ``z`` under that noise: heads that share W_V are alike.
    """

    z: Float[Tensor, "head other_head"]
    correlation: Float64[Tensor, "head other_head"]

    def of_mates(self, group: Int[np.ndarray, " head"]) -> float:
        """Mean correlation of two heads of one kv group, 0 where each has its own."""
        mates = (group[:, None] == group[None, :]) & ~np.eye(len(group), dtype=bool)
        return float(self.correlation.numpy()[mates].mean()) if mates.any() else 0.0


def factor_swap(
    left: Factor, right: Factor, partner: Int[Tensor, " d_head"] | None = None
) -> FactorSwap:
    """Swap the factors' changes between heads: (<dO_h, V_g'V_g O_g> + <dV_h, V_g O_g O_g'>) / sd.

    Comparing whole circuits instead is wrong: the change of a circuit contains its own base
    factors, so under pure noise its own spread is 2.7 times that of the others. ``partner`` says
    which entries rotate with the offset (offsets.py); all offsets then count.
    """
    first, second = left.base.double(), right.base.double()
    of_left, of_right = transposed(first) @ first, second @ transposed(second)
    if partner is not None:
        of_left, of_right = (over_offsets(products, partner) for products in (of_left, of_right))
    on_right, on_left = of_left @ second, first @ of_right
    inner = inner_of_heads(right.delta, on_right) + inner_of_heads(left.delta, on_left)
    variance = _mean_square(right.delta) * reduce(on_right.square(), "head k d -> 1 head", "sum")
    variance = variance + _mean_square(left.delta) * reduce(
        on_left.square(), "head d k -> 1 head", "sum"
    )
    correlation = _correlation(
        _mean_square(right.delta).mean() * _grams_of_heads(on_right)
        + _mean_square(left.delta).mean() * _grams_of_heads(on_left)
    )
    return FactorSwap(torch.where(variance > 0, inner / variance.sqrt(), 0), correlation)


def _grams_of_heads(matrices: Float64[Tensor, "head a b"]) -> Float64[Tensor, "head other_head"]:
    return einsum(matrices, matrices, "head a b, other a b -> head other")


def _correlation(
    covariance: Float64[Tensor, "head other_head"],
) -> Float64[Tensor, "head other_head"]:
    deviation = covariance.diagonal().sqrt()
    scale = einsum(deviation, deviation, "head, other -> head other")
    return torch.where(scale > 0, covariance / scale, 0)


def _mean_square(change: Change) -> Float64[Tensor, "head 1"]:
    return rearrange(energy(change), "head -> head 1") / (change.shape[-2] * change.shape[-1])


def inner_of_heads(
    change: Change, others: Float64[Tensor, "head a b"]
) -> Float64[Tensor, "head other_head"]:
    """<change of head h, matrix of head g>."""
    if not isinstance(change, Factored):
        return einsum(change.double(), others, "head a b, other a b -> head other")
    left, right = change.left.double(), change.right.double()
    if right.dim() == 2:
        return einsum(left, others @ transposed(right), "head a r, other a r -> head other")
    return einsum(right, transposed(left) @ others, "head r b, other r b -> head other")


def share_in_spans(
    change: Change, spans: Float64[Tensor, "head d_model d_head"]
) -> Float64[Tensor, "head other_head"]:
    """Share of each head's change [d_head, d_model] in the span of each head's base weights."""
    if isinstance(change, Factored):
        left, onto = change.left.double(), change.right.double() @ spans
        inner, outer = transposed(left) @ left, onto @ transposed(onto)
        inside = einsum(inner, outer, "head r q, other r q -> head other")
    else:
        parts = [
            einsum(change.double(), some, "head k d, other d r -> head other k r")
            .square()
            .sum((2, 3))
            for some in spans.split(max(1, HEADS_AT_ONCE // max(1, len(spans) * spans[0].numel())))
        ]
        inside = torch.cat(parts, dim=1)
    return inside / rearrange(energy(change), "head -> head 1")


def spans_of(base: Float[Tensor, "head d_head d_model"]) -> Float64[Tensor, "head d_model span"]:
    """Orthonormal bases of each head's row space."""
    return torch.linalg.qr(transposed(base.double())).Q


@dataclass(frozen=True)
class SignFlip:
    """A paired sign-flip test.

    Attributes:
        mean: Mean difference.
        p_value: Two-sided.
        p_floor: Smallest p that this number of pairs and draws can reach.
        draws: Sign patterns used.
    """

    mean: float
    p_value: float
    p_floor: float
    draws: int


def sign_flip_test(differences: Float[np.ndarray, " pair"], *, seed: int) -> SignFlip:
    """Two-sided test that paired differences are centred on 0; exact up to 14 pairs."""
    if len(differences) == 1:  # either sign is as far from 0
        return SignFlip(float(differences[0]), 1.0, 1.0, 2)
    found = stats.permutation_test(
        (differences, np.zeros_like(differences)),  # exchanging the two flips the sign
        lambda one, other, axis: (one - other).mean(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=SIGN_DRAWS,
        batch=SIGN_DRAWS,
        random_state=seed,  # type: ignore[call-arg]  # `rng` from scipy 1.15 on
    )
    draws = len(found.null_distribution)
    drawn = draws < 2.0 ** len(differences)
    floor = max(2 / 2.0 ** len(differences), 2 / (draws + 1) if drawn else 0.0)
    return SignFlip(float(differences.mean()), float(found.pvalue), min(floor, 1.0), draws)


def unit_alignment_spread(d_model: int) -> float:
    """Standard deviation of G of one random unit vector in ``d_model`` dimensions."""
    return float(np.sqrt(2 / (3 * (d_model + 2))))


def cosine_spread(rows: int, columns: int) -> float:
    """Standard deviation of the cosine of two random matrices."""
    return 1 / float(np.sqrt(rows * columns))
