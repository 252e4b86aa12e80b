"""Held-out loss of a model on texts: nats per predicted token, with a bootstrap interval.

    loss(text)  = - mean over the text's answer tokens of log p(token | what precedes it)
    value       = mean over texts;  95 % interval: percentile bootstrap over texts, seeded

Units: nats per token of the model's own tokenizer; lower is better. Losses of two models compare
only where both use one tokenizer.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from tvlens.tables import Table

from .intervals import Values, interval

if TYPE_CHECKING:
    from tvlens.models.lens import LensModel
    from tvlens.models.prompts import Batch

EVALUATION_SCHEMA = pa.schema(
    [
        ("model", pa.string()),
        ("task", pa.string()),
        ("split", pa.string()),
        ("measure", pa.string()),
        ("value", pa.float64()),
        ("ci_low", pa.float64()),
        ("ci_high", pa.float64()),
        ("n", pa.int64()),
        ("unit", pa.string()),
        ("kind", pa.string()),
        ("primary", pa.bool_()),
        ("better", pa.string()),
        ("control", pa.string()),
        ("draw", pa.int32()),
        ("scale", pa.float64()),
        ("against", pa.string()),
        ("difference", pa.float64()),
        ("difference_low", pa.float64()),
        ("difference_high", pa.float64()),
        ("p_value", pa.float64()),
        ("test", pa.string()),
    ]
)
CHUNK = 16  # texts a forward pass: about 1,000 tokens, where two CPU cores are already full


def losses_table(
    model: str, lens: "LensModel", tasks: Mapping[str, "Batch"], *, seed: int = 0
) -> Table:
    """The held-out loss of one model on every task.

    Args:
        model: What the table calls the model.
        lens: The model.
        tasks: Tokenised texts by domain.
        seed: Seed of the bootstrap.
    """
    rows = []
    for task, batch in tasks.items():
        values = held_out_losses(lens, batch)
        low, high = bootstrap_interval(values, seed=seed)
        named = {"model": model, "task": task, "split": "held_out", "kind": "loss"}
        measured = {"measure": "loss", "unit": "nats/token", "better": "lower", "primary": True}
        found = {"value": values.mean(), "ci_low": low, "ci_high": high, "n": len(values)}
        rows.append({**named, **measured, **found})
    columns: dict[str, list[Any]] = {
        name: [row[name] for row in rows] for name in (rows[0] if rows else ())
    }
    return Table.of("evaluation", EVALUATION_SCHEMA, columns)


def held_out_losses(lens: "LensModel", batch: "Batch", *, chunk: int = CHUNK) -> np.ndarray:
    """One loss per text, in nats per token; memory O(chunk * pos * d_vocab)."""
    import torch

    from tvlens.models.metrics import SHIPPED
    from tvlens.models.reading import Reading

    readings = [Reading.of(SHIPPED["loss"], part) for part in batch.chunks(chunk)]
    with torch.no_grad():
        values = [reading.value(reading.logits(lens)) for reading in readings]
    return torch.cat(values).double().cpu().numpy()


def bootstrap_interval(values: np.ndarray, *, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of the mean over ``values``; NaN for fewer than two."""
    numbers, weights = np.arange(len(values)), np.ones(len(values))
    found = interval(Values(numbers, np.asarray(values, dtype=float), weights), seed=seed)
    return found.low, found.high
