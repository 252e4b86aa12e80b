"""Tiny random pairs for the attribution tests: nothing in them is an identity or a zero."""

from collections.abc import Callable

import torch
from torch import nn

SIZES = {"n_layers": 2, "n_heads": 4, "d_model": 32, "d_head": 8, "d_mlp": 24, "d_vocab": 40}


def config(family: str, *, tied: bool = True):
    import transformers

    if family == "gpt2":
        return transformers.GPT2Config(
            vocab_size=40,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_inner=24,
            n_positions=32,
            bos_token_id=0,
            eos_token_id=0,
        )
    shape = {
        "vocab_size": 40,
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 32,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    if family == "neox":
        return transformers.GPTNeoXConfig(**shape)
    shape |= {"num_key_value_heads": 2, "tie_word_embeddings": tied}
    name, own = DESCENDANTS[family]
    return getattr(transformers, name)(**shape, **own)


GEMMA = {
    "head_dim": 12,
    "query_pre_attn_scalar": 10,
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention"],
}
DESCENDANTS = {
    "llama": ("LlamaConfig", {"attention_bias": True}),
    "mistral": ("MistralConfig", {"sliding_window": 4}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 12, "attention_bias": True}),
    "gemma2": ("Gemma2Config", GEMMA),
    "gemma3": ("Gemma3TextConfig", GEMMA),
    "phi3": ("Phi3Config", {"pad_token_id": 0}),
    "olmo2": ("Olmo2Config", {"attention_bias": True}),
}
"""Config class and own entries of Llama and the families that share its config's names."""


def hf_model(family: str, *, seed: int = 0, tied: bool = True) -> nn.Module:
    import transformers

    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(
        config(family, tied=tied), attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            centre = 1.0 if parameter.ndim == 1 and bool((parameter == 1).all()) else 0.0
            parameter.copy_(centre + 0.25 * torch.randn_like(parameter))
    return model


def noised(model: nn.Module, *, scale: float = 0.02, seed: int = 1) -> None:
    """Add noise of ``scale`` times each tensor's own root mean square."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(scale * parameter.pow(2).mean().sqrt() * noise)


def hooked_pair(family: str, change: Callable[[nn.Module], None] = noised, *, tied: bool = True):
    """A random base and the same base after ``change``."""
    from tvlens.models.lens import LensModel, _bridge
    from tvlens.models.pair import HookedPair

    base, tuned = hf_model(family, tied=tied), hf_model(family, tied=tied)
    change(tuned)
    return HookedPair.of(*(LensModel.wrap(_bridge(model, family)) for model in (base, tuned)))


def batch(*, lengths: tuple[int, ...] = (9, 6, 11, 7), seed: int = 3):
    """Prompts of different lengths with answers of two tokens and one wrong token."""
    from tvlens.models.prompts import Batch

    generator = torch.Generator().manual_seed(seed)

    def ids(count: int) -> list[int]:
        return torch.randint(1, 40, (count,), generator=generator).tolist()

    return Batch.of_ids(
        [ids(n) for n in lengths],
        answers=[ids(2) for _ in lengths],
        wrongs=[ids(1) for _ in lengths],
    )


def component(kind: str, layer: int | None, index: int | None, part: str | None):
    from tvlens.components import Component

    return Component(kind, layer, index, part)


def planted_components():
    """What carries the change of ``planted_models``."""
    return (
        component("head", 0, 1, None),
        component("neuron", 1, 5, None),
        component("norm", 1, None, "ln2.w"),
    )


def planted_prompts():
    """Sixteen prompts of tokens below 30, so that the rows of the others are never read."""
    from tvlens.models.prompts import Batch

    generator = torch.Generator().manual_seed(8)

    def ids(count):
        return torch.randint(1, 30, (count,), generator=generator).tolist()

    return Batch.of_ids([ids(6 + n % 3) for n in range(16)], answers=[[7, 11]] * 16)


def planted_models():
    """A base, and a tuned model whose answer is likelier for three components alone.

    Each is moved up its own gradient until the answers' log-probability has risen by 0.5. The
    rows of unused tokens are moved much further and do nothing; a little noise is everywhere.
    """
    from tvlens.models.metrics import SHIPPED
    from tvlens.models.reading import Reading

    base, tuned = (hf_model("llama", tied=False) for _ in range(2))
    reading = Reading.of(SHIPPED["logprob"], planted_prompts())

    def value(model):
        logits = model(reading.batch.ids, attention_mask=reading.batch.mask).logits
        rows = torch.arange(len(logits))[:, None]
        return reading.value(logits[rows, reading.positions]).mean()

    attention, mlp = tuned.model.layers[0].self_attn, tuned.model.layers[1].mlp
    owned = {
        "head": [
            (attention.q_proj.weight, (slice(8, 16),)),
            (attention.o_proj.weight, (slice(None), slice(8, 16))),
        ],
        "neuron": [(mlp.up_proj.weight, (5,)), (mlp.down_proj.weight, (slice(None), 5))],
        "norm": [(tuned.model.layers[1].post_attention_layernorm.weight, (slice(None),))],
    }
    for slices in owned.values():
        start = float(value(tuned))
        while float(value(tuned)) < start + 0.5:
            gradients = torch.autograd.grad(value(tuned), [tensor for tensor, _ in slices])
            with torch.no_grad():
                for (tensor, place), gradient in zip(slices, gradients, strict=True):
                    step = gradient[place]
                    tensor[place] += 0.05 * step / step.norm().clamp_min(1e-9)
    with torch.no_grad():
        tuned.model.embed_tokens.weight[30:] += torch.randn(10, 32)
    noised(tuned, scale=1e-4)
    return base, tuned
