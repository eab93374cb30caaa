"""Checks of an architecture. Nothing here loads PyTorch, which takes seconds."""

from transfusion_mot.config import ModalityConfig, ModelConfig
from transfusion_mot.errors import UserError

# Owner of the weights that towers share.
SHARED = "shared"
# Supported values of `rope_type` in `ModelConfig.rope_scaling`.
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")
# Groups of the group norms in diffusers' U-Net blocks; widths are multiples of it.
UNET_GROUPS = 32
# Names reserved by `slots.order`, `media.NAME`, `caption_loss` and `pad_slots`.
_TAKEN_NAMES = {"slots", "media", "caption", "pad"}


def check_architecture(config: ModelConfig) -> None:
    """Refuse names and sizes that do not fit together.

    Raises:
        UserError: Names the key, its value and the valid values.
    """
    for name, modality in config.modalities.items():
        if modality.tower not in config.towers:
            raise UserError(
                f"model.modalities.{name}.tower is {modality.tower!r}; it needs one of model.towers: "
                f"{', '.join(config.towers)}"
            )
        if modality.objective != "next_token" and modality.tied_embeddings:
            raise UserError(
                f"model.modalities.{name} has tied_embeddings, but the objective {modality.objective} has no "
                "embeddings; remove that key"
            )
        if modality.code_noise_prob and (modality.objective != "next_token" or name == "text"):
            raise UserError(
                f"model.modalities.{name} has code_noise_prob, which works only for codes (objective next_token, not "
                "text); remove that key"
            )
        if not 0 <= modality.code_noise_prob < 1:
            raise UserError(
                f"model.modalities.{name}.code_noise_prob is {modality.code_noise_prob}; it must be at least 0 and "
                "below 1"
            )
        if modality.guidance_scale is not None and (modality.objective == "read" or name == "text"):
            raise UserError(
                f"model.modalities.{name} has guidance_scale, but guidance works only for media; remove that key"
            )
        if modality.vocab_size is not None and name != "text":
            raise UserError(f"model.modalities.{name} has vocab_size, which works only for text; remove that key")
        if modality.objective == "next_token" and modality.is_bidirectional:
            raise UserError(
                f"model.modalities.{name} has the objective next_token and bidirectional attention, so a token would "
                "see the one it predicts; set attention to causal"
            )
    text = config.modalities.get("text")
    if text is None or text.objective != "next_token":
        raise UserError(
            f"model.modalities has {', '.join(config.modalities) or 'nothing'}; 'text' with the objective next_token "
            "must be one of them"
        )
    _check_read(config)
    if idle := set(config.towers) - {config.modalities[name].tower for name in config.made}:
        raise UserError(
            f"model.towers has {sorted(idle)} that no modality with a loss uses; remove them or use them in modalities"
        )
    if len(config.made) == 1:
        raise UserError("model.modalities has only text; add another modality")
    if SHARED in config.towers and len(config.towers) > 1:
        raise UserError(
            f"model.towers has the name '{SHARED}' beside {sorted(set(config.towers) - {SHARED})}; it is reserved for "
            "the weights that towers share; give another one"
        )
    if taken := set(config.modalities) & _TAKEN_NAMES:
        raise UserError(
            f"model.modalities has the name '{min(taken)}', which is reserved for batches and the log; give another one"
        )
    widths = {tower.hidden_size for tower in config.towers.values()}
    if len(widths) > 1 and len(set(config.untied)) < 4:
        raise UserError(
            f"model.untied is {config.untied}, but towers of different hidden_size {sorted(widths)} cannot share "
            "weights; use [norm, qkv, output, ffn]"
        )
    _check_shared(config)
    if config.head_dim % 2:
        raise UserError(f"model.head_dim is {config.head_dim}; rotary positions need an even number")
    if config.num_heads % (config.num_kv_heads or config.num_heads):
        raise UserError(
            f"model.num_heads {config.num_heads} is not a multiple of model.num_kv_heads {config.num_kv_heads}"
        )
    for name, modality in config.modalities.items():
        if modality.objective != "next_token":
            _check_patches(name, modality)
    _check_rope(config)


def _check_read(config: ModelConfig) -> None:
    """Refuse `read` modalities whose source does not exist or has other settings."""
    latents = config.of_objective("diffusion")
    readers: dict[str, str] = {}
    for name, modality in config.modalities.items():
        key = f"model.modalities.{name}"
        if modality.objective != "read":
            if modality.reads is not None:
                raise UserError(
                    f"{key} has reads: {modality.reads}, but its objective is {modality.objective}; set objective: "
                    "read, or remove reads"
                )
            continue
        if modality.reads not in latents:
            what = "codes" if modality.reads in config.modalities else "no modality"
            given = "has no reads" if modality.reads is None else f"reads {modality.reads}, which is {what}"
            raise UserError(
                f"{key} {given}; it must name a modality with the objective diffusion: {', '.join(latents) or 'none'}"
            )
        other = readers.setdefault(modality.reads, name)
        if other != name:
            raise UserError(f"model.modalities has {other} and {name}, which both read {modality.reads}; remove one")
        patch_size = config.modalities[modality.reads].patch_size
        if modality.patch_size != patch_size:
            raise UserError(
                f"{key}.patch_size is {modality.patch_size}, but {modality.reads}, which it reads, has {patch_size}; "
                "give both the same"
            )
        if modality.adapter != "linear":
            raise UserError(
                f"{key}.adapter is {modality.adapter}, but a modality that is only read has a linear adapter; remove "
                "the key"
            )


def _check_shared(config: ModelConfig) -> None:
    """Refuse towers that share a component but have different settings for it."""
    of_tower = {
        name: {
            "intermediate_size": ("ffn", tower.intermediate_size),
            "norm_eps": ("norm", config.norm_eps_of(name)),
            # The norms of queries and keys are part of their projection.
            "norm_eps of queries and keys": ("qkv", config.has_qk_norm(name) and config.norm_eps_of(name)),
            "qk_norm": ("qkv", config.has_qk_norm(name)),
            "qkv_bias": ("qkv", tower.qkv_bias),
            "output_bias": ("output", tower.output_bias),
        }
        for name, tower in config.towers.items()
    }
    for key, (component, _) in next(iter(of_tower.values())).items():
        if len({settings[key][1] for settings in of_tower.values()}) > 1 and component not in config.untied:
            raise UserError(f"model.towers differ in {key}; then model.untied needs '{component}'")


def _check_rope(config: ModelConfig) -> None:
    """Refuse invalid rotary positions."""
    scaling = config.rope_scaling
    if scaling is not None and scaling.get("rope_type") not in ROPE_TYPES:
        raise UserError(f"model.rope_scaling is {scaling}; its rope_type must be one of {', '.join(ROPE_TYPES)}")
    if wrong := [layer for layer in config.layers_without_rope if not 0 <= layer < config.num_layers]:
        raise UserError(f"model.layers_without_rope has {wrong}; the model has the layers 0 to {config.num_layers - 1}")


def _check_patches(name: str, modality: ModalityConfig) -> None:
    if modality.patch_size not in (1, 2, 4, 8):
        raise UserError(f"model.modalities.{name}.patch_size is {modality.patch_size}; known: 1, 2, 4, 8")
    widths, widths_needed = modality.unet_channels, modality.patch_size.bit_length()
    has_bad_width = any(width < 1 or width % UNET_GROUPS for width in widths)
    if modality.adapter == "unet" and (len(widths) < widths_needed or has_bad_width):
        raise UserError(
            f"model.modalities.{name}.unet_channels is {widths}; patch_size {modality.patch_size} needs "
            f"at least {widths_needed} widths, each a multiple of {UNET_GROUPS}"
        )
