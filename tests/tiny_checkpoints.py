"""Tiny random checkpoints in which nothing is an identity: norms and biases are randomised."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 64}


GROUPED = {**SMALL, "num_key_value_heads": 2, "intermediate_size": 48}
"""Llama and its descendants: 4 query heads over 2 kv heads."""


def tiny_llama(folder: Path, seed: int = 0, **config: Any) -> Path:
    """A Llama with 4 query and 2 kv heads; ``tie_word_embeddings=True`` ties it."""
    return _grouped("LlamaConfig", folder, seed, **config)


def tiny_mistral(folder: Path, seed: int = 0, **config: Any) -> Path:
    """A Mistral: a Llama with a sliding window in every block."""
    return _grouped("MistralConfig", folder, seed, **{"sliding_window": 5, **config})


def tiny_qwen2(folder: Path, seed: int = 0, **config: Any) -> Path:
    """A Qwen2: a Llama with biases on query, key and value."""
    return _grouped("Qwen2Config", folder, seed, **config)


def tiny_qwen3(folder: Path, seed: int = 0, **config: Any) -> Path:
    """A Qwen3: heads wider than d_model / n_heads, queries and keys normalised per head."""
    return _grouped("Qwen3Config", folder, seed, **{"head_dim": 12, **config})


def tiny_gemma2(folder: Path, seed: int = 0, **config: Any) -> Path:
    """A Gemma 2: post norms, gains stored as 1 + w, soft caps, a window in the first block."""
    return _grouped("Gemma2Config", folder, seed, **{**GEMMA, **config})


def tiny_gemma3(folder: Path, seed: int = 0, **config: Any) -> Path:
    """A Gemma 3 text model: a Gemma 2 that normalises queries and keys and caps nothing."""
    return _grouped("Gemma3TextConfig", folder, seed, **{**GEMMA, **config})


def tiny_phi3(folder: Path, seed: int = 0, **config: Any) -> Path:
    """A Phi-3: fused query-key-value of unequal widths, fused gate and up."""
    return _grouped("Phi3Config", folder, seed, **config)


def tiny_olmo2(folder: Path, seed: int = 0, **config: Any) -> Path:
    """An OLMo 2: post norms only, queries and keys normalised over the whole projection."""
    return _grouped("Olmo2Config", folder, seed, **config)


GEMMA = {
    "head_dim": 12,
    "query_pre_attn_scalar": 10,
    "sliding_window": 5,
    "layer_types": ["sliding_attention", "full_attention"],
}


def tiny_gpt2(folder: Path, seed: int = 0, **config: Any) -> Path:
    """A GPT-2: tied, learned positions, fused query-key-value in ``Conv1D``."""
    from transformers import GPT2Config

    numbers = {"n_layer": 2, "n_embd": 32, "n_head": 4, "n_inner": 48, "vocab_size": 64, **config}
    return _saved(GPT2Config(**{"n_positions": 64, **_with_ids(numbers)}), folder, seed)


def tiny_neox(folder: Path, seed: int = 0, **config: Any) -> Path:
    """A GPT-NeoX: untied, parallel attention and MLP, query-key-value interleaved per head."""
    from transformers import GPTNeoXConfig

    numbers = {**SMALL, "intermediate_size": 48, **config}
    return _saved(GPTNeoXConfig(max_position_embeddings=64, **_with_ids(numbers)), folder, seed)


FAMILIES: dict[str, Callable[..., Path]] = {
    "llama": tiny_llama,
    "mistral": tiny_mistral,
    "qwen2": tiny_qwen2,
    "qwen3": tiny_qwen3,
    "gemma2": tiny_gemma2,
    "gemma3": tiny_gemma3,
    "phi3": tiny_phi3,
    "olmo2": tiny_olmo2,
    "gpt2": tiny_gpt2,
    "neox": tiny_neox,
}
"""Makers of a checkpoint of each family that has a table, by the table's name."""
ADAPTED = {
    "gpt2": ["c_attn", "c_proj"],
    "gpt_neox": ["query_key_value", "dense_4h_to_h"],
    "phi3": ["qkv_proj", "gate_up_proj", "down_proj"],
}
"""Modules that ``tiny_adapter`` adapts where they have other names than Llama's."""


def tiny_adapter(
    base_folder: Path, folder: Path, rslora: bool = False, seed: int = 0, **lora: Any
) -> Path:
    """A LoRA adapter of rank 4 with alpha 6 on a base folder; all that it trains is random."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    targets = ADAPTED.get(model.config.model_type, ["q_proj", "v_proj", "down_proj"])
    fan = model.config.model_type == "gpt2"
    options = {"r": 4, "lora_alpha": 6, "target_modules": targets, "fan_in_fan_out": fan, **lora}
    adapted = get_peft_model(model, LoraConfig(use_rslora=rslora, **options))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
        elif parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape) * 0.1)
    adapted.save_pretrained(folder)
    return folder


def copy_with(folder: Path, out: Path, edit: Callable[[dict[str, Tensor]], None]) -> Path:
    """A copy of a checkpoint whose tensors ``edit`` has changed in place."""
    out.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.is_file() and path.suffix != ".safetensors":
            shutil.copy2(path, out / path.name)
    for path in sorted(folder.glob("*.safetensors")):
        tensors = load_file(path)
        edit(tensors)
        save_file(
            {k: t.contiguous() for k, t in tensors.items()}, out / path.name, {"format": "pt"}
        )
    return out


def add_noise(seed: int = 1, scale: float = 0.01) -> Callable[[dict[str, Tensor]], None]:
    """An edit for ``copy_with`` that moves every tensor."""

    def edit(tensors: dict[str, Tensor]) -> None:
        generator = torch.Generator().manual_seed(seed)
        for name in sorted(tensors):
            tensor = tensors[name]
            noise = torch.randn(tensor.shape, generator=generator) * scale
            tensors[name] = (tensor.float() + noise).to(tensor.dtype)

    return edit


def _grouped(config_class: str, folder: Path, seed: int, **config: Any) -> Path:
    import transformers

    numbers = _with_ids({**GROUPED, "max_position_embeddings": 64, **config})
    return _saved(getattr(transformers, config_class)(**numbers), folder, seed)


def _with_ids(numbers: dict[str, Any]) -> dict[str, Any]:
    return {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, **numbers}


def _saved(config: Any, folder: Path, seed: int) -> Path:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            gain = parameter.dim() == 1 and name.endswith("weight")
            centre = float(parameter.mean()) if gain else 0.0  # 0 where gains are stored as 1 + w
            parameter.copy_(torch.randn(parameter.shape) * 0.2 + centre)
    model.save_pretrained(folder)
    return folder
