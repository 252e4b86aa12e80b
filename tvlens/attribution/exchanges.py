"""Which activations a study exchanges and in which directions, from the words of its plan.

Parts (``--nodes``): names of ``nodes.NODES`` divided by commas, ``default`` for ``parts_for``,
``all`` for every one that the model has. Directions (``--direction``, once each): a name of
``directions``; within one model with ``@base`` or ``@tuned`` for the model that runs, tuned unless
said; ``default`` for the two across the models and, where prompts have a corrupt prompt, denoising
in the tuned model; ``all`` for every one.

What is asked for by name and cannot be had is refused. What ``default`` and ``all`` stand for is
taken as far as it goes, and what ``all`` leaves out is said.
"""

from collections.abc import Sequence
from typing import NamedTuple, cast, get_args

from tvlens.errors import PromptError, StudyError
from tvlens.models.metrics import Metric

from .directions import CORRUPTED, gradient_vanishes, place_of
from .nodes import NODES, parts_for
from .tables import Direction

DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
DEFAULT, ALL = "default", "all"
DEFAULT_DIRECTIONS: tuple[Direction, ...] = (
    "clean_into_corrupt",
    "tuned_into_base",
    "base_into_tuned",
)


_LACKING = "{} needs prompts with 'corrupt' of the same token length."
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
    """

    direction: Direction
    at: str
    parts: tuple[str, ...]
    prompts: int

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
    """

    nodes: str = DEFAULT
    directions: tuple[str, ...] = ()
    estimators: tuple[str, ...] = ("first_order",)


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
        one = Exchange(wanted.direction, wanted.at, usable, count)
        if not wanted.named and gradient_vanishes(metric, wanted.direction, wanted.at):
            made.vanishing.append(one.words)
            continue
        if len(usable) < len(parts):
            made.left_out.append(_NO_MEAN)
        made.found.append(one)
    return made


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
