"""Write ``held_out_{med,math,gen}.jsonl``: the demo's held-out records without their frame.

    python held_out.py

The demo models and the SmolLM2 pairs are trained on the same records, split by the same hash of
their subject, so what is held out for the one is held out for the other. As in training, questions
are plain, for the tokenizer's own template, and answers have no leading blank.
"""

import json
from pathlib import Path

HERE = Path(__file__).resolve().parent
SHIPPED = HERE.parent.parent / "tvlens" / "demo" / "data"
RECORDS = 48


def bare(line: str) -> str:
    """The line without ``Q:`` and ``A:``."""
    record = json.loads(line)
    question = record["prompt"].removeprefix("Q: ").removesuffix("\nA:").strip()
    return json.dumps({"prompt": question, "answer": record["answer"].strip()})


def main() -> None:
    """Write the three files."""
    for domain in ("med", "math", "gen"):
        lines = (SHIPPED / f"heldout_{domain}.jsonl").read_text("utf-8").splitlines()
        framed = [line for line in lines if json.loads(line)["prompt"].startswith("Q: ")]
        text = "".join(f"{bare(line)}\n" for line in framed[:RECORDS])
        (HERE / f"held_out_{domain}.jsonl").write_text(text, "utf-8")


if __name__ == "__main__":
    main()
