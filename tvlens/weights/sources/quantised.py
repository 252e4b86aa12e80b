"""Quantised weights are refused, with the method's name.

What is stored are codes and scales. The difference of a fine-tune to dequantised weights is mostly
the quantisation's error, so the checkpoint it was made from is the one to compare.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tvlens.errors import UnsupportedFormatError

CONFIGS = ("quantization_config", "compression_config")
FILES = ("quantize_config.json", "quant_config.json")
MARKS: Mapping[str, str] = {
    r"\.(qweight|qzeros|g_idx)$": "GPTQ or AWQ",
    r"\.(SCB|weight_format|absmax|nested_absmax|quant_map|nested_quant_map)$": "bitsandbytes",
    r"\.quant_state\.bitsandbytes__\w+$": "bitsandbytes",
    r"\.W_q$": "HQQ",
    r"\.(weight_packed|weight_scale|weight_zero_point|weight_shape)$": "compressed-tensors or fp8",
    r"\.weight_scale_inv$": "fp8",
    r"\.(codes|codebooks)$": "AQLM",
    r"\._(data|scale|shift)$": "quanto",
    r"_(blocks|scales)$": "MXFP4",
}
"""Tensor names that only a quantised checkpoint has, and whose they are."""
CODES = re.compile(r"^(F8|F4|F6|float8|float4)")
"""Dtypes that mean nothing without a scale."""
HINT = (
    "Compare the checkpoint that it was quantised from; dequantised weights (model.dequantize(), "
    "save_pretrained()) load too, but changes below the quantisation step are lost in them."
)


def refuse_quantised_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse a model that its config.json, or a quantiser's own config, says is quantised.

    Raises:
        UnsupportedFormatError: It is.
    """
    for entry in CONFIGS:
        if found := config.get(entry):
            method = found.get("quant_method") if isinstance(found, dict) else None
            raise _quantised(folder, f"quant_method {method!r} in config.json")
    for name in FILES:
        if (folder / name).is_file():
            raise _quantised(folder, f"it has {name}")


def refuse_quantised_tensors(folder: Path, dtypes: Mapping[str, str]) -> None:
    """Refuse tensors that are codes or scales, judged by name and stored dtype.

    Raises:
        UnsupportedFormatError: There is one.
    """
    for name, dtype in dtypes.items():
        if CODES.match(dtype):
            raise _quantised(folder, f"{name} is {dtype}")
        for mark, method in MARKS.items():
            if re.search(mark, name):
                raise _quantised(folder, f"{method}: it stores {name}")


def _quantised(folder: Path, reason: str) -> UnsupportedFormatError:
    return UnsupportedFormatError(f"{folder} holds quantised weights ({reason}).", hint=HINT)
