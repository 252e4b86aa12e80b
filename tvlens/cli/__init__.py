"""The command line: thin commands over the Python functions, one sentence per error.

Exit status: 0 done; 2 the request cannot be met; 3 it ran and the verdict is negative;
130 interrupted; 1 a bug. A module here holds related commands; importing it adds them to ``app``.
"""

from . import combining, comparing, inspecting, measuring, merging, vectors
from .application import app, main
from .summaries import study_summary

__all__ = [
    "app",
    "combining",
    "comparing",
    "inspecting",
    "main",
    "measuring",
    "merging",
    "study_summary",
    "vectors",
]
