"""Evidence about heads (OV): against heads of other kv groups, and structure in both factors."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from einops import rearrange
from jaxtyping import Float64, Int
from torch import Tensor

from .changes import Change, Factored, energy, gram, transposed, turned
from .evidence import (
    BY_PEERS,
    NO_GAIN_TEST,
    NO_PEERS,
    TEST_COLUMNS,
    Evidence,
    Keys,
    evidence_frame,
    statistic_rows,
)
from .heads import Coordinates, Factor
from .nulls import factor_swap, noise_edge, own_versus_others, share_in_spans, spans_of


@dataclass(frozen=True, eq=False)
class HeadSpikes:
    """Structure in one factor of every head.

    Attributes:
        share: Share of the factor's change in spikes above the edge.
        outside: Share of that energy outside the row space of the head's base weights.
        found: Whether there is any spike.
    """

    share: Float64[Tensor, " head"]
    outside: Float64[Tensor, " head"]
    found: np.ndarray


def head_spikes(
    delta: Change, spans: Float64[Tensor, "head d_model span"], *, seed: int
) -> HeadSpikes:
    """Spikes of each head's change [d_head, d_model] and how far they leave its own directions.

    A spike's right side is D' u / s, so what of it lies in a span Q is u' (D Q) / s.
    """
    energies, vectors = torch.linalg.eigh(gram(turned(delta)))
    edge = rearrange(noise_edge(delta, seed=seed), "head -> head 1")
    above = torch.where(energies > edge.square(), energies, 0)
    inside = (transposed(vectors) @ _onto_own(delta, spans)).square().sum(2)
    total, found = energy(delta), above.sum(1)
    outside = 1 - (torch.where(above > 0, inside, 0).sum(1) / found).nan_to_num()
    return HeadSpikes((found / total).nan_to_num(), outside, (found > 0).numpy())


def _onto_own(
    delta: Change, spans: Float64[Tensor, "head d_model span"]
) -> Float64[Tensor, "head d_head span"]:
    if isinstance(delta, Factored):
        return delta.left.double() @ (delta.right.double() @ spans)
    return delta.double() @ spans


def share_from_right(left: Coordinates, right: Coordinates) -> Float64[Tensor, " head"]:
    """Share of |V_mid dO|^2 in |V_mid dO|^2 + |dV O_mid|^2."""
    from_right = _product_energy(left.middle, right.delta)
    from_left = _product_energy(left.delta, right.middle)
    return (from_right / (from_right + from_left)).nan_to_num()


def _product_energy(
    left: Float64[Tensor, "head left d_head"], right: Float64[Tensor, "head right d_head"]
) -> Float64[Tensor, " head"]:
    """|L R'|^2 from the Grams of the two."""
    return (transposed(left) @ left * (transposed(right) @ right)).sum((1, 2))


@dataclass(frozen=True, eq=False)
class HeadChanges:
    """The OV circuits of a layer, one slice a query head.

    Attributes:
        value: W_V, [d_model, d_head].
        output: W_O, [d_head, d_model].
        left: Coordinates of W_V.
        right: Coordinates of W_O.
        group: The kv head of each.
        kappa: Cosine of each circuit with its change.
    """

    value: Factor
    output: Factor
    left: Coordinates
    right: Coordinates
    group: Int[Tensor, " head"]
    kappa: Float64[Tensor, " head"]


def head_evidence(keys: Keys, heads: HeadChanges, *, seed: int) -> Evidence:
    """Gain and write space of OV against heads of other kv groups; structure of dO by spikes."""
    d_head, d_model = heads.output.base.shape[1:]
    kv, nothing = heads.group.numpy(), np.full(len(heads.group), np.nan)
    swap = factor_swap(heads.value, heads.output)
    gain = own_versus_others(swap.z.numpy(), kv, alike=swap.of_mates(kv))
    out_spans = spans_of(heads.output.base)
    spans = share_in_spans(heads.output.delta, out_spans).nan_to_num()
    space = own_versus_others(spans.numpy(), kv)
    from_right = share_from_right(heads.left, heads.right).numpy()
    reading = heads.value.swapped
    writes = head_spikes(heads.output.delta, out_spans, seed=seed)
    reads = head_spikes(reading.delta, spans_of(reading.base), seed=seed + 1)
    chance = d_head / d_model
    own = ((spans.diagonal() - chance) / (1 - chance)).numpy() if chance < 1 else np.zeros(len(kv))
    amplified = heads.kappa.nan_to_num().numpy() ** 2
    read_inside = (reads.share * (1 - reads.outside)).numpy()
    within = from_right * own + (1 - from_right) * read_inside - amplified
    p_space = nothing if space is None else space.p_greater()
    p_gain = nothing if gain is None else gain.p_two_sided()
    frame = evidence_frame(
        keys,
        share_gain=amplified,
        p_gain=p_gain,
        share_within=np.maximum(0, within),
        p_within=np.where(from_right > 0.5, p_space, np.nan),
        sure_within=(from_right <= 0.5) & reads.found,
        share_new_write=from_right * (writes.share * writes.outside).numpy(),
        sure_new_write=writes.found,
        share_new_read=(1 - from_right) * (reads.share * reads.outside).numpy(),
        sure_new_read=reads.found,
        decided_by=BY_PEERS if gain is not None else NO_PEERS,
        remark="" if gain is not None else NO_GAIN_TEST,
    )
    tests = [
        statistic_rows(keys, name, side=side, null="own_versus_other", effect=found.effect,
                  half_interval=found.half_interval(), p_value=p_value, k=k)
        for name, side, found, p_value, k in (
            ("gain", "both", gain, p_gain, None),
            ("share_in_own_space", "write", space, p_space, d_head),
        )
        if found is not None
    ]  # fmt: skip
    empty = pd.DataFrame(columns=list(TEST_COLUMNS))
    return Evidence(frame, pd.concat(tests, ignore_index=True) if tests else empty)
