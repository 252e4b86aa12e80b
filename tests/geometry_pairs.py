"""A fake pair of checkpoints in memory, with planted tuning vectors, for the geometry tests.

Base matrices get a decaying spectrum (as trained ones have); the tuning vector is what the test
plants, on top of an optional isotropic background.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tvlens.components import Component


@dataclass(frozen=True)
class FakeLayout:
    n_heads: int = 8
    n_kv_heads: int = 8
    d_model: int = 96
    d_head: int = 12
    d_mlp: int = 192
    n_layers: int = 2
    qk_norm: str = ""


@dataclass(frozen=True, eq=False)
class FakeWeight:
    component: Component
    base: Tensor
    delta: Any  # a tensor, or a LowRank
    floor: Tensor | None = None
    base_dtype: torch.dtype = torch.float32
    tuned_dtype: torch.dtype = torch.float32
    tied: bool = False

    def dense_delta(self) -> Tensor:
        return self.delta if isinstance(self.delta, Tensor) else self.delta.dense()


@dataclass(frozen=True, eq=False)
class FakePair:
    weights: Mapping[Component, FakeWeight]
    layout: FakeLayout
    base_name: str = "base"
    tuned_name: str = "tuned"

    @property
    def components(self) -> list[Component]:
        return list(self.weights)

    @property
    def rotary_partners(self) -> list[int]:
        return list(range(self.layout.d_head))

    def blocks(self) -> list[list[Component]]:
        layers = [None, *range(self.layout.n_layers)]
        return [[c for c in self.weights if c.layer == layer] for layer in layers]

    def read(self, component: Component) -> FakeWeight:
        return self.weights[component]

    def slabs(self, component: Component) -> list[FakeWeight]:
        return [self.weights[component]]


def decaying(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """A random matrix with singular values that fall like those of trained weights."""
    matrix = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    values = torch.linspace(1, 0.1, len(values), dtype=torch.float64)
    return (left * values @ right).float()


def shapes(layout: FakeLayout) -> dict[str, tuple[int, int]]:
    d_model, kv = layout.d_model, layout.n_kv_heads * layout.d_head
    q = layout.n_heads * layout.d_head
    return {
        "W_Q": (d_model, q),
        "W_K": (d_model, kv),
        "W_V": (d_model, kv),
        "W_O": (q, d_model),
        "W_gate": (d_model, layout.d_mlp),
        "W_in": (d_model, layout.d_mlp),
        "W_out": (layout.d_mlp, d_model),
    }


@cache
def base_weights(layout: FakeLayout, seed: int = 0) -> dict[Component, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weights = {Component("embedding", None, None, "W_E"): decaying(300, layout.d_model, generator)}
    for layer in range(layout.n_layers):
        for part, shape in shapes(layout).items():
            weights[Component("matrix", layer, None, part)] = decaying(*shape, generator)
        weights[Component("norm", layer, None, "ln1.w")] = torch.ones(layout.d_model)
    weights[Component("norm", None, None, "ln_final.w")] = torch.ones(layout.d_model)
    return weights


def isotropic(like: Tensor, relative: float, generator: torch.Generator) -> Tensor:
    """Noise of ``relative`` times the norm of ``like``."""
    noise = torch.randn(like.shape, generator=generator)
    return noise * (relative * like.norm() / noise.norm())


def fake_pair(
    layout: FakeLayout,
    planted: Mapping[Component, Tensor] | None = None,
    *,
    background: float = 0.0,
    seed: int = 0,
) -> FakePair:
    """A pair whose tuning vectors are ``planted`` plus isotropic noise on the matrices."""
    generator = torch.Generator().manual_seed(seed + 1)
    weights = {}
    for component, base in base_weights(layout, seed).items():
        delta = torch.zeros_like(base)
        if background and component.kind == "matrix":
            delta = isotropic(base, background, generator)
        if planted and component in planted:
            delta = delta + planted[component]
        floor = (base.abs() * 2.0**-24).square() / 12
        weights[component] = FakeWeight(component, base, delta, floor)
    return FakePair(weights, layout)


def within_matrix(layout: FakeLayout, component: Component, index: int, part: Tensor) -> Tensor:
    """A tuning vector of the whole matrix that is ``part`` in one head or neuron."""
    whole = torch.zeros(shapes(layout)[component.part or ""])
    if component.part == "W_O":
        whole[index * layout.d_head : (index + 1) * layout.d_head] = part
    elif component.part in ("W_Q", "W_K", "W_V"):
        whole[:, index * layout.d_head : (index + 1) * layout.d_head] = part
    elif component.part == "W_out":
        whole[index] = part
    else:
        whole[:, index] = part
    return whole


def tail_direction(base: Tensor, generator: torch.Generator, *, count: int = 24) -> Tensor:
    """A unit direction in the ``count`` weakest write directions of ``base``: new, not existing."""
    weakest = torch.linalg.svd(base.double()).Vh[-count:]
    mix = torch.randn(count, generator=generator, dtype=torch.float64)
    return torch.nn.functional.normalize(mix @ weakest, dim=0).float()
