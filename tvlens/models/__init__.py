"""Hooked models, prompts and metrics: the only place that sees TransformerLens."""

from .lens import LensModel
from .metrics import SHIPPED, Metric, Run, default_metric, resolve_metric
from .pair import HookedPair
from .prompts import Batch, Prompt, PromptSet, load_prompts, tokenised

__all__ = [
    "SHIPPED",
    "Batch",
    "HookedPair",
    "LensModel",
    "Metric",
    "Prompt",
    "PromptSet",
    "Run",
    "default_metric",
    "load_prompts",
    "resolve_metric",
    "tokenised",
]
