"""Evidence about embeddings: what their rows, a vector a token, have in common.

An embedding is a matrix so tall that only its d_model Grams are kept: of the base, of the change,
of the two, and of the change with other signs, each summed over pieces of the vocabulary. They hold
all that the rules for whole matrices need: with G = W'W, X = W'D, K = D'D and g the global gain,

    (D - g W)'(D - g W) = K - g (X + X') + g^2 G         whose eigenvectors v are the spikes
    u'W v / sqrt(|W'u| |W v|) = v'Y'v / sqrt(|Y v| s |W v|)  with u = (D - g W) v / s,  Y = X - g G

The edge of the noise is that of the signs of D, not of D - g W, less the share of the gain: the
gain is not known before the last piece. Where the gain is small the two are the same; where it is
large the edge is high, because tokens have different lengths, and the label is that of the gain.
A small fine-tune moves few tokens; how many hold half of the energy is a row of ``tests``.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from .changes import transposed
from .eigen import largest_eigenvalue, strongest
from .evidence import GAIN_COSINE, Evidence, Keys, residual_side, statistic_rows
from .matrices import Basis, Products, directions_of_gram, seen_products
from .matrix_evidence import MatrixStructure, matrix_gain, structure_of, whole_evidence
from .measures import Vocabulary
from .nulls import EDGE_MARGIN, edge

DRAWS_APART = 2 * 2**0.5
"""Two standard deviations of the difference of two draws: the change and the one with its signs."""
TRACY_WIDOM = 1.27
"""Standard deviation of the Tracy-Widom law of real matrices (Johnstone 2001)."""


@dataclass(frozen=True, eq=False)
class TokenSpikes:
    """Directions that the changes of the tokens share, above the edge of the noise.

    Attributes:
        vectors: On the d_model side.
        shares: Shares of the energy that the global gain leaves.
        cosines: How far each is a gain of base directions (``gain_cosines``).
    """

    vectors: Float64[Tensor, "d_model spike"]
    shares: Float64[Tensor, " spike"]
    cosines: Float64[Tensor, " spike"]


def token_spikes(found: Vocabulary, gain: float) -> TokenSpikes:
    """Spikes of the change less its global gain (module docstring)."""
    own, base, both, flipped = (products.double() for products in found.grams)
    whole = found.sums.grouped(1)
    total, left = float(whole.residual), float(whole.residual / whole.delta)
    rest = own - gain * (both + transposed(both)) + gain**2 * base
    shape = (len(found.sums.delta), len(own))
    limit = edge(torch.tensor(total).double(), left * largest_eigenvalue(flipped), shape)
    limit = limit * max(1.0, edge_margin(found.sums.delta, len(own)) / EDGE_MARGIN)
    energies, vectors = strongest(rest, float(limit.square()))
    onto = (both - gain * base) @ vectors
    through = (vectors * onto).sum(0) / energies.sqrt()
    read = onto.norm(dim=0) / energies.sqrt()
    written = (vectors * (base @ vectors)).sum(0).clamp(min=0).sqrt()
    size = (read * written).sqrt().clamp(min=torch.finfo(torch.float64).tiny)
    return TokenSpikes(vectors, energies / total, through / size)


def edge_margin(energies: Float64[Tensor, " token"], d_model: int) -> float:
    """How much one draw's largest singular value may exceed another's by chance.

    A fine-tune that moves few tokens has a small matrix of noise, whose edge varies more than the
    2 % of ``EDGE_MARGIN``: by half of Johnstone's width of the largest eigenvalue over its centre,
    with (sum e)^2 / sum e^2 tokens of energy e.
    """
    tokens = float((energies.sum().square() / energies.square().sum()).clamp(min=2))
    sides = ((tokens - 1) ** 0.5, d_model**0.5)
    width = (1 / sides[0] + 1 / sides[1]) ** (1 / 3) / sum(sides)
    return 1 + DRAWS_APART * TRACY_WIDOM * width / 2


def tokens_with_half(energies: Float64[Tensor, " token"]) -> int:
    """The fewest tokens that hold half of the energy."""
    summed = energies.sort(descending=True).values.cumsum(0)
    return int((summed < summed[-1] / 2).sum()) + 1


def _structure(found: Vocabulary, basis: Basis, gain: float, part: str) -> MatrixStructure:
    spikes = token_spikes(found, gain)
    plain = spikes.cosines.abs() <= GAIN_COSINE
    return structure_of(spikes.shares[plain], spikes.vectors[:, plain], basis, part)


def embedding_evidence(keys: Keys, found: Vocabulary) -> Evidence:
    """The rules of a whole matrix, from Grams; and the tokens that hold half of the change."""
    part, tokens = str(keys["part"][0]), len(found.sums.delta)
    own, base, both, _ = (products.double() for products in found.grams)
    no_rows = base.new_zeros((0, len(base)))
    basis = Basis(no_rows, part == "W_U", base, *directions_of_gram(base))
    seen = seen_products(basis, Products(both, own))
    gain, left = matrix_gain(seen, basis, tokens * len(base)), found.sums.grouped(1).residual
    rest = MatrixStructure(0.0, torch.nan, torch.nan, 0)
    if float(left) > 0:
        rest = _structure(found, basis, gain.gain, part)
    whole = whole_evidence(keys, gain, rest, shape=(tokens, len(base)))
    half = tokens_with_half(found.sums.delta)
    moved = statistic_rows(
        keys,
        "tokens_with_half_the_change",
        side=residual_side(part),
        null="none",
        effect=[half / tokens],
        k=half,
    )
    return Evidence(whole.components, [*whole.statistics, moved])
