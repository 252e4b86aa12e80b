"""``tvlens inspect``: what a comparison would do, before it does it."""

import json as json_format
from typing import Annotated, Any

import typer

from .application import app
from .combining import GRID
from .measuring import SWEPT
from .options import (
    ACTIVATIONS,
    CHECKS,
    DIVIDED,
    JSON,
    MODELS,
    NAMES,
    PROMPTS,
    Base,
    Option,
    Tuned,
    plan_fields,
    takes,
)
from .words import takes_many

PARENTS = {
    "parents": Option(
        Annotated[list[str] | None, typer.Option(help="Rank these and BASE as its parent.")], None
    ),
    "graft": Option(Annotated[bool, typer.Option("--graft", help="Plan a graft too.")], False),
}
MEASURED = {
    "tasks": Option(
        Annotated[
            str | None,
            typer.Option(help="Plan a sweep on this task file; of several fine-tunes combine too."),
        ],
        None,
    ),
    "texts": Option(
        Annotated[
            str | None, typer.Option(help="Plan a comparison of representations on documents.")
        ],
        None,
    ),
    "scales": SWEPT["scales"],
    "grid": Option(Annotated[str, typer.Option(help="Doses of each combined vector.")], "0,0.5,1"),
    "draws": SWEPT["draws"],
    "places": GRID["places"],
    "control": MODELS["control"],
}
"""What models are measured on, and how many."""


@app.command(cls=takes_many("--parents"))
@takes(PROMPTS, ACTIVATIONS, PARENTS, MEASURED, CHECKS, DIVIDED, NAMES, JSON)
def inspect(base: Base, tuned: Tuned, **given: Any) -> None:
    """What a comparison would do, from headers alone: tensors, rows, bytes, seconds, memory."""
    from tvlens.study.inspection import inspection, parent_ranking

    json, parents, graft = (given.pop(name) for name in ("json", "parents", "graft"))
    names, tasks = given.pop("tuned_name") or [], given["tasks"]
    asked = {"graft": graft, "sweep": tasks, "represent": given["texts"]}
    stages = ["decompose", "attribute", *(name for name, wanted in asked.items() if wanted)]
    inspected: list[dict[str, Any]] = []
    for place, spec in enumerate(tuned):
        how: dict[str, Any] = {"stages": stages, "tuned_names": names[place : place + 1]}
        if tasks and place and place == len(tuned) - 1:
            how = {"stages": [*stages, "combine"], "tuned_names": names, "beside": tuned[:-1]}
        found = inspection(base, spec, **how, **plan_fields(given))
        ranking = parent_ranking(spec, [base, *parents]) if parents else None
        inspected.append(found if ranking is None else {**found, "parents": ranking})
    if json:
        shown = inspected if inspected[1:] else inspected[0]
        typer.echo(json_format.dumps(shown, indent=1))
    else:
        _print_inspections(inspected)


def _print_inspections(inspected: list[dict[str, Any]]) -> None:
    from rich.console import Console

    from tvlens.reporting.inspected import inspection_view, ranking_view

    console = Console(highlight=False, soft_wrap=False)
    for number, found in enumerate(inspected):
        if number:
            console.rule()
        console.print(inspection_view(found))
        if "parents" in found:
            console.print(ranking_view(found["parents"]))
