"""Small checkpoints that are the same bits on every machine: raw words of a counter generator.

``tests/golden/mergekit.json`` holds what mergekit makes of them; ``benchmarks/merges.py`` makes it.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
GPT2 = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_inner": 48,
    "n_positions": 64,
    "n_ctx": 64,
    "vocab_size": 64,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
}
CONFIGS = {"llama": LLAMA, "gpt2": GPT2}
MODELS = ("base", "a", "b", "c")


def golden_models(root: Path, family: str) -> dict[str, Path]:
    """A base and three fine-tunes of it by name; ``b`` leaves layer 0 as it was."""
    return {name: _written(root / family / name, family, name) for name in MODELS}


def uniform(label: str, shape: tuple[int, ...]) -> np.ndarray:
    """Float32 numbers from -0.5 to 0.5 that a label and a shape determine."""
    digest = hashlib.sha256(label.encode()).digest()
    words = np.random.Philox(key=int.from_bytes(digest[:16], "little"))
    raw = words.random_raw(int(np.prod(shape))) >> np.uint64(40)
    return (raw.astype(np.float32) / np.float32(2**24) - np.float32(0.5)).reshape(shape)


def _written(folder: Path, family: str, name: str) -> Path:
    folder.mkdir(parents=True)
    tensors = {}
    for tensor, shape in _shapes(family).items():
        tensors[tensor] = uniform(tensor, shape)
        if name != "base" and not (name == "b" and ".0." in tensor):
            tensors[tensor] = tensors[tensor] + uniform(f"{name} {tensor}", shape) / np.float32(10)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIGS[family], indent=1))
    return folder


def _shapes(family: str) -> dict[str, tuple[int, ...]]:
    return _llama_shapes() if family == "llama" else _gpt2_shapes()


def _llama_shapes() -> dict[str, tuple[int, ...]]:
    block = {
        "input_layernorm": (32,),
        "self_attn.q_proj": (32, 32),
        "self_attn.k_proj": (16, 32),
        "self_attn.v_proj": (16, 32),
        "self_attn.o_proj": (32, 32),
        "post_attention_layernorm": (32,),
        "mlp.gate_proj": (48, 32),
        "mlp.up_proj": (48, 32),
        "mlp.down_proj": (32, 48),
    }
    ends = {"model.embed_tokens": (64, 32), "model.norm": (32,), "lm_head": (64, 32)}
    blocks = {f"model.layers.{i}.{n}": shape for i in range(2) for n, shape in block.items()}
    return {f"{name}.weight": shape for name, shape in {**ends, **blocks}.items()}


def _gpt2_shapes() -> dict[str, tuple[int, ...]]:
    linear = {
        "attn.c_attn": (32, 96),
        "attn.c_proj": (32, 32),
        "mlp.c_fc": (32, 48),
        "mlp.c_proj": (48, 32),
    }
    found = {"transformer.wte.weight": (64, 32), "transformer.wpe.weight": (64, 32)}
    norms = [f"transformer.h.{i}.ln_{n}" for i in range(2) for n in (1, 2)]
    for norm in [*norms, "transformer.ln_f"]:
        found |= {f"{norm}.weight": (32,), f"{norm}.bias": (32,)}
    for i in range(2):
        for name, shape in linear.items():
            stem = f"transformer.h.{i}.{name}"
            found |= {f"{stem}.weight": shape, f"{stem}.bias": shape[1:]}
    return found
