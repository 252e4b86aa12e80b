"""Parts of spectra, by the published routine of LAPACK and by scipy's own call of it."""

import ctypes

import numpy as np
import pytest

from tvlens.geometry import lapack


@pytest.fixture(params=["published", "of scipy"])
def routine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to a part of a spectrum."""
    if request.param == "of scipy":
        monkeypatch.setattr(lapack, "published", lambda dtype: None)
    return request.param


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_scipy_publishes_the_routine_that_is_called(dtype: str) -> None:
    routine = lapack.published(dtype)
    assert routine is not None
    holds_the_lock = 4  # FUNCFLAG_PYTHONAPI of ctypes
    assert not type(routine)._flags_ & holds_the_lock


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("size", [1, 2, 7, 150])
def test_a_part_of_a_spectrum_is_that_of_the_whole(size: int, dtype: str, routine: str) -> None:
    noise = np.random.default_rng(size).standard_normal((size, size)).astype(dtype)
    matrix = noise + noise.T
    given = matrix.copy()
    given[np.triu_indices(size, 1)] = np.nan  # one triangle is read
    values, vectors = np.linalg.eigh(matrix.astype(float))
    exact = 1e-10 if dtype == "float64" else 1e-3
    bound = float(values[size // 2] + values[size // 2 - 1]) / 2 if size > 1 else -99.0
    count = (size + 1) // 2
    for found in (
        lapack.eigenpairs_above(given, bound),
        lapack.largest_eigenpairs(given, size - size // 2),
    ):
        assert found[0].dtype == found[1].dtype == dtype
        np.testing.assert_allclose(found[0], values[size // 2 :], atol=exact)
        overlap = np.abs(found[1].T @ vectors[:, size // 2 :])
        np.testing.assert_allclose(overlap, np.eye(size - size // 2), atol=exact)
    alone, none = lapack.largest_eigenpairs(given, count, vectors=False)
    np.testing.assert_allclose(alone, values[size - count :], atol=exact)
    assert none.shape == (size, 0)


def test_no_eigenvalue_above_a_bound_is_none(routine: str) -> None:
    values, vectors = lapack.eigenpairs_above(np.eye(5), 2.0)
    assert values.shape == (0,)
    assert vectors.shape == (5, 0)


def test_parts_of_spectra_leave_their_matrix_alone() -> None:
    matrix = np.diag(np.arange(9.0)) + 1
    before = matrix.copy()
    lapack.eigenpairs_above(matrix, 3.0)
    lapack.largest_eigenpairs(matrix.T, 2)
    np.testing.assert_array_equal(matrix, before)


@pytest.mark.parametrize(
    ("signature", "kinds"),
    [
        ("void (char *, int *, __pyx_t_5scipy_6linalg_13cython_lapack_d *)", "cir"),
        ("void (char *, long *, __pyx_t_5scipy_6linalg_13cython_lapack_d *)", "c?r"),
        ("void (char *, int *, __pyx_t_5scipy_6linalg_13cython_lapack_z *)", "ci?"),
        ("int (char *)", "?"),
    ],
)
def test_arguments_that_are_not_known_are_seen(signature: str, kinds: str) -> None:
    assert lapack.kinds(signature) == kinds


def test_a_routine_with_other_arguments_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lapack, "ROUTINES", {"float64": "dsyevd"})
    lapack.published.cache_clear()
    try:
        assert lapack.published("float64") is None
        monkeypatch.setattr(lapack, "ROUTINES", {"float64": "no such routine"})
        lapack.published.cache_clear()
        assert lapack.published("float64") is None
    finally:
        lapack.published.cache_clear()


def test_a_failure_of_lapack_is_an_error() -> None:
    def failing(*arguments: int) -> None:
        ctypes.c_int.from_address(arguments[-1]).value = 3

    with pytest.raises(np.linalg.LinAlgError, match="info 3"):
        lapack._called(failing, np.eye(3), b"V")
