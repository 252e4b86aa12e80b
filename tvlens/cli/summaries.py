"""The result of a study in a few values, and in the lines that a terminal shows."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tvlens.study.store import Study


def study_summary(study: "Study") -> dict[str, object]:
    """The result of a study in a few JSON values."""
    manifest = study.manifest
    return {
        "study": str(study.folder),
        "report": str(study.folder / "report.html"),
        "identical": manifest["identical"],
        "headline": _headlines(study),
        "carried": _carried(study),
        "graft": {
            name: facts["graft"]
            for name, facts in manifest.get("facts", {}).items()
            if "graft" in facts
        },
        "sweep": {
            name: facts["sweep"]
            for name, facts in manifest.get("facts", {}).items()
            if "sweep" in facts
        },
        "represent": {
            name: facts["represent"]
            for name, facts in manifest.get("facts", {}).items()
            if "represent" in facts
        },
        "combine": [
            sentence
            for facts in manifest.get("facts", {}).values()
            for sentence in facts.get("combine", {}).get("sentences", ())
        ],
        "verdicts": _verdicts(study),
        "warnings": manifest["warnings"],
        "tables": {name: len(study.table(name)) for name in study.tables},
        "seconds": manifest["stages"],
    }


def _headlines(study: "Study") -> dict[str, list[dict[str, object]]]:
    """The contrasts to quote, by fine-tune: claim, verdict, sentence and the numbers behind it."""
    if "contrasts" not in study.tables:
        return {}
    rows = study.contrasts.where(headline=True).data.to_pylist()
    listed = ("layers", "by_layer")
    found: dict[str, list[dict[str, object]]] = {}
    for row in rows:
        kept = {name: value for name, value in row.items() if not name.endswith(listed)}
        found.setdefault(row["tuned"], []).append(kept)
    return found


def _carried(study: "Study") -> dict[str, list[str]]:
    """What new directions carry of the effects, a sentence a contrast, by fine-tune."""
    if "shares" not in study.tables:
        return {}
    found: dict[str, list[str]] = {}
    for row in study.shares.where(level="contrast").data.to_pylist():
        found.setdefault(row["tuned"], []).append(row["sentence"])
    return found


def _verdicts(study: "Study") -> list[str]:
    """What combining did to the paper's claim, where the study combines vectors."""
    if not {"combination_gains", "verdicts"} <= set(study.tables):
        return []
    rows = study.table("verdicts").data.to_pylist()
    return [
        f"{row['claim']}, on {row['task']} ({row['measure']}): {row['verdict']}: {row['why']}."
        for row in rows
        if row["claim"].startswith("combining") and row["task"] is not None
    ]


def summary_text(summary: dict[str, object]) -> str:
    """The same for a terminal: warnings first, then what can be quoted, then the report."""
    lines = [f"warning: {text}" for text in summary["warnings"]]  # type: ignore[attr-defined]
    for name, same in summary["identical"].items():  # type: ignore[attr-defined]
        if same:
            lines.append(
                f"{name}: identical to the base, bit for bit; there is nothing to explain."
            )
    for name, quoted in summary["headline"].items():  # type: ignore[attr-defined]
        lines += [f"{name}: {contrast['sentence']}" for contrast in quoted]
    for name, sentences in summary["carried"].items():  # type: ignore[attr-defined]
        lines += [f"{name}: {sentence}" for sentence in sentences]
    for name, graft in summary["graft"].items():  # type: ignore[attr-defined]
        lines += [f"{name}: {found['sentence']}" for found in graft.values()]
    for name, tasks in summary["sweep"].items():  # type: ignore[attr-defined]
        lines += [f"{name}: {found['sentence']}" for found in tasks.values()]
    for name, found in summary["represent"].items():  # type: ignore[attr-defined]
        lines.append(f"{name}: {found['sentence']}")
    lines += summary["combine"]  # type: ignore[operator]
    lines += summary["verdicts"]  # type: ignore[operator]
    return "\n".join([*lines, f"report: {summary['report']}"])
