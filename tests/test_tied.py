"""A pair in which one model ties its unembedding to the embedding and the other does not."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.tiny_checkpoints import copy_with, tiny_llama
from tvlens.components import Component

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
W_E = Component("embedding", None, None, "W_E")
W_U = Component("embedding", None, None, "W_U")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tied and untied; of the untied one, three embedding rows and one head row have moved."""
    root = tmp_path_factory.mktemp("ties")
    tied = tiny_llama(root / "tied", tie_word_embeddings=True)

    def part(tensors: dict[str, Tensor]) -> None:
        head = tensors[EMBED].clone()
        head[11] += 0.5
        tensors[EMBED][3:6] -= 0.05
        tensors[HEAD] = head

    untied = copy_with(tied, root / "untied", part)
    config = json.loads((untied / "config.json").read_text())
    (untied / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    return {"tied": tied, "untied": untied}


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), [("tied", "untied"), ("untied", "tied")])
def test_both_uses_of_the_tied_tensor_have_their_own_difference(
    folders: dict[str, Path], first: str, second: str
) -> None:
    from tvlens.geometry.decompose import decompose
    from tvlens.weights.matching import load_pair

    pair = load_pair(folders[first], folders[second])
    sign = 1.0 if first == "tied" else -1.0
    embedding = torch.zeros(64, 32)
    embedding[3:6] = -0.05 * sign
    head = torch.zeros(32, 64)
    head[:, 11] = 0.5 * sign
    torch.testing.assert_close(pair.read(W_E).dense_delta(), embedding)
    torch.testing.assert_close(pair.read(W_U).dense_delta(), head)
    stored = load_file(folders[first] / "model.safetensors")
    torch.testing.assert_close(pair.read(W_U).base, stored.get(HEAD, stored[EMBED]).T)
    rows = decompose(pair).to_frame().set_index("component")
    assert rows.loc["embed.W_E", "delta_norm"] == pytest.approx(0.05 * (3 * 32) ** 0.5)
    assert rows.loc["unembed.W_U", "delta_norm"] == pytest.approx(0.5 * 32**0.5)
    base_norm = float(stored.get(HEAD, stored[EMBED]).norm())
    assert rows.loc["unembed.W_U", "base_norm"] == pytest.approx(base_norm)
    assert not rows.loc[["embed.W_E", "unembed.W_U"], "tied"].any()
    fractions = {
        entry.tuned if first == "tied" else entry.base: entry.equal_fraction
        for entry in pair.load_report.tensors
        if EMBED in (entry.base, entry.tuned)
    }
    assert fractions == {EMBED: 61 / 64, HEAD: 63 / 64}


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), [("tied", "untied"), ("untied", "tied")])
def test_both_uses_are_attributed_apart_and_sum_to_the_change(
    folders: dict[str, Path], first: str, second: str
) -> None:
    from tvlens.attribution.weights import weight_scores, weight_table
    from tvlens.models.metrics import SHIPPED
    from tvlens.models.pair import HookedPair
    from tvlens.models.prompts import Batch

    hooked = HookedPair((folders[first], folders[second]))
    batch = Batch.of_ids([[1, 4, 9], [7, 3, 2]], answers=[[11], [12]], wrongs=[[13], [11]])
    metric = SHIPPED["logit_diff"]
    scores = weight_scores(hooked, batch, metric)
    by_name = {str(c): scores.values[i] for i, c in enumerate(scores.components)}
    both = by_name["embed.W_E"] + by_name["unembed.W_U"]
    assert scores.change.abs().min() > 0.01
    torch.testing.assert_close(both, scores.change, rtol=2e-3, atol=1e-4)
    # the head alone: its row moves the logit by 0.5 times the sum of the final residual stream
    alone = weight_scores(hooked, batch, metric, estimator="first_order", at="tuned")
    head = next(alone.values[i] for i, c in enumerate(alone.components) if c == W_U)
    torch.testing.assert_close(head, _head_effect(hooked, metric, batch, first), atol=2e-5, rtol=0)
    rows = weight_table(scores, hooked, batch, metric).to_frame()
    assert not rows.loc[rows["part"].isin(["W_E", "W_U"]), "tied"].any()


def _head_effect(hooked, metric, batch, first: str) -> Tensor:
    """Of the head's difference in the tuned model, by editing the logits."""
    from tvlens.models.metrics import Run

    tuned = hooked.tuned
    final = {}
    hook = [("unembed.hook_in", lambda x, hook: final.update(x=x.detach().clone()))]
    with torch.no_grad(), tuned.hooks(fwd=hook):
        logits = tuned(batch.ids, batch.mask)
    sign = 1.0 if first == "tied" else -1.0
    without = logits.clone()
    without[:, :, 11] -= sign * 0.5 * final["x"].sum(-1)
    return (metric(Run(logits, None), batch) - metric(Run(without, None), batch)).double()


@pytest.mark.slow
def test_two_tied_models_say_so_in_both_tables(folders: dict[str, Path], tmp_path: Path) -> None:
    from tvlens.attribution.weights import weight_scores, weight_table
    from tvlens.models.metrics import SHIPPED
    from tvlens.models.pair import HookedPair
    from tvlens.models.prompts import Batch
    from tvlens.weights.matching import load_pair

    tuned = copy_with(folders["tied"], tmp_path / "tuned", lambda t: t[EMBED].mul_(1.1))
    assert load_pair(folders["tied"], tuned).read(W_E).tied
    hooked = HookedPair((folders["tied"], tuned))
    batch = Batch.of_ids([[1, 4, 9]], answers=[[11]], wrongs=[[13]])
    metric = SHIPPED["logit_diff"]
    table = weight_table(weight_scores(hooked, batch, metric), hooked, batch, metric)
    rows = table.to_frame()
    assert rows.loc[rows["part"].isin(["W_E", "W_U"]), "tied"].all()
