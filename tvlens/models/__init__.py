"""Hooked models, prompts and metrics: the only place that sees TransformerLens."""

from .covariances import Covariances, covariances
from .lens import LensModel
from .metrics import SHIPPED, Metric, Run, default_metric, resolve_metric
from .pair import HookedPair
from .prompts import Batch, Prompt, PromptSet, load_prompts, load_texts, tokenised

__all__ = [
    "SHIPPED",
    "Batch",
    "Covariances",
    "HookedPair",
    "LensModel",
    "Metric",
    "Prompt",
    "PromptSet",
    "Run",
    "covariances",
    "default_metric",
    "load_prompts",
    "load_texts",
    "resolve_metric",
    "tokenised",
]
