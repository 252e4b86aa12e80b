"""What a stage of a study gives to the runner."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tvlens.tables import Table

if TYPE_CHECKING:
    from torch import Tensor

    from tvlens.attribution.positions import PositionSeries

Progress = Callable[[str], None]


@dataclass(frozen=True)
class StageOutput:
    """What a stage made.

    Attributes:
        tables: To be written whole.
        facts: Small JSON values for the manifest.
        warnings: Sentences for the person who reads the result.
        vectors: Tensors that a table names, by the table's name, to be written beside it.
        positions: Scores by position, to be moved into the study; None for a stage without any.
    """

    tables: tuple[Table, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    vectors: Mapping[str, Mapping[str, "Tensor"]] = field(default_factory=dict)
    positions: "tuple[PositionSeries, ...] | None" = None


Outputs = Iterator[tuple[str, StageOutput]]
"""What a stage makes, each under the name of the fine-tune that it belongs to."""
