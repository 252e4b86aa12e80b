"""Evidence for a label: how much of a component's change is a gain, how much is structure, where.

A frame of evidence has one row a component. Five candidate parts of the energy |D|^2 compete:

    gain        along the component's own base weights
    within      structured, in directions that the base already uses
    new_write   structured, writes directions that stand in no relation to the base's
    new_read    the same for reads
    between     structured, but too few directions to tell the two apart

``share_*`` is the part's share, ``p_*`` a p-value that still needs its false discovery rate, and
``sure_*`` true where another rule has already established the part (spikes above the edge).
Structure alone is no finding: every gradient update has it. Hence a new part needs an alignment
whose upper bound is below NEW_HI, and a claim needs the contrast of ``classify``'s headline.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from einops import einsum, rearrange
from jaxtyping import Float, Int
from scipy import stats
from torch import Tensor

from tvlens.components import KNOWN_PARTS, READING_PARTS, Component

from .heads import Factor
from .matrices import (
    Basis,
    alignment,
    channel_gains,
    self_alignment,
    spectral_basis,
    transposed,
)
from .neurons import rows_of_neurons, vector_measures
from .nulls import (
    cosine_spread,
    factor_swap,
    neuron_gain,
    noise_edge,
    own_versus_others,
    share_in_spans,
    unit_alignment_spread,
)

GAIN_Z = 4.0
"""A whole matrix has no peers, so its gain must be 4 isotropic deviations out (p = 6e-5)."""
GAIN_COSINE = 0.5
"""A spike is a gain of base directions when its two sides meet W with half of its full effect."""
NEW_HI = 0.5
"""Alignment halfway between chance (0) and a pure gain (1): below it new, above it rewired."""
DEVIATIONS = 2.0
"""Width of the bounds on an alignment: about 95 %."""
Z95 = 1.959964
"""Half width of a 95 % interval in standard deviations."""

BY_PEERS = "own versus heads of other kv groups; sign-flip edge"
NO_PEERS = "sign-flip edge alone: too few heads of other kv groups to test a gain against"

PARTS = ("gain", "within", "new_write", "new_read", "between")
STRUCTURED = PARTS[1:]
TEST_COLUMNS = (
    "component",
    "side",
    "statistic",
    "null",
    "effect",
    "ci_low",
    "ci_high",
    "p_value",
    "p_floor",
    "draws",
    "k",
)


@dataclass(frozen=True, eq=False)
class Evidence:
    """What is known about some components before the false discovery rate is settled.

    Attributes:
        frame: One row a component (module docstring).
        tests: One row a statistic of a component, columns ``TEST_COLUMNS``.
    """

    frame: pd.DataFrame
    tests: pd.DataFrame


@dataclass(frozen=True, eq=False)
class Spikes:
    """Singular triplets of a change that stand above the noise edge.

    Attributes:
        read: Left directions.
        values: Singular values.
        write: Right directions.
        total: Energy of the whole change.
    """

    read: Float[Tensor, "d_in spike"]
    values: Float[Tensor, " spike"]
    write: Float[Tensor, "d_out spike"]
    total: float

    @property
    def shares(self) -> Float[Tensor, " spike"]:
        """Share of the change's energy in each spike."""
        return self.values.square() / self.total


def spikes_above_edge(delta: Float[Tensor, "d_in d_out"], *, seed: int) -> Spikes:
    """The triplets of ``delta`` above its one-draw sign-flip edge."""
    basis = spectral_basis(delta)
    above = basis.values > noise_edge(delta, seed=seed)
    total = float(delta.double().square().sum())
    return Spikes(basis.read[:, above], basis.values[above], basis.write[:, above], total)


def evidence_frame(components: Sequence[Component], **columns: Any) -> pd.DataFrame:
    """A frame of evidence; what is not given is absent (NaN shares, nothing sure)."""
    values: dict[str, Any] = {
        "component": pd.Series(list(components), dtype=object),
        "kind": [component.kind for component in components],
        "part": [component.part for component in components],
        "alignment": np.nan,
        "alignment_se": np.nan,
        "spikes": 0,
        "decided_by": "no test",
    }
    for part in PARTS:
        values |= {f"share_{part}": 0.0, f"p_{part}": np.nan, f"sure_{part}": False}
    for name, column in columns.items():
        values[name] = column.numpy() if isinstance(column, Tensor) else column
    return pd.DataFrame(values)


def statistic_rows(
    components: Sequence[Component],
    statistic: str,
    *,
    side: str,
    null: str,
    effect: Any,
    half_interval: Any = np.nan,
    p_value: Any = np.nan,
    k: int | None = None,
) -> pd.DataFrame:
    """Rows of the table of tests for one statistic; analytic nulls reach any p and draw nothing."""
    middle = np.asarray(effect, dtype=float)
    return pd.DataFrame(
        {
            "component": pd.Series(list(components), dtype=object),
            "side": side,
            "statistic": statistic,
            "null": null,
            "effect": middle,
            "ci_low": middle - half_interval,
            "ci_high": middle + half_interval,
            "p_value": np.asarray(p_value, dtype=float),
            "p_floor": 0.0,
            "draws": 0,
            "k": k,
        }
    )


def _placed(
    share: Float[np.ndarray, " component"],
    aligned: Float[np.ndarray, " component"],
    error: Float[np.ndarray, " component"],
    part: str,
) -> dict[str, np.ndarray]:
    """Where a structured share belongs, by the bounds of its alignment with the base."""
    new = aligned + DEVIATIONS * error < NEW_HI
    # new writes of a reading matrix are head or neuron coordinates, so its rest is rewired
    within = ~new if part in READING_PARTS else aligned - DEVIATIONS * error > NEW_HI
    new_part = f"new_{residual_side(part)}"
    where = {new_part: new, "within": within & ~new, "between": ~new & ~within}
    return {f"share_{name}": np.where(mask, share, 0.0) for name, mask in where.items()}


def residual_side(part: str) -> str:
    """The side of a matrix that is the residual stream."""
    return "read" if part in READING_PARTS else "write"


def _side_basis(basis: Basis, part: str) -> Basis:
    """A basis whose ``write`` side is the residual stream."""
    if residual_side(part) == "write":
        return basis
    return Basis(basis.write, basis.values, basis.read)


def relative_alignment(
    vectors: Float[Tensor, "row d_model"], basis: Basis
) -> Float[Tensor, " row"]:
    """G_rel of each vector on the ``write`` side of ``basis``."""
    vectors = vectors.double()
    energies = einsum(vectors, basis.write, "row d, d direction -> row direction").square()
    rank = basis.rank.expand(len(vectors))
    found = alignment(energies, vectors.square().sum(1), rank, vectors.shape[1])
    return found / self_alignment(basis, vectors.shape[1])


@dataclass(frozen=True, eq=False)
class MatrixStructure:
    """The structured rest of a matrix's change.

    Attributes:
        share: Share of the change's energy in spikes that are no gains.
        aligned: Their energy-weighted G_rel on the residual side, NaN where that is unknown.
        error: Its standard error at chance.
        spikes: Their number.
    """

    share: float
    aligned: float
    error: float
    spikes: int


def _gain_cosines(spikes: Spikes, base: Float[Tensor, "d_in d_out"]) -> Float[Tensor, " spike"]:
    """rho_j = u'Wv / sqrt(|W'u| |Wv|): 1 where a spike scales a direction of W."""
    base = base.double()
    from_read = einsum(spikes.read, base, "d_in spike, d_in d_out -> spike d_out")
    onto_write = einsum(base, spikes.write, "d_in d_out, d_out spike -> d_in spike")
    through = einsum(from_read, spikes.write, "spike d_out, d_out spike -> spike")
    size = (from_read.norm(dim=1) * onto_write.norm(dim=0)).sqrt()
    return through / size.clamp(min=torch.finfo(torch.float64).tiny)


def matrix_structure(
    base: Float[Tensor, "d_in d_out"],
    rest: Float[Tensor, "d_in d_out"],
    basis: Basis,
    part: str,
    *,
    seed: int,
) -> MatrixStructure:
    """Spikes of ``rest`` (the change less its global gain) that are no gains of base directions."""
    spikes = spikes_above_edge(rest, seed=seed)
    plain = _gain_cosines(spikes, base).abs() <= GAIN_COSINE
    shares = spikes.shares[plain]
    if not len(shares):
        return MatrixStructure(0.0, np.nan, np.nan, 0)
    if part not in KNOWN_PARTS:  # which side would be the residual stream?
        return MatrixStructure(float(shares.sum()), np.nan, np.nan, len(shares))
    side = _side_basis(basis, part)
    vectors = (spikes.write if residual_side(part) == "write" else spikes.read)[:, plain]
    weight = shares / shares.sum()
    rows = rearrange(vectors, "d_model spike -> spike d_model")
    aligned = float((weight * relative_alignment(rows, side)).sum())
    spread = unit_alignment_spread(rows.shape[1]) / abs(float(self_alignment(side, rows.shape[1])))
    error = float(weight.square().sum().sqrt()) * spread
    return MatrixStructure(float(shares.sum()), aligned, error, len(shares))


@dataclass(frozen=True, eq=False)
class MatrixGain:
    """The part of a matrix's change that scales the base or its directions.

    Attributes:
        gain: <D, W> / |W|^2.
        kappa: Cosine of D and W.
        scale: Share in gains of single directions, beyond the global one, less chance.
        scale_spread: Its standard deviation under isotropic noise.
    """

    gain: float
    kappa: float
    scale: float
    scale_spread: float

    @property
    def share(self) -> float:
        """Share of the energy in gains."""
        return self.kappa**2 + max(0.0, self.scale)


def matrix_gain(basis: Basis, delta: Float[Tensor, "d_in d_out"]) -> MatrixGain:
    """Global and single gains of a matrix; chance is r / (m n) +- sqrt(2 r) / (m n)."""
    channels, total = channel_gains(basis, delta), delta.double().square().sum()
    inner, energy = (channels * basis.values).sum(), basis.values.square().sum()
    kappa = float(inner / (energy * total).sqrt())
    rank, size = float(basis.rank), delta.numel()
    scale = float(channels.square().sum() / total) - kappa**2 - rank / size
    return MatrixGain(float(inner / energy), kappa, scale, (2 * rank) ** 0.5 / size)


def matrix_evidence(
    component: Component,
    base: Float[Tensor, "d_in d_out"],
    delta: Float[Tensor, "d_in d_out"],
    basis: Basis,
    *,
    seed: int,
) -> Evidence:
    """Gain against the isotropic null with an effect floor; structure by spikes above the edge.

    ``basis`` is ``spectral_basis(base)``, which the neurons of the matrix share.
    """
    base, delta, part = base.double(), delta.double(), component.part or ""
    own = matrix_gain(basis, delta)
    gain, kappa, scale, whole = own.gain, own.kappa, own.scale, own.kappa**2
    p_kappa = 2 * stats.norm.sf(abs(kappa) / cosine_spread(*base.shape))
    p_scale = stats.norm.sf(scale / own.scale_spread)
    limit = stats.norm.sf(GAIN_Z)
    rest = matrix_structure(base, delta - gain * base, basis, part, seed=seed)
    share = rest.share * (1 - whole)
    placed = _placed(np.array([share]), np.array([rest.aligned]), np.array([rest.error]), part)
    frame = evidence_frame(
        [component],
        share_gain=own.share,
        sure_gain=bool(p_kappa < 2 * limit or p_scale < limit),
        **placed,
        **{f"sure_{name}": rest.spikes > 0 for name in STRUCTURED},
        alignment=rest.aligned,
        alignment_se=rest.error,
        spikes=rest.spikes,
        decided_by="isotropic null with an effect floor; sign-flip edge",
    )
    one = [component]
    kappa_half, scale_half = Z95 * cosine_spread(*base.shape), Z95 * own.scale_spread
    tests = [
        statistic_rows(one, "kappa", side="both", null="isotropic", effect=kappa,
                  half_interval=kappa_half, p_value=p_kappa),
        statistic_rows(one, "e_scale", side="both", null="isotropic", effect=scale,
                  half_interval=scale_half, p_value=p_scale),
        _alignment_rows(frame, residual_side(part)),
    ]  # fmt: skip
    return Evidence(frame, pd.concat(tests, ignore_index=True))


def _alignment_rows(frame: pd.DataFrame, side: str) -> pd.DataFrame:
    """Alignment of the structured part against chance."""
    found = frame[frame["alignment"].notna()]
    return statistic_rows(
        list(found["component"]),
        "g_rel_of_spikes",
        side=side,
        null="isotropic",
        effect=found["alignment"],
        half_interval=Z95 * found["alignment_se"].to_numpy(float),
        p_value=2 * stats.norm.sf(np.abs(found["alignment"] / found["alignment_se"])),
        k=int(found["spikes"].max()) if len(found) else None,
    )


@dataclass(frozen=True, eq=False)
class NeuronStructure:
    """How much of each neuron's change lies in directions that the layer's changes share.

    Attributes:
        share: Share of the change's energy in the common spikes, less chance.
        p_value: Of that share, against an isotropic rest.
        inside: The part of the change that lies there.
        spikes: Number of common spikes.
    """

    share: Float[Tensor, " neuron"]
    p_value: Float[np.ndarray, " neuron"]
    inside: Float[Tensor, "neuron d_model"]
    spikes: int


def neuron_structure(
    delta: Float[Tensor, "neuron d_model"], rest: Float[Tensor, "neuron d_model"], *, seed: int
) -> NeuronStructure:
    """Spikes of the layer's ``rest`` (changes less their own gains) and each neuron's share.

    A single changed neuron has none: one vector carries no evidence of structure.
    """
    spikes = spikes_above_edge(rest, seed=seed)
    rank, d_model = len(spikes.values), rest.shape[1]
    inside = einsum(rest, spikes.write, "neuron d, d spike -> neuron spike") @ spikes.write.mT
    found, chance = inside.square().sum(1), rank / d_model
    share = (found / delta.square().sum(1) - chance) / (1 - chance)
    of_rest = (found / rest.square().sum(1)).nan_to_num().clamp(max=1).numpy()
    p_value = np.ones(len(delta))
    if rank:
        p_value = stats.beta.sf(of_rest, rank / 2, (d_model - rank) / 2)
    return NeuronStructure(share.clamp(min=0).nan_to_num(), p_value, inside, rank)


def neuron_evidence(
    components: Sequence[Component],
    base: Float[Tensor, "d_in d_out"],
    delta: Float[Tensor, "d_in d_out"],
    matrix_basis: Basis,
    *,
    seed: int,
) -> Evidence:
    """Gain against the other neurons of the layer; structure as the share in common spikes."""
    part = components[0].part or ""
    base, delta = (rows_of_neurons(w.double(), part) for w in (base, delta))
    own = vector_measures(base, delta)
    gain = rearrange(own.gain.nan_to_num(), "neuron -> neuron 1")
    shared = neuron_structure(delta, delta - gain * base, seed=seed)
    swap = neuron_gain(base, delta)
    p_gain = 2 * stats.norm.sf((swap.effect / swap.spread).abs().nan_to_num().numpy())
    basis = _side_basis(matrix_basis, part)
    aligned = relative_alignment(shared.inside, basis).numpy()  # NaN where nothing is inside
    spread = unit_alignment_spread(base.shape[1]) / abs(float(self_alignment(basis, base.shape[1])))
    error = np.where(np.isnan(aligned), np.nan, spread)
    frame = evidence_frame(
        components,
        share_gain=own.kappa.square().nan_to_num(),
        p_gain=p_gain,
        **_placed(shared.share.numpy(), aligned, error, part),
        **{f"p_{name}": shared.p_value for name in STRUCTURED},
        alignment=aligned,
        alignment_se=error,
        spikes=shared.spikes,
        decided_by="own versus other neurons of the layer; sign-flip edge",
    )
    tests = [
        statistic_rows(components, "gain", side="both", null="own_versus_other",
                       effect=swap.effect, half_interval=Z95 * swap.spread.numpy(),
                       p_value=p_gain),
        statistic_rows(components, "structured_share", side=residual_side(part), null="isotropic",
                       effect=shared.share, p_value=shared.p_value, k=shared.spikes),
    ]  # fmt: skip
    return Evidence(frame, pd.concat(tests, ignore_index=True))


@dataclass(frozen=True, eq=False)
class HeadSpikes:
    """Structure in one factor of every head.

    Attributes:
        share: Share of the factor's change in spikes above the edge.
        outside: Share of that energy outside the row space of the head's base weights.
        found: Whether there is any spike.
    """

    share: Float[Tensor, " head"]
    outside: Float[Tensor, " head"]
    found: np.ndarray


def head_spikes(
    base: Float[Tensor, "head d_head d_model"],
    delta: Float[Tensor, "head d_head d_model"],
    *,
    seed: int,
) -> HeadSpikes:
    """Spikes of each head's change and how far they leave the head's own directions."""
    basis = spectral_basis(delta)
    edge = rearrange(noise_edge(delta, seed=seed), "head -> head 1")
    energies = torch.where(basis.values > edge, basis.values.square(), 0)
    span = torch.linalg.qr(transposed(base.double())).Q
    inside = einsum(basis.write, span, "head d spike, head d k -> head k spike").square().sum(1)
    total, above = delta.double().square().sum((1, 2)), energies.sum(1)
    outside = 1 - ((energies * inside).sum(1) / above).nan_to_num()
    return HeadSpikes((above / total).nan_to_num(), outside, (above > 0).numpy())


def _share_from_right(left: Factor, right: Factor) -> Float[Tensor, " head"]:
    """Share of |V_mid dO|^2 in |V_mid dO|^2 + |dV O_mid|^2."""
    from_right = left.middle @ right.delta.double()
    from_left = left.delta.double() @ right.middle
    right_energy = from_right.square().sum((1, 2))
    return (right_energy / (right_energy + from_left.square().sum((1, 2)))).nan_to_num()


def head_evidence(
    components: Sequence[Component],
    value: Factor,
    output: Factor,
    group: Int[Tensor, " head"],
    kappa: Float[np.ndarray, " head"],
    *,
    seed: int,
) -> Evidence:
    """Gain and write space of OV against heads of other kv groups; structure of dO by spikes."""
    d_head, d_model = output.base.shape[1:]
    kv = group.numpy()
    swap = factor_swap(value.base, value.delta, output.base, output.delta)
    gain = own_versus_others(swap.z.numpy(), kv)
    spans = share_in_spans(output.delta, output.base).nan_to_num()
    space = own_versus_others(spans.numpy(), kv)
    from_right = _share_from_right(value, output).numpy()
    writes = head_spikes(output.base, output.delta, seed=seed)
    reads = head_spikes(value.swapped.base, value.swapped.delta, seed=seed + 1)
    chance = d_head / d_model
    own = ((spans.diagonal() - chance) / (1 - chance)).numpy() if chance < 1 else np.zeros(len(kv))
    amplified = np.nan_to_num(kappa) ** 2
    read_inside = (reads.share * (1 - reads.outside)).numpy()
    within = from_right * own + (1 - from_right) * read_inside - amplified
    nothing = np.full(len(kv), np.nan)
    p_space = nothing if space is None else space.p_greater()
    frame = evidence_frame(
        components,
        share_gain=amplified,
        p_gain=nothing if gain is None else gain.p_two_sided(),
        share_within=np.maximum(0, within),
        p_within=np.where(from_right > 0.5, p_space, np.nan),
        sure_within=(from_right <= 0.5) & reads.found,
        share_new_write=from_right * (writes.share * writes.outside).numpy(),
        sure_new_write=writes.found,
        share_new_read=(1 - from_right) * (reads.share * reads.outside).numpy(),
        sure_new_read=reads.found,
        decided_by=BY_PEERS if gain is not None else NO_PEERS,
    )
    tests = [
        statistic_rows(components, name, side=side, null="own_versus_other", effect=found.effect,
                  half_interval=found.half_interval(), p_value=p_value, k=k)
        for name, side, found, p_value, k in (
            ("gain", "both", gain, frame["p_gain"], None),
            ("share_in_own_space", "write", space, p_space, d_head),
        )
        if found is not None
    ]  # fmt: skip
    empty = pd.DataFrame(columns=list(TEST_COLUMNS))
    return Evidence(frame, pd.concat(tests, ignore_index=True) if tests else empty)


def joined_evidence(parts: Sequence[Evidence]) -> Evidence:
    """The evidence of several groups of components, in order."""
    tests = [part.tests for part in parts if len(part.tests)]
    empty = pd.DataFrame(columns=list(TEST_COLUMNS))
    return Evidence(
        pd.concat([part.frame for part in parts], ignore_index=True),
        pd.concat(tests, ignore_index=True) if tests else empty,
    )


def with_weights(frame: pd.DataFrame, weights: Mapping[str, pd.Series]) -> pd.DataFrame:
    """The frame with the measures that the gate and the reasons need."""
    labels = [str(component) for component in frame["component"]]
    return frame.assign(**{name: series.loc[labels].to_numpy() for name, series in weights.items()})
