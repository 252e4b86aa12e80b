"""Sweeps and evaluations of the demo models: tables, sentences, and what is refused."""

import json
from pathlib import Path

import pandas as pd
import pytest

from tests.planned_tables import assert_rows
from tvlens.errors import PromptError, SelectionError, StudyError
from tvlens.study.plan import StudyPlan, scales_in

TASKS = """
- {name: medical, kind: loss, file: "demo:med", limit: 10}
- {name: distance, kind: kl, file: "demo:med", limit: 6, metric: kl_to_tuned}
- {name: answers, kind: generation, file: "demo:med", limit: 4, max_new_tokens: 6, metric: length}
"""


def plan(folder: Path, **given) -> StudyPlan:
    (folder / "tasks.yaml").write_text(TASKS)
    asked = {"base": "demo:base", "tuned": ("demo:med",), "stages": ("sweep",), "draws": 2}
    asked |= {"tasks": str(folder / "tasks.yaml"), "scales": "0,0.5,1", "chat": "off"}
    return StudyPlan.model_validate(asked | given)


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    from tvlens.study.runner import run_study

    folder = tmp_path_factory.mktemp("sweep")
    return run_study(plan(folder, controls=("demo:ctl",)), folder / "study")


@pytest.fixture(scope="module")
def part(tmp_path_factory):
    from tvlens.study.runner import run_study

    folder = tmp_path_factory.mktemp("part")
    asked = {"select": "kind == 'matrix' and layer < 4", "rest": "tuned", "draws": 1}
    return run_study(plan(folder, **asked), folder / "study")


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("-0.5:1.5:0.25", (-0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)),
        ("0:1:0.1", (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)),
        ("1:-1:-1", (1.0, 0.0, -1.0)),
        ("0:1:0.4", (0.0, 0.4, 0.8)),
        ("2,-1,2", (2.0, -1.0)),
    ],
)
def test_scales_are_read_with_both_ends(text, numbers):
    assert scales_in(text) == numbers


@pytest.mark.parametrize("text", ["", "a", "0:1", "0:1:0", "1:0:0.5", "0:nan:1", "0:1:1e-9"])
def test_scales_that_are_none_are_refused(text):
    with pytest.raises(StudyError, match="cannot be read"):
        scales_in(text)


def test_a_sweeps_command_repeats_what_was_asked(tmp_path):
    words = plan(tmp_path, select="L0H1", rest="tuned", controls=("demo:ctl",)).command
    assert words.startswith("tvlens sweep demo:base demo:med")
    for option in ("--scales 0,0.5,1", "--select L0H1", "--rest tuned", "--control demo:ctl"):
        assert option in words


@pytest.mark.parametrize(
    ("given", "error", "sentence"),
    [
        ({"tasks": None}, StudyError, "needs tasks"),
        ({"scales": "0"}, StudyError, "nothing but where the sweep starts"),
        ({"select": "layr == 3"}, SelectionError, "no column 'layr'"),
        ({"tasks": "gone.yaml"}, PromptError, "cannot read the tasks"),
    ],
)
def test_what_a_sweep_would_refuse_is_found_before_models_are_read(
    tmp_path, given, error, sentence
):
    from tvlens.study.sweeping import check_sweep

    with pytest.raises(error, match=sentence):
        check_sweep(plan(tmp_path, **given))


@pytest.mark.slow
def test_curves_meet_at_the_ends_and_hold_every_control(swept):
    curves = swept.table("curves").to_frame()
    assert (curves["curve"] == "sweep").all()
    of = curves.groupby(["task", "ranked_by"])["scale"].apply(sorted)
    assert of["medical", "tuning"] == [0.0, 0.5, 1.0]
    assert of["medical", "random"] == [0.5, 0.5, 1.0, 1.0]
    assert of["medical", "ctl"] == [0.5, 1.0]
    assert set(curves["task"]) == {"medical", "distance", "answers"}
    evaluation = swept.table("evaluation").to_frame().set_index(["model", "measure"])["value"]
    tuning = curves[curves["ranked_by"] == "tuning"].set_index(["task", "scale"])["value"]
    assert tuning["medical", 0.0] == evaluation["base", "loss"]
    assert tuning["medical", 1.0] == evaluation["med", "loss"]
    assert tuning["distance", 1.0] == pytest.approx(0.0, abs=1e-6)
    assert evaluation["base", "kl_to_base"] == pytest.approx(0.0, abs=1e-6)
    assert evaluation["med", "agree_tuned"] == 1.0


@pytest.mark.slow
def test_the_demos_tuning_vector_does_more_than_random_ones(swept):
    facts = swept.manifest["facts"]["med"]["sweep"]["medical"]
    assert facts["tuned"] < facts["base"] - 0.3
    assert facts["more_than_a_push"] is True
    pushed = [abs(value - facts["base"]) for value in facts["controls"]["random"]]
    assert max(pushed) < 0.25 * (facts["base"] - facts["tuned"])
    assert "It does more than any random push as hard." in facts["sentence"]
    assert facts["best_scale"] in (0.5, 1.0)


@pytest.mark.slow
def test_items_are_kept_with_what_was_written(swept):
    items = swept.table("evaluation_items").to_frame()
    med = items[(items["model"] == "med") & (items["task"] == "answers")]
    assert med["response"].notna().sum() == 4
    losses = items[(items["model"] == "med") & (items["measure"] == "loss")]
    value = swept.table("evaluation").where(model="med", measure="loss").to_frame()["value"]
    assert losses["value"].mean() == pytest.approx(value.item())
    evaluation = swept.table("evaluation").to_frame()
    other = evaluation[(evaluation["model"] != "base") & (evaluation["measure"] == "loss")]
    assert other["p_value"].notna().all()
    assert (other["against"] == "base").all()


@pytest.mark.slow
def test_the_report_draws_the_curves_and_says_what_they_show(swept):
    page = (swept.folder / "report.html").read_text("utf-8")
    assert page.count('class="scatter"') == 3
    assert "medical: loss by dose" in page
    assert "random vector" in page
    assert "does more than any random push as hard" in page


@pytest.mark.slow
def test_claims_have_their_verdicts_and_those_without_a_task_say_so(swept):
    rows = {row["claim"]: row for row in swept.table("verdicts").data.to_pylist()}
    assert len(rows) == 5
    skill = rows["the domain's skill depends on the tuning vector"]
    assert (skill["task"], skill["measure"], skill["verdict"]) == ("medical", "loss", "supported")
    assert skill["control"] == "ctl for med x 1"  # no better than the base on medical texts
    assert skill["control_value"] == pytest.approx(2.1, abs=0.1)  # random vectors do harm
    following = rows["instruction following depends on the tuning vector"]
    assert following["verdict"] == "not tested"
    assert "tvlens sweep demo:base demo:med" in following["command"]
    assert 'id="claims"' in (swept.folder / "report.html").read_text("utf-8")


@pytest.mark.slow
def test_a_study_file_runs(swept, tmp_path, monkeypatch):
    from tvlens import cli
    from tvlens.cli import comparing

    made = []
    monkeypatch.setattr(comparing, "_show", lambda plan, out, **how: made.append((plan, out)))
    words = ["run", str(swept.folder / "study.yaml"), "--out", str(tmp_path / "again")]
    cli.app(words, standalone_mode=False)
    assert made == [(swept.plan, tmp_path / "again")]


@pytest.mark.slow
def test_a_part_taken_out_of_the_tuned_model(part):
    curves = part.table("curves").to_frame()
    assert 0 < curves["share_of_norm"].iloc[0] < 1
    of = curves[curves["task"] == "medical"].set_index(["ranked_by", "scale"])["value"]
    evaluation = part.table("evaluation").to_frame().set_index(["model", "measure"])["value"]
    assert of["tuning", 1.0] == evaluation["med", "loss"]
    assert evaluation["base", "loss"] > of["tuning", 0.0] > evaluation["med", "loss"]
    assert {"random", "random_set"} <= set(curves["ranked_by"])
    frame = part.table("evaluation").to_frame()
    assert (frame[frame["model"] != "med"]["against"] == "med").all()


@pytest.mark.slow
def test_a_sweep_leaves_the_rows_of_other_stages(tmp_path):
    from tvlens.study.runner import run_study

    asked = plan(tmp_path, scales="0,1", draws=0)
    asked = asked.model_copy(
        update={"stages": ("evaluate", "sweep"), "evaluate": {"maths": "demo:math"}}
    )
    study = run_study(asked, tmp_path / "study")
    frame = study.table("evaluation").to_frame()
    assert set(frame["split"]) == {"held_out", "all"}
    again = run_study(asked.model_copy(update={"stages": ("evaluate",)}), tmp_path / "study")
    pd.testing.assert_frame_equal(
        again.table("evaluation").to_frame().sort_values(["model", "task", "measure", "scale"],
        ignore_index=True),
        frame.sort_values(["model", "task", "measure", "scale"], ignore_index=True),
    )  # fmt: skip


@pytest.mark.slow
def test_models_side_by_side(tmp_path, monkeypatch, capsys):
    from tvlens import cli

    def run(*words):
        monkeypatch.setattr("sys.argv", ["tvlens", *map(str, words)])
        try:
            cli.main()
        except SystemExit as stop:
            return int(stop.code or 0), *capsys.readouterr()
        return 0, *capsys.readouterr()

    (tmp_path / "tasks.yaml").write_text(TASKS)
    asked = ("--tasks", tmp_path / "tasks.yaml", "--out", tmp_path / "out")
    status, out, err = run("evaluate", "demo:base", "demo:med", *asked, "--quiet")
    assert status == 0, err
    assert "loss" in out
    assert "differs from base" in out
    status, out, _ = run("evaluate", "demo:base", "demo:med", *asked, "--json")
    rows = json.loads(out)
    assert {row["model"] for row in rows} == {"base", "med"}
    assert {row["measure"] for row in rows} >= {"loss", "kl_to_base", "length"}
    made = {path.name for path in (tmp_path / "out").iterdir()}
    assert made == {"evaluation.parquet", "evaluation_items.parquet", "manifest.json"}
    status, _, err = run("evaluate", "demo:base", "demo:base", *asked)
    assert status == 2
    assert "called the same" in err


def test_the_rows_of_a_sweep_are_those_that_were_planned(swept):
    found = assert_rows(swept, "sweep", bounded={"evaluation", "evaluation_items"})
    assert found["tables"]["curves"] == {"rows": 3 * (3 + 2 * 2 + 2)}  # tasks x models
    models = 3 + 2 * 2 + 2 + 2
    # loss 3, distances 4, a text 3 measures always and 5 where it has words or a reference
    assert found["tables"]["evaluation"]["at_least"] >= models * (3 + 4 + 3)


def test_the_rows_of_a_sweep_of_a_part_count_random_sets_too(part):
    found = assert_rows(part, "sweep", bounded={"evaluation", "evaluation_items"})
    assert found["tables"]["curves"] == {"rows": 3 * (3 + 2 + 2)}


@pytest.mark.slow
@pytest.mark.parametrize(
    "asked",
    [
        {"draws": 1, "scales": "0,1,2"},
        {"draws": 1, "scales": "0,1", "select": "layer == 0", "rest": "tuned"},
    ],
)
def test_every_model_that_a_sweep_runs_was_planned(tmp_path, asked):
    from tvlens.study.stages import STAGES
    from tvlens.study.task_counts import sweep_runs
    from tvlens.weights.matching import load_pair

    lines = []
    pair = load_pair("demo:base", "demo:med", names=("base", "med"))
    list(STAGES["sweep"](plan(tmp_path, **asked), [pair], lines.append))
    assert sweep_runs(plan(tmp_path, **asked)) == sum(line.startswith("tasks:") for line in lines)
