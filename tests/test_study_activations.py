"""A study whose command names activations, directions and positions: tables, files, page, plan."""

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from markupsafe import escape

from tests.test_reporting import parsed
from tests.tiny_checkpoints import add_noise, copy_with, tiny_llama
from tvlens import cli
from tvlens.attribution import fidelity
from tvlens.errors import StudyError
from tvlens.reporting import edge_tables
from tvlens.reporting.graft_tables import share
from tvlens.study.plan import StudyPlan
from tvlens.study.runner import run_study
from tvlens.study.store import Study

pytestmark = pytest.mark.slow
PARTS = ("z", "q", "k", "pre", "post", "attn_out", "resid_pre")
SERIES = {
    ("clean_into_corrupt", "tuned"),
    ("tuned_into_base", "base"),
    ("base_into_tuned", "tuned"),
    ("clean_into_corrupt", "base"),
    ("zero_ablation", "tuned"),
}
OPTIONS = (
    *("--nodes", ",".join(PARTS), "--direction", "default", "--position"),
    *("--direction", "clean_into_corrupt@base", "--direction", "zero_ablation"),
    *("--check-exact", "14", "--metric", "logit_diff", "--edges"),
    *("--estimator", "first_order", "--estimator", "ig_inputs"),
)
PROMPTS = 3


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that reads the demo's tokens, its fine-tune, three prompts, two corrupt."""
    from tvlens.demo.models import demo_folder, demo_prompts

    root = tmp_path_factory.mktemp("activations")
    base = tiny_llama(root / "base", vocab_size=2048)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy2(demo_folder("base") / name, base / name)
    copy_with(base, root / "one", add_noise(scale=0.005))
    lines = [json.loads(line) for line in Path(demo_prompts("med")).read_text().splitlines()]
    usable = [one for one in lines if "corrupt" in one][:PROMPTS]
    for number, one in enumerate(usable):
        one["corrupt"] = one["prompt"].replace("mean", "word") if number < 2 else one["prompt"]
        one["split"] = "choose" if number == 0 else "judge"
        if number >= 2:
            del one["corrupt"]
    (root / "some.jsonl").write_text("\n".join(map(json.dumps, usable)))
    return root


def words(root: Path, *more: object) -> list[str]:
    models = [root / name for name in ("base", "one")]
    asked = ["attribute", *models, "--prompts", root / "some.jsonl", *OPTIONS, *more]
    return [str(word) for word in asked]


@pytest.fixture(scope="module")
def study(root: Path) -> Study:
    cli.app(words(root, "--out", root / "study", "--quiet"), standalone_mode=False)
    return Study(root / "study")


@pytest.fixture(scope="module")
def attribution(study: Study) -> pd.DataFrame:
    return study.attribution.to_frame()


def test_every_direction_and_activation_that_was_named_is_there(attribution) -> None:
    rows = attribution[attribution["space"] == "activation"]
    estimates = rows[rows["estimator"] == "first_order"]
    assert set(zip(estimates["direction"], estimates["at"], strict=True)) == SERIES
    for series, found in estimates.groupby(["direction", "at"]):
        assert set(found["part"]) == set(PARTS), series
        prompts = 2 if series[0] == "clean_into_corrupt" else PROMPTS
        assert found["prompt"].nunique() == prompts, series
        whole = found[found["prompt"].isna()]
        assert len(whole) == 2 * 2 * 48, series  # pre and post of two layers
    within = estimates["direction"].isin(("clean_into_corrupt", "zero_ablation"))
    assert set(estimates[within]["method"]) == {"activation_first_order"}
    assert set(estimates[~within]["method"]) == {"cross_model_first_order"}


def test_every_direction_has_its_edges_checked_and_circuits_between_prompts(
    study: Study, attribution
) -> None:
    rows = attribution[attribution["space"] == "edge"]
    estimates = rows[rows["estimator"] == "first_order"]
    assert set(zip(estimates["direction"], estimates["at"], strict=True)) == SERIES
    along = rows[rows["estimator"] == "ig_inputs"]
    assert set(along["direction"]) == {"clean_into_corrupt"}
    assert along["nodes"].notna().all()
    fidelity = study.fidelity.to_frame()
    checked = fidelity[(fidelity["kind"] == "edge") & (fidelity["stratum"] == "random")]
    assert set(checked["method"]) == {"edge_first_order", "edge_ig_inputs"}
    assert len(checked) == len(SERIES) + 2
    across = checked[checked["direction"].isin(("tuned_into_base", "base_into_tuned"))]
    assert (across["spearman"] > 0.8).all()
    circuits = study.table("edge_circuits").to_frame()
    assert set(zip(circuits["direction"], circuits["at"], strict=True)) == {
        ("clean_into_corrupt", "base"),
        ("clean_into_corrupt", "tuned"),
    }
    assert set(circuits["ranked_by"]) == {"edge_first_order", "edge_ig_inputs", "random"}
    whole = circuits[circuits["k"] == circuits["of"]]
    assert (whole["value"] - 1).abs().max() < 1e-4
    compared = study.table("circuits").to_frame()
    assert (compared["kind"] == "edge").sum() > 20
    said = " ".join(study.manifest["warnings"])
    assert "ig_inputs needs a prompt and its corrupt prompt: tuned into base" in said


def test_every_direction_and_activation_is_checked_exactly(study: Study, attribution) -> None:
    fidelity = study.fidelity.to_frame()
    rows = fidelity[fidelity["part"].notna() & (fidelity["stratum"] == "random")]
    for series in SERIES:
        of = rows[(rows["direction"] == series[0]) & (rows["at"] == series[1])]
        assert set(of["part"]) == set(PARTS) - {"attn_out", "resid_pre"}, series
    exact = attribution[attribution["method"] == "exact_activation"]
    assert set(zip(exact["direction"], exact["at"], strict=True)) == SERIES
    # a fine-tune this near is first order both ways; six components, so one swap is 0.83 or more
    across = fidelity[(fidelity["method"] == "cross_model_first_order")
                      & (fidelity["kind"] == "all")]  # fmt: skip
    assert len(across) == 4
    assert (across["spearman"] > 0.8).all()
    assert across["slope"].between(0.8, 1.25).all()


def test_scores_by_position_sum_to_those_of_the_table(study: Study, attribution) -> None:
    rows = attribution[(attribution["estimator"] == "first_order") & attribution["prompt"].notna()]
    rows = rows[rows["space"] == "activation"]
    kinds = {"z": "head", "q": "head", "k": "kv_head", "pre": "neuron", "post": "neuron"}
    count = 0
    for (direction, at, part), found in rows.groupby(["direction", "at", "part"]):
        placed = study.positions(
            kinds.get(part, "node"), part=part, direction=direction, at=at, tuned="one"
        )
        summed = placed.scores.double().sum(1).numpy()
        place = {prompt: row for row, prompt in enumerate(placed.prompts)}
        index = found["index"].fillna(0).astype(int)
        ours = summed[found["prompt"].map(place), found["layer"].astype(int), index]
        np.testing.assert_array_equal(ours, found["score"].to_numpy())
        count += 1
    assert count == len(SERIES) * len(PARTS)


def test_scores_by_position_stand_at_the_tokens_of_the_prompt(study: Study, root: Path) -> None:
    from tvlens.models.prompts import load_prompts

    asked = load_prompts(root / "some.jsonl")
    placed = study.positions("head", direction="clean_into_corrupt", at="base", tuned="one")
    assert placed.prompts == (0, 1)
    for row, number in enumerate(placed.prompts):
        prompt = asked[number]
        assert len(placed.tokens[row]) == len(placed.corrupt_tokens[row]) == placed.lengths[row]
        text = "".join(placed.tokens[row])
        assert text.endswith(f"{prompt.prompt}{prompt.answer}")
        assert "word" in "".join(placed.corrupt_tokens[row])
        differ = [
            a != b for a, b in zip(placed.tokens[row], placed.corrupt_tokens[row], strict=True)
        ]
        first = differ.index(True)
        assert not placed.scores[row, :first].any()  # what comes before is alike in both runs
        assert placed.scores[row, first].any()
    assert study.positions("head", tuned="one").corrupt_tokens[2] == ()


def test_the_base_and_the_tuned_circuit_are_compared_part_by_part(study: Study) -> None:
    circuits = study.table("circuits").to_frame()
    nodes = circuits[circuits["kind"] != "edge"]
    assert set(nodes["part"]) == set(PARTS)
    joins = study.table("joins").to_frame()
    assert set(zip(joins["kind"], joins["part"].fillna(""), strict=True)) == {
        ("head", "z"), ("head", "q"), ("kv_head", "k"), ("neuron", "pre"), ("neuron", "post"),
        ("node", ""), ("edge", ""),
    }  # fmt: skip
    heads = circuits[circuits["part"] == "q"]
    rho = heads[["score_base", "score_tuned"]].corr("spearman").iloc[0, 1]
    row = joins[joins["part"] == "q"].iloc[0]
    assert (row["n"], row["spearman"]) == (8, pytest.approx(rho))


def test_roles_are_by_what_a_site_gives_on(study: Study, attribution) -> None:
    roles = study.table("roles").to_frame()
    head = roles[roles["site"] == "L1H2"].iloc[0]
    rows = attribution[attribution["component"] == "L1H2.z"]
    rows = rows[(rows["direction"] == "tuned_into_base") & (rows["estimator"] == "first_order")]
    assert head["passing"] == pytest.approx(rows["score"].mean())


def test_the_command_of_the_study_is_read_back_as_its_plan(study: Study, monkeypatch) -> None:
    from tvlens.cli import comparing

    command = study.manifest["command"]
    assert "--direction default --direction clean_into_corrupt@base" in command
    assert "--position" in command
    made = []
    monkeypatch.setattr(comparing, "_show", lambda plan, out, **how: made.append(plan))
    cli.app(shlex.split(command)[1:], standalone_mode=False)
    assert made[0].model_dump(exclude={"check_nodes", "check_prompts"}) == study.plan.model_dump(
        exclude={"check_nodes", "check_prompts"}
    )


def test_a_finished_study_is_kept_and_another_plan_is_not_mixed_in(
    study: Study, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (study.folder / "positions" / "index.json").stat().st_mtime_ns
    cli.app(words(root, "--out", study.folder, "--resume"), standalone_mode=False)
    assert "attribute: kept" in capsys.readouterr().err
    assert (study.folder / "positions" / "index.json").stat().st_mtime_ns == before
    other = study.plan.model_copy(update={"position": False})
    with pytest.raises(StudyError, match="other options"):
        run_study(other, study.folder, resume=True)


def test_inspect_plans_the_rows_and_the_bytes_that_were_written(study: Study, root: Path) -> None:
    from tests.planned_tables import RATES
    from tvlens.study.inspection import inspection

    options = study.plan.model_dump(exclude={"base", "tuned", "tuned_names", "check_nodes"})
    found = inspection(str(root / "base"), str(root / "one"), rates=RATES, **options)
    stage = found["stages"]["attribute"]
    for name, rows in stage["tables"].items():
        made = len(study.table(name))
        if "rows" in rows:
            assert made == rows["rows"], name
        else:
            assert rows["at_least"] <= made <= rows["at_most"], name
    assert set(stage["tables"]) == set(study.tables)
    files = [*(study.folder / "positions").glob("*.safetensors")]
    # two more series for gradients along the inputs, which only two directions have
    assert stage["positions"]["tensors"] == (len(SERIES) + 2) * len(PARTS)
    headers = sum(8 + int.from_bytes(path.read_bytes()[:8], "little") for path in files)
    whole = sum(path.stat().st_size for path in files) - headers
    assert stage["positions"]["bytes"] == whole
    plain = inspection(
        str(root / "base"), str(root / "one"), rates=RATES, **{**options, "position": False}
    )
    assert "positions" not in plain["stages"]["attribute"]


def test_the_page_draws_every_activation_apart(study: Study, attribution) -> None:
    page = (study.folder / "report.html").read_text("utf-8")
    rows = attribution[attribution["prompt"].notna()]
    rows = rows[(rows["direction"] == "tuned_into_base") & (rows["estimator"] == "first_order")]
    rows = rows[rows["space"] == "activation"]
    for label, said in (
        ("L1H2.z", "layer 1 head 2 z"),
        ("L1H2.q", "layer 1 head 2 q"),
        ("L0K1.k", "layer 0 key-value head 1 k"),
        ("L1.attn_out", "layer 1 attn_out"),
        ("L1.resid_pre", "layer 1 resid_pre"),
    ):
        mean = rows[rows["component"] == label]["score"].mean()
        assert f"<title>{said}: {mean:.4g} logits</title>" in page, label


def test_the_page_says_what_was_done_in_every_direction(study: Study) -> None:
    words = parsed(study.folder / "report.html").words
    for heading in (
        "Tuned into base: cross_model_first_order",
        "Clean into corrupt, in base: activation_first_order",
        "Clean into corrupt, in tuned: activation_first_order",
        "Zero ablation, in tuned: activation_first_order",
    ):
        assert words.count(heading) == 1, heading
    assert "The activation is set to zero." in words
    assert "The base's circuit against the tuned model's" in words


def test_the_page_draws_the_places_of_one_prompt(study: Study) -> None:
    page = (study.folder / "report.html").read_text("utf-8")
    prompts = study.table("prompts").where(tuned="one").to_frame()
    change = (prompts["metric_tuned"] - prompts["metric_base"]).abs()
    number = int(prompts.loc[change.idxmax(), "prompt"])
    placed = study.positions("node", part="resid_pre", tuned="one")
    row = placed.prompts.index(number)
    scores = placed.scores[row, : placed.lengths[row], 1, 0]
    place = int(scores.abs().argmax())
    token = escape(placed.tokens[row][place].strip())
    assert f"<title>layer 1 at {token}: {float(scores[place]):.4g} logits</title>" in page
    drawing = re.search(r'<svg id="m1-placed-1-resid_pre".*?</svg>', page, re.S)
    assert drawing is not None
    cells = re.search(r'<g class="cells">(.*?)</g>', drawing[0], re.S)
    assert cells is not None
    assert cells[1].count("<rect") == 2 * placed.lengths[row]
    assert 'id="m1-placed-1-z"' in page


@pytest.fixture(scope="module")
def selected_study(study: Study, root: Path) -> Study:
    """Run into a copy of the study's folder: fewer activations, no positions, a selection."""
    folder = root / "again"
    shutil.copytree(study.folder, folder)
    select = 'layer == 1 and kind in ("head", "matrix", "node")'
    less = {"position": False, "nodes": "z,mlp_out", "directions": ("tuned_into_base",)}
    less |= {"estimators": ("first_order",), "edges": False}
    return run_study(
        study.plan.model_copy(update={**less, "select": select, "check_exact": 9}), folder
    )


def test_a_plan_without_positions_takes_the_old_ones_away(selected_study: Study) -> None:
    folder = selected_study.folder
    assert not (folder / "positions").exists()
    assert not (folder / "circuits.parquet").exists()
    assert not (folder / "edge_circuits.parquet").exists()
    with pytest.raises(StudyError, match="--position"):
        selected_study.positions("head")
    page = (folder / "report.html").read_text("utf-8")
    assert "At which tokens" not in page
    assert "Where it passes" in page


def test_the_exact_sample_is_drawn_from_what_is_selected(selected_study: Study, root: Path) -> None:
    from tests.planned_tables import RATES
    from tvlens.study.inspection import inspection

    rows = selected_study.attribution.to_frame()
    exact = rows[rows["estimator"] == "exact"]
    assert set(exact["layer"]) == {1}
    assert set(exact["kind"]) == {"head", "matrix", "node"}
    assert set(exact["space"]) == {"activation", "weight"}
    estimates = rows[rows["estimator"] != "exact"]
    assert set(estimates["kind"]) > {"neuron", "embedding"}  # what is scored stays the same
    assert "--select" in selected_study.manifest["command"]
    options = selected_study.plan.model_dump(
        exclude={"base", "tuned", "tuned_names", "check_nodes"}
    )
    found = inspection(str(root / "base"), str(root / "one"), rates=RATES, **options)
    tables = found["stages"]["attribute"]["tables"]
    for name, planned in tables.items():
        if "rows" in planned:
            assert planned["rows"] == len(selected_study.table(name)), name
    assert {"attribution", "fidelity", "findings"} <= {n for n, t in tables.items() if "rows" in t}


@pytest.mark.parametrize(
    ("select", "said"),
    [
        ("L1H2,L9H9", "names 'L9H9', which was not scored"),
        ('part == "z"', "selects nothing with weights"),
        ("layer === 1", "cannot be read"),
    ],
)
def test_a_selection_of_nothing_is_refused(study: Study, root: Path, select, said) -> None:
    from tvlens.attribution.sampling import selected
    from tvlens.errors import SelectionError
    from tvlens.selection import parse_selection

    with pytest.raises((StudyError, SelectionError), match=said):
        selected(study.attribution, parse_selection(select))


def test_a_scan_in_bfloat16_is_near_and_says_what_it_is(study: Study, attribution, root) -> None:
    plan = study.plan.model_copy(
        update={"dtype": "bfloat16", "nodes": "z,k", "directions": ("tuned_into_base",)}
        | {"estimators": ("first_order",)}
    )
    made = run_study(plan, root / "scan")
    assert not {"fidelity", "findings"} & {*made.tables}
    rows = made.attribution.to_frame()
    assert set(rows["estimator"]) == {"first_order", "ig"}
    assert set(rows.loc[rows["estimator"] == "ig", "nodes"]) == {8}
    keys = ["component", "method", "direction", "at", "prompt"]
    both = rows.merge(attribution, on=keys, suffixes=("", "_exact"))
    both = both[both["prompt"].notna() & (both["kind"] == "head")]
    for method, found in both.groupby("method"):
        rho = found[["score", "score_exact"]].corr().iloc[0, 1]
        print(method, len(found), rho)
        assert rho > 0.95, method
    assert made.table("prompts").to_frame()["token_scores"].isna().all()
    assert made.positions("head").scores.shape[0] == PROMPTS
    assert any("scan in bfloat16" in sentence for sentence in made.manifest["warnings"])
    words = parsed(made.folder / "report.html").words
    assert "The scores are a scan in bfloat16" in words
    assert "Withheld: the ranking was not checked" in words


def test_the_page_has_the_largest_edges_beside_exact_patches_and_what_sets_carry(
    study: Study, attribution
) -> None:
    page = (study.folder / "report.html").read_text("utf-8")
    words = parsed(study.folder / "report.html").words
    assert 'id="m1-edges"' in page
    assert words.count("Check against exact patching:") == len(SERIES) + 2
    rows = attribution[(attribution["space"] == "edge") & attribution["prompt"].isna()]
    rows = rows[(rows["direction"] == "tuned_into_base") & (rows["estimator"] == "first_order")]
    largest = rows.loc[rows["score"].abs().idxmax()]
    section = page[page.index('id="m1-edges"') :]
    row = f"{largest['source']}</th><td>{largest['target']}</td>"
    # the exact column is of the same direction and the same edge
    exact = attribution[
        (attribution["method"] == "exact_edge")
        & (attribution["direction"] == "tuned_into_base")
        & (attribution["component"] == largest["component"])
    ]
    cells = section[section.index(row) : section.index(row) + 200]
    assert f"{largest['score']:+.3g}" in cells
    assert f"{exact['score'].mean():+.3g}</td></tr>" in cells
    sets = study.table("edge_circuits").to_frame()
    judged = sets[
        (sets["split"] == "judge")
        & (sets["curve"] == "restored")
        & (sets["at"] == "tuned")
        & (sets["ranked_by"] == "edge_first_order")
        & (sets["k"] == 4)
    ]
    assert f"{judged['value'].item():.0%}" in section
    assert "restored by exchanging these edges alone" in words
    assert "lost when all other edges are exchanged and these are not" in words
    assert edge_tables.SLOPES == fidelity.SLOPE_TO_PASS
    change = judged.iloc[0]
    assert f"The logit_diff changes by {change['change']:+.3g}" in words


@pytest.mark.parametrize(("low", "said"), [(-0.1, "mean nothing"), (0.1, "to 1).")])
def test_shares_of_no_sure_change_mean_nothing(low: float, said: str) -> None:
    row = pd.Series({"metric": "logprob", "change": 0.5, "change_low": low, "change_high": 1.0})
    assert said in edge_tables._changes(row)
    assert ("mean nothing" in edge_tables._changes(row)) == (low < 0)
    assert edge_tables._changes(row.replace(1.0, None)) == ""
    assert [share(value) for value in (-0.001, 0.0, -0.1, -1.0)] == ["0%", "0%", "-10%", "-100%"]


def test_force_removes_the_positions_too(study: Study, root: Path) -> None:
    from tvlens.study.store import prepared_folder

    folder = root / "forced"
    shutil.copytree(study.folder, folder)
    prepared_folder(folder, {}, force=True)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--nodes", "zz"), "no activation 'zz'"),
        (("--direction", "sideways"), "no direction 'sideways'"),
        (("--direction", "tuned_into_base@tuned"), "cannot be taken at 'tuned'"),
        (("--estimator", "ig_inputs"), "no direction that is asked for has two prompts"),
    ],
)
def test_words_that_mean_nothing_are_refused_before_anything_is_made(
    root: Path, tmp_path: Path, options: tuple[str, ...], said: str
) -> None:
    from tvlens.errors import TvlensError

    models = (str(root / "base"), str(root / "one"))
    with pytest.raises(TvlensError, match=said):
        cli.app(
            ["attribute", *models, *options, "--out", str(tmp_path / "s")], standalone_mode=False
        )
    assert not (tmp_path / "s").exists()


def test_a_named_direction_without_corrupt_prompts_is_refused(root: Path, tmp_path: Path) -> None:
    from tvlens.errors import PromptError

    plan = StudyPlan(
        base=str(root / "base"),
        tuned=(str(root / "one"),),
        stages=("attribute",),
        directions=("corrupt_into_clean",),
    )
    with pytest.raises(PromptError, match="corrupt_into_clean needs"):
        run_study(plan, tmp_path / "s")
    assert not (tmp_path / "s").exists()
