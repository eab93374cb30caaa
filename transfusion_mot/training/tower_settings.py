"""Settings that name towers, or parts of them. Nothing here loads PyTorch, which takes seconds."""

from transfusion_mot.config import LORA_MODULES, ModelConfig, RunConfig
from transfusion_mot.errors import UserError
from transfusion_mot.models.architecture import SHARED


def owners(model: ModelConfig) -> list[str]:
    """Names of the owners of weights: the towers, and `shared` if they share components."""
    return list(dict.fromkeys([*model.towers, *([SHARED] if len(set(model.untied)) < 4 else [])]))


def check_towers(config: RunConfig) -> None:
    """Refuse settings of towers that the model does not have.

    Raises:
        UserError: Names the key, its value and the valid values.
    """
    known = owners(config.model)
    frozen, scales = config.training.frozen_towers, config.optimizer.tower_lr_scale
    insulated = config.training.insulated_towers
    for key, names in (
        ("training.frozen_towers", frozen),
        ("training.insulated_towers", insulated),
        ("optimizer.tower_lr_scale", scales),
    ):
        if unknown := sorted(set(names) - set(known)):
            raise UserError(f"{key} names {unknown}; the model has {', '.join(known)}")
    if insulated and (SHARED in known or len(config.model.towers) == 1):
        raise UserError(
            f"training.insulated_towers is {insulated}, but insulated towers must not share weights; use more than one "
            "tower and model.untied=[norm, qkv, output, ffn]"
        )
    if set(frozen) == set(known):
        raise UserError(f"training.frozen_towers is {frozen}, which freezes the whole model; leave a tower to train")
    if too_low := {tower: scale for tower, scale in scales.items() if scale <= 0}:
        raise UserError(
            f"optimizer.tower_lr_scale has {too_low}; it must be above 0 (training.frozen_towers freezes a tower)"
        )


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
