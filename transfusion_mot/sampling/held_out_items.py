"""Example items of sources: evenly spaced media with their texts."""

from typing import cast

import numpy as np
from PIL import Image

from transfusion_mot.data.mixture import Sources
from transfusion_mot.data.sources.base import ImageSet, MediaItem, MediaSet, Text
from transfusion_mot.errors import UserError


def pictures_of(sources: Sources, modality: str, count: int) -> tuple[list[Image.Image], list[str]]:
    """Evenly spaced captioned images of a modality, as the model sees them, with their first captions. Missing files
    are skipped."""
    pictures, captions = [], []
    for media, index, caption in evenly_spaced(sources, modality, count):
        try:
            picture = Image.fromarray(cast(ImageSet, media).image(index))
        except UserError:
            continue
        pictures.append(picture)
        captions.append(caption)
    return pictures, captions


def captions_of(sources: Sources, modality: str, count: int) -> list[str]:
    """The first texts of evenly spaced media of a modality."""
    return [text for _, _, text in evenly_spaced(sources, modality, count)]


def evenly_spaced(sources: Sources, modality: str, count: int) -> list[tuple[MediaSet, int, str]]:
    """(media, index, first text) of evenly spaced documents that pair a text with media of a modality."""
    documents = [
        source.documents
        for source in sources.sources
        if source.documents.is_paired and modality in source.documents.media
    ]
    ends = np.cumsum([len(source) for source in documents])
    total = int(ends[-1]) if documents else 0
    places = np.unique(np.linspace(0, total - 1, count).round().astype(int)) if total else np.zeros(0, int)
    found = []
    for place in places.tolist():
        which = int(np.searchsorted(ends, place, side="right"))
        own = documents[which]
        items = own.document(place - int(ends[which]) + len(own))
        text = next((item for item in items if isinstance(item, Text)), None)
        # A document with several media may lack some of them.
        media = next((item for item in items if isinstance(item, MediaItem) and item.modality == modality), None)
        if text is not None and media is not None:
            found.append((own.media[modality], media.index, text.choices[0]))
    return found


def printable(text: str) -> str:
    """A printable form of a model's text, which may have arbitrary bytes early in a run."""
    return "".join(character if character.isprintable() else "?" for character in text) or "(nothing)"
