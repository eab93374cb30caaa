"""What a step of the model costs in FLOPs, and what GPUs can do."""

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from transfusion_mot.config import ModelConfig
from transfusion_mot.data.batch import Batch
from transfusion_mot.models.attention import SlotIds
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
    """Matrix parameters that every slot of the modality passes through: its tower's blocks, and the head of text."""
    owners = tuple(f".owned.{owner}." for owner in (config.modalities[modality], SHARED))
    return sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.ndim == 2
        and (
            (name.startswith("blocks.") and any(owner in name for owner in owners))
            or (name.startswith("text_head.") and modality == "text")
        )
    )


def adapter_flops(model: TransfusionMoT, latents: torch.Size) -> int:
    """FLOPs of the forward pass of the image adapter of a model without weights (on `meta`), for latents [I, C, Y, X].

    They are counted rather than derived, because some of its layers see patches, some pixels and some images.
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        noisy_latents = torch.empty(latents, device="meta")
        tokens, kept = model.image_adapter.embed(noisy_latents, torch.empty(latents[0], device="meta"))
        model.image_adapter.predict(tokens, kept, *latents[-2:])
    return counter.get_total_flops()


def attending_pairs(batch: Batch, config: ModelConfig) -> Tensor:
    """Pairs of slots of which one attends to the other, of all rows: []; padding is not counted."""
    spans = batch.span_ids if config.image_attention == "bidirectional" else torch.full_like(batch.span_ids, -1)
    slots = SlotIds.from_spans(batch.document_ids, batch.order, spans, batch.copies)
    # A document is whole in its row: a slot sees all places of it from the first to its horizon.
    seen = slots.horizon + 1
    if slots.last_horizon is not None:
        # But for a slot that is hidden from what is read behind its image.
        documents = batch.document_ids + 1
        last = slots.order.new_zeros(documents.shape[0], documents.shape[1] + 1)
        last = last.scatter_reduce(1, documents, slots.order, "amax").gather(1, documents)
        seen = seen - (last - slots.last_horizon).clamp(min=0)
    return torch.where(batch.document_ids >= 0, seen, 0).sum()


def flops_per_pair(config: ModelConfig) -> int:
    """FLOPs of forward and backward of a pair of slots that attend: 12 per layer and attention width."""
    return 12 * config.num_layers * config.num_heads * config.head_dim


def weight_flops_per_row(model: TransfusionMoT, config: ModelConfig, text_slots: int, latents: torch.Size) -> int:
    """FLOPs of forward and backward over one row without attention of slots to each other (Chowdhery et al., arXiv
    2204.02311, appendix B).

    6 per active parameter and slot, and three times the forward pass of the image adapter. What activation
    checkpointing computes again is not counted.

    Args:
        model: It may be sharded or compiled: only its configuration is read.
        config: The fields of its architecture.
        text_slots: Text slots of the row.
        latents: [K, C, Y, X] of its images.
    """
    given = model.config
    with torch.device("meta"):
        bare = TransfusionMoT(given["vocab_size"], given["latent_channels"], given["architecture"])
    images, _, height, width = latents
    patches = images * (height // config.patch_size) * (width // config.patch_size)
    weights = active_parameters(bare, config, "text") * text_slots + active_parameters(bare, config, "image") * patches
    return 6 * weights + 3 * adapter_flops(bare, latents)
