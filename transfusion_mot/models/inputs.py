"""Inputs of the model: the slots of each modality, and ids for the reading order.

Shapes: B rows, T token slots of a modality, K media slots of a modality (images of a row), P patches of one, C latent
channels, Y and X latent height and width, S all slots of a row.

They are tuples, not data classes, so that DDP and FSDP2 find the tensors in them.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from transfusion_mot.losses import IGNORE_INDEX


class TokenInput(NamedTuple):
    """Slots of a modality of tokens.

    Attributes:
        ids: [B, T] token ids.
        labels: [B, T] the next token, `IGNORE_INDEX` where there is no loss. None while sampling.
    """

    ids: Tensor
    labels: Tensor | None = None

    @property
    def has_loss(self) -> bool:
        """Whether there is something to predict."""
        return self.labels is not None

    def num_slots(self, patch_size: int) -> int:
        """Slots of a row that these tokens take; tokens have no patches."""
        return self.ids.shape[1]

    def loss_count(self) -> Tensor:
        """[] float64, slots with a loss."""
        assert self.labels is not None
        return (self.labels != IGNORE_INDEX).sum().double()

    def without_loss(self, rows: Tensor) -> "TokenInput":
        """The same without a label in `rows` [B] bool."""
        assert self.labels is not None
        return self._replace(labels=self.labels.masked_fill(rows[:, None], IGNORE_INDEX))


class LatentInput(NamedTuple):
    """Slots of a modality of continuous latents.

    Attributes:
        latents: [B, K, C, Y, X]; with `noise` they are clean and normalised, without it (sampling) already noisy.
        timesteps: [B, K] one t in [0, 1] for each slot: 0 is clean, 1 is noise.
        noise: [B, K, C, Y, X] the noise to mix in; None in sampling, and if latents are only read.
        mask: [B, K] bool, True where a slot has a loss: it holds an image, and neither a copy nor a condition.
        copies: [B, K] bool, True where a slot holds the clean copy of the image in the slot before it, or of one of the
            modality that is read (`data.image_context: clean`); None where there are no copies.
        conditions: [B, K] bool, True where a slot holds a clean image without a loss, such as the source image of an
            editing pair; None if the data have none.
    """

    latents: Tensor
    timesteps: Tensor
    noise: Tensor | None = None
    mask: Tensor | None = None
    copies: Tensor | None = None
    conditions: Tensor | None = None

    @property
    def has_loss(self) -> bool:
        """Whether there is something to predict."""
        return self.noise is not None

    def num_slots(self, patch_size: int) -> int:
        """Slots of a row that these images take."""
        _, images, _, height, width = self.latents.shape
        return images * height * width // patch_size**2

    @property
    def is_filled(self) -> Tensor:
        """[B, K] bool, True where a slot holds an image."""
        assert self.mask is not None
        filled = self.mask
        for clean in (self.copies, self.conditions):
            filled = filled if clean is None else filled | clean
        return filled

    @property
    def seen_later(self) -> Tensor | None:
        """[B, K] bool, images that later slots see; images with copies are hidden. None if none are hidden."""
        if self.copies is None or self.conditions is None:
            return self.copies
        return self.copies | self.conditions

    def loss_count(self) -> Tensor:
        """[] float64, elements with a loss."""
        assert self.mask is not None
        return (self.mask.sum() * self.latents[0, 0].numel()).double()

    def without_loss(self, rows: Tensor) -> "LatentInput":
        """The same without a loss in `rows` [B] bool."""
        assert self.mask is not None
        return self._replace(mask=self.mask & ~rows[:, None])

    def at(self, timestep: float) -> "LatentInput":
        """The input with every image at one timestep; copies and conditions stay clean."""
        timesteps = torch.full_like(self.timesteps, timestep)
        for clean in (self.copies, self.conditions):
            timesteps = timesteps if clean is None else timesteps.masked_fill(clean, 0.0)
        return self._replace(timesteps=timesteps)


ModalityInput = TokenInput | LatentInput


class Slots(NamedTuple):
    """Ids of all slots of a batch, in the order of `ModelConfig.stream_order`.

    Attributes:
        document_ids: [B, S] the document a slot belongs to; -1 is padding.
        order: [B, S] reading order inside the document; the clean copy of an image is read after it.
        span_ids: [B, S] the image a patch belongs to, counted over all modalities of latents of a row; -1 on tokens.
        rope_positions: [B, S] or [B, S, 3] rotary positions.
        source_ids: [B, S] int16, the source of a slot; -1 is padding. Used only by the log.
    """

    document_ids: Tensor
    order: Tensor
    span_ids: Tensor
    rope_positions: Tensor
    source_ids: Tensor
