"""The canonical weights are the ones the host computes with."""

from pathlib import Path

import pytest
import torch
from einops import rearrange
from safetensors.torch import load_file
from torch import Tensor

from tests.tiny_checkpoints import FAMILIES, copy_with, tiny_llama
from tvlens.components import DISJOINT_KINDS, Component
from tvlens.errors import CheckpointError, UnsupportedFormatError

TIED = {"tie_word_embeddings": True}
UNTIED = {"tie_word_embeddings": False}
VARIANTS: dict[str, tuple[str, dict[str, object]]] = {
    "llama tied": ("llama", TIED),
    "llama wide heads and biases": (
        "llama",
        {"head_dim": 12, "attention_bias": True, "mlp_bias": True},
    ),
    "mistral wide heads": ("mistral", {"head_dim": 12}),
    "qwen2 tied": ("qwen2", TIED),
    "qwen3 tied, biases": ("qwen3", {**TIED, "attention_bias": True}),
    "gemma2 untied, biases": ("gemma2", {**UNTIED, "attention_bias": True}),
    "gemma3 untied": ("gemma3", UNTIED),
    "phi3 tied": ("phi3", TIED),
    "phi3 one kv head": ("phi3", {"num_key_value_heads": 1}),
    "olmo2 tied, biases": ("olmo2", {**TIED, "attention_bias": True}),
    "neox sequential": ("neox", {"use_parallel_residual": False}),
}
CASES = {**{family: (family, {}) for family in FAMILIES}, **VARIANTS}
ZERO_CENTRED = ("gemma2", "gemma3_text")


@pytest.fixture(scope="module", params=CASES, ids=str)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family, config = CASES[request.param]
    return FAMILIES[family](tmp_path_factory.mktemp("layout") / "model", seed=3, **config)


def _bridge(folder: Path):
    from transformer_lens.model_bridge.sources import build_bridge_from_module
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    ).eval()
    return build_bridge_from_module(model, type(model).__name__, hf_config=model.config)


def _host_norm(bridge, component: Component):
    """The live module behind a norm's gain or bias."""
    block = bridge if component.layer is None else bridge.blocks[component.layer]
    name = (component.part or "").partition(".")[0]
    if name.endswith("_post") and name not in block._modules:  # TransformerLens 3.9 on OLMo 2
        name = name.removesuffix("_post")
    return getattr(block.attn if name in ("q_norm", "k_norm") else block, name)


def _host_weight(bridge, component: Component) -> Tensor:
    """The same part read off the live bridge, flattened over heads."""
    part = component.part or ""
    if part == "W_pos":
        return bridge.pos_embed.weight
    if part in ("W_E", "W_U"):
        return getattr(bridge, part)
    if part.endswith((".w", ".b")):
        norm = _host_norm(bridge, component)
        centre = float(bridge.original_model.config.model_type in ZERO_CENTRED)
        return norm.weight + centre if part.endswith(".w") else norm.bias
    block = bridge.blocks[component.layer]
    layer = block.mlp if part in ("W_in", "W_out", "W_gate", "b_in", "b_out", "b_gate") else None
    value = getattr(layer if layer is not None else block.attn, part)
    if part in ("W_Q", "W_K", "W_V"):
        return rearrange(value, "head d_model d_head -> d_model (head d_head)")
    if part == "W_O":
        return rearrange(value, "head d_head d_model -> (head d_head) d_model")
    return value.flatten() if part.startswith("b_") else value


@pytest.mark.slow
def test_every_component_is_bit_equal_to_the_live_bridge(checkpoint: Path) -> None:
    from tvlens.weights.matching import load_pair

    bridge = _bridge(checkpoint)
    pair = load_pair(checkpoint, checkpoint)
    for component in pair.components:
        if component.part == "b_gate":  # the bridge names no such attribute
            continue
        ours, host = pair.base_weight(component), _host_weight(bridge, component)
        assert torch.equal(ours, host), component


def test_heads_are_cut_as_the_live_bridge_cuts_them(checkpoint: Path) -> None:
    from tvlens.geometry.heads import slices_of_heads
    from tvlens.weights.matching import load_pair

    bridge = _bridge(checkpoint)
    pair = load_pair(checkpoint, checkpoint, scan=False)
    for layer in range(2):
        for part in ("W_Q", "W_K", "W_V", "W_O"):
            host = getattr(bridge.blocks[layer].attn, part)
            count = pair.layout.n_kv_heads if part in ("W_K", "W_V") else pair.layout.n_heads
            whole = pair.base_weight(Component("matrix", layer, None, part))
            assert len(host) == count
            assert torch.equal(slices_of_heads(whole, part, count), host), part


@pytest.mark.slow
def test_a_gain_is_what_the_live_norm_multiplies_by(checkpoint: Path) -> None:
    """The oracle runs the norm: of +1 and -1 in turn it gives back the gain with that sign."""
    from tvlens.weights.matching import load_pair

    bridge = _bridge(checkpoint)
    pair = load_pair(checkpoint, checkpoint, scan=False)
    gains = [c for c in pair.components if c.kind == "norm"]
    assert gains
    for component in gains:
        gain, module = pair.base_weight(component), _host_norm(bridge, component)
        signs = torch.ones(len(gain))
        signs[1::2] = -1  # mean zero, so a LayerNorm does not centre it away
        live = module.original_component
        bias = getattr(live, "bias", None)
        found = live(signs) - (0 if bias is None else bias)
        torch.testing.assert_close(found.detach(), signs * gain, rtol=2e-5, atol=1e-6)


def test_a_gains_rounding_is_that_of_the_stored_number(tmp_path: Path) -> None:
    """bfloat16 keeps w far better than 1 + w, and w is what was rounded."""
    from tvlens.weights.matching import load_pair
    from tvlens.weights.precision import rounding_energy

    def half(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            tensors[name] = (tensor * 0.01).bfloat16()

    base = copy_with(FAMILIES["gemma2"](tmp_path / "full"), tmp_path / "base", half)
    tuned = copy_with(base, tmp_path / "tuned", lambda t: t.update(_doubled(t)))
    gain = Component("norm", 0, None, "ln1.w")
    weight = load_pair(base, tuned).read(gain)
    stored = load_file(base / "model.safetensors")["model.layers.0.input_layernorm.weight"].float()
    assert torch.equal(weight.base, 1 + stored)
    assert torch.equal(weight.dense_delta(), stored)
    expected = rounding_energy(2 * stored, "bfloat16")
    torch.testing.assert_close(weight.floor, expected, rtol=1e-6, atol=0)


def _doubled(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: 2 * tensor for name, tensor in tensors.items()}


def test_the_components_hold_every_parameter_once(checkpoint: Path) -> None:
    from transformers import AutoModelForCausalLM

    from tvlens.weights.matching import load_pair

    pair = load_pair(checkpoint, checkpoint, scan=False)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    sizes = [pair.base_weight(component).numel() for component in pair.components]
    assert sum(sizes) == sum(parameter.numel() for parameter in model.parameters())
    assert {component.kind for component in pair.components} <= set(DISJOINT_KINDS)
    assert len(set(map(str, pair.components))) == len(pair.components)


def test_blocks_are_the_components_in_pieces(checkpoint: Path) -> None:
    from tvlens.weights.matching import load_pair

    pair = load_pair(checkpoint, checkpoint, scan=False)
    blocks = pair.blocks()
    assert len(blocks) == pair.layout.n_layers + 1
    assert {c for block in blocks for c in block} == set(pair.components)
    assert all(c.layer == i for i, block in enumerate(blocks[:-1]) for c in block)
    assert all(c.layer is None for c in blocks[-1])


def test_shapes_follow_the_layout(checkpoint: Path) -> None:
    from tvlens.weights.matching import load_pair

    pair = load_pair(checkpoint, checkpoint, scan=False)
    for component in pair.components:
        assert tuple(pair.base_weight(component).shape) == pair.layout.shape(component)


def test_a_tied_unembedding_is_no_component_of_its_own(tmp_path: Path) -> None:
    from tvlens.weights.matching import load_pair

    tied = tiny_llama(tmp_path / "tied", tie_word_embeddings=True)
    pair = load_pair(tied, tied)
    assert Component("embedding", None, None, "W_U") not in pair.components
    assert pair.read(Component("embedding", None, None, "W_E")).tied


def test_a_model_type_without_a_table_is_refused() -> None:
    from tvlens.weights.layout import layout_of

    with pytest.raises(UnsupportedFormatError, match=r"model_type 'bert'; tvlens has tables for"):
        layout_of({"model_type": "bert"})


def test_a_config_that_lacks_a_number_is_refused() -> None:
    from tvlens.weights.layout import layout_of

    with pytest.raises(CheckpointError, match="lacks or garbles a number: 'num_attention_heads'"):
        layout_of({"model_type": "llama"})


@pytest.mark.parametrize(
    ("entries", "sentence"),
    [
        ({"num_hidden_layers": "2"}, "gives n_layers as '2', expected a whole number"),
        ({"num_hidden_layers": 10**8}, "gives n_layers as 100000000"),
        ({"num_hidden_layers": 10**5}, "gives 100000 layers"),
        ({"vocab_size": 0}, "gives d_vocab as 0"),
        ({"num_key_value_heads": 3}, "4 query heads over 3 kv heads, which no model has"),
    ],
)
def test_a_config_with_impossible_numbers_is_refused(
    entries: dict[str, object], sentence: str
) -> None:
    from tvlens.weights.layout import layout_of

    config = {
        "model_type": "llama",
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "hidden_size": 32,
        "intermediate_size": 48,
        "vocab_size": 64,
    }
    assert layout_of(config).n_kv_heads == 4
    with pytest.raises(CheckpointError, match=sentence):
        layout_of(config | entries)
