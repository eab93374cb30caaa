"""Losses on held-out documents, at fixed timesteps and with fixed noise, so that runs and steps compare."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from transfusion_mot.config import RunConfig
from transfusion_mot.data.batch import Batch
from transfusion_mot.config import TEXT
from transfusion_mot.data.mixture import Sources
from transfusion_mot.data.online import OnlineEncoder
from transfusion_mot.data.packing import Packer
from transfusion_mot.data.sources.base import TextDocuments
from transfusion_mot.data.tokenizer import TextTokenizer
from transfusion_mot.models.transfusion import TransfusionMoT
from transfusion_mot.training.log import loss_name
from transfusion_mot.training.step import loss_terms

# Equidistant, as in Stable Diffusion 3 (arXiv 2403.03206, section 5.3.3).
TIMESTEPS = (0.1, 0.3, 0.5, 0.7, 0.9)
SEED = 0


class Validation:
    """Held-out rows, and the losses of a model on them.

    Captions stand before their images for `text_loss` (of all text) and `diffusion_loss` (of images, given what stands
    before them), and behind clean images for `caption_loss`, which is missing if no source has captions. Without images
    there is only `text_loss`, of rows of text.

    Args:
        sources: Held-out sources, at least one.
        tokenizer: Of the run.
        config: Of the run.
        diffusion: Of the run.
        encoder: Encodes images that have no cached latents.
        rows_at_once: Rows of one forward.
        prompt_dropout_prob: Share of the images in front of which nothing stands.
    """

    def __init__(
        self,
        sources: Sources,
        tokenizer: TextTokenizer,
        config: RunConfig,
        diffusion: Diffusion,
        encoder: OnlineEncoder,
        rows_at_once: int,
        prompt_dropout_prob: float = 0.0,
    ) -> None:
        self.diffusion = diffusion
        self.encoder = encoder
        self.rows_at_once = rows_at_once
        captions = sources.only_captions()
        total = sources.num_image_documents()
        wanted = min(total, config.training.num_validation_documents)
        self.has_images = total > 0

        def packer(sources: Sources, caption_first_prob: float, num_rows: int) -> Packer:
            data = dataclasses.replace(
                config.data,
                caption_first_prob=caption_first_prob,
                prompt_dropout_prob=prompt_dropout_prob,
                random_flip=False,
                lookahead=1,
            )
            rope, patch_size, draw = config.model.rope, config.model.patch_size, diffusion.timesteps_from_uniform
            return Packer(sources, tokenizer, data, rope, patch_size, num_rows, SEED, draw)

        def packers(sources: Sources, caption_first_prob: float) -> list[tuple[int, Packer]]:
            """(bucket, packer) of every bucket that has images; a lane each row, so that no image comes twice."""
            result = []
            for bucket, pools in enumerate(sources.image_pools):
                if not pools:
                    continue
                available = sum(sources.pools[pool].length for pool in pools)
                # Of an image in front of its caption there may be a copy.
                slots_per_image = 2 if config.data.has_copies and caption_first_prob == 0 else 1
                num_rows = max(1, wanted * available // total // (config.data.images_per_row // slots_per_image))
                result.append((bucket, packer(sources, caption_first_prob, num_rows)))
            return result

        # Texts alone lie in rows of the first bucket, whose image slots stay empty.
        self.caption_first = packers(sources, 1.0) or [(0, packer(sources, 1.0, text_rows(sources, tokenizer, config)))]
        self.image_first = packers(captions, 0.0)
        self.num_rows = sum(packer.num_lanes for _, packer in self.caption_first)

    @torch.no_grad()
    def losses(self, model: TransfusionMoT, accelerator: Accelerator) -> dict[str, float]:
        """Mean losses over all held-out rows; called by all ranks, which share the rows."""
        timesteps = TIMESTEPS if self.has_images else ()
        device = next(model.parameters()).device
        sums = torch.zeros(2 + len(timesteps), 2, dtype=torch.float64, device=device)
        with accelerator.autocast():
            for batch in self._batches(self.image_first, model, accelerator):
                sums[0] += self._sum_and_count(model, batch, 0.0)[0]
            for batch in self._batches(self.caption_first, model, accelerator):
                sums[1] += self._sum_and_count(model, batch, 0.0)[0]
                for index, timestep in enumerate(timesteps):
                    sums[2 + index] += self._sum_and_count(model, batch, timestep)[1]
        sums = accelerator.reduce(sums, reduction="sum")
        caption, text, *per_timestep = (sums[:, 0] / sums[:, 1].clamp(min=1)).tolist()
        losses = {"text_loss": text} | ({"caption_loss": caption} if self.image_first else {})
        if self.has_images:
            losses["diffusion_loss"] = sum(per_timestep) / len(per_timestep)
            losses |= {f"diffusion_loss/t={t}": loss for t, loss in zip(timesteps, per_timestep, strict=True)}
        return losses

    @torch.no_grad()
    def image_losses(self, model: TransfusionMoT, accelerator: Accelerator, timesteps: Sequence[float]) -> Tensor:
        """[N, len(timesteps)], diffusion loss of each held-out image at each timestep; called by all ranks."""
        found = []
        with accelerator.autocast():
            for batch in self._batches(self.caption_first, model, accelerator):
                elements = batch.latents[0, 0].numel()
                losses = [compute_losses(model, _at(batch, t), self.diffusion).images / elements for t in timesteps]
                found.append(torch.stack(losses, dim=-1)[batch.image_mask].double())
        gathered: list[Tensor] = gather_object([torch.cat(found).cpu()])
        return torch.cat(gathered)

    def _batches(
        self, packers: list[tuple[int, Packer]], model: TransfusionMoT, accelerator: Accelerator
    ) -> Iterator[Batch]:
        """This rank's rows; as many batches on every rank, because they forward a sharded model together."""
        device = next(model.parameters()).device
        for bucket, packer in packers:
            is_compiled = is_compiled_for_shape(model, device, packer.num_slots(bucket))
            lanes = range(accelerator.process_index, packer.num_lanes, accelerator.num_processes)
            for start in range(0, -(-packer.num_lanes // accelerator.num_processes), self.rows_at_once):
                chunk = lanes[start : start + self.rows_at_once]
                # Rows that count for nothing: one where there are none left, and for FlexAttention, which is compiled
                # for every shape, as many as give all batches the shape of training's. Without gradients nothing else
                # is compiled, but for the encoder, which fills its batches itself.
                rows = self.rows_at_once if is_compiled else max(1, len(chunk))
                used = [*chunk, *[0] * (rows - len(chunk))]
                states = np.tile(packer.initial_state(), (rows, 1))
                batch = self.encoder(packer.rows(used, 0, states, bucket)[0].to(device))
                yield batch if len(chunk) == rows else batch.emptied(len(chunk))

    def _sum_and_count(self, model: TransfusionMoT, batch: Batch, timestep: float) -> torch.Tensor:
        """[2, 2]: (sum, count) of text and of diffusion loss with every image at `timestep`."""
        losses = compute_losses(model, _at(batch, timestep), self.diffusion)
        sums = torch.stack([losses.text.sum(), losses.images.sum()])
        return torch.stack([sums.double(), loss_counts(batch)], dim=1)


def is_compiled_for_shape(model: TransfusionMoT, device: torch.device, num_slots: int) -> bool:
    """Whether attention over such rows is compiled anew for every number of them."""
    return model.kernel(device, num_slots)[0] == "flex"


def text_rows(sources: Sources, tokenizer: TextTokenizer, config: RunConfig) -> int:
    """Rows that about as many texts fill as a validation uses, or all held-out ones if they are fewer."""
    most, lengths = config.training.num_validation_documents, []
    pools = [sources.pools[index] for index in sources.text_pools]
    for pool in pools:
        documents = sources.sources[pool.source].documents
        assert isinstance(documents, TextDocuments)
        # Begin and end of a document stand around a text.
        lengths += [len(tokenizer.encode(documents.text(index))) + 2 for index in range(min(pool.length, most))]
    wanted = min(most, sum(pool.length for pool in pools))
    return max(1, int(wanted * np.mean(lengths)) // config.data.text_slots)


def _at(batch: Batch, timestep: float) -> Batch:
    """With every image at one timestep; copies stay clean."""
    timesteps = torch.full_like(batch.timesteps, timestep)
    if batch.copies is not None:
        timesteps = timesteps.masked_fill(batch.copies, 0.0)
    return dataclasses.replace(batch, timesteps=timesteps)
