"""mergekit beside tvlens: golden hashes for the tests, and seconds and memory of a merge.

    python benchmarks/merges.py golden --mergekit-python ENV/bin/python
    python benchmarks/merges.py speed BASE A B --mergekit-python ENV/bin/python --threads 1

mergekit runs as its users run it, in an environment of its own, as a process of its own; nothing
of it is in this repository. ``golden`` writes the checkpoints of ``tests/golden_models.py``, merges
them, and keeps the sha256 of each merged tensor's bytes. ``speed`` times the same TIES merge on
both sides, whole processes from the folders to the written folder, best of ``--repeats``, and the
most anonymous memory of each; then how many merged entries differ, and how many of these are ties.
"""

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

GOLDEN = ROOT / "tests" / "golden" / "mergekit.json"
CASES: dict[str, dict[str, Any]] = {
    "task one": {"merge_method": "task_arithmetic", "scales": [0.3], "density": None},
    "task three": {"merge_method": "task_arithmetic", "scales": [0.7, -0.4, 1.3], "density": None},
    "ties": {"merge_method": "ties", "scales": [1.0, 1.0, 1.0], "density": 0.3},
    "ties weighted": {"merge_method": "ties", "scales": [0.7, 0.2, 1.1], "density": 0.55},
    "ties dense": {"merge_method": "ties", "scales": [0.5, 0.5], "density": None},
    "ties negative": {"merge_method": "ties", "scales": [0.7, -0.4, 1.3], "density": 0.3},
}
"""What is merged, in mergekit's words; fine-tunes are taken in the order a, b, c."""


def mergekit_config(
    base: Path, tuned: list[Path], method: str, scales: list[float], density: float | None
) -> dict[str, Any]:
    """The configuration of a merge as mergekit reads it; JSON is YAML."""
    models = []
    for folder, scale in zip(tuned, scales, strict=False):
        parameters = {"weight": scale} | ({} if density is None else {"density": density})
        models.append({"model": str(folder), "parameters": parameters})
    return {
        "merge_method": method,
        "base_model": str(base),
        "models": models,
        "dtype": "float32",
        "tokenizer_source": None,
    }


ALL_AT_ONCE = """
import sys
from mergekit.scripts.run_yaml import main
for config, out in zip(sys.argv[1::2], sys.argv[2::2]):
    main([config, out, "--no-copy-tokenizer", "--lazy-unpickle"], standalone_mode=False)
"""


def run_mergekit(python: str, merges: dict[Path, dict[str, Any]], threads: int) -> dict[str, float]:
    """Make each merge, by its folder, with mergekit's command in one process; what that costs."""
    words: list[str] = []
    for out, config in merges.items():
        path = out.with_suffix(".yml")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
        words += [str(path), str(out)]
    return watched([python, "-c", ALL_AT_ONCE, *words], threads)


def watched(command: list[str], threads: int) -> dict[str, float]:
    """Run a command; its seconds, those of the processor, and most anonymous memory in MiB."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    environment = {**os.environ, **dict.fromkeys(names, str(threads)), "HF_HUB_OFFLINE": "1"}
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    peak = {"anonymous": 0.0}
    watcher = threading.Thread(target=_watch, args=(process, peak))
    watcher.start()
    output, _ = process.communicate()
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{output}")
    seconds, after = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    worked = sum(getattr(after, n) - getattr(before, n) for n in ("ru_utime", "ru_stime"))
    return {"seconds": seconds, "processor_seconds": worked, **peak}


def _watch(process: subprocess.Popen, peak: dict[str, float]) -> None:
    while process.poll() is None:
        try:
            text = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            return
        for line in text.splitlines():
            if line.startswith("RssAnon:"):
                peak["anonymous"] = max(peak["anonymous"], int(line.split()[1]) / 1024)
        time.sleep(0.005)


def hashes(folder: Path) -> dict[str, str]:
    """sha256 of each tensor's bytes."""
    import torch
    from safetensors.torch import load_file

    found: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            content = tensor.contiguous().flatten().view(torch.uint8).numpy().data
            found[name] = hashlib.sha256(content).hexdigest()
    return dict(sorted(found.items()))


def golden(python: str) -> None:
    """Write the golden file anew."""
    from tests.golden_models import CONFIGS, golden_models

    asked = "import json, mergekit, importlib.metadata as m, torch; print(json.dumps({"
    asked += "'mergekit': m.version('mergekit'), 'torch': torch.__version__, "
    asked += "'numpy': m.version('numpy')}))"
    about = json.loads(subprocess.run([python, "-c", asked], capture_output=True, text=True).stdout)
    found: dict[str, Any] = {"made_by": "benchmarks/merges.py golden", "versions": about}
    found["cases"] = {}
    with tempfile.TemporaryDirectory() as root:
        merges: dict[Path, dict[str, Any]] = {}
        for family in CONFIGS:
            models = golden_models(Path(root), family)
            tuned = [models[name] for name in ("a", "b", "c")]
            for label, case in CASES.items():
                merges[Path(root) / "out" / family / label.replace(" ", "-")] = mergekit_config(
                    models["base"], tuned, case["merge_method"], case["scales"], case["density"]
                )
        run_mergekit(python, merges, 1)
        for out in merges:
            label = out.name.replace("-", " ")
            merged = {**CASES[label], "sha256": hashes(out)}
            found["cases"][f"{out.parent.name} {label}"] = merged
            print(f"{out.parent.name} {label}: {len(merged['sha256'])} tensors")
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps(found, indent=1) + "\n")


def tensors_in(folder: Path) -> dict[str, Any]:
    """The tensors of a checkpoint by name."""
    from safetensors.torch import load_file

    return {
        name: tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def unequal(base: Path, tuned: list[Path], outs: tuple[Path, Path], density: float) -> str:
    """How many merged entries differ, and how many of these a change ties with the last one kept.

    Of changes that are equally large at the cut mergekit keeps those that torch's sort, which is
    not stable, puts first; tvlens keeps the first in storage order.
    """
    one, other = (tensors_in(out) for out in outs)
    before, after = tensors_in(base), [tensors_in(folder) for folder in tuned]
    entries = differing = tied = 0
    for name, merged in one.items():
        apart = merged != other[name]
        entries, differing = entries + merged.numel(), differing + int(apart.sum())
        at_cut = apart & False
        for model in after:
            change = (model[name].float() - before[name].float()).abs()
            kept = max(1, int(density * change.numel()))
            at_cut |= change == change.flatten().kthvalue(change.numel() - kept + 1).values
        tied += int((apart & at_cut).sum())
    return f"{differing} of {entries:,} merged entries differ, {tied} of them tied at a cut"


def speed(arguments: argparse.Namespace) -> None:
    """Both sides of one TIES merge in mergekit's semantics, written as float32 or as stored."""
    rows: dict[str, list[dict[str, float]]] = {"mergekit": [], "tvlens": []}
    config = mergekit_config(
        Path(arguments.base), [Path(a) for a in arguments.tuned], "ties", [1.0, 1.0], 0.2
    )
    with tempfile.TemporaryDirectory() as root:
        for turn in range(arguments.repeats):
            out = Path(root) / f"mergekit-{turn}"
            rows["mergekit"].append(
                run_mergekit(arguments.mergekit_python, {out: config}, arguments.threads)
            )
            command = [sys.executable, "-m", "tvlens", "apply", arguments.base, *arguments.tuned]
            command += ["--out", str(Path(root) / f"tvlens-{turn}"), "--method", "mergekit:ties"]
            command += ["--density", "0.2", "--dtype", "float32", "--quiet"]
            rows["tvlens"].append(watched(command, arguments.threads))
        last = Path(root) / f"mergekit-{turn}", Path(root) / f"tvlens-{turn}"
        print(unequal(Path(arguments.base), [Path(a) for a in arguments.tuned], last, 0.2))
    for side, turns in rows.items():
        print(side, *(f"{name}={min(t[name] for t in turns):.2f}" for name in turns[0]))


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("golden", "speed"))
    parser.add_argument("base", nargs="?")
    parser.add_argument("tuned", nargs="*")
    parser.add_argument("--mergekit-python", required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    golden(arguments.mergekit_python) if arguments.what == "golden" else speed(arguments)


if __name__ == "__main__":
    main()
