"""Tensors with different lengths or random generators for each row."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def padded(rows: Sequence[NDArray[np.int64]], device: torch.device) -> Tensor:
    """Arrays of different lengths => one tensor [B, longest, ...], padded with zeros on the right."""
    longest = max(len(row) for row in rows)
    result = np.zeros((len(rows), longest, *rows[0].shape[1:]), dtype=np.int64)
    for index, row in enumerate(rows):
        result[index, : len(row)] = row
    return torch.from_numpy(result).to(device)


def random_rows(
    draw: Callable[..., Tensor], shape: tuple[int, ...], generators: Sequence[torch.Generator | None]
) -> Tensor:
    """One draw of `shape` per generator (`torch.randn` or `torch.rand`) => float32 [B, *shape].

    Each row is drawn separately, on its generator's device and in float32. So with CPU generators a seed gives the same
    numbers for any batch size, device and number format of the model. Without a generator, torch's global CPU generator
    is used.
    """
    rows = [
        draw(shape, generator=generator, device=generator.device if generator else "cpu", dtype=torch.float32)
        for generator in generators
    ]
    return torch.stack(rows)
