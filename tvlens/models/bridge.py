"""TransformerBridge: a transformers model in TransformerLens's coat, its own weights inside."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from .hosts import Host, Kept, submodule

POST_NORMS = {"ln1_post": "ln1", "ln2_post": "ln2"}
"""What 3.9 calls the norms behind attention and MLP in a family that has none before them."""
TOKENS_OR_PLACES = ("embed", "pos_embed")


def bridge_host(bridge: Any) -> Host:
    """The host of a ``TransformerBridge``."""
    renamed = _renamed_norms(bridge)

    def kept(site: str) -> Mapping[str, Kept]:
        return dict(_kept(module(site), site))

    def module(site: str) -> nn.Module | None:
        return None if site in renamed.values() else _original(bridge, renamed.get(site, site))

    def logits(ids: Tensor, mask: Tensor) -> Tensor:
        return bridge(ids, attention_mask=mask, use_cache=False)

    points = ("hook_in", "hook_out")
    passages = {f"{site}.{p}": f"{own}.{p}" for site, own in renamed.items() for p in points}
    return Host(logits, kept, module, passages)


def _kept(module: nn.Module | None, site: str) -> Iterator[tuple[str, Kept]]:
    weight = None if module is None else module._parameters.get("weight")
    if module is None or weight is None:
        return
    matrix = weight.ndim == 2 and site not in TOKENS_OR_PLACES
    stored = "d_in d_out" if type(module).__name__ == "Conv1D" else "d_out d_in"
    yield "weight", Kept(module, "weight", stored if matrix else "")
    bias = module._parameters.get("bias")
    if bias is not None and not (site == "unembed" and not bias.any()):  # 3.9 puts zeros there
        yield "bias", Kept(module, "bias", "d_out" if matrix else "")


def _original(bridge: Any, site: str) -> nn.Module | None:
    """The transformers module that a site's forward pass runs."""
    found = getattr(submodule(bridge, site), "original_component", None)
    return found if isinstance(found, nn.Module) else None


def _renamed_norms(bridge: Any) -> dict[str, str]:
    """Sites by the names of 4.x and by those of 3.9: OLMo 2 has norms after its maps alone.

    3.9 calls them ``ln1`` and ``ln2``; the transformers module that they stand for says which
    they are.
    """
    first = submodule(bridge, "blocks.0.ln1")
    if submodule(bridge, "blocks.0.ln1_post") is not None or first is None:
        return {}
    if not str(getattr(first, "name", "")).startswith("post_"):
        return {}
    layers = range(bridge.cfg.n_layers)
    return {
        f"blocks.{i}.{new}": f"blocks.{i}.{old}" for i in layers for new, old in POST_NORMS.items()
    }
