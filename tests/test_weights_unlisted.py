"""A family without a table: a row for every tensor, no claim about what it does."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

from tests.tiny_checkpoints import copy_with, tiny_adapter, tiny_llama
from tvlens.components import Component
from tvlens.errors import (
    CheckpointError,
    IncomparableModelsError,
    UnsupportedFormatError,
)

BLOCK = "model.decoder.layers.1."
SPIKED, LOUDER = BLOCK + "self_attn.out_proj.weight", BLOCK + "fc1.weight"
SIDED = (
    *("e_reroute", "e_new_read", "e_new_write", "k_read", "k_write"),
    *("g_write", "g_read", "g_self_write", "g_self_read"),
)


def _plant(tensors: dict[str, Tensor]) -> None:
    """One matrix 10 % longer, one with a new direction, one norm 20 % louder."""
    generator = torch.Generator().manual_seed(0)
    tensors[LOUDER] *= 1.1
    left, right = (torch.randn(n, generator=generator) for n in tensors[SPIKED].shape)
    tensors[SPIKED] += torch.outer(left, right) / 32
    tensors[BLOCK + "final_layer_norm.weight"] *= 1.2
    tensors[BLOCK + "fc1.bias"] += 0.5


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny OPT, which has no table, and the same with something planted."""
    from transformers import AutoModelForCausalLM, OPTConfig

    root = tmp_path_factory.mktemp("unlisted")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = OPTConfig(**sizes, vocab_size=64, max_position_embeddings=40, word_embed_proj_dim=32)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.2 + float(parameter.mean()))
    model.save_pretrained(root / "base")
    return root / "base", copy_with(root / "base", root / "tuned", _plant)


@pytest.fixture(scope="module")
def pair(folders: tuple[Path, Path]):
    from tvlens.weights.matching import load_pair

    return load_pair(*folders)


@pytest.fixture(scope="module")
def weights(pair) -> pd.DataFrame:
    from tvlens.geometry.decompose import decompose

    return decompose(pair).to_frame().set_index("component")


def _handmade(folder: Path, config: dict[str, object], tensors: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "handmade", **config}))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_every_tensor_is_a_component_or_has_a_reason(pair) -> None:
    stored = set(pair.base.tensors)
    assert {place.tensor for place in pair.layout.places.values()} == stored
    assert {entry.base for entry in pair.load_report.tensors if entry.base} == stored
    assert sum(pair.base_weight(c).numel() for c in pair.components) == sum(
        pair.base.read(name).numel() for name in stored
    )
    assert len({str(component) for component in pair.components}) == len(stored)


def test_the_warning_says_what_is_missing_and_how_to_get_it(pair) -> None:
    (warning,) = pair.load_report.warnings
    for words in (
        "no table for the family 'opt'",
        "Heads, neurons, OV and QK are missing",
        "which side of a matrix is its input is unknown",
        "attribution cannot run",
        "tvlens/weights/families/llama.py",
    ):
        assert words in warning


def test_components_are_named_by_their_tensors(pair) -> None:
    found = {str(component): component for component in pair.components}
    matrix = found["L1.self_attn.out_proj.weight"]
    assert matrix == Component("matrix", 1, None, "self_attn.out_proj.weight")
    assert found["L0.fc1.bias"].kind == "bias"
    assert found["L0.final_layer_norm.weight"].kind == "norm"
    assert found["L0.final_layer_norm.weight"].site == "L0.final_layer_norm"
    embedding = found["model.decoder.embed_tokens.weight"]
    assert embedding.kind == "embedding"
    assert pair.read(embedding).tied
    assert found["model.decoder.embed_positions.weight"].kind == "matrix"


def test_what_was_planted_is_found_with_sign_and_size(weights: pd.DataFrame) -> None:
    changed = set(weights.index[weights["delta_norm"] > 0])
    assert changed == {
        "L1.fc1.weight",
        "L1.self_attn.out_proj.weight",
        "L1.final_layer_norm.weight",
        "L1.fc1.bias",
    }
    assert weights.loc["L1.fc1.weight", "gain"] == pytest.approx(0.1, rel=1e-4)
    assert weights.loc["L1.fc1.weight", "e_global"] == pytest.approx(1, abs=1e-6)
    assert weights.loc["L1.final_layer_norm.weight", "gain"] == pytest.approx(0.2, rel=1e-4)
    spiked = weights.loc["L1.self_attn.out_proj.weight"]
    assert spiked["effective_rank_delta"] == pytest.approx(1, abs=1e-3)


def test_nothing_is_said_of_one_side(weights: pd.DataFrame) -> None:
    assert set(weights["kind"]) == {"matrix", "norm", "bias", "embedding"}
    assert weights[list(SIDED)].isna().all(axis=None)
    whole = ["e_global", "e_scale", "e_within", "e_new_both"]
    matrices = weights[(weights["kind"] == "matrix") & (weights["delta_norm"] > 0)]
    assert matrices[whole].notna().all(axis=None)


def _turned(folder: Path, out: Path) -> Path:
    def turn(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if tensor.dim() == 2:
                tensors[name] = tensor.T

    return copy_with(folder, out, turn)


@pytest.mark.slow
def test_no_number_and_no_label_depends_on_how_a_matrix_is_stored(
    folders: tuple[Path, Path], weights: pd.DataFrame, pair, tmp_path: Path
) -> None:
    from tvlens.geometry.classify import classify
    from tvlens.geometry.decompose import decompose
    from tvlens.weights.matching import load_pair

    turned = load_pair(*(_turned(folder, tmp_path / folder.name) for folder in folders))
    table = decompose(turned)
    other = table.to_frame().set_index("component").loc[weights.index]
    columns = weights.columns.difference(["base", "tuned"])
    pd.testing.assert_frame_equal(other[columns], weights[columns], rtol=1e-6, atol=1e-9)
    labels = [
        classify(one, decompose(one)).labels.to_frame().set_index("component")["label"]
        for one in (pair, turned)
    ]
    assert labels[0].to_dict() == labels[1].to_dict()
    assert labels[0]["L1.fc1.weight"] == "amplified"
    assert labels[0]["L1.self_attn.out_proj.weight"] == "mixed"  # structured; on which side?
    assert not set(labels[0]) & {"new_read", "new_write", "rewired"}


@pytest.mark.slow
def test_a_study_of_the_weights_ends_in_a_report_that_warns(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    from tvlens.cli import app
    from tvlens.study.store import Study

    out = tmp_path / "study"
    arguments = ["decompose", *map(str, folders), "--control", str(folders[0]), "--out", str(out)]
    result = CliRunner().invoke(app, [*arguments, "--quiet"])
    assert result.exit_code == 0, result.output
    assert "no table for the family 'opt'" in result.output
    study = Study(out)
    assert "cannot tell: too few layers (no layer has both W_O and W_out" in result.output
    assert set(study.contrasts.to_frame()["n_layers"]) == {0}
    page = (out / "report.html").read_text("utf-8")
    assert "no table for the family" in page
    assert "L1.self_attn.out_proj.weight" in page


def test_attribution_is_refused_before_any_stage_runs(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    from tvlens.study.plan import StudyPlan
    from tvlens.study.runner import run_study

    plan = StudyPlan(base=str(folders[0]), tuned=(str(folders[1]),), prompts="demo:med")
    with pytest.raises(UnsupportedFormatError, match="no table for the family 'opt'") as caught:
        run_study(plan, tmp_path / "study")
    assert "tvlens decompose" in caught.value.hint
    assert not (tmp_path / "study" / "weights.parquet").exists()


@pytest.mark.slow
def test_an_inspection_counts_what_there_is(folders: tuple[Path, Path], weights) -> None:
    from tvlens.study.inspection import inspection

    found = inspection(*map(str, folders))
    assert found["family"] == "opt (no table)"
    assert found["shape"] == {"n_layers": 2}
    counted = found["stages"]["decompose"]["tables"]["weights"]["by"]
    assert counted == weights["kind"].value_counts().to_dict()
    assert "no table for the family 'opt'" in found["stages"]["attribute"]["cannot_run"]


def test_any_config_entry_may_change_the_function(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    from tvlens.weights.matching import load_pair

    other = shutil.copytree(folders[1], tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    changes = {"do_layer_norm_before": False, "eos_token_id": 9, "transformers_version": "4.0"}
    (other / "config.json").write_text(json.dumps(config | changes))
    report = load_pair(folders[0], other).load_report
    assert [(d.field, d.effect) for d in report.config_differences] == [
        ("do_layer_norm_before", "function"),
        ("eos_token_id", "note"),
    ]
    assert "differs in do_layer_norm_before" in report.warnings[0]


def test_two_stacks_of_blocks_keep_apart(tmp_path: Path) -> None:
    from tvlens.weights.matching import load_pair

    def tensors(scale: float) -> dict[str, Tensor]:
        names = [f"{stack}.block.{n}.q.weight" for stack in ("encoder", "decoder") for n in (0, 1)]
        return {name: torch.eye(4) * scale for name in names}

    first, second = (_handmade(tmp_path / str(s), {}, tensors(s)) for s in (1.0, 2.0))
    pair = load_pair(first, second)
    assert {str(component) for component in pair.components} == {
        f"L{n}.{stack}.block.*.q.weight" for stack in ("encoder", "decoder") for n in (0, 1)
    }


def test_blocks_of_several_kinds_and_shapes_all_have_rows(tmp_path: Path) -> None:
    from tvlens.geometry.decompose import decompose
    from tvlens.weights.matching import load_pair

    tensors = {
        "layers.0.mixer.weight": torch.randn(4, 6),
        "layers.2.mixer.weight": torch.randn(4, 6),
        "layers.1.mixer.weight": torch.randn(8, 4),
        "layers.1.experts.0.w.weight": torch.randn(4, 4),
        "layers.1.experts.1.w.weight": torch.randn(4, 4),
        "layers.1.A_log": torch.randn(4),
        "head.weight": torch.randn(4, 16),
    }
    base = _handmade(tmp_path / "base", {"vocab_size": 16}, tensors)
    changed = {name: 2 * tensor for name, tensor in tensors.items()}
    pair = load_pair(base, _handmade(tmp_path / "tuned", {"vocab_size": 16}, changed))
    frame = decompose(pair).to_frame().set_index("component")
    assert set(frame.index) == {
        *("L0.mixer.weight", "L1.mixer.weight", "L2.mixer.weight", "L1.A_log", "head.weight"),
        *("L1.experts.0.w.weight", "L1.experts.1.w.weight"),
    }
    assert frame["gain"].to_list() == pytest.approx([1.0] * 7, rel=1e-6)
    assert pair.base_weight(Component("embedding", None, None, "head.weight")).shape == (16, 4)


def test_what_cannot_be_compared_is_named_and_warned_of(tmp_path: Path) -> None:
    from tvlens.weights.matching import load_pair

    tensors = {
        "layers.0.w.weight": torch.randn(4, 4),
        "layers.0.conv.weight": torch.randn(4, 1, 3),
        "layers.0.scale": torch.ones(()),
        "layers.0.wide.weight": torch.randn(4, 4),
        "layers.0.index": torch.arange(5),
        "rotary.inv_freq": torch.ones(2),
        "only_here": torch.ones(3),
    }
    base = _handmade(tmp_path / "base", {}, tensors)
    changed = {**tensors, "layers.0.wide.weight": torch.randn(5, 4)}
    del changed["only_here"]
    report = load_pair(base, _handmade(tmp_path / "tuned", {}, changed)).load_report
    status = {entry.base: entry.status for entry in report.tensors}
    assert status == {
        "layers.0.w.weight": "compared",
        **dict.fromkeys(
            [f"layers.0.{name}" for name in ("conv.weight", "scale", "wide.weight", "index")],
            "refused",
        ),
        "rotary.inv_freq": "buffer",
        "only_here": "only_in_base",
    }
    assert "4 more cannot be compared" in report.warnings[0]
    assert "only_here is not analysed" in report.warnings[1]


def test_a_part_called_like_a_tables_is_not_taken_for_it(tmp_path: Path) -> None:
    from tvlens.geometry.decompose import decompose
    from tvlens.weights.matching import load_pair

    tensors = {f"blocks.{n}.{part}": torch.randn(6, 6) for n in (0, 1) for part in ("W_Q", "W_out")}
    base = _handmade(tmp_path / "base", {}, tensors)
    changed = {name: tensor + torch.randn(6, 6) for name, tensor in tensors.items()}
    frame = decompose(load_pair(base, _handmade(tmp_path / "tuned", {}, changed))).to_frame()
    assert set(frame["kind"]) == {"matrix"}
    assert frame[list(SIDED)].isna().all(axis=None)
    assert set(frame["part"]) == {"W_Q (as named)", "W_out (as named)"}


def test_nothing_in_common_is_an_error(tmp_path: Path) -> None:
    from tvlens.weights.matching import load_pair

    first, second = (
        _handmade(tmp_path / name, {}, {f"{name}.weight": torch.ones(2, 2)}) for name in "ab"
    )
    with pytest.raises(IncomparableModelsError, match="no tensor of one name and shape"):
        load_pair(first, second)


@pytest.mark.parametrize("side", ["base", "tuned"])
def test_quantised_weights_and_nan_are_refused_as_ever(tmp_path: Path, side: str) -> None:
    from tvlens.weights.matching import load_pair

    def folder(name: str, value: Callable[[Tensor], Tensor]) -> Path:
        tensors = {"layers.0.w": value(torch.ones(2, 2)), "layers.0.v": torch.ones(2, 2)}
        return _handmade(tmp_path / name, {}, tensors)

    plain = folder("plain", lambda t: t)
    for bad, error, words in (
        (folder("quantised", lambda t: t.to(torch.int8)), UnsupportedFormatError, "as I8"),
        (folder("nan", lambda t: t * torch.nan), CheckpointError, "NaN or Inf"),
    ):
        pair = (bad, plain) if side == "base" else (plain, bad)
        with pytest.raises(error, match=words):
            load_pair(*pair)


def test_an_adapter_of_a_family_without_a_table_is_refused(tmp_path: Path) -> None:
    from tvlens.weights.matching import load_pair

    base = tiny_llama(tmp_path / "base")
    adapter = tiny_adapter(base, tmp_path / "adapter")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"model_type": "strange"}))
    with pytest.raises(UnsupportedFormatError, match="adapter of a strange model") as caught:
        load_pair(base, adapter)
    assert "merge_and_unload" in caught.value.hint


def test_a_pair_with_a_table_on_one_side_only_is_refused(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    from tvlens.weights.matching import load_pair

    listed = tiny_llama(tmp_path / "llama")
    for sides in ((listed, folders[0]), (folders[0], listed)):
        with pytest.raises(IncomparableModelsError, match=r"is a (opt|llama) model"):
            load_pair(*sides)
