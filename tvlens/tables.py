"""Tables as values: a pyarrow table with a name, a view for people, and a file.

Each ring declares its own schema beside the code that fills it and passes it to ``Table.of``;
a column that the schema lacks, or a value of another type, is an error rather than a guess.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from .errors import StudyError
from .files import whole_file

KEY_FIELDS: tuple[pa.Field, ...] = (
    pa.field("component", pa.string(), nullable=False),
    pa.field("site", pa.string(), nullable=False),
    pa.field("kind", pa.string(), nullable=False),
    pa.field("layer", pa.int32()),
    pa.field("index", pa.int32()),
    pa.field("kv_index", pa.int32()),
    pa.field("expert", pa.int32()),
    pa.field("rank", pa.int32()),
    pa.field("part", pa.string()),
    pa.field("base", pa.string(), nullable=False),
    pa.field("tuned", pa.string(), nullable=False),
    pa.field("tied", pa.bool_(), nullable=False),
)


def keyed_schema(*fields: tuple[str, pa.DataType]) -> pa.Schema:
    """The key columns followed by nullable ``fields``."""
    return pa.schema([*KEY_FIELDS, *(pa.field(name, kind) for name, kind in fields)])


@dataclass(frozen=True, eq=False)
class Table:
    """A named table with a fixed schema.

    Attributes:
        name: File stem in a study folder, such as ``weights``.
        data: The rows.
        order: Column whose magnitude ``top`` ranks by, empty where none makes sense.
    """

    name: str
    data: pa.Table
    order: str = ""

    @classmethod
    def of(
        cls,
        name: str,
        schema: pa.Schema,
        columns: Mapping[str, Any],
        *,
        order: str = "",
    ) -> "Table":
        """A table of ``columns``, each a list or an array; a field that is absent holds nulls.

        Raises:
            StudyError: A column is not in the schema, or lengths or types disagree.
        """
        if unknown := [column for column in columns if column not in schema.names]:
            raise StudyError(f"table {name!r} has no column {unknown[0]!r}; it has {schema.names}.")
        length = len(next(iter(columns.values()), ()))
        try:
            arrays = [
                pa.array(columns[field.name], type=field.type, from_pandas=True)
                if field.name in columns
                else pa.nulls(length, field.type)
                for field in schema
            ]
            return cls(name, pa.Table.from_arrays(arrays, schema=schema), order)
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise StudyError(f"table {name!r}: {error}") from error

    @classmethod
    def load(cls, path: Path, *, order: str = "") -> "Table":
        """Read a parquet file written by ``save``.

        Raises:
            StudyError: The file is missing or not parquet.
        """
        try:
            return cls(path.stem, pq.read_table(path), order)
        except (OSError, pa.ArrowInvalid) as error:
            raise StudyError(f"cannot read the table {path}: {error}") from error

    def save(self, folder: Path) -> Path:
        """Write ``folder/name.parquet`` whole or not at all; the same rows give the same bytes."""
        path = folder / f"{self.name}.parquet"
        with whole_file(path) as partial:
            pq.write_table(self.data, partial, compression="zstd")
        return path

    def __len__(self) -> int:
        """Number of rows."""
        return self.data.num_rows

    def to_frame(self) -> pd.DataFrame:
        """The rows as a pandas frame."""
        return self.data.to_pandas()

    def where(self, **equal: object) -> "Table":
        """The rows whose columns equal the given values."""
        frame = self.to_frame()
        keep = pd.Series(True, index=frame.index)
        for column, value in equal.items():
            keep &= frame[column].isna() if value is None else frame[column] == value
        return Table(self.name, self.data.filter(pa.array(keep.to_numpy())), self.order)

    def top(self, k: int = 10, by: str = "") -> pd.DataFrame:
        """The ``k`` rows of largest magnitude in ``by`` (default: the table's own order)."""
        column = by or self.order
        frame = self.to_frame()
        if not column:
            return frame.head(k)
        ranked = frame[column].abs().sort_values(ascending=False, kind="stable", na_position="last")
        return frame.loc[ranked.index[:k]].reset_index(drop=True)

    def _repr_html_(self) -> str:
        note = f"<p>{self.name}: {min(10, len(self))} of {len(self)} rows</p>"
        shown = self.top(10).dropna(axis=1, how="all")
        return note + shown.to_html(index=False, float_format="{:.4g}".format)


def concatenated(
    name: str, tables: Sequence[Table], *, order: str = "", as_one: bool = True
) -> Table:
    """The rows of ``tables``, in order, as one table of one chunk a column.

    Thousands of small chunks that live on while tensors come and go would break up the heap, so
    that it never shrinks: 100 MB a layer on a model of 30 layers. Where nothing else follows,
    ``as_one=False`` leaves the chunks of ``tables`` as they are.

    Raises:
        StudyError: There is no table to take the schema from.
    """
    if not tables:
        raise StudyError(f"table {name!r} has no part to be made from.")
    joined = pa.concat_tables([table.data for table in tables])
    return Table(name, joined.combine_chunks() if as_one else joined, order)
