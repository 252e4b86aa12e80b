"""Rows of ``tests`` against the covariance-matched null (``input_null``), where inputs are known.

    matrix, all seven       kappa                 both   a gain beyond what the inputs explain
    matrix, W_Q to W_in     g_read                read   reads more (> 0) or less (< 0) aligned with
                                                         what the base reads than inputs alone
    head, OV and QK         share_in_own_space    read   the same of W_V and W_Q in the head's own
                                                         read space
    neuron, W_gate, W_in    gain                  both   a gain beyond what the inputs explain

The effect is the value less what the null expects, its interval the null's own 95 % around it. No
label is decided by these rows. Of what is written nothing is an input; there the comparison with
other heads and neurons stays.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from tvlens.components import READING_PARTS

from .changes import energy
from .evidence import Z95, Evidence, Keys, Rows, statistic_rows
from .head_evidence import HeadChanges
from .input_null import (
    Form,
    InputMoment,
    InputTest,
    MatrixInputs,
    form_moments,
    gain_test,
    neuron_gain_test,
    share_in_spans_of_reads,
    tested_form,
)
from .matrices import side_alignment
from .matrix_evidence import MatrixChange
from .neuron_evidence import NeuronChanges

NULL = "covariance_matched"
"""What the column ``null`` calls it."""


@dataclass(frozen=True)
class _Statistic:
    name: str
    side: str
    k: int | None = None


def with_rows(evidence: Evidence, rows: Iterable[Rows]) -> Evidence:
    """The evidence with more rows of tests."""
    return Evidence(evidence.components, [*evidence.statistics, *rows])


def _rows(keys: Keys, statistic: _Statistic, test: InputTest) -> Rows:
    return statistic_rows(
        keys,
        statistic.name,
        side=statistic.side,
        null=NULL,
        effect=test.effect,
        half_interval=Z95 * test.spread,
        p_value=test.p_value,
        k=statistic.k,
    )


def matrix_rows(keys: Keys, one: MatrixChange, known: MatrixInputs) -> list[Rows]:
    """A matrix's gain, and where it reads if it reads the residual stream."""
    whitened, found = known.inputs.whitened(one.change), one.found
    lengths = float(found.total.sqrt() * one.basis.values.norm())
    gain = gain_test(known.pushed, whitened, float(keys["kappa"][0]), lengths=lengths)
    rows = [_rows(keys, _Statistic("kappa", "both"), gain)]
    if one.part in READING_PARTS:
        d_read, d_write = one.base.shape
        g_read = side_alignment(one.basis, found, d_read=d_read, d_write=d_write).g_read
        test = known.alignment_test(found, g_read, whitened)
        rows.append(_rows(keys, _Statistic("g_read", "read"), test))
    return rows


def head_rows(keys: Keys, heads: HeadChanges, inputs: InputMoment) -> list[Rows]:
    """Where the reading factor, W_V of OV and W_Q of QK, reads: in its head's own space?"""
    factor, spans = heads.first, heads.spans[0]
    share = share_in_spans_of_reads(factor.delta, spans)
    form = Form(spans, torch.ones(spans.shape[-1], dtype=torch.float64))
    moments, whitened = form_moments(inputs, form), inputs.whitened(factor.delta)
    test = tested_form(share, energy(factor.delta), moments, whitened)
    return [_rows(keys, _Statistic("share_in_own_space", "read", spans.shape[-1]), test)]


def neuron_rows(keys: Keys, neurons: NeuronChanges, inputs: InputMoment) -> list[Rows]:
    """The gain of every reading neuron."""
    test = neuron_gain_test(inputs, neurons.base, neurons.sums.measures().kappa)
    return [_rows(keys, _Statistic("gain", "both"), test)]
