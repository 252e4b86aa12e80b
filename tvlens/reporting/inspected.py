"""What ``tvlens inspect`` found, for people: lines that fit a terminal of 80 columns."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

UNITS = ((86_400, "days", 2), (3_600, "h", 2), (60, "min", 2))
"""Seconds in a unit, its name, and from how many of it on the unit is used."""
NAMED_AT_MOST = 8
"""Tensors and config entries that are listed; ``--json`` has all."""


def inspection_view(found: Mapping[str, Any]) -> RenderableType:
    """One inspection (see ``study.inspection``) as something rich can print."""
    heading = Text(f"{found['base']} -> {found['tuned']}", style="bold")
    warned = [Text(f"warning: {sentence}", style="yellow") for sentence in _warnings(found)]
    refused = [Text(sentence, style="yellow") for sentence in _refusals(found)]
    return Group(
        heading,
        _facts(found),
        *warned,
        Text(),
        _stages(found),
        *refused,
        Text(),
        _tables(found),
        Text(),
        Text(
            "Times are counts of operations at rates measured just now, of a core that nothing "
            "else uses. The far end adds a slow disk and, for attribution, integrals that need "
            "more nodes.",
            style="dim",
        ),
    )


def _warnings(found: Mapping[str, Any]) -> list[str]:
    asked = [found[name] or {} for name in ("prompts", "tasks")]
    return [*found["warnings"], *(text for one in asked for text in one.get("warnings", ()))]


def _refusals(found: Mapping[str, Any]) -> Iterator[str]:
    reasons: dict[str, list[str]] = {}
    for name, stage in found["stages"].items():
        if "cannot_run" in stage:
            reasons.setdefault(stage["cannot_run"], []).append(name)
    for sentence, names in reasons.items():
        yield f"{' and '.join(names)} cannot run: {sentence}"


def _facts(found: Mapping[str, Any]) -> RenderableType:
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _fact_rows(found):
        table.add_row(name, value)
    return table


def _fact_rows(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    size = found["bytes"]
    yield "model", f"{found['family']}, {found['parameters']:,} parameters"
    yield "shape", ", ".join(f"{name}={count:,}" for name, count in found["shape"].items())
    yield "files", f"{amount(size['base'])} base, {amount(size['tuned'])} tuned"
    statuses = found["tensors"].items()
    yield "tensors", ", ".join(f"{n:,} {status.replace('_', ' ')}" for status, n in statuses)
    yield "not compared", _listed(found["not_compared"], "every tensor is compared")
    yield "vocabulary", found["vocabulary"]
    yield "config", _listed(found["config_differences"], "no difference that matters")
    if found["prompts"] is not None:
        yield "prompts", _prompts(found["prompts"])
    if (tasks := found["tasks"]) is not None:
        yield "tasks", f"{tasks['tasks']:,}: {tasks['items']:,} items, {tasks['tokens']:,} tokens"
    if (texts := found["texts"]) is not None:
        yield "texts", f"{texts['name']}: {texts['documents']:,}, {texts['tokens']:,} tokens"


def _listed(sentences: list[str], none: str) -> str:
    shown = sentences[:NAMED_AT_MOST]
    more = len(sentences) - len(shown)
    return (
        "\n".join([*shown, *([f"and {more:,} more (--json lists them)"] if more else [])]) or none
    )


def _prompts(prompts: Mapping[str, Any]) -> str:
    count = f"{prompts['name']}: {prompts['prompts']:,} prompts"
    if "problem" in prompts:
        return count
    chat = ", chat template" if prompts["chat"] else ""
    corrupt = f", {prompts['corrupt']:,} with a corrupt one" if prompts["corrupt"] else ""
    return (
        f"{count}, {prompts['tokens']:,} tokens (longest {prompts['longest']:,}){corrupt}{chat}; "
        f"metric {prompts['metric']} in {prompts['unit']}"
    )


def _stages(found: Mapping[str, Any]) -> RenderableType:
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column("stage", no_wrap=True)
    for heading in ("reads", "time", "between", "memory"):
        table.add_column(heading, justify="right", no_wrap=True)
    running = {name: stage for name, stage in found["stages"].items() if "seconds" in stage}
    for name, stage in running.items():
        memory = amount(stage["peak_memory_bytes"])
        table.add_row(name, amount(stage["bytes_read"]), *_times(stage["seconds"]), memory)
    peak = max(stage["peak_memory_bytes"] for stage in running.values())
    read = sum(stage["bytes_read"] for stage in running.values())
    table.add_row("all", amount(read), *_times(found["seconds"]), amount(peak), style="bold")
    return table


def _times(seconds: Mapping[str, float]) -> tuple[str, str]:
    low, high = duration(seconds["low"]), duration(seconds["high"])
    return duration(seconds["expected"]), f"{low} to {high}"


def _tables(found: Mapping[str, Any]) -> RenderableType:
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column("table", no_wrap=True)
    table.add_column("rows", justify="right", no_wrap=True)
    table.add_column("of which", overflow="fold")
    for stage in found["stages"].values():
        for name, rows in stage.get("tables", {}).items():
            parts = ", ".join(f"{part}={n:,}" for part, n in rows.get("by", {}).items())
            table.add_row(name, _bounds(rows), parts)
        if positions := stage.get("positions"):
            held = f"{positions['tensors']:,} tensors of scores by position"
            table.add_row("positions/", amount(positions["bytes"]), held)
    return table


def _bounds(rows: Mapping[str, Any]) -> str:
    if "rows" in rows:
        return f"{rows['rows']:,}"
    if not rows["at_least"]:
        return f"at most {rows['at_most']:,}"
    return f"{rows['at_least']:,} to {rows['at_most']:,}"


def ranking_view(ranking: Mapping[str, Any]) -> RenderableType:
    """The candidates for a parent, the nearest first, and the sentence that sums them up."""
    columns = {
        "relative_delta": "|delta|/|base|",
        "cosine": "cosine",
        "equal_fraction": "equal",
        "norm_ratio": "|tuned|/|base|",
        "rows": "rows",
    }
    table = Table(box=None, pad_edge=False)
    table.add_column("candidate", overflow="fold")
    for heading in ("verdict", *columns.values()):
        table.add_column(heading, no_wrap=True)
    for row in ranking["candidates"]:
        figures = [f"{row[name]:.4g}" if name in row else "" for name in columns]
        table.add_row(row["candidate"], row["verdict"], *figures)
    reasons = [f"{r['candidate']}: {r['reason']}" for r in ranking["candidates"] if "reason" in r]
    lines = [Text(line) for line in (*reasons, ranking["sentence"])]
    return Padding(Group(table, *lines), (1, 0, 0, 0))


def amount(count: float | int) -> str:
    """Bytes in decimal units: ``404 MB``, ``141 GB``."""
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if count >= size:
            return f"{_short(count / size)} {unit}"
    return f"{_short(count / 1e3)} kB"


def duration(seconds: float | int) -> str:
    """A time in the unit that people would use: ``0.3 s``, ``40 s``, ``12 min``, ``5 h``."""
    for size, unit, least in UNITS:
        if seconds >= least * size:
            return f"{_short(seconds / size)} {unit}"
    return f"{_short(seconds)} s"


def _short(number: float | int) -> str:
    """Two figures, whole above ten."""
    return f"{number:,.0f}" if number >= 10 else f"{number:.1f}"
