"""What an edit lets in, asked for in words beside a study: what it is, and what is refused."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from tests.test_cli import Run
from tests.tiny_checkpoints import add_noise, copy_with, tiny_llama

DOWN = "model.layers.1.mlp.down_proj.weight"


def spiked(tensors: dict[str, torch.Tensor]) -> None:
    """A little noise everywhere and one strong direction in layer 1's W_out."""
    add_noise(1)(tensors)
    generator = torch.Generator().manual_seed(5)
    u, r = (torch.randn(size, generator=generator) for size in (32, 48))
    tensors[DOWN] += 2.0 * torch.outer(u / u.norm(), r / r.norm())


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A pair and its study, whose attribution table is made up: the score of L0H1 is largest."""
    from tests.test_compose_selecting import attribution
    from tvlens.study.plan import StudyPlan
    from tvlens.study.runner import run_study

    root = tmp_path_factory.mktemp("models")
    base = tiny_llama(root / "base")
    found = {
        "base": base,
        "tuned": copy_with(base, root / "tuned", spiked),
        "other": copy_with(base, root / "other", add_noise(2)),
        "study": root / "study",
        "bare": root / "bare",
    }
    plan = StudyPlan(base=str(base), tuned=(str(found["tuned"]),), stages=("decompose",))
    run_study(plan, found["study"])
    shutil.copytree(found["study"], found["bare"])
    attribution().save(found["study"])
    (root / "tasks.yaml").write_text('- {name: a, kind: loss, file: "demo:med", limit: 2}\n')
    return {**found, "tasks": root / "tasks.yaml"}


def frame(study: Path, table: str) -> pd.DataFrame:
    return pd.read_parquet(study / f"{table}.parquet")


def saved(run: Run, folders: dict[str, Path], out: Path, *options: object) -> tuple[Any, str]:
    """The vector that `tvlens vector` writes with some options, and its warnings."""
    from tvlens.weights.vector_file import load_vector

    words = ("vector", folders["base"], folders["tuned"], "--out", out, "--force", *options)
    status, _, err = run(*words)
    assert status == 0, err
    return load_vector(out), err


def assert_same(found: Any, wanted: Any) -> None:
    assert {*found} == {*wanted}
    for one in wanted:
        assert torch.equal(found[one].dense(), wanted[one].dense())


@pytest.mark.slow
def test_labels_select_what_the_list_of_the_study_says(
    run: Run, folders: dict[str, Path], tmp_path: Path
) -> None:
    labels = frame(folders["study"], "labels")
    matrices = labels[labels["kind"] == "matrix"]
    label = matrices.set_index("component")["label"]["L1.W_out"]
    listed = ",".join(matrices[matrices["label"] == label]["component"])
    assert 0 < len(listed.split(",")) < len(matrices)
    out = tmp_path / "v.safetensors"
    text = f'kind == "matrix" and label == "{label}"'
    by_label, _ = saved(run, folders, out, "--study", folders["study"], "--select", text)
    by_list, _ = saved(run, folders, out, "--select", listed)
    assert_same(by_label, by_list)
    assert by_label.name == f"tuned[{text}]"


@pytest.mark.slow
def test_the_top_by_score_are_those_of_the_attribution_table(
    run: Run, folders: dict[str, Path], tmp_path: Path
) -> None:
    out, asked = tmp_path / "v.safetensors", ("--study", folders["study"], "--top")
    best, err = saved(run, folders, out, *asked, 2, "--select", 'kind == "head"')
    assert "1 more have the same |score| as L0H0" in err
    wanted, _ = saved(run, folders, out, "--select", "L0H0,L0H1")
    assert_same(best, wanted)


@pytest.mark.slow
def test_parts_are_saved_and_said(run: Run, folders: dict[str, Path], tmp_path: Path) -> None:
    from tests.test_compose_portions import parts_by_numpy
    from tvlens.weights.matching import load_pair

    out = tmp_path / "v.safetensors"
    found, _ = saved(run, folders, out, "--parts", "new_write,new_both", "--select", "L1.W_out")
    (one,) = found
    base, delta = load_pair(folders["base"], folders["tuned"]).change(one)
    oracle = parts_by_numpy(base, delta.dense(), "W_out")
    wanted = oracle["new_write"] + oracle["new_both"]
    np.testing.assert_allclose(found[one].dense().numpy(), wanted, rtol=0, atol=2e-6)
    assert found.name == "tuned[L1.W_out; the parts new_write,new_both]"


@pytest.mark.slow
def test_along_a_direction_is_the_studys_own_triplet(
    run: Run, folders: dict[str, Path], tmp_path: Path
) -> None:
    """A singular direction of the change: what is let in is strength times read times write."""
    from safetensors.torch import load_file

    rows = frame(folders["study"], "directions").set_index("component")
    out, asked = tmp_path / "v.safetensors", ("--study", folders["study"], "--along")
    found, _ = saved(run, folders, out, *asked, "L1.W_out.d0")
    (one,) = found
    vectors = load_file(folders["study"] / "directions.safetensors")
    read, write = (vectors[f"tuned/L1.W_out.d0.{side}"] for side in ("read", "write"))
    wanted = rows["strength"]["L1.W_out.d0"] * torch.outer(read, write)
    torch.testing.assert_close(found[one].dense(), wanted.float(), rtol=0, atol=1e-5)
    by_columns, _ = saved(run, folders, out, *asked, 'rank == 0 and site == "L1.mlp"')
    torch.testing.assert_close(by_columns[one].dense(), found[one].dense())


@pytest.mark.parametrize(
    ("row", "owner"),
    [
        (("direction", 1, None, "W_out"), ("matrix", 1, None, "W_out")),
        (("direction", 0, None, "W_O"), ("matrix", 0, None, "W_O")),
        (("direction", 0, 3, "OV"), ("head", 0, 3, "W_O")),
        (("neuron", 1, 7, "W_out"), ("neuron", 1, 7, "W_out")),
    ],
)
def test_a_direction_belongs_to_the_matrix_or_the_rows_that_write_it(
    row: tuple[Any, ...], owner: tuple[Any, ...]
) -> None:
    from tvlens.components import Component
    from tvlens.study.selecting import _owner

    named = dict(zip(("kind", "layer", "index", "part"), row, strict=True))
    assert _owner(named) == Component(*owner)


@pytest.mark.slow
def test_a_merge_holds_what_was_selected_and_is_verified_without_the_study(
    run: Run, folders: dict[str, Path], tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    study, out = tmp_path / "study", tmp_path / "m"
    shutil.copytree(folders["study"], study)
    words = ("apply", folders["base"], folders["tuned"], "--out", out, "--quiet")
    asked = ("--study", study, "--select", 'kind == "head"', "--top", 1)
    status, text, err = run(*words, *asked)
    assert status == 0, err
    assert 'only the top 1 by |score| of kind == "head"' in text
    shutil.rmtree(study)
    assert run("verify", out)[0] == 0
    by_list = tmp_path / "list"
    plain = ("apply", folders["base"], folders["tuned"], "--select", "L0H1", "--quiet")
    assert run(*plain, "--out", by_list)[0] == 0
    first, second = (load_file(place / "model.safetensors") for place in (out, by_list))
    assert all(torch.equal(first[name], tensor) for name, tensor in second.items())


def test_the_study_is_known_by_its_files_and_not_by_names(
    run: Run, folders: dict[str, Path], tmp_path: Path
) -> None:
    renamed = tmp_path / "renamed"
    shutil.copytree(folders["tuned"], renamed)
    moved = {**folders, "tuned": renamed}
    asked = ("--study", folders["study"], "--top", 1)
    found, _ = saved(run, moved, tmp_path / "v.safetensors", *asked)
    assert [*map(str, found)] == ["L0.W_Q"]


LABELLED = ("--select", 'label == "new_write"')
REFUSED = [
    (("--parts", "new_write,newread"), "no geometric part 'newread'"),
    (("--parts", ","), "no geometric part"),
    (LABELLED, "is what a study found. Say which study: --study FOLDER."),
    (("--top", "3"), "--top reads what a study found. Say which: --study FOLDER."),
    (("--along", "L1.W_out.d0"), "--along reads what a study found"),
    (("--study", "{nowhere}", *LABELLED), "holds no study"),
    (("--study", "{base}", *LABELLED), "holds no study"),
    (("--study", "{study}", "--select", 'lable == "new_write"'), "did you mean label"),
    (("--study", "{study}", "--select", 'label == "newwrite"'), "labels nothing 'newwrite'"),
    (("--study", "{study}", "--select", "L0H1", "--top", "1"), "is a choice already"),
    (("--study", "{study}", "--select", "L9H1"), "this model has no 'L9H1'"),
    (("--study", "{study}", "--along", "L1.W_out.d99"), "no direction 'L1.W_out.d99' of tuned"),
    (("--study", "{study}", "--along", "strength > 1e9"), "chooses none of the"),
    (("--study", "{study}", "--along", "L1.mlp", "--parts", "global"), "nothing else is chosen"),
    (("--study", "{bare}", "--top", "3"), "no table 'attribution', which holds score"),
    (("--select", "L9H1"), "this model has no 'L9H1'"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("options", "sentence"), REFUSED)
@pytest.mark.parametrize("command", ["sweep", "vector"])
def test_what_cannot_be_let_in_gives_a_sentence_and_leaves_nothing(
    run: Run,
    folders: dict[str, Path],
    tmp_path: Path,
    command: str,
    options: tuple[str, ...],
    sentence: str,
) -> None:
    given = [o.format(**folders, nowhere=tmp_path / "no") for o in options]
    tasks = ("--tasks", folders["tasks"], "--quiet") if command == "sweep" else ()
    words = (command, folders["base"], folders["tuned"], *tasks, "--out", tmp_path / "out")
    status, _, err = run(*words, *given)
    assert status == 2, err
    assert sentence in err
    assert len(err.strip().splitlines()) <= 2
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("command", ["sweep", "vector", "apply"])
def test_a_study_of_another_pair_is_refused(
    run: Run, folders: dict[str, Path], tmp_path: Path, command: str
) -> None:
    tasks = ("--tasks", folders["tasks"], "--quiet") if command == "sweep" else ()
    asked = ("--study", folders["study"], *LABELLED)
    words = (command, folders["base"], folders["other"], *tasks, "--out", tmp_path / "out")
    status, _, err = run(*words, *asked)
    assert status == 2, err
    assert "is no study of base -> other: it is one of" in err
    assert [*tmp_path.iterdir()] == []


def test_a_study_in_other_coordinates_is_refused(
    run: Run, folders: dict[str, Path], tmp_path: Path
) -> None:
    asked = ("--study", folders["study"], "--top", 1, "--canonical")
    words = ("vector", folders["base"], folders["tuned"], "--out", tmp_path / "v.safetensors")
    status, _, err = run(*words, *asked)
    assert status == 2, err
    assert "measured the weights in the stored coordinates" in err
    assert [*tmp_path.iterdir()] == []


def test_what_is_weighed_is_not_chosen_too(
    run: Run, folders: dict[str, Path], tmp_path: Path
) -> None:
    asked = ("--study", folders["study"], "--top", 1, "--weigh", folders["study"])
    words = ("apply", folders["base"], folders["tuned"], "--out", tmp_path / "m")
    status, _, err = run(*words, *asked)
    assert status == 2, err
    assert "--study chooses what --weigh weighs already" in err
    assert [*tmp_path.iterdir()] == []


@pytest.mark.slow
def test_parts_that_an_adapter_has_none_of_are_refused_and_leave_nothing(
    run: Run, folders: dict[str, Path], tmp_path: Path
) -> None:
    from tests.tiny_checkpoints import tiny_adapter

    reads = tiny_adapter(folders["base"], tmp_path / "reads", target_modules=["q_proj"])
    words = ("sweep", folders["base"], reads, "--tasks", folders["tasks"], "--quiet")
    status, _, err = run(*words, "--parts", "new_write", "--out", tmp_path / "out")
    assert status == 2, err
    assert "reads has nothing of new_write" in err
    assert [*tmp_path.iterdir()] == [reads]
