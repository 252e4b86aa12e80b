"""A lineage base -> parent -> tuned: how the whole change divides into its two steps.

With first = parent - base, second = tuned - parent and whole = first + second = tuned - base,

    cosine_steps = <first, second> / (|first| |second|)
    share_first  = <first, whole> / |whole|^2,  share_second likewise;  the two sum to 1

over the entries of one tensor, of all tensors of a part, of a kind, or of the model. A negative
share means that the step leads away from where the whole ends. Inner products are float64.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from tvlens.components import Component
from tvlens.errors import IncomparableModelsError
from tvlens.tables import Table

from .lineage import CORNER
from .pair import VOCABULARY_PARTS, Pair

LINEAGE_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("base", "parent", "tuned")),
        *((name, pa.string()) for name in ("level", "component", "kind", "part")),
        ("layer", pa.int32()),
        ("tensors", pa.int32()),
        *((name, pa.float64()) for name in ("norm_first", "norm_second", "norm_whole")),
        *((name, pa.float64()) for name in ("cosine_steps", "share_first", "share_second")),
    ]
)
"""``level`` is component, part, kind or model: what a row sums over."""


class Products(NamedTuple):
    """Inner products of the two steps with themselves and each other."""

    first: float
    second: float
    both: float

    @property
    def whole(self) -> float:
        """|first + second|^2."""
        return max(0.0, self.first + self.second + 2 * self.both)

    def columns(self) -> dict[str, float | None]:
        """The measures of the table; null where a step, or the whole, is zero."""
        lengths = math.sqrt(self.first * self.second)
        whole = self.whole
        return {
            "norm_first": math.sqrt(self.first),
            "norm_second": math.sqrt(self.second),
            "norm_whole": math.sqrt(whole),
            "cosine_steps": self.both / lengths if lengths else None,
            "share_first": (self.first + self.both) / whole if whole else None,
            "share_second": (self.second + self.both) / whole if whole else None,
        }


def lineage_table(first: Pair, second: Pair) -> Table:
    """Lengths, cosine and shares of the steps ``first`` (base -> parent) and ``second``.

    Embedding rows count where all three models have the token. One tensor is in memory at a time.

    Raises:
        IncomparableModelsError: The second pair does not start where the first one ends.
    """
    if first.tuned.folder.resolve() != second.base.folder.resolve():
        raise IncomparableModelsError(
            f"the step {first.base_name} -> {first.tuned_name} does not end where the step "
            f"{second.base_name} -> {second.tuned_name} starts."
        )
    found = [(c, _products(first, second, c)) for c in _components(first, second)]
    columns: dict[str, list[object]] = {name: [] for name in LINEAGE_SCHEMA.names}
    names = {
        "base": first.base_name,
        "parent": second.base_name,
        "tuned": second.tuned_name,
    }
    for row in _rows(found):
        for name, value in {**names, **row}.items():
            columns[name].append(value)
    return Table.of("lineage", LINEAGE_SCHEMA, columns)


def detour_warning(table: Table) -> str:
    """A sentence where the second step undoes part of the first, else empty."""
    whole = table.where(level="model").to_frame().iloc[0]
    if not whole["cosine_steps"] < -CORNER:
        return ""
    return (
        f"the step {whole['parent']} -> {whole['tuned']} undoes part of {whole['base']} -> "
        f"{whole['parent']} (cosine {whole['cosine_steps']:.2f}): {whole['parent']} may be no "
        f"parent of {whole['tuned']} but another fine-tune."
    )


def _rows(found: list[tuple[Component, Products]]) -> Iterator[dict[str, object]]:
    """The table's rows: the model first, then kinds, parts and single tensors."""
    keys: dict[tuple[str, str | None, str | None], list[Products]] = {("model", None, None): []}
    for level in ("kind", "part"):
        for c, _ in found:
            keys.setdefault((level, c.kind, c.part if level == "part" else None), [])
    for (level, kind, part), held in keys.items():
        held += [
            products
            for c, products in found
            if level == "model" or (c.kind == kind and part in (None, c.part))
        ]
        sums = Products(*(sum(values) for values in zip(*held, strict=True)))
        yield {
            **dict.fromkeys(("component", "layer")),
            **{"level": level, "kind": kind, "part": part, "tensors": len(held)},
            **sums.columns(),
        }
    for c, products in found:
        key = {"component": str(c), "kind": c.kind, "part": c.part, "layer": c.layer}
        yield {"level": "component", "tensors": 1, **key, **products.columns()}


def _components(first: Pair, second: Pair) -> list[Component]:
    """Those of either step; W_U is one of its own as soon as one model has its own."""
    return list(dict.fromkeys([*first.components, *second.components]))


def _products(first: Pair, second: Pair, component: Component) -> Products:
    one, two = (_delta(pair, component) for pair in (first, second))
    if component.part in VOCABULARY_PARTS:
        of_first, of_second = _common(first.rows.tuned, second.rows.base)
        one, two = one[of_first], two[of_second]
    one, two = one.double(), two.double()
    return Products(float((one * one).sum()), float((two * two).sum()), float((one * two).sum()))


def _delta(pair: Pair, component: Component) -> Float[Tensor, "..."]:
    """The tuning vector of one component, tokens in rows; a tied W_U changes as W_E does."""
    if component.part != "W_U":
        return pair.read(component).dense_delta()
    if component in pair.layout.places:
        delta = pair.read(component).dense_delta()
        return rearrange(delta, "d_model d_vocab -> d_vocab d_model")
    embedding = next(c for c in pair.components if c.part == "W_E")
    return pair.read(embedding).dense_delta()


def _common(
    first: Int[Tensor, " row"], second: Int[Tensor, " other"]
) -> tuple[Int[Tensor, " both"], Int[Tensor, " both"]]:
    """Places in both lists of the numbers that both hold."""
    _, one, two = np.intersect1d(first.numpy(), second.numpy(), return_indices=True)
    return torch.from_numpy(one), torch.from_numpy(two)
