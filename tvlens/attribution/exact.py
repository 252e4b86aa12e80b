"""The exact effect of a component's weights: write its slices, run, put them back.

With theta(s) = base + s (tuned - base) and c a component, the *swing* of c at s is

    swing_c(s) = metric(theta(s), c at its tuned weights) - metric(theta(s), c at its base weights)

    exact_weight_insert   swing at s = 0: c alone into the base
    exact_weight_remove   swing at s = 1: what the tuned model loses with c alone taken out
    exact_weight_path     swing averaged over Gauss-Legendre nodes: what ``weight_ig`` estimates

All three are above 0 if the metric is higher because c is tuned. Insert and remove need one
forward a component, the average two a node, each from c's own block on: what comes before it is
kept from one whole pass, and logits are made only where the metric reads them. Insert and remove
answer other questions than the average (alone from base, alone from tuned) and are findings beside
it, never its check.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tvlens.components import Component
from tvlens.models.lens import LensModel
from tvlens.models.metrics import Metric
from tvlens.models.pair import HookedPair
from tvlens.models.prompts import Batch
from tvlens.models.reading import Reading
from tvlens.models.replay import replay
from tvlens.tables import Table

from .sites import End, Piece, Site, WeightPath, pieces, weight_path
from .tables import sampled_table
from .weights import chunks, gauss_legendre, method_run

ExactMethod = Literal["exact_weight_insert", "exact_weight_remove", "exact_weight_path"]
Patched = Component | tuple[Component, ...]
"""What is patched at once: a component, or several together."""
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
    components: Sequence[Patched],
    *,
    method: ExactMethod,
    nodes: int = 8,
) -> Float[Tensor, "component prompt"]:
    """Exact scores in the metric's units, float64.

    Args:
        hooked: The pair; both models are left bit for bit as they were.
        batch: Tokenised prompts.
        metric: What is measured.
        components: Heads, kv heads, kv groups, neurons, or pieces of the disjoint kinds; a tuple of
            them is patched as one, each of its weights once.
        method: Which exact question is asked.
        nodes: Of ``exact_weight_path``; the run's own make it the oracle of ``weight_ig``.

    Raises:
        HostError: A component has no weights in this model, or the weights are not float32.
    """
    hooked.base.require_eval()
    ends = {"exact_weight_insert": [(0.0, 1.0)], "exact_weight_remove": [(1.0, 1.0)]}
    rule = ends.get(method) or gauss_legendre(nodes)
    with weight_path(hooked) as path:
        cuts = [_pieces(one, path) for one in components]
        parts = []
        for chunk in chunks(batch, hooked.base.d_vocab):
            path.move(0.0)
            measured = _Measured(path, hooked.reading(metric, chunk))
            parts.append(sum(weight * measured.swings(cuts, s) for s, weight in rule))
    return torch.cat(parts, dim=1)


def _pieces(patched: Patched, path: WeightPath) -> list[Piece]:
    """The slices that one component, or several together, own."""
    together = (patched,) if isinstance(patched, Component) else patched
    return [piece for one in together for piece in pieces(one, path.lens, path.sites)]


def first_block(parts: Sequence[Piece], sites: Sequence[Site], lens: LensModel) -> int | None:
    """The block from which a change of ``parts`` is felt; ``n_layers``: only after the blocks.

    None where tokens or positions are embedded, before all blocks.
    """
    known_sites = {site.name: site for site in sites}
    after = {"ln_final", "unembed"}
    felt = [
        lens.n_layers if site.role in after else site.layer
        for site in (known_sites[part.site] for part in parts)
    ]
    known = [layer for layer in felt if layer is not None]
    return min(known) if len(known) == len(felt) else None


class _Measured:
    """One chunk of prompts measured on a base model that is being moved."""

    def __init__(self, path: WeightPath, reading: Reading) -> None:
        self.path, self.reading = path, reading
        batch = reading.batch
        self.begun = replay(path.lens, batch.ids, batch.mask, reading.positions, reading.beside)

    def swings(self, cuts: Sequence[list[Piece]], s: float) -> Float[Tensor, "component prompt"]:
        """The swing of every component at ``s``; at an end one side of all swings is the same."""
        self.path.move(s)
        starts = [first_block(parts, self.path.sites, self.path.lens) for parts in cuts]
        plain = self._value(self.begun.record({at for at in starts if at is not None}))
        known: dict[End, Tensor] = {}
        if s in (0.0, 1.0):
            known["base" if s == 0.0 else "tuned"] = plain
        rows = []
        for parts, start in zip(cuts, starts, strict=True):
            high, low = (self._with(parts, start, end, known) for end in ENDS)
            rows.append(high - low)
        return torch.stack(rows) if rows else torch.zeros(0, len(plain)).double()

    def _value(self, logits: Tensor) -> Float[Tensor, " prompt"]:
        return self.reading.value(logits).cpu().double()

    def _with(
        self, parts: list[Piece], start: int | None, end: End, known: dict[End, Tensor]
    ) -> Tensor:
        if end in known:
            return known[end]
        with self.path.placed(parts, end), torch.no_grad():
            return self._value(self.begun.logits(start))


def noise_floor(hooked: HookedPair, batch: Batch, metric: Metric, *, prompts: int = 4) -> float:
    """How far the base's metric moves when a prompt runs alone instead of in its batch.

    The true change is 0, so this is what rounding does to an exact score, in metric units.
    """
    some = batch.rows(range(min(prompts, len(batch))))
    together = hooked.values(hooked.base, metric, some)
    alone = torch.cat([hooked.values(hooked.base, metric, one) for one in some.chunks(1)])
    return float((together - alone).abs().max())
