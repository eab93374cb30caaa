"""Saving a run: a snapshot to use, and a training state to resume from."""

from pathlib import Path
from typing import Self

from accelerate import Accelerator

from transfusion_mot.config import RunConfig
from transfusion_mot.run.data import RunData
from transfusion_mot.run.snapshots import describe_adapter, save_snapshot
from transfusion_mot.run.start import fingerprint
from transfusion_mot.run.training import Training
from transfusion_mot.training.state import StateWriter, state_tensors


class RunSaver:
    """Saves a run. As a context manager it ends when the last state is on the disk. All processes call each method.

    Args:
        accelerator: The run's accelerator.
        config: The run's configuration.
        data: The run's data.
        training: Model, averages, optimizer and log to save.
    """

    def __init__(self, accelerator: Accelerator, config: RunConfig, data: RunData, training: Training) -> None:
        self.accelerator = accelerator
        self.config = config
        self.data = data
        self.training = training
        self.fingerprint = fingerprint(config, data)
        self.adapter = describe_adapter(training.model, training.ema, config, data)
        self.writer = StateWriter(Path(config.output_dir), config.training.keep_last, config.training.keep_every)

    def __enter__(self) -> Self:
        self.writer.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.writer.__exit__(*error)

    def save(self, step: int, *, with_snapshot: bool) -> None:
        """Save the run after `step` steps; the state is written while training continues.

        Raises:
            UserError: The previous state could not be written.
        """
        training, log = self.training, self.training.log
        self.writer.begin(step)
        if with_snapshot:
            # The snapshot first: a state whose snapshot is missing would never get one.
            save_snapshot(
                training.model, training.ema, self.config, self.data, adapter=self.adapter, log=log, step=step
            )
        lanes = self.accelerator.gather(training.loader.states.to(self.accelerator.device)).cpu()
        tensors = state_tensors(training.model, training.ema, training.optimizer, lanes)
        progress = {"step": step, "seen": dict(log.seen), "made_of": self.fingerprint}
        self.writer.save(step, tensors, progress, log.best[1] if log.best is not None else None)
