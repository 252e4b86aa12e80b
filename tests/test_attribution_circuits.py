"""Shares of OV and QK by query head, against a model whose heads share no keys and values."""

import pytest
import torch

from . import attribution_pairs as pairs

END = {"estimator": "first_order", "at": "base"}


def logprob():
    from tvlens.models.metrics import SHIPPED

    return SHIPPED["logprob"]


def scored(hooked, batch, **how):
    from tvlens.attribution.circuits import circuit_scores
    from tvlens.attribution.weights import weight_scores

    scores = weight_scores(hooked, batch, logprob(), **how)
    return scores, circuit_scores(hooked, batch, logprob(), scores)


def of_kind(scores, kind, layer, parts=None):
    return sum(
        values
        for component, values in zip(scores.components, scores.values, strict=True)
        if component.kind == kind
        and component.layer == layer
        and (parts is None or component.part in parts)
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "neox", "qwen3", "gemma2", "gemma3", "olmo2"])
def test_all_heads_together_are_the_attentions_matrices_and_biases(family):
    hooked, batch = pairs.hooked_pair(family), pairs.batch(lengths=(9, 6))
    scores, found = scored(hooked, batch, **END)
    for layer in range(2):
        wanted = of_kind(scores, "head", layer) + of_kind(scores, "kv_head", layer)
        ours = of_kind(found, "head", layer, ("OV", "QK"))
        size = float(wanted.abs().max())
        assert float((ours - wanted).abs().max()) <= 1e-4 * size
        writes = of_kind(scores, "matrix", layer, ("W_V", "W_O"))
        writes = writes + of_kind(scores, "bias", layer, ("b_V",))
        assert float((of_kind(found, "head", layer, ("OV",)) - writes).abs().max()) <= 1e-4 * size


def ungrouped(model):
    """The same function with a copy of keys and values for every query head."""
    import transformers

    config = pairs.config("llama")
    config.num_key_value_heads = 4
    apart = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    held = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, tensor in held.items():
        if ".k_proj." in name or ".v_proj." in name:
            by_head = tensor.reshape(2, 8, *tensor.shape[1:])
            held[name] = by_head.repeat_interleave(2, dim=0).reshape(32, *tensor.shape[1:])
    apart.load_state_dict(held)
    return apart.eval()


@pytest.mark.slow
def test_a_heads_share_is_the_score_of_keys_and_values_of_its_own():
    from tvlens.models.lens import LensModel, _bridge
    from tvlens.models.pair import HookedPair

    models = [pairs.hf_model("llama") for _ in range(2)]
    pairs.noised(models[1])
    wide = [ungrouped(model) for model in models]  # before the bridge renames their modules
    grouped, apart = (
        HookedPair.of(*(LensModel.wrap(_bridge(model, "llama")) for model in two))
        for two in (models, wide)
    )
    batch = pairs.batch(lengths=(9, 6))
    _, found = scored(grouped, batch, **END)
    wanted, own = scored(apart, batch, **END)
    size = float(wanted.values.abs().max())
    assert found.components == own.components
    assert float((found.values - own.values).abs().max()) <= 1e-4 * size
    for layer in range(2):
        for head in range(4):
            places = [
                wanted.components.index(pairs.component(kind, layer, head, None))
                for kind in ("head", "kv_head")
            ]
            both = [
                found.components.index(pairs.component("head", layer, head, part))
                for part in ("OV", "QK")
            ]
            error = wanted.values[places].sum(0) - found.values[both].sum(0)
            assert float(error.abs().max()) <= 1e-4 * size


@pytest.mark.slow
@pytest.mark.parametrize(("module", "part"), [("k_proj", "QK"), ("v_proj", "OV")])
def test_a_change_of_one_kv_head_is_shared_by_its_readers_alone(module, part):
    def change(model):
        weight = model.model.layers[1].self_attn.get_submodule(module).weight
        with torch.no_grad():
            weight[8:16] += 0.1 * torch.randn(8, 32)

    hooked, batch = pairs.hooked_pair("llama", change), pairs.batch(lengths=(9, 6))
    scores, found = scored(hooked, batch, nodes=5)
    for component, values in zip(found.components, found.values, strict=True):
        reads = component.layer == 1 and component.index in (2, 3) and component.part == part
        assert reads == bool(values.abs().max() > 0), component
    total = found.values.sum(0)
    torch.testing.assert_close(total, scores.change, rtol=2e-3, atol=1e-5)


@pytest.mark.slow
def test_gates_give_the_circuits_that_the_swap_gives():
    from tvlens.attribution.circuits import circuit_scores
    from tvlens.attribution.gates import GatedModel, gated_weight_scores

    hooked, batch = pairs.hooked_pair("llama"), pairs.batch(lengths=(9, 6))
    _, swap = scored(hooked, batch, estimator="first_order", at="tuned")
    gated = GatedModel.of_pair(hooked)
    scores = gated_weight_scores(gated, batch, logprob(), estimator="first_order", at="tuned")
    ours = circuit_scores(gated, batch, logprob(), scores)
    size = float(swap.values.abs().max())
    assert float((ours.values - swap.values).abs().max()) <= 1e-4 * size


@pytest.mark.slow
def test_the_rows_are_those_of_heads_with_a_circuit_for_a_part():
    from tvlens.attribution.asking import attribute

    hooked, batch = pairs.hooked_pair("llama"), pairs.batch(lengths=(9, 6))
    frame = attribute(hooked, batch, "logprob", at="base", also=("circuits",)).to_frame()
    rows = frame[frame["part"].isin(["OV", "QK"])]
    assert set(rows["component"]) == {
        f"L{layer}H{head}.{part}"
        for layer in range(2)
        for head in range(4)
        for part in ("OV", "QK")
    }
    assert set(rows["kv_index"]) == {0, 1}
    assert len(rows) == 16 * 2
