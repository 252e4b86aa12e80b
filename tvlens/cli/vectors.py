"""``tvlens vector``: tuning vectors as files."""

import json as json_format
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from tvlens.errors import StudyError

from .application import app
from .options import FOUND, Base, takes


@app.command()
@takes(FOUND)
def vector(
    base: Base,
    tuned: Annotated[str, typer.Argument(help="A fine-tune: folder, adapter, hub id.")],
    out: Annotated[Path, typer.Option("--out", help="The safetensors file to write.")],
    select: Annotated[str, typer.Option(help="Expression over the key, or L3H7,L5N120.")] = "",
    canonical: Annotated[
        bool, typer.Option("--canonical", help="Read the fine-tune in the base's coordinates.")
    ] = False,
    scale: Annotated[float, typer.Option(help="Multiply the vector by this number.")] = 1.0,
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Stored.")] = "float32",
    json: Annotated[bool, typer.Option("--json", help="Print a JSON summary.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    **found: Any,
) -> None:
    """Save a tuning vector with its provenance, read one component at a time."""
    from tvlens.study.selecting import Request, check_request, cut_of
    from tvlens.weights.gauge import canonical as in_base_coordinates
    from tvlens.weights.gauge import removed
    from tvlens.weights.matching import load_pair
    from tvlens.weights.vector_file import save_pair_vector

    if out.exists() and not force:
        raise StudyError(f"{out} is there already.", hint="Give --force to replace it.")
    asked = Request(select, **found)
    check_request(asked)
    pair = load_pair(base, tuned, scan=False)
    warnings = [*pair.load_report.warnings]
    if canonical:
        pair = in_base_coordinates(pair)
        warnings.append(removed(pair).sentence)
    cut = cut_of(asked, pair, canonical=canonical)
    for warning in (*warnings, *cut.notes):
        typer.echo(f"warning: {warning}", err=True)
    given = {"scale": scale, "dtype": dtype, "command": shlex.join(["tvlens", *sys.argv[1:]])}
    taken = cut.of if any(found.values()) else select
    saved = save_pair_vector(pair, out, select=taken, name=asked.text, **given)
    summary = saved.summary
    typer.echo(json_format.dumps(summary, indent=1) if json else saved.sentence)
