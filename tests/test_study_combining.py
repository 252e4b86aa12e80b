"""Combined vectors: models edited by hand, planted losses with and without interaction."""

from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch

from tests.planned_tables import assert_rows
from tvlens.errors import PromptError, SelectionError, StudyError
from tvlens.study.plan import StudyPlan

from . import attribution_pairs as pairs
from . import combined_models as planted

pytestmark = pytest.mark.slow

TASKS = """
- {name: medical, kind: loss, file: "demo:med", limit: 12, domain: med}
- {name: maths, kind: loss, file: "demo:math", limit: 12, domain: math}
- {name: general, kind: loss, file: "demo:gen", limit: 12}
- {name: distance, kind: kl, file: "demo:med", limit: 4, metric: kl_to_tuned, domain: med}
"""


def plan(folder, **given):
    (folder / "tasks.yaml").write_text(TASKS)
    asked = {"base": "demo:base", "tuned": ("demo:med", "demo:math"), "stages": ("combine",)}
    asked |= {"tasks": str(folder / "tasks.yaml"), "grid": "0,1", "chat": "off", "draws": 1}
    return StudyPlan.model_validate(asked | given)


# ---- points


def test_a_grid_holds_the_base_and_every_combination_of_doses():
    from tvlens.study.combination_points import grid

    points = [point.scales for point in grid((0.5, 1.0), 2)]
    assert points[0] == (0.0, 0.0)
    assert points[1] == (0.0, 0.5)  # the last vector's dose is fastest
    assert len(points) == len(set(points)) == 9


def test_a_stand_in_goes_with_the_dose_of_what_it_stands_for():
    from tvlens.study.combination_points import Point, StandIn, grid, points_with, stand_ins

    stand = StandIn(1, "random", 0)
    point = Point((0.5, 1.0), stand)
    assert point.acting == (0, 1)
    assert point.only((1,)) == Point((0.0, 1.0), stand)
    assert point.without(1) == Point((0.5, 0.0))  # the real point: nothing stands in any more
    assert point.only(()) == Point((0.0, 0.0))
    assert point.name(("a", "b")) == "0.5 a + 1 random 1 (for b)"
    assert Point((0.0, 1.0)).name(("a", "b"), method="ties") == "ties(1 b)"
    assert Point((0.0, 0.0)).name(("a", "b"), base="start", method="ties") == "start"
    stands = list(stand_ins(2, 2, ["ctl"]))
    assert len(stands) == 6
    assert len(points_with(grid((0.5, 1.0), 2), stand)) == 6  # dose of the second not 0


# ---- models


def logits(model, batch=None):
    batch = batch or pairs.batch()
    with torch.no_grad():
        return model.logits_at(batch.ids, batch.mask, batch.reading_positions)


def by_hand(edit):
    """Logits of a model whose weights ``edit`` makes of those of base and fine-tunes."""
    from tvlens.models.lens import LensModel

    base, tuned = noised_models()
    named = [dict(model.named_parameters()) for model in tuned]
    with torch.no_grad():
        for name, weight in base.named_parameters():
            weight.copy_(edit(weight.clone(), *(own[name] for own in named)))
    return logits(LensModel.of(base))


def noised_models():
    first, second = (lambda model, s=seed: pairs.noised(model, seed=s) for seed in (1, 2))
    return planted.models(first, second)


@pytest.fixture(scope="module")
def noised():
    base, tuned = noised_models()
    return planted.combining(base, tuned)


def bits(lens):
    return {name: tensor.clone() for name, tensor in lens.model.state_dict().items()}


def assert_close(found, wanted):
    """Within 1e-4 of the largest logit."""
    assert float((found - wanted).abs().max()) <= 1e-4 * float(wanted.abs().max())


@pytest.mark.parametrize("scales", [(0.0, 1.0), (0.5, 1.0), (1.0, 1.0), (-0.5, 2.0)])
def test_a_point_is_the_base_plus_the_scaled_vectors(noised, scales):
    a, b = scales
    wanted = by_hand(lambda base, one, two: base + a * (one - base) + b * (two - base))
    with noised.combined(noised.stack, scales) as lens:
        assert_close(logits(lens), wanted)


def test_no_dose_is_the_base_bit_for_bit_and_the_model_is_left_as_found(noised):
    from tvlens.models.lens import LensModel

    before = bits(noised.lens)
    base, _ = noised_models()
    with noised.combined(noised.stack, (0.0, 0.0)) as lens:
        assert torch.equal(logits(lens), logits(LensModel.of(base)))
    with pytest.raises(RuntimeError, match="stop"), noised.combined(noised.stack, (1.0, 0.5)):
        raise RuntimeError("stop")
    after = bits(noised.lens)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_another_method_is_that_of_merging_by_its_name():
    """The weighted mean of the fine-tuned models; the sum with a trimmed vector for ties."""
    base, tuned = noised_models()
    run = planted.combining(base, tuned, method="linear")
    wanted = by_hand(lambda base, one, two: (1.5 * one + 0.5 * two) / 2)
    with run.combined(run.stack, (1.5, 0.5)) as lens:
        assert_close(logits(lens), wanted)
    ties = planted.combining(base, tuned, method="ties", density=1.0)
    wanted = by_hand(_elected)
    with ties.combined(ties.stack, (1.0, 1.0)) as lens:
        assert_close(logits(lens), wanted)


def _elected(base, one, two):
    a, b = one - base, two - base
    sign = (a + b).sign()
    agree = [(x.sign() == sign) & (x != 0) for x in (a, b)]
    total = a * agree[0] + b * agree[1]
    return base + total / (agree[0].int() + agree[1].int()).clamp(min=1)


def test_a_selected_part_alone_is_added():
    base, tuned = noised_models()
    run = planted.combining(base, tuned, select='part == "W_out"')
    wanted = by_hand_of("down_proj")
    with run.combined(run.stack, (1.0, 1.0)) as lens:
        assert_close(logits(lens), wanted)


def by_hand_of(part):
    from tvlens.models.lens import LensModel

    base, tuned = noised_models()
    named = [dict(model.named_parameters()) for model in tuned]
    with torch.no_grad():
        for name, weight in base.named_parameters():
            if f"{part}.weight" in name:
                weight.copy_(sum(own[name] for own in named) - weight)
    return logits(LensModel.of(base))


def test_what_stands_in_is_as_long_as_what_it_stands_for(noised):
    import tvlens
    from tvlens.study.combination_points import StandIn
    from tvlens.weights.vector import tuning_vector

    own = noised.stack
    stack = noised._with(own, StandIn(1, "random", 0), {})
    assert stack.vectors[0] is own.vectors[0]
    for component, delta in own.vectors[1].items():
        assert stack.vectors[1][component].norm() == pytest.approx(delta.norm(), rel=1e-5)
        assert abs(float((stack.vectors[1][component].dense() * delta.dense()).sum())) < 0.9 * (
            delta.norm() ** 2
        )
    other = noised._with(own, StandIn(1, "random", 1), {})
    mine = stack.vectors[1].cosine(other.vectors[1])
    assert abs(mine) < 0.1  # another draw is another vector
    base, tuned = planted.models(lambda model: pairs.noised(model, seed=7, scale=0.005))
    control = tvlens.load_pair(base, tuned[0], names=("base", "ctl"))
    stack = noised._with(own, StandIn(0, "ctl"), {"ctl": control})
    assert stack.vectors[0].norm() == pytest.approx(own.vectors[0].norm(), rel=1e-5)
    assert stack.vectors[0].cosine(tuning_vector(control)) == pytest.approx(1.0, abs=1e-6)


def test_vectors_of_different_vocabularies_are_refused(noised, monkeypatch):
    from tvlens.errors import IncomparableModelsError
    from tvlens.models import pair as models_pair
    from tvlens.models.pair import CommonTokens
    from tvlens.study.combining import _editable

    sizes = {"one": 40, "two": 38}
    monkeypatch.setattr(
        models_pair, "common_tokens_of", lambda p: CommonTokens(sizes[p.tuned_name], {}, ())
    )
    with pytest.raises(IncomparableModelsError, match="different vocabularies"):
        _editable(noised.pairs, "cpu")


# ---- planted truths on models


def learnt(model):
    """A step down the loss of the first texts, of every weight."""
    batch = planted.texts(1, 15)
    wanted = batch.ids.clone()
    wanted[:, :5] = -100
    loss = model(batch.ids, labels=wanted).loss
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.sub_(0.05 * parameter.grad)
                parameter.grad = None


def unlearnt(model):
    """The same step the other way."""
    base = {name: parameter.clone() for name, parameter in model.named_parameters()}
    learnt(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(2 * base[name] - parameter)


def measured_grid(first, second, **given):
    """Two vectors and two domains, one of tokens 1 to 14 and one of tokens 20 to 33."""
    base, tuned = planted.models(first, second)
    tasks = [
        planted.ready_texts("first", "one", planted.texts(1, 15)),
        planted.ready_texts("second", "two", planted.texts(20, 34, seed=6)),
    ]
    run = planted.combining(base, tuned, tasks, **given)
    return run, run.all(), [one.task for one in tasks]


def test_vectors_that_meet_nowhere_do_not_interact():
    """Embedding rows that no text of the other domain reads: effects add up, nothing falls."""
    from tvlens.study.combination_samples import Samples, interaction
    from tvlens.study.combination_tables import _value
    from tvlens.study.disturbances import whole_rows

    rows = planted.embedding_rows
    _, found, tasks = measured_grid(rows(1, 15), rows(20, 34, seed=2))
    samples = Samples(tasks, 0, found.models)
    for task in tasks:
        effects = [
            abs(_loss(samples, found, task, (a, b)) - _loss(samples, found, task, (0.0, 0.0)))
            for a, b in ((1.0, 0.0), (0.0, 1.0))
        ]
        assert max(effects) > 0.01  # one of them matters to these texts
        assert min(effects) < 1e-6
        for point in found.combinations:
            value = partial(_value, found, samples, task, "loss", "all")
            whole = interaction(point, value).interval
            assert max(map(abs, whole[:3])) < 1e-6
    falls = [row for row in whole_rows(found, tasks, samples) if row["by"] is None]
    assert len(falls) == 8  # two domains, four points with both
    assert max(abs(row["fall"]) for row in falls) < 1e-6
    assert max(abs(row["beyond"]) for row in falls) > 1e-3  # a random vector is not so lucky


def _loss(samples, found, task, scales):
    from tvlens.study.combination_points import Point

    return samples.of(found.points[Point(scales)], task, "loss").value


def test_a_vector_that_takes_back_another_makes_its_domain_fall_by_what_it_had_gained():
    from tvlens.study.combination_points import Point
    from tvlens.study.combination_samples import Samples
    from tvlens.study.combination_tables import combination_tables
    from tvlens.study.disturbances import whole_rows

    run, found, tasks = measured_grid(learnt, unlearnt)
    samples = Samples(tasks, 0, found.models)
    base, one, two = (
        _loss(samples, found, tasks[0], s) for s in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0))
    )
    assert one < base - 0.01
    (row,) = [
        row
        for row in whole_rows(found, tasks, samples)
        if row["by"] is None and row["tuned"] == "one" and row["scales"] == [1.0, 1.0]
    ]
    assert row["fall"] == pytest.approx(base - one, abs=1e-5)  # worse, so positive
    assert row["ci_low"] <= row["fall"] <= row["ci_high"]
    tables, _ = combination_tables(run.plan, found, tasks)
    frame = tables[0].to_frame()
    at = frame[(frame["model"] == "1 one + 1 two") & (frame["task"] == "first")]
    at = at[(at["measure"] == "loss") & (at["split"] == "all")].iloc[0]
    assert at["interaction"] == pytest.approx(2 * base - one - two, abs=1e-5)
    assert at["difference"] == pytest.approx(0.0, abs=1e-5)
    assert at["over_single"] == pytest.approx(base - one, abs=1e-5)
    assert at["single"] == "one"
    assert found.points[Point((1.0, 0.0))].items == found.alone["one"].items


def test_a_part_is_measured_as_that_part_by_hand():
    """W_out of one layer of the second vector, on the base with all of the first."""
    from tvlens.evaluation.suite import Variant, measured, values_of
    from tvlens.models.lens import LensModel
    from tvlens.study.disturbances import disturbances

    run, found, tasks = measured_grid(pairs.noised, lambda model: pairs.noised(model, seed=9))
    before = bits(run.lens)
    made = disturbances(run, found, tasks)
    after = bits(run.lens)
    assert all(torch.equal(before[name], after[name]) for name in before)
    frame = {table.name: table for table in made.tables}["disturbance"].to_frame()
    parts = frame[frame["level"] == "part"]
    assert parts.groupby(["tuned", "added"]).size().to_dict() == {
        ("one", "two"): 14,
        ("two", "one"): 14,
    }
    base, tuned = planted.models(pairs.noised, lambda model: pairs.noised(model, seed=9))
    losses = []
    name = "model.layers.1.mlp.down_proj.weight"
    for added in (False, True):
        model = pairs.hf_model("llama", tied=False)
        pairs.noised(model)
        with torch.no_grad():
            change = dict(tuned[1].named_parameters())[name] - dict(base.named_parameters())[name]
            dict(model.named_parameters())[name].add_(change * added)
        items = measured(Variant("m"), LensModel.of(model), run.tasks).items["first"]
        losses.append(values_of(items, "loss").values.mean())
    row = parts[(parts["tuned"] == "one") & (parts["component"] == "L1.W_out")].iloc[0]
    assert row["fall"] == pytest.approx(losses[1] - losses[0], abs=2e-6)
    assert abs(row["fall"]) > 1e-5
    change = dict(tuned[1].named_parameters())[name] - dict(base.named_parameters())[name]
    assert row["norm_added"] == pytest.approx(float(change.detach().norm()), rel=1e-5)
    ranks = {table.name: table for table in made.tables}["interference_ranks"].to_frame()
    assert (ranks["n"] == 14).all()
    predicted = {table.name: table for table in made.tables}["interference"].to_frame()
    assert set(predicted["base"]) == {"base"}
    layers = planted.combining(base, tuned, run.tasks, places="layer")
    frame = disturbances(layers, found, tasks).tables[0].to_frame()
    assert set(frame.loc[frame["level"] == "part", "component"]) == {"L0", "L1"}
    none = planted.combining(base, tuned, run.tasks, places="none")
    assert (disturbances(none, found, tasks).tables[0].to_frame()["level"] == "whole").all()


# ---- planted losses


def additive(task, point, split):
    return 3.0 - 0.4 * point.scales[0] + 0.3 * point.scales[1]


@pytest.mark.parametrize("crossed", [0.0, 0.2, -0.2])
def test_the_interaction_is_what_was_planted_with_its_sign(crossed):
    from tvlens.study.combination_tables import combination_tables

    def value(task, point, split):
        return additive(task, point, split) + crossed * point.scales[0] * point.scales[1]

    tasks = [planted.loss_task("t", "one")]
    found = planted.planted(tasks, value)
    table, _ = combination_tables(StudyPlan(base="b", tuned=("one", "two")), found, tasks)
    frame = table[0].to_frame()
    frame = frame[(frame["measure"] == "loss") & frame["by"].isna()]
    both = frame[frame["acting"] == 2]
    wanted = [crossed * s[0] * s[1] for s in both["scales"]]
    assert both["interaction"].to_numpy() == pytest.approx(wanted, abs=1e-9)
    assert both["interaction_low"].to_numpy() == pytest.approx(wanted, abs=1e-9)
    assert frame.loc[frame["acting"] < 2, "interaction"].isna().all()
    wanted = [value("t", _point(s), "") - 3.0 for s in frame["scales"]]
    assert frame["difference"].to_numpy() == pytest.approx(wanted, abs=1e-9)


def _point(scales):
    from tvlens.study.combination_points import Point

    return Point(tuple(scales))


def test_what_is_chosen_on_some_items_is_reported_on_the_others():
    """On ``choose`` the point (1, 1) is best by far, on ``judge`` it is the worst."""
    from tvlens.study.combination_gains import gains_table
    from tvlens.study.combination_tables import combination_tables

    def value(task, point, split):
        both = point.scales[0] * point.scales[1] if point.stand_in is None else 0.0
        return 3.0 + (both if split == "judge" else -both)

    tasks = [planted.loss_task("t")]
    found = planted.planted(tasks, value)
    asked = StudyPlan(base="b", tuned=("one", "two"))
    tables, facts = combination_tables(asked, found, tasks)
    best = facts["tasks"]["t"]["best_combination"]
    assert best["scales"] == [1.0, 1.0]
    assert best["value"] == pytest.approx(4.0, abs=0.05)
    assert facts["tasks"]["t"]["best"]["scales"] == [1.0, 1.0]
    frame = tables[0].to_frame()
    at = frame[(frame["model"] == "1 one + 1 two") & (frame["measure"] == "loss")]
    of = at.set_index("split")
    assert list(of.index) == ["all", "choose", "judge"]
    assert of["value"].to_numpy() == pytest.approx([3.0, 2.0, 4.0], abs=0.05)
    assert of["n"].tolist() == [12, 6, 6]
    gains = gains_table(asked, found, tasks).to_frame()
    assert set(gains["model"]) == {"1 one + 1 two"}
    assert gains["gain"].to_numpy() == pytest.approx(-1.0, abs=1e-9)
    assert (gains["n"] == 6).all()
    items = tables[1].to_frame()
    assert set(items["split"]) == {"choose", "judge"}


def test_items_that_a_model_lacks_are_left_out_of_all():
    from tvlens.evaluation.suite import Measured
    from tvlens.study.combination_points import Point
    from tvlens.study.combination_samples import Samples, difference

    tasks = [planted.loss_task("t")]
    found = planted.planted(tasks, additive)
    one, other = (found.points[Point(s)] for s in ((0.0, 0.0), (1.0, 1.0)))
    short = Measured(one.variant, {"t": one.items["t"][2:]})
    samples = Samples(tasks, 0, [short, other])
    found = difference(*(samples.of(m, tasks[0], "loss") for m in (other, short)))
    assert found.value == pytest.approx(-0.1, abs=1e-9)
    assert found.items.tolist() == list(range(2, 12))


def test_a_gain_is_over_everything_that_could_explain_it():
    from tvlens.study.combination_gains import MEAN, gains_table

    def value(task, point, split):
        """Each vector serves its own task; on the third only (1, 0.5) is better."""
        a, b = point.scales
        stand = point.stand_in
        if task == "elsewhere":
            return 3.0 - (1.0 if (a, b) == (1.0, 0.5) and stand is None else 0.0)
        own = a if task == "first" else b
        stood = stand is not None and stand.which == ("first", "second").index(task)
        return 3.0 - (0.0 if stood else own) - (0.25 if stand and stand.by == "ctl" else 0.0)

    tasks = [
        planted.loss_task("first", "one"),
        planted.loss_task("second", "two"),
        planted.loss_task("elsewhere", "ctl"),
    ]
    found = planted.planted(tasks, value, draws=2, controls=("ctl",))
    frame = gains_table(StudyPlan(base="b", tuned=("one", "two")), found, tasks).to_frame()
    away = frame[frame["task"] == "elsewhere"]
    assert set(away["scope"]) == {"elsewhere"}
    assert away["scales"].map(list).tolist() == [[1.0, 0.5]] * len(away)
    assert away.groupby("kind").size().to_dict() == {
        "base": 1,
        "fine-tune": 2,
        "alone": 2,
        "random": 4,
    }  # the task is the control's, so that it says nothing here
    assert away["gain"].to_numpy() == pytest.approx(1.0, abs=1e-9)
    mean = frame[frame["task"] == MEAN].set_index("over")["gain"]
    assert mean["base"] == pytest.approx(1.0, abs=1e-9)
    assert mean["one"] == pytest.approx(0.5, abs=1e-9)
    assert mean["1 one + 1 random 2 (for two)"] == pytest.approx(0.5, abs=1e-9)
    assert mean["1 one + 1 ctl (for two)"] == pytest.approx(0.25, abs=1e-9)


def test_a_vector_alone_is_compared_at_its_own_best_dose():
    from tvlens.study.combination_gains import gains_table

    def value(task, point, split):
        return 3.0 - (0.8 if point.scales == (0.5, 0.0) else 0.0)

    tasks = [planted.loss_task("t")]
    found = planted.planted(tasks, value)
    frame = gains_table(StudyPlan(base="b", tuned=("one", "two")), found, tasks).to_frame()
    alone = frame[frame["kind"] == "alone"].set_index("over")["gain"]
    assert alone["0.5 one"] == pytest.approx(-0.8, abs=1e-9)


def test_tasks_that_say_nothing_of_generalisation_are_left_out():
    from tvlens.evaluation.tasks import Task, TaskSpec
    from tvlens.study.combination_gains import gains_table, targets

    odd = TaskSpec(name="odd", kind="generation", file="x", metric="rep_4")
    tasks = [planted.loss_task("first", "one"), Task(odd, {}), planted.loss_task("away")]
    assert [one.name for one in targets(tasks, ("one", "two"))] == ["away"]
    other = [*tasks, planted.loss_task("second", "two", metric="bits_per_byte")]
    assert [one.name for one in targets(other, ("one", "two"))] == ["away"]
    only = [planted.loss_task("away", split="judge")]
    found = planted.planted(only, additive)
    frame = gains_table(StudyPlan(base="b", tuned=("one", "two")), found, only).to_frame()
    assert len(frame) == 1
    assert frame["over"].isna().all()


def test_falls_are_worse_when_positive_and_stand_beside_random_ones():
    from tvlens.study.combination_samples import Samples
    from tvlens.study.disturbances import whole_rows

    def value(task, point, split):
        """Adding the second vector costs the first's domain 0.6, a random one 0.2."""
        a, b = point.scales
        stand = point.stand_in
        cost = 0.2 if stand is not None and stand.which == 1 else 0.6
        return 3.0 - a + cost * b

    tasks = [planted.loss_task("first", "one"), planted.loss_task("away")]
    found = planted.planted(tasks, value)
    rows = list(whole_rows(found, tasks, Samples(tasks, 0, found.models)))
    at = [row for row in rows if row["scales"] == [1.0, 1.0]]
    assert {row["task"] for row in rows} == {"first"}
    assert {(row["by"], row["added"]) for row in at} == {(None, "two"), ("random", "two")}
    real = next(row for row in at if row["by"] is None)
    assert real["fall"] == pytest.approx(0.6, abs=1e-9)
    assert real["beyond"] == pytest.approx(0.4, abs=1e-9)
    assert next(row for row in at if row["by"])["fall"] == pytest.approx(0.2, abs=1e-9)


# ---- does prediction rank with what is measured?


def part_rows(falls, predicted):
    from tvlens.study.disturbances import PREDICTORS

    named = {"base": "b", "tuned": "one", "added": "two", "task": "t", "measure": "loss"}
    return [
        {**named, **dict.fromkeys(PREDICTORS, p), "fall": f}
        for f, p in zip(falls, predicted, strict=True)
    ]


@pytest.mark.parametrize(
    ("sign", "verdict"), [(1, "ranks alike"), (-1, "ranks the other way round")]
)
def test_predictions_that_rank_like_what_is_measured_are_said_to(sign, verdict):
    from tvlens.study.disturbances import rank_rows

    noise = np.random.default_rng(0).normal(0, 0.5, 20)
    rows = list(rank_rows(part_rows(sign * np.arange(20.0), np.arange(20.0) + noise), "matrix"))
    assert {row["verdict"] for row in rows} == {verdict}
    assert rows[0]["spearman"] * sign > 0.9
    assert rows[0]["ci_low"] <= rows[0]["spearman"] <= rows[0]["ci_high"]
    assert rows[0]["p_value"] == pytest.approx(1 / 2001)
    assert "over 20 matrices" in rows[0]["sentence"]


def test_too_few_parts_or_no_relation_cannot_be_told():
    from tvlens.study.disturbances import rank_rows

    (row, *_) = rank_rows(part_rows(np.arange(7.0), np.arange(7.0)), "layer")
    assert row["verdict"] == "cannot tell"
    assert row["sentence"].endswith("cannot tell: 7 layers.")
    rng = np.random.default_rng(1)
    (row, *_) = rank_rows(part_rows(rng.normal(size=40), rng.normal(size=40)), "matrix")
    assert row["verdict"] == "cannot tell"
    assert row["p_value"] > 0.05
    assert list(rank_rows([], "none")) == []


def test_predictions_of_a_layer_are_pooled_by_length():
    from tvlens.study.disturbances import parts_of

    same = {"kind": "matrix", "layer": 0, "tuned": "a", "other": "b", "norm_b": 2.0}
    names = ("conflict_entries", "overlap_read", "overlap_write", "sti_relative")
    frame = pd.DataFrame(
        [
            {**same, "component": "L0.W_Q", "part": "W_Q", "norm_a": 1.0, "sign_conflict": 0.2},
            {**same, "component": "L0.W_O", "part": "W_O", "norm_a": 3.0, "sign_conflict": 0.6},
        ]
    ).assign(sti=[1.0, 2.0], **dict.fromkeys(names, 0.5))
    (layer,) = parts_of(frame, "a", "b", "layer")
    assert layer.predicted["sign_conflict"] == pytest.approx((0.2 + 3 * 0.6) / 4)
    assert layer.predicted["sti"] == 3.0
    assert layer.predicted["norm_added"] == pytest.approx(8**0.5)  # b is what is added
    (other,) = parts_of(frame, "b", "a", "layer")
    assert other.predicted["norm_added"] == pytest.approx(10**0.5)
    assert [part.name for part in parts_of(frame, "a", "b", "matrix")] == ["L0.W_Q", "L0.W_O"]
    assert parts_of(frame, "a", "c", "matrix") == []
    assert parts_of(frame, "a", "b", "none") == []


# ---- verdicts

GOOD = {"base": (0.5, 0.4, 0.6), "fine-tune": (0.3, 0.2, 0.4), "alone": (0.03, 0.01, 0.1)}
GOOD |= {"random": (0.3, 0.2, 0.4)}


@pytest.mark.parametrize(
    ("changed", "verdict", "why"),
    [
        ({}, "supported", "better than the base, each vector alone"),
        ({"random": (0.0, -0.02, 0.02)}, "not supported", "0.05 better than random"),
        ({"base": (-0.5, -0.6, -0.4)}, "not supported", "0.05 better than base"),
        ({"alone": (0.0, -0.1, 0.04)}, "not supported", "0.05 better than alone"),
        ({"fine-tune": (0.3, -0.1, 0.7)}, "cannot tell", "not surely better than fine-tune"),
        ({"fine-tune": (0.04, 0.01, 0.07)}, "cannot tell", "better than fine-tune, by less"),
        ({"random": None}, "cannot tell", "nothing stood in a vector's place"),
        ({"base": (-0.5, -0.6, -0.4), "random": None}, "not supported", "better than base"),
        ({"control": (0.2, float("nan"), float("nan"))}, "cannot tell", "better than control"),
    ],
)
def test_a_verdict_follows_from_the_intervals(changed, verdict, why):
    from tvlens.study.combination_claims import CombinedGain, judged_combination

    kinds = {kind: ends for kind, ends in (GOOD | changed).items() if ends is not None}
    found = judged_combination([CombinedGain(k, k, *e) for k, e in kinds.items()], "nats/token")
    assert found["verdict"] == verdict
    assert why in found["why"]
    assert (found["value"], found["ci_low"], found["ci_high"]) == kinds["base"]
    least = min((ends for kind, ends in kinds.items() if kind != "base"), key=lambda e: e[0])
    assert found["control_value"] == least[0]


def test_a_table_of_gains_has_a_verdict_for_each_of_its_targets():
    from tvlens.study.combination_claims import combined_rows

    shared = {"measure": "loss", "unit": "nats/token", "model": "1 a + 1 b"}
    rows = [
        {**shared, "scope": "elsewhere", "task": "away", "kind": k, "over": k}
        | dict(zip(("gain", "ci_low", "ci_high"), ends, strict=True))
        for k, ends in GOOD.items()
    ]
    rows.append({**shared, "scope": "domains", "task": "mean over domains", "model": None})
    found = list(combined_rows(pd.DataFrame(rows)))
    assert [(row["task"], row["verdict"]) for row in found] == [
        ("away", "supported"),
        ("mean over domains", "cannot tell"),
    ]
    assert found[0]["tuned"] == "1 a + 1 b"
    assert found[1]["why"] == "a task lacks items of choose or of judge"


# ---- plans


@pytest.mark.parametrize(
    ("given", "error", "sentence"),
    [
        ({"tuned": ("demo:med",)}, StudyError, "needs two fine-tunes"),
        ({"tasks": None}, StudyError, "needs tasks"),
        ({"grid": "0"}, StudyError, "nothing but 0"),
        ({"grid": "0:1:0.01", "draws": 9}, StudyError, "models, more than 5,000"),
        ({"method": "magic"}, StudyError, "no merge method 'magic'"),
        ({"method": "linear", "grid": "-1,1"}, StudyError, "sum to zero"),
        ({"parent": "demo:ctl"}, StudyError, "--parent has no place here"),
        ({"select": "layr == 3"}, SelectionError, "no column 'layr'"),
        ({"tasks": "gone.yaml"}, PromptError, "cannot read the tasks"),
        ({"tuned_names": ("a", "b")}, StudyError, "distance asks for the distance to the tuned"),
    ],
)
def test_what_combining_would_refuse_is_found_before_models_are_read(
    tmp_path, given, error, sentence
):
    from tvlens.study.combining import check_combine

    with pytest.raises(error, match=sentence):
        check_combine(plan(tmp_path, **given))


def test_the_command_of_a_combination_is_read_back_as_that_plan(tmp_path, monkeypatch):
    import shlex

    from tvlens import cli
    from tvlens.cli import comparing

    asked = {"method": "ties", "density": 0.5, "select": "L0H1", "controls": ("demo:ctl",)}
    asked |= {"grid": "0:1:0.25", "draws": 2, "places": "layer", "seed": 4}
    wanted, made = plan(tmp_path, **asked), []
    assert wanted.command.startswith("tvlens combine demo:base demo:med demo:math")
    assert "--scales 0:1:0.25" in wanted.command
    monkeypatch.setattr(comparing, "_show", lambda plan, out, **how: made.append(plan))
    cli.app(shlex.split(wanted.command)[1:], standalone_mode=False)
    assert made == [wanted]


def test_domains_that_name_nothing_are_named():
    from tvlens.study.combining import _domain_warnings

    asked = StudyPlan(base="b", tuned=("x/med", "x/math"), controls=("x/ctl",))
    tasks = [planted.loss_task("a", "med"), planted.loss_task("b", "ctl")]
    assert _domain_warnings(asked, tasks) == []
    (warning,) = _domain_warnings(asked, [*tasks, planted.loss_task("c", "mde")])
    assert "'mde'" in warning


# ---- the whole study


@pytest.fixture(scope="module")
def combined(tmp_path_factory):
    from tvlens.study.runner import run_study

    folder = tmp_path_factory.mktemp("combined")
    return run_study(plan(folder, controls=("demo:ctl",)), folder / "study")


@pytest.mark.slow
def test_a_study_holds_the_grid_with_what_stands_in(combined):
    frame = combined.table("combinations").to_frame()
    losses = frame[(frame["measure"] == "loss") & (frame["split"] == "all")]
    value = losses.set_index(["task", "model"])["value"]
    of_base = combined.load_report["pairs"][0]["base_name"]
    assert value["medical", "1 med"] < value["medical", of_base] - 0.3
    assert value["maths", "1 math"] < value["maths", of_base] - 0.3
    assert value["medical", "1 med + 1 math"] > value["medical", "1 med"]
    assert set(frame.loc[frame["by"].notna(), "by"]) == {"random", "ctl"}
    assert len(frame["model"].unique()) == 4 + 2 * 2 * 2
    distances = frame[frame["measure"] == "kl_to_tuned"].set_index(["model", "split"])["value"]
    assert distances["1 med", "all"] == pytest.approx(0.0, abs=1e-6)
    items = combined.table("combination_items").to_frame()
    one = items[(items["model"] == "med") & (items["task"] == "medical")]
    assert one[one["measure"] == "loss"]["value"].mean() == pytest.approx(value["medical", "1 med"])


@pytest.mark.slow
def test_a_study_has_falls_ranks_and_verdicts(combined):
    falls = combined.table("disturbance").to_frame()
    whole = falls[(falls["level"] == "whole") & falls["by"].isna()]
    assert (whole["fall"] > 0).all()  # each disturbs the other's domain
    assert len(falls[falls["level"] == "part"]) == 2 * 56
    ranks = combined.table("interference_ranks").to_frame()
    assert set(ranks["task"]) == {"medical", "maths"}
    rows = [
        row
        for row in combined.table("verdicts").data.to_pylist()
        if row["claim"].startswith("combining")
    ]
    assert [row["task"] for row in rows] == ["general", "mean over domains"]
    assert all(row["verdict"] in ("supported", "not supported", "cannot tell") for row in rows)
    names = {row["claim"] for row in combined.table("verdicts").data.to_pylist()}
    assert len(names) == 5


@pytest.mark.slow
def test_the_report_draws_the_grid_and_says_what_it_shows(combined):
    page = (combined.folder / "report.html").read_text("utf-8")
    assert 'id="combined"' in page
    assert 'id="combined-0"' in page
    assert "Measured interference" in page
    assert "Does prediction rank with what is measured?" in page
    facts = combined.manifest["facts"]["math"]["combine"]
    assert any(text.startswith("Adding math to med") for text in facts["sentences"])


def test_the_rows_of_a_combination_are_those_that_were_planned(combined):
    decided = {"disturbance", "interference", "interference_ranks"}
    found = assert_rows(combined, "combine", bounded=decided)["tables"]
    made = combined.table("disturbance").to_frame()
    assert found["disturbance"]["at_least"] == (made["level"] == "whole").sum()
    for name in decided:  # both fine-tunes of the demo changed every matrix
        assert found[name]["at_most"] == len(combined.table(name)), name


def test_every_model_that_a_combination_runs_was_planned(tmp_path):
    from tvlens.evaluation.suite import ready
    from tvlens.evaluation.tasks import load_tasks
    from tvlens.models.pair import tokenizer_in
    from tvlens.study.stages import STAGES
    from tvlens.study.task_counts import combine_runs
    from tvlens.weights.matching import load_pair

    few = tmp_path / "few.yaml"
    few.write_text("- {name: medical, kind: loss, file: 'demo:med', limit: 2, domain: med}\n")
    asked = plan(tmp_path, tasks=str(few), grid="0.5,1", places="layer")
    pairs = [load_pair("demo:base", spec, names=("base", spec[5:])) for spec in asked.tuned]
    lines = []
    list(STAGES["combine"](asked, pairs, lines.append))
    tasks = ready(load_tasks(few), tokenizer_in([pairs[0].base.folder]))
    models = [line for line in lines if line.startswith("tasks: ")]
    layers, before = 8, 1
    assert combine_runs(pairs[0], asked, tasks) == (len(models), layers + before)
    assert any("8 parts of math" in line for line in lines)


def test_points_and_falls_of_three_vectors_are_counted_as_they_are_measured():
    from tvlens.study.combination_points import Point, StandIn
    from tvlens.study.disturbances import added_at
    from tvlens.study.task_counts import combined_points

    asked = StudyPlan(base="b", tuned=("one", "two", "three"), grid="0,1", draws=2, controls=("c",))
    assert len(combined_points(asked)) == 8 + 3 * 3 * 4
    assert added_at(Point((1.0, 1.0, 0.0)), 0) == [1]
    assert added_at(Point((0.0, 1.0, 1.0)), 0) == []
    assert added_at(Point((1.0, 1.0, 1.0), StandIn(2, "random", 0)), 0) == [2]
