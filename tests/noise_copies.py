"""Copies of a checkpoint whose change is isotropic noise: what no claim may be made of."""

from collections.abc import Callable, Collection

import torch
from torch import Tensor


def noise_of_relative_size(
    relative: float, *, seed: int = 0, only: Collection[str] = ("",)
) -> Callable[[dict[str, Tensor]], None]:
    """An edit for ``copy_with``: noise of ``relative`` times the norm of each matrix.

    Args:
        relative: Length of the change over that of the matrix.
        seed: Of the draw.
        only: A tensor is changed if its name holds one of these.
    """

    def edit(tensors: dict[str, Tensor]) -> None:
        generator = torch.Generator().manual_seed(seed)
        for name in sorted(tensors):
            tensor = tensors[name]
            if tensor.dim() == 2 and any(part in name for part in only):
                noise = torch.randn(tensor.shape, generator=generator)
                noise *= relative * tensor.float().norm() / noise.norm()
                tensors[name] = tensor.float() + noise

    return edit
