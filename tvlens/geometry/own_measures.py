"""Measures of the user's own: a number for every component, from its base weights and its change.

A measure is any callable ``f(base, delta) -> number`` of two float32 tensors of equal shape: a
matrix [d_in, d_out], as in ``x @ W``; a head's or kv head's slice of one ([d_model, d_head], of
W_O [d_head, d_model]); a neuron's vector [d_model]; a norm or bias. A plain function is a measure
of matrices; ``Measure`` says of what else. Results go into the table ``measures`` and, under the
measure's name, into the evidence that a classifier is given.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import pyarrow as pa
from jaxtyping import Float
from torch import Tensor

from tvlens.callables import name_of
from tvlens.components import Component, Kind, key_columns
from tvlens.errors import ExtensionError
from tvlens.tables import Table, concatenated, keyed_schema

from .heads import slices_of_heads
from .measures import HEAD_PARTS, KV_PARTS, NEURON_PARTS
from .neurons import rows_of_neurons
from .own_classifiers import own_callable
from .reading import Pair, kv_index_of

MEASURES_SCHEMA = keyed_schema(
    ("measure", pa.string()), ("value", pa.float64()), ("unit", pa.string())
)
WHOLE = ("matrix", "norm", "bias", "embedding")
CUT = ("head", "kv_head", "neuron")
"""Kinds that are slices of matrices."""


@dataclass(frozen=True)
class Measure:
    """A named number of a component.

    Attributes:
        name: What tables call it.
        function: ``f(base, delta) -> number``; NaN where it means nothing.
        kinds: What it is measured of.
        unit: Its unit, empty for a ratio.
    """

    name: str
    function: Callable[[Tensor, Tensor], Any]
    kinds: tuple[str, ...] = ("matrix",)
    unit: str = ""

    def __post_init__(self) -> None:
        """Refuse a kind that has no weights.

        Raises:
            ExtensionError: It is none of ``WHOLE`` and ``CUT``.
        """
        for kind in self.kinds:
            if kind not in (*WHOLE, *CUT):
                raise ExtensionError(
                    f"{self.name} asks for kind {kind!r}; there are {', '.join((*WHOLE, *CUT))}."
                )

    def of(self, base: Float[Tensor, "..."], delta: Float[Tensor, "..."], label: str) -> float:
        """The value of one component.

        Raises:
            ExtensionError: It is no single number.
        """
        found = self.function(base, delta)
        try:
            return float(found)
        except (TypeError, ValueError, RuntimeError) as error:
            shape = f" of shape {tuple(found.shape)}" if isinstance(found, Tensor) else ""
            raise ExtensionError(
                f"{self.name} gave {type(found).__name__}{shape} for {label}, expected a number."
            ) from error


Given = str | Measure | Callable[[Tensor, Tensor], Any]


def resolved_measures(given: Sequence[Given]) -> tuple[Measure, ...]:
    """The measures that are meant by ``package.module:function``, ``Measure`` or callable.

    Raises:
        ExtensionError: One cannot be found or called, or two have one name.
    """
    found = tuple(map(_resolved, given))
    names = [measure.name for measure in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ExtensionError(f"two measures are called {twice[0]!r}.")
    return found


def _resolved(given: Given) -> Measure:
    found = own_callable(given, "measure") if isinstance(given, str) else given
    if isinstance(found, Measure):
        return found
    if not callable(found):
        raise ExtensionError(f"expected a measure, got {type(found).__name__}.")
    return Measure(name_of(found).rpartition(":")[2], found)


def measured(pair: Pair, measures: Sequence[Measure]) -> Table:
    """The table ``measures`` of a pair; one component is in memory at a time.

    Args:
        pair: Base and tuned checkpoint.
        measures: What to measure.

    Raises:
        ExtensionError: A measure gives no number.
    """
    tables = [Table.of("measures", MEASURES_SCHEMA, {})]
    for component in (component for block in pair.blocks() for component in block):
        tables += _measured(pair, component, measures)
    return concatenated("measures", tables, order="value")


def _measured(pair: Pair, component: Component, measures: Sequence[Measure]) -> Iterator[Table]:
    """Rows of one component and of what is cut from it."""
    wanted = {kind for measure in measures for kind in measure.kinds}
    cut = _cut_kind(component)
    if not wanted & {component.kind, cut}:
        return
    weight = pair.read(component)
    base, delta = weight.base, weight.dense_delta()
    for measure in measures:
        if component.kind in measure.kinds:
            values = [measure.of(base, delta, str(component))]
            yield _table(pair, measure, [component], values, tied=bool(weight.tied))
        if cut != component.kind and cut in measure.kinds:
            bases, deltas = _slices(pair, component, base, delta)
            pieces = [Component(cut, component.layer, n, component.part) for n in range(len(bases))]
            cells = zip(bases, deltas, pieces, strict=True)
            values = [measure.of(own, change, str(piece)) for own, change, piece in cells]
            yield _table(pair, measure, pieces, values)


def _cut_kind(component: Component) -> Kind:
    """What a matrix is cut into; its own kind where it is not."""
    if component.kind != "matrix" or component.part not in (*HEAD_PARTS, *NEURON_PARTS):
        return component.kind
    if component.part in NEURON_PARTS:
        return "neuron"
    return "kv_head" if component.part in KV_PARTS else "head"


def _slices(pair: Pair, component: Component, *whole: Tensor) -> list[Tensor]:
    """The slices of some tensors of a matrix, their number first."""
    part = component.part or ""
    if part in NEURON_PARTS:
        return [rows_of_neurons(each, part) for each in whole]
    count = pair.layout.n_kv_heads if part in KV_PARTS else pair.layout.n_heads
    return [slices_of_heads(each, part, count) for each in whole]


def _table(
    pair: Pair,
    measure: Measure,
    components: list[Component],
    values: list[float],
    *,
    tied: bool = False,
) -> Table:
    group, count = kv_index_of(pair).tolist(), len(components)
    own: dict[str, Callable[[int], int]] = {"kv_head": lambda i: i, "head": lambda i: group[i]}
    kv_index = [own[c.kind](c.index or 0) if c.kind in own else None for c in components]
    columns = {
        **key_columns(components, kv_index=kv_index),
        "base": [pair.base_name] * count,
        "tuned": [pair.tuned_name] * count,
        "tied": [tied] * count,
        "measure": [measure.name] * count,
        "value": values,
        "unit": [measure.unit] * count,
    }
    return Table.of("measures", MEASURES_SCHEMA, columns, order="value")


def with_measures(
    weights: pd.DataFrame, own: Table | None, *, taken: Sequence[str] = ()
) -> pd.DataFrame:
    """The frame of ``weights`` with a column for each measure, NaN where it was not measured.

    Args:
        weights: Frame of the table ``weights``.
        own: The table ``measures``.
        taken: Further names that a measure must not have.

    Raises:
        ExtensionError: A measure has the name of a column.
    """
    if own is None or not len(own):
        return weights
    frame = own.to_frame().pivot(index="component", columns="measure", values="value")
    if clash := [name for name in frame if name in weights or name in taken]:
        raise ExtensionError(f"a measure is called {clash[0]!r}, as a column of the evidence is.")
    return weights.merge(frame, left_on="component", right_index=True, how="left")
