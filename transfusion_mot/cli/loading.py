"""A checkpoint, as a user names it, => a pipeline that is ready on its device."""

import torch

from transfusion_mot.errors import UserError
from transfusion_mot.files import find_snapshot
from transfusion_mot.pipeline import TransfusionPipeline


def load_pipeline(
    checkpoint: str,
    device: str | torch.device,
    dtype: str | None,
    *,
    lora: str | None = None,
    lora_scale: float = 1.0,
) -> TransfusionPipeline:
    """The pipeline of a run or snapshot, with adapters added to its weights.

    Args:
        checkpoint: A run folder or a snapshot.
        device: Where it computes.
        dtype: Number format of the transformer, `bf16` or `fp32`; None is `bf16` on CUDA and `fp32` elsewhere.
        lora: The folder of an adapter, or None.
        lora_scale: How much of it is added.

    Raises:
        UserError: There is no such snapshot, adapter or device.
    """
    pipeline = TransfusionPipeline.from_pretrained(find_snapshot(checkpoint))
    if lora is not None:
        pipeline.load_lora_weights(lora)
    if pipeline.get_active_adapters():
        # In float32, and for the speed of a model without adapters.
        pipeline.fuse_lora(lora_scale=lora_scale)
        pipeline.unload_lora_weights()
    try:
        pipeline.to(torch.device(device))
    # torch asserts where it was built without CUDA.
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device '{device}' cannot be used ({str(error).splitlines()[0]}); try --device cpu") from None
    if (dtype or ("bf16" if pipeline.device.type == "cuda" else "fp32")) == "bf16":
        # The autoencoder is a small part of the time, and shows every rounding. (`to` would warn of what it could do.)
        pipeline.transformer.bfloat16()
    return pipeline
