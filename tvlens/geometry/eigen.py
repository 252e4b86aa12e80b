"""Eigenpairs of Gram matrices, no more of them than are needed.

A part of a spectrum through ``lapack``, torch has no driver for that; a whole one through numpy,
a fifth faster than torch where torch has Intel's library on another processor.
"""

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from .changes import transposed
from .lapack import eigenpairs_above, largest_eigenpairs

SMALL = 1024
"""Up to this size a tridiagonal form costs no more than the largest eigenvalue by iteration."""
STEPS = 60
"""Lanczos steps for the edge of a spectrum: 1e-7 off at size 576, a thousandth of the margin."""


def eigenpairs(
    products: Float64[Tensor, "*component size size"],
) -> tuple[Float64[Tensor, "*component size"], Float64[Tensor, "*component size size"]]:
    """All eigenvalues of symmetric matrices, largest first, and their vectors."""
    values, vectors = np.linalg.eigh(products.numpy())
    return torch.from_numpy(values).flip(-1), torch.from_numpy(vectors).flip(-1)


def strongest(
    products: Float64[Tensor, "size size"], bound: float, *, at_least: int = 0
) -> tuple[Float64[Tensor, " found"], Float64[Tensor, "size found"]]:
    """Eigenvalues above ``bound``, largest first, and their vectors.

    Args:
        products: A symmetric matrix.
        bound: What the eigenvalues must exceed.
        at_least: So many are given even where fewer exceed it.
    """
    values, vectors = eigenpairs_above(products.numpy(), bound)
    if len(values) < (wanted := min(at_least, len(products))):
        values, vectors = largest_eigenpairs(products.numpy(), wanted)
    return torch.from_numpy(values).flip(0), torch.from_numpy(vectors).flip(1)


def largest_eigenvalue(products: Float[Tensor, "size size"]) -> Float64[Tensor, ""]:
    """The largest eigenvalue of a Gram matrix."""
    if len(products) > SMALL:
        return _by_iteration(products)
    return torch.from_numpy(largest_eigenpairs(products.numpy(), 1, vectors=False)[0])[0].double()


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
