"""Null models: what a tuning vector looks like when it carries no structure.

    rounding        snr = |d|^2 over the expected rounding energy; below SNR nothing is said
    sign flip       singular values of D with the sign of every entry drawn anew: keeps magnitudes,
                    kills structure; one draw, because over 8 draws its edge varies by 0.5 to 0.8 %
    own vs others   a component's change against its own base weights, compared with the base
                    weights of its peers in the same layer: also right where weights and updates
                    share preferred directions, which an isotropic null calls significant
    isotropic       only for whole matrices, which have no peers, and never without an effect floor

Rows are always the *changes* of a component and columns the *base weights* it is held against, so
one strongly changed component does not disturb the test of the others.
"""

from dataclasses import dataclass

import numpy as np
import torch
from einops import einsum, reduce
from jaxtyping import Bool, Float, Int
from scipy import stats
from torch import Tensor

from .matrices import transposed

SNR = 4.0
"""Least energy over rounding energy: at 4 the rounding holds a fifth of the observed energy."""
EDGE_MARGIN = 1.02
"""Over the sign-flip edge: three times its spread (0.5 to 0.8 %) between draws."""
EXACT_LAYERS = 14
"""Up to 2^14 sign patterns are enumerated; beyond, they are drawn."""
SIGN_DRAWS = 20_000
"""Standard error of p = .05 is .0015."""


def above_rounding(
    delta_norm: Float[np.ndarray, " component"], snr: Float[np.ndarray, " component"]
) -> Bool[np.ndarray, " component"]:
    """Whether a change can be told from rounding; an adapter has no snr and passes."""
    return (delta_norm > 0) & (np.isnan(snr) | (snr >= SNR))


def with_random_signs(
    delta: Float[Tensor, "*component a b"], *, seed: int
) -> Float[Tensor, "*component a b"]:
    """The entries of ``delta`` with signs drawn anew."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, delta.shape, generator=generator, dtype=torch.int8)
    return delta * (2 * signs - 1).to(delta)


def noise_edge(delta: Float[Tensor, "*component a b"], *, seed: int) -> Float[Tensor, "*component"]:
    """Largest singular value that entries of these magnitudes reach without structure.

    The larger of the iid edge |D| / sqrt(mn) (sqrt m + sqrt n) and one sign-flip draw, plus 2 %.
    """
    delta = delta.double()
    rows, columns = delta.shape[-2:]
    norm = delta.square().sum((-2, -1)).sqrt()
    iid = norm * (rows**0.5 + columns**0.5) / (rows * columns) ** 0.5
    flipped = with_random_signs(delta, seed=seed)
    if rows < columns:
        flipped = transposed(flipped)
    gram = einsum(flipped, flipped, "... i a, ... i b -> ... a b")
    return EDGE_MARGIN * torch.maximum(iid, torch.linalg.eigvalsh(gram)[..., -1].sqrt())


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
    freedom: int
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
    values: Float[np.ndarray, "head other_head"], group: Int[np.ndarray, " head"]
) -> OwnVersusOthers | None:
    """Moderated t of the diagonal against the columns of other kv groups.

    The variance over peers is shrunk to the layer's median. Heads that share a kv head share
    weights, so they are no peers. None where fewer than two peers are left: nothing is testable.
    """
    peers = group[:, None] != group[None, :]
    counts = peers.sum(1)
    others = int(counts.min())
    if others < 2:  # one peer has no spread to compare with
        return None
    mean = np.where(peers, values, 0).sum(1) / counts
    spread = (np.where(peers, values - mean[:, None], 0) ** 2).sum(1) / (counts - 1)
    freedom = others - 1
    prior = max(2, freedom)
    moderated = (prior * np.median(spread) + freedom * spread) / (prior + freedom)
    error = np.sqrt(moderated * (1 + 1 / others))
    return OwnVersusOthers(np.diag(values) - mean, error, prior + freedom, others)


@dataclass(frozen=True, eq=False)
class NeuronGain:
    """cos(change, own base weights) less its mean over all neurons of the layer, and its spread."""

    effect: Float[Tensor, " neuron"]
    spread: Float[Tensor, " neuron"]


def _unit(rows: Float[Tensor, "neuron d_model"]) -> Float[Tensor, "neuron d_model"]:
    return torch.nn.functional.normalize(rows.double(), dim=1, eps=1e-300)


def neuron_gain(
    base: Float[Tensor, "neuron d_model"], delta: Float[Tensor, "neuron d_model"]
) -> NeuronGain:
    """Own against all others, in closed form: exact mean and variance over the layer's neurons."""
    direction, change = _unit(base), _unit(delta)
    centre = reduce(direction, "neuron d_model -> d_model", "mean")
    centred = direction - centre
    covariance = einsum(centred, centred, "neuron a, neuron b -> a b") / len(base)
    variance = einsum(change @ covariance, change, "neuron a, neuron a -> neuron")
    own = einsum(change, direction, "neuron a, neuron a -> neuron")
    return NeuronGain(own - change @ centre, variance.clamp(min=0).sqrt())


@dataclass(frozen=True, eq=False)
class FactorSwap:
    """First-order gain of a circuit when the changes of head h meet the base weights of head g.

    Attributes:
        z: In units of its spread under independent noise in both factors.
    """

    z: Float[Tensor, "head other_head"]


def factor_swap(
    left_base: Float[Tensor, "head d_model d_head"],
    left_delta: Float[Tensor, "head d_model d_head"],
    right_base: Float[Tensor, "head d_head d_model"],
    right_delta: Float[Tensor, "head d_head d_model"],
) -> FactorSwap:
    """Swap the factors' changes between heads: (<dO_h, V_g'V_g O_g> + <dV_h, V_g O_g O_g'>) / sd.

    Comparing whole circuits instead is wrong: the change of a circuit contains its own base
    factors, so under pure noise its own spread is 2.7 times that of the others.
    """
    left, right = left_base.double(), right_base.double()
    left_gram = einsum(left, left, "head d k, head d l -> head k l")
    right_gram = einsum(right, right, "head k d, head l d -> head k l")
    on_right, on_left = left_gram @ right, left @ right_gram
    inner = einsum(right_delta.double(), on_right, "head k d, other k d -> head other")
    inner = inner + einsum(left_delta.double(), on_left, "head d k, other d k -> head other")
    right_variance = reduce(right_delta.double().square(), "head k d -> head 1", "mean")
    left_variance = reduce(left_delta.double().square(), "head d k -> head 1", "mean")
    variance = right_variance * reduce(on_right.square(), "head k d -> 1 head", "sum")
    variance = variance + left_variance * reduce(on_left.square(), "head d k -> 1 head", "sum")
    return FactorSwap(torch.where(variance > 0, inner / variance.sqrt(), 0))


def share_in_spans(
    delta: Float[Tensor, "head d_head d_model"], base: Float[Tensor, "head d_head d_model"]
) -> Float[Tensor, "head other_head"]:
    """Share of each head's change that lies in the row space of each head's base weights."""
    span = torch.linalg.qr(transposed(base.double())).Q
    inside = einsum(delta.double(), span, "head k d, other d r -> head other k r")
    total = reduce(delta.double().square(), "head k d -> head 1", "sum")
    return reduce(inside.square(), "head other k r -> head other", "sum") / total


@dataclass(frozen=True)
class SignFlip:
    """A paired sign-flip test.

    Attributes:
        mean: Mean difference.
        p_value: Two-sided.
        p_floor: Smallest p that this number of pairs can reach.
        draws: Sign patterns used.
    """

    mean: float
    p_value: float
    p_floor: float
    draws: int


def sign_flip_test(differences: Float[np.ndarray, " layer"], *, seed: int) -> SignFlip:
    """Two-sided test that paired differences are centred on 0; exact up to 14 pairs."""
    count = len(differences)
    if count <= EXACT_LAYERS:
        patterns = (np.arange(2**count)[:, None] >> np.arange(count)) & 1
        extra, floor = 0, 2 / 2**count
    else:
        patterns = np.random.default_rng(seed).integers(0, 2, (SIGN_DRAWS, count))
        extra, floor = 1, max(2 / 2**count, 1 / (SIGN_DRAWS + 1))
    means = np.abs((2 * patterns - 1) @ differences) / count
    observed = abs(float(differences.mean()))
    reached = int((means >= observed * (1 - 1e-12)).sum())  # the observed pattern must count
    p_value = (reached + extra) / (len(means) + extra)
    return SignFlip(float(differences.mean()), p_value, min(floor, 1.0), len(means))


def unit_alignment_spread(d_model: int) -> float:
    """Standard deviation of G of one random unit vector in ``d_model`` dimensions."""
    return float(np.sqrt(2 / (3 * (d_model + 2))))


def cosine_spread(rows: int, columns: int) -> float:
    """Standard deviation of the cosine of two random matrices."""
    return 1 / float(np.sqrt(rows * columns))
