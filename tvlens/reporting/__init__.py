"""Tables -> one offline HTML page."""

from .report import render_report

__all__ = ["render_report"]
