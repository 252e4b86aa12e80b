"""How good a text is to look at: variety, repetition, loops, and likeness to a reference.

    distinct_n = different n-grams of words / n-grams of words [1];  rep_n = 1 - distinct_n [2]

of each text by itself, not of all texts together: a mean over texts can be resampled.

[1] Li et al. 2016, https://arxiv.org/abs/1510.03055; [2] Welleck et al. 2020,
https://arxiv.org/abs/1908.04319
"""

from collections.abc import Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec

LOOP_TIMES = 3
"""Said so often in a row at the end of a text is a loop; twice happens in good prose."""
LONGEST_LOOP = 32
"""Tokens of the longest thing looked for; a longer one is a repetition that rep_4 sees."""
REFERENCE_PACKAGES = {"chrf": "sacrebleu", "rouge_l": "rouge_score"}


def distinct(text: str, n: int) -> float | None:
    """Different runs of ``n`` words over all of them; None for a text of fewer words."""
    words = text.lower().split()
    runs = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return len(set(runs)) / len(runs) if runs else None


def loops(ids: Sequence[int]) -> bool:
    """Whether the tokens end in one sequence said ``LOOP_TIMES`` times in a row or more."""
    for size in range(1, min(LONGEST_LOOP, len(ids) // LOOP_TIMES) + 1):
        end = list(ids[-size:])
        if list(ids[-size * LOOP_TIMES :]) == end * LOOP_TIMES:
            return True
    return False


def quality(text: str, ids: Sequence[int], *, ended: bool) -> Iterator[tuple[str, float]]:
    """The measures of a text that need no reference."""
    for name, n in (("distinct_1", 1), ("distinct_2", 2)):
        if (share := distinct(text, n)) is not None:
            yield name, share
    if (share := distinct(text, 4)) is not None:
        yield "rep_4", 1.0 - share
    yield "loop", float(loops(ids))
    yield "length", float(len(ids))
    yield "ended", float(ended)


def missing_packages() -> dict[str, str]:
    """Measures against references whose package is not installed, with its name."""
    return {
        measure: package
        for measure, package in REFERENCE_PACKAGES.items()
        if find_spec(package) is None
    }


def likeness(text: str, reference: str) -> Iterator[tuple[str, float]]:
    """The measures of a text against a reference, as far as their packages are installed."""
    missing = missing_packages()
    if "chrf" not in missing:
        chrf = import_module("sacrebleu.metrics.chrf").CHRF()
        yield "chrf", chrf.sentence_score(text, [reference]).score
    if "rouge_l" not in missing:
        rouge = import_module("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
        yield "rouge_l", rouge.score(reference, text)["rougeL"].fmeasure
