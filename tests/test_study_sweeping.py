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
    assert facts["moved_farther_by"] == []


@pytest.mark.parametrize(("step", "farther"), [(-2.0, ["ctl"]), (2.0, []), (-0.5, [])])
def test_a_control_that_moves_a_measure_farther_is_named(tmp_path, step, farther):
    from tvlens.evaluation.measures import Item
    from tvlens.evaluation.suite import Measured, Variant
    from tvlens.evaluation.tasks import load_tasks
    from tvlens.study.sweep_tables import _beside, _sentence

    asked = plan(tmp_path, controls=("demo:ctl",))
    task = load_tasks(asked.tasks)[0]

    def model(control: str, move: float, scale: float = 1.0) -> Measured:
        losses = [Item(i, "loss", 5.0 + 0.01 * i + move) for i in range(10)]
        return Measured(Variant(control, control=control, scale=scale), {"medical": losses})

    base = model("tuning", 0.0, 0.0)
    found = [base, model("tuning", -1.0), model("random", 0.01), model("ctl", step)]
    facts = _beside(asked, task, found, base)
    assert facts["more_than_a_push"] is True
    assert facts["moved_farther_by"] == farther
    said = _sentence(
        task, {"metric": "loss", "unit": "", "base": 5.0, "tuned": 4.0, **facts}, "m", "it"
    )
    assert ("The control ctl moves it farther." in said) == bool(farther)


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
    row = '<th scope="row" class="long">the domain&#39;s skill depends on the tuning vector</th>'
    assert f'{row}<td>medical, loss</td><td class="long">' in page  # wraps, and is not squeezed


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


def by_numpy(
    model: Path,
    base: Path,
    names: tuple[str, ...],
    folder: Path,
    sign: float,
    tuned: str = "demo:med",
) -> float:
    """The loss of a model plus or minus some parts of a fine-tune's change, all made in numpy."""
    import torch

    from tests.test_compose_portions import parts_by_numpy
    from tests.tiny_checkpoints import copy_with
    from tvlens.study.evaluating import evaluate
    from tvlens.weights.matching import load_pair

    pair = load_pair("demo:base", tuned)
    stored = {place.tensor: one for one, place in pair.layout.places.items()}

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            one = stored[name]
            if one.kind == "matrix":
                weight, delta = pair.change(one)
                parts = parts_by_numpy(weight, delta.dense(), one.part)
                moved = sum(parts[part] for part in names if part in parts)
                tensors[name] = (tensor.double() + sign * torch.from_numpy(moved).T).float()

    of = tuned.removeprefix("demo:")
    copied = copy_with(model, folder / of / "edited", edit)
    models = [str(base), str(copied)]
    table = evaluate(models, str(folder / "tasks.yaml"), folder / of / "e", chat="off")
    rows = table.to_frame().set_index(["model", "measure"])["value"]
    return float(rows["edited", "loss"])


@pytest.mark.slow
@pytest.mark.parametrize(("rest", "dose", "sign"), [("base", 1.0, 1.0), ("tuned", 0.0, -1.0)])
def test_geometric_parts_are_let_in_and_taken_out_as_written_by_hand(tmp_path, rest, dose, sign):
    from tvlens.demo.models import demo_folder
    from tvlens.study.runner import run_study

    names = ("new_write", "new_both")
    asked = {"kept_parts": ",".join(names), "rest": rest, "draws": 1, "controls": ("demo:ctl",)}
    study = run_study(plan(tmp_path, scales="0,0.5,1", **asked), tmp_path / "study")
    curves = study.table("curves").to_frame()
    of = curves[curves["task"] == "medical"].set_index(["ranked_by", "scale"])["value"]
    base, med = (demo_folder(name) for name in ("base", "med"))
    wanted = by_numpy(base if rest == "base" else med, base, names, tmp_path, sign)
    assert of["tuning", dose] == pytest.approx(wanted, abs=2e-5)
    control = by_numpy(base if rest == "base" else med, base, names, tmp_path, sign, "demo:ctl")
    assert of["ctl", dose] == pytest.approx(control, abs=2e-5)  # these parts of its change alone
    evaluation = study.table("evaluation").to_frame().set_index(["model", "measure"])["value"]
    start = 0.0 if rest == "base" else 1.0
    assert of["tuning", start] == evaluation["base" if rest == "base" else "med", "loss"]
    assert set(curves["ranked_by"]) == {"tuning", "random", "ctl"}
    assert abs(of["random", dose] - of["tuning", start]) < 0.5 * abs(wanted - of["tuning", start])
    assert 0.1 < curves["share_of_norm"].iloc[0] < 0.9
    verdicts = study.table("verdicts").to_frame().set_index("claim")
    skill = verdicts.loc["the domain's skill depends on the tuning vector"]
    assert (skill["verdict"], skill["why"]) == ("not tested", "a part was swept, or from tuned")
    warnings = " ".join(study.manifest["warnings"])
    assert "18 changed components (embedding, norm) have no geometric parts" in warnings
    assert "this part of the tuning vector gives" in study.manifest["facts"]["med"]["sweep"][
        "medical"]["sentence"]  # fmt: skip


@pytest.mark.slow
def test_directions_of_a_study_are_swept_beside_random_ones_and_other_components(tmp_path):
    from tvlens.study.runner import run_study

    asked = StudyPlan(base="demo:base", tuned=("demo:med",), stages=("decompose",))
    made = run_study(asked, tmp_path / "made")
    swept = run_study(
        plan(tmp_path, along='part == "W_out"', study=str(made.folder), draws=1, scales="0,1"),
        tmp_path / "study",
    )
    curves = swept.table("curves").to_frame()
    assert set(curves["ranked_by"]) == {"tuning", "random", "random_set"}
    share = curves["share_of_norm"].iloc[0]
    rows = made.directions.where(part="W_out").to_frame()
    matrices, neurons = rows[rows["rank"].notna()], rows[rows["rank"].isna()]
    weights = made.weights.to_frame()
    whole = weights[weights["kind"].isin(("matrix", "norm", "bias", "embedding"))]
    tied = whole["delta_norm"].where(whole["kind"] != "embedding", 2**0.5 * whole["delta_norm"])
    least = (matrices["strength"] ** 2).sum() / (tied**2).sum()
    most = least + (neurons["strength"] ** 2).sum() / (tied**2).sum()
    assert least <= share**2 <= most


def along_two():
    """A tiny base, a noised copy of it, and what W_out of layer 1 changes along two directions."""
    import torch

    import tvlens
    from tests import attribution_pairs as pairs
    from tvlens.compose.edits import EditableModel
    from tvlens.compose.portions import Along
    from tvlens.study.selecting import Cut
    from tvlens.study.sweeping import _swept

    base, tuned = pairs.hf_model("llama"), pairs.hf_model("llama")
    pairs.noised(tuned)
    pair = tvlens.load_pair(base, tuned)
    one = pairs.component("matrix", 1, None, "W_out")
    cut = Cut(None, Along({one: torch.eye(32)[:2]}, pair.layout))
    return base, pair, one, _swept(EditableModel.of_pair(pair), cut, pair, from_base=True)


def test_the_random_vector_of_directions_has_their_rank_and_length():
    from tvlens.compose.controls import random_vector
    from tvlens.weights.delta import LowRank

    _, _, one, swept = along_two()
    drawn, own = random_vector(swept.moved, seed=3)[one], swept.moved.vector[one]
    assert isinstance(drawn, LowRank)
    assert isinstance(own, LowRank)
    assert drawn.rank == own.rank == 2
    assert drawn.norm() == pytest.approx(own.norm(), rel=1e-6)
    assert 0 < swept.share_of_norm < 0.2
    assert swept.whole is not swept.moved  # other components are drawn from the whole vector


@pytest.mark.slow
def test_other_components_in_place_of_directions_are_moved_by_as_much(tmp_path, monkeypatch):
    from tvlens.attribution.partition import partition
    from tvlens.compose.controls import length
    from tvlens.study.sweeping import _Run

    _, pair, one, swept = along_two()
    run, asked = _Run(plan(tmp_path), pair, swept, [], {}, lambda text: None), []
    monkeypatch.setattr(_Run, "_along", lambda self, *words: asked.append(words) or iter(()))
    assert [*run._random_set(0)] == []
    ((name, draw, gated, doses),) = asked
    assert (name, draw) == ("random_set", 0)
    whole = swept.whole.vector[one].norm()
    moved = swept.moved.vector[one].norm()
    assert length(partition(gated), doses) == pytest.approx(moved, rel=1e-5)
    assert moved < 0.5 * whole  # so that the whole matrix's length would be seen


@pytest.mark.slow
def test_a_control_that_changed_nothing_there_moves_nothing(tmp_path):
    import torch

    import tvlens
    from tests import attribution_pairs as pairs
    from tvlens.study.sweeping import _Run
    from tvlens.weights.vector import tuning_vector

    base, pair, one, swept = along_two()
    control = pairs.hf_model("llama")
    with torch.no_grad():
        control.model.layers[0].mlp.down_proj.weight.mul_(1.1)
    run = _Run(plan(tmp_path), pair, swept, [], {}, lambda text: None)
    assert len(run._portion(tuning_vector(tvlens.load_pair(base, control)))) == 0
    assert [*run._portion(tuning_vector(pair))] == [one]


@pytest.mark.slow
@pytest.mark.parametrize(("from_base", "alone"), [(True, True), (False, False)])
def test_the_whole_vector_is_let_go_where_only_parts_are_moved(from_base, alone):
    import tvlens
    from tests import attribution_pairs as pairs
    from tvlens.compose.edits import EditableModel
    from tvlens.compose.portions import geometric_parts
    from tvlens.study.selecting import Cut
    from tvlens.study.sweeping import _swept

    base, tuned = pairs.hf_model("llama"), pairs.hf_model("llama")
    pairs.noised(tuned)
    pair = tvlens.load_pair(base, tuned)
    cut = Cut(None, geometric_parts("new_write"))
    swept = _swept(EditableModel.of_pair(pair), cut, pair, from_base=from_base)
    assert (swept.whole is swept.moved) == alone
    assert 0 < swept.share_of_norm < 1
    assert len(swept.notes) == 2


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
        {"draws": 1, "scales": "0,1", "kept_parts": "new_write"},
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
