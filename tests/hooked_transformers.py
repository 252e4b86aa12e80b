"""HookedTransformers of TransformerLens 3.9, made from tiny transformers models entry by entry."""

from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor, nn

from . import attribution_pairs as pairs

RMS = ("llama", "qwen2", "qwen3", "olmo2")
UNPROCESSED = {
    "fold_ln": False,
    "center_writing_weights": False,
    "center_unembed": False,
    "fold_value_biases": False,
}


def host() -> Any:
    """TransformerLens, where it still has a HookedTransformer."""
    import transformer_lens

    if "HookedTransformer" not in dir(transformer_lens):
        pytest.skip("TransformerLens 4 has no HookedTransformer", allow_module_level=True)
    return transformer_lens


def hf_model(family: str, *, seed: int = 0) -> nn.Module:
    """A random model without what a HookedTransformer of its family has no place for."""
    import transformers

    shape = pairs.config(family)
    if family != "qwen2":
        shape.attention_bias = family == "neox"
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(shape, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            centre = 1.0 if parameter.ndim == 1 and bool((parameter == 1).all()) else 0.0
            parameter.copy_(centre + 0.25 * torch.randn_like(parameter))
    return model


def hooked_transformer(model: nn.Module, *, folded: bool = False) -> Any:
    """The HookedTransformer with the weights of a transformers model."""
    family = model.config.model_type.replace("gpt_", "")
    made = host().HookedTransformer(_config(family, model.config), move_to_device=False).eval()
    weights = (
        _gpt2(model) if family == "gpt2" else _neox(model) if family == "neox" else _rms(model)
    )
    how = {} if folded else UNPROCESSED
    made.load_and_process_state_dict({k: v.detach().clone() for k, v in weights.items()}, **how)
    return made


def _config(family: str, config: Any) -> Any:
    shape = {
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "d_model": config.hidden_size,
        "d_head": getattr(config, "head_dim", None)
        or config.hidden_size // config.num_attention_heads,
        "d_mlp": getattr(config, "intermediate_size", 24),
        "d_vocab": config.vocab_size,
        "n_ctx": config.max_position_embeddings,
        "act_fn": {"gpt2": "gelu_new", "neox": "gelu"}.get(family, "silu"),
        "normalization_type": "RMS" if family in RMS else "LN",
        "eps": 1e-5 if family not in RMS else config.rms_norm_eps,
        "model_name": f"tiny-{family}",
        "original_architecture": config.architectures[0] if config.architectures else None,
        "device": "cpu",
        "init_weights": False,
    }
    if family in RMS:
        shape |= {"gated_mlp": True, "final_rms": True}
        shape["n_key_value_heads"] = config.num_key_value_heads
        shape["use_qk_norm"] = family == "qwen3"
    if family == "olmo2":
        shape["original_architecture"] = "Olmo2ForCausalLM"
    if family != "gpt2":
        rope = config.rope_parameters
        share = rope.get("partial_rotary_factor", 1.0)
        shape |= {
            "positional_embedding_type": "rotary",
            "rotary_dim": int(share * shape["d_head"]),
            "rotary_base": int(rope["rope_theta"]),
            "rotary_adjacent_pairs": False,
            "parallel_attn_mlp": family == "neox",
        }
    return host().HookedTransformerConfig(**shape)


def _in_heads(weight: Tensor, width: int) -> Tensor:
    return rearrange(weight, "(head width) d_in -> head d_in width", width=width)


def _rms(model: Any) -> dict[str, Tensor]:
    inner, head_width = model.model, model.model.layers[0].self_attn.head_dim
    weights = {
        "embed.W_E": inner.embed_tokens.weight,
        "unembed.W_U": model.lm_head.weight.mT,
        "ln_final.w": inner.norm.weight,
    }
    for layer, block in enumerate(inner.layers):
        here, attn, mlp = f"blocks.{layer}.", block.self_attn, block.mlp
        first = getattr(block, "input_layernorm", None) or block.post_attention_layernorm
        second = getattr(block, "post_feedforward_layernorm", None)
        second = second or block.post_attention_layernorm
        weights |= {
            f"{here}ln1.w": first.weight,
            f"{here}ln2.w": second.weight,
            f"{here}mlp.W_gate": mlp.gate_proj.weight.mT,
            f"{here}mlp.W_in": mlp.up_proj.weight.mT,
            f"{here}mlp.W_out": mlp.down_proj.weight.mT,
            f"{here}attn.W_O": rearrange(
                attn.o_proj.weight, "d_out (head width) -> head width d_out", width=head_width
            ),
        }
        for own, name in (("W_Q", "q"), ("_W_K", "k"), ("_W_V", "v")):
            projection = getattr(attn, f"{name}_proj")
            weights[f"{here}attn.{own}"] = _in_heads(projection.weight, head_width)
            if projection.bias is not None:
                bias = rearrange(projection.bias, "(head width) -> head width", width=head_width)
                weights[f"{here}attn.{own.replace('W', 'b')}"] = bias
            if (norm := getattr(attn, f"{name}_norm", None)) is not None:
                weights[f"{here}attn.{name}_norm.w"] = norm.weight
    return weights


def _neox(model: Any) -> dict[str, Tensor]:
    inner, heads = model.gpt_neox, model.config.num_attention_heads
    weights = {
        "embed.W_E": inner.embed_in.weight,
        "unembed.W_U": model.lm_head.weight.mT,
        "ln_final.w": inner.final_layer_norm.weight,
        "ln_final.b": inner.final_layer_norm.bias,
    }
    for layer, block in enumerate(inner.layers):
        here, attn = f"blocks.{layer}.", block.attention
        fused, bias = attn.query_key_value.weight, attn.query_key_value.bias
        cut = "(head three width) d_in -> three head d_in width"
        matrices = rearrange(fused, cut, head=heads, three=3)
        biases = rearrange(bias, "(head three width) -> three head width", head=heads, three=3)
        for number, name in enumerate("QKV"):
            weights[f"{here}attn.W_{name}"] = matrices[number]
            weights[f"{here}attn.b_{name}"] = biases[number]
        weights |= {
            f"{here}attn.W_O": rearrange(
                attn.dense.weight, "d_out (head width) -> head width d_out", head=heads
            ),
            f"{here}attn.b_O": attn.dense.bias,
            f"{here}mlp.W_in": block.mlp.dense_h_to_4h.weight.mT,
            f"{here}mlp.b_in": block.mlp.dense_h_to_4h.bias,
            f"{here}mlp.W_out": block.mlp.dense_4h_to_h.weight.mT,
            f"{here}mlp.b_out": block.mlp.dense_4h_to_h.bias,
            **_layer_norm(f"{here}ln1", block.input_layernorm),
            **_layer_norm(f"{here}ln2", block.post_attention_layernorm),
        }
    return weights


def _gpt2(model: Any) -> dict[str, Tensor]:
    inner, heads = model.transformer, model.config.n_head
    weights = {
        "embed.W_E": inner.wte.weight,
        "pos_embed.W_pos": inner.wpe.weight,
        "unembed.W_U": model.lm_head.weight.mT,
        **_layer_norm("ln_final", inner.ln_f),
    }
    for layer, block in enumerate(inner.h):
        here, attn = f"blocks.{layer}.", block.attn
        for name, matrix, bias in zip(
            "QKV",
            attn.c_attn.weight.chunk(3, dim=1),
            attn.c_attn.bias.chunk(3),
            strict=True,
        ):
            weights[f"{here}attn.W_{name}"] = rearrange(
                matrix, "d_in (head width) -> head d_in width", head=heads
            )
            weights[f"{here}attn.b_{name}"] = rearrange(
                bias, "(head width) -> head width", head=heads
            )
        weights |= {
            f"{here}attn.W_O": rearrange(
                attn.c_proj.weight, "(head width) d_out -> head width d_out", head=heads
            ),
            f"{here}attn.b_O": attn.c_proj.bias,
            f"{here}mlp.W_in": block.mlp.c_fc.weight,
            f"{here}mlp.b_in": block.mlp.c_fc.bias,
            f"{here}mlp.W_out": block.mlp.c_proj.weight,
            f"{here}mlp.b_out": block.mlp.c_proj.bias,
            **_layer_norm(f"{here}ln1", block.ln_1),
            **_layer_norm(f"{here}ln2", block.ln_2),
        }
    return weights


def _layer_norm(name: str, norm: Any) -> dict[str, Tensor]:
    return {f"{name}.w": norm.weight, f"{name}.b": norm.bias}
