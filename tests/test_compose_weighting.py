"""Factors from attribution scores, in a merge and after it was saved."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny_checkpoints import add_noise, copy_with, tiny_adapter, tiny_llama
from tvlens.components import Component, key_columns
from tvlens.errors import StudyError

Scores = list[tuple[Component, int | None, float]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("weighting")
    base = tiny_llama(root / "base")
    return {
        "base": base,
        "a": copy_with(base, root / "a", add_noise(1)),
        "lora": tiny_adapter(base, root / "lora"),
    }


def _table(scores: Scores, tuned: str = "a"):
    from tvlens.attribution.tables import ATTRIBUTION_SCHEMA
    from tvlens.tables import Table

    count = len(scores)
    columns = {
        **key_columns([component for component, _, _ in scores]),
        "base": ["base"] * count,
        "tuned": [tuned] * count,
        "tied": [False] * count,
        "method": ["weight_ig"] * count,
        "prompt": [prompt for _, prompt, _ in scores],
        "score": [score for _, _, score in scores],
    }
    return Table.of("attribution", ATTRIBUTION_SCHEMA, columns)


def _layout(folders: dict[str, Path]):
    from tvlens.weights.matching import load_pair

    return load_pair(folders["base"], folders["a"]).layout


QUERY, KEY = Component("matrix", 0, None, "W_Q"), Component("matrix", 0, None, "W_K")
NORM = Component("norm", 1, None, "ln2.w")
WHOLE: Scores = [
    (QUERY, 0, 3.0),
    (QUERY, 1, 1.0),
    (KEY, 0, 0.25),
    (KEY, 1, 0.75),
    (Component("matrix", 1, None, "W_O"), 0, -2.0),
    (NORM, 0, 0.125),
]


def test_a_component_gets_its_share_of_the_largest_mean_of_its_kind(
    folders: dict[str, Path],
) -> None:
    from tvlens.compose.weighting import score_shares

    found = score_shares(_table(WHOLE), _layout(folders))
    assert {str(c): (s.axis, s.factors.tolist()) for c, s in found.items()} == {
        "L0.W_Q": (None, [1.0]),
        "L0.W_K": (None, [0.25]),
        "L1.W_O": (None, [0.0]),
        "L1.ln2.w": (None, [1.0]),
    }
    lower = score_shares(_table(WHOLE), _layout(folders), better="lower")
    assert float(lower[Component("matrix", 1, None, "W_O")].factors) == 1.0
    assert float(lower[QUERY].factors) == 0.0
    assert NORM not in lower  # no norm makes the metric lower


def test_heads_and_neurons_weigh_their_slices(folders: dict[str, Path]) -> None:
    from tvlens.compose.weighting import score_shares

    scores: Scores = [(Component("head", 0, i), 0, float(i)) for i in range(4)]
    scores += [(Component("kv_head", 1, 1), 0, 5.0), (Component("neuron", 0, 7), 0, 9.0)]
    scores += [(Component("neuron", 0, 7), None, 2.0), (Component("neuron", 0, 8), None, 1.0)]
    layout = _layout(folders)
    found = score_shares(_table(scores), layout, kinds=("head", "kv_head", "neuron"))
    each = torch.tensor([0, 1 / 3, 2 / 3, 1]).repeat_interleave(8)
    assert found[QUERY].axis == 1
    torch.testing.assert_close(found[QUERY].factors, each)
    output = found[Component("matrix", 0, None, "W_O")]
    assert output.axis == 0
    torch.testing.assert_close(output.factors, each)
    value = found[Component("matrix", 1, None, "W_V")].factors
    assert value.tolist() == [0.0] * 8 + [1.0] * 8
    neurons = found[Component("matrix", 0, None, "W_out")]
    assert (neurons.axis, neurons.factors[7].item(), neurons.factors[8].item()) == (0, 1.0, 0.5)
    assert KEY not in found


def test_a_merge_multiplies_by_them_and_leaves_the_rest_out(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    from tvlens.compose.combining import merge
    from tvlens.compose.verifying import verify

    found = merge(folders["base"], [folders["a"]], scales=2.0).weighed(_table(WHOLE))
    new = dict(found.tensors())
    stem = "model.layers.0.self_attn."
    norm = "model.layers.1.post_attention_layernorm.weight"
    assert new.keys() == {f"{stem}q_proj.weight", f"{stem}k_proj.weight", norm}
    base, tuned = (load_file(folders[n] / "model.safetensors") for n in ("base", "a"))
    for name, share in ((f"{stem}q_proj.weight", 1.0), (f"{stem}k_proj.weight", 0.25)):
        wanted = base[name].double() + 2 * share * (tuned[name] - base[name]).double()
        torch.testing.assert_close(new[name], wanted.float(), rtol=0, atol=1e-7)
    found.save(tmp_path / "m")
    assert verify(tmp_path / "m").holds
    card = (tmp_path / "m" / "README.md").read_text()
    assert "weighted by component" in card


def test_low_rank_stays_low_rank(folders: dict[str, Path], tmp_path: Path) -> None:
    from tvlens.compose.combining import merge
    from tvlens.compose.verifying import verify
    from tvlens.weights.delta import LowRank

    scores: Scores = [(Component("head", 0, i), 0, float(i)) for i in range(4)]
    plain = merge(folders["base"], [folders["lora"]])
    found = plain.weighed(_table(scores, "lora"), kinds=("head",))
    delta = found.delta(QUERY)
    assert isinstance(delta, LowRank)
    each = torch.tensor([0, 1 / 3, 2 / 3, 1]).repeat_interleave(8)
    torch.testing.assert_close(delta.dense(), plain.delta(QUERY).dense() * each)
    found.save(tmp_path / "lora", as_lora=4)
    assert verify(tmp_path / "lora").holds


def test_a_table_that_weighs_nothing_is_refused(folders: dict[str, Path]) -> None:
    from tvlens.compose.combining import merge
    from tvlens.compose.weighting import score_shares

    with pytest.raises(StudyError, match="no weight_ig score of matrix that makes the metric high"):
        score_shares(_table(WHOLE[4:5]), _layout(folders), kinds=("matrix",))
    with pytest.raises(StudyError, match="has no scores of a; it has those of other"):
        merge(folders["base"], [folders["a"]]).weighed(_table(WHOLE, "other"))
