"""The weights that a hooked model computes with: this ring's one door to the host.

A TransformerLens bridge may compute with copies of the Hugging Face tensors (GPT-NeoX's query, key
and value) or with folded ones, so neither reading nor writing those tensors is enough. The
modules that the host really uses are known to the attribution ring, which is asked when it is
needed and not before.
"""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from jaxtyping import Float
from torch import Tensor

from tvlens.components import Component
from tvlens.errors import HostError

LiveWeights = Mapping[Component, Float[Tensor, "..."]]
FOLDING_CLASS = "HookedTransformer"


def is_hooked(model: Any) -> bool:
    """Whether ``model`` is TransformerLens's, or a ``LensModel`` around one."""
    return hasattr(model, "hook_dict") or hasattr(getattr(model, "model", None), "hook_dict")


def bridge_of(model: Any) -> Any:
    """The TransformerBridge of a hooked model.

    Raises:
        HostError: It is a HookedTransformer, whose weights are not those of a checkpoint.
    """
    bridge = model if hasattr(model, "hook_dict") else model.model
    if any(cls.__name__ == FOLDING_CLASS for cls in type(bridge).__mro__):
        raise HostError(
            "a HookedTransformer folds and centres its weights when it loads them, so they cannot "
            "be subtracted from a checkpoint's.",
            hint="Give the folder or the Hugging Face model it was made from, or "
            "TransformerBridge.boot_transformers(folder).",
        )
    return bridge


def live_weights(model: Any) -> LiveWeights:
    """Canonical views of the weights that the forward pass reads; writing to them changes it.

    Raises:
        HostError: It is a HookedTransformer.
    """
    return import_module("tvlens.attribution.sites").live_weights(bridge_of(model))
