"""The stage of the weights: what was written, what kind it is, and one fine-tune against others.

Pair       -> weights, tests, labels, contrasts, measures, directions, readings
all pairs  -> lineage, overlap
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tvlens.tables import concatenated
from tvlens.weights.gauge import canonical, removed

from .controls import controls_from
from .covariances import Known, base_covariances, runs_models
from .directions import overlap_tables, written_directions
from .outputs import Outputs, Progress, StageOutput
from .plan import StudyPlan

if TYPE_CHECKING:
    from tvlens.weights.matching import Pair


def decompose_stage(plan: StudyPlan, pairs: "Sequence[Pair]", say: Progress) -> Outputs:
    """Measure and classify every component of the tuning vectors; then one against the other."""
    pairs, controls = _canonical(plan, pairs, say), {}
    made: dict[str, StageOutput] = {}
    for group in _of_one_base(pairs):
        found = _canonical(plan, controls_from(plan, group[0]), say)
        controls[group[0].base.folder] = found
        if runs_models(plan):
            say(f"what the matrices of {group[0].base_name} read")
        known = base_covariances(plan, group[0])
        made.update(_decomposed(plan, group, found, known, say))
    yield from ((pair.tuned_name, made[pair.tuned_name]) for pair in pairs)
    lineage = lineage_stage(plan, pairs, say)
    overlaps = overlap_tables(plan, pairs, controls, say)
    yield pairs[-1].tuned_name, replace(lineage, tables=(*lineage.tables, *overlaps))


def _of_one_base(pairs: "Sequence[Pair]") -> "list[list[Pair]]":
    """The pairs by their base, in order: what belongs to a base alone is then worked out once."""
    groups: dict[Path, list[Pair]] = {}
    for pair in pairs:
        groups.setdefault(pair.base.folder, []).append(pair)
    return list(groups.values())


def _decomposed(
    plan: StudyPlan,
    pairs: "Sequence[Pair]",
    controls: "Sequence[Pair]",
    known: Known,
    say: Progress,
) -> Outputs:
    """The geometry of fine-tunes of one base."""
    from tvlens.geometry.classify import decompose_and_classify

    facts: dict[str, dict[str, Any]] = {pair.tuned_name: dict(known.facts) for pair in pairs}
    warnings: dict[str, tuple[str, ...]] = {pair.tuned_name: known.warnings for pair in pairs}
    for pair in pairs if plan.canonical else ():
        moved = removed(pair)
        counts = {"neurons": moved.neurons, "heads": moved.heads}
        facts[pair.tuned_name]["canonical"] = counts
        warnings[pair.tuned_name] = (*known.warnings, moved.sentence)
    say(f"decompose and classify: {', '.join(pair.tuned_name for pair in pairs)}")
    found = decompose_and_classify(
        pairs,
        controls=controls,
        covariances=known.covariances,
        classifier=plan.classifier,
        measures=plan.measures,
        seed=plan.seed,
        progress=_blocks_of("decompose", say),
    )
    for pair, geometry in zip(pairs, found, strict=True):
        name, labels = pair.tuned_name, geometry.labels
        say(f"directions: {name}")
        written = written_directions(pair, labels.labels, seed=plan.seed)
        tables = (geometry.weights, labels.tests, labels.labels, labels.contrasts)
        tables += () if labels.measures is None else (labels.measures,)
        yield (
            name,
            StageOutput(
                (*tables, written.directions, written.readings),
                facts[name],
                warnings[name],
                vectors={"directions": written.vectors},
            ),
        )


def _blocks_of(stage: str, say: Progress) -> Callable[[int, int], None]:
    """Says how many blocks are done where that leaves no line behind (``say.passing``)."""
    passing = getattr(say, "passing", None)

    def said(done: int, total: int) -> None:
        if passing is not None:
            passing(f"{stage}: block {done} of {total}")

    return said


def _canonical(plan: StudyPlan, pairs: "Sequence[Pair]", say: Progress) -> "list[Pair]":
    """The pairs, if asked for with their tuned models read in the base's coordinates."""
    if not plan.canonical:
        return list(pairs)
    found = []
    for pair in pairs:
        say(f"finding the base's coordinates for {pair.tuned_name}")
        found.append(canonical(pair))
    return found


def lineage_stage(plan: StudyPlan, pairs: "Sequence[Pair]", say: Progress) -> StageOutput:
    """With a parent: how each whole way from the base divides into its two steps."""
    if plan.parent is None:
        return StageOutput(())
    from tvlens.weights.steps import detour_warning, lineage_table

    first = pairs[0]
    seconds = [pair for pair in pairs if pair.base_name == first.tuned_name]
    say(f"lineage: {first.base_name} -> {first.tuned_name} -> ...")
    tables = [lineage_table(first, second) for second in seconds]
    warnings = (detour_warning(table) for table in tables)
    return StageOutput((concatenated("lineage", tables),), warnings=tuple(filter(None, warnings)))
