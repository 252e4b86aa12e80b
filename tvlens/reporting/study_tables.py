"""What was compared and what was measured on held-out data."""

from collections import Counter
from typing import Any

import pandas as pd

from .datatable import DataTable, words
from .figures import NOTHING, number, with_ends
from .folder import rows_of

MAX_LISTED = 200  # tensors named one by one; the rest are counted


def load_tables(report: dict[str, Any]) -> list[DataTable]:
    """Status counts, then every tensor that was not plainly compared."""
    tensors = [t for t in report.get("tensors") or () if isinstance(t, dict)]
    counts = Counter(str(t.get("status")) for t in tensors)
    rows = tuple((status, f"{count:,}") for status, count in sorted(counts.items()))
    tables = [DataTable("Tensors of the two checkpoints by status.", ("status", "tensors"), rows)]
    odd = [t for t in tensors if t.get("status") != "compared"]
    listed = tuple(
        tuple(words(t.get(key)) for key in ("status", "base", "tuned", "reason"))
        for t in odd[:MAX_LISTED]
    )
    if listed:
        more = f" (the first {MAX_LISTED} of {len(odd):,})" if len(odd) > MAX_LISTED else ""
        caption = f"Tensors that were not simply compared{more}."
        columns = ("status", "base", "tuned", "reason")
        tables.append(DataTable(caption, columns, listed, text_columns=4))
    return tables


def config_table(report: dict[str, Any]) -> DataTable | None:
    """The config entries that differ, and what that means."""
    found = [d for d in report.get("config_differences") or () if isinstance(d, dict)]
    effects = {"function": "changes the function", "refused": "not comparable", "note": "noted"}
    rows = tuple(
        (
            words(difference.get("field")),
            *(words(difference.get(end)) for end in ("base", "tuned")),
            effects.get(str(difference.get("effect")), words(difference.get("effect"))),
        )
        for difference in found
    )
    columns = ("entry", "base", "tuned", "effect")
    return DataTable("Config entries that differ.", columns, rows, text_columns=4) if rows else None


def lineage_table(frame: pd.DataFrame) -> DataTable | None:
    """How each way from the base divides into its two steps, by kind and part."""
    rows = frame[frame["level"] != "component"]
    if rows.empty:
        return None
    lines = tuple(
        (
            f"{row.base} → {row.parent} → {row.tuned}",
            " ".join(words(w) for w in (row.kind, row.part) if isinstance(w, str)) or "everything",
            f"{int(row.tensors):,}",
            *(number(norm) for norm in (row.norm_first, row.norm_second, row.norm_whole)),
            number(row.cosine_steps),
            *(_share(share) for share in (row.share_first, row.share_second)),
        )
        for row in rows_of(rows)
    )
    return DataTable(
        "The two steps of each lineage. Shares are of the whole way's squared length and add up "
        "to 100 %; below zero, a step leads away from where the whole ends. Cosine: between the "
        "steps; clearly below zero, the second undoes part of the first, as after a wrong parent.",
        ("lineage", "of", "tensors", "|first|", "|second|", "|whole|", "cosine", *_SHARES),
        lines,
        text_columns=2,
    )


_SHARES = ("share of first", "share of second")


def _share(share: float) -> str:
    return NOTHING if pd.isna(share) else f"{number(100 * share)} %"


def evaluation_table(frame: pd.DataFrame) -> DataTable | None:
    """Measured values, one column a model."""
    rows = frame.dropna(subset=["value"])
    rows = rows[rows["control"].isna()]  # the doses of a sweep are in its curves
    if rows.empty:
        return None
    models = [str(m) for m in rows["model"].dropna().unique()]
    keys = ["task", "split", "measure", "unit", "n"]
    lines = []
    for _, group in rows.groupby(keys, sort=False, dropna=False):
        first = next(rows_of(group))
        named = (first.task, first.split, first.measure, first.unit)
        texts = (text if isinstance(text, str) else NOTHING for text in named)
        cells = (_measured(group[group["model"] == model]) for model in models)
        lines.append((*texts, number(first.n), *cells))
    return DataTable(
        "Measured on held-out data, with 95 % intervals. A lower loss is better.",
        ("task", "split", "measure", "unit", "n", *models),
        tuple(lines),
        text_columns=4,
    )


def verdicts_table(frame: pd.DataFrame) -> DataTable | None:
    """The paper's claims with what was measured of each, and the verdict."""
    if frame.empty:
        return None
    lines = []
    for row in rows_of(frame):
        verdict = f"{row.verdict}: {row.why}" if isinstance(row.why, str) else str(row.verdict)
        by = ", ".join(text for text in (row.task, row.measure) if isinstance(text, str))
        texts = (row.claim, by or NOTHING, verdict, row.tuned)
        value = (row.value, row.ci_low, row.ci_high)
        control = (row.control_value, row.control_low, row.control_high)
        lines.append(
            (
                *(text if isinstance(text, str) else NOTHING for text in texts),
                with_ends(*value),
                row.control if isinstance(row.control, str) else NOTHING,
                with_ends(*control),
            )
        )
    return DataTable(
        "The paper's claims (arXiv 2510.09359): the gain over the base with its 95 % interval, the "
        "control over which the gain is smallest, and the verdict by the rules of docs/claims.md. "
        "Of the small subspace: its rank as a share of d_model, and over a random vector's.",
        ("claim", "measured by", "verdict", "model", "gain", "control", "gain over it"),
        tuple(lines),
        text_columns=4,
    )


def _measured(rows: pd.DataFrame) -> str:
    cells = [with_ends(row.value, row.ci_low, row.ci_high, 4) for row in rows_of(rows)]
    return "; ".join(cells) or NOTHING
