"""Each family on a planted pair: what was changed is found where it is, with sign and size."""

import math
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import nn

from tests.tiny_checkpoints import FAMILIES

LAYER, HEAD, NEURON = 1, 2, 7
STRETCH, TURN, LOUDER = 0.05, 0.3, 0.25
"""Head 2 writes 5 % more, neuron 7 writes 0.3 rad elsewhere, one gain is 25 % larger."""
ZERO_CENTRED = ("gemma2", "gemma3")
GAINS = {"gpt2": ("ln_1", "ln1"), "olmo2": ("self_attn.k_norm", "k_norm")} | {
    "gemma2": ("post_feedforward_layernorm", "ln2_post"),
    "gemma3": ("self_attn.q_norm", "q_norm"),
    "qwen3": ("self_attn.q_norm", "q_norm"),
}
"""The norm that is planted in, its module and its name; ``ln1`` of the others."""


def _plant(model: nn.Module, family: str) -> None:
    """Change one head, one neuron and one gain of a live transformers model.

    Written with the model's own modules and its forward pass in mind, not with tvlens's tables.
    """
    block = _block(model, family)
    conv = family == "gpt2"
    output = block.get_submodule({"gpt2": "attn.c_proj", "neox": "attention.dense"}.get(
        family, "self_attn.o_proj"
    ))  # fmt: skip
    write = block.get_submodule({"gpt2": "mlp.c_proj", "neox": "mlp.dense_4h_to_h"}.get(
        family, "mlp.down_proj"
    ))  # fmt: skip
    gain = block.get_submodule(GAINS.get(family, ("input_layernorm", ""))[0]).weight
    with torch.no_grad():
        # What a head writes is its slice of the output map's input axis.
        heads = output.weight if conv else output.weight.T
        d_head = heads.shape[0] // 4
        heads[HEAD * d_head : (HEAD + 1) * d_head] *= 1 + STRETCH
        neuron = (write.weight if conv else write.weight.T)[NEURON]
        across = torch.randn(neuron.shape, generator=torch.Generator().manual_seed(5))
        across -= across @ neuron / neuron.square().sum() * neuron
        across *= neuron.norm() / across.norm()
        neuron.copy_(math.cos(TURN) * neuron + math.sin(TURN) * across)
        centre = float(family in ZERO_CENTRED)
        gain.copy_((gain + centre) * (1 + LOUDER) - centre)


def _block(model: nn.Module, family: str) -> nn.Module:
    path = {"gpt2": "transformer.h", "neox": "gpt_neox.layers"}.get(family, "model.layers")
    return model.get_submodule(path)[LAYER]


def _planted(folder: Path, family: str, change: Callable[[nn.Module, str], None]) -> Path:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    change(model, family)
    tuned = folder.with_name(f"{family}-planted")
    model.save_pretrained(tuned)
    return tuned


@pytest.fixture(scope="module", params=FAMILIES)
def planted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """The family's name and its planted pair."""
    from tvlens.weights.matching import load_pair

    base = FAMILIES[request.param](tmp_path_factory.mktemp("families") / request.param)
    return request.param, load_pair(base, _planted(base, request.param, _plant))


@pytest.fixture(scope="module")
def weights(planted) -> pd.DataFrame:
    from tvlens.geometry.decompose import decompose

    return decompose(planted[1]).to_frame().set_index("component")


def test_nothing_but_what_was_planted_has_changed(planted, weights: pd.DataFrame) -> None:
    family, _ = planted
    norm = GAINS.get(family, ("", "ln1"))[1]
    changed = set(weights.index[weights["delta_norm"] > 0])
    expected = {f"L1H{HEAD}.W_O", f"L1H{HEAD}.OV", f"L1N{NEURON}.W_out"}
    assert changed == {*expected, "L1.W_O", "L1.W_out", f"L1.{norm}.w"}
    assert (weights.loc[list(changed), "snr"] > 100).all()


def test_a_stretched_head_is_a_gain_of_its_own_size(weights: pd.DataFrame) -> None:
    for part in ("W_O", "OV"):
        row = weights.loc[f"L1H{HEAD}.{part}"]
        assert row["gain"] == pytest.approx(STRETCH, rel=1e-4)
        assert row["kappa"] == pytest.approx(1, abs=1e-6)
        assert row["residual"] == pytest.approx(0, abs=1e-5)


def test_a_turned_neuron_has_the_angle_it_was_turned_by(weights: pd.DataFrame) -> None:
    row = weights.loc[f"L1N{NEURON}.W_out"]
    assert row["gain"] == pytest.approx(math.cos(TURN) - 1, rel=1e-4)
    assert row["residual"] == pytest.approx(math.sin(TURN), rel=1e-4)
    assert row["cos_base_tuned"] == pytest.approx(math.cos(TURN), rel=1e-6)


def test_a_larger_gain_is_measured_on_what_the_model_multiplies_by(
    planted, weights: pd.DataFrame
) -> None:
    row = weights.loc[f"L1.{GAINS.get(planted[0], ('', 'ln1'))[1]}.w"]
    assert row["kind"] == "norm"
    assert row["gain"] == pytest.approx(LOUDER, rel=1e-5)
    assert row["residual"] == pytest.approx(0, abs=1e-6)


def test_circuits_are_there_where_queries_and_keys_meet_as_they_are(
    planted, weights: pd.DataFrame
) -> None:
    normalised = planted[0] in ("qwen3", "gemma3", "olmo2")
    assert set(weights.loc[weights["kind"] == "head", "part"]) == {
        *("W_Q", "W_O", "OV"),
        *(() if normalised else ("QK",)),
    }


@pytest.mark.slow
def test_an_inspection_counts_the_rows_that_decompose_makes(planted, weights) -> None:
    from tvlens.study.inspection import inspection

    _, pair = planted
    folders = str(pair.base.folder), str(pair.tuned.folder)
    found = inspection(*folders, stages=("decompose",))
    counted = found["stages"]["decompose"]["tables"]["weights"]["by"]
    assert counted == weights["kind"].value_counts().to_dict()


def test_labels_of_both_sides_join(planted) -> None:
    """Weights and attribution call every disjoint component the same."""
    from tvlens.attribution.sites import weight_sites
    from tvlens.models.lens import LensModel

    _, pair = planted
    sites = weight_sites(LensModel.load(pair.base.folder))
    found = {str(site.component(t)) for site in sites for t in site.tensors}
    tied = {"unembed.W_U"} if pair.layout.tied else set()
    assert found == {str(component) for component in pair.components} | tied
