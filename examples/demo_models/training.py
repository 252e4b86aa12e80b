"""The demo tokenizer, the architecture, and one training loop with a fixed number of steps.

Every step sees 32 windows of 128 tokens from a packed stream in which each record starts with the
beginning-of-text token. AdamW, linear warm-up, cosine decay to a tenth. The base learns every
token; a fine-tune learns answers only, so the questions' form is not part of what it is taught.
"""

import math
import random
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from corpora import Record
from jaxtyping import Float, Int
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BEGIN, PAD = "<|begin|>", "<|pad|>"
# A digit is a token of its own and may carry the blank before it, so " 7" and " 4" differ at once.
PIECES = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
IGNORED = -100
WINDOWS, LENGTH = 32, 128


class Schedule(NamedTuple):
    """What a training run is fixed by."""

    steps: int
    learning_rate: float
    seed: int
    warmup: int = 40


def train_tokenizer(texts: Iterable[str], *, vocab_size: int = 2048) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that puts the beginning-of-text token first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BEGIN, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A $B", special_tokens=[(BEGIN, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=BEGIN,
        pad_token=PAD,
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )


def new_model(*, seed: int) -> LlamaForCausalLM:
    """The demo architecture at its random start: 8 layers, 4 query heads on 2 key-value heads."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=96,
        intermediate_size=208,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=24,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )
    return LlamaForCausalLM(config).float()


def packed_stream(
    tokenizer: PreTrainedTokenizerFast, items: list[Record | str], *, answers_only: bool, seed: int
) -> Int[Tensor, "2 pos"]:
    """Ids and labels of the shuffled items end to end; a text without question is learned whole."""
    items = list(items)
    random.Random(seed).shuffle(items)
    prompts = ["" if isinstance(item, str) else item.prompt for item in items]
    answers = [item if isinstance(item, str) else item.answer for item in items]
    prompt_ids = tokenizer(prompts)["input_ids"]
    answer_ids = tokenizer(answers, add_special_tokens=False)["input_ids"]
    ids, labels = [], []
    for prompt, answer in zip(prompt_ids, answer_ids, strict=True):
        masked = answers_only and len(prompt) > 1
        ids += prompt + answer
        # The first token is always learned: it is how the answer before it ends.
        labels += (prompt[:1] + [IGNORED] * (len(prompt) - 1) if masked else prompt) + answer
    return torch.tensor([ids, labels])


def train(model: LlamaForCausalLM, stream: Int[Tensor, "2 pos"], schedule: Schedule) -> None:
    """Train ``model`` in place on windows of ``stream``, every window once before any again."""
    draw = torch.Generator().manual_seed(schedule.seed)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}],
        lr=schedule.learning_rate,
        betas=(0.9, 0.98),
    )
    order, started = torch.empty(0, dtype=torch.long), time.monotonic()
    model.train()
    for step in range(schedule.steps):
        if len(order) < WINDOWS:
            offset = int(torch.randint(LENGTH, (1,), generator=draw))
            starts = torch.arange(offset, stream.shape[1] - LENGTH - 1, LENGTH)
            order = torch.cat([order, starts[torch.randperm(len(starts), generator=draw)]])
        chosen, order = order[:WINDOWS], order[WINDOWS:]
        window = stream[:, chosen[:, None] + torch.arange(LENGTH + 1)]
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate * rate(step, schedule)
        loss = window_loss(model, window[0], window[1])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0 or step == schedule.steps - 1:
            seconds = time.monotonic() - started
            print(f"step {step} loss {loss.item():.3f} {seconds:.0f} s", flush=True)
    model.eval()


def rate(step: int, schedule: Schedule) -> float:
    """The learning rate's factor at a step: linear up, cosine down to a tenth."""
    if step < schedule.warmup:
        return (step + 1) / schedule.warmup
    done = (step - schedule.warmup) / max(1, schedule.steps - schedule.warmup)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * done))


def window_loss(
    model: LlamaForCausalLM, ids: Int[Tensor, "batch pos"], labels: Int[Tensor, "batch pos"]
) -> Float[Tensor, ""]:
    """Mean next-token loss in nats over labelled positions, the unembedding run on those alone."""
    hidden = model.model(input_ids=ids[:, :-1]).last_hidden_state
    labelled = labels[:, 1:] != IGNORED
    logits = model.lm_head(hidden[labelled])
    return torch.nn.functional.cross_entropy(logits, labels[:, 1:][labelled])


@torch.no_grad()
def answer_loss(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, records: list[Record | str]
) -> float:
    """Loss in nats per answer token over all records; a text counts from its first token."""
    total, count = 0.0, 0
    for record in records:
        prompt = "" if isinstance(record, str) else record.prompt
        answer = record if isinstance(record, str) else record.answer
        start = tokenizer(prompt)["input_ids"]
        ids = (start + tokenizer(answer, add_special_tokens=False)["input_ids"])[:256]
        logits = model(input_ids=torch.tensor([ids])).logits[0, len(start) - 1 : -1]
        target = torch.tensor(ids[len(start) :])
        total += torch.nn.functional.cross_entropy(logits, target, reduction="sum").item()
        count += len(target)
    return total / count


def save_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """A Hugging Face folder in fp32."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
