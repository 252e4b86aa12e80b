"""Directions, readings and overlap in a study: from folders to tables, vectors and the page."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from tests.test_reporting import HOSTILE, parsed
from tests.test_weights_vocabulary import WORDS, resized, word_tokenizer
from tests.tiny_checkpoints import add_noise, copy_with, tiny_adapter, tiny_llama
from tvlens.errors import StudyError
from tvlens.reporting.direction_tables import token_list, visible
from tvlens.reporting.report import render_report
from tvlens.study.directions import readable
from tvlens.study.plan import StudyPlan
from tvlens.study.runner import run_study
from tvlens.study.store import Study
from tvlens.tables import Table

pytestmark = pytest.mark.slow

DOWN = "model.layers.1.mlp.down_proj.weight"
PLANTED = 17


def _writes(token: int, seed: int):
    """An edit that lets layer 1's MLP write along the unembedding row of a token."""

    def edit(tensors: dict[str, Tensor]) -> None:
        along = tensors["lm_head.weight"][token] / tensors["model.norm.weight"]
        read = torch.randn(48, generator=torch.Generator().manual_seed(seed))
        tensors[DOWN] += torch.outer(along / along.norm(), read)

    return edit


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("directions")
    base = tiny_llama(root / "start")
    word_tokenizer(base, [*WORDS[:PLANTED], HOSTILE, *WORDS[PLANTED + 1 :]])
    made = {"base": base}
    for name, seed in (("a", 1), ("b", 2)):  # one token, evoked by other inputs
        made[name] = copy_with(base, root / name, _writes(PLANTED, seed))
    made["ctl"] = copy_with(base, root / "ctl", _writes(40, 3))
    return made


@pytest.fixture(scope="module")
def study(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Study:
    plan = StudyPlan(
        base=str(folders["base"]),
        tuned=(str(folders["a"]), str(folders["b"])),
        controls=(str(folders["ctl"]),),
        stages=("decompose",),
    )
    return run_study(plan, tmp_path_factory.mktemp("study") / "study")


def test_the_planted_write_is_named_for_every_fine_tune(study: Study) -> None:
    rows = study.directions.to_frame().set_index(["tuned", "component"])
    directions = rows[rows["kind"] == "direction"]
    assert set(directions.index) == {("a", "L1.W_out.d0"), ("b", "L1.W_out.d0")}
    either = zip(rows["promoted"], rows["suppressed"], strict=True)  # as a neuron's sign has it
    assert all(HOSTILE in {up[0], down[0]} for up, down in either)
    for name in "ab":
        row = rows.loc[(name, "L1.W_out.d0")]
        assert row["promoted"][0] == HOSTILE
        assert row["promoted_ids"][0] == PLANTED
        assert row["vector"] == f"{name}/L1.W_out.d0"


def test_the_saved_vectors_patched_into_the_base_give_the_fine_tune(
    study: Study, folders: dict[str, Path]
) -> None:
    from safetensors.torch import load_file

    row = study.directions.where(tuned="a").to_frame().iloc[0]
    vectors = study.direction_vectors
    patch = row["strength"] * torch.outer(
        vectors[f"{row['vector']}.read"], vectors[f"{row['vector']}.write"]
    )
    stored = {name: load_file(folders[name] / "model.safetensors")[DOWN] for name in ("base", "a")}
    torch.testing.assert_close(stored["base"] + patch.mT, stored["a"], rtol=0, atol=1e-5)


def test_fine_tunes_and_control_stand_against_each_other(study: Study) -> None:
    rows = study.table("overlap").to_frame()
    rows = rows[rows["component"] == "L1.W_out"].set_index(["tuned", "other"])
    assert set(rows.index) == {("a", "b"), ("a", "ctl"), ("b", "ctl")}
    assert rows.loc[("a", "b"), "overlap"] == pytest.approx(1, abs=1e-4)
    assert rows.loc[("a", "b"), "shared"] == 1
    assert rows.loc[("a", "ctl"), "relation"] == "control"
    assert rows.loc[("a", "ctl"), "shared"] == 0


def test_blocks_pass_by_only_where_they_leave_no_line(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    class Spinner:
        def __init__(self) -> None:
            self.said: list[str] = []
            self.passed: list[str] = []

        def __call__(self, text: str) -> None:
            self.said.append(text)

        def passing(self, text: str) -> None:
            self.passed.append(text)

    plan = StudyPlan(base=str(folders["base"]), tuned=(str(folders["a"]),), stages=("decompose",))
    spinner, lines = Spinner(), list[str]()
    run_study(plan, tmp_path / "spinner", progress=spinner)
    assert spinner.passed == [f"decompose: block {number} of 3" for number in (1, 2, 3)]
    run_study(plan, tmp_path / "lines", progress=lines.append)
    assert lines == spinner.said
    assert not any("block" in line for line in lines)


def test_fine_tunes_are_compared_in_the_bases_coordinates_if_asked_for(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    order = torch.randperm(48, generator=torch.Generator().manual_seed(5))

    def renumber(tensors: dict[str, Tensor]) -> None:
        for name in ("gate_proj", "up_proj"):
            stored = tensors[f"model.layers.1.mlp.{name}.weight"]
            stored.copy_(stored[order].clone())
        tensors[DOWN].copy_(tensors[DOWN][:, order].clone())

    moved = copy_with(folders["a"], tmp_path / "moved", renumber)
    ctl = copy_with(folders["ctl"], tmp_path / "other", renumber)
    plan = StudyPlan(
        base=str(folders["base"]),
        tuned=(str(folders["a"]), str(moved)),
        controls=(str(ctl),),
        stages=("decompose",),
        canonical=True,
    )
    rows = run_study(plan, tmp_path / "study").table("overlap").to_frame()
    rows = rows[rows["component"] == "L1.W_out"].set_index(["tuned", "other"])
    assert rows.loc[("a", "moved"), "cosine"] == pytest.approx(1, abs=1e-4)
    assert rows.loc[("a", "other"), "norm_b"] == pytest.approx(
        rows.loc[("a", "other"), "norm_a"], rel=0.5
    )  # a control too: renumbered weights are as far from the base as two bases are


def test_readings_hold_both_fine_tunes_with_their_noise(study: Study) -> None:
    rows = study.table("readings").to_frame()
    assert set(rows["tuned"]) == {"a", "b"}
    assert set(rows["component"]) == {"L1.W_out"}
    assert rows[["value", "chance", "noise"]].notna().all().all()


def test_the_page_shows_all_three_and_no_token_becomes_markup(study: Study) -> None:
    page = study.folder / "report.html"
    markup = parsed(page)
    for heading in ("New directions by name", "readings, beside noise", "against each other"):
        assert heading in markup.words
    assert "img" not in markup.tags
    assert HOSTILE not in page.read_text("utf-8")
    assert "</script><img␣src=x␣" in markup.words  # cut, its blanks made visible, and still text
    assert "a, ctl (control)" in markup.words


def test_a_study_of_an_older_version_names_the_command_and_one_without_directions_says_so(
    study: Study, tmp_path: Path
) -> None:
    old = shutil.copytree(study.folder, tmp_path / "old")
    for name in ("directions", "readings", "overlap"):
        (old / f"{name}.parquet").unlink()
    words = parsed(render_report(old)).words
    assert words.count("new directions by name, the paper's readings: tvlens decompose") == 1
    assert "New directions by name" not in words
    assert "against each other" not in words
    empty = Table("directions", study.directions.data.slice(0, 0))
    empty.save(old)
    assert "No direction that is written stands above" in parsed(render_report(old)).words


def test_a_single_fine_tune_has_nothing_to_stand_against(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    plan = StudyPlan(base=str(folders["base"]), tuned=(str(folders["a"]),), stages=("decompose",))
    study = run_study(plan, tmp_path / "study")
    assert "overlap" not in study.tables
    assert {"directions", "readings"} <= set(study.tables)


@pytest.mark.slow
def test_with_a_parent_the_fine_tunes_are_compared_from_the_parent(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    tuned = [copy_with(folders["a"], tmp_path / n, add_noise(s)) for n, s in (("x", 5), ("y", 6))]
    plan = StudyPlan(
        base=str(folders["base"]),
        parent=str(folders["a"]),
        tuned=tuple(map(str, tuned)),
        stages=("decompose",),
    )
    rows = run_study(plan, tmp_path / "study").table("overlap").to_frame()
    assert set(zip(rows["base"], rows["tuned"], rows["other"], strict=True)) == {("a", "x", "y")}


@pytest.mark.slow
def test_a_replicate_gives_a_ceiling_and_an_unknown_one_is_refused_at_once(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    plan = StudyPlan(
        base=str(folders["base"]),
        tuned=tuple(str(folders[name]) for name in ("a", "b", "ctl")),
        replicates={"a": "b"},
        stages=("decompose",),
    )
    rows = run_study(plan, tmp_path / "study").table("overlap").to_frame()
    rows = rows[rows["component"] == "L1.W_out"].set_index(["tuned", "other"])
    assert rows.loc[("a", "b"), "relation"] == "replicate"
    assert rows.loc[("a", "ctl"), "overlap_ceiling"] == pytest.approx(1, abs=1e-4)
    with pytest.raises(StudyError, match="'c' is none of the fine-tunes"):
        run_study(plan.model_copy(update={"replicates": {"a": "c"}}), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_tokens_keep_their_names_where_the_fine_tune_numbers_them_anew(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    words = [*WORDS[:PLANTED], HOSTILE, *WORDS[PLANTED + 1 :]]
    order = torch.randperm(60, generator=torch.Generator().manual_seed(3)).tolist()
    moved = resized(folders["a"], tmp_path / "moved", [*order, 60, 61, 62, 63])
    word_tokenizer(moved, [words[i] for i in order])
    plan = StudyPlan(base=str(folders["base"]), tuned=(str(moved),), stages=("decompose",))
    row = run_study(plan, tmp_path / "study").directions.to_frame().iloc[0]
    assert row["promoted"][0] == HOSTILE
    assert row["promoted_ids"][0] == PLANTED  # the base's number


def test_an_adapter_has_directions_of_its_rank(folders: dict[str, Path], tmp_path: Path) -> None:
    adapter = tiny_adapter(folders["base"], tmp_path / "lora")
    plan = StudyPlan(base=str(folders["base"]), tuned=(str(adapter),), stages=("decompose",))
    study = run_study(plan, tmp_path / "study")
    rows = study.directions.where(kind="direction", part="W_out").to_frame()
    assert 2 <= len(rows) <= 8  # rank 4, two layers
    assert np.isfinite(rows["top_z"]).all()


@pytest.mark.slow
def test_the_same_plan_gives_the_same_bytes(folders: dict[str, Path], tmp_path: Path) -> None:
    plan = StudyPlan(base=str(folders["base"]), tuned=(str(folders["b"]),), stages=("decompose",))
    made = [run_study(plan, tmp_path / name).folder for name in ("one", "two")]
    for name in ("directions.parquet", "directions.safetensors", "readings.parquet"):
        assert (made[0] / name).read_bytes() == (made[1] / name).read_bytes(), name


def test_stored_token_strings_become_the_text_they_stand_for() -> None:
    byte_level = ["\u0120the", "caf\u00c3\u00a9", "\u010a", "\u00c3", "<|end|>"]
    assert readable(byte_level) == [" the", "café", "\n", "\u00c3", "<|end|>"]
    assert readable(["\u2581the", "caf\u00c3\u00a9"]) == [" the", "caf\u00c3\u00a9"]


def test_blanks_and_what_cannot_be_printed_are_made_visible() -> None:
    assert visible(" the\n") == "\N{OPEN BOX}the\\n"
    assert visible("\u202eevil") == "\\u202eevil"  # no token turns the page around
    assert len(visible("x" * 100)) == 24
    assert token_list([" a", "b", "c", "d", "e", "f"]).split(" · ") == ["␣a", "b", "c", "d", "e"]


@pytest.mark.demo
def test_the_demo_study_names_its_directions_and_holds_them_against_the_control(
    demo_study: Path,
) -> None:
    rows = pd.read_parquet(demo_study / "directions.parquet")
    assert {"W_O", "W_out", "OV"} <= set(rows["part"])
    assert set(rows["kind"]) == {"direction", "neuron"}
    assert (rows["spikes"] >= rows.groupby("component")["rank"].transform("max").fillna(0)).all()
    assert rows["promoted"].map(len).eq(10).all()
    vectors = Study(demo_study).direction_vectors
    assert all(f"{name}.write" in vectors for name in rows["vector"])
    readings = pd.read_parquet(demo_study / "readings.parquet")
    writes = readings[(readings["rule"] == "energy_0.9025") & (readings["kind"] == "matrix")]
    means = writes.groupby("part")[["value", "noise", "corrected"]].mean()
    # raw values say that the MLP is the more aligned; they say so of noise
    assert means.loc["W_out", "value"] > means.loc["W_O", "value"] + 0.1
    assert means.loc["W_out", "noise"] > means.loc["W_O", "noise"] + 0.1
    assert abs(means.loc["W_out", "corrected"] - means.loc["W_O", "corrected"]) < 0.1
    overlap = pd.read_parquet(demo_study / "overlap.parquet")
    assert set(overlap["other"]) == {"ctl"}
    matrices = overlap[overlap["kind"] == "matrix"]
    assert (matrices["cosine"] > 5 * matrices["cosine_floor_sd"]).mean() > 0.9
