"""Tuning vectors of one base added over a grid of doses, beside what could stand in place of each.

With tau_j the vectors (or the same part of each) and s_j their doses, every point of the grid is

    base + merge(s_1 tau_1, s_2 tau_2, ...)      ``task``: the sum; other methods by their names

and beside every point at which vector j has a dose the same with, in place of tau_j,

    random    a Gaussian vector as long as tau_j, tensor by tensor; some draws
    NAME      the vector of a control fine-tune of the same base, made as long as tau_j on the whole

so that adding one domain to another is compared with adding something as long. One base is
resident; weights are written in float64, rounded once, and every bit is put back. Where one vector
alone has dose 1, whole and added, the stored fine-tune itself is measured; where none has a dose,
the base. What one vector does to the domain of another, and whether that could be foretold from
the weights, is in ``disturbances``; the paper's claim in ``combination_gains``.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from tvlens.errors import IncomparableModelsError, StudyError
from tvlens.tables import Table
from tvlens.threads import one_thread

from .combination_points import Point, StandIn, grid, points_with, stand_ins
from .controls import controls_from
from .plan import StudyPlan, name_of, scales_in
from .sweeping import WIDE, Progress

if TYPE_CHECKING:
    from tvlens.compose.combining import Merge
    from tvlens.compose.edits import Doses, EditableModel, Share
    from tvlens.evaluation.suite import Measured, Ready
    from tvlens.evaluation.tasks import Task
    from tvlens.models.lens import LensModel
    from tvlens.models.pair import CommonTokens
    from tvlens.models.reading import MakesLogits
    from tvlens.weights.matching import Pair
    from tvlens.weights.vector import TuningVector

MOST_MODELS = 5_000
"""Models that one grid may measure: more than an hour at a second each, so more is a slip."""
COMBINED = "combined"
"""``control`` of a point of the grid in the tables of items."""


class Combination(NamedTuple):
    """What was found of several tuning vectors together.

    Attributes:
        tables: The grid, its items, gains, disturbances, and what was predicted.
        facts: Sentences, and per task the best points.
        warnings: What the reader should know.
    """

    tables: tuple[Table, ...]
    facts: dict[str, Any]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Found:
    """What every model did on the tasks.

    Attributes:
        base_name: What tables call the base.
        names: The fine-tunes whose vectors are combined, in order.
        points: Every point of the grid, and the same with stand-ins; all doses 0 is the base.
        alone: The stored fine-tunes by name.
    """

    base_name: str
    names: tuple[str, ...]
    points: "dict[Point, Measured]" = field(repr=False)
    alone: "dict[str, Measured]" = field(repr=False)

    @property
    def base(self) -> "Measured":
        """The base."""
        return self.points[Point((0.0,) * len(self.names))]

    @property
    def models(self) -> "list[Measured]":
        """Every model, the stored fine-tunes last."""
        return [*self.points.values(), *self.alone.values()]

    @property
    def grid(self) -> list[Point]:
        """The points at which nothing stands in."""
        return [point for point in self.points if point.stand_in is None]

    @property
    def combinations(self) -> list[Point]:
        """Those of them at which two vectors or more have a dose."""
        return [point for point in self.grid if len(point.acting) > 1]

    def stood_in(self, point: Point) -> list[Point]:
        """A point with something in place of one of its vectors."""
        return [p for p in self.points if p.stand_in is not None and p.scales == point.scales]


def check_combine(plan: StudyPlan) -> None:
    """Find what combining would refuse, before any model is loaded.

    Raises:
        StudyError: Fewer than two fine-tunes, no tasks, or scales, methods or models that do not
            fit.
        PromptError: A task file cannot be used.
        SelectionError: The selection cannot be read.
    """
    from tvlens.evaluation.tasks import load_tasks
    from tvlens.selection import parse_selection

    if len(plan.tuned) < 2:
        raise StudyError(
            f"combining needs two fine-tunes of one base at least, got {len(plan.tuned)}.",
            hint="`tvlens sweep` measures one tuning vector by its dose.",
        )
    if plan.parent is not None:
        raise StudyError("vectors are combined on one base; --parent has no place here.")
    if plan.tasks is None:
        raise StudyError("combining needs tasks.", hint="Give a task file with --tasks.")
    _check_grid(plan)
    if plan.select:
        parse_selection(plan.select)
    _check_domains(plan, load_tasks(plan.tasks))


def _check_grid(plan: StudyPlan) -> None:
    from tvlens.compose.combining import method_named
    from tvlens.compose.merging import effective_scales

    method, scales = method_named(plan.method), scales_in(plan.grid)
    if not any(scales):
        raise StudyError(f"the scales {plan.grid!r} hold nothing but 0, which is the base.")
    doses, count = len({0.0, *scales}), len(plan.tuned)
    stands = count * (plan.draws + len(plan.controls)) * (doses - 1) * doses ** (count - 1)
    if doses**count + stands > MOST_MODELS:
        raise StudyError(
            f"{doses} doses of {count} vectors with what stands in their places are "
            f"{doses**count + stands:,} models, more than {MOST_MODELS:,}.",
            hint="Give fewer --scales, --draws or fine-tunes.",
        )
    try:
        for point in grid(scales, count):
            effective_scales([s for s in point.scales if s] or [1.0], method)
    except ValueError as error:
        raise StudyError(str(error), hint="Give other scales, or the method task.") from error


def _check_domains(plan: StudyPlan, tasks: "Sequence[Task]") -> None:
    for task in tasks:
        if task.spec.primary.endswith("_to_tuned") or task.spec.primary == "agree_tuned":
            if task.spec.domain not in plan.names:
                raise StudyError(
                    f"{task.spec.name} asks for the distance to the tuned model, and there are "
                    f"{len(plan.names)}.",
                    hint=f"Say which with domain: one of {', '.join(plan.names)}.",
                )


def combine(plan: StudyPlan, pairs: "Sequence[Pair]", say: Progress, *, device: str) -> Combination:
    """Measure the tasks of ``plan`` over the grid of its scales.

    Args:
        plan: What to measure.
        pairs: One base and each fine-tune.
        say: Called with one line for each model.
        device: Where they run.

    Raises:
        IncomparableModelsError: The fine-tunes do not share the base's vocabulary.
        SelectionError: The selection selects nothing that changed.
        HostError: The models cannot be run.
    """
    from tvlens.evaluation.suite import warnings_of
    from tvlens.evaluation.tasks import load_tasks

    from .combination_gains import gains_table
    from .combination_tables import combination_tables
    from .disturbances import disturbances

    tasks = load_tasks(str(plan.tasks))
    run = Combining.of(plan, pairs, tasks, say, device=device)
    with one_thread(only_if=run.lens.d_model < WIDE):
        found = run.all()
        say("what one vector does to the other's domain")
        measured = disturbances(run, found, tasks)
    say("comparing the points of the grid")
    tables, facts = combination_tables(plan, found, tasks)
    gains = gains_table(plan, found, tasks)
    facts |= {"sentences": [*facts["sentences"], *measured.sentences]}
    warnings = (*run.warnings, *warnings_of(run.tasks), *_domain_warnings(plan, tasks))
    return Combination((*tables, gains, *measured.tables), {"combine": facts}, warnings)


def _domain_warnings(plan: StudyPlan, tasks: "Sequence[Task]") -> list[str]:
    """Domains that name no fine-tune of the study: their tasks count as elsewhere."""
    known = {*plan.names, *map(name_of, plan.controls)}
    left = sorted({task.spec.domain or "" for task in tasks} - known - {""})
    return [
        f"the domain {name!r} of a task is the name of no fine-tune here, so that task counts as "
        "elsewhere."
        for name in left
    ]


class Stack(NamedTuple):
    """The vectors that are added, each with the doses that let in all of what is selected."""

    vectors: "tuple[TuningVector, ...]"
    shares: "tuple[Share, ...]"

    def replaced(self, which: int, vector: "TuningVector", share: "Share") -> "Stack":
        """The same with another vector at one place."""
        vectors, shares = list(self.vectors), list(self.shares)
        vectors[which], shares[which] = vector, share
        return Stack(tuple(vectors), tuple(shares))


@dataclass(frozen=True)
class Combining:
    """One resident base, several tuning vectors of it, and tasks that are ready.

    Attributes:
        plan: What is asked.
        pairs: Base and each fine-tune.
        models: The same lens with each vector.
        tasks: The tasks, tokenised, with what they are compared with.
        say: Called with one line for each model.
        warnings: What the vocabularies leave out.
    """

    plan: StudyPlan
    pairs: "Sequence[Pair]"
    models: "tuple[EditableModel, ...]"
    tasks: "list[Ready]" = field(repr=False)
    say: Progress
    warnings: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        plan: StudyPlan,
        pairs: "Sequence[Pair]",
        tasks: "Sequence[Task]",
        say: Progress,
        *,
        device: str,
    ) -> "Combining":
        """The base loaded once, and the tasks made ready.

        Raises:
            IncomparableModelsError: The fine-tunes do not share the base's vocabulary.
        """
        from tvlens.evaluation.suite import ready, with_reference

        models = _editable(pairs, device)
        prepared = ready(tasks, models[0].tokenizer, chat=plan.chat)
        prepared = with_reference(prepared, "base", models[0].lens)
        prepared = _with_tuned(prepared, dict(zip(plan.names, models, strict=True)))
        said = dict.fromkeys(text for model in models for text in model.warnings)
        return cls(plan, pairs, models, prepared, say, tuple(said))

    @property
    def lens(self) -> "LensModel":
        """The resident base."""
        return self.models[0].lens

    @property
    def names(self) -> tuple[str, ...]:
        """The fine-tunes, in order."""
        return self.plan.names

    @property
    def part(self) -> str | None:
        """The selection, None for whole vectors."""
        return self.plan.select or None

    @property
    def stack(self) -> Stack:
        """The tuning vectors themselves."""
        from tvlens.compose.edits import Share

        shares = (Share(model.gated, self.selected(model)) for model in self.models)
        return Stack(tuple(model.vector for model in self.models), tuple(shares))

    def selected(self, model: "EditableModel") -> "Doses":
        """Dose 1 on what is selected of a model's vector, 0 elsewhere."""
        from tvlens.compose.edits import scaled

        return model.doses(scaled(1.0, self.part))

    def all(self) -> Found:
        """The fine-tunes as stored, every point of the grid, and every stand-in at each."""
        alone = {name: self._stored(place) for place, name in enumerate(self.names)}
        points, own = grid(scales_in(self.plan.grid), len(self.models)), self.stack
        found = {point: self._at(point, own, alone) for point in points}
        controls = controls_from(self.plan, self.pairs[0])
        named = {control.tuned_name: control for control in controls}
        for stand in stand_ins(len(self.models), self.plan.draws, list(named)):
            stack = self._with(own, stand, named)
            for point in points_with(points, stand):
                found[point] = self._at(point, stack, alone)
        return Found(self.pairs[0].base_name, self.names, found, alone)

    @contextmanager
    def combined(self, stack: Stack, scales: Sequence[float]) -> "Iterator[MakesLogits]":
        """The resident model with the vectors in it, for the time of the block."""
        from tvlens.compose.edits import Share, written

        if not any(scales):
            yield self.lens
            return
        if self.plan.method == "task":
            shares = [
                Share(share.gated, {key: scale * dose for key, dose in share.doses.items()})
                for share, scale in zip(stack.shares, scales, strict=True)
                if scale
            ]
        else:
            shares = [self._merged(stack, scales)]
        with written(self.lens, shares) as lens:
            yield lens

    def _merged(self, stack: Stack, scales: Sequence[float]) -> "Share":
        from tvlens.attribution.gates import GatedModel
        from tvlens.compose.edits import Edit, Share

        merge = self._merge(stack)
        terms = (replace(t, scale=s) for t, s in zip(merge.terms, scales, strict=True))
        vector = replace(merge, terms=tuple(terms)).vector()
        return Share(GatedModel.of_vector(self.lens, vector), self.models[0].doses(Edit(1.0)))

    def _merge(self, stack: Stack) -> "Merge":
        from tvlens.compose.combining import merge

        plan, base = self.plan, self.pairs[0].base
        asked = {"density": plan.density, "select": plan.select, "seed": plan.seed}
        return merge(base, list(stack.vectors), method=plan.method, **asked)

    def _with(self, own: Stack, stand: StandIn, controls: "dict[str, Pair]") -> Stack:
        """The vectors with something as long in place of one."""
        from tvlens.attribution.gates import GatedModel
        from tvlens.compose.controls import random_vector
        from tvlens.compose.edits import Edit, Share

        model = self.models[stand.which]
        if stand.by in controls:
            vector = self._as_long(controls[stand.by], model)
            doses = self.selected(model)
        else:
            seed = self._seed(stand)
            vector = random_vector(model, seed=seed, part=self.part)
            doses = model.doses(Edit(1.0))
        gated = GatedModel.of_vector(self.lens, vector)
        return own.replaced(stand.which, vector, Share(gated, doses))

    def _as_long(self, control: "Pair", model: "EditableModel") -> "TuningVector":
        """A control's vector, made as long as that of a model where both are selected."""
        from tvlens.attribution.gates import GatedModel
        from tvlens.attribution.partition import partition
        from tvlens.compose.controls import length
        from tvlens.weights.vector import tuning_vector

        vector, doses = tuning_vector(control), self.selected(model)
        gated = GatedModel.of_vector(self.lens, vector)
        wanted, found = (length(partition(one), doses) for one in (model.gated, gated))
        return vector * (wanted / found) if found else vector

    def _seed(self, stand: StandIn) -> int:
        """Draws for different vectors, and of two seeds, share none up to a thousand draws."""
        draw = (stand.draw or 0) * len(self.models) + stand.which
        return 1_000 * self.plan.seed + draw

    def _stored(self, place: int) -> "Measured":
        """A fine-tune as it was stored."""
        from tvlens.compose.edits import scaled
        from tvlens.evaluation.suite import Variant, measured

        self.say(f"tasks: {self.names[place]}")
        with self.models[place].edited(scaled(1.0)) as lens:
            return measured(Variant(self.names[place]), lens, self.tasks)

    def _at(self, point: Point, stack: Stack, alone: "dict[str, Measured]") -> "Measured":
        from tvlens.evaluation.suite import Measured, Variant, measured

        base, stand = self.pairs[0].base_name, point.stand_in
        name = point.name(self.names, base=base, method=self.plan.method)
        control, draw = (COMBINED, None) if stand is None else (stand.by, stand.draw)
        variant = Variant(name, control, draw) if point.acting else Variant(base)
        if (stored := self._is_stored(point)) is not None:
            return Measured(variant, alone[stored].items)
        self.say(f"tasks: {name}")
        with self.combined(stack, point.scales) as lens:
            return measured(variant, lens, self.tasks)

    def _is_stored(self, point: Point) -> str | None:
        """The fine-tune that a point is, if it is one."""
        whole = self.plan.method == "task" and self.part is None and point.stand_in is None
        if whole and len(point.acting) == 1 and point.scales[point.acting[0]] == 1.0:
            return self.names[point.acting[0]]
        return None


def _editable(pairs: "Sequence[Pair]", device: str) -> "tuple[EditableModel, ...]":
    """The base of all pairs once, with the vector of each."""
    import torch

    from tvlens.attribution.gates import GatedModel
    from tvlens.compose.edits import EditableModel
    from tvlens.models.pair import tuned_lens
    from tvlens.weights.vector import tuning_vector

    common = one_vocabulary(pairs)
    models = [EditableModel.of_pair(pairs[0], device=device)]
    lens, how = models[0].lens, {"device": device, "dtype": torch.float32}
    lens.unknown = {token: text for tokens in common for token, text in tokens.unknown.items()}
    for pair, tokens in list(zip(pairs, common, strict=True))[1:]:
        vector = tuning_vector(pair)
        gated, stored = GatedModel.of_vector(lens, vector), partial(tuned_lens, pair, tokens, **how)
        models.append(EditableModel(gated, vector, stored, tokens.tokenizer(pair), tokens.warnings))
    return tuple(models)


def one_vocabulary(pairs: "Sequence[Pair]") -> "list[CommonTokens]":
    """The tokens that each pair of one base has in common: equally many rows in all.

    Raises:
        IncomparableModelsError: The fine-tunes do not share the base's vocabulary.
    """
    from tvlens.models.pair import common_tokens_of

    common = [common_tokens_of(pair) for pair in pairs]
    if len({tokens.size for tokens in common}) > 1:
        sizes = {p.tuned_name: t.size for p, t in zip(pairs, common, strict=True)}
        raise IncomparableModelsError(
            f"vectors of different vocabularies cannot be added on one base: {sizes} rows.",
            hint="Combine fine-tunes that kept the base's tokens.",
        )
    return common


def _with_tuned(tasks: "Sequence[Ready]", models: "dict[str, EditableModel]") -> "list[Ready]":
    """Distances of a domain with the logits of the fine-tune that learnt it."""
    from tvlens.compose.edits import scaled
    from tvlens.evaluation.suite import with_reference

    found = list(tasks)
    for place, one in enumerate(tasks):
        model = models.get(one.task.spec.domain or "")
        if model is not None and one.task.spec.kind == "kl":
            with model.edited(scaled(1.0)) as lens:
                found[place] = with_reference([one], "tuned", lens)[0]
    return found
