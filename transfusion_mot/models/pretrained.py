"""Causal language models of transformers as the text tower: their sizes, their weights, and the export.

Supported models are like Llama: RMSNorm before attention and feed-forward, rotary positions, a gated feed-forward with
SiLU. Other families are refused by name.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig

from transfusion_mot.config import TEXT, ModelConfig
from transfusion_mot.errors import UserError
from transfusion_mot.hub_names import download, refuse_missing_path
from transfusion_mot.models.architecture import ROPE_TYPES
from transfusion_mot.models.initial_weights import WeightFiles, WeightReport
from transfusion_mot.models.lora import base_parameters
from transfusion_mot.models.transfusion import TransfusionMoT

FAMILIES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "SmolLM3ForCausalLM")
_EXPERTS = "its feed-forwards are routed experts"
_OLMO = "its norms come after attention and feed-forward, and those of queries and keys cover all heads"
_GEMMA = "its norms multiply by 1 + weight, its feed-forward has GELU, and its embeddings are multiplied by a constant"
# Why the best-known other families do not fit. (Phi-3 would fit if its fused matrices were split.)
_REFUSED = {
    "GemmaForCausalLM": _GEMMA,
    "Gemma2ForCausalLM": f"{_GEMMA}; it also has norms behind each layer, sliding windows and capped logits",
    "Gemma3ForCausalLM": f"{_GEMMA}; it also has norms behind each layer, sliding windows and two kinds of frequencies",
    "OlmoForCausalLM": "its norms are LayerNorms",
    "Olmo2ForCausalLM": _OLMO,
    "Olmo3ForCausalLM": _OLMO,
    "MixtralForCausalLM": _EXPERTS,
    "Qwen2MoeForCausalLM": _EXPERTS,
    "Qwen3MoeForCausalLM": _EXPERTS,
    "OlmoeForCausalLM": _EXPERTS,
    "GPT2LMHeadModel": "it has LayerNorms and learned positions",
}
_PATTERNS = ["*.json", "tokenizer*", "*.model", "*.txt"]


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model of transformers.

    Attributes:
        name: The given folder or name on the Hugging Face hub.
        folder: Folder of its files.
        family: Its class in transformers.
        config: Its configuration.
    """

    name: str
    folder: Path
    family: str
    config: PreTrainedConfig

    @classmethod
    def open(cls, name: str) -> "LanguageModel":
        """Find a model and read its configuration.

        Raises:
            UserError: It does not exist, is not a language model, or is not equivalent to a tower.
        """
        folder = _find(name)
        try:
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{name} has a config.json that transformers cannot read ({' '.join(str(error).split())[:200]}); give "
                "the folder of a causal language model"
            ) from None
        family = (getattr(config, "architectures", None) or [type(config).__name__.replace("Config", "ForCausalLM")])[0]
        _check(name, family, config)
        return cls(name, folder, family, config)

    def sections(self, tower: str) -> dict[str, Any]:
        """Sections of a run's configuration that follow from it, nested as in YAML.

        Args:
            tower: The tower of text.
        """
        config, bias = self.config, bool(getattr(self.config, "attention_bias", False))
        rope = {key: value for key, value in config.rope_parameters.items() if value is not None and key != "type"}
        theta = float(rope.pop("rope_theta"))
        rope.pop("partial_rotary_factor", None)
        uses_rope = getattr(config, "no_rope_layers", None) or [1] * config.num_hidden_layers
        return {
            "model": {
                "num_layers": config.num_hidden_layers,
                "num_heads": config.num_attention_heads,
                "num_kv_heads": config.num_key_value_heads or config.num_attention_heads,
                "head_dim": self.head_dim,
                "rope_theta": theta,
                "rope_scaling": rope,
                "layers_without_rope": [layer for layer, uses in enumerate(uses_rope) if not uses],
                "max_position_embeddings": self._longest(),
                "towers": {
                    tower: {
                        "hidden_size": config.hidden_size,
                        "intermediate_size": config.intermediate_size,
                        "norm_eps": config.rms_norm_eps,
                        "qk_norm": self.family == "Qwen3ForCausalLM",
                        "qkv_bias": bias or self.family == "Qwen2ForCausalLM",
                        "output_bias": bias,
                    }
                },
                "modalities": {
                    TEXT: {
                        "tower": tower,
                        "tied_embeddings": bool(config.tie_word_embeddings),
                        "vocab_size": config.vocab_size,
                    }
                },
            },
            "tokenizer": {"path": self.name},
        }

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        own: int | None = getattr(self.config, "head_dim", None)
        return own or self.config.hidden_size // self.config.num_attention_heads

    def _longest(self) -> int | None:
        """Maximum rotary positions without a sliding window or changed frequencies; None is no limit."""
        config = self.config
        limits = []
        # Those of Mistral have no kinds of layers: all have the window.
        kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
        if getattr(config, "sliding_window", None) is not None and "sliding_attention" in kinds:
            limits.append(config.sliding_window)
        if config.rope_parameters["rope_type"] == "dynamic":
            limits.append(config.max_position_embeddings)
        return min(limits, default=None)

    def fill(self, model: TransfusionMoT, tower: str, report: WeightReport) -> None:
        """Load its weights into a tower, whole or sharded, one tensor after the other; called by all processes.

        Raises:
            UserError: A file is missing or damaged, or its weights do not fit its own configuration.
        """
        files = WeightFiles(self._with_weights(), "model")
        parameters, known = base_parameters(model), set(files.names)
        used = set()
        for name, sources in tensor_names(model.architecture, tower).items():
            used.update(sources)
            if not known.issuperset(sources):
                report.missing[name] = ""
                continue
            # Queries, keys and values are one matrix here.
            tensor = (
                torch.cat([files.read(source) for source in sources]) if len(sources) > 1 else files.read(sources[0])
            )
            report.take_rows(name, parameters[name], tensor)
        is_tied = model.architecture.modalities[TEXT].tied_embeddings
        for name in sorted(known - used):
            reason = ""
            if name.endswith("rotary_emb.inv_freq"):
                reason = "computed from its configuration"
            if name == "lm_head.weight" and is_tied:
                reason = "its configuration uses the embedding instead"
            report.unexpected[name] = reason

    def _with_weights(self) -> Path:
        if Path(self.name).exists():
            return self.folder
        return download(self.name, ["*.safetensors", "*.safetensors.index.json"], "pretrained")


def tensor_names(config: ModelConfig, tower: str) -> dict[str, list[str]]:
    """Parameters of a tower and of text => the tensors of a language model that each of them stacks.

    Args:
        config: Of the model.
        tower: The tower of text, which owns all its components.
    """
    settings, names = config.towers[tower], {}

    def add(own: str, *sources: str) -> None:
        names[own] = list(sources)

    for layer in range(config.num_layers):
        own, source = f"blocks.{layer}", f"model.layers.{layer}"
        heads = f"{own}.qkv.owned.{tower}"
        add(f"{own}.attention_norm.owned.{tower}.weight", f"{source}.input_layernorm.weight")
        for kind in ["weight"] + ["bias"] * settings.qkv_bias:
            add(f"{heads}.linear.{kind}", *(f"{source}.self_attn.{part}_proj.{kind}" for part in "qkv"))
        if config.has_qk_norm(tower):
            add(f"{heads}.q_norm.weight", f"{source}.self_attn.q_norm.weight")
            add(f"{heads}.k_norm.weight", f"{source}.self_attn.k_norm.weight")
        for kind in ["weight"] + ["bias"] * settings.output_bias:
            add(f"{own}.output.owned.{tower}.{kind}", f"{source}.self_attn.o_proj.{kind}")
        add(f"{own}.ffn_norm.owned.{tower}.weight", f"{source}.post_attention_layernorm.weight")
        for part in ("gate", "up", "down"):
            add(f"{own}.ffn.owned.{tower}.{part}.weight", f"{source}.mlp.{part}_proj.weight")
    add(f"final_norm.owned.{tower}.weight", "model.norm.weight")
    add(f"modalities.{TEXT}.embedding.weight", "model.embed_tokens.weight")
    if not config.modalities[TEXT].tied_embeddings:
        add(f"modalities.{TEXT}.head.weight", "lm_head.weight")
    return names


def _find(name: str) -> Path:
    """The folder of a model's configuration and tokenizer.

    Raises:
        UserError: There is none.
    """
    folder = Path(name)
    if not folder.exists():
        refuse_missing_path(name, "pretrained")
        folder = download(name, _PATTERNS, "pretrained")
    if folder.suffix == ".gguf" or (
        folder.is_dir() and not (folder / "config.json").is_file() and any(folder.glob("*.gguf"))
    ):
        raise UserError(
            f"{name} is in GGUF, whose weights are rounded for inference; give the safetensors of the model"
        )
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{name} has no config.json; give the folder of a language model of transformers, or its name on the hub"
        )
    return folder


def _check(name: str, family: str, config: PreTrainedConfig) -> None:
    """Refuse models that are not equivalent to a tower.

    Raises:
        UserError: Names what it is.
    """
    if family not in FAMILIES:
        reason = f", which does not fit: {_REFUSED[family]}" if family in _REFUSED else ""
        raise UserError(f"{name} is a {family}{reason}; a tower can be one of {', '.join(FAMILIES)}")
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(f"{name} is quantised; give the model in bfloat16, float16 or float32")
    rope = config.rope_parameters
    rope_type = rope.get("rope_type", "default")
    if rope_type not in ROPE_TYPES:
        raise UserError(
            f"{name} has rotary positions of the type {rope_type}; a tower can have {', '.join(ROPE_TYPES)}"
        )
    for what, wrong in (
        (f"the activation {config.hidden_act}, and a tower has silu", config.hidden_act not in ("silu", "swish")),
        ("biases in its feed-forwards, and a tower has none", getattr(config, "mlp_bias", False)),
        ("rotary positions on a part of each head", rope.get("partial_rotary_factor", 1.0) != 1.0),
    ):
        if wrong:
            raise UserError(f"{name} does not fit: it has {what}; give another model")
