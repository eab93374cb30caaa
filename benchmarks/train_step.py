"""Compare times of a training step: `python -m benchmarks.train_step --size 760m`.

Every contender trains on the same rows with the step function of `train.py`: forward, backward, clipping, optimizer,
averaged weights. They take turns: temperature and host load affect all of them equally. While one runs, the weights and
moments of the others are in host memory.

Times are means: only every tenth step updates the averaged weights, and a median would ignore these steps. So each turn
should have a multiple of ten steps.
"""

import argparse
import contextlib
import gc
import json
import logging
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Protocol, cast, get_args, get_type_hints

from benchmarks.shapes import IMAGE, LAYOUTS, SIZES, Layout, Size
from transfusion_mot.config import TEXT, OptimizerConfig, TrainingConfig
from transfusion_mot.errors import UserError, exit_on_user_error
from transfusion_mot.outputs import check_writable_folder

CONTENDERS = ("mot", "dense", "gather_scatter", "transfusion_pytorch")


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train_step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--size", choices=SIZES, default="163m", help="model (default: %(default)s)")
    parser.add_argument("--layout", choices=LAYOUTS, help="batch (default: that of the size)")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS[:3]))
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="number of turns (default: %(default)s)")
    parser.add_argument("--rival-rows", type=int, default=16, help="documents of transfusion-pytorch in a step")
    parser.add_argument("--workers", type=int, default=8, help="processes that prepare rows (default: %(default)s)")
    parser.add_argument("--cuda-graph", action="store_true", help="record the step of all but transfusion_pytorch")
    parser.add_argument("--float8", action="store_true", help="8-bit matrix products in the blocks of mot and dense")
    parser.add_argument(
        "--attention",
        choices=get_args(get_type_hints(TrainingConfig)["attention"]),
        default="auto",
        help="kernel of all but transfusion_pytorch (default: %(default)s)",
    )
    parser.add_argument("--profile", action="store_true", help="add a table of where the time of `mot` goes")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder for the JSON")
    given = parser.parse_args(arguments)
    check_writable_folder(given.output, "--output")
    return given


if __name__ == "__main__":
    # Before PyTorch loads, which takes seconds: --help, and mistakes in the options.
    with exit_on_user_error():
        parse_arguments(sys.argv[1:])

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.optim import Optimizer

from benchmarks.gather_scatter import GatherScatterMoT
from benchmarks.kernel_profile import profile_step
from benchmarks.workload import CHANNELS, DIFFUSION, make_loader
from transfusion_mot.data.batch import Batch
from transfusion_mot.data.row_arrays import RowShape
from transfusion_mot.models.attention import KernelChoice, dense_mask, slot_ids
from transfusion_mot.models.inputs import LatentInput, ModalityInput, TokenInput
from transfusion_mot.models.modalities import DiffusionModality
from transfusion_mot.models.transfusion import TransfusionMoT
from transfusion_mot.reporting.flops import flops_per_pair, peak_flops, weight_flops_per_row
from transfusion_mot.training.ema import EMA
from transfusion_mot.training.float8 import convert_to_float8
from transfusion_mot.training.graph import WARM_UP, GraphedStep, make_capturable
from transfusion_mot.training.optimizer import make_optimizer
from transfusion_mot.training.parallel import make_accelerator, place, wrap
from transfusion_mot.training.step import StepResult, train_step

_logger = logging.getLogger(__name__)


class Trains(Protocol):
    """Interface of contenders: an object that takes optimizer steps."""

    def step(self) -> Tensor:
        """One step => its losses, on the device."""
        ...


class Contender:
    """A model with its optimizer, trained by the step function of `train.py`.

    Args:
        name: `mot`, `dense` or `gather_scatter`.
        size: Size of the model.
        batches: Endless batches.
        accelerator: Accelerator of the run.
        cuda_graph: Record the step as a CUDA graph.
        float8: Use 8-bit products in the blocks.
        attention: Attention kernel, as in `training.attention`.
    """

    _MIDDLE = 100_000

    def __init__(
        self,
        name: str,
        size: Size,
        batches: Iterator[Batch],
        accelerator: Accelerator,
        *,
        cuda_graph: bool,
        float8: bool,
        attention: KernelChoice,
    ) -> None:
        torch.manual_seed(0)
        self.name = name
        self.batches = batches
        self.accelerator = accelerator
        self.config = size.model(dense=name == "dense")
        with torch.device("meta"):
            self.model = TransfusionMoT.from_sections({TEXT: size.vocab_size, IMAGE: CHANNELS}, self.config, DIFFUSION)
        place(self.model, accelerator, seed=0)
        self.model.attention = attention
        if float8:
            convert_to_float8(self.model)
        self.ema = EMA(self.model, TrainingConfig().ema_decay)
        self.optimizer: Optimizer = make_optimizer(self.model, OptimizerConfig())
        trained: nn.Module = self.model
        on_gpu = accelerator.device.type == "cuda"
        if name == "gather_scatter":
            trained = GatherScatterMoT(self.model)
            if on_gpu:
                trained.compile_blocks()
        elif on_gpu:
            self.model.compile_blocks()
        self.trained = wrap(trained, accelerator)
        if cuda_graph:
            make_capturable(self.optimizer)
        self.cuda_graph = cuda_graph
        self.steps_done = 0
        self.take_step: Callable[[Batch], StepResult] = self.plain_step

    def plain_step(self, batch: Batch) -> StepResult:
        """The step function of `train.py`."""
        return train_step(
            self.trained,
            batch,
            self.optimizer,
            self.accelerator,
            loss_weights={name: modality.loss_weight for name, modality in self.config.modalities.items()},
            microbatch_rows=batch.num_rows,
            max_grad_norm=1.0,
        )

    def step(self) -> Tensor:
        """One optimizer step => summed losses [modalities]."""
        result = self.take_step(next(self.batches))
        sums = torch.stack([losses.sum() for losses in result.losses.values()])
        # As in the middle of a run; at its beginning the averages are updated after every step.
        self.ema.update(self.model, self._MIDDLE + self.steps_done)
        self.steps_done += 1
        return sums

    def move(self, device: torch.device) -> None:
        """Move parameters and moments to a device; compiled code works again after they are back, a CUDA graph is
        recorded again."""
        self.take_step = GraphedStep(self.plain_step) if self.cuda_graph and device.type == "cuda" else self.plain_step
        with torch.no_grad():
            for parameter in [*self.model.parameters(), *self.ema.weights.values()]:
                parameter.data = parameter.data.to(device)
        for state in self.optimizer.state.values():
            for key, value in state.items():
                if isinstance(value, Tensor) and value.ndim:
                    state[key] = value.to(device)


class Rival:
    """The package transfusion-pytorch with its own documents, as many as fit in memory."""

    def __init__(self, size: Size, device: torch.device, rows: int) -> None:
        from benchmarks.transfusion_pytorch_rival import Shape, TransfusionPytorch

        shape = Shape(
            size.hidden_size,
            size.num_layers,
            size.num_heads,
            size.head_dim,
            size.intermediate_size,
            size.vocab_size,
        )
        self.name = "transfusion_pytorch"
        self.rival = TransfusionPytorch(shape, device, rows)
        self.model = self.rival.model
        if device.type == "cuda":
            self.rival.compile()

    def step(self) -> Tensor:
        """One optimizer step => loss."""
        return self.rival.step()

    def move(self, device: torch.device) -> None:
        """Does nothing: the package trains alone, so it need not free memory."""


def timed_steps(contender: Trains, count: int, device: torch.device) -> list[float]:
    """Milliseconds of each of `count` steps; each is launched while the previous one still runs."""
    if device.type != "cuda":
        times = [time.perf_counter()]
        for _ in range(count):
            contender.step()
            times.append(time.perf_counter())
        return [1000 * (after - before) for before, after in pairwise(times)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        contender.step()
        event.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) for before, after in pairwise(events)]


def assert_equal(ours: Contender, rival: Contender, batch: Batch) -> float:
    """Check that both give the same logits and predictions for a row with the same weights => largest relative
    difference.

    Raises:
        AssertionError: The difference is more than bfloat16 explains.
    """
    rival.model.load_state_dict(ours.model.state_dict())
    row = batch.split(1)[0]
    inputs = without_losses(row.inputs, ours.model)
    with torch.no_grad(), ours.accelerator.autocast():
        one, two = (model(inputs, row.slots).predictions for model in (ours.model, rival.trained))
    differences = {
        name: ((two[name].float() - predicted.float()).norm() / predicted.float().norm()).item()
        for name, predicted in one.items()
    }
    # Relative errors of bfloat16 are 2^-9; they add up over the layers.
    assert max(differences.values()) < 0.05, (
        f"{ours.name} and {rival.name} differ by {differences} in what they predict"
    )
    return max(differences.values())


def without_losses(inputs: dict[str, ModalityInput], model: TransfusionMoT) -> dict[str, ModalityInput]:
    """The same inputs for predictions: tokens without labels, and latents that are already noisy."""
    result: dict[str, ModalityInput] = {}
    for name, given in inputs.items():
        if isinstance(given, TokenInput):
            result[name] = TokenInput(given.ids)
        else:
            assert given.noise is not None
            diffusion = cast(DiffusionModality, model.modality(name)).diffusion
            noisy = diffusion.add_noise(given.latents, given.noise, given.timesteps)
            result[name] = LatentInput(noisy, given.timesteps, copies=given.copies)
    return result


def waits_for_device(contender: Contender | Rival) -> bool:
    """Whether the host waits for the device inside a step."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        contender.step()
    except RuntimeError as error:
        _logger.warning("%s: %s", contender.name, error)
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def block_pairs(batch: Batch, model: TransfusionMoT, block: int) -> float:
    """Pairs of slots in the blocks of a row that a kernel cannot skip, mean over rows."""
    total = 0
    for row in batch.split(1):
        slots = slot_ids(model.architecture, row.inputs, row.slots)
        mask = dense_mask(slots, slots)[0]
        pad = -len(mask) % block
        tiles = nn.functional.pad(mask, (0, pad, 0, pad)).unflatten(1, (-1, block)).unflatten(0, (-1, block))
        total += int(tiles.any(dim=3).any(dim=1).sum()) * block * block
    return total / batch.num_rows


def main(arguments: list[str]) -> None:
    options = parse_arguments(arguments)
    size, layout = SIZES[options.size], LAYOUTS[options.layout or options.size]

    precision: Literal["bf16", "no"] = "bf16" if torch.cuda.is_available() else "no"
    accelerator = make_accelerator(TrainingConfig(mixed_precision=precision, tracker=None), Path())
    device = accelerator.device
    if accelerator.is_fsdp2 and options.contenders != ["mot"]:
        raise UserError("with FSDP2 only --contenders mot can be timed: sharded weights cannot be moved to the host")
    if options.float8 and (accelerator.is_fsdp2 or not set(options.contenders) <= {"mot", "dense"}):
        raise UserError("--float8 is for --contenders mot dense, without FSDP2: the others compute in bfloat16")
    with tempfile.TemporaryDirectory() as own:
        # All processes use the value of the first one.
        (folder,) = broadcast_object_list([own])
        loader = make_loader(
            layout, size, accelerator, folder=Path(folder), num_steps=10**6, num_workers=options.workers
        )
        batches = (batch for batch, _ in loader)
        parallelism = "-fsdp2" if accelerator.is_fsdp2 else "-ddp" if accelerator.num_processes > 1 else ""
        report = {
            "command": " ".join(["python -m benchmarks.train_step", *without_output(arguments)]),
            **surroundings(device),
            "layout": vars(layout),
            "processes": accelerator.num_processes,
            "parallelism": parallelism.removeprefix("-") or None,
            "contenders": {},
        }
        options.output.mkdir(parents=True, exist_ok=True)
        variant = f"{accelerator.num_processes}x{parallelism}"
        variant += ("-graph" if options.cuda_graph else "") + ("-float8" if options.float8 else "")
        variant += "" if options.attention == "auto" else f"-{options.attention}"
        name = f"train_step-{options.size}-{options.layout or options.size}-{variant}.json"
        with contextlib.closing(batches):
            for report["contenders"] in compare(options, size, layout, batches, accelerator):
                if accelerator.is_main_process:
                    (options.output / name).write_text(json.dumps(report, indent=1))
    accelerator.print(table(report))


def compare(
    options: argparse.Namespace, size: Size, layout: Layout, batches: Iterator[Batch], accelerator: Accelerator
) -> Iterator[dict[str, dict[str, Any]]]:
    """Build every contender and let them take turns => results of each, after every turn."""
    device, host = accelerator.device, torch.device("cpu")
    on_gpu = device.type == "cuda"
    results: dict[str, dict[str, Any]] = {}
    contenders: dict[str, Contender | Rival] = {}
    sample = next(batches)
    slots_per_step = layout.rows * layout.slots
    for turn in range(options.rounds):
        for name in options.contenders:
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            if turn == 0:
                begun = time.perf_counter()
                if name == "transfusion_pytorch":
                    contenders[name] = Rival(size, device, options.rival_rows)
                else:
                    contenders[name] = Contender(
                        name,
                        size,
                        batches,
                        accelerator,
                        cuda_graph=options.cuda_graph,
                        float8=options.float8,
                        attention=options.attention,
                    )
            contender = contenders[name]
            contender.move(device)
            if turn == 0:
                built = time.perf_counter()
                loss = contender.step()
                if not bool(loss.isfinite().all()):
                    raise SystemExit(f"{name}: the loss is not finite: {loss.tolist()}")
                results[name] = {
                    "first_step_seconds": time.perf_counter() - begun,
                    "of_which_building_the_model": built - begun,
                    "parameters": sum(parameter.numel() for parameter in contender.model.parameters()),
                    "slots_per_step": slots_per_step
                    if isinstance(contender, Contender)
                    else contender.rival.tokens_per_step,
                    "milliseconds": [],
                }
            result = results[name]
            for _ in range((4 if turn == 0 else 2) + (WARM_UP if options.cuda_graph else 0)):
                contender.step()
            graphs = counters["stats"]["unique_graphs"]
            result["milliseconds"] += timed_steps(contender, options.steps // options.rounds, device)
            result["recompiles"] = result.get("recompiles", 0) + counters["stats"]["unique_graphs"] - graphs
            if on_gpu:
                result["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
                result["waits_for_device"] = waits_for_device(contender)
            if turn == 0 and isinstance(contender, Contender) and (peak := peak_flops(device)) is not None:
                with accelerator.autocast():
                    kernel, _ = contender.model.kernel(device, layout.slots)
                pairs = block_pairs(sample, contender.model, 64 if kernel == "interval" else 128)
                attention = flops_per_pair(contender.model) * pairs
                row_flops = weight_flops_per_row(contender.model, RowShape.of_batch(contender.config, sample))
                result |= {"flops_per_step": (row_flops + attention) * layout.rows, "peak_flops": peak}
                result["attention"] = kernel
            if turn == 0 and name == "mot" and options.profile:
                result["profile"] = profile_step(contender.step)
            if name == "gather_scatter" and turn == 0 and isinstance(ours := contenders.get("mot"), Contender):
                ours.move(device)
                assert isinstance(contender, Contender)
                result["difference_to_mot"] = assert_equal(ours, contender, sample)
                ours.move(host)
            accelerator.print(f"{name}: {statistics.mean(result['milliseconds']):.1f} ms", flush=True)
            if len(options.contenders) > 1:
                contender.move(host)
                gc.collect()
                if on_gpu:
                    torch.cuda.empty_cache()
            yield results


def without_output(arguments: Sequence[str]) -> list[str]:
    """Arguments of a command line without the output folder, which does not affect results."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--output")
    return parser.parse_known_args(arguments)[1]


def surroundings(device: torch.device) -> dict[str, Any]:
    """Facts that belong to every result: hardware, versions, commit, date."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit or None,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def table(report: dict[str, Any]) -> str:
    """The report in Markdown."""
    lines = [
        "| contender | parameters | ms a step, mean | median | to mot | tokens/s | MFU | peak GiB | first step "
        "| recompiles | waits |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    contenders = report["contenders"]
    reference = statistics.mean(contenders["mot"]["milliseconds"]) if "mot" in contenders else float("nan")
    for name, result in contenders.items():
        mean, median = statistics.mean(result["milliseconds"]), statistics.median(result["milliseconds"])
        rate = result["slots_per_step"] * report["processes"] / mean * 1000
        mfu = result["flops_per_step"] / mean * 1000 / result["peak_flops"] if "flops_per_step" in result else None
        lines.append(
            f"| {name} | {result['parameters'] / 1e6:.0f}M | {mean:.1f} | {median:.1f} | {reference / mean:.3f} "
            f"| {rate:,.0f} | {f'{mfu:.3f}' if mfu else '-'} | {result.get('peak_gib', float('nan')):.1f} "
            f"| {result['first_step_seconds']:.0f} s | {result['recompiles']} | {result.get('waits_for_device', '-')} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    with exit_on_user_error():
        main(sys.argv[1:])
