"""A HookedTransformer (TransformerLens 3.9) beside the bridge on the same weights."""

import copy

import pytest
import torch

from . import attribution_pairs as pairs
from . import hooked_transformers as hooked

hooked.host()  # skips the file where there is none

FAMILIES = ("llama", "qwen2", "qwen3", "neox", "gpt2", "olmo2")
"""Grouped heads, biases, norms within heads, parallel blocks, positions, norms behind maps."""


def metric():
    from tvlens.models.metrics import SHIPPED

    return SHIPPED["logprob"]


def models(family):
    base, tuned = hooked.hf_model(family), hooked.hf_model(family)
    pairs.noised(tuned)
    return base, tuned


def own_pair(family):
    """Both models as HookedTransformers, and the transformers models they were made from."""
    from tvlens.models import HookedPair, LensModel

    made = models(family)
    return HookedPair.of(*(LensModel.wrap(hooked.hooked_transformer(m)) for m in made)), made


def bridges(made):
    from tvlens.models import HookedPair, LensModel
    from tvlens.models.lens import _bridge

    return HookedPair.of(*(LensModel.wrap(_bridge(copy.deepcopy(m), "tiny")) for m in made))


def state(model):
    """All that an analysis could leave behind: bits, flags, hooks, settings."""
    return {
        "bits": {n: t.clone() for n, t in model.state_dict().items()},
        "flags": [p.requires_grad for p in model.parameters()],
        "grads": [p.grad is None for p in model.parameters()],
        "hooks": [
            (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
            for m in model.modules()
        ],
        "points": [(len(p.fwd_hooks), len(p.bwd_hooks)) for p in model.hook_dict.values()],
        "level": model.context_level,
        "training": model.training,
        "cfg": copy.deepcopy(vars(model.cfg)),
    }


def assert_as_found(before, model):
    after = state(model)
    bits = before.pop("bits"), after.pop("bits")
    assert all(torch.equal(bits[0][name], bits[1][name]) for name in bits[0])
    assert bits[0].keys() == bits[1].keys()
    assert before == after


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers_and_of_the_bridge(family):
    from tvlens.models import LensModel

    model = hooked.hf_model(family)
    lens, batch = LensModel.wrap(hooked.hooked_transformer(model)), pairs.batch()
    with torch.no_grad():
        wanted = model(batch.ids, attention_mask=batch.mask).logits
        real = batch.mask.bool()
        torch.testing.assert_close(
            lens(batch.ids, batch.mask)[real], wanted[real], rtol=1e-5, atol=1e-5
        )
        read = lens.logits_at(batch.ids, batch.mask, batch.reading_positions)
        rows = torch.arange(len(batch))[:, None]
        torch.testing.assert_close(
            read, wanted[rows, batch.reading_positions], rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("at", "s"), [("base", 0.0), ("tuned", 1.0)])
def test_score_of_every_tensor_is_its_gradient_times_its_delta(family, at, s):
    from tests.test_attribution_weights import by_parameter_gradient
    from tvlens.attribution.weights import weight_scores

    ours, _ = own_pair(family)
    batch = pairs.batch()
    found = weight_scores(ours, batch, metric(), estimator="first_order", at=at)
    by_name = dict(zip(found.components, found.values, strict=True))
    oracle = by_parameter_gradient(ours, batch, s)
    assert {c for c in by_name if c.index is None} == set(oracle)
    for component, products in oracle.items():
        for prompt, product in enumerate(products):
            scale = max(abs(float(product.sum())), 1e-3 * float(product.abs().sum()), 1e-9)
            error = abs(float(by_name[component][prompt]) - float(product.sum()))
            assert error <= 5e-5 * scale + 1e-7, (component, prompt)


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_complete_and_those_of_the_bridge_and_of_gates(family):
    from tvlens.attribution.gates import GatedModel, gated_weight_scores
    from tvlens.attribution.weights import weight_scores

    ours, made = own_pair(family)
    batch = pairs.batch()
    found = weight_scores(ours, batch, metric())
    theirs = weight_scores(bridges(made), batch, metric())
    assert found.completeness <= 2e-3
    by_name = dict(zip(found.components, found.values, strict=True))
    largest = float(theirs.values.abs().max())
    for component, wanted in zip(theirs.components, theirs.values, strict=True):
        assert float((by_name.pop(component) - wanted).abs().max()) <= 1e-5 * largest, component
    # a HookedTransformer has a bias everywhere; those that the checkpoint lacks stay 0
    assert all(component.kind == "bias" and not value.any() for component, value in by_name.items())
    gated = gated_weight_scores(GatedModel.of_pair(ours), batch, metric())
    assert gated.components == found.components
    assert float((gated.values - found.values).abs().max()) <= 1e-4 * largest


@pytest.mark.parametrize("family", ["qwen3", "neox"])
@pytest.mark.parametrize("method", ["exact_weight_insert", "exact_weight_remove"])
def test_exact_patches_are_those_of_the_bridge(family, method):
    from tvlens.attribution.exact import exact_weight_scores
    from tvlens.attribution.gates import GatedModel, gated_swings

    ours, made = own_pair(family)
    batch = pairs.batch()
    components = [
        pairs.component("head", 1, 2, None),
        pairs.component("kv_head", 0, 1, None),
        pairs.component("kv_group", 1, 1, None),
        pairs.component("neuron", 0, 5, None),
        pairs.component("matrix", 1, None, "W_K"),
        pairs.component("matrix", 0, None, "W_O"),
        pairs.component("norm", 0, None, "ln1.w"),
        pairs.component("embedding", None, None, "W_E"),
        pairs.component("embedding", None, None, "W_U"),
    ]
    found = exact_weight_scores(ours, batch, metric(), components, method=method)
    wanted = exact_weight_scores(bridges(made), batch, metric(), components, method=method)
    assert float(wanted.abs().max()) > 1e-2
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=5e-6)
    s = float(method == "exact_weight_remove")
    swings = gated_swings(GatedModel.of_pair(ours), batch, metric(), components, s=s)
    assert float((swings - found).abs().max()) <= 1e-4 * float(found.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_geometric_parts_and_circuits_are_those_of_the_bridge(family):
    from tvlens.attribution.circuits import circuit_scores
    from tvlens.attribution.parts import part_scores
    from tvlens.attribution.weights import weight_scores

    ours, made = own_pair(family)
    batch, theirs, found = pairs.batch(), bridges(made), []
    before = state(ours.base.model)
    for pair in (ours, theirs):
        scores = weight_scores(pair, batch, metric(), nodes=3)
        parts = part_scores(pair, batch, metric(), scores).parts
        found.append((parts, circuit_scores(pair, batch, metric(), scores)))
    assert_as_found(before, ours.base.model)
    (parts, circuits), (wanted, wanted_circuits) = found
    # a HookedTransformer has a bias everywhere; those that the checkpoint lacks stay 0
    empty = [name for name in parts.keys() - wanted.keys() if not parts[name].values.any()]
    assert parts.keys() - set(empty) == wanted.keys()
    largest = max(float(part.values.abs().max()) for part in wanted.values())
    for name, part in wanted.items():
        mine = dict(zip(parts[name].components, parts[name].values, strict=True))
        for component, values in zip(part.components, part.values, strict=True):
            assert float((mine[component] - values).abs().max()) <= 1e-4 * largest, component
    assert circuits.components == wanted_circuits.components
    scale = float(wanted_circuits.values.abs().max())
    assert scale > 1e-3
    assert float((circuits.values - wanted_circuits.values).abs().max()) <= 1e-4 * scale


@pytest.mark.parametrize("family", ["qwen3", "neox"])
def test_integrals_along_a_layer_are_those_of_the_bridge(family):
    from tvlens.attribution.layer_integrals import layer_integrals

    ours, made = own_pair(family)
    batch, parts = pairs.batch(), ("z", "q", "post", "mlp_out")
    found, wanted = (
        layer_integrals(pair, batch, metric(), parts=parts, nodes=3)
        for pair in (ours, bridges(made))
    )
    assert found.values.keys() == wanted.values.keys()
    largest = max(float(values.abs().max()) for values in wanted.values.values())
    assert largest > 1e-2
    for name, values in wanted.values.items():
        assert float((found.values[name] - values).abs().max()) <= 1e-4 * largest, name


@pytest.mark.parametrize("family", ["llama", "olmo2"])
@pytest.mark.parametrize("direction", ["tuned_into_base", "base_into_tuned"])
def test_scores_of_activations_are_those_of_the_bridge(family, direction):
    from tvlens.attribution.activations import attribute_activations, exact_activations

    ours, made = own_pair(family)
    batch, theirs = pairs.batch(), bridges(made)
    columns = ["component", "prompt", "score"]
    frames = [
        attribute_activations(pair, batch, metric(), direction=direction)
        .to_frame()[columns]
        .set_index(columns[:2])["score"]
        for pair in (ours, theirs)
    ]
    largest = frames[1].abs().max()
    assert (frames[0] - frames[1]).abs().max() <= 1e-5 * largest
    heads = [pairs.component("head", 1, 2, None), pairs.component("node", 0, None, "mlp_out")]
    exact = [
        exact_activations(pair, batch, metric(), heads, direction=direction).to_frame()["score"]
        for pair in (ours, theirs)
    ]
    assert exact[1].abs().max() > 1e-3
    assert (exact[0] - exact[1]).abs().max() <= 1e-5 * max(1.0, exact[1].abs().max())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("estimator", ["qk_fix", "atp_star"])
def test_repaired_scores_are_those_of_the_bridge(family, estimator):
    from tvlens.attribution.activations import activation_scores
    from tvlens.attribution.directions import question

    ours, made = own_pair(family)
    batch, theirs, found = pairs.batch(), bridges(made), []
    for pair in (ours, theirs):
        asked = question(pair, metric(), "tuned_into_base")
        how = {"parts": ("q", "k", "z", "post", "embed"), "estimator": estimator}
        before = state(ours.base.model)
        found.append(activation_scores(asked, batch, by_position=True, **how))
        assert_as_found(before, ours.base.model)
    for scored in ("values", "positions"):
        mine, wanted = (getattr(each, scored) for each in found)
        assert mine.keys() == wanted.keys()
        for cut, values in wanted.items():
            assert values.abs().max() > 0, cut
            error = (mine[cut] - values).abs().max()
            assert error <= 2e-5 * values.abs().max() + 1e-7, (scored, cut)


@pytest.mark.parametrize("family", FAMILIES)
def test_edges_are_those_of_the_bridge(family):
    from tvlens.attribution.directions import question
    from tvlens.attribution.edge_patching import edges_together, exact_edges
    from tvlens.attribution.edges import edge_scores

    from .test_attribution_nodes import batch as with_corrupt

    ours, made = own_pair(family)
    batch, theirs = with_corrupt(), bridges(made)
    before = state(ours.tuned.model)
    for direction in ("clean_into_corrupt", "tuned_into_base"):
        asked = [question(pair, metric(), direction) for pair in (ours, theirs)]
        mine, wanted = (edge_scores(each, batch) for each in asked)
        biased = [edge for edge in mine.graph.edges if edge.source.part == "b_O"]
        named = [edge for edge in wanted.graph.edges if edge.source.part != "b_O"]
        assert len(mine.graph.edges) - len(biased) == len(named)  # HookedTransformer has them all
        largest = float(wanted.values.abs().max())
        assert largest > 1e-3
        for edge in named:
            assert float((mine.of(edge) - wanted.of(edge)).abs().max()) <= 2e-5 * largest, edge
        some = named[:: max(1, len(named) // 6)]
        exact = [
            exact_edges(pair, batch, metric(), some, direction=direction).to_frame()["score"]
            for pair in (ours, theirs)
        ]
        assert (exact[0] - exact[1]).abs().max() <= 1e-5 * max(1.0, exact[1].abs().max())
    question_here = question(ours, metric(), "clean_into_corrupt")
    every = edges_together(question_here, batch, mine.graph.exists)
    torch.testing.assert_close(
        every, ours.values(ours.tuned, metric(), batch).detach().double(), rtol=0, atol=5e-6
    )
    assert_as_found(before, ours.tuned.model)


def test_edges_of_folded_weights_are_those_of_the_folded_model():
    """Norms without gains: what reads the stream is told by the model's own modules."""
    from tvlens.attribution.directions import question
    from tvlens.attribution.edges import edge_scores
    from tvlens.models import HookedPair, LensModel

    from .test_attribution_nodes import batch as with_corrupt

    folded, raw = (
        HookedPair.of(
            *(LensModel.wrap(hooked.hooked_transformer(m, folded=how)) for m in models("gpt2"))
        )
        for how in (True, False)
    )
    found = [
        edge_scores(question(pair, metric(), "clean_into_corrupt"), with_corrupt())
        for pair in (folded, raw)
    ]
    logits = [edge for edge in found[1].graph.edges if edge.target.part != "logits"]
    largest = float(found[1].values.abs().max())
    for edge in logits:  # folding and centring change neither what heads read nor their effect
        error = float((found[0].of(edge) - found[1].of(edge)).abs().max())
        assert error <= 1e-4 * largest, edge


@pytest.mark.parametrize("family", ["llama", "neox"])
def test_an_anchor_is_that_of_the_bridge(family):
    from tvlens.attribution.weights import weight_scores
    from tvlens.models.anchors import anchor

    ours, made = own_pair(family)
    batch, theirs = pairs.batch(), bridges(made)
    mine, wanted = (anchor(pair, batch, hook="blocks.0.hook_resid_post") for pair in (ours, theirs))
    assert mine.gap == pytest.approx(wanted.gap, rel=1e-4)
    torch.testing.assert_close(mine.direction, wanted.direction, rtol=1e-3, atol=1e-5)
    scores = [weight_scores(p, batch, wanted.metric, nodes=4) for p in (ours, theirs)]
    by_name = dict(zip(scores[0].components, scores[0].values, strict=True))
    largest = float(scores[1].values.abs().max())
    for component, values in zip(scores[1].components, scores[1].values, strict=True):
        assert float((by_name[component] - values).abs().max()) <= 2e-5 * largest, component


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_in_memory_are_those_of_the_checkpoint(family, tmp_path):
    from tvlens.weights.matching import load_pair

    made = models(family)
    for model, name in zip(made, ("base", "tuned"), strict=True):
        model.save_pretrained(tmp_path / name)
    wanted = load_pair(tmp_path / "base", tmp_path / "tuned")
    found = load_pair(*(hooked.hooked_transformer(model) for model in made))
    assert set(wanted.components) <= set(found.components)
    for component in wanted.components:
        ours, theirs = (pair.read(component) for pair in (found, wanted))
        assert torch.equal(ours.base, theirs.base), component
        assert torch.equal(ours.dense_delta(), theirs.dense_delta()), component
    for component in set(found.components) - set(wanted.components):
        if component.part != "W_U":  # two tensors here, one in a tied checkpoint
            assert not found.read(component).base.any(), component


def test_a_pair_in_memory_is_decomposed_and_hooked_as_it_is():
    from tvlens.geometry.decompose import decompose
    from tvlens.models import HookedPair
    from tvlens.weights.matching import load_pair

    base, tuned = (hooked.hooked_transformer(model) for model in models("llama"))
    before = state(base), state(tuned)
    pair = load_pair(base, tuned)
    assert len(decompose(pair).to_frame())
    ours = HookedPair(pair)
    assert ours.base.model is base
    assert ours.tuned.model is tuned
    assert_as_found(before[0], base)
    assert_as_found(before[1], tuned)


def test_a_tuning_vector_is_held_for_a_while():
    from tvlens.weights.matching import load_pair
    from tvlens.weights.vector import tuning_vector

    base, tuned = (hooked.hooked_transformer(model) for model in models("qwen3"))
    vector, batch = tuning_vector(load_pair(base, tuned)), pairs.batch()
    before = state(base)
    with torch.no_grad(), vector.apply_to(base) as held:
        found, wanted = held(batch.ids), tuned(batch.ids)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert_as_found(before, base)


def test_a_folded_model_has_activations_and_no_weights():
    from tvlens.attribution.activations import attribute_activations
    from tvlens.attribution.weights import weight_scores
    from tvlens.errors import HostError
    from tvlens.models import HookedPair, LensModel
    from tvlens.weights.matching import load_pair

    made = models("neox")
    folded = [hooked.hooked_transformer(model, folded=True) for model in made]
    reload = 'HookedTransformer.from_pretrained_no_processing("tiny-neox")'
    with pytest.raises(HostError, match="norms have no gains") as caught:
        load_pair(*folded)
    assert reload in str(caught.value.hint)
    ours, batch = HookedPair.of(*map(LensModel.wrap, folded)), pairs.batch()
    with pytest.raises(HostError, match="neither subtracted nor attributed to"):
        weight_scores(ours, batch, metric())
    before = state(folded[0])
    found = attribute_activations(ours, batch, metric(), direction="tuned_into_base").to_frame()
    assert found["score"].abs().max() > 1e-3
    assert_as_found(before, folded[0])


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"center_unembed": True}, "unembedding was centred"),
        ({"fold_value_biases": True}, "value biases were folded"),
    ],
)
def test_other_processing_shows_in_the_weights(how, said):
    from tvlens.models import LensModel

    model = hooked.hf_model("neox")
    raw = hooked.hooked_transformer(model)
    weights = {name: tensor.clone() for name, tensor in raw.state_dict().items()}
    raw.load_and_process_state_dict(weights, **{**hooked.UNPROCESSED, **how})
    assert said in LensModel.wrap(raw).host.not_raw
    assert not LensModel.wrap(hooked.hooked_transformer(model)).host.not_raw


class Trouble(Exception):
    pass


@pytest.mark.parametrize("raised", [False, True])
def test_the_users_object_is_left_as_found(raised):
    """Their own hooks stay and fire, weights and flags come back, also when a metric raises."""
    from tvlens.attribution.activations import attribute_activations
    from tvlens.attribution.gates import GatedModel, gated_weight_scores
    from tvlens.attribution.weights import weight_scores
    from tvlens.models.metrics import Metric

    ours, _ = own_pair("qwen3")
    base, batch, fired = ours.base.model, pairs.batch(), []
    base.add_hook("blocks.0.attn.hook_z", lambda z, hook: fired.append(hook.name))
    base.blocks[0].ln1.register_forward_hook(lambda *_: None)
    for number, parameter in enumerate(base.parameters()):
        parameter.requires_grad_(number % 3 == 0)
    before = state(base), state(ours.tuned.model)
    calls = iter(range(1000))

    def failing(run, prompts):
        if raised and next(calls) >= 2:
            raise Trouble
        return metric()(run, prompts)

    own = Metric("own", "nats", "higher", failing)
    for run in (
        lambda: weight_scores(ours, batch, own, nodes=2),
        lambda: attribute_activations(ours, batch, own, direction="tuned_into_base"),
        lambda: gated_weight_scores(GatedModel.of_pair(ours), batch, own, estimator="first_order",
                                    at="base"),
    ):  # fmt: skip
        if raised:
            with pytest.raises(Trouble):
                run()
        else:
            run()
    assert fired
    assert_as_found(before[0], base)
    assert_as_found(before[1], ours.tuned.model)


def test_a_hook_that_raises_leaves_nothing_at_the_edges_of_modules():
    ours, _ = own_pair("llama")
    before, batch = state(ours.base.model), pairs.batch()

    def failing(activation, hook):
        assert hook.name == "blocks.1.attn.q.hook_in"
        raise Trouble

    with pytest.raises(Trouble), ours.base.hooks(fwd=[("blocks.1.attn.q.hook_in", failing)]):
        ours.base(batch.ids, batch.mask)
    assert_as_found(before, ours.base.model)


def passed(lens, names, batch):
    """Activations at all names and gradients at outputs, a list for each name."""
    found, gradients = {name: [] for name in names}, {n: [] for n in names if n.endswith("out")}

    def keep(place):
        return lambda tensor, hook: place.append(tensor.detach())

    fwd = [(name, keep(place)) for name, place in found.items()]
    bwd = [(name, keep(place)) for name, place in gradients.items()]
    with lens.hooks(fwd=fwd, bwd=bwd):
        logits = lens(batch.ids, batch.mask)
        (logits * batch.mask[..., None]).pow(2).mean().backward()
    return found, gradients


def test_each_edge_is_passed_once_with_the_bridges_shape_and_values():
    from tvlens.attribution.sites import weight_sites

    ours, made = own_pair("qwen3")
    theirs, batch = bridges(made), pairs.batch()
    names = [
        f"{site.name}.{point}"
        for site in weight_sites(ours.base)
        for point in ("hook_in", "hook_out")
        if site.role != "embed"
    ]
    seen = [passed(pair.base, names, batch) for pair in (ours, theirs)]
    real = batch.mask.bool()
    for kind in (0, 1):
        ours_seen, theirs_seen = seen[0][kind], seen[1][kind]
        assert ours_seen.keys() == theirs_seen.keys()
        for name, tensors in ours_seen.items():
            assert len(tensors) == len(theirs_seen[name]) == 1, name
            assert tensors[0].shape == theirs_seen[name][0].shape, name
            first, second = (
                t.movedim(2, 1) if "_norm.hook" in name else t
                for t in (tensors[0], theirs_seen[name][0])
            )
            scale = float(second[real].abs().max())
            assert float((first - second)[real].abs().max()) <= 1e-5 * scale, name


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m.set_use_split_qkv_input(True), "use_split_qkv_input is on"),
        (lambda m: m.blocks[0].mlp.b_in.data.fill_(1.0), "bias other than 0"),
    ],
)
def test_weights_that_enter_otherwise_are_refused(change, said):
    from tvlens.attribution.sites import weight_sites
    from tvlens.errors import HostError

    ours, _ = own_pair("llama")
    change(ours.base.model)
    with pytest.raises(HostError, match=said):
        weight_sites(ours.base)


@pytest.mark.parametrize(
    ("how", "said"), [({"attn_only": True}, "no MLPs"), ({"num_experts": 2}, "experts")]
)
def test_models_of_another_make_are_refused(how, said):
    from tvlens.errors import HostError
    from tvlens.models import LensModel

    made = hooked.hooked_transformer(hooked.hf_model("llama"))
    for name, value in how.items():
        setattr(made.cfg, name, value)
    with pytest.raises(HostError, match=said):
        LensModel.wrap(made)


def test_the_pages_lines_run():
    import re
    from pathlib import Path

    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tvlens.demo.models import demo_folder

    page = (Path(__file__).parent.parent / "docs" / "hookedtransformer.md").read_text("utf-8")
    names = {}
    for name, demo in (("base", "base"), ("tuned", "med")):
        model = AutoModelForCausalLM.from_pretrained(demo_folder(demo), dtype=torch.float32)
        names[name] = hooked.hooked_transformer(model)
        names[name].tokenizer = AutoTokenizer.from_pretrained(demo_folder(demo))
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(block, "hookedtransformer.md", "exec"), names)
    assert len(names["weights"].to_frame())
    frame = names["scores"].to_frame()
    assert frame.loc[frame["kind"] == "matrix", "score"].abs().max() > 1e-2
    assert (frame["status"] == "ok").all()
    assert len(names["passing"].to_frame())


@pytest.mark.parametrize("family", FAMILIES)
def test_moments_of_inputs_are_those_of_the_bridge_and_nothing_is_left_behind(family):
    from tvlens.models import LensModel
    from tvlens.models.covariances import covariances
    from tvlens.models.lens import _bridge

    model, batch = hooked.hf_model(family), pairs.batch()
    own = hooked.hooked_transformer(model)
    before = state(own)
    found = covariances(own, batch)
    assert_as_found(before, own)
    theirs = covariances(LensModel.wrap(_bridge(copy.deepcopy(model), "tiny")), batch)
    assert found.moments.keys() == theirs.moments.keys()
    for key, moments in theirs.moments.items():
        torch.testing.assert_close(found.moments[key].raw, moments.raw, rtol=1e-4, atol=1e-5)


def test_moments_of_folded_weights_are_refused():
    from tvlens.errors import HostError
    from tvlens.models.covariances import covariances

    folded = hooked.hooked_transformer(hooked.hf_model("llama"), folded=True)
    with pytest.raises(HostError, match="not a checkpoint's"):
        covariances(folded, pairs.batch())
