"""A pass that begins at a block, and logits made only where they are read."""

import pytest
import torch

from . import attribution_pairs as pairs

FAMILIES = ("llama", "gpt2", "neox")


def metrics():
    from tvlens.models.metrics import SHIPPED

    return SHIPPED


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["logit_diff", "logprob", "logprob_mean", "loss", "kl_to_tuned"])
def test_a_metric_reads_the_same_from_the_logits_it_needs_as_from_all(family, name):
    from tvlens.models.metrics import Run

    hooked, batch, metric = pairs.hooked_pair(family), pairs.batch(), metrics()[name]
    with torch.no_grad():
        reference = hooked.tuned(batch.ids, batch.mask) if metric.reference else None
        whole = metric(Run(hooked.base(batch.ids, batch.mask), reference), batch)
    reading = hooked.reading(metric, batch)
    with torch.no_grad():
        logits = reading.logits(hooked.base)
        torch.testing.assert_close(reading.value(logits), whole, rtol=1e-5, atol=1e-6)
    assert logits.shape[1] == 3 < batch.ids.shape[1]  # two answer tokens and the one before


def test_documents_are_read_everywhere_and_an_own_metric_gets_everything():
    from tvlens.models.metrics import Metric
    from tvlens.models.prompts import Batch
    from tvlens.models.reading import Reading

    documents = Batch.of_ids([[1, 2, 3, 4], [5, 6]])
    assert documents.reading_positions.tolist() == [[0, 1, 2, 3]] * 2
    cut = documents.cut_to_answers()
    assert torch.equal(cut.scored, documents.scored)
    assert torch.equal(cut.ids, documents.ids)
    own = Metric("mine", "logits", "higher", lambda run, batch: run.logits[:, 0, 7])
    reading = Reading.of(own, pairs.batch())
    assert reading.cut is reading.batch
    assert reading.positions.tolist() == [list(range(13))] * 4


def test_the_cut_batch_holds_each_answer_and_the_token_before_it():
    from tvlens.models.prompts import Batch

    batch = Batch.of_ids([[1, 2, 3], [4]], answers=[[5], [6, 7, 8]])
    cut = batch.cut_to_answers()
    assert batch.reading_positions.tolist() == [[2, 3, 3, 3], [0, 1, 2, 3]]
    assert cut.ids.tolist()[1] == [4, 6, 7, 8]
    assert cut.ids.tolist()[0][:2] == [3, 5]
    assert cut.mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert cut.scored.tolist() == [[False, True, False, False], [False, True, True, True]]
    assert cut.n_scored.tolist() == batch.n_scored.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_replay_from_any_block_is_the_whole_pass(family):
    from tvlens.models.replay import replay

    hooked, batch = pairs.hooked_pair(family), pairs.batch()
    reading = hooked.reading(metrics()["logprob"], batch)
    begun = replay(hooked.base, batch.ids, batch.mask, reading.positions)
    whole = begun.record({0, 1, 2})
    with torch.no_grad():
        for layer in (None, 0, 1, 2):
            torch.testing.assert_close(begun.logits(layer), whole, rtol=0, atol=1e-6)
    begun.record({1})
    with pytest.raises(KeyError):
        begun.logits(0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_replay_sees_new_weights_and_hooks_from_its_block_on(family):
    from tvlens.models.replay import replay

    hooked, batch = pairs.hooked_pair(family), pairs.batch()
    reading = hooked.reading(metrics()["logprob"], batch)
    begun = replay(hooked.base, batch.ids, batch.mask, reading.positions)
    plain = begun.record({1, 2})
    hook = ("blocks.1.mlp.hook_post", lambda activation, hook: 2 * activation)
    with torch.no_grad(), hooked.base.hooks(fwd=[hook]):
        whole, replayed, after = begun.whole(), begun.logits(1), begun.logits(2)
    torch.testing.assert_close(replayed, whole, rtol=0, atol=1e-6)
    assert float((whole - plain).abs().max()) > 1e-3
    torch.testing.assert_close(after, plain, rtol=0, atol=1e-6)


def test_a_family_that_does_more_than_its_blocks_makes_whole_passes(caplog):
    from tvlens.models.replay import replay

    hooked, batch = pairs.hooked_pair("llama"), pairs.batch()
    reading = hooked.reading(metrics()["logprob"], batch)
    model = hooked.base.model.original_model
    forward = model.forward

    def capped(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = torch.tanh(output.logits / 0.5) * 0.5
        return output

    model.forward = capped
    begun = replay(hooked.base, batch.ids, batch.mask, reading.positions)
    assert begun.from_tokens
    assert "whole" in caplog.text
    with torch.no_grad():
        whole = begun.record({1})
        torch.testing.assert_close(begun.logits(1), whole, rtol=0, atol=1e-6)
    assert float(whole.abs().max()) <= 0.5


def test_only_the_blocks_above_an_edit_are_run():
    from tvlens.attribution.exact import exact_weight_scores

    hooked, batch = pairs.hooked_pair("llama"), pairs.batch()
    runs = {0: 0, 1: 0}

    def counting(layer):
        def hook_function(module, args):
            runs[layer] += 1

        return hook_function

    for layer in runs:
        hooked.base.model.blocks[layer].register_forward_pre_hook(counting(layer))
    edits = [pairs.component("head", 1, index, None) for index in range(4)]
    exact_weight_scores(
        hooked, batch, metrics()["logprob"], edits, method="exact_weight_path", nodes=3
    )
    whole = 1 + 3  # the trial of the replay, and one recording at each node
    assert runs[0] == whole
    assert runs[1] == whole + 1 + 2 * 3 * len(edits)


def test_the_first_block_that_feels_an_edit():
    from tvlens.attribution.exact import first_block
    from tvlens.attribution.sites import pieces, weight_path

    hooked = pairs.hooked_pair("gpt2")
    with weight_path(hooked) as path:
        for key, block in (
            (("head", 1, 0, None), 1),
            (("norm", 0, None, "ln2.w"), 0),
            (("norm", None, None, "ln_final.w"), 2),
            (("embedding", None, None, "W_U"), 2),
            (("embedding", None, None, "W_E"), None),
            (("embedding", None, None, "W_pos"), None),
        ):
            parts = pieces(pairs.component(*key), hooked.base, path.sites)
            assert first_block(parts, path.sites, hooked.base) == block
