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
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from einops import einsum, rearrange
from jaxtyping import Float, Float64, Int
from torch import Tensor

from tvlens.components import Component

from .changes import transposed
from .evidence import DEVIATIONS, GAIN_COSINE, NEW_HI
from .heads import slices_of_heads
from .matrices import K_FRACTION
from .nulls import noise_edge, unit_alignment_spread
from .reading import Pair, kv_index_of
from .spectra import Spectra, Triplets, triplets_of

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
RITZ_START = 30
RITZ_STEPS = 4
"""Power steps from the base's own directions: each shrinks the error by (s_30 / s_10)^2."""
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
    seed = seed + 1000 * (0 if layer is None else layer + 1)  # the draws of ``classify``
    known = {component for block in pair.blocks() for component in block}
    found: list[Direction] = []
    for part in WRITERS:
        if part in parts and parts[part].resolved:
            found += matrix_directions(parts[part], seed=seed)
    if {"W_V", "W_O"} <= set(parts):
        group = kv_index_of(pair)
        found += head_directions(layer, parts["W_V"], parts["W_O"], group, seed=seed)
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


def matrix_directions(spectra: Spectra, *, seed: int) -> list[Direction]:
    """The strongest triplets above the noise edge of one writing matrix."""
    weight, delta = spectra.weight, spectra.delta
    edge = float(noise_edge(spectra.change, seed=seed))
    spikes = int((delta.values > edge).sum())
    kept = min(spikes, MATRIX_KEPT)
    if not kept:
        return []
    read, write = (rearrange(side[:, :kept], "d n -> n d") for side in (delta.read, delta.write))
    common = {"edge": edge, "spikes": spikes, **matrix_intruders(spectra)}
    gains = gain_cosines(read, write, weight.base)
    total = float(spectra.change.double().square().sum())
    rows = _described(write, delta.values[:kept], gains, spectra.base, total)
    return _directions(spectra.component, read, write, [{**common, **row} for row in rows])


def matrix_intruders(spectra: Spectra) -> dict[str, int]:
    """The classical intruder count of a writing matrix, for every bar of the sweep."""
    tuned = spectra.weight.base.double() + spectra.change.double()
    start = torch.cat(
        [spectra.base.write[:, :RITZ_START], spectra.delta.write[:, :RITZ_START]], dim=1
    )
    strongest = strongest_writes(tuned, start, count=INTRUDER_TOP)
    cosines = einsum(strongest, spectra.base.write, "d n, d direction -> n direction").abs()
    largest = cosines.amax(1)
    return {f"intruders_{EPS_SUFFIX[eps]}": int((largest < eps).sum()) for eps in INTRUDER_EPS}


def strongest_writes(
    matrix: Float[Tensor, "d_in d_out"], start: Float[Tensor, "d_out guess"], *, count: int
) -> Float[Tensor, "d_out strongest"]:
    """The strongest write directions of ``matrix`` by subspace iteration from a good guess."""
    span = torch.linalg.qr(start).Q
    for _ in range(RITZ_STEPS):
        span = torch.linalg.qr(matrix.mT @ (matrix @ span)).Q
    image = matrix @ span
    rotation = torch.linalg.eigh(image.mT @ image).eigenvectors.flip(-1)
    return (span @ rotation)[:, :count]


def gain_cosines(
    read: Float[Tensor, "row d_in"],
    write: Float[Tensor, "row d_out"],
    base: Float[Tensor, "d_in d_out"],
) -> Float[Tensor, " row"]:
    """r'Wu / sqrt(|W'r| |Wu|): 1 where a triplet scales a direction of W, -1 where it shrinks."""
    base = base.double()
    return _gain_cosines(read @ base, write @ base.mT, write)


def _gain_cosines(
    from_read: Float[Tensor, "row d_out"],
    onto_write: Float[Tensor, "row d_in"],
    write: Float[Tensor, "row d_out"],
) -> Float[Tensor, " row"]:
    through = (from_read * write).sum(1)
    size = (from_read.norm(dim=1) * onto_write.norm(dim=1)).sqrt()
    return through / size.clamp(min=torch.finfo(torch.float64).tiny)


def _described(
    write: Float[Tensor, "row d_model"],
    strengths: Float[Tensor, " row"],
    gains: Float[Tensor, " row"],
    basis: Triplets,
    total: float,
) -> list[dict[str, Any]]:
    """Facts of some write vectors against the base's write directions, and their labels."""
    d_model = write.shape[1]
    energies = einsum(write, basis.write, "row d, d direction -> row direction").square()
    k = max(1, min(int(K_FRACTION * d_model), basis.rank))
    aligned = basis.write_alignment(write)
    error = unit_alignment_spread(d_model) / abs(basis.self_alignment(d_model))
    columns = {
        "strength": strengths,
        "share": strengths.square() / total,
        "gain_cosine": gains,
        "g_rel": aligned,
        "novelty": 1 - energies[:, :k].sum(1),
        "max_cos": energies.amax(1).clamp(max=1).sqrt(),
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
    read: Float[Tensor, "row d_in"],
    write: Float[Tensor, "row d_model"],
    facts: Sequence[dict[str, Any]],
) -> list[Direction]:
    return [
        Direction(source, rank, read[rank], write[rank], write[rank], row)
        for rank, row in enumerate(facts)
    ]


@dataclass(frozen=True, eq=False)
class _Side:
    """One factor of the OV circuits of a layer, written out, one slice a head.

    Attributes:
        base: Base weights.
        middle: Base plus half the change: with it the product rule has no cross term (heads.py).
        change: The tuning vector, or what is kept of it.
    """

    base: Float64[Tensor, "head a b"]
    middle: Float64[Tensor, "head a b"]
    change: Float64[Tensor, "head a b"]

    def of_heads(self, group: Int[Tensor, " head"]) -> "_Side":
        """The factor that each query head reads, one slice a query head."""
        return _Side(self.base[group], self.middle[group], self.change[group])


def _side(spectra: Spectra, n_heads: int) -> _Side:
    base, change = (
        slices_of_heads(matrix, spectra.part, n_heads).double()
        for matrix in (spectra.weight.base, spectra.change)
    )
    return _Side(base, base + change / 2, change)


def _structured(side: _Side, *, resolved: bool, seed: int) -> tuple[_Side, Int[Tensor, " head"]]:
    """A factor whose change is cut to its triplets above the edge, and how many there are."""
    found = triplets_of(side.change)
    edge = rearrange(noise_edge(side.change, seed=seed), "head -> head 1")
    above = (found.values > edge) & resolved
    kept = torch.where(above, found.values, 0)
    change = einsum(found.read, kept, found.write, "head a j, head j, head b j -> head a b")
    return replace(side, change=change), above.sum(1)


def circuit_triplets(
    left: Float64[Tensor, "head d_model k"], right: Float64[Tensor, "head k d_model"]
) -> Triplets:
    """Singular directions of left @ right without forming a d_model x d_model matrix."""
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(transposed(right))
    core = triplets_of(r_left @ transposed(r_right))
    return Triplets(q_left @ core.read, core.values, q_right @ core.write)


def head_directions(
    layer: int | None, value: Spectra, output: Spectra, group: Int[Tensor, " head"], *, seed: int
) -> list[Direction]:
    """The strongest structured triplets of every head's OV circuit."""
    whole = _side(value, int(group.max()) + 1), _side(output, len(group))
    (reads, value_spikes), (writes, output_spikes) = (
        _structured(side, resolved=one.resolved, seed=seed)
        for side, one in zip(whole, (value, output), strict=True)
    )
    spikes = value_spikes[group] + output_spikes
    change = circuit_triplets(*_both_sides(reads.of_heads(group), writes))
    base = circuit_triplets(whole[0].of_heads(group).base, whole[1].base)
    total = _product_energy(*_both_sides(whole[0].of_heads(group), whole[1]))
    found: list[Direction] = []
    for head in spikes.nonzero().flatten().tolist():
        source = Component("head", layer, head, "OV")
        one, own = (Triplets(b.read[head], b.values[head], b.write[head]) for b in (change, base))
        found += _of_one_head(source, one, own, int(spikes[head]), float(total[head]))
    return found


def _both_sides(
    value: _Side, output: _Side
) -> tuple[Float64[Tensor, "head d_model k"], Float64[Tensor, "head k d_model"]]:
    """Factors of V_mid dO + dV O_mid, the exact change of the circuit."""
    left = torch.cat([value.middle, value.change], dim=2)
    return left, torch.cat([output.change, output.middle], dim=1)


def _product_energy(
    left: Float64[Tensor, "head d_model k"], right: Float64[Tensor, "head k d_model"]
) -> Float64[Tensor, " head"]:
    """|left @ right|^2 of every head."""
    grams = (transposed(left) @ left, right @ transposed(right))
    return einsum(grams[0], grams[1], "head a b, head a b -> head")


def _of_one_head(
    source: Component, change: Triplets, base: Triplets, spikes: int, total: float
) -> list[Direction]:
    kept = min(spikes, HEAD_KEPT, change.rank)
    read, write = (rearrange(side[:, :kept], "d n -> n d") for side in (change.read, change.write))
    from_read = (read @ base.read * base.values) @ base.write.mT
    onto_write = (write @ base.write * base.values) @ base.read.mT
    gains = _gain_cosines(from_read, onto_write, write)
    rows = _described(write, change.values[:kept], gains, base, total)
    return _directions(source, read, write, [{"spikes": spikes, **row} for row in rows])


def neuron_directions(spectra: Spectra, labels: pd.DataFrame) -> list[Direction]:
    """The longest changes among a layer's W_out neurons that are labelled new or amplified."""
    layer = spectra.component.layer
    mine = (labels["kind"] == "neuron") & (labels["part"] == "W_out") & (labels["layer"] == layer)
    named = labels[mine & labels["label"].isin(NAMED_LABELS)]
    delta, base = spectra.change.double(), spectra.weight.base.double()
    lengths = delta.norm(dim=1)
    chosen = sorted(named["index"].astype(int), key=lambda i: (-float(lengths[i]), i))[
        :NEURONS_KEPT
    ]
    if not chosen:
        return []
    write = delta[chosen] / rearrange(lengths[chosen], "neuron -> neuron 1")
    cosines = torch.nn.functional.cosine_similarity(delta[chosen], base[chosen], dim=1)
    total = float(delta.square().sum())
    rows = _described(write, lengths[chosen], cosines, spectra.base, total)
    label = dict(zip(named["index"].astype(int), named["label"], strict=True))
    return [
        Direction(
            Component("neuron", layer, i, "W_out"),
            None,
            None,
            unit,
            unit,
            {**row, "label": label[i], "spikes": len(named)},
        )
        for i, unit, row in zip(chosen, write, rows, strict=True)
    ]
