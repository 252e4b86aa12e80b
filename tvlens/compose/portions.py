"""Portions: what of a change of weights an edit lets in, where a choice of entries cannot say it.

A portion takes of each component's change D, given its base weight W (both canonical, ``x @ W``),

    parts of geometry     the chosen parts of D in W's own singular directions; all of them sum to
                          D (``geometry.splits``; global, scale, within, reroute, new_read, ...)
    what it writes along directions u_1 ... u_k          D Q Q'     with Q an orthonormal basis
    what it reads along directions r_1 ... r_k           Q Q' D     of their span

and what it takes is a tuning vector like any other: on one resident model it is swept, grafted,
taken away (``vector - portion``) or saved. Worked out in float64 and rounded once to the vector's
dtype. Directions give factors of their number, and of what comes in factors at most as many.

    model, parts = EditableModel.of_pair(pair), geometric_parts("new_write,new_both")
    new = portion(model.vector, parts, pair.stored_weight)
    model.with_vector(new).edited(scaled(1.0))                   # the base with these parts
    model.with_vector(model.vector - new).edited(scaled(1.0))    # the tuned model without them

Only matrices have geometric parts: norms, biases and embeddings are in no portion of them, and
``left_out`` says so. A direction belongs to a matrix, or to the rows of W_O or W_out of one head
or neuron; of a head's OV circuit what W_O's change writes along it is taken, and nothing of W_V's.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import torch
from einops import rearrange
from jaxtyping import Float, Float64
from torch import Tensor

from tvlens.components import KNOWN_PARTS, Component, Side
from tvlens.errors import SelectionError
from tvlens.geometry.changes import Change, Factored
from tvlens.geometry.splits import GEOMETRIC_PARTS, new_part, parts_of_change
from tvlens.weights.delta import Absent, Delta, Dense, LowRank, without_zeros
from tvlens.weights.layout import Layout
from tvlens.weights.pair import Pair
from tvlens.weights.slices import Kept, cut_axis, cuts
from tvlens.weights.vector import TuningVector, restricted

DEPENDENT = 1e-5
"""A unit vector that reaches no further out of the span of others adds float32's rounding alone."""
WeightOf = Callable[[Component], Float[Tensor, "..."]]
"""The base's stored weight of a component, canonical."""


@runtime_checkable
class Portion(Protocol):
    """What is taken of the changes of a model, one component at a time."""

    @property
    def text(self) -> str:
        """What it is, for the name of the vector."""
        ...

    def of(self, component: Component, base: Float[Tensor, "..."], delta: Delta) -> Delta | None:
        """What it takes of a component's change; None where it says nothing of the component."""
        ...


def portion(vector: TuningVector, taken: Portion, weight: WeightOf) -> TuningVector:
    """What a portion takes of a tuning vector; what it says nothing of is zero.

    Args:
        vector: The vector.
        taken: The portion.
        weight: Gives the base's weights, asked one at a time; ``Pair.stored_weight``.

    Raises:
        SelectionError: It takes nothing of this vector.
    """
    deltas: dict[Component, Delta] = {}
    for component, delta in vector.items():
        if isinstance(delta, Absent):
            continue
        found = taken.of(component, weight(component), delta)
        if found is not None and not isinstance(found, Absent):
            deltas[component] = found
    if not deltas:
        raise SelectionError(f"{vector.name} has nothing of {taken.text}.")
    return replace(vector, name=f"{vector.term}[{taken.text}]", deltas=deltas, selection=None)


@dataclass(frozen=True)
class GeometricParts:
    """Some geometric parts of every matrix's change.

    Attributes:
        names: Of ``GEOMETRIC_PARTS``.
    """

    names: frozenset[str]

    @property
    def text(self) -> str:
        """The names, in the order of the columns ``e_*``."""
        return ", ".join(name for name in GEOMETRIC_PARTS if name in self.names)

    def of(self, component: Component, base: Float[Tensor, "..."], delta: Delta) -> Delta | None:
        """The sum of the parts: the change itself, as it is, where these are all."""
        if not has_parts(component) or isinstance(delta, Absent):
            return None
        part = str(component.part)
        if self.names >= parts_in(part):
            return delta
        total = torch.zeros(delta.shape, dtype=torch.float64)
        for name, values in parts_of_change(base, _change(delta), part):
            if name in self.names:
                total += values
        return without_zeros(Dense(total.to(delta.dtype)))


def geometric_parts(text: str) -> GeometricParts:
    """Read names divided by commas.

    Raises:
        SelectionError: There is no part of such a name.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in GEOMETRIC_PARTS]
    if unknown or not names:
        raise SelectionError(
            f"there is no geometric part {', '.join(unknown) or text!r}.",
            hint=f"The parts are {', '.join(GEOMETRIC_PARTS)}.",
        )
    return GeometricParts(frozenset(names))


def parts_in(part: str) -> frozenset[str]:
    """The parts that the change of a matrix has: what is new is a read or a write."""
    other = {"new_read", "new_write"} - {new_part(part)}
    return frozenset(GEOMETRIC_PARTS) - other


def has_parts(component: Component) -> bool:
    """Whether a component's change has geometric parts: a matrix whose orientation is known."""
    return component.kind == "matrix" and component.part in KNOWN_PARTS


def check_parts(taken: GeometricParts, pair: Pair) -> None:
    """Refuse parts that no changed matrix of a pair has, before anything is loaded or written.

    Raises:
        SelectionError: It is so.
    """
    of_these = (c for c in pair.components if has_parts(c) and taken.names & parts_in(str(c.part)))
    if all(isinstance(pair.change(component)[1], Absent) for component in of_these):
        raise SelectionError(
            f"{pair.tuned_name} has nothing of {taken.text}.",
            hint="Matrices that write the residual stream have new_write, those that read it "
            "new_read.",
        )


def left_out(vector: TuningVector, taken: GeometricParts) -> tuple[str, ...]:
    """What of a vector has no geometric part or none of these, in sentences."""
    changed = {c: d.norm() for c, d in vector.items() if not isinstance(d, Absent)}
    whole = math.hypot(*changed.values()) or 1.0
    splitless = {c: size for c, size in changed.items() if not has_parts(c)}
    notes = []
    if splitless:
        kinds = ", ".join(dict.fromkeys(c.kind for c in splitless))
        share = (math.hypot(*splitless.values()) / whole) ** 2
        notes.append(
            f"{len(splitless)} changed components ({kinds}) have no geometric parts and are left "
            f"out: {share:.2%} of the vector's squared length."
        )
    matrices = [c for c in changed if has_parts(c)]
    without = [c for c in matrices if not taken.names & parts_in(str(c.part))]
    if without:
        named = ", ".join(dict.fromkeys(str(c.part) for c in without))
        notes.append(f"{named} have no part {taken.text}: all of their change is left out.")
    return tuple(notes)


@dataclass(frozen=True, eq=False)
class Along:
    """What some components' changes write, or read, along directions.

    Attributes:
        directions: For a matrix, a head's W_O or a neuron's W_out its vectors, of any length.
        layout: The numbers of the model, which say which rows a head or neuron has.
        side: Whether the vectors are written (``D Q Q'``) or read (``Q Q' D``).
        text: What they are called.
    """

    directions: Mapping[Component, Float[Tensor, "direction width"]] = field(repr=False)
    layout: Layout = field(repr=False)
    side: Side = "write"
    text: str = "directions"

    def __post_init__(self) -> None:
        """Refuse directions that belong to nothing.

        Raises:
            SelectionError: A component is no matrix of the model nor a slice of one whose heads or
                neurons lie across the directions, or its vectors have another width.
        """
        for component, vectors in self.directions.items():
            matrix, axis = matrix_of(component), 1 if self.side == "write" else 0
            there = matrix in self.layout.places and has_parts(matrix)
            if not there or (component != matrix and cut_axis(self.layout, matrix) == axis):
                raise SelectionError(f"{component} does not {self.side} along directions.")
            width = self.layout.shape(matrix)[axis]
            if vectors.shape[-1] != width:
                raise SelectionError(
                    f"{component} cannot {self.side} along a direction of {vectors.shape[-1]} "
                    f"entries; it has {width}."
                )

    @property
    def components(self) -> tuple[Component, ...]:
        """The matrices, heads and neurons of which something is taken."""
        return tuple(self.directions)

    def of(self, component: Component, base: Float[Tensor, "..."], delta: Delta) -> Delta | None:
        """The projected change; a head's or neuron's rows on the span of the matrix's and its own.

        So what a matrix and a slice of it both say is taken once.
        """
        mine = [(c, v) for c, v in self.directions.items() if matrix_of(c) == component]
        if not mine or isinstance(delta, Absent):
            return None
        of_all = _frame([v for c, v in mine if c == component], self.directions[mine[0][0]])
        factors = [self._projected(delta, of_all)]
        for owner, vectors in mine:
            if owner != component:
                rows = restricted(delta, _slice_of(owner, self.layout))
                factors.append(self._projected(rows, _frame([vectors], vectors, beside=of_all)))
        left = torch.cat([one.left for one in factors], dim=1).to(delta.dtype)
        right = torch.cat([one.right for one in factors], dim=0).to(delta.dtype)
        return without_zeros(LowRank(left, right))

    def _projected(self, delta: Delta, frame: Float64[Tensor, "width k"]) -> LowRank:
        """A change on the span of some directions, in factors, float64."""
        if self.side == "write":
            return LowRank(_times(delta, frame), rearrange(frame, "width k -> k width"))
        return LowRank(frame, rearrange(_times_from_left(delta, frame), "width k -> k width"))


def matrix_of(component: Component) -> Component:
    """The matrix that a head's or neuron's slice is cut from; a matrix itself."""
    return Component("matrix", component.layer, None, component.part)


def _slice_of(owner: Component, layout: Layout) -> Kept:
    """The rows or columns of a matrix that a head or neuron owns."""
    matrix = matrix_of(owner)
    cut = next(cut for cut in cuts(layout, matrix) if cut.kind == owner.kind)
    axis = cut_axis(layout, matrix)
    entries = torch.zeros(layout.shape(matrix)[axis], dtype=torch.bool)
    index = owner.index or 0
    entries[index * cut.width : (index + 1) * cut.width] = True
    return Kept(axis, entries)


def _frame(
    given: Sequence[Float[Tensor, "direction width"]],
    like: Float[Tensor, "_ width"],
    *,
    beside: Float64[Tensor, "width _"] | None = None,
) -> Float64[Tensor, "width k"]:
    """An orthonormal basis of the span of some directions, less the span of ``beside``."""
    vectors = torch.cat([*given, like[:0]]).double()
    vectors = torch.nn.functional.normalize(vectors, dim=1)
    if beside is not None:
        vectors = vectors - (vectors @ beside) @ beside.mT
    _, values, right = torch.linalg.svd(vectors, full_matrices=False)
    return rearrange(right[values > DEPENDENT], "k width -> width k")


def _times(delta: Delta, frame: Float64[Tensor, "width k"]) -> Float64[Tensor, "d_in k"]:
    """D Q, in float64; factors are not written out."""
    if isinstance(delta, LowRank):
        return delta.left.double() @ (delta.right.double() @ frame)
    return delta.dense().double() @ frame


def _times_from_left(delta: Delta, frame: Float64[Tensor, "width k"]) -> Float64[Tensor, "d k"]:
    """D' Q, likewise."""
    if isinstance(delta, LowRank):
        return _times(LowRank(delta.right.mT, delta.left.mT), frame)
    return delta.dense().double().mT @ frame


def _change(delta: Delta) -> Change:
    """A matrix's difference as geometry has it."""
    return Factored(delta.left, delta.right) if isinstance(delta, LowRank) else delta.dense()
