"""The control fine-tunes of a study, seen from a base."""

from collections.abc import Collection

from tvlens.weights.matching import Pair, load_pair

from .plan import StudyPlan, name_of


def controls_from(plan: StudyPlan, pair: Pair, *, but: Collection[str] = ()) -> list[Pair]:
    """The controls of ``plan`` minus the base of ``pair``, without those named in ``but``."""
    start = pair.base.name if pair.base.name.startswith("demo:") else str(pair.base.folder)
    wanted = [spec for spec in plan.controls if name_of(spec) not in but]
    return [load_pair(start, spec, names=(pair.base_name, name_of(spec))) for spec in wanted]
