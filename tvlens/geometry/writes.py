"""What a tuning vector writes into the residual stream, direction by direction.

Sources are what writes there:

    W_O, W_out   singular triplets of the change above its noise edge, the MATRIX_KEPT strongest
    OV           of each head: triplets of V_mid dO_s + dV_s O_mid, where dO_s and dV_s hold what
                 of the factors' changes is above the factors' own edges; the HEAD_KEPT strongest
    W_out rows   the NEURONS_KEPT longest changes of a layer whose label is new_write or amplified

``spikes`` counts all that were found, whatever was kept (of a neuron: the layer's labelled ones).
For a direction with read vector r, write vector u and strength s, ``s * outer(r, u)`` is part of
the change, in the orientation x @ W; r and u are unit vectors. A neuron has no r: its change is
s * u. The measures of u against the base's write directions:

    gain_cosine   r'Wu / sqrt(|W'r| |Wu|): 1 where the direction scales one of the base's
    g_rel         alignment of u with them: chance 0, a pure gain 1
    novelty       1 - |U_k'u|^2 for the k strongest; chance 1 - k / d_model
    max_cos       largest |cos| of u with one of them; intruder_05 is max_cos < 0.5, which is far
                  above chance (0.18 at d_model 576): mostly not one base direction, not "at
                  chance". Nearly equal singular values of the base mix freely, which lowers
                  max_cos; g_rel and novelty do not mind
    intruders_05  the classical count: of the INTRUDER_TOP strongest write directions of the tuned
                  matrix, those with max_cos < 0.5

Label of a direction: |gain_cosine| > 1/2 is amplified or attenuated; else, with the error e of
g_rel at chance, g_rel + 2 e < 1/2 is new_write, g_rel - 2 e > 1/2 rewired, the rest mixed. Neurons
bring theirs. new_write is what most of any fine-tune looks like; compare with a control.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import pandas as pd
import torch
from einops import einsum, rearrange
from jaxtyping import Float, Float64, Int
from torch import Tensor

from tvlens.components import Component

from .changes import Factored, Remainder, energy, transposed, written_rows
from .evidence import DEVIATIONS, GAIN_COSINE, NEW_HI
from .heads import Factor
from .matrices import K_FRACTION, Basis, self_alignment, spectral_basis
from .matrix_evidence import gain_cosines, relative_alignment
from .neurons import sums_of_rows
from .nulls import noise_edge, unit_alignment_spread
from .reading import Pair, Slice, factor_of_heads, kv_index_of
from .spectra import STRONGEST, Spectra, is_resolved, layer_seed

MATRIX_KEPT = 8
HEAD_KEPT = 2
NEURONS_KEPT = 8
"""Rows per matrix, head and layer that a person still reads; ``spikes`` counts the rest."""
NAMED_LABELS = ("new_write", "amplified")
INTRUDER_TOP = 10
INTRUDER_EPS = (0.3, 0.5, 0.7)
"""A sweep, because no single bar is chance: see ``max_cos``."""
WRITERS = {"W_O": "ln1_post.w", "W_out": "ln2_post.w"}
"""Matrices that write the residual stream, and the gain behind each where there is one."""
RITZ_STEPS = 4
"""Power steps from the STRONGEST directions of the base and of its change: each shrinks the error
by (s_30 / s_10)^2."""
EPS_SUFFIX = {eps: f"{int(10 * eps):02d}" for eps in INTRUDER_EPS}
FACTS = (
    *("label", "strength", "edge", "share", "gain_cosine", "g_rel", "g_rel_se", "novelty"),
    *("max_cos", "spikes", "k"),
    *(f"{word}_{end}" for word in ("intruder", "intruders") for end in EPS_SUFFIX.values()),
)
"""The columns of ``directions`` that come from the weights alone (module docstring)."""


@dataclass(frozen=True, eq=False)
class Direction:
    """One direction that a tuning vector writes.

    Attributes:
        source: The matrix, head or neuron that writes it.
        rank: Its place by strength, from 0; None for a neuron's whole change.
        read: Unit vector that evokes it, None for a neuron.
        write: Unit vector that it writes.
        residual: ``write`` as it enters the residual stream (behind a post norm's gain).
        facts: Its columns ``FACTS``; what a source lacks is absent.
    """

    source: Component
    rank: int | None
    read: Float[Tensor, " d_in"] | None
    write: Float[Tensor, " d_model"]
    residual: Float[Tensor, " d_model"]
    facts: dict[str, Any]

    @property
    def name(self) -> str:
        """The label for people, such as ``L3.W_out.d0``; a neuron keeps its own."""
        return str(self.source) if self.rank is None else f"{self.source}.d{self.rank}"

    def turned(self, sign: float) -> "Direction":
        """The same rank-one part with the signs of both its vectors changed."""
        read = None if self.read is None else self.read * sign
        return replace(self, read=read, write=self.write * sign, residual=self.residual * sign)


def directions_of_block(
    pair: Pair, spectra: Sequence[Spectra], labels: pd.DataFrame | None = None, *, seed: int
) -> list[Direction]:
    """The directions of one block, from its changed matrices.

    Args:
        pair: Base and tuned checkpoint.
        spectra: The block's matrices.
        labels: Frame of the table ``labels``, from which neurons are chosen; None names none.
        seed: Seed of the sign-flip draws, as given to ``classify``.
    """
    parts = {one.part: one for one in spectra}
    layer = next((one.component.layer for one in spectra), None)
    known = {component for block in pair.blocks() for component in block}
    found: list[Direction] = []
    for part in WRITERS:
        if part in parts and parts[part].resolved:
            found += matrix_directions(parts[part])
    if {"W_V", "W_O"} <= set(parts):
        weights = {part: parts[part].weight for part in ("W_V", "W_O")}
        own = layer_seed(parts["W_O"].component, seed)
        found += head_directions(layer, weights, kv_index_of(pair), seed=own)
    if "W_out" in parts and labels is not None:
        found += neuron_directions(parts["W_out"], labels)
    gains = {part: Component("norm", layer, None, name) for part, name in WRITERS.items()}
    behind = {part: pair.read(gain).base for part, gain in gains.items() if gain in known}
    return [_behind_post_norm(one, behind) for one in found]


def _behind_post_norm(direction: Direction, gains: dict[str, Tensor]) -> Direction:
    part = "W_O" if direction.source.part == "OV" else direction.source.part or ""
    if part not in gains:
        return direction
    return replace(direction, residual=direction.write * gains[part].double())


def matrix_directions(spectra: Spectra) -> list[Direction]:
    """The strongest triplets above the noise edge of one writing matrix."""
    spikes = spectra.change
    kept = min(spikes.above, MATRIX_KEPT)
    if not kept:
        return []
    read, write = spikes.read[:, :kept], spikes.write[:, :kept]
    common = {"edge": spikes.edge, "spikes": spikes.above, **matrix_intruders(spectra)}
    gains = gain_cosines(read, write, spectra.weight.base)
    seen = spectra.base.coordinates(write, "write")
    rows = _described(seen, spikes.values[:kept], gains, spectra.base, (len(write), spikes.total))
    return _directions(spectra.component, read, write, [{**common, **row} for row in rows])


def matrix_intruders(spectra: Spectra) -> dict[str, int]:
    """The classical intruder count of a writing matrix, for every bar of the sweep."""
    weight, writes = spectra.weight, (spectra.base.write, spectra.change.write)
    tuned = Remainder(weight.base, weight.change, -torch.ones((1, 1), dtype=torch.float64))
    start = torch.cat([side[:, :STRONGEST] for side in writes], dim=1)
    strongest = strongest_writes(tuned, start, count=INTRUDER_TOP)
    largest = spectra.base.coordinates(strongest, "write").abs().amax(0)
    return {f"intruders_{EPS_SUFFIX[eps]}": int((largest < eps).sum()) for eps in INTRUDER_EPS}


def strongest_writes(
    matrix: Remainder, start: Float64[Tensor, "d_out guess"], *, count: int
) -> Float64[Tensor, "d_out strongest"]:
    """The strongest write directions of ``matrix`` by subspace iteration from a good guess."""
    span = torch.linalg.qr(start).Q
    for _ in range(RITZ_STEPS):
        span = torch.linalg.qr(matrix.turned.product(matrix.product(span))).Q
    image = matrix.product(span)
    rotation = torch.linalg.eigh(transposed(image) @ image).eigenvectors.flip(-1)
    return (span @ rotation)[:, :count]


def _described(
    seen: Float64[Tensor, "direction row"],
    strengths: Float64[Tensor, " row"],
    gains: Float64[Tensor, " row"],
    basis: Basis,
    size: tuple[int, float],
) -> list[dict[str, Any]]:
    """Facts of some unit write vectors against the base's write directions, and their labels.

    Args:
        seen: Their coordinates along the base's write directions.
        strengths: Their singular values, or lengths.
        gains: Their gain cosines.
        basis: The base's directions.
        size: d_model, and the energy of the whole change.
    """
    (d_model, total), energies = size, seen.square()
    k = max(1, min(int(K_FRACTION * d_model), int(basis.rank)))
    error = unit_alignment_spread(d_model) / abs(float(self_alignment(basis, d_model)))
    columns = {
        "strength": strengths,
        "share": strengths.square() / total,
        "gain_cosine": gains,
        "g_rel": relative_alignment(seen, torch.ones_like(strengths), basis, d_model),
        "novelty": 1 - energies[:k].sum(0),
        "max_cos": energies.amax(0).clamp(max=1).sqrt(),
    }
    lists = {name: column.tolist() for name, column in columns.items()}
    rows = []
    for values in zip(*lists.values(), strict=True):
        row = dict(zip(lists, values, strict=True))
        row |= {"g_rel_se": error, "k": k, "label": direction_label(row, error)}
        for eps in INTRUDER_EPS:
            row[f"intruder_{EPS_SUFFIX[eps]}"] = row["max_cos"] < eps
        rows.append(row)
    return rows


def direction_label(row: dict[str, Any], error: float) -> str:
    """The rule of the module docstring."""
    if abs(row["gain_cosine"]) > GAIN_COSINE:
        return "amplified" if row["gain_cosine"] > 0 else "attenuated"
    if row["g_rel"] + DEVIATIONS * error < NEW_HI:
        return "new_write"
    return "rewired" if row["g_rel"] - DEVIATIONS * error > NEW_HI else "mixed"


def _directions(
    source: Component,
    read: Float64[Tensor, "d_in row"],
    write: Float64[Tensor, "d_model row"],
    facts: Sequence[dict[str, Any]],
) -> list[Direction]:
    return [
        Direction(source, rank, read[:, rank], write[:, rank], write[:, rank], row)
        for rank, row in enumerate(facts)
    ]


@dataclass(frozen=True, eq=False)
class _Cut:
    """One factor of the circuits of a layer in float64, its change cut to what is above its edge.

    Attributes:
        base: Base weights.
        middle: Halfway between base and tuned.
        delta: The whole change.
        structured: Its triplets above the edge.
        spikes: How many there are in each head.
    """

    base: Float64[Tensor, "head a b"]
    middle: Float64[Tensor, "head a b"]
    delta: Float64[Tensor, "head a b"]
    structured: Float64[Tensor, "head a b"]
    spikes: Int[Tensor, " head"]

    def of_heads(self, group: Int[Tensor, " head"]) -> "_Cut":
        """The factor that each query head reads."""
        return _Cut(*(getattr(self, one.name)[group] for one in fields(self)))


def _cut(factor: Factor, *, is_resolved: bool, seed: int) -> _Cut:
    """A factor whose change is cut; written out, since both circuits need their middle whole."""
    base, delta = factor.base.double(), written_rows(factor.delta, 0, factor.base.shape[1])
    middle = base + delta / 2
    if not is_resolved:
        none = torch.zeros(len(base), dtype=torch.long)
        return _Cut(base, middle, delta, torch.zeros_like(delta), none)
    basis = spectral_basis(delta)
    above = basis.values > rearrange(noise_edge(delta, seed=seed), "head -> head 1")
    kept = torch.where(above, basis.values, 0)
    change = einsum(basis.read, kept, basis.write, "head a j, head j, head b j -> head a b")
    return _Cut(base, middle, delta, change, above.sum(1))


@dataclass(frozen=True, eq=False)
class _Framed:
    """Products left @ right of a layer's heads, never formed: a core between two frames.

    Attributes:
        left: Orthonormal columns that span the columns of ``left``.
        core: Singular directions of the rest.
        right: Orthonormal columns that span the rows of ``right``.
    """

    left: Float64[Tensor, "*head d_model k"]
    core: Basis
    right: Float64[Tensor, "*head d_model k"]

    def of(self, head: int) -> "_Framed":
        """The product of one head."""
        return _Framed(self.left[head], self.core.of(head), self.right[head])


def _framed(
    left: Float64[Tensor, "head d_model k"], right: Float64[Tensor, "head k d_model"]
) -> _Framed:
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(transposed(right))
    return _Framed(q_left, spectral_basis(r_left @ transposed(r_right)), q_right)


def head_directions(
    layer: int | None, weights: dict[str, Slice], group: Int[Tensor, " head"], *, seed: int
) -> list[Direction]:
    """The strongest structured triplets of every head's OV circuit."""
    counts = {"W_V": int(group.max()) + 1, "W_O": len(group)}
    value, output = (
        _cut(factor_of_heads(one, part, counts[part]), is_resolved=is_resolved(one), seed=seed)
        for part, one in weights.items()
    )
    value = value.of_heads(group)
    spikes = value.spikes + output.spikes
    base = _framed(value.base, output.base)
    change = _framed(
        torch.cat([value.middle, value.structured], dim=2),
        torch.cat([output.structured, output.middle], dim=1),
    )
    whole = energy(
        Factored(
            torch.cat([value.middle, value.delta], dim=2),
            torch.cat([output.delta, output.middle], dim=1),
        )
    )
    found: list[Direction] = []
    for head in spikes.nonzero().flatten().tolist():
        source = Component("head", layer, head, "OV")
        one, own = change.of(head), base.of(head)
        found += _of_one_head(source, one, own, int(spikes[head]), float(whole[head]))
    return found


def _of_one_head(
    source: Component, change: _Framed, base: _Framed, spikes: int, total: float
) -> list[Direction]:
    kept = min(spikes, HEAD_KEPT, int(change.core.rank))
    read, write = (
        change.left @ change.core.read[:, :kept],
        change.right @ change.core.write[:, :kept],
    )
    from_read, onto_write = transposed(base.left) @ read, transposed(base.right) @ write
    core = transposed(base.core.tall) if base.core.turned else base.core.tall
    gains = gain_cosines(from_read, onto_write, core)
    seen = base.core.coordinates(onto_write, "write")
    rows = _described(seen, change.core.values[:kept], gains, base.core, (len(write), total))
    return _directions(source, read, write, [{"spikes": spikes, **row} for row in rows])


def neuron_directions(spectra: Spectra, labels: pd.DataFrame) -> list[Direction]:
    """The longest changes among a layer's W_out neurons that are labelled new or amplified."""
    layer, weight = spectra.component.layer, spectra.weight
    mine = (labels["kind"] == "neuron") & (labels["part"] == "W_out") & (labels["layer"] == layer)
    named = labels[mine & labels["label"].isin(NAMED_LABELS)]
    label = dict(zip(named["index"].astype(int), named["label"], strict=True))
    if not label:
        return []
    sums = sums_of_rows(weight.base, weight.change)
    lengths, cosines = sums.delta.sqrt(), sums.measures().kappa
    chosen = sorted(label, key=lambda i: (-float(lengths[i]), i))[:NEURONS_KEPT]
    rows = torch.cat([written_rows(weight.change, i, i + 1) for i in chosen])
    write = torch.nn.functional.normalize(rows, dim=1)
    seen = spectra.base.coordinates(transposed(write), "write")
    size = (write.shape[1], float(sums.delta.sum()))
    facts = _described(seen, lengths[chosen], cosines[chosen], spectra.base, size)
    own = [
        {**row, "label": label[i], "spikes": len(label)}
        for i, row in zip(chosen, facts, strict=True)
    ]
    return [
        Direction(Component("neuron", layer, i, "W_out"), None, None, unit, unit, row)
        for i, unit, row in zip(chosen, write, own, strict=True)
    ]
