"""Measures of vectors against loops, identities and edge cases."""

import math

import pandas as pd
import pytest
import torch
from einops import rearrange
from hypothesis import given
from hypothesis import strategies as st

from tvlens.geometry.neurons import rows_of_neurons, sums_of_rows, vector_measures

sizes = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(0, 10_000))


def _random(rows: int, columns: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    both = torch.randn(2, rows, columns, generator=generator, dtype=torch.float64)
    return both[0], both[1]


@pytest.mark.slow
@given(sizes)
def test_measures_equal_a_loop_over_plain_floats(size: tuple[int, int, int]) -> None:
    base, delta = _random(*size)
    found = vector_measures(base, delta)
    for row, (w, d) in enumerate(zip(base.tolist(), delta.tolist(), strict=True)):
        inner = sum(a * b for a, b in zip(w, d, strict=True))
        w_norm, d_norm = math.hypot(*w), math.hypot(*d)
        gain = inner / w_norm**2
        rest = math.hypot(*(b - gain * a for a, b in zip(w, d, strict=True)))
        assert float(found.gain[row]) == pytest.approx(gain, rel=1e-9)
        assert float(found.kappa[row]) == pytest.approx(inner / w_norm / d_norm, rel=1e-9)
        assert float(found.residual[row]) == pytest.approx(rest / w_norm, rel=1e-9, abs=1e-9)


@given(sizes)
def test_the_cosine_from_gain_and_residual_is_the_cosine(size: tuple[int, int, int]) -> None:
    base, delta = _random(*size)
    direct = torch.nn.functional.cosine_similarity(base, base + delta, dim=1)
    torch.testing.assert_close(vector_measures(base, delta).cos_base_tuned, direct)


@given(sizes, st.floats(-3, 3).filter(lambda a: abs(a) > 1e-6))
def test_the_gain_of_a_scaled_vector_is_the_scale(size: tuple[int, int, int], scale: float) -> None:
    base, _ = _random(*size)
    found = vector_measures(base, scale * base)
    torch.testing.assert_close(found.gain, torch.full_like(found.gain, scale))
    torch.testing.assert_close(found.residual, torch.zeros_like(found.gain), atol=1e-12, rtol=0)
    torch.testing.assert_close(found.kappa, torch.full_like(found.gain, math.copysign(1, scale)))


@given(sizes)
def test_swapping_base_and_tuned_turns_the_change_round(size: tuple[int, int, int]) -> None:
    base, delta = _random(*size)
    there, back = vector_measures(base, delta), vector_measures(base + delta, -delta)
    torch.testing.assert_close(there.delta_norm, back.delta_norm)
    torch.testing.assert_close(there.cos_base_tuned, back.cos_base_tuned)
    # <d, w> |w|^-2 and -<d, w + d> |w + d|^-2 add up to the energies' balance
    inner = there.gain * there.base_norm**2 + there.delta_norm**2
    torch.testing.assert_close(back.gain * back.base_norm**2, -inner)


def test_unchanged_has_cosine_one_and_a_zero_base_has_nothing() -> None:
    base = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    found = vector_measures(base, torch.tensor([[0.0, 0.0], [1.0, 0.0]]))
    assert float(found.cos_base_tuned[0]) == 1.0
    assert float(found.relative_delta[0]) == 0.0
    assert torch.isnan(found.kappa[0])
    for name in ("gain", "residual", "kappa", "cos_base_tuned", "relative_delta"):
        assert torch.isnan(getattr(found, name)[1]), name


def test_a_tiny_change_keeps_its_digits_in_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(1, 3000, generator=generator)
    found = vector_measures(base, 1e-6 * base)
    # 1e-6 times a float32 weight is rounded at 6e-8 of itself, at random
    assert float(found.gain[0]) == pytest.approx(1e-6, rel=1e-7)


def test_snr_is_an_energy_ratio() -> None:
    found = vector_measures(torch.ones(1, 4), torch.full((1, 4), 2.0), torch.tensor([4.0]))
    assert float(found.snr[0]) == pytest.approx(4.0)
    assert float(found.floor_norm[0]) == pytest.approx(2.0)
    assert torch.isnan(vector_measures(torch.ones(1, 4), torch.ones(1, 4)).snr[0])


def test_long_rows_are_summed_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    base, delta = _random(3, 50, 1)
    whole = vector_measures(base, delta)
    monkeypatch.setattr("tvlens.geometry.neurons.ENTRIES_AT_ONCE", 7)
    pieces = vector_measures(base, delta)
    torch.testing.assert_close(whole.residual, pieces.residual)
    torch.testing.assert_close(whole.kappa, pieces.kappa)


def test_a_neuron_is_a_row_of_w_out_and_a_column_of_w_in() -> None:
    matrix = torch.arange(6.0).reshape(2, 3)
    assert torch.equal(rows_of_neurons(matrix, "W_out")[1], matrix[1])
    assert torch.equal(rows_of_neurons(matrix, "W_in")[1], matrix[:, 1])


@pytest.mark.parametrize("stored", ["rows", "columns"])
@pytest.mark.parametrize("left_over", [1e-9, 1e-6, 1e-3, 1e-2])
def test_what_is_left_of_a_nearly_pure_gain_keeps_its_digits(stored: str, left_over: float) -> None:
    base, across = _random(5, 40, 2)
    across -= (across * base).sum(1, keepdim=True) / base.square().sum(1, keepdim=True) * base
    across *= left_over * base.norm(dim=1, keepdim=True) / across.norm(dim=1, keepdim=True)
    delta = 0.5 * base + across
    if stored == "columns":
        base, delta = (rearrange(side, "a b -> b a").contiguous().T for side in (base, delta))
    found = vector_measures(base, delta)
    expected = torch.full_like(found.residual, left_over)
    # rounding of delta alone moves it by 1e-16 of the gain
    torch.testing.assert_close(found.residual, expected, rtol=1e-6, atol=0)


def test_rows_and_columns_of_a_file_have_the_same_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tvlens.geometry.neurons.ENTRIES_AT_ONCE", 50)
    base, delta = _random(6, 30, 4)
    delta[2, :7] = 0
    floor = base.square()
    turned = [rearrange(side, "a b -> b a").contiguous().T for side in (base, delta)]
    here, there = sums_of_rows(base, delta, floor), sums_of_rows(*turned, floor)
    for name, values in vars(here).items():
        torch.testing.assert_close(getattr(there, name), values, msg=name)
    assert here.equal.tolist() == [0, 0, 7, 0, 0, 0]


def _one_along_the_base(times_rounding: float) -> pd.DataFrame:
    """Labels of 240 neurons with noise, of which number 7 changed in strong directions of the base.

    Its change has ``times_rounding`` times the energy of rounding.
    """
    from tests.geometry_pairs import FakeLayout, FakePair, FakeWeight
    from tvlens.components import Component
    from tvlens.geometry.blocks import Ask, findings_of_block
    from tvlens.geometry.classify import labelled, with_q_values

    generator = torch.Generator().manual_seed(0)
    d_model = 384
    left, _, right = torch.linalg.svd(torch.randn(240, d_model, generator=generator))
    base = left * torch.exp(-torch.arange(240) / 60) @ right[:240]
    delta = 1e-5 * torch.randn(240, d_model, generator=generator)
    mixture = torch.randn(24, generator=generator) @ right[:24]
    delta[7] = 0.05 * base[7].norm() * mixture / mixture.norm()
    floor = torch.full_like(delta, float(delta[7].square().sum()) / times_rounding / d_model)
    floor[:7], floor[8:] = 1e-12, 1e-12
    component = Component("matrix", 0, None, "W_out")
    weight = FakeWeight(component, base, delta, floor)
    pair = FakePair({component: weight}, FakeLayout(n_heads=1, n_kv_heads=1))
    (found,) = findings_of_block([Ask(pair, [component], seed=0)])
    calls = labelled(with_q_values(found.evidence.frame))
    return calls[calls["kind"] == "neuron"].reset_index(drop=True)


@pytest.mark.slow
def test_a_neuron_along_the_base_is_rewired_by_itself_unless_rounding_could_have_done_it() -> None:
    far, near = _one_along_the_base(25.0), _one_along_the_base(23.0)
    assert far.loc[7, "label"] == "rewired"
    assert far.loc[7, "decided_by"].startswith("alignment of the neuron's own change")
    assert near.loc[7, "label"] == "unresolved"
    assert near.loc[7, "structured_share"] == 0  # and so takes nothing from a gain
    for frame in (far, near):
        assert set(frame["label"].drop(7)) == {"unresolved"}
