"""Export the text tower of a snapshot as a causal language model of transformers."""

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from transfusion_mot.config import TEXT, ModelConfig
from transfusion_mot.errors import UserError
from transfusion_mot.files import find_snapshot
from transfusion_mot.models.lora import base_parameters
from transfusion_mot.models.pretrained import tensor_names
from transfusion_mot.models.transfusion import TransfusionMoT
from transfusion_mot.pipeline import TransfusionPipeline
from transfusion_mot.training.checkpoint import atomic_folder

# The value of tokenizers without a maximum length.
_NO_LENGTH = 10**9


def export_language_model(checkpoint: str, output: Path, dtype: torch.dtype) -> dict[str, int]:
    """Write the text tower, its embedding, head and tokenizer => bytes of every weights file.

    Args:
        checkpoint: A run folder or a snapshot.
        output: Folder of the new model; its contents are replaced.
        dtype: Number format of the weights.

    Raises:
        UserError: There is no such snapshot, or transformers has no equivalent model.
    """
    pipeline = load_fused(find_snapshot(checkpoint))
    tokenizer = pipeline.text_tokenizer
    config = language_model_config(pipeline.transformer)
    config.eos_token_id, config.bos_token_id = tokenizer.eos_id, tokenizer.bos_id
    config.pad_token_id = tokenizer.hf.pad_token_id
    length = tokenizer.hf.model_max_length
    if pipeline.transformer.architecture.max_position_embeddings is None and length < _NO_LENGTH:
        config.max_position_embeddings = int(length)
    with torch.device("meta"):
        model = cast(PreTrainedModel, AutoModelForCausalLM.from_config(config))
    model.load_state_dict(tensors_of(pipeline.transformer), assign=True, strict=not config.tie_word_embeddings)
    model.tie_weights()
    model.to(dtype)
    model.config.dtype = dtype
    model.generation_config = GenerationConfig.from_model_config(config)
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(output) as folder:
        model.save_pretrained(folder)
        tokenizer.save(folder)
    return {str(path.relative_to(output)): path.stat().st_size for path in sorted(output.rglob("*.safetensors"))}


def load_fused(snapshot: Path) -> TransfusionPipeline:
    """Load a snapshot, with its active adapters fused into the weights.

    Raises:
        UserError: It cannot be loaded.
    """
    pipeline = TransfusionPipeline.from_pretrained(snapshot)
    if pipeline.get_active_adapters():
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
    return pipeline


def tensors_of(model: TransfusionMoT) -> dict[str, Tensor]:
    """The tensors of the text tower under the names of transformers; they share memory with the model's tensors."""
    config, parameters = model.architecture, base_parameters(model)
    heads, kv_heads = config.num_heads, config.num_kv_heads or config.num_heads
    sizes = [config.head_dim * count for count in (heads, kv_heads, kv_heads)]
    tensors: dict[str, Tensor] = {}
    for own, names in tensor_names(config, config.modalities[TEXT].tower).items():
        parts = parameters[own].detach().split(sizes) if len(names) > 1 else (parameters[own].detach(),)
        tensors.update(zip(names, parts, strict=True))
    return tensors


def language_model_config(model: TransfusionMoT) -> PreTrainedConfig:
    """The transformers configuration of a model that is equivalent to the text tower on texts.

    Raises:
        UserError: There is none.
    """
    config = model.architecture
    tower = config.modalities[TEXT].tower
    settings = config.towers[tower]
    if len(set(config.untied)) < 4 and len(config.towers) > 1:
        raise UserError(
            f"the towers share weights (model.untied is {config.untied}), but a language model needs its own"
        )
    config_class, fields = _family(config, tower)
    if config.max_position_embeddings is not None:
        fields["max_position_embeddings"] = config.max_position_embeddings
    return config_class(
        vocab_size=model.config["sizes"][TEXT],
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads or config.num_heads,
        head_dim=config.head_dim,
        rms_norm_eps=config.norm_eps_of(tower),
        rope_parameters={"rope_type": "default", **(config.rope_scaling or {}), "rope_theta": config.rope_theta},
        tie_word_embeddings=config.modalities[TEXT].tied_embeddings,
        **fields,
    )


def _family(config: ModelConfig, tower: str) -> tuple[type[PreTrainedConfig], dict[str, Any]]:
    """The transformers class for a tower, and its special fields."""
    settings, without_rope = config.towers[tower], config.layers_without_rope
    both = settings.qkv_bias == settings.output_bias
    biases = {"attention_bias": settings.output_bias}
    if config.has_qk_norm(tower) and both and not without_rope:
        return Qwen3Config, biases
    if not config.has_qk_norm(tower):
        if without_rope and both:
            layers = [int(layer not in without_rope) for layer in range(config.num_layers)]
            return SmolLM3Config, {"no_rope_layers": layers, "pad_token_id": None, **biases}
        if settings.qkv_bias and not settings.output_bias and not without_rope:
            return Qwen2Config, {}
        if both and not without_rope:
            # The width of a Llama must be a multiple of its number of heads.
            is_llama = settings.hidden_size % config.num_heads == 0
            if is_llama:
                return LlamaConfig, biases
            if not settings.qkv_bias:
                return MistralConfig, {"sliding_window": None}
    raise UserError(
        "transformers has no language model with the features of the text tower: "
        f"qk_norm={config.has_qk_norm(tower)}, qkv_bias={settings.qkv_bias}, output_bias={settings.output_bias}, "
        f"layers_without_rope={without_rope}, hidden_size={settings.hidden_size} and {config.num_heads} heads"
    )
