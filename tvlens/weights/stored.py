"""From changes of components to new checkpoint tensors: the inverse of reading them.

Reading a component is a rearrangement of a stored tensor (``Layout.canonical``: transposed, cut
out of a fused tensor), at most with a constant added (zero-centred gains). The derivative of a
rearrangement, applied the other way, is its inverse, so autograd puts a change back to where it
came from, bit for bit, for every family that can be read. Entries whose change is zero keep their
bits; the others are ``base + change`` in float64, rounded once to the stored dtype.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tvlens.components import Component
from tvlens.errors import CheckpointError

from .delta import Absent, Delta
from .families.table import Place
from .layout import Layout
from .pair import VOCABULARY_PARTS, Pair


class StoredTensor(NamedTuple):
    """A checkpoint tensor under its stored name, in its stored dtype and orientation."""

    name: str
    tensor: Float[Tensor, "..."]


def new_tensors(base: Pair, deltas: Mapping[Component, Delta]) -> Iterator[StoredTensor]:
    """The stored tensors that ``deltas`` change, each whole; one is in memory at a time.

    A tied unembedding that is stored beside its embedding changes with it.

    Args:
        base: The base matched with itself, under the layout that ``deltas`` have.
        deltas: Changes by component; absent ones change nothing.

    Raises:
        CheckpointError: A file cannot be read, or a new value does not fit the stored dtype.
    """
    for tensor, parts in changed_parts(base.layout, deltas).items():
        stored = base.base_tensors.get(tensor)
        source = stored or base.base_tensors[base.layout.embedding_tensor]
        new = _changed(base, base.base.read(source), parts, name=stored or tensor)
        yield StoredTensor(stored or tensor, new)
        head = base.base_tensors.get(base.layout.unembedding_tensor)
        if base.layout.tied and tensor == base.layout.embedding_tensor and head is not None:
            yield StoredTensor(head, new)


def changed_parts(
    layout: Layout, deltas: Mapping[Component, Delta]
) -> dict[str, list[tuple[Place, Delta]]]:
    """The changes by checkpoint tensor, several where a tensor is fused."""
    found: dict[str, list[tuple[Place, Delta]]] = {}
    for component, delta in deltas.items():
        if not isinstance(delta, Absent):
            place = layout.places[component]
            found.setdefault(place.tensor, []).append((place, delta))
    return found


def scattered(layout: Layout, place: Place, change: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """A canonical change in the orientation and shape of its checkpoint tensor, zero elsewhere."""
    shape = layout.stored_shapes[place.tensor]
    with torch.inference_mode(False), torch.enable_grad():
        whole = torch.zeros(shape, dtype=change.dtype, requires_grad=True)
        (found,) = torch.autograd.grad(layout.canonical(whole, place), whole, change.clone())
    return found


def _changed(
    base: Pair, stored: Float[Tensor, "..."], parts: list[tuple[Place, Delta]], name: str
) -> Float[Tensor, "..."]:
    layout, new = base.layout, stored.clone()
    for place, delta in parts:
        rows = layout.d_vocab if place.part in VOCABULARY_PARTS else stored.shape[0]
        old = stored[:rows]
        change = scattered(layout, place, delta.dense()).reshape(old.shape)
        total = (old.double() + change).to(stored.dtype)
        if not bool(torch.isfinite(total).all()):
            raise CheckpointError(
                f"{name} overflows {stored.dtype} when the tuning vector is added.",
                hint="Scale the vector down, or store the base as float32.",
            )
        new[:rows] = torch.where(change == 0, new[:rows], total)
    return new
