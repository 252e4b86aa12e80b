"""Several models in one study: fine-tunes beside each other, and a lineage over a parent."""

import json
from pathlib import Path

import pandas as pd
import pytest

from tests.test_cli import Run
from tests.test_weights_lineage import _reinitialised
from tests.test_weights_vocabulary import WORDS, word_tokenizer
from tests.tiny_checkpoints import add_noise, copy_with, tiny_adapter, tiny_llama
from tvlens.study.plan import StudyPlan
from tvlens.study.runner import run_study

pytestmark = pytest.mark.slow

KEY = ["tuned", "component"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("several")
    base = tiny_llama(root / "start")
    word_tokenizer(base, WORDS)
    made = {"base": base}
    for seed, name in enumerate(("instruct", "two", "three"), 1):
        made[name] = copy_with(base, root / name, add_noise(seed=seed, scale=0.02))
    made["domain"] = copy_with(made["instruct"], root / "domain", add_noise(seed=7, scale=0.02))
    prompts = root / "prompts.jsonl"
    lines = [
        {"prompt": "w1 w2 w3", "answer": " w4", "wrong": " w5", "split": "choose"},
        {"prompt": "w6 w7", "answer": " w8", "wrong": " w9", "split": "judge"},
    ]
    prompts.write_text("\n".join(map(json.dumps, lines)))
    texts = root / "texts.txt"
    texts.write_text("w1 w2 w3 w4\n\nw5 w6 w7")
    return {**made, "prompts": prompts, "texts": texts}


def _plan(folders: dict[str, Path], *tuned: str, **options: object) -> StudyPlan:
    given = {
        "prompts": str(folders["prompts"]),
        "check_exact": 6,
        "check_nodes": 4,
        "stages": ("decompose", "attribute", "evaluate"),
        "evaluate": {"words": str(folders["texts"])},
    }
    specs = tuple(str(folders[name]) for name in tuned)
    return StudyPlan(base=str(folders["base"]), tuned=specs, **{**given, **options})


@pytest.fixture(scope="module")
def both(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("both") / "study"
    run_study(_plan(folders, "instruct", "two"), folder)
    return folder


def test_three_fine_tunes_share_one_study(folders: dict[str, Path], tmp_path: Path) -> None:
    plan = _plan(folders, "instruct", "two", "three", stages=("decompose",))
    study = run_study(plan, tmp_path / "study")
    for table in ("weights", "tests", "labels"):
        counts = study.table(table).to_frame().groupby("tuned", sort=False).size()
        assert counts.index.tolist() == ["instruct", "two", "three"]
        assert counts.nunique() == 1
    assert len(study.load_report["pairs"]) == 3
    assert set(study.manifest["inputs"]) == {"base", "instruct", "two", "three"}


@pytest.mark.parametrize("table", ["weights", "tests", "labels", "attribution", "fidelity"])
@pytest.mark.slow
def test_every_table_holds_every_fine_tune(both: Path, table: str) -> None:
    frame = pd.read_parquet(both / f"{table}.parquet")
    assert list(frame["tuned"].unique()) == ["instruct", "two"]
    counts = frame.groupby("tuned").size()
    assert counts.nunique() == 1 or table == "attribution"  # whose exact sample differs


@pytest.mark.slow
def test_a_fine_tune_has_the_same_numbers_alone_and_in_company(
    folders: dict[str, Path], both: Path, tmp_path: Path
) -> None:
    alone = run_study(_plan(folders, "two"), tmp_path / "alone").folder
    for table in ("weights", "labels", "attribution", "fidelity", "findings", "prompts"):
        own = pd.read_parquet(alone / f"{table}.parquet")
        beside = pd.read_parquet(both / f"{table}.parquet")
        beside = beside[beside["tuned"] == "two"].reset_index(drop=True)
        pd.testing.assert_frame_equal(own, beside)


@pytest.mark.slow
def test_the_load_report_and_the_page_hold_every_fine_tune(both: Path) -> None:
    report = json.loads((both / "load_report.json").read_text())
    assert [pair["tuned_name"] for pair in report["pairs"]] == ["instruct", "two"]
    assert {pair["base_name"] for pair in report["pairs"]} == {"base"}
    page = (both / "report.html").read_text()
    for name in ("instruct", "two"):
        assert f"<h2>{name}</h2>" in page
        assert f"From base to {name}, logit_diff changes by" in page
    assert 'id="lineage"' not in page


@pytest.mark.slow
def test_each_model_is_evaluated_once(both: Path) -> None:
    frame = pd.read_parquet(both / "evaluation.parquet")
    assert frame["model"].tolist() == ["base", "instruct", "two"]


@pytest.mark.slow
def test_weights_join_attribution_within_each_fine_tune(both: Path) -> None:
    from tvlens.study.store import Study

    joined = Study(both).joined(part="W_O")
    assert joined.groupby("tuned").size().nunique() == 1
    assert joined["score"].notna().all()


# --- a parent -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lineage(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lineage") / "study"
    run_study(_plan(folders, "domain", parent=str(folders["instruct"])), folder)
    return folder


STEPS = [("base", "instruct"), ("instruct", "domain"), ("base", "domain-from-base")]


@pytest.mark.parametrize("table", ["weights", "labels", "attribution"])
@pytest.mark.slow
def test_a_study_with_a_parent_holds_both_steps_and_the_whole(lineage: Path, table: str) -> None:
    frame = pd.read_parquet(lineage / f"{table}.parquet")
    pairs = frame[["base", "tuned"]].drop_duplicates()
    assert sorted(pairs.itertuples(index=False, name=None)) == sorted(STEPS)


@pytest.mark.slow
def test_the_attributed_changes_of_the_steps_sum_to_the_whole(lineage: Path) -> None:
    frame = pd.read_parquet(lineage / "prompts.parquet")
    change = (frame["metric_tuned"] - frame["metric_base"]).groupby(frame["tuned"]).apply(list)
    for first, second, whole in zip(
        change["instruct"], change["domain"], change["domain-from-base"], strict=True
    ):
        assert first + second == pytest.approx(whole, abs=1e-5)


@pytest.mark.slow
def test_the_lineage_table_agrees_with_the_weights_of_the_three_pairs(lineage: Path) -> None:
    steps = pd.read_parquet(lineage / "lineage.parquet")
    rows = steps[steps["level"] == "component"].set_index("component")
    weights = pd.read_parquet(lineage / "weights.parquet").set_index(KEY)["delta_norm"]
    for name, row in rows.iterrows():
        assert row["norm_first"] == pytest.approx(weights["instruct", name], rel=1e-6)
        assert row["norm_second"] == pytest.approx(weights["domain", name], rel=1e-6)
        whole = weights["domain-from-base", name]
        assert row["norm_whole"] == pytest.approx(whole, rel=1e-5)
    assert (steps["share_first"] + steps["share_second"]).to_numpy() == pytest.approx(1)
    assert steps[["base", "parent", "tuned"]].drop_duplicates().to_numpy().tolist() == [
        ["base", "instruct", "domain"]
    ]


@pytest.mark.slow
def test_the_page_names_each_step_and_shows_the_lineage(lineage: Path) -> None:
    page = (lineage / "report.html").read_text()
    for base, tuned in STEPS:
        assert f"<h2>{base} → {tuned}</h2>" in page
    assert "base → instruct → domain" in page
    assert 'id="lineage"' in page


@pytest.mark.slow
def test_models_of_a_lineage_are_evaluated_once(lineage: Path) -> None:
    frame = pd.read_parquet(lineage / "evaluation.parquet")
    assert frame["model"].tolist() == ["base", "instruct", "domain"]


def test_two_fine_tunes_of_a_parent_share_its_first_step(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    plan = _plan(folders, "domain", "two", parent=str(folders["instruct"]), stages=("decompose",))
    study = run_study(plan, tmp_path / "study")
    assert study.table("weights").to_frame()["tuned"].unique().tolist() == [
        *("instruct", "domain", "domain-from-base", "two", "two-from-base")
    ]
    assert study.table("lineage").to_frame()["tuned"].unique().tolist() == ["domain", "two"]
    assert any("instruct may be no parent of two" in w for w in study.manifest["warnings"])
    assert not any("no parent of domain" in w for w in study.manifest["warnings"])


def test_an_adapter_after_a_parent_has_its_whole_way_in_the_lineage_alone(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    adapter = tiny_adapter(folders["instruct"], tmp_path / "adapter")
    plan = StudyPlan(
        base=str(folders["base"]),
        tuned=(str(adapter),),
        parent=str(folders["instruct"]),
        stages=("decompose",),
    )
    study = run_study(plan, tmp_path / "study")
    names = study.table("weights").to_frame()["tuned"].unique().tolist()
    assert names == ["instruct", "adapter"]
    assert len(study.table("lineage")) > 0
    assert any("in lineage.parquet alone" in w for w in study.manifest["warnings"])


# --- the command line ---------------------------------------------------------------------------


def test_the_parent_is_an_option_of_the_stage_commands(
    run: Run,
    folders: dict[str, Path],
    tmp_path: Path,
) -> None:
    words = (folders["base"], folders["domain"], "--parent", folders["instruct"])
    status, _, err = run("decompose", *words, "--out", tmp_path / "s", "--quiet")
    assert status == 0, err
    study = json.loads((tmp_path / "s" / "manifest.json").read_text())
    assert f"--parent {folders['instruct']}" in study["command"]
    assert set(study["inputs"]) == {"base", "instruct", "domain"}
    assert (tmp_path / "s" / "lineage.parquet").is_file()


def test_an_adapter_as_the_parent_is_refused(
    run: Run,
    folders: dict[str, Path],
    tmp_path: Path,
) -> None:
    adapter = tiny_adapter(folders["base"], tmp_path / "adapter")
    words = (folders["base"], folders["domain"], "--parent", adapter, "--out", tmp_path / "s")
    status, _, err = run("decompose", *words)
    assert status == 2
    assert "is an adapter, which nothing can start from. Merge it" in err


def test_inspect_ranks_parents_in_a_table_and_as_json(
    run: Run,
    folders: dict[str, Path],
    tmp_path: Path,
) -> None:
    stranger = copy_with(folders["base"], tmp_path / "stranger", _reinitialised)
    words = ("inspect", folders["base"], folders["domain"], "--parents", folders["instruct"])
    status, out, err = run(*words, stranger)
    assert status == 0, err
    shown = "".join(out.split())
    assert f"{folders['instruct']}isthelikeliestparentof{folders['domain']}" in shown
    assert "|delta|/|base|" in shown
    assert out.index(" plausible") < out.index(" implausible")
    status, out, _ = run(*words, stranger, "--json")
    ranking = json.loads(out)["parents"]
    assert [row["verdict"] for row in ranking["candidates"]] == [
        *("plausible", "plausible", "implausible")
    ]
    assert ranking["likeliest"] == str(folders["instruct"])
    assert ranking["candidates"][0]["rows"] > 0
    status, out, _ = run("inspect", folders["base"], folders["domain"], "--json")
    assert "parents" not in json.loads(out)


def test_a_parent_of_a_taken_name_is_marked() -> None:
    plan = StudyPlan(base="b", tuned=("x/chat",), parent="y/chat")
    assert [step.tuned_name for step in plan.steps] == ["chat-parent", "chat", "chat-from-base"]
