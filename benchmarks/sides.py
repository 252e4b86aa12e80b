"""What each side of a comparison of weights does; each runs in an interpreter of its own.

    python benchmarks/sides.py SIDE BASE TUNED [THREADS]

prints one line of JSON: seconds of the work after the side's imports (``startup.py`` measures
those), seconds of processor time, peak resident bytes, and what came out, so that a side that did
nothing shows. A side imports only what it needs, so that ``modeldelta`` runs in an environment
without tvlens.

    plain             one pass: read, sha256 of the stored bytes, sum of the squared delta
    basic             tvlens, every matrix, head and neuron, no spectra
    basic_scanned     the same after the look for NaN that `tvlens decompose` takes first
    spectra           the same and the singular spectrum of every matrix's and embedding's delta
    full              tvlens, all of ``decompose``
    labelled          tvlens, the tables of weights, tests, labels and contrasts of a fine-tune
    labelled_both     the same of two fine-tunes of one base, in one call
    modeldelta        norms, cosine and singular spectrum of every matrix's delta
    host              both models loaded with TransformerLens in float32, its default
    imports           tvlens's weights side imported, nothing done
"""

import hashlib
import inspect
import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Work = Callable[[], Any]


def plain(base: str, tuned: str) -> Work:
    """Read, hash and sum: what any comparison of two checkpoints costs at least."""
    import torch
    from safetensors import safe_open

    def work() -> float:
        digests, total = (hashlib.sha256(), hashlib.sha256()), 0.0
        for first in sorted(Path(base).glob("*.safetensors")):
            with safe_open(first, "pt") as one, safe_open(Path(tuned) / first.name, "pt") as other:
                for name in one.keys():
                    sides = one.get_tensor(name), other.get_tensor(name)
                    for digest, tensor in zip(digests, sides, strict=True):
                        digest.update(memoryview(tensor.flatten().view(torch.uint8).numpy()))
                    delta = sides[1].float().sub_(sides[0])
                    total += float(torch.linalg.vector_norm(delta)) ** 2
        return total

    return work


def basic(base: str, tuned: str, *, scan: bool = False, singular: str = "none") -> Work:
    """Table of every component without spectra, from the folders on."""
    from tvlens.geometry import decompose
    from tvlens.weights.matching import load_pair

    if "spectra" not in inspect.signature(decompose).parameters:
        raise SystemExit('this tvlens has no decompose(pair, spectra="none").')
    return lambda: len(decompose(load_pair(base, tuned, scan=scan), spectra=singular))


def basic_scanned(base: str, tuned: str) -> Work:
    """``basic`` with the pass over both files that finds NaN, Inf and identical tensors."""
    return basic(base, tuned, scan=True)


def spectra(base: str, tuned: str) -> Work:
    """What modeldelta gives, heads and neurons besides."""
    return basic(base, tuned, singular="delta")


def full(base: str, tuned: str) -> Work:
    """The whole table ``weights``."""
    from tvlens.geometry import decompose
    from tvlens.weights.matching import load_pair

    return lambda: len(decompose(load_pair(base, tuned, scan=False)))


def labelled(base: str, *tuned: str) -> Work:
    """Decomposed and classified in one pass, as `tvlens decompose` does."""
    from tvlens.geometry import decompose_and_classify
    from tvlens.weights.matching import load_pair

    def work() -> list[int]:
        found = decompose_and_classify([load_pair(base, path, scan=False) for path in tuned])
        return [len(one.labels.labels) for one in found]

    return work


def labelled_both(base: str, tuned: str) -> Work:
    """The same with the further fine-tune that lies beside the tuned model."""
    return labelled(base, tuned, str(Path(tuned).with_name("further")))


def modeldelta(base: str, tuned: str) -> Work:
    """The measures behind the report of `python -m modeldelta`, without checks and report."""
    from modeldelta.core.weight_diff import compare_models
    from modeldelta.utils.model_loader import get_tensor_map

    def work() -> list[int]:
        measured, skipped = compare_models(get_tensor_map(base), get_tensor_map(tuned))
        return [len(measured), skipped]

    return work


def host(base: str, tuned: str) -> Work:
    """Both models as bridges at the same time."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module
    from transformers import AutoModelForCausalLM

    def loaded(folder: str) -> Any:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32", local_files_only=True)
        return build_bridge_from_module(model, type(model).__name__, hf_config=model.config)

    def work() -> float:
        bridges = loaded(base), loaded(tuned)
        # touches every number, as any use of the models does: mapped weights then count
        return sum(float(p.sum()) for bridge in bridges for p in bridge.parameters())

    return work


def imports(base: str, tuned: str) -> Work:
    """An interpreter with torch and tvlens's weights side."""
    import torch  # noqa: F401

    import tvlens.geometry
    import tvlens.weights.matching  # noqa: F401

    return lambda: None


SIDES: dict[str, Callable[..., Work]] = {
    side.__name__: side
    for side in (
        *(plain, basic, basic_scanned, spectra, full),
        *(labelled, labelled_both, modeldelta, host, imports),
    )
}


def report(sides: dict[str, Callable[[str, str], Work]], words: list[str], warm: int = 0) -> None:
    """Run the side that the command line names and print its figures.

    Args:
        sides: Every side by name.
        words: Side, base, tuned, and the number of threads.
        warm: How often the work is done before it is timed.
    """
    side, base, tuned, *threads = words
    work = sides[side](base, tuned)
    import torch

    torch.set_num_threads(int(threads[0]) if threads else 1)
    for _ in range(warm):
        work()
    start, used = time.perf_counter(), time.process_time()
    result = work()
    figures = {
        "seconds": time.perf_counter() - start,
        "processor_seconds": time.process_time() - used,
        "peak_resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "result": result,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    report(SIDES, sys.argv[1:])
