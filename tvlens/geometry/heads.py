"""Measures of attention heads: the circuits OV and QK from their factors.

A head writes x @ W_V @ W_O; its OV circuit has rank d_head in d_model x d_model. The change of a
product follows exactly, without a cross term, from the midpoint rule

    delta(V O) = V_mid dO + dV O_mid,        V_mid = V + dV / 2,  O_mid = O + dO / 2

which is 10^3 to 10^5 times more accurate in float32 than V' O' - V O. Both the base circuit and its
change live in span[V_mid, dV] on the left and span[O_mid', dO'] on the right, so two QR factors
leave *cores* of at most 2 d_head x 2 d_head that hold every invariant measure; no d_model x d_model
matrix is formed. QK is the content part W_Q @ W_K' (no rotary phase, no position).
W_V -> W_V A, W_O -> A^-1 W_O changes neither circuit; single columns of the factors do change.
"""

from dataclasses import dataclass

import torch
from einops import einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor

from .matrices import transposed


@dataclass(frozen=True, eq=False)
class Factor:
    """One factor of the circuits of a layer, one slice a head.

    Attributes:
        base: Base weights.
        delta: Tuning vector.
        floor: Expected rounding energy per entry, None where there is none.
    """

    base: Float[Tensor, "head a b"]
    delta: Float[Tensor, "head a b"]
    floor: Float[Tensor, "head a b"] | None = None

    @property
    def middle(self) -> Float[Tensor, "head a b"]:
        """Halfway between base and tuned, float64."""
        return self.base.double() + self.delta.double() / 2

    @property
    def swapped(self) -> "Factor":
        """The factor with its two sides exchanged."""
        floor = None if self.floor is None else transposed(self.floor)
        return Factor(transposed(self.base), transposed(self.delta), floor)

    def of_heads(self, kv_index: Int[Tensor, " head"]) -> "Factor":
        """The factor that each query head reads, one slice a query head."""
        floor = None if self.floor is None else self.floor[kv_index]
        return Factor(self.base[kv_index], self.delta[kv_index], floor)


@dataclass(frozen=True, eq=False)
class CircuitCores:
    """A circuit and its change in coordinates of their common spans.

    Attributes:
        base: Core of the base circuit.
        delta: Core of its change.
        floor_energy: Expected rounding energy of the change, None where there is none.
    """

    base: Float[Tensor, "head left right"]
    delta: Float[Tensor, "head left right"]
    floor_energy: Float[Tensor, " head"] | None


def slices_of_heads(
    matrix: Float[Tensor, "d_in d_out"], part: str, n_heads: int
) -> Float[Tensor, "head a b"]:
    """Cut a matrix into heads: W_O by its rows, W_Q W_K W_V by their columns."""
    if part == "W_O":
        return rearrange(matrix, "(head d_head) d_model -> head d_head d_model", head=n_heads)
    return rearrange(matrix, "d_model (head d_head) -> head d_model d_head", head=n_heads)


def kv_index_of_heads(n_heads: int, n_kv_heads: int) -> Int[Tensor, " head"]:
    """The kv head that each query head reads; empty where no head is known."""
    return torch.arange(n_heads) // max(1, n_heads // max(1, n_kv_heads))


def _floor_energy(left: Factor, right: Factor) -> Float[Tensor, " head"] | None:
    """Expected |V_mid nO + nV O_mid|^2 of independent rounding errors nO, nV."""
    if left.floor is None or right.floor is None:
        return None
    left_norms = left.middle.square().sum(1)
    right_norms = right.middle.square().sum(2)
    from_right = einsum(left_norms, right.floor.double(), "head k, head k right -> head")
    return from_right + einsum(left.floor.double(), right_norms, "head left k, head k -> head")


def circuit_cores(left: Factor, right: Factor) -> CircuitCores:
    """Cores of the circuits left @ right; ``left`` is [d_model, d_head], ``right`` its reverse."""
    left_span = torch.cat([left.middle, left.delta.double()], dim=2)
    right_span = torch.cat([right.middle, right.delta.double()], dim=1)
    q_left = torch.linalg.qr(left_span).Q
    q_right = torch.linalg.qr(transposed(right_span)).Q

    def left_core(factor: Float[Tensor, "head d_model k"]) -> Float[Tensor, "head left k"]:
        return einsum(q_left, factor.double(), "head d left, head d k -> head left k")

    def right_core(factor: Float[Tensor, "head k d_model"]) -> Float[Tensor, "head k right"]:
        return einsum(factor.double(), q_right, "head k d, head d right -> head k right")

    base = left_core(left.base) @ right_core(right.base)
    delta = left_core(left.middle) @ right_core(right.delta)
    delta = delta + left_core(left.delta) @ right_core(right.middle)
    return CircuitCores(base, delta, _floor_energy(left, right))
