"""The tab that edits a picture, for models that were trained on editing pairs."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from PIL import Image

from transfusion_mot.demo.live import painted_live
from transfusion_mot.demo.shared import (
    MAX_IMAGES,
    MAX_STEPS,
    MODEL,
    add_gallery,
    add_seed,
    add_upload,
    gr,
    mistakes_shown,
    refused,
    uploaded,
)
from transfusion_mot.pipeline import TransfusionPipeline


class EditTab:
    """Edits of a picture by an instruction, with one pipeline."""

    def __init__(self, pipeline: TransfusionPipeline) -> None:
        self.pipeline = pipeline
        self.trained = pipeline.scheduler
        self.is_codes = pipeline.codec.kind == "codes"

    def edit(
        self,
        path: str | None,
        instruction: str,
        num_images: int,
        seed: int,
        steps: int,
        scale: float,
        image_scale: float,
    ) -> Iterator[tuple[list[Image.Image], str]]:
        """An uploaded file and an instruction => results, and a line about them."""
        instruction = instruction.strip()
        if not instruction:
            raise refused("Write an instruction first.")
        seeds = [int(seed) + index for index in range(int(num_images))]

        def run(on_step_end: Callable[..., dict[str, Any]]) -> list[Image.Image]:
            self.pipeline.scheduler = self.trained
            images: list[Image.Image] = self.pipeline.edit(
                picture,
                instruction,
                num_inference_steps=int(steps),
                guidance_scale=scale,
                image_guidance_scale=image_scale,
                num_images_per_prompt=len(seeds),
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                callback_on_step_end=None if self.is_codes else on_step_end,
            ).images
            return images

        with mistakes_shown():
            picture = uploaded(path)
            for images, line, _ in painted_live(run):
                yield images, line

    def add(self) -> None:
        """Add the tab to the page that is being built."""
        config = self.pipeline.config
        own_scale = self.pipeline.guidance_of(self.pipeline.image_modality)
        with gr.Tab("Edit"), gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=320):
                picture = add_upload("edited")
                instruction = gr.Textbox(
                    label="Instruction", placeholder="make it green", max_lines=2, elem_id="instruction"
                )
                with gr.Row():
                    start = gr.Button("Edit", variant="primary", elem_id="edit", scale=3)
                    stop = gr.Button("Stop", scale=1, min_width=80)
                with gr.Row():
                    scale = gr.Slider(1, 15, own_scale, step=0.1, label="Guidance by the instruction")
                    image_scale = gr.Slider(1, 5, 1.5, step=0.1, label="Guidance by the picture")
                with gr.Row():
                    num_images = gr.Slider(1, MAX_IMAGES, 4, step=1, label="Results")
                    steps = gr.Slider(1, MAX_STEPS, config.num_inference_steps, step=1, label="Steps")
                seed = add_seed()
            with gr.Column(scale=6, min_width=320):
                results = add_gallery("edits")
                line = gr.Markdown(min_height=24)
        editing = gr.on(
            [start.click, instruction.submit],
            self.edit,
            [picture, instruction, num_images, seed, steps, scale, image_scale],
            [results, line],
            show_progress="minimal",
            show_progress_on=results,
            **MODEL,
        )
        stop.click(None, cancels=[editing])
