"""One offline HTML page from a study folder's files alone.

The page asks the network for nothing: its content security policy allows inline styles and
exactly the scripts it was made with, by their hashes. All text from models, prompts and files
passes through Jinja's escaping or ``script_json``, so no ``<`` of theirs reaches the markup. The
same files give the same bytes.
"""

import base64
import hashlib
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from tvlens.files import write_whole

from .absent import absent
from .circuitsvis import bundle
from .combinations import combined_part
from .datatable import described
from .direction_tables import overlap_table
from .folder import StudyFolder
from .sections import ModelPart, model_part
from .study_tables import (
    config_table,
    evaluation_table,
    lineage_table,
    load_tables,
    verdicts_table,
)

PAGE = "report.html"
MAX_BYTES = 8 * 10**6  # a page above this is made again without the figures' tooltips


def render_report(folder: Path) -> Path:
    """Write ``folder/report.html`` from the study's other files and give its path.

    Raises:
        StudyError: The folder is missing or one of its files cannot be read.
    """
    study = StudyFolder.read(Path(folder))
    path = Path(folder) / PAGE
    page = page_of(study).encode("utf-8")
    if len(page) > MAX_BYTES:
        page = page_of(study, tooltips=False).encode("utf-8")
    write_whole(path, page)
    return path


def page_of(study: StudyFolder, *, tooltips: bool = True) -> str:
    """The page as text, with or without the figures' tooltips."""
    names = study.tuned_names
    models = [
        model_part(study, tuned, place + 1, tooltips=tooltips) for place, tuned in enumerate(names)
    ]
    scripts = _scripts(models)
    evaluation = study.table("evaluation")
    return (
        _environment()
        .get_template("page.html.jinja")
        .render(
            title=_title(study, names),
            names=names,
            models=models,
            policy=content_security_policy(scripts),
            scripts=[Markup(script) for script in scripts],
            style=Markup(_read("page.css")),
            load_parts=[
                _load_part(study.title(name), report) for name, report in study.load_reports.items()
            ],
            lineage=lineage_table(study.table("lineage")),
            overlap=overlap_table(study),
            combined=combined_part(study, tooltips=tooltips),
            evaluation=evaluation_table(evaluation),
            verdicts=verdicts_table(study.table("verdicts")),
            absent=absent(study),
            reproduce=_reproduce(study),
            warnings=_warnings(study),
        )
    )


def content_security_policy(scripts: list[str]) -> str:
    """A policy that lets only ``scripts`` run and lets nothing be fetched."""
    digests = (hashlib.sha256(script.encode("utf-8")).digest() for script in scripts)
    hashes = " ".join(f"'sha256-{base64.b64encode(d).decode('ascii')}'" for d in digests)
    return (
        f"default-src 'none'; script-src {hashes or repr('none')}; style-src 'unsafe-inline'; "
        "base-uri 'none'; form-action 'none'"
    )


def _scripts(models: list[ModelPart]) -> list[str]:
    calls = [text.plot.call for model in models for text in model.tokens]
    code = bundle() if calls else ""
    return [code, "\n".join(calls)] if code else []


def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _read(name: str) -> str:
    return (Path(__file__).parent / name).read_text("utf-8")


def _title(study: StudyFolder, names: list[str]) -> str:
    """Base and fine-tunes; of a folder that only measured models these."""
    if study.plan or not set(study.tables) <= {"evaluation"}:
        return f"{_base_name(study)} → {', '.join(names)}"
    return ", ".join(study.table("evaluation")["model"].unique()) or "Nothing yet"


def _base_name(study: StudyFolder) -> str:
    if base := study.plan.get("base"):
        return str(base)
    names = study.table("weights")["base"].dropna().unique()
    return str(names[0]) if len(names) else "base"


def _load_part(name: str, report: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": name,
        "identical": bool(report.get("identical")),
        "same_function": _same_function(report.get("same_function")),
        "vocabulary": str((report.get("vocabulary") or {}).get("sentence", "")),
        "refused": [t for t in report.get("tensors") or () if t.get("status") == "refused"],
        "tables": load_tables(report),
        "config": config_table(report),
        "warnings": described(report.get("warnings")),
    }


def _warnings(study: StudyFolder) -> list[str]:
    """The manifest's warnings less those that stand with the load report."""
    loader = {w for r in study.load_reports.values() for w in described(r.get("warnings"))}
    return [w for w in described(study.manifest.get("warnings")) if w not in loader]


def _same_function(found: object) -> str:
    if not isinstance(found, dict) or found.get("value") is None:
        return ""
    if not found["value"]:
        reason = f": {found['reason']}" if found.get("reason") else ""
        return f"No change of coordinates makes the weights of the two equal{reason}."
    by = ", ".join(str(b) for b in found.get("by") or ())
    return "The two compute the same function" + (f", up to {by}." if by else ".")


def _reproduce(study: StudyFolder) -> dict[str, Any]:
    manifest = study.manifest
    inputs = manifest.get("inputs") if isinstance(manifest.get("inputs"), dict) else {}
    settings = {key: manifest[key] for key in ("seed", "dtype", "device") if key in manifest}
    versions = manifest.get("versions")
    return {
        "command": str(manifest.get("command") or study.plan.get("command") or ""),
        "plan": study.plan_text,
        "versions": described(versions if isinstance(versions, dict) else {}),
        "settings": described(settings),
        "inputs": [(str(name), described(files)) for name, files in (inputs or {}).items()],
        "stages": described(manifest.get("stages")),
    }
