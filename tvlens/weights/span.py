"""Several tuning vectors of one base: inner products, and projection onto their span.

``gram`` gives <v_i, v_j> per component; they add up to the whole. ``project`` splits a vector v as
``along + across`` with ``along = sum_i c_i v_i`` and across orthogonal to every v_i. The
coefficients solve the normal equations of the unit-length vectors in float64; directions whose
eigenvalue is below ``DEPENDENT`` of the largest are taken as dependent and left out, which gives
the solution of least norm. One refinement step removes the error of the first solution. Both parts
keep the form of their terms: of low-rank vectors they are low rank.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import pandas as pd
import torch
from einops import einsum
from jaxtyping import Float64
from torch import Tensor

from tvlens.components import Component, key_columns

from .delta import Delta, inner_product
from .provenance import require_same_base
from .vector import TuningVector, weighted_sum

DEPENDENT = 1e-12
"""Squared sine of the angle below which vectors count as dependent: float32 knows no finer."""


@dataclass(frozen=True, eq=False)
class Gram:
    """Inner products of several vectors.

    Attributes:
        names: The vectors' names, in order.
        by_component: The matrix of products at every component that one of them holds.
    """

    names: tuple[str, ...]
    by_component: Mapping[Component, Float64[Tensor, "vector vector"]] = field(repr=False)

    @property
    def whole(self) -> Float64[Tensor, "vector vector"]:
        """The products over all entries."""
        count = len(self.names)
        return sum(self.by_component.values(), torch.zeros(count, count, dtype=torch.float64))

    @property
    def cosines(self) -> Float64[Tensor, "vector vector"]:
        """The cosines over all entries, NaN where a vector is zero."""
        return _cosines(self.whole)

    def to_frame(self) -> pd.DataFrame:
        """One row for each component and pair of vectors: the key, product and cosine."""
        pairs = [(i, j) for i in range(len(self.names)) for j in range(i, len(self.names))]
        components = [component for component in self.by_component for _ in pairs]
        cosines = {component: _cosines(m) for component, m in self.by_component.items()}
        columns = {
            **key_columns(components),
            "first": [self.names[i] for _ in self.by_component for i, _ in pairs],
            "second": [self.names[j] for _ in self.by_component for _, j in pairs],
            "product": [float(m[i, j]) for m in self.by_component.values() for i, j in pairs],
            "cosine": [float(m[i, j]) for m in cosines.values() for i, j in pairs],
        }
        return pd.DataFrame(columns)


@dataclass(frozen=True, eq=False)
class Projection:
    """A vector in two parts, one in the span of others and one orthogonal to it.

    Attributes:
        coefficients: What each of the others is multiplied by, in their order.
        along: The part in the span.
        across: The part orthogonal to it; the two add up to the vector.
        share: |along|^2 / |vector|^2, NaN for a zero vector.
    """

    coefficients: tuple[float, ...]
    along: TuningVector
    across: TuningVector
    share: float


def gram(vectors: Sequence[TuningVector]) -> Gram:
    """The inner products of ``vectors`` at every component.

    Raises:
        ValueError: There is no vector.
        IncomparableModelsError: They belong to different bases.
    """
    if not vectors:
        raise ValueError("inner products need at least one tuning vector.")
    for other in vectors[1:]:
        require_same_base(vectors[0].base, other.base, [c for c in vectors[0] if c in other])
    held = [c for c in vectors[0].base.layout.components() if any(c in v for v in vectors)]
    products = {c: _products([vector.get(c) for vector in vectors]) for c in held}
    return Gram(tuple(vector.name for vector in vectors), products)


def project(vector: TuningVector, onto: Sequence[TuningVector]) -> Projection:
    """Split a vector into its part in the span of ``onto`` and the part orthogonal to it.

    Raises:
        ValueError: ``onto`` is empty.
        IncomparableModelsError: The vectors belong to different bases.
    """
    if not onto:
        raise ValueError("a span needs at least one tuning vector.")
    products = gram(onto).whole
    coefficients = _solved(products, _dots(vector, onto))
    across = _remainder(vector, onto, coefficients)
    coefficients = coefficients + _solved(products, _dots(across, onto))
    across = _remainder(vector, onto, coefficients)
    factors = [float(c) for c in coefficients]
    along = weighted_sum(list(zip(factors, onto, strict=True)))
    whole = vector.norm()
    share = (along.norm() / whole) ** 2 if whole else math.nan
    return Projection(
        tuple(factors),
        replace(along, name=f"{vector.term} along {_listed(onto)}"),
        replace(across, name=f"{vector.term} across {_listed(onto)}"),
        share,
    )


def _listed(vectors: Sequence[TuningVector]) -> str:
    return f"[{', '.join(vector.name for vector in vectors)}]"


def _products(deltas: Sequence[Delta | None]) -> Float64[Tensor, "vector vector"]:
    found = torch.zeros(len(deltas), len(deltas), dtype=torch.float64)
    for i, first in enumerate(deltas):
        for j, second in enumerate(deltas[: i + 1]):
            if first is not None and second is not None:
                product = first.norm() ** 2 if i == j else inner_product(first, second)
                found[i, j] = found[j, i] = product
    return found


def _cosines(products: Float64[Tensor, "vector vector"]) -> Float64[Tensor, "vector vector"]:
    lengths = products.diagonal().sqrt()
    scale = einsum(lengths, lengths, "a, b -> a b")
    return torch.where(scale > 0, products / scale, torch.nan)


def _dots(vector: TuningVector, onto: Sequence[TuningVector]) -> Float64[Tensor, " vector"]:
    return torch.tensor([vector.dot(other) for other in onto], dtype=torch.float64)


def _solved(
    products: Float64[Tensor, "vector vector"], right: Float64[Tensor, " vector"]
) -> Float64[Tensor, " vector"]:
    """The least-norm solution, taken on vectors of unit length; zero vectors get zero."""
    lengths = products.diagonal().sqrt()
    unit = torch.where(lengths > 0, 1 / lengths, 0.0)
    values, directions = torch.linalg.eigh(einsum(products, unit, unit, "a b, a, b -> a b"))
    inverse = torch.where(values > DEPENDENT * values.max(), 1 / values, 0.0)
    in_eigen = inverse * einsum(directions, unit * right, "a k, a -> k")
    return unit * einsum(directions, in_eigen, "a k, k -> a")


def _remainder(
    vector: TuningVector, onto: Sequence[TuningVector], coefficients: Float64[Tensor, " vector"]
) -> TuningVector:
    terms = [(-float(c), other) for c, other in zip(coefficients, onto, strict=True)]
    return weighted_sum([(1.0, vector), *terms])
