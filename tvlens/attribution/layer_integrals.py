"""Integrated gradients between two activations: a whole layer's exchange, divided exactly.

A *site* is one activation of one layer, all heads' z of block 3 or its neurons together. With a
the receiver's activation there, b what it is given (``directions``), and s in [0, 1],

    score = sign * (b - a) . integral over s of d metric / d activation at a + s (b - a)

by component, summed over positions. The components of a site sum to what exchanging the whole
site does [1], which is a forward pass and is made: the row of the whole tensor (kind ``node``)
holds the sum, and its ``gap`` what the quadrature leaves of the exact effect. A single component
needs none of this: one exact patch costs less than its integral. Sites of different layers carry
the same effect and do not add up.

[1] Sundararajan, Taly and Yan 2017, https://arxiv.org/abs/1703.01365
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Float64
from torch import Tensor

from tvlens.components import Component
from tvlens.errors import MetricError
from tvlens.models.metrics import Metric
from tvlens.models.pair import HookedPair
from tvlens.models.prompts import Batch
from tvlens.models.replay import Replay, replay
from tvlens.tables import Table, concatenated

from .directions import Patch, question
from .nodes import DEFAULT_PARTS, Site, activation_sites, wide
from .products import difference
from .tables import (
    NEURONS_PER_PROMPT,
    Cut,
    Direction,
    MethodRun,
    attribution_table,
    sampled_table,
)
from .weights import COMPLETE, INCOMPLETE, NOISE, gauss_legendre

NODE_COUNTS = (3, 5, 8, 12)
"""Nodes tried in turn; between activations 3 leave about half a per cent on SmolLM2-135M."""
ROWS_AT_ONCE = 16
"""Prompts of one forward and backward: memory grows with it, scores do not change."""
NEURONS_AT_RANDOM = 64
"""Neurons outside the largest that get rows per prompt too."""

SiteScores = dict[str, Float64[Tensor, "batch ..."]]
"""Numbers of every site by hook name."""


@dataclass(frozen=True, eq=False)
class LayerIntegrals:
    """Integrated scores of the components of some sites.

    Attributes:
        sites: The sites.
        values: Scores [prompt, index] of every site, by hook name, in the metric's unit.
        effects: What exchanging the whole site does, exactly.
        nodes: Quadrature nodes.
        run: How the scores were made.
    """

    sites: Sequence[Site]
    values: Mapping[str, Float[Tensor, "batch index"]]
    effects: Mapping[str, Float[Tensor, " batch"]]
    nodes: int
    run: MethodRun

    @property
    def gaps(self) -> dict[str, Float[Tensor, " batch"]]:
        """Of every site what its components leave of the exact effect, in metric units."""
        return {name: self.effects[name] - rows.sum(1) for name, rows in self.values.items()}

    @property
    def completeness(self) -> float:
        """mean |gap| / mean |effect| over sites and prompts; 0 is perfect."""
        gaps, effects = (torch.cat([*of.values()]) for of in (self.gaps, self.effects))
        return float(gaps.abs().mean()) / max(float(effects.abs().mean()), NOISE)

    def table(self, *, neurons: int | None = NEURONS_PER_PROMPT) -> Table:
        """The rows of components, and one of every whole site with its gap.

        Args:
            neurons: How many neurons get rows per prompt, None for all.
        """
        status = "incomplete" if self.completeness > INCOMPLETE else "ok"
        run, gaps = replace(self.run, nodes=self.nodes, status=status), self.gaps
        tables = []
        for site in self.sites:
            whole = Component("node", site.layer, None, site.part)
            total = rearrange(self.values[site.hook].sum(1), "batch -> batch 1")
            tables.append(sampled_table([whole], total, replace(run, gap=gaps[site.hook].tolist())))
        fine = {cut: values for cut, values in self._by_cut().items() if cut.kind != "node"}
        if fine:
            tables.append(
                attribution_table(fine, run, neurons=neurons, at_random=NEURONS_AT_RANDOM)
            )
        return concatenated("attribution", tables, order="score")

    def _by_cut(self) -> dict[Cut, Float[Tensor, "batch layer index"]]:
        return {
            cut: torch.stack([self.values[s.hook] for s in self.sites if s.cut == cut], dim=1)
            for cut in dict.fromkeys(site.cut for site in self.sites)
        }


def layer_integrals(
    hooked: HookedPair,
    batch: Batch,
    metric: Metric,
    *,
    direction: Direction = "tuned_into_base",
    at: str = "",
    parts: Sequence[str] = DEFAULT_PARTS,
    nodes: int | None = None,
    mean_over: Batch | None = None,
) -> LayerIntegrals:
    """The effect of exchanging every site's activation as a whole, divided over its components.

    Costs a forward and backward from the site's block on for every site and node. Unlike first
    order it also works where the metric's gradient vanishes at the receiver (a KL at its own end).

    Args:
        hooked: The two models; left as they were.
        batch: The prompts; directions with a corrupt prompt take those that have one.
        metric: What is measured.
        direction: What is put where; see ``directions``.
        at: The model of a direction within one model, tuned unless said.
        parts: Which activations; see ``nodes``.
        nodes: Quadrature nodes; None takes as many of ``NODE_COUNTS`` as make the scores sum up.
        mean_over: Prompts whose mean ``mean_ablation`` puts in, these unless given.

    Raises:
        PromptError: No prompt has the corrupt prompt that the direction needs.
        HostError: A model lacks a part, or is in training mode.
        MetricError: The metric does not depend on the logits differentiably.
    """
    asked = question(hooked, metric, direction, at=at, mean_over=mean_over)
    batch, sites = asked.usable(batch), activation_sites(asked.receiver, parts)
    means = asked.means(batch, sites)

    def over_chunks(made: Callable[[_Exchanges], SiteScores]) -> SiteScores:
        parts = [
            made(_Exchanges.of(asked.patch(rows, means), sites))
            for rows in batch.chunks(ROWS_AT_ONCE)
        ]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    with asked.receiver.frozen():
        effects = over_chunks(_Exchanges.effects)
        for count in NODE_COUNTS if nodes is None else (nodes,):
            values = over_chunks(partial(_Exchanges.integrals, nodes=count))
            found = LayerIntegrals(sites, values, effects, count, asked.run(batch, "ig"))
            if found.completeness <= COMPLETE:
                break
    return found


@dataclass(frozen=True, eq=False)
class _Exchanges:
    """One chunk of prompts whose sites are exchanged, one at a time and part of the way.

    Attributes:
        patch: What is put where.
        sites: The sites.
        given: What is put in, by hook name.
        begun: The receiver's pass, recorded before every block.
        plain: The metric of that pass.
    """

    patch: Patch
    sites: Sequence[Site]
    given: Mapping[str, Tensor]
    begun: Replay
    plain: Float64[Tensor, " batch"]

    @classmethod
    def of(cls, patch: Patch, sites: Sequence[Site]) -> "_Exchanges":
        """The exchanges of one patch."""
        model, batch = patch.receiver, patch.batch
        reading = patch.reading
        begun = replay(model, patch.receiver_ids, batch.mask, reading.positions, reading.beside)
        logits = begun.record({site.layer for site in sites if site.layer is not None})
        plain = patch.reading.value(logits).cpu().double()
        return cls(patch, sites, patch.given([site.hook for site in sites]), begun, plain)

    def effects(self) -> SiteScores:
        """What exchanging each whole site does, in the direction's sign."""
        found = {}
        for site in self.sites:
            with torch.no_grad():
                value, _ = self._run(site, 1.0)
            found[site.hook] = self.patch.sign * (value.cpu().double() - self.plain)
        return found

    def integrals(self, nodes: int) -> SiteScores:
        """Scores [prompt, index] of each site."""
        return {site.hook: self._integral(site, nodes) for site in self.sites}

    def _integral(self, site: Site, nodes: int) -> Float64[Tensor, "batch index"]:
        total = torch.zeros(())
        for s, weight in gauss_legendre(nodes):
            with torch.enable_grad():
                value, point = self._run(site, s)
                if not value.requires_grad:
                    raise MetricError(
                        f"{self.patch.reading.metric.name} does not depend on the logits "
                        "differentiably."
                    )
                (gradient,) = torch.autograd.grad(value.sum(), point.leaf)
            product = site.product(point.step, wide(gradient))
            total = total + weight * product.cpu().double()
        return self.patch.sign * total

    def _run(self, site: Site, s: float) -> tuple[Float[Tensor, " batch"], "_Point"]:
        """The metric with the site at ``s`` of the way, and where it then is."""
        point = _Point(site, self.given[site.hook], self.patch, s)
        with self.patch.receiver.hooks(fwd=[(site.hook, point.hook)]):
            logits = self.begun.logits(site.layer)
        return self.patch.reading.value(logits), point


@dataclass(eq=False)
class _Point:
    """A site on its way from the receiver's activation to the given one.

    Attributes:
        site: The site.
        given: What is put in.
        patch: Where.
        s: How far.
        leaf: The activation there, where the graph begins.
        step: The whole way, 0 at padding.
    """

    site: Site
    given: Tensor
    patch: Patch
    s: float
    leaf: Tensor = field(default_factory=lambda: torch.zeros(()))
    step: Tensor = field(default_factory=lambda: torch.zeros(()))

    def hook(self, activation: Tensor, hook: Any) -> Tensor:
        """A forward hook."""
        own = activation.detach()
        real = self.patch.batch.mask.bool().to(own.device)
        self.step = difference(self.site, self.given, own, real)
        self.leaf = (wide(own) + self.s * self.step).to(own.dtype).requires_grad_(True)
        return self.leaf
