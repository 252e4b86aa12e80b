"""Tables that were planned from headers beside those that a study made."""

from collections.abc import Collection
from typing import Any

from tvlens.study.store import Study

RATES = dict.fromkeys(
    ("hash", "entry", "product", "eigen", "row", "label", "call", "forward"), 1e-9
)
"""Seconds a unit, where nothing is timed."""


def planned(study: Study, *, last: int = -1) -> dict[str, Any]:
    """The plan of a study as ``tvlens inspect`` gives it, of one of its fine-tunes.

    Args:
        study: A finished study.
        last: Place of the fine-tune, of those that are combined the last.
    """
    from tvlens.study.inspection import inspection

    plan = study.plan
    options = plan.model_dump(exclude={"base", "tuned", "tuned_names", "check_nodes"})
    beside = plan.tuned[:-1] if "combine" in plan.stages else ()
    return inspection(plan.base, plan.tuned[last], beside=beside, rates=RATES, **options)


def assert_rows(study: Study, stage: str, *, bounded: Collection[str] = ()) -> dict[str, Any]:
    """Every table of ``stage`` has the rows that were planned; gives what was planned."""
    found = planned(study)["stages"][stage]
    for name, rows in found["tables"].items():
        made = len(study.table(name))
        if name in bounded:
            assert rows["at_least"] <= made <= rows["at_most"], name
        else:
            assert rows["rows"] == made, name
    return found
