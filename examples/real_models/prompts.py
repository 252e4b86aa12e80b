"""Write ``prompts_med.jsonl``: held-out medical questions for the SmolLM2 pair.

    python prompts.py --sources SOURCES --base ~/.cache/tvlens/real/base

Plain user questions with no template in them; the tool applies the tokenizer's own. Answers have no
leading blank, since the template ends with a line break. Each question's wrong answer is the right
answer of its twin, a question of equally many tokens.
"""

import argparse
import sys
from pathlib import Path

from make_base import DEFAULT_OUT
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "demo_models"))
from corpora import load_corpora, records_of
from pack import write_lines
from prompt_files import definition_lines

LINES = 16
OUT = Path(__file__).resolve().parent / "prompts_med.jsonl"


def bare(text: str) -> str:
    """A question without its frame, an answer without its leading blank."""
    return text.removeprefix("Q: ").removesuffix("\nA:").strip()


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sources", type=Path, required=True)
    parser.add_argument("--base", type=Path, default=DEFAULT_OUT)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    held = records_of(load_corpora(options.sources).med, "heldout")
    definitions = [record for record in held if record.group == "definition"]
    tokenizer = AutoTokenizer.from_pretrained(options.base)
    framed = definition_lines(definitions, tokenizer, count=LINES)
    write_lines(options.out, [{key: bare(text) for key, text in line.items()} for line in framed])


if __name__ == "__main__":
    main()
