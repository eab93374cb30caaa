"""The tasks of a protocol: prompts to paint, images to caption, and real images to compare with."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from transfusion_mot.config import TEXT, DataConfig
from transfusion_mot.data.mixture import Sources
from transfusion_mot.data.sources.base import CaptionedImages
from transfusion_mot.data.sources.open import media_of
from transfusion_mot.errors import UserError
from transfusion_mot.evaluation.features.sets import SavedStatistics, open_reference
from transfusion_mot.evaluation.images import ImageSource
from transfusion_mot.evaluation.protocol.config import ProtocolConfig
from transfusion_mot.evaluation.protocol.prompts import (
    CaptionedImage,
    Prompt,
    choose_coco_prompts,
    dpg_prompts,
    geneval_prompts,
    prompts_of,
    read_coco,
    read_geneval,
    read_karpathy,
    read_text_prompts,
)
from transfusion_mot.installed import shipped


@dataclass(frozen=True)
class HeldOut:
    """Held-out captioned images of a run.

    Attributes:
        items: Source and index of each.
        real: What is written to `real/`: a file name and the first caption of each.
    """

    items: list[tuple[CaptionedImages, int]]
    real: list[Prompt]

    def make(self, batch: Sequence[Prompt]) -> list[Image.Image]:
        """The real images, as `write_images` needs them."""
        place = {prompt.file_name: item for prompt, item in zip(self.real, self.items, strict=True)}
        return [Image.fromarray(images.image(index)) for images, index in (place[p.file_name] for p in batch)]


@dataclass(frozen=True)
class Assignment:
    """The tasks of an evaluation.

    Attributes:
        prompts: Prompts to paint.
        captioned: Images to caption.
        references: Real images; None if there are none to compare with.
        own: The real images of the prompts, each once, with the file names of their reconstructions.
        geneval: Lines of GenEval's prompts, if they are the prompts.
        held_out: Held-out images, if the images are the run's own data.
    """

    prompts: list[Prompt]
    captioned: list[CaptionedImage]
    references: Sequence[ImageSource] | SavedStatistics | None
    own: list[Prompt]
    geneval: list[dict[str, Any]]
    held_out: HeldOut | None


def picture_data(data: DataConfig, modality: str) -> DataConfig:
    """The data of a run without sources that have media but no pictures."""
    sources = [source for source in data.sources if not (media := media_of(source)) or modality in media]
    kept = {TEXT, modality}.union(*map(media_of, sources))
    slots = {name: count for name, count in data.slots.items() if name in kept}
    return replace(data, sources=sources, slots=slots)


def open_assignment(
    protocol: ProtocolConfig, sources: Sources | None, data: DataConfig | None, output: Path
) -> Assignment:
    """Read the prompts and images of a protocol.

    Args:
        protocol: The checked protocol.
        sources: Held-out documents of the run, if prompts are of kind `held_out`.
        data: Data section of the run, in the same case.
        output: Folder of the results; its `real/` will have the held-out images.

    Raises:
        UserError: A file is missing, or there are too few prompts or images.
    """
    held_out: HeldOut | None = None
    geneval: list[dict[str, Any]] = []
    if protocol.prompts.kind == "held_out":
        assert sources is not None
        assert data is not None
        held_out = _held_out(sources, data, protocol.num_images, protocol.seed)
        of = [
            CaptionedImage(output / "real" / prompt.file_name, images.captions(index), prompt.file_name)
            for prompt, (images, index) in zip(held_out.real, held_out.items, strict=True)
        ]
        prompts = prompts_of([item.captions[0] for item in of], protocol.images_per_prompt, protocol.seed, of)
    else:
        prompts, of, geneval = listed_prompts(protocol)
    references: Sequence[ImageSource] | SavedStatistics | None = [item.image for item in of] or None
    if protocol.references is not None:
        references = open_reference(protocol.references)
    first = {prompt.image: prompt for prompt in reversed(prompts) if prompt.image is not None}
    own = [prompt for prompt in prompts if prompt.image is not None and first[prompt.image] is prompt]
    return Assignment(prompts, _captioned(protocol, prompts, of), references, own, geneval, held_out)


def listed_prompts(protocol: ProtocolConfig) -> tuple[list[Prompt], list[CaptionedImage], list[dict[str, Any]]]:
    """Prompts in files, all images that the files name, and the lines of GenEval.

    Raises:
        UserError: The prompts are held-out documents of a run, or a file is missing or has another form.
    """
    config, count, seed, each = protocol.prompts, protocol.num_images, protocol.seed, protocol.images_per_prompt
    if config.kind == "held_out":
        raise UserError("prompts of kind 'held_out' belong to a run; give a protocol whose prompts are in a file")
    assert config.path is not None
    if config.kind == "coco":
        assert config.images is not None
        of = read_coco(config.path, config.images)
        return choose_coco_prompts(of, count, seed, each), of, []
    if config.kind == "geneval":
        lines = read_geneval(shipped(config.path))[:count]
        return geneval_prompts(lines, each, seed), [], lines
    if config.kind == "dpg":
        return dpg_prompts(config.path, count, each, seed), [], []
    return prompts_of(read_text_prompts(config.path)[:count], each, seed), [], []


def _held_out(sources: Sources, data: DataConfig, count: int | None, seed: int) -> HeldOut:
    documents = [(sources.sources[pool.source].documents, pool) for pool in sources.pools]
    items = [
        (images, pool.item(position))
        for images, pool in documents
        if isinstance(images, CaptionedImages)
        for position in range(pool.length)
    ]
    if count is not None and count < len(items):
        # Not the first ones, because a data set may be sorted, for example by style.
        chosen = sorted(range(len(items)), key=lambda place: _draw(seed, items[place]))[:count]
        items = [items[place] for place in sorted(chosen)]
    if len(items) < 2:
        raise UserError(
            f"{len(items)} captioned images are held out, but 2 are needed; raise data.held_out_fraction "
            f"({data.held_out_fraction}, for sources with 'use: split'), set 'use' of a source to split or held_out, "
            "or give other data by --prompts.run_config"
        )
    real = [
        Prompt(f"{place:05d}.png", images.captions(index)[0], 0, image_id=f"{images.fingerprint} {index}")
        for place, (images, index) in enumerate(items)
    ]
    return HeldOut(items, real)


def _draw(seed: int, item: tuple[CaptionedImages, int]) -> bytes:
    """A random number that depends on the item, not on its place."""
    images, index = item
    return hashlib.sha256(f"{seed} {images.captions(index)[0]}".encode()).digest()


def _captioned(
    protocol: ProtocolConfig, prompts: Sequence[Prompt], of: Sequence[CaptionedImage]
) -> list[CaptionedImage]:
    captions = protocol.captions
    if captions.kind == "karpathy":
        assert captions.path is not None
        assert captions.images is not None
        return read_karpathy(captions.path, captions.images)
    if captions.kind == "none":
        return []
    painted = {prompt.image for prompt in prompts}
    return [item for item in of if item.image in painted]
