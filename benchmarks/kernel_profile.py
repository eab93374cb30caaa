"""Time of a GPU step by kind of kernel."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

# Categories with words of kernel names; the first match counts.
CATEGORIES = {
    "attention": ("interval_", "flex_attention", "flash", "decode_attention"),
    "matrix products": ("gemm", "gemv", "nvjet", "cutlass", "decode_products"),
    "norm, rotation and joining of heads": ("join_heads",),
    "cross-entropy": ("logsumexp",),
    "SwiGLU": ("silu",),
    "optimizer and clipping": ("multi_tensor_apply", "foreach", "adamw"),
    "norms and residual sums": ("rsqrt", "pow", "unsafe_view_add", "_norm_forward", "_norm_reverse"),
    "casts and copies": ("copy", "memcpy", "memset"),
}


def profile_step(step: Callable[[], Any], repetitions: int = 2) -> dict[str, Any]:
    """Run a step under the profiler => milliseconds a step by category and of the longest kernels, kernels a step.

    `total` is their sum; `busy` counts the time in which several run at once only once.
    """
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as recorded:
        for _ in range(repetitions):
            step()
        torch.cuda.synchronize()
    categories: Counter[str] = Counter()
    kernels: Counter[str] = Counter()
    spans = []
    for event in recorded.events():
        # The device's timeline also has ranges marked by users and the compiler.
        if event.device_type.name != "CUDA" or event.is_user_annotation:
            continue
        milliseconds = event.device_time / 1000 / repetitions
        kernels[event.name] += milliseconds
        categories[category(event.name)] += milliseconds
        spans.append((event.time_range.start, event.time_range.end))
    return {
        "total": sum(categories.values()),
        "busy": _covered(spans) / 1000 / repetitions,
        "kernels_per_step": len(spans) / repetitions,
        "categories": dict(categories.most_common()),
        "longest": {name[:120]: milliseconds for name, milliseconds in kernels.most_common(40)},
    }


def _covered(spans: list[tuple[float, float]]) -> float:
    """Total length covered by intervals."""
    covered, until = 0.0, 0.0
    for start, end in sorted(spans):
        covered += max(0.0, end - max(start, until))
        until = max(until, end)
    return covered


def category(kernel: str) -> str:
    """Category of a kernel, by its name."""
    name = kernel.lower()
    return next((key for key, words in CATEGORIES.items() if any(word in name for word in words)), "other")
