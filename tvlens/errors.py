"""The exception tree.

TvlensError
├── CheckpointError            a file or folder cannot be read, or holds what no model should
│   └── UnsupportedFormatError  readable, but of a form tvlens does not read
├── IncomparableModelsError    two models whose difference means nothing
├── AdapterError               an adapter that does not fit its base
├── SelectionError             a selection that cannot be read, or that selects nothing
├── PromptError                a prompt file or a prompt
├── MetricError                a metric that cannot be computed as asked
├── ExtensionError             a classifier or measure of the user's own
├── HostError                  the hooked model lacks what an analysis needs
├── StudyError                 a study folder, its tables, or its options
└── BudgetError                more memory, time or disk than there is
"""


class TvlensError(Exception):
    """A request that cannot be met; the message says what, ``hint`` says what to do.

    Attributes:
        hint: One sentence with the way out, empty where there is none.
    """

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint

    def __str__(self) -> str:
        """The message, followed by the hint."""
        message = super().__str__()
        return f"{message} {self.hint}" if self.hint else message


class CheckpointError(TvlensError):
    """A checkpoint that cannot be read, or that holds NaN or Inf."""


class UnsupportedFormatError(CheckpointError):
    """A checkpoint whose format tvlens does not read."""


class IncomparableModelsError(TvlensError):
    """Two models whose weights cannot be subtracted meaningfully."""


class AdapterError(TvlensError):
    """An adapter whose modules or shapes do not fit the base model."""


class SelectionError(TvlensError):
    """A selection expression that cannot be read, or that selects nothing."""


class PromptError(TvlensError):
    """A prompt file with bad lines, or prompts that do not fit the request."""


class MetricError(TvlensError):
    """A metric that is unknown or needs what the prompts do not give."""


class ExtensionError(TvlensError):
    """A callable of the user's own that is not found, or does not give what it must."""


class HostError(TvlensError):
    """A hooked model that lacks a hook, a weight or a state that is needed."""


class StudyError(TvlensError):
    """A study folder that cannot be used as asked."""


class BudgetError(TvlensError):
    """A request that needs more memory, time or disk than there is."""
