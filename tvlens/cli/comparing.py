"""The commands that make or show a study: compare, decompose, attribute, graft, demo, report."""

import json as json_format
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .application import app
from .options import (
    ACTIVATIONS,
    CHECKS,
    DIVIDED,
    GEOMETRY,
    MODELS,
    NAMES,
    PROMPTS,
    RUN,
    SEED,
    SHOWN,
    Base,
    Option,
    Out,
    Tuned,
    plan_fields,
    takes,
)
from .progress import Progress, log_to_stderr
from .summaries import study_summary, summary_text

if TYPE_CHECKING:
    from tvlens.study.plan import StudyPlan

PARENT = {"parent": MODELS["parent"]}
KEEP = {
    "keep": Option(Annotated[float, typer.Option(min=0.01, max=1.0, help="Share to restore.")], 0.9)
}


@app.command()
@takes(PROMPTS, ACTIVATIONS, CHECKS, DIVIDED, MODELS, GEOMETRY, NAMES, SEED, RUN)
def compare(base: Base, tuned: Tuned, out: Out, **given: Any) -> None:
    """What was written, what kind it is, and what it does: the whole study."""
    run_stages(("decompose", "attribute"), base, tuned, out, given)


@app.command()
@takes(MODELS, GEOMETRY, NAMES, SEED, RUN)
def decompose(base: Base, tuned: Tuned, out: Out, **given: Any) -> None:
    """The weights side alone: what was written and what kind it is. Loads no model."""
    run_stages(("decompose",), base, tuned, out, given)


@app.command()
@takes(PROMPTS, ACTIVATIONS, CHECKS, DIVIDED, PARENT, NAMES, SEED, RUN)
def attribute(base: Base, tuned: Tuned, out: Out, **given: Any) -> None:
    """The attribution side alone: which parts the behaviour on the prompts depends on."""
    run_stages(("attribute",), base, tuned, out, given)


@app.command()
@takes(PROMPTS, KEEP, NAMES, SEED, RUN)
def graft(base: Base, tuned: Tuned, out: Out, **given: Any) -> None:
    """The smallest sets of components whose tuning vectors carry the behaviour, tried for real."""
    run_stages(("graft",), base, tuned, out, given)


@app.command()
@takes(RUN)
def run(
    plan: Annotated[Path, typer.Argument(help="A study.yaml.")],
    out: Out,
    **given: Any,
) -> None:
    """Run the study that a file describes: one of yours, or that of a finished study."""
    from tvlens.study.plan import StudyPlan

    _show(StudyPlan.load(plan), out, **given)


@app.command()
def report(study: Annotated[Path, typer.Argument(help="A study folder.")]) -> None:
    """Make report.html again from the tables of a study."""
    from tvlens.reporting.report import render_report
    from tvlens.study.store import existing_study

    typer.echo(f"report: {render_report(existing_study(study).folder)}")


@app.command()
@takes({"out": Option(Out, Path("tvlens-demo"))}, SHOWN)
def demo(**given: Any) -> None:
    """Compare the shipped base with its medical fine-tune, with a format control."""
    from tvlens.study.demo import demo_plan

    _show(demo_plan(), given.pop("out"), resume=False, **given)


def run_stages(
    stages: tuple[str, ...], base: str, tuned: list[str], out: Path, given: dict[str, Any]
) -> None:
    """Make the plan that the options ask for, and run it."""
    from tvlens.study.plan import StudyPlan

    shown = {name: given.pop(name) for name in RUN}
    asked = plan_fields(given) | {"base": base, "tuned": tuned, "stages": stages}
    _show(StudyPlan.model_validate(asked), out, **shown)


def _show(
    plan: "StudyPlan", out: Path, *, json: bool, quiet: bool, verbose: bool, **how: bool
) -> None:
    from tvlens.study.runner import run_study

    if verbose:
        log_to_stderr()
    with Progress(shown=not quiet and not json) as progress:
        study = run_study(plan, out, progress=progress, **how)
    summary = study_summary(study)
    typer.echo(json_format.dumps(summary, indent=1) if json else summary_text(summary))
