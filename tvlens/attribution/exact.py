"""The exact effect of a component's weights: write its slices, run, put them back.

With theta(s) = base + s (tuned - base) and c a component, the *swing* of c at s is

    swing_c(s) = metric(theta(s), c at its tuned weights) - metric(theta(s), c at its base weights)

    exact_weight_insert   swing at s = 0: c alone into the base
    exact_weight_remove   swing at s = 1: what the tuned model loses with c alone taken out
    exact_weight_path     swing averaged over Gauss-Legendre nodes: what ``weight_ig`` estimates

All three are above 0 if the metric is higher because c is tuned. Insert and remove need one
forward a component, the average two a node. Insert and remove answer other questions than the
average (alone from base, alone from tuned) and are findings beside it, never its check.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tvlens.components import Component
from tvlens.models.metrics import Metric, Run
from tvlens.models.pair import HookedPair
from tvlens.models.prompts import Batch
from tvlens.tables import Table

from .sites import End, Piece, WeightPath, pieces, weight_path
from .tables import sampled_table
from .weights import chunks, gauss_legendre, method_run

ExactMethod = Literal["exact_weight_insert", "exact_weight_remove", "exact_weight_path"]
ENDS: tuple[End, End] = ("tuned", "base")


def exact_weight_table(
    hooked: HookedPair,
    batch: Batch,
    metric: Metric,
    components: Sequence[Component],
    *,
    method: ExactMethod,
    nodes: int = 8,
) -> Table:
    """The exact scores of ``components`` in the attribution table's form, one row per prompt."""
    scores = exact_weight_scores(hooked, batch, metric, components, method=method, nodes=nodes)
    used = nodes if method == "exact_weight_path" else 1
    run = method_run(method, hooked, batch, metric, nodes=used)
    return sampled_table(list(components), scores.mT, run)


def exact_weight_scores(
    hooked: HookedPair,
    batch: Batch,
    metric: Metric,
    components: Sequence[Component],
    *,
    method: ExactMethod,
    nodes: int = 8,
) -> Float[Tensor, "component prompt"]:
    """Exact scores in the metric's units, float64.

    Args:
        hooked: The pair; both models are left bit for bit as they were.
        batch: Tokenised prompts.
        metric: What is measured.
        components: Heads, kv heads, kv groups, neurons, or pieces of the disjoint kinds.
        method: Which exact question is asked.
        nodes: Of ``exact_weight_path``; the run's own make it the oracle of ``weight_ig``.

    Raises:
        HostError: A component has no weights in this model, or the weights are not float32.
    """
    hooked.base.require_eval()
    ends = {"exact_weight_insert": [(0.0, 1.0)], "exact_weight_remove": [(1.0, 1.0)]}
    rule = ends.get(method) or gauss_legendre(nodes)
    with weight_path(hooked) as path:
        cuts = [pieces(component, hooked.base, path.sites) for component in components]
        parts = []
        for chunk in chunks(batch, hooked.base.d_vocab):
            path.move(0.0)
            measured = _Measured(path, metric, chunk, hooked.reference_logits(metric, chunk))
            parts.append(sum(weight * measured.swings(cuts, s) for s, weight in rule))
    return torch.cat(parts, dim=1)


class _Measured:
    """One chunk of prompts measured on a base model that is being moved."""

    def __init__(
        self, path: WeightPath, metric: Metric, batch: Batch, reference: Tensor | None
    ) -> None:
        self.path, self.metric, self.batch, self.reference = path, metric, batch, reference

    def value(self) -> Float[Tensor, " prompt"]:
        """The metric at the weights as they are."""
        with torch.no_grad():
            logits = self.path.lens(self.batch.ids, self.batch.mask)
            return self.metric(Run(logits, self.reference), self.batch).cpu().double()

    def swings(self, cuts: Sequence[list[Piece]], s: float) -> Float[Tensor, "component prompt"]:
        """The swing of every component at ``s``; at an end one side of all swings is the same."""
        self.path.move(s)
        known: dict[End, Tensor] = {}
        if s in (0.0, 1.0):
            known["base" if s == 0.0 else "tuned"] = self.value()
        rows = []
        for parts in cuts:
            high, low = (self._with(parts, end, known) for end in ENDS)
            rows.append(high - low)
        return torch.stack(rows) if rows else torch.zeros(0, len(self.batch)).double()

    def _with(self, parts: list[Piece], end: End, known: dict[End, Tensor]) -> Tensor:
        if end in known:
            return known[end]
        with self.path.placed(parts, end):
            return self.value()


def noise_floor(hooked: HookedPair, batch: Batch, metric: Metric, *, prompts: int = 4) -> float:
    """How far the base's metric moves when a prompt runs alone instead of in its batch.

    The true change is 0, so this is what rounding does to an exact score, in metric units.
    """
    some = batch.rows(range(min(prompts, len(batch))))
    together = hooked.values(hooked.base, metric, some)
    alone = torch.cat([hooked.values(hooked.base, metric, one) for one in some.chunks(1)])
    return float((together - alone).abs().max())
