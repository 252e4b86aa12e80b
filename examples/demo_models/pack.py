"""Put the demo models and texts into the package's data folder, and check what storage costs.

    python pack.py --sources SOURCES --work WORK --out tvlens/demo/data

Writes the base in fp16, each fine-tune as int8 steps with one scale per row, the tokenizer, the
prompt files and the held-out texts, then reads everything back through ``tvlens.demo.models`` and
prints held-out losses as stored. Refuses to finish if storage moved a loss by over 0.001.
"""

import argparse
import json
import random
import shutil
from pathlib import Path

import torch
from corpora import Corpora, Record, load_corpora, records_of
from make import heldout_prose
from prompt_files import PROMPTS
from safetensors.torch import load_file, save_file
from torch import Tensor
from training import answer_loss
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from tvlens.demo.models import COPIED, DEMO_NAMES, SCALE, STEP, VECTOR, tuned_tensors

TOLERANCE = 0.001
LINES = 100


def stored_difference(base: dict[str, Tensor], tuned: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tuning vector as int8 steps of a per-row scale; vectors in fp32."""
    stored = {}
    for name, tensor in tuned.items():
        difference = tensor.float() - base[name].float()
        if difference.dim() == 1:
            stored[name + VECTOR] = difference
            continue
        scale = (difference.abs().amax(dim=1) / 127).clamp_min(torch.finfo(torch.float32).tiny)
        stored[name + STEP] = (difference / scale[:, None]).round().to(torch.int8)
        stored[name + SCALE] = scale
    return stored


def pack_models(work: Path, out: Path) -> None:
    """Weights, configuration and tokenizer."""
    base = load_file(work / "base" / "model.safetensors")
    save_file({name: tensor.half() for name, tensor in base.items()}, out / "base.safetensors")
    for name in DEMO_NAMES[1:]:
        tuned = load_file(work / name / "model.safetensors")
        save_file(stored_difference(base, tuned), out / f"{name}.safetensors")
    for file in COPIED:
        shutil.copyfile(work / "base" / file, out / file)
    for file in out.glob("*.safetensors"):
        file.chmod(0o644)  # safetensors writes for the owner alone


def write_lines(path: Path, lines: list[dict[str, str]]) -> None:
    """JSON lines."""
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    path.write_text(text, encoding="utf-8")


def pack_texts(corpora: Corpora, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Prompt files, and held-out texts that share no question with them."""
    for domain, maker in PROMPTS.items():
        held = records_of(getattr(corpora, domain), "heldout")
        prompts = maker(held, tokenizer)
        used = {text for line in prompts for text in line.values()}
        rest = [r for r in held if r.prompt not in used and r.answer not in used]
        texts = random.Random(0).sample(rest, LINES)
        write_lines(out / f"prompts_{domain}.jsonl", prompts)
        lines = [{"prompt": record.prompt, "answer": record.answer} for record in texts]
        write_lines(out / f"heldout_{domain}.jsonl", lines)


def heldout_sets(corpora: Corpora, out: Path) -> dict[str, list[Record | str]]:
    """The shipped held-out texts, and 100 held-out paragraphs of prose."""
    sets: dict[str, list[Record | str]] = {}
    for domain in PROMPTS:
        lines = (out / f"heldout_{domain}.jsonl").read_text(encoding="utf-8").splitlines()
        sets[domain] = [Record(**json.loads(line), subject="", group="") for line in lines]
    sets["prose"] = list(heldout_prose(corpora.prose)[:LINES])
    return sets


def losses(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    sets: dict[str, list[Record | str]],
) -> dict[str, float]:
    """Held-out loss per set in nats per token."""
    return {name: answer_loss(model.eval(), tokenizer, records) for name, records in sets.items()}


def check_storage(corpora: Corpora, work: Path, out: Path) -> None:
    """Print a table of losses, the last column the largest change that storage made."""
    tokenizer = AutoTokenizer.from_pretrained(work / "base")
    sets = heldout_sets(corpora, out)
    base = load_file(out / "base.safetensors")
    print("| model | " + " | ".join(sets) + " | storage |\n|" + "---|" * (len(sets) + 2))
    for name in DEMO_NAMES:
        model = LlamaForCausalLM.from_pretrained(work / name, dtype=torch.float32)
        before = losses(model, tokenizer, sets)
        stored = {} if name == "base" else load_file(out / f"{name}.safetensors")
        model.load_state_dict(tuned_tensors(base, stored), strict=False)
        after = losses(model, tokenizer, sets)
        moved = max(abs(after[domain] - before[domain]) for domain in sets)
        print(f"| {name} | " + " | ".join(f"{x:.3f}" for x in after.values()) + f" | {moved:.5f} |")
        if moved > TOLERANCE:
            raise SystemExit(f"storage moved a loss of {name} by {moved:.4f}")


def main() -> None:
    """Pack everything and check it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sources", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    corpora = load_corpora(options.sources)
    tokenizer = AutoTokenizer.from_pretrained(options.work / "base")
    options.out.mkdir(parents=True, exist_ok=True)
    pack_models(options.work, options.out)
    pack_texts(corpora, tokenizer, options.out)
    check_storage(corpora, options.work, options.out)


if __name__ == "__main__":
    main()
