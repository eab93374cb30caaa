"""Losses on held-out documents, at fixed timesteps and with fixed noise, so that runs and steps compare."""

import dataclasses

import torch
from accelerate import Accelerator
from torch import nn

from transfusion_mot.config import RunConfig
from transfusion_mot.data.batch import Batch
from transfusion_mot.data.packing import Packer, Sources
from transfusion_mot.data.tokenizer import TextTokenizer
from transfusion_mot.diffusion import Diffusion
from transfusion_mot.training.step import loss_counts, loss_sums

# Equidistant, as in Stable Diffusion 3 (arXiv 2403.03206, section 5.3.3).
TIMESTEPS = (0.1, 0.3, 0.5, 0.7, 0.9)
SEED = 0


class Validation:
    """Held-out rows, and the losses of a model on them.

    Captions stand before their images for `text_loss` (of captions and texts alone) and `diffusion_loss` (of images,
    given their captions), and behind clean images for `caption_loss`.

    Args:
        sources: Held-out sources.
        tokenizer: Of the run.
        config: Of the run.
        diffusion: Of the run.
        rows_at_once: Rows of one forward.
    """

    def __init__(
        self, sources: Sources, tokenizer: TextTokenizer, config: RunConfig, diffusion: Diffusion, rows_at_once: int
    ) -> None:
        self.diffusion = diffusion
        self.rows_at_once = rows_at_once
        per_row = config.data.images_per_row
        available = sum(len(source) for source in sources.images)
        self.num_rows = max(1, min(config.training.num_validation_documents, available) // per_row)

        def packer(sources: Sources, caption_first_prob: float) -> Packer:
            data = dataclasses.replace(config.data, caption_first_prob=caption_first_prob, prompt_dropout_prob=0.0)
            rope, patch_size = config.model.rope, config.model.patch_size
            return Packer(
                sources, tokenizer, data, rope, patch_size, self.num_rows, SEED, diffusion.timesteps_from_uniform
            )

        self.caption_first = packer(sources, 1.0)
        self.image_first = packer(Sources(sources.images, sources.image_weights), 0.0)

    @torch.no_grad()
    def losses(self, model: nn.Module, accelerator: Accelerator) -> dict[str, float]:
        """Mean losses over all held-out rows; called by all ranks, which share the rows."""
        device = next(model.parameters()).device
        sums = torch.zeros(2 + len(TIMESTEPS), 2, dtype=torch.float64, device=device)
        lanes = range(accelerator.process_index, self.num_rows, accelerator.num_processes)
        for start in range(0, len(lanes), self.rows_at_once):
            chunk = lanes[start : start + self.rows_at_once]
            before = self._rows(self.caption_first, chunk).to(device)
            behind = self._rows(self.image_first, chunk).to(device)
            with accelerator.autocast():
                sums[0] += self._sum_and_count(model, behind, 0.0)[0]
                sums[1] += self._sum_and_count(model, before, 0.0)[0]
                for index, timestep in enumerate(TIMESTEPS):
                    sums[2 + index] += self._sum_and_count(model, before, timestep)[1]
        sums = accelerator.reduce(sums, reduction="sum")
        caption, text, *per_timestep = (sums[:, 0] / sums[:, 1].clamp(min=1)).tolist()
        by_timestep = {f"diffusion_loss/t={t}": loss for t, loss in zip(TIMESTEPS, per_timestep, strict=True)}
        mean = sum(per_timestep) / len(per_timestep)
        return {"text_loss": text, "caption_loss": caption, "diffusion_loss": mean, **by_timestep}

    def _rows(self, packer: Packer, lanes: range) -> Batch:
        return Batch.cat([packer.row(lane, 0, packer.initial_cursors())[0] for lane in lanes])

    def _sum_and_count(self, model: nn.Module, batch: Batch, timestep: float) -> torch.Tensor:
        """[2, 2]: (sum, count) of text and of diffusion loss with every image at `timestep`."""
        batch = dataclasses.replace(batch, timesteps=torch.full_like(batch.timesteps, timestep))
        return torch.stack([loss_sums(model, batch, self.diffusion).double(), loss_counts(batch)], dim=1)
