"""Singular directions of a matrix and of its change, taken once for all that reads them.

A matrix that did not change, or whose base is zero, has none; nor has one whose orientation is
unknown (a family without a table).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from torch import Tensor

from tvlens.components import KNOWN_PARTS, Component

from .decompose import Pair, Slice, read_block
from .evidence import residual_side
from .matrices import Basis, spectral_basis, transposed
from .nulls import above_rounding

SMALLEST = 1e-300
"""Keeps the ratio to a rounding floor of zero finite."""


@dataclass(frozen=True, eq=False)
class Spectra:
    """One matrix, its change, and the singular directions of both.

    Attributes:
        component: Which one.
        weight: Base and tuning vector.
        base: Directions of the base.
        delta: Directions of the tuning vector.
    """

    component: Component
    weight: Slice
    base: Basis
    delta: Basis

    @property
    def part(self) -> str:
        """The part, such as ``W_O``."""
        return self.component.part or ""

    @property
    def side(self) -> str:
        """``read`` or ``write``: the side of the matrix that is the residual stream."""
        return residual_side(self.part)

    @property
    def resolved(self) -> bool:
        """Whether the change can be told from rounding."""
        return is_resolved(self.weight.delta, self.weight.floor)


def is_resolved(delta: Float[Tensor, "..."], floor: Float[Tensor, "..."] | None) -> bool:
    """Whether the change of a whole weight can be told from rounding; ``floor`` is per entry."""
    energy = float(delta.double().square().sum())
    snr = np.nan if floor is None else energy / max(float(floor.double().sum()), SMALLEST)
    return bool(above_rounding(np.array([energy]), np.array([snr]))[0])


def onto_residual(basis: Basis, part: str) -> Float[Tensor, "*component d_model direction"]:
    """The directions of a basis on the side that is the residual stream."""
    return basis.write if residual_side(part) == "write" else basis.read


def writing(
    matrix: Float[Tensor, "*component d_in d_out"], part: str
) -> Float[Tensor, "*component other d_model"]:
    """The matrix with the residual stream as its last axis."""
    return matrix if residual_side(part) == "write" else transposed(matrix)


def spectra_of(weights: Mapping[Component, Slice]) -> list[Spectra]:
    """The changed matrices among ``weights`` with their singular directions."""
    return [
        Spectra(one, weight, spectral_basis(weight.base), spectral_basis(weight.delta))
        for one, weight in weights.items()
        if one.kind == "matrix" and one.part in KNOWN_PARTS and _measurable(weight)
    ]


def spectra_of_block(pair: Pair, block: Sequence[Component]) -> list[Spectra]:
    """The changed matrices of one block with their singular directions."""
    return spectra_of(read_block(pair, block))


def _measurable(weight: Slice) -> bool:
    return bool(weight.delta.any()) and bool(weight.base.any())
