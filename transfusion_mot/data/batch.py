"""The batch: rows of text slots and images, laid out by modality, with the ids that carry reading order.

Shapes: B rows, T text slots, K images a row, P patches an image, S = T + K*P, C latent channels, Y and X latent height
and width.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from transfusion_mot.losses import IGNORE_INDEX


@dataclass
class Batch:
    """Rows of a training batch.

    Attributes:
        text_ids: [B, T] token ids.
        text_labels: [B, T] the next token, `IGNORE_INDEX` where there is no loss.
        latents: [B, K, C, Y, X] clean normalised latents.
        noise: [B, K, C, Y, X] the noise that will be mixed in.
        timesteps: [B, K] one t in (0, 1] per image; 0 for a copy.
        document_ids: [B, S] the document a slot belongs to; -1 is padding.
        order: [B, S] reading order inside the document; the copy of an image is read behind it.
        span_ids: [B, S] the image a patch belongs to; -1 on text.
        rope_positions: [B, S] or [B, S, 3] rotary positions.
        source_ids: [B, S] int16, the source that a slot was filled from; -1 is padding. For the log alone.
        copies: [B, K] bool, where images are seen by what follows them in clean copies (`data.image_context: clean`):
            True where the slot holds such a copy, of the image in the slot before it; it has timestep 0. Else None.
    """

    text_ids: Tensor
    text_labels: Tensor
    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    document_ids: Tensor
    order: Tensor
    span_ids: Tensor
    rope_positions: Tensor
    source_ids: Tensor
    copies: Tensor | None = None

    @property
    def filled_images(self) -> Tensor:
        """[B, K] bool, True where the slot holds an image or a copy of one."""
        text_slots, images = self.text_ids.shape[1], self.latents.shape[1]
        return self.document_ids[:, text_slots:].unflatten(1, (images, -1))[:, :, 0] >= 0

    @property
    def image_mask(self) -> Tensor:
        """[B, K] bool, True where the slot holds an image: it has a loss, which a copy has not."""
        return self.filled_images if self.copies is None else self.filled_images & ~self.copies

    def tensors(self) -> dict[str, Tensor]:
        """The fields that are there, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def _map(self, function) -> Self:  # type: ignore[no-untyped-def]  # noqa: ANN001
        return type(self)(**{name: function(tensor) for name, tensor in self.tensors().items()})

    def to(self, device: torch.device) -> Self:
        """Copy to a device, without waiting where the memory is pinned."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def split(self, rows: int) -> list[Self]:
        """Cut into microbatches of `rows` rows; the last may be smaller."""
        parts = {name: tensor.split(rows) for name, tensor in self.tensors().items()}
        return [type(self)(**dict(zip(parts, values, strict=True))) for values in zip(*parts.values(), strict=True)]

    def emptied(self, first: int = 0) -> Self:
        """The same with nothing but padding in its rows from `first` on."""
        is_kept = torch.arange(len(self.text_ids), device=self.text_ids.device)[:, None] < first
        labels = self.text_labels.where(is_kept, IGNORE_INDEX)
        return dataclasses.replace(self, text_labels=labels, document_ids=self.document_ids.where(is_kept, -1))

    @classmethod
    def cat(cls, parts: list[Self]) -> Self:
        """Join rows."""
        if len(parts) == 1:
            return parts[0]
        return cls(**{name: torch.cat([part.tensors()[name] for part in parts]) for name in parts[0].tensors()})


@dataclass
class Rows:
    """What is prepared on the host.

    Attributes:
        batch: Rows; where images are encoded on the device, their latents are still the noise of the posterior.
        images_uint8: [B, K, H, W, 3] where images are encoded on the device, else None; zeros in empty slots.
    """

    batch: Batch
    images_uint8: Tensor | None

    @property
    def nbytes(self) -> int:
        """Size of all tensors."""
        images = 0 if self.images_uint8 is None else self.images_uint8.nbytes
        return images + sum(tensor.nbytes for tensor in self.batch.tensors().values())

    def to(self, device: torch.device) -> Self:
        """Copy to a device, without waiting where the memory is pinned."""
        images = None if self.images_uint8 is None else self.images_uint8.to(device, non_blocking=True)
        return type(self)(self.batch.to(device), images)

    @classmethod
    def cat(cls, parts: list[Self]) -> Self:
        """Join rows."""
        images = [part.images_uint8 for part in parts if part.images_uint8 is not None]
        return cls(Batch.cat([part.batch for part in parts]), torch.cat(images) if images else None)


# Where a tensor begins in a run of bytes, its type and its shape.
_Place = tuple[int, torch.dtype, tuple[int, ...]]
_IMAGES = "images_uint8"
# Kernels read 16 bytes at once where they begin at a multiple.
_ALIGNMENT = 16


@dataclass(frozen=True)
class PackedRows:
    """Rows of some steps as one tensor.

    Between processes a tensor takes half a millisecond, whatever its size, and the ten of a small batch longer than the
    step that is trained on them.

    Attributes:
        content: uint8 [bytes].
        layout: Of each step: name of a field => where it is.
    """

    content: Tensor
    layout: list[dict[str, _Place]]

    @classmethod
    def pack(cls, steps: list[Rows]) -> Self:
        """Copy rows into one tensor."""
        named = [rows.batch.tensors() for rows in steps]
        for tensors, rows in zip(named, steps, strict=True):
            if rows.images_uint8 is not None:
                tensors[_IMAGES] = rows.images_uint8
        layout, size = [], 0
        for tensors in named:
            places: dict[str, _Place] = {}
            for name, tensor in tensors.items():
                places[name] = size, tensor.dtype, tuple(tensor.shape)
                size += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
            layout.append(places)
        packed = cls(torch.empty(size, dtype=torch.uint8), layout)
        for tensors, views in zip(named, packed._views(), strict=True):
            for name, tensor in tensors.items():
                views[name].copy_(tensor)
        return packed

    def rows(self) -> list[Rows]:
        """The rows of each step, which share the memory of `content`."""
        steps = []
        for views in self._views():
            images = views.pop(_IMAGES, None)
            steps.append(Rows(Batch(**views), images))
        return steps

    def _views(self) -> list[dict[str, Tensor]]:
        return [
            {
                name: self.content[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
                for name, (start, dtype, shape) in places.items()
            }
            for places in self.layout
        ]

    def to(self, device: torch.device) -> Self:
        """Copy to a device, without waiting where the memory is pinned."""
        return dataclasses.replace(self, content=self.content.to(device, non_blocking=True))

    def pin_memory(self) -> Self:
        """Called by the data loader, so that the copy to the device need not wait."""
        return dataclasses.replace(self, content=self.content.pin_memory())
