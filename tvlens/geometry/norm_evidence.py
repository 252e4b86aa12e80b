"""Evidence about norms: a gain of the own gains against those of other norms; single channels.

A norm multiplies channel i by w_i (1 + the stored number where a family stores it so) and its
change d is one vector. Gain vectors resemble each other: all are positive, the same few channels
stand out in all of them, so that d = a w_h also looks like a gain of every other norm and like a
shift of all channels. Hence d is explained by a common shift and by all norms of its width at once,

    d_h = c + sum_g b_hg w_g + rest

and b_hh must stand out among the b_hg, each in units of its standard error: what is own to h is
what no combination of the others explains. The energy of b_hh w_h is the share of the gain, never
more than kappa^2. The ``rest`` tells of single channels: those further from its median than normal
numbers of the same median deviation come.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Float64
from scipy import stats
from torch import Tensor

from .evidence import (
    GATE_COLUMNS,
    MINS,
    Evidence,
    Keys,
    evidence_rows,
    joined_evidence,
    statistic_rows,
)
from .nulls import OwnVersusOthers, own_versus_peers

RIDGE = 1e-9
"""Added to the products of unit profiles: it lets copies of one another be inverted."""
OWN_AT_LEAST = 1e-6
"""Share of a profile that no other explains, below which its coefficient is arithmetic."""
PEER_SHARE = 0.5
"""Norms explained together are at most half as many as channels, so that a rest is left."""
CHANNEL_LEVEL = 0.05
"""Chance of one channel standing out among all of a norm's channels without reason."""
MEDIAN_DEVIATION = float(stats.norm.ppf(0.75))
"""Median of |x| of a normal x of unit spread."""
MEDIAN_EFFICIENCY = 0.37
"""A median deviation is as uncertain as a standard deviation of so many times the channels."""
SHARED = (
    "It lies along its own gains, but a shift of all channels or the gains of other norms explain "
    "it as well."
)
BY_NORMS = "own versus other norms of its width; normal rest by its median deviation"
NO_NORMS = "single channels alone: fewer than two other norms of its width to test a gain against"


@dataclass(frozen=True, eq=False)
class NormChange:
    """One norm and how it changed.

    Attributes:
        keys: Its key and the measures of the gate.
        base: The gain that acts, channel by channel.
        change: Tuned minus base.
    """

    keys: Keys
    base: Float64[Tensor, " d_model"]
    change: Float64[Tensor, " d_model"]


@dataclass(frozen=True, eq=False)
class JointGains:
    """Changes explained by a shift of all channels and all gain vectors at once.

    Attributes:
        gain: Coefficient of each norm's change on its own gains, 0 where they are not its own.
        t: Coefficients on all norms' gains in units of their standard errors.
        estimable: Norms with a profile that the others leave something of.
        rest: What is left of each change.
    """

    gain: Float64[Tensor, " norm"]
    t: Float64[Tensor, "norm other_norm"]
    estimable: Bool[Tensor, " norm"]
    rest: Float64[Tensor, "norm d_model"]


def joint_gains(
    base: Float64[Tensor, "norm d_model"], change: Float64[Tensor, "norm d_model"]
) -> JointGains:
    """Least squares of every change on all gain vectors and a constant."""
    profile, moved = (rows - rows.mean(1, keepdim=True) for rows in (base, change))
    length = profile.norm(dim=1)
    flat = length <= OWN_AT_LEAST * base.norm(dim=1)
    unit = torch.where(flat[:, None], 0, profile / length[:, None])
    count, channels = base.shape
    inverse = torch.linalg.inv(unit @ unit.mT + RIDGE * torch.eye(count, dtype=base.dtype))
    own = 1 / inverse.diagonal()
    coefficient = moved @ unit.mT @ inverse
    rest = moved - coefficient @ unit
    freedom = max(1, channels - 1 - count)
    variance = rearrange(rest.square().sum(1), "norm -> norm 1") / freedom
    t = (coefficient * own.sqrt() / variance.sqrt()).nan_to_num()
    estimable = ~flat & (own > OWN_AT_LEAST)
    gain = torch.where(estimable, coefficient.diagonal() / length, 0)
    return JointGains(gain, t, estimable, rest)


@dataclass(frozen=True, eq=False)
class Channels:
    """Single channels of norms that changed more than the rest of their norm does.

    Attributes:
        energy: Their energy.
        p_value: Of the furthest one among all channels.
        count: Their number.
    """

    energy: Float[np.ndarray, " norm"]
    p_value: Float[np.ndarray, " norm"]
    count: Float[np.ndarray, " norm"]


def single_channels(rest: Float64[Tensor, "norm d_model"]) -> Channels:
    """Channels beyond normal numbers with the same median deviation (module docstring)."""
    channels = rest.shape[1]
    away = (rest - rest.quantile(0.5, dim=1, keepdim=True)).abs()
    spread = away.quantile(0.5, dim=1, keepdim=True) / MEDIAN_DEVIATION
    distance = torch.where(away > 0, away / spread, 0).numpy()
    p_values = 2 * stats.t.sf(distance, max(1.0, MEDIAN_EFFICIENCY * (channels - 1)))
    all_channels = np.minimum(1, channels * p_values)
    above = all_channels <= CHANNEL_LEVEL
    energy = np.where(above, rest.square().numpy(), 0).sum(1)
    return Channels(energy, all_channels.min(1), above.sum(1).astype(float))


def norm_evidence(norms: Sequence[NormChange]) -> Evidence:
    """Gain and single channels of all norms of a model, each width by itself."""
    return joined_evidence([_of_width(some) for some in _comparable(norms)])


def _comparable(norms: Sequence[NormChange]) -> Iterator[list[NormChange]]:
    """Norms that are explained together: one width, and no more than ``PEER_SHARE`` allows."""
    widths = dict.fromkeys(len(norm.base) for norm in norms)
    for width in widths:
        same = [norm for norm in norms if len(norm.base) == width]
        groups = -(-len(same) // max(3, int(PEER_SHARE * width)))
        for numbers in np.array_split(np.arange(len(same)), groups):
            yield [same[number] for number in numbers]


def _of_width(norms: Sequence[NormChange]) -> Evidence:
    keys = {name: [x for n in norms for x in n.keys[name]] for name in norms[0].keys}
    keys |= {name: np.array([float(x) for x in keys[name]]) for name in GATE_COLUMNS}
    base, change = (torch.stack([getattr(n, name) for n in norms]) for name in ("base", "change"))
    joint, total = joint_gains(base, change), change.square().sum(1).numpy()
    found = _against_peers(joint, total > 0)
    p_gain = np.full(len(norms), np.nan) if found is None else found.p_two_sided()
    p_gain = np.where(joint.estimable.numpy() & (total > 0), p_gain, np.nan)
    share = _own_shares(joint.gain.numpy(), keys)
    single = single_channels(joint.rest)
    within = single.energy / np.where(total > 0, total, np.inf)
    told = joint.estimable.numpy() & (found is not None)
    rows = evidence_rows(
        keys,
        share_gain=share,
        p_gain=p_gain,
        share_within=within,
        p_within=single.p_value,
        spikes=single.count,
        remark=np.where(np.square(keys["kappa"]) - share >= MINS, SHARED, ""),
        decided_by=np.where(told, BY_NORMS, NO_NORMS),
    )
    tests = [
        statistic_rows(keys, "single_channels", side="both", null="normal_rest", effect=within,
                       p_value=single.p_value, k=len(base[0])),
    ]  # fmt: skip
    if found is not None:
        tests.append(
            statistic_rows(keys, "gain", side="both", null="own_versus_other", effect=found.effect,
                           half_interval=found.half_interval(), p_value=p_gain)
        )  # fmt: skip
    return Evidence([rows], tests)


def _own_shares(gain: Float[np.ndarray, " norm"], keys: Keys) -> Float[np.ndarray, " norm"]:
    """Energy of a gain that is own, never more than kappa^2 nor against its sign."""
    kappa, whole = np.nan_to_num(keys["kappa"]), np.nan_to_num(keys["gain"])
    with np.errstate(divide="ignore", invalid="ignore"):
        part = np.nan_to_num(gain / whole)  # of the energy kappa^2 = whole^2 |w|^2 / |d|^2
    return kappa**2 * np.clip(part, 0, 1) ** 2


def _against_peers(joint: JointGains, changed: Bool[np.ndarray, " norm"]) -> OwnVersusOthers | None:
    """The own coefficient against those on other norms; t has unit spread where nothing is."""
    peers = (joint.estimable & ~torch.eye(len(changed), dtype=torch.bool)).numpy()
    return own_versus_peers(
        joint.t.diagonal().numpy(), joint.t.numpy(), peers, typical=changed, least=1.0
    )
