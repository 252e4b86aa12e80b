"""A merge as a LoRA adapter: each changed matrix in two factors of a given rank.

The factors are the leading singular vectors, which are the nearest matrix of that rank (Eckart and
Young 1936); a change that already is a sum of adapters goes through QR of its factors and is never
written out. In the canonical orientation (``x @ W``) a change is ``left @ right``, and peft stores
``A = left.T`` and ``B = right.T``, for every kind of layer. ``lora_alpha`` is the rank, so that
nothing is scaled.

Norms and biases are no products, and a tied embedding has two uses of which an adapter would change
one: they stay the base's, and the manifest says how long their change was.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from einops import einsum, rearrange
from jaxtyping import Float32
from torch import Tensor

from tvlens.errors import StudyError
from tvlens.weights.delta import Absent, Delta, Dense, spectrum
from tvlens.weights.families.table import Place

from .combining import Merge, Rounding
from .manifest import AdapterRecord
from .shards import Content, bytes_of, write_file

PREFIX = "base_model.model."
CONV1D_TYPES = ("gpt2",)
"""Model types whose linear maps are stored the other way round (``fan_in_fan_out``)."""


class Factored(NamedTuple):
    """A matrix's change as an adapter holds it.

    Attributes:
        first: peft's A.
        second: peft's B.
        rounding: Length of the change and of what is lost, squared.
    """

    first: Float32[Tensor, "rank d_in"]
    second: Float32[Tensor, "d_out rank"]
    rounding: Rounding


def write_adapter(merge: Merge, folder: Path, rank: int, progress: Callable[[str], None]) -> Any:
    """Write adapter_config.json and adapter_model.safetensors into a folder.

    Raises:
        StudyError: The base's family has no table, or no matrix changes.
    """
    from .export import Made

    if not merge.layout.listed:
        raise StudyError(
            f"tvlens has no table for the family of {merge.base.base_name}, so it cannot tell "
            "which way round factors multiply.",
            hint="Write a checkpoint instead: leave --as-lora out.",
        )
    made = Made("adapter", "float32")
    contents: list[Content] = []
    modules: list[str] = []
    for tensor in _matrices(merge):
        delta = _whole(merge, tensor)
        if isinstance(delta, Absent):
            continue
        progress(f"factors of {tensor}")
        module = tensor.removesuffix(".weight")
        found = factored(delta, rank)
        made.rounding[tensor] = found.rounding
        modules.append(module)
        contents += _contents(module, found, embedding=tensor == merge.layout.embedding_tensor)
    if not modules:
        raise StudyError(
            f"no matrix of {merge.base.base_name} changes, so there is nothing for an adapter.",
            hint="Select other components, or write a checkpoint: leave --as-lora out.",
        )
    written = write_file(
        folder / "adapter_model.safetensors", contents, {"format": "pt"}, like=None
    )
    made.files["adapter_model.safetensors"] = written.sha256
    config = json.dumps(_config(merge, modules, rank), indent=2) + "\n"
    (folder / "adapter_config.json").write_text(config, encoding="utf-8")
    made.adapter = _record(merge, made.rounding, rank)
    return made


def factored(delta: Delta, rank: int) -> Factored:
    """The nearest change of a rank, its singular values halved between the factors.

    Where a matrix has fewer singular values than ``rank``, the rest of the factors is zero.
    """
    found = spectrum(delta)
    root = found.values[:rank].sqrt()
    left, right = found.left[:, :rank] * root, found.right[:rank]
    right = einsum(root, right, "k, k d_out -> k d_out")
    first = torch.zeros(rank, left.shape[0])
    second = torch.zeros(right.shape[1], rank)
    first[: len(root)] = rearrange(left, "d_in k -> k d_in").float()
    second[:, : len(root)] = rearrange(right, "k d_out -> d_out k").float()
    whole = float(found.values.square().sum())
    lost = float(found.values[rank:].square().sum())
    return Factored(first, second, Rounding(whole, lost))


def _matrices(merge: Merge) -> list[str]:
    """Checkpoint tensors that are linear maps or untied embeddings, each once."""
    tied = {merge.layout.embedding_tensor} if merge.layout.tied else set[str]()
    found = [
        place.tensor
        for component, place in merge.layout.places.items()
        if component.kind in ("matrix", "embedding") and place.part != "W_pos"
    ]
    return [tensor for tensor in dict.fromkeys(found) if tensor not in tied]


def _whole(merge: Merge, tensor: str) -> Delta:
    """The change of a checkpoint tensor, fused parts side by side, canonical orientation."""
    places = {p: c for c, p in merge.layout.places.items() if p.tensor == tensor}
    if len(places) == 1:
        return merge.delta(next(iter(places.values())))
    shape = merge.layout.stored_shapes[tensor]
    whole = torch.zeros(math.prod(shape))
    for span, change in merge.pieces(tensor, shape):
        whole[span] = change.float()
    place: Place = next(iter(places))
    matrix = whole.reshape(shape)
    if place.transposed:
        matrix = rearrange(matrix, "d_out d_in -> d_in d_out")
    return Dense(matrix) if bool(matrix.any()) else Absent(tuple(matrix.shape))


def _contents(module: str, found: Factored, *, embedding: bool) -> list[Content]:
    names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    end = "" if embedding else ".weight"
    return [
        Content(
            f"{PREFIX}{module}.{name}{end}",
            "F32",
            tuple(tensor.shape),
            tensor.numel() * 4,
            lambda tensor=tensor: bytes_of(tensor),
        )
        for name, tensor in zip(names, (found.first, found.second), strict=True)
    ]


def _config(merge: Merge, modules: list[str], rank: int) -> dict[str, Any]:
    kind = merge.base.base.config.get("model_type")
    return {
        "base_model_name_or_path": merge.base_spec or merge.base.base_name,
        "bias": "none",
        "fan_in_fan_out": kind in CONV1D_TYPES,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": modules,
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }


def _record(merge: Merge, roundings: dict[str, Rounding], rank: int) -> AdapterRecord:
    held = set(roundings)
    left_out: dict[str, float] = {}
    for component, place in merge.layout.places.items():
        if place.tensor not in held and (norm := merge.delta(component).norm()):
            left_out[str(component)] = norm
    total = sum(roundings.values(), Rounding())
    missing = math.fsum(norm**2 for norm in left_out.values())
    whole = total.change + missing
    return AdapterRecord(
        rank=rank,
        relative_error=total.relative,
        by_tensor={name: found.relative for name, found in roundings.items()},
        left_out=left_out,
        left_out_share_of_squared_norm=missing / whole if whole else 0.0,
    )
