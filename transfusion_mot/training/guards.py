"""Checks of the steps of a run: wrong first losses, losses and gradients that are not finite, and spikes."""

import math
import statistics
from collections import Counter, deque

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from transfusion_mot.config import TEXT, RunConfig
from transfusion_mot.data.batch import Batch
from transfusion_mot.data.online import OnlineEncoder
from transfusion_mot.data.packing import Packer
from transfusion_mot.data.row_arrays import RowShape
from transfusion_mot.errors import NotFiniteError, UserError
from transfusion_mot.models.modalities import DiffusionModality, Modality, TokenModality
from transfusion_mot.models.transfusion import INIT_STD
from transfusion_mot.training.log import StepRecord
from transfusion_mot.training.step import loss_terms

# Steps before a spike that it is compared with, their minimum number, and the deviations above their median.
_WINDOW, _FEWEST, _DEVIATIONS = 200, 50, 10.0
# Maximum number of named rows and documents; maximum number of successive skipped steps.
_MOST_NAMED = 3
_MOST_SKIPPED = 20
_TEXT_SHOWN = 80
# Tolerance of the first losses of a new model: in nats, and as a share of the diffusion loss.
_TOKEN_BAND, _DIFFUSION_BAND = 0.5, 0.05
# Accepted mean square of latents; normalised ones have 1.
_LATENT_BAND = (0.1, 10.0)


class SpikeDetector:
    """Finds values above the previous values' median + 10 times their median absolute deviation."""

    def __init__(self) -> None:
        self.window: deque[float] = deque(maxlen=_WINDOW)

    def median_if_spike(self, value: float) -> float | None:
        """Add a value => the median of the previous values, if this one is far above it; else None."""
        found = None
        if len(self.window) >= _FEWEST:
            median = statistics.median(self.window)
            deviation = statistics.median(abs(before - median) for before in self.window)
            # A minimum deviation: otherwise a tiny change among equal values would be a spike.
            if value > median + _DEVIATIONS * max(deviation, 0.01 * abs(median)):
                found = median
        self.window.append(value)
        return found


class Guards:
    """Checks the steps of a run, using the values that the log has collected; called by all ranks.

    Args:
        accelerator: The run's accelerator.
        model: The model as prepared for training.
        modalities: Modalities of the bare model.
        packer: The run's packer, which makes the rows of a step again to name their documents.
        encoder: The run's encoder.
        lanes: Lanes of this rank.
        config: The run's configuration.
        is_new: Whether the model is randomly initialised, so that its first losses are known.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        modalities: dict[str, Modality],
        *,
        packer: Packer,
        encoder: OnlineEncoder,
        lanes: range,
        config: RunConfig,
        is_new: bool,
    ) -> None:
        self.accelerator = accelerator
        self.model = model
        self.modalities = modalities
        self.packer = packer
        self.encoder = encoder
        self.lanes = lanes
        self.config = config.training
        self.loss_weights = {name: config.model.modalities[name].loss_weight for name in modalities}
        # Loss of random logits: ln V, plus half the variance of a sum of `hidden_size` normal weights.
        self.first_losses = {
            name: math.log(modality.vocab_size) + modality.embedding.embedding_dim * INIT_STD**2 / 2
            for name, modality in modalities.items()
            if isinstance(modality, TokenModality)
        }
        self.is_new = is_new
        # For each modality of latents: summed squares of the targets and of the latents.
        self._first_squares: dict[str, Tensor] = {}
        self._states: dict[int, Tensor] = {}
        self._skipped_in_turn = 0
        self._spikes = {"loss": SpikeDetector(), "gradient norm": SpikeDetector()}

    def add(self, step: int, batch: Batch, states_before: Tensor) -> None:
        """Remember the rows of step 1, 2, ..., without waiting for the device.

        Args:
            batch: Rows of this rank.
            states_before: States of this rank's lanes before the step.
        """
        self._states[step] = states_before
        if self.is_new and step == 1:
            for name, modality in self.modalities.items():
                if isinstance(modality, DiffusionModality):
                    given = batch.latents(name)
                    assert given.noise is not None
                    assert given.mask is not None
                    target = modality.diffusion.target(given.latents, given.noise, given.timesteps)
                    mask = given.mask[:, :, None, None, None]
                    squares = [
                        torch.where(mask, values, 0.0).double().square().sum() for values in (target, given.latents)
                    ]
                    self._first_squares[name] = self.accelerator.reduce(torch.stack(squares), reduction="sum")

    def check(self, steps: list[StepRecord]) -> Counter[str]:
        """Check the steps since the last call => numbers of skipped steps and of spikes.

        Raises:
            NotFiniteError: A loss or gradient is not finite, and `on_non_finite` is `stop` or too many steps in
                succession were skipped.
            UserError: The first losses are not those of a new model.
        """
        noticed: Counter[str] = Counter(skipped_steps=0, spikes=0)
        for record in steps:
            if record.is_finite:
                self._skipped_in_turn = 0
                if record.step == 1 and self.is_new:
                    self._check_first(record)
                noticed["spikes"] += self._warn_of_spike(record)
                continue
            noticed["skipped_steps"] += 1
            self._skipped_in_turn += 1
            # Finding the rows costs a backward pass for each of them, so it is done only once.
            told = self._describe(record, find_rows=noticed["skipped_steps"] == 1)
            if self.config.on_non_finite == "stop":
                raise NotFiniteError(
                    f"{told}. The step changed no parameter; resume from the last saved state with a lower "
                    "optimizer.lr or without these documents, or set training.on_non_finite=skip"
                )
            if self._skipped_in_turn == _MOST_SKIPPED:
                raise NotFiniteError(
                    f"{told}; the last {_MOST_SKIPPED} steps were skipped for the same reason. Resume from an earlier "
                    "state in state/ with a lower optimizer.lr"
                )
            self.accelerator.print(f"warning: {told}; skipped")
        self._states.clear()
        return noticed

    def _check_first(self, record: StepRecord) -> None:
        """Refuse first losses that are not those of a new model.

        The logits of a new model are nearly equal. The last layer of its patch adapter is zero, so it predicts zero,
        and the loss is the mean square of its target.
        """
        for name, expected in self.first_losses.items():
            if record.counts[name] and abs(record.loss(name) - expected) > _TOKEN_BAND:
                raise UserError(
                    f"the {name} loss of the first step is {record.loss(name):.3f}, but a new model with this "
                    f"vocabulary should have about {expected:.3f}: check the tokenizer or codec, the head of the "
                    "model and the initialisation"
                )
        for name, squares in self._first_squares.items():
            if not record.counts[name]:
                continue
            expected, latents = (squares / record.counts[name]).tolist()
            if not _LATENT_BAND[0] < latents < _LATENT_BAND[1]:
                raise UserError(
                    f"the {name} latents of the first step have a mean square of {latents:.3g}, but normalised latents "
                    "have about 1: the codec's scaling factor, or the mean and deviation of its latents, does not fit "
                    "these media"
                )
            if abs(record.loss(name) - expected) > _DIFFUSION_BAND * expected:
                raise UserError(
                    f"the {name} loss of the first step is {record.loss(name):.4f}, but a new model predicts zero and "
                    f"should have {expected:.4f}, the mean square of its target: the patch adapter is not initialised "
                    "to zero, or predictions and targets do not belong together"
                )

    def _warn_of_spike(self, record: StepRecord) -> bool:
        loss = sum(weight * record.loss(name) for name, weight in self.loss_weights.items())
        found = []
        for (name, detector), value in zip(self._spikes.items(), (loss, record.grad_norm), strict=True):
            median = detector.median_if_spike(value)
            if median is not None:
                found.append(f"{name} is {value:.3g}, the median of the steps before {median:.3g}")
        if found:
            by_modality = [
                [self.loss_weights[name] * row / max(1.0, record.counts[name]) for row in rows]
                for name, rows in record.by_row.items()
            ]
            parts = [sum(parts) for parts in zip(*by_modality, strict=True)]
            most = sorted(range(len(parts)), key=parts.__getitem__, reverse=True)[:_MOST_NAMED]
            rows = ", ".join(f"{row} ({100 * parts[row] / (loss or 1.0):.0f} %)" for row in most)
            self.accelerator.print(
                f"warning: step {record.step} is a spike: {' and '.join(found)}; rows with most of the loss: {rows}"
            )
        return bool(found)

    def _describe(self, record: StepRecord, find_rows: bool) -> str:
        """The losses and gradients of a step that are not finite, and their rows and documents."""
        losses = "".join(f"{name} loss {record.loss(name):.4g}, " for name in record.by_row)
        told = f"step {record.step} is not finite ({losses}gradient norm {record.grad_norm:.4g})"
        num_rows = self.packer.num_lanes
        rows = []
        # With 8-bit products the rows of a microbatch share scales: one non-finite row makes all of them non-finite.
        if not self.config.float8:
            sums = zip(*record.by_row.values(), strict=True)
            rows = [row for row, losses_of_row in enumerate(sums) if not math.isfinite(sum(losses_of_row))]
        if find_rows and not rows:
            rows = self._rows_of_bad_gradient(record)
        if not rows:
            return told
        if len(rows) == num_rows > 1:
            return f"{told} in every row: the weights or the learning rate are the reason, not the data"
        named = [
            f"row {row}: {text}"
            for row in rows[:_MOST_NAMED]
            for text in gather_object(self._documents(record.step, row) if row in self.lanes else [])
        ]
        more = f"; and in {len(rows) - _MOST_NAMED} more rows" if len(rows) > _MOST_NAMED else ""
        return f"{told} in {'; '.join(named)}{more}"

    def _rows_again(self, step: int, lanes: range) -> Batch:
        """Make the rows of this rank in a step again."""
        states = self._states[step][lanes.start - self.lanes.start : lanes.stop - self.lanes.start]
        rows, _, _ = self.packer.rows(lanes, step - 1, np.asarray(states))
        return self.encoder(rows.to(self.accelerator.device))

    def _documents(self, step: int, row: int) -> list[str]:
        """One line about the documents in a row of this rank."""
        batch = self._rows_again(step, range(row, row + 1))
        slots, block = batch.slots, RowShape.of_batch(self.packer.model, batch).blocks[TEXT]
        text_of = slice(block.start, block.start + block.num_slots)
        parts = []
        for document in range(int(slots.document_ids.max()) + 1):
            member = slots.document_ids[0] == document
            source = self.packer.sources.names[int(slots.source_ids[0][member][0])]
            text = self.packer.tokenizer.decode(batch.tokens(TEXT).ids[0][member[text_of]].tolist())
            text = text if len(text) <= _TEXT_SHOWN else f"{text[:_TEXT_SHOWN]}..."
            parts.append(f"{source} '{' '.join(text.split())}'")
        return [", ".join(parts)]

    def _rows_of_bad_gradient(self, record: StepRecord) -> list[int]:
        """Rows whose own gradient is not finite, found by one backward pass for each.

        All ranks take part in every backward pass. So for each row the other ranks compute an empty row, and all ranks
        get the result.
        """
        mine = self._rows_again(record.step, self.lanes).split(1)
        # Without a loss, non-finite values would stay: zero times infinity is not zero.
        empty = mine[0].emptied().map(lambda tensor: tensor.nan_to_num(0.0, 0.0, 0.0))
        processes = self.accelerator.num_processes
        scales = {
            name: weight * processes / max(1.0, record.counts[name]) for name, weight in self.loss_weights.items()
        }
        found = []
        for row in range(self.packer.num_lanes):
            batch = mine[row - self.lanes.start] if row in self.lanes else empty
            with self.accelerator.autocast():
                terms = loss_terms(self.model, batch)
            self.accelerator.backward(sum(scales[name] * term.loss for name, term in terms.items()))
            gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
            shards = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
            norm = torch.stack([shard.float().norm() for shard in shards]).sum()
            self.model.zero_grad(set_to_none=True)
            if not math.isfinite(self.accelerator.reduce(norm, reduction="sum").item()):
                found.append(row)
        return found
