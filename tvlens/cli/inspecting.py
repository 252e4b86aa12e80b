"""``tvlens inspect``: what a comparison would do, before it does it."""

import json as json_format
from typing import Annotated, Any

import typer

from .application import app
from .options import (
    ACTIVATIONS,
    CHECKS,
    DIVIDED,
    JSON,
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


@app.command(cls=takes_many("--parents"))
@takes(PROMPTS, ACTIVATIONS, PARENTS, CHECKS, DIVIDED, JSON)
def inspect(base: Base, tuned: Tuned, **given: Any) -> None:
    """What a comparison would do, from headers alone: tensors, rows, bytes, seconds, memory."""
    from tvlens.study.inspection import inspection, parent_ranking

    json, parents, graft = (given.pop(name) for name in ("json", "parents", "graft"))
    stages = ("decompose", "attribute", *(("graft",) if graft else ()))
    inspected: list[dict[str, Any]] = []
    for spec in tuned:
        found = inspection(base, spec, stages=stages, **plan_fields(given))
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
