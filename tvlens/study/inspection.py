"""What a comparison would do, from headers alone: tensors, bytes, rows, and rough costs.

The seconds and the memory are estimates from counts, with the measured rates beside them; they
are for deciding whether to start, not for quoting.
"""

from typing import Any

from tvlens.components import DISJOINT_KINDS
from tvlens.weights.matching import Pair, load_pair

from .plan import name_of

READ_RATE = 0.4e9  # bytes a second that are read, hashed and scanned, one thread of a 2024 CPU
SPECTRUM_RATE = 6e9  # multiply-adds a second of the Gram and eigen steps, likewise
NODES = 8


def inspection(base: str, tuned: str) -> dict[str, Any]:
    """What ``tvlens compare`` of the two would read, compare and write.

    Raises:
        TvlensError: The two cannot be compared; the sentence says why.
    """
    pair = load_pair(base, tuned, names=("base", name_of(tuned)), scan=False)
    report = pair.load_report
    numbers = pair.layout
    return {
        "base": pair.base.name,
        "tuned": pair.tuned.name,
        "family": numbers.family,
        "shape": {
            name: getattr(numbers, name)
            for name in ("n_layers", "n_heads", "n_kv_heads", "d_head", "d_model", "d_mlp")
            if numbers.listed or getattr(numbers, name)
        },
        "tensors": report.counts,
        "not_compared": [
            f"{match.base or match.tuned}: {match.status}. {match.reason}".rstrip()
            for match in report.tensors
            if match.status in ("only_in_base", "only_in_tuned", "refused")
        ],
        "config_differences": [
            f"{found.field}: {found.base!r} in base, {found.tuned!r} in tuned ({found.effect})"
            for found in report.config_differences
        ],
        "warnings": report.warnings,
        "bytes": _bytes(pair),
        "table_rows": _rows(pair),
        "decompose_seconds": round(_seconds(pair), 1),
        "model_memory_bytes": 2 * 4 * _parameters(pair),
    }


def _bytes(pair: Pair) -> int:
    sizes = {"float32": 4, "float64": 8}
    total = 0
    for source in (pair.base, pair.tuned):
        for info in source.tensors.values():
            count = 1
            for length in info.shape:
                count *= length
            total += count * sizes.get(info.dtype, 2)
    return total


def _parameters(pair: Pair) -> int:
    total = 0
    for info in pair.base.tensors.values():
        count = 1
        for length in info.shape:
            count *= length
        total += count
    return total


def _rows(pair: Pair) -> dict[str, int]:
    """Rows of the weights table, by kind; four a head (W_Q, W_O, OV, QK), two a kv head.

    A family that normalises queries and keys has no QK.
    """
    numbers = pair.layout
    rows = {kind: 0 for kind in DISJOINT_KINDS}
    for component in pair.components:
        rows[component.kind] += 1
    neuron_parts = 3 if numbers.gated else 2
    rows["head"] = (3 if numbers.qk_norm else 4) * numbers.n_layers * numbers.n_heads
    rows["kv_head"] = 2 * numbers.n_layers * numbers.n_kv_heads
    rows["neuron"] = neuron_parts * numbers.n_layers * numbers.d_mlp
    return rows


def _seconds(pair: Pair) -> float:
    """Reading and hashing both checkpoints, and one Gram spectrum of each matrix and delta."""
    spectra = 0
    for component in pair.components:
        if component.kind == "matrix":
            small, large = sorted(pair.layout.shape(component))
            spectra += 2 * small * small * (large + 10 * small)
    return _bytes(pair) / READ_RATE + spectra / SPECTRUM_RATE
