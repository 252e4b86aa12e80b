"""Parts of spectra equal those of whole ones, whatever the size, the rank and the clusters."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tvlens.geometry import eigen
from tvlens.geometry.changes import Remainder, gram, own_products
from tvlens.geometry.eigen import largest_eigenvalue, strongest
from tvlens.geometry.nulls import Signs, noise_edge
from tvlens.geometry.spikes import spikes_above_edge

SPECTRA = ("noise", "low rank", "clusters", "one value")


def _matrix(rows: int, columns: int, seed: int, spectrum: str) -> Tensor:
    """A matrix of a kind of spectrum: ``clusters`` has equal singular values in threes."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    left, values, right = torch.linalg.svd(noise, full_matrices=False)
    number = torch.arange(len(values))
    values = {
        "noise": values,
        "low rank": torch.where(number < 2, values, 0),
        "clusters": values[number // 3 * 3],
        "one value": values[:1].expand(len(values)),
    }[spectrum]
    return left * values @ right


sizes = st.tuples(st.integers(1, 40), st.integers(1, 24), st.integers(0, 999))


@given(sizes, st.sampled_from(SPECTRA), st.floats(0, 1.1), st.integers(0, 30))
def test_the_strongest_eigenpairs_are_those_of_the_whole_spectrum(
    size: tuple[int, int, int], spectrum: str, share: float, at_least: int
) -> None:
    products = gram(_matrix(*size, spectrum))
    values = torch.linalg.eigvalsh(products)
    bound = share * float(values[-1]) + 1e-9
    if (values - bound).abs().min() < 1e-9 * float(values[-1]):
        bound *= 1 + 1e-6  # not on a value: either side of it would be right
    expected = values.flip(0)[: max(min(at_least, len(values)), int((values > bound).sum()))]
    found, directions = strongest(products, bound, at_least=at_least)
    scale = float(values[-1])
    torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=1e-12)
    ones = torch.eye(len(found), dtype=torch.float64)
    torch.testing.assert_close(directions.mT @ directions, ones, rtol=0, atol=1e-9)
    residual = products @ directions - directions * found
    assert float(residual.norm(dim=0).amax() if len(found) else 0) <= 1e-11 * scale


@given(sizes, st.sampled_from(SPECTRA))
def test_the_largest_eigenvalue_is_the_last_of_all(
    size: tuple[int, int, int], spectrum: str
) -> None:
    products = gram(_matrix(*size, spectrum))
    expected = float(torch.linalg.eigvalsh(products)[-1])
    assert float(largest_eigenvalue(products)) == pytest.approx(expected, rel=1e-9)
    assert float(largest_eigenvalue(products.float())) == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_the_largest_eigenvalue_by_iteration_is_that_of_the_tridiagonal_form(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    products = gram(_matrix(600, 300, 0, "noise")).float()
    direct = float(largest_eigenvalue(products))
    monkeypatch.setattr(eigen, "SMALL", 299)
    # the edge of a spectrum without a gap: 1e-4 is two hundredths of the margin
    assert float(largest_eigenvalue(products)) == pytest.approx(direct, rel=1e-4)


@given(sizes)
def test_products_of_a_matrix_with_itself_keep_its_precision(size: tuple[int, int, int]) -> None:
    matrix = _matrix(*size, "noise")
    for turned in (matrix, matrix.mT):
        torch.testing.assert_close(own_products(turned), turned.mT @ turned)
        own = own_products(turned.float())
        assert own.dtype == torch.float32
        torch.testing.assert_close(own, turned.float().mT @ turned.float())


@given(
    st.tuples(st.integers(2, 40), st.integers(2, 24), st.integers(0, 999)),
    st.sampled_from(SPECTRA),
    st.integers(0, 5),
)
def test_spikes_are_what_a_dense_svd_leaves_above_the_edge(
    size: tuple[int, int, int], spectrum: str, at_least: int
) -> None:
    rows, columns, seed = size
    change = _matrix(rows, columns, seed, spectrum)
    change = change + 30 * torch.outer(change[:, 0], change[0])
    base = _matrix(rows, columns, seed + 1, "noise")
    rest = change - 0.1 * base
    values = torch.linalg.svdvals(rest)
    limit = float(noise_edge(rest, seed=4))
    if (values - limit).abs().min() < 1e-5 * limit:
        return  # on the edge: its float32 draw decides
    gain = torch.full((1, 1), 0.1, dtype=torch.float64)
    total = float(rest.square().sum())
    found = spikes_above_edge(
        Remainder(base, change, gain), total, signs=Signs(4), at_least=at_least
    )
    assert found.above == int((values > limit).sum())
    known = values[: max(found.above, at_least)]
    torch.testing.assert_close(found.values, known[known > 1e-5 * values[0]])
    along = found.read.mT @ rest @ found.write
    scale = float(values[0])
    torch.testing.assert_close(along / scale, torch.diag(found.values) / scale, rtol=0, atol=1e-8)
