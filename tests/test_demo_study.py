"""Smoke tests on the demo study: that all of it was written, and that its numbers hang together."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

pytestmark = pytest.mark.demo
DISJOINT = ("matrix", "norm", "bias", "embedding")


def _table(study: Path, name: str) -> pd.DataFrame:
    return pd.read_parquet(study / f"{name}.parquet")


def test_every_file_of_the_contract_is_there(demo_study: Path) -> None:
    tables = (
        "weights",
        "tests",
        "labels",
        "contrasts",
        "prompts",
        "attribution",
        "fidelity",
        "findings",
    )
    for name in (*(f"{t}.parquet" for t in (*tables, "evaluation")), "study.yaml", "report.html"):
        assert (demo_study / name).is_file(), name
    assert not list(demo_study.glob("*.partial"))


def test_every_tensor_is_accounted_for_and_none_is_refused(demo_study: Path) -> None:
    report = json.loads((demo_study / "load_report.json").read_text())
    assert report["identical"] is False
    assert {entry["status"] for entry in report["tensors"]} <= {"compared", "tied"}
    assert len(report["tensors"]) >= 74  # 9 a layer, the embedding and the final norm


def test_weight_scores_sum_to_the_change_of_the_metric_on_every_prompt(demo_study: Path) -> None:
    scores = _table(demo_study, "attribution")
    scores = scores[(scores["method"] == "weight_ig") & scores["kind"].isin(DISJOINT)]
    prompts = _table(demo_study, "prompts").set_index("prompt")
    change = prompts["metric_tuned"] - prompts["metric_base"]
    gap = scores.groupby("prompt")["score"].sum() - change
    assert gap.abs().mean() <= 0.002 * change.abs().mean()  # the contract's completeness


def test_token_scores_sum_to_the_same_change(demo_study: Path) -> None:
    prompts = _table(demo_study, "prompts")
    change = prompts["metric_tuned"] - prompts["metric_base"]
    gap = prompts["token_scores"].map(np.sum) - change
    assert gap.abs().mean() <= 0.002 * change.abs().mean()


def test_the_integral_agrees_with_exact_patching(demo_study: Path) -> None:
    fidelity = _table(demo_study, "fidelity")
    row = fidelity[
        (fidelity["method"] == "weight_ig")
        & (fidelity["kind"] == "all")
        & (fidelity["stratum"] == "random")
    ].iloc[0]
    assert row["spearman"] >= 0.9
    assert 0.8 <= row["slope"] <= 1.25


def test_the_fine_tune_is_better_at_medicine_than_base_and_control(demo_study: Path) -> None:
    losses = _table(demo_study, "evaluation").pivot(index="model", columns="task", values="value")
    assert set(losses.index) == {"base", "med", "ctl"}
    assert losses.loc["med", "medical"] < losses.loc["base", "medical"] - 0.3
    assert losses.loc["med", "medical"] < losses.loc["ctl", "medical"] - 0.1
    assert losses.loc["med", "maths"] > losses.loc["med", "medical"]


def test_tables_join_on_tuned_and_site(demo_study: Path) -> None:
    from tvlens.study.store import Study

    joined = Study(demo_study).joined(part="W_O")
    heads = joined[joined["kind"] == "head"]
    assert len(heads) == 8 * 4
    assert heads["score"].notna().all()


def test_labels_and_weights_have_the_same_components(demo_study: Path) -> None:
    weights, labels = _table(demo_study, "weights"), _table(demo_study, "labels")
    assert labels["component"].is_unique
    assert set(labels["component"]) <= set(weights["component"])


def test_the_report_is_one_offline_page(demo_study: Path) -> None:
    page = (demo_study / "report.html").read_text("utf-8")
    assert len(page) < 8e6
    assert "<script src" not in page
    assert "<link" not in page


def test_the_notebook_shows_study_and_plot(demo_study: Path) -> None:
    from tvlens.study.store import Study

    study = Study(demo_study)
    assert "med" in study._repr_html_()
    assert study.plot("heads").data[0].z.shape == (8, 4)


def test_the_answer_gives_the_controls_loss_beside_the_fine_tunes(demo_study: Path) -> None:
    page = (demo_study / "report.html").read_text("utf-8")
    losses = _table(demo_study, "evaluation").set_index(["model", "task"])["value"]
    assert f"(ctl {losses['ctl', 'medical']:.4g})" in page


def test_contrasts_are_counted_by_the_scores_of_both_matrices(demo_study: Path) -> None:
    """The oracle groups the attribution rows itself."""
    frame = _table(demo_study, "contrasts")
    assert len(frame) == 8  # two claims, raw and minus the control, alike and weighted
    scores = _table(demo_study, "attribution")
    scores = scores[(scores["method"] == "weight_ig") & (scores["kind"] == "matrix")]
    sizes = [
        sum(scores.loc[scores["component"] == f"L{layer}.{part}", "score"].abs().mean()
            for part in ("W_O", "W_out"))
        for layer in range(8)
    ]  # fmt: skip
    for row in frame[frame["weighting"] == "weight_ig"].itertuples():
        np.testing.assert_allclose(row.weight_by_layer, np.array(sizes) / sum(sizes))
        difference = row.attention_by_layer - row.mlp_by_layer
        assert row.mean == pytest.approx(float(difference @ row.weight_by_layer))


def test_raw_contrasts_are_differences_in_the_weights_table(demo_study: Path) -> None:
    weights = _table(demo_study, "weights").set_index("component")
    frame = _table(demo_study, "contrasts")
    for claim, column in (("newness", "g_write"), ("amplification", "amplification")):
        own = [weights.loc[f"L{n}.W_O", column] - weights.loc[f"L{n}.W_out", column]
               for n in range(8)]  # fmt: skip
        row = frame[(frame["claim"] == claim) & (frame["against"] == "raw")].iloc[0]
        assert row["mean"] == pytest.approx(np.mean(own))
