"""Parameters that a run trains: all, all except frozen towers, or adapters and `lora.also_train`."""

import torch

from transfusion_mot.config import ModelConfig, RunConfig
from transfusion_mot.models.lora import add_adapter
from transfusion_mot.models.transfusion import TransfusionMoT, base_name, is_of_adapter
from transfusion_mot.training.tower_settings import trainable_parts
from transfusion_mot.training.towers import freeze_towers, tower_of


def parts_of(name: str, config: ModelConfig) -> set[str]:
    """Names in `trainable_parts` that a parameter belongs to.

    Args:
        name: Name of a parameter of the model without adapters.
        config: The model's configuration.
    """
    tower, words = tower_of(name, config), name.split(".")
    if name.startswith("modalities."):
        inside = ".".join(words[1:])
        return {tower} | {part for part in trainable_parts(config) if f"{inside}.".startswith(f"{part}.")}
    component = name.split(".owned.")[0].split(".")[-1]
    if component.endswith("_norm") or words[-2] in ("q_norm", "k_norm"):
        component = "norm"
    return {tower, f"{tower}.{component}"}


def choose_trained(model: TransfusionMoT, config: RunConfig) -> None:
    """Set which parameters need a gradient, and add the adapters, while the model is on `meta`.

    In bfloat16 runs, untrained matrices are stored in bfloat16, because every product rounds them to it anyway. Norms
    and biases are used in float32 and keep their number format.
    """
    if config.lora is None:
        freeze_towers(model, config.training.frozen_towers)
    else:
        add_adapter(model, config.lora)
        also = set(config.lora.also_train)
        for name, parameter in model.named_parameters():
            if not is_of_adapter(name):
                parameter.requires_grad_(bool(also & parts_of(base_name(name), config.model)))
    if config.training.mixed_precision == "bf16":
        for parameter in model.parameters():
            if not parameter.requires_grad and parameter.ndim > 1:
                parameter.data = parameter.data.to(torch.bfloat16)
