"""Evidence about heads (OV, QK): against heads of other kv groups; structure in both factors."""

from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Float64, Int
from torch import Tensor

from tvlens.components import Side

from .changes import Change, Factored, energy, gram, transposed, turned
from .evidence import (
    BY_PEERS,
    NO_GAIN_TEST,
    NO_PEERS,
    Evidence,
    Keys,
    evidence_rows,
    statistic_rows,
)
from .heads import Coordinates, Factor, change_of_heads
from .nulls import factor_swap, noise_edge, own_versus_others, share_in_spans
from .offsets import mean_change


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

    def of_heads(self, group: Int[Tensor, " head"]) -> "HeadSpikes":
        """Those of the kv head that each query head reads."""
        return HeadSpikes(self.share[group], self.outside[group], self.found[group.numpy()])


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


@dataclass(frozen=True, eq=False)
class HeadChanges:
    """The circuits OV or QK of a layer, one slice a query head.

    Attributes:
        circuit: ``OV`` or ``QK``.
        first: W_V or W_Q, [d_model, d_head].
        second: W_O, [d_head, d_model], or W_K so.
        left: Coordinates of the first.
        right: Coordinates of the second.
        spans: ``spans_of`` the base weights of both, each as [d_head, d_model].
        group: The kv head of each.
        partner: What each entry of a head rotates with, itself where it does not.
    """

    circuit: str
    first: Factor
    second: Factor
    left: Coordinates
    right: Coordinates
    spans: tuple[Float64[Tensor, "head d_model span"], ...]
    group: Int[Tensor, " head"]
    partner: Int[Tensor, " d_head"]

    @property
    def own(self) -> Factor:
        """The factor that each query head has for itself, [d_head, d_model]: W_O or W_Q."""
        return self.second if self.circuit == "OV" else self.first.swapped

    @property
    def shared(self) -> Factor:
        """The factor of the kv head, [d_head, d_model]: W_V or W_K."""
        return self.first.swapped if self.circuit == "OV" else self.second

    @property
    def own_spans(self) -> Float64[Tensor, "head d_model span"]:
        """The span of each head's own factor."""
        return self.spans[1 if self.circuit == "OV" else 0]

    @property
    def shared_spans(self) -> Float64[Tensor, "head d_model span"]:
        """That of the factor of its kv head."""
        return self.spans[0 if self.circuit == "OV" else 1]

    def shared_spikes(self, *, seed: int) -> HeadSpikes:
        """Structure in the kv heads' factors, worked out once for all query heads of each."""
        known, group = self.group.unique(return_inverse=True)
        first = torch.searchsorted(self.group, known)
        delta = change_of_heads(self.shared.delta, first)
        return head_spikes(delta, self.shared_spans[first], seed=seed).of_heads(group)

    @property
    def side(self) -> Side:
        """What the own factor does with the residual stream."""
        return "write" if self.circuit == "OV" else "read"


def head_evidence(keys: Keys, heads: HeadChanges, *, seed: int) -> Evidence:
    """Gain and own space against heads of other kv groups; structure of both factors by spikes.

    W_V, W_Q and W_K read and W_O writes: in QK, whatever is new is a new read. With rotary
    positions the gain of QK is that of all offsets (offsets.py), else of the product.
    """
    kv, nothing = heads.group.numpy(), np.full(len(heads.group), np.nan)
    swap = factor_swap(heads.first, heads.second, heads.partner)
    gain = own_versus_others(swap.z.numpy(), kv, alike=swap.of_mates(kv))
    mean = mean_change(heads.left, heads.right, heads.partner)
    from_own = (mean.from_right if heads.circuit == "OV" else 1 - mean.from_right).numpy()
    spans = share_in_spans(heads.own.delta, heads.own_spans).nan_to_num()
    space = own_versus_others(spans.numpy(), kv)
    own = head_spikes(heads.own.delta, heads.own_spans, seed=seed)
    shared = heads.shared_spikes(seed=seed + 1)
    amplified = mean.kappa.nan_to_num().numpy() ** 2
    shared_inside = (shared.share * (1 - shared.outside)).numpy()
    within = from_own * _above_chance(spans, heads.own) + (1 - from_own) * shared_inside - amplified
    p_space = nothing if space is None else space.p_greater()
    p_gain = nothing if gain is None else gain.p_two_sided()
    rows = evidence_rows(
        {**keys, "gain": mean.gain.numpy(), "kappa": mean.kappa.numpy()},
        share_gain=amplified,
        p_gain=p_gain,
        share_within=np.maximum(0, within),
        p_within=np.where(from_own > 0.5, p_space, np.nan),
        sure_within=(from_own <= 0.5) & shared.found,
        **_new_parts(heads.side, from_own, own, shared),
        decided_by=BY_PEERS if gain is not None else NO_PEERS,
        remark="" if gain is not None else NO_GAIN_TEST,
    )
    tests = [
        statistic_rows(keys, name, side=side, null="own_versus_other", effect=found.effect,
                  half_interval=found.half_interval(), p_value=p_value, k=k)
        for name, side, found, p_value, k in (
            ("gain", "both", gain, p_gain, None),
            ("share_in_own_space", heads.side, space, p_space, heads.own.base.shape[1]),
        )
        if found is not None
    ]  # fmt: skip
    return Evidence([rows], tests)


def _above_chance(
    spans: Float64[Tensor, "head other_head"], own: Factor
) -> Float[np.ndarray, " head"]:
    """Share of each head's change in its own space, 0 at chance and 1 at most."""
    d_head, d_model = own.base.shape[1:]
    chance = d_head / d_model
    if chance >= 1:
        return np.zeros(len(spans))
    return ((spans.diagonal() - chance) / (1 - chance)).numpy()


def _new_parts(
    side: Side, from_own: Float[np.ndarray, " head"], own: HeadSpikes, shared: HeadSpikes
) -> dict[str, np.ndarray]:
    """Shares of new writes and reads; those of two reading factors add up."""
    of_own = from_own * (own.share * own.outside).numpy()
    of_shared = (1 - from_own) * (shared.share * shared.outside).numpy()
    if side == "read":
        return {"share_new_read": of_own + of_shared, "sure_new_read": own.found | shared.found}
    return {
        "share_new_write": of_own,
        "sure_new_write": own.found,
        "share_new_read": of_shared,
        "sure_new_read": shared.found,
    }
