"""A CLIP of toy size with random weights, as files."""

from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer


def save_tiny_clip(folder: Path) -> Path:
    """Write model and processor into `folder`: images of 32 px, a context of 32 tokens, bytes as vocabulary."""
    torch.manual_seed(0)
    # CLIP's vocabulary has every byte twice: inside a word and at its end.
    words = [byte + end for end in ("", "</w>") for byte in sorted(ByteLevel.alphabet())]
    words += ["<|startoftext|>", "<|endoftext|>"]
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    start, end = len(words) - 2, len(words) - 1
    text = {"vocab_size": len(words), "max_position_embeddings": 32, "bos_token_id": start, "eos_token_id": end}
    config = CLIPConfig(
        text_config={**sizes, **text, "pad_token_id": end},
        vision_config={**sizes, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    CLIPModel(config).save_pretrained(folder)
    tokenizer = CLIPTokenizer(vocab={word: index for index, word in enumerate(words)}, merges=[])
    crop = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(image_processor=crop, tokenizer=tokenizer).save_pretrained(folder)
    return folder
