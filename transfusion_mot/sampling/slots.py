"""What the model must know of sampled slots: rows of different lengths side by side, and the cache they go into."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from transfusion_mot.models.attention import KVCache
from transfusion_mot.models.positions import Positions
from transfusion_mot.models.transfusion import TransfusionMoT


class Slots(NamedTuple):
    """Where slots stand, as `TransfusionMoT.forward` takes it: [B, S], and [B, S] or [B, S, 3] for the last."""

    document_ids: Tensor
    order: Tensor
    span_ids: Tensor
    rope_positions: Tensor

    def between(self, start: int, end: int) -> "Slots":
        """The slots of columns `start` to `end` of every row."""
        return Slots(*(ids[:, start:end] for ids in self))


def padded(rows: Sequence[NDArray[np.int64]], filler: int, device: torch.device) -> Tensor:
    """Arrays of different lengths => one tensor [B, longest, ...], filled up on the right."""
    longest = max(len(row) for row in rows)
    result = np.full((len(rows), longest, *rows[0].shape[1:]), filler, dtype=np.int64)
    for index, row in enumerate(rows):
        result[index, : len(row)] = row
    return torch.from_numpy(result).to(device)


def padded_slots(rows: Sequence[Positions], span_id: int, device: torch.device) -> Slots:
    """One segment of every row => slots as wide as the longest; those filled up belong to no document.

    Args:
        rows: What `PositionCounter` counted for each row.
        span_id: -1 for text, the number of the image for patches.
    """
    orders = [order for order, _ in rows]
    return Slots(
        document_ids=padded([np.zeros_like(order) for order in orders], -1, device),
        order=padded(orders, 0, device),
        span_ids=padded([np.full_like(order, span_id) for order in orders], -1, device),
        rope_positions=padded([rope_positions for _, rope_positions in rows], 0, device),
    )


def joined(*segments: Slots) -> Slots:
    """Segments one after the other in every row, in the order in which the model gets their tokens."""
    return Slots(*(torch.cat(ids, dim=1) for ids in zip(*segments, strict=True)))


def new_cache(model: TransfusionMoT, rows: int, capacity: int, device: torch.device) -> KVCache:
    """An empty cache for `capacity` slots of `rows` rows."""
    config = model.architecture
    autocast = torch.is_autocast_enabled(device.type)
    return KVCache(
        num_layers=config.num_layers,
        rows=rows,
        num_kv_heads=config.num_kv_heads or config.num_heads,
        head_dim=config.head_dim,
        capacity=capacity,
        device=device,
        dtype=torch.get_autocast_dtype(device.type) if autocast else model.dtype,
    )


def random_rows(
    draw: Callable[..., Tensor], shape: tuple[int, ...], generators: Sequence[torch.Generator | None]
) -> Tensor:
    """One draw of `shape` per generator (`torch.randn` or `torch.rand`) => float32 [B, *shape].

    Each row has a draw of its own, on its generator's device and always in float32: with CPU generators the same seed
    gives the same numbers whatever the batch size, the device of the model and its number format. Without a generator
    torch's global CPU generator is used.
    """
    rows = [
        draw(shape, generator=generator, device=generator.device if generator else "cpu", dtype=torch.float32)
        for generator in generators
    ]
    return torch.stack(rows)
