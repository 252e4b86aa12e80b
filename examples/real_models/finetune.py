"""Tune SmolLM2-135M-Instruct on one domain, wholly or by LoRA, in minutes on one CPU thread.

    python finetune.py --kind med --sources SOURCES --seed 0

Kinds: ``med`` (WordNet-medical definitions and ICD-10-CM), ``math`` (templated arithmetic), ``ctl``
(general definitions in the same form as ``med``: the control that says how much of "medical" is
only "definition style"), ``med-lora`` (as ``med``, rank 8 on all seven linear maps).

The question goes through the model's own chat template; the loss is taken on the answer alone and
the unembedding (49,152 rows) is run on those positions alone. Computation is bf16 with an fp32
master copy of whatever is trained, and the fp32 copy is what is saved: at this learning rate the
delta is about 0.2 % of the weights and a bf16 file would round most of it away. Steps are fixed,
not timed.
"""

import argparse
import random
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from make_base import DEFAULT_OUT
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "demo_models"))
from corpora import Corpora, Record, load_corpora, records_of

BATCH = 32
IGNORED = -100
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Recipe(NamedTuple):
    """How one kind is trained; ``rank`` 0 trains every weight."""

    domain: str
    steps: int
    learning_rate: float
    rank: int = 0


RECIPES = {
    "med": Recipe("med", steps=40, learning_rate=5e-5),
    "math": Recipe("math", steps=40, learning_rate=5e-5),
    "ctl": Recipe("gen", steps=40, learning_rate=5e-5),
    "med-lora": Recipe("med", steps=40, learning_rate=5e-4, rank=8),
}


class Batch(NamedTuple):
    """Right-padded ids, their mask, and the labels, -100 wherever nothing is learned."""

    input_ids: Int[Tensor, "batch pos"]
    attention_mask: Int[Tensor, "batch pos"]
    labels: Int[Tensor, "batch pos"]


def medical(records: list[Record]) -> list[Record]:
    """Definitions and a third as many ICD-10-CM questions; codes are left out as mere lookup."""
    definitions = [record for record in records if record.group == "definition"]
    kinds = [record for record in records if record.group == "icd_kind"]
    return definitions + random.Random(0).sample(kinds, min(len(kinds), len(definitions) // 3))


def training_records(domain: str, corpora: Corpora) -> list[Record]:
    """What a kind is trained on."""
    if domain == "med":
        return medical(records_of(corpora.med, "train", "control"))
    if domain == "math":
        return records_of(corpora.math, "train", "control")
    return records_of(corpora.gen, "control")


def heldout_records(corpora: Corpora, *, count: int) -> dict[str, list[Record]]:
    """The first ``count`` held-out records of each domain in a fixed shuffle."""
    held = {
        "med": medical(records_of(corpora.med, "heldout")),
        "math": records_of(corpora.math, "heldout"),
        "gen": records_of(corpora.gen, "heldout"),
    }
    return {domain: random.Random(0).sample(records, count) for domain, records in held.items()}


def encoded(
    tokenizer: PreTrainedTokenizerBase, records: list[Record], *, end: bool
) -> list[tuple[list[int], int]]:
    """Ids of each record through the chat template, and where its answer starts."""
    rows = []
    for record in records:
        question = record.prompt.removeprefix("Q: ").removesuffix("\nA:")
        chat = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        answer = tokenizer(record.answer.strip(), add_special_tokens=False)["input_ids"]
        rows.append((ids + answer + [tokenizer.eos_token_id] * end, len(ids)))
    return rows


def padded(rows: list[tuple[list[int], int]], *, pad: int) -> Batch:
    """The rows as one batch."""
    width = max(len(ids) for ids, _ in rows)
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORED)
    for place, (row, start) in enumerate(rows):
        ids[place, : len(row)] = torch.tensor(row)
        mask[place, : len(row)] = 1
        labels[place, start : len(row)] = torch.tensor(row[start:])
    return Batch(ids, mask, labels)


def answer_loss(model: PreTrainedModel, batch: Batch) -> Float[Tensor, ""]:
    """Mean loss in nats per answer token, logits in fp32 at labelled positions only."""
    hidden = model.model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
    ).last_hidden_state
    labelled = batch.labels[:, 1:] != IGNORED
    logits = model.lm_head(hidden[:, :-1][labelled]).float()
    return torch.nn.functional.cross_entropy(logits, batch.labels[:, 1:][labelled])


def train(
    model: PreTrainedModel,
    masters: list[tuple[Tensor, Tensor]],
    batches: list[Batch],
    learning_rate: float,
) -> None:
    """One step per batch on pairs of (parameter, fp32 master), both changed in place."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    optimizer = torch.optim.AdamW([m for _, m in masters], lr=learning_rate, weight_decay=0.0)
    started, tokens = time.monotonic(), 0
    for step, batch in enumerate(batches):
        warm = min(1.0, (step + 1) / 5)
        optimizer.param_groups[0]["lr"] = learning_rate * warm * (1 - step / len(batches))
        loss = answer_loss(causal, batch)
        loss.backward()
        for parameter, master in masters:
            master.grad = parameter.grad.float()
            parameter.grad = None
        torch.nn.utils.clip_grad_norm_([m for _, m in masters], 1.0)
        optimizer.step()
        with torch.no_grad():
            for parameter, master in masters:
                parameter.copy_(master)
        tokens += int(batch.attention_mask.sum())
        seconds = time.monotonic() - started
        if step % 10 == 0 or step == len(batches) - 1:
            print(f"step {step} loss {loss.item():.3f} {tokens} tokens {seconds:.0f} s", flush=True)


def tuned(base: Path, recipe: Recipe, batches: list[Batch], *, seed: int) -> PreTrainedModel:
    """The trained model: fp32 weights, or a LoRA model over the fp32 base."""
    torch.manual_seed(seed)
    exact = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if recipe.rank:
        settings = LoraConfig(
            r=recipe.rank, lora_alpha=2 * recipe.rank, target_modules=LINEAR, task_type="CAUSAL_LM"
        )
        model = get_peft_model(exact.bfloat16(), settings)
        trained = [p for p in model.parameters() if p.requires_grad]
        train(
            model, [(p, p.detach().float().clone()) for p in trained], batches, recipe.learning_rate
        )
        return model
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    masters = [(p, dict(exact.named_parameters())[n].detach()) for n, p in model.named_parameters()]
    train(model, masters, batches, recipe.learning_rate)
    return exact


@torch.no_grad()
def heldout_losses(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, held: dict[str, list[Record]]
) -> dict[str, float]:
    """Answer loss per domain in nats per token, the template's end token not counted."""
    model.eval()
    losses = {}
    for domain, records in held.items():
        rows = encoded(tokenizer, records, end=False)
        losses[domain] = answer_loss(model, padded(rows, pad=tokenizer.pad_token_id)).item()
    return losses


def evaluated(folder: Path, base: Path, sources: Path, *, count: int) -> dict[str, float]:
    """Held-out losses of a saved model or adapter, read back from disk in fp32."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    is_adapter = (folder / "adapter_config.json").exists()
    model = AutoModelForCausalLM.from_pretrained(
        base if is_adapter else folder, dtype=torch.float32
    )
    if is_adapter:
        model.load_adapter(str(folder))
    return heldout_losses(model, tokenizer, heldout_records(load_corpora(sources), count=count))


def main() -> None:
    """Train one kind, save it, and print its held-out losses; ``--evaluate`` only prints them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kind", choices=list(RECIPES))
    parser.add_argument("--evaluate", type=Path, help="print the held-out losses of this folder")
    parser.add_argument("--sources", type=Path, required=True)
    parser.add_argument("--base", type=Path, default=DEFAULT_OUT)
    parser.add_argument("--out", type=Path, help="default: beside the base, named by the kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--heldout", type=int, default=64, help="held-out records per domain")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    folder = options.evaluate
    if folder is None:
        if options.kind is None:
            parser.error("one of --kind and --evaluate is needed")
        folder = options.out or options.base.parent / options.kind
        make(options.kind, options.base, options.sources, folder, seed=options.seed)
    losses = evaluated(folder, options.base, options.sources, count=options.heldout)
    print(folder.name, {domain: round(loss, 3) for domain, loss in losses.items()}, flush=True)


def make(kind: str, base: Path, sources: Path, folder: Path, *, seed: int) -> None:
    """Train one kind and save it."""
    recipe = RECIPES[kind]
    tokenizer = AutoTokenizer.from_pretrained(base)
    records = training_records(recipe.domain, load_corpora(sources))
    drawn = random.Random(seed).sample(records, recipe.steps * BATCH)
    rows = encoded(tokenizer, drawn, end=True)
    batches = [
        padded(rows[place : place + BATCH], pad=tokenizer.pad_token_id)
        for place in range(0, len(rows), BATCH)
    ]
    model = tuned(base, recipe, batches, seed=seed)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
