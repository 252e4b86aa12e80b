"""What an exactly patched component does alone, from base and from tuned."""

from collections.abc import Sequence

import pyarrow as pa

from tvlens.components import key_columns
from tvlens.errors import StudyError
from tvlens.tables import Table, keyed_schema

from .series import of_method, scores_by_series
from .weights import NOISE

SHARE = 0.5
"""An effect alone counts if it is at least this share of the component's integrated score."""
FINDINGS_SCHEMA = keyed_schema(
    ("metric", pa.string()),
    ("unit", pa.string()),
    ("insert", pa.float64()),
    ("remove", pa.float64()),
    ("ig", pa.float64()),
    ("finding", pa.string()),
    ("role", pa.string()),
)


def findings_table(attribution: Table) -> Table:
    """What each exactly patched component does alone, beside its integrated score.

    ``attribution`` holds ``weight_ig`` and the exact insert and remove rows; means are over the
    prompts of the exact sample. An effect counts if it has the sign and at least half the size of
    the integrated score: ``insert`` alone makes the component *sufficient*, ``remove`` alone
    *necessary*, both *both*; neither, with a score that is not noise, *redundant*: it works only
    together with others. *none* where nothing is above the noise. ``role`` is filled where
    activations are known too.

    Raises:
        StudyError: One of the three methods has no rows.
    """
    scores = scores_by_series(attribution)
    wanted = ("exact_weight_insert", "exact_weight_remove", "weight_ig")
    found = [of_method(scores, method) for method in wanted]
    if missing := [m for m, frame in zip(wanted, found, strict=True) if frame is None]:
        raise StudyError(f"findings need rows of {', '.join(missing)}.")
    known = [frame for frame in found if frame is not None]
    prompts = known[0].columns
    insert, remove, ig = (frame.reindex(columns=prompts).mean(axis=1) for frame in known)
    components = [c for c in insert.index if c in ig.index]
    triples = [(float(insert[c]), float(remove[c]), float(ig[c])) for c in components]
    columns: dict[str, Sequence[object]] = {
        **key_columns(components),
        **_constant_columns(attribution, len(components)),
        "insert": [t[0] for t in triples],
        "remove": [t[1] for t in triples],
        "ig": [t[2] for t in triples],
        "finding": [finding(*t) for t in triples],
    }
    return Table.of("findings", FINDINGS_SCHEMA, columns, order="ig")


def finding(insert: float, remove: float, ig: float) -> str:
    """``sufficient``, ``necessary``, ``both``, ``redundant`` or ``none``."""
    if max(abs(insert), abs(remove), abs(ig)) <= NOISE:
        return "none"
    alone, missing = (x * ig > 0 and abs(x) >= SHARE * abs(ig) for x in (insert, remove))
    names = {(True, True): "both", (True, False): "sufficient", (False, True): "necessary"}
    return names.get((alone, missing), "redundant")


def _constant_columns(scores: Table, count: int) -> dict[str, list[object]]:
    first = scores.data.slice(0, 1).to_pylist()
    names = ("base", "tuned", "metric", "unit")
    row = first[0] if first else dict.fromkeys(names, "")
    return {**{name: [row[name]] * count for name in names}, "tied": [False] * count}
