"""The demo study: the shipped base against its medical fine-tune, with a format control."""

from pathlib import Path

from .plan import StudyPlan
from .runner import Progress, run_study
from .store import Study


def demo_plan() -> StudyPlan:
    """The plan that ``tvlens demo`` runs."""
    return StudyPlan(
        base="demo:base",
        tuned=("demo:med",),
        controls=("demo:ctl",),
        prompts="demo:med",
        metric="logprob",  # how much likelier the right definition became, in nats
        stages=("decompose", "attribute", "evaluate"),
        position=True,
        check_exact=63,  # three of each kind at random and at the top, and as many again
        evaluate={"medical": "demo:med", "maths": "demo:math", "general": "demo:gen"},
    )


def run_demo(folder: Path, *, progress: Progress | None = None) -> Study:
    """Run the demo study into ``folder``, replacing an earlier one."""
    return run_study(demo_plan(), folder, force=True, progress=progress)
