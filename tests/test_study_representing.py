"""The represent stage on planted checkpoints, its verdict, its section, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from tests.planned_tables import planned
from tests.test_weights_vocabulary import WORDS, word_tokenizer
from tests.tiny_checkpoints import add_noise, copy_with, tiny_llama
from tvlens.errors import PromptError, StudyError
from tvlens.study.plan import StudyPlan
from tvlens.study.subspace_claim import CLAIM, judged_rank, median

LAYERS, D_MODEL = 5, 32


def quiet(tensors):
    """Blocks that write little, so that what one writes is not what the next makes of it."""
    for name in tensors:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensors[name] *= 0.02


def in_two_directions(tensors):
    """Every MLP writes something new in the same two directions."""
    generator = torch.Generator().manual_seed(4)
    left = torch.randn(D_MODEL, 2, generator=generator)
    for name in sorted(tensors):
        if name.endswith("down_proj.weight"):
            right = torch.randn(2, tensors[name].shape[1], generator=generator)
            tensors[name] += 0.003 * left @ right


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("representing")
    start = tiny_llama(root / "start", num_hidden_layers=LAYERS)
    word_tokenizer(start, WORDS)
    base = copy_with(start, root / "base", quiet)
    rng = np.random.default_rng(0)
    texts = root / "texts.txt"
    lines = [" ".join(f"w{i}" for i in rng.integers(1, 60, 12)) for _ in range(40)]
    texts.write_text("\n\n".join(lines))
    return {
        "base": base,
        "narrow": copy_with(base, root / "narrow", in_two_directions),
        "wide": copy_with(base, root / "wide", add_noise(seed=2, scale=0.01)),
        "texts": texts,
    }


def plan(folders: dict[str, Path], *tuned: str, **given) -> StudyPlan:
    asked = {"base": str(folders["base"]), "stages": ("represent",), "draws": 2}
    asked |= {"tuned": tuple(str(folders[name]) for name in tuned)}
    asked |= {"texts": str(folders["texts"])}
    return StudyPlan.model_validate(asked | given)


@pytest.fixture(scope="module")
def study(folders, tmp_path_factory):
    from tvlens.study.runner import run_study

    folder = tmp_path_factory.mktemp("represented") / "study"
    return run_study(plan(folders, "narrow", "wide", controls=(str(folders["wide"]),)), folder)


def stream(frame, measure="effective_rank"):
    rows = frame[(frame["part"] == "resid_post") & (frame["tokens"] == "without_first")]
    return rows[rows["measure"] == measure]


@pytest.mark.slow
def test_every_model_has_the_same_rows(study):
    frame = study.table("representations").to_frame()
    assert frame.groupby("model", sort=False).size().nunique() == 1
    own = frame[frame["tuned"] == "narrow"]
    assert list(own["model"].unique()) == [
        *("narrow", "random 1 for narrow", "random 2 for narrow", "wide for narrow")
    ]
    assert list(own["control"].fillna("").unique()) == ["", "random", "wide"]
    assert set(frame["base"]) == {"base"}
    assert set(frame["n_documents"]) == {40}
    assert set(frame["n_tokens"]) == {480, 440}


@pytest.mark.slow
def test_the_planted_subspace_is_narrow_beside_random_vectors_and_control(study):
    frame = study.table("representations").to_frame()
    ranks = stream(frame[frame["tuned"] == "narrow"]).groupby("model", sort=False)["value"]
    assert ranks.max()["narrow"] < 3
    assert ranks.min().drop("narrow").min() > 8
    first = stream(frame[frame["model"] == "narrow"]).iloc[0]
    assert sum(first["spectrum"][:2]) > 0.99


@pytest.mark.slow
def test_a_control_is_measured_as_that_model_itself(study):
    """The vector of ``wide`` on the base beside narrow, and ``wide`` as a fine-tune."""
    frame = study.table("representations").to_frame()
    keys = ["component", "tokens", "measure"]
    mine, other = (
        frame[frame["model"] == name].set_index(keys)["value"]
        for name in ("wide", "wide for narrow")
    )
    np.testing.assert_allclose(mine, other, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_random_vectors_are_as_long_and_another_draw_is_another(study):
    frame = study.table("representations").to_frame()
    own = stream(frame[frame["tuned"] == "narrow"], "relative_change").groupby("model")["value"]
    first, second = (own.median()[f"random {n} for narrow"] for n in (1, 2))
    assert first != second
    assert own.median()["narrow"] / 5 < first < 5 * own.median()["narrow"]


@pytest.mark.slow
def test_the_verdicts_follow_and_stand_in_the_table_and_the_page(study):
    rows = study.table("verdicts").to_frame()
    own = rows[rows["claim"] == CLAIM].set_index("tuned")
    assert own.loc["narrow", "verdict"] == "supported"
    assert own.loc["narrow", "value"] < 0.1
    assert "surely below the control" in own.loc["narrow", "why"]
    assert own.loc["wide", "verdict"] == "not supported"
    assert own.loc["narrow", "task"] == "texts.txt"
    assert own.loc["narrow", "command"].startswith("tvlens represent ")
    others = rows[rows["claim"] != CLAIM]
    assert set(others["verdict"]) == {"not tested"}
    page = (study.folder / "report.html").read_text("utf-8")
    assert page.count('class="scatter"') == 6
    assert "What it does to the representations" in page
    assert "differs from the base&#39;s in an effective rank of" in page


@pytest.mark.slow
def test_facts_say_what_was_read_and_found(study):
    facts = study.manifest["facts"]["narrow"]["represent"]
    assert (facts["texts"], facts["documents"], facts["tokens"]) == ("texts.txt", 40, 440)
    assert facts["width"] == D_MODEL
    shares = facts["effective_rank_share"]
    assert shares["narrow"] < 0.1 < shares["random 1 for narrow"]
    assert "440 tokens of 40 documents" in facts["sentence"]
    assert "random vectors as long:" in facts["sentence"]
    assert "the control wide:" in facts["sentence"]


@pytest.mark.slow
def test_a_lineage_holds_each_step_and_the_whole(folders, tmp_path):
    from tvlens.study.runner import run_study

    asked = plan(folders, "wide", parent=str(folders["narrow"]), draws=0)
    study = run_study(asked, tmp_path / "study")
    frame = study.table("representations").to_frame()
    steps = frame[["base", "tuned"]].drop_duplicates().itertuples(index=False, name=None)
    assert list(steps) == [("base", "narrow"), ("narrow", "wide"), ("base", "wide-from-base")]
    verdicts = study.table("verdicts").to_frame()
    assert set(verdicts[verdicts["claim"] == CLAIM]["verdict"]) == {"cannot tell"}  # no draws


@pytest.mark.slow
def test_identical_models_are_unchanged_and_their_claim_open(folders, tmp_path):
    from tvlens.study.runner import run_study

    asked = plan(folders, "base", tuned_names=("same",), draws=1)
    study = run_study(asked, tmp_path / "study")
    frame = study.table("representations").to_frame()
    assert set(frame["status"]) == {"unchanged"}
    assert (frame[frame["measure"] == "effective_rank"]["value"] == 0).all()
    row = study.table("verdicts").to_frame().set_index("claim").loc[CLAIM]
    assert row["verdict"] == "cannot tell"
    assert "0 blocks changed" in row["why"]
    assert "give what the base's give" in study.manifest["facts"]["same"]["represent"]["sentence"]


@pytest.mark.slow
def test_the_command_line_runs_the_stage_and_says_what_it_found(
    folders, tmp_path, monkeypatch, capsys
):
    from tvlens import cli

    words = ["represent", folders["base"], folders["narrow"], "--texts", folders["texts"]]
    words += ["--out", tmp_path / "study", "--draws", 0, "--json"]
    monkeypatch.setattr("sys.argv", ["tvlens", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    summary = json.loads(capsys.readouterr().out)
    assert "effective rank" in summary["represent"]["narrow"]["sentence"]
    assert set(summary["tables"]) == {"representations", "verdicts"}


@pytest.mark.parametrize(
    ("texts", "error", "sentence"),
    [(None, StudyError, "--texts"), ("gone.txt", PromptError, "cannot read the prompts")],
)
def test_documents_that_cannot_be_read_are_found_first(texts, error, sentence):
    from tvlens.study.representing import check_represent

    asked = StudyPlan(base="a", tuned=("b",), stages=("represent",), texts=texts)
    with pytest.raises(error, match=sentence):
        check_represent(asked)


# --- the rule -----------------------------------------------------------------------------------


def ranks(own, *random, control=None, status="ok"):
    """Rows of shares of d_model by block: of the fine-tune, of random vectors, of a control."""
    models = [("med", None, own), *((f"random {n}", "random", r) for n, r in enumerate(random, 1))]
    models += [("ctl for med", "ctl", control)] if control is not None else []
    rows = [
        {"model": model, "control": name, "layer": layer, "value": value, "status": status}
        for model, name, values in models
        for layer, value in enumerate(values)
    ]
    return pd.DataFrame(rows)


LOW, MIDDLE, HIGH = [0.04, 0.05, 0.05, 0.06, 0.05, 0.04], [0.09] * 6, [0.4] * 6
SPREAD = [0.02, 0.5, 0.03, 0.6, 0.02, 0.5]


@pytest.mark.parametrize(
    ("given", "verdict", "why"),
    [
        (ranks(LOW, HIGH, HIGH), "supported", "few dimensions"),
        (ranks(LOW, HIGH, [0.06] * 6), "not supported", "0.5 of the rank of random 2"),
        (ranks(HIGH, [0.9] * 6), "not supported", "more than 0.1 of the dimensions"),
        (ranks(SPREAD, [0.95] * 6), "cannot tell", "not surely at most 0.1"),
        (ranks(LOW, [0.05, 0.4, 0.06, 0.4, 0.05, 0.4]), "cannot tell", "not surely at most 0.5"),
        (ranks(LOW), "cannot tell", "no random vector"),
        (ranks(LOW, HIGH, status="few_tokens"), "cannot tell", "4 tokens for each dimension"),
        (ranks(LOW[:3], HIGH[:3]), "cannot tell", "3 blocks changed"),
        (ranks(LOW, HIGH, status="rounding"), "cannot tell", "0 blocks changed"),
    ],
)
def test_a_verdict_follows_from_the_ranks(given, verdict, why):
    found = judged_rank(given)
    assert found["verdict"] == verdict
    assert why in found["why"]


def test_the_table_has_the_random_vector_that_leaves_least_and_the_control_a_word():
    found = judged_rank(ranks(LOW, HIGH, [0.2] * 6, control=MIDDLE))
    assert (found["control"], found["value"]) == ("random 2", 0.05)
    assert found["control_value"] == pytest.approx(0.25)
    assert found["control_low"] <= 0.25 <= found["control_high"]
    assert "surely below the control: 0.56 of the rank of ctl for med" in found["why"]
    level = judged_rank(ranks(LOW, HIGH, control=LOW))
    assert level["verdict"] == "supported"
    assert "not surely below the control, so not about the domain" in level["why"]


def test_blocks_before_the_first_change_do_not_count():
    given = ranks([0.0, 0.0, *LOW], [0.4] * 8)
    given.loc[(given["model"] == "med") & (given["layer"] < 2), "status"] = "unchanged"
    found = judged_rank(given)
    assert found["value"] == 0.05
    assert found["control_value"] == pytest.approx(0.125)


def test_the_ratio_is_taken_block_by_block():
    own = np.array([0.01, 0.02, 0.04, 0.08, 0.01, 0.02])
    found = judged_rank(ranks(own, 4 * own))
    assert found["control_value"] == found["control_low"] == found["control_high"] == 0.25


def test_the_interval_of_a_median_covers_it_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for draw in range(200):
        found = median(rng.normal(1.0, 2.0, 30), seed=draw)
        hits += found.low <= 1.0 <= found.high
    assert 0.88 <= hits / 200 <= 0.995


def test_the_rows_of_every_fine_tune_are_those_that_were_planned(study):
    rows = [
        planned(study, last=place)["stages"]["represent"]["tables"]["representations"]
        for place in (0, 1)
    ]
    frame = study.representations.to_frame()
    made = frame[frame["tuned"] == "narrow"]["part"].value_counts().to_dict()
    assert [one["by"] for one in rows] == [made, made]
    assert sum(one["rows"] for one in rows) == len(frame)


def test_the_documents_that_are_read_are_counted(study):
    known = planned(study)["texts"]
    first = stream(study.representations.to_frame(), "cka").iloc[0]
    assert known["documents"] == first["n_documents"]
    assert known["tokens"] == first["n_tokens"] + first["n_documents"]  # the first ones apart
