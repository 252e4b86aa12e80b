"""The table ``overlap``: fine-tunes of one base against each other, component by component.

For two tuning vectors A and B of one component:

    cosine     <A, B> / (|A| |B|); ``inner``, ``norm_a`` and ``norm_b`` add up over components
    overlap    |Q_A' Q_B|^2 / min(k, l), where Q_A holds the k (``rank_a``) directions of A above
               its noise edge on the side that is the residual stream, at most SPIKES_KEPT, and
               Q_B the l (``rank_b``) of B
    principal_cosines   cosines of the principal angles, singular values of Q_A' Q_B

Neither means anything without what unrelated vectors show and what two runs of one recipe show:

    floor      random vectors: cosine 0 +- 1 / sqrt(entries); random subspaces of d dimensions:
               overlap max(k, l) / d, with the exact deviation. Both are exact for isotropic
               vectors; two unrelated fine-tunes share more, since all updates prefer some
               directions, so a control on other text is the stronger floor
    ceiling    the same measure between A and a replicate of A (same data and recipe, other seed),
               or the geometric mean of that and B's where both have one; null where neither has.
               It cannot be had from one run: halves of a finished tuning vector do not exist

``shared`` counts the principal cosines above the value that the largest one of random subspaces
exceeds with probability SHARED_P: exact where min(k, l) <= EXACT_RANK, else by Johnstone's
approximation [1], which asks a little too much. Shared directions are real overlap, not
necessarily large: ``overlap`` says how large.

[1] Johnstone 2008, Annals of Statistics 36, 2638: the largest root of a double Wishart setting.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from einops import einsum
from jaxtyping import Float
from scipy import optimize, special, stats
from torch import Tensor

from tvlens.components import KNOWN_PARTS, Component, key_columns
from tvlens.errors import IncomparableModelsError, StudyError
from tvlens.tables import KEY_FIELDS, Table, keyed_schema
from tvlens.threads import one_thread

from .evidence import residual_side
from .nulls import noise_edge
from .reading import Pair, Weight
from .spectra import is_resolved, onto_residual, triplets_of

SPIKES_KEPT = 64
"""Directions above the edge that a subspace holds at most; ``spikes_a`` counts all of them."""
COSINES_KEPT = 8
"""Principal cosines in the table, largest first."""
SHARED_P = 1e-3
TRACY_WIDOM_999 = 3.2724
"""99.9 % quantile of the Tracy-Widom law for real matrices."""
EXACT_RANK = 8
"""Beyond, the Pfaffian of nearly equal rows loses its digits."""
NODES = 80
"""Gauss-Legendre nodes of the Pfaffian's integrals: 160 give the same bounds to 2e-4."""

OVERLAP_SCHEMA = keyed_schema(
    ("other", pa.string()),
    ("relation", pa.string()),
    *(
        (name, pa.float64())
        for name in (
            *("norm_a", "norm_b", "inner", "cosine", "cosine_floor_sd", "cosine_ceiling"),
            *("overlap", "overlap_floor", "overlap_floor_sd", "overlap_ceiling"),
        )
    ),
    ("principal_cosines", pa.list_(pa.float64())),
    ("shared_bound", pa.float64()),
    *((name, pa.int32()) for name in ("d", "rank_a", "rank_b", "spikes_a", "spikes_b")),
    *((name, pa.int32()) for name in ("shared", "specific_a", "specific_b")),
)

OWN_COLUMNS = ("tuned", *OVERLAP_SCHEMA.names[len(KEY_FIELDS) :])


@dataclass(frozen=True, eq=False)
class Change:
    """One fine-tune's change of one component.

    Attributes:
        delta: The tuning vector, flat where it is no matrix of known orientation.
        span: Its directions above the noise edge on the residual side; None where there is no
            such side, no columns where nothing is above the edge.
        spikes: How many are above the edge, kept or not.
    """

    delta: Float[Tensor, "..."]
    span: Float[Tensor, "d_model spike"] | None
    spikes: int


@dataclass(frozen=True, eq=False)
class Subspaces:
    """Two subspaces against each other.

    Attributes:
        overlap: |Q_A'Q_B|^2 / min(k, l).
        floor: Its mean for random subspaces.
        floor_sd: Its deviation for random subspaces.
        cosines: Of the principal angles, largest first.
        bound: What the largest cosine of random subspaces exceeds with probability ``SHARED_P``.
    """

    overlap: float
    floor: float
    floor_sd: float
    cosines: Float[np.ndarray, " angle"]
    bound: float

    @property
    def shared(self) -> int:
        """Principal cosines above the bound."""
        return int((self.cosines > self.bound).sum())


def change_of(weight: Weight, component: Component, *, seed: int) -> Change:
    """The change of one component with its directions above the noise edge."""
    delta, part = weight.dense_delta(), component.part or ""
    if component.kind != "matrix" or part not in KNOWN_PARTS:
        return Change(delta, None, 0)
    d_model = delta.shape[0 if residual_side(part) == "read" else 1]
    if not is_resolved(delta, weight.floor):
        return Change(delta, torch.zeros(d_model, 0, dtype=torch.float64), 0)
    basis = triplets_of(delta)
    spikes = int((basis.values > noise_edge(delta, seed=seed)).sum())
    return Change(delta, onto_residual(basis, part)[:, : min(spikes, SPIKES_KEPT)], spikes)


def inner_and_norms(a: Float[Tensor, "..."], b: Float[Tensor, "..."]) -> tuple[float, float, float]:
    """<A, B>, |A| and |B|, summed in float64 a slab at a time."""
    sums = [0.0, 0.0, 0.0]
    for some_a, some_b in zip(a.flatten().split(2**22), b.flatten().split(2**22), strict=True):
        some_a, some_b = some_a.double(), some_b.double()
        products = (some_a @ some_b, some_a @ some_a, some_b @ some_b)
        sums = [total + float(more) for total, more in zip(sums, products, strict=True)]
    return sums[0], sums[1] ** 0.5, sums[2] ** 0.5


def subspaces(a: Float[Tensor, "d a"], b: Float[Tensor, "d b"]) -> Subspaces | None:
    """Overlap and principal angles of two orthonormal frames; None where one of them is empty."""
    d, ranks = len(a), (a.shape[1], b.shape[1])
    if not all(ranks):
        return None
    cosines = torch.linalg.svdvals(einsum(a, b, "d a, d b -> a b")).clamp(max=1).numpy()
    overlap = float((cosines**2).sum()) / min(ranks)
    return Subspaces(overlap, *random_overlap(*ranks, d), cosines, largest_cosine_bound(*ranks, d))


def random_overlap(rank_a: int, rank_b: int, d: int) -> tuple[float, float]:
    """Exact mean and deviation of |Q_A'Q_B|^2 / min(k, l) for random subspaces of d dimensions."""
    free = rank_a * (d - rank_a) * rank_b * (d - rank_b)
    variance = 2 * free / (d**2 * (d - 1) * (d + 2)) if d > 1 else 0.0
    least = min(rank_a, rank_b)
    return rank_a * rank_b / d / least, variance**0.5 / least


@cache
def largest_cosine_bound(rank_a: int, rank_b: int, d: int) -> float:
    """What the largest principal cosine of random subspaces exceeds with probability SHARED_P."""
    least, most = min(rank_a, rank_b), max(rank_a, rank_b)
    if least + most >= d:  # they must meet, or nearly: a cosine of 1 is no finding
        return 1.0
    if least == 1:
        return float(np.sqrt(stats.beta.isf(SHARED_P, most / 2, (d - most) / 2)))
    rough = _johnstone_bound(least, most, d)
    if least > EXACT_RANK:
        return rough**0.5
    # no root lies beyond, and the nodes lie close together
    end = float(stats.beta.isf(1e-15, (most + least) / 2, (d - most - least + 1) / 2))
    whole = _log_pfaffian(end, least, most, d)

    def excess(x: float) -> float:
        return float(np.exp(_log_pfaffian(x, least, most, d) - whole)) - (1 - SHARED_P)

    root = optimize.root_scalar(excess, bracket=(rough / 2, end), rtol=1e-6)
    return float(root.root) ** 0.5


def _johnstone_bound(least: int, most: int, d: int) -> float:
    """The 99.9 % quantile of the largest squared cosine, 1 to 5 % too large in the cosine [1]."""
    gamma, phi = (2 * np.arcsin(np.sqrt((rank - 0.5) / (d - 1))) for rank in (least, most))
    centre = 2 * np.log(np.tan((phi + gamma) / 2))
    scale = 16 / (d - 1) ** 2 / (np.sin(phi + gamma) ** 2 * np.sin(phi) * np.sin(gamma))
    return float(special.expit(centre + np.cbrt(scale) * TRACY_WIDOM_999))


def _log_pfaffian(x: float, least: int, most: int, d: int) -> float:
    """Logarithm of P(largest squared cosine <= x), up to a constant.

    The squared cosines t have density prod t^m (1 - t)^n prod |t_i - t_j|, m = (most - least - 1)
    / 2, n = (d - most - least - 1) / 2. Its integral over [0, x]^least is by de Bruijn's formula
    the Pfaffian of a_ij = int (F_i dF_j - F_j dF_i), F_i the incomplete beta function of
    (m + i, n + 1), bordered by F_i(x) where ``least`` is odd.
    """
    nodes, weights = np.polynomial.legendre.leggauss(NODES)
    u = (nodes + 1) / 2
    t, dt = x * u**2, x * u * weights  # t = x u^2 takes the root at 0 away
    first = (most - least - 1) / 2 + np.arange(1, least + 1)[:, None]
    second = (d - most - least + 1) / 2
    density = np.exp(
        (first - 1) * np.log(t) + (second - 1) * np.log1p(-t) - special.betaln(first, second)
    )
    half = (special.betainc(first, second, t) * dt) @ density.T
    skew = half - half.T
    if least % 2:
        border = special.betainc(first, second, x)
        skew = np.block([[skew, border], [-border.T, np.zeros((1, 1))]])
    return float(np.linalg.slogdet(skew)[1]) / 2


def _changes(pairs: Sequence[Pair], component: Component, *, seed: int) -> dict[str, Change]:
    """The component's change in every fine-tune; none where their embeddings hold other rows.

    Raises:
        IncomparableModelsError: The fine-tunes have other bases.
    """
    found: dict[str, Change] = {}
    base: Tensor | None = None
    for pair in pairs:
        weight = pair.read(component)
        base = weight.base if base is None else base
        same = weight.base.shape == base.shape and torch.equal(weight.base, base)
        if not same and component.kind == "embedding":
            return {}
        if not same:
            raise IncomparableModelsError(
                f"{component} of the base of {pair.tuned_name} is not that of "
                f"{pairs[0].tuned_name}: vectors of different bases have no common origin.",
                hint="Compare fine-tunes of one base.",
            )
        found[pair.tuned_name] = change_of(weight, component, seed=seed)
    return found


def _measures(a: Change, b: Change) -> dict[str, Any]:
    """All that is measured between two changes of one component."""
    inner, norm_a, norm_b = inner_and_norms(a.delta, b.delta)
    known = norm_a > 0 and norm_b > 0
    row: dict[str, Any] = {
        "norm_a": norm_a,
        "norm_b": norm_b,
        "inner": inner,
        "cosine": inner / (norm_a * norm_b) if known else None,
        "cosine_floor_sd": a.delta.numel() ** -0.5,
        "spikes_a": a.spikes,
        "spikes_b": b.spikes,
    }
    if a.span is None or b.span is None:
        return row
    row |= {"d": len(a.span), "rank_a": a.span.shape[1], "rank_b": b.span.shape[1]}
    found = subspaces(a.span, b.span)
    if found is None:
        return row
    return row | {
        "overlap": found.overlap,
        "overlap_floor": found.floor,
        "overlap_floor_sd": found.floor_sd,
        "principal_cosines": found.cosines[:COSINES_KEPT].tolist(),
        "shared_bound": found.bound,
        "shared": found.shared,
        "specific_a": row["rank_a"] - found.shared,
        "specific_b": row["rank_b"] - found.shared,
    }


def _ceilings(
    names: tuple[str, str], changes: Mapping[str, Change], replicates: Mapping[str, str]
) -> dict[str, float | None]:
    """Cosine and overlap of each fine-tune with its replicate, geometric mean over the two."""
    a, b = names
    if replicates.get(a) == b:
        return {}
    runs = [(name, replicates[name]) for name in names if name in replicates]
    rows = [_measures(changes[name], changes[other]) for name, other in runs]
    found: dict[str, float | None] = {}
    for measure in ("cosine", "overlap"):
        known = [row[measure] for row in rows if row.get(measure) is not None]
        usable = len(known) == len(runs) > 0 and min(known) > 0
        found[f"{measure}_ceiling"] = float(np.prod(known) ** (1 / len(known))) if usable else None
    return found


def _relation(names: tuple[str, str], replicates: Mapping[str, str], controls: set[str]) -> str:
    if replicates.get(names[0]) == names[1]:
        return "replicate"
    return "control" if controls & set(names) else "fine-tune"


@one_thread()
def overlap(
    pairs: Sequence[Pair],
    *,
    replicates: Mapping[str, str] | None = None,
    controls: Sequence[str] = (),
    seed: int = 0,
) -> Table:
    """Every two fine-tunes of one base against each other, a component at a time.

    Args:
        pairs: The base with each fine-tune, each under a name of its own.
        replicates: Name of a fine-tune to the name of another run of its recipe among ``pairs``;
            it holds both ways.
        controls: Names of the control fine-tunes among ``pairs``.
        seed: Seed of the sign-flip draws, as given to ``classify``.

    Raises:
        StudyError: Two pairs have one name, or a replicate is not among them.
        IncomparableModelsError: The fine-tunes have other bases.
    """
    twins = _twins([pair.tuned_name for pair in pairs], replicates or {})
    rows: list[dict[str, Any]] = []
    components: list[Component] = []
    for component in (c for block in pairs[0].blocks() for c in block):
        own = seed + 1000 * (0 if component.layer is None else component.layer + 1)
        changes = _changes(pairs, component, seed=own)
        for names in itertools.combinations(changes, 2):
            components.append(component)
            relation = _relation(names, twins, set(controls))
            named = {"tuned": names[0], "other": names[1], "relation": relation}
            measured = _measures(*(changes[name] for name in names))
            rows.append({**named, **measured, **_ceilings(names, changes, twins)})
    columns = {name: [row.get(name) for row in rows] for name in OWN_COLUMNS}
    base = {"base": [pairs[0].base_name] * len(rows), "tied": [False] * len(rows)}
    keyed = {**key_columns(components), **base, **columns}
    return Table.of("overlap", OVERLAP_SCHEMA, keyed, order="cosine")


def _twins(names: list[str], replicates: Mapping[str, str]) -> dict[str, str]:
    """Replicates both ways."""
    if len(set(names)) < len(names):
        raise StudyError(f"two fine-tunes are called the same: {names}.")
    twins = dict(replicates) | {other: name for name, other in replicates.items()}
    if missing := sorted(set(twins) - set(names)):
        raise StudyError(
            f"the replicate {missing[0]!r} is not among the fine-tunes: {names}.",
            hint="Name both runs of a recipe as fine-tunes of the study.",
        )
    return twins
