"""Copies of tiny models that compute the same with other weights, and near-copies that do not.

Written with the modules of transformers in mind, not with tvlens's tables: every edit is made in
place on views [unit, width, d_model] of a live float64 model.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

Views = dict[str, Tensor]
Edit = Callable[[nn.Module, Views, torch.Generator], None]
ZERO_CENTRED = ("gemma2", "gemma3_text")


def saved_copy(
    folder: Path,
    out: Path,
    edits: Iterable[Edit],
    *,
    seed: int = 1,
    dtype: torch.dtype | None = None,
) -> Path:
    """The checkpoint in ``folder`` with every block edited, saved in its own or another dtype."""
    model = live(folder)
    apply(model, edits, seed)
    model.to(dtype or torch.float32).save_pretrained(out)
    return out


def live(folder: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


def apply(model: nn.Module, edits: Iterable[Edit], seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in range(model.config.num_hidden_layers):
            views = block_views(model, layer)
            for edit in edits:
                edit(model, views, generator)


def logits(model: nn.Module) -> Tensor:
    ids = torch.randint(3, 60, (3, 9), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model(ids).logits


# --- views --------------------------------------------------------------------------------------


def block_views(model: nn.Module, layer: int) -> Views:
    """The parameters of a block as views: heads [head, d_head, d_model], neurons [n, d_model]."""
    kind = model.config.model_type
    block = {"gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers"}.get(kind, "model.layers")
    views = {"gpt2": _gpt2, "gpt_neox": _neox}.get(kind, _llama)(
        model.config, model.get_submodule(f"{block}.{layer}")
    )
    return {name: view for name, view in views.items() if view is not None}


def _gpt2(config, block) -> Views:
    d, heads = config.n_embd, (config.n_head, config.n_embd // config.n_head)
    fused, bias = block.attn.c_attn.weight.T, block.attn.c_attn.bias
    qkv = {n: fused[i * d : (i + 1) * d].unflatten(0, heads) for i, n in enumerate("QKV")}
    biases = {f"b{n}": bias[i * d : (i + 1) * d].unflatten(0, heads) for i, n in enumerate("QKV")}
    return {
        **qkv,
        **biases,
        "O": block.attn.c_proj.weight.unflatten(0, heads),
        "in": block.mlp.c_fc.weight.T,
        "bin": block.mlp.c_fc.bias,
        "out": block.mlp.c_proj.weight,
        "ln1": block.ln_1.weight,
        "bln1": block.ln_1.bias,
        "ln2": block.ln_2.weight,
        "bln2": block.ln_2.bias,
    }


def _neox(config, block) -> Views:
    heads = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    fused = block.attention.query_key_value.weight.unflatten(0, (heads[0], 3, heads[1]))
    bias = block.attention.query_key_value.bias.unflatten(0, (heads[0], 3, heads[1]))
    return {
        **{name: fused[:, i] for i, name in enumerate("QKV")},
        **{f"b{name}": bias[:, i] for i, name in enumerate("QKV")},
        "O": block.attention.dense.weight.T.unflatten(0, heads),
        "in": block.mlp.dense_h_to_4h.weight,
        "bin": block.mlp.dense_h_to_4h.bias,
        "out": block.mlp.dense_4h_to_h.weight.T,
        "ln1": block.input_layernorm.weight,
        "bln1": block.input_layernorm.bias,
        "ln2": block.post_attention_layernorm.weight,
        "bln2": block.post_attention_layernorm.bias,
    }


def _llama(config, block) -> Views:
    attention, mlp = block.self_attn, block.mlp
    heads, kv = config.num_attention_heads, config.num_key_value_heads
    d_head = getattr(config, "head_dim", None) or config.hidden_size // heads
    counts = {"Q": heads, "K": kv, "V": kv}
    views: Views = {"O": attention.o_proj.weight.T.unflatten(0, (heads, d_head))}
    if hasattr(attention, "qkv_proj"):
        parts = attention.qkv_proj.weight.split([n * d_head for n in counts.values()])
        weights, biases = dict(zip(counts, parts, strict=True)), {}
        views["gate"], views["in"] = mlp.gate_up_proj.weight.chunk(2)
    else:
        modules = {name: getattr(attention, f"{name.lower()}_proj") for name in counts}
        weights = {name: module.weight for name, module in modules.items()}
        biases = {name: module.bias for name, module in modules.items() if module.bias is not None}
        views["gate"], views["in"] = mlp.gate_proj.weight, mlp.up_proj.weight
    views |= {name: w.unflatten(0, (counts[name], d_head)) for name, w in weights.items()}
    views |= {f"b{name}": b.unflatten(0, (counts[name], d_head)) for name, b in biases.items()}
    views["out"] = mlp.down_proj.weight.T
    gemma = config.model_type in ZERO_CENTRED
    norms = {"ln1": "input_layernorm", "ln2": "post_attention_layernorm"}
    norms = {"ln1": "input_layernorm", "ln2": "pre_feedforward_layernorm"} if gemma else norms
    if config.model_type != "olmo2":
        views |= {name: getattr(block, module).weight for name, module in norms.items()}
    for name in ("q_norm", "k_norm"):
        if hasattr(attention, name):
            views[name] = getattr(attention, name).weight
    return views


# --- edits that change no function --------------------------------------------------------------


def permute_neurons(model: nn.Module, views: Views, generator: torch.Generator) -> None:
    order = torch.randperm(len(views["out"]), generator=generator)
    for name in ("gate", "in", "bin", "out"):
        if name in views:
            views[name].copy_(views[name][order].clone())


def permute_heads(model: nn.Module, views: Views, generator: torch.Generator) -> None:
    kv, share = len(views["K"]), len(views["Q"]) // len(views["K"])
    groups = torch.randperm(kv, generator=generator)
    within = [torch.randperm(share, generator=generator) + g * share for g in groups.tolist()]
    heads = torch.cat(within)
    for names, order in ((("K", "V", "bK", "bV"), groups), (("Q", "O", "bQ"), heads)):
        for name in names:
            if name in views:
                views[name].copy_(views[name][order].clone())
    if "q_norm" in views and len(views["q_norm"]) > views["Q"].shape[1]:  # over the projection
        for name, order in (("q_norm", heads), ("k_norm", groups)):
            by_head = views[name].unflatten(0, (len(order), -1))
            by_head.copy_(by_head[order].clone())


def rescale_neurons(model: nn.Module, views: Views, generator: torch.Generator) -> None:
    """Gated neurons by any factor, those behind a ReLU by positive ones, others not at all."""
    rectified = getattr(model.config, "activation_function", "") == "relu"
    if "gate" in views or rectified:
        factors = _factors(len(views["in"]), generator, signed="gate" in views)
        views["in"].mul_(factors[:, None])
        views["out"].div_(factors[:, None])
        if "bin" in views:
            views["bin"].mul_(factors)


def rescale_gains(model: nn.Module, views: Views, generator: torch.Generator) -> None:
    centre = float(model.config.model_type in ZERO_CENTRED)
    for norm, readers in (("ln1", "QKV"), ("ln2", ("gate", "in"))):
        if norm not in views:
            continue
        factors = _factors(len(views[norm]), generator)
        views[norm].copy_((views[norm] + centre) * factors - centre)
        if f"b{norm}" in views:
            views[f"b{norm}"].mul_(factors)
        for reader in readers:
            if reader in views:
                views[reader].div_(factors)


def rotate_values(model: nn.Module, views: Views, generator: torch.Generator) -> None:
    share = len(views["Q"]) // len(views["V"])
    for kv, value in enumerate(views["V"]):
        basis = torch.randn(len(value), len(value), generator=generator, dtype=torch.float64)
        basis = torch.linalg.qr(basis).Q * _factors(len(value), generator)
        _turn(views, "V", kv, basis)
        for head in range(kv * share, (kv + 1) * share):
            _turn(views, "O", head, torch.linalg.inv(basis).T)


def rotate_keys(model: nn.Module, views: Views, generator: torch.Generator) -> None:
    """Any basis where nothing rotates, a complex number a rotary pair, a sign where normalised."""
    share = len(views["Q"]) // len(views["K"])
    for kv, key in enumerate(views["K"]):
        basis = _key_basis(model, len(key), generator)
        _turn(views, "K", kv, basis)
        for head in range(kv * share, (kv + 1) * share):
            _turn(views, "Q", head, torch.linalg.inv(basis).T)


def exchange_key_gains(model: nn.Module, views: Views, generator: torch.Generator) -> None:
    """Rotary pairs of the query's gain up, of the key's down, where they are normalised."""
    if "q_norm" not in views:
        return
    centre, d_head = float(model.config.model_type in ZERO_CENTRED), views["Q"].shape[1]
    key = (views["k_norm"] + centre).unflatten(0, (-1, 2, d_head // 2))
    query = (views["q_norm"] + centre).unflatten(0, (-1, 2, d_head // 2))
    factors = _factors(len(key) * key.shape[-1], generator).reshape(len(key), 1, -1)
    views["k_norm"].copy_((key * factors).flatten() - centre)
    query = query / factors.repeat_interleave(len(query) // len(key), dim=0)
    views["q_norm"].copy_(query.flatten() - centre)


def rescale_final(model: nn.Module, views: Views, generator: torch.Generator) -> None:
    """The last norm's gain against an unembedding of its own; once, with the first block."""
    if model.config.tie_word_embeddings or getattr(model, "rescaled", False):
        return
    model.rescaled = True
    norm = {"gpt_neox": "gpt_neox.final_layer_norm", "gpt2": "transformer.ln_f"}.get(
        model.config.model_type, "model.norm"
    )
    head, norm = model.get_output_embeddings(), model.get_submodule(norm)
    factors = _factors(len(norm.weight), generator)
    norm.weight.mul_(factors)
    if getattr(norm, "bias", None) is not None:
        norm.bias.mul_(factors)
    head.weight.div_(factors)


PERMUTED = (permute_neurons, permute_heads)
ROTATED = (rotate_values, rotate_keys)
RESCALED = (rescale_gains, exchange_key_gains, rescale_final)
ALL = (*RESCALED, rescale_neurons, *ROTATED, *PERMUTED)


def _turn(views: Views, name: str, unit: int, basis: Tensor) -> None:
    views[name][unit].copy_(basis @ views[name][unit])
    if f"b{name}" in views:
        views[f"b{name}"][unit].copy_(basis @ views[f"b{name}"][unit])


def _factors(count: int, generator: torch.Generator, *, signed: bool = True) -> Tensor:
    """Between a half and two, of either sign."""
    exponents = torch.rand(count, generator=generator, dtype=torch.float64) * 2 - 1
    signs = torch.randint(0, 2, (count,), generator=generator) * 2 - 1
    return 2**exponents * (signs if signed else 1)


def _key_basis(model: nn.Module, width: int, generator: torch.Generator) -> Tensor:
    kind, free = model.config.model_type, torch.randn(width, width, generator=generator).double()
    basis = torch.linalg.qr(free).Q * _factors(width, generator)
    if kind == "gpt2":
        return basis
    rotary = width // 4 if kind == "gpt_neox" else width
    modulus, angle = _factors(rotary // 2, generator), torch.rand(rotary // 2, generator=generator)
    if kind in ("qwen3", "gemma3_text", "olmo2"):
        modulus, angle = modulus.sign(), torch.zeros(rotary // 2)
    cos, sin = torch.diag(modulus * angle.cos()), torch.diag(modulus * angle.sin())
    rest = torch.linalg.qr(free[rotary:, rotary:]).Q * _factors(width - rotary, generator)
    return torch.block_diag(torch.cat([torch.cat([cos, -sin], 1), torch.cat([sin, cos], 1)]), rest)
