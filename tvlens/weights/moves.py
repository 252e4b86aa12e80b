"""Moves along the inner axes of a block: other coordinates, the same function.

What the parameters of a block compute does not depend on how its inner axes are numbered and
scaled. An ``AxisMove`` renumbers the units of such an axis (neurons, heads, entries of a norm) and
gives each unit a new basis:

    x'[unit] = x[order[unit]] @ M[unit]

What is multiplied along that axis afterwards takes the same move with inverse(M).T in place of M,
the *dual*, and both changes cancel:

    norm gain and bias        ->  rows of the matrices that read the norm
    W_V, b_V (kv heads)       ->  rows of W_O (query heads of the kv group)
    W_K, b_K (kv heads)       ->  columns of W_Q, b_Q (query heads of the kv group)
    W_in, b_in (neurons)      ->  rows of W_out; W_gate, b_gate take the order alone

Weights are effective and canonical (``x @ W``). Rounding errors that are independent from entry to
entry have the energy ``E @ M**2`` after the move.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from einops import einsum, rearrange, repeat
from jaxtyping import Float, Float64, Int
from torch import Tensor

GAIN, SCALE, ROTATION, PERMUTATION = "gain", "scale", "rotation", "permutation"
"""What a move is called in reports."""
READS = " read"
"""Ends the name of the dual of a norm's axis."""
AXES: Mapping[str, tuple[str, ...]] = {
    "ln1.w": ("ln1",),
    "ln1.b": ("ln1",),
    "W_Q": ("ln1 read", "query"),
    "W_K": ("ln1 read", "key"),
    "W_V": ("ln1 read", "value"),
    "b_Q": ("query",),
    "b_K": ("key",),
    "b_V": ("value",),
    "W_O": ("result", ""),
    "q_norm.w": ("q_norm",),
    "k_norm.w": ("k_norm",),
    "ln2.w": ("ln2",),
    "ln2.b": ("ln2",),
    "W_gate": ("ln2 read", "gate"),
    "W_in": ("ln2 read", "neuron"),
    "b_gate": ("gate",),
    "b_in": ("neuron",),
    "W_out": ("activation", ""),
    "ln_final.w": ("ln_final",),
    "ln_final.b": ("ln_final",),
    "W_U": ("ln_final read", ""),
}
"""Which moves act along the axes of a part; parts that are not here have fixed coordinates."""
NAMES: Mapping[str, str] = {
    "ln1": GAIN,
    "ln2": GAIN,
    "ln_final": GAIN,
    "k_norm": GAIN,
    "neuron": SCALE,
    "key": ROTATION,
    "value": ROTATION,
}
"""What a new basis of an axis is called; duals go by the name of what they follow."""


@dataclass(frozen=True, eq=False)
class AxisMove:
    """Renumbered units of one axis, each in a new basis.

    Attributes:
        order: The number that each unit had before the move.
        matrices: The new basis of each unit, ``x @ M``; a neuron's is one number.
    """

    order: Int[Tensor, " unit"]
    matrices: Float64[Tensor, "unit width width"]

    @classmethod
    def scaling(
        cls, factors: Float64[Tensor, " unit"], order: Int[Tensor, " unit"] | None = None
    ) -> "AxisMove":
        """Units of one entry each, multiplied by ``factors`` after they are renumbered."""
        numbers = torch.arange(len(factors)) if order is None else order
        return cls(numbers, rearrange(factors, "unit -> unit 1 1"))

    @property
    def reorders(self) -> bool:
        """Whether a unit gets another number."""
        return not torch.equal(self.order, torch.arange(len(self.order)))

    @property
    def distance(self) -> float:
        """The largest entry of any basis less the identity."""
        return float((self.matrices - _identities(*self.matrices.shape[:2])).abs().max())

    def dual(self, order: Int[Tensor, " unit"] | None = None) -> "AxisMove":
        """The move of what is multiplied along the axis, so that the product stays.

        Args:
            order: Of the units there, where several share one unit here (query heads of a kv
                head): then there is a multiple of the units, neighbours belonging together.
        """
        inverse = (
            1 / self.matrices
            if self.matrices.shape[-1] == 1
            else rearrange(torch.linalg.inv(self.matrices), "unit a b -> unit b a")
        )
        if order is None:
            return AxisMove(self.order, inverse)
        share = len(order) // len(self.order)
        return AxisMove(order, repeat(inverse, "unit a b -> (unit share) a b", share=share))

    def along_last(self, tensor: Float64[Tensor, "..."], power: int = 1) -> Float64[Tensor, "..."]:
        """The tensor moved along its last axis, by matrices to an elementwise power."""
        width = self.matrices.shape[-1]
        units = rearrange(tensor, "... (unit width) -> ... unit width", width=width)
        ordered = units[..., self.order, :] if self.reorders else units
        matrices = self.matrices**power
        if width == 1:
            moved = ordered * rearrange(matrices, "unit 1 1 -> unit 1")
        else:
            moved = einsum(ordered, matrices, "... unit a, unit a b -> ... unit b")
        return rearrange(moved, "... unit width -> ... (unit width)")

    def along_first(self, tensor: Float64[Tensor, "row column"], power: int = 1) -> Tensor:
        """The tensor moved along its first axis."""
        turned = self.along_last(rearrange(tensor, "row column -> column row"), power)
        return rearrange(turned, "column row -> row column")


@dataclass(frozen=True, eq=False)
class Moves:
    """The moves of one block's axes, by the names in ``AXES``; axes without one stay."""

    axes: Mapping[str, AxisMove] = field(default_factory=dict)

    def moved(self, part: str, weight: Float[Tensor, "..."]) -> Float64[Tensor, "..."]:
        """An effective canonical weight in the new coordinates."""
        return self._through(part, weight.double(), power=1)

    def energy(self, part: str, energy: Float[Tensor, "..."]) -> Float64[Tensor, "..."]:
        """The energy of independent errors of a weight, in the new coordinates."""
        return self._through(part, energy.double(), power=2)

    def touches(self, part: str, beyond: float = 0.0) -> bool:
        """Whether a part gets another basis, farther than ``beyond`` from the old one."""
        return any(move.distance > beyond for move in self._of(part) if move is not None)

    def orders(self) -> "Moves":
        """The new numbers alone, in the old bases."""
        return Moves(
            {
                name: AxisMove(move.order, _identities(*move.matrices.shape[:2]))
                for name, move in self.axes.items()
            }
        )

    def names(self, beyond: float = 0.0) -> set[str]:
        """What the moves are called, those of bases within ``beyond`` of the old left out."""
        found = {PERMUTATION for move in self.axes.values() if move.reorders}
        for axis, name in NAMES.items():
            if axis in self.axes and self.axes[axis].distance > beyond:
                found.add(name)
        return found

    def _of(self, part: str) -> list[AxisMove | None]:
        return [self.axes.get(axis) for axis in AXES.get(part, ())]

    def _through(self, part: str, tensor: Float64[Tensor, "..."], power: int) -> Tensor:
        moves = self._of(part)
        if moves and (last := moves[-1]) is not None:
            tensor = last.along_last(tensor, power)
        if len(moves) > 1 and (first := moves[0]) is not None:
            tensor = first.along_first(tensor, power)
        return tensor


def _identities(units: int, width: int) -> Float64[Tensor, "unit width width"]:
    return repeat(torch.eye(width, dtype=torch.float64), "a b -> unit a b", unit=units)
