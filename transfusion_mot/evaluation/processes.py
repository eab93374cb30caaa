"""The processes of `accelerate launch` that share an evaluation, or a single process."""

from collections.abc import Callable, Iterable

import torch
from accelerate import PartialState
from accelerate.utils import gather, gather_object

from transfusion_mot.errors import UserError
from transfusion_mot.evaluation.images import pick_device


def open_processes(device: str | None) -> tuple[PartialState, torch.device]:
    """Join the other processes, if there are any => the processes, and the device of this one.

    Args:
        device: Name of the device of a single process; several processes each have their own unless the name is `cpu`.

    Raises:
        UserError: There is no such device.
    """
    picked = pick_device(device)
    processes = PartialState(cpu=picked.type == "cpu")
    return processes, processes.device if processes.num_processes > 1 else picked


def shared_rows(
    batches: Callable[[int, int], Iterable[torch.Tensor]],
    count: int,
    width: int,
    device: torch.device,
    processes: PartialState | None,
) -> torch.Tensor:
    """Rows `[count, width]`, computed by all processes; all call this, and all receive all rows.

    Args:
        batches: Called with the rank and the number of processes => batches `[B, width]` of the rows of this process,
            in order: rows rank, rank + processes, ...
        count: Number of all rows.
        width: Length of a row.
        device: Device of this process.
        processes: The processes; None means only this one.

    Raises:
        UserError: One of the processes raised it; the others raise it, too, instead of waiting.
    """
    rank, world = (processes.process_index, processes.num_processes) if processes is not None else (0, 1)
    rows = torch.zeros(-(-count // world), width, device=device)
    failure: UserError | None = None
    try:
        start = 0
        for batch in batches(rank, world):
            rows[start : start + len(batch)] = batch
            start += len(batch)
    except UserError as error:
        failure = error
    if world > 1:
        messages = [message for message in gather_object([failure and str(failure)]) if message is not None]
        failure = UserError(messages[0]) if messages else None
    if failure is not None:
        raise failure
    if world == 1:
        return rows
    gathered: torch.Tensor = gather(rows)
    return gathered.unflatten(0, (world, -1)).transpose(0, 1).flatten(0, 1)[:count]
