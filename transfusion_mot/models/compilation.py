"""How many shapes the compiler keeps code for."""

import torch


def allow_shapes(count: int) -> None:
    """Let each compiled function have code for so many more shapes in this process.

    PyTorch allows 8. Behind them it fails where it must compile a whole function, and else computes without compiled
    code, for good; what it keeps belongs to a function, whichever model calls it. The default stays as a reserve, so
    that a function that is compiled without end is still noticed.
    """
    config = torch._dynamo.config
    config.recompile_limit += count
    config.accumulated_recompile_limit += count
