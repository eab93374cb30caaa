"""The processor cores of this process."""

import os


def usable_cores() -> int:
    """Cores that this process may use: fewer than the machine has in many jobs of clusters and in containers."""
    # macOS does not say which.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
