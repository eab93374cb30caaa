"""Time of one layer's attention, forward and backward, by each kernel: `python -m benchmarks.attention`.

Rows are those of a training step; queries, keys and values are random. Only the time of kernels is measured, because
they run without gaps in a step.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

from benchmarks.shapes import IMAGE, LAYOUTS, SIZES
from transfusion_mot.errors import UserError, exit_on_user_error


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.attention", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=["760m", "163m"])
    parser.add_argument("--head-dim", type=int, default=128, help="width of a head (default: %(default)s)")
    parser.add_argument("--copies", action="store_true", help="every other image is a copy that later slots attend to")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    # Before PyTorch loads, which takes seconds: --help, and mistakes in the options.
    with exit_on_user_error():
        parse_arguments(sys.argv[1:])

import torch
from accelerate import Accelerator
from torch import Tensor

from benchmarks.kernel_profile import profile_step
from benchmarks.train_step import surroundings
from benchmarks.workload import make_loader
from transfusion_mot.data.batch import Batch
from transfusion_mot.models import interval_attention
from transfusion_mot.models.attention import AttentionMask, SlotIds, joint_attention, training_mask

# Interval attention has kernels for Hopper, and kernels in Triton for all devices.
KERNELS = ("flex", "interval", "interval in Triton")


def main(arguments: list[str]) -> None:
    options = parse_arguments(arguments)
    if not torch.cuda.is_available():
        raise UserError("there is no CUDA device, which the kernels need")
    accelerator = Accelerator(mixed_precision="bf16")
    print(surroundings(accelerator.device))
    print("| rows | kernel | forward ms | backward ms | together | flex / it |\n| --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        for name in options.layouts:
            # The number of heads of the layout's model, or of the smaller model.
            size = SIZES.get(name, SIZES["163m"])
            loader = make_loader(LAYOUTS[name], size, accelerator, folder=Path(folder), num_steps=1, num_workers=0)
            batch, _ = next(iter(loader))
            heads = size.num_heads * size.head_dim // options.head_dim
            times = {kernel: time_of(kernel, batch, heads, options.head_dim, options.copies) for kernel in KERNELS}
            for kernel, (forward, backward) in times.items():
                both = forward + backward
                ratio = sum(times["flex"]) / both
                print(f"| {name} | {kernel} | {forward:.3f} | {backward:.3f} | {both:.3f} | {ratio:.2f} |", flush=True)


def time_of(kernel: str, batch: Batch, num_heads: int, head_dim: int, with_copies: bool) -> tuple[float, float]:
    """Milliseconds of the kernels of forward and backward."""
    ids = batch.slots
    device = ids.order.device
    copies = None
    if with_copies:
        rows, images = batch.latents(IMAGE).timesteps.shape
        copies = (torch.arange(images, device=device) % 2 == 1).expand(rows, images)
    slots = SlotIds.from_spans(ids.document_ids, ids.order, ids.span_ids, copies)
    shape = (4, *ids.order.shape, num_heads, head_dim)
    q, k, v, upstream = torch.randn(shape, device=device, dtype=torch.bfloat16).transpose(2, 3)
    for heads in (q, k, v):
        heads.requires_grad_()
    without_hopper = mock.patch.object(interval_attention, "has_hopper_kernels", return_value=False)
    with without_hopper if kernel == "interval in Triton" else nullcontext():
        mask = training_mask(slots, "flex" if kernel == "flex" else "interval")
        return measured(q, k, v, upstream, mask)


def measured(q: Tensor, k: Tensor, v: Tensor, upstream: Tensor, mask: AttentionMask) -> tuple[float, float]:
    def forward() -> Tensor:
        return joint_attention(q, k, v, mask)

    def both() -> None:
        torch.autograd.grad(forward(), (q, k, v), upstream)

    # Both with gradients, as in training, because FlexAttention's forward is different without gradients.
    times = []
    for run in (forward, both):
        run()
        times.append(profile_step(run, 10)["categories"]["attention"])
    return times[0], times[1] - times[0]


if __name__ == "__main__":
    with exit_on_user_error():
        main(sys.argv[1:])
