"""``tvlens apply`` and ``tvlens verify``: what they write, say and refuse."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.test_cli import Run
from tests.tiny_checkpoints import add_noise, copy_with, tiny_adapter, tiny_llama


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    base = tiny_llama(root / "base")

    def poison(tensors: dict) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][2, 5] = float("nan")

    return {
        "base": base,
        "a": copy_with(base, root / "a", add_noise(1)),
        "b": copy_with(base, root / "b", add_noise(2)),
        "lora": tiny_adapter(base, root / "lora"),
        "nan": copy_with(base, root / "nan", poison),
        "other": tiny_llama(root / "other", intermediate_size=64),
    }


@pytest.mark.slow
def test_apply_writes_what_verify_accepts_and_refuses_after_an_edit(
    run: Run, folders: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "m"
    words = ("apply", folders["base"], folders["a"], folders["lora"], "--out", out)
    status, text, err = run(*words, "--scale", "0.5", "-0.25", "--quiet")
    assert (status, err) == (0, "")
    assert "base + 0.5 * a - 0.25 * lora" in text
    places = (folders["base"], folders["a"], out)
    base, tuned, new = (load_file(place / "model.safetensors") for place in places)
    name = "model.layers.0.mlp.up_proj.weight"  # the adapter leaves it
    wanted = base[name].double() + 0.5 * (tuned[name] - base[name]).double()
    assert torch.equal(new[name], wanted.float())
    status, text, _ = run("verify", out)
    assert status == 0
    assert text == f"{out}: 21 tensors are base + 0.5 * a - 0.25 * lora, within stored rounding.\n"
    new[name][3, 4] += 1
    save_file(new, out / "model.safetensors", {"format": "pt"})
    status, text, err = run("verify", out)
    assert status == 3
    assert f"{name} differs in 1 entries" in err
    status, text, _ = run("verify", out, "--json")
    assert (status, json.loads(text)["holds"]) == (3, False)


@pytest.mark.slow
def test_options_reach_the_merge_and_the_manifest(
    run: Run, folders: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "m"
    options = ["--method", "mergekit:ties", "--density", "0.5", "--select", "L1.mlp", "--seed", "3"]
    status, text, _ = run(
        "apply", folders["base"], folders["a"], folders["b"], "--out", out, *options, "--json"
    )
    assert status == 0
    found = json.loads(text)
    assert found["changed_tensors"] == 3
    assert found["scales"] == {"a": 1.0, "b": 1.0}
    manifest = json.loads((out / "tvlens_manifest.json").read_text())
    assert (manifest["method"], manifest["density"], manifest["seed"]) == ("mergekit:ties", 0.5, 3)
    assert manifest["command"].startswith("tvlens apply ")
    assert run("verify", out)[0] == 0


@pytest.mark.slow
def test_an_adapter_is_written_and_its_losses_said(
    run: Run, folders: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "m"
    status, text, _ = run("apply", folders["base"], folders["a"], "--out", out, "--as-lora", 4)
    assert status == 0
    assert "adapter of rank 4" in text
    assert "cannot hold 5 changed components" in text
    assert (out / "adapter_config.json").is_file()
    assert run("verify", out)[0] == 0


@pytest.mark.slow
def test_a_vector_file_goes_in_and_moved_inputs_are_named(
    run: Run, folders: dict[str, Path], tmp_path: Path
) -> None:
    file, out = tmp_path / "v.safetensors", tmp_path / "m"
    assert run("vector", folders["base"], folders["a"], "--out", file)[0] == 0
    assert run("apply", folders["base"], file, "--out", out, "--quiet")[0] == 0
    file.rename(tmp_path / "w.safetensors")
    status, _, err = run("verify", out)
    assert status == 2
    assert "there is no file" in err
    assert run("verify", out, "--vector", tmp_path / "w.safetensors")[0] == 0


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["a", "b", "--scale", "1", "2", "3"], "got 3 scales for 2 vectors"),
        (["a", "--method", "mean"], "there is no merge method 'mean'"),
        (["a", "--density", "0", "--method", "ties"], "more than 0 and at most 1, got 0.0"),
        (["a", "--select", "laier == 1"], "position 1: there is no column 'laier'"),
        (["nan"], "up_proj.weight[2, 5]"),
        (["other"], "d_mlp"),
        (["/nowhere/v.safetensors"], "there is no file /nowhere/v.safetensors"),
        (["/nowhere/model"], "there is no folder /nowhere/model"),
        (["a", "--as-lora", "4", "--dtype", "bfloat16"], "an adapter is stored as float32"),
        (["a", "--weigh", "/nowhere"], "cannot read the table"),
    ],
)
def test_bad_input_gives_a_sentence_and_leaves_no_folder(
    run: Run, folders: dict[str, Path], tmp_path: Path, words: list[str], sentence: str
) -> None:
    given = [str(folders.get(word, word)) for word in words]
    status, _, err = run("apply", folders["base"], *given, "--out", tmp_path / "m", "--quiet")
    assert status == 2, err
    assert sentence in err
    assert len(err.strip().splitlines()) <= 2
    assert [*tmp_path.iterdir()] == []


def test_an_adapter_is_no_base_and_a_file_no_folder(
    run: Run, folders: dict[str, Path], tmp_path: Path
) -> None:
    status, _, err = run("apply", folders["lora"], folders["a"], "--out", tmp_path / "m")
    assert status == 2
    assert "the base of a merge must be a full checkpoint" in err
    (tmp_path / "m").write_text("mine")
    status, _, err = run("apply", folders["base"], folders["a"], "--out", tmp_path / "m", "--force")
    assert status == 2
    assert (tmp_path / "m").read_text() == "mine"
    status, _, err = run("verify", folders["base"])
    assert status == 2
    assert "was not written by `tvlens apply`" in err


def test_scales_end_where_a_word_is_no_number() -> None:
    from tvlens.cli.words import is_number, takes_many

    command = takes_many("--scale", is_number)
    assert not is_number("v.safetensors")
    found: list[list[str]] = []

    class Spy(command):  # type: ignore[valid-type,misc]
        pass

    del Spy
    import typer.core

    original = typer.core.TyperCommand.parse_args
    try:
        typer.core.TyperCommand.parse_args = lambda self, ctx, args: found.append(args) or []
        command("x").parse_args(None, ["B", "--scale", "0.5", "-1", "V", "2", "--out", "o"])
    finally:
        typer.core.TyperCommand.parse_args = original
    assert found == [["B", "--scale", "0.5", "--scale", "-1", "V", "2", "--out", "o"]]
