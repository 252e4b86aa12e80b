"""A base model and its fine-tune, hooked, side by side."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tvlens.errors import CheckpointError, HostError, IncomparableModelsError

from .lens import LensModel
from .metrics import Metric
from .prompts import Batch
from .reading import Reading

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
_ROWS_AT_ONCE = 16
"""Prompts of one forward pass; a large vocabulary's logits set the memory."""
_SHAPE = ("n_layers", "n_heads", "n_kv_heads", "d_head", "d_model", "d_mlp")


class HookedPair:
    """The two models of a pair, ready for forward and backward passes.

    Attributes:
        base: The base model.
        tuned: Its fine-tune.
        tokenizer: The tuned model's tokenizer, the base's where it has none, or None.
        base_name: What tables call the base.
        tuned_name: What tables call the fine-tune.
    """

    def __init__(
        self,
        pair: Any,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Load both models of ``pair`` (a ``tvlens`` Pair, or the two folders)."""
        base, tuned, adapter, names = _folders(pair)
        self.base = LensModel.load(base, device=device, dtype=dtype)
        self.tuned = LensModel.load(tuned, adapter=adapter, device=device, dtype=dtype)
        self.base_name, self.tuned_name = names
        self.tokenizer = tokenizer_in([adapter or tuned, base])
        self._require_same_shape()

    @classmethod
    def of(
        cls,
        base: LensModel,
        tuned: LensModel,
        *,
        tokenizer: Any = None,
        names: tuple[str, str] = ("base", "tuned"),
    ) -> "HookedPair":
        """A pair of models that the caller made.

        Raises:
            IncomparableModelsError: Their shapes differ.
        """
        pair = cls.__new__(cls)
        pair.base, pair.tuned, pair.tokenizer = base, tuned, tokenizer
        pair.base_name, pair.tuned_name = names
        pair._require_same_shape()
        return pair

    def reading(self, metric: Metric, batch: Batch) -> Reading:
        """``metric`` on ``batch``, with the logits it compares with, if any."""
        models = {"base": self.base, "tuned": self.tuned}
        return Reading.of(metric, batch, models.get(metric.reference or ""))

    def values(self, model: LensModel, metric: Metric, batch: Batch) -> Float[Tensor, " batch"]:
        """The metric of every prompt on one of the two models."""
        parts = []
        for rows in batch.chunks(_ROWS_AT_ONCE):
            reading = self.reading(metric, rows)
            with torch.no_grad():
                parts.append(reading.value(reading.logits(model)))
        return torch.cat(parts)

    def _require_same_shape(self) -> None:
        for name in _SHAPE:
            base, tuned = getattr(self.base, name), getattr(self.tuned, name)
            if base != tuned:
                raise IncomparableModelsError(
                    f"{name} is {base} in the base, {tuned} in the tuned."
                )


def _folders(pair: Any) -> tuple[Path, Path, Path | None, tuple[str, str]]:
    """Base folder, folder of the tuned weights, adapter folder if any, and names."""
    if isinstance(pair, tuple):
        base, tuned = (Path(folder) for folder in pair)
        adapter = (tuned / "adapter_config.json").is_file()
        names = (base.name, tuned.name)
    elif hasattr(pair, "base") and hasattr(pair, "tuned"):
        base, tuned = Path(pair.base.folder), Path(pair.tuned.folder)
        adapter = pair.tuned.is_adapter
        names = (pair.base_name, pair.tuned_name)
    else:
        raise HostError(f"expected a Pair or two folders, got {type(pair).__name__}.")
    return (base, base, tuned, names) if adapter else (base, tuned, None, names)


def tokenizer_in(folders: Sequence[Path | str]) -> Any:
    """The tokenizer of the first folder that has one, or None.

    Raises:
        CheckpointError: The files are there and do not load.
    """
    from transformers import AutoTokenizer

    for folder in map(Path, folders):
        if any((folder / name).is_file() for name in _TOKENIZER_FILES):
            try:
                return AutoTokenizer.from_pretrained(folder, local_files_only=True)
            except (OSError, ValueError, KeyError) as error:
                raise CheckpointError(
                    f"the tokenizer in {folder} does not load: {error}"
                ) from error
    return None
