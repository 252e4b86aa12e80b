"""A folder as of a 70B: real headers over holes, so that nothing is there to be read."""

import json
import math
import struct
from pathlib import Path

SHARDS = 30
LLAMA_70B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "max_position_embeddings": 8192,
}


def hollow_llama(folder: Path, **config: object) -> Path:
    """A sharded bf16 checkpoint of Llama-3-70B's shape whose shards are sparse files."""
    numbers = {**LLAMA_70B, **config}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(numbers))
    tensors = list(_shapes(numbers).items())
    size = math.ceil(len(tensors) / SHARDS)
    weight_map = {}
    for number, start in enumerate(range(0, len(tensors), size), 1):
        file = f"model-{number:05d}-of-{SHARDS:05d}.safetensors"
        held = dict(tensors[start : start + size])
        _write_hollow(folder / file, held)
        weight_map |= dict.fromkeys(held, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def _shapes(numbers: dict) -> dict[str, tuple[int, ...]]:
    d_model, d_mlp = numbers["hidden_size"], numbers["intermediate_size"]
    d_kv = d_model // numbers["num_attention_heads"] * numbers["num_key_value_heads"]
    block = {
        "input_layernorm": (d_model,),
        "self_attn.q_proj": (d_model, d_model),
        "self_attn.k_proj": (d_kv, d_model),
        "self_attn.v_proj": (d_kv, d_model),
        "self_attn.o_proj": (d_model, d_model),
        "post_attention_layernorm": (d_model,),
        "mlp.gate_proj": (d_mlp, d_model),
        "mlp.up_proj": (d_mlp, d_model),
        "mlp.down_proj": (d_model, d_mlp),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (numbers["vocab_size"], d_model)
    }
    for layer in range(numbers["num_hidden_layers"]):
        for name, shape in block.items():
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
    shapes["model.norm.weight"] = (d_model,)
    return {**shapes, "lm_head.weight": (numbers["vocab_size"], d_model)}


def _write_hollow(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
