"""A checkpoint named by the user => a pipeline on its device."""

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
        device: Device of the pipeline.
        dtype: Number format of the transformer, `bf16` or `fp32`; None is `bf16` on CUDA and `fp32` elsewhere.
        lora: The folder of an adapter, or None.
        lora_scale: Factor on the adapter.

    Raises:
        UserError: There is no such snapshot, adapter or device.
    """
    pipeline = TransfusionPipeline.from_pretrained(find_snapshot(checkpoint))
    if lora is not None:
        pipeline.load_lora_weights(lora)
    if pipeline.get_active_adapters():
        # Fused in float32 for precision; a fused model is as fast as one without adapters.
        pipeline.fuse_lora(lora_scale=lora_scale)
        pipeline.unload_lora_weights()
    try:
        pipeline.to(torch.device(device))
    # A torch built without CUDA raises AssertionError.
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device '{device}' cannot be used ({str(error).splitlines()[0]}); try --device cpu") from None
    if (dtype or ("bf16" if pipeline.device.type == "cuda" else "fp32")) == "bf16":
        # The autoencoder stays in float32: it takes little of the time, and its rounding is visible.
        pipeline.transformer.bfloat16()
    return pipeline
