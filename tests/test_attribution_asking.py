"""The public questions: one call each, what is chosen where nothing is said, and refusals."""

import numpy as np
import pytest
import torch

from . import attribution_pairs as pairs


@pytest.fixture(scope="module")
def hooked():
    return pairs.hooked_pair("llama")


@pytest.fixture(scope="module")
def batch():
    return pairs.batch(lengths=(9, 6))


def methods(table):
    frame = table.to_frame()
    return {tuple(row) for row in frame[["method", "direction", "at"]].drop_duplicates().to_numpy()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("said", "method", "at"),
    [
        ({}, "weight_ig", "path"),
        ({"estimator": "first_order"}, "weight_first_order_base", "base"),
        ({"at": "tuned"}, "weight_first_order_tuned", "tuned"),
        ({"direction": "base_into_tuned", "estimator": "first_order"},
         "weight_first_order_tuned", "tuned"),
    ],
)  # fmt: skip
def test_what_is_not_said_of_weights_is_chosen(hooked, batch, said, method, at):
    import tvlens as tv
    from tvlens.attribution.weights import attribute_weights
    from tvlens.models.metrics import SHIPPED

    found = tv.attribute(hooked, batch, "logprob", **said)
    assert {(m, a) for m, _, a in methods(found)} == {(method, at)}
    estimator = "ig" if at == "path" else "first_order"
    wanted = attribute_weights(hooked, batch, SHIPPED["logprob"], estimator=estimator, at=at)
    assert found.data.equals(wanted.data)


def test_what_is_not_said_of_activations_is_chosen(hooked, batch):
    import tvlens as tv
    from tvlens.attribution.activations import attribute_activations
    from tvlens.models.metrics import SHIPPED

    found = tv.attribute(hooked, batch, "logprob", space="activation", activations=("z",))
    wanted = attribute_activations(
        hooked, batch, SHIPPED["logprob"], direction="tuned_into_base", parts=("z",)
    )
    assert found.data.equals(wanted.data)
    joint = tv.attribute(hooked, batch, "logprob", space="activation", estimator="ig",
                         direction="base_into_tuned", activations=("z",))  # fmt: skip
    assert methods(joint) == {("cross_model_ig", "base_into_tuned", "tuned")}


@pytest.mark.parametrize(
    ("said", "match"),
    [
        ({"estimator": "ig", "at": "base"}, "weights have no ig"),
        (
            {"estimator": "first_order", "at": "tuned", "direction": "tuned_into_base"},
            "no first_order",
        ),
        ({"also": ("part",)}, "also: expected"),
        ({"space": "activation", "also": ("parts",)}, "activations have none"),
    ],
)
def test_what_does_not_go_together_is_refused(hooked, batch, said, match):
    import tvlens as tv

    with pytest.raises(ValueError, match=match):
        tv.attribute(hooked, batch, "logprob", **said)


def test_no_pair_and_no_metric_are_refused_with_the_way_out(hooked, batch):
    import tvlens as tv
    from tvlens.attribution.asking import asked_batch
    from tvlens.errors import HostError, MetricError

    with pytest.raises(HostError, match=r"tv\.HookedPair"):
        asked_batch(hooked.base, batch)
    with pytest.raises(MetricError, match="there is no metric"):
        tv.attribute(hooked, batch, "speed")
    unanswered = pairs.batch(lengths=(5,)).rows([0])
    unanswered.wrong_ids[0] = torch.tensor([], dtype=torch.long)
    with pytest.raises(MetricError, match="wrong"):
        tv.attribute(hooked, unanswered, "logit_diff")


def test_the_metric_is_chosen_by_what_token_ids_have(batch):
    from tvlens.attribution.asking import asked_metric
    from tvlens.models.prompts import Batch

    assert asked_metric(None, batch).name == "logit_diff"
    assert asked_metric(None, Batch.of_ids([[1, 2]], answers=[[3]])).name == "logprob"
    assert asked_metric(None, Batch.of_ids([[1, 2]])).name == "loss"


@pytest.mark.parametrize(
    ("at", "method"),
    [("", "exact_weight_path"), ("base", "exact_weight_insert"), ("tuned", "exact_weight_remove")],
)
def test_patching_weights_is_the_exact_counterpart(hooked, batch, at, method):
    import tvlens as tv
    from tvlens.attribution.exact import exact_weight_scores
    from tvlens.models.metrics import SHIPPED

    found = tv.patch(hooked, batch, "logprob", "L1H2,L0.W_out", at=at, nodes=2).to_frame()
    assert set(found["method"]) == {method}
    chosen = [pairs.component("matrix", 0, None, "W_out"), pairs.component("head", 1, 2, None)]
    assert set(found["component"]) == {str(c) for c in chosen}
    wanted = exact_weight_scores(hooked, batch, SHIPPED["logprob"], chosen, method=method, nodes=2)
    for component, values in zip(chosen, wanted, strict=True):
        rows = found[found["component"] == str(component)].sort_values("prompt")
        np.testing.assert_allclose(rows["score"], values)


def test_patching_activations_takes_names_and_expressions(hooked, batch):
    import tvlens as tv

    one = tv.patch(hooked, batch, "logprob", "L1H2", space="activation").to_frame()
    assert set(one["component"]) == {"L1H2.z"}
    named = tv.patch(hooked, batch, "logprob", "L1H2.q", space="activation").to_frame()
    assert set(named["component"]) == {"L1H2.q"}
    written = tv.patch(
        hooked, batch, "logprob", 'part == "mlp_out" and layer == 1', space="activation"
    ).to_frame()
    assert set(written["component"]) == {"L1.mlp_out"}
    given = [pairs.component("head", 1, 2, "z")]
    same = tv.patch(hooked, batch, "logprob", given, space="activation").to_frame()
    np.testing.assert_allclose(same["score"], one["score"])


def test_a_selection_that_names_nothing_is_refused(hooked, batch):
    import tvlens as tv
    from tvlens.errors import SelectionError

    with pytest.raises(SelectionError, match="L9H9"):
        tv.patch(hooked, batch, "logprob", "L9H9,L1H2")
    with pytest.raises(SelectionError, match="activation space"):
        tv.patch(hooked, batch, "logprob", 'part == "W_Q"', space="activation")


def test_grafting_chooses_on_one_split_and_judges_on_the_other(hooked, monkeypatch):
    """What a graft finds is tested where it is made; here, what it is asked."""
    import tvlens as tv
    from tvlens.attribution import asking
    from tvlens.errors import PromptError
    from tvlens.models.prompts import Prompt, PromptSet
    from tvlens.tables import Table

    splits = ("choose", "judge", "judge", "choose")
    prompts = PromptSet(tuple(Prompt("p", answer="a", split=split) for split in splits))
    batch = pairs.batch().rows([3, 1, 2])  # the first prompt was left out
    seen = []
    monkeypatch.setattr(asking, "asked_batch", lambda hooked, prompts: batch)
    monkeypatch.setattr(asking, "gated_weight_scores", lambda *asked: "scores")
    empty = Table.of("grafts", asking.grafting.GRAFTS_SCHEMA, {})

    def found(*asked, **how):
        seen.append((asked, how))
        return asking.grafting.Graft(empty, empty, {})

    monkeypatch.setattr(asking.grafting, "graft", found)
    tv.graft(hooked, prompts, "logprob", keep=0.5, seed=3)
    (gated, rows, metric, scores), how = seen[0]
    assert gated.lens is hooked.base
    assert (rows, metric.name, scores) == (batch, "logprob", "scores")
    assert how == {"choose": [0], "judge": [1, 2], "keep": 0.5, "seed": 3,
                   "names": ("base", "tuned")}  # fmt: skip
    with pytest.raises(PromptError, match="no splits"):
        tv.graft(hooked, batch)


def test_the_public_calls_have_docstrings_with_examples_arguments_and_errors():
    import tvlens as tv

    for name in ("attribute", "patch", "graft"):
        text = getattr(tv, name).__doc__
        for section in (f"tv.{name}(", "Args:", "Raises:"):
            assert section in text, (name, section)
