"""What a run reports: losses and speed in `metrics.jsonl` and a tracker, and the model's work in FLOPs."""

import json
import math
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from transfusion_mot.config import ModelConfig, RunConfig
from transfusion_mot.data.batch import Batch
from transfusion_mot.data.mixture import SOURCE_COUNTED, Sources, counter
from transfusion_mot.data.packing import COUNTED
from transfusion_mot.errors import NotFiniteError, UserError
from transfusion_mot.models.adapters import UNetAdapter
from transfusion_mot.models.attention import SlotIds, dense_mask
from transfusion_mot.models.mot import SHARED
from transfusion_mot.training.step import StepResult

# Dense bf16 peak in FLOP/s, from the vendors' data sheets.
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "L40S": 362e12, "4090": 165e12}


class RunLog:
    """Collects what steps leave and writes it to `metrics.jsonl` and the tracker.

    Args:
        accelerator: Of the run.
        run: Run folder.
        config: Of the run.
        model: The bare model, for its FLOPs.
        first_step: Steps done before; later lines of an earlier attempt are dropped.
        seen: Documents, tokens and slots of those steps, over all ranks.
        sources: Of the run.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        run: Path,
        config: RunConfig,
        model: nn.Module,
        first_step: int,
        seen: dict[str, int],
        sources: Sources,
    ) -> None:
        self.accelerator = accelerator
        self.path = run / "metrics.jsonl"
        self.config = config
        self.model = model
        self.seen = Counter(seen)
        self.sources = sources
        self.counted = [*COUNTED, *(counter(name, what) for name in sources.names for what in SOURCE_COUNTED)]
        self.left_out = {
            counter(name, f"left_out/{reason}"): count
            for index, name in enumerate(sources.names)
            for reason, count in sources.left_out(index).items()
        }
        self.peak_flops = peak_flops(accelerator.device)
        self.flops_per_row = 0.0
        if accelerator.is_main_process:
            kept = [line for line in read_metrics(self.path) if line["step"] <= first_step] if first_step else []
            self.path.write_text("".join(json.dumps(line) + "\n" for line in kept))
        if config.training.tracker is not None:
            try:
                accelerator.init_trackers("transfusion_mot")
            except (ValueError, ImportError) as error:
                raise UserError(f"training.tracker '{config.training.tracker}' cannot be used: {error}") from None
        self._begin_interval(first_step)

    def _begin_interval(self, step: int) -> None:
        self.started, self.first_step = time.perf_counter(), step
        self.sums = torch.zeros(2, dtype=torch.float64, device=self.accelerator.device)
        self.counts = torch.zeros_like(self.sums)
        self.interval: Counter[str] = Counter()
        self.slots = 0

    def add(self, result: StepResult, batch: Batch, counts: Counter[str]) -> None:
        """Take a step in, without waiting for the device."""
        self.sums += result.loss_sums
        self.counts += result.counts
        self.grad_norm, self.tower_grad_norms = result.grad_norm, result.tower_grad_norms
        self.interval.update(counts)
        # Buckets differ in their patches.
        self.slots += batch.order.numel() * self.accelerator.num_processes
        if self.peak_flops is not None and not self.flops_per_row:
            # Of one row: the mask over all rows could be larger than what training needs.
            self.flops_per_row = flops_per_row(self.model, self.config.model, batch.split(1)[0])

    def write(self, step: int, lr: float) -> dict[str, str]:
        """Write the means since the last call => what the progress bar shows.

        Raises:
            NotFiniteError: A loss is not finite; names the steps.
        """
        # The one place where the host waits for the device.
        counted = self.sums.new_tensor([self.interval[name] for name in self.counted])
        totals = self.accelerator.reduce(torch.cat([self.sums, counted]), reduction="sum").tolist()
        interval = dict(zip(self.counted, map(int, totals[2:]), strict=True))
        self.seen.update(interval)
        seconds, steps = time.perf_counter() - self.started, step - self.first_step
        text_loss, diffusion_loss = (s / max(1.0, c) for s, c in zip(totals[:2], self.counts.tolist(), strict=True))
        grad_norm = float(self.grad_norm)
        if not math.isfinite(text_loss + diffusion_loss + grad_norm):
            raise NotFiniteError(
                f"not finite between steps {self.first_step + 1} and {step}: text loss {text_loss}, diffusion loss "
                f"{diffusion_loss}, gradient norm {grad_norm}; states saved before are unharmed: resume with a lower "
                "optimizer.lr"
            )
        rows = steps * self.config.training.num_rows
        used_slots = self.slots - interval["pad_slots"]
        values = {
            "text_loss": text_loss,
            "diffusion_loss": diffusion_loss,
            "loss": text_loss + self.config.training.diffusion_loss_weight * diffusion_loss,
            "grad_norm": grad_norm,
            **{f"grad_norm/{tower}": float(norm) for tower, norm in self.tower_grad_norms.items()},
            "lr": lr,
            "seconds_per_step": seconds / steps,
            "tokens_per_second": used_slots / seconds,
            "images_per_second": interval["images"] / seconds,
            "pad_fraction": interval["pad_slots"] / self.slots,
            **{f"{name}_seen": self.seen[name] for name in self.counted},
            **{counter(name, "epochs"): epochs for name, epochs in self.sources.epochs(self.seen).items()},
            **self.left_out,
        }
        if self.peak_flops is not None:
            values["mfu"] = self.flops_per_row * rows / seconds / (self.peak_flops * self.accelerator.num_processes)
            values["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self._write(step, values)
        self._begin_interval(step)
        images = f"{values['images_per_second']:.0f}"
        return {"text": f"{text_loss:.3f}", "diffusion": f"{diffusion_loss:.4f}", "images/s": images}

    def write_validation(self, step: int, losses: dict[str, float]) -> None:
        """Write held-out losses."""
        self._write(step, {f"validation/{name}": loss for name, loss in losses.items()})
        summary = ", ".join(f"{name} {losses[name]:.4f}" for name in losses if "/" not in name)
        self.accelerator.print(f"\nstep {step}: held-out {summary}")

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done inside is not training: its time counts in no speed."""
        begun = time.perf_counter()
        yield
        self.started += time.perf_counter() - begun

    def _write(self, step: int, values: dict[str, Any]) -> None:
        self.accelerator.log(values, step=step)
        if self.accelerator.is_main_process:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file, without one that a crash cut off."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines


def peak_flops(device: torch.device) -> float | None:
    """Peak FLOP/s of a known GPU, else None."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)


def active_parameters(model: nn.Module, config: ModelConfig, modality: str) -> int:
    """Matrix parameters that a slot of the modality passes through: its tower's blocks and its own input or output."""
    owners = tuple(f".owned.{owner}." for owner in (config.modalities[modality], SHARED))
    shared = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if name.startswith("blocks.") and parameter.ndim == 2 and any(owner in name for owner in owners)
    )
    own = "text_head." if modality == "text" else "image_adapter."
    return shared + sum(p.numel() for name, p in model.named_parameters() if name.startswith(own) and p.ndim == 2)


def flops_per_row(model: nn.Module, config: ModelConfig, batch: Batch, pairs: float | None = None) -> float:
    """FLOPs of forward and backward over one row of `batch`, see `row_flops`.

    Args:
        batch: One row or more.
        pairs: Pairs of slots a row to count; those that attend in `batch` if None.
    """
    if pairs is None:
        slots = SlotIds.from_spans(batch.document_ids, batch.order, batch.span_ids)
        pairs = dense_mask(slots, slots).sum().item() / batch.order.shape[0]
    _, images, *latent_shape = batch.latents.shape
    return row_flops(model, config, batch.text_ids.shape[1], images, torch.Size(latent_shape), pairs)


def row_flops(
    model: nn.Module, config: ModelConfig, text_slots: int, images: int, latent_shape: torch.Size, pairs: float
) -> float:
    """FLOPs of forward and backward over one row (Chowdhery et al., arXiv 2204.02311, appendix B).

    6 per parameter and slot, 12 per layer, attention width and pair of slots that attend, and the convolutions of a
    U-Net adapter.

    Args:
        latent_shape: [C, Y, X] of an image.
        pairs: Pairs of slots that attend.
    """
    patches = images * latent_shape[1] * latent_shape[2] // config.patch_size**2
    weights = 6 * (
        active_parameters(model, config, "text") * text_slots + active_parameters(model, config, "image") * patches
    )
    attention = 12 * config.num_layers * config.num_heads * config.head_dim * pairs
    return weights + attention + images * convolution_flops(config, latent_shape)


def convolution_flops(config: ModelConfig, latent_shape: torch.Size) -> float:
    """FLOPs of the convolutions of the image adapter over one image [C, Y, X], forward and backward."""
    if config.image_adapter == "linear":
        return 0.0
    channels, height, width = latent_shape
    hidden_size = config.towers[config.modalities["image"]].hidden_size
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        adapter = UNetAdapter(channels, hidden_size, config.patch_size, config.unet_channels, config.unet_num_layers)
        hidden, kept = adapter.embed(torch.empty(1, channels, height, width), torch.empty(1))
        adapter.predict(hidden, kept, height, width)
    return 3.0 * counter.get_flop_counts()["Global"][torch.ops.aten.convolution]
