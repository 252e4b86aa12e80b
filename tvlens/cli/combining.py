"""``tvlens combine``: several tuning vectors on one base, over a grid of doses."""

from typing import Annotated, Any, Literal

import typer

from .application import app
from .comparing import run_stages
from .measuring import CONTROL, MODEL_RUN, SWEPT, TASKS
from .merging import MERGE
from .options import NAMES, RUN, SEED, Base, Option, Out, Tuned, takes

GRID = {
    "scales": Option(
        Annotated[str, typer.Option(help="Doses of each vector: first:last:step, or with commas.")],
        "0,0.5,1",
    ),
    "method": MERGE["method"],
    "density": MERGE["density"],
    "select": SWEPT["select"],
    "draws": SWEPT["draws"],
    "places": Option(
        Annotated[
            Literal["matrix", "layer", "none"],
            typer.Option(help="What of one vector is added to another by itself."),
        ],
        "matrix",
    ),
}
"""The grid, what stands in for a vector, and how one vector's parts are added to another."""


@app.command()
@takes(TASKS, GRID, CONTROL, MODEL_RUN, NAMES, SEED, RUN)
def combine(base: Base, tuned: Tuned, out: Out, **given: Any) -> None:
    """Add tuning vectors over a grid of doses and measure tasks: does each disturb the other?"""
    given["grid"] = given.pop("scales")
    run_stages(("combine",), base, tuned, out, given)
