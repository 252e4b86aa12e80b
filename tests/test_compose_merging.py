"""Merge methods against formulas written entry by entry in float64."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

SHAPE = (7, 11)
SCALES = [0.7, -0.4, 1.3]


def _changes(count: int = 3, seed: int = 0, shape: tuple[int, ...] = SHAPE) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) * 0.05 for _ in range(count)]


def _merged(name: str, changes: list[Tensor], scales: list[float], **options) -> Tensor:
    from tvlens.compose.merging import METHODS, merged

    return merged(changes, scales, METHODS[name], **options)


def _trimmed(change: Tensor, count: int) -> list[float]:
    """The largest entries by sorting, of equal ones the first."""
    values = change.double().flatten().tolist()
    order = sorted(range(len(values)), key=lambda i: (-abs(values[i]), i))[:count]
    return [value if i in set(order) else 0.0 for i, value in enumerate(values)]


def _ties(columns: list[list[float]], scales: list[float]) -> list[float]:
    """Algorithm 1 of TIES, an entry at a time."""
    found = []
    for entries in zip(*columns, strict=True):
        scaled = [s * e for s, e in zip(scales, entries, strict=True)]
        total = math.fsum(scaled)
        agreeing = [x for x in scaled if x * total > 0]
        found.append(math.fsum(agreeing) / len(agreeing) if agreeing else 0.0)
    return found


def _mergekit_ties(columns: list[list[float]], scales: list[float]) -> list[float]:
    found = []
    for entries in zip(*columns, strict=True):
        scaled = [s * e for s, e in zip(scales, entries, strict=True)]
        sign = 1.0 if math.fsum(scaled) >= 0 else -1.0
        agreeing = [(x, s) for x, s in zip(scaled, scales, strict=True) if x * sign > 0]
        divisor = math.fsum(s for _, s in agreeing)
        found.append(math.fsum(x for x, _ in agreeing) / (divisor or 1.0))
    return found


def _close(found: Tensor, expected: list[float]) -> None:
    wanted = torch.tensor(expected, dtype=torch.float64)
    scale = float(wanted.abs().max()) or 1.0
    assert float((found.double().flatten() - wanted).abs().max()) <= 1e-6 * scale


@pytest.mark.parametrize("name", ["task", "mergekit:task_arithmetic"])
def test_task_arithmetic_is_the_scaled_sum(name: str) -> None:
    changes = _changes()
    expected = [
        math.fsum(s * e for s, e in zip(SCALES, entries, strict=True))
        for entries in zip(*(c.double().flatten().tolist() for c in changes), strict=True)
    ]
    _close(_merged(name, changes, SCALES), expected)


def test_task_is_summed_in_double() -> None:
    changes = [torch.tensor([1.0]), torch.tensor([2.0**-40]), torch.tensor([-1.0])]
    assert float(_merged("task", changes, [1.0, 1.0, 1.0])) == 2.0**-40
    assert float(_merged("mergekit:task_arithmetic", changes, [1.0, 1.0, 1.0])) == 0.0


def test_linear_is_the_weighted_mean_of_the_models() -> None:
    base, changes = torch.randn(SHAPE).double(), _changes()
    models = [base + change.double() for change in changes]
    scales = [0.5, 2.0, 0.25]
    mean = sum(s * m for s, m in zip(scales, models, strict=True)) / sum(scales)
    torch.testing.assert_close(base + _merged("linear", changes, scales), mean)
    with pytest.raises(ValueError, match="sum to zero"):
        _merged("linear", changes, [1.0, -2.0, 1.0])


@pytest.mark.parametrize("density", [0.05, 0.3, 0.55, 1.0])
def test_ties_is_the_algorithm_of_the_paper(density: float) -> None:
    changes = _changes()
    count = max(1, int(density * changes[0].numel()))
    columns = [_trimmed(change, count) for change in changes]
    _close(_merged("ties", changes, SCALES, density=density), _ties(columns, SCALES))


@pytest.mark.parametrize("density", [0.05, 0.3, 1.0])
def test_mergekits_ties_divides_by_the_agreeing_scales(density: float) -> None:
    changes = _changes()
    count = max(1, int(density * changes[0].numel()))
    columns = [_trimmed(change, count) for change in changes]
    found = _merged("mergekit:ties", changes, SCALES, density=density)
    assert found.dtype == torch.float32
    _close(found, _mergekit_ties(columns, SCALES))


def test_equal_scales_cancel_in_mergekits_ties_and_not_in_the_papers() -> None:
    changes = _changes()
    ones = {n: _merged(n, changes, [1.0] * 3, density=0.4) for n in ("ties", "mergekit:ties")}
    halves = {n: _merged(n, changes, [0.5] * 3, density=0.4) for n in ("ties", "mergekit:ties")}
    torch.testing.assert_close(halves["ties"], 0.5 * ones["ties"])
    torch.testing.assert_close(halves["mergekit:ties"], ones["mergekit:ties"])
    torch.testing.assert_close(ones["ties"].float(), ones["mergekit:ties"])


def test_a_sum_of_zero_has_no_sign_in_the_paper_and_is_positive_in_mergekit() -> None:
    changes = [torch.tensor([0.25, 0.0]), torch.tensor([-0.25, 0.0])]
    assert _merged("ties", changes, [1.0, 1.0], density=1.0).tolist() == [0.0, 0.0]
    assert _merged("mergekit:ties", changes, [1.0, 1.0]).tolist() == [0.25, 0.0]


def test_of_equal_magnitudes_the_paper_keeps_all_and_mergekit_the_first() -> None:
    change = torch.tensor([0.5, -0.25, 0.25, -0.25, 0.125])
    assert _merged("ties", [change], [1.0], density=0.4).tolist() == [0.5, -0.25, 0.25, -0.25, 0.0]
    assert _merged("mergekit:ties", [change], [1.0], density=0.4).tolist() == [0.5, -0.25, 0, 0, 0]


@pytest.mark.parametrize("case", ["random", "ties", "zeros", "tiny", "one"])
def test_the_cut_is_where_sorting_puts_it(case: str) -> None:
    from tvlens.compose.merging import magnitude_cut

    vector = {
        "random": torch.randn(5000),
        "ties": torch.randint(-3, 4, (5000,)).float(),
        "zeros": torch.cat([torch.zeros(900), torch.randn(100)]),
        "tiny": torch.randn(3000) * 1e-40,  # subnormal
        "one": torch.tensor([-0.5]),
    }[case]
    ordered = vector.abs().sort(descending=True).values
    for count in sorted({1, len(vector) // 3 or 1, len(vector) - 1 or 1, len(vector)}):
        cut = magnitude_cut(lambda: iter(vector.split(617)), count)
        assert cut.value == float(ordered[count - 1])
        assert cut.equal == count - int((vector.abs() > cut.value).sum())


def test_dare_keeps_each_entry_with_its_probability_and_the_mean() -> None:
    ones = torch.ones(400, 500)
    found = _merged("dare", [ones], [1.0], density=0.1, seed=3)
    kept = found != 0
    assert float(kept.double().mean()) == pytest.approx(0.1, abs=4 * (0.09 / ones.numel()) ** 0.5)
    assert torch.equal(found[kept], torch.full_like(found[kept], float(np.float32(10.0))))
    again = _merged("dare", [ones], [1.0], density=0.1, seed=3)
    assert torch.equal(found, again)
    for other in ({"seed": 4}, {"seed": 3, "label": "elsewhere"}):
        assert not torch.equal(found, _merged("dare", [ones], [1.0], density=0.1, **other))
    two = _merged("dare", [ones, ones], [1.0, 1.0], density=0.1, seed=3)
    assert float((two == 20).double().mean()) == pytest.approx(0.01, abs=0.002)  # drawn apart


def test_mergekits_dare_keeps_the_sum_of_magnitudes() -> None:
    (change,) = _changes(1, shape=(40, 50))
    found = _merged("mergekit:dare_linear", [change], [1.0], density=0.3, seed=1)
    kept = found != 0
    assert float(found.abs().sum()) == pytest.approx(float(change.abs().sum()), rel=1e-6)
    factor = float(change.abs().sum() / change[kept].abs().sum())
    torch.testing.assert_close(found[kept], change[kept] * factor)
    elected = _merged("mergekit:dare_ties", [change, -2 * change], [1.0, 1.0], density=0.5, seed=1)
    plain = [
        _merged("mergekit:dare_linear", [c], [1.0], density=0.5, seed=1)
        for c in (change, -2 * change)
    ]
    del plain
    assert bool((elected.isfinite()).all())


@pytest.mark.parametrize("name", ["ties", "dare", "mergekit:ties", "mergekit:dare_linear"])
def test_a_change_may_be_cut_into_pieces_anywhere(name: str) -> None:
    from tvlens.compose.merging import METHODS, sparsifier

    (change,) = _changes(1, shape=(997,))
    change[::3] = change[0]  # equal magnitudes at the cut
    found = {}
    for size in (1, 64, 997):
        keep = sparsifier(
            METHODS[name],
            0.4,
            lambda size=size: iter(change.split(size)),
            count=398,
            seed=5,
            label="x",
        )
        found[size] = torch.cat([keep(piece) for piece in change.split(size)])
    assert torch.equal(found[1], found[997])
    assert torch.equal(found[64], found[997])
    assert 0 < int((found[997] != 0).sum()) < 997


def test_a_method_of_ones_own_is_a_value() -> None:
    from tvlens.compose.merging import Method, merged

    own = Method("mine", "trimmed by tensor, added", "", trim="tensor", density=0.5)
    change = torch.tensor([1.0, -2.0, 3.0, -4.0])
    assert merged([change], [2.0], own).tolist() == [0.0, 0.0, 6.0, -8.0]


@pytest.mark.parametrize("scales", [[], [float("nan")], [float("inf")]])
def test_scales_must_be_numbers(scales: list[float]) -> None:
    from tvlens.compose.merging import METHODS, effective_scales

    with pytest.raises(ValueError, match="at least one finite scale"):
        effective_scales(scales, METHODS["task"])
