"""What an edit is judged beside: directions and parts that are as long and mean nothing.

    random vector   every tensor's difference replaced by a Gaussian one of equal length (of equal
                    rank too, where it is of low rank): is it the direction, or any push as hard?
    random set      in place of a part, as many other heads, neurons and tensors of each kind, cut
                    in the same way, scaled to the part's length: is it these, or any as many?
    another fine-tune on the same format: is it the domain, or any fine-tuning at all?

The first two are drawn by a seed; the third is a tuning vector like any other.
"""

import hashlib
import math
from collections import defaultdict
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from tvlens.attribution.gates import Key
from tvlens.attribution.partition import Partition, partition
from tvlens.components import Component
from tvlens.weights.delta import Absent, Delta, Dense, LowRank, scaled
from tvlens.weights.vector import TuningVector, restricted

from .edits import Doses, Edit, EditableModel, Part, Term

LONGEST_SCALE = 100.0
"""A random set whose vectors would have to be made longer than this is left as long as that: it
then holds next to no tuning vector, and what it does says nothing."""


def random_vector(model: EditableModel, *, seed: int, part: Part | None = None) -> TuningVector:
    """A Gaussian vector that is as long as the tuning vector, tensor by tensor.

    Args:
        model: The base and its tuning vector.
        seed: Of the draw; each component has a stream of its own.
        part: Only there, as long as the tuning vector is there; zero elsewhere.
    """
    vector = model.vector
    kept = None if part is None else model.kept(part)
    deltas: dict[Component, Delta] = {}
    for component, delta in vector.items():
        if isinstance(delta, Absent) or (kept is not None and component not in kept):
            continue
        drawn = _drawn(delta, _stream(seed, component))
        if kept is not None:
            drawn, delta = (restricted(d, kept[component]) for d in (drawn, delta))
        length = drawn.norm()
        if length and delta.norm():
            deltas[component] = scaled(drawn, delta.norm() / length)
    name = f"random {seed} as long as {vector.name}"
    return replace(vector, name=name, deltas=deltas, inputs=(), selection=None, scale=None)


def _stream(seed: int, component: Component) -> torch.Generator:
    digest = hashlib.sha256(f"{seed} {component.kind} {component}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _drawn(delta: Delta, generator: torch.Generator) -> Delta:
    if isinstance(delta, LowRank):
        left, right = (
            torch.randn(side.shape, generator=generator) for side in (delta.left, delta.right)
        )
        return LowRank(left, right)
    return Dense(torch.randn(delta.shape, generator=generator))


@dataclass(frozen=True)
class RandomSet:
    """Other parts of a tuning vector in place of some.

    Attributes:
        doses: 1 on the others, 0 elsewhere.
        scale: What makes them as long as the part they stand for.
        count: How many heads, neurons and tensors they are.
    """

    doses: Doses = field(repr=False)
    scale: float
    count: int


def random_set(
    model: EditableModel, part: Part, *, seed: int, as_long: float | None = None
) -> RandomSet:
    """As many others of each kind as ``part`` holds, cut in the same way.

    Of a head of which the part holds W_Q alone, another head's W_Q is taken. Where a kind has too
    few others, all of them are taken and the rest comes from the part.

    Args:
        model: The base and its tuning vector.
        part: What they stand for.
        seed: Of the draw.
        as_long: The length they are scaled to, the part's own by default.
    """
    parts = partition(model.gated)
    mask = model.doses(Edit(0.0, (Term(part, 1.0),)))
    patterns = _patterns(model, parts, mask)
    rng = np.random.default_rng([seed, len(patterns)])
    by_pattern: dict[tuple[str, frozenset[Key]], list[int]] = defaultdict(list)
    for owner, pattern in patterns.items():
        by_pattern[parts.components[owner].kind, pattern].append(owner)
    doses = {key: torch.zeros_like(dose) for key, dose in mask.items()}
    taken: set[int] = set()
    for (kind, pattern), mine in by_pattern.items():
        alike = [i for i, c in enumerate(parts.components) if c.kind == kind and i not in taken]
        others = [i for i in alike if i not in patterns]
        order = [*rng.permutation(others), *rng.permutation([i for i in alike if i in patterns])]
        drawn = [int(i) for i in order[: len(mine)]]
        taken.update(drawn)
        _let_in(model, parts, drawn, pattern, doses)
    wanted, found = (length(parts, chosen) for chosen in (mask, doses))
    wanted = wanted if as_long is None else as_long
    scale = min(wanted, LONGEST_SCALE * found) / max(found, 1e-30)
    return RandomSet(doses, scale, len(taken))


def _roles(model: EditableModel) -> dict[Key, Key]:
    """What a tensor is in its block, by site and tensor: ``attn.q``, ``weight``."""
    return {(s.name, tensor): (s.role, tensor) for s in model.gated.sites for tensor in s.tensors}


def _patterns(model: EditableModel, parts: Partition, mask: Doses) -> dict[int, frozenset[Key]]:
    """For each candidate that is touched the roles of its tensors that are; whole if uncut."""
    roles = _roles(model)
    touched: dict[int, set[Key]] = defaultdict(set)
    for key, dose in mask.items():
        for owner in parts.owners[key][dose != 0].tolist():
            touched[owner].add(roles[key])
    cut = ("head", "kv_head", "neuron")
    return {
        owner: frozenset(found) if parts.components[owner].kind in cut else frozenset()
        for owner, found in touched.items()
    }


def _let_in(
    model: EditableModel,
    parts: Partition,
    drawn: list[int],
    pattern: frozenset[Key],
    doses: Doses,
) -> None:
    roles, wanted = _roles(model), torch.tensor(drawn)
    for key, owners in parts.owners.items():
        if not pattern or roles[key] in pattern:
            doses[key][torch.isin(owners, wanted.to(owners.device))] = 1.0


def length(parts: Partition, doses: Doses) -> float:
    """Length of a tuning vector let in by ``doses``; a tied embedding counts at both uses."""
    total = 0.0
    for key, dose in doses.items():
        total += float((parts.squares[key] * dose.cpu().double().square()).sum())
    return math.sqrt(total)
