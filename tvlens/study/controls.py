"""What a study puts in a tuning vector's place: control fine-tunes and seeds of random vectors."""

from tvlens.weights.matching import Pair, load_pair

from .plan import StudyPlan, name_of


def controls_from(plan: StudyPlan, pair: Pair) -> list[Pair]:
    """The controls of ``plan`` minus the base of ``pair``."""
    start = pair.base.name if pair.base.name.startswith("demo:") else str(pair.base.folder)
    return [load_pair(start, spec, names=(pair.base_name, name_of(spec))) for spec in plan.controls]


def draw_seed(plan: StudyPlan, draw: int) -> int:
    """The seed of a random vector; draws of two seeds share none, up to a thousand draws."""
    return 1_000 * plan.seed + draw
