"""Weights beside effects: what the size of a change foretells, and where an effect arises.

Three questions, each a join of tables on the key (a fourth, whether MLP or attention writes newer
directions where it matters, is ``contrasts`` weighted by ``effect_of_layers``):

- *Does size predict effect?* Spearman's rho between the length of a site's tuning vector and the
  mean size of its score, kind by kind.
- *Source or carrier?* The weight score of a site says what is higher because it was written
  *here*; the score of its activation across the models says what of the difference *passes* here,
  wherever it was written. Written and passing: ``both``; written alone: ``source``; passing alone:
  ``carrier``; else ``neither``. A score counts if its 95 % interval over prompts (Student's t)
  excludes 0 and its mean is at least one per cent of the metric's mean change.
- *Is it the same circuit?* Rank agreement of the scores of clean into corrupt activations, and of
  edges, in the base and in the tuned model, and the components where they differ most. Of neurons
  and edges those are compared that have rows per prompt in both.

Ranks are compared with a bootstrap over components; what has fewer than three is null.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import pandas as pd
import pyarrow as pa
from jaxtyping import Float
from scipy import stats

from tvlens.components import DISJOINT_KINDS, Component, key_columns
from tvlens.tables import Table, keyed_schema

from .series import group_of, keys, rank_agreement, whole_rows

Role = Literal["source", "carrier", "both", "neither"]
COUNTS = 0.01
"""Share of the metric's mean change below which a site's score is not worth a role."""
_CONFIDENCE = 0.95
_PRODUCTS = ("OV", "QK")
_OUTPUTS = ("z", "post")
"""What a head and a neuron give on: the activation that stands for the whole site."""
_WITHIN = ("activation_first_order", "edge_first_order")
"""Methods whose scores within one model are compared between the two."""
_SITES = ("head", "kv_head", "neuron")

Scores = dict[Component, Float[np.ndarray, " prompt"]]
Interval = tuple[float, float, float]
"""A mean and the two ends of its interval."""

JOINS_SCHEMA = pa.schema(
    [
        ("question", pa.string()),
        ("measure", pa.string()),
        ("kind", pa.string()),
        ("part", pa.string()),
        ("base", pa.string()),
        ("tuned", pa.string()),
        ("n", pa.int32()),
        ("spearman", pa.float64()),
        ("ci_low", pa.float64()),
        ("ci_high", pa.float64()),
    ]
)
ROLES_SCHEMA = keyed_schema(
    ("metric", pa.string()),
    ("unit", pa.string()),
    ("written", pa.float64()),
    ("written_low", pa.float64()),
    ("written_high", pa.float64()),
    ("passing", pa.float64()),
    ("passing_low", pa.float64()),
    ("passing_high", pa.float64()),
    ("n", pa.int32()),
    ("role", pa.string()),
    ("role_exact", pa.string()),
)
CIRCUITS_SCHEMA = keyed_schema(
    ("metric", pa.string()),
    ("unit", pa.string()),
    ("score_base", pa.float64()),
    ("score_tuned", pa.float64()),
    ("difference", pa.float64()),
    ("ci_low", pa.float64()),
    ("ci_high", pa.float64()),
    ("n", pa.int32()),
)


def size_and_effect(weights: Table, attribution: Table, *, seed: int = 0) -> Table:
    """Does the length of a site's tuning vector predict the size of its integrated score?

    Args:
        weights: Rows of the weights table of one fine-tune.
        attribution: Its attribution rows, ``weight_ig`` among them.
        seed: Of the bootstrap.
    """
    sizes = _site_sizes(weights.to_frame())
    effects = _mean_effects(attribution.where(method="weight_ig").to_frame())
    joined = sizes.join(effects, how="inner").reset_index()
    rows = []
    for kind, group in joined.groupby("kind", sort=False):
        for measure in ("delta_norm", "relative_delta"):
            known = group.dropna(subset=[measure, "effect"])
            found = rank_agreement(known[measure], known["effect"], seed=seed)
            rows.append(("size_predicts_effect", measure, kind, None, len(known), *found))
    return _joins_table(rows, attribution)


def _site_sizes(frame: pd.DataFrame) -> pd.DataFrame:
    """Length and relative length of every scored thing: a site's parts together, else a tensor."""
    frame = frame[~frame["part"].isin(_PRODUCTS)]
    whole = frame["kind"].isin(_SITES)
    frame = frame.assign(scored=frame["site"].where(whole, frame["component"]))
    squares = frame.assign(delta=frame["delta_norm"] ** 2, base=frame["base_norm"] ** 2)
    total = squares.groupby(["kind", "scored"], sort=False)[["delta", "base"]].sum()
    length = np.sqrt(total["delta"])
    relative = np.sqrt(total["delta"] / total["base"].where(total["base"] > 0))
    return pd.DataFrame({"delta_norm": length, "relative_delta": relative})


def _mean_effects(rows: pd.DataFrame) -> pd.DataFrame:
    """|mean score over prompts| of every component; neurons have theirs in one row."""
    rows = whole_rows(rows)
    rows = rows[rows["prompt"].isna() == (rows["kind"] == "neuron")]
    means = rows.groupby(["kind", "component"], sort=False)["score"].mean().abs()
    return means.rename_axis(["kind", "scored"]).to_frame("effect")


def effect_of_layers(attribution: Table, parts: Sequence[str]) -> dict[int, float]:
    """What the metric owes to some matrices of each layer: mean |weight_ig| over prompts and parts.

    Sizes are taken before the mean, so a layer whose effects cancel over prompts counts as well.

    Args:
        attribution: Rows of one fine-tune.
        parts: Parts of the matrices, such as ``W_O``.
    """
    rows = whole_rows(attribution.where(method="weight_ig", kind="matrix").to_frame())
    rows = rows[rows["part"].isin(parts) & rows["prompt"].notna()]
    means = rows["score"].abs().groupby(rows["layer"]).mean()
    return {int(layer): float(mean) for layer, mean in means.items()}  # type: ignore[arg-type]


def roles_table(attribution: Table) -> Table:
    """Source or carrier: every head and neuron with rows per prompt in both spaces.

    ``role`` is by the estimates (``weight_ig``; ``cross_model_first_order`` into the base),
    ``role_exact`` by exact patching of the same site, null where it was not in the sample.
    """
    frame = whole_rows(attribution.to_frame())
    frame = frame[frame["prompt"].notna() & frame["kind"].isin(("head", "neuron"))]
    change = _mean_change(attribution)
    written, passing = (
        _by_site(frame, method) for method in ("weight_ig", "cross_model_first_order")
    )
    exact = [_by_site(frame, method) for method in ("exact_weight_path", "exact_activation")]
    sites = [site for site in written if site in passing]
    estimates = [[_interval(scores[site]) for site in sites] for scores in (written, passing)]
    columns: dict[str, Sequence[object]] = {
        **key_columns(sites),
        **_constants(frame, len(sites)),
        "n": [int(np.isfinite(written[site]).sum()) for site in sites],
        "role": [role(here, through, change) for here, through in zip(*estimates, strict=True)],
        "role_exact": [_exact_role(exact, site, change) for site in sites],
    }
    for name, found in zip(("written", "passing"), estimates, strict=True):
        for place, end in enumerate(("", "_low", "_high")):
            columns[name + end] = [interval[place] for interval in found]
    return Table.of("roles", ROLES_SCHEMA, columns, order="written")


def role(written: Interval, passing: Interval, change: float) -> Role:
    """The role of a site whose scores have these means and intervals."""
    here, through = (
        low * high > 0 and abs(mean) >= COUNTS * change for mean, low, high in (written, passing)
    )
    names: dict[tuple[bool, bool], Role] = {
        (True, True): "both",
        (True, False): "source",
        (False, True): "carrier",
    }
    return names.get((here, through), "neither")


def circuits_table(attribution: Table) -> Table | None:
    """Scores of clean into corrupt in the base and in the tuned model; None without both."""
    frame = attribution.to_frame()
    asked = frame["method"].isin(_WITHIN) & frame["prompt"].notna()
    frame = frame[asked & (frame["direction"] == "clean_into_corrupt")]
    base, tuned = (_scores(frame[frame["at"] == end], whole=False) for end in ("base", "tuned"))
    components = [c for c in tuned if c in base]
    if not components:
        return None
    differences = [_interval(tuned[c] - base[c]) for c in components]
    columns: dict[str, Sequence[object]] = {
        **key_columns(components),
        **_constants(frame, len(components)),
        "score_base": [float(np.nanmean(base[c])) for c in components],
        "score_tuned": [float(np.nanmean(tuned[c])) for c in components],
        "difference": [mean for mean, _, _ in differences],
        "ci_low": [low for _, low, _ in differences],
        "ci_high": [high for _, _, high in differences],
        "n": [int(np.isfinite(base[c]).sum()) for c in components],
    }
    return Table.of("circuits", CIRCUITS_SCHEMA, columns, order="difference")


def circuit_agreement(circuits: Table, *, seed: int = 0) -> Table:
    """Rank agreement of the two circuits on signed mean scores.

    By kind; activations of heads and neurons part by part, since an output is not ranked among
    queries.
    """
    frame, rows = circuits.to_frame(), []
    groups = pd.Series(list(map(group_of, keys(frame))), index=frame.index, dtype=object)
    for (kind, part), group in frame.groupby(groups, sort=False):
        found = rank_agreement(group["score_base"], group["score_tuned"], seed=seed)
        method = _WITHIN[kind == "edge"]
        rows.append(("same_circuit", method, kind, part, len(group), *found))
    return _joins_table(rows, circuits)


def _joins_table(rows: Sequence[tuple], source: Table) -> Table:
    names = source.data.slice(0, 1).to_pylist()
    base, tuned = (names[0]["base"], names[0]["tuned"]) if names else ("", "")
    columns = {
        "question": [r[0] for r in rows],
        "measure": [r[1] for r in rows],
        "kind": [r[2] for r in rows],
        "part": [r[3] for r in rows],
        "base": [base] * len(rows),
        "tuned": [tuned] * len(rows),
        "n": [r[4] for r in rows],
        "spearman": [r[5] for r in rows],
        "ci_low": [r[6] for r in rows],
        "ci_high": [r[7] for r in rows],
    }
    return Table.of("joins", JOINS_SCHEMA, columns)


def _mean_change(attribution: Table) -> float:
    """Mean size of the metric's change over prompts: what the disjoint kinds sum to."""
    frame = whole_rows(attribution.where(method="weight_ig").to_frame())
    frame = frame[frame["prompt"].notna() & frame["kind"].isin(DISJOINT_KINDS)]
    gaps = frame.groupby("prompt")["gap"].first().fillna(0.0)
    return float((frame.groupby("prompt")["score"].sum() + gaps).abs().mean())


def _by_site(frame: pd.DataFrame, method: str) -> Scores:
    """Scores of one method by site; across models: the tuned activation into the base."""
    rows = frame[(frame["method"] == method) & (frame["direction"] == "tuned_into_base")]
    rows = rows[rows["part"].isna() | rows["part"].isin(_OUTPUTS)]
    return _scores(rows, whole=True)


def _scores(rows: pd.DataFrame, *, whole: bool) -> Scores:
    """Scores over prompts, NaN where a prompt has none; ``whole``: by site, its part left out."""
    if rows.empty:
        return {}
    named = [component._replace(part=None) if whole else component for component in keys(rows)]
    prompts = {prompt: place for place, prompt in enumerate(sorted(rows["prompt"].unique()))}
    found: Scores = {}
    for component, prompt, score in zip(named, rows["prompt"], rows["score"], strict=True):
        found.setdefault(component, np.full(len(prompts), np.nan))[prompts[prompt]] = score
    return found


def _interval(scores: Float[np.ndarray, " prompt"]) -> Interval:
    """Mean and Student's t interval; the whole line where one prompt cannot tell."""
    known = scores[np.isfinite(scores)]
    mean = float(known.mean())
    if len(known) < 2:
        return mean, -np.inf, np.inf
    error = float(known.std(ddof=1)) / np.sqrt(len(known))
    reach = float(stats.t.ppf((1 + _CONFIDENCE) / 2, len(known) - 1)) * error
    return mean, mean - reach, mean + reach


def _exact_role(exact: Sequence[Scores], site: Component, change: float) -> Role | None:
    if any(site not in scores for scores in exact):
        return None
    written, passing = (_interval(scores[site]) for scores in exact)
    return role(written, passing, change)


def _constants(frame: pd.DataFrame, count: int) -> dict[str, Sequence[object]]:
    names = ("base", "tuned", "metric", "unit")
    first = {name: frame[name].iloc[0] if len(frame) else "" for name in names}
    return {**{name: [first[name]] * count for name in names}, "tied": [False] * count}
