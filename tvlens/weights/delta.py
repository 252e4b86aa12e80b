"""Differences of weights: dense, in two low-rank factors, DoRA's two parts, or absent."""

from dataclasses import dataclass

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from tvlens.errors import AdapterError, IncomparableModelsError


@dataclass(frozen=True, eq=False)
class Dense:
    """A difference written out.

    Attributes:
        tensor: Tuned minus base, canonical orientation.
    """

    tensor: Float[Tensor, "..."]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the difference."""
        return tuple(self.tensor.shape)

    def dense(self) -> Float[Tensor, "..."]:
        """The difference written out."""
        return self.tensor

    def norm(self) -> float:
        """Frobenius norm, summed in float64."""
        return float(torch.linalg.vector_norm(self.tensor, dtype=torch.float64))


@dataclass(frozen=True, eq=False)
class LowRank:
    """A difference ``left @ right`` that is never written out unless asked for.

    Attributes:
        left: Reads the input.
        right: Writes the output; carries the adapter's scale.
    """

    left: Float[Tensor, "d_in rank"]
    right: Float[Tensor, "rank d_out"]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the difference."""
        return (self.left.shape[0], self.right.shape[1])

    @property
    def rank(self) -> int:
        """Number of columns of the factors, an upper bound of the rank."""
        return self.left.shape[1]

    def dense(self) -> Float[Tensor, "d_in d_out"]:
        """The difference written out."""
        return einsum(self.left, self.right, "d_in rank, rank d_out -> d_in d_out")

    def norm(self) -> float:
        """Frobenius norm through the triangular factor of ``left``, in float64."""
        triangle = torch.linalg.qr(self.left.double(), mode="r").R
        return float(torch.linalg.vector_norm(triangle @ self.right.double()))


@dataclass(frozen=True, eq=False)
class Dora:
    """DoRA's difference, length and direction apart; their sum is the difference.

    DoRA replaces W by ``length * (W + change) / norm(W + change)``, norms by output column and
    ``change`` of low rank (Liu et al. 2024, arXiv:2402.09353, eq. 5).

    Attributes:
        magnitude: ``(length / norm(W) - 1) * W``: the base's own columns, longer or shorter.
        direction: The rest, zero where ``change`` is zero.
    """

    magnitude: Float[Tensor, "d_in d_out"]
    direction: Float[Tensor, "d_in d_out"]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the difference."""
        return tuple(self.magnitude.shape)

    def dense(self) -> Float[Tensor, "d_in d_out"]:
        """The difference written out."""
        return self.magnitude + self.direction

    def norm(self) -> float:
        """Frobenius norm of the whole, summed in float64."""
        return float(torch.linalg.vector_norm(self.dense(), dtype=torch.float64))


@dataclass(frozen=True)
class Absent:
    """A difference that is zero because nothing was trained there.

    Attributes:
        shape: Shape of the weight.
    """

    shape: tuple[int, ...]

    def dense(self) -> Float[Tensor, "..."]:
        """Zeros."""
        return torch.zeros(self.shape)

    def norm(self) -> float:
        """Zero."""
        return 0.0


Delta = Dense | LowRank | Dora | Absent
UNTRAINED = 2.0**-21
"""Relative: a length this close to the base's norm is that norm, as float32 sums it up."""


def dora(
    base: Float[Tensor, "d_in d_out"], change: LowRank, length: Float[Tensor, " d_out"]
) -> Dora:
    """DoRA's difference to ``base``, computed in float64.

    Raises:
        AdapterError: A column of ``base + change`` is zero, so that DoRA divides by zero.
    """
    start = base.double()
    turned = start + change.left.double() @ change.right.double()
    before, after = (torch.linalg.vector_norm(w, dim=0) for w in (start, turned))
    if bool((after == 0).any()):
        raise AdapterError(
            f"column {int((after == 0).nonzero()[0])} of a weight with DoRA has no length to "
            "divide by.",
            hint="The adapter does not belong to this base, or training diverged.",
        )
    wanted = trained_length(before, length)
    longer = torch.where(before > 0, wanted / before - 1, torch.zeros_like(before))
    magnitude = start * longer
    direction = turned * (wanted / after) - start - magnitude
    return Dora(magnitude.to(base.dtype), direction.to(base.dtype))


def trained_length(
    before: Float[Tensor, " d_out"], length: Float[Tensor, " d_out"]
) -> Float[Tensor, " d_out"]:
    """DoRA's lengths in float64, those that are the norms ``before`` training set to them."""
    wanted = length.double()
    return torch.where((wanted - before).abs() <= UNTRAINED * before, before, wanted)


def scaled(delta: Delta, factor: float | int) -> Delta:
    """``factor`` times a difference, in the same form."""
    match delta:
        case Dense():
            return Dense(delta.tensor * factor)
        case LowRank():
            return LowRank(delta.left, delta.right * factor)
        case Dora():
            return Dora(delta.magnitude * factor, delta.direction * factor)
        case Absent():
            return delta


def added(first: Delta, second: Delta) -> Delta:
    """The sum; two low-rank differences stay low rank, two of DoRA keep their parts.

    Raises:
        IncomparableModelsError: The shapes differ.
    """
    _refuse_other_shape(first, second)
    if isinstance(first, Absent):
        return second
    if isinstance(second, Absent):
        return first
    if isinstance(first, LowRank) and isinstance(second, LowRank):
        left = torch.cat([first.left, second.left], dim=1)
        return LowRank(left, torch.cat([first.right, second.right], dim=0))
    if isinstance(first, Dora) and isinstance(second, Dora):
        magnitude = first.magnitude + second.magnitude
        return Dora(magnitude, first.direction + second.direction)
    return Dense(first.dense() + second.dense())


def inner_product(first: Delta, second: Delta) -> float:
    """The sum of products of entries, in float64; factors are not written out.

    Raises:
        IncomparableModelsError: The shapes differ.
    """
    _refuse_other_shape(first, second)
    if isinstance(first, Absent) or isinstance(second, Absent):
        return 0.0
    if isinstance(first, LowRank) and isinstance(second, LowRank):
        lefts = einsum(first.left.double(), second.left.double(), "d_in a, d_in b -> a b")
        rights = einsum(first.right.double(), second.right.double(), "a d_out, b d_out -> a b")
        return float((lefts * rights).sum())
    return float((first.dense().double() * second.dense().double()).sum())


def _refuse_other_shape(first: Delta, second: Delta) -> None:
    if first.shape != second.shape:
        raise IncomparableModelsError(
            f"tuning vectors of shapes {first.shape} and {second.shape} cannot be combined.",
            hint="Both must belong to the same base model.",
        )
