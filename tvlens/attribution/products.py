"""Differences times gradients, reduced in the backward hook so that neither is kept for long.

One forward of the donor, one forward and backward of the receiver. The donor's activations are
kept, O(batch * pos * width of all sites), and become differences while the receiver runs; each is
dropped as soon as its gradient has arrived, unless more backward passes are to come. What stays is
[batch, index] a site, by position [batch, pos, index].
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tvlens.errors import HostError, MetricError
from tvlens.models.lens import HookList, LensModel, leaf

from .directions import Patch
from .nodes import NODES, Site, wide
from .patterns import PatternChange

START = NODES["embed"][1]
"""Where the graph of a frozen model starts."""


@dataclass
class Products:
    """Hooks that turn gradients into scores as they arrive.

    Attributes:
        sites: The activations.
        difference: What is put in at every site; minus the activation once the forward has passed.
        real: Real tokens.
        by_position: Keep the positions apart.
        patterns: Of queries and keys whose softmax is made anew: what they do to the pattern, by
            hook. They have no difference, and their gradient is that of the pattern.
        again: Keep the differences for another backward pass.
        start: The embedding's output, where the graph of a frozen model starts.
        scores: [batch, index] or [batch, pos, index] of every site, filled in the backward.
    """

    sites: Sequence[Site]
    difference: dict[str, Tensor]
    real: Bool[Tensor, "batch pos"]
    by_position: bool = False
    patterns: Mapping[str, PatternChange] = field(default_factory=dict)
    again: bool = False
    start: list[Tensor] = field(default_factory=list)
    scores: dict[str, Tensor] = field(default_factory=dict)

    def forward_hooks(self) -> HookList:
        """Hooks that take the differences and begin the graph."""
        subtracted = [site for site in self.sites if site.hook not in self.patterns]
        return [
            *((site.hook, partial(self._subtract, site)) for site in subtracted),
            self.begin,
        ]

    @property
    def begin(self) -> tuple[str, Callable[..., Tensor]]:
        """The forward hook at which the graph of a frozen model starts."""
        return START, self._begin

    def backward_hooks(self) -> HookList:
        """Hooks that take the products; the embedding has none, it is the graph's leaf."""
        return [
            (NODES["pattern"][1].format(site.layer), partial(self._through_pattern, site))
            if site.hook in self.patterns
            else (site.hook, partial(self.multiply, site))
            for site in self.sites
            if site.hook != START
        ]

    def finish(self) -> None:
        """Take the product of the embedding, if it is among the sites, after a backward.

        Raises:
            HostError: Some site's gradient never came.
        """
        gradient = self.start[0].grad
        for site in self.sites:
            if site.hook == START and gradient is not None:
                self.multiply(site, gradient, None)
        if silent := [site.hook for site in self.sites if site.hook not in self.scores]:
            raise HostError(f"no gradient reached {silent[0]!r}.")

    def next_pass(self) -> dict[str, Tensor]:
        """The scores of a backward pass; another may follow.

        Raises:
            HostError: Some site's gradient never came.
        """
        self.finish()
        found, self.scores = self.scores, {}
        self.start[0].grad = None
        return found

    def multiply(self, site: Site, gradient: Tensor, hook: object) -> None:
        """A backward hook of ``site``."""
        difference = self.difference[site.hook]
        if not self.again:
            del self.difference[site.hook]
        self.scores[site.hook] = site.product(
            difference, wide(gradient), by_position=self.by_position
        )

    def _through_pattern(self, site: Site, gradient: Tensor, hook: object) -> None:
        self.scores[site.hook] = self.patterns[site.hook].score(gradient)

    def _subtract(self, site: Site, activation: Tensor, hook: object) -> None:
        given = self.difference[site.hook]
        self.difference[site.hook] = difference(site, given, activation.detach(), self.real)

    def _begin(self, activation: Tensor, hook: object) -> Tensor:
        self.start.append(leaf(activation, hook))
        return self.start[0]


def difference(
    site: Site, given: Tensor, own: Float[Tensor, "batch ..."], real: Bool[Tensor, "batch pos"]
) -> Float[Tensor, "batch ..."]:
    """What is put in minus what is there, 0 at padding."""
    return (wide(given) - wide(own)).masked_fill(~site.real(real, own.ndim), 0.0)


def first_order(
    patch: Patch, sites: Sequence[Site], *, by_position: bool = False
) -> dict[str, Float[Tensor, "batch ..."]]:
    """Scores of every site by hook name, in the direction's sign."""
    given = patch.given([site.hook for site in sites])
    real = patch.batch.mask.bool().to(patch.receiver.device)
    products = Products(sites, given, real, by_position)
    forward, backward = products.forward_hooks(), products.backward_hooks()
    model = patch.receiver
    with model.frozen(), torch.enable_grad(), model.hooks(fwd=forward, bwd=backward):
        metric_value(patch, model).backward()
    products.finish()
    return {name: patch.sign * score for name, score in products.scores.items()}


def metric_value(patch: Patch, model: LensModel) -> Float[Tensor, ""]:
    """The metric summed over prompts, which are independent rows: one backward serves all.

    Raises:
        MetricError: It does not depend on the logits differentiably.
    """
    values = patch.reading.value(patch.reading.logits(model, patch.receiver_ids))
    if not values.requires_grad:
        raise MetricError(
            f"{patch.reading.metric.name} does not depend on the logits differentiably."
        )
    return values.sum()
