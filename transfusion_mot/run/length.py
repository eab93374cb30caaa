"""Length of a run: steps from the configuration, or computed from a number of epochs."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np

from transfusion_mot.config import RunConfig
from transfusion_mot.data.mixture import counter
from transfusion_mot.data.packing import Packer

# Beyond this number of epochs a held-out loss has usually started to rise long ago.
_MANY_EPOCHS = 1000
# Rows that are packed to count their documents. The same number of rows before them is not counted, because the first
# rows also take documents that wait for later rows.
_MEASURED_ROWS = 64


def with_num_steps(config: RunConfig, packer: Packer) -> RunConfig:
    """The configuration with `num_steps` instead of `num_epochs`, if `num_epochs` is given."""
    epochs = config.training.num_epochs
    if epochs is None:
        return config
    num_steps = max(1, math.ceil(epochs / epochs_per_step(packer)))
    return replace(config, training=replace(config.training, num_epochs=None, num_steps=num_steps))


def described_length(num_steps: int, packer: Packer) -> str:
    """Steps and epochs of a run in words, with a warning about very many epochs."""
    documents = packer.sources.num_documents()
    epochs = num_steps * epochs_per_step(packer)
    warning = "; so many epochs memorise the data: set fewer training.num_steps" if epochs >= _MANY_EPOCHS else ""
    return f"steps: {num_steps}, about {epochs:.3g} epochs of {documents:,} documents{warning}"


def epochs_per_step(packer: Packer) -> float:
    """Share of all documents that a step takes: the mean over trial rows."""
    lanes = range(min(packer.num_lanes, _MEASURED_ROWS))
    states = np.tile(packer.initial_state(), (len(lanes), 1))
    num_steps = math.ceil(_MEASURED_ROWS / len(lanes))
    taken: Counter[str] = Counter()
    for step in range(2 * num_steps):
        _, states, counts = packer.rows(lanes, step, states)
        if step >= num_steps:
            taken.update(counts)
    documents = sum(taken[counter(name, "taken")] for name in packer.sources.names)
    return documents / (num_steps * len(lanes)) * packer.num_lanes / packer.sources.num_documents()
