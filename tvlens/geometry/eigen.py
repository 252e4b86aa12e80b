"""Eigenpairs of Gram matrices, no more of them than are needed.

LAPACK through numpy and scipy: torch has no driver for a part of a spectrum. Gram matrices come
from finite weights, so that nothing is looked for NaN again.
"""

import numpy as np
import torch
from jaxtyping import Float, Float64
from scipy import linalg
from torch import Tensor

from .changes import transposed

SMALL = 1024
"""Up to this size a tridiagonal form costs no more than the largest eigenvalue by iteration."""
STEPS = 60
"""Lanczos steps for the edge of a spectrum: 1e-7 off at size 576, a thousandth of the margin."""


def strongest(
    products: Float64[Tensor, "size size"], bound: float, *, at_least: int = 0
) -> tuple[Float64[Tensor, " found"], Float64[Tensor, "size found"]]:
    """Eigenvalues above ``bound``, largest first, and their vectors.

    Args:
        products: A symmetric matrix.
        bound: What the eigenvalues must exceed.
        at_least: So many are given even where fewer exceed it.
    """
    size = len(products)
    matrix, options = products.numpy(), {"driver": "evr", "check_finite": False}
    values, vectors = linalg.eigh(matrix, subset_by_value=(bound, np.inf), **options)
    if len(values) < (wanted := min(at_least, size)):
        values, vectors = linalg.eigh(matrix, subset_by_index=(size - wanted, size - 1), **options)
    return torch.from_numpy(values).flip(0), torch.from_numpy(vectors).flip(1)


def largest_eigenvalue(products: Float[Tensor, "size size"]) -> Float64[Tensor, ""]:
    """The largest eigenvalue of a Gram matrix."""
    size = len(products)
    if size > SMALL:
        return _by_iteration(products)
    last = (size - 1, size - 1)
    options = {"eigvals_only": True, "subset_by_index": last, "check_finite": False}
    return torch.from_numpy(linalg.eigh(products.numpy(), **options))[0].double()


def _by_iteration(products: Float[Tensor, "size size"]) -> Float64[Tensor, ""]:
    """Lanczos with full reorthogonalisation."""
    size = len(products)
    basis = products.new_zeros((STEPS + 1, size))
    basis[0] = size**-0.5
    diagonal, beside = products.new_zeros(STEPS), products.new_zeros(STEPS)
    for step in range(STEPS):
        onward = products @ basis[step]
        diagonal[step] = onward @ basis[step]
        for _ in range(2):  # once leaves rounding that brings converged directions back
            onward = onward - transposed(basis[: step + 1]) @ (basis[: step + 1] @ onward)
        beside[step] = onward.norm()
        basis[step + 1] = onward / beside[step].clamp(min=torch.finfo(torch.float32).tiny)
    tied = torch.diag(beside[:-1], 1)
    return torch.linalg.eigvalsh((torch.diag(diagonal) + tied + transposed(tied)).double())[-1]
