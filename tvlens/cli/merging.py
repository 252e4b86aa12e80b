"""``tvlens apply`` and ``tvlens verify``: tuning vectors taken home, and checked again."""

import json as json_format
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .application import app
from .options import FOUND, JSON, SEED, Base, Option, takes
from .progress import Progress
from .words import is_number, takes_many

if TYPE_CHECKING:
    from tvlens.compose.combining import Merge

NEGATIVE = 3
"""Exit status of a check that ran and did not hold."""
DENSITY = typer.Option(min=0.0, max=1.0, help="Share of entries kept, where a method trims.")
AS_LORA = typer.Option("--as-lora", min=1, help="Write a LoRA adapter of this rank instead.")
MERGE = {
    "scale": Option(
        Annotated[list[float] | None, typer.Option(help="One for all vectors, or one each.")], None
    ),
    "select": Option(Annotated[str, typer.Option(help="Expression, or L3H7,L5N120.")], ""),
    "method": Option(
        Annotated[str, typer.Option(help="task, linear, ties, dare, mergekit:ties, ...")], "task"
    ),
    "density": Option(Annotated[float | None, DENSITY], None),
    "study": FOUND["study"],
    "top": FOUND["top"],
    "weigh": Option(
        Annotated[
            Path | None,
            typer.Option(help="Study folder: weigh components by their attribution scores."),
        ],
        None,
    ),
    "any_base": Option(
        Annotated[bool, typer.Option("--any-base", help="Take vectors of another base too.")], False
    ),
}
"""What is merged and how."""
WRITTEN = {
    "dtype": Option(
        Annotated[
            Literal["stored", "float32", "bfloat16", "float16"],
            typer.Option(help="How weights are stored: as in BASE, or as."),
        ],
        "stored",
    ),
    "as_lora": Option(Annotated[int | None, AS_LORA], None),
    "force": Option(
        Annotated[bool, typer.Option("--force", help="Replace a folder that tvlens wrote.")], False
    ),
    "quiet": Option(Annotated[bool, typer.Option("--quiet", help="Print only the result.")], False),
}
"""How the result is stored."""


@app.command(cls=takes_many("--scale", is_number))
@takes(MERGE, SEED, WRITTEN, JSON)
def apply(
    base: Base,
    vectors: Annotated[
        list[str], typer.Argument(help="Vector files, fine-tunes, adapters, hub ids.")
    ],
    out: Annotated[Path, typer.Option("--out", help="The folder to write.")],
    **given: Any,
) -> None:
    """Add tuning vectors to a base and write a checkpoint or adapter that transformers loads."""
    from tvlens.compose.combining import merge
    from tvlens.study.selecting import Request, check_request, chosen_merge

    shown = {name: given.pop(name) for name in ("json", "quiet")}
    written = {name: given.pop(name) for name in ("dtype", "as_lora", "force")}
    weigh, scales = given.pop("weigh"), given.pop("scale")
    asked = Request(given.pop("select"), top=given.pop("top"), study=given.pop("study"))
    check_request(asked)
    plain = "" if asked.study else asked.select
    found = merge(base, vectors, scales=scales or 1.0, select=plain, **given)
    if weigh is not None:
        found = _weighed(found, weigh)
    if asked.study is not None:
        found = chosen_merge(found, asked)
    for note in found.notes:
        typer.echo(f"warning: {note}", err=True)
    command = shlex.join(["tvlens", *sys.argv[1:]])
    with Progress(shown=not shown["quiet"] and not shown["json"]) as progress:
        saved = found.save(out, command=command, progress=progress, **written)
    typer.echo(json_format.dumps(saved.summary, indent=1) if shown["json"] else saved.sentence)


def _weighed(found: "Merge", study: Path) -> "Merge":
    """The merge weighed by a study's scores, whichever way its metric is good."""
    from tvlens.models.metrics import SHIPPED
    from tvlens.tables import Table

    attribution = Table.load(study / "attribution.parquet")
    metrics = attribution.data["metric"].to_pylist()[:1]
    metric = SHIPPED.get(metrics[0]) if metrics else None
    return found.weighed(attribution, better=metric.better if metric else "higher")


@app.command(cls=takes_many("--vector"))
@takes(JSON)
def verify(
    folder: Annotated[Path, typer.Argument(help="A folder that `tvlens apply` wrote.")],
    base: Annotated[str | None, typer.Option(help="Where the base is now.")] = None,
    vector: Annotated[
        list[str] | None, typer.Option(help="Where the vectors are now, in order.")
    ] = None,
    **given: Any,
) -> None:
    """Check that a merged folder is its base plus the stated combination; exit 3 if not."""
    from tvlens.compose.verifying import verify as check

    verdict = check(folder, base=base, vectors=vector or None)
    if given["json"]:
        typer.echo(json_format.dumps(verdict.summary, indent=1))
    else:
        typer.echo(verdict.sentence, err=not verdict.holds)
    if not verdict.holds:
        raise typer.Exit(NEGATIVE)
