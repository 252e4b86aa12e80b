"""Embedding rows are compared token by token, whatever their numbers; none is cut silently."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.tiny_checkpoints import copy_with, tiny_llama
from tvlens.components import Component
from tvlens.errors import CheckpointError, IncomparableModelsError

W_E = Component("embedding", None, None, "W_E")
W_U = Component("embedding", None, None, "W_U")
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
WORDS = [f"w{i}" for i in range(60)]


def word_tokenizer(folder: Path, words: list[str], added: tuple[str, ...] = ()) -> None:
    """A real tokenizer of whole words, saved as transformers saves it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="w0")
    fast.add_tokens(list(added), special_tokens=True)
    fast.save_pretrained(folder)


def resized(folder: Path, out: Path, rows: list[int | None], seed: int = 5) -> Path:
    """A copy whose embedding rows are the given rows of the old; None is a random new row."""
    generator = torch.Generator().manual_seed(seed)

    def edit(tensors: dict[str, Tensor]) -> None:
        for name in {EMBED, HEAD} & tensors.keys():
            old = tensors[name]
            made = [
                torch.randn(old.shape[1], generator=generator) if row is None else old[row]
                for row in rows
            ]
            tensors[name] = torch.stack(made)

    copy = copy_with(folder, out, edit)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"vocab_size": len(rows)}))
    return copy


def plant(folder: Path, deltas: dict[str, dict[int, float]]) -> None:
    """Add a number to every entry of some rows of some tensors, in place."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    for name, rows in deltas.items():
        for row, amount in rows.items():
            tensors[name][row] += amount
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 rows, untied, a tokenizer of 60 words: rows 60 to 63 are padding."""
    folder = tiny_llama(tmp_path_factory.mktemp("vocabulary") / "base")
    word_tokenizer(folder, WORDS)
    return folder


@pytest.mark.slow
def test_a_permuted_vocabulary_is_compared_token_by_token(base: Path, tmp_path: Path) -> None:
    from tvlens.geometry.decompose import decompose
    from tvlens.weights.matching import load_pair

    order = torch.randperm(60, generator=torch.Generator().manual_seed(3)).tolist()
    tuned = resized(base, tmp_path / "tuned", [*order, 60, 61, 62, 63])
    word_tokenizer(tuned, [WORDS[i] for i in order])
    plant(tuned, {EMBED: {order.index(7): 0.5}, HEAD: {order.index(9): -0.25}})
    pair = load_pair(base, tuned)
    embedding, head = pair.read(W_E).dense_delta(), pair.read(W_U).dense_delta()
    assert torch.allclose(embedding[7], torch.tensor(0.5))
    assert torch.allclose(head[:, 9], torch.tensor(-0.25))
    embedding[7], head[:, 9] = 0, 0
    assert embedding.count_nonzero() == head.count_nonzero() == 0
    assert pair.rows.tuned[7] == order.index(7)
    assert pair.load_report.counts == {"aligned": 2, "compared": 19}
    moved = sum(i != row for i, row in enumerate(order))
    assert f"{moved} tokens have another number in tuned" in pair.load_report.warnings[0]
    entry = next(e for e in pair.load_report.tensors if e.base == EMBED)
    assert entry.equal_fraction == 63 / 64
    by_name = decompose(pair).to_frame().set_index("component")
    assert by_name.loc["embed.W_E", "delta_norm"] == pytest.approx(0.5 * 32**0.5)


def test_added_tokens_and_padding_to_a_multiple_are_reported_with_their_norms(
    tmp_path: Path,
) -> None:
    """The demo's own tokenizer and transformers' own resizing, tied."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tvlens.demo.models import demo_folder
    from tvlens.weights.matching import load_pair

    folder = demo_folder("base")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    count = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|bot|>"]})
    tokenizer.add_tokens(["tachycardia"])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64, mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[17] += 0.125
    model.save_pretrained(tmp_path / "tuned")
    tokenizer.save_pretrained(tmp_path / "tuned")

    pair = load_pair(folder, tmp_path / "tuned")
    delta = pair.read(W_E).dense_delta()
    assert delta.shape == (count, 96)
    assert torch.allclose(delta[17], torch.tensor(0.125), atol=1e-6)
    assert delta.norm(dim=1).nonzero().flatten().tolist() == [17]
    assert pair.read(W_E).tied
    assert W_U not in pair.components
    assert list(pair.rows.new_tokens.values()) == ["<|user|>", "<|bot|>", "tachycardia"]
    rows = -(-(count + 3) // 64) * 64
    assert pair.rows.new == tuple(range(count, rows))
    found = pair.load_report.to_dict()["vocabulary"]
    assert found["new"]["first"] == {
        str(count): "<|user|>",
        str(count + 1): "<|bot|>",
        str(count + 2): "tachycardia",
    }
    norms = sorted(
        float(row.norm()) for row in model.get_input_embeddings().weight.detach()[count:]
    )
    assert found["new"]["norm_low"] == pytest.approx(norms[0])
    assert found["new"]["norm_high"] == pytest.approx(norms[-1])
    assert found["new"]["norm_median"] == pytest.approx(norms[(len(norms) - 1) // 2])
    kept = model.get_input_embeddings().weight[:count].norm(dim=1)
    shorter = sum(float(norm) < found["new"]["norm_median"] for norm in kept.detach()) / count
    assert found["new"]["share_of_matched_shorter"] == pytest.approx(shorter)
    assert f"{rows - count} new rows without a counterpart, tokens '<|user|>'" in found["sentence"]
    assert any("are not compared" in w for w in pair.load_report.warnings)


@pytest.mark.parametrize("longer", ["base", "tuned"])
def test_padding_on_one_side_is_matched_by_number_and_the_surplus_told(
    base: Path, tmp_path: Path, longer: str
) -> None:
    from tvlens.weights.matching import load_pair

    padded = resized(base, tmp_path / "padded", [*range(64), None, None])
    plant(padded, {EMBED: {61: 1.0}})
    folders = (padded, base) if longer == "base" else (base, padded)
    pair = load_pair(*folders)
    sign = -1.0 if longer == "base" else 1.0
    delta = pair.read(W_E).dense_delta()
    assert torch.allclose(delta[61], torch.tensor(sign))
    assert delta.norm(dim=1).nonzero().flatten().tolist() == [61]
    assert (pair.rows.gone if longer == "base" else pair.rows.new) == (64, 65)
    assert "4 padding rows by number" in pair.load_report.vocabulary["sentence"]
    assert "2 new rows without" in load_pair(base, padded).load_report.vocabulary["sentence"]
    assert "all padding" in pair.load_report.vocabulary["sentence"]


def test_a_new_token_in_a_padding_row_is_compared_with_that_row_and_named(
    base: Path, tmp_path: Path
) -> None:
    from tvlens.weights.matching import load_pair

    tuned = shutil.copytree(base, tmp_path / "tuned")
    word_tokenizer(tuned, WORDS, added=("<x>",))
    plant(tuned, {EMBED: {60: 2.0}})
    pair = load_pair(base, tuned)
    assert pair.rows.whole
    assert torch.allclose(pair.read(W_E).dense_delta()[60], torch.tensor(2.0))
    assert pair.rows.new_tokens == {60: "<x>"}
    entry = next(e for e in pair.load_report.tensors if e.base == EMBED)
    assert entry.status == "compared"
    assert "1 new tokens at padding rows of the other: '<x>'" in entry.reason


def test_a_truncated_tokenizer_leaves_its_rows_matched_by_number(
    base: Path, tmp_path: Path
) -> None:
    from tvlens.weights.matching import load_pair

    tuned = shutil.copytree(base, tmp_path / "tuned")
    word_tokenizer(tuned, WORDS[:50])
    plant(tuned, {HEAD: {55: 1.0}})
    pair = load_pair(base, tuned)
    assert torch.allclose(pair.read(W_U).dense_delta()[:, 55], torch.tensor(1.0))
    assert list(pair.rows.gone_tokens.values()) == WORDS[50:]
    assert pair.rows.gone == ()


def test_a_dropped_token_that_moves_the_others_is_reported_as_gone(
    base: Path, tmp_path: Path
) -> None:
    from tvlens.weights.matching import load_pair

    kept = [i for i in range(60) if i != 10]
    tuned = resized(base, tmp_path / "tuned", [*kept, 60, 61, 62, 63])
    word_tokenizer(tuned, [WORDS[i] for i in kept])
    plant(tuned, {EMBED: {10: 1.0}})  # the row of w11 now
    pair = load_pair(base, tuned)
    delta = pair.read(W_E).dense_delta()
    matched = pair.rows.base.tolist()
    assert torch.allclose(delta[matched.index(11)], torch.tensor(1.0))
    assert 10 in pair.rows.gone
    assert pair.rows.gone_tokens[10] == "w10"
    # rows that are padding in both keep their number, so three of the four are compared
    assert [i for i in matched if i >= 60] == [60, 61, 62]


def test_without_tokenizers_rows_are_matched_by_number_and_the_report_says_so(
    tmp_path: Path,
) -> None:
    from tvlens.weights.matching import load_pair

    folder = tiny_llama(tmp_path / "bare")
    copy = shutil.copytree(folder, tmp_path / "copy")
    report = load_pair(folder, copy).load_report
    assert report.vocabulary["rule"] == "number"
    entry = next(e for e in report.tensors if e.base == EMBED)
    assert (entry.status, entry.reason) == (
        "compared",
        "64 rows by number, since a tokenizer is missing",
    )


def test_an_unembedding_of_another_length_than_the_embedding_is_refused(
    base: Path, tmp_path: Path
) -> None:
    from tvlens.weights.matching import load_pair

    tuned = resized(base, tmp_path / "tuned", [*range(64), None])
    word_tokenizer(tuned, WORDS)
    odd = copy_with(tuned, tmp_path / "odd", lambda t: t.update({HEAD: t[HEAD][:64]}))
    with pytest.raises(IncomparableModelsError, match=r"embeddings have 64 and 65 rows") as caught:
        load_pair(base, odd)
    assert [entry.tuned for entry in caught.value.report.refused] == [HEAD]


def test_a_nan_in_a_moved_row_is_named_by_its_stored_row(base: Path, tmp_path: Path) -> None:
    from tvlens.weights.matching import load_pair

    tuned = resized(base, tmp_path / "tuned", [*range(59, -1, -1), 60, 61, 62, 63])
    word_tokenizer(tuned, WORDS[::-1])
    plant(tuned, {EMBED: {4: float("nan")}})
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight\[4, 0\]"):
        load_pair(base, tuned, scan=False).read(W_E)


def test_row_steps_of_a_storage_note_follow_their_rows(base: Path, tmp_path: Path) -> None:
    from tvlens.weights.matching import load_pair

    tuned = resized(base, tmp_path / "tuned", [*range(59, -1, -1), 60, 61, 62, 63])
    word_tokenizer(tuned, WORDS[::-1])
    steps = [1.0 + row for row in range(64)]
    note = {"rounding": {"dtype": "int8_row_delta", "step": {EMBED: steps, HEAD: steps}}}
    (tuned / "tvlens_storage.json").write_text(json.dumps(note))
    pair = load_pair(base, tuned)
    expected = torch.tensor([steps[59 - i] if i < 60 else steps[i] for i in range(64)]) ** 2 / 12
    assert torch.allclose(pair.read(W_E).floor, expected[:, None].expand(64, 32), atol=1e-6)
    assert torch.allclose(pair.read(W_U).floor, expected.expand(32, 64), atol=1e-6)


def test_tokens_come_from_the_files_beside_vocab_json(tmp_path: Path) -> None:
    from tvlens.weights.vocabulary import token_strings

    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1}')
    (tmp_path / "added_tokens.json").write_text('{"<x>": 2}')
    decoder = {"0": {"content": "ignored"}, "3": {"content": "<y>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    assert token_strings(tmp_path) == {0: "a", 1: "b", 2: "<x>", 3: "<y>"}
    (tmp_path / "added_tokens.json").write_text("[1]")
    with pytest.raises(CheckpointError, match=r"added_tokens\.json cannot be read"):
        token_strings(tmp_path)


def test_tokens_beyond_the_rows_are_told(base: Path, tmp_path: Path) -> None:
    from tvlens.weights.matching import load_pair

    tuned = shutil.copytree(base, tmp_path / "tuned")
    word_tokenizer(tuned, WORDS, added=tuple(f"<{i}>" for i in range(6)))
    report = load_pair(base, tuned).load_report
    assert any("numbers 2 tokens beyond its embedding rows" in w for w in report.warnings)


Tokenizer = st.lists(st.sampled_from("abcdefgh"), unique=True, max_size=6)


@pytest.mark.slow
@given(first=Tokenizer, second=Tokenizer, extra=st.tuples(st.integers(0, 3), st.integers(0, 3)))
def test_every_row_is_matched_once_or_left_out_once(
    first: list[str], second: list[str], extra: tuple[int, int]
) -> None:
    """Against a slow reading of the rule: by string, else padding by number."""
    from tvlens.weights.vocabulary import matched_rows

    sizes = len(first) + extra[0], len(second) + extra[1]
    rows = matched_rows((dict(enumerate(first)), dict(enumerate(second))), sizes)
    pairs = list(zip(rows.base.tolist(), rows.tuned.tolist(), strict=True))
    assert sorted([b for b, _ in pairs] + list(rows.gone)) == list(range(sizes[0]))
    assert sorted([t for _, t in pairs] + list(rows.new)) == list(range(sizes[1]))
    for number, token in enumerate(first):
        if token in second:
            assert (number, second.index(token)) in pairs
    shared = [t for t in first if t in second]
    assert rows.by_token == len(shared)
    moved = any(first.index(t) != second.index(t) for t in shared)
    for base, tuned in pairs:
        tokens = [t[i] for t, i in ((first, base), (second, tuned)) if i < len(t)]
        if len(tokens) == 2:
            assert tokens[0] == tokens[1]
        else:
            assert base == tuned
            assert not (moved and tokens)
