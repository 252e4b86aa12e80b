"""GGUF files of tiny models, written as llama.cpp's converter writes them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

WIDE = {"hidden_size": 64, "intermediate_size": 96}
"""Rows of whole blocks of 32."""
WIDER = {"hidden_size": 256, "intermediate_size": 256}
"""Rows of whole blocks of 256, which K-types need."""
K_TYPES = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k")
ARCHITECTURES = {"gemma2": "gemma2", "llama": "llama", "qwen2": "qwen2", "gpt2": "gpt2"}


def write_gguf(
    folder: Path,
    path: Path,
    kind: str = "q8_0",
    *,
    edit: Callable[[str, np.ndarray], np.ndarray] = lambda name, values: values,
    settings: Mapping[str, Any] | None = None,
    tokens: list[str] | None = None,
) -> Path:
    """A checkpoint of one safetensors file as GGUF; vectors stay float32, as in llama.cpp.

    ``edit`` changes tensors by their checkpoint names before they are quantised; random blocks
    take the place of K-types, which gguf does not quantise to.
    """
    import json

    from gguf import MODEL_ARCH_NAMES, GGUFWriter, get_tensor_name_map

    config = json.loads((folder / "config.json").read_text())
    architecture = ARCHITECTURES[config["model_type"]]
    arch = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == architecture)
    layers = config.get("num_hidden_layers") or config["n_layer"]
    names = get_tensor_name_map(arch, layers)
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = GGUFWriter(path, architecture)
    _add_settings(writer, config, layers, dict(settings or {}))
    if tokens is not None:
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(tokens)
        writer.add_token_types([1] * len(tokens))
        writer.add_token_merges([])
    for name, tensor in load_file(folder / "model.safetensors").items():
        stem, _, suffix = name.rpartition(".")
        found = names.get_name(stem) or names.get_name(stem.removeprefix("transformer."))
        values = edit(name, tensor.float().numpy())
        stored = np.ascontiguousarray(_as_llama_cpp(values, f"{found}.{suffix}", config))
        _add(writer, f"{found}.{suffix}", stored, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random_blocks(rows: int, width: int, kind: str, seed: int = 0) -> np.ndarray:
    """Rows of random bytes whose float16 scales are numbers of a weight's size."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    entries, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind.upper()]]
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (rows * width // entries, size), dtype=np.uint8)
    for place in HALVES[kind]:
        scales = rng.uniform(1e-3, 5e-3, len(blocks)).astype(np.float16)
        blocks[:, place : place + 2] = scales.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(rows, -1)


HALVES = {
    "q4_0": [0], "q4_1": [0, 2], "q5_0": [0], "q5_1": [0, 2], "q8_0": [0],
    "q2_k": [80, 82], "q3_k": [108], "q4_k": [0, 2], "q5_k": [0, 2], "q6_k": [208],
}  # fmt: skip
"""Bytes of a block where its float16 scales begin."""


def _add(writer: Any, name: str, values: np.ndarray, kind: str) -> None:
    from gguf import GGMLQuantizationType, quantize

    if values.ndim < 2 or kind == "f32":
        writer.add_tensor(name, values.astype(np.float32))
        return
    number = GGMLQuantizationType[kind.upper()]
    if kind in K_TYPES:
        blocks = random_blocks(*values.shape, kind, seed=len(name))
    else:
        blocks = quantize(values.astype(np.float32), number)
    writer.add_tensor(name, blocks, raw_dtype=number)


def _add_settings(writer: Any, config: dict[str, Any], layers: int, more: dict[str, Any]) -> None:
    width = config.get("hidden_size") or config["n_embd"]
    heads = config.get("num_attention_heads") or config["n_head"]
    writer.add_block_count(layers)
    writer.add_embedding_length(width)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads", heads))
    writer.add_context_length(config.get("max_position_embeddings") or config["n_positions"])
    writer.add_feed_forward_length(config.get("intermediate_size") or config["n_inner"])
    writer.add_vocab_size(config["vocab_size"])
    if "rms_norm_eps" in config:
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
        writer.add_rope_freq_base((config.get("rope_parameters") or {}).get("rope_theta", 10000.0))
        if config["model_type"] != "qwen2":
            head_dim = config.get("head_dim") or width // heads
            writer.add_key_length(head_dim)
            writer.add_value_length(head_dim)
            writer.add_rope_dimension_count(head_dim)
    else:
        writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    for key, value in more.items():
        writer.add_uint32(key, value)


def _as_llama_cpp(values: np.ndarray, name: str, config: dict[str, Any]) -> np.ndarray:
    """What convert_hf_to_gguf.py does to a tensor's values."""
    kind = config["model_type"]
    if kind == "llama" and (".attn_q." in name or ".attn_k." in name):
        heads = config["num_attention_heads" if ".attn_q." in name else "num_key_value_heads"]
        paired = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
        return paired.swapaxes(1, 2).reshape(values.shape)
    if kind == "gemma2" and name.endswith("norm.weight"):
        return values + 1
    if kind == "gpt2" and name.startswith("blk") and values.ndim == 2:
        return values.T
    return values


def loaded_by_transformers(path: Path) -> dict[str, torch.Tensor]:
    """The state dict that transformers makes of a GGUF file."""
    from transformers import AutoModelForCausalLM, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    return model.state_dict()
