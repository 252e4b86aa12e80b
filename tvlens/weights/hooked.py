"""The weights that a hooked model computes with: this ring's one door to the host.

A TransformerLens bridge may compute with copies of the Hugging Face tensors (GPT-NeoX's query, key
and value) or with folded ones, and a HookedTransformer has tensors of its own, so neither reading
nor writing a checkpoint's tensors is enough. The modules that the host really uses are known to
the attribution ring, which is asked when it is needed and not before.
"""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from jaxtyping import Float
from torch import Tensor

from tvlens.components import Component

LiveWeights = Mapping[Component, Float[Tensor, "..."]]


def is_hooked(model: Any) -> bool:
    """Whether ``model`` is TransformerLens's, or a ``LensModel`` around one."""
    return hasattr(model, "hook_dict") or hasattr(getattr(model, "model", None), "hook_dict")


def host_of(model: Any) -> Any:
    """TransformerLens's own object of a hooked model."""
    return model if hasattr(model, "hook_dict") else model.model


def live_weights(model: Any) -> LiveWeights:
    """Views of the weights that the forward pass reads; writing to them changes it.

    Their entries are in canonical order; heads may be an axis of their own.

    Raises:
        HostError: They were folded or centred when they were loaded.
    """
    return import_module("tvlens.attribution.sites").live_weights(host_of(model))
