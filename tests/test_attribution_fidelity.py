"""The agreement of estimates with exact patches: planted numbers, and a real sample."""

import numpy as np
import pytest
import torch
from scipy import stats

from . import attribution_pairs as pairs

pytestmark = pytest.mark.slow


def random_scores(components=12, prompts=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(components, prompts, generator=generator).double()


def agreement(estimate, exact, **how):
    from tvlens.attribution.fidelity import agreement as agree

    return agree(estimate, exact, **how)


def test_equal_scores_agree_perfectly():
    scores = random_scores()
    found = agreement(scores, scores)
    assert found.n == 12
    assert found.spearman == pytest.approx(1.0)
    assert found.spearman_worst == pytest.approx(1.0)
    assert found.slope == pytest.approx(1.0)
    assert found.sign_agreement == 1.0
    assert (found.ci_low, found.ci_high) == (pytest.approx(1.0), pytest.approx(1.0))
    assert found.passed is True


def test_a_wrong_sign_and_a_wrong_factor_do_not_pass():
    scores = random_scores()
    assert agreement(-scores, scores).spearman == pytest.approx(-1.0)
    assert agreement(-scores, scores).sign_agreement == 0.0
    assert agreement(-scores, scores).passed is False
    doubled = agreement(scores, 2 * scores)
    assert doubled.spearman == pytest.approx(1.0)
    assert doubled.slope == pytest.approx(2.0)
    assert doubled.passed is False


def test_the_slope_is_exact_per_estimate_and_rho_is_scipys():
    estimate = random_scores()
    exact = 1.2 * estimate + 0.5 * random_scores(seed=1)
    found = agreement(estimate, exact)
    x, y = estimate.mean(1).numpy(), exact.mean(1).numpy()
    assert found.slope == pytest.approx(np.linalg.lstsq(x[:, None], y, rcond=None)[0][0])
    assert found.spearman == pytest.approx(stats.spearmanr(x, y).statistic)
    worst = min(stats.spearmanr(estimate[:, i], exact[:, i]).statistic for i in range(5))
    assert found.spearman_worst == pytest.approx(worst)
    assert found.ci_low <= found.spearman <= found.ci_high


@pytest.mark.parametrize("count", [0, 1, 2])
def test_fewer_than_three_components_say_nothing(count):
    found = agreement(random_scores(count), random_scores(count))
    assert found.n == count
    assert found.spearman is None
    assert found.slope is None
    assert found.passed is None


def test_a_constant_says_nothing():
    found = agreement(random_scores(), torch.ones(12, 5).double())
    assert found.spearman is None
    assert found.ci_low is None
    assert found.passed is None


def test_components_that_are_only_noise_are_left_out():
    scores = random_scores()
    noise = 1e-6 * random_scores(40, seed=2)
    mixed = agreement(torch.cat([scores, noise]), torch.cat([scores, -noise]), noise=1e-4)
    assert mixed.n == 12
    assert mixed.spearman == pytest.approx(1.0)
    assert agreement(torch.cat([scores, noise]), torch.cat([scores, -noise])).spearman < 0.9


@pytest.mark.parametrize(
    ("insert", "remove", "ig", "said"),
    [
        (1.0, 1.0, 1.0, "both"),
        (1.0, 0.1, 1.0, "sufficient"),
        (0.1, 0.9, 1.0, "necessary"),
        (0.1, 0.1, 1.0, "redundant"),
        (-1.0, -1.0, 1.0, "redundant"),
        (-2.0, -0.1, -1.0, "sufficient"),
        (0.0, 1e-5, -1e-5, "none"),
    ],
)
def test_findings_say_what_a_component_does_alone(insert, remove, ig, said):
    from tvlens.attribution.findings import finding

    assert finding(insert, remove, ig) == said


def estimates(hooked, batch, metric):
    from tvlens.attribution.activations import attribute_activations
    from tvlens.attribution.weights import attribute_weights
    from tvlens.tables import concatenated

    how = (
        {"estimator": "ig", "at": "path"},
        {"estimator": "first_order", "at": "base"},
        {"estimator": "first_order", "at": "tuned"},
    )
    return concatenated(
        "attribution",
        [
            *(attribute_weights(hooked, batch, metric, **one) for one in how),
            *(
                attribute_activations(hooked, batch, metric, direction=direction)
                for direction in ("tuned_into_base", "base_into_tuned")
            ),
        ],
        order="score",
    )


@pytest.fixture(scope="module")
def checked():
    from tvlens.attribution.fidelity import check_fidelity
    from tvlens.models.metrics import SHIPPED

    hooked, batch = pairs.hooked_pair("llama"), pairs.batch(lengths=(5, 4, 6))
    table = estimates(hooked, batch, SHIPPED["logprob"])
    found = check_fidelity(hooked, batch, SHIPPED["logprob"], table, count=42)
    return table, *found


def test_every_estimate_of_a_small_fine_tune_passes_its_own_question(checked):
    _, _, fidelity = checked
    frame = fidelity.to_frame()
    pooled = frame[(frame["kind"] == "all") & (frame["stratum"] == "random")]
    assert set(zip(pooled["method"], pooled["direction"], strict=True)) == {
        ("weight_ig", "tuned_into_base"),
        ("weight_first_order_base", "tuned_into_base"),
        ("weight_first_order_tuned", "base_into_tuned"),
        ("cross_model_first_order", "tuned_into_base"),
        ("cross_model_first_order", "base_into_tuned"),
    }
    assert pooled["passed"].all()
    ig = pooled[pooled["method"] == "weight_ig"].iloc[0]
    assert ig["spearman"] > 0.99
    assert 0.97 < ig["slope"] < 1.03
    assert frame.loc[frame["stratum"] == "top", "passed"].isna().all()
    assert frame.loc[(frame["kind"] != "all") & (frame["n"] < 3), "spearman"].isna().all()


def test_estimates_of_the_wrong_sign_fail_the_check(checked):
    import pyarrow as pa

    from tvlens.attribution.fidelity import fidelity_table
    from tvlens.attribution.sampling import sampled_strata
    from tvlens.tables import Table

    table, exact, _ = checked
    scores = pa.array(-table.data["score"].to_numpy())
    place = table.data.schema.get_field_index("score")
    wrong = Table(table.name, table.data.set_column(place, "score", scores), table.order)
    strata = sampled_strata(table.where(method="weight_ig"), count=42)
    frame = fidelity_table(wrong, exact, strata).to_frame()
    assert len(frame) > 0
    assert not frame.loc[frame["stratum"] == "random", "passed"].fillna(False).any()


def test_sums_stand_beside_the_change_of_the_metric(checked):
    table, exact, fidelity = checked
    row = fidelity.where(method="weight_ig", kind="matrix", stratum="top").to_frame().iloc[0]
    frame = exact.where(method="exact_weight_insert", kind="matrix").to_frame()
    named = table.where(method="weight_ig", kind="matrix").to_frame()
    largest = named.assign(size=named["score"].abs()).groupby("component")["size"].mean()
    top = largest.sort_values(ascending=False).index[: int(row["n"])]
    wanted = frame[frame["component"].isin(top)].groupby("component")["score"].mean().sum()
    assert row["sum_insert"] == pytest.approx(wanted)
    change = named["gap"].groupby(named["prompt"]).first()
    total = table.where(method="weight_ig").to_frame()
    total = total[total["kind"].isin(["matrix", "norm", "bias", "embedding"])]
    per_prompt = total.groupby("prompt")["score"].sum() + change
    assert row["metric_change"] == pytest.approx(per_prompt.mean(), abs=1e-5)


def test_findings_hold_the_means_of_the_exact_sample(checked):
    from tvlens.attribution.findings import findings_table
    from tvlens.tables import concatenated

    table, exact, _ = checked
    frame = findings_table(concatenated("attribution", [table, exact])).to_frame()
    sample = exact.where(method="exact_weight_remove").to_frame()
    assert set(frame["component"]) == set(sample["component"])
    row = frame[frame["kind"] == "head"].iloc[0]
    rows = sample[sample["component"] == row["component"]]
    assert row["remove"] == pytest.approx(rows["score"].mean())
    assert frame["role"].isna().all()
    assert set(frame["finding"]) <= {"sufficient", "necessary", "both", "redundant", "none"}


def test_the_same_seed_draws_the_same_sample_and_another_seed_another(checked):
    from tvlens.attribution.sampling import sampled_strata

    table = checked[0].where(method="weight_ig")
    first, again = (sampled_strata(table, count=40, seed=1) for _ in range(2))
    assert first == again
    assert first["random"] != sampled_strata(table, count=40, seed=2)["random"]
    assert first["top"] == sampled_strata(table, count=40, seed=2)["top"]
    assert not set(first["top"]) & set(first["random"])
    assert sum(map(len, first.values())) == 40


def test_an_exact_average_at_few_nodes_is_held_against_the_estimate_at_the_same_nodes():
    """One node misses a sixth of a curved integral; the estimate at that node misses it too."""
    from tvlens.attribution.fidelity import check_fidelity, fidelity_table
    from tvlens.attribution.sampling import sampled_strata
    from tvlens.attribution.weights import attribute_weights
    from tvlens.models.metrics import SHIPPED

    hooked = pairs.hooked_pair("llama", lambda model: pairs.noised(model, scale=0.2))
    batch, metric = pairs.batch(), SHIPPED["logprob"]
    table = attribute_weights(hooked, batch, metric)
    exact, fidelity = check_fidelity(
        hooked, batch, metric, table, count=40, nodes=1, prompts=len(batch)
    )

    def slope(found):
        rows = found.to_frame()
        rows = rows[(rows["method"] == "weight_ig") & (rows["stratum"] == "random")]
        return float(rows[rows["kind"] == "all"]["slope"].iloc[0])

    strata = sampled_strata(table, count=40)
    at_other_nodes = slope(fidelity_table(table, exact, strata))
    assert abs(slope(fidelity) - 1) < 0.5 * abs(at_other_nodes - 1)
    assert abs(at_other_nodes - 1) > 0.1
    used = exact.where(method="exact_weight_path").to_frame()
    assert set(used["nodes"]) == {1}


def test_a_plan_spends_more_time_on_more_components_and_nodes():
    from tvlens.attribution.sampling import MOST, WANTED, Cost, affordable

    cost = Cost(whole=1.0, patched=0.5, activation_series=3)
    assert affordable(cost, seconds=1.0, nodes=8) == (0, 3)
    assert affordable(cost, seconds=1e6, nodes=12) == (MOST, 12)
    for nodes in (8, 5, 3):
        enough = cost.of(WANTED, nodes) + 0.25
        assert affordable(cost, seconds=enough, nodes=8) == (WANTED, nodes)


def test_the_cost_of_a_patch_is_that_of_a_pass_from_half_way_up():
    from tvlens.attribution.sampling import patching_cost
    from tvlens.models.metrics import SHIPPED

    hooked = pairs.hooked_pair("llama")
    cost = patching_cost(hooked, pairs.batch(), SHIPPED["logprob"], activation_series=2)
    assert 0 < cost.patched < 10
    assert 0 < cost.whole < 10
    # one component more: in and out, two passes at each of three nodes, one for each series
    assert cost.of(5, 3) - cost.of(4, 3) == pytest.approx((2 + 6 + 2) * cost.patched)


def test_with_no_time_at_all_a_few_of_every_kind_are_checked_on_a_few_prompts():
    from tvlens.attribution.fidelity import check_fidelity
    from tvlens.attribution.sampling import LEAST
    from tvlens.attribution.weights import attribute_weights
    from tvlens.models.metrics import SHIPPED

    hooked, batch = pairs.hooked_pair("gpt2"), pairs.batch(lengths=(4, 5, 6, 4, 5, 6))
    table = attribute_weights(hooked, batch, SHIPPED["logprob"])
    exact, fidelity = check_fidelity(hooked, batch, SHIPPED["logprob"], table, seconds=1e-6)
    frame = exact.to_frame()
    assert frame["component"].nunique() == LEAST
    assert frame["prompt"].nunique() == 4
    assert set(frame["kind"]) == {
        "matrix",
        "head",
        "kv_head",
        "neuron",
        "norm",
        "bias",
        "embedding",
    }
    assert set(fidelity.to_frame()["method"]) == {"weight_ig"}


def test_a_table_without_weight_scores_is_refused():
    from tvlens.attribution.activations import attribute_activations
    from tvlens.attribution.fidelity import check_fidelity
    from tvlens.errors import StudyError
    from tvlens.models.metrics import SHIPPED

    hooked, batch = pairs.hooked_pair("llama"), pairs.batch()
    table = attribute_activations(hooked, batch, SHIPPED["logprob"], direction="tuned_into_base")
    with pytest.raises(StudyError, match="weight space"):
        check_fidelity(hooked, batch, SHIPPED["logprob"], table, count=3)


def test_four_components_in_the_right_order_decide_nothing():
    from tvlens.attribution.fidelity import agreement

    exact = torch.arange(1.0, 6.0)[:, None].repeat(1, 3)
    assert agreement(exact, exact).passed is True
    assert agreement(exact[:4], exact[:4]).passed is None
    assert agreement(exact[:4], exact[:4]).spearman == pytest.approx(1)


def test_a_component_counts_once_in_the_series_it_was_drawn_for(checked):
    from tvlens.attribution.sampling import drawn_sizes
    from tvlens.attribution.series import group_of, keys

    estimates, _, fidelity = checked
    frame = estimates.to_frame()
    rows = frame[(frame["direction"] == "base_into_tuned") & (frame["prompt"] == 0)]
    rows = rows[rows["method"] == "cross_model_first_order"]
    groups = keys(rows).map(group_of).value_counts().to_dict()
    planned = drawn_sizes(groups, 42)
    found = fidelity.to_frame()
    found = found[(found["direction"] == "base_into_tuned") & (found["kind"] != "all")]
    found = found[found["method"] == "cross_model_first_order"]
    assert len(found) == 2 * len(planned)
    for row in found.itertuples():
        part = row.part if isinstance(row.part, str) else None
        assert row.n <= planned[row.kind, part][row.stratum == "random"], (row.kind, row.stratum)


def test_the_benchmark_calls_unchanged_only_what_is_zero_on_both_sides():
    from benchmarks.fidelity import compared

    nothing, something = torch.zeros(4, 3), random_scores(4, 3)
    unchanged = compared("a", "norm", "first order", nothing, nothing)
    assert unchanged.passed
    assert "unchanged" in unchanged.markdown()
    with np.errstate(invalid="ignore"):
        assert not compared("a", "norm", "first order", nothing, something).passed
    assert compared("a", "norm", "first order", something, something).passed
