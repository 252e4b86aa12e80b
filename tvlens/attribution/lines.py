"""A base model at any place of the straight line to its fine-tune, by swap or by gates.

What is averaged over a line (``parts``, ``circuits``) does not care how the model gets there. By
swap the weights are written in place, both models resident; by gates hooks add what the difference
would add, the weights stay, and factors of an adapter stay factors.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from einops import einsum, rearrange, reduce
from jaxtyping import Float, Float64
from torch import Tensor

from tvlens.geometry.changes import Change, Factored
from tvlens.models.lens import HookList, LensModel
from tvlens.models.metrics import Metric
from tvlens.models.pair import HookedPair
from tvlens.models.prompts import Batch
from tvlens.models.reading import Reading
from tvlens.weights.delta import Absent, Delta, LowRank

from .gates import GatedModel
from .nodes import wide
from .sites import Site, WeightPath, weight_path
from .weights import METHODS, WeightScores, chunks, gauss_legendre

Pass = Callable[[Reading, float], dict[Any, Tensor]]
"""One forward and backward at a place of the line: numbers [prompt, ...] by a key."""


@dataclass(frozen=True, eq=False)
class Line:
    """A base model that can be put anywhere between base and tuned.

    Attributes:
        lens: The model.
        sites: Where it has weights.
        base: A site's base weight, canonical.
        change: The change of a site's weight or bias, canonical.
        reading: A metric on prompts; puts the model back to the base.
        place: Put the model at a place of the line; the hooks that this takes, if any.
    """

    lens: LensModel
    sites: list[Site]
    base: Callable[[Site], Tensor]
    change: Callable[[Site, str], Change]
    reading: Callable[[Metric, Batch], Reading]
    place: Callable[[float, Reading], HookList]


@contextmanager
def line_of(models: HookedPair | GatedModel) -> Iterator[Line]:
    """The line of a pair, by swap, or of a gated model, by gates; afterwards all is as it was.

    Raises:
        HostError: The model is in training mode, or a pair's weights cannot be moved.
    """
    if isinstance(models, GatedModel):
        with models.lens.frozen():
            yield _by_gates(models)
        return
    with models.base.frozen(), weight_path(models) as path:
        yield _by_swap(models, path)


def averaged(
    line: Line, batch: Batch, metric: Metric, scores: WeightScores, one_pass: Pass
) -> dict[Any, Tensor]:
    """What ``one_pass`` gives, averaged over the nodes of ``scores``; all prompts, float64."""
    at = METHODS[scores.method][2]
    rule = gauss_legendre(scores.nodes) if at == "path" else [(float(at == "tuned"), 1.0)]
    made: list[dict[Any, Tensor]] = []
    for part in chunks(batch, line.lens.d_vocab):
        reading, total = line.reading(metric, part), {}
        for s, weight in rule:
            for key, rows in one_pass(reading, s).items():
                total[key] = total.get(key, 0.0) + weight * rows.cpu().double()
        made.append(total)
    return {key: torch.cat([rows[key] for rows in made]) for key in made[0]}


def terms(
    x: Float[Tensor, "batch pos d_in"],
    g: Float[Tensor, "batch pos d_out"],
    change: Change,
    *,
    outward: bool,
) -> Float[Tensor, "batch pos width"]:
    """A score's terms by entry of what a map writes (``outward``), or of what it reads.

    Args:
        x: What the map reads.
        g: The gradient at what it writes.
        change: The change of its weight.
        outward: By entries of what it writes.
    """
    if isinstance(change, Factored):
        return g * moved(x, change) if outward else x * moved(g, change.turned)
    if outward:
        return g * moved(x, change)
    return x * einsum(g, change, "batch pos d_out, d_in d_out -> batch pos d_in")


def moved(x: Float[Tensor, "batch pos d_in"], change: Change) -> Float[Tensor, "batch pos d_out"]:
    """What a change adds to a map's output, x D."""
    if isinstance(change, Factored):
        low = einsum(x, change.left, "batch pos d_in, d_in rank -> batch pos rank")
        return einsum(low, change.right, "batch pos rank, rank d_out -> batch pos d_out")
    return einsum(x, change, "batch pos d_in, d_in d_out -> batch pos d_out")


def flat(activation: Float[Tensor, "batch pos ..."]) -> Float[Tensor, "batch pos width"]:
    """Heads side by side, in float32 at least."""
    return wide(rearrange(activation, "batch pos ... -> batch pos (...)"))


def by_index(
    entries: Float[Tensor, "batch pos width"], count: int
) -> Float64[Tensor, "batch index"]:
    """Sums over positions and over the entries of each head or neuron."""
    summed = reduce(entries, "batch pos (index width) -> batch index", "sum", index=count)
    return summed.double()


def changed(change: Change) -> bool:
    """Whether a change is anything but zero."""
    sides = (change.left, change.right) if isinstance(change, Factored) else (change,)
    return all(bool(side.any()) for side in sides)


def on_device(change: Change, device: torch.device) -> Change:
    """A change where ``device`` is."""
    if isinstance(change, Factored):
        return Factored(change.left.to(device), change.right.to(device))
    return change.to(device)


def _by_swap(hooked: HookedPair, path: WeightPath) -> Line:
    def base(site: Site) -> Tensor:
        return site.canonical("weight", path.base[site.name, "weight"])

    def change(site: Site, tensor: str) -> Change:
        return site.canonical(tensor, path.delta(site, tensor))

    def reading(metric: Metric, batch: Batch) -> Reading:
        path.move(0.0)
        return hooked.reading(metric, batch)

    def place(s: float, reading: Reading) -> HookList:
        path.move(s)
        return ()

    return Line(path.lens, path.sites, base, change, reading, place)


def _by_gates(gated: GatedModel) -> Line:
    def base(site: Site) -> Tensor:
        return site.canonical("weight", site.parameter("weight").data).float()

    def change(site: Site, tensor: str) -> Change:
        return _change(gated.deltas[site.name, tensor])

    def place(s: float, reading: Reading) -> HookList:
        return gated.hooks(gated.gates(len(reading.batch), s), reading)

    return Line(gated.lens, gated.sites, base, change, gated.reading, place)


def _change(delta: Delta) -> Change:
    """A difference as geometry has it; a matrix that was not trained has factors of rank 0."""
    match delta:
        case LowRank():
            return Factored(delta.left, delta.right)
        case Absent(shape=(rows, columns)):
            return Factored(torch.zeros(rows, 0), torch.zeros(0, columns))
        case _:
            return delta.dense()
