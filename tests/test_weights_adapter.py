"""Adapters stay in their factors, and the factors are what peft would merge."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny_checkpoints import FAMILIES, copy_with, tiny_adapter, tiny_gpt2, tiny_llama
from tvlens.components import Component
from tvlens.errors import AdapterError, CheckpointError, UnsupportedFormatError

MERGE = 1e-6
"""peft adds in float32: one rounding of a weight of order 1."""
ADAPTED = ("llama", "gpt2", "neox", "phi3", "gemma2")
"""Separate and fused projections, cut in blocks, head by head and at unequal widths."""
W_Q = Component("matrix", 0, None, "W_Q")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("adapter")
    base = tiny_llama(root / "base")
    return base, tiny_adapter(base, root / "adapter")


@pytest.fixture
def adapter(folders: tuple[Path, Path], tmp_path: Path) -> Path:
    return shutil.copytree(folders[1], tmp_path / "adapter")


def _merged(base: Path, adapter: Path, out: Path) -> Path:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
    return out


def _configured(adapter: Path, **entries: object) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def _edited(adapter: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    edit(tensors)
    save_file(tensors, adapter / "adapter_model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("family", ADAPTED)
@pytest.mark.parametrize("rslora", [False, True])
def test_factors_equal_what_peft_merges(family: str, rslora: bool, tmp_path: Path) -> None:
    from tvlens.weights.delta import Absent, LowRank
    from tvlens.weights.matching import load_pair

    base = FAMILIES[family](tmp_path / "base")
    adapter = tiny_adapter(base, tmp_path / "adapter", rslora)
    pair = load_pair(base, adapter)
    whole = load_pair(base, _merged(base, adapter, tmp_path / "merged"))
    forms = set()
    for component in pair.components:
        low, dense = pair.read(component), whole.read(component)
        forms.add(type(low.delta))
        assert torch.allclose(low.dense_delta(), dense.dense_delta(), atol=MERGE), component
        assert torch.allclose(
            pair.tuned_weight(component), whole.tuned_weight(component), atol=MERGE
        )
        assert low.floor is None
    assert forms == {LowRank, Absent}


@pytest.mark.slow
def test_patterns_give_a_module_its_own_rank_and_scale(tmp_path: Path) -> None:
    from tvlens.weights.matching import load_pair

    base = tiny_llama(tmp_path / "base")
    adapter = tiny_adapter(
        base,
        tmp_path / "adapter",
        rank_pattern={"layers.1.self_attn.q_proj": 2},
        alpha_pattern={"down_proj": 20, "layers.1.self_attn.q_proj": 3},
    )
    pair = load_pair(base, adapter)
    whole = load_pair(base, _merged(base, adapter, tmp_path / "merged"))
    assert pair.read(Component("matrix", 1, None, "W_Q")).delta.rank == 2
    assert pair.read(W_Q).delta.rank == 4
    for component in pair.components:
        expected = whole.read(component).dense_delta()
        assert torch.allclose(pair.read(component).dense_delta(), expected, atol=MERGE), component


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("changed", ["W_E", "W_U", "both"])
def test_a_tied_embedding_is_two_weights_where_one_use_is_adapted(
    tmp_path: Path, changed: str
) -> None:
    from tvlens.weights.matching import load_pair

    base = tiny_llama(tmp_path / "base", tie_word_embeddings=True)
    modules = {"W_E": ["embed_tokens"], "W_U": ["lm_head"], "both": ["embed_tokens", "lm_head"]}
    adapter = tiny_adapter(base, tmp_path / "adapter", target_modules=modules[changed])
    pair = load_pair(base, adapter)
    stored = load_file(adapter / "adapter_model.safetensors")

    def factor(pattern: str) -> torch.Tensor:
        return next(t for name, t in stored.items() if pattern in name)

    embedding = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    read = {p: pair.read(Component("embedding", None, None, p)) for p in ("W_E", "W_U")}
    assert torch.equal(read["W_U"].base, embedding.T)
    expected = {part: torch.zeros_like(read[part].base) for part in read}
    if changed in ("W_E", "both"):
        product = factor("lora_embedding_B") @ factor("lora_embedding_A")
        expected["W_E"] = 1.5 * product.T
    if changed in ("W_U", "both"):
        expected["W_U"] = 1.5 * (factor("lm_head.lora_B") @ factor("lm_head.lora_A")).T
    for part, weight in read.items():
        assert torch.allclose(weight.dense_delta(), expected[part], atol=MERGE)
    alone = [w for w in pair.load_report.warnings if "compared as two weights, as in training" in w]
    assert len(alone) == (changed != "both")


def test_rows_of_a_tied_embedding_and_factors_of_its_head_are_refused(tmp_path: Path) -> None:
    from tvlens.weights.matching import load_pair

    base = tiny_llama(tmp_path / "base", tie_word_embeddings=True)
    adapter = tiny_adapter(base, tmp_path / "adapter", trainable_token_indices=[3])
    head = torch.randn(64, 32)
    _edited(adapter, lambda t: t.update({"base_model.model.lm_head.weight": head}))
    with pytest.raises(AdapterError, match="by rows and otherwise"):
        load_pair(base, adapter)


def test_a_head_that_the_adapter_stores_whole_unties_the_pair(tmp_path: Path) -> None:
    from tvlens.weights.matching import load_pair

    base = tiny_llama(tmp_path / "base", tie_word_embeddings=True)
    adapter = tiny_adapter(base, tmp_path / "adapter")
    head = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    _edited(adapter, lambda t: t.update({"base_model.model.lm_head.weight": head}))
    pair = load_pair(base, adapter)
    weight = pair.read(Component("embedding", None, None, "W_U"))
    embedding = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(weight.base, embedding.T)
    assert torch.allclose(weight.base + weight.dense_delta(), head.T, atol=MERGE)
    assert weight.floor is not None
    assert pair.read(Component("embedding", None, None, "W_E")).dense_delta().norm() == 0


def test_every_tensor_of_base_and_adapter_is_in_the_report(folders: tuple[Path, Path]) -> None:
    from tvlens.weights.matching import load_pair

    pair = load_pair(*folders)
    assert {entry.base for entry in pair.load_report.tensors} == set(pair.base.tensors)
    noted = {entry.tuned for entry in pair.load_report.tensors} - {None}
    assert noted == set(pair.tuned.tensors)
    assert pair.load_report.counts == {"untouched_by_adapter": 15, "compared": 12}
    assert pair.load_report.identical is False


def test_an_adapter_of_zeros_is_identical_to_its_base(
    folders: tuple[Path, Path], adapter: Path
) -> None:
    from tvlens.weights.matching import load_pair

    _edited(adapter, lambda t: [v.zero_() for k, v in t.items() if "lora_B" in k])
    assert load_pair(folders[0], adapter).load_report.identical is True


def test_another_base_name_is_only_a_warning(folders: tuple[Path, Path], adapter: Path) -> None:
    from tvlens.weights.matching import load_pair

    assert load_pair(*folders).load_report.warnings == []
    _configured(adapter, base_model_name_or_path="/some/machine/other-model")
    warnings = load_pair(folders[0], adapter).load_report.warnings
    assert len(warnings) == 1
    assert "trained on '/some/machine/other-model', not on base" in warnings[0]


def test_modules_that_the_base_lacks_are_an_error(folders: tuple[Path, Path]) -> None:
    from tvlens.weights.matching import load_pair

    other = tiny_gpt2(folders[0].parent / "gpt2")
    with pytest.raises(AdapterError, match=r"changes .*, which gpt2 does not have\. 5 more") as e:
        load_pair(other, folders[1])
    assert [entry.status for entry in e.value.report.tensors].count("refused") == 6


def test_shapes_of_another_base_are_an_error(folders: tuple[Path, Path], tmp_path: Path) -> None:
    from tvlens.weights.matching import load_pair

    wide = tiny_llama(tmp_path / "wide", hidden_size=64)
    with pytest.raises(AdapterError, match=r"of size \(48, 32\); in wide it is \(48, 64\)"):
        load_pair(wide, folders[1])


@pytest.mark.parametrize(
    ("entries", "error", "sentence"),
    [
        ({"peft_type": "IA3"}, UnsupportedFormatError, "of type 'IA3'"),
        ({"peft_type": "IA3"}, UnsupportedFormatError, r"merge_and_unload\(\)"),
        ({"peft_type": "ADALORA"}, UnsupportedFormatError, "of type 'ADALORA'"),
        ({"peft_type": "PREFIX_TUNING"}, UnsupportedFormatError, "changes no weight"),
        ({"peft_type": "XLORA"}, UnsupportedFormatError, "several changes for each input"),
        ({"peft_type": None}, UnsupportedFormatError, "of type None"),
        ({"use_qalora": True}, UnsupportedFormatError, "with use_qalora"),
        ({"target_parameters": ["q_proj.weight"]}, UnsupportedFormatError, "target_parameters"),
        ({"layer_replication": [[0, 1]]}, UnsupportedFormatError, "with layer_replication"),
        ({"kasa_config": {"beta": 1}}, UnsupportedFormatError, "with kasa_config"),
        ({"init_lora_weights": "lora_ga"}, UnsupportedFormatError, "changes the base"),
        ({"use_dora": True}, AdapterError, "has no lora_magnitude_vector"),
        ({"r": 0}, AdapterError, "says rank 0"),
        ({"r": 4.5}, AdapterError, r"says rank 4\.5"),
        ({"lora_alpha": float("nan")}, AdapterError, "'nan' for lora_alpha"),
        ({"lora_alpha": "6"}, AdapterError, "expected a number"),
        ({"lora_alpha": 10**40}, AdapterError, "expected a number"),
        ({"rank_pattern": {"(": 3}}, AdapterError, "no regular expression"),
        ({"rank_pattern": [3]}, AdapterError, "no object under 'rank_pattern'"),
        ({"target_modules": ["q_proj", "v_proj"]}, AdapterError, "down_proj, which its target"),
        ({"target_modules": ".*q_proj"}, AdapterError, "peft would not load them"),
        ({"layers_to_transform": [0]}, AdapterError, r"layers\.1.*layers_to_transform"),
        ({"layers_to_transform": "0"}, AdapterError, "no list under layers_to_transform"),
        ({"exclude_modules": ["v_proj"]}, AdapterError, "its exclude_modules names"),
        ({"target_modules": 3}, AdapterError, "no list of target modules"),
        ({"init_lora_weights": "pissa_niter_4"}, UnsupportedFormatError, "changes the base"),
        ({"r": 5}, AdapterError, "says rank 5 for"),
    ],
)
def test_adapters_that_are_more_than_factors_are_refused(
    folders: tuple[Path, Path],
    adapter: Path,
    entries: dict[str, object],
    error: type[Exception],
    sentence: str,
) -> None:
    from tvlens.weights.matching import load_pair

    _configured(adapter, **entries)
    with pytest.raises(error, match=sentence):
        load_pair(folders[0], adapter)


def test_a_config_without_alpha_is_refused(folders: tuple[Path, Path], adapter: Path) -> None:
    from tvlens.weights.matching import load_pair

    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    del config["lora_alpha"]
    path.write_text(json.dumps(config))
    with pytest.raises(AdapterError, match="has no 'lora_alpha'"):
        load_pair(folders[0], adapter)


def test_a_lonely_factor_is_refused(folders: tuple[Path, Path], adapter: Path) -> None:
    from tvlens.weights.matching import load_pair

    _edited(adapter, lambda t: t.pop(next(name for name in t if "lora_B" in name)))
    with pytest.raises(AdapterError, match="has no lora_B for"):
        load_pair(folders[0], adapter)


def test_a_nan_in_a_factor_is_refused(folders: tuple[Path, Path], adapter: Path) -> None:
    from tvlens.weights.matching import load_pair

    def poison(tensors: dict[str, torch.Tensor]) -> None:
        name = next(n for n in tensors if "layers.0.self_attn.q_proj.lora_A" in n)
        tensors[name][2, 5] = torch.nan

    _edited(adapter, poison)
    with pytest.raises(CheckpointError, match=r"q_proj\.lora_A\.weight\[2, 5\]"):
        load_pair(folders[0], adapter)


def test_an_adapter_cannot_be_the_base(folders: tuple[Path, Path]) -> None:
    from tvlens.weights.matching import load_pair

    with pytest.raises(AdapterError, match="the base must be a full checkpoint"):
        load_pair(folders[1], folders[0])


def test_a_base_that_lacks_a_weight_is_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    from tvlens.weights.matching import load_pair

    holed = copy_with(folders[0], tmp_path / "holed", lambda t: t.pop("model.norm.weight"))
    with pytest.raises(CheckpointError, match=r"holed lacks model\.norm\.weight"):
        load_pair(holed, folders[1])
