"""From the configured sources to what rows are filled from."""

from collections.abc import Iterator
from typing import Literal

from transfusion_mot.autoencoder import Autoencoder
from transfusion_mot.config import AutoencoderConfig, DataConfig
from transfusion_mot.data.latents import cached_latents
from transfusion_mot.data.packing import Sources
from transfusion_mot.data.sources import load_captioned_images, load_text_documents
from transfusion_mot.errors import UserError

Split = Literal["train", "held_out"]


def open_sources(data: DataConfig, autoencoder: Autoencoder, config: AutoencoderConfig, split: Split) -> Sources:
    """Open every source of a split, images as latents; a source of which nothing is held out is left out.

    Raises:
        UserError: No source has images to train on.
    """
    sources = Sources([], [])
    for source in data.sources:
        if source.kind == "text":
            texts = load_text_documents(source, data, split)
            if len(texts):
                sources.texts.append(texts)
                sources.text_weights.append(source.weight)
            continue
        images = load_captioned_images(source, data, split)
        if len(images) or split == "train":
            sources.images.append(cached_latents(images, autoencoder, data.cache_dir, config.batch_size))
            sources.image_weights.append(source.weight)
    if split == "train" and not sources.images:
        raise UserError("data.sources has no source with images; add one of kind openmoji or imagefolder")
    return sources


def training_texts(data: DataConfig) -> Iterator[str]:
    """Every caption and text of the training split, from which a tokenizer is trained."""
    for source in data.sources:
        if source.kind == "text":
            documents = load_text_documents(source, data, "train")
            yield from (documents.text(index) for index in range(len(documents)))
        else:
            yield from load_captioned_images(source, data, "train").captions
