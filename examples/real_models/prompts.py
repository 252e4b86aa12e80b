"""Write ``prompts_med.jsonl`` or ``prompts_math.jsonl``: held-out questions for the SmolLM2 pairs.

    python prompts.py --kind med --sources SOURCES --base ~/.cache/tvlens/real/base

Plain user questions with no template in them; the tool applies the tokenizer's own. Answers have no
leading blank, since the template ends with a line break. Each question's wrong answer is the right
answer of its twin, a question of equally many tokens.
"""

import argparse
import sys
from pathlib import Path

from make_base import DEFAULT_OUT
from transformers import AutoTokenizer, PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "demo_models"))
from corpora import Record, load_corpora, records_of
from pack import write_lines
from prompt_files import Line, arithmetic_lines, definition_lines

LINES = 16
HERE = Path(__file__).resolve().parent


def bare(text: str) -> str:
    """A question without its frame, an answer without its leading blank."""
    return text.removeprefix("Q: ").removesuffix("\nA:").strip()


def medical(sources: Path, tokenizer: PreTrainedTokenizerBase) -> list[Line]:
    """Sixteen definitions."""
    held = records_of(load_corpora(sources).med, "heldout")
    return definition_lines(
        [record for record in held if record.group == "definition"], tokenizer, count=LINES
    )


def arithmetic(sources: Path, tokenizer: PreTrainedTokenizerBase) -> list[Line]:
    """Eight bare sums and eight word problems.

    Stripped first: this tokenizer makes a leading blank a token of its own before a digit.
    """
    held = records_of(load_corpora(sources).math, "heldout")
    lines = arithmetic_lines(held, tokenizer, written=stripped)
    groups = ("arithmetic", "word_problem")
    return [x for group in groups for x in [y for y in lines if y["group"] == group][: LINES // 2]]


def stripped(record: Record) -> Record:
    """The record without frame and leading blank."""
    return record._replace(prompt=bare(record.prompt), answer=bare(record.answer))


KINDS = {"med": medical, "math": arithmetic}


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kind", choices=list(KINDS), default="med")
    parser.add_argument("--sources", type=Path, required=True)
    parser.add_argument("--base", type=Path, default=DEFAULT_OUT)
    parser.add_argument("--out", type=Path, help="default: beside this script")
    options = parser.parse_args()
    framed = KINDS[options.kind](options.sources, AutoTokenizer.from_pretrained(options.base))
    out = options.out or HERE / f"prompts_{options.kind}.jsonl"
    write_lines(out, [{key: bare(text) for key, text in line.items()} for line in framed])


if __name__ == "__main__":
    main()
