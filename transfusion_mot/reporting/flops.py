"""FLOPs of a step of the model, and peak FLOPs of GPUs."""

from collections import Counter
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from transfusion_mot.config import ModelConfig
from transfusion_mot.data.batch import Batch
from transfusion_mot.data.row_arrays import RowShape
from transfusion_mot.models.architecture import SHARED
from transfusion_mot.models.attention import slot_ids
from transfusion_mot.models.layers import SwiGLU
from transfusion_mot.models.modalities import DiffusionModality, ReadModality, TokenModality
from transfusion_mot.models.mot import MoTBlock
from transfusion_mot.models.transfusion import TransfusionMoT

# Dense bf16 peak in FLOP/s, from the vendors' data sheets.
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "L40S": 362e12, "4090": 165e12}


def peak_flops(device: torch.device) -> float | None:
    """Peak FLOP/s of a known GPU, else None."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)


def active_parameters(model: nn.Module, config: ModelConfig, modality: str) -> int:
    """Matrix parameters for each slot of the modality: the blocks of its tower, and the head for tokens."""
    is_tied = config.modalities[modality].tied_embeddings
    head = f"modalities.{modality}.{'embedding' if is_tied else 'head'}.weight"
    owners = tuple(f".owned.{owner}." for owner in (config.modalities[modality].tower, SHARED))
    return sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.ndim == 2
        and ((name.startswith("blocks.") and any(owner in name for owner in owners)) or name == head)
    )


def adapter_flops(modality: DiffusionModality | ReadModality, latents: torch.Size) -> int:
    """FLOPs of forward and backward of a patch adapter without weights (on `meta`), for latents [I, C, Y, X].

    They are counted rather than derived, because its layers work on patches, latents or whole images.
    """
    with FlopCounterMode(display=False) as counter:
        result = torch.empty(latents, device="meta")
        if isinstance(modality, ReadModality):
            result = modality.adapter.embed(result)
        else:
            tokens, kept = modality.adapter.embed(result, torch.empty(latents[0], device="meta"))
            # The tensors between the two have a gradient, whichever part of the adapter is trained.
            tokens = tokens if tokens.requires_grad else tokens.requires_grad_()
            result = modality.adapter.predict(tokens, kept, *latents[-2:])
        if result.requires_grad:
            result.sum().backward()
    return counter.get_total_flops()


def attending_pairs(batch: Batch, model: TransfusionMoT) -> Tensor:
    """Number of pairs of slots in which one attends to the other, over all rows: []; padding is not counted."""
    slots = slot_ids(model.architecture, batch.inputs, batch.slots)
    # A document is contiguous in reading order: a slot attends to all places of it from the first to its own horizon.
    seen = slots.horizon + 1
    if slots.visible_until is not None:
        # Except for slots that are hidden from everything after their image.
        documents = batch.slots.document_ids + 1
        last = slots.order.new_zeros(documents.shape[0], documents.shape[1] + 1)
        last = last.scatter_reduce(1, documents, slots.order, "amax").gather(1, documents)
        seen = seen - (last - slots.visible_until).clamp(min=0)
    return torch.where(batch.slots.document_ids >= 0, seen, 0).sum()


def flops_per_pair(model: TransfusionMoT) -> int:
    """FLOPs of forward and backward for a pair of attending slots: 12 per layer and attention width, and the same again
    for each additional attention of insulated towers."""
    config, block = model.architecture, cast(MoTBlock, model.blocks[0])
    return 12 * config.num_layers * config.num_heads * config.head_dim * block.num_attentions


def weight_flops_per_row(model: TransfusionMoT, shape: RowShape) -> int:
    """FLOPs of forward and backward over one row without the products between slots in attention (Chowdhery et al.,
    arXiv 2204.02311, appendix B).

    For each slot and element of a matrix: 2 for the result, 2 for the gradient of the input, if it has one, and 2 for
    the gradient of the matrix, if it is trained. Recomputation by activation checkpointing is not counted.

    Args:
        model: It may be sharded or compiled. `requires_grad` of its parameters shows whether they are trained.
        shape: Slots of the row.
    """
    config = model.architecture
    with torch.device("meta"):
        bare = TransfusionMoT.from_config(dict(model.config))
    total = 0
    slots, has_gradient = Counter[str](), dict.fromkeys(config.towers, False)
    for name, block in shape.blocks.items():
        tower = config.modalities[name].tower
        slots[tower] += block.num_slots
        entrance = model.modalities[name]
        is_trained = _is_trained(entrance.embedding if isinstance(entrance, TokenModality) else entrance)
        has_gradient[tower] |= is_trained
        if block.latent_shape is not None:
            module = cast(DiffusionModality | ReadModality, bare.modalities[name])
            for key, parameter in module.named_parameters():
                parameter.requires_grad_(entrance.get_parameter(key).requires_grad)
            total += adapter_flops(module, torch.Size((block.capacity, *block.latent_shape)))
    for layer in model.blocks:
        of_tower, has_gradient = _block_flops(cast(MoTBlock, layer), has_gradient)
        total += sum(count * of_tower[tower] for tower, count in slots.items())
    for name, block in shape.blocks.items():
        if isinstance(modality := model.modalities[name], TokenModality):
            head = modality.embedding if modality.head is None else modality.head
            total += _matrix_flops(head, has_gradient[config.modalities[name].tower]) * block.num_slots
    return total


def _block_flops(block: MoTBlock, has_gradient: dict[str, bool]) -> tuple[dict[str, int], dict[str, bool]]:
    """FLOPs of the matrices of a block for a slot of each tower, and whether its output streams have gradients.

    Args:
        has_gradient: Whether its input streams have gradients.
    """
    flops = {}
    reads = {tower: has or _is_trained(block.attention_norm[tower]) for tower, has in has_gradient.items()}
    # Queries, keys and values of all towers are one tensor.
    attended = any(has or _is_trained(block.qkv[tower]) for tower, has in reads.items())
    behind = {}
    for tower, has in has_gradient.items():
        ffn = cast(SwiGLU, block.ffn[tower])
        hidden = has or attended or _is_trained(block.output[tower])
        normed = hidden or _is_trained(block.ffn_norm[tower])
        product = normed or _is_trained(ffn.gate) or _is_trained(ffn.up)
        flops[tower] = (
            _matrix_flops(block.qkv[tower], reads[tower])
            + _matrix_flops(block.output[tower], attended)
            + _matrix_flops(ffn.gate, normed)
            + _matrix_flops(ffn.up, normed)
            + _matrix_flops(ffn.down, product)
        )
        behind[tower] = product or _is_trained(ffn.down)
    return flops, behind


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _matrix_flops(module: nn.Module, has_gradient: bool) -> int:
    """FLOPs of a matrix and its low-rank adapters for one slot.

    Args:
        has_gradient: Whether the input has a gradient.
    """
    total = 0
    for name, parameter in module.named_parameters():
        if parameter.ndim == 2:
            # The second matrix of an adapter multiplies the output of the first one.
            needs_input = has_gradient or "lora_B." in name
            total += parameter.numel() * 2 * (1 + needs_input + parameter.requires_grad)
    return total
