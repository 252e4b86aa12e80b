"""Tuning vectors form a vector space, whatever form their parts have."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.tiny_checkpoints import add_noise, copy_with, tiny_adapter, tiny_llama
from tvlens.components import Component
from tvlens.errors import IncomparableModelsError

W_Q = Component("matrix", 0, None, "W_Q")
FLOAT32 = 1e-6
"""A few roundings of float32 sums over rank-sized axes."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("vectors")
    base = tiny_llama(root / "base")
    return {
        "base": base,
        "one": copy_with(base, root / "one", add_noise(1)),
        "two": copy_with(base, root / "two", add_noise(2)),
        "adapter": tiny_adapter(base, root / "adapter"),
        "other_adapter": tiny_adapter(base, root / "other_adapter", seed=5),
    }


def _vector(folders: dict[str, Path], name: str):
    from tvlens.weights.matching import load_pair
    from tvlens.weights.vector import tuning_vector

    return tuning_vector(load_pair(folders["base"], folders[name]))


def _flat(vector) -> Tensor:
    return torch.cat([delta.dense().flatten() for delta in vector.values()]).double()


def test_the_vector_is_tuned_minus_base(folders: dict[str, Path]) -> None:
    from safetensors.torch import load_file

    base, tuned = (load_file(folders[name] / "model.safetensors") for name in ("base", "one"))
    name = "model.layers.0.self_attn.q_proj.weight"
    found = _vector(folders, "one")[W_Q].dense()
    assert torch.equal(found, (tuned[name] - base[name]).T)


@pytest.mark.parametrize("other", ["two", "adapter"])
def test_sums_scales_and_products_are_those_of_the_flat_vectors(
    folders: dict[str, Path], other: str
) -> None:
    first, second = _vector(folders, "one"), _vector(folders, other)
    flat_first, flat_second = _flat(first), _flat(second)
    combined = 0.5 * (first - second) + second * 2
    expected = 0.5 * (flat_first - flat_second) + flat_second * 2
    assert torch.allclose(_flat(combined), expected, atol=FLOAT32)
    assert first.dot(second) == pytest.approx(float(flat_first @ flat_second), rel=1e-5, abs=1e-6)
    assert second.norm() == pytest.approx(float(flat_second.norm()), rel=FLOAT32)
    assert first.cosine(-first) == pytest.approx(-1)


def test_low_rank_vectors_stay_low_rank_and_exact(folders: dict[str, Path]) -> None:
    from tvlens.weights.delta import Absent, LowRank

    first, second = _vector(folders, "adapter"), _vector(folders, "other_adapter")
    total = first - second
    assert isinstance(total[W_Q], LowRank)
    assert total[W_Q].rank == 8
    assert isinstance(total[Component("matrix", 0, None, "W_O")], Absent)
    assert torch.allclose(_flat(total), _flat(first) - _flat(second), atol=FLOAT32)
    assert first.dot(second) == pytest.approx(float(_flat(first) @ _flat(second)), rel=1e-5)
    assert total.norm() == pytest.approx(float(_flat(total).norm()), rel=1e-5)


def test_select_keeps_the_components_asked_for(folders: dict[str, Path]) -> None:
    vector = _vector(folders, "one")
    part = vector.select(lambda component: component.layer == 1)
    rest = vector.select(lambda component: component.layer != 1)
    assert {component.layer for component in part} == {1}
    assert part.norm() ** 2 + rest.norm() ** 2 == pytest.approx(vector.norm() ** 2)


def test_vectors_of_different_components_are_not_added(folders: dict[str, Path]) -> None:
    vector = _vector(folders, "one")
    with pytest.raises(IncomparableModelsError, match=r"have different components, such as L0\."):
        vector + vector.select(lambda component: component.layer == 1)


def test_differences_of_different_shapes_are_not_added() -> None:
    from tvlens.weights.delta import Absent, Dense, added

    with pytest.raises(IncomparableModelsError, match=r"shapes \(2,\) and \(3,\)"):
        added(Dense(torch.zeros(2)), Absent((3,)))


def test_a_zero_vector_has_no_direction(folders: dict[str, Path]) -> None:
    zero = _vector(folders, "base")
    assert zero.norm() == 0
    assert math.isnan(zero.cosine(zero))
