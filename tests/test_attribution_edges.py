"""Edges: identities in every family, TransformerLens's numbers, plain forwards of transformers."""

import pytest
import torch

from . import attribution_pairs as pairs
from .test_attribution_nodes import FAMILIES, all_double, batch, double_pair, metric

__all__ = ["all_double"]
WITHIN = ("clean_into_corrupt", "corrupt_into_clean")
DIRECTIONS = (*WITHIN, "tuned_into_base", "base_into_tuned", "zero_ablation", "mean_ablation")


def asked(hooked, direction="clean_into_corrupt", **how):
    from tvlens.attribution.directions import question

    return question(hooked, metric(), direction, **how)


def scored(hooked, rows, direction="clean_into_corrupt", **how):
    from tvlens.attribution.edges import edge_scores

    return edge_scores(asked(hooked, direction), rows, **how)


def exact_matrix(hooked, rows, edges, direction):
    """Exact effects [prompt, edge] in the order of ``edges``."""
    from tvlens.attribution.edge_patching import exact_edges

    frame = exact_edges(hooked, rows, metric(), edges, direction=direction).to_frame()
    wide = frame.pivot(index="prompt", columns="component", values="score")
    return torch.tensor(wide[[str(edge.component) for edge in edges]].to_numpy())


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("direction", WITHIN)
def test_edges_out_of_a_source_sum_to_the_score_of_what_it_writes(family, direction):
    """Within one model a head's result has the first-order score of its z."""
    from tvlens.attribution.activations import activation_scores

    hooked, rows = pairs.hooked_pair(family), batch()
    found = scored(hooked, rows, direction)
    of_nodes = activation_scores(
        asked(hooked, direction), rows, parts=("embed", "z", "attn_out", "mlp_out")
    )
    nodes = {cut.part: values for cut, values in of_nodes.values.items()}
    out, allowed = found.values.sum(2), 1e-5 * float(found.values.abs().max())
    for place, source in enumerate(found.graph.sources):
        part = {"result": "z"}.get(source.part, source.part)
        if part == "b_O":
            assert not out[:, place].any()
            continue
        expected = nodes[part][:, source.layer or 0, source.index or 0]
        torch.testing.assert_close(out[:, place], expected.double(), rtol=0, atol=allowed)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_all_edges_together_give_the_other_run_and_none_gives_the_receiver(family):
    from tvlens.attribution.edge_graph import EdgeGraph
    from tvlens.attribution.edge_patching import edges_together

    hooked, rows = pairs.hooked_pair(family), batch()
    question = asked(hooked)
    every = EdgeGraph(hooked.tuned).exists
    clean = hooked.values(hooked.tuned, metric(), rows).detach()
    patch = question.patch(rows, {})
    corrupt = patch.reading.value(patch.reading.logits(hooked.tuned, patch.receiver_ids)).detach()
    for chosen, expected in ((every, clean), (torch.zeros_like(every), corrupt)):
        values = edges_together(question, rows, chosen)
        torch.testing.assert_close(values, expected.double(), rtol=0, atol=2e-6)
    assert float((clean - corrupt).abs().min()) > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("direction", ["clean_into_corrupt", "base_into_tuned", "zero_ablation"])
def test_one_edge_is_the_same_alone_and_as_a_set_of_one(family, direction):
    from tvlens.attribution.edge_graph import EdgeGraph
    from tvlens.attribution.edge_patching import edges_together

    hooked, rows = pairs.hooked_pair(family), batch()
    question, graph = asked(hooked, direction), EdgeGraph(hooked.tuned)
    edges = graph.edges[::7]
    alone = exact_matrix(hooked, rows, edges, direction)
    nothing = torch.zeros_like(graph.exists)
    plain, sign = edges_together(question, rows, nothing), question.patch(rows, {}).sign
    assert float(alone.abs().max()) > 0.01
    for column, edge in enumerate(edges):
        one = nothing.clone()
        one[graph.place(edge)] = True
        moved = sign * (edges_together(question, rows, one) - plain)
        torch.testing.assert_close(alone[:, column], moved, rtol=0, atol=5e-6)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_an_edges_score_is_the_slope_of_its_exact_patch_in_double_precision(
    family, all_double, monkeypatch
):
    """A small step of what is exchanged, both ways, through the exact patch."""
    from tvlens.attribution import edge_patching

    hooked, rows = double_pair(family), batch(lengths=(5,))
    found = scored(hooked, rows, "tuned_into_base")
    edges = found.graph.edges[::5]
    whole, step, ends = edge_patching.differences, 1e-4, []
    for share in (step, -step):

        def part(patch, graph, share=share):
            return share * whole(patch, graph)

        monkeypatch.setattr(edge_patching, "differences", part)
        ends.append(exact_matrix(hooked, rows, edges, "tuned_into_base")[0])
    slopes = (ends[0] - ends[1]) / (2 * step)
    estimates = torch.stack([found.values[0][found.graph.place(edge)] for edge in edges])
    allowed = 1e-6 * float(found.values.abs().max())
    torch.testing.assert_close(estimates, slopes, rtol=0, atol=allowed)


@pytest.mark.parametrize("family", ["gpt2", "neox"])
def test_edges_equal_those_of_transformerlens(family):
    """Where each head has keys of its own; TransformerLens refuses grouped ones."""
    from transformer_lens.tools.analysis import attribution_patching as theirs

    try:
        how = theirs.EdgeAttributionConfig(granularity="edge")
    except NotImplementedError:
        pytest.skip("TransformerLens 3.9 has no edges")
    hooked, rows = pairs.hooked_pair(family), batch()
    found = scored(hooked, rows)
    places = {str(edge.component): found.graph.place(edge) for edge in found.graph.edges}
    compared = 0
    for prompt in range(len(rows)):
        alone = rows.rows([prompt])
        length = int(alone.prompt_lengths[0])
        answer, wrong = int(alone.answer_ids[0][0]), int(alone.wrong_ids[0][0])
        result = theirs.attribution_patch(
            hooked.tuned.model,
            alone.ids[:, :length],
            alone.corrupted().ids[:, :length],
            lambda logits, last=length - 1, a=answer, w=wrong: (
                logits[0, last, a] - logits[0, last, w]
            ),
            how,
        )
        summed = {}
        for (source, target), score in result.edge_scores.items():
            label = f"{_their_name(source)}->{_their_name(target)}"
            summed[label] = summed.get(label, 0.0) + score
        largest = max(abs(score) for score in summed.values())
        for label, score in summed.items():
            assert float(found.values[prompt][places[label]]) == pytest.approx(
                score, abs=2e-6 * largest
            ), label
            compared += 1
    without_biases = [e for e in found.graph.edges if e.source.part != "b_O"]
    assert compared == len(rows) * len(without_biases)


def _their_name(node):
    if node.kind in ("embed", "logits"):
        return node.kind
    if node.head is None:
        return f"L{node.layer}.{node.kind}"
    letter = "K" if node.kind in ("k_input", "v_input") else "H"
    return f"L{node.layer}{letter}{node.head}.{node.kind.replace('attn_head_out', 'result')}"


ENDS = {
    "head to query": (("head", 0, 1, "result"), ("head", 1, 2, "q_input")),
    "head to shared key": (("head", 0, 3, "result"), ("kv_head", 1, 1, "k_input")),
    "head to shared value": (("head", 0, 0, "result"), ("kv_head", 1, 0, "v_input")),
    "head to its own MLP": (("head", 0, 2, "result"), ("node", 0, None, "mlp_in")),
    "MLP to MLP": (("node", 0, None, "mlp_out"), ("node", 1, None, "mlp_in")),
    "embedding to value": (("node", None, None, "embed"), ("kv_head", 0, 1, "v_input")),
    "head to logits": (("head", 1, 3, "result"), ("node", None, None, "logits")),
}


@pytest.mark.slow
@pytest.mark.parametrize("which", ENDS)
@pytest.mark.parametrize("direction", ["clean_into_corrupt", "tuned_into_base"])
def test_an_exact_edge_is_a_plain_forward_of_transformers_with_one_reader_moved(which, direction):
    """No hook of TransformerLens: torch hooks on the modules of two Llamas of transformers."""
    from tvlens.attribution.tables import Edge
    from tvlens.components import Component
    from tvlens.models.lens import LensModel, _bridge
    from tvlens.models.pair import HookedPair

    models = {name: pairs.hf_model("llama") for name in ("base", "tuned")}
    pairs.noised(models["tuned"])
    lenses = [LensModel.wrap(_bridge(pairs.hf_model("llama"), name)) for name in models]
    pairs.noised(lenses[1].model.original_model)
    hooked, rows = HookedPair.of(*lenses), batch(lengths=(6,))
    source, target = (Component(*end) for end in ENDS[which])
    ours = exact_matrix(hooked, rows, [Edge(source, target)], direction)
    across = direction == "tuned_into_base"
    ids = {"clean": rows.ids, "corrupt": rows.corrupted().ids}
    receiver = models["base" if across else "tuned"]
    run, given = ("clean", "clean") if across else ("corrupt", "clean")
    moved = _written(models["tuned"], ids[given], source) - _written(receiver, ids[run], source)
    answer, wrong = int(rows.answer_ids[0][0]), int(rows.wrong_ids[0][0])
    values = []
    for change in (moved, torch.zeros_like(moved)):
        with torch.no_grad(), _one_reader_moved(receiver, target, change):
            logits = receiver(ids[run]).logits[0, 5]
        values.append(float(logits[answer] - logits[wrong]))
    assert abs(values[0] - values[1]) > 1e-4
    assert float(ours) == pytest.approx(values[0] - values[1], abs=5e-6)


def _written(model, ids, source):
    """What a source writes, from the modules' own inputs and outputs."""
    kept, inner = {}, model.model
    if source.part == "embed":
        return inner.embed_tokens(ids).detach()
    block = inner.layers[source.layer]
    module = block.mlp if source.part == "mlp_out" else block.self_attn.o_proj
    handle = module.register_forward_hook(lambda m, args, out: kept.update(x=args[0], y=out))
    with torch.no_grad():
        model(ids)
    handle.remove()
    if source.part == "mlp_out":
        return kept["y"]
    if source.part == "b_O":
        return module.bias.detach().expand_as(kept["y"])
    width = 8
    part = slice(source.index * width, (source.index + 1) * width)
    return kept["x"][..., part] @ module.weight[:, part].T.detach()


def _one_reader_moved(model, target, change):
    """A context in which one target's norm sees the stream plus ``change``."""
    import contextlib

    @contextlib.contextmanager
    def moved():
        handles, inner = [], model.model
        if target.part == "logits":
            hook = inner.norm.register_forward_pre_hook(lambda m, args: (args[0] + change,))
            handles.append(hook)
        else:
            block, seen = inner.layers[target.layer], {}
            mlp = target.part == "mlp_in"
            norm = block.post_attention_layernorm if mlp else block.input_layernorm
            handles.append(norm.register_forward_hook(lambda m, args, out: seen.update(x=args[0])))

            def again(module, args, out):
                other = module.forward(norm.forward(seen["x"] + change))
                if mlp:
                    return other
                out, part = out.clone(), slice(target.index * 8, target.index * 8 + 8)
                out[..., part] = other[..., part]
                return out

            attention = block.self_attn
            module = {
                "q_input": attention.q_proj,
                "k_input": attention.k_proj,
                "v_input": attention.v_proj,
                "mlp_in": block.mlp,
            }[target.part]
            handles.append(module.register_forward_hook(again))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    return moved()


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.2, 0.8])
def test_a_set_of_edges_is_a_plain_forward_of_transformers_with_streams_of_their_own(share):
    """As above, with what sources write in that very run: upstream edges have changed it."""
    from tvlens.attribution.edge_graph import EdgeGraph
    from tvlens.attribution.edge_patching import edges_together

    hooked, rows = pairs.hooked_pair("llama"), batch(lengths=(6,))
    graph = EdgeGraph(hooked.tuned)
    drawn = torch.rand(graph.exists.shape, generator=torch.Generator().manual_seed(1)) < share
    ours = edges_together(asked(hooked), rows, drawn)
    model = pairs.hf_model("llama")
    pairs.noised(model)
    clean, corrupt = rows.ids, rows.corrupted().ids
    given = {source: _written(model, clean, source) for source in graph.sources}
    chosen = {
        target: [graph.sources[u] for u in range(graph.seen[v]) if drawn[u, v]]
        for v, target in enumerate(graph.targets)
    }
    with torch.no_grad(), _OwnStreams(model, chosen, given):
        logits = model(corrupt).logits[0, 5]
    answer, wrong = int(rows.answer_ids[0][0]), int(rows.wrong_ids[0][0])
    assert float(ours) == pytest.approx(float(logits[answer] - logits[wrong]), abs=1e-5)


class _OwnStreams:
    """torch hooks: every target's norm sees the stream with its chosen sources exchanged."""

    def __init__(self, model, chosen, given):
        self.model, self.chosen, self.given = model.model, chosen, given
        self.written, self.seen, self.handles = {}, {}, []

    def __enter__(self):
        embed = pairs.component("node", None, None, "embed")
        self.on(self.model.embed_tokens, lambda m, args, out: self.written.update({embed: out}))
        for layer, block in enumerate(self.model.layers):
            before, middle = block.input_layernorm, block.post_attention_layernorm
            for norm in (before, middle):
                self.on(norm, lambda m, args, out: self.seen.update({m: args[0]}))
            attention = block.self_attn
            for name, kind in (("q", "head"), ("k", "kv_head"), ("v", "kv_head")):
                read = self.reading(layer, before, kind, f"{name}_input")
                self.on(getattr(attention, f"{name}_proj"), read)
            self.on(attention.o_proj, self.writing(layer))
            self.on(block.mlp, self.mlp(layer, middle))
        last = pairs.component("node", None, None, "logits")
        self.handles.append(
            self.model.norm.register_forward_pre_hook(
                lambda m, args: (args[0] + self.change(last),)
            )
        )

    def __exit__(self, *raised):
        for handle in self.handles:
            handle.remove()

    def on(self, module, hook):
        self.handles.append(module.register_forward_hook(hook))

    def change(self, target):
        sources = self.chosen[target]
        return sum((self.given[one] - self.written[one] for one in sources), 0.0)

    def again(self, module, norm, target):
        return module.forward(norm.forward(self.seen[norm] + self.change(target)))

    def reading(self, layer, norm, kind, part):
        def hook(module, args, out):
            moved = out.clone()
            for index in range(out.shape[-1] // 8):
                here = slice(8 * index, 8 * index + 8)
                target = pairs.component(kind, layer, index, part)
                moved[..., here] = self.again(module, norm, target)[..., here]
            return moved

        return hook

    def writing(self, layer):
        def hook(module, args, out):
            for head in range(4):
                here = slice(8 * head, 8 * head + 8)
                result = args[0][..., here] @ module.weight[:, here].T
                self.written[pairs.component("head", layer, head, "result")] = result
            bias = pairs.component("bias", layer, None, "b_O")
            self.written[bias] = module.bias.expand_as(out)

        return hook

    def mlp(self, layer, norm):
        def hook(module, args, out):
            target = pairs.component("node", layer, None, "mlp_in")
            out = self.again(module, norm, target)
            self.written[pairs.component("node", layer, None, "mlp_out")] = out
            return out

        return hook


@pytest.mark.slow
def test_an_edge_into_a_shared_key_is_the_sum_over_copies_of_it():
    """The same function with a key and value for every query head."""
    from tvlens.models.lens import LensModel, _bridge
    from tvlens.models.pair import HookedPair

    grouped, copies = pairs.hooked_pair("llama"), []
    models = [pairs.hf_model("llama") for _ in range(2)]
    pairs.noised(models[1])
    for model in models:
        shape = pairs.config("llama")
        shape.num_key_value_heads = 4
        copy, weights = type(model)(shape), dict(model.state_dict())
        for name, tensor in weights.items():
            if ".k_proj." in name or ".v_proj." in name:
                by_head = tensor.unflatten(0, (2, 8))
                weights[name] = by_head.repeat_interleave(2, dim=0).flatten(0, 1)
        copy.load_state_dict(weights)
        copies.append(LensModel.wrap(_bridge(copy.eval(), "copy")))
    rows = batch()
    ours, theirs = scored(grouped, rows), scored(HookedPair.of(*copies), rows)
    allowed = 1e-5 * float(ours.values.abs().max())
    checked = 0
    for edge in ours.graph.edges:
        mine = ours.values[(slice(None), *ours.graph.place(edge))]
        targets = [edge.target]
        if edge.target.kind == "kv_head":
            first = 2 * edge.target.index
            targets = [edge.target._replace(index=first), edge.target._replace(index=first + 1)]
            checked += 1
        split = [
            theirs.values[(slice(None), *theirs.graph.place(edge._replace(target=target)))]
            for target in targets
        ]
        torch.testing.assert_close(mine, sum(split), rtol=0, atol=allowed)
    assert checked > 20


@pytest.mark.slow
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_edges_do_not_depend_on_padding_or_on_other_prompts(direction):
    hooked = pairs.hooked_pair("llama")
    right, left = (scored(hooked, batch(side=side), direction) for side in ("right", "left"))
    allowed = 1e-4 * float(right.values.abs().max())
    torch.testing.assert_close(right.values, left.values, rtol=0, atol=allowed)
    if direction == "mean_ablation":  # the mean is over the other prompts
        return
    for prompt in range(3):
        alone = scored(hooked, batch().rows([prompt]), direction)
        torch.testing.assert_close(alone.values[0], right.values[prompt], rtol=0, atol=allowed)
    one_at_a_time = scored(hooked, batch(), direction, rows_at_once=1)
    torch.testing.assert_close(one_at_a_time.values, right.values, rtol=0, atol=allowed)


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["tuned_into_base", "base_into_tuned"])
def test_small_changes_across_models_are_what_exact_patches_say(direction):
    def little(model):
        pairs.noised(model, scale=1e-3)

    hooked, rows = pairs.hooked_pair("llama", little), batch()
    found = scored(hooked, rows, direction)
    edges = found.graph.edges
    exact = exact_matrix(hooked, rows, edges, direction)
    estimates = found.values[:, found.graph.exists]
    # what is left is second order and float32: a few per cent of the largest
    allowed = 0.03 * float(exact.abs().max())
    torch.testing.assert_close(estimates, exact, rtol=0, atol=allowed)
    assert float(torch.corrcoef(torch.stack([estimates.mean(0), exact.mean(0)]))[0, 1]) > 0.999


def test_equal_models_have_no_edges_of_any_size():
    found = scored(pairs.hooked_pair("llama", lambda model: None), batch(), "tuned_into_base")
    assert not found.values.any()
    assert found.values.shape[1:] == (13, 19)  # attention has biases here


def test_scores_are_zero_where_no_edge_is():
    found = scored(pairs.hooked_pair("neox"), batch(), "tuned_into_base")
    exists = found.graph.exists
    assert not found.values[:, ~exists].any()
    assert found.values[:, exists].any(0).float().mean() > 0.9
    labels = [str(edge.component) for edge in found.graph.edges]
    assert len(labels) == len(set(labels)) == int(exists.sum())
    assert "L0H0.result->L0.mlp_in" not in labels  # neox: attention and MLP side by side
    assert "L0H0.result->L1.mlp_in" in labels


@pytest.mark.slow
def test_the_rows_of_edges():
    from tvlens.attribution.edges import attribute_edges

    hooked, rows = pairs.hooked_pair("llama"), batch()
    table = attribute_edges(hooked, rows, metric(), direction="clean_into_corrupt", edges=10)
    found, frame = scored(hooked, rows), table.to_frame()
    mean, by_prompt = frame[frame["prompt"].isna()], frame[frame["prompt"].notna()]
    assert set(frame["kind"]) == set(frame["space"]) == {"edge"}
    assert len(mean) == len(found.graph.edges) == 95
    size = {}
    for edge in found.graph.edges:
        values = found.values[(slice(None), *found.graph.place(edge))]
        size[str(edge.component)] = float(values.abs().mean())
        row = mean[mean["component"] == str(edge.component)].iloc[0]
        assert row["score"] == pytest.approx(float(values.mean()), abs=1e-9)
        assert row["mean_abs"] == pytest.approx(float(values.abs().mean()), abs=1e-9)
        assert (row["source"], row["target"]) == (str(edge.source), str(edge.target))
        assert row["n"] == 3
        assert row["ci_low"] <= row["score"] <= row["ci_high"]
    with_rows = set(by_prompt["component"])
    largest = sorted(size, key=lambda label: -size[label])[:10]
    assert {*largest} <= with_rows
    assert len(with_rows) == 10 + 64
    assert len(by_prompt) == 3 * 74
    labelled = {str(edge.component): edge for edge in found.graph.edges}
    for row in by_prompt.itertuples():
        expected = float(found.of(labelled[row.component])[int(row.prompt)])
        assert row.score == pytest.approx(expected, abs=1e-9)
        assert row.component == f"{row.source}->{row.target}"
    ranked = [str(edge.component) for edge in found.ranked()]
    means = {c: abs(s) for c, s in zip(mean["component"], mean["score"], strict=True)}
    assert ranked[0] == max(means, key=lambda label: means[label])


@pytest.mark.slow
def test_what_has_no_edge_is_refused():
    from tvlens.attribution.edge_patching import exact_edges
    from tvlens.attribution.edges import attribute_edges
    from tvlens.attribution.tables import Edge
    from tvlens.components import Component
    from tvlens.errors import HostError, PromptError

    hooked, rows = pairs.hooked_pair("llama"), batch()
    late = Edge(Component("head", 1, 0, "result"), Component("head", 0, 0, "q_input"))
    unknown = Edge(Component("head", 0, 0, "z"), Component("node", 1, None, "mlp_in"))
    for edge in (late, unknown):
        with pytest.raises(HostError, match="no edge from"):
            exact_edges(hooked, rows, metric(), [edge], direction="tuned_into_base")
    with pytest.raises(PromptError, match="corrupt"):
        attribute_edges(hooked, pairs.batch(), metric(), direction="clean_into_corrupt")
    with pytest.raises(HostError, match="no line between its inputs"):
        attribute_edges(hooked, rows, metric(), direction="tuned_into_base", estimator="ig_inputs")


def test_a_distance_at_its_own_end_is_refused():
    from tvlens.attribution.edges import attribute_edges
    from tvlens.errors import MetricError
    from tvlens.models import SHIPPED

    hooked = pairs.hooked_pair("llama")
    with pytest.raises(MetricError):
        attribute_edges(hooked, batch(), SHIPPED["kl_to_base"], direction="tuned_into_base")


def test_a_family_whose_blocks_do_not_add_up_is_refused():
    """Granite multiplies what blocks write before it is added."""
    import transformers

    from tvlens.attribution.edges import attribute_edges
    from tvlens.errors import HostError
    from tvlens.models.lens import LensModel, _bridge
    from tvlens.models.pair import HookedPair

    shape = transformers.GraniteConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        residual_multiplier=0.3,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(shape, attn_implementation="eager")
        models.append(LensModel.wrap(_bridge(model.eval(), "granite")))
    with pytest.raises(HostError, match="does not add up"):
        attribute_edges(HookedPair.of(*models), batch(), metric(), direction="clean_into_corrupt")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "neox"])
def test_every_stream_and_every_reading_of_it_is_checked(family):
    from tvlens.attribution.edge_graph import EdgeGraph
    from tvlens.attribution.nodes import activations
    from tvlens.errors import HostError

    hooked, rows = pairs.hooked_pair(family), batch()
    graph = EdgeGraph(hooked.base)
    found = activations(hooked.base, rows.ids, rows.mask, graph.checked_at)
    graph.require_sums(found)
    for hook in graph.checked_at:
        moved = found[hook].clone()
        moved[0, 2] += 0.02 * moved.abs().max()
        with pytest.raises(HostError, match="does not add up"):
            graph.require_sums({**found, hook: moved})


@pytest.mark.slow
def test_models_are_left_as_found_after_success_and_after_an_exception():
    from tvlens.attribution.edge_patching import edges_together, exact_edges
    from tvlens.attribution.edges import attribute_edges
    from tvlens.models import Metric

    from .test_attribution_activations import state

    hooked, rows = pairs.hooked_pair("llama"), batch()
    before, found = state(hooked), scored(hooked, rows)
    edges = found.graph.edges[:3]
    attribute_edges(hooked, rows, metric(), direction="corrupt_into_clean")
    exact_edges(hooked, rows, metric(), edges, direction="tuned_into_base")
    edges_together(asked(hooked), rows, found.graph.exists)
    assert state(hooked) == before

    def fails(run, batch):
        raise RuntimeError("a metric of the user's")

    broken = Metric("broken", "nats", "higher", fails)
    for call in (
        lambda: attribute_edges(hooked, rows, broken, direction="tuned_into_base"),
        lambda: exact_edges(hooked, rows, broken, edges, direction="tuned_into_base"),
    ):
        with pytest.raises(RuntimeError, match="of the user's"):
            call()
        assert state(hooked) == before


@pytest.mark.slow
def test_edges_in_bfloat16_are_a_scan_and_nothing_exact():
    from tvlens.attribution.edge_patching import edges_together, exact_edges
    from tvlens.errors import HostError
    from tvlens.models.lens import LensModel, _bridge
    from tvlens.models.pair import HookedPair

    wide, narrow = ([pairs.hf_model("llama") for _ in range(2)] for _ in range(2))
    for models in (wide, narrow):
        pairs.noised(models[1], scale=0.1)
    full, half = (
        HookedPair.of(*(LensModel.wrap(_bridge(m.to(dtype), "tiny")) for m in models))
        for models, dtype in ((wide, torch.float32), (narrow, torch.bfloat16))
    )
    rows = batch()
    there = scored(full, rows).graph.exists
    one, other = (scored(pair, rows).values[:, there].mean(0) for pair in (full, half))
    assert float(torch.corrcoef(torch.stack([one, other]))[0, 1]) > 0.99
    found = scored(half, rows)
    for exact in (
        lambda: exact_edges(
            half, rows, metric(), found.graph.edges[:1], direction="clean_into_corrupt"
        ),
        lambda: edges_together(asked(half), rows, there),
    ):
        with pytest.raises(HostError, match="needs float32"):
            exact()
