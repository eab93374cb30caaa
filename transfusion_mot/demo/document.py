"""The tab of documents: the model continues a text and decides when it writes and when it paints."""

import base64
import html
import io

import torch
from PIL import Image

from transfusion_mot.demo.shared import (
    MAX_IMAGES,
    MAX_STEPS,
    MAX_TOKENS,
    MODEL,
    add_seed,
    add_upload,
    gr,
    mistakes_shown,
    refused,
    uploaded,
)
from transfusion_mot.pipeline import TransfusionPipeline


class DocumentTab:
    """Continues a text, with an optional picture, as a document, with one pipeline."""

    def __init__(self, pipeline: TransfusionPipeline) -> None:
        self.pipeline = pipeline
        self.trained = pipeline.scheduler
        self.is_codes = pipeline.codec.kind == "codes"

    def go_on(
        self,
        text: str,
        path: str | None,
        max_images: int,
        max_new_tokens: int,
        seed: int,
        steps: int | None,
        scale: float,
        temperature: float,
    ) -> str:
        """A beginning => the document as HTML; the visitor's part is marked."""
        text = text.strip()
        if not text and path is None:
            raise refused("Give a text or a picture to begin with.")
        with mistakes_shown():
            given = ([uploaded(path)] if path is not None else []) + ([text] if text else [])
            self.pipeline.scheduler = self.trained
            follows = self.pipeline.interleave(
                given,
                max_images=int(max_images),
                max_new_tokens=int(max_new_tokens),
                num_inference_steps=None if steps is None else int(steps),
                guidance_scale=scale,
                temperature=temperature,
                generator=torch.Generator().manual_seed(int(seed)),
            )
        return as_html(given, follows)

    def add(self) -> None:
        """Add the tab to the page that is being built."""
        config = self.pipeline.config
        own_scale = self.pipeline.guidance_of(self.pipeline.image_modality)
        with gr.Tab("Document"), gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=320):
                text = gr.Textbox(
                    label="Beginning of the document", placeholder="a red apple", lines=2, elem_id="begins"
                )
                with gr.Accordion("A picture before the text (optional)", open=False):
                    picture = add_upload("begins-picture", height=220)
                start = gr.Button("Continue", variant="primary", elem_id="go-on")
                with gr.Row():
                    max_images = gr.Slider(0, MAX_IMAGES, 1, step=1, label="Max. pictures")
                    length = gr.Slider(1, MAX_TOKENS, 64, step=1, label="Max. text tokens")
                with gr.Row():
                    steps = gr.State(None)
                    if not self.is_codes:
                        steps = gr.Slider(1, MAX_STEPS, config.num_inference_steps, step=1, label="Steps")
                    scale = gr.Slider(1, 15, own_scale, step=0.1, label="Guidance scale")
                with gr.Row():
                    temperature = gr.Slider(0, 2, 0, step=0.05, label="Temperature")
                    seed = add_seed()
            with gr.Column(scale=6, min_width=320):
                document = gr.HTML(elem_id="document", container=True, min_height=320, padding=True)
        gr.on(
            [start.click, text.submit],
            self.go_on,
            [text, picture, max_images, length, seed, steps, scale, temperature],
            document,
            **MODEL,
        )


def as_html(given: list[str | Image.Image], follows: list[str | Image.Image]) -> str:
    """Texts and pictures in reading order."""
    parts = [f'<span class="given">{_part(item)}</span>' for item in given]
    parts += [_part(item) for item in follows] or ["<p>(the end)</p>"]
    return "".join(parts)


def _part(item: str | Image.Image) -> str:
    if isinstance(item, str):
        return html.escape(item).replace("\n", "<br>")
    file = io.BytesIO()
    item.save(file, "PNG")
    return f'<img src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}" alt="picture">'
