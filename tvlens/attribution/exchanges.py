"""Which activations a study exchanges and in which directions, from the words of its plan.

Parts (``--nodes``): names of ``nodes.NODES`` divided by commas, ``default`` for ``parts_for``,
``all`` for every one that the model has. Directions (``--direction``, once each): a name of
``directions``; within one model with ``@base`` or ``@tuned`` for the model that runs, tuned unless
said; ``default`` for the two across the models and, where prompts have a corrupt prompt, denoising
in the tuned model; ``all`` for every one.

Estimators (``--estimator``): ``ig_inputs`` needs two prompts, so it is left out of directions that
run one. Edges (``--edges``) are exchanged in the same directions, by those estimators that edges
have, first order if none of them was asked for.

What is asked for by name and cannot be had is refused. What ``default`` and ``all`` stand for is
taken as far as it goes, and what ``all`` leaves out is said.
"""

from collections.abc import Sequence
from typing import NamedTuple, cast, get_args

from tvlens.errors import PromptError, StudyError
from tvlens.models.metrics import Metric

from .directions import CORRUPTED, gradient_vanishes, place_of
from .nodes import NODES, parts_for
from .tables import Direction, EdgeEstimator, Estimator

DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
EDGE_ESTIMATORS: tuple[EdgeEstimator, ...] = get_args(EdgeEstimator)
DEFAULT, ALL = "default", "all"
DEFAULT_DIRECTIONS: tuple[Direction, ...] = (
    "clean_into_corrupt",
    "tuned_into_base",
    "base_into_tuned",
)


_LACKING = "{} needs prompts with 'corrupt' of the same token length."
_NO_LINE = "ig_inputs needs a prompt and its corrupt prompt: {} has no such estimate."
_NO_MEAN = (
    "attention patterns have no mean over prompts of different lengths, so mean_ablation leaves "
    "them out."
)


class Exchange(NamedTuple):
    """One direction, asked of one model.

    Attributes:
        direction: What is put where.
        at: The model that runs.
        parts: The activations.
        prompts: How many prompts it can be asked on.
        estimators: How it is estimated.
        of_edges: How its edges are estimated; none where they were not asked for.
    """

    direction: Direction
    at: str
    parts: tuple[str, ...]
    prompts: int
    estimators: tuple[Estimator, ...] = ("first_order",)
    of_edges: tuple[EdgeEstimator, ...] = ()

    @property
    def words(self) -> str:
        """The direction for people, with its model where there is a choice."""
        named = self.direction.replace("_", " ")
        return named if self.at in self.direction else f"{named}, in the {self.at} model"


class Words(NamedTuple):
    """What a plan says about exchanges.

    Attributes:
        nodes: Its list of parts.
        directions: Its directions; none for the usual ones.
        estimators: Its estimators, which have usual activations of their own.
        edges: Whether edges are exchanged too.
    """

    nodes: str = DEFAULT
    directions: tuple[str, ...] = ()
    estimators: tuple[Estimator, ...] = ("first_order",)
    edges: bool = False


class Exchanges(NamedTuple):
    """What is exchanged, and what is not.

    Attributes:
        found: What is exchanged.
        vanishing: Directions that were not named and whose gradient is zero, in words.
        left_out: Sentences on what else is left out.
    """

    found: list[Exchange]
    vanishing: list[str]
    left_out: list[str]


USUAL = Words()


class _Wanted(NamedTuple):
    direction: Direction
    at: str
    word: str

    @property
    def named(self) -> bool:
        """Whether it was asked for by its own name."""
        return self.word not in (DEFAULT, ALL)


def parts_there(*, gated: bool) -> tuple[str, ...]:
    """The parts that a model has: the up branch of an MLP only if it is gated."""
    return tuple(part for part in NODES if gated or part != "pre_linear")


def chosen_parts(
    text: str,
    there: Sequence[str] = tuple(NODES),
    estimators: Sequence[str] = USUAL.estimators,
) -> tuple[str, ...]:
    """The parts that a list stands for, each once, in its order.

    Args:
        text: Names, ``default``, ``all``, divided by commas.
        there: The parts that the model has.
        estimators: Whose usual parts ``default`` stands for.

    Raises:
        StudyError: The list is empty, or names what does not exist or what the model lacks.
    """
    named = {DEFAULT: parts_for(estimators), ALL: tuple(there)}
    words = [word.strip() for word in text.split(",") if word.strip()]
    found = [part for word in words for part in named.get(word, (word,))]
    hint = f"There are {', '.join(NODES)}; default and all."
    if not found:
        raise StudyError("--nodes names no activation.", hint=hint)
    for part in found:
        if part not in NODES:
            raise StudyError(f"there is no activation {part!r}.", hint=hint)
        if part not in there:
            raise StudyError(
                f"this model has no activation {part!r}.",
                hint="It is the up branch of a gated MLP; --nodes all takes what there is.",
            )
    return tuple(dict.fromkeys(found))


def chosen_directions(words: Sequence[str]) -> list[tuple[Direction, str]]:
    """The directions that some words stand for, each with its model.

    Raises:
        StudyError: There is no such direction.
        HostError: It cannot be asked at that model.
    """
    return [(wanted.direction, wanted.at) for wanted in _wanted(words)]


def exchanges(
    asked: Words, metric: Metric, *, there: Sequence[str], prompts: int, corrupt: int
) -> Exchanges:
    """What is exchanged, and what is left out.

    Args:
        asked: What the plan says.
        metric: What is measured.
        there: The parts that the model has.
        prompts: Number of prompts.
        corrupt: Those with a corrupt prompt of their own length.

    Raises:
        StudyError: A part or a direction does not exist, or nothing of the parts can be asked.
        PromptError: A direction asked for by name needs corrupt prompts, and there are none.
    """
    parts, made = chosen_parts(asked.nodes, there, asked.estimators), Exchanges([], [], [])
    for wanted in _wanted(asked.directions):
        lacking = wanted.direction in CORRUPTED and not corrupt
        if lacking and wanted.named:
            raise PromptError(_LACKING.format(wanted.direction))
        if lacking:  # of the usual directions that is no news
            made.left_out.extend([_LACKING.format(wanted.direction)] * (wanted.word == ALL))
            continue
        usable = _usable(wanted.direction, parts)
        count = corrupt if wanted.direction in CORRUPTED else prompts
        estimators = _estimators(wanted.direction, asked.estimators)
        of_edges = _of_edges(estimators) if asked.edges else ()
        one = Exchange(wanted.direction, wanted.at, usable, count, estimators, of_edges)
        if not wanted.named and gradient_vanishes(metric, wanted.direction, wanted.at):
            made.vanishing.append(one.words)
            continue
        if len(usable) < len(parts):
            made.left_out.append(_NO_MEAN)
        if len(estimators) < len(asked.estimators):
            made.left_out.append(_NO_LINE.format(one.words))
        if estimators or of_edges:
            made.found.append(one)
    _require_line(asked.estimators, made.found)
    return made


def _require_line(estimators: Sequence[Estimator], found: Sequence[Exchange]) -> None:
    """Refuse gradients along inputs where no direction has two of them."""
    if "ig_inputs" in estimators and not any("ig_inputs" in one.estimators for one in found):
        raise StudyError(
            "--estimator ig_inputs: no direction that is asked for has two prompts.",
            hint=f"Give prompts with 'corrupt', and --direction {' or '.join(CORRUPTED)}.",
        )


def _estimators(direction: str, asked: tuple[Estimator, ...]) -> tuple[Estimator, ...]:
    """Those that the direction has."""
    between = direction in CORRUPTED
    return tuple(estimator for estimator in asked if estimator != "ig_inputs" or between)


def _of_edges(estimators: Sequence[Estimator]) -> tuple[EdgeEstimator, ...]:
    """Those that edges have, first order if there is none."""
    found: list[EdgeEstimator] = [e for e in EDGE_ESTIMATORS if e in estimators]
    return tuple(found) or ("first_order",)


def _wanted(words: Sequence[str]) -> list[_Wanted]:
    found: dict[tuple[str, str], _Wanted] = {}
    for word in words or (DEFAULT,):
        name, _, at = word.partition("@")
        several = {DEFAULT: DEFAULT_DIRECTIONS, ALL: DIRECTIONS}.get(word, (name,))
        for direction in several:
            if direction not in DIRECTIONS:
                raise StudyError(
                    f"there is no direction {direction!r}.",
                    hint=f"There are {', '.join(DIRECTIONS)}; default and all.",
                )
            one = _Wanted(cast(Direction, direction), place_of(direction, at), word)
            if not found.setdefault(one[:2], one).named:
                found[one[:2]] = one
    return list(found.values())


def _usable(direction: str, parts: tuple[str, ...]) -> tuple[str, ...]:
    if direction != "mean_ablation":
        return parts
    usable = tuple(part for part in parts if part != "pattern")
    if not usable:
        raise StudyError(_NO_MEAN, hint="Use zero_ablation, or name more --nodes.")
    return usable
