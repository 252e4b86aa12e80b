"""What geometry reads: pairs of checkpoints by their protocol, weights as tensors.

A change in factors stays in factors; one that is zero because nothing was trained has rank zero.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor

from tvlens.components import Component
from tvlens.weights.delta import Absent, Delta, Dense, LowRank

from .changes import Change, Factored
from .heads import Factor, changes_of_heads, kv_index_of_heads, slices_of_heads


@runtime_checkable
class Weight(Protocol):
    """What geometry reads of one component: float32 tensors in the orientation x @ W."""

    @property
    def base(self) -> Tensor:
        """Base weights."""
        ...

    @property
    def floor(self) -> Tensor | None:
        """Expected rounding energy per entry, None for adapters."""
        ...

    @property
    def base_dtype(self) -> object:
        """Stored dtype of the base."""
        ...

    @property
    def tuned_dtype(self) -> object:
        """Stored dtype of the tuned model."""
        ...

    @property
    def tied(self) -> bool:
        """Whether the tensor is shared with another component."""
        ...

    @property
    def delta(self) -> object:
        """The tuning vector in the form that it was read in."""
        ...

    def dense_delta(self) -> Tensor:
        """The tuning vector as a dense tensor."""
        ...


@runtime_checkable
class Layout(Protocol):
    """What no tensor's shape tells about the attention."""

    @property
    def n_heads(self) -> int:
        """Query heads in a layer."""
        ...

    @property
    def n_kv_heads(self) -> int:
        """Key and value heads in a layer."""
        ...

    @property
    def qk_norm(self) -> str:
        """What queries and keys are normalised over, empty where they are not."""
        ...


@runtime_checkable
class Pair(Protocol):
    """What geometry needs of a pair of checkpoints; ``weights.pair`` has the real one."""

    @property
    def base_name(self) -> str:
        """Name of the base in tables."""
        ...

    @property
    def tuned_name(self) -> str:
        """Name of the tuned model in tables."""
        ...

    @property
    def layout(self) -> Layout:
        """Numbers of the model."""
        ...

    @property
    def rotary_partners(self) -> list[int]:
        """The entry that each entry of a head rotates with, itself where it does not rotate."""
        ...

    def blocks(self) -> list[list[Component]]:
        """The disjoint components, one list a layer and one for what has no layer."""
        ...

    def read(self, component: Component) -> Weight:
        """Base weights and tuning vector of one component."""
        ...

    def slabs(self, component: Component) -> Iterable[Weight]:
        """The same in pieces along the vocabulary, one piece where there is none."""
        ...


@runtime_checkable
class Inputs(Protocol):
    """What is known of the inputs of a base's matrices; ``models.covariances`` has the real one."""

    def of(self, component: Component) -> Tensor | None:
        """Second moment [d_in, d_in] of what a matrix reads; None where it is unknown."""
        ...


@dataclass(frozen=True, eq=False)
class Slice:
    """A component's weight as tensors, read once.

    Attributes:
        base: Base weights.
        change: Tuning vector.
        floor: Expected rounding energy per entry, None for adapters.
        dtypes: Stored dtypes of base and tuned.
        tied: Whether the tensor is shared with another component.
    """

    base: Float[Tensor, "..."]
    change: Change
    floor: Float[Tensor, "..."] | None
    dtypes: tuple[str, str]
    tied: bool


def change_of(weight: Weight) -> Change:
    """The tuning vector of a weight: factors of a matrix as they are, all else written out."""
    match weight.delta:
        case LowRank() as low:
            return Factored(low.left, low.right)
        case Absent(shape=(rows, columns)):
            return Factored(weight.base.new_zeros(rows, 0), weight.base.new_zeros(0, columns))
        case _:
            return weight.dense_delta()


def delta_of(change: Change) -> Delta:
    """A change as ``weights.delta`` has it, for what is measured there."""
    if isinstance(change, Factored):
        return LowRank(change.left, change.right)
    return Dense(change)


def slice_of(weight: Weight) -> Slice:
    """A weight as tensors."""
    dtypes = (str(weight.base_dtype), str(weight.tuned_dtype))
    return Slice(
        base=weight.base,
        change=change_of(weight),
        floor=weight.floor,
        dtypes=(dtypes[0].removeprefix("torch."), dtypes[1].removeprefix("torch.")),
        tied=bool(weight.tied),
    )


def factor_of_heads(weight: Slice, part: str, n_heads: int) -> Factor:
    """A matrix of an attention layer, one slice a head."""
    floor = None if weight.floor is None else slices_of_heads(weight.floor, part, n_heads)
    base = slices_of_heads(weight.base, part, n_heads)
    return Factor(base, changes_of_heads(weight.change, part, n_heads), floor)


def kv_index_of(pair: Pair) -> Int[Tensor, " head"]:
    """The kv head that each query head of a pair reads."""
    return kv_index_of_heads(pair.layout.n_heads, pair.layout.n_kv_heads)
