"""Weight attribution against parameter gradients, completeness, planted pairs, and tidiness."""

import itertools

import pytest
import torch

from . import attribution_pairs as pairs

FAMILIES = ("llama", "gpt2", "neox")
DESCENDANTS = tuple(family for family in pairs.DESCENDANTS if family != "llama")
"""Families that share Llama's names: norms after sub-layers, on queries and keys, and so on."""


def logprob():
    from tvlens.models.metrics import SHIPPED

    return SHIPPED["logprob"]


def scores(hooked, batch, **how):
    from tvlens.attribution.weights import weight_scores

    return weight_scores(hooked, batch, logprob(), **how)


def by_parameter_gradient(hooked, batch, s):
    """The oracle: autograd's gradient of each parameter at theta(s), times its delta."""
    from tvlens.attribution.sites import weight_path
    from tvlens.models.metrics import Run

    found = {}
    with weight_path(hooked) as path:
        path.move(s)
        pads = {m: m.padding_idx for m in hooked.base.model.modules() if hasattr(m, "padding_idx")}
        for module in pads:
            module.padding_idx = None
        live = {(x.name, t): (x, x.parameter(t)) for x in path.sites for t in x.tensors}
        for _, parameter in live.values():
            parameter.requires_grad_(True)
        rows = []
        for one in batch.chunks(1):
            value = logprob()(Run(hooked.base(one.ids, one.mask)), one).sum()
            gradients = torch.autograd.grad(value, [p for _, p in live.values()])
            rows.append(gradients)
        for place, (key, (site, _)) in enumerate(live.items()):
            delta = path.delta(site, key[1]).double()
            products = [gradients[place].double() * delta for gradients in rows]
            found[site.component(key[1])] = products
        for module, pad in pads.items():
            module.padding_idx = pad
    return found


@pytest.mark.slow
@pytest.mark.parametrize("family", [*FAMILIES, *DESCENDANTS])
@pytest.mark.parametrize(("at", "s"), [("base", 0.0), ("tuned", 1.0)])
def test_score_of_every_tensor_is_its_gradient_times_its_delta(family, at, s):
    hooked, batch = pairs.hooked_pair(family), pairs.batch()
    found = scores(hooked, batch, estimator="first_order", at=at)
    oracle = by_parameter_gradient(hooked, batch, s)
    ours = dict(zip(found.components, found.values, strict=True))
    assert {c for c in ours if c.index is None} == set(oracle)
    for component, products in oracle.items():
        for prompt, product in enumerate(products):
            # Cancellation within a tensor makes a plain relative error meaningless.
            scale = max(abs(float(product.sum())), 1e-3 * float(product.abs().sum()), 1e-9)
            error = abs(float(ours[component][prompt]) - float(product.sum()))
            # 1e-7: a metric of a few nats is itself known to that only, in float32.
            assert error <= 5e-5 * scale + 1e-7, (component, prompt)


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_and_neurons_are_slices_of_the_gradient_product(family):
    hooked, batch = pairs.hooked_pair(family), pairs.batch()
    found = scores(hooked, batch, estimator="first_order", at="base")
    oracle = by_parameter_gradient(hooked, batch, 0.0)
    conv = family == "gpt2"

    def of(part, columns, *, out):
        # Linear stores [out, in]; GPT-2's attn.o and MLP are Conv1D and store [in, out].
        axis = int(not out) if not (conv and part in ("W_O", "W_in", "W_out")) else int(out)
        kind = "bias" if part.startswith("b_") else "matrix"
        products = oracle.get(pairs.component(kind, 1, None, part))
        if products is None:
            return torch.zeros(len(batch)).double()
        axis = 0 if kind == "bias" else axis
        return torch.stack([p.narrow(axis, *columns).sum() for p in products])

    def check(kind, index, parts):
        place = found.components.index(pairs.component(kind, 1, index, None))
        torch.testing.assert_close(found.values[place], sum(parts), rtol=2e-4, atol=2e-6)

    head = (16, 8)
    check(
        "head",
        2,
        [of("W_Q", head, out=True), of("W_O", head, out=False), of("b_Q", head, out=True)],
    )
    check("kv_head", 1, [of(p, (8, 8), out=True) for p in ("W_K", "W_V", "b_K", "b_V")])
    check(
        "neuron",
        5,
        [
            of("W_gate", (5, 1), out=True),
            of("W_in", (5, 1), out=True),
            of("b_in", (5, 1), out=True),
            of("W_out", (5, 1), out=False),
        ],
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "metric"),
    [
        *itertools.product(FAMILIES, ["logprob", "logit_diff", "loss", "kl_to_tuned"]),
        *itertools.product(DESCENDANTS, ["logprob"]),
    ],
)
def test_integrated_scores_sum_to_the_change_of_the_metric(family, metric):
    from tvlens.attribution.weights import weight_scores
    from tvlens.models.metrics import SHIPPED

    hooked, batch = pairs.hooked_pair(family), pairs.batch()
    found = weight_scores(hooked, batch, SHIPPED[metric])
    before, after = (
        hooked.values(model, SHIPPED[metric], batch) for model in (hooked.base, hooked.tuned)
    )
    disjoint = torch.tensor(
        [c.kind in ("matrix", "norm", "bias", "embedding") for c in found.components]
    )
    # 2e-5: what fp32 leaves of a metric of this size; the quadrature leaves far less here.
    torch.testing.assert_close(
        found.values[disjoint].sum(0), (after - before).double(), rtol=2e-3, atol=2e-5
    )
    assert found.nodes == 8
    assert found.completeness < 0.002


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_heads_and_neurons_sum_to_their_matrices_and_biases(family):
    found = scores(pairs.hooked_pair(family), pairs.batch())

    def total(kinds, parts=None, layer=1):
        return sum(
            v
            for c, v in zip(found.components, found.values, strict=True)
            if c.kind in kinds and c.layer == layer and (parts is None or c.part in parts)
        )

    coarse = ("matrix", "bias")
    attention = total(coarse, ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V"))
    mlp = total(coarse, ("W_gate", "W_in", "W_out", "b_gate", "b_in"))
    torch.testing.assert_close(total(("head", "kv_head")), attention)
    torch.testing.assert_close(total(("neuron",)), mlp)


@pytest.mark.slow
def test_tied_embeddings_get_a_row_for_reading_and_one_for_writing():
    hooked = pairs.hooked_pair("llama", tied=True)
    apart = pairs.hooked_pair("llama", tied=False, change=pairs.noised)
    assert hooked.base.model.embed.weight is hooked.base.model.unembed.weight
    found = scores(hooked, pairs.batch())
    parts = [c.part for c in found.components if c.kind == "embedding"]
    assert parts == ["W_E", "W_U"]
    assert hooked.base.model.embed.weight is hooked.base.model.unembed.weight
    assert apart.base.model.embed.weight is not apart.base.model.unembed.weight


@pytest.mark.slow
def test_a_change_of_one_head_alone_is_found_with_its_full_size():
    def one_head(model):
        attention = model.model.layers[1].self_attn
        with torch.no_grad():
            attention.q_proj.weight[8:16] += 0.1 * torch.randn(8, 32)
            attention.o_proj.weight[:, 8:16] += 0.1 * torch.randn(32, 8)

    hooked, batch = pairs.hooked_pair("llama", one_head), pairs.batch()
    found = scores(hooked, batch)
    place = found.components.index(pairs.component("head", 1, 1, None))
    for i, component in enumerate(found.components):
        touched = str(component) in ("L1H1", "L1.W_Q", "L1.W_O")
        assert touched or bool((found.values[i] == 0).all()), component
    assert float(found.change.abs().min()) > 1e-3
    torch.testing.assert_close(found.values[place], found.change, rtol=2e-3, atol=1e-5)


OWN_NORMS = [
    ("qwen3", "self_attn.q_norm", "L1.q_norm.w"),
    ("gemma3", "self_attn.k_norm", "L1.k_norm.w"),
    ("olmo2", "self_attn.k_norm", "L1.k_norm.w"),
    ("gemma2", "post_attention_layernorm", "L1.ln1_post.w"),
    ("olmo2", "post_feedforward_layernorm", "L1.ln2_post.w"),
]


@pytest.mark.parametrize(("family", "module", "label"), OWN_NORMS)
def test_a_gain_that_changed_alone_has_the_whole_change_at_real_tokens(family, module, label):
    def gain(model):
        with torch.no_grad():
            model.model.layers[1].get_submodule(module).weight += 0.3

    hooked, batch = pairs.hooked_pair(family, gain), pairs.batch(lengths=(2, 1))
    # As many positions as heads: an exchange of the two axes shows at the padding.
    assert batch.ids.shape[1] == hooked.base.n_heads
    assert int((batch.mask == 0).sum()) == 1
    found = scores(hooked, batch)
    for component, values in zip(found.components, found.values, strict=True):
        expected = found.change if str(component) == label else torch.zeros(2).double()
        torch.testing.assert_close(values, expected, rtol=2e-3, atol=2e-6)
    assert float(found.change.abs().min()) > 1e-4
    assert float(found.by_token[batch.mask == 0].abs().max()) == 0
    torch.testing.assert_close(found.by_token.sum(1), found.change, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "olmo2"])
def test_integrated_scores_of_every_norm_are_its_exact_average_swing(family):
    from tvlens.attribution.exact import exact_weight_scores

    hooked, batch = pairs.hooked_pair(family), pairs.batch(lengths=(9, 6))
    found = scores(hooked, batch)
    norms = [c for c in found.components if c.kind == "norm" and c.layer == 1]
    names = {str(c).split(".")[1] for c in norms}
    assert {"q_norm", "k_norm"} < names
    assert len(norms) == {"qwen3": 4, "gemma3": 6, "olmo2": 4}[family]
    method = "exact_weight_path"
    exact = exact_weight_scores(hooked, batch, logprob(), norms, method=method, nodes=4)
    ours = torch.stack([found.values[found.components.index(c)] for c in norms])
    # Not equal: the swing of one component has curvature of its own, 1 % of it at this size.
    assert float((ours - exact).abs().max()) < 0.05 * float(exact.abs().max())
    assert float(exact.abs().min(dim=1).values.min()) > 0


@pytest.mark.slow
def test_two_equal_models_give_exact_zeros():
    found = scores(pairs.hooked_pair("llama", lambda model: None), pairs.batch())
    assert bool((found.values == 0).all())
    assert found.completeness == 0.0


@pytest.mark.slow
def test_exchanging_the_models_turns_every_sign():
    from tvlens.models.pair import HookedPair

    hooked, batch = pairs.hooked_pair("gpt2"), pairs.batch()
    there = scores(hooked, batch)
    back = scores(HookedPair.of(hooked.tuned, hooked.base), batch)
    torch.testing.assert_close(there.values, -back.values, rtol=1e-3, atol=2e-6)


@pytest.mark.slow
def test_a_prompt_scores_the_same_alone_and_in_a_batch_and_in_chunks(monkeypatch):
    from tvlens.attribution import weights

    hooked, batch = pairs.hooked_pair("llama"), pairs.batch()
    end = {"estimator": "first_order", "at": "tuned"}
    together = scores(hooked, batch, **end)
    monkeypatch.setattr(weights, "TOKENS_AT_ONCE", 2 * batch.ids.shape[1])
    chunked = scores(hooked, batch, **end)
    alone = torch.cat([scores(hooked, one, **end).values for one in batch.chunks(1)], dim=1)
    # 1e-4 of the largest score: fp32 sums over padded rows in another order.
    size = float(together.values.abs().max())
    assert float((together.values - alone).abs().max()) <= 1e-4 * size
    assert float((together.values - chunked.values).abs().max()) <= 1e-4 * size


@pytest.mark.slow
def test_nodes_are_raised_until_the_gap_is_small():
    coarse = pairs.hooked_pair("llama", lambda model: pairs.noised(model, scale=1.0))
    found = scores(coarse, pairs.batch())
    assert found.nodes > 8
    assert found.incomplete == (found.completeness > 0.1)


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def unchanged(model, before):
    after = model.state_dict()
    return all(
        torch.equal(before[n].view(torch.int32), after[n].view(torch.int32))
        for n in before
        if before[n].dtype == torch.float32
    )


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_both_models_are_left_bit_for_bit_as_they_were(family):
    hooked = pairs.hooked_pair(family)
    models = (hooked.base.model, hooked.tuned.model)
    # A minus zero would come back as plus zero if theta(0) were computed instead of copied.
    with torch.no_grad():
        models[0].blocks[0].ln1.original_component.weight[0] = -0.0
    before = [state(model) for model in models]
    flags = [p.requires_grad for p in models[0].parameters()]
    scores(hooked, pairs.batch())
    assert all(unchanged(*both) for both in zip(models, before, strict=True))
    assert flags == [p.requires_grad for p in models[0].parameters()]
    assert all(p.grad is None for model in models for p in model.parameters())


def test_a_metric_that_raises_leaves_the_models_and_hooks_as_they_were():
    from tvlens.attribution.weights import weight_scores
    from tvlens.models.metrics import Metric

    hooked, batch = pairs.hooked_pair("gpt2"), pairs.batch()
    before = state(hooked.base.model)
    calls = []

    def fails_midway(run, rows):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("midway")
        return run.logits.sum((1, 2))

    with pytest.raises(RuntimeError, match="midway"):
        weight_scores(hooked, batch, Metric("bad", "x", "higher", fails_midway))
    assert unchanged(hooked.base.model, before)
    assert not any(p.fwd_hooks or p.bwd_hooks for p in hooked.base.model.hook_dict.values())


def test_half_precision_is_refused_with_the_way_out():
    from tvlens.errors import HostError

    hooked = pairs.hooked_pair("llama")
    hooked.tuned.model.to(torch.bfloat16)
    with pytest.raises(HostError, match=r"dtype=torch\.float32"):
        scores(hooked, pairs.batch())


def test_a_difference_outside_the_known_weights_is_refused():
    from tvlens.errors import HostError

    hooked = pairs.hooked_pair("neox")
    hooked.tuned.model.ln_final.original_component.eps = 10.0
    with pytest.raises(HostError, match="cannot attribute"):
        scores(hooked, pairs.batch())


def test_an_estimator_at_the_wrong_place_is_refused():
    with pytest.raises(ValueError, match="got ig at base"):
        scores(pairs.hooked_pair("llama"), pairs.batch(), at="base")


@pytest.mark.slow
def test_the_table_has_the_contracts_rows():
    from tvlens.attribution.weights import attribute_weights

    hooked, batch = pairs.hooked_pair("llama"), pairs.batch()
    frame = attribute_weights(hooked, batch, logprob()).to_frame()
    assert set(frame["method"]) == {"weight_ig"}
    assert set(frame["space"]) == {"weight"}
    heads = frame[frame["kind"] == "head"]
    assert len(heads) == 2 * 4 * len(batch)
    assert heads["part"].isna().all()
    assert (heads["component"] == heads["site"]).all()
    assert set(heads["kv_index"]) == {0, 1}
    assert frame["gap"].dropna().abs().max() < 1e-3
    assert set(frame["nodes"]) == {8}
    tokens = frame[frame["prompt"] == 2]["n_tokens"].unique()
    assert tokens.tolist() == [int(batch.lengths[2])]
    assert frame.loc[frame["component"] == "unembed.W_U", "tied"].all()
    pooled = frame[(frame["kind"] == "neuron") & frame["prompt"].isna()]
    assert len(pooled) == 2 * 24
    assert set(frame["status"]) == {"ok"}


@pytest.mark.slow
def test_first_order_tables_name_their_end_and_direction():
    from tvlens.attribution.weights import attribute_weights

    hooked, batch = pairs.hooked_pair("neox"), pairs.batch()
    for at, direction in (("base", "tuned_into_base"), ("tuned", "base_into_tuned")):
        table = attribute_weights(hooked, batch, logprob(), estimator="first_order", at=at)
        frame = table.to_frame()
        assert set(frame["method"]) == {f"weight_first_order_{at}"}
        assert set(frame["direction"]) == {direction}
        assert frame["gap"].isna().all()


def test_neurons_beyond_the_top_get_some_rows_by_chance(monkeypatch):
    from tvlens.attribution import weights

    monkeypatch.setattr(weights, "NEURONS_AT_RANDOM", 6)
    hooked, batch = pairs.hooked_pair("llama"), pairs.batch()
    found = scores(hooked, batch, estimator="first_order", at="base")
    table = weights.weight_table(found, hooked, batch, logprob(), neurons=10)
    neurons = table.where(kind="neuron").to_frame()
    shown = neurons[neurons["prompt"].notna()]
    assert shown["component"].nunique() == 16
    assert not shown.duplicated(["component", "prompt"]).any()
    sizes = neurons[neurons["prompt"].isna()].set_index("component")["mean_abs"]
    largest = set(sizes.sort_values(ascending=False).index[:10])
    assert largest < set(shown["component"])


@pytest.mark.slow
def test_scores_by_token_sum_to_the_change_too():
    found = scores(pairs.hooked_pair("gpt2"), pairs.batch())
    assert float(found.by_token.abs().sum()) > 0
    total = found.by_token.double().sum(1)
    torch.testing.assert_close(total, found.change, rtol=2e-3, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("end", ["base", "tuned"])
def test_first_order_of_a_distance_to_its_own_end_is_refused_and_explained(end):
    from tvlens.attribution.gates import GatedModel, gated_weight_scores
    from tvlens.attribution.weights import weight_scores
    from tvlens.errors import MetricError
    from tvlens.models.metrics import SHIPPED

    hooked, batch = pairs.hooked_pair("llama"), pairs.batch()
    metric, other = SHIPPED[f"kl_to_{end}"], "tuned" if end == "base" else "base"
    gated = GatedModel.of_pair(hooked)
    for scored, model in ((weight_scores, hooked), (gated_weight_scores, gated)):
        with pytest.raises(MetricError, match=f"distance to the {end} model.*gradient.*is zero"):
            scored(model, batch, metric, estimator="first_order", at=end)
        there = scored(model, batch, metric, estimator="first_order", at=other)
        assert there.values.abs().max() > 1e-4
    whole = weight_scores(hooked, batch, metric)
    assert whole.completeness < 2e-3
    # a distance to the base grows on the way, one to the tuned model shrinks
    assert (whole.change.sign() == (1 if end == "base" else -1)).all()
