"""What each operation of ``work`` costs here and now, in seconds a unit.

Each rate is the least of a few runs of a few milliseconds. What runs on one thread is timed by the
processor's clock and so on a core of its own, whatever else happens to run; what runs on several,
or on an accelerator, by the wall's.
"""

import hashlib
import time
from collections.abc import Callable, Mapping

import numpy as np
import pandas as pd
import torch

from tvlens.components import Component, key_columns
from tvlens.geometry.classify import labelled, with_q_values
from tvlens.geometry.decompose import WEIGHTS_SCHEMA
from tvlens.geometry.evidence import evidence_rows
from tvlens.geometry.neurons import vector_measures
from tvlens.tables import Table
from tvlens.threads import one_thread

Rates = Mapping[str, float]
"""Seconds a unit, by operation."""
Clock = Callable[[], float]

RUNS = 4
FORWARD_SHARE = 0.8
"""Speed of a model's products, as a share of a square product's: they are of many shapes."""
_EIGEN_SIZE = 256
_PRODUCT_SIZE = 512


def measured_rates(device: str = "cpu", *, wide: bool = True) -> dict[str, float]:
    """The rates of this machine, in about half a second.

    Args:
        device: Where the models run.
        wide: The models are wide enough to run on all threads; else on one.
    """
    alone = torch.device(device).type == "cpu" and (not wide or torch.get_num_threads() == 1)
    with one_thread():
        rates = {name: rate(time.process_time) for name, rate in ON_ONE_THREAD.items()}
    with one_thread(only_if=alone):
        rates["forward"] = _forward_rate(device, time.process_time if alone else time.perf_counter)
    return rates


def _least_seconds(run: Callable[[], object], clock: Clock) -> float:
    run()
    times = []
    for _ in range(RUNS):
        started = clock()
        run()
        times.append(clock() - started)
    return min(times)


def _hash_rate(clock: Clock) -> float:
    block = bytes(1 << 21)
    return _least_seconds(lambda: hashlib.sha256(block).digest(), clock) / len(block)


def _entry_rate(clock: Clock) -> float:
    base, delta = torch.randn(2, 16, 1 << 14)
    return _least_seconds(lambda: vector_measures(base, delta), clock) / base.numel()


def _product_rate(clock: Clock) -> float:
    matrix = torch.randn(_PRODUCT_SIZE, _PRODUCT_SIZE, dtype=torch.float64)
    return _least_seconds(lambda: matrix @ matrix, clock) / (2 * _PRODUCT_SIZE**3)


def _eigen_rate(clock: Clock) -> float:
    matrix = torch.randn(_EIGEN_SIZE, _EIGEN_SIZE, dtype=torch.float64)
    units = _EIGEN_SIZE**3 * (1 + 200 / _EIGEN_SIZE)
    return _least_seconds(lambda: torch.linalg.eigh(matrix @ matrix.mT), clock) / units


def _neurons(count: int) -> list[Component]:
    return [Component("neuron", 0, index, "W_in") for index in range(count)]


def _row_rate(clock: Clock) -> float:
    neurons = _neurons(1000)
    texts = {name: ["name"] * len(neurons) for name in ("base", "tuned")}
    numbers = torch.randn(len(neurons)).double()
    filled = ("base_norm", "delta_norm", "relative_delta", "gain", "residual", "kappa", "snr")

    def run() -> Table:
        columns = {**texts, "tied": [False] * len(neurons)}
        columns |= {name: numbers.tolist() for name in filled}
        return Table.of("weights", WEIGHTS_SCHEMA, {**key_columns(neurons), **columns})

    return _least_seconds(run, clock) / len(neurons)


def _label_rate(clock: Clock) -> float:
    few, many = 50, 550

    def seconds(count: int) -> float:
        spread = np.linspace(0.01, 0.5, count)
        keys = {**key_columns(_neurons(count)), "tied": [False] * count}
        rows = evidence_rows(keys, share_gain=spread, p_gain=spread, share_within=spread)
        frame = pd.DataFrame(rows).assign(delta_norm=1.0, snr=10.0, gain=spread, kappa=spread)
        return _least_seconds(lambda: labelled(with_q_values(frame)), clock)

    return max(0.0, seconds(many) - seconds(few)) / (many - few)


def _call_rate(clock: Clock) -> float:
    small = torch.randn(8, 8)

    def run() -> None:
        for _ in range(500):
            torch.nn.functional.linear(small, small)

    return _least_seconds(run, clock) / 500


def _forward_rate(device: str, clock: Clock) -> float:
    size = 2 * _PRODUCT_SIZE
    matrix = torch.randn(size, size).to(device)

    def run() -> float:
        return float((matrix @ matrix)[0, 0])  # a number has to wait for its device

    seconds = _least_seconds(run, clock)
    return seconds / (2 * size**3) / FORWARD_SHARE


ON_ONE_THREAD: dict[str, Callable[[Clock], float]] = {
    "hash": _hash_rate,
    "entry": _entry_rate,
    "product": _product_rate,
    "eigen": _eigen_rate,
    "row": _row_rate,
    "label": _label_rate,
    "call": _call_rate,
}
"""What measures each rate; a model's own passes run on their device, with its threads."""
