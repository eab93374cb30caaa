"""Parameters that a run trains: all, all except frozen towers, or adapters and `lora.also_train`."""

import torch

from transfusion_mot.config import LORA_MODULES, ModelConfig, RunConfig
from transfusion_mot.errors import UserError
from transfusion_mot.models.lora import add_adapter
from transfusion_mot.models.mot import SHARED
from transfusion_mot.models.transfusion import TransfusionMoT, base_name, is_of_adapter
from transfusion_mot.training.towers import freeze_towers, owners, tower_of


def check_lora(config: RunConfig) -> None:
    """Refuse adapters that the model cannot have, and settings that exclude adapters.

    Raises:
        UserError: Names the key, its value and the valid values.
    """
    lora, model = config.lora, config.model
    if lora is None:
        return
    if lora.rank < 1:
        raise UserError(f"lora.rank is {lora.rank}; it must be at least 1 (lora=null trains all weights)")
    if not lora.alpha > 0:
        raise UserError(f"lora.alpha is {lora.alpha}; it must be above 0")
    towers = owners(model)
    for key, names, known in (
        ("towers", lora.towers, towers),
        ("modules", lora.modules, list(LORA_MODULES)),
        ("also_train", lora.also_train, trainable_parts(model)),
    ):
        if unknown := [name for name in names or [] if name not in known]:
            raise UserError(f"lora.{key} names {', '.join(unknown)}; known: {', '.join(known)}")
    if not lora.modules:
        raise UserError(f"lora.modules is empty; give some of {', '.join(LORA_MODULES)}")
    for tower in lora.towers or towers:
        for part in lora.also_train:
            if part in (tower, *(f"{tower}.{component}" for component in ("qkv", "output", "ffn"))):
                raise UserError(
                    f"lora.also_train names {part}, whose matrices have adapters (lora.towers); train either its "
                    "weights or its adapters"
                )
    if config.training.frozen_towers:
        raise UserError(
            f"training.frozen_towers is {config.training.frozen_towers}, but lora trains only adapters and "
            "lora.also_train; remove frozen_towers, and name the towers with adapters in lora.towers"
        )
    if config.optimizer.name == "muon":
        raise UserError("optimizer.name is muon, which does not work with adapters; use adamw with lora")
    if config.training.float8:
        raise UserError("training.float8 has not been tried with lora; set training.float8 to false")


def trainable_parts(model: ModelConfig) -> list[str]:
    """Names that `lora.also_train` accepts."""
    names = []
    for owner in owners(model):
        is_shared = owner == SHARED
        own = [part for part in ("norm", "qkv", "output", "ffn") if (part not in model.untied) == is_shared]
        names += [owner, *(f"{owner}.{part}" for part in own)]
    for name in model.stream_order:
        modality = model.modalities[name]
        if modality.objective == "diffusion":
            names += [f"{name}.adapter", f"{name}.adapter.timestep"]
        elif modality.objective == "read":
            names += [f"{name}.adapter"]
        else:
            names += [f"{name}.embedding", *([] if modality.tied_embeddings else [f"{name}.head"])]
    return list(dict.fromkeys(names))


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
