"""The log of a run: losses, speed and counts, in `metrics.jsonl`, a tracker and on the console."""

import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from transfusion_mot.config import RunConfig
from transfusion_mot.data.batch import Batch
from transfusion_mot.data.mixture import SOURCE_COUNTED, Sources, counter
from transfusion_mot.data.packing import counted_by
from transfusion_mot.data.row_arrays import Block, RowShape
from transfusion_mot.errors import UserError
from transfusion_mot.losses import IGNORE_INDEX
from transfusion_mot.models.inputs import LatentInput, TokenInput
from transfusion_mot.models.transfusion import TransfusionMoT
from transfusion_mot.reporting.flops import attending_pairs, flops_per_pair, peak_flops, weight_flops_per_row
from transfusion_mot.training.metrics import (
    METRICS_FILE,
    VALIDATION,
    append_metrics,
    loss_name,
    read_metrics,
    replace_metrics,
)
from transfusion_mot.training.step import StepResult

# Number of equal bins of the timesteps (0, 1] with separate diffusion losses.
TIMESTEP_BINS = 10
# Counters that continue when a run is resumed and do not affect training.
_RUNNING = ("seconds", "flops", "skipped_steps", "spikes")
_HELD_OUT = f"{VALIDATION}loss"


@dataclass(frozen=True)
class StepRecord:
    """Losses and gradient norm of one step, over all ranks.

    Attributes:
        step: 1 is the first step of a run.
        by_row: For each modality, the summed loss of every row of the global batch.
        counts: For each modality, labelled tokens or elements of the step.
        grad_norm: Gradient norm before clipping.
    """

    step: int
    by_row: dict[str, list[float]]
    counts: dict[str, float]
    grad_norm: float

    def loss(self, modality: str) -> float:
        """Mean loss: nats per labelled token, or squared error per element."""
        return sum(self.by_row[modality]) / max(1.0, self.counts[modality])

    @property
    def is_finite(self) -> bool:
        """Whether all losses and the gradient are numbers."""
        return math.isfinite(sum(map(self.loss, self.by_row)) + self.grad_norm)


@dataclass
class Interval:
    """The steps since the last line of the log, over all ranks.

    Attributes:
        steps: Record of each step.
        seconds: Duration of the steps on this rank.
        slots, flops: Slots of all rows, and FLOPs of the model for them.
        counted: Documents, tokens and slots, by counter.
        by_source: For each modality of tokens, (sum, count) of its loss for every source.
        by_timestep: For each modality of latents, (sum, count) of its loss for every bin of timesteps.
        waited: Seconds that each rank waited for its rows.
        memory_gib: Peak memory of each rank's device so far.
    """

    steps: list[StepRecord]
    seconds: float
    slots: int
    flops: float
    counted: dict[str, int]
    by_source: dict[str, list[list[float]]]
    by_timestep: dict[str, list[list[float]]]
    waited: list[float]
    memory_gib: list[float]


def loss_by_source(losses: Tensor, given: TokenInput, source_ids: Tensor, num_sources: int) -> Tensor:
    """[sources, 2]: summed loss and labelled tokens of each; losses, source ids [B, T]."""
    assert given.labels is not None
    return _sums_by(source_ids, num_sources, losses, given.labels != IGNORE_INDEX)


def loss_by_timestep(losses: Tensor, given: LatentInput) -> Tensor:
    """[bins, 2]: summed loss and elements of each bin of timesteps; losses [B, K]."""
    assert given.mask is not None
    bins = (given.timesteps * TIMESTEP_BINS).ceil().clamp(1, TIMESTEP_BINS) - 1
    sums = _sums_by(bins, TIMESTEP_BINS, losses, given.mask)
    return torch.stack([sums[:, 0], sums[:, 1] * given.latents[0, 0].numel()], dim=1)


def _sums_by(group: Tensor, num_groups: int, values: Tensor, mask: Tensor) -> Tensor:
    """[groups, 2] float64: sum and number of the values of every group, where the mask is set."""
    member = (group.flatten()[:, None] == torch.arange(num_groups, device=group.device)) & mask.flatten()[:, None]
    sums = torch.where(member, values.flatten()[:, None], 0.0).sum(dim=0)
    return torch.stack([sums.double(), member.sum(dim=0).double()], dim=1)


class RunLog:
    """Collects the results of steps and writes them to `metrics.jsonl` and the tracker.

    Args:
        accelerator: The run's accelerator.
        run: Run folder.
        config: The run's configuration.
        model: The bare model, for its FLOPs.
        sources: The run's sources.
        first_step: Steps done before; later lines of an earlier attempt are dropped.
        seen: Documents, tokens and slots of those steps, over all ranks.
        history: Metrics file of those steps, if they were done in another run folder.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        run: Path,
        config: RunConfig,
        *,
        model: TransfusionMoT,
        sources: Sources,
        first_step: int,
        seen: Mapping[str, int],
        history: Path | None = None,
    ) -> None:
        self.accelerator = accelerator
        self.path = run / METRICS_FILE
        self.config = config
        self.model = model
        self.seen = Counter(seen)
        self.sources = sources
        self.modalities = config.model.made
        self.counted = [
            *counted_by(config.model),
            *(counter(name, what) for name in sources.names for what in SOURCE_COUNTED),
        ]
        self.left_out = {
            counter(name, f"left_out/{reason}"): count
            for index, name in enumerate(sources.names)
            for reason, count in sources.left_out(index).items()
        }
        self.peak_flops = peak_flops(accelerator.device)
        self._flops_per_row: dict[tuple[tuple[str, Block], ...], int] = {}
        earlier = read_metrics(history or self.path) if first_step else []
        kept = [line for line in earlier if line["step"] <= first_step]
        # There is no snapshot to keep before the first step.
        held_out = [(line[_HELD_OUT], line["step"]) for line in kept if _HELD_OUT in line and line["step"]]
        # The lowest held-out loss so far, and its step.
        self.best: tuple[float, int] | None = min(held_out, default=None)
        self.running = {name: next((line[name] for line in reversed(kept) if name in line), 0) for name in _RUNNING}
        # Read before the file changes, because all processes read it.
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            replace_metrics(self.path, kept)
        if config.training.tracker is not None:
            try:
                accelerator.init_trackers("transfusion_mot")
            except (ValueError, ImportError) as error:
                raise UserError(f"training.tracker '{config.training.tracker}' cannot be used: {error}") from None
        self._begin_interval(first_step)

    def _begin_interval(self, step: int) -> None:
        self.started, self.first_step = time.perf_counter(), step
        self.interval: Counter[str] = Counter()
        self.slots, self.flops, self.waited = 0, 0, 0.0
        device, model = self.accelerator.device, self.config.model

        def zeros(count: int) -> Tensor:
            return torch.zeros(count, 2, dtype=torch.float64, device=device)

        self.by_source = {name: zeros(len(self.sources.names)) for name in model.of_objective("next_token")}
        self.by_timestep = {name: zeros(TIMESTEP_BINS) for name in model.of_objective("diffusion")}
        self.pairs = torch.zeros(1, dtype=torch.float64, device=device)
        self._by_row: list[Tensor] = []
        self._of_step: list[Tensor] = []

    def add(self, result: StepResult, batch: Batch, counts: Counter[str], seconds_waited: float = 0.0) -> None:
        """Add a step, without waiting for the device."""
        # [modalities, rows]
        by_row = torch.stack([losses.sum(dim=1) for losses in result.losses.values()])
        self._by_row.append(by_row)
        self._of_step.append(torch.cat([result.counts, result.grad_norm.double()[None]]))
        self._tower_grad_norms = result.tower_grad_norms
        # Non-finite losses would hide those of the other steps.
        finite = result.grad_norm.isfinite() & by_row.isfinite().all()
        shape = RowShape.of_batch(self.config.model, batch)
        for name, losses in result.losses.items():
            given, block = batch.inputs[name], shape.blocks[name]
            if isinstance(given, TokenInput):
                source_ids = batch.slots.source_ids[:, block.start : block.start + block.num_slots]
                sums = loss_by_source(losses, given, source_ids, len(self.sources.names))
                self.by_source[name] += torch.where(finite, sums, 0.0)
            else:
                self.by_timestep[name] += torch.where(finite, loss_by_timestep(losses, given), 0.0)
        self.interval.update(counts)
        self.waited += seconds_waited
        # Buckets differ in their number of patches.
        self.slots += batch.slots.order.numel() * self.accelerator.num_processes
        key = tuple(shape.blocks.items())
        if key not in self._flops_per_row:
            self._flops_per_row[key] = weight_flops_per_row(self.model, shape)
        self.flops += self._flops_per_row[key] * self.config.training.num_rows
        self.pairs += attending_pairs(batch, self.model)

    def collect(self) -> Interval:
        """Results of the steps since the last line; called by all ranks.

        Only here does the host wait for the device, and each rank for the others: one all-reduce sums everything.
        """
        ranks, rank, device = self.accelerator.num_processes, self.accelerator.process_index, self.accelerator.device
        by_row = torch.stack(self._by_row).double()
        # A rank leaves the entries of other ranks at zero, so that the sum concatenates all ranks.
        all_rows = by_row.new_zeros(*by_row.shape[:2], ranks, by_row.shape[2])
        all_rows[:, :, rank] = by_row
        memory = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
        of_ranks = by_row.new_zeros(2, ranks)
        of_ranks[:, rank] = by_row.new_tensor([self.waited, memory])
        counted = by_row.new_tensor([self.interval[name] for name in self.counted])
        by_source, by_timestep = self.by_source.values(), self.by_timestep.values()
        parts = (*by_source, *by_timestep, of_ranks, self.pairs, counted, all_rows.flatten(2))
        summed = self.accelerator.reduce(torch.cat([part.flatten() for part in parts]), reduction="sum").cpu()
        pieces = iter(
            piece.view(part.shape)
            for piece, part in zip(summed.split([part.numel() for part in parts]), parts, strict=True)
        )
        sums_by_source = {name: next(pieces).tolist() for name in self.by_source}
        sums_by_timestep = {name: next(pieces).tolist() for name in self.by_timestep}
        of_ranks, pairs, counted, all_rows = pieces
        # Equal on all ranks.
        of_step = torch.stack(self._of_step).tolist()
        steps = [
            StepRecord(
                self.first_step + 1 + index,
                dict(zip(self.modalities, rows, strict=True)),
                dict(zip(self.modalities, numbers[:-1], strict=True)),
                numbers[-1],
            )
            for index, (rows, numbers) in enumerate(zip(all_rows.tolist(), of_step, strict=True))
        ]
        return Interval(
            steps,
            time.perf_counter() - self.started,
            self.slots,
            self.flops + flops_per_pair(self.model) * pairs.item(),
            dict(zip(self.counted, map(int, counted.tolist()), strict=True)),
            sums_by_source,
            sums_by_timestep,
            *of_ranks.tolist(),
        )

    def write(self, interval: Interval, lr: float, noticed: Counter[str]) -> str:
        """Write the means of an interval => a line for the console.

        Args:
            interval: Result of `collect`.
            lr: Learning rate of its last step.
            noticed: Counts from the guards: `skipped_steps` and `spikes`.
        """
        self.seen.update(interval.counted)
        seconds, counted, finite = interval.seconds, interval.counted, [s for s in interval.steps if s.is_finite]
        more = {"seconds": seconds, "flops": interval.flops, **noticed}
        self.running = {name: value + more.get(name, 0) for name, value in self.running.items()}
        losses = {
            name: _mean([(sum(step.by_row[name]), step.counts[name]) for step in finite]) for name in self.modalities
        }
        step, used_slots = interval.steps[-1].step, interval.slots - counted["pad_slots"]
        rates = {name: counted[f"{name}_items"] / seconds for name in self.modalities if f"{name}_items" in counted}
        values = {
            **{loss_name(name): loss for name, loss in losses.items()},
            "loss": self.total(losses),
            "grad_norm": finite[-1].grad_norm if finite else 0.0,
            **(self._norms_of_towers() if interval.steps[-1].is_finite else {}),
            "lr": lr,
            "seconds_per_step": seconds / len(interval.steps),
            "tokens_per_second": used_slots / seconds,
            **{f"{name}_items_per_second": rate for name, rate in rates.items()},
            "data_wait_fraction": max(interval.waited) / seconds,
            "pad_fraction": counted["pad_slots"] / interval.slots,
            **{
                f"{loss_name(name)}/t={index / TIMESTEP_BINS:.1f}-{(index + 1) / TIMESTEP_BINS:.1f}": total / count
                for name, bins in interval.by_timestep.items()
                for index, (total, count) in enumerate(bins)
                if count
            },
            **{
                counter(source, loss_name(name)): total / count
                for name, sums in interval.by_source.items()
                for source, (total, count) in zip(self.sources.names, sums, strict=True)
                if count
            },
            **{f"{name}_seen": self.seen[name] for name in self.counted},
            **{counter(name, "epochs"): epochs for name, epochs in self.sources.epochs(self.seen).items()},
            **self.left_out,
            **self.running,
        }
        shown = [
            f"step {step:>{len(str(self.config.training.num_steps))}}",
            # A loss of latents is about 1, so it needs more digits.
            *(f"{name} {losses[name]:6.{4 if name in self.by_timestep else 3}f}" for name in self.modalities),
            f"norm {values['grad_norm']:5.2f}",
            f"lr {lr:.1e}",
            f"{1000 * values['seconds_per_step']:5.0f} ms",
            *(f"{rate:6.0f} {name}/s" for name, rate in rates.items()),
            f"data wait {100 * values['data_wait_fraction']:2.0f} %",
            _shown_epochs(list(self.sources.epochs(self.seen).values())),
            f"{_shown_time((self.config.training.num_steps - step) * values['seconds_per_step'])} left",
        ]
        if self.peak_flops is not None:
            values["mfu"] = interval.flops / seconds / (self.peak_flops * self.accelerator.num_processes)
            values["peak_memory_gib"] = max(interval.memory_gib)
            shown += [f"MFU {100 * values['mfu']:2.0f} %", f"{values['peak_memory_gib']:4.1f} GiB"]
        self._write(step, values)
        self._begin_interval(step)
        return "  ".join(shown)

    def _norms_of_towers(self) -> dict[str, float]:
        """Gradient norms of the last step."""
        return {f"grad_norm/{tower}": float(norm) for tower, norm in self._tower_grad_norms.items()}

    def total(self, losses: dict[str, float]) -> float:
        """The mean losses of all modalities, weighted as in training."""
        return sum(self.config.model.modalities[name].loss_weight * loss for name, loss in losses.items())

    def write_validation(self, step: int, losses: dict[str, float]) -> str:
        """Write held-out losses, and their sum as in training => a line for the console."""
        total = self.total({name: losses[loss_name(name)] for name in self.modalities if loss_name(name) in losses})
        self._write(step, {f"{VALIDATION}{name}": loss for name, loss in (losses | {"loss": total}).items()})
        summary = "  ".join(f"{name} {losses[name]:.4f}" for name in losses if "/" not in name)
        if step and (self.best is None or total < self.best[0]):
            self.best = total, step
            summary += "  (lowest so far)"
        return f"step {step:>{len(str(self.config.training.num_steps))}}  held-out {summary}"

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Context whose time does not count as training."""
        begun = time.perf_counter()
        yield
        self.started += time.perf_counter() - begun

    def _write(self, step: int, values: dict[str, Any]) -> None:
        self.accelerator.log(values, step=step)
        if self.accelerator.is_main_process:
            append_metrics(self.path, [{"step": step, **values}])


def _mean(parts: list[tuple[float, float]]) -> float:
    """Total sum divided by total count."""
    return sum(total for total, _ in parts) / max(1.0, sum(count for _, count in parts))


def _shown_epochs(epochs: list[float]) -> str:
    """Epochs of the sources in words; for several the range from fewest to most."""
    least, most = min(epochs), max(epochs)
    return f"epoch {most:.2f}" if most - least < 0.005 else f"epoch {least:.2f}-{most:.2f}"


def _shown_time(seconds: float) -> str:
    """A duration in its two largest units."""
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02} min"
