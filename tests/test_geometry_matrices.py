"""Spectral measures of matrices against dense SVDs and planted changes."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tvlens.geometry.changes import gram, singular_energies, transposed
from tvlens.geometry.matrices import (
    alignment,
    amplification,
    effective_rank,
    energy_split,
    row_space,
    seen,
    self_alignment,
    side_alignment,
    spectral_basis,
    stable_rank,
)


def _normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _parts(base: Tensor, delta: Tensor, k_read: int, k_write: int) -> list[float]:
    basis = spectral_basis(base)
    split = energy_split(basis, seen(basis, delta), k_read=k_read, k_write=k_write)
    names = ("whole", "scale", "existing", "new_read", "new_write", "new_both")
    return [float(getattr(split, name)) for name in names]


def _parts_by_masks(base: Tensor, delta: Tensor, k_read: int, k_write: int) -> list[float]:
    """The oracle: full orthogonal bases, the global gain subtracted, and masks over the entries."""
    u, s, vh = np.linalg.svd(base.numpy(), full_matrices=True)
    gain = float((base * delta).sum() / base.square().sum())
    core = u.T @ (delta - gain * base).numpy() @ vh.T
    total = float(delta.square().sum())
    size = len(s)
    scale = (core[range(size), range(size)] ** 2).sum()
    core[range(size), range(size)] = 0
    energy = core**2
    return [
        gain**2 * float(base.square().sum()) / total,
        scale / total,
        energy[:k_read, :k_write].sum() / total,
        energy[k_read:, :k_write].sum() / total,
        energy[:k_read, k_write:].sum() / total,
        energy[k_read:, k_write:].sum() / total,
    ]


@pytest.mark.slow
@given(st.integers(2, 6), st.integers(2, 6), st.integers(0, 1000), st.data())
def test_the_energy_parts_equal_masks_on_full_bases_and_sum_to_one(
    rows: int, columns: int, seed: int, data: st.DataObject
) -> None:
    k_read = data.draw(st.integers(1, rows))
    k_write = data.draw(st.integers(1, columns))
    rank = min(rows, columns)
    k_read, k_write = min(k_read, rank), min(k_write, rank)
    base, delta = _normal(rows, columns, seed=seed), _normal(rows, columns, seed=seed + 1)
    # a random small base may be ill conditioned: the Gram costs 1e-16 times its condition squared
    base = base + 3 * torch.eye(rows, columns, dtype=torch.float64)
    found = _parts(base, delta, k_read, k_write)
    assert found == pytest.approx(_parts_by_masks(base, delta, k_read, k_write), abs=1e-7)
    assert sum(found) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("shape", [(12, 30), (30, 12)])
def test_a_gain_of_the_whole_matrix_is_all_global(shape: tuple[int, int]) -> None:
    base = _normal(*shape)
    assert _parts(base, 0.03 * base, 3, 3) == pytest.approx([1, 0, 0, 0, 0, 0], abs=1e-9)


def test_gains_of_single_directions_are_scale() -> None:
    base = _normal(20, 12)
    u, s, vh = torch.linalg.svd(base, full_matrices=False)
    signs = torch.tensor([1.0, -1.0] * 6, dtype=torch.float64)
    parts = _parts(base, u * (s * signs) @ vh, 3, 3)
    assert parts[0] + parts[1] == pytest.approx(1, abs=1e-9)
    assert parts[1] > 0.5


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (9, 9)])
def test_amplification_is_1_of_a_gain_minus_1_of_an_attenuation_and_0_of_both(
    shape: tuple[int, int],
) -> None:
    base = _normal(*shape)
    basis = spectral_basis(base)
    u, s, vh = torch.linalg.svd(base, full_matrices=False)
    signs = torch.where(torch.arange(len(s)) % 2 == 0, 1.0, -1.0).double()
    half = u * signs @ vh  # as much energy one way as the other, but for a middle one
    for delta, net in ((0.03 * base, 1.0), (-0.03 * base, -1.0), (half, signs.mean())):
        found = float(amplification(basis, seen(basis, delta)))
        assert found == pytest.approx(float(net), abs=1e-9)


@pytest.mark.slow
def test_amplification_of_noise_is_0_on_average_whatever_the_shape() -> None:
    for shape in ((10, 40), (20, 20)):
        basis = spectral_basis(_normal(*shape))
        net = [
            float(amplification(basis, seen(basis, _normal(*shape, seed=s)))) for s in range(2, 402)
        ]
        spread = (3 * min(shape)) ** 0.5 / (shape[0] * shape[1])  # of sum C|C|, each C normal
        assert np.std(net) == pytest.approx(spread, rel=0.15)
        assert abs(np.mean(net)) < 3 * spread / 20


def test_a_new_write_direction_lands_in_new_write_and_a_new_read_in_new_read() -> None:
    base = _normal(20, 12)
    u, _, vh = torch.linalg.svd(base, full_matrices=False)
    names = ["whole", "scale", "existing", "new_read", "new_write", "new_both"]
    write = dict(zip(names, _parts(base, torch.outer(u[:, 0], vh[9]), 4, 4), strict=True))
    read = dict(zip(names, _parts(base, torch.outer(u[:, 9], vh[0]), 4, 4), strict=True))
    assert write["new_write"] == pytest.approx(1, abs=1e-9)
    assert read["new_read"] == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("shape", [(8, 20), (20, 8), (9, 9)])
def test_the_basis_rebuilds_the_matrix(shape: tuple[int, int]) -> None:
    base = _normal(*shape)
    basis = spectral_basis(base)
    torch.testing.assert_close(basis.read * basis.values @ transposed(basis.write), base)
    torch.testing.assert_close(basis.values, torch.linalg.svdvals(base))


def test_null_directions_are_zero_and_do_not_count() -> None:
    base = _normal(20, 4) @ _normal(4, 12, seed=1)
    basis = spectral_basis(base)
    assert float(basis.rank) == 4
    assert not basis.read[:, 4:].any()
    assert not basis.write[:, 4:].any()


def test_a_pure_gain_has_relative_alignment_one_on_both_sides() -> None:
    base = _normal(20, 12)
    basis = spectral_basis(base)
    sides = side_alignment(basis, seen(basis, 0.1 * base), d_read=20, d_write=12)
    assert float(sides.g_read) == pytest.approx(1)
    assert float(sides.g_write) == pytest.approx(1)


def test_noise_has_alignment_zero_even_where_the_base_has_null_directions() -> None:
    base = _normal(60, 15) @ _normal(15, 40, seed=1)
    basis = spectral_basis(base)
    found = [side_alignment(basis, seen(basis, _normal(60, 40, seed=s)), d_read=60, d_write=40)
             for s in range(2, 42)]  # fmt: skip
    # sd of one matrix's G is about sqrt(2 / (3 d)) / sqrt(60), of the mean of 40 less than .005
    assert float(torch.stack([f.g_write for f in found]).mean()) == pytest.approx(0, abs=0.02)
    assert float(torch.stack([f.g_read for f in found]).mean()) == pytest.approx(0, abs=0.02)


def test_alignment_is_a_gini_and_ties_the_null_directions() -> None:
    energies = torch.tensor([2.0, 1.0], dtype=torch.float64)
    # four dimensions: weights 3/4, 1/4, and the null pair shares (-1/4 - 3/4) / 2 = -1/2
    found = alignment(energies, torch.tensor(5.0).double(), torch.tensor(2.0).double(), 4)
    assert float(found) == pytest.approx((2 * 0.75 + 1 * 0.25 + 2 * -0.5) / 5)


def test_ranks_of_known_spectra() -> None:
    assert float(effective_rank(torch.ones(7).double())) == pytest.approx(7)
    assert float(effective_rank(torch.tensor([4.0, 0.0]).double())) == pytest.approx(1)
    assert float(stable_rank(torch.tensor([4.0, 2.0, 2.0]).double())) == pytest.approx(2)
    matrix = _normal(5, 9)
    values = torch.linalg.svdvals(matrix).square()
    torch.testing.assert_close(singular_energies(matrix), values)


def test_a_batch_gives_what_each_matrix_gives() -> None:
    base, delta = _normal(3, 10, 6), _normal(3, 10, 6, seed=1)
    bases = spectral_basis(base)
    together = energy_split(bases, seen(bases, delta), k_read=2, k_write=2)
    for one in range(3):
        basis = spectral_basis(base[one])
        alone = energy_split(basis, seen(basis, delta[one]), k_read=2, k_write=2)
        torch.testing.assert_close(together.new_write[one], alone.new_write)
        torch.testing.assert_close(together.scale[one], alone.scale)


def test_the_gram_route_of_embeddings_equals_the_svd_route() -> None:
    base, delta = _normal(50, 8), _normal(50, 8, seed=1)
    basis = spectral_basis(base)
    space = row_space(gram(base), gram(delta))
    sides = side_alignment(basis, seen(basis, delta), d_read=50, d_write=8)
    torch.testing.assert_close(space.g, sides.g_write)
    torch.testing.assert_close(space.g_self, self_alignment(basis, 8))
    torch.testing.assert_close(space.delta_energies, singular_energies(delta))
