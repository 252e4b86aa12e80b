"""What models do on tasks and inside: evaluate, sweep and represent."""

import inspect
import json as json_format
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .application import app
from .comparing import PARENT, run_stages
from .options import (
    FOUND,
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
    takes,
)
from .progress import Progress, log_to_stderr

TASKS = {
    "tasks": Option(
        Annotated[str, typer.Option("--tasks", help="Task file (YAML), or demo:med.")],
        inspect.Parameter.empty,
    ),
}
TEXTS = {
    "texts": Option(
        Annotated[str, typer.Option("--texts", help="Documents (.txt, .jsonl), or demo:NAME.")],
        inspect.Parameter.empty,
    ),
}
CONTROL = {"control": MODELS["control"]}
MODEL_RUN = {"chat": PROMPTS["chat"], "device": PROMPTS["device"]}
SWEPT = {
    "scales": Option(
        Annotated[str, typer.Option(help="Doses: first:last:step, or numbers with commas.")],
        "-0.5:1.5:0.25",
    ),
    "select": Option(
        Annotated[str, typer.Option(help="The part: an expression over the key, or L3H7,L5N120.")],
        "",
    ),
    **FOUND,
    "rest": Option(
        Annotated[Literal["base", "tuned"], typer.Option(help="Whether the rest is out or in.")],
        "base",
    ),
    "draws": Option(
        Annotated[int, typer.Option(min=0, help="Random vectors beside the tuning vector.")], 3
    ),
}
DRAWS = {"draws": SWEPT["draws"]}
SKIP = {"skip_bad_lines": PROMPTS["skip_bad_lines"]}
NAME = {
    "name": Option(
        Annotated[list[str] | None, typer.Option("--name", help="A name per model.")], None
    ),
}
Models = Annotated[list[str], typer.Argument(help="Folders, adapters of the first, hub ids.")]


@app.command()
@takes(TASKS, SWEPT, CONTROL, MODEL_RUN, NAMES, SEED, RUN)
def sweep(base: Base, tuned: Tuned, out: Out, **given: Any) -> None:
    """Let the tuning vector in by many doses, whole or in part, and measure tasks at each."""
    given["kept_parts"] = given.pop("parts")
    run_stages(("sweep",), base, tuned, out, given)


@app.command()
@takes(TEXTS, DRAWS, CONTROL, PARENT, SKIP, MODEL_RUN, NAMES, SEED, RUN)
def represent(base: Base, tuned: Tuned, out: Out, **given: Any) -> None:
    """Compare activations of base and fine-tune on documents: likeness, and in which directions."""
    run_stages(("represent",), base, tuned, out, given)


@app.command()
@takes(TASKS, MODEL_RUN, NAME, SEED, SHOWN)
def evaluate(models: Models, out: Out, **given: Any) -> None:
    """Measure models on tasks, each compared with the first item by item."""
    from tvlens.reporting.measured import evaluation_view
    from tvlens.study.evaluating import evaluate as evaluate_models
    from tvlens.study.prompted import device_of

    json, quiet, verbose = (given.pop(name) for name in ("json", "quiet", "verbose"))
    if verbose:
        log_to_stderr()
    given["device"], names = device_of(given["device"]), given.pop("name") or ()
    with Progress(shown=not quiet and not json) as progress:
        table = evaluate_models(
            models,
            given.pop("tasks"),
            out,
            names=names,
            progress=progress,
            **given,
        )
    if json:
        typer.echo(json_format.dumps(_rows(table), indent=1))
        return
    from rich.console import Console

    Console(highlight=False, soft_wrap=False).print(evaluation_view(table.to_frame()))
    typer.echo(f"tables: {Path(out)}")


def _rows(table: Any) -> list[dict[str, Any]]:
    """The rows as JSON takes them: what is no number is null."""
    return [
        {key: None if value != value else value for key, value in row.items()}
        for row in table.data.to_pylist()
    ]
