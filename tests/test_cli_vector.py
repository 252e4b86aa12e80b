"""``tvlens vector``: what it writes, says and refuses."""

import json
from pathlib import Path

import pytest

from tests.test_cli import Run
from tests.tiny_checkpoints import add_noise, copy_with, tiny_llama


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    base = tiny_llama(root / "base")

    def poison(tensors: dict) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][2, 5] = float("nan")

    return {
        "base": base,
        "tuned": copy_with(base, root / "tuned", add_noise()),
        "nan": copy_with(base, root / "nan", poison),
    }


def test_it_writes_a_vector_that_adds_up_to_the_tuned_model(
    run: Run, folders: dict[str, Path], tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import load_file

    from tvlens.weights.vector_file import load_vector, read_header

    out = tmp_path / "v.safetensors"
    status, text, err = run("vector", folders["base"], folders["tuned"], "--out", out)
    assert (status, err) == (0, "")
    assert "tuned minus base" in text
    tuned = load_file(folders["tuned"] / "model.safetensors")
    new = dict(load_vector(out).apply_to(folders["base"]))
    assert new.keys() == tuned.keys()
    for name, tensor in new.items():
        torch.testing.assert_close(tensor, tuned[name], rtol=0, atol=2e-7)
    assert read_header(out).command.startswith("tvlens vector ")


@pytest.mark.slow
def test_selection_scale_and_dtype_are_said_and_kept(
    run: Run, folders: dict[str, Path], tmp_path: Path
) -> None:
    words = ["vector", folders["base"], folders["tuned"], "--out", tmp_path / "v.safetensors"]
    options = ["--select", "L0H1,L1.mlp", "--scale", "-2", "--dtype", "bfloat16"]
    status, text, _ = run(*words, *options)
    assert status == 0
    assert "of the whole vector's squared length" in text
    assert "bfloat16 lost 0.001" in text
    status, text, _ = run(*words, *options, "--force", "--json")
    found = json.loads(text)
    assert found["components"] == {"dense": 5}
    assert found["name"] == "-2 * tuned[L0H1,L1.mlp]"
    assert 0 < found["share_of_squared_norm"] < 1


def test_a_model_and_itself_are_said_to_be_equal(
    run: Run, folders: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "v.safetensors"
    status, text, _ = run("vector", folders["base"], folders["base"], "--out", out)
    assert status == 0
    assert "the vector is zero" in text


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["tuned", "--select", "laier == 1"], "position 1: there is no column 'laier'"),
        (["tuned", "--select", "L9H1"], "this model has no 'L9H1'"),
        (["tuned", "--scale", "nan"], "by a finite number, got nan"),
        (["nan"], "up_proj.weight[2, 5]"),
    ],
)
def test_bad_input_gives_a_sentence_and_leaves_no_file(
    run: Run, folders: dict[str, Path], tmp_path: Path, words: list[str], sentence: str
) -> None:
    out = tmp_path / "v.safetensors"
    status, _, err = run("vector", folders["base"], folders[words[0]], *words[1:], "--out", out)
    assert status == 2
    assert sentence in err
    assert [*tmp_path.iterdir()] == []


def test_an_existing_file_needs_force(run: Run, folders: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "v.safetensors"
    out.write_text("mine")
    status, _, err = run("vector", folders["base"], folders["tuned"], "--out", out)
    assert status == 2
    assert "is there already" in err
    assert out.read_text() == "mine"


@pytest.mark.slow
def test_a_copy_in_other_coordinates_has_no_tuning_vector_in_the_bases(
    run: Run, folders: dict[str, Path], tmp_path: Path
) -> None:
    from tests import gauge_copies as copies
    from tvlens.weights.vector_file import load_vector, read_header

    copied = copies.saved_copy(folders["base"], tmp_path / "copy", copies.PERMUTED)
    as_stored, in_bases = tmp_path / "stored.safetensors", tmp_path / "base.safetensors"
    run("vector", folders["base"], copied, "--out", as_stored)
    status, _, err = run("vector", folders["base"], copied, "--out", in_bases, "--canonical")
    assert status == 0
    assert "renumbered" in err
    assert load_vector(as_stored).norm() > 1
    assert load_vector(in_bases).norm() < 1e-5
    for path, coordinates in ((as_stored, "stored"), (in_bases, "base")):
        tuned = next(i for i in load_vector(path).inputs if i.role == "tuned")
        assert tuned.coordinates == coordinates
        assert read_header(path).inputs[1].coordinates == coordinates
