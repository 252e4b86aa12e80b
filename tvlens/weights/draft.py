"""A pair in the making: what the steps of matching read and fill."""

from dataclasses import dataclass, field

from tvlens.errors import TvlensError

from .layout import Layout
from .report import LoadReport, Status, TensorMatch
from .sources.adapter import Adapter
from .sources.folder import Source
from .vocabulary import RowMatch


@dataclass
class Draft:
    """Two sources, the layout they share so far, and the report on them so far.

    Attributes:
        base: The base's files.
        tuned: The tuned model's or adapter's files.
        layouts: The layouts of base and tuned as their configs have them.
        layout: The layout of both; ties and vocabulary are settled on the way.
        report: An entry for every tensor that has been dealt with.
        base_tensors: Stored name by the family's name.
        tuned_tensors: The same for the tuned checkpoint.
        adapter: The adapter's changes, None for a full checkpoint.
        ties: Whether base and tuned tie W_U to W_E.
        rows: Which embedding rows belong together, None until that is settled.
        misfits: What is wrong with single tensors; raised once all are in the report.
        peek: Nothing but headers and a few rows may be read.
    """

    base: Source
    tuned: Source
    layouts: tuple[Layout, Layout]
    layout: Layout
    report: LoadReport = field(default_factory=LoadReport)
    base_tensors: dict[str, str] = field(default_factory=dict)
    tuned_tensors: dict[str, str] = field(default_factory=dict)
    adapter: Adapter | None = None
    ties: tuple[bool, bool] = (False, False)
    rows: RowMatch | None = None
    misfits: list[TvlensError] = field(default_factory=list)
    peek: bool = False

    def note(
        self, base: str | None, tuned: str | None, status: Status, reason: str = ""
    ) -> TensorMatch:
        """Add an entry to the report."""
        entry = TensorMatch(base, tuned, status, reason)
        self.report.tensors.append(entry)
        return entry

    @property
    def sides(self) -> tuple[tuple[Source, dict[str, str]], tuple[Source, dict[str, str]]]:
        """Base and tuned, each with its names."""
        return (self.base, self.base_tensors), (self.tuned, self.tuned_tensors)

    @property
    def embedding(self) -> str:
        """Checkpoint name of W_E."""
        return self.layout.embedding_tensor

    @property
    def unembedding(self) -> str:
        """Checkpoint name of W_U where it is stored."""
        return self.layout.unembedding_tensor

    def warn(self, sentence: str) -> None:
        """Add a warning to the report."""
        self.report.warnings.append(sentence)

    def note_tie(self) -> None:
        """Say that W_U is W_E where neither checkpoint stores it."""
        stored = any(self.unembedding in names for _, names in self.sides)
        if self.layout.tied and self.unembedding and not stored:
            self.note(None, None, "tied", f"{self.unembedding} is {self.embedding}, stored once")
