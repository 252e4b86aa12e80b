"""Singular directions of a matrix and of its change, taken once for all that reads them.

A matrix that did not change, or whose base is zero, has none; nor has one whose orientation is
unknown (a family without a table).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from tvlens.components import KNOWN_PARTS, Component

from .changes import Change, transposed, written_rows
from .evidence import residual_side
from .matrices import alignment, spectral_basis
from .nulls import above_rounding
from .reading import Pair, Slice, slice_of

SMALLEST = 1e-300
"""Keeps the ratio to a rounding floor of zero finite."""


@dataclass(frozen=True, eq=False)
class Triplets:
    """Singular triplets with the directions of both sides written out, strongest first.

    Attributes:
        read: Directions of the input side, zero where the value is.
        values: Singular values.
        write: Directions of the output side.
    """

    read: Float64[Tensor, "*component d_in direction"]
    values: Float64[Tensor, "*component direction"]
    write: Float64[Tensor, "*component d_out direction"]

    @property
    def rank(self) -> int:
        """Directions that every component has."""
        return int((self.values > 0).sum(-1).min())

    def self_alignment(self, dimension: int) -> float:
        """G of one matrix itself on a side of ``dimension``: what a pure gain would show."""
        energies = self.values.square()
        rank = torch.tensor(float(self.rank), dtype=torch.float64)
        return float(alignment(energies, energies.sum(-1), rank, dimension))

    def write_alignment(self, vectors: Float64[Tensor, "row d_out"]) -> Float64[Tensor, " row"]:
        """G_rel of vectors on the write side of one matrix."""
        energies = (vectors @ self.write).square()
        rank = torch.full((len(vectors),), float(self.rank), dtype=torch.float64)
        found = alignment(energies, vectors.square().sum(1), rank, vectors.shape[1])
        return found / self.self_alignment(vectors.shape[1])


def triplets_of(matrix: Float[Tensor, "*component d_in d_out"]) -> Triplets:
    """The singular triplets of a matrix, or of several of one shape."""
    basis = spectral_basis(matrix)
    return Triplets(basis.read, basis.values, basis.write)


@dataclass(frozen=True, eq=False)
class Spectra:
    """One matrix, its change, and the singular directions of both.

    Attributes:
        component: Which one.
        weight: Base and tuning vector.
        change: The tuning vector written out.
        base: Directions of the base.
        delta: Directions of the tuning vector.
    """

    component: Component
    weight: Slice
    change: Float[Tensor, "d_in d_out"]
    base: Triplets
    delta: Triplets

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
        return is_resolved(self.change, self.weight.floor)


def is_resolved(delta: Float[Tensor, "..."], floor: Float[Tensor, "..."] | None) -> bool:
    """Whether the change of a whole weight can be told from rounding; ``floor`` is per entry."""
    energy = float(delta.double().square().sum())
    snr = np.nan if floor is None else energy / max(float(floor.double().sum()), SMALLEST)
    return bool(above_rounding(np.array([energy]), np.array([snr]))[0])


def onto_residual(basis: Triplets, part: str) -> Float[Tensor, "*component d_model direction"]:
    """The directions of a basis on the side that is the residual stream."""
    return basis.write if residual_side(part) == "write" else basis.read


def writing(
    matrix: Float[Tensor, "*component d_in d_out"], part: str
) -> Float[Tensor, "*component other d_model"]:
    """The matrix with the residual stream as its last axis."""
    return matrix if residual_side(part) == "write" else transposed(matrix)


def written_out(change: Change) -> Float[Tensor, "*component a b"]:
    """A change as one tensor: itself, or the product of its factors in float32."""
    if isinstance(change, Tensor):
        return change
    return written_rows(change, 0, change.shape[-2]).float()


def spectra_of(weights: Mapping[Component, Slice]) -> list[Spectra]:
    """The changed matrices among ``weights`` with their singular directions."""
    found = []
    for one, weight in weights.items():
        if one.kind != "matrix" or one.part not in KNOWN_PARTS or not bool(weight.base.any()):
            continue
        change = written_out(weight.change)
        if bool(change.any()):
            base, delta = triplets_of(weight.base), triplets_of(change)
            found.append(Spectra(one, weight, change, base, delta))
    return found


def spectra_of_block(pair: Pair, block: Sequence[Component]) -> list[Spectra]:
    """The changed matrices of one block with their singular directions."""
    matrices = (component for component in block if component.kind == "matrix")
    return spectra_of({component: slice_of(pair.read(component)) for component in matrices})
