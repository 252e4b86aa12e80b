"""Moments of inputs: against plain passes of transformers, whatever the padding; left as found."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from . import attribution_pairs as pairs

READERS = {
    "llama": ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"),
    "olmo2": ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"),
    "gpt2": ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
    "neox": (
        *("attention.query_key_value", "attention.dense"),
        *("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    ),
}
"""The transformers modules that read attention, z, mlp and post."""


def lens_of(model):
    from tvlens.models.lens import LensModel, _bridge

    return LensModel.wrap(_bridge(model, "tiny"))


def read_by_transformers(model, family, batch):
    """Every token's input of each reading module, prompt by prompt without padding."""
    from tvlens.models.covariances import INPUTS

    blocks = {"gpt2": "transformer.h", "neox": "gpt_neox.layers"}.get(family, "model.layers")
    seen, handles = {}, []
    for layer in range(2):
        for name, reader in zip(INPUTS, READERS[family], strict=True):
            module = model.get_submodule(f"{blocks}.{layer}.{reader}")
            rows = seen[layer, name] = []
            handles.append(
                module.register_forward_pre_hook(lambda m, args, r=rows: r.append(args[0][0]))
            )
    with torch.no_grad():
        for row, length in enumerate(batch.lengths.tolist()):
            start = int(batch.starts[row])
            model(batch.ids[row : row + 1, start : start + length])
    for handle in handles:
        handle.remove()
    return {key: torch.cat(rows).double() for key, rows in seen.items()}


@pytest.fixture(scope="module")
def llama():
    return lens_of(pairs.hf_model("llama"))


@pytest.fixture(scope="module")
def found(llama):
    from tvlens.models.covariances import covariances

    return covariances(llama, pairs.batch())


@pytest.mark.parametrize("family", READERS)
def test_moments_are_those_of_plain_passes_without_padding(family: str) -> None:
    from tvlens.models.covariances import covariances

    model, batch = pairs.hf_model(family), pairs.batch()
    found = covariances(lens_of(copy.deepcopy(model)), batch, rows=3)
    plain = read_by_transformers(model, family, batch)
    assert found.tokens == int(batch.mask.sum()) < batch.mask.numel()
    assert found.moments.keys() == plain.keys()
    for key, tokens in plain.items():
        moments = found.moments[key]
        assert len(tokens) == found.tokens
        raw = torch.stack([torch.outer(x, x) for x in tokens]).mean(0)
        torch.testing.assert_close(moments.raw, raw, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(moments.mean, tokens.mean(0), rtol=1e-4, atol=1e-5)
        fourth = sum(float(x @ x) ** 2 for x in tokens) / len(tokens)
        assert moments.fourth == pytest.approx(fourth, rel=1e-4)


def test_every_matrix_has_the_moment_of_what_it_reads(found) -> None:
    from tvlens.components import Component

    sizes = dict.fromkeys(("W_Q", "W_K", "W_V", "W_gate", "W_in"), 32)
    for part, size in {**sizes, "W_O": 32, "W_out": 24}.items():
        moment = found.of(Component("matrix", 1, None, part))
        assert moment.shape == (size, size)
        assert float(torch.linalg.eigvalsh(moment)[0]) > 0
    queries, keys, gate = (
        found.of(Component("matrix", 1, None, part)) for part in ("W_Q", "W_K", "W_gate")
    )
    assert torch.equal(queries, keys)
    assert not torch.allclose(queries, gate)
    for other in (Component("embedding", None, None, "W_U"), Component("norm", 1, None, "ln1.w")):
        assert found.of(other) is None


def test_the_centred_covariance_is_that_about_the_mean(llama, found) -> None:
    from tvlens.components import Component

    component = Component("matrix", 0, None, "W_in")
    model = pairs.hf_model("llama")
    tokens = read_by_transformers(model, "llama", pairs.batch())[0, "mlp"]
    centred = torch.cov(tokens.T, correction=0)
    torch.testing.assert_close(found.centred(component), centred, rtol=1e-4, atol=1e-5)


def test_how_prompts_are_batched_and_padded_changes_nothing(llama, found) -> None:
    from tvlens.models import Batch
    from tvlens.models.covariances import covariances

    batch = pairs.batch()
    rows = [row[mask.bool()].tolist() for row, mask in zip(batch.ids, batch.mask, strict=True)]
    left = Batch.of_ids(rows, side="left")
    for other in (covariances(llama, batch, rows=1), covariances(llama, left)):
        for key, moments in found.moments.items():
            torch.testing.assert_close(other.moments[key].raw, moments.raw, rtol=1e-4, atol=1e-5)


def test_a_pair_is_measured_on_its_base_and_only_what_is_asked_for(found) -> None:
    from tvlens.models.covariances import covariances

    pair = pairs.hooked_pair("llama")
    part = covariances(pair, pairs.batch(), inputs=["z"])
    assert part.moments.keys() == {(0, "z"), (1, "z")}
    torch.testing.assert_close(part.moments[1, "z"].raw, found.moments[1, "z"].raw)
    with pytest.raises(ValueError, match=r"no input 'resid'; there are attention, z, mlp, post"):
        covariances(pair, pairs.batch(), inputs=["resid"])


def test_the_model_is_left_as_it_was_found_also_after_an_exception(llama, monkeypatch) -> None:
    from tvlens.models import covariances as module_function
    from tvlens.models.covariances import _Sums

    def state():
        bits = {name: tensor.clone() for name, tensor in llama.model.state_dict().items()}
        flags = [p.requires_grad for p in llama.model.parameters()]
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in llama.model.modules()]
        return bits, (flags, hooks, torch.is_grad_enabled())

    bits, rest = state()
    module_function(llama, pairs.batch())
    monkeypatch.setattr(_Sums, "add", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        module_function(llama, pairs.batch())
    after, later = state()
    assert rest == later
    assert all(torch.equal(tensor, after[name]) for name, tensor in bits.items())


def test_a_model_in_training_mode_and_no_token_are_refused() -> None:
    from tvlens.errors import HostError, PromptError
    from tvlens.models.covariances import covariances

    model = pairs.hf_model("gpt2")
    lens = lens_of(model)
    with pytest.raises(PromptError, match="at least one token"):
        covariances(lens, replace(pairs.batch(), mask=torch.zeros_like(pairs.batch().mask)))
    lens.model.train()
    with pytest.raises(HostError, match="training mode"):
        covariances(lens, pairs.batch())


def test_the_shrinkage_is_that_of_ledoit_and_wolf_token_by_token() -> None:
    from tvlens.models.covariances import Moments, shrinkage

    generator = torch.Generator().manual_seed(1)
    scale = torch.linspace(0.2, 3, 12, dtype=torch.float64)
    tokens = torch.randn(40, 12, generator=generator, dtype=torch.float64) * scale + 0.5
    raw = tokens.T @ tokens / 40
    level = raw.trace() / 12
    apart = sum(float((torch.outer(x, x) - raw).square().sum()) for x in tokens) / 40**2
    spread = float((raw - level * torch.eye(12, dtype=torch.float64)).square().sum())
    moments = Moments(raw, tokens.mean(0), float(tokens.square().sum(1).square().mean()))
    assert 0.01 < apart / spread < 0.9
    assert shrinkage(moments, 40) == pytest.approx(apart / spread, rel=1e-9)
    assert shrinkage(moments, 10**9) == 1e-4
    few = Moments(torch.diag(torch.tensor([1.0, 0.0]).double()), torch.zeros(2).double(), 9.0)
    assert shrinkage(few, 1) == 1.0


def test_the_shrunk_moment_keeps_the_trace_and_lifts_the_smallest_eigenvalue() -> None:
    from tvlens.components import Component
    from tvlens.models.covariances import Covariances, Moments

    token = torch.tensor([3.0, 0.0, 4.0], dtype=torch.float64)
    moments = {(0, "mlp"): Moments(torch.outer(token, token), token, 700.0)}
    found = Covariances(moments, tokens=4)
    moment = found.of(Component("matrix", 0, None, "W_in"))
    # error (700 - 625) / 4, spread 625 - 625 / 3
    share = 18.75 / (625 - 625 / 3)
    assert float(moment.trace()) == pytest.approx(25)
    assert torch.linalg.eigvalsh(moment).tolist() == pytest.approx(
        [share * 25 / 3, share * 25 / 3, (1 - share) * 25 + share * 25 / 3]
    )
    assert found.shrinkages() == {"mlp": pytest.approx(share)}


def test_what_is_saved_is_read_back(found, tmp_path: Path) -> None:
    from tvlens.models.covariances import Covariances

    path = found.save(tmp_path / "c.safetensors")
    again = Covariances.load(path)
    assert (again.tokens, again.model) == (found.tokens, found.model)
    assert list(again.moments) == list(found.moments)
    for key, moments in found.moments.items():
        torch.testing.assert_close(again.moments[key].raw, moments.raw, rtol=1e-6, atol=1e-6)
        assert again.moments[key].fourth == moments.fourth
    assert found.save(tmp_path / "d").read_bytes() == path.read_bytes()


def test_a_file_of_another_kind_or_format_is_refused(found, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from tvlens.errors import CheckpointError, UnsupportedFormatError
    from tvlens.models.covariances import Covariances

    other = tmp_path / "other.safetensors"
    save_file({"a": torch.zeros(2)}, other)
    later = tmp_path / "later.safetensors"
    save_file({"a": torch.zeros(2)}, later, metadata={"tvlens_covariances": '{"format": 2}'})
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(found.save(tmp_path / "whole").read_bytes()[:-40])
    for path in (other, cut, tmp_path / "none"):
        with pytest.raises(CheckpointError, match=r"no covariances that can be read.*tvlens\."):
            Covariances.load(path)
    with pytest.raises(UnsupportedFormatError, match="format 2; this tvlens reads format 1"):
        Covariances.load(later)


def test_memory_is_eight_bytes_an_entry_of_every_block() -> None:
    from tvlens.models.covariances import bytes_needed

    widths = {"attention": 576, "z": 576, "mlp": 576, "post": 1536}
    assert bytes_needed(widths, layers=30) == 240 * (3 * (576**2 + 576) + 1536**2 + 1536)
    assert bytes_needed(widths, ["z"], layers=1) == 8 * (576**2 + 576)
