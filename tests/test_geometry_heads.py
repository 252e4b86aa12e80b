"""Circuits from factors against dense products."""

import pytest
import torch
from einops import rearrange
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tvlens.geometry.changes import singular_energies
from tvlens.geometry.heads import (
    Factor,
    circuit_cores,
    circuit_energies,
    circuit_sums,
    column_products,
    kv_index_of_heads,
    slices_of_heads,
)
from tvlens.geometry.matrices import energy_split, seen, side_alignment, spectral_basis
from tvlens.geometry.neurons import vector_measures


def _normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _factors(heads: int, d_model: int, d_head: int, *, size: float = 0.3) -> tuple[Factor, Factor]:
    left = Factor(_normal(heads, d_model, d_head), size * _normal(heads, d_model, d_head, seed=1))
    right = Factor(
        _normal(heads, d_head, d_model, seed=2), size * _normal(heads, d_head, d_model, seed=3)
    )
    return left, right


def _dense(left: Factor, right: Factor) -> tuple[Tensor, Tensor]:
    base = left.base @ right.base
    return base, (left.base + left.delta) @ (right.base + right.delta) - base


@pytest.mark.slow
@given(st.integers(1, 3), st.integers(2, 9), st.integers(1, 3))
def test_cores_keep_norms_inner_products_and_spectra_of_the_dense_circuit(
    heads: int, d_model: int, d_head: int
) -> None:
    left, right = _factors(heads, d_model, min(d_head, d_model))
    cores, (base, delta) = circuit_cores(left, right), _dense(left, right)
    for core, dense in ((cores.base, base), (cores.delta, delta)):
        torch.testing.assert_close(core.norm(dim=(1, 2)), dense.norm(dim=(1, 2)))
    torch.testing.assert_close((cores.base * cores.delta).sum((1, 2)), (base * delta).sum((1, 2)))
    size = cores.delta.shape[-1]
    torch.testing.assert_close(
        singular_energies(cores.delta)[:, :size],
        torch.linalg.svdvals(delta)[:, :size].square(),
        atol=1e-8,
        rtol=1e-8,
    )


@given(st.integers(1, 3), st.integers(2, 9), st.integers(1, 3), st.floats(1e-4, 2))
def test_products_of_columns_hold_what_the_basic_measures_of_the_cores_do(
    heads: int, d_model: int, d_head: int, size: float
) -> None:
    left, right = _factors(heads, d_model, min(d_head, d_model))
    left = Factor(left.base, size * left.delta, 1e-9 * left.base.square())
    right = Factor(right.base, size * right.delta, 1e-9 * right.base.square())
    cores = circuit_cores(left, right)
    flat = (rearrange(core, "head a b -> head (a b)") for core in (cores.base, cores.delta))
    expected = vector_measures(*flat, cores.floor_energy)
    found = circuit_sums(column_products(left), column_products(right.swapped)).measures()
    for name, values in expected.columns().items():
        torch.testing.assert_close(getattr(found, name), values, rtol=1e-6, atol=1e-7)


@given(
    st.integers(1, 3),
    st.integers(2, 12),
    st.integers(1, 3),
    st.floats(1e-4, 2),
    st.sampled_from(["both", "left", "right", "none", "dependent"]),
)
def test_the_spectrum_from_products_of_columns_is_that_of_the_change_written_out(
    heads: int, d_model: int, d_head: int, size: float, changed: str
) -> None:
    left, right = _factors(heads, d_model, min(d_head, d_model))
    sizes = {"left": (size, 0.0), "right": (0.0, size), "none": (0.0, 0.0)}
    one, two = sizes.get(changed, (size, size))
    left, right = Factor(left.base, one * left.delta), Factor(right.base, two * right.delta)
    if changed == "dependent":  # the change adds no direction to the factor's own
        left = Factor(left.base, size * left.base)
    tuned = (left.base + left.delta) @ (right.base + right.delta)
    expected = torch.linalg.svdvals(tuned - left.base @ right.base).square()
    found = circuit_energies(column_products(left), column_products(right.swapped))
    count = min(found.shape[1], expected.shape[1])
    scale = float((left.base @ right.base).square().sum()) * max(size, 1e-12)
    torch.testing.assert_close(found[:, :count], expected[:, :count], rtol=1e-6, atol=1e-10 * scale)
    assert float(found[:, count:].abs().sum()) <= 1e-10 * scale


def test_energy_parts_and_alignments_of_cores_equal_the_dense_ones() -> None:
    left, right = _factors(4, 24, 5)
    cores, (base, delta) = circuit_cores(left, right), _dense(left, right)
    small, large = spectral_basis(cores.base), spectral_basis(base)
    ours = energy_split(small, seen(small, cores.delta), k_read=5, k_write=5)
    dense = energy_split(large, seen(large, delta), k_read=5, k_write=5)
    for name in ("whole", "scale", "existing", "new_read", "new_write", "new_both"):
        torch.testing.assert_close(getattr(ours, name), getattr(dense, name), atol=1e-9, rtol=1e-7)
    in_core = side_alignment(small, seen(small, cores.delta), d_read=24, d_write=24)
    in_full = side_alignment(large, seen(large, delta), d_read=24, d_write=24)
    for name in ("g_read", "g_write", "g_self_read", "g_self_write"):
        torch.testing.assert_close(getattr(in_core, name), getattr(in_full, name))


def test_a_change_of_gauge_leaves_the_circuit_unchanged() -> None:
    left, right = _factors(1, 20, 4)
    mix = torch.eye(4, dtype=torch.float64) + 0.4 * _normal(4, 4, seed=9)
    left = Factor(left.base, left.base @ mix - left.base)
    right = Factor(right.base, torch.linalg.inv(mix) @ right.base - right.base)
    cores = circuit_cores(left, right)
    assert left.delta.norm() > 0.3 * left.base.norm()
    # float64 rounding of a solve with a condition of about 10
    assert float(cores.delta.norm() / cores.base.norm()) < 1e-12


def test_the_circuits_rounding_energy_is_what_random_rounding_gives() -> None:
    left, right = _factors(1, 16, 4)
    floor = (torch.full_like(left.base, 1e-6), torch.full_like(right.base, 4e-6))
    found = circuit_cores(
        Factor(left.base, left.delta, floor[0]), Factor(right.base, right.delta, floor[1])
    ).floor_energy
    energies = []
    for seed in range(200):
        noise = 1e-3 * _normal(1, 16, 4, seed=seed), 2e-3 * _normal(1, 4, 16, seed=500 + seed)
        middle = left.base + left.delta / 2, right.base + right.delta / 2
        energies.append((middle[0] @ noise[1] + noise[0] @ middle[1]).square().sum())
    assert found is not None
    # 128 independent errors a draw, 200 draws: the mean is good to about 2 %
    assert float(found[0]) == pytest.approx(float(torch.stack(energies).mean()), rel=0.06)
    assert circuit_cores(left, right).floor_energy is None


def test_heads_are_columns_of_w_v_and_rows_of_w_o() -> None:
    w_v, w_o = _normal(6, 8), _normal(8, 6)
    assert torch.equal(slices_of_heads(w_v, "W_V", 4)[1], w_v[:, 2:4])
    assert torch.equal(slices_of_heads(w_o, "W_O", 4)[1], w_o[2:4])
    assert kv_index_of_heads(6, 2).tolist() == [0, 0, 0, 1, 1, 1]


def test_structure_of_a_kv_head_is_that_of_its_own_query_heads() -> None:
    from tvlens.geometry.head_evidence import HeadChanges
    from tvlens.geometry.heads import Factor, coordinates
    from tvlens.geometry.nulls import spans_of

    generator = torch.Generator().manual_seed(3)
    group = torch.tensor([0, 0, 1, 1, 1, 2])
    values = torch.randn(3, 40, 8, generator=generator)
    change = 1e-3 * torch.randn(3, 40, 8, generator=generator)
    change[1] += 0.1 * torch.outer(torch.randn(40, generator=generator), torch.ones(8))
    shared = Factor(values, change).of_heads(group)
    outputs = torch.randn(6, 8, 40, generator=generator)
    own = Factor(outputs, torch.zeros_like(outputs))
    known = coordinates(shared), coordinates(own.swapped)
    spans = spans_of(values.mT)[group], spans_of(outputs)
    heads = HeadChanges("OV", shared, own, *known, spans, group, torch.arange(8))
    spikes = heads.shared_spikes(seed=0)
    assert spikes.found.tolist() == [False, False, True, True, True, False]
    assert bool((spikes.share[2:5] > 0.99).all())
    inside = spans[0][2].T @ change[1].double().sum(1)  # the one direction, within what W_V reads
    outside = 1 - float(inside.square().sum() / change[1].double().sum(1).square().sum())
    torch.testing.assert_close(
        spikes.outside[2:5], torch.full((3,), outside).double(), atol=0.01, rtol=0
    )
