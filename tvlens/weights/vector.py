"""Tuning vectors: tuned weights minus base weights, as data with an algebra.

A vector is an element of the space of all parameters of one base; a component that it does not
hold is zero there, so a selection can be added to the rest and gives the whole again. A tied
embedding is one component and counts once. Sums and products are exact up to one rounding of each
entry or factor (``delta.py``); vectors of different bases are refused (``provenance.py``).
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from tvlens.components import Component
from tvlens.errors import SelectionError
from tvlens.selection import parse_selection

from .delta import Delta, combined, inner_product, masked, scaled, without_zeros
from .pair import Pair
from .provenance import BaseRecord, Input, digest, require_same_base
from .slices import Kept, chosen

if TYPE_CHECKING:
    from .applying import Application

StoredDtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True, eq=False)
class TuningVector(Mapping[Component, Delta]):
    """What fine-tuning added, by component; low-rank parts stay in their factors.

    Attributes:
        base: The model it belongs to.
        name: Which fine-tune it comes from, or the formula of how it was combined.
        deltas: Tuned minus base, canonical orientation (``x @ W``), float32.
        inputs: The models it was made from.
        selection: The expression it was selected by, empty for a whole vector, None for a
            predicate or where differently selected vectors were combined.
        scale: What the fine-tune's vector was multiplied by, None for a combination.
        stored_dtype: The dtype of the file it was loaded from.
    """

    base: BaseRecord
    name: str
    deltas: Mapping[Component, Delta] = field(repr=False)
    inputs: tuple[Input, ...] = field(default=(), repr=False)
    selection: str | None = ""
    scale: float | None = 1.0
    stored_dtype: StoredDtype = "float32"

    @property
    def base_name(self) -> str:
        """The name of the model it belongs to."""
        return self.base.name

    @property
    def term(self) -> str:
        """The name, in parentheses where it is a formula."""
        return self.name if self.scale == 1.0 else f"({self.name})"

    def __getitem__(self, component: Component) -> Delta:
        """The difference at a component."""
        return self.deltas[component]

    def __contains__(self, component: object) -> bool:
        """Whether it holds a component, be it zero; nothing is read."""
        return component in self.deltas

    def __iter__(self) -> Iterator[Component]:
        """The components, in model order."""
        return iter(self.deltas)

    def __len__(self) -> int:
        """Number of components."""
        return len(self.deltas)

    def __add__(self, other: "TuningVector") -> "TuningVector":
        """The sum, component by component; where one holds nothing, the other's part."""
        return weighted_sum([(1.0, self), (1.0, other)])

    def __sub__(self, other: "TuningVector") -> "TuningVector":
        """The difference, component by component."""
        return weighted_sum([(1.0, self), (-1.0, other)])

    def __mul__(self, factor: float | int) -> "TuningVector":
        """The vector made ``factor`` times as long.

        Raises:
            ValueError: ``factor`` is NaN or infinite.
        """
        if not math.isfinite(factor):
            raise ValueError(f"a tuning vector can be scaled by a finite number, got {factor!r}.")
        deltas = {component: scaled(delta, factor) for component, delta in self.items()}
        return replace(
            self,
            name=f"{factor:g} * {self.term}",
            deltas=deltas,
            scale=None if self.scale is None else self.scale * factor,
        )

    __rmul__ = __mul__

    def __truediv__(self, divisor: float | int) -> "TuningVector":
        """The vector made ``divisor`` times shorter."""
        return self * (1 / divisor)

    def __neg__(self) -> "TuningVector":
        """The vector that takes away what this one adds."""
        return self * -1.0

    def select(
        self, which: str | Callable[[Component], bool] | Mapping[Component, Kept]
    ) -> "TuningVector":
        """The part of the vector that ``which`` accepts; what it came from stays in its name.

        Args:
            which: An expression over the key columns or a list of sites (``tvlens.selection``),
                which may be finer than matrices: a matrix of which only some heads or neurons
                are selected is zero elsewhere. Or a predicate over the components held, or what
                is kept of each, as ``slices.chosen`` and ``compose.selecting`` give it.

        Raises:
            SelectionError: The expression cannot be read or selects nothing held here.
        """
        if callable(which):
            deltas = {component: delta for component, delta in self.items() if which(component)}
            return replace(self, name=f"{self.term}[...]", deltas=deltas, selection=None)
        by_name = isinstance(which, str)
        kept = kept_by(which, self.base, self.name) if by_name else which
        text = which if by_name else ", ".join([*map(str, which)][:3])
        deltas = {c: restricted(delta, kept[c]) for c, delta in self.items() if c in kept}
        if not deltas:
            raise SelectionError(
                f"the selection {text!r} selects nothing that {self.name} holds.",
                hint=f"It holds {len(self)} components, such as {next(map(str, self), 'none')}.",
            )
        both = f"({self.selection}) and ({text})" if self.selection else text
        selection = None if self.selection is None or not by_name else both
        return replace(self, name=f"{self.term}[{text}]", deltas=deltas, selection=selection)

    def norm(self) -> float:
        """Euclidean length over all entries; a tied embedding counts once."""
        return math.sqrt(math.fsum(length**2 for length in self.norms().values()))

    def norms(self) -> dict[Component, float]:
        """The length of every component's difference."""
        return {component: delta.norm() for component, delta in self.items()}

    def dot(self, other: "TuningVector") -> float:
        """Inner product over all entries."""
        return math.fsum(self.products(other).values())

    def products(self, other: "TuningVector") -> dict[Component, float]:
        """The inner product at every component that both hold; elsewhere it is zero.

        Raises:
            IncomparableModelsError: The vectors belong to different bases.
        """
        shared = [component for component in self if component in other]
        require_same_base(self.base, other.base, shared)
        return {component: inner_product(self[component], other[component]) for component in shared}

    def cosine(self, other: "TuningVector") -> float:
        """Cosine of the angle to another vector, NaN if one of them is zero."""
        length = self.norm() * other.norm()
        return self.dot(other) / length if length else math.nan

    def cosines(self, other: "TuningVector") -> dict[Component, float]:
        """The cosine at every component that both hold, NaN where one of them is zero."""
        found = {}
        for component, product in self.products(other).items():
            length = self[component].norm() * other[component].norm()
            found[component] = product / length if length else math.nan
        return found

    def apply_to(self, base: Any, *, any_base: bool = False) -> "Application":
        """The vector on a base: new tensors to iterate over, or a model to be in for a while.

        Args:
            base: A checkpoint's folder or name, or a model in memory.
            any_base: Apply it to another base of the same shape too.

        Raises:
            IncomparableModelsError: The base has another shape, or (when its tensors are read)
                other weights than the vector was taken from.
        """
        from .applying import application

        return application(self, base, any_base=any_base)

    def save(self, path: Any, *, dtype: StoredDtype = "float32") -> Any:
        """Write the vector and its provenance as one safetensors file; see ``vector_file``."""
        from .vector_file import save_vector

        return save_vector(self, path, dtype=dtype)


def tuning_vector(pair: Pair) -> TuningVector:
    """The tuning vector of a pair, all of it in memory: 4 bytes a parameter, or the factors.

    Tensors that did not change are absent. Every component of the base is hashed on the way.
    """
    deltas: dict[Component, Delta] = {}
    digests: dict[Component, str] = {}
    for component in pair.components:
        deltas[component], digests[component] = read_change(pair, component)
    base = base_record(pair, digests)
    return TuningVector(base, pair.tuned_name, deltas, inputs_of(pair))


def read_change(pair: Pair, component: Component) -> tuple[Delta, str]:
    """A component's difference, absent where it is zero, and the digest of its base weight."""
    base, delta = pair.change(component)
    return without_zeros(delta), digest(base)


def base_record(pair: Pair, digests: Mapping[Component, str]) -> BaseRecord:
    """What a vector of ``pair`` knows of its base."""
    return BaseRecord(pair.base_name, pair.base.config, pair.layout, digests)


def inputs_of(pair: Pair) -> tuple[Input, ...]:
    """Both sources of a pair; their files are hashed when a vector is saved."""
    return (
        Input("base", pair.base_name, pair.base.sha256),
        Input(
            "tuned", pair.tuned_name, pair.tuned.sha256, "stored" if pair.moves is None else "base"
        ),
    )


def weighted_sum(terms: Sequence[tuple[float | int, TuningVector]]) -> TuningVector:
    """The sum of factor times vector over ``terms``, added up in float64 and rounded once.

    Raises:
        ValueError: There is no term, or a factor is NaN or infinite.
        IncomparableModelsError: The vectors belong to different bases.
    """
    if not terms or not all(math.isfinite(factor) for factor, _ in terms):
        raise ValueError("a sum needs at least one tuning vector and finite factors.")
    first = terms[0][1]
    for _, other in terms[1:]:
        require_same_base(first.base, other.base, [c for c in first if c in other])
    held = [c for c in first.base.layout.components() if any(c in vector for _, vector in terms)]
    deltas = {
        c: combined([(factor, vector[c]) for factor, vector in terms if c in vector]) for c in held
    }
    selections = {vector.selection for _, vector in terms}
    return TuningVector(
        first.base,
        _formula(terms),
        deltas,
        _all_inputs(terms),
        selections.pop() if len(selections) == 1 else None,
        None,
    )


def kept_by(selection: str, base: BaseRecord, tuned: str) -> dict[Component, Kept]:
    """What a selection keeps of each component of a vector's base."""
    return chosen(parse_selection(selection), base.layout, base=base.name, tuned=tuned)


def restricted(delta: Delta, kept: Kept) -> Delta:
    """The difference on what a selection keeps of it."""
    if kept.axis is None or kept.entries is None:
        return delta
    return without_zeros(masked(delta, kept.axis, kept.entries))


def _formula(terms: Sequence[tuple[float | int, TuningVector]]) -> str:
    text = ""
    for factor, vector in terms:
        sign = " - " if factor < 0 else " + "
        size = "" if abs(factor) == 1 else f"{abs(factor):g} * "
        bare = not size and factor > 0
        name = vector.name if bare else vector.term
        text += (sign if text else sign.strip(" +")) + size + name
    return text


def _all_inputs(terms: Sequence[tuple[float | int, TuningVector]]) -> tuple[Input, ...]:
    """Every input once; two of one name stay two."""
    return tuple(dict.fromkeys(entry for _, vector in terms for entry in vector.inputs))
