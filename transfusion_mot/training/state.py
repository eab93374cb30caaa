"""Training states: everything that resumes a run, written by torch.distributed.checkpoint, each rank its share.

Tensors are stored by name, so any number of ranks can read them, sharded or not. No state of random generators is
saved, because every draw depends only on the seed, the step, and the row or process.
"""

import json
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import yaml
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from transfusion_mot.config import TokenizerConfig
from transfusion_mot.data.tokenizer import TextTokenizer, load_tokenizer
from transfusion_mot.errors import UserError
from transfusion_mot.training.checkpoint import (
    PROGRESS_FILE,
    aside_of,
    begin_aside,
    prune,
    put_in_place,
    run_config_file,
)
from transfusion_mot.training.ema import EMA
from transfusion_mot.training.parallel import host_group

LANES = "lanes"
# Increase it when parameter names or lane states change. States of version 0.1 have no number.
_FORMAT = 2

# The warning about a single process is not useful.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")


class StateWriter:
    """Writes training states while training continues, and removes old states and snapshots.

    `save` copies the state to the CPU and returns. The next `save` waits for the previous one, and the end of the
    `with` block waits for the last. All ranks call each method.

    Args:
        run: Run folder.
        keep_last: Number of newest states and of newest snapshots to keep.
        keep_every: Also keep states and snapshots of every multiple of this number of steps; 0 is none.
    """

    def __init__(self, run: Path, keep_last: int, keep_every: int) -> None:
        self.run = run
        self.keep_last = keep_last
        self.keep_every = keep_every
        # A separate group, because the writing thread communicates with other ranks during training.
        self.group = host_group()
        self.rank = dist.get_rank() if self.group is not None else 0
        self.world_size = dist.get_world_size() if self.group is not None else 1
        self.thread = ThreadPoolExecutor(max_workers=1)
        self.pending: Future[None] | None = None

    def __enter__(self) -> "StateWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()
        self.thread.shutdown()

    def begin(self, step: int) -> None:
        """Mark that the state after `step` steps will be written, before the snapshot of that step is.

        The mark distinguishes a run that was killed between the two in its first save from one whose states were
        removed.
        """
        if self.rank == 0:
            begin_aside(self._folder(step))

    def _folder(self, step: int) -> Path:
        return self.run / "state" / f"step-{step:07d}"

    def save(
        self, step: int, tensors: dict[str, Tensor], progress: dict[str, Any], best_step: int | None = None
    ) -> None:
        """Begin to write the training state after `step` steps.

        Args:
            tensors: Result of `state_tensors`; unsharded tensors are equal on all ranks.
            progress: JSON values.
            best_step: The step whose snapshot is always kept.

        Raises:
            UserError: The previous state could not be written.
        """
        self.wait()
        folder = self._folder(step)
        if self.rank == 0:
            aside = aside_of(folder)
            aside.mkdir(parents=True, exist_ok=True)
            (aside / PROGRESS_FILE).write_text(json.dumps({"format": _FORMAT, **progress}))
        if self.group is not None:
            dist.barrier(self.group)
        # Tensors that every rank has are divided among the ranks, so that none copies and writes all of them.
        mine = {
            name: tensor
            for number, (name, tensor) in enumerate(tensors.items())
            if isinstance(tensor, DTensor) or number % self.world_size == self.rank
        }
        written = cast(
            Future[Any],
            async_save(mine, checkpoint_id=aside_of(folder), process_group=self.group, no_dist=self.group is None),
        )
        self.pending = self.thread.submit(self._finish, written, folder, best_step)

    def _finish(self, written: Future[Any], folder: Path, best_step: int | None) -> None:
        written.result()
        if self.rank == 0:
            put_in_place(folder)
            prune(folder.parent, self.keep_last, self.keep_every, None)
            prune(self.run / "snapshots", self.keep_last, self.keep_every, best_step)

    def wait(self) -> None:
        """Wait until the last state is on the disk.

        Raises:
            UserError: It could not be written.
        """
        pending, self.pending = self.pending, None
        try:
            if pending is not None:
                pending.result()
        except (CheckpointException, OSError) as error:
            raise UserError(
                f"a training state could not be written below {self.run / 'state'} ({_reason(error)}); earlier states "
                "are intact: free disk space, and start again to resume from the newest"
            ) from None


def state_tensors(model: nn.Module, ema: EMA, optimizer: Optimizer, lanes: Tensor) -> dict[str, Tensor]:
    """Everything that a step changes, by name."""
    tensors = {LANES: lanes}
    for name, parameter in model.named_parameters():
        tensors[f"model/{name}"] = parameter.detach()
        if name in ema.weights:
            tensors[f"ema/{name}"] = ema.weights[name]
        for key, moment in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer/{name}/{key}"] = moment
    return tensors


def load_progress(folder: Path) -> dict[str, Any]:
    """The part of a training state that is not tensors.

    Raises:
        UserError: The file is damaged, or another version wrote it.
    """
    try:
        progress: dict[str, Any] = json.loads((folder / PROGRESS_FILE).read_text())
    except (OSError, ValueError) as error:
        raise _unreadable(folder, error) from None
    if "format" not in progress:
        raise UserError(
            f"{folder} is a training state of version 0.1, which cannot be resumed: finish the run with that version, "
            "and convert its snapshot (python -m transfusion_mot.sampling.convert SNAPSHOT NEW_FOLDER); or use another "
            "output_dir"
        )
    if progress["format"] != _FORMAT:
        raise UserError(
            f"{folder} has the format {progress['format']}, but this version reads {_FORMAT}: continue with the "
            "version that wrote it, or use another output_dir"
        )
    return progress


def refuse_other_run(trained_with: dict[str, Any], given: dict[str, Any], folder: Path) -> None:
    """Refuse to resume with another model, codec, tokenizer or number of rows.

    Args:
        trained_with: Settings stored in the state, by name.
        given: Settings now.
        folder: The training state.

    Raises:
        UserError: Names what differs.
    """
    for part, now in json.loads(json.dumps(given)).items():
        if part not in trained_with:
            raise UserError(
                f"{folder} does not say with which {part} it was trained, so an older version wrote it; "
                "continue with that version, or use another output_dir"
            )
        before = trained_with[part]
        if before != now:
            before, now = _differing(before, now)
            raise UserError(
                f"{folder} was trained with another {part}: {before}, and now it is {now}; continue with "
                f"--config {run_config_file(folder)}, or use another output_dir"
            )


def _differing(before: Any, now: Any) -> tuple[Any, Any]:
    """Two values => their differing entries if they are (nested) dictionaries, else both values."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return before, now
    names = [name for name in now | before if before.get(name) != now.get(name)]
    pairs = {name: _differing(before.get(name), now.get(name)) for name in names}
    return {name: one for name, (one, _) in pairs.items()}, {name: other for name, (_, other) in pairs.items()}


def refuse_other_tokenizer(config: TokenizerConfig, kept: TextTokenizer, folder: Path) -> None:
    """Refuse to resume with settings that name another tokenizer than the run's own.

    Args:
        config: Settings now.
        kept: Settings of the resumed run.
        folder: Its training state.

    Raises:
        UserError: Names what differs.
    """
    file = run_config_file(folder)
    try:
        before = TokenizerConfig(**yaml.safe_load(file.read_text())["tokenizer"])
    except (OSError, KeyError, TypeError, yaml.YAMLError):
        before = None  # The file is missing or was edited by hand.
    # With a path, `vocab_size` has no effect.
    if before is not None and before.path == config.path and (config.path or before.vocab_size == config.vocab_size):
        return
    if config.path is not None:
        if load_tokenizer(config.path, list(kept.begin_ids)).fingerprint == kept.fingerprint:
            return
        given = f"tokenizer.path={config.path} is another tokenizer"
    elif before is None:
        return
    elif before.path is not None:
        given = f"tokenizer.path is null, and was {before.path}"
    else:
        given = f"tokenizer.vocab_size is {config.vocab_size}, and was {before.vocab_size}"
    raise UserError(
        f"{folder} was trained with another tokenizer: {given}; continue with --config {file}, or use another "
        "output_dir"
    )


def load_tensors(folder: Path, model: nn.Module, ema: EMA, optimizer: Optimizer) -> Tensor:
    """Read a training state into a model, its averages and its optimizer => the states of all lanes [rows, n].

    Only the moments of the optimizer are restored; betas, epsilon and weight decay are those of the configuration. A
    parameter that was not trained before starts without moments, and its average starts at its value.

    Raises:
        UserError: A file is damaged.
    """
    saved = _saved_tensors(folder)
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    tensors = {LANES: saved[LANES]}
    moments: dict[nn.Parameter, dict[str, Tensor]] = {}
    without_average = []
    for name, parameter in model.named_parameters():
        tensors[f"model/{name}"] = parameter.detach()
        if f"ema/{name}" in saved and name in ema.weights:
            tensors[f"ema/{name}"] = ema.weights[name]
        elif name in ema.weights:
            without_average.append((ema.weights[name], parameter.detach()))
        prefix = f"optimizer/{name}/"
        for full_name in [full_name for full_name in saved if full_name.startswith(prefix)]:
            if id(parameter) in trained:
                like = saved[full_name]
                # Moments are sharded like the parameter; scalars are not.
                whole = like.shape == parameter.shape
                of_form = parameter.detach() if whole else like
                moment = torch.zeros_like(of_form, dtype=like.dtype, device=parameter.device)
                moments.setdefault(parameter, {})[full_name.removeprefix(prefix)] = tensors[full_name] = moment
    _read(folder, tensors)
    for average, weight in without_average:
        average.copy_(weight)
    for parameter, own in moments.items():
        optimizer.state[parameter] = own
    return tensors[LANES]


def _saved_tensors(folder: Path) -> dict[str, Tensor]:
    """Empty tensors with the saved shapes and dtypes."""
    try:
        entries = FileSystemReader(folder).read_metadata().state_dict_metadata
        return {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            for name, entry in entries.items()
            if isinstance(entry, TensorStorageMetadata)
        }
    except Exception as error:  # Unpickling a damaged file can raise any exception.
        raise _unreadable(folder, error) from None


def _read(folder: Path, tensors: dict[str, Tensor]) -> None:
    try:
        load(tensors, checkpoint_id=folder, no_dist=not dist.is_initialized())
    # torch derives the first one from BaseException.
    except (CheckpointException, Exception) as error:
        raise _unreadable(folder, error) from None


def _unreadable(folder: Path, error: BaseException) -> UserError:
    return UserError(f"training state {folder} cannot be read ({_reason(error)}); remove it to use the one before")


def _reason(error: BaseException) -> str:
    """An error in one line; for an error on several ranks, that of the first."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
