"""The demo models: where they are kept, and how they become ordinary Hugging Face folders.

Four Llama models of 0.9 M parameters and one tokenizer: ``base`` (general English), and three
fine-tunes of it on the same question-and-answer form: ``med`` (medicine), ``math`` (arithmetic) and
``ctl`` (more general English, the control for form alone). They are grammatical and strongly tinted
by their domain, and know nothing.

The package holds the base in fp16 and each fine-tune as a tuning vector, for a matrix one int8
number per entry and one fp32 scale per row,

    tuned[row, column] = base[row, column] + scale[row] * step[row, column],

and for a vector the fp32 difference itself. ``demo_folder`` writes the sum once, as fp32, under the
user's cache, with a ``tvlens_storage.json`` that says how coarsely the weights were stored: a
reader of small differences needs it, because the fp32 file no longer shows it. Scales are in weight
units.
"""

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Literal, get_args

Domain = Literal["med", "math", "gen"]
Tensors = dict[str, Any]  # torch tensors by name; torch is imported only where it is used

DEMO_NAMES = ("base", "med", "math", "ctl")
DATA = Path(__file__).parent / "data"
COPIED = ("config.json", "tokenizer.json", "tokenizer_config.json")
STEP, SCALE, VECTOR = ".step", ".scale", ".difference"


def demo_folder(name: str) -> Path:
    """The fp32 checkpoint folder of a demo model, written on first use.

    Args:
        name: One of ``DEMO_NAMES``.

    Raises:
        ValueError: There is no such demo model.
    """
    if name not in DEMO_NAMES:
        raise ValueError(f"no demo model {name!r}; the demo models are {', '.join(DEMO_NAMES)}")
    folder = _cache() / "tvlens" / "demo" / _content_hash() / name
    if not folder.is_dir():
        _publish(name, folder)
    return folder


def demo_prompts(domain: str) -> Path:
    """The prompt file of a domain: held-out questions with a right and a wrong answer."""
    return _text_file("prompts", domain)


def demo_texts(domain: str) -> Path:
    """The held-out texts of a domain: lines of prompt and answer."""
    return _text_file("heldout", domain)


def tuned_tensors(base: Tensors, stored: Tensors) -> Tensors:
    """Base plus a stored tuning vector, in fp32; tensors the vector lacks stay the base's."""
    tuned = {name: tensor.float() for name, tensor in base.items()}
    for name in tuned:
        if name + VECTOR in stored:
            tuned[name] = tuned[name] + stored[name + VECTOR]
        if name + STEP in stored:
            scale = stored[name + SCALE][:, None]
            tuned[name] = tuned[name] + scale * stored[name + STEP].float()
    return tuned


def _text_file(kind: str, domain: str) -> Path:
    """A file of the package's data, by kind and domain."""
    if domain not in get_args(Domain):
        valid = ", ".join(get_args(Domain))
        raise ValueError(f"no demo domain {domain!r}; the domains are {valid}")
    return DATA / f"{kind}_{domain}.jsonl"


def _cache() -> Path:
    """The user's cache folder."""
    chosen = os.environ.get("XDG_CACHE_HOME", "")
    return Path(chosen) if chosen else Path.home() / ".cache"


def _content_hash() -> str:
    """Sixteen hex digits over all that a folder is made from: another release starts anew."""
    digest = hashlib.sha256()
    for file in (*COPIED, *(f"{name}.safetensors" for name in DEMO_NAMES)):
        digest.update(file.encode() + b"\0" + (DATA / file).read_bytes())
    return digest.hexdigest()[:16]


def _publish(name: str, folder: Path) -> None:
    """Write the folder under a temporary name beside its place, then rename it into place."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=folder.parent))
    try:
        _write(name, unfinished)
        unfinished.chmod(0o755)
        unfinished.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another process was first, with the same content
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write(name: str, folder: Path) -> None:
    """The checkpoint, its tokenizer and its storage record, into an empty folder."""
    from safetensors.torch import load_file, save_file

    tensors = {key: tensor.float() for key, tensor in load_file(DATA / "base.safetensors").items()}
    rounding: dict[str, Any] = {"dtype": "float16"}
    if name != "base":
        stored = load_file(DATA / f"{name}.safetensors")
        tensors = tuned_tensors(tensors, stored)
        rounding = {"dtype": "int8_row_delta", "step": _steps(stored)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for file in COPIED:
        shutil.copyfile(DATA / file, folder / file)
    record = json.dumps({"rounding": rounding}, indent=1, sort_keys=True)
    (folder / "tvlens_storage.json").write_text(record + "\n", encoding="utf-8")


def _steps(stored: Tensors) -> dict[str, dict[str, float]]:
    """The largest and the root-mean-square row scale of every matrix."""
    return {
        name.removesuffix(SCALE): {
            "max": scale.max().item(),
            "rms": scale.square().mean().sqrt().item(),
        }
        for name, scale in stored.items()
        if name.endswith(SCALE)
    }
