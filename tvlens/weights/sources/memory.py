"""Models in memory as sources: their own tensors, read one at a time and never changed.

Opening one copies nothing; reading gives a copy of one tensor on the CPU, so that what is made of
it neither follows later training nor reaches back. Read are

* a transformers model: its state dict;
* a peft model: the factors of its active adapter, and what that adapter stores whole; as a base,
  the model under the adapter, read without the factors that peft put into it;
* a TransformerLens bridge: the Hugging Face tensors it was built on, after a check that they are
  the weights it computes with (nothing folded, nothing trained in a copy);
* a HookedTransformer: its own tensors, if nothing was folded or centred when they were loaded.

No class of those libraries is imported: a model is told by what it has.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from tvlens.errors import AdapterError, CheckpointError, HostError, UnsupportedFormatError
from tvlens.weights.families import hooked_transformer
from tvlens.weights.hooked import host_of, is_hooked, live_weights
from tvlens.weights.layout import Layout, layout_of

from .adapter import PREFIX, adapter_of
from .folder import Source, TensorInfo

FILE = "memory"
"""What reports call the file of a tensor in memory."""
BRIDGED = "._original_component"
INJECTED = (".base_layer.", ".original_module.")
"""What peft puts into the names of the weights under its layers."""
PEFT_OWN = (".lora_", ".modules_to_save.")
PROCESSED = ("compatibility_mode", "_weights_processed")
"""What a bridge sets when it folds or centres its weights, the Hugging Face tensors included."""
_SAVE = "Save it with save_pretrained() and give the folder."


@dataclass(frozen=True, eq=False)
class MemorySource(Source):
    """A model in memory, read like a folder.

    Attributes:
        module: The model that was given.
        live: Its tensors by the names that a checkpoint of it has; the model's own.
        beneath: The model that an adapter in memory is attached to, None for a full model.
    """

    module: Any = field(kw_only=True, repr=False)
    live: Mapping[str, Tensor] = field(kw_only=True, repr=False)
    beneath: "MemorySource | None" = field(default=None, kw_only=True, repr=False)

    @property
    def has_factors_inside(self) -> bool:
        """Whether peft has put factors into a model that is read without them."""
        return not self.is_adapter and any(True for _ in _layers(self.module))

    def read(self, name: str) -> Shaped[Tensor, "..."]:
        """A copy of one tensor in its own dtype, on the CPU.

        Raises:
            CheckpointError: There is no such tensor.
        """
        self._info(name)
        return self.live[name].detach().to("cpu", copy=True).reshape(self.tensors[name].shape)

    def read_rows(self, name: str, start: int, stop: int) -> Shaped[Tensor, "..."]:
        """A copy of rows ``start`` to ``stop`` of one tensor.

        Raises:
            CheckpointError: There is no such tensor.
        """
        self._info(name)
        rows = self.live[name].detach()[start:stop].to("cpu", copy=True)
        return rows.reshape(len(rows), *self.tensors[name].shape[1:])

    def sha256(self) -> dict[str, str]:
        """The digest of the config and one over names, dtypes, shapes and bytes of all tensors."""
        tensors = hashlib.sha256()
        for name in sorted(self.tensors):
            info = self.tensors[name]
            tensors.update(f"{name} {info.dtype} {list(info.shape)}\n".encode())
            tensors.update(_bytes(self.read(name)))
        config = json.dumps(self.config, sort_keys=True, default=str).encode()
        return {"config.json": hashlib.sha256(config).hexdigest(), FILE: tensors.hexdigest()}


def open_model(model: Any) -> MemorySource:
    """The source of a model in memory.

    Raises:
        CheckpointError: Its tensors are not in memory, or it has no config.
        UnsupportedFormatError: Quantised weights, or an adapter that is more than factors.
        HostError: A hooked model whose weights are not those of a checkpoint.
        AdapterError: An adapter that is merged, disabled, or not the only active one.
    """
    if is_hooked(model):
        host = host_of(model)
        return _of_bridge(host) if hasattr(host, "original_model") else _of_own_weights(host)
    if not isinstance(model, nn.Module):
        raise CheckpointError(
            f"expected a folder, a name or a model, got {type(model).__name__}.",
            hint="Give a checkpoint folder, org/model, demo:base, or a transformers model.",
        )
    is_peft = hasattr(model, "peft_config") and hasattr(model, "get_base_model")
    return _of_adapter(model) if is_peft else _of_module(model)


def _of_module(model: nn.Module) -> MemorySource:
    """A transformers model; factors that peft put into it are left out."""
    live = dict(model.state_dict(keep_vars=True))
    if any(BRIDGED in name for name in live):
        raise HostError(
            f"the weights of this {type(model).__name__} belong to a TransformerBridge.",
            hint="Give the bridge itself.",
        )
    _refuse_merged(model)
    cleaned = {_cleaned(n): t for n, t in live.items() if not any(p in n for p in PEFT_OWN)}
    return _source(model, _config(model), cleaned)


def _of_bridge(bridge: Any) -> MemorySource:
    for flag in PROCESSED:
        if getattr(bridge, flag, False):
            raise _other_weights("its weights were processed")
    module = bridge.original_model
    config = _config(module)
    layout = layout_of(config)
    known = {*layout.stored_shapes, layout.unembedding_tensor}
    live: dict[str, Tensor] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        plain = name.replace(BRIDGED, "")
        if layout.canonical_name(plain) in known:
            live.setdefault(plain, tensor)
    source = _source(bridge, config, live)
    _refuse_processed(source, layout)
    return source


def _of_own_weights(model: Any) -> MemorySource:
    """A hooked model without a transformers model inside, under the names of its own table.

    Its ``live`` tensors may have heads as an axis of their own.
    """
    weights = live_weights(model)
    config = hooked_transformer.config_of(model.cfg)
    layout = layout_of(config)
    live: dict[str, Tensor] = {}
    tensors: dict[str, TensorInfo] = {}
    for component, place in layout.places.items():
        live[place.tensor] = weights[component].mT if place.transposed else weights[component]
        dtype = str(live[place.tensor].dtype).removeprefix("torch.")
        tensors[place.tensor] = TensorInfo(dtype, layout.stored_shapes[place.tensor], FILE)
    folder, name = _origin(model, config, is_adapter=False)
    return MemorySource(name, folder, config, tensors, False, module=model, live=live)


def _of_adapter(model: nn.Module) -> MemorySource:
    active = _active_adapter(model)
    _refuse_merged(model)
    config = _adapter_config(model, active)
    own = re.compile(rf"(\.(lora_\w+|modules_to_save))\.{re.escape(active)}(?=\.|$)")
    live = {
        own.sub(r"\1.default", name): tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if own.search(name)
    }
    beneath = _of_base_of_adapter(model)
    source = _source(model, config, live, is_adapter=True, beneath=beneath)
    _refuse_other_scaling(model, active, source)
    return source


def _of_base_of_adapter(model: Any) -> MemorySource:
    module = model.get_base_model()
    live = dict(module.state_dict(keep_vars=True))
    cleaned = {_cleaned(n): t for n, t in live.items() if not any(p in n for p in PEFT_OWN)}
    return _source(module, _config(module), cleaned)


def _source(
    model: nn.Module,
    config: dict[str, Any],
    live: dict[str, Tensor],
    *,
    is_adapter: bool = False,
    beneath: MemorySource | None = None,
) -> MemorySource:
    for name, tensor in live.items():
        if tensor.is_meta:
            raise CheckpointError(
                f"{name} of this {type(model).__name__} is not in memory (device meta).",
                hint="Load the model without offloading it, or give its folder.",
            )
    folder, name = _origin(model, config, is_adapter)
    tensors = {name: _info(tensor) for name, tensor in live.items()}
    return MemorySource(
        name, folder, config, tensors, is_adapter, module=model, live=live, beneath=beneath
    )


def _origin(model: Any, config: Mapping[str, Any], is_adapter: bool) -> tuple[Path, str]:
    """Where it says it was loaded from, for its tokenizer, and what reports call it."""
    stated = "" if is_adapter else str(getattr(getattr(model, "config", None), "name_or_path", ""))
    kind = type(model).__name__
    if stated and Path(stated).is_dir():
        return Path(stated), f"{Path(stated).resolve().name} in memory"
    return Path(f"<{kind} in memory>"), f"{kind} in memory"


def _info(tensor: Tensor) -> TensorInfo:
    return TensorInfo(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), FILE)


def _config(model: Any) -> dict[str, Any]:
    """The config as save_pretrained() would write it."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_json_string"):
        raise CheckpointError(
            f"this {type(model).__name__} has no config, so its tensors cannot be named.",
            hint="Give a transformers model, a PeftModel, a TransformerBridge, or a folder.",
        )
    found = json.loads(config.to_json_string(use_diff=True))
    if quantisation := found.get("quantization_config"):
        raise UnsupportedFormatError(
            f"this {type(model).__name__} holds quantised weights ({quantisation}).",
            hint="Load it in float32, float16 or bfloat16.",
        )
    return found


def _cleaned(name: str) -> str:
    for part in INJECTED:
        name = name.replace(part, ".")
    return name


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """peft's layers by their names in the base."""
    for name, module in model.named_modules():
        if hasattr(module, "merged_adapters"):
            yield name.removeprefix(PREFIX), module


def _refuse_merged(model: nn.Module) -> None:
    for name, layer in _layers(model):
        if layer.merged_adapters:
            raise AdapterError(
                f"the adapter is merged into {name}, whose base weights are gone.",
                hint="Call unmerge_adapter() first, or give the base and the merged model.",
            )


def _active_adapter(model: Any) -> str:
    active = list(model.active_adapters)
    disabled = [name for name, layer in _layers(model) if layer.disable_adapters]
    if len(active) != 1 or disabled:
        state = f"{len(active)} active adapters" if not disabled else "a disabled adapter"
        raise AdapterError(
            f"this {type(model).__name__} has {state}; a tuning vector needs one that acts.",
            hint="Call set_adapter(name), or enable_adapter_layers().",
        )
    return str(active[0])


def _adapter_config(model: Any, active: str) -> dict[str, Any]:
    found = {k: _as_saved(v) for k, v in model.peft_config[active].to_dict().items()}
    for entry, nothing in (("bias", "none"), ("trainable_token_indices", None)):
        if found.get(entry, nothing) not in (nothing, {}, []):
            raise UnsupportedFormatError(
                f"the adapter {active!r} also trains weights of the base in place ({entry} is "
                f"{found[entry]!r}).",
                hint=_SAVE,
            )
    return found


def _as_saved(entry: Any) -> Any:
    """An entry of an adapter's config as adapter_config.json would hold it."""
    return sorted(entry) if isinstance(entry, set) else getattr(entry, "value", entry)


def _refuse_other_scaling(model: nn.Module, active: str, source: MemorySource) -> None:
    """The scale in memory can be set at any time; the config's alpha and rank must agree."""
    factors = adapter_of(source).factors
    for name, layer in _layers(model):
        scaling, entry = getattr(layer, "scaling", {}).get(active), factors.get(f"{name}.weight")
        if scaling is None or entry is None:
            continue
        if not math.isclose(scaling, entry.scaling, rel_tol=1e-9):
            raise AdapterError(
                f"{name} is scaled by {scaling:g} in memory; the adapter's config says "
                f"{entry.scaling:g}.",
                hint="Reset the scale, and scale the tuning vector instead.",
            )


def _refuse_processed(source: MemorySource, layout: Layout) -> None:
    """What the bridge computes with must be the Hugging Face tensors."""
    live = live_weights(source.module)
    names = {layout.canonical_name(stored): stored for stored in source.live}
    for component, place in layout.places.items():
        if component not in live or place.tensor not in names:
            continue
        stored = source.read(names[place.tensor]).float()
        expected = layout.canonical(stored.reshape(layout.stored_shapes[place.tensor]), place)
        if not torch.equal(live[component].detach().cpu().float(), expected):
            raise _other_weights(f"{component} differs")


def _other_weights(reason: str) -> HostError:
    return HostError(
        f"the bridge computes with other weights than its checkpoint's ({reason}): they were "
        "folded, centred, or trained in the bridge.",
        hint="Build the bridge anew from the folder, without enable_compatibility_mode().",
    )


def _bytes(tensor: Shaped[Tensor, "..."]) -> memoryview:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data
