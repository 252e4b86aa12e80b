"""The plan of a study and the folder it is kept in."""

import json
from pathlib import Path
from typing import Any

import pytest

from tvlens.errors import StudyError
from tvlens.study.plan import StudyPlan, name_of
from tvlens.study.store import prepared_folder, write_json

PLAN = StudyPlan(base="demo:base", tuned=("demo:med", "runs/math/"), seed=3)


def test_a_plan_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    PLAN.save(tmp_path)
    assert StudyPlan.load(tmp_path / "study.yaml") == PLAN


def test_fine_tunes_are_named_by_the_last_part_of_what_was_given() -> None:
    assert PLAN.names == ("med", "math")
    assert name_of("org/model") == "model"


def test_two_fine_tunes_of_one_name_are_refused_with_the_way_out() -> None:
    plan = StudyPlan(base="b", tuned=("one/model", "two/model"))
    with pytest.raises(StudyError, match=r"called the same.*--tuned-name"):
        _ = plan.names


def test_as_many_names_as_fine_tunes_are_needed() -> None:
    plan = StudyPlan(base="b", tuned=("one", "two"), tuned_names=("a",))
    with pytest.raises(StudyError, match="2 fine-tunes but 1 names"):
        _ = plan.names


@pytest.mark.parametrize("text", ["base: [", "base: b\ntuned: [t]\nsped: 1\n", "[]"])
def test_a_file_that_is_no_plan_gives_a_sentence(tmp_path: Path, text: str) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(text)
    with pytest.raises(StudyError, match="is not a study plan"):
        StudyPlan.load(path)


def test_a_folder_of_another_pair_is_refused_and_keeps_its_files(tmp_path: Path) -> None:
    prepared_folder(tmp_path, {"base": {"a": "1"}}, force=False)
    write_json(tmp_path / "manifest.json", {"inputs": {"base": {"a": "1"}}})
    (tmp_path / "weights.parquet").write_text("kept")
    with pytest.raises(StudyError, match=r"holds the study of another pair.*--force"):
        prepared_folder(tmp_path, {"base": {"a": "2"}}, force=False)
    assert (tmp_path / "weights.parquet").read_text() == "kept"
    prepared_folder(tmp_path, {"base": {"a": "1"}}, force=False)
    assert (tmp_path / "weights.parquet").exists()


def test_force_removes_the_files_of_the_earlier_study_and_no_others(tmp_path: Path) -> None:
    write_json(tmp_path / "manifest.json", {"inputs": {"base": {"a": "1"}}})
    (tmp_path / "weights.parquet").write_text("old")
    (tmp_path / "package.json").write_text("mine")
    (tmp_path / "measured.parquet").write_text("mine")
    prepared_folder(tmp_path, {"base": {"a": "2"}}, force=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["measured.parquet", "package.json"]


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(StudyError, match="not empty and holds no study"):
        prepared_folder(tmp_path, {}, force=False)


def test_a_folder_with_only_a_refused_load_report_can_be_used_again(tmp_path: Path) -> None:
    (tmp_path / "load_report.json").write_text("{}")
    prepared_folder(tmp_path, {}, force=False)


def test_a_file_for_a_folder_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_text("")
    with pytest.raises(StudyError, match="is a file"):
        prepared_folder(path, {}, force=False)


def test_json_never_holds_a_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Out of range"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    write_json(tmp_path / "a.json", {"x": 1.5})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1.5}


@pytest.mark.parametrize("stage", ["decompose", "attribute", "graft"])
def test_the_command_of_a_stage_alone_is_that_stages_command(stage: str) -> None:
    plan = StudyPlan(base="a", tuned=("b",), tuned_names=("c",), stages=(stage,), keep=0.5)
    keep = " --keep 0.5" if stage == "graft" else ""
    assert plan.command == f"tvlens {stage} a b --tuned-name c{keep} --seed 0 --out DIR"
    both = plan.model_copy(update={"stages": ("decompose", "attribute")})
    assert both.command.startswith("tvlens compare a b ")


def test_a_command_repeats_every_option_that_was_given_and_quotes_what_needs_it() -> None:
    plan = StudyPlan(
        base="a",
        tuned=("b",),
        controls=("c 1", "d"),
        canonical=True,
        check_seconds=9.0,
        chat="off",
        seed=3,
    )
    assert plan.command == (
        "tvlens compare a b --control 'c 1' --control d --canonical --chat off --check-seconds 9.0"
        " --seed 3 --out DIR"
    )


def test_the_command_of_a_plan_is_read_back_as_that_plan(monkeypatch) -> None:
    import shlex

    from tvlens import cli
    from tvlens.cli import comparing

    plan = StudyPlan(
        base="a",
        tuned=("b", "x y"),
        tuned_names=("n", "m"),
        controls=("c",),
        parent="p",
        prompts="f.jsonl",
        metric="loss",
        covariances="c.safetensors",
        classifier="mine:labels",
        measures=("mine:depth", "mine:width"),
        chat="off",
        nodes="all",
        directions=("default", "zero_ablation@base"),
        position=True,
        dtype="bfloat16",
        select="L0H1,L0.W_in",
        neurons="all",
        estimators=("first_order", "atp_star"),
        parts=True,
        circuits=True,
        check_exact=3,
        skip_bad_lines=True,
        device="cpu",
        seed=4,
    )
    made = []
    monkeypatch.setattr(comparing, "_show", lambda plan, out, **how: made.append(plan))
    cli.app(shlex.split(plan.command)[1:], standalone_mode=False)
    assert made == [plan]


SWEPT: dict[str, Any] = {
    "stages": ("sweep",),
    "tasks": "tasks.yaml",
    "scales": "-1:1:0.5",
    "select": 'kind == "head" and layer == 3',
    "rest": "tuned",
    "draws": 1,
}


@pytest.mark.parametrize(
    ("given", "whole"),
    [
        ({}, True),
        ({"study": "s"}, True),
        ({"select": "L0H1"}, False),
        ({"top": 3}, False),
        ({"kept_parts": "global"}, False),
        ({"along": "L1.mlp"}, False),
    ],
)
def test_a_sweep_of_a_part_is_none_of_the_whole_vector(given: dict[str, Any], whole: bool) -> None:
    assert StudyPlan(base="a", tuned=("b",), **given).is_whole is whole


LOOKED_UP: dict[str, Any] = {
    "stages": ("sweep",),
    "tasks": "tasks.yaml",
    "select": 'kind == "neuron" and label == "new_write"',
    "study": "my study",
    "top": 20,
    "kept_parts": "new_write,new_both",
}
ALONG: dict[str, Any] = {
    "stages": ("sweep",),
    "tasks": "tasks.yaml",
    "study": "s",
    "along": 'label == "new_write" and layer >= 4',
}
REPRESENTED: dict[str, Any] = {
    "stages": ("represent",),
    "parent": "p",
    "texts": "demo:med",
    "draws": 5,
}


@pytest.mark.parametrize("options", [SWEPT, LOOKED_UP, ALONG, REPRESENTED])
def test_the_command_of_one_stage_is_read_back_as_that_plan(
    monkeypatch, options: dict[str, Any]
) -> None:
    import shlex

    from tvlens import cli
    from tvlens.cli import comparing

    plan = StudyPlan(base="a", tuned=("b",), controls=("c",), chat="off", seed=4, **options)
    made = []
    monkeypatch.setattr(comparing, "_show", lambda plan, out, **how: made.append(plan))
    cli.app(shlex.split(plan.command)[1:], standalone_mode=False)
    assert made == [plan]
