"""How a component's score divides over the geometric parts of its change.

A score is linear in the change of the weights, so with D = sum of parts (``geometry.splits``)

    score_c = < mean gradient, D_c > = sum over parts p of < mean gradient, D_c^p >,

the mean taken over the nodes of the score's own rule (one node for first order). It says which
share of an effect is carried by gains of what was there (``global``, ``scale``), by a rewiring of
existing directions (``within``, ``reroute``) and by new ones (``new_read``, ``new_write``,
``new_both``): energies ``e_*`` say how much was written, these say how much of it works.

Every component is split in the coordinates of its own base: a matrix in its own singular
directions, a head or kv head in those of its slices (W_Q and W_O; W_K and W_V), their parts added
up by name; a neuron along and across its own vectors. What a head or neuron owns of a bias is a
part ``bias``. Norms, biases and embeddings have no split. The parts of a component sum to its
score; those of heads or neurons do not sum to those of their matrix, whose coordinates are others.

The coordinates take about five times a matrix's memory, so layers are taken in groups that fit
``ENTRIES_AT_ONCE``, each with passes of its own whose backward ends where the group begins. No
gradient of a parameter is formed. A change that comes in factors stays in them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from tvlens.components import Component
from tvlens.errors import HostError
from tvlens.geometry.changes import Change, Factored
from tvlens.geometry.heads import changes_of_heads, slices_of_heads
from tvlens.geometry.splits import (
    GEOMETRIC_PARTS,
    NeuronSplit,
    Split,
    matrix_split,
    neuron_split,
    new_part,
)
from tvlens.models.lens import LensModel, leaf
from tvlens.models.metrics import Metric
from tvlens.models.pair import HookedPair
from tvlens.models.prompts import Batch
from tvlens.models.reading import Reading
from tvlens.tables import Table, concatenated

from .gates import GatedModel
from .lines import Line, averaged, by_index, changed, flat, line_of, on_device, terms
from .sites import LINEAR, Site, counts, gate_count
from .tables import NEURONS_PER_PROMPT, Cut, MethodRun, attribution_table, sampled_table
from .weights import NEURONS_AT_RANDOM, WeightScores

BIAS = "bias"
"""What a head or a neuron owns of biases, which have no directions."""
PARTS = (*GEOMETRIC_PARTS, BIAS)
ENTRIES_AT_ONCE = 2**28
"""Numbers that the coordinates of one group of layers may take: 1 GiB in float32."""
ENTRIES_OF_A_WEIGHT = 5
"""What a change and its coordinates, whole and by heads or neurons, take in numbers of a matrix."""

Rows = dict[tuple[str, bool, str], Float[Tensor, "_ _"]]
"""Scores [prompt, index] by site, whether cut into heads or neurons, and part."""


class Part(NamedTuple):
    """One part of the scores of those components that have it.

    Attributes:
        components: Matrices, heads, kv heads, then neurons.
        values: What it takes of their scores, in the metric's units, float64.
    """

    components: list[Component]
    values: Float[Tensor, "component prompt"]


@dataclass(frozen=True, eq=False)
class PartScores:
    """Scores with their division over the parts.

    Attributes:
        scores: The scores.
        parts: Every part that some component has, by its name, in the order of ``PARTS``.
    """

    scores: WeightScores
    parts: Mapping[str, Part]

    def of(self, component: Component) -> dict[str, Float[Tensor, " prompt"]]:
        """The parts of one component, which sum to its score.

        Raises:
            KeyError: The component has no split.
        """
        found = {
            name: part.values[part.components.index(component)]
            for name, part in self.parts.items()
            if component in part.components
        }
        if not found:
            raise KeyError(f"{component} has no split: only matrices, heads and neurons do.")
        return found


def part_scores(
    models: HookedPair | GatedModel, batch: Batch, metric: Metric, scores: WeightScores
) -> PartScores:
    """The division of ``scores`` over geometric parts.

    Takes about as long again as the scores themselves, and more where layers need several groups.

    Args:
        models: The pair, whose weights are moved and put back bit for bit; or a base with a tuning
            vector behind gates, without a second model.
        batch: The prompts of the scores.
        metric: Their metric.
        scores: From ``weight_scores`` or ``gated_weight_scores`` on these; their method and nodes
            are taken again.

    Raises:
        HostError: As for ``weight_scores``.
    """
    rows: Rows = {}
    with line_of(models) as line:
        for sites in _groups(line):
            parted = [found for site in sites if (found := _parted(line, site)) is not None]
            if parted:
                passes = _Passes(line, parted)
                rows |= averaged(line, batch, metric, scores, passes.rows)
        return PartScores(scores, _by_component(line, rows, len(batch)))


def part_table(
    found: PartScores, run: MethodRun, *, neurons: int | None = NEURONS_PER_PROMPT
) -> Table:
    """A row for every component, part and prompt, with ``geometric_part`` set.

    Neurons have rows as in the table of whole scores, and the same ones have rows per prompt.

    Args:
        found: The parts.
        run: What the rows of the whole scores have in common.
        neurons: How many neurons get rows per prompt, None for all.
    """
    whole = _layered(found.scores.components, found.scores.values)
    tables = []
    for name, part in found.parts.items():
        # completeness is a statement about whole scores
        own = replace(run, geometric_part=name, gap=())
        coarse = [i for i, c in enumerate(part.components) if c.kind != "neuron"]
        by_prompt = rearrange(part.values[coarse], "component prompt -> prompt component")
        if coarse:
            tables.append(sampled_table([part.components[i] for i in coarse], by_prompt, own))
        if len(coarse) < len(part.components):
            fine = {Cut("neuron"): _layered(part.components, part.values)}
            tables.append(
                attribution_table(
                    fine, own, neurons=neurons, at_random=NEURONS_AT_RANDOM, ranked_by=whole
                )
            )
    return concatenated("attribution", tables, order="score")


def _layered(
    components: Sequence[Component], values: Float[Tensor, "component prompt"]
) -> Float[Tensor, "prompt layer index"]:
    """The neurons among some scores, which come layer by layer."""
    rows = [i for i, component in enumerate(components) if component.kind == "neuron"]
    layers = max(1, len({components[i].layer for i in rows}))
    return rearrange(values[rows], "(layer index) prompt -> prompt layer index", layer=layers)


def _groups(line: Line) -> Iterator[list[Site]]:
    """Linear maps of as many layers as fit, one layer at least."""
    layers: dict[int | None, list[Site]] = {}
    for site in line.sites:
        if site.role in LINEAR:
            layers.setdefault(site.layer, []).append(site)
    group: list[Site] = []
    held = 0
    for sites in layers.values():
        size = ENTRIES_OF_A_WEIGHT * sum(site.parameter("weight").numel() for site in sites)
        if group and held + size > ENTRIES_AT_ONCE:
            yield group
            group, held = [], 0
        group, held = [*group, *sites], held + size
    if group:
        yield group


@dataclass(frozen=True, eq=False)
class _Parted:
    """A site whose weights changed, with the coordinates of its parts.

    Attributes:
        site: The site.
        count: Heads or neurons.
        change: Its change, where the model is.
        splits: Those of the matrix and of its heads or neurons; None where only the bias changed.
        bias: The change of a bias that heads or neurons own, else None.
    """

    site: Site
    count: int
    change: Change
    splits: tuple[Split, Split | NeuronSplit] | None
    bias: Tensor | None


def _parted(line: Line, site: Site) -> _Parted | None:
    """What the passes need of a site; None where it did not change."""
    device, count = line.lens.device, gate_count(site, "weight", line.lens)
    change, bias = line.change(site, "weight"), None
    if _owns_bias(site):
        bias = _written(line.change(site, "bias")).to(device)
    if not changed(change):
        return None if bias is None else _Parted(site, count, change, None, bias)
    splits = _splits(line, site, count, on_device(change, torch.device("cpu")))
    return _Parted(site, count, on_device(change, device), splits, bias)


def _splits(
    line: Line, site: Site, count: int, change: Change
) -> tuple[Split, Split | NeuronSplit]:
    base, cut = line.base(site), LINEAR[site.role]
    whole = matrix_split(rearrange(base, "d_in d_out -> 1 d_in d_out"), _alone(change), cut.weight)
    if cut.kind == "neuron":
        return whole, neuron_split(base, change, cut.weight)
    slices = slices_of_heads(base, cut.weight, count)
    changes = changes_of_heads(change, cut.weight, count)
    return whole, matrix_split(slices, changes, cut.weight)


def _owns_bias(site: Site) -> bool:
    """Whether heads or neurons own a bias of the site."""
    return "bias" in site.tensors and site.cut_axis("bias") is not None


def _written(change: Change) -> Tensor:
    return change.left @ change.right if isinstance(change, Factored) else change


def _alone(change: Change) -> Change:
    """A change of one component, with an axis for it."""
    if isinstance(change, Factored):
        sides = (rearrange(side, "a b -> 1 a b") for side in (change.left, change.right))
        return Factored(*sides)
    return rearrange(change, "d_in d_out -> 1 d_in d_out")


@dataclass(frozen=True, eq=False)
class _Passes:
    """Passes over some sites: inputs are kept on the way up, scores divided on the way down."""

    line: Line
    parted: Sequence[_Parted]
    inputs: dict[str, Tensor] = field(default_factory=dict)

    def rows(self, reading: Reading, s: float) -> Rows:
        """One forward and backward at ``s``, the backward down to the first of the sites."""
        rows: Rows = {}
        lowest = min(one.site.layer or 0 for one in self.parted)
        start = f"blocks.{lowest}.hook_resid_pre" if lowest else "hook_embed"
        fwd: list[tuple[str, Callable[..., Any]]] = [*self.line.place(s, reading), (start, leaf)]
        fwd += [(f"{one.site.name}.hook_in", partial(self._keep, one)) for one in self.parted]
        bwd = [
            (f"{one.site.name}.hook_out", partial(self._divide, one, rows)) for one in self.parted
        ]
        with torch.enable_grad(), self.line.lens.hooks(fwd=fwd, bwd=bwd):
            reading.value(reading.logits(self.line.lens)).sum().backward()
        reached = {site for site, _, _ in rows}
        if silent := [one.site.name for one in self.parted if one.site.name not in reached]:
            raise HostError(f"no gradient reached {silent[0]}: its hook did not fire.")
        return rows

    def _keep(self, parted: _Parted, activation: Tensor, hook: Any) -> None:
        self.inputs[parted.site.name] = activation.detach()

    def _divide(self, parted: _Parted, rows: Rows, gradient: Tensor, hook: Any) -> None:
        with torch.no_grad():
            x, g = flat(self.inputs.pop(parted.site.name)), flat(gradient.detach())
            found = _shares(parted, x, g)
        rows.update({(parted.site.name, *key): values for key, values in found.items()})


def _shares(
    parted: _Parted, x: Float[Tensor, "batch pos d_in"], g: Float[Tensor, "batch pos d_out"]
) -> dict[tuple[bool, str], Tensor]:
    """What parts take of a matrix's score (False) and of those of its heads or neurons (True)."""
    found: dict[tuple[bool, str], Tensor] = {}
    if parted.bias is not None:
        found[True, BIAS] = by_index(g * parted.bias, parted.count)
    if parted.splits is None:
        return found
    whole, fine = parted.splits
    outward = LINEAR[parted.site.role].side == "out"
    total = by_index(terms(x, g, parted.change, outward=outward), parted.count)
    matrix = whole.shares(x, g, total.sum(-1, keepdim=True))
    if isinstance(fine, NeuronSplit):
        pieces = fine.shares(g, x, total) if outward else fine.shares(x, g, total)
    elif outward:
        pieces = fine.shares(x, _by_head(g, parted.count), total)
    else:
        pieces = fine.shares(_by_head(x, parted.count), g, total)
    found |= {(False, name): values for name, values in matrix.items()}
    return found | {(True, name): values for name, values in pieces.items()}


def _by_head(
    x: Float[Tensor, "batch pos width"], count: int
) -> Float[Tensor, "batch pos head d_head"]:
    return rearrange(x, "batch pos (head d_head) -> batch pos head d_head", head=count)


def _by_component(line: Line, rows: Rows, prompts: int) -> dict[str, Part]:
    """Parts of matrices, then of heads, kv heads and neurons, summed over their matrices."""
    coarse: dict[str, dict[Component, Tensor]] = {}
    fine: dict[str, dict[tuple[str, int], Tensor]] = {}
    for site in (site for site in line.sites if site.role in LINEAR):
        kind, count = LINEAR[site.role].kind, gate_count(site, "weight", line.lens)
        for name in _present(site, fine=False):
            values = rows.get((site.name, False, name), torch.zeros(prompts, 1).double())
            coarse.setdefault(name, {})[site.component("weight")] = values.mT
        for name in _present(site, fine=True):
            values = rows.get((site.name, True, name), torch.zeros(prompts, count).double())
            of_part, key = fine.setdefault(name, {}), (kind, site.layer or 0)
            of_part[key] = of_part.get(key, 0.0) + values.mT
    return {
        name: _joined(coarse.get(name, {}), fine.get(name, {}), line.lens)
        for name in PARTS
        if name in coarse or name in fine
    }


def _present(site: Site, *, fine: bool) -> Sequence[str]:
    """The parts that a site's matrix has, or that it adds to its heads or neurons."""
    new = new_part(LINEAR[site.role].weight)
    owned = (BIAS,) if fine and _owns_bias(site) else ()
    if fine and LINEAR[site.role].kind == "neuron":
        return ("global", "within", new, *owned)
    return ("global", "scale", "within", "reroute", new, "new_both", *owned)


def _joined(
    coarse: Mapping[Component, Tensor], fine: Mapping[tuple[str, int], Tensor], lens: LensModel
) -> Part:
    components, values = [*coarse], [*coarse.values()]
    for kind in counts(lens):
        for (owner, layer), rows in sorted(fine.items()):
            if owner == kind:
                components += [Component(kind, layer, index) for index in range(len(rows))]
                values.append(rows)
    return Part(components, torch.cat(values))
