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
from jaxtyping import Float, Float64
from scipy import optimize, special, stats
from torch import Tensor

from tvlens.components import KNOWN_PARTS, Component, key_columns
from tvlens.errors import IncomparableModelsError, StudyError
from tvlens.tables import KEY_FIELDS, Table, keyed_schema
from tvlens.threads import one_thread
from tvlens.weights.delta import inner_product

from .evidence import residual_side
from .reading import Pair, Slice, Weight, delta_of, slice_of
from .spectra import is_resolved, layer_seed, onto_residual, spikes_of

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
class Span:
    """The directions that one fine-tune gives one matrix.

    Attributes:
        frame: Those above the noise edge on the residual side, no columns where none is.
        spikes: How many are above the edge, kept or not.
    """

    frame: Float64[Tensor, "d_model spike"]
    spikes: int


@dataclass(frozen=True, eq=False)
class Together:
    """One component in all fine-tunes.

    Attributes:
        names: The fine-tunes.
        inner: Inner products of their changes.
        entries: Entries of the component.
        spans: Of each fine-tune; none where it is no matrix of known orientation.
    """

    names: tuple[str, ...]
    inner: Float64[np.ndarray, "tuned tuned"]
    entries: int
    spans: Sequence[Span] = ()


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


def span_of(weight: Slice, component: Component, *, seed: int) -> Span:
    """The directions of one matrix's change above its noise edge."""
    part = component.part or ""
    if not is_resolved(weight):
        d_model = weight.base.shape[0 if residual_side(part) == "read" else 1]
        return Span(torch.zeros(d_model, 0, dtype=torch.float64), 0)
    spikes = spikes_of(weight, seed=seed)
    return Span(onto_residual(spikes, part)[:, :SPIKES_KEPT], spikes.above)


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


def together(pairs: Sequence[Pair], component: Component, *, seed: int) -> Together | None:
    """A component in every fine-tune, a slab at a time; None where embeddings hold other rows.

    Raises:
        IncomparableModelsError: The fine-tunes have other bases.
    """
    names = tuple(pair.tuned_name for pair in pairs)
    inner, entries, weights = np.zeros((len(pairs), len(pairs))), 0, []
    for slabs in itertools.zip_longest(*(pair.slabs(component) for pair in pairs)):
        if any(slab is None for slab in slabs) or not _share_a_base(slabs):
            if component.kind == "embedding":
                return None
            raise IncomparableModelsError(
                f"{component} is not the same in the bases of {', '.join(names)}: vectors of "
                "different bases have no common origin.",
                hint="Compare fine-tunes of one base.",
            )
        weights = [slice_of(slab) for slab in slabs]
        inner += _inner_products(weights)
        entries += weights[0].base.numel()
    if component.kind != "matrix" or component.part not in KNOWN_PARTS:
        return Together(names, inner, entries)
    return Together(names, inner, entries, [span_of(w, component, seed=seed) for w in weights])


def _share_a_base(weights: Sequence[Weight]) -> bool:
    first, *others = (weight.base for weight in weights)
    return all(first.shape == base.shape and torch.equal(first, base) for base in others)


def _inner_products(weights: Sequence[Slice]) -> Float64[np.ndarray, "tuned tuned"]:
    deltas = [delta_of(weight.change) for weight in weights]
    return np.array([[inner_product(one, other) for other in deltas] for one in deltas])


def _measures(found: Together, names: tuple[str, str]) -> dict[str, Any]:
    """All that is measured between two fine-tunes of one component."""
    i, j = (found.names.index(name) for name in names)
    inner, norm_a, norm_b = found.inner[i, j], found.inner[i, i] ** 0.5, found.inner[j, j] ** 0.5
    known = norm_a > 0 and norm_b > 0
    row: dict[str, Any] = {
        "norm_a": norm_a,
        "norm_b": norm_b,
        "inner": inner,
        "cosine": inner / (norm_a * norm_b) if known else None,
        "cosine_floor_sd": found.entries**-0.5,
    }
    return (
        row | _span_measures(found.spans[i], found.spans[j])
        if found.spans
        else {**row, "spikes_a": 0, "spikes_b": 0}
    )


def _span_measures(a: Span, b: Span) -> dict[str, Any]:
    row: dict[str, Any] = {
        "d": len(a.frame),
        **{"rank_a": a.frame.shape[1], "rank_b": b.frame.shape[1]},
        **{"spikes_a": a.spikes, "spikes_b": b.spikes},
    }
    found = subspaces(a.frame, b.frame)
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
    names: tuple[str, str], found: Together, replicates: Mapping[str, str]
) -> dict[str, float | None]:
    """Cosine and overlap of each fine-tune with its replicate, geometric mean over the two."""
    a, b = names
    if replicates.get(a) == b:
        return {}
    runs = [(name, replicates[name]) for name in names if name in replicates]
    rows = [_measures(found, run) for run in runs]
    ceilings: dict[str, float | None] = {}
    for measure in ("cosine", "overlap"):
        known = [row[measure] for row in rows if row.get(measure) is not None]
        usable = len(known) == len(runs) > 0 and min(known) > 0
        ceiling = float(np.prod(known) ** (1 / len(known))) if usable else None
        ceilings[f"{measure}_ceiling"] = ceiling
    return ceilings


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
        found = together(pairs, component, seed=layer_seed(component, seed))
        if found is None:
            continue
        for names in itertools.combinations(found.names, 2):
            components.append(component)
            relation = _relation(names, twins, set(controls))
            named = {"tuned": names[0], "other": names[1], "relation": relation}
            rows.append({**named, **_measures(found, names), **_ceilings(names, found, twins)})
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
