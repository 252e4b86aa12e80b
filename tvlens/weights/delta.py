"""Differences of weights: dense, in two low-rank factors, or absent."""

from dataclasses import dataclass

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from tvlens.errors import IncomparableModelsError


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


Delta = Dense | LowRank | Absent


def scaled(delta: Delta, factor: float | int) -> Delta:
    """``factor`` times a difference, in the same form."""
    match delta:
        case Dense():
            return Dense(delta.tensor * factor)
        case LowRank():
            return LowRank(delta.left, delta.right * factor)
        case Absent():
            return delta


def added(first: Delta, second: Delta) -> Delta:
    """The sum; two low-rank differences stay low rank.

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
