"""Tables: schema, top, where, file."""

from pathlib import Path

import pyarrow as pa
import pytest

from tvlens.errors import StudyError
from tvlens.tables import Table, concatenated

SCHEMA = pa.schema([("name", pa.string()), ("score", pa.float64()), ("layer", pa.int32())])


def _table() -> Table:
    columns = {"name": ["a", "b", "c"], "score": [0.1, -3.0, None], "layer": [0, None, 2]}
    return Table.of("scores", SCHEMA, columns, order="score")


def test_top_ranks_by_magnitude_and_keeps_signs() -> None:
    assert _table().top(2)["name"].tolist() == ["b", "a"]
    assert _table().top(1)["score"].tolist() == [-3.0]


def test_where_matches_values_and_nulls() -> None:
    assert _table().where(layer=None).to_frame()["name"].tolist() == ["b"]
    assert len(_table().where(name="a", layer=0)) == 1


def test_a_saved_table_is_read_back_and_two_writes_give_the_same_bytes(tmp_path: Path) -> None:
    first = _table().save(tmp_path).read_bytes()
    assert Table.load(tmp_path / "scores.parquet").data.equals(_table().data)
    assert _table().save(tmp_path).read_bytes() == first
    assert not list(tmp_path.glob("*.partial"))


def test_an_absent_column_is_null_and_an_unknown_one_is_refused() -> None:
    assert Table.of("t", SCHEMA, {"name": ["a"]}).to_frame()["score"].isna().all()
    with pytest.raises(StudyError, match="no column 'nmae'"):
        Table.of("t", SCHEMA, {"nmae": ["a"]})


def test_a_value_of_another_type_is_refused() -> None:
    with pytest.raises(StudyError, match="table 't'"):
        Table.of("t", SCHEMA, {"layer": ["three"]})


def test_a_truncated_file_gives_a_sentence(tmp_path: Path) -> None:
    path = _table().save(tmp_path)
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(StudyError, match="cannot read the table"):
        Table.load(path)


def test_tables_concatenate_in_order() -> None:
    both = concatenated("scores", [_table(), _table()])
    assert both.to_frame()["name"].tolist() == ["a", "b", "c"] * 2
    with pytest.raises(StudyError, match="no part"):
        concatenated("scores", [])
