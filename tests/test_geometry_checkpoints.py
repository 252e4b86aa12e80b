"""The geometry of real tiny checkpoints: files on disk, fused and grouped tensors, adapters."""

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from torch import Tensor

from tests.tiny_checkpoints import copy_with, tiny_adapter, tiny_gpt2, tiny_llama, tiny_neox
from tvlens.geometry import classify, decompose
from tvlens.weights.matching import load_pair

pytestmark = pytest.mark.slow

WRITES = {
    tiny_llama: "o_proj.weight",
    tiny_gpt2: "attn.c_proj.weight",
    tiny_neox: "attention.dense.weight",
}


def _tables(base: Path, tuned: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    pair = load_pair(str(base), str(tuned))
    weights = decompose(pair)
    labels = classify(pair, weights)
    return weights.to_frame(), labels.labels.to_frame()


@pytest.mark.parametrize("family", list(WRITES), ids=lambda f: f.__name__)
def test_scaling_the_attention_output_amplifies_every_head_and_nothing_else(
    tmp_path: Path, family: Callable[[Path], Path]
) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            if name.endswith(WRITES[family]):
                tensors[name] *= 1.05

    base = family(tmp_path / "base")
    weights, labels = _tables(base, copy_with(base, tmp_path / "tuned", edit))
    changed = labels[labels["label"] != "unchanged"]
    assert set(changed["label"]) == {"amplified"}
    assert set(changed["part"]) == {"W_O", "OV"}
    assert (changed["part"] == "OV").sum() == 8
    gains = weights.loc[weights["part"].isin(["W_O", "OV"]), "gain"]
    # 1.05 w in float32 is rounded at 6e-8 of w
    assert gains.to_numpy() == pytest.approx(0.05, rel=1e-5)


def test_scaling_one_kv_head_of_grouped_values_amplifies_the_query_heads_that_read_it(
    tmp_path: Path,
) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        value = tensors["model.layers.1.self_attn.v_proj.weight"]
        value[: len(value) // 2] *= 1.1

    base = tiny_llama(tmp_path / "base")
    weights, _ = _tables(base, copy_with(base, tmp_path / "tuned", edit))
    frame = weights[weights["delta_norm"] > 0].set_index("component")
    assert set(frame.index) == {"L1.W_V", "L1K0.W_V", "L1H0.OV", "L1H1.OV"}
    assert frame.loc["L1H1.OV", "gain"] == pytest.approx(0.1, rel=1e-5)


def test_an_adapter_has_no_snr_and_its_untouched_matrices_are_unchanged(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base")
    weights, labels = _tables(base, tiny_adapter(base, tmp_path / "adapter"))
    assert weights["snr"].isna().all()
    matrices = labels[labels["kind"] == "matrix"]
    untouched = matrices["part"].isin(["W_K", "W_O", "W_gate", "W_in"])
    assert set(matrices.loc[untouched, "label"]) == {"unchanged"}
    assert not matrices.loc[~untouched, "label"].isin(["unchanged", "amplified"]).any()
    rank = weights.loc[weights["component"] == "L0.W_Q", "effective_rank_delta"].item()
    assert rank <= 4.000001
