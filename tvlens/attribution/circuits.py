"""Scores of the circuits OV and QK of every query head, which divide attention between them.

A kv head's W_K and W_V act through each query head that reads it. The gradient at a key or value
is a sum over these heads, so with g_k^h the part of it that comes through head h

    QK_h = < grad W_Q[h], dW_Q[h] > + sum over positions of g_k^h . (x dW_K + db_K)[kv of h]
    OV_h = < grad W_O[h], dW_O[h] > + sum over positions of g_v^h . (x dW_V + db_V)[kv of h]

(b_Q with W_Q). All heads together sum to the scores of the attention's four matrices and of b_Q,
b_K and b_V: a division by query head where ``head`` and ``kv_head`` rows divide the same by
parameter. Unlike those, a share of W_K or W_V is no edit of weights, so it has no exact
counterpart. The gradient through one head is taken by a backward of the attention alone, from the
outputs z of every head that is the n-th reader of its kv head to keys and values: rotary phases,
norms on queries and keys, caps and masks are in it without being named.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from tvlens.components import Component
from tvlens.geometry.changes import Factored
from tvlens.models.lens import leaf
from tvlens.models.metrics import Metric
from tvlens.models.pair import HookedPair
from tvlens.models.prompts import Batch
from tvlens.models.reading import Reading
from tvlens.tables import Table

from .gates import GatedModel
from .lines import (
    Line,
    averaged,
    by_index,
    changed,
    flat,
    line_of,
    moved,
    on_device,
    terms,
)
from .series import CIRCUITS
from .sites import Site
from .tables import MethodRun, sampled_table
from .weights import WeightScores

_MAPS = ("attn.q", "attn.k", "attn.v", "attn.o")

Rows = dict[tuple[str, int], Float[Tensor, "prompt head"]]
"""Scores by circuit and layer."""


@dataclass(frozen=True, eq=False)
class CircuitScores:
    """Scores of the circuits of all heads.

    Attributes:
        components: ``L0H0.OV`` ..., layer by layer, then those of QK.
        values: In the metric's units, float64.
    """

    components: list[Component]
    values: Float[Tensor, "component prompt"]


def circuit_scores(
    models: HookedPair | GatedModel, batch: Batch, metric: Metric, scores: WeightScores
) -> CircuitScores:
    """The scores of OV and QK of every query head, by the method and at the nodes of ``scores``.

    Keeps the graph of one chunk of prompts while the attention's backwards are taken.

    Args:
        models: The pair, or a base with a tuning vector behind gates.
        batch: The prompts of the scores.
        metric: Their metric.
        scores: From ``weight_scores`` or ``gated_weight_scores`` on these.

    Raises:
        HostError: As for ``weight_scores``.
    """
    with line_of(models) as line:
        passes = _Passes(line, {site.name: site for site in line.sites})
        rows = averaged(line, batch, metric, scores, passes.rows)
        layers, heads = range(line.lens.n_layers), range(line.lens.n_heads)
    found = [Component("head", i, h, part) for part in CIRCUITS for i in layers for h in heads]
    values = [rows[part, layer].mT for part in CIRCUITS for layer in layers]
    return CircuitScores(found, torch.cat(values))


def circuit_table(found: CircuitScores, run: MethodRun) -> Table:
    """A row for every circuit and prompt; ``kind`` head, ``part`` OV or QK."""
    return sampled_table(
        found.components, rearrange(found.values, "component prompt -> prompt component"), run
    )


@dataclass(eq=False)
class _Kept:
    """Tensors of one pass by hook name.

    Attributes:
        inputs: What maps read, off the graph.
        passing: Outputs of maps and of the heads, on the graph.
    """

    inputs: dict[str, Tensor] = field(default_factory=dict)
    passing: dict[str, Tensor] = field(default_factory=dict)

    def looked_at(self, name: str) -> tuple[str, Callable[..., None]]:
        """A hook that keeps what passes."""
        return name, partial(self._look, name)

    def _look(self, name: str, activation: Tensor, hook: Any) -> None:
        self.inputs[name] = flat(activation.detach())

    def through(self, name: str) -> tuple[str, Callable[..., Tensor]]:
        """A hook that keeps what passes and hands on the very tensor that it keeps."""
        return name, partial(self._pass, name)

    def _pass(self, name: str, activation: Tensor, hook: Any) -> Tensor:
        self.passing[name] = activation
        return activation


@dataclass(frozen=True, eq=False)
class _Passes:
    line: Line
    sites: dict[str, Site]

    def rows(self, reading: Reading, s: float) -> Rows:
        """One forward, one backward, and those of the attentions alone."""
        lens, kept = self.line.lens, _Kept()
        blocks = [f"blocks.{layer}." for layer in range(lens.n_layers)]
        first = [kept.looked_at(f"{b}attn.{m}.hook_in") for b in blocks for m in "qkv"]
        first += [kept.through(f"{b}attn.o.hook_in") for b in blocks]
        last = [kept.through(f"{b}{m}.hook_out") for b in blocks for m in _MAPS]
        # what gates add to an output starts from its input, so those are handed on before
        hooks = [*first, *self.line.place(s, reading), ("hook_embed", leaf), *last]
        with torch.enable_grad(), lens.hooks(fwd=hooks):
            total = reading.value(reading.logits(lens)).sum()
            names = [f"{b}attn.{m}" for b in blocks for m in ("q.hook_out", "o.hook_in")]
            names += [f"{b}attn.o.hook_out" for b in blocks]
            passing = [kept.passing[name] for name in names]
            found = torch.autograd.grad(total, passing, retain_graph=True)
            gradients = dict(zip(names, found, strict=True))
            rows: Rows = {}
            for layer, block in enumerate(blocks):
                shares = self._shares(kept, gradients[f"{block}attn.o.hook_in"], block)
                rows["OV", layer] = self._written(kept, gradients, block) + shares["v"]
                rows["QK", layer] = self._read(kept, gradients, block) + shares["k"]
        return rows

    def _read(
        self, kept: _Kept, gradients: dict[str, Tensor], block: str
    ) -> Float[Tensor, "prompt head"]:
        """Scores of W_Q and b_Q by head."""
        site = self.sites[f"{block}attn.q"]
        g = flat(gradients[f"{site.name}.hook_out"])
        return by_index(g * self._moved(site, kept.inputs[f"{site.name}.hook_in"]), self._heads)

    def _written(
        self, kept: _Kept, gradients: dict[str, Tensor], block: str
    ) -> Float[Tensor, "prompt head"]:
        """Scores of W_O by head."""
        site = self.sites[f"{block}attn.o"]
        z = flat(kept.passing[f"{site.name}.hook_in"].detach())
        g = flat(gradients[f"{site.name}.hook_out"])
        change = on_device(self.line.change(site, "weight"), g.device)
        return by_index(terms(z, g, change, outward=False), self._heads)

    def _shares(
        self, kept: _Kept, g_z: Float[Tensor, "batch pos ..."], block: str
    ) -> dict[str, Float[Tensor, "prompt head"]]:
        """What W_K and W_V (with their biases) owe to each query head."""
        groups = self.line.lens.n_kv_heads
        readers = self._heads // groups
        sites = {name: self.sites[f"{block}attn.{name}"] for name in "kv"}
        outputs = [kept.passing[f"{site.name}.hook_out"] for site in sites.values()]
        moves = [self._moved(site, kept.inputs[f"{site.name}.hook_in"]) for site in sites.values()]
        found: dict[str, list[Tensor]] = {name: [] for name in sites}
        for reader in range(readers):
            through = torch.autograd.grad(
                kept.passing[f"{block}attn.o.hook_in"],
                outputs,
                _of_reader(g_z, reader, groups=groups, readers=readers),
                retain_graph=True,
            )
            for name, gradient, move in zip(sites, through, moves, strict=True):
                found[name].append(by_index(flat(gradient) * move, groups))
        return {
            name: rearrange(torch.stack(rows), "reader batch group -> batch (group reader)")
            for name, rows in found.items()
        }

    def _moved(
        self, site: Site, x: Float[Tensor, "batch pos d_in"]
    ) -> Float[Tensor, "batch pos d_out"]:
        """What the change of a map adds to its output, its bias's included."""
        change = on_device(self.line.change(site, "weight"), x.device)
        width = change.shape[-1]
        out = moved(x, change) if changed(change) else x.new_zeros(*x.shape[:-1], width)
        if "bias" not in site.tensors:
            return out
        bias = self.line.change(site, "bias")
        return out if isinstance(bias, Factored) else out + bias.to(out.device)

    @property
    def _heads(self) -> int:
        return self.line.lens.n_heads


def _of_reader(
    g_z: Float[Tensor, "batch pos ..."], reader: int, *, groups: int, readers: int
) -> Float[Tensor, "batch pos ..."]:
    """The gradient at the outputs of those heads that are the n-th reader of their kv head."""
    side_by_side = rearrange(g_z, "batch pos ... -> batch pos (...)")
    by_reader = rearrange(
        side_by_side, "batch pos (group reader width) -> batch pos group reader width",
        group=groups, reader=readers,
    )  # fmt: skip
    kept = torch.zeros_like(by_reader)
    kept[:, :, :, reader] = by_reader[:, :, :, reader]
    return kept.reshape(g_z.shape)
