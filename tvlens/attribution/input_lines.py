"""Gradients along the inputs: the embedding moved from the tokens that run to those given.

Within one model, with e the embedding of the receiver's tokens, e' that of the tokens whose
activations are put in, and s in [0, 1], the model runs on e + s (e' - e). First order takes the
gradient at s = 0, where a saturated softmax or MLP may hide an effect; here it is averaged along
the line [1], while the exchanged activations stay those of the two real runs:

    score = sign * (given activation - receiver's) . integral over s of d metric / d activation

For the embedding itself these are integrated gradients of the inputs [2], by position those of
single tokens, and they sum to metric(s = 1) - metric(s = 0): the ``gap`` of every row is what the
quadrature leaves of that. Scores of other activations do not sum up. Only directions between a
prompt and its corrupt prompt have such a line.

[1] Hanna, Pezzelle and Belinkov 2024, https://arxiv.org/abs/2403.17806 (EAP-IG, there for edges)
[2] Sundararajan, Taly and Yan 2017, https://arxiv.org/abs/1703.01365
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from tvlens.errors import HostError
from tvlens.models.prompts import Batch

from .directions import CORRUPTED, Patch, Question
from .nodes import NODES, Site, activations, wide
from .products import START, Products, difference, metric_value
from .weights import INCOMPLETE, NOISE, gauss_legendre

NODE_COUNTS = (8, 16, 32, 64)
"""Nodes tried in turn: half way between two tokens lies no token, and norms turn fast there."""
COMPLETE = 0.01
"""Mean gap over mean change at which more nodes are not tried; ranks need less."""
SEARCHED = 4
"""Prompts on which the number of nodes is found."""
EMBEDDING = Site(NODES["embed"][0], None, START)


@dataclass(eq=False)
class AlongInputs:
    """An estimator at a number of nodes; it remembers what they leave of the integral.

    Attributes:
        nodes: Quadrature nodes.
        gaps: Of every chunk of prompts: metric(s = 1) - metric(s = 0) minus the scores of the
            embedding, in the direction's sign.
        changes: Of every chunk that difference.
    """

    nodes: int
    gaps: list[Float64[Tensor, " batch"]] = field(default_factory=list)
    changes: list[Float64[Tensor, " batch"]] = field(default_factory=list)

    def __call__(
        self, patch: Patch, sites: Sequence[Site], *, by_position: bool = False
    ) -> dict[str, Float[Tensor, "batch ..."]]:
        """Scores of every site by hook name, as ``ig_inputs`` gives them."""
        asked = [*sites, *([] if EMBEDDING in sites else [EMBEDDING])]
        found = ig_inputs(patch, asked, by_position=by_position, nodes=self.nodes)
        self.note(patch, found[START].flatten(1).sum(1))
        return {site.hook: found[site.hook] for site in sites}

    def note(self, patch: Patch, embedding: Float[Tensor, " batch"]) -> None:
        """Remember what is left when the embedding has these scores."""
        change = change_of(patch)
        self.changes.append(change)
        self.gaps.append(change - embedding.cpu().double())

    @property
    def completeness(self) -> float:
        """mean |gap| / mean |change|; 0 is perfect."""
        gaps, changes = torch.cat(self.gaps), torch.cat(self.changes)
        return float(gaps.abs().mean()) / max(float(changes.abs().mean()), NOISE)

    @property
    def facts(self) -> dict[str, Any]:
        """What the rows of such scores say about it."""
        status = "incomplete" if self.completeness > INCOMPLETE else "ok"
        return {"nodes": self.nodes, "gap": torch.cat(self.gaps).tolist(), "status": status}


@dataclass(frozen=True, eq=False)
class InputLine:
    """The line of one chunk of prompts.

    Attributes:
        start: The embedding of the receiver's tokens.
        way: What that of the given tokens differs by; 0 at padding.
    """

    start: Float[Tensor, "batch pos d_model"]
    way: Float[Tensor, "batch pos d_model"]

    @classmethod
    def of(cls, patch: Patch) -> "InputLine":
        """The line of a patch between tokens."""
        model, mask = patch.receiver, patch.batch.mask
        own = activations(model, patch.receiver_ids, mask, [START])[START]
        real = mask.bool().to(model.device)
        return cls(own, difference(EMBEDDING, patch.given([START])[START], own, real))

    def hook(self, s: float) -> tuple[str, Callable[..., Tensor]]:
        """A forward hook that puts in the embedding at ``s`` of the way."""
        return START, partial(self._put, s)

    def _put(self, s: float, activation: Tensor, hook: object) -> Tensor:
        return (wide(self.start) + s * self.way).to(activation.dtype)


def require_line(direction: str) -> None:
    """Refuse directions whose two runs do not differ in their tokens.

    Raises:
        HostError: This one's do not.
    """
    if direction not in CORRUPTED:
        raise HostError(
            f"{direction} runs the same tokens twice, so there is no line between its inputs.",
            hint=f"ig_inputs is for {' and '.join(CORRUPTED)}.",
        )


def ig_inputs(
    patch: Patch, sites: Sequence[Site], *, by_position: bool = False, nodes: int
) -> dict[str, Float[Tensor, "batch ..."]]:
    """Scores of every site by hook name, in the direction's sign.

    Memory: both runs' activations of all sites, O(batch * pos * width), beside one graph.

    Args:
        patch: What is put where.
        sites: The activations.
        by_position: Keep the positions apart.
        nodes: Quadrature nodes.

    Raises:
        MetricError: The metric does not depend on the logits differentiably.
    """
    model, mask, names = patch.receiver, patch.batch.mask, [site.hook for site in sites]
    real = mask.bool().to(model.device)
    own, given = activations(model, patch.receiver_ids, mask, names), patch.given(names)
    ways = {site.hook: difference(site, given[site.hook], own[site.hook], real) for site in sites}
    line, total = InputLine.of(patch), {}
    for s, weight in gauss_legendre(nodes):
        products = Products(sites, dict(ways), real, by_position)
        hooks = [line.hook(s), products.begin]
        with model.frozen(), torch.enable_grad():
            with model.hooks(fwd=hooks, bwd=products.backward_hooks()):
                metric_value(patch, model).backward()
        products.finish()
        for name, score in products.scores.items():
            total[name] = total.get(name, 0.0) + patch.sign * weight * score
    return total


def along_inputs(asked: Question, batch: Batch, *, rows_at_once: int) -> AlongInputs:
    """The estimator with as many nodes as make the embedding's scores sum up, or the most.

    The number is found on a few of the prompts; ``facts`` say what it leaves on all.

    Args:
        asked: The direction.
        batch: The prompts, all of them with a corrupt prompt.
        rows_at_once: Prompts of one pass.

    Raises:
        HostError: The direction has no line between inputs.
    """
    require_line(asked.direction)
    step = max(1, len(batch) // SEARCHED)
    some = batch.rows(range(0, len(batch), step)[:SEARCHED])
    tried = AlongInputs(NODE_COUNTS[0])
    for nodes in NODE_COUNTS:
        tried = AlongInputs(nodes)
        for rows in some.chunks(rows_at_once):
            tried(asked.patch(rows, {}), [EMBEDDING])
        if tried.completeness <= COMPLETE:
            break
    return AlongInputs(tried.nodes)


def change_of(patch: Patch) -> Float64[Tensor, " batch"]:
    """metric(s = 1) - metric(s = 0) of every prompt, in the direction's sign."""
    line, values = InputLine.of(patch), []
    for s in (1.0, 0.0):
        with torch.no_grad(), patch.receiver.hooks(fwd=[line.hook(s)]):
            logits = patch.reading.logits(patch.receiver, patch.receiver_ids)
            values.append(patch.reading.value(logits).cpu().double())
    return patch.sign * (values[0] - values[1])
