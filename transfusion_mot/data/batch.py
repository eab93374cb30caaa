"""A batch: rows of slots, laid out by modality, with ids for the reading order."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from transfusion_mot.models.inputs import LatentInput, ModalityInput, Slots, TokenInput

_SLOTS = "slots"


@dataclass
class Batch:
    """Rows of a training batch.

    Attributes:
        inputs: Input of each modality, in the order of `ModelConfig.stream_order`.
        slots: Ids of all slots of a row, in the same order.
    """

    inputs: dict[str, ModalityInput]
    slots: Slots

    @property
    def num_rows(self) -> int:
        """Rows B."""
        return self.slots.order.shape[0]

    def tokens(self, modality: str) -> TokenInput:
        """The input of a modality of tokens."""
        given = self.inputs[modality]
        assert isinstance(given, TokenInput)
        return given

    def latents(self, modality: str) -> LatentInput:
        """The input of a modality of latents."""
        given = self.inputs[modality]
        assert isinstance(given, LatentInput)
        return given

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, such as `text.ids` or `slots.order`."""
        parts = {**self.inputs, _SLOTS: self.slots}
        return {
            f"{part}.{field}": tensor
            for part, fields in parts.items()
            for field, tensor in fields._asdict().items()
            if tensor is not None
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Self:
        """The batch with these `tensors`."""
        parts: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            part, field = name.rsplit(".", 1)
            parts.setdefault(part, {})[field] = tensor
        slots = Slots(**parts.pop(_SLOTS))
        kinds = {name: TokenInput if "ids" in part else LatentInput for name, part in parts.items()}
        return cls({name: kinds[name](**part) for name, part in parts.items()}, slots)

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Apply a function to every tensor."""
        return self.from_tensors({name: function(tensor) for name, tensor in self.tensors().items()})

    def to(self, device: torch.device) -> Self:
        """Copy to a device, without waiting where the memory is pinned."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def split(self, rows: int) -> list[Self]:
        """Cut into microbatches of `rows` rows; the last may be smaller."""
        parts = {name: tensor.split(rows) for name, tensor in self.tensors().items()}
        return [
            self.from_tensors(dict(zip(parts, values, strict=True))) for values in zip(*parts.values(), strict=True)
        ]

    def emptied(self, first: int = 0) -> Self:
        """The batch with only padding in its rows from `first` on."""
        empty = torch.arange(self.num_rows, device=self.slots.order.device) >= first
        inputs = {name: given.without_loss(empty) for name, given in self.inputs.items()}
        slots = self.slots._replace(document_ids=self.slots.document_ids.masked_fill(empty[:, None], -1))
        return dataclasses.replace(self, inputs=inputs, slots=slots)

    def at(self, timestep: float) -> Self:
        """The batch with all latents at one timestep; copies and conditions stay clean."""
        inputs = {
            name: given.at(timestep) if isinstance(given, LatentInput) else given for name, given in self.inputs.items()
        }
        return dataclasses.replace(self, inputs=inputs)

    @property
    def with_loss(self) -> dict[str, ModalityInput]:
        """The inputs that have a loss: all except those that are only read."""
        return {name: given for name, given in self.inputs.items() if given.has_loss}

    def counts(self) -> Tensor:
        """[modalities] float64: labelled tokens, or elements with a diffusion loss, of each modality that has a
        loss."""
        return torch.stack([given.loss_count() for given in self.with_loss.values()])

    @classmethod
    def cat(cls, parts: list[Self]) -> Self:
        """Join rows."""
        if len(parts) == 1:
            return parts[0]
        tensors = [part.tensors() for part in parts]
        return cls.from_tensors({name: torch.cat([part[name] for part in tensors]) for name in tensors[0]})


@dataclass
class Rows:
    """Rows as prepared on the host.

    Attributes:
        batch: Rows; if media are encoded on the device, their latents are still the noise of the posterior.
        media: For each modality whose media are encoded on the device: uint8 [B, K, H, W, 3], zeros in empty slots.
    """

    batch: Batch
    media: dict[str, Tensor]

    @property
    def nbytes(self) -> int:
        """Size of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name; media follow the batch as `media.NAME`."""
        return self.batch.tensors() | {f"{_MEDIA}{name}": tensor for name, tensor in self.media.items()}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Self:
        """The rows with these `tensors`."""
        batch = {name: tensor for name, tensor in tensors.items() if not name.startswith(_MEDIA)}
        media = {name.removeprefix(_MEDIA): tensor for name, tensor in tensors.items() if name.startswith(_MEDIA)}
        return cls(Batch.from_tensors(batch), media)

    def to(self, device: torch.device) -> Self:
        """Copy to a device, without waiting where the memory is pinned."""
        return self.from_tensors({name: t.to(device, non_blocking=True) for name, t in self.tensors().items()})

    @classmethod
    def cat(cls, parts: list[Self]) -> Self:
        """Join rows."""
        tensors = [part.tensors() for part in parts]
        return cls.from_tensors({name: torch.cat([part[name] for part in tensors]) for name in tensors[0]})


# Start of a tensor in the bytes, its type and its shape.
_Place = tuple[int, torch.dtype, tuple[int, ...]]
_MEDIA = "media."
# Kernels read 16 bytes at once at aligned addresses.
_ALIGNMENT = 16


@dataclass(frozen=True)
class PackedRows:
    """Rows of some steps as one tensor.

    Sending a tensor between processes takes half a millisecond, independent of its size. The ten tensors of a small
    batch would take longer than its training step.

    Attributes:
        content: uint8 [bytes].
        layout: For each step: name of a field => its place.
    """

    content: Tensor
    layout: list[dict[str, _Place]]

    @classmethod
    def pack(cls, steps: list[Rows]) -> Self:
        """Copy rows into one tensor."""
        named = [rows.tensors() for rows in steps]
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
        """The rows of each step; they share the memory of `content`."""
        return [Rows.from_tensors(views) for views in self._views()]

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
        """Called by the data loader, so that the host does not wait for the copy to the device."""
        return dataclasses.replace(self, content=self.content.pin_memory())
