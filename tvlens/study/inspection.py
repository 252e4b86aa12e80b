"""What a comparison would do, from headers alone: tensors, bytes, rows, and rough costs.

The seconds and the memory are estimates from counts, with the measured rates beside them; they
are for deciding whether to start, not for quoting.
"""

from collections.abc import Sequence
from typing import Any

from tvlens.components import DISJOINT_KINDS
from tvlens.errors import TvlensError
from tvlens.weights.lineage import Likeness, likeness, told_apart
from tvlens.weights.matching import Pair, load_pair
from tvlens.weights.sources.opening import open_source

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
        "vocabulary": (report.vocabulary or {}).get("sentence", "that of the base"),
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


def parent_ranking(tuned: str, candidates: Sequence[str]) -> dict[str, Any]:
    """Which of some models is likeliest the parent of another: a row of evidence for each.

    Args:
        tuned: The model whose parent is asked for.
        candidates: Model specifications; those that cannot be compared get the reason instead.

    Raises:
        TvlensError: ``tuned`` cannot be read.
    """
    open_source(tuned)
    found: list[Likeness] = []
    refused = []
    for spec in dict.fromkeys(candidates):
        try:
            found.append(likeness(load_pair(spec, tuned, names=(spec, tuned), scan=False)))
        except TvlensError as error:
            refused.append({"candidate": spec, "verdict": "refused", "reason": str(error)})
    found.sort(key=lambda candidate: candidate.distance)
    rivals = [other.base for other in found[1:] if not _apart(found[0], other)]
    return {
        "candidates": [*(candidate.to_dict() for candidate in found), *refused],
        "likeliest": found[0].base if found and not rivals and not found[0].unlike else None,
        "sentence": _ranking_sentence(tuned, found, rivals),
    }


def _apart(nearest: Likeness, other: Likeness) -> bool:
    """Whether the distance decides between two candidates, by how far they are from each other."""
    names = nearest.base, other.base
    try:
        between = likeness(load_pair(*names, names=names, scan=False))
    except TvlensError:
        return True  # each can be compared with the tuned model, but they not with each other
    return told_apart(nearest.distance, other.distance, between.distance)


def _ranking_sentence(tuned: str, found: list[Likeness], rivals: list[str]) -> str:
    if not found or found[0].verdict == "implausible":
        return f"None of the candidates looks like the parent of {tuned}."
    if found[0].unlike:
        return found[0].warning
    if rivals:
        return (
            f"{found[0].base} and {', '.join(rivals)} cannot be told apart as parents of {tuned}: "
            "the changes have too much in common."
        )
    if found[1:]:
        return f"{found[0].base} is the likeliest parent of {tuned} among the candidates."
    return f"{found[0].base} looks like a parent of {tuned}; name others to compare it with."


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
