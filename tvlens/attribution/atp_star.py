"""AtP*: attribution patching with two repairs (Kramar et al. 2024, arXiv 2403.00745).

First order (``products``) misses a component in two ways. A query or key whose softmax is
saturated has a gradient near 0 however much exchanging it changes the pattern; and where what a
component does directly cancels what it does through later layers, the gradient is the small rest
of large terms, which is not what is left of a real exchange.

*QK fix*: the score of queries and keys goes through the pattern, with the softmax made anew under
what is put in (``patterns``). All other activations keep their first-order score.

*GradDrop*: one more backward pass for every layer l, in which no gradient passes through what l
adds to the residual stream (its attn_out and mlp_out), so that what goes through l cannot cancel
what goes past it. With c_l the scores of that pass and c those of the plain one,

    score = sign(c) * mean over l of |c_l|.

A component's own layer is not in the mean: nothing of it is left there (the paper divides by
L - 1). Activations of the residual stream itself (embed, resid_pre, resid_post) are in no layer
and take the mean over all L. The paper's score is the mean alone; the sign is that of the plain
pass, and where that is exactly 0 that of the sum of c_l. Where terms cancel the sign says little.

The mean is no estimate of a size: an effect through k further layers counts (L - 1 - k) / (L - 1)
of itself; and an effect of attention through the MLP of its own block is never told apart from
its direct one. It is for finding what first order misses. ``qk_fix`` is the first repair alone, in
the metric's units like first order.

Cost: a forward pass and five runs of each attention beside first order, and for GradDrop a
backward pass a layer through one graph, which with all differences stays until the last of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from tvlens.models.lens import HookList, LensModel

from .directions import Patch
from .nodes import NODES, SOFTMAX_PARTS, Site
from .patterns import pattern_changes
from .products import Products, metric_value

ON_STREAM = ("embed", "resid_pre", "resid_post")
"""Activations that are in no layer."""
_ADDED = ("attn_out", "mlp_out")
"""What a layer adds to the residual stream."""


def qk_fix(
    patch: Patch, sites: Sequence[Site], *, by_position: bool = False
) -> dict[str, Float[Tensor, "batch ..."]]:
    """First order, with the softmax made anew for queries and keys; in the direction's sign.

    Keys of all positions are exchanged together, as ``exact_activations`` does; by position each
    alone, as in the paper, so that the scores of a key's positions do not sum to its score.
    """
    made = _Passes(sites)
    _run(patch, made, by_position, [None])
    return {name: patch.sign * score for name, score in made.plain.items()}


def atp_star(
    patch: Patch, sites: Sequence[Site], *, by_position: bool = False
) -> dict[str, Float[Tensor, "batch ..."]]:
    """``qk_fix`` and GradDrop; in the direction's sign.

    By position the mean of sizes is taken of each position, so that positions do not sum to the
    score of all together.
    """
    made, layers = _Passes(sites), range(patch.receiver.n_layers)
    _run(patch, made, by_position, [None, *layers])
    return {site.hook: patch.sign * made.combined(site, len(layers)) for site in sites}


@dataclass
class _Passes:
    """What is kept of one backward pass after another, O(batch * index) a site.

    Attributes:
        sites: The activations.
        plain: The scores with nothing dropped, by hook.
        sizes: Sums of absolute scores over the layers that were dropped, but for a site's own.
        sums: Sums of the same scores with their signs.
    """

    sites: Sequence[Site]
    plain: dict[str, Tensor] = field(default_factory=dict)
    sizes: dict[str, Tensor] = field(default_factory=dict)
    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, layer: int | None, scores: dict[str, Tensor]) -> None:
        """Take in the scores of the pass that dropped ``layer``."""
        if layer is None:
            self.plain = scores
            return
        for site in self.sites:
            if _own_layer(site) != layer:
                score = scores[site.hook]
                self.sizes[site.hook] = self.sizes.get(site.hook, 0.0) + score.abs()
                self.sums[site.hook] = self.sums.get(site.hook, 0.0) + score

    def combined(self, site: Site, layers: int) -> Tensor:
        """The mean size with the plain pass's sign; the plain score where there is one layer."""
        plain, dropped = self.plain[site.hook], layers - (_own_layer(site) is not None)
        if not dropped:
            return plain
        sign = torch.where(plain == 0, self.sums[site.hook], plain).sign()
        return sign * self.sizes[site.hook] / dropped


def _own_layer(site: Site) -> int | None:
    return None if site.part in ON_STREAM else site.layer


def _run(patch: Patch, made: _Passes, by_position: bool, dropped: Sequence[int | None]) -> None:
    """A backward pass for every layer that is dropped, through one graph; None drops nothing."""
    gate, model = Gate(), patch.receiver
    products = _products(patch, made.sites, by_position)
    products.again = len(dropped) > 1
    forward = [*products.forward_hooks(), *(gate.hooks(model) if products.again else ())]
    backward = products.backward_hooks()
    with model.frozen(), torch.enable_grad(), model.hooks(fwd=forward, bwd=backward):
        value = metric_value(patch, model)
        for layer in dropped:
            gate.layer = layer
            value.backward(retain_graph=layer != dropped[-1])
            made.add(layer, products.next_pass())


def _products(patch: Patch, sites: Sequence[Site], by_position: bool) -> Products:
    given = patch.given([site.hook for site in sites])
    fixed = [site for site in sites if site.part in SOFTMAX_PARTS]
    changes = pattern_changes(patch, fixed, given, by_position=by_position)
    plain = {name: tensor for name, tensor in given.items() if name not in changes}
    real = patch.batch.mask.bool().to(patch.receiver.device)
    return Products(sites, plain, real, by_position, patterns=changes)


@dataclass
class Gate:
    """Where gradients leave what layers add to the residual stream.

    Attributes:
        layer: The layer whose gradient is stopped there, None for no layer.
    """

    layer: int | None = None

    def hooks(self, model: LensModel) -> HookList:
        """Forward hooks that let activations pass and wait for their gradients."""
        return [
            (NODES[part][1].format(layer), partial(self._passing, layer))
            for layer in range(model.n_layers)
            for part in _ADDED
        ]

    def _passing(self, layer: int, activation: Tensor, hook: object) -> Tensor:
        passing = activation.view_as(activation)  # a node of its own
        if passing.requires_grad:
            passing.register_hook(partial(self._returned, layer))
        return passing

    def _returned(self, layer: int, gradient: Tensor) -> Tensor:
        return torch.zeros_like(gradient) if self.layer == layer else gradient
