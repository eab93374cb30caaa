"""Resources of a run, computed without a GPU: `python train.py --plan --config FILE --gpus 8 --gpu A100-80GB`."""

import argparse
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, get_args

import torch
import transformers
from diffusers import AutoencoderKL, ModelMixin, VQModel

from transfusion_mot.codecs.audio_codes import CLASSES as AUDIO_CLASSES
from transfusion_mot.codecs.audio_codes import AudioCodes
from transfusion_mot.codecs.image_codes import CLASSES, ImageCodes
from transfusion_mot.codecs.mel_vq import MelVQModel
from transfusion_mot.config import TEXT, CodecConfig, LoraConfig, RunConfig
from transfusion_mot.data.row_arrays import RowShape
from transfusion_mot.data.tokenizer import load_tokenizer
from transfusion_mot.errors import UserError
from transfusion_mot.models.mot import Checkpointing
from transfusion_mot.models.transfusion import TransfusionMoT, check_model
from transfusion_mot.reporting.flops import PEAK_FLOPS, active_parameters, flops_per_pair, weight_flops_per_row
from transfusion_mot.reporting.memory import Memory, Parallelism, Setting, step_memory
from transfusion_mot.training.graph import why_not_recorded
from transfusion_mot.training.lora import choose_trained
from transfusion_mot.training.tower_settings import check_lora, check_towers
from transfusion_mot.training.towers import tower_of

GIB = 2**30
# Memory of a GPU as torch reports it, in GiB.
GPU_MEMORY = {
    "A100-40GB": 39.4,
    "A100-80GB": 79.1,
    "H100": 79.1,
    "H200": 139.7,
    "B200": 178.4,
    "L40S": 44.4,
    "4090": 23.5,
}
# The rest holds the CUDA context, buffers of the collectives, and what the allocator cannot use.
USABLE = 0.92
# Used if a codec cannot be read, from the papers: latents of eight channels and downsampling 8, or the codes of
# Chameleon.
_CHANNELS, _DOWNSAMPLING = 8, 8
_CODEBOOK = 8192
_ROWS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "ema": "averaged weights",
    "copies": "bfloat16 copies, gathered weights",
    "blocks": "activations of blocks",
    "adapter": "activations of adapter and norms",
    "logits": "logits and their gradients",
    "working": "gradients of a block's activations",
}


def plan(arguments: Sequence[str], read_config: Callable[[Sequence[str]], RunConfig]) -> str:
    """The plan of a run as text.

    Args:
        arguments: Arguments of `train.py`, with `--plan` and the options of this function's parser.
        read_config: Reads the configuration from the other arguments.

    Raises:
        UserError: The configuration has a mistake, or the GPUs cannot share the batch.
    """
    parser = argparse.ArgumentParser(prog="train.py --plan", allow_abbrev=False, add_help=False)
    parser.add_argument("--plan", action="store_true")
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--gpu", choices=GPU_MEMORY, default="A100-80GB")
    parser.add_argument("--mfu", type=float, default=0.4)
    options, rest = parser.parse_known_args(list(arguments))
    config = read_config(rest)
    check_model(config.model)
    check_towers(config)
    check_lora(config)
    if options.gpus < 1 or config.training.num_rows % options.gpus:
        raise UserError(
            f"training.num_rows is {config.training.num_rows} and cannot be split evenly over {options.gpus} GPUs; "
            "give --gpus a divisor of it"
        )
    if not 0 < options.mfu <= 1:
        raise UserError(
            f"--mfu is {options.mfu}; it is the share of the GPU's peak that is used, above 0 and at most 1"
        )
    model, shape, assumed = open_model(config)
    plainly = why_not_recorded("cuda", options.gpus) if config.training.cuda_graph else None
    parts = [
        *(f"assumed: {line}" for line in assumed),
        *([plainly] if plainly is not None else []),
        parameter_table(model, config),
        memory_table(model, shape, config, options.gpus, options.gpu),
        microbatch_table(model, shape, config, options.gpus, options.gpu),
        choices_table(model, shape, config, options.gpus, options.gpu),
        time_line(model, shape, config, options.gpus, options.gpu, options.mfu),
    ]
    return "\n\n".join(parts)


def open_model(config: RunConfig) -> tuple[TransfusionMoT, RowShape, list[str]]:
    """The model on `meta`, its rows, and the assumptions."""
    assumed = []
    vocab_size = config.tokenizer.vocab_size
    if config.tokenizer.path is not None:
        try:
            model = config.model
            tokenizer = load_tokenizer(config.tokenizer.path, model.made, model.has_pretrained_text)
            vocab_size = tokenizer.vocab_size
        except UserError:
            rows = config.model.modalities[TEXT].vocab_size
            if rows is not None:
                assumed.append(f"{rows} tokens: {config.tokenizer.path} has no tokenizer that can be read")
            else:
                assumed.append(f"{vocab_size} tokens (tokenizer.vocab_size): {config.tokenizer.path} cannot be read")
    sizes, latent_shapes = {TEXT: vocab_size}, {}
    height, width = max(config.data.image_sizes, key=math.prod)
    for name, codec in config.codecs.items():
        if config.model.modalities[name].objective == "next_token":
            codebook = _codebook_size(codec)
            if codebook is None:
                assumed.append(f"{_CODEBOOK} codes: {codec.path} cannot be read")
            # Start and end of a span.
            sizes[name] = (codebook or _CODEBOOK) + 2
            continue
        found = _latents(codec.path)
        channels, downsampling = found or (_CHANNELS, _DOWNSAMPLING)
        if found is None:
            what = f"latents of {channels} channels and 1/{downsampling} of the pixels"
            assumed.append(f"{what}: {codec.path} cannot be read")
        sizes[name] = channels
        latent_shapes[name] = [(channels, height // downsampling, width // downsampling)]
    if config.data.buckets:
        assumed.append(f"all images of {height} x {width} pixels, the largest of data.buckets")
    shape = RowShape.of(config.model, config.data.slots, latent_shapes, 0)
    with torch.device("meta"):
        model = TransfusionMoT.from_sections(sizes, config.model, config.diffusion)
        choose_trained(model, config)
    model.insulate(config.training.insulated_towers)
    return model, shape, assumed


def _latents(path: str) -> tuple[int, int] | None:
    """Channels and downsampling of an autoencoder; None if it cannot be read."""
    try:
        config = AutoencoderKL.load_config(path, local_files_only=True)
        return config["latent_channels"], 2 ** (len(config["block_out_channels"]) - 1)
    except (OSError, ValueError, KeyError):
        return None


def _codebook_size(codec: CodecConfig) -> int | None:
    """Codes of a tokenizer of images or audio; None if it cannot be read."""
    try:
        # A function of diffusers, which reads any config.json.
        config = VQModel.load_config(codec.path, local_files_only=True)
        name = config["_class_name"] if "_class_name" in config else config["architectures"][0]
        is_audio = name in AUDIO_CLASSES
        model_class: Any = getattr(transformers, name, MelVQModel) if is_audio else CLASSES[name]
        with torch.device("meta"):
            if issubclass(model_class, ModelMixin):
                model = model_class.from_config(config)
            else:
                model = model_class(model_class.config_class.from_dict(config))
            return (AudioCodes(model, codec.num_codebooks) if is_audio else ImageCodes(model)).codebook_size
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _line(title: str, *values: float | str) -> str:
    """A row of a table; floats have two decimals."""
    return f"{title:42}" + "".join(f"{f'{v:.2f}' if isinstance(v, float) else v:>10}" for v in values)


def parameter_table(model: TransfusionMoT, config: RunConfig) -> str:
    """Parameters of each tower, total parameters, and active parameters for a slot of each modality."""
    in_blocks, outside = Counter[str](), Counter[str]()
    for name, parameter in model.named_parameters():
        counts = in_blocks if name.startswith("blocks.") else outside
        counts[tower_of(name, config.model)] += parameter.numel()
    lines = [_line("millions of parameters", "blocks", "outside", "sum")]
    for tower in sorted(in_blocks | outside):
        numbers = in_blocks[tower] / 1e6, outside[tower] / 1e6
        frozen = ["frozen"] if tower in config.training.frozen_towers else []
        lines.append(_line(f"tower {tower}", *numbers, sum(numbers), *frozen))
    numbers = in_blocks.total() / 1e6, outside.total() / 1e6
    lines.append(_line("all", *numbers, sum(numbers)))
    for name, modality in config.model.modalities.items():
        active = active_parameters(model, config.model, name) / 1e6
        slot = "token" if modality.objective == "next_token" else "patch"
        lines.append(_line(f"active matrices: {name} {slot}", "", "", active))
    return "\n".join(lines)


def parallelisms(config: RunConfig) -> tuple[Parallelism, ...]:
    """Possible parallelism of the run: Muon, 8-bit products and moments, and averages on the CPU need whole
    matrices."""
    needs_whole = config.optimizer.name != "adamw" or config.training.float8 or config.training.ema_on_cpu
    return ("ddp",) if needs_whole else get_args(Parallelism)


def rows_per_gpu(config: RunConfig, gpus: int) -> int:
    """Rows of a step that one GPU computes."""
    return config.training.num_rows // gpus


def setting_of(
    config: RunConfig, gpus: int, rows: int, parallelism: Parallelism, checkpointing: Checkpointing
) -> Setting:
    """The configured step with microbatches of `rows` rows."""
    return Setting(
        rows=rows,
        microbatches=-(-rows_per_gpu(config, gpus) // rows),
        gpus=gpus,
        parallelism=parallelism,
        checkpointing=checkpointing,
        width=2 if config.training.mixed_precision == "bf16" else 4,
        optimizer=config.optimizer.name,
        ema=not config.training.ema_on_cpu,
    )


def memory_table(model: TransfusionMoT, shape: RowShape, config: RunConfig, gpus: int, gpu: str) -> str:
    """Memory of the configured microbatch by part, for each kind of parallelism."""
    training = config.training
    rows = min(training.microbatch_rows or rows_per_gpu(config, gpus), rows_per_gpu(config, gpus))
    memories: list[Memory] = [
        step_memory(model, shape, setting_of(config, gpus, rows, parallelism, training.activation_checkpointing))
        for parallelism in parallelisms(config)
    ]
    lines = [_line(f"GiB on each of {gpus} {gpu}", *parallelisms(config))]
    for name, title in _ROWS.items():
        lines.append(_line(title, *(getattr(memory, name) / GIB for memory in memories)))
    lines.append(_line("peak (not all exist at a time)", *(memory.peak / GIB for memory in memories)))
    limit = USABLE * GPU_MEMORY[gpu]
    fits = ["fits" if memory.peak <= limit * GIB else "too much" for memory in memories]
    lines.append(_line(f"of {limit:.1f} usable", *fits))
    lines.append(
        f"for microbatches of {rows} of {rows_per_gpu(config, gpus)} rows of {shape.num_slots} slots, "
        f"training.activation_checkpointing={training.activation_checkpointing}"
    )
    return "\n".join(lines)


def largest_microbatch(
    model: TransfusionMoT,
    shape: RowShape,
    config: RunConfig,
    gpus: int,
    gpu: str,
    parallelism: Parallelism,
    checkpointing: Checkpointing,
) -> int:
    """Largest divisor of a GPU's rows that fits in memory, so that all microbatches have one shape; 0 if none fits."""
    limit = USABLE * GPU_MEMORY[gpu] * GIB
    own = rows_per_gpu(config, gpus)
    for rows in (count for count in range(own, 0, -1) if own % count == 0):
        if step_memory(model, shape, setting_of(config, gpus, rows, parallelism, checkpointing)).peak <= limit:
            return rows
    return 0


def microbatch_table(model: TransfusionMoT, shape: RowShape, config: RunConfig, gpus: int, gpu: str) -> str:
    """The largest `training.microbatch_rows` that fits, for each kind of parallelism and checkpointing."""
    lines = [_line(f"largest microbatch_rows on {gpu}", *parallelisms(config))]
    for checkpointing in get_args(Checkpointing):
        found = [
            largest_microbatch(model, shape, config, gpus, gpu, parallelism, checkpointing) or "none"
            for parallelism in parallelisms(config)
        ]
        lines.append(_line(f"checkpointing {checkpointing}", *found))
    return "\n".join(lines)


def choices_table(model: TransfusionMoT, shape: RowShape, config: RunConfig, gpus: int, gpu: str) -> str:
    """Peak memory of the configured microbatch on a GPU with all parameters, by trained parts and method."""
    rows = min(config.training.microbatch_rows or rows_per_gpu(config, gpus), rows_per_gpu(config, gpus))
    frozen = [TEXT] if config.model.modalities[TEXT].tower == TEXT and len(config.model.towers) > 1 else []
    own = config.lora or LoraConfig()
    trained: dict[str, tuple[LoraConfig | None, list[str]]] = {
        "as configured": (config.lora, config.training.frozen_towers),
        "every weight": (None, []),
        "frozen text tower": (None, frozen),
        f"lora of rank {own.rank}": (replace(own, towers=None, also_train=[]), []),
    }
    lines = [
        f"GiB on one {gpu}, of {USABLE * GPU_MEMORY[gpu]:.1f} usable, by training.activation_checkpointing",
        _line("", *get_args(Checkpointing)),
    ]
    for title, (lora, towers) in trained.items():
        if title == "frozen text tower" and not frozen:
            continue
        choice = replace(config, lora=lora, training=replace(config.training, frozen_towers=towers))
        with torch.device("meta"):
            other = TransfusionMoT.from_sections(dict(model.config.sizes), config.model, config.diffusion)
            choose_trained(other, choice)
        other.insulate(config.training.insulated_towers)
        ways: dict[str, dict[str, Any]] = {"": {}}
        if title != "as configured":
            ways = {
                ", adamw": {"optimizer": "adamw", "ema": True},
                ", adamw_8bit": {"optimizer": "adamw_8bit", "ema": True},
                ", adamw_8bit, ema_on_cpu": {"optimizer": "adamw_8bit", "ema": False},
            }
        for way, changes in ways.items():
            peaks = []
            for checkpointing in get_args(Checkpointing):
                setting = replace(setting_of(choice, gpus, rows, "ddp", checkpointing), **changes)
                peaks.append(step_memory(other, shape, setting).peak / GIB)
            lines.append(_line(title + way, *peaks))
    return "\n".join(lines)


def time_line(model: TransfusionMoT, shape: RowShape, config: RunConfig, gpus: int, gpu: str, mfu: float) -> str:
    """FLOPs of a token and the length of the run."""
    of_row = weight_flops_per_row(model, shape) + shape.causal_pairs * flops_per_pair(model)
    of_step = of_row * config.training.num_rows
    peak = PEAK_FLOPS[next(name for name in PEAK_FLOPS if gpu.startswith(name))]
    seconds = of_step / (gpus * peak * mfu)
    tokens = config.training.num_rows * shape.num_slots
    steps, days = config.training.num_steps, config.training.num_steps * seconds / 86400
    length = f"{days:.3g} days for {steps} steps ({steps * tokens / 1e9:.4g}B tokens)"
    if config.training.num_epochs is not None:
        length = f"{config.training.num_epochs:g} epochs (the number of steps depends on the data),"
    return (
        f"{of_row / shape.num_slots / 1e9:.3g} GFLOP a token (mean over tokens and patches, forward and backward), "
        f"{of_step / 1e15:.3g} PFLOP a step of {tokens / 1e6:.3g}M tokens\n"
        f"{seconds:.3g} s a step and {length} on {gpus} {gpu} at an MFU of {mfu:g}"
    )
