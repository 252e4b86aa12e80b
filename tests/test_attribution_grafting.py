"""Grafting on planted pairs, and every weight with one owner."""

import pytest
import torch

from . import attribution_pairs as pairs

PLANTED = pairs.planted_components()

pytestmark = pytest.mark.slow


def logprob():
    from tvlens.models.metrics import SHIPPED

    return SHIPPED["logprob"]


def prompts():
    return pairs.planted_prompts()


def planted_pair():
    from tvlens.models.lens import LensModel, _bridge
    from tvlens.models.pair import HookedPair

    return HookedPair.of(*(LensModel.wrap(_bridge(m, "llama")) for m in pairs.planted_models()))


@pytest.fixture(scope="module")
def grafted():
    from tvlens.attribution.gates import GatedModel
    from tvlens.attribution.grafting import graft
    from tvlens.attribution.weights import weight_scores

    hooked, batch = planted_pair(), prompts()
    scores = weight_scores(hooked, batch, logprob())
    return graft(
        GatedModel.of_pair(hooked),
        batch,
        logprob(),
        scores,
        choose=range(0, 16, 2),
        judge=range(1, 16, 2),
        keep=0.9,
    )


@pytest.mark.parametrize("question", ["restored", "destroyed"])
def test_the_smallest_set_is_what_was_planted(grafted, question):
    from tvlens.attribution.series import keys

    frame = grafted.sets.to_frame()
    assert set(keys(frame[frame["curve"] == question])) == set(PLANTED)
    facts = grafted.facts["graft"][question]
    assert facts["size"] == 3
    assert facts["judged"] == pytest.approx(1.0, abs=0.1)
    assert facts["ci_low"] <= facts["judged"] <= facts["ci_high"]


@pytest.mark.parametrize("question", ["restored", "destroyed"])
def test_sets_by_length_and_at_random_do_not_carry_it(grafted, question):
    facts = grafted.facts["graft"][question]
    assert max(facts["by_delta_norm"], *facts["random"]) < 0.8
    assert "better than" in facts["sentence"]
    assert "not surely" not in facts["sentence"]
    frame = grafted.curves.to_frame()
    longest = frame[(frame["ranked_by"] == "delta_norm") & (frame["k"] == 1)]
    assert (longest["share_of_norm"] > 0.5).all()  # the unused rows of the embedding
    assert longest["value"].abs().max() < 0.1


def test_all_components_together_are_the_tuned_model(grafted):
    frame = grafted.curves.to_frame()
    whole = frame[(frame["k"] == frame["of"]) & (frame["ranked_by"] == "score")]
    assert len(whole) == 4
    assert whole["value"].tolist() == pytest.approx([1.0] * 4, abs=1e-4)
    assert whole["share_of_norm"].tolist() == pytest.approx([1.0] * 4)


def test_random_sets_have_the_length_and_the_kinds_of_the_set_they_stand_beside(grafted):
    frame = grafted.curves.to_frame()
    drawn = frame[(frame["ranked_by"] == "random") & (frame["scale"] < 99)]
    mine = frame[frame["ranked_by"] == "score"].groupby("k")["share_of_norm"].first()
    wanted = mine.loc[drawn["k"]].to_numpy()
    assert set(drawn["k"]) >= {64}
    assert (drawn["share_of_norm"] * drawn["scale"]).to_numpy() == pytest.approx(wanted)


@pytest.mark.parametrize("family", ["llama", "gpt2", "neox"])
def test_every_weight_has_one_owner(family):
    from tvlens.attribution.gates import GatedModel
    from tvlens.attribution.partition import partition

    hooked = pairs.hooked_pair(family)
    gated = GatedModel.of_pair(hooked)
    parts = partition(gated)
    total = sum(delta.norm() ** 2 for delta in gated.deltas.values())
    assert float(parts.norms.pow(2).sum()) == pytest.approx(total, rel=1e-9)
    assert {c.kind for c in parts.components} >= {"head", "kv_head", "neuron", "norm", "embedding"}
    assert not [c for c in parts.components if c.kind == "matrix"]
    ones = torch.zeros(len(parts.components))
    place = parts.components.index(pairs.component("neuron", 0, 3, None))
    ones[place] = 1.0
    wanted = gated.gates(2)
    gated.set(wanted, parts.components[place], 1.0)
    found = parts.gates(ones, 2)
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_lengths_of_factors_are_those_of_their_product():
    from tvlens.attribution.partition import _squares
    from tvlens.attribution.sites import weight_sites
    from tvlens.weights.delta import Dense, LowRank

    sites = {s.name: s for s in weight_sites(pairs.hooked_pair("llama").base)}
    for name, shape, count in (
        ("blocks.0.attn.q", (32, 32), 4),
        ("blocks.0.mlp.out", (24, 32), 24),
    ):
        factors = LowRank(torch.randn(shape[0], 3), torch.randn(3, shape[1]))
        whole = _squares(Dense(factors.dense()), sites[name], "weight", count)
        torch.testing.assert_close(
            _squares(factors, sites[name], "weight", count), whole, rtol=1e-5, atol=1e-6
        )


def test_a_metric_that_does_not_move_and_an_empty_split_are_refused():
    from tvlens.attribution.gates import GatedModel
    from tvlens.attribution.grafting import graft
    from tvlens.attribution.weights import weight_scores
    from tvlens.errors import PromptError, StudyError

    hooked, batch = pairs.hooked_pair("llama", lambda model: None), pairs.batch()
    scores = weight_scores(hooked, batch, logprob(), estimator="first_order", at="base")
    gated = GatedModel.of_pair(hooked)
    with pytest.raises(StudyError, match="nothing to restore"):
        graft(gated, batch, logprob(), scores, choose=[0, 1], judge=[2, 3])
    with pytest.raises(PromptError, match="empty"):
        graft(gated, batch, logprob(), scores, choose=[0, 1], judge=[])


def test_a_set_that_is_never_enough_is_said_so():
    from tvlens.attribution.grafting import Interval, _facts

    found = _facts("restored", None, 0.9, [], 2, Interval(1.0, 0.5, 1.5))
    assert found["size"] is None
    assert "no number" in found["sentence"]
    found = _facts("restored", 1, 0.9, [], 2, Interval(1.0, -0.5, 1.5))
    assert found["sentence"].startswith("cannot tell")
