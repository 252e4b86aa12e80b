"""tvlens: what did fine-tuning do to this model?

    import tvlens as tv

    pair = tv.load_pair("demo:base", "demo:med")        # lazy; pair.load_report
    study = tv.compare(pair, tv.prompts("demo:med"))    # everything

Names are loaded when first used: ``import tvlens`` loads neither torch nor TransformerLens.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .components import Component
from .errors import TvlensError

if TYPE_CHECKING:
    from .attribution.asking import attribute, graft, patch
    from .compose.combining import merge
    from .compose.interference import interference
    from .geometry.classify import classify
    from .geometry.decompose import decompose
    from .models.anchors import anchor
    from .models.covariances import covariances
    from .models.metrics import Metric
    from .models.pair import HookedPair
    from .models.prompts import load_prompts as prompts
    from .reporting.report import render_report
    from .study.plan import StudyPlan
    from .study.runner import compare, run_study
    from .study.store import Study
    from .tables import Table
    from .weights.matching import Pair, load_pair
    from .weights.vector import TuningVector, tuning_vector

_HOMES = {
    "HookedPair": ("models.pair", "HookedPair"),
    "Metric": ("models.metrics", "Metric"),
    "Pair": ("weights.matching", "Pair"),
    "Study": ("study.store", "Study"),
    "StudyPlan": ("study.plan", "StudyPlan"),
    "Table": ("tables", "Table"),
    "TuningVector": ("weights.vector", "TuningVector"),
    "anchor": ("models.anchors", "anchor"),
    "attribute": ("attribution.asking", "attribute"),
    "classify": ("geometry.classify", "classify"),
    "compare": ("study.runner", "compare"),
    "covariances": ("models.covariances", "covariances"),
    "decompose": ("geometry.decompose", "decompose"),
    "graft": ("attribution.asking", "graft"),
    "interference": ("compose.interference", "interference"),
    "load_pair": ("weights.matching", "load_pair"),
    "merge": ("compose.combining", "merge"),
    "patch": ("attribution.asking", "patch"),
    "prompts": ("models.prompts", "load_prompts"),
    "render_report": ("reporting.report", "render_report"),
    "run_study": ("study.runner", "run_study"),
    "tuning_vector": ("weights.vector", "tuning_vector"),
}
"""Public name -> the module that holds it and its name there."""

__all__ = [
    "Component",
    "HookedPair",
    "Metric",
    "Pair",
    "Study",
    "StudyPlan",
    "Table",
    "TuningVector",
    "TvlensError",
    "anchor",
    "attribute",
    "classify",
    "compare",
    "covariances",
    "decompose",
    "graft",
    "interference",
    "load_pair",
    "merge",
    "patch",
    "prompts",
    "render_report",
    "run_study",
    "tuning_vector",
]


def __getattr__(name: str) -> Any:
    """Load a public name from its module at first use (PEP 562)."""
    if name == "__version__":
        from importlib.metadata import version

        return version(__package__ or "tvlens")
    if name not in _HOMES:
        raise AttributeError(f"tvlens has no {name!r}; it has {', '.join(__all__)}.")
    module, attribute = _HOMES[name]
    value = getattr(import_module(f".{module}", __name__), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names."""
    return list(__all__)
