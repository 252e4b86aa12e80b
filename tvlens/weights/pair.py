"""A matched pair of checkpoints, read one component at a time."""

import math
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tvlens.components import Component

from .contents import chosen_rows, first_non_finite, non_finite
from .delta import Absent, Delta, Dense, LowRank, added
from .families.table import Place
from .layout import Layout
from .precision import coarsest_dtype, rounding_energy, stored_dtype, stored_step, uniform_energy
from .report import LoadReport, with_report
from .sources.adapter import Adapter, low_rank
from .sources.folder import Source
from .vocabulary import RowMatch

VOCABULARY_PARTS = ("W_E", "W_U")


@dataclass(frozen=True, eq=False)
class Weight:
    """One component of both models.

    Attributes:
        component: Which one.
        base: The base's weight, float32, canonical orientation (``x @ W``).
        delta: Tuned minus base.
        floor: Expected rounding energy per entry, None for an adapter: it stores the
            difference itself.
        equal_fraction: Share of entries that are equal in both; NaN for low-rank factors,
            whose product is not written out.
        base_dtype: Dtype in the base's file.
        tuned_dtype: Dtype in the tuned model's or adapter's file.
        tied: The same tensor is also W_U.
    """

    component: Component
    base: Float[Tensor, "..."]
    delta: Delta
    floor: Float[Tensor, "..."] | None
    equal_fraction: float
    base_dtype: str
    tuned_dtype: str
    tied: bool

    def dense_delta(self) -> Float[Tensor, "..."]:
        """Tuned minus base, written out."""
        return self.delta.dense()


@dataclass(frozen=True, eq=False)
class Pair:
    """Two checkpoints whose difference has a meaning.

    Attributes:
        base: The base's files.
        tuned: The tuned model's files, or the adapter's.
        base_name: What tables call the base.
        tuned_name: What tables call the tuned model.
        layout: Numbers and places, of what both have.
        load_report: What became of every tensor.
        base_tensors: Stored name by the family's name.
        tuned_tensors: The same for the tuned checkpoint, or what an adapter stores whole.
        adapter: The adapter's factors, None for a full checkpoint.
        rows: Which embedding rows of the two belong together. W_E has a row and W_U a column for
            each matched pair, in this order; rows without a counterpart are in ``rows.new`` and
            ``rows.gone`` and in no component.
    """

    base: Source
    tuned: Source
    base_name: str
    tuned_name: str
    layout: Layout
    load_report: LoadReport
    base_tensors: dict[str, str] = field(repr=False)
    tuned_tensors: dict[str, str] = field(repr=False)
    adapter: Adapter | None = field(default=None, repr=False)
    rows: RowMatch = field(kw_only=True, repr=False)

    @property
    def components(self) -> list[Component]:
        """The disjoint pieces of the parameters, in model order."""
        return self.layout.components()

    def blocks(self) -> list[list[Component]]:
        """Components by block; the last list holds embeddings and the final norm."""
        return self.layout.blocks()

    def read(self, component: Component) -> Weight:
        """The component of both models, read from the files now.

        Raises:
            KeyError: The pair has no such component.
            CheckpointError: A file cannot be read, or holds NaN or Inf.
        """
        place = self.layout.places[component]
        base = self.base_weight(component)
        delta, tuned_dtype = self._difference(place, base)
        floor = None
        if isinstance(delta, Dense):
            floor = self._floor(place, base, base + delta.tensor)
        name = self._stored_name(self.base_tensors, place)
        return Weight(
            component,
            base,
            delta,
            floor,
            _equal_fraction(delta),
            self.base.tensors[name].dtype,
            tuned_dtype,
            self.layout.tied and component.part == "W_E",
        )

    def compare(self, prompts: Any = None, **options: Any) -> Any:
        """The whole study of this pair: ``tvlens.compare(pair, prompts, **options)``.

        The one place where an inner ring reaches outwards, and only when it is called: the word a
        notebook wants to write.
        """
        return import_module("tvlens.study.runner").compare(self, prompts, **options)

    def base_weight(self, component: Component) -> Float[Tensor, "..."]:
        """The base's weight alone, float32, canonical."""
        return self._weight(self.base, self.base_tensors, self.layout.places[component])

    def tuned_weight(self, component: Component) -> Float[Tensor, "..."]:
        """The tuned model's weight alone, float32, canonical; an adapter's is base + delta."""
        place = self.layout.places[component]
        if self.adapter is None:
            return self._weight(self.tuned, self.tuned_tensors, place)
        base = self.base_weight(component)
        return base + self._difference(place, base)[0].dense()

    def _weight(self, source: Source, names: dict[str, str], place: Place) -> Float[Tensor, "..."]:
        stored = self._stored(source, self._stored_name(names, place), place)
        return self.layout.canonical(stored, place).contiguous()

    def _stored(self, source: Source, name: str, place: Place) -> Float[Tensor, "..."]:
        if place.part in VOCABULARY_PARTS:
            rows = self.rows.base if source is self.base else self.rows.tuned
            values = chosen_rows(source, name, rows).float()
        else:
            rows, values = None, source.read(name).float()
        scanned = self.load_report.identical is not None
        if not scanned and (index := first_non_finite(values)) is not None:
            index = index if rows is None else (int(rows[index[0]]), *index[1:])
            raise with_report(non_finite(source, name, index), self.load_report)
        return values.reshape(self.layout.stored_shapes[place.tensor])

    def _stored_name(self, names: dict[str, str], place: Place) -> str:
        if place.part == "W_U" and place.tensor not in names:
            return names[self.layout.embedding_tensor]
        return names[place.tensor]

    def _difference(self, place: Place, base: Float[Tensor, "..."]) -> tuple[Delta, str]:
        """Tuned minus base and the dtype it was stored in."""
        if self.adapter is None:
            name = self._stored_name(self.tuned_tensors, place)
            tuned = self._weight(self.tuned, self.tuned_tensors, place)
            return Dense(tuned - base), self.tuned.tensors[name].dtype
        delta: Delta = Absent(tuple(base.shape))
        dtype = self.base.tensors[self._stored_name(self.base_tensors, place)].dtype
        if stored := self.tuned_tensors.get(place.tensor):
            difference = self._weight(self.tuned, self.tuned_tensors, place) - base
            delta = Dense(difference) if bool(difference.count_nonzero()) else delta
            dtype = self.tuned.tensors[stored].dtype
        if factors := self.adapter.factors.get(place.tensor):
            whole = low_rank(self.tuned, factors)
            right = self.layout.output_part(whole.right, place).contiguous()
            delta = added(delta, LowRank(whole.left, right))
            dtype = self.tuned.tensors[factors.first].dtype
        return delta, dtype

    def _floor(
        self, place: Place, base: Float[Tensor, "..."], tuned: Float[Tensor, "..."]
    ) -> Float[Tensor, "..."]:
        names = (
            self._stored_name(self.base_tensors, place),
            self._stored_name(self.tuned_tensors, place),
        )
        sources = (self.base, self.tuned)
        dtypes = [
            stored_dtype(source.tensors[name].dtype, source.rounding)
            for source, name in zip(sources, names, strict=True)
        ]
        step = stored_step(self.tuned.rounding, names[1])
        if step is None:
            return rounding_energy(tuned, coarsest_dtype(*dtypes))
        if step.dim() and place.part in VOCABULARY_PARTS:
            step = step[self.rows.tuned]
        shape = self.layout.stored_shapes[place.tensor]
        rows = step.reshape(-1, *[1] * (len(shape) - 1)) if step.dim() else step
        steps = self.layout.canonical(torch.broadcast_to(rows, shape), place)
        return uniform_energy(steps) + rounding_energy(base, coarsest_dtype(dtypes[0]))


def _equal_fraction(delta: Delta) -> float:
    """Share of zeros; NaN for factors."""
    match delta:
        case Absent():
            return 1.0
        case LowRank():
            return math.nan
        case Dense():
            return float((delta.tensor == 0).double().mean())
