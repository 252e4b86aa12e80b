"""Combined vectors as the page draws them, from rows that are known."""

import json

import pytest

from tvlens.study.combination_tables import COMBINATIONS_SCHEMA
from tvlens.study.disturbances import DISTURBANCE_SCHEMA, RANKS_SCHEMA
from tvlens.tables import Table


def grid_rows(count):
    """Loss 3 - first dose + 2 x second, and 0.5 of interaction where both are 1."""
    names = ("med", "math", "code")[:count]
    doses = [(a, b, *[0.0] * (count - 2)) for a in (0.0, 1.0) for b in (0.0, 0.5, 1.0)]
    rows = []
    for scales in doses:
        both = scales[0] == scales[1] == 1.0
        change = -scales[0] + 2 * scales[1] + 0.5 * both
        row = {"model": f"{scales[0]:g} + {scales[1]:g}", "vectors": list(names)}
        row |= {"scales": list(scales), "task": "medical", "measure": "loss", "primary": True}
        row |= {"unit": "nats/token", "better": "lower", "value": 3 + change, "ci_low": 2.0}
        row |= {"ci_high": 4.0, "difference": change, "interaction": 0.5 if both else None}
        rows += [{**row, "split": split} for split in ("all", "judge")]
    rows.append({**rows[-1], "model": "random", "by": "random", "split": "all", "value": 9.0})
    return [*rows, {**rows[0], "measure": "perplexity", "primary": False, "value": 20.0}]


def folder(tmp_path, count=2):
    from tvlens.reporting.folder import StudyFolder

    def saved(name, schema, rows):
        columns = {c: [row.get(c) for row in rows] for c in schema.names}
        Table.of(name, schema, columns).save(tmp_path)

    saved("combinations", COMBINATIONS_SCHEMA, grid_rows(count))
    fall = {"level": "whole", "tuned": "med", "added": "math", "task": "medical", "fall": 2.5}
    falls = [fall, {**fall, "by": "random", "fall": 0.7}, {**fall, "level": "part", "fall": 0.1}]
    saved("disturbance", DISTURBANCE_SCHEMA, falls)
    rank = {"tuned": "med", "added": "math", "task": "medical", "predictor": "sti", "n": 56}
    rank |= {"spearman": 0.4, "ci_low": 0.1, "ci_high": 0.6, "verdict": "ranks alike"}
    saved("interference_ranks", RANKS_SCHEMA, [rank])
    facts = {"math": {"combine": {"sentences": ["medical: 3 in the base."]}}, "med": {}}
    (tmp_path / "manifest.json").write_text(json.dumps({"facts": facts}))
    return StudyFolder.read(tmp_path)


def test_two_vectors_are_drawn_as_a_grid_of_differences(tmp_path):
    from tvlens.reporting.combinations import combined_part

    part = combined_part(folder(tmp_path))
    assert part is not None
    assert part.notes == ["medical: 3 in the base."]
    (drawn,) = part.maps
    assert [tick.text for tick in drawn.row_ticks] == ["0", "1"]
    assert [tick.text for tick in drawn.column_ticks] == ["0", "0.5", "1"]
    assert [cell.text for cell in drawn.cells] == ["0", "1", "2", "-1", "0", "1.5"]
    assert "down: dose of med, across: dose of math" in drawn.title
    assert "lower is better" in drawn.title
    assert "1 med + 0.5 math: 0" in drawn.cells[4].title


def test_the_tables_hold_points_falls_and_ranks(tmp_path):
    from tvlens.reporting.combinations import combined_part

    part = combined_part(folder(tmp_path))
    assert part is not None
    points, falls, ranks = part.tables
    assert points.columns == ("model", "medical (loss)")
    assert len(points.rows) == 6  # no stand-in, no other split
    assert points.rows[-1] == ("1 + 1", "4.5 [2, 4]; 0.5")
    assert [row[4] for row in falls.rows] == ["2.5"]
    assert ranks.rows[0][2:5] == ("STI", "56", "0.4 [0.1, 0.6]")


@pytest.mark.parametrize("count", [3])
def test_of_three_vectors_there_is_a_table_and_no_map(tmp_path, count):
    from tvlens.reporting.combinations import combined_part

    part = combined_part(folder(tmp_path, count))
    assert part is not None
    assert part.maps == []
    assert len(part.tables) == 3


def test_a_study_without_combinations_has_no_such_section(tmp_path):
    from tvlens.reporting.combinations import combined_part
    from tvlens.reporting.folder import StudyFolder
    from tvlens.reporting.report import page_of

    (tmp_path / "manifest.json").write_text("{}")
    study = StudyFolder.read(tmp_path)
    assert combined_part(study) is None
    assert 'id="combined"' not in page_of(study)


@pytest.mark.slow
def test_the_page_holds_the_section(tmp_path):
    from tvlens.reporting.report import page_of

    page = page_of(folder(tmp_path))
    assert 'id="combined"' in page
    assert 'id="combined-0"' in page
    assert "Measured interference" in page
