"""What the decompose stage knows of its base's inputs, and the options for one's own functions."""

from pathlib import Path

import pandas as pd
import pytest
import torch

DEMO = {"base": "demo:base", "tuned": ("demo:med",), "prompts": "demo:med"}
NAME = "tests.test_study_covariances:"


def shrunk(base: torch.Tensor, delta: torch.Tensor) -> float:
    """A measure of one's own."""
    return float((base + delta).norm() < base.norm())


def by_measure(evidence: pd.DataFrame) -> pd.Series:
    """A classifier of one's own that uses it."""
    return evidence["shrunk"].map({1.0: "shorter", 0.0: "longer"}).fillna("unresolved")


def plan(**options):
    from tvlens.study.plan import StudyPlan

    return StudyPlan.model_validate(DEMO | options)


@pytest.fixture(scope="module")
def pair():
    from tvlens import load_pair

    return load_pair("demo:base", "demo:med", names=("base", "med"))


@pytest.fixture(scope="module")
def known(pair):
    from tvlens.study.covariances import base_covariances

    return base_covariances(plan(), pair)


@pytest.fixture(scope="module")
def file(known, tmp_path_factory) -> Path:
    return known.covariances.save(tmp_path_factory.mktemp("moments") / "base.safetensors")


def test_auto_takes_them_on_the_prompts_where_the_models_run_anyway(pair, known) -> None:
    from tvlens.study.covariances import base_covariances

    assert known.warnings == ()
    assert len(known.covariances.moments) == 8 * 4
    about = known.facts["covariances"]
    assert about["source"] == "demo:med"
    assert about["tokens"] == known.covariances.tokens > 500
    assert set(about["shrinkage"]) == {"attention", "z", "mlp", "post"}
    assert all(0 < share < 0.5 for share in about["shrinkage"].values())
    for other in (plan(stages=("decompose",)), plan(covariances="off")):
        assert base_covariances(other, pair).covariances is None


@pytest.mark.slow
def test_they_are_those_of_the_base(pair, known) -> None:
    from tvlens import HookedPair, covariances
    from tvlens.models import load_prompts, tokenised

    hooked = HookedPair(pair)
    found = covariances(hooked, tokenised(load_prompts("demo:med"), hooked.tokenizer))
    for key, moments in known.covariances.moments.items():
        torch.testing.assert_close(moments.raw, found.moments[key].raw)


def test_a_file_serves_the_base_and_no_step_that_starts_elsewhere(pair, known, file) -> None:
    from dataclasses import replace

    from tvlens.study.covariances import base_covariances

    found = base_covariances(plan(covariances=str(file), stages=("decompose",)), pair)
    assert found.covariances.moments.keys() == known.covariances.moments.keys()
    assert found.facts["covariances"]["source"] == str(file)
    later = base_covariances(plan(covariances=str(file)), replace(pair, base_name="parent"))
    assert later.covariances is None
    assert "not tested against what parent reads" in later.warnings[0]


@pytest.mark.slow
def test_what_does_not_fit_is_left_out_and_said(pair, monkeypatch) -> None:
    from tvlens.study import covariances

    monkeypatch.setattr(covariances, "AUTO_BYTES", 8 * 8 * 3 * (96**2 + 96))
    found = covariances.base_covariances(plan(), pair)
    assert {name for _, name in found.covariances.moments} == {"attention", "z", "mlp"}
    assert found.warnings[0].startswith("covariances of post were left out: they would take 0.0 GB")
    monkeypatch.setattr(covariances, "AUTO_BYTES", 10)
    found = covariances.base_covariances(plan(), pair)
    assert found.covariances is None
    assert "attention, z, mlp, post were left out" in found.warnings[0]


def test_a_file_or_a_function_that_is_not_there_is_refused_before_anything_runs(tmp_path) -> None:
    from tvlens.errors import CheckpointError, ExtensionError, StudyError
    from tvlens.study.refusals import check_inputs

    with pytest.raises(StudyError, match=r"no file 'on'.*auto, off, or a file"):
        check_inputs(plan(covariances="on"))
    wrong = tmp_path / "wrong"
    wrong.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="no covariances that can be read"):
        check_inputs(plan(covariances=str(wrong)))
    with pytest.raises(ExtensionError, match="classifier 'no:one' cannot be imported"):
        check_inputs(plan(classifier="no:one"))
    with pytest.raises(ExtensionError, match="measure 'no:one' cannot be imported"):
        check_inputs(plan(measures=("no:one",)))
    check_inputs(plan(classifier="no:one", stages=("attribute",)))  # which uses none


@pytest.mark.slow
def test_a_study_by_ones_own_functions_can_be_run_again(tmp_path, file) -> None:
    from tvlens.reporting.report import render_report
    from tvlens.study.runner import run_study

    asked = plan(
        stages=("decompose",),
        covariances=str(file),
        classifier=NAME + "by_measure",
        measures=(NAME + "shrunk",),
    )
    study = run_study(asked, tmp_path / "study")
    assert {"measures", "labels", "tests"} <= set(study.tables)
    labels = study.labels.to_frame()
    assert set(labels["label"]) == {"shorter", "longer", "unresolved"}
    assert set(labels["decided_by"]) == {NAME + "by_measure"}
    values = study.table("measures").to_frame().set_index("component")["value"]
    own = labels[labels["kind"] == "matrix"].set_index("component")["label"]
    assert (own == values.map({1.0: "shorter", 0.0: "longer"})).all()
    rows = study.table("tests").where(null="covariance_matched").to_frame()
    assert rows["q_value"].notna().all()
    assert set(rows["kind"]) == {"matrix", "head", "neuron"}
    assert study.manifest["facts"]["med"]["covariances"]["tokens"] > 500
    command = study.manifest["command"]
    assert f"--covariances {file}" in command
    assert f"--classifier {NAME}by_measure --measure {NAME}shrunk" in command
    page = render_report(study.folder).read_text("utf-8")
    assert "longer" in page
    assert "shorter" in page


def test_functions_are_named_for_a_study_and_lambdas_are_refused(pair, tmp_path) -> None:
    from tvlens.errors import ExtensionError
    from tvlens.study import runner
    from tvlens.study.store import Study

    made = []

    def kept(plan, folder, **how):
        made.append(plan)
        return Study(folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "run_study", kept)
        pair.compare(
            out=tmp_path / "s", classifier=by_measure, measures=[shrunk], seed=4, chat="off"
        )
    (asked,) = made
    assert asked.classifier == NAME + "by_measure"
    assert asked.measures == (NAME + "shrunk",)
    assert (asked.seed, asked.chat) == (4, "off")
    with pytest.raises(ExtensionError, match=r"cannot be imported under that name.*tvlens\.class"):
        pair.compare(out=tmp_path / "t", classifier=lambda evidence: evidence)
