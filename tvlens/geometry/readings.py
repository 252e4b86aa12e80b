"""The table ``readings``: subspace alignment as a paper may have meant it, beside noise.

Tanwar et al. 2025 [1] tell "new" from "amplified" by a "subspace alignment" whose formula could not
be found. Three readings are common; each compares a change D with its base W on the side that is
the residual stream, of dimension d. With U_k the k strongest directions of W there:

    sa_proj       |P_k D| / |D|, P_k the projection onto U_k [2]; k (column ``rule``) is the rank
                  that holds 90.25 % of |W|^2, the rank that holds 95 %, or d_head
    sa_phi        |U_D^i' U_W^j|^2 / min(i, j), top i of D against top j of W [3]
    sa_cos_mean   of the top SA_COS_TOP directions of D, the largest |cos| with one direction of W,
                  averaged; sa_cos_max: the largest of them

Raw values are not comparable between matrices: k follows the spectrum, and isotropic noise scores
sqrt(k / d). So each value stands beside

    chance      the expectation for isotropic noise: k / d for the energy under sa_proj (``value``
                and ``chance`` are both its square root), max(i, j) / d for sa_phi, exact; for
                sa_cos_mean the exact expectation over Haar vectors; for sa_cos_max a mean of
                COS_DRAWS draws
    corrected   (v - c) / (1 - c), chance 0, all inside 1; of the energies for sa_proj, and null
                where chance is 1, so that nothing can be told
    noise       what one seeded draw of isotropic noise of the same norm scores; it is drawn as it
                is seen from the base, where the energies of its directions are independent
    noise_corrected   the same draw, corrected: how far from 0 chance alone can lead

No raw value goes into a label or a verdict of this library.

[1] arXiv 2510.09359. [2] Marczak et al. 2025, arXiv 2502.04959: the published code thresholds
sqrt(energy) at .95, which is 90.25 % of the energy. [3] Hu et al. 2021, arXiv 2106.09685, 7.2.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from math import lgamma
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from einops import einsum, rearrange
from jaxtyping import Float, Float64, Int
from scipy import integrate, special
from torch import Tensor

from tvlens.components import Component, key_columns
from tvlens.tables import Table, concatenated, keyed_schema
from tvlens.threads import one_thread

from .changes import Change, energy, product
from .evidence import residual_side
from .heads import change_of_heads
from .matrices import spectral_basis
from .measures import HEAD_PARTS, KV_PARTS
from .reading import Pair, factor_of_heads, kv_index_of
from .spectra import (
    Spectra,
    onto_residual,
    spectra_of_block,
    strongest_onto_residual,
    writing,
)

ENERGY_RULES = {"energy_0.9025": 0.95**2, "energy_0.95": 0.95}
"""Shares of |W|^2 that set k."""
PHI_GRID = ((1, 1), (1, 8), (8, 8), (8, 64))
"""Top i of the change against top j of the base; LoRA's figures use ranks of 8 and 64."""
SA_COS_TOP = 10
COS_DRAWS = 64
"""Standard error of the mean of the largest cosine: an eighth of its spread of about a tenth."""

NUMBERS = ("value", "chance", "corrected", "noise", "noise_corrected")
READINGS_SCHEMA = keyed_schema(
    *((name, pa.string()) for name in ("side", "reading", "rule")),
    *((name, pa.int32()) for name in ("k", "i", "d")),
    *((name, pa.float64()) for name in NUMBERS),
)


class Reading(NamedTuple):
    """One reading of a batch of components.

    Attributes:
        reading: ``sa_proj``, ``sa_phi``, ``sa_cos_mean`` or ``sa_cos_max``.
        rule: What set the ranks.
        k: Directions of the base.
        i: Directions of the change, 0 where all of it counts.
        value: What was read.
        chance: Its expectation under isotropic noise.
        noise: What one draw of noise scores.
        power: 2 where chance is corrected for in energies, 1 where in the value itself.
    """

    reading: str
    rule: str
    k: Int[np.ndarray, " component"]
    i: int
    value: Float[np.ndarray, " component"]
    chance: Float[np.ndarray, " component"]
    noise: Float[np.ndarray, " component"]
    power: int = 1

    def corrected(self, raw: Float[np.ndarray, " component"]) -> Float[np.ndarray, " component"]:
        """(v - c) / (1 - c) of the value or its energy; NaN where chance is 1."""
        value, chance = raw**self.power, self.chance**self.power
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(chance < 1, (value - chance) / (1 - chance), np.nan)


@dataclass(frozen=True, eq=False)
class Sided:
    """Some matrices of one shape as seen from the residual stream.

    Attributes:
        directions: The base's directions there, strongest first; null ones are zero.
        values: The base's singular values.
        inside: Energy of the tuning vector in each of them, as a share of the whole.
        strongest: The SA_COS_TOP strongest directions of the tuning vector; null ones are zero.
        other: Dimension of the other side.
        side: ``read`` or ``write``: which side of the matrices is the residual stream.
    """

    directions: Float64[Tensor, "component d_model direction"]
    values: Float64[Tensor, "component direction"]
    inside: Float64[Tensor, "component direction"]
    strongest: Float64[Tensor, "component d_model change_direction"]
    other: int
    side: str

    @classmethod
    def of(cls, base: Float[Tensor, "component d_in d_out"], delta: Change, part: str) -> "Sided":
        """From matrices in the orientation x @ W."""
        own = spectral_basis(base)
        directions, facing = onto_residual(own, part), writing(delta, part)
        strongest = strongest_onto_residual(delta, part, SA_COS_TOP)
        inside = share_inside(facing, directions)
        return cls(directions, own.values, inside, strongest, facing.shape[-2], residual_side(part))

    @classmethod
    def of_one(cls, one: Spectra) -> "Sided":
        """From a single matrix whose directions are known."""
        directions, facing = onto_residual(one.base, one.part), writing(one.weight.change, one.part)
        strongest = onto_residual(one.change, one.part)[:, :SA_COS_TOP]
        return cls(
            rearrange(directions, "d direction -> 1 d direction"),
            rearrange(one.base.values, "direction -> 1 direction"),
            rearrange(share_inside(facing, directions), "direction -> 1 direction"),
            rearrange(strongest, "d direction -> 1 d direction"),
            facing.shape[-2],
            residual_side(one.part),
        )

    @property
    def d(self) -> int:
        """Dimension of the residual stream."""
        return self.directions.shape[-2]

    @property
    def rank(self) -> int:
        """Directions that every base has."""
        return int((self.values > 0).sum(1).min())

    @property
    def change_rank(self) -> int:
        """Directions that every change has."""
        return int((self.strongest.square().sum(1) > 0.5).sum(1).min())


def energy_rank(
    values: Float[Tensor, "component direction"], share: float
) -> Int[np.ndarray, " component"]:
    """The smallest rank whose singular values hold ``share`` of the energy."""
    held = values.square().cumsum(1) / values.square().sum(1, keepdim=True)
    return ((held < share - 1e-12).sum(1) + 1).clamp(max=values.shape[1]).numpy()


def share_inside(
    facing: Change, directions: Float64[Tensor, "*component d_model direction"]
) -> Float64[Tensor, "*component direction"]:
    """Share of the energy of changes, the residual stream last, in each of some directions."""
    inside = product(facing, directions).square().sum(-2)
    return inside / rearrange(energy(facing), "... -> ... 1")


def drawn_inside(sided: Sided, *, seed: int) -> Float[np.ndarray, "component direction"]:
    """What ``inside`` is for isotropic noise: energies of Gaussian entries, one draw.

    Orthonormal directions see independent parts of it, so none of its entries need be drawn.
    """
    values, generator = sided.values.numpy(), np.random.default_rng(seed)
    drawn = np.where(values > 0, generator.chisquare(sided.other, values.shape), 0)
    rest = sided.other * (sided.d - (values > 0).sum(1, keepdims=True))
    return drawn / (drawn.sum(1, keepdims=True) + 2 * generator.standard_gamma(rest / 2))


def sa_proj(sided: Sided, d_head: int, *, seed: int) -> Iterator[Reading]:
    """|P_k D| / |D| for every rule of k."""
    count = len(sided.values)
    inside, inside_noise = (
        shares.cumsum(1).clip(max=1)
        for shares in (sided.inside.numpy(), drawn_inside(sided, seed=seed))
    )
    ranks = {rule: energy_rank(sided.values, share) for rule, share in ENERGY_RULES.items()}
    if d_head <= sided.rank:
        ranks["d_head"] = np.full(count, d_head)
    rows = np.arange(count)
    for rule, k in ranks.items():
        value, noise = np.sqrt(inside[rows, k - 1]), np.sqrt(inside_noise[rows, k - 1])
        yield Reading("sa_proj", rule, k, 0, value, np.sqrt(k / sided.d), noise, power=2)


def sa_phi(sided: Sided, *, seed: int) -> Iterator[Reading]:
    """|U_D^i' U_W^j|^2 / min(i, j) over a small grid.

    Seen from the base, the top directions of isotropic noise are a Haar frame, so the draw needs
    no decomposition: its first j rows are the cosines with the base's j directions.
    """
    count = len(sided.values)
    cosines = _cosines(sided)
    drawn = haar_frames(count, sided.d, max(i for i, _ in PHI_GRID), seed=seed)
    for i, j in PHI_GRID:
        if i > min(sided.change_rank, sided.d) or j > sided.rank:
            continue
        value, noise = (
            c[:, :j, :i].square().sum((1, 2)).numpy() / min(i, j) for c in (cosines, drawn)
        )
        chance = np.full(count, max(i, j) / sided.d)
        yield Reading("sa_phi", f"{i}_{j}", np.full(count, j), i, value, chance, noise)


def sa_cos(sided: Sided, *, seed: int) -> Iterator[Reading]:
    """Mean and largest of the best single cosines of the change's top directions."""
    count, rank = len(sided.values), sided.rank
    top = min(SA_COS_TOP, sided.change_rank)
    best = _cosines(sided)[:, :rank, :top].abs().amax(1)
    drawn = haar_frames(count, sided.d, top, seed=seed)[:, :rank].abs().amax(1)
    chances = {
        "sa_cos_mean": expected_best_cosine(rank, sided.d),
        "sa_cos_max": expected_largest_cosine(rank, sided.d, top),
    }
    reduced = {"sa_cos_mean": lambda c: c.mean(1), "sa_cos_max": lambda c: c.amax(1)}
    for name, chance in chances.items():
        value, noise = (reduced[name](c).numpy() for c in (best, drawn))
        everywhere = np.full(count, rank)
        yield Reading(name, f"top_{top}", everywhere, top, value, np.full(count, chance), noise)


def _cosines(sided: Sided) -> Float[Tensor, "component direction change_direction"]:
    return einsum(
        sided.directions, sided.strongest, "c d direction, c d change -> c direction change"
    )


def haar_frames(count: int, d: int, width: int, *, seed: int) -> Float[Tensor, "count d width"]:
    """Random orthonormal frames, uniform over all of them; at most ``d`` wide."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(count, d, min(width, d), generator=generator, dtype=torch.float64)
    return torch.linalg.qr(drawn).Q


@cache
def expected_best_cosine(rank: int, d: int) -> float:
    """E of the largest |cos| of a random unit vector with ``rank`` orthonormal ones.

    For a Gaussian vector g of length |g|, which is independent of its direction, this is
    E max_{j <= rank} |g_j| / E |g|; the first is the integral of 1 - erf(x / sqrt 2)^rank.
    """
    largest, _ = integrate.quad(
        lambda x: -np.expm1(rank * np.log(special.erf(x / np.sqrt(2)))) if x > 0 else 1.0,
        0,
        np.sqrt(2 * np.log(rank + 1)) + 8,
        limit=200,
    )
    return float(largest / (np.sqrt(2) * np.exp(lgamma((d + 1) / 2) - lgamma(d / 2))))


@cache
def expected_largest_cosine(rank: int, d: int, top: int) -> float:
    """The mean over draws of the largest |cos| between a Haar frame and ``rank`` directions."""
    return float(haar_frames(COS_DRAWS, d, top, seed=0)[:, :rank].abs().amax((1, 2)).mean())


def readings_of(sided: Sided, d_head: int, *, seed: int) -> list[Reading]:
    """All readings of a batch of components of one shape."""
    return [
        *sa_proj(sided, d_head, seed=seed),
        *sa_phi(sided, seed=seed + 1),
        *sa_cos(sided, seed=seed + 2),
    ]


def d_head_of(pair: Pair) -> int:
    """Width of a head, from the first W_O of the pair; 0 where no head is known."""
    everything = (component for block in pair.blocks() for component in block)
    first = next((c for c in everything if c.kind == "matrix" and c.part == "W_O"), None)
    if first is None or not pair.layout.n_heads:
        return 0
    return pair.read(first).base.shape[0] // pair.layout.n_heads


def readings_of_block(pair: Pair, spectra: Sequence[Spectra], d_head: int, *, seed: int) -> Table:
    """Rows of one block: its changed matrices, then the slices that its heads own.

    Args:
        pair: Base and tuned checkpoint.
        spectra: The block's changed matrices.
        d_head: Width of a head, one of the rules of k; 0 where no head is known.
        seed: Seed of the draws of noise; another one in every layer and part.
    """
    tables = [Table.of("readings", READINGS_SCHEMA, {})]
    for place, one in enumerate(spectra):
        layer = one.component.layer
        own = seed + 1000 * (0 if layer is None else layer + 1) + 10 * place
        whole = Sided.of_one(one)
        rows = readings_of(whole, d_head, seed=own)
        tables.append(_table(pair, [one.component], rows, whole))
        if one.part in HEAD_PARTS and d_head:
            tables.append(_head_table(pair, one, d_head, seed=own + 5))
    return concatenated("readings", tables, order="corrected")


def _head_table(pair: Pair, one: Spectra, d_head: int, *, seed: int) -> Table:
    """Rows of the changed slices of one attention matrix."""
    of_kv = one.part in KV_PARTS
    n_heads = pair.layout.n_kv_heads if of_kv else pair.layout.n_heads
    factor = factor_of_heads(one.weight, one.part, n_heads)
    changed = (energy(factor.delta) > 0) & (energy(factor.base) > 0)
    if not bool(changed.any()):
        return Table.of("readings", READINGS_SCHEMA, {})
    kind = "kv_head" if of_kv else "head"
    some = changed.nonzero().flatten()
    components = [Component(kind, one.component.layer, n, one.part) for n in some.tolist()]
    sided = Sided.of(factor.base[some], change_of_heads(factor.delta, some), one.part)
    return _table(pair, components, readings_of(sided, d_head, seed=seed), sided)


def _table(pair: Pair, components: list[Component], rows: Sequence[Reading], sided: Sided) -> Table:
    """One row a component and reading."""
    group, count = kv_index_of(pair).tolist(), len(components)
    own = {"kv_head": lambda i: i, "head": lambda i: group[i]}
    kv_index = [own[c.kind](c.index) if c.kind in own else None for c in components]
    once = key_columns(components, kv_index=kv_index)
    columns: dict[str, list[Any]] = {
        name: list(values) * len(rows) for name, values in once.items()
    }
    columns |= {
        name: [value] * count * len(rows)
        for name, value in (
            ("base", pair.base_name),
            ("tuned", pair.tuned_name),
            ("tied", False),
            ("side", sided.side),
            ("d", sided.d),
        )
    }
    per_row = {name: [] for name in ("reading", "rule", "k", "i", *NUMBERS)}
    for row in rows:
        values = {
            "reading": [row.reading] * count,
            "rule": [row.rule] * count,
            "k": row.k.tolist(),
            "i": [row.i or None] * count,
            "value": row.value.tolist(),
            "chance": row.chance.tolist(),
            "corrected": row.corrected(row.value).tolist(),
            "noise": row.noise.tolist(),
            "noise_corrected": row.corrected(row.noise).tolist(),
        }
        for name, cells in values.items():
            per_row[name] += cells
    return Table.of("readings", READINGS_SCHEMA, {**columns, **per_row}, order="corrected")


@one_thread()
def readings(pair: Pair, *, seed: int = 0) -> Table:
    """The table ``readings`` of a pair, a block at a time."""
    d_head = d_head_of(pair)
    tables = [
        readings_of_block(pair, spectra_of_block(pair, block, seed=seed), d_head, seed=seed)
        for block in pair.blocks()
        if block
    ]
    empty = Table.of("readings", READINGS_SCHEMA, {})
    return concatenated("readings", [empty, *tables], order="corrected")
