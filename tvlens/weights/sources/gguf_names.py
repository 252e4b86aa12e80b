"""What transformers knows about GGUF files: configs, tokens, names, and order of rows.

llama.cpp has names of its own and stores some tensors otherwise (rows of Llama's W_Q and W_K in
another order, Gemma's gains with 1 added, GPT-2's matrices transposed). transformers undoes that
when it loads such a file, and its tables are used here, one tensor at a time.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import repeat
from jaxtyping import Float32, Int, Num

from tvlens.errors import CheckpointError, TvlensError, UnsupportedFormatError

from .gguf_header import Header

_CONVERT = "Convert it to a Hugging Face folder, or compare the checkpoint that it was made from."


@dataclass(frozen=True, eq=False)
class Names:
    """How a GGUF file reads as a checkpoint of transformers.

    Attributes:
        config: config.json, as save_pretrained() would write it.
        tokens: Token strings by number, None where the file has no tokenizer.
        names: Checkpoint name by the name in the file; what the model does not use is left out.
        shapes: The shape that each checkpoint tensor has in the model.
        processor: transformers' inverse of what llama.cpp does to the tensors.
    """

    config: dict[str, Any]
    tokens: dict[int, str] | None
    names: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    processor: Any = field(repr=False)

    def restored(
        self, values: Float32[np.ndarray, "..."], original: str
    ) -> Float32[np.ndarray, "..."]:
        """A tensor as the model has it, from what the file holds under ``original``.

        Raises:
            UnsupportedFormatError: It is a part of a tensor, or several in one.
            CheckpointError: Its shape does not fit the model.
        """
        if original not in self.names:
            return values
        aside: dict[str, Any] = {}
        try:
            result = self.processor.process(
                values, original, tensor_key_mapping={}, parsed_parameters={"tensors": aside}
            )
        except Exception as error:  # processors count on the shapes that the model has
            raise CheckpointError(
                f"{original} of the GGUF file has the shape {values.shape}, which its model does "
                "not have.",
                hint="Copy the file again.",
            ) from error
        if result.name is not None:
            return np.asarray(result.weights)
        if len(aside) != 1:
            raise UnsupportedFormatError(
                f"{original} of the GGUF file is not one tensor of the model.", hint=_CONVERT
            )
        return next(iter(aside.values())).numpy()

    def row_order(self, original: str, shape: tuple[int, ...]) -> Int[np.ndarray, " row"] | None:
        """Which row of the file is each row of a matrix, None where more than rows has changed."""
        if len(shape) != 2:
            return None
        order = np.arange(shape[0])
        if original not in self.names:
            return order
        found = self._tried(repeat(order, "row -> row column", column=2), original)
        if found is None or found.shape != (len(order), 2) or (found[:, 0] != found[:, 1]).any():
            return None
        return found[:, 0] if np.array_equal(np.sort(found[:, 0]), order) else None

    def is_shifted(self, original: str, shape: tuple[int, ...]) -> bool:
        """Whether the file holds a tensor with a constant added."""
        zeros = np.zeros((shape[0], *(1 for _ in shape[1:])))
        found = self._tried(zeros, original) if original in self.names else None
        return found is not None and bool(np.any(found))

    def _tried(self, probe: Num[np.ndarray, "..."], original: str) -> Num[np.ndarray, "..."] | None:
        """What becomes of a probe, None where a processor asks for a tensor's full shape."""
        try:
            return self.processor.process(
                probe, original, parsed_parameters={"tensors": {}}
            ).weights
        except Exception:
            return None


def names_of(path: Path, header: Header) -> Names:
    """What transformers makes of a GGUF file, from its header alone.

    Raises:
        UnsupportedFormatError: transformers does not know the architecture.
        CheckpointError: The settings in the file describe no model.
    """
    architecture = str(header.settings.get("general.architecture"))
    _refuse_others(path, header, architecture)
    try:
        return _names(path, header, architecture)
    except TvlensError:
        raise
    except NotImplementedError as error:
        raise _unknown(path, architecture) from error
    except Exception as error:  # a config made of a damaged file's settings raises anything
        if isinstance(error, ValueError) and "not supported" in str(error):
            raise _unknown(path, architecture) from error
        reason = f"{type(error).__name__}: {error}".split("\n")[0][:300]
        raise CheckpointError(
            f"the settings in {path} describe no {architecture[:40]} model ({reason}).",
            hint="Copy the file again, or convert the model again with a current llama.cpp.",
        ) from error


def _refuse_others(path: Path, header: Header, architecture: str) -> None:
    """Files that hold a part of a model, experts, or more blocks than tensors."""
    if header.settings.get("split.count", 1) not in (0, 1):
        raise UnsupportedFormatError(
            f"{path} is one part of several.",
            hint="Join them with llama.cpp's `llama-gguf-split --merge`.",
        )
    if header.settings.get(f"{architecture}.expert_count"):
        raise UnsupportedFormatError(
            f"{path} holds a mixture of experts, which tvlens does not read from GGUF.",
            hint=_CONVERT,
        )
    layers = header.settings.get(f"{architecture}.block_count")
    if type(layers) is not int or not 0 < layers <= len(header.tensors):  # each has a tensor
        raise CheckpointError(
            f"{path} gives {str(layers)[:40]} as its number of blocks and holds "
            f"{len(header.tensors)} tensors.",
            hint="Copy the file again.",
        )


def _names(path: Path, header: Header, architecture: str) -> Names:
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers import modeling_gguf_pytorch_utils as gguf

    parsed = gguf.load_gguf_checkpoint(str(path), return_tensors=False)
    given = parsed["config"]
    config = AutoConfig.for_model(**given)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    processor = gguf.TENSOR_PROCESSORS.get(architecture, gguf.TensorProcessor)(config=given)
    known = gguf.get_gguf_hf_weights_map(model, processor)
    return Names(
        json.loads(config.to_json_string(use_diff=True)),
        _tokens(parsed),
        _used(path, {name: known[name] for name in header.tensors if name in known}),
        {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()},
        processor,
    )


def _tokens(parsed: Mapping[str, Any]) -> dict[int, str] | None:
    tokens = parsed["tokenizer"].get("tokens")
    return dict(enumerate(map(str, tokens))) if isinstance(tokens, list) else None


def _used(path: Path, names: dict[str, str]) -> dict[str, str]:
    """The names, each of which must be another tensor of the model."""
    if not names:
        raise CheckpointError(
            f"{path} holds no tensor that its model has.", hint="Copy the file again."
        )
    if len(set(names.values())) < len(names):
        raise UnsupportedFormatError(
            f"{path} stores a tensor of the model in several parts.", hint=_CONVERT
        )
    return names


def _unknown(path: Path, architecture: str) -> UnsupportedFormatError:
    return UnsupportedFormatError(
        f"{path} is GGUF of the architecture {architecture[:40]!r}, which transformers does not "
        "read.",
        hint=_CONVERT,
    )
