"""What was asked, enough to run it again: the content of ``study.yaml``."""

import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tvlens.errors import StudyError
from tvlens.files import write_whole

Stage = Literal["decompose", "attribute", "graft", "evaluate", "sweep", "combine", "represent"]
Estimator = Literal["first_order", "qk_fix", "atp_star", "ig_inputs"]
STAGES: tuple[Stage, ...] = get_args(Stage)


ALONE = ("decompose", "attribute", "graft", "sweep", "combine", "represent")
"""Stages that have a command of their own."""
NOT_OPTIONS = {
    *("base", "tuned", "stages", "seed"),  # written in places of their own
    *("replicates", "evaluate", "check_nodes", "check_prompts"),  # Python's alone
}
"""Fields that the command line does not take as options."""
OPTION_NAMES = {
    **{"tuned_names": "tuned-name", "controls": "control", "directions": "direction"},
    **{"estimators": "estimator", "measures": "measure"},
    **{"grid": "scales", "kept_parts": "parts"},
}
"""Options whose name is not that of their field."""
PLANNED = {
    "check_exact": "check_count",
    "check_nodes": "check_nodes",
    "check_prompts": "check_prompts",
}
"""Options that a plan by time fills in, and the fact that holds each."""
WHOLE_WAY = "-from-base"
"""What the name of a fine-tune ends in where tables hold its way from the base past the parent."""


class Step(NamedTuple):
    """Two models whose difference is studied.

    Attributes:
        base: Specification of the first.
        tuned: Specification of the second.
        base_name: What tables call the first in ``base``.
        tuned_name: What tables call the difference in ``tuned``.
    """

    base: str
    tuned: str
    base_name: str
    tuned_name: str


class StudyPlan(BaseModel):
    """The options of one study.

    Attributes:
        base: Model specification of the base.
        tuned: Model specifications of the fine-tunes.
        tuned_names: Names of the fine-tunes in every table; folder names where not given.
        parent: The model between base and fine-tunes (base -> instruct -> domain): the study
            then holds both steps and the whole way.
        controls: Specifications of control fine-tunes: classified beside each fine-tune.
        replicates: Name of a fine-tune to that of another run of its recipe (other seed), which is
            a fine-tune of the study too: the ceiling of what two fine-tunes can have in common.
        prompts: Prompt file, ``demo:NAME``, or None for the shipped neutral texts.
        metric: Metric name, ``anchor`` or ``anchor@LAYER``, or ``package.module:function``; None
            chooses by the prompts.
        classifier: Your own classifier, ``package.module:function``.
        measures: Your own measures, each ``package.module:function``.
        covariances: A file of ``tvlens.covariances`` of the base; ``auto`` takes them on the
            prompts where the models are run on these anyway; or ``off``.
        canonical: Measure the weights in the base's coordinates (``weights.gauge``); what runs
            the models stays as stored.
        stages: Which stages to run.
        nodes: Which activations are attributed to: names divided by commas, default, all.
        directions: What is put where (``attribution.exchanges``); none for the usual ones.
        edges: Exchange edges too, what one component writes as one other reads it.
        position: Keep the scores of activations by position, in ``positions/``.
        evaluate: Held-out text files to measure, by domain name.
        check_exact: Components in the exact sample; None plans it from ``check_seconds`` and
            writes what was planned.
        check_nodes: Nodes of the exact path average; None takes what fits the time, or 3.
        check_prompts: Prompts of the exact sample; None takes 16.
        select: Which components the exact sample is drawn from, and in a sweep the part of the
            tuning vector that is let in (``tvlens.selection``); empty for all.
        study: In a sweep: the study whose labels, scores and directions ``select``, ``top`` and
            ``along`` speak of.
        top: Let in only so many of what is selected, those with the largest |score|.
        kept_parts: Let in only these geometric parts of each matrix's change; empty for all.
        along: Let in only what is written along these directions of the study; empty for all.
        check_seconds: Time that the exact checks may take, as far as a plan can tell.
        estimators: How the effects of exchanged activations are estimated; each is checked. With
            others than first order, queries and keys are among the usual activations.
        dtype: What attribution runs in: bfloat16 is a scan of estimates, nothing exact is made.
        parts: Divide the integrated weight scores over the geometric parts of each change.
        circuits: Give OV and QK of every query head an integrated weight score of their own.
        keep: Share of a behaviour's change that grafting restores or destroys.
        tasks: Task file of a sweep or a combination, or ``demo:NAME``.
        scales: Doses of a sweep: ``first:last:step``, or numbers with commas.
        rest: Whether the rest of it is out (``base``) or in (``tuned``).
        draws: Random vectors that stand beside a tuning vector, and random parts, in a sweep and
            where representations are compared.
        texts: Documents that representations are compared on: a file, or ``demo:NAME``.
        draws: Random vectors, and random parts, that a sweep is repeated with.
        grid: Doses of every vector where several are combined, as for ``scales``; 0 is added.
        method: How combined vectors become one: a name of ``compose.merging.METHODS``.
        density: Share of entries that a method which trims keeps; None for the method's own.
        places: What of one vector is added by itself to another: a matrix, a layer, or nothing.
        seed: Seed of every random draw.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    base: str
    tuned: tuple[str, ...] = Field(min_length=1)
    tuned_names: tuple[str, ...] = ()
    parent: str | None = None
    controls: tuple[str, ...] = ()
    replicates: dict[str, str] = {}
    prompts: str | None = None
    metric: str | None = None
    classifier: str | None = None
    measures: tuple[str, ...] = ()
    covariances: str = "auto"
    canonical: bool = False
    stages: tuple[Stage, ...] = ("decompose", "attribute")
    evaluate: dict[str, str] = {}
    chat: Literal["auto", "on", "off"] = "auto"
    nodes: str = "default"
    directions: tuple[str, ...] = ()
    edges: bool = False
    position: bool = False
    neurons: Literal["top", "all"] = "top"
    estimators: tuple[Estimator, ...] = Field(default=("first_order",), min_length=1)
    check_exact: int | None = Field(default=None, ge=1)
    check_nodes: int | None = Field(default=None, ge=1)
    check_prompts: int | None = Field(default=None, ge=1)
    select: str = ""
    study: str | None = None
    top: int | None = Field(default=None, ge=1)
    kept_parts: str = ""
    along: str = ""
    check_seconds: float = Field(default=60.0, gt=0)
    parts: bool = False
    circuits: bool = False
    keep: float = Field(default=0.9, gt=0, le=1)
    tasks: str | None = None
    scales: str = "-0.5:1.5:0.25"
    rest: Literal["base", "tuned"] = "base"
    draws: int = Field(default=3, ge=0)
    texts: str | None = None
    grid: str = "0,0.5,1"
    method: str = "task"
    density: float | None = Field(default=None, gt=0, le=1)
    places: Literal["matrix", "layer", "none"] = "matrix"
    skip_bad_lines: bool = False
    device: str = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        """The fine-tunes' names, one each and all different.

        Raises:
            StudyError: Names and fine-tunes differ in number, or two names are the same.
        """
        names = self.tuned_names or tuple(name_of(spec) for spec in self.tuned)
        if len(names) != len(self.tuned):
            raise StudyError(f"{len(self.tuned)} fine-tunes but {len(names)} names: {names}.")
        if len(set(names)) != len(names):
            raise StudyError(
                f"two fine-tunes are called the same: {names}.",
                hint="Give each a name with --tuned-name.",
            )
        return names

    @property
    def parent_name(self) -> str:
        """What tables call the parent; marked as such where a fine-tune has its name."""
        name = name_of(self.parent or "")
        return f"{name}-parent" if name in ("base", *self.names) else name

    @property
    def steps(self) -> tuple["Step", ...]:
        """The pairs of the study: base and fine-tune, or with a parent each step and the whole.

        Raises:
            StudyError: As for ``names``.
        """
        tuned = list(zip(self.tuned, self.names, strict=True))
        if self.parent is None:
            return tuple(Step(self.base, spec, "base", name) for spec, name in tuned)
        parent = self.parent_name
        steps = [Step(self.base, self.parent, "base", parent)]
        for spec, name in tuned:
            steps.append(Step(self.parent, spec, parent, name))
            steps.append(Step(self.base, spec, "base", name + WHOLE_WAY))
        return tuple(steps)

    @property
    def doses(self) -> tuple[float, ...]:
        """The doses that ``scales`` says, in order.

        Raises:
            StudyError: They cannot be read, or there is none.
        """
        return scales_in(self.scales)

    @property
    def is_whole(self) -> bool:
        """Whether a sweep lets in whole tuning vectors, rather than a part of each."""
        return not (self.select or self.top or self.kept_parts or self.along)

    @property
    def command(self) -> str:
        """The command line that runs this plan again."""
        alone = self.stages[0] if len(self.stages) == 1 else "compare"
        words = ["tvlens", alone if alone in ALONE else "compare", self.base, *self.tuned]
        unasked = NOT_OPTIONS | (set() if alone == "graft" else {"keep"})
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if name not in unasked and value != field.default:
                words += _written(OPTION_NAMES.get(name, name.replace("_", "-")), value)
        return shlex.join([*words, "--seed", str(self.seed), "--out", "DIR"])

    def with_sample(self, facts: Mapping[str, Any]) -> "StudyPlan":
        """The plan with the exact sample that was planned by time, so that a rerun repeats it."""
        if self.check_exact is not None or "check_count" not in facts:
            return self
        return self.model_copy(update={option: facts[fact] for option, fact in PLANNED.items()})

    def save(self, folder: Path) -> Path:
        """Write ``study.yaml``, whole or not at all."""
        path = folder / "study.yaml"
        write_whole(path, yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False))
        return path

    @classmethod
    def load(cls, path: Path) -> "StudyPlan":
        """Read a plan.

        Raises:
            StudyError: The file is missing, is not YAML, or holds an option that does not exist.
        """
        try:
            return cls.model_validate(yaml.safe_load(path.read_text("utf-8")))
        except OSError as error:
            raise StudyError(f"there is no study plan at {path}.") from error
        except (ValidationError, yaml.YAMLError) as error:
            raise StudyError(f"{path} is not a study plan: {error}") from error


MOST_SCALES = 1_000


def scales_in(text: str) -> tuple[float, ...]:
    """The numbers of ``first:last:step``, both ends included, or of a list with commas.

    Raises:
        StudyError: They cannot be read, or there is none.
    """
    try:
        numbers = [float(word) for word in text.replace(":", ",").split(",")]
    except ValueError:
        numbers = []
    found = numbers
    if ":" in text and len(numbers) == 3 and numbers[2]:
        first, last, step = numbers
        count = (last - first) / step
        steps = math.floor(count + 1e-6) + 1 if math.isfinite(count) else 0
        found = [round(first + place * step, 10) for place in range(min(steps, MOST_SCALES + 1))]
    elif ":" in text:
        found = []
    if not 0 < len(found) <= MOST_SCALES or not all(map(math.isfinite, found)):
        raise StudyError(
            f"the scales {text!r} cannot be read.",
            hint="Write first:last:step, such as -0.5:1.5:0.25, or numbers with commas.",
        )
    return tuple(dict.fromkeys(found))


def _written(option: str, value: object) -> list[str]:
    """An option as words: a flag alone, and once for each of several values."""
    if value is True:
        return [f"--{option}"]
    values = value if isinstance(value, tuple) else (value,)
    return [word for each in values for word in (f"--{option}", str(each))]


def name_of(spec: str) -> str:
    """The short name of a model specification: its last path part, or ``med`` of ``demo:med``."""
    return spec.rstrip("/").replace(":", "/").rpartition("/")[2] or spec
