"""Memory and time of fine-tuning steps by what is trained: `python -m benchmarks.finetune_memory --size 1.5b`.

Each variant trains a model with random weights on real rows, with the step function of `train.py`. The table shows its
peak memory beside the prediction of `train.py --plan`. `--limit 21.6` limits memory as on a GPU with 24 GB.
"""

import argparse
import contextlib
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from benchmarks.shapes import IMAGE, SIZES, Layout
from transfusion_mot.config import (
    TEXT,
    LoraConfig,
    ModalityConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TowerConfig,
    TrainingConfig,
)
from transfusion_mot.errors import UserError, exit_on_user_error
from transfusion_mot.outputs import check_writable_folder


@dataclass(frozen=True)
class Variant:
    """The trained parts, and the method."""

    frozen: list[str] = field(default_factory=list)
    lora: LoraConfig | None = None
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    ema_on_cpu: bool = False
    checkpointing: Literal["none", "selective", "full"] = "none"

    def run(self, model: ModelConfig) -> RunConfig:
        """The configuration of its run."""
        training = TrainingConfig(
            frozen_towers=self.frozen,
            ema_on_cpu=self.ema_on_cpu,
            activation_checkpointing=self.checkpointing,
            mixed_precision="bf16" if torch.cuda.is_available() else "no",
        )
        return RunConfig(model=model, lora=self.lora, training=training, optimizer=OptimizerConfig(self.optimizer))


_ALL = LoraConfig(rank=16)
_TEXT_ALONE = LoraConfig(rank=16, towers=[TEXT], also_train=[IMAGE])
_WITH_ADAPTER = LoraConfig(rank=16, also_train=[f"{IMAGE}.adapter"])
VARIANTS = {
    "full": Variant(),
    "full-8bit": Variant(optimizer="adamw_8bit"),
    "full-selective": Variant(checkpointing="selective"),
    "frozen-text": Variant(frozen=[TEXT]),
    "frozen-text-8bit-full": Variant(frozen=[TEXT], optimizer="adamw_8bit", checkpointing="full"),
    "frozen-text-8bit-offload-selective": Variant(
        frozen=[TEXT], optimizer="adamw_8bit", ema_on_cpu=True, checkpointing="selective"
    ),
    "lora-text-8bit-offload-selective": Variant(
        lora=_TEXT_ALONE, optimizer="adamw_8bit", ema_on_cpu=True, checkpointing="selective"
    ),
    "lora": Variant(lora=_ALL),
    "lora-selective": Variant(lora=_ALL, checkpointing="selective"),
    "lora-full": Variant(lora=_ALL, checkpointing="full"),
    "lora-and-adapter": Variant(lora=_WITH_ADAPTER),
}


def qwen(hidden_size: int, num_layers: int, num_heads: int, num_kv_heads: int, intermediate_size: int) -> ModelConfig:
    """A text tower of the sizes of Qwen2.5 (arXiv 2412.15115, table 1), and an image tower of the same."""
    tower = TowerConfig(hidden_size, intermediate_size, qkv_bias=True)
    return ModelConfig(
        towers={TEXT: tower, IMAGE: tower},
        modalities={
            TEXT: ModalityConfig(TEXT, tied_embeddings=True),
            IMAGE: ModalityConfig(IMAGE, "diffusion", loss_weight=5.0),
        },
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=128,
        qk_norm=False,
        rope="1d",
        rope_theta=1e6,
        norm_eps=1e-6,
    )


# Model, vocabulary, and the rows of a step.
MODELS = {
    "tiny": (SIZES["tiny"].model(dense=False), SIZES["tiny"].vocab_size, Layout(2, 64, 2, 32)),
    "760m": (SIZES["760m"].model(dense=False), SIZES["760m"].vocab_size, Layout(4, 2048, 8)),
    "1.5b": (qwen(1536, 28, 12, 2, 8960), 151936, Layout(2, 1024, 4)),
}


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.finetune_memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--size", choices=MODELS, default="1.5b", help="of each tower (default: %(default)s)")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="(default: all)")
    parser.add_argument("--rows", type=int, help="rows of a step (default: that of the size)")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each (default: %(default)s)")
    parser.add_argument("--limit", type=float, metavar="GIB", help="memory limit in GiB (default: all)")
    parser.add_argument("--workers", type=int, default=4, help="processes that prepare rows (default: %(default)s)")
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

from benchmarks.train_step import surroundings, timed_steps, without_output
from benchmarks.workload import CHANNELS, DIFFUSION, make_loader
from transfusion_mot.data.batch import Batch
from transfusion_mot.data.row_arrays import RowShape
from transfusion_mot.models.transfusion import TransfusionMoT
from transfusion_mot.reporting.memory import Setting, step_memory
from transfusion_mot.training.ema import EMA
from transfusion_mot.training.lora import choose_trained
from transfusion_mot.training.optimizer import make_optimizer
from transfusion_mot.training.parallel import make_accelerator, place, wrap
from transfusion_mot.training.step import train_step

GIB = 2**30
# Warm enough for the clocks and the allocator.
_WARM_UP = 5


class Trained:
    """A variant, trained by the step function of `train.py`."""

    # As in the middle of a run; at its beginning the averages are updated after every step.
    _MIDDLE = 100_000

    def __init__(
        self, variant: Variant, model: ModelConfig, vocab_size: int, batches: Iterator[Batch], accelerator: Accelerator
    ) -> None:
        self.config, self.batches, self.accelerator = variant.run(model), batches, accelerator
        with torch.device("meta"):
            self.model = TransfusionMoT.from_sections({TEXT: vocab_size, IMAGE: CHANNELS}, model, DIFFUSION)
            choose_trained(self.model, self.config)
        place(self.model, accelerator, seed=0)
        training = self.config.training
        self.ema = EMA(self.model, training.ema_decay, on_cpu=training.ema_on_cpu)
        self.optimizer = make_optimizer(self.model, self.config.optimizer)
        self.model.checkpoint_activations(training.activation_checkpointing)
        if accelerator.device.type == "cuda":
            self.model.compile_blocks()
        self.wrapped = wrap(self.model, accelerator)
        self.steps_done = 0

    def step(self) -> torch.Tensor:
        """One optimizer step => summed losses [modalities]."""
        batch = next(self.batches)
        result = train_step(
            self.wrapped,
            batch,
            self.optimizer,
            self.accelerator,
            loss_weights={name: modality.loss_weight for name, modality in self.config.model.modalities.items()},
            microbatch_rows=batch.num_rows,
            max_grad_norm=1.0,
        )
        self.ema.update(self.model, self._MIDDLE + self.steps_done)
        self.steps_done += 1
        return torch.stack([losses.sum() for losses in result.losses.values()])

    def predicted(self, shape: RowShape, rows: int) -> float:
        """Predicted bytes at the peak."""
        setting = Setting(
            rows,
            checkpointing=self.config.training.activation_checkpointing,
            width=2 if self.config.training.mixed_precision == "bf16" else 4,
            optimizer=self.config.optimizer.name,
            ema=not self.config.training.ema_on_cpu,
        )
        with torch.device("meta"):
            model = TransfusionMoT.from_sections(dict(self.model.config.sizes), self.config.model, DIFFUSION)
            choose_trained(model, self.config)
        return step_memory(model, shape, setting).peak


def measure(
    name: str,
    model: ModelConfig,
    vocab_size: int,
    layout: Layout,
    batches: Iterator[Batch],
    accelerator: Accelerator,
    steps: int,
) -> dict[str, Any]:
    """Train a variant => its results; without times if memory was not sufficient or a package is missing."""
    device = accelerator.device
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    begun = time.perf_counter()
    try:
        trained = Trained(VARIANTS[name], model, vocab_size, batches, accelerator)
        loss = trained.step()
        if not bool(loss.isfinite().all()):
            raise SystemExit(f"{name}: the loss is not finite: {loss.tolist()}")
        first = time.perf_counter() - begun
        timed_steps(trained, _WARM_UP, device)
        times = timed_steps(trained, steps, device)
    except torch.cuda.OutOfMemoryError:
        return {"failed": "out of memory"}
    except UserError as error:
        return {"failed": str(error)}
    parameters = list(trained.model.parameters())
    return {
        "parameters": sum(parameter.numel() for parameter in parameters),
        "trained": sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        # Averages are updated in one of ten steps; with ema_on_cpu only the mean shows their time.
        "milliseconds": times,
        "first_step_seconds": first,
        "peak_gib": torch.cuda.max_memory_allocated() / GIB if on_gpu else None,
        "reserved_gib": torch.cuda.max_memory_reserved() / GIB if on_gpu else None,
        "predicted_gib": trained.predicted(RowShape.of_batch(model, next(batches)), layout.rows) / GIB,
    }


def main(arguments: list[str]) -> None:
    options = parse_arguments(arguments)
    model, vocab_size, layout = MODELS[options.size]
    layout = Layout(options.rows or layout.rows, layout.text_slots, layout.images, layout.image_size)

    precision: Literal["bf16", "no"] = "bf16" if torch.cuda.is_available() else "no"
    training = TrainingConfig(num_rows=layout.rows, mixed_precision=precision, tracker=None)
    accelerator = make_accelerator(training, Path())
    if options.limit is not None:
        total = torch.cuda.get_device_properties(accelerator.device).total_memory
        torch.cuda.set_per_process_memory_fraction(options.limit * GIB / total)
    report = {
        "command": " ".join(["python -m benchmarks.finetune_memory", *without_output(arguments)]),
        **surroundings(accelerator.device),
        "layout": vars(layout),
        "limit_gib": options.limit,
        "variants": {},
    }
    options.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        loader = make_loader(
            layout, SIZES["tiny"], accelerator, folder=Path(folder), num_steps=10**6, num_workers=options.workers
        )
        batches = (batch for batch, _ in loader)
        with contextlib.closing(batches):
            for name in options.variants:
                report["variants"][name] = measure(name, model, vocab_size, layout, batches, accelerator, options.steps)
                print(table(report).splitlines()[-1], flush=True)
                accelerator.free_memory()
                gc.collect()
                if accelerator.device.type == "cuda":
                    torch.cuda.empty_cache()
                    torch._dynamo.reset()
                suffix = "" if options.limit is None else f"-{options.limit:g}gib"
                file = options.output / f"finetune_memory-{options.size}-{layout.rows}rows{suffix}.json"
                file.write_text(json.dumps(report, indent=1))
    print(table(report))


def table(report: dict[str, Any]) -> str:
    """The report in Markdown."""
    lines = [
        "| variant | trained | peak GiB | by the plan | reserved | ms a step | mean ms |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, result in report["variants"].items():
        if "failed" in result:
            lines.append(f"| {name} | {result['failed']} | | | | | |")
            continue
        peak, reserved = ("-" if result[key] is None else f"{result[key]:.2f}" for key in ("peak_gib", "reserved_gib"))
        lines.append(
            f"| {name} | {result['trained'] / 1e6:,.1f}M of {result['parameters'] / 1e6:,.0f}M | {peak} "
            f"| {result['predicted_gib']:.2f} | {reserved} | {statistics.median(result['milliseconds']):.0f} "
            f"| {statistics.mean(result['milliseconds']):.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    with exit_on_user_error():
        main(sys.argv[1:])
