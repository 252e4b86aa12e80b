"""Circuits whose form depends on the distance of two tokens: rotary positions.

Where a key stands m tokens before a query, rotary attention scores with W_Q R_m W_K', and R_m
turns every pair of a head's entries by its own angle. The mean over all m of the inner product of
two such circuits is

    < Q R K', Q2 R K2' > = < Q' Q2, P(K' K2) >,     P(X) = the mean over m of R_m X R_m'

P keeps of each pair's 2 x 2 block its part a I + b J, of entries that do not rotate everything, and
of pairs against other entries nothing. In complex numbers q = q_1 + i q_2, k = k_1 + i k_2 that is
the sum over pairs of |q k*|^2: the forms A_f = q_1 k_1' + q_2 k_2' and B_f = q_1 k_2' - q_2 k_1' of
each frequency, and nothing else. One complex number a pair may go from q to k unnoticed, and no
more; the content part, m = 0, would take any basis for equal. Without rotation P is the identity.
"""

from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Bool, Float64, Int
from torch import Tensor

from .heads import Coordinates


def _pair_turn(partner: Int[Tensor, " d_head"]) -> Float64[Tensor, "d_head d_head"]:
    """A quarter turn of every pair, nothing for an entry that is its own partner."""
    entry = torch.arange(len(partner))
    turn = torch.zeros((len(partner), len(partner)), dtype=torch.float64)
    turn[entry, partner] = torch.where(partner < entry, -1.0, 1.0).double()
    return turn


def _kept(partner: Int[Tensor, " d_head"]) -> Bool[Tensor, "d_head d_head"]:
    entry = torch.arange(len(partner))
    column = rearrange(entry, "entry -> entry 1")
    still = partner == entry
    pairs = (column == entry) | (rearrange(partner, "entry -> entry 1") == entry)
    return pairs | (rearrange(still, "entry -> entry 1") & still)


def over_offsets(
    products: Float64[Tensor, "*head d_head d_head"], partner: Int[Tensor, " d_head"]
) -> Float64[Tensor, "*head d_head d_head"]:
    """P: the mean of R X R' over all offsets (module docstring)."""
    turn = _pair_turn(partner)
    return torch.where(_kept(partner), (products + turn @ products @ turn.mT) / 2, 0)


def _inner(
    first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], partner: Int[Tensor, " d_head"]
) -> Float64[Tensor, " head"]:
    """Mean inner product of two circuits, each a pair of factors in coordinates."""
    left, right = (one.mT @ two for one, two in zip(first, second, strict=True))
    return (left * over_offsets(right, partner)).sum((1, 2))


@dataclass(frozen=True, eq=False)
class MeanChange:
    """A circuit and its change, in the mean over all offsets.

    Attributes:
        gain: <D, M> / |M|^2.
        kappa: Cosine of D and M.
        from_right: Share of |left dR'|^2 in |left dR'|^2 + |dL right'|^2.
    """

    gain: Float64[Tensor, " head"]
    kappa: Float64[Tensor, " head"]
    from_right: Float64[Tensor, " head"]


def mean_change(
    left: Coordinates, right: Coordinates, partner: Int[Tensor, " d_head"]
) -> MeanChange:
    """Gain of circuits left R right' by the midpoint rule, D = L_mid R dR' + dL R R_mid'."""
    whole = (left.base, right.base)
    parts = ((left.middle, right.delta), (left.delta, right.middle))
    on_right, on_left = (_inner(part, part, partner) for part in parts)
    energy = on_right + on_left + 2 * _inner(parts[0], parts[1], partner)
    along = _inner(parts[0], whole, partner) + _inner(parts[1], whole, partner)
    base = _inner(whole, whole, partner)
    size = (base * energy.clamp(min=0)).sqrt()
    return MeanChange(
        gain=torch.where(base > 0, along / base, torch.nan),
        kappa=torch.where(size > 0, along / size, torch.nan).clamp(-1, 1),
        from_right=(on_right / (on_right + on_left)).nan_to_num(),
    )
