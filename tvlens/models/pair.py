"""A base model and its fine-tune, hooked, side by side."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tvlens.errors import CheckpointError, HostError, IncomparableModelsError
from tvlens.weights.sources.folder import read_json
from tvlens.weights.vocabulary import RowMatch, Tokens, matched_rows, named, token_strings

from .lens import LensModel, refuse_gguf
from .metrics import Metric
from .prompts import Batch
from .reading import Reading

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
_ROWS_AT_ONCE = 16
"""Prompts of one forward pass; a large vocabulary's logits set the memory."""
_SHAPE = ("n_layers", "n_heads", "n_kv_heads", "d_head", "d_model", "d_mlp", "d_vocab")


class LogitDifference(NamedTuple):
    """How far apart the logits of two models are.

    Attributes:
        difference: Largest absolute difference.
        size: Largest absolute logit of the base.
    """

    difference: float
    size: float


class HookedPair:
    """The two models of a pair, ready for forward and backward passes.

    Attributes:
        base: The base model.
        tuned: Its fine-tune.
        tokenizer: The tuned model's tokenizer; the base's where the tuned model has none, or has
            tokens that the base does not know; where no folder has one, what a hooked model in
            memory carries; or None.
        warnings: What the two vocabularies leave out, in sentences.
        base_name: What tables call the base.
        tuned_name: What tables call the fine-tune.
    """

    def __init__(
        self,
        pair: Any,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Load both models of ``pair`` (a ``tvlens`` Pair, or the two folders).

        One sequence of token ids serves both models, so every token must have one number in both.
        Rows that only one of them has are left out of it. Models that are in memory are used as
        they are: their weights are shared where device, dtype and rows fit and no adapter is
        merged, and copied otherwise; the models stay as they were.

        Raises:
            IncomparableModelsError: A token has another number in each, or the shapes differ.
        """
        common, how = common_tokens_of(pair), {"device": device, "dtype": dtype}
        self.base = base_lens(pair, common, **how)
        self.tuned = tuned_lens(pair, common, **how)
        self.base_name, self.tuned_name = _folders(pair)[-1]
        self.tokenizer = common.tokenizer(pair)
        self.warnings = common.warnings
        self._require_same_shape()

    @classmethod
    def of(
        cls,
        base: Any,
        tuned: Any,
        *,
        tokenizer: Any = None,
        names: tuple[str, str] = ("base", "tuned"),
    ) -> "HookedPair":
        """A pair of models that the caller made: LensModel, TransformerBridge, HookedTransformer.

        Raises:
            IncomparableModelsError: Their shapes differ.
            HostError: One is no hooked model.
        """
        pair = cls.__new__(cls)
        pair.base, pair.tuned = (
            model if isinstance(model, LensModel) else LensModel.wrap(model)
            for model in (base, tuned)
        )
        pair.tokenizer = tokenizer
        pair.base_name, pair.tuned_name = names
        pair.warnings = ()
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

    def largest_logit_difference(self, batch: Batch) -> "LogitDifference":
        """How far the two models' logits are apart at any token of ``batch``."""
        difference = size = 0.0
        for rows in batch.chunks(_ROWS_AT_ONCE):
            places = torch.arange(rows.ids.shape[1]).expand(len(rows), -1)
            with torch.no_grad():
                base, tuned = (
                    model.logits_at(rows.ids, rows.mask, places)[rows.mask.bool()]
                    for model in (self.base, self.tuned)
                )
            difference = max(difference, float((tuned - base).abs().max()))
            size = max(size, float(base.abs().max()))
        return LogitDifference(difference, size)

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
    for path in (base, tuned):
        refuse_gguf(path)
    return (base, base, tuned, names) if adapter else (base, tuned, None, names)


@dataclass(frozen=True)
class CommonTokens:
    """The token ids that mean the same to both models of a pair.

    Attributes:
        size: Rows that both embeddings have; both models are read with so many.
        unknown: Ids below ``size`` that only one tokenizer knows, or the two know differently.
        folders: Where to look for the tokenizer of the prompts, in order.
        warnings: What is left out, in sentences.
    """

    size: int
    unknown: Mapping[int, str]
    folders: tuple[Path, ...]
    warnings: tuple[str, ...] = ()

    def tokenizer(self, pair: Any) -> Any:
        """The tokenizer of the prompts for ``pair``, or None."""
        return tokenizer_in(self.folders) or _carried_tokenizer(_models(pair))


def base_lens(pair: Any, common: CommonTokens, *, device: str, dtype: torch.dtype) -> LensModel:
    """The base of a pair alone, with the rows that ``common`` says.

    Raises:
        CheckpointError: It does not load.
        HostError: TransformerLens does not know the architecture.
    """
    base, *_ = _folders(pair)
    lens = _lens(_models(pair)[0], base, rows=common.size, device=device, dtype=dtype)
    lens.unknown = common.unknown
    return lens


def tuned_lens(pair: Any, common: CommonTokens, *, device: str, dtype: torch.dtype) -> LensModel:
    """The fine-tune of a pair alone, an adapter merged, with the rows that ``common`` says.

    Raises:
        CheckpointError: It does not load.
        AdapterError: The adapter does not fit the base.
    """
    base, tuned, adapter, _ = _folders(pair)
    inside, how = _models(pair), {"rows": common.size, "device": device, "dtype": dtype}
    if adapter is None:
        lens = _lens(inside[1], tuned, **how)
    else:
        lens = _adapted(inside, base, adapter, **how)
    lens.unknown = common.unknown
    return lens


def common_tokens(
    base: Path, tuned: Path, adapter: Path | None = None, *, sizes: tuple[int, int] | None = None
) -> CommonTokens:
    """What one sequence of token ids can hold that both models are to read.

    Args:
        base: Folder of the base.
        tuned: Folder of the tuned model, the base's again for an adapter.
        adapter: Folder of the adapter, which may hold a tokenizer.
        sizes: Rows of the embeddings of base and tuned; those in config.json where not given.

    Raises:
        IncomparableModelsError: A token that both know has another number in each, or the
            embeddings differ in length and a tokenizer is missing.
    """
    sizes = sizes or (_configured_size(base), _configured_size(tuned))
    own = adapter or tuned
    tokens = token_strings(base), token_strings(own)
    if tokens[0] is None or tokens[1] is None:
        if sizes[0] != sizes[1]:
            raise IncomparableModelsError(
                f"the base has {sizes[0]} tokens, the tuned model {sizes[1]}, and a tokenizer is "
                "missing, so nobody knows which they share.",
                hint="Put both tokenizer.json files beside the weights.",
            )
        return CommonTokens(sizes[0], {}, (own, base))
    rows = matched_rows((tokens[0], tokens[1]), sizes)
    _require_same_numbers(rows, tokens[0])
    return _in_common(rows, min(sizes), (base, own), (tokens[0], tokens[1]))


def common_tokens_of(pair: Any) -> CommonTokens:
    """``common_tokens`` of a ``tvlens`` Pair, or of two folders.

    Raises:
        IncomparableModelsError: As for ``common_tokens``.
    """
    base, tuned, adapter, _ = _folders(pair)
    sizes = _vocabulary_size(pair, 0, base), _vocabulary_size(pair, 1, tuned)
    return common_tokens(base, tuned, adapter, sizes=sizes)


def _in_common(
    rows: RowMatch, size: int, folders: tuple[Path, Path], tokens: tuple[Tokens, Tokens]
) -> CommonTokens:
    """The common tokens of vocabularies that number them alike."""
    both = tokens[0].items() & tokens[1].items()
    lone = [dict(t.items() - both) for t in tokens]
    unknown = {i: token for side in lone for i, token in side.items() if i < size}
    # whose tokenizer has nothing that the other model does not know; the tuned model's if both
    first, second = folders if lone[1] and not lone[0] else folders[::-1]
    warnings = []
    if lone[1] or lone[0]:
        listed = "; ".join(
            f"only the {name} knows {named(token for _, token in sorted(side.items()))}"
            for name, side in zip(("base", "tuned model"), lone, strict=True)
            if side
        )
        whose = "base's" if first == folders[0] else "tuned model's"
        warnings.append(
            f"the vocabularies differ: {listed}. Prompts are read with the {whose} tokenizer and "
            "chat template, and such tokens can be neither read nor answered."
        )
    if rows.sizes[0] != rows.sizes[1]:
        warnings.append(
            f"attribution runs on the first {size:,} rows of embedding and unembedding, which both "
            f"models have (base {rows.sizes[0]:,}, tuned {rows.sizes[1]:,}); the longer model's "
            "probabilities leave out the rest."
        )
    return CommonTokens(size, unknown, (first, second), tuple(warnings))


def _require_same_numbers(rows: RowMatch, tokens: Tokens) -> None:
    if not rows.by_token:
        raise IncomparableModelsError(
            "the two tokenizers have no token in common, so no prompt can be read by both models.",
        )
    if rows.moved:
        first = int((rows.base != rows.tuned).nonzero()[0])
        base, tuned = int(rows.base[first]), int(rows.tuned[first])
        raise IncomparableModelsError(
            f"token {tokens[base]!r} is number {base} in the base and {tuned} in the tuned model "
            f"({rows.moved:,} tokens moved), so one sequence of ids cannot serve both.",
            hint="The weights can still be compared: tvlens decompose.",
        )


def _configured_size(folder: Path) -> int:
    return _size_in(read_json(folder / "config.json"), str(folder / "config.json"))


def _vocabulary_size(pair: Any, side: int, folder: Path) -> int:
    """Rows of an embedding; of a model in memory by the config it carries."""
    model = _models(pair)[side]
    if model is None:
        return _configured_size(folder)
    if (config := getattr(model, "config", None)) is None:
        return int(model.cfg.d_vocab)
    return _size_in(config.to_dict(), f"the config of {type(model).__name__}")


def _size_in(config: Mapping[str, Any], where: str) -> int:
    try:
        return int((config.get("text_config") or config)["vocab_size"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{where} gives no vocab_size.") from error


def _models(pair: Any) -> tuple[Any, Any]:
    """The two models of a pair as far as they are in memory, None for those on disk."""
    sources = (None, None) if isinstance(pair, tuple) else (pair.base, pair.tuned)
    base, tuned = (getattr(source, "module", None) for source in sources)
    return base, tuned


def _carried_tokenizer(models: tuple[Any, Any]) -> Any:
    """The tokenizer of a hooked model, the tuned one's first; None where neither has one."""
    base, tuned = (getattr(model, "tokenizer", None) for model in models)
    return tuned or base


def _lens(model: Any, folder: Path, **how: Any) -> LensModel:
    return LensModel.load(folder, **how) if model is None else LensModel.of(model, **how)


def _adapted(models: tuple[Any, Any], base: Path, adapter: Path, **how: Any) -> LensModel:
    """The base with its adapter merged into a copy of it."""
    if models[1] is not None:
        return LensModel.of(models[1], **how)
    if models[0] is not None:
        return LensModel.of(models[0], adapter=adapter, **how)
    return LensModel.load(base, adapter=adapter, **how)


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
