"""Curves of a sweep as they are drawn, from rows that are known."""

import io
import json

import pandas as pd
import pytest

from tvlens.attribution.grafting import CURVES_SCHEMA
from tvlens.evaluation.losses import EVALUATION_SCHEMA
from tvlens.tables import Table


@pytest.fixture
def study(tmp_path):
    from tvlens.reporting.folder import StudyFolder

    rows = [
        ("tuning", None, 0.0, 3.0, 2.8, 3.2),
        ("tuning", None, 1.0, 2.0, 1.9, 2.1),
        ("random", 0, 1.0, 3.1, 2.9, 3.3),
        ("random", 1, 1.0, 3.2, 3.0, 3.4),
        ("random", 1, 2.0, 3.4, 3.0, 3.6),
    ]
    names = ("ranked_by", "draw", "scale", "value", "ci_low", "ci_high")
    columns = {name: [row[i] for row in rows] for i, name in enumerate(names)}
    same = {"curve": "sweep", "tuned": "med", "metric": "loss", "unit": "nats/token", "n": 7}
    same |= {"share_of_norm": 1.0, "task": "medical", "split": "all"}
    columns |= {name: [value] * len(rows) for name, value in same.items()}
    Table.of("curves", CURVES_SCHEMA, columns).save(tmp_path)
    models = {"model": ["base", "med x 1"], "control": [None, "tuning"], "value": [3.0, 2.0]}
    models |= {"task": ["medical"] * 2, "measure": ["loss"] * 2, "split": ["all"] * 2}
    models |= {"n": [7, 7], "unit": ["nats/token"] * 2}
    Table.of("evaluation", EVALUATION_SCHEMA, models).save(tmp_path)
    facts = {"med": {"sweep": {"medical": {"sentence": "medical: 3 in the base."}}}}
    (tmp_path / "manifest.json").write_text(json.dumps({"facts": facts}))
    return StudyFolder.read(tmp_path)


def test_a_task_is_one_plot_with_a_line_for_each_curve(study):
    from tvlens.reporting.sweeps import sweep_notes, sweep_plots

    (plot,) = sweep_plots(study, "med", "m1")
    groups = {group.label: group for group in plot.groups}
    assert {label: group.total for label, group in groups.items()} == {
        "random vector": 3,
        "tuning vector": 2,
    }
    assert "medical: loss by dose, n = 7." in plot.words.caption
    tuning, random = (groups[label].line for label in ("tuning vector", "random vector"))
    assert tuning.count("M") == 3  # a line and two intervals
    assert tuning.count("V") == 2
    assert random.count("M") == 2  # two draws, no intervals
    assert random.count("L") == 1
    first, second = groups["tuning vector"].points
    assert first.x < second.x
    assert first.y < second.y  # a higher loss is drawn higher up
    low = float(tuning.rpartition("V")[2])
    assert low < second.y
    assert sweep_notes(study, "med") == ["medical: 3 in the base."]


def test_the_doses_of_a_sweep_are_in_its_curves_and_not_in_the_table_of_models(study):
    from tvlens.reporting.study_tables import evaluation_table

    table = evaluation_table(study.table("evaluation"))
    assert table is not None
    assert table.columns[-1] == "base"


def test_claims_stand_in_a_table_with_their_verdicts():
    from tvlens.reporting.figures import NOTHING
    from tvlens.reporting.study_tables import verdicts_table

    frame = pd.DataFrame(
        {
            "claim": ["a", "b"],
            "tuned": ["med", None],
            "task": ["t", None],
            "measure": ["loss", None],
            "value": [0.5, None],
            "ci_low": [0.4, None],
            "ci_high": [0.6, None],
            "control": ["ctl", None],
            "control_value": [0.2, None],
            "control_low": [0.1, None],
            "control_high": [0.3, None],
            "verdict": ["supported", "not tested"],
            "why": ["better", "no task"],
        }
    )
    table = verdicts_table(frame)
    assert table is not None
    known = ("a", "t, loss", "supported: better", "med")
    assert table.rows[0] == (*known, "0.5 [0.4, 0.6]", "ctl", "0.2 [0.1, 0.3]")
    assert table.rows[1][1:3] == (NOTHING, "not tested: no task")
    assert verdicts_table(frame[:0]) is None


def test_models_side_by_side_mark_what_differs():
    from rich.console import Console

    from tvlens.reporting.measured import evaluation_view

    frame = pd.DataFrame(
        {
            "model": ["base", "med"],
            "task": ["t", "t"],
            "measure": ["loss", "loss"],
            "value": [3.0, 2.0],
            "ci_low": [2.9, 1.9],
            "ci_high": [3.1, 2.1],
            "n": [5, 5],
            "primary": [True, True],
            "p_value": [None, 0.01],
        }
    )
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(evaluation_view(frame))
    text = console.export_text()
    assert "2 [1.9, 2.1]*" in text
    assert "3 [2.9, 3.1]*" not in text
    assert "differs from base" in text
