"""The rounding floor is what an actual round trip through the dtype costs."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tvlens.errors import CheckpointError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight", [1.0, -1.5, 0.013, 3.1e-5, 1e-7, 0.0, -1000.0])
def test_spacing_is_the_distance_to_the_next_number_of_the_dtype(dtype: str, weight: float) -> None:
    from tvlens.weights.precision import spacing

    stored = torch.tensor([abs(weight)]).to(DTYPES[dtype])
    bits = stored.view(torch.int32 if dtype == "float32" else torch.int16)
    following = (bits + 1).view(DTYPES[dtype])  # the next number up has the next bit pattern
    expected = following.double() - stored.double()
    assert torch.equal(spacing(stored.float() * math.copysign(1, weight), dtype), expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_floor_predicts_the_energy_of_a_round_trip(dtype: str) -> None:
    from tvlens.weights.precision import rounding_energy

    weights = torch.randn(400, 400, generator=torch.Generator().manual_seed(0)) * 0.05
    rounded = weights.to(DTYPES[dtype]).float()
    lost = float((rounded - weights).double().square().sum())
    floor = float(rounding_energy(rounded, dtype).double().sum())
    # 160,000 nearly uniform errors: the sum has a relative spread of 0.9 / 400
    assert floor == pytest.approx(lost, rel=0.02)


def test_bfloat16_noise_is_the_fraction_of_the_norm_that_was_measured() -> None:
    from tvlens.weights.precision import rounding_energy

    weights = torch.randn(500, 500, generator=torch.Generator().manual_seed(1))
    relative = float(rounding_energy(weights, "bfloat16").sum().sqrt() / weights.norm())
    assert relative == pytest.approx(0.00166, rel=0.02)  # methods.md 3.8 item 7


@pytest.mark.slow
@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_energies_are_those_of_the_spacing_and_positive_everywhere(weight: float) -> None:
    from tvlens.weights.precision import rounding_energy, spacing, uniform_energy

    weights = torch.tensor([weight])
    for dtype in DTYPES:
        energy = float(rounding_energy(weights, dtype))
        assert 0 < energy < math.inf
        slow = float(uniform_energy(spacing(weights, dtype)))
        if slow < 1e37:  # beyond, float32 cannot hold the energy and the largest is given
            assert energy == pytest.approx(slow, rel=1e-6)


def test_the_coarsest_dtype_has_the_fewest_bits_and_is_never_finer_than_the_arithmetic() -> None:
    from tvlens.weights.precision import coarsest_dtype

    assert coarsest_dtype("float32", "bfloat16") == "bfloat16"
    assert coarsest_dtype("float16", "float32") == "float16"
    assert coarsest_dtype("float16", "bfloat16") == "bfloat16"
    assert coarsest_dtype("float64", "float64") == "float32"


def test_a_dtype_without_a_known_rounding_is_refused() -> None:
    from tvlens.weights.precision import coarsest_dtype

    with pytest.raises(CheckpointError, match="weights of dtype F8_E4M3 have no known rounding"):
        coarsest_dtype("float32", "F8_E4M3")


def test_a_uniform_grid_has_a_twelfth_of_its_squared_step() -> None:
    from tvlens.weights.precision import uniform_energy

    assert float(uniform_energy(torch.tensor(0.3))) == pytest.approx(0.0075)


def test_a_storage_note_overrules_the_dtype_of_the_file_only_downwards() -> None:
    from tvlens.weights.precision import stored_dtype, stored_step

    assert stored_dtype("float32", {"dtype": "float16"}) == "float16"
    assert stored_dtype("bfloat16", {"dtype": "float32"}) == "bfloat16"
    assert stored_dtype("float32", {"dtype": "int8_row_delta"}) == "float32"
    assert stored_dtype("float32", None) == "float32"
    note = {"dtype": "int8_row_delta", "step": {"a": {"rms": 0.5, "max": 2.0}, "b": [1.0, 2.0]}}
    assert float(stored_step(note, "a")) == 0.5
    assert stored_step(note, "b").tolist() == [1.0, 2.0]
    assert stored_step(note, "c") is None
