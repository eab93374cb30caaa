"""Previews of a model during training: pictures of prompts, captions and edits of held-out pictures, speech."""

from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

from transfusion_mot.config import TEXT
from transfusion_mot.data.images import grid
from transfusion_mot.data.mixture import Sources
from transfusion_mot.pipeline import TransfusionPipeline
from transfusion_mot.sampling.held_out_edits import HeldOutEdits, edited, held_out_edits
from transfusion_mot.sampling.held_out_items import captions_of, pictures_of, printable
from transfusion_mot.sampling.sizes import Size, by_size
from transfusion_mot.sampling.speech_previews import SpeechPreviews

_NUM_CAPTIONED, _NUM_PAINTED = 8, 4
# Edits of each source of editing pairs.
_NUM_EDITED = 4
_COLUMNS = 4
# Pictures of the initial weights of a run, and the grid that shows them beside the newest ones.
BEFORE, BEFORE_AND_AFTER = "before", "before-and-after.png"
# Gap between two pictures, in pixels.
_LINE, _LINE_COLOUR = 2, "#999999"


class Previews:
    """Labelled grids, and speech if the model has it, in a folder and, if that is the tracker, in TensorBoard.

    Prompts are painted at all sizes of training in turn. If there are pictures from before the first step, as in a
    fine-tuning run, a grid shows them beside the newest ones.

    Args:
        pipeline: Paints and captions with the current weights of its transformer.
        prompts: Prompts to paint and to say; may be empty. None takes captions of held-out images and audio.
        held_out: Held-out documents: evenly spaced images are captioned, evenly spaced pairs are edited.
        folder: Folder of the grids.

    Raises:
        UserError: A prompt is longer than any in training.
    """

    def __init__(
        self, pipeline: TransfusionPipeline, prompts: list[str] | None, held_out: Sources, folder: Path
    ) -> None:
        self.pipeline = pipeline
        self.folder = folder
        # Training needs the memory between previews.
        pipeline.workspace.records = False
        # Prompts that sampling would refuse are refused before training.
        for modality in pipeline.transformer.architecture.made:
            if modality != TEXT:
                pipeline.sampling_settings(modality, None, None)
        if prompts:
            pipeline.check_prompts(prompts)
        self.speech = SpeechPreviews(pipeline, prompts, held_out, folder)
        self.prompts: list[str] = []
        self.pictures: list[Image.Image] = []
        self.captions: list[str] = []
        self.edits: list[HeldOutEdits] = []
        if not pipeline.has_images:
            return
        if prompts is None:
            captions = captions_of(held_out, pipeline.image_modality, _NUM_PAINTED)
            # Training cuts captions that are too long for a row; sampling refuses such prompts.
            prompts = [caption for caption in captions if pipeline.is_short_enough(caption)]
        self.prompts = prompts
        self.pictures, self.captions = pictures_of(held_out, pipeline.image_modality, _NUM_CAPTIONED)
        pairs = zip(held_out.names, held_out.sources, strict=True)
        found = [held_out_edits(pipeline, name, source, _NUM_EDITED) for name, source in pairs]
        self.edits = [edits for edits in found if edits is not None and edits.before]

    def make(self, step: int, accelerator: Accelerator) -> list[str]:
        """Paint, edit, caption, speak and transcribe after `step` steps => lines for the log; called by the main
        process, or by all of a sharded model."""
        self.pipeline.set_progress_bar_config(disable=True)
        if self.prompts and self.pipeline.can_paint:
            sizes = self.pipeline.sizes.trained
            turns = [sizes[place % len(sizes)] for place in range(len(self.prompts))]
            images = by_size(turns, self._paint)
            self._show(images, self.prompts, name="samples", suffix="", step=step, accelerator=accelerator)
            if accelerator.is_main_process:
                self._compare(images, step)
        if self.pipeline.can_paint:
            made = [edited(self.pipeline, edits, batch_size=_NUM_EDITED, seed=0) for edits in self.edits]
            beside = [
                _beside(before, after)
                for edits, results in zip(self.edits, made, strict=True)
                for before, after in zip(edits.before, results, strict=True)
            ]
            if beside:
                labels = [instruction for edits in self.edits for instruction in edits.instructions]
                self._show(beside, labels, name="edits", suffix="-edits", step=step, accelerator=accelerator)
        if self.pictures:
            written = self.pipeline.caption(self.pictures)
            labels = [f"{printable(new)} [{real}]" for new, real in zip(written, self.captions, strict=True)]
            self._show(self.pictures, labels, name="captions", suffix="-captions", step=step, accelerator=accelerator)
        return self.speech.make(step, accelerator)

    def _compare(self, images: list[Image.Image], step: int) -> None:
        """Keep the pictures from before the first step, and show later ones beside them."""
        files = [self.folder / BEFORE / f"{place}.png" for place in range(len(images))]
        if step == 0:
            (self.folder / BEFORE).mkdir(exist_ok=True)
            for image, file in zip(images, files, strict=True):
                image.save(file)
        elif all(file.exists() for file in files):
            pairs = [_beside(Image.open(file), image) for file, image in zip(files, images, strict=True)]
            grid(pairs, self.prompts, _COLUMNS).save(self.folder / BEFORE_AND_AFTER)

    def _paint(self, places: list[int], size: Size) -> list[Image.Image]:
        prompts = [self.prompts[place] for place in places]
        generators = [torch.Generator().manual_seed(place) for place in places]
        images: list[Image.Image] = self.pipeline(prompts, height=size[0], width=size[1], generator=generators).images
        return images

    def _show(
        self,
        images: list[Image.Image],
        labels: list[str],
        *,
        name: str,
        suffix: str,
        step: int,
        accelerator: Accelerator,
    ) -> None:
        if not accelerator.is_main_process:
            return
        self.folder.mkdir(exist_ok=True)
        sheet = grid(images, labels, _COLUMNS)
        sheet.save(self.folder / f"step-{step:07d}{suffix}.png")
        for tracker in accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.log_images({name: np.asarray(sheet)[None]}, step, dataformats="NHWC")


def _beside(left: Image.Image, right: Image.Image) -> Image.Image:
    """Two pictures in one, with a line between them."""
    both = Image.new("RGB", (left.width + right.width + _LINE, max(left.height, right.height)), _LINE_COLOUR)
    both.paste(left, (0, 0))
    both.paste(right, (left.width + _LINE, 0))
    return both
