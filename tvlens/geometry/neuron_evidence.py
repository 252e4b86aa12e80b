"""Evidence about neurons: gain against the layer's other neurons, structure that they share.

Where the layer's common directions hold too little of a neuron's change to say anything, its own
direction may still say that the change stays where the base is strong: the alignment of one vector
with the base's directions has a known spread at chance. Such a neuron is *within* if the lower
bound of its alignment is beyond NEW_HI; as a share of its energy the alignment itself counts, since
a part f with the base's spectrum and a rest at chance have G_rel = f. Nothing of the kind can be
said of new directions: of one vector, new and noise look alike. Nor is it said near rounding, whose
errors are as large as the weights that they are made in, and so lie where the base is strong.
"""

from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Float64
from scipy import stats
from torch import Tensor

from .changes import Change, Remainder, slabs, transposed
from .evidence import (
    DEVIATIONS,
    MINS,
    NEW_HI,
    STRUCTURED,
    Z95,
    Evidence,
    Keys,
    evidence_rows,
    placed,
    residual_side,
    statistic_rows,
)
from .matrices import Basis, self_alignment
from .matrix_evidence import relative_alignment
from .neurons import Sums
from .nulls import (
    SNR_OF_STRUCTURE,
    Peers,
    Signs,
    above_rounding,
    neuron_gain,
    unit_alignment_spread,
)
from .spikes import Spikes, spikes_above_edge

BY_OTHERS = "own versus other neurons of the layer; sign-flip edge"
BY_ITSELF = (
    "alignment of the neuron's own change with the base, isotropic null with an effect floor"
)


@dataclass(frozen=True, eq=False)
class NeuronChanges:
    """The neurons of one matrix, one row each, and what has been measured of them.

    Attributes:
        base: Base weights.
        change: Tuning vector.
        sums: ``sums_of_rows(base, change)``.
        basis: ``spectral_basis`` of the matrix that the neurons are cut from.
        peers: ``peers_of(base)``.
        part: Which matrix it is.
        signs: Of the one draw for the noise edge.
    """

    base: Float[Tensor, "neuron d_model"]
    change: Change
    sums: Sums
    basis: Basis
    peers: Peers
    part: str
    signs: Signs


@dataclass(frozen=True, eq=False)
class NeuronStructure:
    """How much of each neuron's change lies in directions that the layer's changes share.

    Attributes:
        share: Share of the change's energy in the common spikes, less chance.
        p_value: Of that share, against an isotropic rest.
        aligned: G_rel of the part of the change that lies there, NaN where nothing does.
        spikes: Number of common spikes.
    """

    share: Float64[Tensor, " neuron"]
    p_value: Float[np.ndarray, " neuron"]
    aligned: Float64[Tensor, " neuron"]
    spikes: int


def neuron_structure(neurons: NeuronChanges) -> NeuronStructure:
    """Spikes of the layer's changes less their own gains, and each neuron's share.

    A single changed neuron has none: one vector carries no evidence of structure.
    """
    sums, d_model = neurons.sums, neurons.base.shape[1]
    nothing = torch.zeros_like(sums.delta)
    left = float(sums.residual.sum())
    if left <= 0:
        return NeuronStructure(nothing, np.ones(len(nothing)), nothing + torch.nan, 0)
    gain = rearrange(sums.gain.nan_to_num(), "neuron -> neuron 1")
    rest = Remainder(neurons.base, neurons.change, gain)
    spikes = spikes_above_edge(rest, left, signs=neurons.signs)
    inside, rank = shared_with_others(spikes, sums.residual), len(spikes.values)
    found, chance = inside.square().sum(1), rank / d_model
    share = (found / sums.delta - chance) / (1 - chance)
    of_rest = (found / sums.residual).nan_to_num().clamp(max=1).numpy()
    p_value = np.ones(len(nothing))
    if rank:
        p_value = stats.beta.sf(of_rest, rank / 2, (d_model - rank) / 2)
    coordinates = neurons.basis.coordinates(spikes.write, residual_side(neurons.part))
    aligned = _alignments(inside, coordinates, neurons.basis, d_model)
    return NeuronStructure(share.clamp(min=0).nan_to_num(), p_value, aligned, rank)


def shared_with_others(
    spikes: Spikes, energy: Float64[Tensor, " neuron"]
) -> Float64[Tensor, "neuron spike"]:
    """Each neuron's coordinates along the common spikes as the other neurons alone have them.

    A neuron pulls every spike towards itself. To first order (the secular equation of a rank-one
    update of the Gram matrix) its coordinate without that pull is 1 - h times as long, h = r^2 /
    (s^2 - m), with r^2 its energy outside the spikes, s the singular value and m the mean energy
    of a direction that is no spike. A spike of one neuron's own making vanishes.

    Args:
        spikes: Spikes of the neurons' changes.
        energy: Energy of each neuron's change.
    """
    inside = spikes.read * spikes.values
    rest = rearrange((energy - inside.square().sum(1)).clamp(min=0), "neuron -> neuron 1")
    others = max(1, min(len(spikes.read), len(spikes.write)) - len(spikes.values))
    own = rest / (spikes.values.square() - rest.sum() / others).clamp(min=1e-300)
    return inside * (1 - own).clamp(min=0)


def own_alignments(
    neurons: NeuronChanges, asked: Bool[np.ndarray, " neuron"]
) -> Float64[Tensor, " neuron"]:
    """G_rel of some neurons' changes less their own gains, NaN for the others.

    In float32: an alignment is a mean of hundreds of energies, and the gain must have left enough.
    """
    found = torch.full_like(neurons.sums.delta, torch.nan)
    gain = rearrange(neurons.sums.gain.nan_to_num(), "neuron -> neuron 1")
    rest = Remainder(neurons.base, neurons.change, gain)
    side, d_model = residual_side(neurons.part), neurons.base.shape[1]
    for start, stop in slabs(rest.shape):
        some = torch.from_numpy(asked[start:stop])
        if not bool(some.any()):
            continue
        rows = rest.rough_rows(start, stop)[some]
        coordinates = neurons.basis.coordinates(transposed(rows), side)
        aligned = relative_alignment(coordinates, rows.square().sum(1), neurons.basis, d_model)
        found[start:stop][some] = aligned
    return found


def _alignments(
    inside: Float64[Tensor, "neuron spike"],
    coordinates: Float64[Tensor, "direction spike"],
    basis: Basis,
    d_model: int,
) -> Float64[Tensor, " neuron"]:
    """G_rel of mixtures of spikes, some neurons at a time."""
    parts = [
        relative_alignment(
            coordinates @ transposed(inside[i:j]), inside[i:j].square().sum(1), basis, d_model
        )
        for i, j in slabs((len(inside), len(coordinates)))
    ]
    return torch.cat(parts)


def structured_columns(
    neurons: NeuronChanges, shared: NeuronStructure, spread: float
) -> dict[str, np.ndarray]:
    """Structured shares of every neuron: in common directions, or else where the base is strong.

    Args:
        neurons: The neurons.
        shared: Their structure in common directions.
        spread: Standard deviation of G_rel of one random vector.
    """
    share, aligned, sums = shared.share.numpy(), shared.aligned.numpy(), neurons.sums
    left = (sums.residual / sums.delta).nan_to_num().numpy()
    snr = sums.measures().snr.numpy()
    readable = above_rounding(sums.delta.numpy(), snr, least=SNR_OF_STRUCTURE)
    own = own_alignments(neurons, (share < MINS) & (left >= MINS) & readable).numpy()
    alone = own - DEVIATIONS * spread > NEW_HI
    aligned = np.where(alone, own, aligned)
    error = np.where(np.isnan(aligned), np.nan, spread)
    share = np.where(alone, own.clip(max=1) * left, share)
    p_own = stats.norm.sf(own / spread)
    return {
        **placed(share, aligned, error, neurons.part),
        **{f"p_{name}": np.where(alone, p_own, shared.p_value) for name in STRUCTURED},
        "alignment": aligned,
        "alignment_se": error,
        "decided_by": np.where(alone, BY_ITSELF, BY_OTHERS),
    }


def neuron_evidence(keys: Keys, neurons: NeuronChanges) -> Evidence:
    """Gain against the other neurons of the layer; structure as the share in common spikes."""
    d_model, part = neurons.base.shape[1], neurons.part
    kappa = neurons.sums.measures().kappa.nan_to_num()
    shared = neuron_structure(neurons)
    swap = neuron_gain(neurons.peers, neurons.change, kappa)
    p_gain = 2 * stats.norm.sf((swap.effect / swap.spread).abs().nan_to_num().numpy())
    spread = unit_alignment_spread(d_model) / abs(float(self_alignment(neurons.basis, d_model)))
    rows = evidence_rows(
        keys,
        share_gain=kappa.square(),
        p_gain=p_gain,
        **structured_columns(neurons, shared, spread),
        spikes=shared.spikes,
    )
    tests = [
        statistic_rows(keys, "gain", side="both", null="own_versus_other",
                       effect=swap.effect, half_interval=Z95 * swap.spread.numpy(),
                       p_value=p_gain),
        statistic_rows(keys, "structured_share", side=residual_side(part), null="isotropic",
                       effect=shared.share, p_value=shared.p_value, k=shared.spikes),
    ]  # fmt: skip
    return Evidence([rows], tests)
