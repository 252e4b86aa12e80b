"""A sweep: tasks measured along a tuning vector, beside what could stand in its place.

With tau the tuning vector or a part of it, and the rest out (``base``) or in (``tuned``),

    tuning       rest + s * tau
    random       the same with a Gaussian vector as long as tau, tensor by tensor; some draws
    random_set   with a part: as many other components, as long; some draws
    NAME         the same with the vector of a control fine-tune of the same base

From ``tuned`` on, what stands in tau's place is let in by s - 1, so that all curves meet at the
tuned model at s = 1, and at the base at s = 0 otherwise. The best dose of a task is chosen on the
items of the split ``choose`` and reported on those of ``judge``.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from tvlens.errors import StudyError
from tvlens.tables import Table
from tvlens.threads import one_thread

from .controls import controls_from, draw_seed
from .plan import StudyPlan

if TYPE_CHECKING:
    from tvlens.attribution.gates import GatedModel
    from tvlens.attribution.partition import Partition
    from tvlens.compose.edits import Doses, EditableModel
    from tvlens.evaluation.suite import Measured, Ready, Variant
    from tvlens.models.reading import MakesLogits
    from tvlens.weights.matching import Pair

Progress = Callable[[str], None]
WIDE = 1024
"""Width of the residual stream from which several threads pay off in a pass."""
TUNING, RANDOM, RANDOM_SET = "tuning", "random", "random_set"


class Sweep(NamedTuple):
    """What a sweep found for one pair.

    Attributes:
        tables: Curves, evaluation and items.
        facts: Per task both ends, the best dose, what controls do, and the sentence.
        warnings: What the reader should know.
    """

    tables: tuple[Table, ...]
    facts: dict[str, Any]
    warnings: tuple[str, ...]


def check_sweep(plan: StudyPlan) -> None:
    """Find what a sweep would refuse, before any model is loaded.

    Raises:
        StudyError: There are no tasks, or the scales cannot be read.
        PromptError: A task file cannot be used.
        SelectionError: The selection cannot be read.
    """
    from tvlens.evaluation.tasks import load_tasks
    from tvlens.selection import parse_selection

    if plan.tasks is None:
        raise StudyError("a sweep needs tasks.", hint="Give a task file with --tasks.")
    if not set(plan.doses) - {start_of(plan)}:
        raise StudyError(f"the scales {plan.scales!r} hold nothing but where the sweep starts.")
    if plan.select:
        parse_selection(plan.select)
    load_tasks(plan.tasks)


def sweep(
    plan: StudyPlan, pair: "Pair", say: Progress, *, device: str, known: Collection[str] = ()
) -> Sweep:
    """Measure the tasks of ``plan`` along the tuning vector of ``pair``.

    Args:
        plan: What to measure.
        pair: Base and fine-tune.
        say: Called with one line for each model.
        device: Where they run.
        known: Models whose rows other tables of the study hold, so that these need not.

    Raises:
        SelectionError: The selection selects nothing that changed.
        HostError: The models cannot be run.
    """
    from tvlens.compose.edits import EditableModel, scaled
    from tvlens.evaluation.suite import Variant, measured, ready, warnings_of, with_reference
    from tvlens.evaluation.tasks import load_tasks

    from .sweep_tables import sweep_tables

    tasks = load_tasks(str(plan.tasks))
    model = EditableModel.of_pair(pair, device=device)
    with one_thread(only_if=model.lens.d_model < WIDE):
        prepared = ready(tasks, model.tokenizer, chat=plan.chat)
        prepared = with_reference(prepared, "base", model.lens)
        say(f"tasks: {pair.tuned_name}")
        with model.edited(scaled(1.0)) as lens:
            prepared = with_reference(prepared, "tuned", lens)
            tuned = measured(Variant(pair.tuned_name), lens, prepared)
        say(f"tasks: {pair.base_name}")
        base = measured(Variant(pair.base_name), model.lens, prepared)
        run = _Run(plan, pair, model, prepared, {0.0: base, 1.0: tuned}, say)
        found = [base, tuned, *run.all()]
    tables, facts = sweep_tables(
        plan, pair, tasks, found, share_of_norm=run.share_of_norm, known=known
    )
    return Sweep(tables, {"sweep": facts}, (*model.warnings, *warnings_of(prepared)))


def start_of(plan: StudyPlan) -> float:
    """The dose at which a sweep starts: the rest out, or in."""
    return 0.0 if plan.rest == "base" else 1.0


@dataclass(frozen=True)
class _Run:
    """All variants of one sweep."""

    plan: StudyPlan
    pair: "Pair"
    model: "EditableModel"
    tasks: "list[Ready]"
    ends: "dict[float, Measured]"
    say: Progress

    @property
    def part(self) -> str | None:
        """The selection, None for the whole vector."""
        return self.plan.select or None

    def all(self) -> "Iterator[Measured]":
        """The tuning vector at every dose, then every control."""
        for scale in self.plan.doses:
            yield self._tuning(scale)
        for draw in range(self.plan.draws):
            yield from self._random(draw)
            if self.part is not None:
                yield from self._random_set(draw)
        for control in controls_from(self.plan, self.pair):
            yield from self._control(control)

    @property
    def share_of_norm(self) -> float:
        """Length of the part over that of the whole vector."""
        from tvlens.attribution.partition import partition
        from tvlens.compose.controls import length
        from tvlens.compose.edits import scaled

        parts: Partition = partition(self.model.gated)
        part, whole = (
            length(parts, self.model.doses(scaled(1.0, one))) for one in (self.part, None)
        )
        return part / whole if whole else 0.0

    def _tuning(self, scale: float) -> "Measured":
        from tvlens.compose.edits import scaled
        from tvlens.evaluation.suite import Measured

        edit = scaled(scale, self.part, rest=start_of(self.plan))
        variant = self._variant(TUNING, None, scale)
        for end, known in self.ends.items():
            if edit.is_whole(end):
                return Measured(variant, known.items)
        return self._measured(variant, self.model.edited(edit))

    def _random(self, draw: int) -> "Iterator[Measured]":
        from tvlens.attribution.gates import GatedModel
        from tvlens.compose.controls import random_vector

        seed = draw_seed(self.plan, draw)
        vector = random_vector(self.model, seed=seed, part=self.part)
        gated = GatedModel.of_vector(self.model.lens, vector)
        yield from self._along(RANDOM, draw, gated, None)

    def _random_set(self, draw: int) -> "Iterator[Measured]":
        from tvlens.compose.controls import random_set

        found = random_set(self.model, str(self.part), seed=draw_seed(self.plan, draw))
        doses = {key: found.scale * dose for key, dose in found.doses.items()}
        yield from self._along(RANDOM_SET, draw, self.model.gated, doses)

    def _control(self, control: "Pair") -> "Iterator[Measured]":
        from tvlens.attribution.gates import GatedModel
        from tvlens.compose.edits import scaled
        from tvlens.weights.vector import tuning_vector

        gated = GatedModel.of_vector(self.model.lens, tuning_vector(control))
        doses = self.model.doses(scaled(1.0, self.part))
        yield from self._along(control.tuned_name, None, gated, doses)

    def _along(
        self, name: str, draw: int | None, gated: "GatedModel", doses: "Doses | None"
    ) -> "Iterator[Measured]":
        """What stands in the tuning vector's place, at every dose but the start."""
        from tvlens.compose.edits import Edit, Share, written

        start = start_of(self.plan)
        ones = self.model.doses(Edit(1.0)) if doses is None else doses
        beneath = [Share(self.model.gated, self.model.doses(Edit(start)))] if start else []
        for scale in self.plan.doses:
            if scale == start:
                continue
            moved = {key: (scale - start) * dose for key, dose in ones.items()}
            shares = [*beneath, Share(gated, moved)]
            variant = self._variant(name, draw, scale)
            yield self._measured(variant, written(self.model.lens, shares))

    def _measured(
        self, variant: "Variant", edited: "AbstractContextManager[MakesLogits]"
    ) -> "Measured":
        from tvlens.evaluation.suite import measured

        self.say(f"tasks: {variant.model}")
        with edited as lens:
            return measured(variant, lens, self.tasks)

    def _variant(self, control: str, draw: int | None, scale: float) -> "Variant":
        from tvlens.evaluation.suite import Variant

        tuned, number = self.pair.tuned_name, "" if draw is None else f" {draw + 1}"
        other = f"{control.replace('_', ' ')}{number} for {tuned}"
        return Variant(f"{tuned if control == TUNING else other} x {scale:g}", control, draw, scale)
