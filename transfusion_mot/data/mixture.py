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
    """Open every source of a split, images as latents.

    Raises:
        UserError: No source has images.
    """
    of_images = [source for source in data.sources if source.kind != "text"]
    of_text = [source for source in data.sources if source.kind == "text"]
    if not of_images:
        raise UserError("data.sources has no source with images; add one of kind openmoji or imagefolder")
    return Sources(
        images=[
            cached_latents(load_captioned_images(source, data, split), autoencoder, data.cache_dir, config.batch_size)
            for source in of_images
        ],
        image_weights=[source.weight for source in of_images],
        texts=[load_text_documents(source, data, split) for source in of_text],
        text_weights=[source.weight for source in of_text],
    )


def training_texts(data: DataConfig) -> Iterator[str]:
    """Every caption and text of the training split, from which a tokenizer is trained."""
    for source in data.sources:
        if source.kind == "text":
            documents = load_text_documents(source, data, "train")
            yield from (documents.text(index) for index in range(len(documents)))
        else:
            yield from load_captioned_images(source, data, "train").captions
