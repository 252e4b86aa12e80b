"""Matching accounts for every tensor, and refuses what cannot be subtracted."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.tiny_checkpoints import add_noise, copy_with, tiny_gpt2, tiny_llama, tiny_neox
from tvlens.components import Component
from tvlens.errors import CheckpointError, IncomparableModelsError, UnsupportedFormatError

W_E = Component("embedding", None, None, "W_E")
W_U = Component("embedding", None, None, "W_U")
W_Q = Component("matrix", 0, None, "W_Q")
LN1 = Component("norm", 0, None, "ln1.w")
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
TWIN = f"module.{Q_PROJ}"
Edit = Callable[[dict[str, Tensor]], object]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("matching") / "base")


@pytest.fixture
def tuned(base: Path, tmp_path: Path) -> Path:
    return copy_with(base, tmp_path / "tuned", add_noise())


def _configured(folder: Path, **entries: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def _tokenizer(folder: Path, tokens: list[str], added: tuple[str, ...] = ()) -> None:
    """The part of a tokenizer.json that lists tokens."""
    vocabulary = {token: index for index, token in enumerate(tokens)}
    entries = [{"id": len(tokens) + i, "content": token} for i, token in enumerate(added)]
    text = json.dumps({"model": {"vocab": vocabulary}, "added_tokens": entries})
    (folder / "tokenizer.json").write_text(text)


def _renamed(rule: Callable[[str], str]) -> Edit:
    def edit(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[rule(name)] = tensors.pop(name)

    return edit


@pytest.mark.slow
def test_a_pair_is_read_as_base_delta_and_floor(base: Path, tuned: Path) -> None:
    from tvlens.weights.matching import load_pair
    from tvlens.weights.precision import rounding_energy

    pair = load_pair(base, tuned)
    assert (pair.base_name, pair.tuned_name) == ("base", "tuned")
    stored = [load_file(folder / "model.safetensors")[Q_PROJ] for folder in (base, tuned)]
    weight = pair.read(W_Q)
    assert torch.equal(weight.base, stored[0].T)
    assert torch.equal(weight.dense_delta(), (stored[1] - stored[0]).T)
    assert torch.equal(pair.tuned_weight(W_Q), stored[1].T)
    assert torch.allclose(weight.floor, rounding_energy(stored[1].T, "float32"))
    assert (weight.base_dtype, weight.tuned_dtype) == ("float32", "float32")
    assert weight.equal_fraction == float((stored[0] == stored[1]).float().mean())


def test_every_tensor_of_both_is_compared(base: Path, tuned: Path) -> None:
    from tvlens.weights.matching import load_pair

    report = load_pair(base, tuned).load_report
    names = set(load_file(base / "model.safetensors"))
    assert {entry.base for entry in report.tensors} == names
    assert {entry.tuned for entry in report.tensors} == names
    assert report.counts == {"compared": len(names)}
    assert report.identical is False
    assert report.warnings == []
    found = report.to_dict()
    assert found["tensors"][0].keys() >= {"base", "tuned", "status", "reason"}
    assert json.loads(json.dumps(found)) == found


def test_identical_models_say_so_and_go_on(base: Path, tmp_path: Path) -> None:
    from tvlens.weights.matching import load_pair

    pair = load_pair(base, shutil.copytree(base, tmp_path / "copy"))
    assert pair.load_report.identical is True
    assert "identical: every tuning vector is zero" in pair.load_report.warnings[0]
    assert pair.load_report.to_dict()["same_function"]["value"] is True
    weight = pair.read(W_Q)
    assert weight.equal_fraction == 1
    assert weight.delta.norm() == 0


def test_one_changed_entry_is_not_identical(base: Path, tmp_path: Path) -> None:
    from tvlens.weights.matching import load_pair

    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[Q_PROJ][3, 4] += 1

    pair = load_pair(base, copy_with(base, tmp_path / "tuned", edit))
    assert pair.load_report.identical is False
    entry = next(e for e in pair.load_report.tensors if e.base == Q_PROJ)
    assert entry.equal_fraction == 1 - 1 / 1024


def test_without_a_scan_only_headers_are_read(base: Path, tuned: Path) -> None:
    from tvlens.weights.matching import load_pair

    pair = load_pair(base, tuned, scan=False)
    assert pair.load_report.identical is None
    assert pair.load_report.counts == {"compared": 21}


def test_two_folders_of_one_name_get_different_names(base: Path, tmp_path: Path) -> None:
    from tvlens.weights.matching import load_pair

    copy = shutil.copytree(base, tmp_path / "tuned" / "base")
    pair = load_pair(base, copy)
    assert pair.tuned_name == "tuned/base"
    assert pair.base_name.endswith("/base")
    assert load_pair(base, base).base_name != load_pair(base, base).tuned_name
    assert load_pair(base, copy, names=("a", "b")).tuned_name == "b"


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (tiny_llama, lambda name: name.removeprefix("model.")),
        (tiny_llama, lambda name: f"_orig_mod.{name}"),
        (tiny_llama, lambda name: f"module._orig_mod.{name}"),
        (tiny_gpt2, lambda name: name.removeprefix("transformer.")),
        (tiny_neox, lambda name: name.replace("embed_out", "lm_head")),
    ],
)
def test_other_names_for_the_same_tensor_are_renamed(
    make: Callable[..., Path], rule: Callable[[str], str], tmp_path: Path
) -> None:
    from tvlens.weights.matching import load_pair

    base = make(tmp_path / "base")
    copy = copy_with(base, tmp_path / "copy", _renamed(rule))
    report = load_pair(base, copy).load_report
    assert report.identical is True
    for entry in report.tensors:
        if entry.base is not None:
            assert entry.status == ("compared" if rule(entry.base) == entry.base else "renamed")
            assert entry.tuned == rule(entry.base)
    assert "renamed" in report.counts


def test_a_vector_stored_as_a_row_is_reshaped(base: Path, tmp_path: Path) -> None:
    from tvlens.weights.matching import load_pair

    name = "model.layers.0.input_layernorm.weight"
    copy = copy_with(base, tmp_path / "copy", lambda t: t.update({name: t[name].reshape(1, -1)}))
    pair = load_pair(base, copy)
    entry = next(e for e in pair.load_report.tensors if e.base == name)
    assert entry.status == "reshaped"
    assert pair.load_report.identical is True
    assert pair.read(LN1).dense_delta().shape == (32,)


def test_buffers_are_named_and_not_compared(tmp_path: Path) -> None:
    from tvlens.weights.matching import load_pair

    base = tiny_gpt2(tmp_path / "base")
    mask = {"transformer.h.0.attn.bias": torch.ones(1, 1, 64, 64, dtype=torch.uint8)}
    copy = copy_with(base, tmp_path / "copy", lambda t: t.update(mask))
    bare = copy_with(copy, tmp_path / "bare", _renamed(lambda n: n.removeprefix("transformer.")))
    for pair in (load_pair(base, copy), load_pair(copy, bare)):
        assert pair.load_report.counts["buffer"] == 1
        assert pair.load_report.identical is True


def test_an_adapter_beside_a_model_is_mentioned(base: Path, tuned: Path) -> None:
    from tvlens.weights.matching import load_pair

    (tuned / "adapter_config.json").write_text("{}")
    warnings = load_pair(base, tuned).load_report.warnings
    assert warnings == ["tuned holds an adapter beside the model; only the model is read."]


@pytest.mark.parametrize("side", ["base", "tuned"])
def test_a_tensor_that_only_one_has_is_named_and_warned_of(
    base: Path, tmp_path: Path, side: str
) -> None:
    from tvlens.weights.matching import load_pair

    extra = copy_with(base, tmp_path / "extra", lambda t: t.update(v_head=torch.ones(3)))
    pair = load_pair(extra, base) if side == "base" else load_pair(base, extra)
    entry = next(e for e in pair.load_report.tensors if "v_head" in (e.base, e.tuned))
    assert entry.status == f"only_in_{side}"
    assert pair.load_report.identical is False
    assert "v_head is not analysed" in pair.load_report.warnings[0]


def test_a_tensor_that_no_table_knows_is_refused_not_skipped(base: Path, tmp_path: Path) -> None:
    from tvlens.weights.matching import load_pair

    def edit(tensors: dict[str, Tensor]) -> None:
        tensors["v_head"] = torch.ones(())

    extra = copy_with(base, tmp_path / "extra", edit)
    report = load_pair(extra, extra).load_report
    assert [entry.base for entry in report.refused] == ["v_head"]
    assert "v_head is not analysed" in report.warnings[0]


def test_a_stored_copy_of_a_tied_embedding_is_tied(tmp_path: Path) -> None:
    from tvlens.weights.matching import load_pair

    base = tiny_llama(tmp_path / "base", tie_word_embeddings=True)
    both = copy_with(
        base,
        tmp_path / "both",
        lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}),
    )
    for first, second in ((base, base), (base, both), (both, both)):
        pair = load_pair(first, second)
        assert pair.load_report.counts["tied"] == 1
        assert pair.load_report.identical is True
        assert W_U not in pair.components
        assert pair.read(W_E).tied
        assert not pair.read(W_Q).tied


def test_a_head_that_differs_from_its_tied_embedding_is_compared_and_warned_of(
    tmp_path: Path,
) -> None:
    from tvlens.weights.matching import load_pair

    base = tiny_llama(tmp_path / "base", tie_word_embeddings=True)
    head = torch.ones(64, 32)
    other = copy_with(base, tmp_path / "other", lambda t: t.update({"lm_head.weight": head}))
    pair = load_pair(base, other)
    assert any("differs from model.embed_tokens.weight" in w for w in pair.load_report.warnings)
    embedding = pair.base_weight(W_E)
    assert torch.equal(pair.read(W_U).base, embedding.T)
    assert torch.equal(pair.read(W_U).dense_delta(), head.T - embedding.T)


def test_untying_is_a_warning_and_the_head_is_compared_with_the_embedding(tmp_path: Path) -> None:
    from tvlens.weights.matching import load_pair

    base = tiny_llama(tmp_path / "base", tie_word_embeddings=True)
    untied = copy_with(base, tmp_path / "untied", lambda t: t.update({"lm_head.weight": HEAD}))
    _configured(untied, tie_word_embeddings=False)
    for first, second in ((base, untied), (untied, base)):
        pair = load_pair(first, second)
        assert [w for w in pair.load_report.warnings if "ties its unembedding" in w]
        difference = pair.tuned_weight(W_U) - pair.base_weight(W_U)
        assert torch.allclose(pair.read(W_U).dense_delta(), difference)
        assert not pair.read(W_E).tied


HEAD = torch.full((64, 32), 0.5)


def test_an_untied_model_without_a_head_is_refused(base: Path, tmp_path: Path) -> None:
    from tvlens.weights.matching import load_pair

    bare = copy_with(base, tmp_path / "bare", lambda t: t.pop("lm_head.weight"))
    with pytest.raises(IncomparableModelsError, match=r"base has lm_head\.weight, bare lacks it"):
        load_pair(base, bare)
    with pytest.raises(CheckpointError, match=r"neither bare nor bare has lm_head\.weight"):
        load_pair(bare, bare)


# --- configs ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entries", "field"),
    [
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, "rope_theta"),
        ({"rope_parameters": None, "rope_theta": 20000}, "rope_theta"),
        (
            {"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}},
            "rope_scaling",
        ),
        ({"rms_norm_eps": 1e-5}, "norm_eps"),
        ({"sliding_window": 16}, "sliding_window"),
    ],
)
def test_a_config_entry_that_changes_the_function_is_a_loud_warning(
    base: Path, tmp_path: Path, entries: dict[str, object], field: str
) -> None:
    from tvlens.weights.matching import load_pair

    other = shutil.copytree(base, tmp_path / "other")
    _configured(other, **entries)
    report = load_pair(base, other).load_report
    assert [(d.field, d.effect) for d in report.config_differences] == [(field, "function")]
    assert f"config.json differs in {field}" in report.warnings[0]
    assert report.identical is False


def test_the_old_and_the_new_form_of_rope_are_the_same(base: Path, tmp_path: Path) -> None:
    from tvlens.weights.matching import load_pair

    old = shutil.copytree(base, tmp_path / "old")
    _configured(old, rope_parameters=None, rope_theta=10000, rope_scaling=None)
    report = load_pair(base, old).load_report
    assert report.config_differences == []
    assert report.identical is True


def test_the_float32_of_an_epsilon_is_no_difference(base: Path, tmp_path: Path) -> None:
    from tvlens.weights.matching import load_pair

    other = shutil.copytree(base, tmp_path / "other")
    _configured(other, rms_norm_eps=9.999999974752427e-07)
    assert load_pair(base, other).load_report.config_differences == []


def test_a_config_entry_without_effect_is_a_note(base: Path, tmp_path: Path) -> None:
    from tvlens.weights.matching import load_pair

    other = shutil.copytree(base, tmp_path / "other")
    _configured(other, eos_token_id=7, transformers_version="4.0.0")
    report = load_pair(base, other).load_report
    assert [(d.field, d.effect) for d in report.config_differences] == [("eos_token_id", "note")]
    assert report.identical is True


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"num_hidden_layers": 3}, "differ in n_layers: 2 in base, 3 in other"),
        ({"num_key_value_heads": 4}, "differ in n_kv_heads: 2 in base, 4 in other"),
        ({"num_attention_heads": 2}, "differ in n_heads: 4 in base, 2 in other"),
        ({"hidden_size": 64}, "differ in d_head: 8 in base, 16 in other"),
        ({"intermediate_size": 64}, "differ in d_mlp: 48 in base, 64 in other"),
        ({"hidden_act": "gelu"}, "differ in activation: 'silu' in base, 'gelu' in other"),
        ({"attention_bias": True}, "differ in qkv_bias: False in base, True in other"),
    ],
)
def test_another_architecture_is_refused_with_both_sides_named(
    base: Path, tmp_path: Path, config: dict[str, object], sentence: str
) -> None:
    from tvlens.weights.matching import load_pair

    other = tiny_llama(tmp_path / "other", **config)
    with pytest.raises(IncomparableModelsError, match=sentence) as caught:
        load_pair(base, other)
    assert caught.value.report.config_differences[0].effect == "refused"


def test_another_model_type_is_refused_with_both_sides_named(base: Path, tmp_path: Path) -> None:
    from tvlens.weights.matching import load_pair

    other = tiny_gpt2(tmp_path / "other")
    with pytest.raises(IncomparableModelsError, match="base is a llama model, other a gpt2 model"):
        load_pair(base, other)


# --- shapes and contents ------------------------------------------------------------------------


def test_another_shape_is_refused_with_both_sides_named(base: Path, tmp_path: Path) -> None:
    from tvlens.weights.matching import load_pair

    other = copy_with(base, tmp_path / "other", lambda t: t.update({Q_PROJ: t[Q_PROJ][:16]}))
    sentence = r"q_proj\.weight is \(32, 32\) in base and \(16, 32\) in other"
    with pytest.raises(IncomparableModelsError, match=sentence) as caught:
        load_pair(base, other)
    assert [entry.base for entry in caught.value.report.refused] == [Q_PROJ]
    with pytest.raises(CheckpointError, match=r"their config.json asks for \(32, 32\)"):
        load_pair(other, other)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("side", ["base", "tuned"])
def test_nan_and_inf_are_refused_by_tensor_and_index(
    base: Path, tmp_path: Path, value: float, side: str
) -> None:
    from tvlens.weights.matching import load_pair

    def poison(tensors: dict[str, Tensor]) -> None:
        tensors[Q_PROJ][5, 7] = value
        tensors["model.norm.weight"][2] = value

    bad = copy_with(base, tmp_path / "bad", poison)
    folders = (bad, base) if side == "base" else (base, bad)
    sentence = r"bad: model\.layers\.0.*q_proj\.weight\[5, 7\] in model\.safetensors is NaN or Inf"
    with pytest.raises(CheckpointError, match=sentence + r".*1 more tensors") as caught:
        load_pair(*folders)
    report = caught.value.report
    assert {getattr(entry, side) for entry in report.refused} == {Q_PROJ, "model.norm.weight"}
    assert len(report.tensors) == 21
    assert report.to_dict()["identical"] is None
    pair = load_pair(*folders, scan=False)
    with pytest.raises(CheckpointError, match=sentence):
        pair.read(W_Q)


def test_a_nan_beyond_the_first_chunk_has_its_own_index(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tvlens.weights import contents
    from tvlens.weights.matching import load_pair

    def poison(tensors: dict[str, Tensor]) -> None:
        tensors[Q_PROJ][30, 1] = torch.nan

    monkeypatch.setattr(contents, "CHUNK", 100)
    bad = copy_with(base, tmp_path / "bad", poison)
    with pytest.raises(CheckpointError, match=r"\[30, 1\]"):
        load_pair(base, bad)
    pair = load_pair(base, copy_with(base, tmp_path / "tuned", add_noise()))
    assert pair.load_report.identical is False


def test_a_dtype_that_is_no_float_is_refused(base: Path, tmp_path: Path) -> None:
    from tvlens.weights.matching import load_pair

    other = copy_with(base, tmp_path / "other", lambda t: t.update({Q_PROJ: t[Q_PROJ].char()}))
    with pytest.raises(UnsupportedFormatError, match=r"other stores .*q_proj\.weight as I8"):
        load_pair(base, other)


def test_a_tensor_under_two_names_is_refused(base: Path, tmp_path: Path) -> None:
    from tvlens.weights.matching import load_pair

    twice = copy_with(base, tmp_path / "twice", lambda t: t.update({TWIN: t[Q_PROJ].clone()}))
    with pytest.raises(CheckpointError, match=r"twice stores .*q_proj\.weight twice"):
        load_pair(base, twice)


# --- floors -------------------------------------------------------------------------------------


def test_the_floor_is_that_of_the_coarser_checkpoint(base: Path, tmp_path: Path) -> None:
    from tvlens.weights.matching import load_pair

    def round_all(tensors: dict[str, Tensor]) -> None:
        tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items()})

    coarse = copy_with(base, tmp_path / "coarse", round_all)
    weight = load_pair(base, coarse).read(Component("matrix", 1, None, "W_gate"))
    assert (weight.base_dtype, weight.tuned_dtype) == ("float32", "bfloat16")
    lost = float(weight.dense_delta().double().square().sum())
    # 1,536 uniform errors: a relative spread of 0.9 / 39
    assert float(weight.floor.double().sum()) == pytest.approx(lost, rel=0.1)


def test_storage_notes_set_the_floor_of_a_file_that_hides_its_rounding(
    base: Path, tuned: Path
) -> None:
    from tvlens.weights.matching import load_pair
    from tvlens.weights.precision import rounding_energy

    first = shutil.copytree(base, tuned.parent / "first")
    (first / "tvlens_storage.json").write_text('{"rounding": {"dtype": "float16"}}')
    step = {Q_PROJ: {"rms": 0.01, "max": 0.02}}
    note = {"rounding": {"dtype": "int8_row_delta", "step": step}}
    (tuned / "tvlens_storage.json").write_text(json.dumps(note))
    pair = load_pair(first, tuned)
    weight = pair.read(W_Q)
    expected = 0.01**2 / 12 + rounding_energy(weight.base, "float16")
    assert torch.allclose(weight.floor, expected)
    norm = pair.read(LN1)  # the note has no step for it
    tuned_norm = norm.base + norm.dense_delta()
    assert torch.allclose(norm.floor, rounding_energy(tuned_norm, "float16"))


def test_steps_of_rows_are_those_of_the_stored_rows(base: Path, tuned: Path) -> None:
    from tvlens.weights.matching import load_pair

    steps = [0.1 * row for row in range(32)]
    note = {"rounding": {"dtype": "int8_row_delta", "step": {Q_PROJ: steps}}}
    (tuned / "tvlens_storage.json").write_text(json.dumps(note))
    floor = load_pair(base, tuned).read(W_Q).floor
    expected = torch.tensor(steps).square() / 12
    assert torch.allclose(floor, expected.expand(32, 32), atol=1e-12)  # stored rows are outputs


# --- vocabulary ---------------------------------------------------------------------------------


def _longer(base: Path, out: Path, extra: int = 3) -> Path:
    def edit(tensors: dict[str, Tensor]) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = torch.cat([tensors[name], torch.ones(extra, 32)])

    folder = copy_with(base, out, edit)
    _configured(folder, vocab_size=64 + extra)
    return folder


def test_added_tokens_are_aligned_where_the_tokenizers_agree(base: Path, tmp_path: Path) -> None:
    from tvlens.weights.matching import load_pair

    tokens = [f"t{i}" for i in range(64)]
    first = shutil.copytree(base, tmp_path / "first")
    longer = _longer(base, tmp_path / "longer")
    _tokenizer(first, tokens)
    _tokenizer(longer, tokens, added=("<a>", "<b>", "<c>"))
    for pair in (load_pair(first, longer), load_pair(longer, first)):
        assert pair.layout.d_vocab == 64
        assert pair.load_report.counts == {"aligned": 2, "compared": 19}
        entry = next(e for e in pair.load_report.tensors if e.status == "aligned")
        word = "new" if pair.base_name == "first" else "gone"
        expected = f"64 rows by token string; 3 {word} rows without a counterpart, tokens '<a>', "
        assert entry.reason.startswith(expected)
        assert pair.read(W_E).dense_delta().norm() == 0
        assert pair.read(W_U).base.shape == (32, 64)
        assert pair.load_report.identical is False


def test_another_vocabulary_size_without_tokenizers_is_refused(base: Path, tmp_path: Path) -> None:
    from tvlens.weights.matching import load_pair

    longer = _longer(base, tmp_path / "longer")
    sentence = "base has 64 embedding rows, longer 67, and a tokenizer is missing"
    with pytest.raises(IncomparableModelsError, match=sentence):
        load_pair(base, longer)


def test_tokenizers_without_a_common_token_are_refused(base: Path, tmp_path: Path) -> None:
    from tvlens.weights.matching import load_pair

    first, second = (shutil.copytree(base, tmp_path / name) for name in ("first", "second"))
    _tokenizer(first, ["a", "b"])
    _tokenizer(second, ["x", "y"])
    with pytest.raises(IncomparableModelsError, match="have no token in common"):
        load_pair(first, second)


def test_a_token_under_another_name_is_not_compared_and_told(base: Path, tmp_path: Path) -> None:
    from tvlens.weights.matching import load_pair

    first, second = (shutil.copytree(base, tmp_path / name) for name in ("first", "second"))
    _tokenizer(first, ["a", "b", "c"])
    _tokenizer(second, ["a", "x", "c"])
    pair = load_pair(first, second)
    assert (pair.rows.new, pair.rows.gone) == ((1,), (1,))
    assert "tokens 'x'; 1 gone rows" in pair.load_report.warnings[0]
    assert pair.read(W_E).base.shape == (63, 32)


def test_a_list_of_scored_tokens_is_read_too(tmp_path: Path) -> None:
    from tvlens.weights.vocabulary import token_strings

    text = json.dumps({"model": {"vocab": [["a", 0.0], ["b", -1.0]]}})
    (tmp_path / "tokenizer.json").write_text(text)
    assert token_strings(tmp_path) == {0: "a", 1: "b"}
    (tmp_path / "tokenizer.json").unlink()
    assert token_strings(tmp_path) is None
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1}')
    assert token_strings(tmp_path) == {0: "a", 1: "b"}


def test_a_broken_tokenizer_file_is_named(base: Path, tmp_path: Path) -> None:
    from tvlens.weights.matching import load_pair

    broken = shutil.copytree(base, tmp_path / "broken")
    (broken / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read as a tokenizer"):
        load_pair(broken, base)


# --- imports ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_reading_a_pair_loads_neither_the_host_nor_transformers(base: Path, tuned: Path) -> None:
    import subprocess
    import sys

    code = (
        "import sys; from tvlens.weights.matching import load_pair\n"
        f"pair = load_pair({str(base)!r}, {str(tuned)!r}); pair.read(pair.components[0])\n"
        "assert not {'transformers', 'transformer_lens', 'peft'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])
