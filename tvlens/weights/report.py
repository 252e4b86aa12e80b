"""What became of every tensor of both checkpoints."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeVar

from tvlens.errors import TvlensError

Status = Literal[
    "compared",
    "renamed",
    "reshaped",
    "tied",
    "aligned",
    "only_in_base",
    "only_in_tuned",
    "untouched_by_adapter",
    "buffer",
    "refused",
]
Effect = Literal["refused", "function", "note"]
AnyTvlensError = TypeVar("AnyTvlensError", bound=TvlensError)


@dataclass
class TensorMatch:
    """The fate of one tensor, or of two that belong together.

    Attributes:
        base: Stored name in the base, None where it has none.
        tuned: Stored name in the tuned checkpoint, None where it has none.
        status: What was done with it.
        reason: Why, empty where the status says it all.
        equal_fraction: Share of entries that are equal, None where nothing was compared.
    """

    base: str | None
    tuned: str | None
    status: Status
    reason: str = ""
    equal_fraction: float | None = None


@dataclass(frozen=True)
class ConfigDifference:
    """A config entry that differs.

    Attributes:
        field: Its name.
        base: Value of the base.
        tuned: Value of the tuned model.
        effect: ``refused`` (no comparison), ``function`` (equal weights would still compute
            something else) or ``note``.
    """

    field: str
    base: Any
    tuned: Any
    effect: Effect


@dataclass(frozen=True)
class SameFunction:
    """Whether two models with different weights compute the same.

    Attributes:
        value: True where a change of coordinates makes the weights equal up to rounding, False
            where none that tvlens knows does, None where it was not judged.
        by: What the change consists of: permutation, gain, scale, rotation; empty for none.
        residual: |aligned tuned - base| / |base| over the tensors that were compared: all that
            differ, or those of the first block that shows that the models are different.
        reason: Why it is not so or was not judged; empty where it is so.
    """

    value: bool | None
    by: tuple[str, ...] = ()
    residual: float | None = None
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The entry of load_report.json."""
        return {**asdict(self), "by": list(self.by)}


@dataclass
class LoadReport:
    """The account of a pair.

    Attributes:
        tensors: One entry for every stored tensor of both checkpoints.
        config_differences: Every config entry that differs and could matter.
        warnings: Sentences for people.
        vocabulary: How embedding rows were matched, None for an adapter; ``sentence`` says it.
        identical: No weight and no function-changing config entry differs; None if the
            contents were not read.
        same_function: Whether the models compute the same, as far as their weights tell.
    """

    tensors: list[TensorMatch] = field(default_factory=list)
    config_differences: list[ConfigDifference] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    vocabulary: dict[str, Any] | None = None
    identical: bool | None = None
    same_function: SameFunction = field(
        default_factory=lambda: SameFunction(None, reason="the contents were not read")
    )

    @property
    def refused(self) -> list[TensorMatch]:
        """The tensors that no analysis covers."""
        return [match for match in self.tensors if match.status == "refused"]

    @property
    def counts(self) -> dict[str, int]:
        """Number of entries by status, in order of appearance."""
        found: dict[str, int] = {}
        for match in self.tensors:
            found[match.status] = found.get(match.status, 0) + 1
        return found

    def to_dict(self) -> dict[str, Any]:
        """The report as load_report.json holds it."""
        return {
            "tensors": [asdict(match) for match in self.tensors],
            "config_differences": [asdict(difference) for difference in self.config_differences],
            "warnings": list(self.warnings),
            "vocabulary": self.vocabulary,
            "identical": self.identical,
            "same_function": self.same_function.to_dict(),
        }


def with_report(error: AnyTvlensError, report: LoadReport) -> AnyTvlensError:
    """The error, carrying the report as ``error.report`` for whoever writes load_report.json."""
    vars(error)["report"] = report
    return error
