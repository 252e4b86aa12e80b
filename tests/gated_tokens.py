"""Weight attribution by position, written another way: the oracle of ``WeightScores.by_token``.

Let every position p have a gate s_p, and let each linear map, norm and embedding compute at p with
base + s_p (tuned - base). All gates at 0 are the base model, all at 1 the tuned one, so

    score_p = integral over s in [0, 1] of d metric / d s_p, all gates at s,

sums over the tokens of a prompt to metric(tuned) - metric(base), in the metric's units and with
its sign; above 0: the metric is higher because tuned weights work at this token. A score belongs
to the place of the computation, not to the word alone: what a later token reads of an earlier one
through attention was computed at the earlier one.

The sites of ``weights.py`` are affine in their weights, so the derivative at a site is the site
run on the difference itself, and one backward pass to the gates yields every token's score.
"""

from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from tvlens.attribution.sites import Site, WeightPath, weight_path
from tvlens.attribution.weights import chunks, gauss_legendre
from tvlens.models.lens import HookList
from tvlens.models.metrics import Metric, Run
from tvlens.models.pair import HookedPair
from tvlens.models.prompts import Batch


def gated_token_scores(
    hooked: HookedPair, batch: Batch, metric: Metric, *, nodes: int
) -> Float[Tensor, "batch pos"]:
    """The score of every token of every prompt, 0 at padding.

    Costs ``nodes`` forward and backward passes; the models are left as they were.
    """
    width = batch.ids.shape[1]
    parts = []
    with hooked.base.frozen(), weight_path(hooked) as path:
        for rows in chunks(batch, hooked.base.d_vocab):
            path.move(0.0)
            reference = _reference_logits(hooked, metric, rows)
            total = torch.zeros(rows.ids.shape, dtype=torch.float64)
            for s, weight in gauss_legendre(nodes):
                path.move(s)
                total += weight * _gate_gradients(path, metric, rows, reference).double().cpu()
            parts.append(torch.nn.functional.pad(total * rows.mask, (0, width - total.shape[1])))
    return torch.cat(parts)


def _reference_logits(hooked: HookedPair, metric: Metric, batch: Batch) -> Tensor | None:
    if metric.reference is None:
        return None
    model = hooked.base if metric.reference == "base" else hooked.tuned
    with torch.no_grad():
        return model(batch.ids, batch.mask)


def _gate_gradients(
    path: WeightPath, metric: Metric, batch: Batch, reference: Tensor | None
) -> Float[Tensor, "batch pos"]:
    gates = torch.zeros(batch.ids.shape, device=path.lens.device, requires_grad=True)
    hooks = _gated(path, gates, batch)
    with torch.enable_grad(), path.lens.hooks(fwd=hooks):
        values = metric(Run(path.lens(batch.ids, batch.mask), reference), batch)
        return torch.autograd.grad(values.sum(), gates)[0]


def _gated(path: WeightPath, gates: Float[Tensor, "batch pos"], batch: Batch) -> HookList:
    """Forward hooks that add gate times the output of the difference at every site."""
    inputs: dict[str, Tensor] = {}
    hooks: list[tuple[str, Callable[..., Any]]] = []

    def kept(site: Site) -> Callable[..., None]:
        return lambda activation, hook: inputs.__setitem__(site.name, activation.detach())

    def added(site: Site) -> Callable[..., Tensor]:
        def hook_function(activation: Tensor, hook: object) -> Tensor:
            moved = _output_of_difference(path, site, inputs.pop(site.name), activation)
            return activation + gates.reshape(*gates.shape, *[1] * (moved.ndim - 2)) * moved

        return hook_function

    for site in path.sites:
        if site.role == "embed":
            inputs[site.name] = batch.ids.to(gates.device)
            hooks.append(("hook_embed", added(site)))
        else:
            hooks += [(f"{site.name}.hook_in", kept(site)), (f"{site.name}.hook_out", added(site))]
    return hooks


def _output_of_difference(path: WeightPath, site: Site, x: Tensor, activation: Tensor) -> Tensor:
    """d output / d s of a site: affine in its weights, so f(delta) - f(0)."""
    delta = {name: path.delta(site, name) for name in site.tensors}
    nothing = {name: torch.zeros_like(tensor) for name, tensor in delta.items()}
    if site.role == "pos_embed":
        x = x.expand(len(activation), -1)
    flat = x if x.ndim == 2 else rearrange(x, "batch pos ... -> batch pos (...)")
    with torch.no_grad():
        moved, constant = (
            torch.func.functional_call(site.module, weights, (flat,))
            for weights in (delta, nothing)
        )
        scale = 1.0
        if site.role == "embed":  # Gemma's hook comes after a factor of sqrt(d_model)
            scale = float(activation.norm() / site.module(flat).norm().clamp_min(1e-30))
        return scale * (moved - constant).reshape(activation.shape)
