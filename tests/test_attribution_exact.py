"""Exact weight patches against models built by hand, and as the oracle of the estimates."""

import copy

import pytest
import torch

from . import attribution_pairs as pairs


def logprob():
    from tvlens.models.metrics import SHIPPED

    return SHIPPED["logprob"]


def exact(hooked, batch, components, method, **how):
    from tvlens.attribution.exact import exact_weight_scores

    name = f"exact_weight_{method}"
    return exact_weight_scores(hooked, batch, logprob(), components, method=name, **how)


def value(model, batch):
    """The metric of a Hugging Face model that never saw a hook."""
    from tvlens.models.metrics import Run

    with torch.no_grad():
        return logprob()(Run(model(batch.ids, attention_mask=batch.mask).logits), batch).double()


def llama_slices(model, index):
    """Head, kv head and neuron ``index`` of layer 1 as views of a Hugging Face Llama."""
    layer, d = model.model.layers[1], slice(8 * index, 8 * index + 8)
    attention, mlp = layer.self_attn, layer.mlp
    return {
        "head": [
            attention.q_proj.weight[d],
            attention.q_proj.bias[d],
            attention.o_proj.weight[:, d],
        ],
        "kv_head": [
            attention.k_proj.weight[d],
            attention.k_proj.bias[d],
            attention.v_proj.weight[d],
            attention.v_proj.bias[d],
        ],
        "neuron": [
            mlp.gate_proj.weight[index],
            mlp.up_proj.weight[index],
            mlp.down_proj.weight[:, index],
        ],
        "norm": [layer.input_layernorm.weight],
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["head", "kv_head", "neuron", "norm"])
def test_insert_and_remove_equal_models_edited_by_hand(kind):
    base, tuned, batch = pairs.hf_model("llama"), pairs.hf_model("llama"), pairs.batch()
    pairs.noised(tuned, scale=0.2)
    inserted, removed = copy.deepcopy(base), copy.deepcopy(tuned)
    with torch.no_grad():
        for edited, donor in ((inserted, tuned), (removed, base)):
            for here, there in zip(
                *(llama_slices(m, 1)[kind] for m in (edited, donor)), strict=True
            ):
                here.copy_(there)
    hooked = pairs.hooked_pair("llama", lambda model: pairs.noised(model, scale=0.2))
    part, index = ("ln1.w", None) if kind == "norm" else (None, 1)
    component = pairs.component(kind, 1, index, part)
    # 1e-5: two layouts of the same fp32 forward.
    close = {"rtol": 1e-3, "atol": 1e-5}
    alone = exact(hooked, batch, [component], "insert")[0]
    torch.testing.assert_close(alone, value(inserted, batch) - value(base, batch), **close)
    missing = exact(hooked, batch, [component], "remove")[0]
    torch.testing.assert_close(missing, value(tuned, batch) - value(removed, batch), **close)
    assert float(alone.abs().max()) > 1e-3


def test_components_in_a_tuple_are_patched_together():
    base, tuned, batch = pairs.hf_model("llama"), pairs.hf_model("llama"), pairs.batch()
    pairs.noised(tuned, scale=0.2)
    inserted = copy.deepcopy(base)
    with torch.no_grad():
        for kind in ("head", "neuron"):
            both = (llama_slices(m, 1)[kind] for m in (inserted, tuned))
            for here, there in zip(*both, strict=True):
                here.copy_(there)
    hooked = pairs.hooked_pair("llama", lambda model: pairs.noised(model, scale=0.2))
    head, neuron = (pairs.component(kind, 1, 1, None) for kind in ("head", "neuron"))
    found = exact(hooked, batch, [(head, neuron), (head,), head, neuron], "insert")
    wanted = value(inserted, batch) - value(base, batch)
    torch.testing.assert_close(found[0], wanted, rtol=1e-3, atol=1e-5)
    assert torch.equal(found[1], found[2])
    assert float((found[0] - found[2] - found[3]).abs().max()) > 1e-4  # together is no sum


def test_an_untied_copy_of_the_unembedding_is_patched_alone():
    base, batch = pairs.hf_model("llama"), pairs.batch()
    edited, tuned = pairs.hf_model("llama"), pairs.hf_model("llama")
    pairs.noised(tuned)
    edited.lm_head.weight = torch.nn.Parameter(tuned.lm_head.weight.detach().clone())
    hooked = pairs.hooked_pair("llama")
    found = exact(hooked, batch, [pairs.component("embedding", None, None, "W_U")], "insert")[0]
    wanted = value(edited, batch) - value(base, batch)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2", "neox"])
@pytest.mark.parametrize(
    ("method", "estimator", "at", "error"),
    # First order misses curvature; the path shares the integral's nodes and misses less.
    [
        ("insert", "first_order", "base", 0.15),
        ("remove", "first_order", "tuned", 0.15),
        ("path", "ig", "path", 0.01),
    ],
)
def test_each_estimate_is_close_to_the_exact_answer_to_its_own_question(
    family, method, estimator, at, error
):
    from tvlens.attribution.weights import weight_scores

    hooked, batch = pairs.hooked_pair(family), pairs.batch()
    guess = weight_scores(hooked, batch, logprob(), estimator=estimator, at=at)
    chosen = [i for i, c in enumerate(guess.components) if c.layer != 0 and c.index in (None, 1)]
    components = [guess.components[i] for i in chosen]
    truth = exact(hooked, batch, components, method)
    difference = (guess.values[chosen] - truth).norm() / truth.norm()
    assert float(difference) < error
    flipped = (-guess.values[chosen] - truth).norm() / truth.norm()
    assert float(flipped) > 1.0


@pytest.mark.slow
def test_the_path_average_is_the_integral_where_the_metric_is_linear():
    """Only the unembedding's bias-free rows move and the metric is a logit: no curvature."""
    from tvlens.attribution.exact import exact_weight_scores
    from tvlens.attribution.weights import weight_scores
    from tvlens.models.metrics import Metric

    def logits_move(model):
        with torch.no_grad():
            model.lm_head.weight += 0.1 * torch.randn(40, 32)

    hooked = pairs.hooked_pair("llama", logits_move, tied=False)
    batch = pairs.batch()
    metric = Metric("logit", "logits", "higher", lambda run, rows: run.logits[:, 3, 7])
    component = pairs.component("embedding", None, None, "W_U")
    ig = weight_scores(hooked, batch, metric)
    place = ig.components.index(component)
    for method in ("exact_weight_insert", "exact_weight_remove", "exact_weight_path"):
        truth = exact_weight_scores(hooked, batch, metric, [component], method=method, nodes=2)
        torch.testing.assert_close(truth[0], ig.values[place], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(truth[0], ig.change, rtol=1e-4, atol=1e-5)


def test_a_kv_group_is_its_kv_head_and_all_that_read_it():
    from tvlens.attribution.sites import pieces, weight_sites

    hooked = pairs.hooked_pair("llama")
    sites = weight_sites(hooked.base)
    group = pieces(pairs.component("kv_group", 0, 1, None), hooked.base, sites)
    parts = [
        pairs.component("kv_head", 0, 1, None),
        pairs.component("head", 0, 2, None),
        pairs.component("head", 0, 3, None),
    ]
    assert set(group) == {p for part in parts for p in pieces(part, hooked.base, sites)}


@pytest.mark.slow
def test_prompts_in_chunks_score_the_same(monkeypatch):
    from tvlens.attribution import weights

    hooked, batch = pairs.hooked_pair("gpt2"), pairs.batch()
    head = [pairs.component("head", 0, 1, None)]
    whole = exact(hooked, batch, head, "path", nodes=3)
    monkeypatch.setattr(weights, "TOKENS_AT_ONCE", batch.ids.shape[1])
    torch.testing.assert_close(
        whole, exact(hooked, batch, head, "path", nodes=3), rtol=1e-3, atol=1e-5
    )


@pytest.mark.slow
@pytest.mark.parametrize("method", ["insert", "remove", "path"])
@pytest.mark.parametrize("fails", [False, True])
def test_weights_come_back_bit_for_bit_after_success_and_after_an_error(method, fails):
    from tvlens.attribution.exact import exact_weight_scores
    from tvlens.attribution.sites import all_components, weight_sites
    from tvlens.models.metrics import Metric

    hooked, batch = pairs.hooked_pair("gpt2"), pairs.batch()
    models = (hooked.base.model, hooked.tuned.model)
    before = [{k: v.clone() for k, v in m.state_dict().items()} for m in models]
    calls = []

    def metric(run, rows):
        calls.append(1)
        if fails and len(calls) == 3:
            raise RuntimeError("midway")
        return run.logits[:, 2, 5]

    components = all_components(hooked.base, weight_sites(hooked.base))[::5]
    ask = Metric("logit", "logits", "higher", metric)

    def patched():
        exact_weight_scores(
            hooked, batch, ask, components, method=f"exact_weight_{method}", nodes=2
        )

    if fails:
        with pytest.raises(RuntimeError, match="midway"):
            patched()
    else:
        patched()
    for model, old in zip(models, before, strict=True):
        assert all(torch.equal(tensor, old[name]) for name, tensor in model.state_dict().items())
    assert models[0].embed.weight is models[0].unembed.weight


def test_an_unknown_component_is_refused_by_name():
    from tvlens.errors import HostError

    hooked = pairs.hooked_pair("gpt2")
    for unknown in (
        pairs.component("matrix", 0, None, "W_gate"),
        pairs.component("head", 0, 4, None),
        pairs.component("head", 7, 0, None),
    ):
        with pytest.raises(HostError, match=str(unknown)):
            exact(hooked, pairs.batch(), [unknown], "insert")


def test_the_table_has_a_row_per_component_and_prompt():
    from tvlens.attribution.exact import exact_weight_table

    hooked, batch = pairs.hooked_pair("neox"), pairs.batch()
    chosen = [pairs.component("neuron", 0, 3, None), pairs.component("norm", 1, None, "ln2.w")]
    frame = exact_weight_table(
        hooked, batch, logprob(), chosen, method="exact_weight_remove"
    ).to_frame()
    assert len(frame) == 2 * len(batch)
    assert set(frame["method"]) == {"exact_weight_remove"}
    assert set(frame["direction"]) == {"base_into_tuned"}
    rows = frame[frame["component"] == "L0N3"].sort_values("prompt")["score"].tolist()
    assert rows == exact(hooked, batch, chosen, "remove")[0].tolist()


def test_the_noise_floor_is_small_and_not_negative():
    from tvlens.attribution.exact import noise_floor

    floor = noise_floor(pairs.hooked_pair("llama"), pairs.batch(), logprob())
    assert 0.0 <= floor < 1e-4
