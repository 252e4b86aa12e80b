"""The command under a table of docs/ gives the table's numbers, within their intervals.

Commands and figures are read from the pages, so that neither can drift from the other. Real models
as in test_deep.py; about an hour of one core in all.
"""

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import pytest

from .test_deep import REAL

pytestmark = pytest.mark.deep
ROOT = Path(__file__).parent.parent
NUMBER = r"[+-]?\d+(?:\.\d+)?"
RANGE = re.compile(
    rf"(?P<value>{NUMBER})\W*[\[(,]\s*(?P<low>{NUMBER})(?:,| to )\s*(?P<high>{NUMBER})"
)


class Figure(NamedTuple):
    """A number of a page and its interval."""

    value: float
    low: float
    high: float

    def holds(self, found: float) -> bool:
        """Whether a number is in the interval, or the figure to its last digit."""
        return self.low <= found <= self.high


def section(page: str, heading: str) -> str:
    """The text under a heading, up to the next one of any level."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    found = re.search(
        rf"^#+ {re.escape(heading)}\n(.*?)(?=^#+ |\Z)", text, re.DOTALL | re.MULTILINE
    )
    assert found, f"{page} has no section {heading!r}"
    return found[1]


def table(text: str, first: str) -> dict[str, dict[str, str]]:
    """The rows of the table whose head begins with ``first``, by their first cell."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first} |"))
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip().strip("*") for cell in line.strip("|").split("|")])
    head, _, *body = rows
    return {row[0]: dict(zip(head, row, strict=True)) for row in body}


def figure(cell: str) -> Figure:
    """``2.70 [2.42, 3.02]``, ``+1.68 (1.43 to 1.93)`` or ``+0.006, -0.016 to +0.028``."""
    found = RANGE.search(cell.replace("*", ""))
    assert found, f"no figure with an interval in {cell!r}"
    return Figure(*(float(found[name]) for name in ("value", "low", "high")))


def run(text: str, out: Path, folder: Path = ROOT) -> Path:
    """Run the first tvlens command of a text; its study goes to ``out``."""
    words = shlex.split(next(line for line in text.splitlines() if line.startswith("tvlens ")))
    place = words.index("--out")
    words = [str(ROOT / word) if word.startswith("examples/") else word for word in words]
    words[place + 1] = str(out)
    subprocess.run([sys.executable, "-m", "tvlens", *words[1:], "--quiet"], cwd=folder, check=True)
    return out


def needs_real(*names: str) -> None:
    """The real models must be there."""
    missing = [name for name in ("base", *names) if not (REAL / name).is_dir()]
    assert not missing, f"make {missing[0]} with examples/real_models first"


def assert_combination(text: str, first: str, found: pd.DataFrame) -> None:
    """The losses of a grid are in the intervals of a table."""
    plain = found[found["by"].isna() & (found["split"] == "all") & (found["measure"] == "loss")]
    values = plain.set_index(["model", "task"])["value"]
    for model, row in table(text, first).items():
        for task in ("medical", "maths", "general"):
            assert figure(row[task]).holds(values[model, task]), (model, task)


def assert_judged(
    text: str, first: str, judged: dict[str, tuple[str, str]], verdicts: pd.DataFrame
) -> None:
    """Verdicts are those of a table, gains in its intervals."""
    rows = table(text, first)
    assert rows.keys() == judged.keys()
    for name, row in rows.items():
        claim = verdicts.loc[judged[name]]
        assert claim["verdict"] == row["verdict"], name
        assert figure(row["gain over the base"]).holds(claim["value"]), name


def assert_contrasts(text: str, contrasts: pd.DataFrame) -> None:
    """Every row of the headline is in the interval of the page, with its verdict."""
    found = contrasts[contrasts["measure"].str.startswith("G_rel of writes")]
    found = found[found["weighting"] == "none"].set_index(["tuned", "against"])
    rows = table(text, "newness: G_rel of writes")
    assert len(rows) == len(found) - 2  # the LoRA is shown raw and minus both
    for name, row in rows.items():
        tuned, against = name.replace(", ", " ").split(" ", 1)
        claim = found.loc[tuned, against.replace("minus both", "minus controls")]
        assert figure(row["difference, 95 % interval"]).holds(claim["mean"]), name
        assert claim["verdict"] == row["verdict"], name


COUNTED = {
    "OV heads": ("head", "OV"),
    "QK heads": ("head", "QK"),
    "W_out neurons": ("neuron", "W_out"),
}


def assert_counts(text: str, labels: pd.DataFrame) -> None:
    """Counts of labels are those of the page, every one of them."""
    rows = table(text, "counts of labels, and sizes")
    for what, (kind, part) in COUNTED.items():
        some = labels[(labels["kind"] == kind) & (labels["part"] == part)]
        (name,) = (name for name in rows if what in name)
        names = [label.replace(" ", "_") for label in name.split(": ")[1].split(", ")]
        for tuned, cell in rows[name].items():
            if tuned not in set(some["tuned"]):
                continue
            counts = some[some["tuned"] == tuned]["label"].value_counts()
            shown = [int(number.replace(",", "")) for number in cell.split(", ")]
            assert [counts.get(label, 0) for label in names] == shown, (tuned, name)


def test_figures_are_read_as_pages_write_them() -> None:
    assert figure("**2.70** [2.42, 3.02]") == (2.70, 2.42, 3.02)
    assert figure("+1.68 (1.43 to 1.93); ctl +0.53 (0.39 to 0.69)") == (1.68, 1.43, 1.93)
    assert figure("-0.012, -0.092 to +0.069") == (-0.012, -0.092, 0.069)
    assert not Figure(1.0, 0.9, 1.1).holds(1.2)


def test_the_combination_of_the_shipped_models(tmp_path: Path) -> None:
    page = "combining.md"
    top = (ROOT / "docs" / page).read_text(encoding="utf-8")
    out = run(top, tmp_path / "study")
    grid = section(page, "The grid")
    assert_combination(grid, "model", pd.read_parquet(out / "combinations.parquet"))
    verdicts = pd.read_parquet(out / "verdicts.parquet").set_index(["task", "measure"])
    judged = {
        "general, loss": ("general", "loss"),
        "general, choices": ("general choices", "choice_logprob"),
        "mean over both domains, loss": ("mean over domains", "loss"),
        "mean over both domains, choices": ("mean over domains", "choice_logprob"),
    }
    heading = '"Combining improves generalisation", judged'
    assert_judged(section(page, heading), "judged on", judged, verdicts)


def test_the_contrasts_of_smollm2(tmp_path: Path) -> None:
    needs_real("med", "med-lora", "math", "ctl", "ctl-1")
    text = section("results.md", "What was written, and what kind it is")
    out = run(text, tmp_path / "study", REAL)
    assert_contrasts(text, pd.read_parquet(out / "contrasts.parquet"))
    assert_counts(text, pd.read_parquet(out / "labels.parquet"))


JUDGED = {
    "skill: medical loss": "medical",
    "skill: maths loss": "maths",
    "skill: general loss": "general",
    "skill: right definition": "definitions",
    "skill: sums": "sums",
    "generation quality": "answers",
    "instruction following": "obeys",
}


def assert_swept(text: str, verdicts: pd.DataFrame) -> None:
    """The verdicts of a sweep are those of a table, gains in its intervals."""
    rows = table(text, "claim")
    assert rows.keys() == JUDGED.keys()
    for name, row in rows.items():
        claim = verdicts[verdicts["task"] == JUDGED[name]].iloc[0]
        assert claim["verdict"] == row["verdict"], name
        cell = row["gain over base; over what it is smallest"]
        assert figure(cell).holds(claim["value"]), name


@pytest.mark.parametrize(
    ("tuned", "called"), [("med", "medical"), ("math", "maths"), ("med-lora", "LoRA's")]
)
def test_the_sweeps_of_smollm2(tmp_path: Path, tuned: str, called: str) -> None:
    needs_real(tuned, "ctl")
    text = section("results.md", f"Does behaviour need the {called} vector?")
    studies = ROOT / "examples" / "studies"
    out = run(text.replace("cd examples/studies && ", ""), tmp_path / "study", studies)
    assert_swept(text, pd.read_parquet(out / "verdicts.parquet"))


def test_the_representations_of_smollm2(tmp_path: Path) -> None:
    needs_real("med", "ctl")
    text = section("results.md", "What it does to the representations")
    out = run(text, tmp_path / "study", REAL)
    claim = pd.read_parquet(out / "verdicts.parquet").set_index("claim")
    row = claim.loc["fine-tuning changes a small subspace of the representations"]
    assert row["verdict"] == "not supported"
    shown = re.search(r"\((?P<value>[\d.]+) %, (?P<low>[\d.]+) to (?P<high>[\d.]+)\)", text)
    assert shown, "the page gives the rank's interval"
    assert float(shown["low"]) / 100 <= row["value"] <= float(shown["high"]) / 100


def test_the_combination_of_smollm2(tmp_path: Path) -> None:
    needs_real("med", "math", "ctl")
    text = section("combining.md", "The same on SmolLM2-135M")
    studies = ROOT / "examples" / "studies"
    out = run(text.replace("cd examples/studies && ", ""), tmp_path / "study", studies)
    assert_combination(text, "SmolLM2", pd.read_parquet(out / "combinations.parquet"))
    verdicts = pd.read_parquet(out / "verdicts.parquet").set_index(["task", "measure"])
    judged = {
        "general, loss": ("general", "loss"),
        "mean over both domains, loss": ("mean over domains", "loss"),
    }
    assert_judged(text, "SmolLM2, judged on", judged, verdicts)
