"""Laws of differences: a vector space with an inner product, whatever the form of its parts."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

EXACT = 1e-12
"""Relative, float64: a few hundred roundings."""
FORMS = ("dense", "low_rank", "absent")


def _made(form: str, seed: int, shape: tuple[int, int] = (5, 4)):
    from tvlens.weights.delta import Absent, Dense, LowRank

    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    if form == "dense":
        return Dense(normal(*shape))
    if form == "low_rank":
        return LowRank(normal(shape[0], 2), normal(2, shape[1]))
    return Absent(shape)


def _close(first: float, second: float, scale: float) -> bool:
    return abs(first - second) <= EXACT * max(scale, 1e-300)


forms, seeds = st.sampled_from(FORMS), st.integers(0, 10_000)
factors = st.floats(-4, 4, allow_subnormal=False)
recipes = st.tuples(forms, seeds)


@given(recipes, recipes)
def test_every_form_agrees_with_the_written_out_one(one, other) -> None:
    from tvlens.weights.delta import added, inner_product

    first, second = _made(*one), _made(*other)
    one, two = first.dense().double(), second.dense().double()
    assert _close(first.norm(), float(one.norm()), float(one.norm()))
    size = float(one.norm() * two.norm())
    assert _close(inner_product(first, second), float((one * two).sum()), size)
    total = added(first, second).dense().double()
    assert torch.allclose(total, one + two, rtol=EXACT, atol=EXACT)


@given(recipes, recipes, recipes, factors)
def test_sums_are_associative_and_products_distribute(one, other, another, factor) -> None:
    from tvlens.weights.delta import added, inner_product, scaled

    first, second, third = _made(*one), _made(*other), _made(*another)
    left = added(added(first, second), third).dense().double()
    right = added(first, added(second, third)).dense().double()
    assert torch.allclose(left, right, rtol=EXACT, atol=EXACT)
    spread = scaled(added(first, second), factor).dense().double()
    apart = added(scaled(first, factor), scaled(second, factor)).dense().double()
    assert torch.allclose(spread, apart, rtol=EXACT, atol=EXACT)
    whole = inner_product(added(first, second), third)
    parts = inner_product(first, third) + inner_product(second, third)
    assert _close(whole, parts, (first.norm() + second.norm()) * third.norm())


@given(recipes, recipes)
def test_products_are_symmetric_and_bounded_by_the_norms(one, other) -> None:
    from tvlens.weights.delta import inner_product

    first, second = _made(*one), _made(*other)
    size = first.norm() * second.norm()
    assert _close(inner_product(first, second), inner_product(second, first), size)
    assert abs(inner_product(first, second)) <= size * (1 + EXACT)
    assert _close(inner_product(first, first), first.norm() ** 2, first.norm() ** 2)


@given(seeds, seeds)
def test_what_cancels_between_factors_is_gone(seed: int, other: int) -> None:
    from tvlens.weights.delta import LowRank, added, inner_product, scaled

    first, second = _made("low_rank", seed), _made("low_rank", other)
    nothing = added(added(first, second), scaled(added(first, second), -1))
    assert isinstance(nothing, LowRank)
    size = first.norm() + second.norm()
    assert nothing.norm() <= 1e-14 * size
    assert abs(inner_product(nothing, first)) <= 1e-14 * size * first.norm()


@given(st.sampled_from(("dense", "low_rank")), seeds)
def test_a_spectrum_is_that_of_the_matrix(form: str, seed: int) -> None:
    from tvlens.weights.delta import spectrum

    delta = _made(form, seed)
    found, matrix = spectrum(delta), delta.dense()
    assert torch.allclose(found.left * found.values @ found.right, matrix, rtol=EXACT, atol=EXACT)
    expected = torch.linalg.svdvals(matrix)[: len(found.values)]
    assert torch.allclose(found.values, expected, rtol=1e-10, atol=1e-10)
    eye = torch.eye(len(found.values), dtype=torch.float64)
    assert torch.allclose(found.left.T @ found.left, eye, atol=1e-12)
    assert torch.allclose(found.right @ found.right.T, eye, atol=1e-12)


def test_the_spectrum_of_nothing_is_empty_and_a_bias_has_none() -> None:
    from tvlens.weights.delta import Absent, Dense, spectrum

    assert spectrum(Absent((3, 2))).values.tolist() == []
    with pytest.raises(ValueError, match=r"belongs to a matrix, got shape \(3,\)"):
        spectrum(Dense(torch.zeros(3)))


@given(recipes, st.sampled_from((0, 1)), st.lists(st.booleans(), min_size=4, max_size=4))
def test_masks_split_a_difference_into_orthogonal_parts(one, axis: int, kept) -> None:
    from tvlens.weights.delta import added, inner_product, masked

    delta = _made(*one)
    entries = torch.tensor(kept if axis else [*kept, True])
    part, rest = masked(delta, axis, entries), masked(delta, axis, ~entries)
    assert type(part) is type(delta)
    assert torch.allclose(added(part, rest).dense().double(), delta.dense().double(), atol=1e-13)
    assert abs(inner_product(part, rest)) <= EXACT * max(delta.norm() ** 2, 1e-300)
    index = (slice(None), ~entries) if axis else (~entries,)
    assert part.dense()[index].count_nonzero() == 0


def test_large_matrices_are_multiplied_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    from tvlens.weights import delta as module

    first, second = _made("dense", 1, (37, 6)), _made("dense", 2, (37, 6))
    low = _made("low_rank", 3, (37, 6))
    whole = [module.inner_product(first, other) for other in (second, low)]
    monkeypatch.setattr(module, "ENTRIES_AT_ONCE", 13)
    assert [module.inner_product(first, o) for o in (second, low)] == pytest.approx(
        whole, rel=1e-12
    )


def test_float32_factors_are_multiplied_in_float64() -> None:
    from tvlens.weights.delta import LowRank

    # 1 * 1 + 2^-13 * 2^-13 - 1 * 1 is lost in a float32 sum
    left = torch.tensor([[1.0, 2.0**-13, 1.0]])
    right = torch.tensor([[1.0], [2.0**-13], [-1.0]])
    assert LowRank(left, right).dense().item() == 2.0**-26
    assert LowRank(left, right).norm() == pytest.approx(2.0**-26, rel=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_scaling_keeps_the_form_and_scales_the_norm(form: str) -> None:
    from tvlens.weights.delta import Absent, scaled

    delta = scaled(_made(form, 1), 2)
    assert isinstance(delta, Absent) or math.isclose(delta.norm(), 2 * _made(form, 1).norm())
