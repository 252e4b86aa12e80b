"""Exact activation patching: put one activation in for real, run, and look at the metric.

    score = sign * (metric(run with the component's activation exchanged) - metric(run))

in the units and signs of the estimates, all positions of a prompt together or one at a time. Each
forward begins at the first block that is patched (``models.replay``). Where that is faster,
several patches are row groups of one forward, neighbours in depth together; the unpatched run
then has as many copies, so that the rounding of a layout cancels.

*Isolated* patches of keys and values (Prakash et al. 2024, cross-model activation patching): a
key or value is read from everywhere, so exchanging one also changes what its heads write at
positions that only prepare the answer. With ``isolated`` the outputs z of the heads that read it
are put back to the receiver's own wherever the metric does not read, so that only what the
answering positions themselves read from the exchanged keys or values counts.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float
from torch import Tensor

from tvlens.components import Component
from tvlens.errors import HostError
from tvlens.models.lens import HookList, LensModel
from tvlens.models.metrics import Metric
from tvlens.models.pair import HookedPair
from tvlens.models.prompts import Batch
from tvlens.models.replay import Replay, replay
from tvlens.tables import Table

from .directions import Patch, Question, question
from .nodes import NODES, Site, activations, named_activation, site_of
from .tables import Direction, sampled_table

ROWS_AT_ONCE = 16
"""Prompts of one forward: memory grows with it, scores do not change."""
_CPU_TOKENS = 128
"""Past this a CPU's forward is bound by arithmetic, and stacking patches gains nothing."""
_ACCELERATOR_TOKENS = 8_192
"""Enough rows to fill an accelerator, few enough for the logits of a large vocabulary."""


@dataclass(frozen=True, eq=False)
class Edit:
    """One activation, or a slice of it, that is replaced at some positions.

    Attributes:
        site: Where.
        index: The head's or neuron's number; None for the whole tensor.
        where: The positions.
        given: What is put in, to be broadcast against the activation of the batch.
    """

    site: Site
    index: int | None
    where: Bool[Tensor, "batch pos"]
    given: Tensor

    def hook(self, rows: slice) -> tuple[str, Callable[..., Tensor]]:
        """A forward hook that edits the batch at ``rows`` of a pass over several copies of it."""
        return self.site.hook, partial(self._patched, rows)

    def _patched(self, rows: slice, activation: Tensor, hook: object) -> Tensor:
        axis, index = self.site.index_axis, self.index
        patched = activation.clone()
        own = patched[rows]
        new = self.given.to(own.device, own.dtype).expand_as(own)
        where = self.site.real(self.where.to(own.device), own.ndim)
        if index is not None:
            own, new = own.select(axis, index), new.select(axis, index)
            where = where.select(axis, 0)
        own.copy_(torch.where(where, new, own))
        return patched


def exact_activations(
    hooked: HookedPair,
    batch: Batch,
    metric: Metric,
    components: Sequence[Component],
    *,
    direction: Direction,
    at: str = "",
    isolated: bool = False,
    mean_over: Batch | None = None,
    rows_at_once: int = ROWS_AT_ONCE,
) -> Table:
    """What the metric changes by when each component's activation is exchanged, one at a time.

    Same sign and unit as ``attribute_activations``: per prompt, all positions together.

    Args:
        hooked: The two models; left as they were.
        batch: The prompts.
        metric: What is measured.
        components: Heads (``part`` z unless named), kv heads, neurons, or nodes, a whole tensor
            such as ``Component("node", 3, None, "z")`` among them.
        direction: What is put where; see ``directions``.
        at: The model of a direction within one model, tuned unless said.
        isolated: Of keys and values, count only what the answering positions read from them.
        mean_over: Prompts whose mean ``mean_ablation`` puts in, these unless given.
        rows_at_once: Prompts of one forward.

    Raises:
        PromptError: No prompt has the corrupt prompt that the direction needs.
        HostError: A component has no activation here or cannot be isolated, or the model runs
            below float32, where rounding is larger than the effect of a head.
    """
    asked = question(hooked, metric, direction, at=at, mean_over=mean_over)
    batch, sites = asked.usable(batch), [site_of(c, hooked.base) for c in components]
    named = [named_activation(c, site) for c, site in zip(components, sites, strict=True)]
    if isolated:
        _require_isolable(named)
    parts = [
        effects(patch, _edits(patch, named, sites, isolated=isolated))
        for patch in _patches(asked, batch, sites, rows_at_once)
    ]
    run = asked.run(batch, "exact_isolated" if isolated else "exact")
    return sampled_table(named, torch.cat(parts), run)


def exact_positions(
    asked: Question, batch: Batch, component: Component, *, rows_at_once: int = ROWS_AT_ONCE
) -> Float[Tensor, "batch pos"]:
    """The exact effect of exchanging a component's activation at one position at a time.

    Place 0 is a prompt's first real token; places past its end are 0. One forward a position.

    Raises:
        TvlensError: As for ``exact_activations``.
    """
    batch, site = asked.usable(batch), site_of(component, asked.receiver)
    width, parts = int(batch.lengths.max()), []
    for patch in _patches(asked, batch, [site], rows_at_once):
        given = patch.given([site.hook])[site.hook]
        count = int(patch.batch.lengths.max())
        edits = [
            [Edit(site, component.index, _place(patch.batch, place), given)]
            for place in range(count)
        ]
        parts.append(torch.nn.functional.pad(effects(patch, edits), (0, width - count)))
    return torch.cat(parts)


def _patches(
    asked: Question, batch: Batch, sites: Sequence[Site], rows_at_once: int
) -> Iterator[Patch]:
    require_single_precision(asked)
    means = asked.means(batch, sites)
    for rows in batch.chunks(rows_at_once):
        yield asked.patch(rows, means)


def require_single_precision(asked: Question) -> None:
    """Refuse models below float32, where rounding is larger than the effect of a head.

    Raises:
        HostError: One of the two is.
    """
    for model in (asked.hooked.base, asked.hooked.tuned):
        if model.dtype not in (torch.float32, torch.float64):
            raise HostError(
                f"exact patching needs float32, the model is {model.dtype}.",
                hint="Load the pair with dtype=torch.float32.",
            )


def _place(batch: Batch, place: int) -> Bool[Tensor, "batch pos"]:
    """The ``place``-th real token of every row that has so many."""
    real = batch.mask.bool()
    return real & (real.cumsum(1) == place + 1)


def _require_isolable(components: Sequence[Component]) -> None:
    for component in components:
        if component.kind != "kv_head" or component.part not in ("k", "v"):
            raise HostError(
                f"{component} cannot be isolated: only keys and values of a kv head are read "
                "from other positions.",
                hint='Ask for Component("kv_head", layer, index, "k") or "v".',
            )


def _edits(
    patch: Patch, components: Sequence[Component], sites: Sequence[Site], *, isolated: bool
) -> list[list[Edit]]:
    """What is edited for every component: its activation, and z put back if isolated."""
    given = patch.given(sorted({site.hook for site in sites}))
    real = patch.batch.mask.bool()
    edits = [
        [Edit(site, component.index, real, given[site.hook])]
        for component, site in zip(components, sites, strict=True)
    ]
    if isolated:
        for own, component in zip(edits, components, strict=True):
            own += _put_back(patch, component)
    return edits


def _put_back(patch: Patch, component: Component) -> list[Edit]:
    """The heads that read a kv head, at their own outputs where the metric does not read."""
    cut, name = NODES["z"]
    site = Site(cut, component.layer, name.format(component.layer))
    plain = activations(patch.receiver, patch.receiver_ids, patch.batch.mask, [site.hook])
    elsewhere = patch.batch.mask.bool() & ~patch.batch.answer_positions
    share = patch.receiver.n_heads // patch.receiver.n_kv_heads
    first = (component.index or 0) * share
    return [Edit(site, first + i, elsewhere, plain[site.hook]) for i in range(share)]


def effects(patch: Patch, edits: Sequence[list[Edit]]) -> Float[Tensor, "batch edit"]:
    """The exact score of every list of edits."""
    groups = max(1, min(_groups(patch.receiver, patch.batch), len(edits)))
    order = sorted(range(len(edits)), key=lambda i: _depth(edits[i][0].site))
    patch.receiver.require_eval()
    begun = _repeated(patch, groups)
    layers = {edit[0].site.layer for edit in edits if edit[0].site.layer is not None}
    plain = _group_values(patch, begun.record(layers), groups)
    scores = plain.new_zeros(len(edits), len(patch.batch))
    for start in range(0, len(order), groups):
        chosen = order[start : start + groups]
        hooks = _hooks([edits[i] for i in chosen], len(patch.batch))
        with torch.no_grad(), patch.receiver.hooks(fwd=hooks):
            logits = begun.logits(edits[chosen[0]][0].site.layer)
            patched = _group_values(patch, logits, groups)
        scores[chosen] = (patched - plain)[: len(chosen)]
    return patch.sign * rearrange(scores, "edit batch -> batch edit")


def _hooks(edits: Sequence[list[Edit]], size: int) -> HookList:
    """The hooks of a pass in which every list of edits has a row group of its own."""
    return [
        edit.hook(slice(group * size, (group + 1) * size))
        for group, own in enumerate(edits)
        for edit in own
    ]


def _groups(model: LensModel, batch: Batch) -> int:
    tokens = _CPU_TOKENS if model.device.type == "cpu" else _ACCELERATOR_TOKENS
    return max(1, tokens // max(1, batch.ids.numel()))


def _depth(site: Site) -> int:
    return -1 if site.layer is None else site.layer


def _repeated(patch: Patch, groups: int) -> Replay:
    """The receiver's pass over ``groups`` copies of the batch."""
    ids, mask, positions = (
        repeat(rows, "batch pos -> (group batch) pos", group=groups)
        for rows in (patch.receiver_ids, patch.batch.mask, patch.reading.positions)
    )
    return replay(patch.receiver, ids, mask, positions, patch.reading.beside)


def _group_values(
    patch: Patch, logits: Float[Tensor, "rows read d_vocab"], groups: int
) -> Float[Tensor, "group batch"]:
    """The metric of every copy of the batch."""
    split = rearrange(logits, "(group batch) pos vocab -> group batch pos vocab", group=groups)
    return torch.stack([patch.reading.value(one) for one in split])
