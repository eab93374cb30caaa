"""The tab that varies a picture, or repaints a part marked by the visitor, for any model that paints."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image

from transfusion_mot.config import DEFAULT_STRENGTH
from transfusion_mot.demo.live import painted_live
from transfusion_mot.demo.shared import (
    MAX_IMAGES,
    MAX_STEPS,
    MODEL,
    add_gallery,
    add_seed,
    gr,
    mistakes_shown,
    refused,
)
from transfusion_mot.pipeline import TransfusionPipeline

# Height and width of the drawing area, in pixels.
_CANVAS = 512


class RepaintTab:
    """Repaints the marked part of a picture by a prompt, with one pipeline."""

    def __init__(self, pipeline: TransfusionPipeline) -> None:
        self.pipeline = pipeline
        self.trained = pipeline.scheduler

    def repaint(
        self,
        drawn: dict[str, Any] | None,
        prompt: str,
        strength: float,
        num_images: int,
        seed: int,
        steps: int,
        scale: float,
    ) -> Iterator[tuple[list[Image.Image], str]]:
        """A picture with marks drawn on it => results, and a line about them. Without marks everything may change."""
        if drawn is None or drawn["background"] is None:
            raise refused("Give a picture first.")
        prompt = prompt.strip()
        if not prompt:
            raise refused("Write a prompt first.")
        picture, mask = on_white(drawn["background"]), mask_of(drawn["layers"])
        seeds = [int(seed) + index for index in range(int(num_images))]

        def run(on_step_end: Callable[..., dict[str, Any]]) -> list[Image.Image]:
            self.pipeline.scheduler = self.trained
            images: list[Image.Image] = self.pipeline(
                prompt,
                image=picture,
                mask_image=mask,
                strength=strength,
                num_inference_steps=int(steps),
                guidance_scale=scale,
                num_images_per_prompt=len(seeds),
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                callback_on_step_end=on_step_end,
            ).images
            return images

        with mistakes_shown():
            for images, line, _ in painted_live(run):
                yield images, line

    def add(self) -> None:
        """Add the tab to the page that is being built."""
        config = self.pipeline.config
        own_scale = self.pipeline.guidance_of(self.pipeline.image_modality)
        with gr.Tab("Repaint"), gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=320):
                drawn = gr.ImageEditor(
                    label="Draw over the part to repaint",
                    type="pil",
                    sources=["upload", "clipboard"],
                    transforms=[],
                    layers=False,
                    brush=gr.Brush(default_size=12, colors=["#e11d48"], color_mode="fixed"),
                    canvas_size=(_CANVAS, _CANVAS),
                    height=460,
                    buttons=[],
                    elem_id="drawn",
                )
                prompt = gr.Textbox(label="Prompt", placeholder="a red apple", max_lines=2, elem_id="repaint-prompt")
                with gr.Row():
                    start = gr.Button("Repaint", variant="primary", elem_id="repaint", scale=3)
                    stop = gr.Button("Stop", scale=1, min_width=80)
                strength = gr.Slider(0.05, 1, DEFAULT_STRENGTH, step=0.05, label="Strength (1 repaints from scratch)")
                with gr.Row():
                    num_images = gr.Slider(1, MAX_IMAGES, 4, step=1, label="Results")
                    steps = gr.Slider(1, MAX_STEPS, config.num_inference_steps, step=1, label="Steps")
                with gr.Row():
                    scale = gr.Slider(1, 15, own_scale, step=0.1, label="Guidance scale")
                    seed = add_seed()
            with gr.Column(scale=6, min_width=320):
                results = add_gallery("repainted")
                line = gr.Markdown(elem_classes="told", min_height=24)
        repainting = gr.on(
            [start.click, prompt.submit],
            self.repaint,
            [drawn, prompt, strength, num_images, seed, steps, scale],
            [results, line],
            show_progress="minimal",
            show_progress_on=results,
            **MODEL,
        )
        stop.click(None, cancels=[repainting])


def on_white(picture: Image.Image) -> Image.Image:
    """A picture without transparent parts."""
    picture = picture.convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture).convert("RGB")


def mask_of(layers: list[Image.Image]) -> Image.Image | None:
    """The drawn layers as white on black; None if they are empty."""
    drawn = [np.asarray(layer.convert("RGBA"))[..., 3] > 0 for layer in layers]
    white = np.logical_or.reduce(drawn) if drawn else np.zeros(1, bool)
    return Image.fromarray((255 * white).astype(np.uint8)) if white.any() else None
