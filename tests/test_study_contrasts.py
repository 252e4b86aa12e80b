"""Contrasts in a study: noise shows none, though raw alignment does, which never stands alone."""

from pathlib import Path

import pandas as pd
import pytest

from tests.noise_copies import noise_of_relative_size
from tests.test_reporting import parsed
from tests.tiny_checkpoints import copy_with
from tvlens.study.plan import StudyPlan
from tvlens.study.runner import run_study
from tvlens.study.store import Study

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """``demo:base`` and a copy of it with noise on every matrix; the control is noise as well."""
    from tvlens.demo.models import demo_folder

    root = tmp_path_factory.mktemp("noise")
    names = ("noise", "other-1", "other-2")
    made = [
        copy_with(demo_folder("base"), root / name, noise_of_relative_size(0.1, seed=seed))
        for seed, name in enumerate(names)
    ]
    plan = StudyPlan(
        base="demo:base",
        tuned=(str(made[0]),),
        controls=tuple(map(str, made[1:])),
        stages=("decompose",),
    )
    return run_study(plan, root / "study")


@pytest.fixture(scope="module")
def contrasts(study: Study) -> pd.DataFrame:
    return study.contrasts.to_frame()


def test_noise_is_within_two_errors_of_no_contrast(contrasts: pd.DataFrame) -> None:
    for row in contrasts.itertuples():
        differences = row.attention_by_layer - row.mlp_by_layer
        error = differences.std(ddof=1) / len(differences) ** 0.5
        assert abs(row.mean) < 2 * error, (row.claim, row.against)
        assert row.verdict in ("not supported", "cannot tell"), row.sentence
        assert abs(row.mean) < 0.02


def test_raw_alignment_of_the_same_noise_differs_and_never_stands_alone(
    study: Study, contrasts: pd.DataFrame
) -> None:
    readings = study.table("readings").to_frame()
    beside = readings[["value", "chance", "noise"]]
    assert beside.notna().all(axis=None)
    rows = readings[(readings["kind"] == "matrix") & (readings["rule"] == "energy_0.9025")]
    by_layer = rows[rows["part"].isin(("W_O", "W_out"))].pivot_table(
        index="layer", columns="part", values=["value", "corrected"]
    )
    raw = by_layer["value"]["W_out"] - by_layer["value"]["W_O"]
    assert raw.min() > 0.05  # every layer of noise says that the MLP follows the base more
    corrected = by_layer["corrected"]["W_out"] - by_layer["corrected"]["W_O"]
    assert abs(corrected.mean()) < raw.mean() / 10
    assert set(contrasts["measure"]) == {
        "G_rel of writes, W_O minus W_out",
        "net energy share of gains, W_O minus W_out",
    }


def test_the_page_shows_raw_alignment_beside_noise_alone(study: Study) -> None:
    from tvlens.reporting.direction_tables import readings_table
    from tvlens.reporting.folder import StudyFolder

    shown = readings_table(StudyFolder.read(study.folder).table("readings"))
    assert shown is not None
    for place, name in enumerate(shown.columns):
        if name.startswith("SA-"):
            assert shown.columns[place + 1 : place + 3] == ("of noise", "corrected")
    assert not any("SA-" in said for said in _answers(study.folder))


def _answers(folder: Path) -> list[str]:
    from tvlens.reporting.answer import answer
    from tvlens.reporting.folder import StudyFolder

    return [statement.text for statement in answer(StudyFolder.read(folder), "noise")]


def test_the_answer_quotes_the_table_and_so_does_the_command_line(study: Study) -> None:
    from tvlens.cli import study_summary

    quoted = study.contrasts.where(headline=True).to_frame()["sentence"].tolist()
    assert len(quoted) == 2
    assert all("minus the mean of 2 controls" in sentence for sentence in quoted)
    said = _answers(study.folder)
    assert [text for text in said if text in quoted] == quoted
    told = study_summary(study)["headline"]["noise"]  # type: ignore[index]
    assert [row["sentence"] for row in told] == quoted
    words = parsed(study.folder / "report.html").words
    assert all(sentence in words for sentence in quoted)
    assert "minus other-1" in words


def test_the_page_draws_every_layer_of_both_contrasts(study: Study) -> None:
    page = (study.folder / "report.html").read_text("utf-8")
    for claim in ("newness", "amplification"):
        figure = page.split(f'<svg id="m1-{claim}"')[1].split("</svg>")[0]
        assert figure.count("<use ") == 2 * 8  # raw and minus controls
        assert figure.count("<title>layer ") == 2 * 8


def test_the_rows_are_those_that_inspect_forecasts(contrasts: pd.DataFrame) -> None:
    from tvlens.study.row_counts import contrast_rows
    from tvlens.weights.matching import load_pair

    pair = load_pair("demo:base", "demo:med", scan=False)  # the same shapes
    assert contrast_rows(pair, 2, weighted=False).at_least == len(contrasts)
    assert contrast_rows(pair, 2, weighted=True).at_least == 2 * len(contrasts)
    assert contrast_rows(pair, 0, weighted=False).at_least == 2
