"""Classifiers and measures of one's own: what they get, what they may give, what is refused."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from tests.geometry_pairs import FakeLayout, FakePair, fake_pair
from tvlens.components import Component

pytestmark = pytest.mark.slow

LAYOUT = FakeLayout(n_heads=4, n_kv_heads=2, d_model=48, d_head=12, d_mlp=96, n_layers=1)
NAME = "tests.test_geometry_own:"


@pytest.fixture(scope="module")
def pair() -> FakePair:
    w_out = Component("matrix", 0, None, "W_out")
    base = fake_pair(LAYOUT).weights[w_out].base
    return fake_pair(LAYOUT, {w_out: 0.05 * base}, background=0.002)


@pytest.fixture(scope="module")
def classified(pair: FakePair) -> Callable[..., Any]:
    from tvlens.geometry import classify, decompose

    weights = decompose(pair)
    return lambda **given: classify(pair, weights, **given)


def by_size(evidence: pd.DataFrame) -> pd.Series:
    """Public columns only: two words of one's own."""
    return evidence["relative_delta"].gt(0.01).map({True: "large", False: "small"})


def with_reasons(evidence: pd.DataFrame) -> pd.DataFrame:
    rows = evidence.loc[evidence["snr"].notna() | True, ["component"]].sample(
        frac=1, random_state=1
    )
    return rows.assign(label="mixed", label_reason="because", share_new=0.25)


def frobenius_share(base: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    return delta.norm() / (base.norm() + delta.norm())


def test_labels_of_a_classifier_are_in_the_table_under_its_name(classified) -> None:
    found, plain = classified(classifier=by_size), classified()
    frame, shipped = found.labels.to_frame(), plain.labels.to_frame()
    assert frame["component"].equals(shipped["component"])
    assert set(frame["label"]) == {"large", "small"}
    large = set(frame.loc[frame["label"] == "large", "component"])
    assert {"L0.W_out", "L0N5.W_out"} <= large
    assert "L0.W_O" not in large
    assert set(frame["decided_by"]) == {NAME + "by_size"}
    assert frame["label_reason"][0] == f"Called {frame['label'][0]} by {NAME}by_size."
    for column in ("share_new", "share_amplified", "structured_share", "dominance"):
        assert frame[column].equals(shipped[column])
    assert found.tests.data.equals(plain.tests.data)
    assert found.where(label="large").to_frame()["component"].isin(large).all()


def test_a_frame_may_name_its_rows_give_reasons_and_shares(classified) -> None:
    frame = classified(classifier=with_reasons).labels.to_frame()
    assert set(frame["label_reason"]) == {"because"}
    assert set(frame["share_new"]) == {0.25}
    assert frame["component"].tolist() == classified().labels.to_frame()["component"].tolist()


def test_a_list_of_words_is_enough_and_a_name_finds_the_function(classified) -> None:
    frame = classified(classifier=lambda e: ["mixed"] * len(e)).labels.to_frame()
    assert set(frame["label"]) == {"mixed"}
    assert frame["decided_by"][0].startswith(NAME)
    named = classified(classifier=NAME + "by_size").labels.data
    assert named.equals(classified(classifier=by_size).labels.data)


def test_the_shipped_classifier_passed_in_is_the_shipped_one(classified) -> None:
    from tvlens.geometry import labelled

    assert classified(classifier=labelled).labels.data.equals(classified().labels.data)


def test_the_evidence_holds_what_is_documented_and_is_the_callers_own(classified) -> None:
    from tvlens.geometry.evidence import PARTS

    seen: list[pd.DataFrame] = []

    def spoil(evidence: pd.DataFrame) -> list[str]:
        seen.append(evidence.copy())
        evidence["gain"] = np.nan
        evidence["share_gain"] = 9.0
        return ["mixed"] * len(evidence)

    frame = classified(classifier=spoil, measures=[frobenius_share]).labels.to_frame()
    assert frame["share_amplified"].equals(classified().labels.to_frame()["share_amplified"])
    (evidence,) = seen
    for part in PARTS:
        assert {f"share_{part}", f"p_{part}", f"q_{part}", f"significant_{part}"} <= {*evidence}
    more = {"component", "site", "kind", "layer", "index", "part", "resolved", "readable"}
    more |= {"relative_delta", "g_write", "spikes", "alignment", "alignment_se", "remark"}
    assert more <= {*evidence}
    assert evidence["component"].is_unique
    matrices = evidence["kind"] == "matrix"
    assert evidence.loc[matrices, "frobenius_share"].notna().all()
    assert evidence.loc[~matrices, "frobenius_share"].isna().all()


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (lambda e: None, r"gave NoneType, expected one label a component"),
        (lambda e: "mixed", r"gave str, expected one label"),
        (lambda e: 7, r"gave int, expected one label"),
        (lambda e: ["mixed"], r"gave 1 labels for \d+ components"),
        (lambda e: e["kind"].iloc[::-1], r"or in another order.*column 'component'"),
        (lambda e: e[["component"]], r"frame without a column 'label'"),
        (
            lambda e: e[["component"]].assign(label="x").iloc[3:],
            r"gave 3 components no label: embed\.W_E",
        ),
        (
            lambda e: pd.concat([e, e.iloc[[2]]]).assign(label="x")[["component", "label"]],
            r"more than once",
        ),
        (
            lambda e: pd.concat([e, e.iloc[[2]].assign(component="L9.W_Q")]).assign(label="x")[
                ["component", "label"]
            ],
            r"gave a label to L9\.W_Q, which is no component",
        ),
        (
            lambda e: [*["mixed"] * (len(e) - 1), None],
            r"called \S+ (None|nan); a label is a word \(1 of \d+",
        ),
        (lambda e: e.assign(label=1.0), r"called embed\.W_E 1\.0; a label is a word"),
        (lambda e: e.assign(label=" "), r"a label is a word"),
    ],
)
def test_anything_but_a_label_a_component_is_refused(classified, given, sentence: str) -> None:
    from tvlens.errors import ExtensionError

    with pytest.raises(ExtensionError, match=sentence):
        classified(classifier=given)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("by_size", r"no classifier 'by_size'.*package\.module:function"),
        ("no.such:thing", r"cannot be imported: No module named 'no'"),
        (NAME + "absent", r"cannot be imported: .*absent"),
        (NAME + "NAME", r"expected a classifier, got str"),
    ],
)
def test_a_classifier_that_is_not_there_is_refused(classified, given, sentence: str) -> None:
    from tvlens.errors import ExtensionError

    with pytest.raises(ExtensionError, match=sentence):
        classified(classifier=given)


# --- measures -----------------------------------------------------------------------------------


def test_a_measure_sees_every_component_of_its_kinds_in_its_orientation(classified, pair) -> None:
    from tvlens.geometry import Measure

    shapes: dict[str, tuple[int, ...]] = {}

    def rows(base: torch.Tensor, delta: torch.Tensor) -> float:
        assert base.shape == delta.shape
        shapes[f"{len(shapes)}"] = tuple(base.shape)
        return float(base.shape[0])

    kinds = ("matrix", "head", "kv_head", "neuron", "norm")
    table = classified(measures=[Measure("rows", rows, kinds, "rows")]).measures
    frame = table.to_frame().set_index("component")
    expected = {"L0.W_out": 96, "L0.W_Q": 48, "L0H3.W_Q": 48, "L0H3.W_O": 12, "L0K1.W_V": 48}
    expected |= {"L0N7.W_gate": 48, "L0N7.W_out": 48, "L0.ln1.w": 48}
    for component, value in expected.items():
        assert frame.loc[component, "value"] == value, component
    assert frame["kind"].value_counts().to_dict() == {
        **{"neuron": 288, "head": 8, "matrix": 7, "kv_head": 4, "norm": 2},
    }
    assert (48, 12) in shapes.values()
    assert set(frame["unit"]) == {"rows"}
    assert frame.loc["L0H3.W_O", "kv_index"] == 1


def test_a_measure_has_the_value_that_its_function_gives(classified, pair) -> None:
    table = classified(measures=[NAME + "frobenius_share"]).measures
    frame = table.to_frame().set_index("component")
    assert len(frame) == 7
    for component, weight in pair.weights.items():
        if component.kind == "matrix":
            expected = float(frobenius_share(weight.base, weight.delta))
            assert frame.loc[str(component), "value"] == expected
    assert set(frame["measure"]) == {"frobenius_share"}
    assert classified().measures is None


def test_a_slice_of_a_measure_is_the_slice_of_the_matrix(classified, pair) -> None:
    from tvlens.geometry import Measure

    measure = Measure("first", lambda base, delta: delta.flatten()[0], ("head", "neuron"))
    frame = classified(measures=[measure]).measures.to_frame().set_index("component")
    delta = {str(c): weight.delta for c, weight in pair.weights.items()}
    assert frame.loc["L0H2.W_O", "value"] == float(delta["L0.W_O"][24, 0])
    assert frame.loc["L0H2.W_Q", "value"] == float(delta["L0.W_Q"][0, 24])
    assert frame.loc["L0N9.W_in", "value"] == float(delta["L0.W_in"][0, 9])
    assert frame.loc["L0N9.W_out", "value"] == float(delta["L0.W_out"][9, 0])


def test_a_classifier_uses_a_measure_by_its_name(classified) -> None:
    from tvlens.geometry import Measure

    size = Measure("my_size", lambda base, delta: delta.norm() / base.norm(), ("matrix", "neuron"))

    def mine(evidence: pd.DataFrame) -> list[str]:
        return ["big" if x > 0.01 else "rest" for x in evidence["my_size"]]

    frame = classified(classifier=mine, measures=[size]).labels.to_frame()
    assert "L0.W_out" in set(frame.loc[frame["label"] == "big", "component"])


@pytest.mark.parametrize(
    ("measures", "sentence"),
    [
        ([lambda b, d: None], r"gave NoneType for L0\.W_Q, expected a number"),
        ([lambda b, d: d], r"gave Tensor of shape \(48, 48\) for L0\.W_Q"),
        ([lambda b, d: "much"], r"gave str for L0\.W_Q"),
        ([frobenius_share, frobenius_share], r"two measures are called 'frobenius_share'"),
        (["frobenius_share"], r"no measure 'frobenius_share'"),
        ([NAME + "NAME"], r"expected a measure, got str"),
    ],
)
def test_a_measure_that_gives_no_number_is_refused(classified, measures, sentence: str) -> None:
    from tvlens.errors import ExtensionError

    with pytest.raises(ExtensionError, match=sentence):
        classified(measures=measures)


def test_names_and_kinds_that_cannot_be_are_refused(classified) -> None:
    from tvlens.errors import ExtensionError
    from tvlens.geometry import Measure

    with pytest.raises(ExtensionError, match="asks for kind 'layer'; there are matrix, norm"):
        Measure("a", frobenius_share, ("layer",))
    for name in ("relative_delta", "spikes"):
        with pytest.raises(ExtensionError, match=f"a measure is called '{name}'"):
            classified(measures=[Measure(name, frobenius_share)], classifier=by_size)


# --- names --------------------------------------------------------------------------------------


def test_functions_are_named_so_that_they_can_be_found_again() -> None:
    from tvlens.callables import imported, name_of, spec_of

    assert name_of(by_size) == NAME + "by_size"
    assert spec_of(by_size) == NAME + "by_size"
    assert imported(NAME + "by_size") is by_size
    assert spec_of(lambda e: e) is None
    assert imported("os.path:join") is __import__("os").path.join
    assert name_of(partial(by_size)) == "functools:partial"


def test_a_module_in_the_working_directory_is_found_and_the_path_put_back(
    tmp_path, monkeypatch
) -> None:
    import sys

    from tvlens.callables import imported

    (tmp_path / "my_labels_here.py").write_text("def mine(evidence):\n    return 1\n")
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    try:
        assert imported("my_labels_here:mine")(None) == 1
    finally:
        sys.modules.pop("my_labels_here", None)
    assert sys.path == before
