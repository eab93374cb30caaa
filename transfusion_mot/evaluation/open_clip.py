"""A CLIP in open_clip's format, as HPSv2's authors publish theirs => a CLIP of transformers."""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

from transfusion_mot.errors import UserError
from transfusion_mot.evaluation.clip_score import Clip
from transfusion_mot.evaluation.weights import weights_hash
from transfusion_mot.hub_names import ask_hub

# Of ViT-H/14, the only network of HPSv2: widths of its towers of images and text, and the heads of both, which the
# weights do not say.
_WIDTHS, _NUM_HEADS = (1280, 1024), 16

_RENAMED = {
    r"^visual\.transformer\.resblocks\.": "vision_model.encoder.layers.",
    r"^transformer\.resblocks\.": "text_model.encoder.layers.",
    r"^visual\.conv1\.": "vision_model.embeddings.patch_embedding.",
    r"^visual\.positional_embedding$": "vision_model.embeddings.position_embedding.weight",
    r"^visual\.class_embedding$": "vision_model.embeddings.class_embedding",
    r"^visual\.ln_pre\.": "vision_model.pre_layrnorm.",
    r"^visual\.ln_post\.": "vision_model.post_layernorm.",
    r"^token_embedding\.": "text_model.embeddings.token_embedding.",
    r"^positional_embedding$": "text_model.embeddings.position_embedding.weight",
    r"^ln_final\.": "text_model.final_layer_norm.",
    r"\.attn\.": ".self_attn.",
    r"\.ln_([12])\.": r".layer_norm\1.",
    r"\.mlp\.c_fc\.": ".mlp.fc1.",
    r"\.mlp\.c_proj\.": ".mlp.fc2.",
}
# Matrices that open_clip multiplies from the right.
_TRANSPOSED = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}


def load_hpsv2_file(path: str, tokenizer: str, device: torch.device) -> Clip:
    """Load the published file of HPSv2 or HPSv2.1.

    Args:
        path: The `.pt` file.
        tokenizer: CLIP model of transformers, a name or folder. Its tokenizer is used, because the file has none; all
            models of CLIP have the same tokenizer.
        device: Device of the model.

    Raises:
        UserError: The file cannot be read or has other weights, or there is no tokenizer.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = _renamed(state.get("state_dict", state))
        config = _config(state)
        model, loading = CLIPModel.from_pretrained(
            None, config=config, state_dict=state, dtype=torch.float32, output_loading_info=True
        )
    # Parsers of damaged and other files raise any error.
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"'{path}' does not hold a CLIP in open_clip's format, as HPSv2 is published: {reason}"
        ) from None
    widths = config.vision_config.hidden_size, config.text_config.hidden_size
    if widths != _WIDTHS:
        raise UserError(f"'{path}' holds a CLIP of the widths {widths}; HPSv2's are {_WIDTHS} (ViT-H/14)")
    if loading["missing_keys"] or loading["unexpected_keys"]:
        first = sorted({*loading["missing_keys"], *loading["unexpected_keys"]})[0]
        raise UserError(f"'{path}' has other weights than HPSv2's CLIP, first '{first}'")
    try:
        ask_hub(tokenizer)
        words = AutoTokenizer.from_pretrained(tokenizer)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split()).split(". ")[0]
        raise UserError(
            f"'{path}' has no tokenizer, and that of '{tokenizer}' cannot be loaded ({reason}); give the folder of a "
            "CLIP model with --clip, whose tokenizer is the same"
        ) from None
    size = config.vision_config.image_size
    crop = CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    weights = weights_hash(model)
    model = model.to(device).eval().requires_grad_(False)
    return Clip(Path(path).name, weights, model, CLIPProcessor(image_processor=crop, tokenizer=words), device)


def _renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of open_clip's CLIP by their names in transformers."""
    found: dict[str, Tensor] = {}
    for name, weight in state.items():
        if name in _TRANSPOSED:
            found[_TRANSPOSED[name]] = weight.T.contiguous()
            continue
        for pattern, replacement in _RENAMED.items():
            name = re.sub(pattern, replacement, name)
        if ".in_proj_" not in name:
            found[name] = weight
            continue
        for part, third in zip("qkv", weight.chunk(3), strict=True):
            found[name.replace("in_proj_", f"{part}_proj.")] = third.contiguous()
    return found


def _config(state: Mapping[str, Tensor]) -> CLIPConfig:
    """The sizes of a model, by the shapes of its weights."""

    def tower(name: str) -> dict[str, int | str]:
        layers = {key.split(".")[3] for key in state if key.startswith(f"{name}.encoder.layers.")}
        inner, width = state[f"{name}.encoder.layers.0.mlp.fc1.weight"].shape
        sizes = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": len(layers)}
        return {**sizes, "num_attention_heads": _NUM_HEADS, "hidden_act": "gelu"}

    vocab_size, context = (
        state[f"text_model.embeddings.{kind}_embedding.weight"].shape[0] for kind in ("token", "position")
    )
    patch = state["vision_model.embeddings.patch_embedding.weight"].shape[-1]
    patches = state["vision_model.embeddings.position_embedding.weight"].shape[0] - 1
    # The text is read at its end token, which is the last of the vocabulary.
    text = {"vocab_size": vocab_size, "max_position_embeddings": context, "bos_token_id": vocab_size - 2}
    ends = {"eos_token_id": vocab_size - 1, "pad_token_id": vocab_size - 1}
    return CLIPConfig(
        text_config=tower("text_model") | text | ends,
        vision_config=tower("vision_model") | {"image_size": round(patches**0.5) * patch, "patch_size": patch},
        projection_dim=state["text_projection.weight"].shape[0],
    )
