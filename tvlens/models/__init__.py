"""Hooked models, prompts and metrics: the only place that sees TransformerLens."""

from .lens import LensModel
from .metrics import SHIPPED, Metric, Run, default_metric, resolve_metric
from .pair import HookedPair
from .prompts import Batch, Prompt, PromptSet, load_prompts, load_texts, tokenised

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
    "load_texts",
    "resolve_metric",
    "tokenised",
]
