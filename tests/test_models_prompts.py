"""Prompt files line by line, and tokenising by the tokenizer's own conventions."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tvlens.errors import HostError, PromptError
from tvlens.models.prompts import (
    NEUTRAL,
    Batch,
    Prompt,
    PromptSet,
    load_prompts,
    load_texts,
    split_of,
    tokenised,
)


def words_tokenizer(*, bos: bool = False, eos: bool = False, chat: bool = False) -> Any:
    """Byte-level BPE trained on a sentence or two; BOS and EOS only where asked for."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    text = ["The capital of France is Paris", "The capital of Italy is Rome"] * 9
    specials = ["<s>", "</s>", "<pad>", "<user>", "<end>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        text,
        trainers.BpeTrainer(
            vocab_size=300, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
        ),
    )
    template = [*(["<s>"] if bos else []), "$A", *(["</s>"] if eos else [])]
    if bos or eos:
        made.post_processor = processors.TemplateProcessing(
            single=" ".join(template), special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    if chat:
        tokenizer.chat_template = "{% for m in messages %}<user>{{ m['content'] }}<end>{% endfor %}"
    return tokenizer


def written(path: Path, *lines: Any) -> Path:
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines), "utf-8")
    return path


FRANCE = {"prompt": "The capital of France is", "answer": " Paris", "wrong": " Rome"}


def one(**fields: str) -> PromptSet:
    return PromptSet((Prompt(**{**FRANCE, **fields}),))


def test_a_prompt_file_is_read_in_order_with_every_field(tmp_path: Path) -> None:
    second = {"prompt": "x", "corrupt": "y", "group": "g", "split": "judge"}
    read = load_prompts(written(tmp_path / "p.jsonl", FRANCE, "", second))
    assert read.name == "p.jsonl"
    assert [p.prompt for p in read] == ["The capital of France is", "x"]
    assert read[0].answer == " Paris"
    assert read[1] == Prompt("x", corrupt="y", group="g", split="judge")
    assert not read.all_have("answer")


def test_all_bad_lines_are_named_at_once_and_can_be_skipped(tmp_path: Path) -> None:
    bad = [
        "{not json",
        {"answer": "a"},
        {"prompt": "a", "anwser": "b"},
        {"prompt": ""},
        ["a"],
        {"prompt": "a", "split": "test"},
        {"prompt": "a", "wrong": "b"},
        {"prompt": 3},
    ]
    path = written(tmp_path / "p.jsonl", FRANCE, *bad)
    with pytest.raises(PromptError) as caught:
        load_prompts(path)
    message = str(caught.value)
    assert all(f"line {number}:" in message for number in range(2, 10))
    assert "anwser" in message
    assert "line 1:" not in message
    read = load_prompts(path, skip_bad_lines=True)
    assert len(read) == 1
    assert len(read.skipped) == 8


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xff\xfe"])
def test_files_without_a_prompt_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(content)
    with pytest.raises(PromptError):
        load_prompts(path)


def test_a_missing_file_and_an_unknown_demo_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=r"nothing\.jsonl"):
        load_prompts(tmp_path / "nothing.jsonl")
    with pytest.raises(PromptError, match="demo:chemistry"):
        load_prompts("demo:chemistry")
    with pytest.raises(PromptError, match="demo:chemistry"):
        load_texts("demo:chemistry")


def test_a_text_file_holds_documents_between_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_text("One line.\nAnd another.\n\n\n  Second.  \n", "utf-8")
    assert [p.prompt for p in load_prompts(path)] == ["One line.\nAnd another.", "Second."]
    assert [p.prompt for p in load_texts(path)] == ["One line.\nAnd another.", "Second."]


def test_the_neutral_texts_are_documents_of_both_splits() -> None:
    neutral = load_prompts(None)
    assert neutral.name == "neutral"
    assert len(neutral) == 16
    assert {p.split for p in neutral} == {"choose", "judge"}
    assert not any(p.answer for p in neutral)
    assert NEUTRAL.read_text("utf-8").isascii()


def test_the_split_is_a_hash_of_the_group_or_of_the_prompt() -> None:
    # the first byte of sha256("a") is 0xca, even; of sha256("b") 0x3e; of sha256("c") 0x2e;
    # of sha256("e") 0x3f, odd
    assert [split_of(key) for key in "abce"] == ["choose", "choose", "choose", "judge"]
    assert Prompt("a").split == "choose"
    assert Prompt("a", group="e").split == "judge"
    assert Prompt("a", split="judge").split == "judge"
    many = [split_of(str(number)) for number in range(1000)]
    assert 430 < many.count("judge") < 570


def test_the_answer_is_appended_to_the_prompt_and_rows_are_padded_right() -> None:
    tokenizer = words_tokenizer()
    prompts = PromptSet((Prompt(**FRANCE), Prompt("The", answer=" capital of Italy")))
    batch = tokenised(prompts, tokenizer)
    for row, prompt in enumerate(prompts):
        start, length = int(batch.prompt_lengths[row]), int(batch.lengths[row])
        assert tokenizer.decode(batch.ids[row, :start]) == prompt.prompt
        assert tokenizer.decode(batch.ids[row, start:length]) == prompt.answer
        assert batch.ids[row, start:length].tolist() == batch.answer_ids[row].tolist()
        assert (batch.ids[row, length:] == tokenizer.pad_token_id).all()
        assert batch.mask[row].tolist() == [1] * length + [0] * (batch.ids.shape[1] - length)
    assert tokenizer.decode(batch.wrong_ids[0]) == " Rome"
    assert len(batch.wrong_ids[1]) == 0
    assert not batch.adds_bos
    assert not batch.chat


def test_scored_tokens_are_the_answers_or_all_but_the_first_of_a_document() -> None:
    batch = Batch.of_ids([[5, 6, 7], [5, 6]], answers=[[], [8, 9]])
    assert batch.scored.tolist() == [[False, True, True, False], [False, False, True, True]]
    assert batch.answer_positions.tolist() == [
        [True, True, False, False],
        [False, True, True, False],
    ]
    assert batch.n_scored.tolist() == [2, 2]


@pytest.mark.parametrize("eos", [False, True])
def test_bos_is_added_where_the_tokenizer_does_and_eos_never(eos: bool) -> None:
    with_bos = tokenised(one(), words_tokenizer(bos=True, eos=eos))
    without = tokenised(one(), words_tokenizer(eos=eos))
    assert with_bos.adds_bos
    assert not without.adds_bos
    assert with_bos.ids[0, 0] == 0
    assert with_bos.ids[0, 1:].tolist() == without.ids[0].tolist()
    assert 1 not in with_bos.ids


def test_the_chat_template_is_used_once_where_there_is_one() -> None:
    tokenizer = words_tokenizer(bos=True, chat=True)
    auto, off = tokenised(one(), tokenizer), tokenised(one(), tokenizer, chat="off")
    assert auto.chat
    assert auto.texts == ["<user>The capital of France is<end>"]
    assert not auto.ids.eq(0).any(), "a template brings its own beginning"
    assert off.texts == ["The capital of France is"]
    assert off.ids[0, 0] == 0
    document = tokenised(PromptSet((Prompt("The capital"),)), tokenizer)
    assert document.texts == ["The capital"]
    with pytest.raises(PromptError, match="no chat template"):
        tokenised(one(), words_tokenizer(), chat="on")


def test_a_warning_shows_both_splits_where_joint_tokenising_differs() -> None:
    tokenizer = words_tokenizer()
    assert tokenised(one(), tokenizer).warnings == []
    broken = tokenised(one(prompt="The capital of France is Pa", answer="ris"), tokenizer)
    assert len(broken.warnings) == 1
    assert "1 prompts (1) tokenise differently" in broken.warnings[0]
    assert "jointly" in broken.warnings[0]


def test_a_corrupt_prompt_of_another_length_is_left_out_and_named() -> None:
    fits = Prompt(**FRANCE, corrupt="The capital of France is")
    longer = Prompt(**FRANCE, corrupt="The capital of the capital of Italy is")
    batch = tokenised(PromptSet((fits, longer)), words_tokenizer())
    assert [len(ids) > 0 for ids in batch.corrupt_ids] == [True, False]
    assert any("1 prompts (2) have a corrupt prompt" in text for text in batch.warnings)
    assert len(batch) == 2
    assert batch.with_corrupt().numbers == [0]
    assert torch.equal(batch.corrupt_ids[0], batch.ids[0])
    with pytest.raises(PromptError):
        batch.corrupted()


def test_rows_and_chunks_keep_each_prompts_tokens_and_number() -> None:
    batch = Batch.of_ids(
        [[1, 2, 3, 4], [5], [6, 7]], answers=[[8], [9], [3]], wrongs=[[1], [2], [4]]
    )
    chunks = list(batch.chunks(2))
    assert [part.numbers for part in chunks] == [[0, 1], [2]]
    assert chunks[1].ids.tolist() == [[6, 7, 3]]
    assert chunks[1].wrong_ids[0].tolist() == [4]
    assert batch.rows([2, 0]).numbers == [2, 0]
    assert sum(int(part.mask.sum()) for part in chunks) == int(batch.mask.sum())


def test_no_tokenizer_and_empty_prompts_are_refused() -> None:
    with pytest.raises(HostError, match="tokenizer"):
        tokenised(one(), None)
    with pytest.raises(PromptError, match="prompt 1"):
        tokenised(PromptSet((Prompt("T"),)), words_tokenizer())
