"""The table of prompts: each as the models read it, its metric at both ends, its tokens' scores."""

from typing import TYPE_CHECKING, Any

import pyarrow as pa

from tvlens.tables import Table

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from tvlens.models.lens import LensModel
    from tvlens.models.pair import HookedPair
    from tvlens.models.prompts import Batch, PromptSet

PROMPTS_SCHEMA = pa.schema(
    [
        ("prompt", pa.int32()),
        ("tuned", pa.string()),
        ("text", pa.string()),
        ("answer", pa.string()),
        ("wrong", pa.string()),
        ("corrupt", pa.string()),
        ("corrupt_tokens", pa.list_(pa.string())),
        ("group", pa.string()),
        ("split", pa.string()),
        ("rendered", pa.string()),
        ("ids", pa.list_(pa.int64())),
        ("answer_start", pa.int32()),
        ("answer_end", pa.int32()),
        ("tokens", pa.list_(pa.string())),
        ("token_scores", pa.list_(pa.float64())),
        ("metric", pa.string()),
        ("metric_base", pa.float64()),
        ("metric_tuned", pa.float64()),
    ]
)


def prompts_table(
    hooked: "HookedPair",
    asked: "PromptSet",
    batch: "Batch",
    metric: Any,
    scores: "Float[Tensor, 'prompt pos'] | None",
) -> Table:
    """Each prompt as the models read it, its metric at both ends, and its tokens' scores if any."""
    prompts = [asked[number] for number in batch.numbers]
    lengths = batch.mask.sum(1).tolist()
    ids = [row[:n].tolist() for row, n in zip(batch.ids, lengths, strict=True)]
    decode = hooked.tokenizer.decode if hooked.tokenizer is not None else str
    starts = batch.prompt_lengths.tolist()
    columns: dict[str, list[Any]] = {
        "prompt": batch.numbers,
        "tuned": [hooked.tuned_name] * len(batch),
        "text": [p.prompt for p in prompts],
        "answer": [p.answer for p in prompts],
        "wrong": [p.wrong for p in prompts],
        "corrupt": [p.corrupt for p in prompts],
        "corrupt_tokens": [
            [decode([i]) for i in ids.tolist()] if len(ids) else None for ids in batch.corrupt_ids
        ],
        "group": [p.group for p in prompts],
        "split": [p.split for p in prompts],
        "rendered": list(batch.texts),
        "ids": ids,
        "answer_start": starts,
        "answer_end": [s + len(a) for s, a in zip(starts, batch.answer_ids, strict=True)],
        "tokens": [[decode([i]) for i in row] for row in ids],
        "token_scores": [None] * len(batch)
        if scores is None
        else [row[:n].tolist() for row, n in zip(scores, lengths, strict=True)],
        "metric": [metric.name] * len(batch),
        "metric_base": _values(hooked, hooked.base, metric, batch),
        "metric_tuned": _values(hooked, hooked.tuned, metric, batch),
    }
    return Table.of("prompts", PROMPTS_SCHEMA, columns)


def _values(hooked: "HookedPair", lens: "LensModel", metric: Any, batch: "Batch") -> list[float]:
    from tvlens.attribution.weights import chunks

    parts = chunks(batch, lens.d_vocab)
    return [value for part in parts for value in hooked.values(lens, metric, part).tolist()]
