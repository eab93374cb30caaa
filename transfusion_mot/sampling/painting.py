"""Paint, reconstruct and caption many images with several processes, into folders that a later attempt continues."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image

from transfusion_mot.codecs.base import reconstruct as reconstruct_pixels
from transfusion_mot.data.images import ImageArray, to_pil, to_pixels
from transfusion_mot.evaluation.images import METADATA, load_rgb
from transfusion_mot.evaluation.protocol.prompts import CaptionedImage, Prompt, captioned_hash, prompts_hash
from transfusion_mot.evaluation.protocol.sample_files import (
    Make,
    caption_all,
    claim_folder,
    read_written_captions,
    write_captions,
    write_images,
    write_metadata,
)
from transfusion_mot.pipeline import TransfusionPipeline
from transfusion_mot.sampling.decoding import Decoding
from transfusion_mot.sampling.sizes import Size, by_size
from transfusion_mot.schedulers import sampler_name

# Settings that apply to only one kind of model.
OF_CODES = ("code_temperature", "code_top_p", "code_top_k")
OF_LATENTS = ("num_inference_steps", "guidance_interval", "scheduler")


@dataclass(frozen=True)
class SamplerSettings:
    """Settings of painting, named like the pipeline's arguments."""

    num_inference_steps: int
    guidance_scale: float
    guidance_interval: list[float]
    scheduler: str
    code_temperature: float = 1.0
    code_top_p: float = 1.0
    code_top_k: int = 0

    def decoding(self) -> Decoding:
        """Settings for drawing codes.

        Raises:
            UserError: A value is out of its range.
        """
        return Decoding(1, self.code_temperature, self.code_top_p, self.code_top_k)


@dataclass(frozen=True)
class Painter:
    """A model with the processes that share its work; all of them call each method.

    Attributes:
        pipeline: The model.
        checkpoint: Hash of its files.
        processes: Processes that share the images.
        batch_size: Images in a batch.
    """

    pipeline: TransfusionPipeline
    checkpoint: str
    processes: PartialState
    batch_size: int

    def paint(
        self, prompts: Sequence[Prompt], sampling: SamplerSettings, folder: Path, image_size: int | None = None
    ) -> None:
        """Paint prompts with the pipeline's scheduler, which must be the one of `sampling`.

        A prompt beyond the model's maximum length is read without its last words; see `shortened`.

        Args:
            prompts: Prompts to paint; their real images, if any, are already stored.
            sampling: Settings of painting.
            folder: Folder of the images.
            image_size: Height and width; None paints each prompt at the size at which training would read its real
                image, or at the default size.

        Raises:
            UserError: The folder holds images of other settings.
        """

        sizes = self.pipeline.sizes

        def size_of(prompt: Prompt) -> Size:
            if image_size is not None:
                return image_size, image_size
            return sizes.default if prompt.image is None else sizes.of(prompt.image)

        def make(batch: Sequence[Prompt]) -> list[Image.Image]:
            def paint(places: list[int], size: Size) -> list[Image.Image]:
                images: list[Image.Image] = self.pipeline(
                    [self.shortened(batch[place].text) for place in places],
                    sampling.num_inference_steps,
                    sampling.guidance_scale,
                    height=size[0],
                    width=size[1],
                    guidance_interval=cast(tuple[float, float], tuple(sampling.guidance_interval)),
                    code_temperature=sampling.code_temperature,
                    code_top_p=sampling.code_top_p,
                    code_top_k=sampling.code_top_k,
                    generator=[torch.Generator().manual_seed(batch[place].image_seed) for place in places],
                ).images
                return images

            return by_size([size_of(prompt) for prompt in batch], paint)

        assert sampler_name(self.pipeline.scheduler) == sampling.scheduler
        settings = {"checkpoint": self.checkpoint, "prompts": prompts_hash(prompts), **self.told(sampling)}
        if len(sizes.trained) > 1:
            settings["image_size"] = image_size
        self._write(prompts, folder, make, description="painting", settings=settings)

    def told(self, sampling: SamplerSettings) -> dict[str, Any]:
        """The settings that the model uses: of reverse steps, or of drawing codes."""
        idle = self.idle
        return {name: value for name, value in vars(sampling).items() if name not in idle}

    @property
    def idle(self) -> tuple[str, ...]:
        """Names of the settings that have no effect on the model."""
        return OF_LATENTS if self.pipeline.codec.kind == "codes" else OF_CODES

    def shortened(self, text: str) -> str:
        """A prompt cut after the last word that fits the model."""
        words = text.split(" ")
        while len(words) > 1 and not self.pipeline.is_short_enough(" ".join(words)):
            words.pop()
        return " ".join(words)

    def copy(self, prompts: Sequence[Prompt], folder: Path, make: Make) -> None:
        """Write existing images, such as those of a data set.

        Raises:
            UserError: The folder holds other images.
        """
        settings = {"images": prompts_hash(prompts)}
        self._write(prompts, folder, make, description="real images", settings=settings)

    def reconstruct(self, prompts: Sequence[Prompt], image_size: int | None, folder: Path) -> None:
        """Write the real images of prompts, encoded and decoded by the codec.

        Args:
            prompts: Prompts that each have an image.
            image_size: Size of the images; None is the size at which training would read each of them.
            folder: Folder of the results, under the file names of the prompts.

        Raises:
            UserError: An image cannot be read, or the folder holds others.
        """
        codec, device = self.pipeline.codec, self.pipeline.device

        def make(batch: Sequence[Prompt]) -> list[Image.Image]:
            images = [self._real(prompt, image_size) for prompt in batch]

            def reconstruct(places: list[int], _: Size) -> list[Image.Image]:
                pixels = to_pixels(np.stack([images[place] for place in places])).to(device)
                return to_pil(reconstruct_pixels(codec, pixels))

            return by_size([image.shape[:2] for image in images], reconstruct)

        settings = {"checkpoint": self.checkpoint, "images": prompts_hash(prompts), "image_size": image_size}
        self._write(prompts, folder, make, description="reconstructing", settings=settings)

    def _real(self, prompt: Prompt, image_size: int | None) -> ImageArray:
        """The image of a prompt, `uint8 [H, W, 3]`."""
        assert prompt.image is not None
        if image_size is not None:
            # Cropped like the references, which differ by half a pixel otherwise.
            return load_rgb(prompt.image, image_size)
        return self.pipeline.sizes.read(prompt.image)

    def caption(self, images: Sequence[CaptionedImage], max_new_tokens: int, output: Path) -> list[str]:
        """Caption images greedily => their captions, also written to `captions.jsonl` in `output`.

        Raises:
            UserError: An image cannot be read, or `output` holds captions of other settings.
        """
        folder, processes = output / "captions", self.processes
        settings = {
            "checkpoint": self.checkpoint,
            "images": captioned_hash(images),
            "max_new_tokens": max_new_tokens,
        }
        self._claim(folder, settings)
        caption_all(
            images,
            folder,
            lambda paths: self.pipeline.caption(
                [Image.fromarray(self.pipeline.sizes.read(path)) for path in paths], max_new_tokens=max_new_tokens
            ),
            batch_size=self.batch_size,
            rank=processes.process_index,
            num_ranks=processes.num_processes,
        )
        processes.wait_for_everyone()
        captions = read_written_captions(images, folder, self.batch_size)
        if processes.is_main_process:
            write_captions(images, captions, output / "captions.jsonl")
        return captions

    def _write(
        self, prompts: Sequence[Prompt], folder: Path, make: Make, *, description: str, settings: dict[str, Any]
    ) -> None:
        self._claim(folder, settings)
        processes = self.processes
        write_images(
            prompts,
            folder,
            make,
            batch_size=self.batch_size,
            description=description,
            rank=processes.process_index,
            num_ranks=processes.num_processes,
        )
        if processes.is_main_process:
            write_metadata(prompts, folder / METADATA)
        processes.wait_for_everyone()

    def _claim(self, folder: Path, settings: dict[str, Any]) -> None:
        # Results of other batches, or of another kind of device, differ by rounding.
        more = {"batch_size": self.batch_size, "device": self.pipeline.device.type}
        with self.processes.main_process_first():
            claim_folder(folder, settings | more)


def files_hash(snapshot: Path) -> str:
    """Hash of the weights and configurations of a snapshot."""
    digest = hashlib.sha256()
    for path in sorted(snapshot.rglob("*")):
        if path.suffix in (".safetensors", ".json"):
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
            digest.update(f"{path.relative_to(snapshot)} {content}".encode())
    return f"sha256 {digest.hexdigest()[:12]}"
