"""Tuning vectors: tuned weights minus base weights, as data with an algebra."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from tvlens.components import Component
from tvlens.errors import IncomparableModelsError

from .delta import Delta, added, inner_product, scaled
from .pair import Pair


@dataclass(frozen=True, eq=False)
class TuningVector(Mapping[Component, Delta]):
    """What fine-tuning added, by component; low-rank parts stay in their factors.

    Attributes:
        base_name: The model it can be added to.
        name: Which fine-tune it comes from, or how it was combined.
        deltas: Tuned minus base, canonical orientation, float32.
    """

    base_name: str
    name: str
    deltas: Mapping[Component, Delta] = field(repr=False)

    def __getitem__(self, component: Component) -> Delta:
        """The difference at a component."""
        return self.deltas[component]

    def __iter__(self) -> Iterator[Component]:
        """The components, in model order."""
        return iter(self.deltas)

    def __len__(self) -> int:
        """Number of components."""
        return len(self.deltas)

    def __add__(self, other: "TuningVector") -> "TuningVector":
        """The sum, component by component."""
        _refuse_other_components(self, other)
        deltas = {component: added(self[component], other[component]) for component in self}
        return TuningVector(self.base_name, f"{self.name} + {other.name}", deltas)

    def __mul__(self, factor: float | int) -> "TuningVector":
        """The vector made ``factor`` times as long."""
        deltas = {component: scaled(delta, factor) for component, delta in self.items()}
        return TuningVector(self.base_name, f"{factor:g} * ({self.name})", deltas)

    __rmul__ = __mul__

    def __neg__(self) -> "TuningVector":
        """The vector that takes away what this one adds."""
        return self * -1.0

    def __sub__(self, other: "TuningVector") -> "TuningVector":
        """The difference, component by component."""
        return self + other * -1.0

    def select(self, predicate: Callable[[Component], bool]) -> "TuningVector":
        """The part of the vector at the components that ``predicate`` accepts."""
        deltas = {component: delta for component, delta in self.items() if predicate(component)}
        return TuningVector(self.base_name, self.name, deltas)

    def norm(self) -> float:
        """Euclidean length over all entries; a tied embedding counts once."""
        return math.sqrt(sum(delta.norm() ** 2 for delta in self.values()))

    def dot(self, other: "TuningVector") -> float:
        """Inner product over all entries."""
        _refuse_other_components(self, other)
        return sum(inner_product(self[component], other[component]) for component in self)

    def cosine(self, other: "TuningVector") -> float:
        """Cosine of the angle to another vector, NaN if one of them is zero."""
        length = self.norm() * other.norm()
        return self.dot(other) / length if length else math.nan


def tuning_vector(pair: Pair) -> TuningVector:
    """The tuning vector of a pair, all of it in memory: 4 bytes a parameter, or the factors."""
    deltas = {component: pair.read(component).delta for component in pair.components}
    return TuningVector(pair.base_name, pair.tuned_name, deltas)


def _refuse_other_components(first: TuningVector, second: TuningVector) -> None:
    if other := first.keys() ^ second.keys():
        raise IncomparableModelsError(
            f"the tuning vectors {first.name!r} and {second.name!r} have different components, "
            f"such as {min(map(str, other))}.",
            hint="Both must belong to the same base model and the same selection.",
        )
