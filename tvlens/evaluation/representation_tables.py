"""The table of representations: one row a component, model, set of tokens and measure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa

from tvlens.components import key_columns
from tvlens.tables import Table, concatenated, keyed_schema

from .representations import Compared
from .similarity import UNITS

SPECTRUM = 32
"""Leading eigenvalue shares that the table keeps."""

REPRESENTATIONS_SCHEMA = keyed_schema(
    ("model", pa.string()),
    ("control", pa.string()),
    ("draw", pa.int32()),
    ("tokens", pa.string()),
    ("measure", pa.string()),
    ("value", pa.float64()),
    ("unit", pa.string()),
    ("ci_low", pa.float64()),
    ("ci_high", pa.float64()),
    ("chance", pa.float64()),
    ("k", pa.int32()),
    ("width", pa.int32()),
    ("n_tokens", pa.int64()),
    ("n_documents", pa.int32()),
    ("spectrum", pa.list_(pa.float64())),
    ("status", pa.string()),
)
"""One row a component, model, set of tokens and measure.

    model      what was compared with ``base``; ``tuned`` is the fine-tune that it stands beside
    control    null for the fine-tune itself, ``random`` (with ``draw``), or a control fine-tune
    tokens     ``without_first``: all but the first of each document; or ``all``
    chance, k  of ``overlap``: that of random subspaces, and how many directions
    spectrum   on rows of ``effective_rank``: the leading eigenvalue shares
    status     ``ok``; ``few_tokens``: ranks are not to be believed; ``rounding``, ``unchanged``
"""


@dataclass(frozen=True)
class Named:
    """What the rows of one comparison have in common.

    Attributes:
        base: What tables call the base.
        tuned: The fine-tune.
        model: What was compared with the base.
        control: What it is, None for the fine-tune itself.
        draw: Number of a random vector.
        heads_per_kv: Query heads that share a kv head.
    """

    base: str
    tuned: str
    model: str
    control: str | None = None
    draw: int | None = None
    heads_per_kv: int = 1


def representations_table(found: Sequence[Compared], named: Named) -> Table:
    """The rows of one comparison.

    Raises:
        StudyError: ``found`` is empty.
    """
    tables = [_rows(one, named) for one in found]
    return concatenated("representations", tables)


def _rows(one: Compared, named: Named) -> Table:
    components, count = one.components, len(one.cosines)
    found, measures = one.similarity, list(UNITS)
    values: Mapping[str, Sequence[float]] = {
        "cosine": [each.value for each in one.cosines],
        **{name: tensor.tolist() for name, tensor in found.values.items()},
    }
    kv_index = [
        None if c.index is None else c.index // named.heads_per_kv for c in components
    ]  # fmt: skip
    keys = key_columns(components, kv_index=kv_index)
    times = len(measures)
    same = {
        **{name: getattr(named, name) for name in ("base", "tuned", "model", "control", "draw")},
        **{"tied": False, "tokens": one.tokens, "width": one.width},
        **{"n_tokens": one.count, "n_documents": one.documents},
    }
    columns: dict[str, Sequence[object]] = {
        **{name: list(column) * times for name, column in keys.items()},
        **{name: [value] * (count * times) for name, value in same.items()},
        "measure": [name for name in measures for _ in range(count)],
        "unit": [UNITS[name] for name in measures for _ in range(count)],
        "value": [value for name in measures for value in values[name]],
        "status": list(found.status) * times,
    }
    for name in ("low", "high"):
        ends = [getattr(each, name) for each in one.cosines]
        columns[f"ci_{name}"] = _only("cosine", ends, measures)
    k = found.k.tolist()
    columns["k"] = _only("overlap", k, measures)
    columns["chance"] = _only("overlap", [each / one.width for each in k], measures)
    leading: list[object] = found.shares[:, :SPECTRUM].tolist()
    columns["spectrum"] = _only("effective_rank", leading, measures)
    return Table.of("representations", REPRESENTATIONS_SCHEMA, columns)


def _only(
    measure: str, values: Sequence[object], measures: Sequence[str]
) -> list[object]:  # fmt: skip
    """``values`` on the rows of one measure, nothing on the others."""
    nothing: list[object] = [None] * len(values)
    return [value for name in measures for value in (values if name == measure else nothing)]
