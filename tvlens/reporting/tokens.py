"""Prompts whose tokens are coloured by their scores."""

import math
from dataclasses import dataclass
from typing import Any

import pandas as pd

from .circuitsvis import TokenPlot
from .figures import SIGNED, colour_at, hex_code, number
from .folder import StudyFolder, rows_of

TOKEN_PROMPTS = 8  # texts shown; the table holds the rest


@dataclass(frozen=True)
class TokenText:
    """One prompt's tokens with the sentence above them."""

    heading: str
    plot: TokenPlot
    colours: tuple[str, ...]


def token_texts(study: StudyFolder, tuned: str, slug: str) -> tuple[list[TokenText], str]:
    """The first prompts that have a score for each token, and what was left out and why."""
    prompts = study.table("prompts", tuned)
    rows = prompts[prompts["tokens"].notna() & prompts["token_scores"].notna()]
    usable, refused = [], 0
    for place, row in enumerate(rows_of(rows)):
        scores = [float("nan") if s is None else float(s) for s in row.token_scores]
        if len(scores) != len(row.tokens) or not all(map(math.isfinite, scores)) or not scores:
            refused += 1
            continue
        usable.append((place, row, scores))
    shown = usable[:TOKEN_PROMPTS]
    limit = max((abs(s) for _, _, scores in shown for s in scores), default=0.0) or 1.0
    texts = [_token_text(f"cv-{slug}-{p}", row, scores, limit) for p, row, scores in shown]
    notes = []
    if shown:
        notes.append(f"Full colour is {number(limit)} either way.")
        notes.append(f"{len(shown)} of {len(prompts)} prompts are shown.")
    if refused:
        notes.append(f"{refused} left out: a token without a finite score.")
    return texts, " ".join(notes)


def _token_text(name: str, row: Any, scores: list[float], limit: float) -> TokenText:
    named = {"split": row.split, "group": row.group, "answer": row.answer}
    known = [f"{key}: {value}" for key, value in named.items() if isinstance(value, str) and value]
    number_of = "" if pd.isna(row.prompt) else f" {int(row.prompt)}"
    heading = f"Prompt{number_of}" + (f" ({', '.join(known)})" if known else "")
    tokens = tuple(str(token) for token in row.tokens)
    plot = TokenPlot(name, tokens, tuple(scores), limit)
    return TokenText(heading, plot, tuple(_shade(score / limit) for score in scores))


def _shade(position: float) -> str:
    return hex_code(colour_at(SIGNED, position / 2 + 0.5))
