"""What a step of the model costs in FLOPs, and what GPUs can do."""

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from transfusion_mot.config import ModelConfig
from transfusion_mot.data.batch import Batch
from transfusion_mot.data.row_arrays import RowShape
from transfusion_mot.models.modalities import DiffusionModality
from transfusion_mot.models.mot import SHARED
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
    """Matrix parameters that every slot of the modality passes through: its tower's blocks, and the head of tokens."""
    is_tied = config.modalities[modality].tied_embeddings
    head = f"modalities.{modality}.{'embedding' if is_tied else 'head'}.weight"
    owners = tuple(f".owned.{owner}." for owner in (config.modalities[modality].tower, SHARED))
    return sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.ndim == 2
        and ((name.startswith("blocks.") and any(owner in name for owner in owners)) or name == head)
    )


def adapter_flops(modality: DiffusionModality, latents: torch.Size) -> int:
    """FLOPs of the forward pass of a patch adapter without weights (on `meta`), for latents [I, C, Y, X].

    They are counted rather than derived, because some of its layers see patches, some pixels and some images.
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        noisy_latents = torch.empty(latents, device="meta")
        tokens, kept = modality.adapter.embed(noisy_latents, torch.empty(latents[0], device="meta"))
        modality.adapter.predict(tokens, kept, *latents[-2:])
    return counter.get_total_flops()


def attending_pairs(batch: Batch, model: TransfusionMoT) -> Tensor:
    """Pairs of slots of which one attends to the other, of all rows: []; padding is not counted."""
    slots = model.slot_ids(batch.inputs, batch.slots)
    # A document is whole in its row: a slot sees all places of it from the first to its horizon.
    seen = slots.horizon + 1
    if slots.visible_until is not None:
        # But for a slot that is hidden from what is read behind its image.
        documents = batch.slots.document_ids + 1
        last = slots.order.new_zeros(documents.shape[0], documents.shape[1] + 1)
        last = last.scatter_reduce(1, documents, slots.order, "amax").gather(1, documents)
        seen = seen - (last - slots.visible_until).clamp(min=0)
    return torch.where(batch.slots.document_ids >= 0, seen, 0).sum()


def flops_per_pair(config: ModelConfig) -> int:
    """FLOPs of forward and backward of a pair of slots that attend: 12 per layer and attention width."""
    return 12 * config.num_layers * config.num_heads * config.head_dim


def weight_flops_per_row(model: TransfusionMoT, shape: RowShape) -> int:
    """FLOPs of forward and backward over one row without attention of slots to each other (Chowdhery et al., arXiv
    2204.02311, appendix B).

    6 per active parameter and slot, and three times the forward pass of the patch adapters. What activation
    checkpointing computes again is not counted.

    Args:
        model: It may be sharded or compiled: only its configuration is read.
        shape: Slots of the row.
    """
    with torch.device("meta"):
        bare = TransfusionMoT.from_config(dict(model.config))
    weights = adapters = 0
    for name, block in shape.blocks.items():
        weights += active_parameters(bare, bare.architecture, name) * block.num_slots
        modality = bare.modality(name)
        if block.latent_shape is not None and isinstance(modality, DiffusionModality):
            adapters += adapter_flops(modality, torch.Size((block.capacity, *block.latent_shape)))
    return 6 * weights + 3 * adapters
