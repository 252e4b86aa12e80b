"""Weights for the parts of a tuning vector, from a table of attribution scores.

A part is multiplied by its score as a share of the largest score of its kind, and by zero where its
score points the other way: what helps most enters whole, what does harm stays out. Kinds are taken
apart because scores of a neuron, a head and a matrix are sums of different numbers of entries.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tvlens.attribution.series import whole_rows
from tvlens.components import DISJOINT_KINDS, Component
from tvlens.errors import CheckpointError, StudyError
from tvlens.tables import Table
from tvlens.weights.layout import Layout
from tvlens.weights.slices import Kept, cut_axis, cuts

Key = tuple[str, int | None, int | None, str | None]
"""Kind, layer, index and part; the part of heads and neurons is None: their scores sum over it."""
SHARES = "tvlens_shares.safetensors"
"""The file of a merged folder that holds the factors, so that it can be checked."""


@dataclass(frozen=True, eq=False)
class Share:
    """What one component is multiplied by.

    Attributes:
        axis: The axis whose entries have a factor each, None where there is one for all.
        factors: The factors.
    """

    axis: int | None
    factors: Float[Tensor, " entry"]


def score_shares(
    table: Table,
    layout: Layout,
    *,
    tuned: str = "",
    method: str = "weight_ig",
    kinds: Sequence[str] = DISJOINT_KINDS,
    better: Literal["higher", "lower"] = "higher",
) -> dict[Component, Share]:
    """A factor from 0 to 1 for each component or slice that has a score.

    Args:
        table: Rows of attribution; scores are averaged over prompts.
        layout: The model's components.
        tuned: Only the rows of this fine-tune, all by default.
        method: Only the rows of this method.
        kinds: Which kinds of rows give weights: whole components, or ``head``, ``kv_head`` and
            ``neuron`` for their slices. A component gets no factor where it has no row.
        better: Which way of the metric is good.

    Raises:
        StudyError: No row is left, or none of its scores points the right way.
    """
    scores = mean_scores(table, tuned=tuned, method=method, kinds=kinds)
    if better == "lower":
        scores = {key: -score for key, score in scores.items()}
    largest = dict.fromkeys(kinds, 0.0)
    for key, score in scores.items():
        largest[key[0]] = max(largest[key[0]], score)
    if not any(score > 0 for score in largest.values()):
        raise StudyError(
            f"the table {table.name!r} has no {method} score of {', '.join(kinds)} that makes the "
            f"metric {better}.",
            hint="Give another method, other kinds, or the other way of the metric.",
        )
    shares = {k: max(0.0, s / largest[k[0]]) for k, s in scores.items() if largest[k[0]] > 0}
    found = {c: _share(layout, c, shares) for c in layout.components()}
    return {component: share for component, share in found.items() if share is not None}


def mean_scores(table: Table, *, tuned: str, method: str, kinds: Sequence[str]) -> dict[Key, float]:
    """Mean score by part: the row over all prompts where there is one, as neurons have.

    Raises:
        StudyError: The rows are of several fine-tunes.
    """
    frame = whole_rows(table.to_frame())
    keep = (frame["method"] == method) & frame["kind"].isin(list(kinds))
    if tuned:
        keep &= frame["tuned"] == tuned
    if frame.loc[keep, "tuned"].nunique() > 1:
        raise StudyError(
            f"the table {table.name!r} holds several fine-tunes.", hint="Say which: tuned=NAME."
        )
    found: dict[Key, list[tuple[bool, float]]] = {}
    for row in frame[keep].to_dict("records"):
        found.setdefault(_key(row), []).append((_is_missing(row["prompt"]), float(row["score"])))
    return {key: _mean(rows) for key, rows in found.items()}


def _mean(rows: list[tuple[bool, float]]) -> float:
    over_all = [score for is_mean, score in rows if is_mean]
    scores = over_all or [score for _, score in rows]
    return sum(scores) / len(scores)


def _key(row: Mapping[Any, Any]) -> Key:
    layer, index = (None if _is_missing(row[n]) else int(row[n]) for n in ("layer", "index"))
    return row["kind"], layer, index, row["part"] if row["kind"] in DISJOINT_KINDS else None


def _is_missing(value: Any) -> bool:
    return bool(pd.isna(value))


def _share(layout: Layout, component: Component, shares: Mapping[Key, float]) -> Share | None:
    whole = shares.get((component.kind, component.layer, None, component.part))
    if whole is not None:
        return Share(None, torch.tensor([whole]))
    for cut in cuts(layout, component):
        keys = [(cut.kind, component.layer, index, None) for index in range(cut.count)]
        if any(key in shares for key in keys):
            each = torch.tensor([shares.get(key, 0.0) for key in keys])
            return Share(cut_axis(layout, component), each.repeat_interleave(cut.width))
    return None


def kept_shares(kept: Mapping[Component, Kept]) -> dict[Component, Share]:
    """A selection as factors: 1 for what is kept; what has no factor is left out."""
    return {
        component: Share(
            one.axis, torch.ones(1) if one.entries is None else one.entries.to(torch.float32)
        )
        for component, one in kept.items()
    }


def save_shares(folder: Path, shares: Sequence[Mapping[Component, Share] | None]) -> None:
    """Write the factors of each vector into a folder."""
    tensors, axes = {}, {}
    for number, own in enumerate(shares):
        for component, share in (own or {}).items():
            name = f"{number}.{component}"
            tensors[name], axes[name] = share.factors.float().contiguous(), share.axis
    weighted = [own is not None for own in shares]
    about = {"axes": json.dumps(axes), "weighted": json.dumps(weighted)}
    save_file(tensors, folder / SHARES, about)


def load_shares(folder: Path, layouts: Sequence[Layout]) -> list[Mapping[Component, Share] | None]:
    """The factors of each vector, as ``save_shares`` wrote them.

    Raises:
        CheckpointError: The file is missing or does not fit the layouts.
    """
    try:
        with safe_open(folder / SHARES, framework="pt") as file:
            metadata = file.metadata()
            axes, weighted = json.loads(metadata["axes"]), json.loads(metadata["weighted"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        return [
            {
                component: Share(axes[name], tensors[name])
                for component in layout.components()
                if (name := f"{number}.{component}") in tensors
            }
            if weighted[number]
            else None
            for number, layout in enumerate(layouts)
        ]
    except (OSError, SafetensorError, KeyError, IndexError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder / SHARES} cannot be read: {error}.", hint="Copy the folder again."
        ) from error
