"""Sets of edges: exact shares, a planted circuit, what is refused."""

import pytest
import torch

from . import attribution_pairs as pairs
from .test_attribution_edges import asked, scored
from .test_attribution_nodes import batch, metric

LENGTHS = (6, 4, 7, 5, 6, 8)
CHOOSE, JUDGE = [0, 2, 4], [1, 3, 5]


def circuits(hooked, rows, direction="clean_into_corrupt", **how):
    from tvlens.attribution.edge_circuits import edge_circuits

    found = scored(hooked, rows, direction)
    table = edge_circuits(
        asked(hooked, direction), rows, [found], **{"choose": CHOOSE, "judge": JUDGE} | how
    )
    return found, table.to_frame()


@pytest.fixture(scope="module")
def hooked():
    return pairs.hooked_pair("llama")


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["clean_into_corrupt", "corrupt_into_clean"])
def test_all_edges_are_all_of_the_change_and_shares_are_those_of_runs(hooked, direction):
    from tvlens.attribution.edge_patching import edges_together

    rows = batch(lengths=LENGTHS)
    found, frame = circuits(hooked, rows, direction)
    whole = frame[frame["k"] == 95]
    assert len(whole) == 4
    assert (whole["value"] - 1).abs().max() < 1e-5
    question, every = asked(hooked, direction), found.graph.exists
    none = torch.zeros_like(every)
    ends = (every, none) if direction == "clean_into_corrupt" else (none, every)

    def clean_and_corrupt(split):
        return [float(edges_together(question, rows.rows(split), given).mean()) for given in ends]

    clean, corrupt = clean_and_corrupt(JUDGE)
    change = clean - corrupt
    # by hand: the four edges whose mean over the choosing prompts favours the change most
    higher, lower = clean_and_corrupt(CHOOSE)
    toward = 1.0 if higher > lower else -1.0
    means = {edge: toward * float(found.of(edge)[CHOOSE].mean()) for edge in found.graph.edges}
    four = sorted(means, key=lambda edge: -means[edge])[:4]
    given = none.clone()
    for edge in four:
        given[found.graph.place(edge)] = True
    with_four = float(edges_together(question, rows.rows(JUDGE), given).mean())
    without = float(edges_together(question, rows.rows(JUDGE), found.graph.exists & ~given).mean())
    start, end = (corrupt, clean) if direction == "clean_into_corrupt" else (clean, corrupt)
    expected = {
        "restored": (with_four - start) / (end - start),
        "destroyed": (end - without) / (end - start),
    }
    assert abs(change) > 0.01
    for curve, value in expected.items():
        row = frame[
            (frame["curve"] == curve)
            & (frame["k"] == 4)
            & (frame["split"] == "judge")
            & (frame["ranked_by"] == "edge_first_order")
        ]
        assert row["value"].item() == pytest.approx(value, abs=1e-4)
        assert row["ci_low"].item() <= value + 1e-6
        assert row["n"].item() == 3
        assert row["change"].item() == pytest.approx(end - start, abs=1e-5)
        assert row["change_low"].item() <= end - start <= row["change_high"].item()


@pytest.mark.slow
def test_sizes_random_sets_and_rows(hooked):
    _, frame = circuits(hooked, batch(lengths=LENGTHS))
    assert sorted(frame["k"].unique()) == [1, 4, 16, 64, 95]
    drawn = frame[frame["ranked_by"] == "random"]
    assert sorted(drawn["draw"].unique()) == [0, 1]
    assert len(frame) == 2 * 2 * (5 + 2 * 4)
    assert set(frame["of"]) == {95}
    _, again = circuits(hooked, batch(lengths=LENGTHS))
    _, other = circuits(hooked, batch(lengths=LENGTHS), seed=1)
    assert frame["value"].equals(again["value"])
    changed = other["ranked_by"] == "random"
    assert not frame["value"][changed].equals(other["value"][changed])
    assert frame["value"][~changed].equals(other["value"][~changed])


@pytest.mark.slow
def test_random_sets_have_as_many_edges_into_each_kind_of_reader(hooked):
    from tvlens.attribution.edge_circuits import _Search

    rows = batch(lengths=LENGTHS)
    search = _Search(asked(hooked), rows, {"choose": CHOOSE, "judge": JUDGE}, 0)
    chosen = search.order(scored(hooked, rows))[:20]
    drawn = search.random(chosen, 0)
    edges = search.graph.edges

    def parts(places):
        return sorted(str(edges[place].target.part) for place in places.tolist())

    assert parts(drawn) == parts(chosen)
    assert len(set(drawn.tolist())) == 20
    assert set(drawn.tolist()) != set(chosen.tolist())


@pytest.mark.slow
def test_a_planted_circuit_is_found():
    """A model whose answer depends on its prompt through one MLP alone: others write nothing."""
    from tvlens.models.lens import LensModel, _bridge
    from tvlens.models.pair import HookedPair

    def of_one_mlp():
        model = pairs.hf_model("llama", tied=False)
        with torch.no_grad():
            for number, layer in enumerate(model.model.layers):
                layer.self_attn.o_proj.weight.zero_()
                layer.self_attn.o_proj.bias.zero_()
                if number == 1:
                    layer.mlp.down_proj.weight.zero_()
            # what the embedding says of a token lies where no logit reads it
            model.model.embed_tokens.weight[:, 16:] = 0.0
            model.model.layers[0].mlp.down_proj.weight[:16] = 0.0
            model.lm_head.weight[:, :16] = 0.0
        return model

    hooked = HookedPair.of(*(LensModel.wrap(_bridge(of_one_mlp(), "one")) for _ in range(2)))
    rows = batch(lengths=LENGTHS)
    found, frame = circuits(hooked, rows)
    # the norms at the end see all that is written, so the embedding is not without effect there
    two = {"embed->L0.mlp_in", "L0.mlp_out->logits", "embed->logits"}
    size = found.values.abs().mean(0)
    others = {
        str(edge.component): float(size[found.graph.place(edge)])
        for edge in found.graph.edges
        if str(edge.component) not in two
    }
    assert max(others.values()) == 0.0
    mine = frame[(frame["ranked_by"] == "edge_first_order") & (frame["split"] == "judge")]
    restored = mine[mine["curve"] == "restored"].set_index("k")["value"]
    # what the embedding does to the last norm is against the change and comes last
    assert restored[4] == pytest.approx(1.0, abs=0.02)
    assert {str(edge.component) for edge in found.ranked(CHOOSE)[:3]} == two
    drawn = frame[(frame["ranked_by"] == "random") & (frame["k"] == 4)]
    assert drawn["value"].abs().max() < 0.9


def test_what_cannot_be_judged_is_refused(hooked):
    from tvlens.errors import PromptError, StudyError
    from tvlens.models.prompts import Batch

    rows = batch(lengths=LENGTHS)
    with pytest.raises(PromptError, match="one of the splits"):
        circuits(hooked, rows, judge=[])
    ids = [[3, 4, 5]] * 4
    same = Batch.of_ids(ids, answers=[[7]] * 4, wrongs=[[8]] * 4, corrupts=ids)
    with pytest.raises(StudyError, match="nothing to restore"):
        circuits(hooked, same, choose=[0, 1], judge=[2, 3])
    assert metric().name == "logit_diff"
