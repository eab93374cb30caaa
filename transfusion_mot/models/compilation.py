"""The number of shapes for which the compiler keeps code."""

import torch


def allow_shapes(count: int) -> None:
    """Allow each compiled function code for this many more shapes in this process.

    PyTorch's limit is 8, for each function over all models that call it. Beyond it, functions that must be compiled as
    a whole fail, and others run without compilation from then on. The limit is only raised, so that endless
    recompilation is still noticed.
    """
    config = torch._dynamo.config
    config.recompile_limit += count
    config.accumulated_recompile_limit += count
