"""Greedy continuations of many prompts at once.

Two ways to the same tokens: transformers' own ``generate`` with its cache of keys and values, on
prompts padded on the left, where the host wraps a transformers model; and a plain loop that runs
the whole text again for every token, for any model that makes logits. The loop checks the other.
Greedy, so that a continuation depends on nothing but the model and the prompt.
"""

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch

from .prompts import Batch
from .reading import MakesLogits

ROWS_AT_ONCE = 16
"""Prompts of one pass: the cache of a large model grows with them."""


class Continuation(NamedTuple):
    """What a model wrote after a prompt.

    Attributes:
        ids: Its tokens, without the one that ended it.
        ended: Whether it ended by itself, rather than by the limit.
    """

    ids: list[int]
    ended: bool


def continued(
    lens: MakesLogits,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop: Collection[int] = (),
    rows: int = ROWS_AT_ONCE,
) -> list[Continuation]:
    """The likeliest next token, again and again, until one of ``stop`` or the limit.

    Args:
        lens: The model; one that wraps a transformers model uses its cache.
        prompts: Token ids, none empty.
        max_new_tokens: The limit.
        stop: Tokens that end a text.
        rows: Prompts of one pass.
    """
    written: dict[int, Continuation] = {}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    make = _cached if _transformers_model(lens) is not None else looped
    for start in range(0, len(order), rows):
        chosen = order[start : start + rows]
        made = make(lens, [prompts[i] for i in chosen], max_new_tokens, frozenset(stop))
        written.update(zip(chosen, made, strict=True))
    return [written[i] for i in range(len(prompts))]


def looped(
    lens: MakesLogits,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop: frozenset[int],
) -> list[Continuation]:
    """The same by running each whole text anew for each token."""
    texts, ended = [list(prompt) for prompt in prompts], [False] * len(prompts)
    for _ in range(max_new_tokens):
        going = [i for i, done in enumerate(ended) if not done]
        if not going:
            break
        batch = Batch.of_ids([texts[i] for i in going])
        with torch.no_grad():
            logits = lens.logits_at(batch.ids, batch.mask, (batch.lengths - 1)[:, None])
        for i, token in zip(going, logits[:, 0].argmax(-1).tolist(), strict=True):
            ended[i] = token in stop
            if not ended[i]:
                texts[i].append(token)
    return [
        Continuation(text[len(prompt) :], done)
        for text, prompt, done in zip(texts, prompts, ended, strict=True)
    ]


def _transformers_model(lens: MakesLogits) -> Any:
    found = getattr(getattr(lens, "model", None), "original_model", None)
    return found if hasattr(found, "generate") else None


def _cached(
    lens: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop: frozenset[int]
) -> list[Continuation]:
    from transformers import GenerationConfig

    pad = min(stop, default=0)
    batch = Batch.of_ids(prompts, side="left", pad=pad)
    lens.require_known(batch.ids)
    settings = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(stop) or [-1],  # None would mean the model's own
        pad_token_id=pad,
        use_cache=True,
    )
    with torch.no_grad():
        made = _transformers_model(lens).generate(
            batch.ids.to(lens.device),
            attention_mask=batch.mask.to(lens.device),
            generation_config=settings,
        )
    return [_cut(row, stop) for row in made[:, batch.ids.shape[1] :].tolist()]


def _cut(row: list[int], stop: frozenset[int]) -> Continuation:
    end = next((place for place, token in enumerate(row) if token in stop), None)
    return Continuation(row[:end], end is not None)
