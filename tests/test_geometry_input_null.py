"""The covariance-matched null: its moments against draws, its p-values against planted updates."""

from functools import cache

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from torch import Tensor

from tests.geometry_pairs import FakeLayout, FakePair, FakeWeight
from tvlens.components import Component

LAYOUT = FakeLayout(n_heads=4, n_kv_heads=2, d_model=48, d_head=12, d_mlp=96, n_layers=1)
READERS = {"W_Q": 48, "W_K": 24, "W_V": 24, "W_gate": 96, "W_in": 96}


def normal(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def rotation(d: int, *, seed: int) -> Tensor:
    """Uniform over rotations and reflections."""
    q, r = torch.linalg.qr(normal(d, d, seed=seed))
    return q * r.diagonal().sign()


def stretched(d: int, *, seed: int, condition: float = 300.0) -> Tensor:
    """A second moment with eigenvalues that fall by ``condition``, in random directions."""
    values = torch.logspace(0, -np.log10(condition), d, dtype=torch.float64)
    turn = rotation(d, seed=seed)
    return (turn * values) @ turn.T


class Known:
    """Moments by part, as ``tvlens.covariances`` gives them."""

    def __init__(self, moments: dict[str, Tensor]) -> None:
        self.moments = moments

    def of(self, component: Component) -> Tensor | None:
        return self.moments.get(component.part or "")


@cache
def moments() -> dict[str, Tensor]:
    stream = stretched(48, seed=1)
    return {
        **dict.fromkeys(READERS, stream),
        "W_O": stretched(48, seed=2),
        "W_out": stretched(96, seed=3),
    }


@cache
def bases() -> dict[str, Tensor]:
    """Weights whose reads lie where the inputs do, as those of trained models."""
    shapes = {**{part: (48, width) for part, width in READERS.items()}, "W_O": (48, 48)}
    shapes["W_out"] = (96, 48)
    found = {}
    for number, (part, shape) in enumerate(shapes.items()):
        root = torch.linalg.cholesky(moments()[part])
        found[part] = (root @ normal(*shape, seed=10 + number)).float()
    return found


def pair_of(changes: dict[str, Tensor]) -> FakePair:
    weights = {}
    for part, base in bases().items():
        component = Component("matrix", 0, None, part)
        delta = changes.get(part, torch.zeros_like(base))
        delta = delta if not isinstance(delta, Tensor) else delta.float()
        floor = None if not isinstance(delta, Tensor) else torch.full_like(base, 1e-20)
        weights[component] = FakeWeight(component, base, delta, floor)
    return FakePair(weights, LAYOUT)


def from_inputs(part: str, *, seed: int, mix: Tensor | None = None) -> Tensor:
    """One draw of the null; ``mix`` [out, out] shapes what is written, which must not matter."""
    base = bases()[part]
    root = torch.linalg.cholesky(moments()[part])
    drawn = root @ normal(*base.shape, seed=seed)
    drawn = drawn if mix is None else drawn @ mix
    return drawn * (0.01 * base.double().norm() / drawn.norm())


def rows_of(pairs: list[FakePair]) -> pd.DataFrame:
    """All rows of tests against both nulls, of several changes of one base."""
    from tvlens.geometry.blocks import Ask, findings_of_block

    known = Known(moments())
    asks = [Ask(pair, pair.components, seed=3, covariances=known) for pair in pairs]
    return pd.concat([found.evidence.tests for found in findings_of_block(asks)])


# --- the moments --------------------------------------------------------------------------------


def test_the_moments_of_a_form_are_those_of_many_rotations() -> None:
    from tvlens.geometry.input_null import Form, InputMoment, form_moments, tested_form
    from tvlens.geometry.input_null import _power_sums as power_sums

    d, draws = 6, 30_000
    inputs = InputMoment.of(stretched(d, seed=1, condition=20))
    directions, weights, rest = rotation(d, seed=2)[:, :2], torch.tensor([2.0, 1.0]).double(), 0.3
    change = normal(d, 2, seed=4)
    found = form_moments(inputs, Form(directions, weights, rest))
    whole = (directions * weights) @ directions.T + rest * torch.eye(d, dtype=torch.float64)
    assert float(found.expected) == pytest.approx(
        float((inputs.moment @ whole).trace() / inputs.moment.trace())
    )
    apart = whole - float(found.expected) * torch.eye(d, dtype=torch.float64)
    whitened = torch.linalg.inv(inputs.root) @ change
    turns = torch.linalg.qr(normal(draws, d, d, seed=5))
    turns = turns.Q * turns.R.diagonal(dim1=1, dim2=2).sign()[:, None, :]
    drawn = inputs.root @ turns @ whitened
    values = torch.einsum("nij,ik,nkj->n", drawn, apart, drawn).numpy()
    square, cube = (float(x) for x in power_sums(whitened))
    variance = 2 * float(found.square) * square / ((d - 1) * (d + 2))
    third = 8 * d * float(found.cube) * cube / ((d - 2) * (d - 1) * (d + 2) * (d + 4))
    error = values.std() / draws**0.5
    assert abs(values.mean()) < 4 * error
    assert values.var() == pytest.approx(variance, rel=0.04)
    assert (values**3).mean() == pytest.approx(third, rel=0.12)
    assert abs(third) > 0.5 * variance**1.5  # skewed enough to be seen
    total = change.square().sum().reshape(1)
    for quantile in (0.05, 0.95):  # the two tails differ
        value = found.expected + float(np.quantile(values, quantile)) / total
        p_value = tested_form(value, total, found, whitened).p_value[0]
        assert p_value == pytest.approx(0.1, abs=0.025)


@pytest.mark.parametrize("width", [3, 9])
def test_the_spread_of_a_gain_is_that_of_many_rotations(width: int) -> None:
    from tvlens.geometry.input_null import InputMoment, gain_test

    d, draws = 6, 4_000
    inputs = InputMoment.of(stretched(d, seed=1, condition=20))
    base, change = normal(d, width, seed=2), normal(d, width, seed=3)
    whitened = inputs.whitened(change)
    lengths = float(base.norm() * change.norm())
    test = gain_test(inputs.root.T @ base, whitened, 0.1, lengths=lengths)
    drawn = [
        float((base * (inputs.root @ rotation(d, seed=n) @ whitened)).sum()) / lengths
        for n in range(draws)
    ]
    assert test.spread[0] == pytest.approx(np.std(drawn), rel=0.05)
    assert test.p_value[0] == pytest.approx(2 * stats.norm.sf(0.1 / test.spread[0]))


@pytest.mark.parametrize("values", [(1.0, 1.0, 1.0, 1.0), (4.0, 1.0), (9.0, 1.0, 0.2, 0.01)])
def test_shares_of_a_direction_are_those_of_gaussian_draws(values: tuple[float, ...]) -> None:
    from tvlens.geometry.input_null import direction_shares

    found = direction_shares(np.array(values))
    drawn = normal(200_000, len(values), seed=1).numpy() ** 2 * np.array(values)
    oracle = (drawn / drawn.sum(1, keepdims=True)).mean(0)
    assert found.sum() == pytest.approx(1, abs=1e-8)
    assert found == pytest.approx(oracle, abs=3e-3)
    if len(values) == 2:  # known in closed form
        assert found[0] == pytest.approx(2 / 3, abs=1e-8)


def test_shares_of_a_wide_direction_sum_to_one() -> None:
    from tvlens.geometry.input_null import direction_shares

    for values in (np.logspace(0, -6, 4096), np.array([1e4] + [1.0] * 575)):
        assert direction_shares(values).sum() == pytest.approx(1, abs=1e-6)


def test_the_scale_of_the_inputs_does_not_matter_and_white_ones_expect_nothing() -> None:
    from tvlens.geometry.input_null import Form, InputMoment, form_moments, tested_form

    change, directions = normal(8, 5, seed=1), rotation(8, seed=2)
    weights = torch.linspace(1, -1, 8, dtype=torch.float64)
    value = ((directions.T @ change).square().sum(1) * weights).sum() / change.square().sum()
    form, total = Form(directions, weights), change.square().sum().reshape(1)
    found = []
    for scale in (1.0, 50.0):
        inputs = InputMoment.of(scale * stretched(8, seed=3))
        moments_ = form_moments(inputs, form)
        found.append(tested_form(value.reshape(1), total, moments_, inputs.whitened(change)))
    assert found[0].effect == pytest.approx(found[1].effect)
    assert found[0].p_value == pytest.approx(found[1].p_value)
    white = InputMoment.of(torch.eye(8))
    assert float(form_moments(white, form).expected) == pytest.approx(0, abs=1e-12)


def test_a_moment_without_energy_in_some_direction_is_refused() -> None:
    from tvlens.errors import StudyError
    from tvlens.geometry.input_null import InputMoment

    with pytest.raises(StudyError, match=r"not positive definite.*tvlens\.covariances"):
        InputMoment.of(torch.diag(torch.tensor([1.0, 0.0, 2.0])))


# --- calibration --------------------------------------------------------------------------------


DRAWS = 150


@cache
def matrices() -> dict[str, object]:
    """What the null needs of every base."""
    from tvlens.geometry.input_null import InputMoment, MatrixInputs
    from tvlens.geometry.matrices import spectral_basis

    return {
        part: MatrixInputs(InputMoment.of(moments()[part]), base, spectral_basis(base))
        for part, base in bases().items()
    }


def drawn_changes(part: str) -> list[Tensor]:
    """Draws of the null, every other one with few directions that are written."""
    width = bases()[part].shape[1]
    skewed = [torch.logspace(0, -2, width, dtype=torch.float64), None]
    return [
        from_inputs(part, seed=97 * number + len(part) + ord(part[-1]), mix=_mix(skewed, number))
        for number in range(DRAWS)
    ]


def _mix(scales: list[Tensor | None], number: int) -> Tensor | None:
    scale = scales[number % 2]
    return None if scale is None else normal(len(scale), len(scale), seed=number) * scale


@cache
def matrix_tests() -> dict[str, pd.DataFrame]:
    """Gains of four matrices and reads of three under draws of the null."""
    from tvlens.geometry.input_null import gain_test
    from tvlens.geometry.matrices import seen, side_alignment

    found: dict[str, list[pd.DataFrame]] = {"kappa": [], "g_read": []}
    for part in ("W_Q", "W_gate", "W_O", "W_out", "W_K"):
        known = matrices()[part]
        rows, columns = known.base.shape
        for change in drawn_changes(part):
            whitened, seen_ = known.inputs.whitened(change), seen(known.basis, change)
            lengths = float(change.norm() * known.base.double().norm())
            cosine = float((change * known.base).sum()) / lengths
            if part != "W_K":
                test = gain_test(known.pushed, whitened, cosine, lengths=lengths)
                found["kappa"].append(_frame(test))
            if part in READERS:
                sides = side_alignment(known.basis, seen_, d_read=rows, d_write=columns)
                test = known.alignment_test(seen_, sides.g_read, whitened)
                found["g_read"].append(_frame(test))
    return {name: pd.concat(frames) for name, frames in found.items()}


def _frame(test) -> pd.DataFrame:
    half = 1.96 * test.spread
    columns = {"p_value": test.p_value, "ci_low": test.effect - half, "ci_high": test.effect + half}
    return pd.DataFrame(columns)


def head_tests() -> pd.DataFrame:
    from tvlens.geometry.head_evidence import HeadChanges
    from tvlens.geometry.heads import Factor, coordinates, slices_of_heads
    from tvlens.geometry.input_evidence import head_rows

    base = slices_of_heads(bases()["W_Q"].double(), "W_Q", 4)
    keys = {name: values * 4 for name, values in _keys(Component("head", 0, 0, "QK")).items()}
    frames, group = [], torch.arange(4)
    for change in drawn_changes("W_Q"):
        factor = Factor(base, slices_of_heads(change, "W_Q", 4))
        own = coordinates(factor)
        spans = (torch.linalg.qr(base).Q,) * 2
        heads = HeadChanges("QK", factor, factor.swapped, own, own, spans, group, torch.arange(12))
        frames += map(pd.DataFrame, head_rows(keys, heads, matrices()["W_Q"].inputs))
    return pd.concat(frames)


def neuron_tests() -> pd.DataFrame:
    from tvlens.geometry.input_null import neuron_gain_test

    found = []
    for part in ("W_gate", "W_in"):
        known = matrices()[part]
        for change in drawn_changes(part)[:20]:
            cosine = torch.nn.functional.cosine_similarity(change, known.base.double(), dim=0)
            found.append(_frame(neuron_gain_test(known.inputs, known.base.T, cosine)))
    return pd.concat(found)


def _keys(component: Component) -> dict[str, list[object]]:
    from tvlens.components import key_columns

    return {**key_columns([component]), "tied": [False]}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kappa", "g_read", "heads", "neurons"])
def test_an_update_drawn_from_the_null_is_rejected_as_often_as_stated(name: str) -> None:
    made = {"heads": head_tests, "neurons": neuron_tests}
    rows = made[name]() if name in made else matrix_tests()[name]
    assert len(rows) >= 450
    for level, low, high in ((0.05, 0.02, 0.07), (0.5, 0.44, 0.56)):
        share = float((rows["p_value"] < level).mean())
        print(name, level, len(rows), share)
        assert low <= share <= high
    inside = ((rows["ci_low"] <= 0) & (rows["ci_high"] >= 0)).mean()
    assert 0.93 <= inside <= 0.98


@pytest.mark.slow
def test_an_isotropic_null_would_call_the_same_updates_findings() -> None:
    pairs = [pair_of({p: from_inputs(p, seed=n) for p in READERS}) for n in range(3)]
    rows = rows_of(pairs)
    reads = rows[(rows["statistic"] == "g_rel_of_spikes") & (rows["side"] == "read")]
    assert len(reads) >= 12
    assert (reads["p_value"] < 0.05).mean() > 0.5
    assert reads["effect"].mean() > 0.2


def _row(rows: pd.DataFrame, part: str, null: str, statistic: str) -> pd.Series:
    found = rows[(rows["part"] == part) & (rows["null"] == null) & (rows["kind"] == "matrix")]
    (place,) = np.flatnonzero(found["statistic"] == statistic)
    return found.iloc[place]


def _sized(part: str, change: Tensor, relative: float = 0.02) -> Tensor:
    return change * (relative * bases()[part].double().norm() / change.norm())


@pytest.mark.slow
@pytest.mark.parametrize("part", ["W_gate", "W_Q"])
def test_reads_away_from_the_inputs_are_found_where_random_reads_would_look_alike(
    part: str,
) -> None:
    """Reads of the middle directions: of average alignment, and beside what inputs explain new."""
    from tvlens.geometry.matrices import spectral_basis

    basis = spectral_basis(bases()[part])
    rank = int(basis.rank)
    middle = basis.read[:, rank // 2 - rank // 8 : rank // 2 + rank // 8]
    change = middle @ normal(middle.shape[1], bases()[part].shape[1], seed=6)
    rows = rows_of([pair_of({part: _sized(part, change)})])
    assert _row(rows, part, "isotropic", "g_rel_of_spikes")["p_value"] > 0.05
    found = _row(rows, part, "covariance_matched", "g_read")
    assert found["effect"] < 0
    assert found["p_value"] < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_gain_is_found_with_its_sign_in_matrices_and_reading_neurons(sign: float) -> None:
    changes = {part: sign * 0.02 * base.double() for part, base in bases().items()}
    rows = rows_of([pair_of(changes)])
    rows = rows[rows["null"] == "covariance_matched"]
    for part in bases():
        found = _row(rows, part, "covariance_matched", "kappa")
        assert found["effect"] == pytest.approx(sign)
        assert found["p_value"] < 1e-8
    neurons = rows[rows["kind"] == "neuron"]
    assert set(neurons["part"]) == {"W_gate", "W_in"}
    assert neurons["effect"].to_numpy() == pytest.approx(sign)
    assert (neurons["p_value"] < 0.05).mean() > 0.9


def test_reads_in_a_heads_own_space_are_found_beyond_what_the_inputs_share() -> None:
    base = bases()["W_Q"].unflatten(1, (4, 12))
    change = from_inputs("W_Q", seed=501).unflatten(1, (4, 12))
    own = base[:, 2].double() @ normal(12, 12, seed=2)
    change[:, 2] = own * (change[:, 2].norm() / own.norm())
    rows = rows_of([pair_of({"W_Q": change.flatten(1)})])
    found = rows[(rows["part"] == "QK") & (rows["null"] == "covariance_matched")]
    found = found.set_index("index")
    assert found["k"].tolist() == [12] * 4
    assert found.loc[2, "effect"] > 0.2
    assert found.loc[2, "p_value"] < 1e-6
    assert (found["p_value"].drop(2) > 0.01).all()


@pytest.mark.slow
def test_a_change_in_factors_gets_the_rows_of_its_product() -> None:
    from tvlens.weights.delta import LowRank

    factored, dense = {}, {}
    for number, (part, base) in enumerate(bases().items()):
        left, right = normal(base.shape[0], 3, seed=number), normal(3, base.shape[1], seed=90)
        factored[part] = LowRank((0.01 * left).float(), right.float())
        dense[part] = factored[part].dense()
    found = [rows_of([pair_of(changes)]) for changes in (factored, dense)]
    found = [rows[rows["null"] == "covariance_matched"].reset_index(drop=True) for rows in found]
    assert len(found[0]) == 7 + 5 + 2 * 4 + 2 * 96
    for column in ("effect", "ci_low", "p_value"):
        one, other = (rows[column].to_numpy(float) for rows in found)
        assert one == pytest.approx(other, rel=1e-3, abs=1e-6)


# --- in the tables ------------------------------------------------------------------------------


@pytest.mark.slow
def test_labels_stay_and_tests_have_the_rows_of_the_null_with_their_q_values() -> None:
    from tvlens.geometry import classify, decompose

    changes = {part: from_inputs(part, seed=number) for number, part in enumerate(bases())}
    pair = pair_of(changes)
    weights = decompose(pair)
    plain = classify(pair, weights)
    found = classify(pair, weights, covariances=Known(moments()))
    assert found.labels.data.equals(plain.labels.data)
    rows = found.tests.to_frame()
    added = rows[rows["null"] == "covariance_matched"]
    others = rows[rows["null"] != "covariance_matched"].reset_index(drop=True)
    pd.testing.assert_frame_equal(others, plain.tests.to_frame())
    assert not rows.duplicated(["component", "side", "statistic", "null"]).any()
    counted = added.groupby(["kind", "statistic"]).size().to_dict()
    assert counted == {
        ("head", "share_in_own_space"): 8,
        ("matrix", "g_read"): 5,
        ("matrix", "kappa"): 7,
        ("neuron", "gain"): 192,
    }
    assert (added["q_value"] >= added["p_value"] - 1e-15).all()
    assert set(added.loc[added["kind"] == "neuron", "m"]) == {96}


@pytest.mark.slow
def test_an_input_that_is_not_known_leaves_its_matrices_without_rows() -> None:
    from tvlens.geometry import classify, decompose

    pair = pair_of({part: from_inputs(part, seed=5) for part in bases()})
    some = Known({part: moments()[part] for part in ("W_Q", "W_K", "W_V")})
    rows = classify(pair, decompose(pair), covariances=some).tests.to_frame()
    added = rows[rows["null"] == "covariance_matched"]
    assert set(added["part"]) == {"W_Q", "W_K", "W_V", "OV", "QK"}


def test_covariances_of_another_model_are_refused() -> None:
    from tvlens.errors import StudyError
    from tvlens.geometry import classify, decompose

    pair = pair_of({"W_Q": from_inputs("W_Q", seed=5)})
    other = Known({"W_Q": torch.eye(32)})
    with pytest.raises(StudyError, match=r"hold 32 inputs of L0\.W_Q, which reads 48"):
        classify(pair, decompose(pair), covariances=other)
