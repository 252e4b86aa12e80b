"""What carries the effect, on the page: bars, a table, the answer's sentence."""

import pytest

from tests.test_attribution_shares import PLANTED, attribution, weights
from tests.test_reporting import parsed
from tvlens.attribution.shares import shares_table
from tvlens.reporting.part_tables import parts_bars, parts_table
from tvlens.reporting.report import render_report


@pytest.fixture(scope="module")
def shares():
    return shares_table(attribution(PLANTED, noise=0.1), weights=weights())


def test_bars_are_as_long_as_effects_and_end_where_the_sum_lies(shares):
    bars = parts_bars(shares.to_frame(), "m1")
    assert bars is not None
    assert [bar.name for bar in bars.bars] == ["attention", "MLP", "W O", "W out", "neuron"]
    mlp = bars.bars[1]
    gain, new = mlp.segments
    assert new.x == pytest.approx(bars.zero, abs=0.2)
    assert gain.x + gain.width == pytest.approx(bars.zero, abs=0.2)
    assert gain.width / new.width == pytest.approx(1 / 3, rel=0.2)
    assert mlp.total == pytest.approx(bars.zero + new.width - gain.width, abs=0.3)
    assert gain.title.startswith("MLP, scale: -")


def test_the_table_has_shares_beside_what_was_written(shares):
    table = parts_table(shares.to_frame())
    assert table is not None
    row = next(row for row in table.rows if row[0] == "attention")
    assert row[table.columns.index("new: of effect")].startswith("0.2")
    assert row[table.columns.index("gains: of what was written")] == "0.6"


def test_nothing_divided_draws_nothing(shares):
    empty = shares.to_frame().iloc[:0]
    assert parts_bars(empty, "m1") is None
    assert parts_table(empty) is None


def test_the_page_shows_them_and_the_answer_quotes_the_contrast(shares, tmp_path):
    for table in (shares, attribution(PLANTED)):
        table.save(tmp_path)
    markup = parsed(render_report(tmp_path))
    page = (tmp_path / "report.html").read_text("utf-8")
    assert "New directions carry more of the MLP's effect than of attention's: supported" in (
        markup.words
    )
    assert '<svg id="m1-parts" class="bars"' in page


def test_a_study_without_parts_says_how_to_make_them(tmp_path):
    attribution(PLANTED).where(geometric_part=None).save(tmp_path)
    (tmp_path / "study.yaml").write_text("base: b\ntuned: [t]\nprompts: p.jsonl\n")
    words = parsed(render_report(tmp_path)).words
    assert "--prompts p.jsonl --parts --out DIR" in words
