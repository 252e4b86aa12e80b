"""A sweep: tasks measured along a tuning vector, beside what could stand in its place.

With tau the tuning vector or a part of it, and the rest out (``base``) or in (``tuned``),

    tuning       rest + s * tau
    random       the same with a Gaussian vector as long as tau, tensor by tensor; some draws
    random_set   with a selection: as many other components, as long; along directions: as many
                 other components as these belong to, as long; some draws
    NAME         the same with the vector of a control fine-tune of the same base

A part is a selection of entries, the geometric parts of every matrix's change, or what is written
along directions (``selecting``). The last two are vectors of their own. The whole one is then kept
beside them only where it is in the model or other components of it are drawn.

From ``tuned`` on, what stands in tau's place is let in by s - 1, so that all curves meet at the
tuned model at s = 1, and at the base at s = 0 otherwise. The best dose of a task is chosen on the
items of the split ``choose`` and reported on those of ``judge``.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from tvlens.errors import SelectionError, StudyError
from tvlens.tables import Table
from tvlens.threads import one_thread

from .controls import controls_from, draw_seed
from .plan import StudyPlan
from .selecting import Cut, Request, check_request, cut_of

if TYPE_CHECKING:
    from tvlens.attribution.gates import GatedModel
    from tvlens.compose.edits import Doses, EditableModel, Part, Share
    from tvlens.evaluation.suite import Measured, Ready, Variant
    from tvlens.models.reading import MakesLogits
    from tvlens.weights.matching import Pair
    from tvlens.weights.vector import TuningVector

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
        StudyError: There are no tasks, the scales cannot be read, or there is no such study.
        PromptError: A task file cannot be used.
        SelectionError: The selection cannot be read.
    """
    from tvlens.evaluation.tasks import load_tasks

    if plan.tasks is None:
        raise StudyError("a sweep needs tasks.", hint="Give a task file with --tasks.")
    if not set(plan.doses) - {start_of(plan)}:
        raise StudyError(f"the scales {plan.scales!r} hold nothing but where the sweep starts.")
    check_request(request_of(plan))
    load_tasks(plan.tasks)


def check_swept(plan: StudyPlan, pairs: "Sequence[Pair]") -> None:
    """Find what a sweep would refuse of what is asked for, once the files are matched.

    Raises:
        SelectionError: It selects nothing, or names what is not there.
        StudyError: The study is of other models, or lacks a table.
    """
    from tvlens.compose.portions import GeometricParts, check_parts

    for pair in pairs if "sweep" in plan.stages else ():
        cut = cut_of(request_of(plan), pair)
        if isinstance(cut.portion, GeometricParts):
            check_parts(cut.portion, pair)


def request_of(plan: StudyPlan) -> Request:
    """What of the tuning vectors a sweep lets in."""
    return Request(plan.select, plan.top, plan.kept_parts, plan.along, plan.study)


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
    cut = cut_of(request_of(plan), pair)
    model = EditableModel.of_pair(pair, device=device)
    said = model.warnings
    with one_thread(only_if=model.lens.d_model < WIDE):
        prepared = ready(tasks, model.tokenizer, chat=plan.chat)
        prepared = with_reference(prepared, "base", model.lens)
        say(f"tasks: {pair.tuned_name}")
        with model.edited(scaled(1.0)) as lens:
            prepared = with_reference(prepared, "tuned", lens)
            tuned = measured(Variant(pair.tuned_name), lens, prepared)
        say(f"tasks: {pair.base_name}")
        base = measured(Variant(pair.base_name), model.lens, prepared)
        if cut.portion is not None:
            say(f"{cut.portion.text}: {pair.tuned_name}")
        swept = _swept(model, cut, pair, from_base=plan.rest == "base")
        del model  # and with it the whole vector, where no more than a portion is asked for
        run = _Run(plan, pair, swept, prepared, {0.0: base, 1.0: tuned}, say)
        found = [base, tuned, *run.all()]
    tables, facts = sweep_tables(
        plan, pair, tasks, found, share_of_norm=swept.share_of_norm, known=known
    )
    return Sweep(tables, {"sweep": facts}, (*swept.notes, *said, *warnings_of(prepared)))


def start_of(plan: StudyPlan) -> float:
    """The dose at which a sweep starts: the rest out, or in."""
    return 0.0 if plan.rest == "base" else 1.0


@dataclass(frozen=True)
class _Swept:
    """What a sweep moves.

    Attributes:
        whole: The base and its whole tuning vector, or what is moved where no more is asked for.
        moved: The base and what is moved: the whole vector or a portion of it.
        cut: What was asked for.
        share_of_norm: Length of what is moved over that of the whole vector.
        notes: What a reader should know of it.
    """

    whole: "EditableModel"
    moved: "EditableModel"
    cut: Cut
    share_of_norm: float
    notes: tuple[str, ...]

    @property
    def part(self) -> "Part | None":
        """The selection of entries, None for all that is moved."""
        return self.cut.part


def _swept(model: "EditableModel", cut: Cut, pair: "Pair", *, from_base: bool) -> _Swept:
    """The model with what is asked for of its vector; ``from_base`` if the rest is out."""
    from tvlens.compose.portions import Along, GeometricParts, left_out, portion

    moved, notes = model, cut.notes
    if cut.portion is not None:
        moved = model.with_vector(portion(model.vector, cut.portion, pair.stored_weight))
    if isinstance(cut.portion, GeometricParts):
        notes = (*notes, *left_out(model.vector, cut.portion))
    length = _length(model, None)
    share = _length(moved, cut.part) / length if length else 0.0
    # other components in place of those that directions belong to are taken from the whole vector
    keeps_whole = not from_base or isinstance(cut.portion, Along)
    return _Swept(model if keeps_whole else moved, moved, cut, share, notes)


def _length(model: "EditableModel", part: "Part | None") -> float:
    """Length of a vector, or of a part of it, let in."""
    from tvlens.attribution.partition import Partition, partition
    from tvlens.compose.controls import length
    from tvlens.compose.edits import scaled

    parts: Partition = partition(model.gated)
    return length(parts, model.doses(scaled(1.0, part)))


@dataclass(frozen=True)
class _Run:
    """All variants of one sweep."""

    plan: StudyPlan
    pair: "Pair"
    swept: _Swept
    tasks: "list[Ready]"
    ends: "dict[float, Measured]"
    say: Progress

    def all(self) -> "Iterator[Measured]":
        """The tuning vector at every dose, then every control."""
        for scale in self.plan.doses:
            yield self._tuning(scale)
        for draw in range(self.plan.draws):
            yield from self._random(draw)
            yield from self._random_set(draw)
        for control in controls_from(self.plan, self.pair):
            yield from self._control(control)

    def _tuning(self, scale: float) -> "Measured":
        from tvlens.compose.edits import scaled
        from tvlens.evaluation.suite import Measured

        swept, start = self.swept, start_of(self.plan)
        variant = self._variant(TUNING, None, scale)
        if swept.cut.portion is not None and scale != start:
            return self._moved(variant, swept.moved.gated, self._ones(), scale)
        edit = scaled(start if swept.cut.portion else scale, swept.part, rest=start)
        for end, known in self.ends.items():
            if edit.is_whole(end):
                return Measured(variant, known.items)
        return self._measured(variant, swept.whole.edited(edit))

    def _random(self, draw: int) -> "Iterator[Measured]":
        from tvlens.attribution.gates import GatedModel
        from tvlens.compose.controls import random_vector
        from tvlens.compose.edits import Edit

        model, part = self.swept.moved, self.swept.part
        vector = random_vector(model, seed=draw_seed(self.plan, draw), part=part)
        gated = GatedModel.of_vector(model.lens, vector)
        yield from self._along(RANDOM, draw, gated, model.doses(Edit(1.0)))

    def _random_set(self, draw: int) -> "Iterator[Measured]":
        """Other components than the part's, or than those of which a portion takes something."""
        from tvlens.compose.controls import random_set
        from tvlens.compose.portions import Along

        swept, seed = self.swept, draw_seed(self.plan, draw)
        if isinstance(swept.cut.portion, Along):
            model, owners = swept.whole, swept.cut.portion.components
            long = _length(swept.moved, None)
            found = random_set(model, owners, seed=seed, as_long=long)
        elif swept.part is not None:
            model = swept.moved
            found = random_set(model, swept.part, seed=seed)
        else:
            return
        doses = {key: found.scale * dose for key, dose in found.doses.items()}
        yield from self._along(RANDOM_SET, draw, model.gated, doses)

    def _control(self, control: "Pair") -> "Iterator[Measured]":
        from tvlens.attribution.gates import GatedModel
        from tvlens.weights.vector import tuning_vector

        gated = GatedModel.of_vector(self.swept.whole.lens, self._portion(tuning_vector(control)))
        yield from self._along(control.tuned_name, None, gated, self._ones())

    def _portion(self, vector: "TuningVector") -> "TuningVector":
        """Of a control's vector what is taken of the tuning vector."""
        from tvlens.compose.portions import portion

        taken = self.swept.cut.portion
        if taken is None:
            return vector
        try:
            return portion(vector, taken, self.pair.stored_weight)
        except SelectionError:  # the control changed nothing there, and so it moves nothing
            return vector.select(lambda component: False)

    def _ones(self) -> "Doses":
        """All that is moved, let in whole."""
        from tvlens.compose.edits import scaled

        return self.swept.moved.doses(scaled(1.0, self.swept.part))

    def _along(
        self, name: str, draw: int | None, gated: "GatedModel", ones: "Doses"
    ) -> "Iterator[Measured]":
        """What stands in the tuning vector's place, at every dose but the start."""
        for scale in self.plan.doses:
            if scale != start_of(self.plan):
                yield self._moved(self._variant(name, draw, scale), gated, ones, scale)

    def _moved(
        self, variant: "Variant", gated: "GatedModel", ones: "Doses", scale: float
    ) -> "Measured":
        """What is let in by ``scale``, upon the base or, less one, upon the tuned model."""
        from tvlens.compose.edits import Share, written

        moved = {key: (scale - start_of(self.plan)) * dose for key, dose in ones.items()}
        shares = [*self._beneath(), Share(gated, moved)]
        return self._measured(variant, written(self.swept.whole.lens, shares))

    def _beneath(self) -> "list[Share]":
        """The whole vector where the rest is in."""
        from tvlens.compose.edits import Edit, Share

        start, whole = start_of(self.plan), self.swept.whole
        return [Share(whole.gated, whole.doses(Edit(start)))] if start else []

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
