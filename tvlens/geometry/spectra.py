"""Singular directions of a matrix and of its change, taken once for all that reads them.

A matrix that did not change, or whose base is zero, has none; nor has one whose orientation is
unknown (a family without a table).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float64
from torch import Tensor

from tvlens.components import KNOWN_PARTS, Component

from .changes import Change, Remainder, energy, gram, product, turned
from .evidence import residual_side
from .matrices import Basis, directions_of_gram, spectral_basis
from .nulls import Signs, above_rounding
from .reading import Pair, Slice, slice_of
from .spikes import Spikes, spikes_above_edge

SMALLEST = 1e-300
"""Keeps the ratio to a rounding floor of zero finite."""
STRONGEST = 30
"""Directions of a change that are known even where fewer stand above its noise edge."""


@dataclass(frozen=True, eq=False)
class Spectra:
    """One matrix, its change, and the singular directions of both.

    Attributes:
        component: Which one.
        weight: Base and tuning vector.
        base: Directions of the base.
        change: Directions of the tuning vector, those above its noise edge or the STRONGEST.
    """

    component: Component
    weight: Slice
    base: Basis
    change: Spikes

    @property
    def part(self) -> str:
        """The part, such as ``W_O``."""
        return self.component.part or ""

    @property
    def resolved(self) -> bool:
        """Whether the change can be told from rounding."""
        return is_resolved(self.weight)


def is_resolved(weight: Slice) -> bool:
    """Whether the change of a whole weight can be told from rounding."""
    total, snr = float(energy(_matrix(weight.change))), np.nan
    if weight.floor is not None:
        snr = total / max(float(weight.floor.sum(dtype=torch.float64)), SMALLEST)
    return bool(above_rounding(np.array([total]), np.array([snr]))[0])


def _matrix(change: Change) -> Change:
    """A change as a matrix: a vector is one row."""
    is_vector = isinstance(change, Tensor) and change.dim() < 2
    return rearrange(change, "entry -> 1 entry") if is_vector else change


def layer_seed(component: Component, seed: int) -> int:
    """The seed of a component's sign-flip draw: that of ``classify``, another in every layer."""
    return seed + 1000 * (0 if component.layer is None else component.layer + 1)


def spikes_of(weight: Slice, *, seed: int, at_least: int = 0) -> Spikes:
    """Triplets of the whole change of a matrix above its noise edge, or ``at_least`` so many."""
    nothing_less = torch.zeros((1, 1), dtype=torch.float64)
    whole = Remainder(weight.base, weight.change, nothing_less)
    return spikes_above_edge(
        whole, float(energy(weight.change)), signs=Signs(seed), at_least=at_least
    )


def onto_residual(
    basis: Basis | Spikes, part: str
) -> Float64[Tensor, "*component d_model direction"]:
    """The directions of a matrix on the side that is the residual stream."""
    return basis.write if residual_side(part) == "write" else basis.read


def writing(change: Change, part: str) -> Change:
    """A change with the residual stream as its last axis."""
    return change if residual_side(part) == "write" else turned(change)


def strongest_onto_residual(
    change: Change, part: str, count: int
) -> Float64[Tensor, "*component d_model direction"]:
    """The ``count`` strongest directions of changes on the residual side; null ones are zero."""
    facing = writing(change, part)
    if facing.shape[-2] >= facing.shape[-1]:
        return directions_of_gram(gram(facing))[1][..., :count]
    values, short = directions_of_gram(gram(turned(facing)))
    values, short = values[..., :count], short[..., :count]
    inverse = torch.where(values > 0, 1 / values, 0)
    return product(turned(facing), short) * rearrange(inverse, "... a -> ... 1 a")


def spectra_of_block(pair: Pair, block: Sequence[Component], *, seed: int) -> list[Spectra]:
    """The changed matrices of one block with their singular directions.

    Args:
        pair: Base and tuned checkpoint.
        block: Its components.
        seed: Seed of the noise edges, as given to ``classify``.
    """
    found: list[Spectra] = []
    for component in block:
        if component.kind != "matrix" or component.part not in KNOWN_PARTS:
            continue
        weight = slice_of(pair.read(component))
        if bool(energy(weight.change) > 0) and bool(weight.base.any()):
            spikes = spikes_of(weight, seed=layer_seed(component, seed), at_least=STRONGEST)
            found.append(Spectra(component, weight, spectral_basis(weight.base), spikes))
    return found
