"""8-bit matrix products in the blocks, by torchao: `training.float8`."""

import importlib.util
from collections.abc import Mapping

import torch
from accelerate import Accelerator

from transfusion_mot.codecs.base import Codec
from transfusion_mot.config import RunConfig
from transfusion_mot.errors import UserError
from transfusion_mot.models.transfusion import TransfusionMoT

# All dimensions of a product must be multiples of it, also the number of slots (for the weights' gradients).
_MULTIPLE = 16
# Compute capability of the first GPUs with such products, Ada; Hopper is 9.0.
_CAPABILITY = (8, 9)


def check_float8(config: RunConfig, accelerator: Accelerator, codecs: Mapping[str, Codec]) -> None:
    """Refuse `training.float8` where it does not run or takes longer than bfloat16.

    Args:
        config: The run's configuration.
        accelerator: The run's accelerator.
        codecs: Codec of each modality; those of latents give the number of patches of an image.

    Raises:
        UserError: Names the problem.
    """
    if importlib.util.find_spec("torchao") is None:
        raise UserError('training.float8 needs the package torchao: pip install "transfusion-mot[float8]"')
    if accelerator.is_fsdp2:
        raise UserError(
            "training.float8 has not been tried with FSDP2; set training.float8 to false, or use DDP or one device"
        )
    if not config.training.compile:
        raise UserError(
            "training.float8 without training.compile takes longer than bfloat16; set training.compile to true, or "
            "training.float8 to false"
        )
    if wrong := {key: width for key, width in _widths(config, codecs).items() if width % _MULTIPLE}:
        named = " and ".join(f"{key} is {width}" for key, width in wrong.items())
        raise UserError(
            f"training.float8 needs multiples of {_MULTIPLE}, but {named}; change that, or set training.float8 to false"
        )
    device = accelerator.device
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < _CAPABILITY:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        raise UserError(
            "training.float8 needs a GPU that multiplies 8-bit numbers (compute capability 8.9 or more: Ada, Hopper "
            f"and newer), but this run is on {name}; set training.float8 to false"
        )
    if config.training.mixed_precision == "no":
        raise UserError(
            "training.float8 needs bfloat16, but training.mixed_precision is no; set that to bf16, or "
            "training.float8 to false"
        )


def _widths(config: RunConfig, codecs: Mapping[str, Codec]) -> dict[str, int]:
    """Keys of the configuration => dimensions of the products in the blocks."""
    model, data = config.model, config.data
    widths = {}
    for name, tower in model.towers.items():
        widths[f"model.towers.{name}.hidden_size"] = tower.hidden_size
        widths[f"model.towers.{name}.intermediate_size"] = tower.intermediate_size
    widths["model.num_heads * model.head_dim"] = model.num_heads * model.head_dim
    if model.num_kv_heads is not None:
        # Keys and values are one projection.
        widths["2 * model.num_kv_heads * model.head_dim"] = 2 * model.num_kv_heads * model.head_dim
    # Each single row must fit: the guards check the rows of a non-finite step one by one.
    for name, slots in data.slots.items():
        if model.modalities[name].objective == "next_token":
            widths[f"data.slots.{name}"] = slots
            continue
        codec = codecs[model.content_of(name)]
        assert codec.medium != "audio"
        side = codec.downsampling * model.modalities[name].patch_size
        for height, width in data.image_sizes:
            patches = (height // side) * (width // side)
            widths[f"data.slots.{name} * {patches} patches"] = slots * patches
    return widths


def convert_to_float8(model: TransfusionMoT) -> None:
    """Let the linear layers of the blocks compute with 8-bit numbers, forward and backward; before `compile_blocks`.

    Operands are rounded at each product, with one scale for a whole tensor. The parameters stay the same objects with
    the same names. Attention and everything outside of the blocks compute as before.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    # With one scale for each row a step takes longer than in bfloat16 (benchmarks/tried.md).
    convert_to_float8_training(model.blocks, config=Float8LinearConfig.from_recipe_name("tensorwise"))
