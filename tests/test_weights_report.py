"""The load report: every stored tensor of both checkpoints once, with what became of it and why."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from tests.test_weights_vocabulary import EMBED, HEAD, WORDS, resized, word_tokenizer
from tests.tiny_checkpoints import add_noise, copy_with, tiny_llama
from tvlens.errors import IncomparableModelsError

BLOCK = "model.layers.1."
MISSING, RESHAPED = f"{BLOCK}mlp.up_proj.weight", f"{BLOCK}input_layernorm.weight"
RENAMED, POISONED = f"{BLOCK}self_attn.q_proj.weight", "model.layers.0.self_attn.o_proj.weight"


def _stored(folder: Path) -> list[str]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return sorted(file.keys())


def _edit(tensors: dict[str, Tensor]) -> None:
    add_noise()(tensors)
    tensors[f"module.{RENAMED}"] = tensors.pop(RENAMED)
    del tensors[MISSING]
    tensors["v_head.weight"] = torch.ones(1, 32)
    tensors["model.rotary_emb.inv_freq"] = torch.ones(4)
    tensors[RESHAPED] = tensors[RESHAPED].reshape(1, -1)
    tensors[POISONED][5, 7] = float("nan")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("report")
    base = tiny_llama(root / "base")
    word_tokenizer(base, WORDS)
    longer = resized(base, root / "longer", [*range(64), None])
    tuned = copy_with(longer, root / "tuned", _edit)
    word_tokenizer(tuned, WORDS)
    return base, tuned


def test_one_report_holds_every_fate_of_a_tensor(folders: tuple[Path, Path]) -> None:
    from tvlens.weights.matching import load_pair

    with pytest.raises(IncomparableModelsError) as caught:
        load_pair(*folders)
    sentence = str(caught.value)
    assert f"base has {MISSING}, tuned lacks it" in sentence
    assert f"tuned: {POISONED}[5, 7] in model.safetensors is NaN or Inf" in sentence
    report = caught.value.report.to_dict()
    fates = {t["base"] or t["tuned"]: (t["status"], t["reason"]) for t in report["tensors"]}
    assert fates.pop(RENAMED) == ("renamed", f"both are {RENAMED}")
    assert fates.pop(MISSING) == (
        "only_in_base",
        "tuned lacks it, although its config.json asks for it",
    )
    unused = "no llama model uses it, so no component holds it"
    assert fates.pop("v_head.weight") == ("only_in_tuned", unused)
    assert fates.pop(RESHAPED) == ("reshaped", "(32,) and (1, 32) read as (32,)")
    assert fates.pop(POISONED) == ("refused", "NaN or Inf at [5, 7] of the tuned tensor")
    buffer = "no parameter: recomputed from config.json"
    assert fates.pop("model.rotary_emb.inv_freq") == ("buffer", buffer)
    rows = (
        "60 rows by token string; 4 padding rows by number; 1 new rows without a counterpart, "
        "all padding"
    )
    assert fates.pop(EMBED) == fates.pop(HEAD) == ("aligned", rows)
    assert set(fates.values()) == {("compared", "")}
    assert report["identical"] is None
    assert any("v_head.weight is not analysed" in w for w in report["warnings"])
    assert json.loads(json.dumps(report)) == report


def test_every_stored_tensor_of_both_appears_exactly_once(folders: tuple[Path, Path]) -> None:
    from tvlens.weights.matching import load_pair

    with pytest.raises(IncomparableModelsError) as caught:
        load_pair(*folders)
    entries = caught.value.report.tensors
    for side, folder in zip(("base", "tuned"), folders, strict=True):
        named = [getattr(entry, side) for entry in entries]
        assert sorted(name for name in named if name is not None) == _stored(folder)


def test_nothing_but_the_tensors_at_fault_is_lost_from_the_counts(
    folders: tuple[Path, Path],
) -> None:
    from tvlens.weights.matching import load_pair

    with pytest.raises(IncomparableModelsError) as caught:
        load_pair(*folders)
    counts = Counter(entry.status for entry in caught.value.report.tensors)
    assert counts == {
        "compared": len(_stored(folders[0])) - 6,
        "aligned": 2,
        **dict.fromkeys(("renamed", "reshaped", "only_in_base", "only_in_tuned"), 1),
        **dict.fromkeys(("refused", "buffer"), 1),
    }
