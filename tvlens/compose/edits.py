"""Edits: a base model with a tuning vector let in by any amount, whole or in parts.

    theta = base + dose * (tuned - base)            one dose for every head, neuron or tensor

    remove   dose 0        a whole removed vector is the base itself
    negate   dose below 0, also beyond the base
    scale    any dose;  interpolate: a dose in [0, 1];  graft: 1 on a part and 0 elsewhere

An ``Edit`` says the dose of the rest and those of parts; ``EditableModel`` holds one resident
model and one copy of the tuning vector, and is in an edit for the time of a block. There are two
ways to be: ``swap`` writes base + dose * delta (in float64, rounded once) into the weights and puts
every bit back, and a pass then costs what a plain one does; ``gates`` adds dose * (x delta) in
hooks and writes nothing. Each checks the other. Where nothing is let in no weight is touched, so
the base is the base bit for bit; where all is let in whole, the stored tuned model itself runs.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor

from tvlens.attribution.gates import GatedModel, Gates, Key
from tvlens.attribution.sites import LINEAR, Site, gate_count, parted, ties_embeddings
from tvlens.components import Component
from tvlens.errors import SelectionError
from tvlens.models.lens import LensModel
from tvlens.models.pair import base_lens, common_tokens_of, tuned_lens
from tvlens.models.reading import MakesLogits
from tvlens.selection import Selection, parse_selection
from tvlens.weights.delta import Absent
from tvlens.weights.slices import Kept, chosen
from tvlens.weights.vector import TuningVector, tuning_vector

Part = str | tuple[Component, ...] | Mapping[Component, Kept]
"""A selection expression or list of sites, the components themselves, or what is kept of each."""
Doses = dict[Key, Float[Tensor, " index"]]
"""For every tensor the dose of each head or neuron that cuts it, or of the whole tensor."""
Way = Literal["swap", "gates"]


class Term(NamedTuple):
    """A part of a tuning vector and how much of it is let in."""

    part: Part
    scale: float


@dataclass(frozen=True)
class Edit:
    """How much of a tuning vector is let into the base.

    Attributes:
        rest: The dose of everything that no term names.
        terms: Parts with doses of their own; where two name the same weights the later one counts.
    """

    rest: float = 0.0
    terms: tuple[Term, ...] = ()

    def __post_init__(self) -> None:
        """Refuse doses that are no numbers."""
        for scale in (self.rest, *(term.scale for term in self.terms)):
            if not math.isfinite(scale):
                raise ValueError(f"a tuning vector can be let in by a finite dose, got {scale!r}.")

    def is_whole(self, scale: float) -> bool:
        """Whether everything has this one dose."""
        return self.rest == scale and all(term.scale == scale for term in self.terms)


def scaled(scale: float, part: Part | None = None, *, rest: float = 0.0) -> Edit:
    """The whole vector, or a part of it, by ``scale``; the rest of it by ``rest``."""
    return Edit(scale) if part is None else Edit(rest, (Term(part, scale),))


def removed(part: Part | None = None) -> Edit:
    """The tuned model without a part of its vector; without all of it, the base."""
    return scaled(0.0, part, rest=1.0)


def negated(part: Part | None = None, *, scale: float = 1.0) -> Edit:
    """The base less ``scale`` times the vector; or the tuned model with a part so reversed."""
    return scaled(-scale, part, rest=1.0)


def grafted(part: Part) -> Edit:
    """The base with a part of the vector."""
    return scaled(1.0, part)


def interpolated(share: float, part: Part | None = None) -> Edit:
    """The point ``share`` of the way from base to tuned, of a part or of the whole vector.

    Raises:
        ValueError: ``share`` is not in [0, 1].
    """
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"expected a share between 0 and 1, got {share!r}; scaled() goes beyond.")
    return scaled(share, part)


class Share(NamedTuple):
    """A tuning vector behind gates and how much of it is let in where."""

    gated: GatedModel
    doses: Doses


@dataclass(frozen=True)
class EditableModel:
    """One resident base model and one copy of a tuning vector.

    Attributes:
        gated: The base with the vector behind gates.
        vector: The same vector as data: what selections speak about.
        tuned: Loads the stored tuned model; None where there is none, and all let in is then the
            sum, within rounding.
        tokenizer: The tokenizer that both models can be read with, None if no folder has one.
        warnings: What their vocabularies leave out.
    """

    gated: GatedModel
    vector: TuningVector
    tuned: Callable[[], LensModel] | None = field(default=None, repr=False)
    tokenizer: Any = field(default=None, repr=False)
    warnings: tuple[str, ...] = ()

    @classmethod
    def of_pair(
        cls, pair: Any, *, device: str = "cpu", dtype: torch.dtype = torch.float32
    ) -> "EditableModel":
        """The base of a ``tvlens`` Pair, its tuning vector, and the way to the tuned model.

        Raises:
            HostError: TransformerLens cannot run the base, or the vector does not fit it.
        """
        common, how = common_tokens_of(pair), {"device": device, "dtype": dtype}
        lens, vector = base_lens(pair, common, **how), tuning_vector(pair)
        gated = GatedModel.of_vector(lens, vector)
        return cls(
            gated,
            vector,
            lambda: tuned_lens(pair, common, **how),
            common.tokenizer(pair),
            common.warnings,
        )

    @property
    def lens(self) -> LensModel:
        """The resident base model."""
        return self.gated.lens

    def with_vector(self, vector: TuningVector) -> "EditableModel":
        """The same resident model with another vector of its base: a portion, a sum, a random one.

        Raises:
            HostError: The vector does not fit the model.
        """
        gated = GatedModel.of_vector(self.lens, vector)
        return replace(self, gated=gated, vector=vector, tuned=None)

    @contextmanager
    def edited(self, edit: Edit, *, by: Way = "swap") -> Iterator[MakesLogits]:
        """A model that computes what ``edit`` says, for the time of the block.

        By ``swap`` this is the resident model itself (the stored tuned one where all is let in);
        its weights are as found afterwards, also after an exception. Beside the vector that takes
        a copy of the weights that change; ``gates`` takes none, at about twice the time a pass.

        Raises:
            SelectionError: A part selects nothing or cannot be read.
        """
        if by == "gates":
            yield GatedLens(self.gated, self.doses(edit))
        elif self.tuned is not None and edit.is_whole(1.0):
            yield self.tuned()
        else:
            with written(self.lens, [Share(self.gated, self.doses(edit))]) as lens:
                yield lens

    def doses(self, edit: Edit) -> Doses:
        """The dose of every head, neuron and tensor.

        Raises:
            SelectionError: A part selects nothing or cannot be read.
        """
        parts = [(self.kept(term.part), term.scale) for term in edit.terms]
        found: Doses = {}
        for site in self.gated.sites:
            for tensor in site.tensors:
                count = gate_count(site, tensor, self.lens)
                dose = torch.full((count,), float(edit.rest), device=self.lens.device)
                for kept, scale in parts:
                    if (which := kept.get(self._owner(site, tensor))) is not None:
                        dose[_indices(which, count)] = scale
                found[site.name, tensor] = dose
        return found

    def kept(self, part: Part) -> dict[Component, Kept]:
        """What a part keeps of each component of the vector's base.

        Raises:
            SelectionError: It cannot be read, or selects nothing that the vector holds.
        """
        text, found = self._found(part)
        if all(isinstance(self.vector.get(c), Absent | None) for c in found):
            raise SelectionError(
                f"the selection {text!r} selects nothing that {self.vector.name} changed."
            )
        return found

    def _found(self, part: Part) -> tuple[str, dict[Component, Kept]]:
        if isinstance(part, Mapping):
            return ", ".join([*map(str, part)][:3]), dict(part)
        if isinstance(part, str):
            selection = parse_selection(part)
        else:
            names = tuple(map(str, part))
            selection = Selection(", ".join(names[:3]), names, None)
        base = self.vector.base
        found = chosen(selection, base.layout, base=base.name, tuned=self.vector.name)
        return selection.text, found

    def _owner(self, site: Site, tensor: str) -> Component:
        """The component of the vector that a tensor reads: a tied unembedding the embedding's."""
        component = site.component(tensor)
        tied = component.part == "W_U" and self.vector.base.layout.tied
        return component._replace(part="W_E") if tied else component


@dataclass(frozen=True)
class GatedLens:
    """The base with doses behind gates, as far as a measure needs a model; nothing is written.

    Attributes:
        gated: The base with the vector behind gates.
        doses: How much is let in where.
    """

    gated: GatedModel
    doses: Doses = field(repr=False)

    @property
    def d_vocab(self) -> int:
        """Tokens of the output."""
        return self.gated.lens.d_vocab

    def logits_at(
        self,
        ids: Int[Tensor, "batch pos"],
        mask: Int[Tensor, "batch pos"],
        positions: Int[Tensor, "batch read"],
    ) -> Float[Tensor, "batch read d_vocab"]:
        """Logits of every row at its own positions."""
        gates: Gates = {
            key: repeat(dose, "index -> row index", row=len(ids))
            for key, dose in self.doses.items()
        }
        lens = self.gated.lens
        with lens.hooks(fwd=self.gated.hooks_at(gates, ids, positions)):
            return lens.logits_at(ids, mask, positions)


@contextmanager
def written(lens: LensModel, shares: Sequence[Share]) -> Iterator[LensModel]:
    """``lens`` with the shares of some tuning vectors in its weights; every bit comes back.

    A tied embedding is parted meanwhile where a vector changes its two uses apart.

    Args:
        lens: The base of all the vectors.
        shares: Vectors and doses; what they add is summed.
    """
    sites = shares[0].gated.sites
    before: dict[int, tuple[Tensor, Tensor]] = {}
    with ExitStack() as stack:
        if ties_embeddings(lens) and not all(_moves_as_one(share) for share in shares):
            stack.enter_context(parted(sites))
        try:
            for site in sites:
                for tensor in site.tensors:
                    _write(site, tensor, shares, before)
            yield lens
        finally:
            for live, old in before.values():
                live.data.copy_(old)


def _write(
    site: Site, tensor: str, shares: Sequence[Share], before: dict[int, tuple[Tensor, Tensor]]
) -> None:
    live = site.parameter(tensor)
    if id(live) in before:  # the unembedding of a tied pair: the embedding's change is there
        return
    change = _change(site, tensor, shares)
    if change is None:
        return
    before[id(live)] = live, live.detach().clone()
    stored = site.kept[tensor].in_order(live.data)
    stored.copy_((stored.double() + change.reshape(stored.shape)).to(live.dtype))


def _change(site: Site, tensor: str, shares: Sequence[Share]) -> Float[Tensor, "..."] | None:
    """What the shares add to a tensor, canonical and float64; None where that is nothing."""
    total = None
    for gated, doses in shares:
        delta, dose = gated.deltas[site.name, tensor], doses[site.name, tensor]
        if isinstance(delta, Absent) or not bool(dose.any()):
            continue
        part = delta.dense().double() * _over_entries(dose, site, tensor, delta.shape)
        total = part if total is None else total + part
    return total


def _over_entries(
    dose: Float[Tensor, " index"], site: Site, tensor: str, shape: tuple[int, ...]
) -> Float[Tensor, "..."]:
    """Doses as what multiplies a canonical tensor: by rows, by columns, or one for all."""
    if len(dose) == 1:
        return dose.double()
    rows = tensor == "weight" and LINEAR[site.role].side == "in"
    wide = repeat(
        dose.double(), "index -> (index width)", width=shape[0 if rows else -1] // len(dose)
    )
    return rearrange(wide, "entry -> entry 1") if rows else wide


def _moves_as_one(share: Share) -> bool:
    """Whether embedding and unembedding change by one and the same."""
    keys = [(s.name, "weight") for s in share.gated.sites if s.role in ("embed", "unembed")]
    (embed, unembed), doses = (share.gated.deltas[key] for key in keys), share.doses
    if not torch.equal(doses[keys[0]], doses[keys[1]]):
        return False
    if isinstance(embed, Absent) or isinstance(unembed, Absent):
        return type(embed) is type(unembed)
    first, second = embed.dense(), unembed.dense().mT
    return first.data_ptr() == second.data_ptr() or torch.equal(first, second)


def _indices(kept: Kept, count: int) -> slice | Tensor:
    """The heads or neurons of a tensor that are kept."""
    if kept.entries is None:
        return slice(None)
    return rearrange(kept.entries, "(index width) -> index width", index=count).any(1)
