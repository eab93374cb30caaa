"""Hidden states of a model after each of its blocks, on held-out rows."""

from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from transfusion_mot.config import ModelConfig
from transfusion_mot.errors import UserError
from transfusion_mot.evaluation.feature_space import States
from transfusion_mot.models.transfusion import TransfusionMoT
from transfusion_mot.training.validation import Validation

# Timestep of latents: half noise.
TIMESTEP = 0.5


def check_one_width(model: ModelConfig) -> None:
    """Refuse towers of different widths: their hidden states cannot be compared.

    Raises:
        UserError: The widths differ.
    """
    widths = {tower.hidden_size for tower in model.towers.values()}
    if len(widths) > 1:
        raise UserError(
            f"the towers of the model have the widths {', '.join(map(str, sorted(widths)))}; comparing hidden states "
            "needs a model with one width"
        )


def hidden_states(
    model: TransfusionMoT, validation: Validation, accelerator: Accelerator, *, most: int, seed: int
) -> list[States]:
    """Hidden states of filled slots, equally many of every modality: before the first block, then after each block.

    Args:
        model: A model with towers of one width, see `check_one_width`.
        validation: The validation that has the rows.
        accelerator: An accelerator with one process.
        most: Maximum number of states of a modality.
        seed: Seed of the choice of states.

    Raises:
        UserError: No held-out document has one of the modalities.
    """
    config = model.architecture
    layers: list[dict[str, Tensor]] = []
    handles = [model.blocks[0].register_forward_pre_hook(lambda _, inputs: layers.append(inputs[0]))]
    handles += [block.register_forward_hook(lambda _, inputs, output: layers.append(output)) for block in model.blocks]
    found: list[dict[str, list[Tensor]]] = [{} for _ in range(len(model.blocks) + 1)]
    try:
        with torch.no_grad():
            for batch in validation.batches(model, accelerator):
                given: Any = batch.at(TIMESTEP)
                layers.clear()
                model(inputs=given.inputs, slots=given.slots)
                names = [name for name in config.stream_order if name in given.inputs]
                lengths = [model.num_slots(name, given.inputs[name]) for name in names]
                filled = dict(zip(names, (given.slots.document_ids >= 0).split(lengths, dim=1), strict=True))
                for of_layer, streams in zip(found, layers, strict=True):
                    for name, states in _by_modality(model, streams, names, lengths).items():
                        of_layer.setdefault(name, []).append(states[filled[name]].float().cpu())
    finally:
        for handle in handles:
            handle.remove()
    together = [{name: torch.cat(parts).numpy() for name, parts in of_layer.items()} for of_layer in found]
    count = min(most, *(len(states) for states in together[0].values()))
    if not count:
        empty = [name for name, states in together[0].items() if not len(states)]
        raise UserError(f"no held-out document has {', '.join(empty)}; raise --num-documents, or hold out more")
    generator = np.random.default_rng(seed)
    drawn = {name: generator.permutation(len(states))[:count] for name, states in together[0].items()}
    return [{name: states[drawn[name]] for name, states in of_layer.items()} for of_layer in together]


def _by_modality(
    model: TransfusionMoT, streams: dict[str, Tensor], names: list[str], lengths: list[int]
) -> dict[str, Tensor]:
    """The stream of each tower, cut into its modalities."""
    tower_of = {name: model.architecture.modalities[name].tower for name in names}
    places = dict.fromkeys(streams, 0)
    states = {}
    for name, length in zip(names, lengths, strict=True):
        start = places[tower_of[name]]
        states[name] = streams[tower_of[name]][:, start : start + length]
        places[tower_of[name]] = start + length
    return states
