"""Tiny language models of transformers, with random weights, saved as a user would have them.

`python tests/language_models.py FOLDER` writes all of them.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

VOCAB_SIZE = 307
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 500000.0,
}
# Name: configuration class, and what is not as in `SIZES`.
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "Llama": (LlamaConfig, {"tie_word_embeddings": False}),
    "Llama 3, tied": (LlamaConfig, {"tie_word_embeddings": True, "rope_parameters": LLAMA3, "rms_norm_eps": 1e-2}),
    "Llama, biases, wide heads": (LlamaConfig, {"attention_bias": True, "head_dim": 20, "num_key_value_heads": 1}),
    "Llama, linear": (LlamaConfig, {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4}}),
    "Llama, dynamic": (LlamaConfig, {"rope_parameters": {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 1e4}}),
    "Qwen2, tied": (Qwen2Config, {"tie_word_embeddings": True, "rope_parameters": {"rope_theta": 1e6}}),
    "Qwen2, yarn": (Qwen2Config, {"rope_parameters": YARN}),
    "Qwen3": (Qwen3Config, {"head_dim": 12, "rms_norm_eps": 1e-3}),
    "Qwen3, biases": (Qwen3Config, {"attention_bias": True, "head_dim": 8, "tie_word_embeddings": True}),
    "Mistral": (MistralConfig, {"head_dim": 12, "sliding_window": None}),
    "Mistral, window": (MistralConfig, {"sliding_window": 128}),
    "SmolLM3": (
        SmolLM3Config,
        {"no_rope_layer_interval": 2, "pad_token_id": None, "bos_token_id": None, "eos_token_id": 0},
    ),
}


def language_model(case: str) -> PreTrainedModel:
    """One of `CASES`; all its parameters are random, norms and biases, too."""
    config_class, changes = CASES[case]
    config = config_class(**(SIZES | changes))
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(drawn * 1.5 * parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 1 + 0.3 * drawn)
    return model.eval()


def tokenizer(begins_with_bos: bool, spare: int = 8, *, has_bos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE with `VOCAB_SIZE - spare` ids, 3 of them special; it may have a begin of text and not use it."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|begin|>", "<|im_end|>"]
    texts = ["red apple, large octopus, small blue elephant, yellow keyboard, purple banana"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - spare, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts * 3, trainer)
    assert backend.get_vocab_size() == VOCAB_SIZE - spare
    bos = "<|begin|>" if begins_with_bos or has_bos else None
    if begins_with_bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", backend.token_to_id("<|begin|>"))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", bos_token=bos)


def save_language_model(
    folder: Path, case: str, *, begins_with_bos: bool = True, spare: int = 8, **kwargs: Any
) -> PreTrainedModel:
    """Write a language model with its tokenizer."""
    model = language_model(case)
    model.save_pretrained(folder, **kwargs)
    tokenizer(begins_with_bos, spare).save_pretrained(folder)
    return model


if __name__ == "__main__":
    for name in CASES:
        save_language_model(Path(sys.argv[1]) / name.lower().replace(",", "").replace(" ", "-"), name)
