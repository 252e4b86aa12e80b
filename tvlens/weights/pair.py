"""A matched pair of checkpoints, read one component at a time."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tvlens.components import Component

from .configs import rotary_entries
from .contents import chosen_rows, first_non_finite, non_finite
from .delta import Absent, Delta, Dense, Dora, LowRank, added, dora
from .families.table import Place
from .layout import Layout
from .moves import Moves
from .precision import (
    SMALLEST_ENERGY,
    coarsest_dtype,
    rounding_energy,
    stored_dtype,
    stored_step,
    uniform_energy,
)
from .report import LoadReport, with_report
from .sources.adapter import Adapter, Factors, Rows, low_rank, shift
from .sources.folder import Source
from .vocabulary import RowMatch

VOCABULARY_PARTS = ("W_E", "W_U")
SLAB = 1 << 22
"""Entries of a vocabulary matrix that are read at once: 16 MiB in float32."""


@dataclass(frozen=True, eq=False)
class Weight:
    """One component of both models.

    Attributes:
        component: Which one.
        base: The base's weight, float32, canonical orientation (``x @ W``); the effective gain
            where gains are stored as their difference from 1.
        delta: Tuned minus base; a ``Dora`` has length and direction apart.
        floor: Expected rounding energy per entry, None for what stores the difference
            itself: LoRA's factors and added biases. DoRA's is that of its rounded lengths.
        base_dtype: Dtype in the base's file.
        tuned_dtype: Dtype in the tuned model's or adapter's file.
        tied: The same tensor is also the unembedding.
    """

    component: Component
    base: Float[Tensor, "..."]
    delta: Delta
    floor: Float[Tensor, "..."] | None
    base_dtype: str
    tuned_dtype: str
    tied: bool

    @property
    def equal_fraction(self) -> float:
        """Share of entries that are equal in both; NaN for factors that are not written out."""
        return _equal_fraction(self.delta)

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
        moves: How each block of the tuned model is brought into the base's coordinates when it is
            read (``gauge.canonical``), None where it is read as it is stored.
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
    moves: Mapping[int | None, Moves] | None = field(default=None, kw_only=True, repr=False)

    @property
    def components(self) -> list[Component]:
        """The disjoint pieces of the parameters, in model order."""
        return self.layout.components()

    @property
    def rotary_partners(self) -> list[int]:
        """The entry that each entry of a head rotates with, itself where it does not rotate."""
        layout, config = self.layout, self.layout.filled(self.base.config)
        if not layout.rotary:
            return list(range(layout.d_head))
        share = rotary_entries(config)["rotary_share"]
        width = int(config.get("rotary_dim") or layout.d_head * share)
        step = 1 if config.get("rotary_adjacent_pairs") else width // 2
        moved = [i + step if i // step % 2 == 0 else i - step for i in range(width)]
        return [*moved, *range(width, layout.d_head)]

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
        stored = self._weight(self.base, self.base_tensors, place)
        delta, tuned_dtype = self._difference(component, stored)
        floor = self._floor_of(component, stored, delta)
        name = self._stored_name(self.base_tensors, place)
        return Weight(
            component,
            _effective(stored, place),
            delta,
            floor,
            self.base.tensors[name].dtype,
            tuned_dtype,
            self.layout.is_shared(component),
        )

    def slabs(self, component: Component) -> Iterator[Weight]:
        """The component in pieces of some of its tokens, in order; others come as one piece.

        Memory is one piece, however large the vocabulary is.

        Raises:
            KeyError: The pair has no such component.
            CheckpointError: A file cannot be read, or holds NaN or Inf.
        """
        if not self._is_separable(self.layout.places[component]):
            yield self.read(component)
            return
        step = max(1, SLAB // self.layout.d_model)
        for start in range(0, len(self.rows), step):
            yield self._narrowed(start, start + step).read(component)

    def _is_separable(self, place: Place) -> bool:
        """Whether each token's share of a component can be read without the others'."""
        factors = self.adapter.factors.get(place.tensor) if self.adapter else None
        # DoRA's lengths are norms over the input side, which is the vocabulary in W_E
        whole = place.part == "W_E" and factors is not None and factors.magnitude is not None
        return place.part in VOCABULARY_PARTS and not whole

    def _narrowed(self, start: int, stop: int) -> "Pair":
        """The pair with a vocabulary of some of its matched rows."""
        rows = replace(
            self.rows, base=self.rows.base[start:stop], tuned=self.rows.tuned[start:stop]
        )
        return replace(self, rows=rows, layout=replace(self.layout, d_vocab=len(rows)))

    def stored_weight(self, component: Component) -> Float[Tensor, "..."]:
        """The base's weight alone, float32, canonical orientation, the values as stored."""
        place = self.layout.places[component]
        return self._weight(self.base, self.base_tensors, place).contiguous()

    def change(self, component: Component) -> tuple[Float[Tensor, "..."], Delta]:
        """The base's stored weight and the difference alone, without floors; see ``read``."""
        stored = self.stored_weight(component)
        return stored, self._difference(component, stored)[0]

    def compare(self, prompts: Any = None, **options: Any) -> Any:
        """The whole study of this pair: ``tvlens.compare(pair, prompts, **options)``.

        The one place where an inner ring reaches outwards, and only when it is called: the word a
        notebook wants to write.
        """
        return import_module("tvlens.study.runner").compare(self, prompts, **options)

    def base_weight(self, component: Component) -> Float[Tensor, "..."]:
        """The base's weight alone, float32, canonical."""
        place = self.layout.places[component]
        return _effective(self.stored_weight(component), place)

    def tuned_weight(self, component: Component) -> Float[Tensor, "..."]:
        """The tuned model's weight alone, float32, canonical; an adapter's is base + delta."""
        place = self.layout.places[component]
        if self.adapter is None:
            return _effective(self._tuned(component).contiguous(), place)
        stored = self.stored_weight(component)
        return _effective(stored + self._difference(component, stored)[0].dense(), place)

    def rounding(
        self, component: Component, base: Float[Tensor, "..."], tuned: Float[Tensor, "..."]
    ) -> Float[Tensor, "..."]:
        """Expected rounding energy of effective weights of two full checkpoints, as stored."""
        place = self.layout.places[component]
        return self._floor(place, base - place.centre, tuned - place.centre)

    def _tuned(self, component: Component) -> Float[Tensor, "..."]:
        """What a full tuned checkpoint stores, moved into the base's coordinates if asked for."""
        place = self.layout.places[component]
        stored = self._weight(self.tuned, self.tuned_tensors, place)
        if self.moves is None:
            return stored
        moves = self.moves.get(component.layer, Moves())
        effective = stored.double() + place.centre
        return (moves.moved(place.part, effective) - place.centre).float()

    def _weight(self, source: Source, names: dict[str, str], place: Place) -> Float[Tensor, "..."]:
        """Float32 in canonical orientation: where nothing is copied, the mapped file itself."""
        return self.layout.canonical(
            self._stored(source, self._stored_name(names, place), place), place
        )

    def _stored(self, source: Source, name: str, place: Place) -> Float[Tensor, "..."]:
        if place.part in VOCABULARY_PARTS:
            rows = self.rows.base if source is self.base else self.rows.tuned
            values = chosen_rows(source.read_rows, name, rows).float()
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

    def _difference(self, component: Component, base: Float[Tensor, "..."]) -> tuple[Delta, str]:
        """Tuned minus base and the dtype it was stored in."""
        place = self.layout.places[component]
        if self.adapter is None:
            dtype = self.tuned.tensors[self._stored_name(self.tuned_tensors, place)].dtype
            tuned = self._tuned(component)
            # what was converted to float32 is a copy already; float32 may be the file itself
            copied = dtype != "float32" and self.moves is None
            return Dense(tuned.sub_(base) if copied else tuned - base), dtype
        return self._adapted(self.adapter, place, base)

    def _adapted(
        self, adapter: Adapter, place: Place, base: Float[Tensor, "..."]
    ) -> tuple[Delta, str]:
        """An adapter's change and its dtype: what it stores whole first, then what it adds."""
        name = place.tensor
        dtype = self.base.tensors[self._stored_name(self.base_tensors, place)].dtype
        start = base
        if stored := adapter.replaced.get(name):
            start = self._weight(self.tuned, self.tuned_tensors, place)
            dtype = self.tuned.tensors[stored].dtype
        if rows := adapter.rows.get(name):
            start, dtype = self._with_rows(place, rows), self.tuned.tensors[rows.stored].dtype
        if change := adapter.shifts.get(name):
            start = start + self.layout.output_part(shift(self.tuned, change), place)
            dtype = self.tuned.tensors[change.stored].dtype
        moved = start is not base and not torch.equal(start, base)
        delta = Dense(start - base) if moved else Absent(tuple(base.shape))
        if factors := adapter.factors.get(name):
            delta = added(delta, self._factored(factors, place, start))
            dtype = self.tuned.tensors[factors.first].dtype
        return delta, dtype

    def _with_rows(self, place: Place, rows: Rows) -> Float[Tensor, "..."]:
        """The base's embedding with the rows that an adapter stores."""
        stored = self._stored(self.base, self._stored_name(self.base_tensors, place), place)
        whole, numbers = stored.clone(), torch.tensor(rows.numbers)
        places = torch.searchsorted(self.rows.base, numbers).clamp(max=len(self.rows) - 1)
        here = self.rows.base[places] == numbers
        whole[places[here]] = self.tuned.read(rows.stored).float()[here]
        return self.layout.canonical(whole, place)

    def _factored(self, factors: Factors, place: Place, start: Float[Tensor, "..."]) -> Delta:
        """What factors add to a weight: the part of a fused tensor, LoRA or DoRA."""
        whole = low_rank(self.tuned, factors)
        left, right = whole.left, self.layout.output_part(whole.right, place).contiguous()
        left = left[self.rows.base] if place.part == "W_E" else left
        right = right[:, self.rows.base] if place.part == "W_U" else right
        change = LowRank(left, right)
        if factors.magnitude is None:
            return change
        length = self.layout.output_part(self.tuned.read(factors.magnitude).float(), place)
        return dora(start, change, length[self.rows.base] if place.part == "W_U" else length)

    def _floor_of(
        self, component: Component, base: Float[Tensor, "..."], delta: Delta
    ) -> Float[Tensor, "..."] | None:
        """The rounding energy of what was stored rounded, None of what stores a difference."""
        place = self.layout.places[component]
        adapter, name = self.adapter, place.tensor
        if self.moves is not None:
            stored = self._weight(self.tuned, self.tuned_tensors, place)
            moves = self.moves.get(component.layer, Moves())
            energy = moves.energy(place.part, self._floor(place, base, stored))
            return energy.float().clamp(min=SMALLEST_ENERGY)
        if isinstance(delta, Dense) and (adapter is None or name in adapter.replaced):
            return self._floor(place, base, base, delta.tensor)
        if adapter is None:
            return None
        if isinstance(delta, Dora):
            lengths = adapter.factors[name].magnitude
            return _length_energy(base + delta.dense(), self._coarsest(place, lengths))
        if isinstance(delta, Dense | Absent) and name in adapter.rows:
            coarsest, change = self._coarsest(place, adapter.rows[name].stored), delta.dense()
            energy = rounding_energy(base + change, coarsest)
            return torch.where(change != 0, energy, SMALLEST_ENERGY)
        return None

    def _coarsest(self, place: Place, stored: str | None) -> str:
        """The coarser dtype of the base's weight and of what an adapter stores for it."""
        dtype = self.base.tensors[self._stored_name(self.base_tensors, place)].dtype
        own = self.tuned.tensors[stored].dtype if stored else dtype
        return coarsest_dtype(stored_dtype(dtype, self.base.rounding), own)

    def _floor(
        self,
        place: Place,
        base: Float[Tensor, "..."],
        tuned: Float[Tensor, "..."],
        change: Float[Tensor, "..."] | None = None,
    ) -> Float[Tensor, "..."]:
        """The rounding energy of a full checkpoint's ``tuned + change``."""
        names = (
            self._stored_name(self.base_tensors, place),
            self._stored_name(self.tuned_tensors, place),
        )
        energy = self._float_floor(place, names, base, tuned, change)
        sides = (self.base, self.rows.base), (self.tuned, self.rows.tuned)
        for (source, rows), name in zip(sides, names, strict=True):
            if (steps := self._steps(source, name, place, rows)) is not None:
                energy = energy + uniform_energy(steps)
        return energy

    def _float_floor(
        self,
        place: Place,
        names: tuple[str, str],
        base: Float[Tensor, "..."],
        tuned: Float[Tensor, "..."],
        change: Float[Tensor, "..."] | None,
    ) -> Float[Tensor, "..."]:
        """The rounding energy of the dtypes and storage notes of two stored tensors."""
        sources = (self.base, self.tuned)
        dtypes = [
            stored_dtype(source.tensors[name].dtype, source.rounding)
            for source, name in zip(sources, names, strict=True)
        ]
        step = stored_step(self.tuned.rounding, names[1])
        if step is None:
            return rounding_energy(tuned, coarsest_dtype(*dtypes), change=change)
        if step.dim() and place.part in VOCABULARY_PARTS:
            step = step[self.rows.tuned]
        shape = self.layout.stored_shapes[place.tensor]
        rows = step.reshape(-1, *[1] * (len(shape) - 1)) if step.dim() else step
        steps = self.layout.canonical(torch.broadcast_to(rows, shape), place)
        return uniform_energy(steps) + rounding_energy(base, coarsest_dtype(dtypes[0]))

    def _steps(
        self, source: Source, name: str, place: Place, rows: Int[Tensor, " row"]
    ) -> Float[Tensor, "..."] | None:
        """Steps of a tensor's entries, canonical orientation; None where its dtype says it all."""
        if not source.has_steps(name):
            return None
        if place.part not in VOCABULARY_PARTS:
            rows = torch.arange(source.tensors[name].shape[0])
        steps = chosen_rows(source.read_steps, name, rows)
        return self.layout.canonical(steps.reshape(self.layout.stored_shapes[place.tensor]), place)


def _effective(stored: Float[Tensor, "..."], place: Place) -> Float[Tensor, "..."]:
    """What the model multiplies by: 1 + w where gains are stored as their difference from 1."""
    return stored + place.centre if place.centre else stored


def _length_energy(tuned: Float[Tensor, "d_in d_out"], dtype: str) -> Float[Tensor, "d_in d_out"]:
    """Expected squared error per entry of DoRA's weights through the rounding of its lengths.

    The lengths are set to the norms of the base's columns before training and stored afterwards;
    ``dtype`` is the coarser of the two, and an error of a length stretches its whole column.
    """
    lengths = torch.linalg.vector_norm(tuned, dim=0)
    return rounding_energy(lengths, dtype) * (tuned / lengths).square()


def _equal_fraction(delta: Delta) -> float:
    """Share of zeros; NaN for factors."""
    match delta:
        case Absent():
            return 1.0
        case LowRank():
            return math.nan
        case Dense() | Dora():
            written = delta.dense()
            return 1 - int(written.count_nonzero()) / max(1, written.numel())
