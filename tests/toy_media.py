"""Documents of four modalities in memory: text, two of latents, codes of different lengths; and rows of them."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from transfusion_mot.config import TEXT, DataConfig, ModalityConfig, ModelConfig, TowerConfig
from transfusion_mot.data.mixture import Source, Sources
from transfusion_mot.data.packing import Packer
from transfusion_mot.data.sources.base import MediaItem, Text
from transfusion_mot.data.tokenizer import TextTokenizer, train_tokenizer

# Shape of the latents of each modality that has some, and their patches of two by two; speech has codes.
SHAPES = {"depth": (2, 2, 4), "image": (3, 4, 4)}
PATCHES = {"depth": 2, "image": 4}
START, END = 1000, 1001
MODALITIES = (TEXT, "depth", "image", "speech")


def model_config(rope: Literal["1d", "3d"] = "1d") -> ModelConfig:
    """A tower for each modality; text comes first in a row, then the others by name."""
    return ModelConfig(
        towers={name: TowerConfig(16, 24) for name in MODALITIES},
        modalities={name: ModalityConfig(name, "diffusion" if name in SHAPES else "next_token") for name in MODALITIES},
        num_layers=1,
        num_heads=2,
        head_dim=8,
        rope=rope,
    )


def four_modality_tokenizer() -> TextTokenizer:
    """Without merges: a text of n ASCII characters has n tokens."""
    return train_tokenizer(["a"], 256 + 3 + 6, MODALITIES)


class Media:
    """Stands for the media of one modality of a source and for their encoded form.

    Latents are all `index`; codes are all `index`, as many as `lengths` says.
    """

    def __init__(self, modality: str, lengths: Sequence[int]) -> None:
        self.kind = "latents" if modality in SHAPES else "codes"
        self.modality, self.lengths = modality, lengths
        self.name = self.fingerprint = modality
        self.skipped: dict[str, int] = {}
        self.buckets = np.zeros(len(lengths), dtype=np.int16)
        self.readable = np.ones(len(lengths), dtype=np.bool_)

    def __len__(self) -> int:
        return len(self.lengths)

    def posterior(self, index: int, flipped: bool = False) -> tuple[np.ndarray, np.ndarray]:
        mean = np.full(SHAPES[self.modality], index, dtype=np.float16)
        return mean, np.zeros_like(mean)

    def span(self, index: int, flipped: bool = False) -> list[int]:
        return [START, *[index] * self.lengths[index], END]


class ToyDocuments:
    """Documents of texts and media, all in order or all of one thing each."""

    def __init__(
        self, name: str, documents: list[list[Text | MediaItem]], media: dict[str, Media], is_paired: bool
    ) -> None:
        self.name, self.documents, self.media, self.is_paired = name, documents, media, is_paired
        self.documents_fingerprint, self.skipped = repr(documents), {}
        has_text = any(isinstance(item, Text) for document in documents for item in document)
        self.modalities = (*([TEXT] if has_text else []), *media)

    def __len__(self) -> int:
        return len(self.documents)

    def document(self, index: int) -> list[Text | MediaItem]:
        return self.documents[index]


def source_of(
    name: str,
    documents: list[list[str | tuple[str, int]]],
    *,
    is_paired: bool = False,
    weight: float = 1.0,
) -> Source:
    """A source of documents of texts, and of media by modality and number of codes (of latents any number).

    Media of a modality are numbered from 0 in the order in which they come.
    """
    lengths: dict[str, list[int]] = {}
    made: list[list[Text | MediaItem]] = []
    for document in documents:
        made.append([])
        for item in document:
            if isinstance(item, str):
                made[-1].append(Text([item]))
            else:
                modality, length = item
                made[-1].append(MediaItem(modality, len(lengths.setdefault(modality, []))))
                lengths[modality].append(length)
    media = {modality: Media(modality, counts) for modality, counts in lengths.items()}
    return Source(ToyDocuments(name, made, media, is_paired), weight, dict(media))


def toy_packer(
    sources: list[Source],
    tokenizer: TextTokenizer,
    slots: dict[str, int],
    *,
    lanes: int = 1,
    seed: int = 0,
    rope: Literal["1d", "3d"] = "1d",
    **data: Any,
) -> Packer:
    """Builds rows of all four modalities."""
    latent_shapes = {name: [shape] for name, shape in SHAPES.items()}
    return Packer(
        Sources(sources, latent_shapes),
        tokenizer,
        DataConfig(slots=slots, **data),
        model_config(rope),
        num_lanes=lanes,
        seed=seed,
        timesteps_from_uniform=lambda uniform: uniform,
    )


def mixed_sources() -> list[Source]:
    """Every kind: captions of one or several media, documents in order, only texts, and only codes."""
    captioned = [["sun", ("image", 0)], ["a car goes by", ("speech", 9), ("image", 0)], ["fox", ("depth", 0)]]
    in_order = [["one", ("image", 0), "two", ("speech", 5), ("depth", 0), "three"], [("speech", 3), "x" * 40]]
    return [
        source_of("captioned", captioned * 3, is_paired=True, weight=2.0),
        source_of("in order", in_order * 2),
        source_of("texts", [["t" * 9], ["some words"]]),
        source_of("speech", [[("speech", 30)], [("speech", 2)], [("speech", 11)]]),
    ]


MIXED_SLOTS = {TEXT: 40, "image": 3, "depth": 2, "speech": 26}


def block_starts(slots: dict[str, int]) -> dict[str, range]:
    """The slots of each modality in a row, in the order of the row."""
    ranges, start = {}, 0
    for name in MODALITIES:
        length = slots[name] * PATCHES.get(name, 1)
        ranges[name] = range(start, start + length)
        start += length
    return ranges
