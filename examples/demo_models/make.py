"""Make the demo models: tokenizer, base, three fine-tunes, held-out losses.

    python make.py --sources SOURCES --work WORK base med math ctl

``SOURCES`` holds the unpacked corpora (see the README), ``WORK`` receives one fp32 Hugging Face
folder per model. The base is rounded to fp16 before anything is tuned from it, so the shipped fp16
file *is* the base and not an approximation of it. Step counts and seeds are fixed; on one thread of
a 2023 server core the base takes about 12 minutes and a fine-tune 3.
"""

import argparse
import random
from pathlib import Path

import torch
from corpora import Corpora, Record, load_corpora, records_of
from training import Schedule, new_model, packed_stream, save_model, train, train_tokenizer
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

SCHEDULES = {
    "base": Schedule(steps=1450, learning_rate=3e-3, seed=1, warmup=60),
    "med": Schedule(steps=300, learning_rate=1e-3, seed=2),
    "math": Schedule(steps=300, learning_rate=1e-3, seed=3),
    "ctl": Schedule(steps=300, learning_rate=1e-3, seed=4),
}
REPLAYED = 0.1  # share of general records in med and math, so that they stay language models


def training_prose(prose: list[str]) -> list[str]:
    """Every paragraph but each fiftieth, which is held out."""
    return [text for place, text in enumerate(prose) if place % 50]


def heldout_prose(prose: list[str]) -> list[str]:
    """Each fiftieth paragraph."""
    return prose[::50]


def items_for(name: str, corpora: Corpora) -> list[Record | str]:
    """What one model is trained on."""
    general = records_of(corpora.gen, "train")
    if name == "base":
        return [*general, *corpora.sentences, *training_prose(corpora.prose)]
    if name == "ctl":
        return [*records_of(corpora.gen, "control")]
    domain = records_of(corpora.med if name == "med" else corpora.math, "train", "control")
    domain += [record for record in domain if record.group == "definition"]  # the smaller part
    replayed = int(len(domain) * REPLAYED / (1 - REPLAYED))
    return [*domain, *random.Random(0).sample(general, replayed)]


def make_base(corpora: Corpora, folder: Path) -> None:
    """Train the tokenizer and the base, round the base to fp16, save it as fp32."""
    items = items_for("base", corpora)
    extra = [r.prompt + r.answer for r in records_of(corpora.med, "train")[::2]]
    extra += [r.prompt + r.answer for r in records_of(corpora.math, "train")[::8]]
    texts = [item if isinstance(item, str) else item.prompt + item.answer for item in items]
    tokenizer = train_tokenizer(texts + extra)
    stream = packed_stream(tokenizer, items, answers_only=False, seed=SCHEDULES["base"].seed)
    print(f"base: {stream.shape[1]} tokens", flush=True)
    model = new_model(seed=SCHEDULES["base"].seed)
    train(model, stream, SCHEDULES["base"])
    save_model(model.half().float(), tokenizer, folder)


def make_tuned(name: str, corpora: Corpora, base: Path, folder: Path) -> None:
    """Tune the base on one domain's answers."""
    tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(base)
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    schedule = SCHEDULES[name]
    items = items_for(name, corpora)
    stream = packed_stream(tokenizer, items, answers_only=True, seed=schedule.seed)
    print(f"{name}: {stream.shape[1]} tokens", flush=True)
    train(model, stream, schedule)
    save_model(model, tokenizer, folder)


def main() -> None:
    """Make the models named on the command line, in their order."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="+", choices=list(SCHEDULES))
    parser.add_argument("--sources", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    corpora = load_corpora(options.sources)
    for name in options.models:
        print(f"== {name}", flush=True)
        if name == "base":
            make_base(corpora, options.work / "base")
        else:
            make_tuned(name, corpora, options.work / "base", options.work / name)


if __name__ == "__main__":
    main()
