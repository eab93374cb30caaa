"""The tab that paints prompts, and the history of pictures below all tabs."""

import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from transfusion_mot.cli.outputs import save_png
from transfusion_mot.demo.live import painted_live
from transfusion_mot.demo.shared import (
    CACHE_SECONDS,
    MAX_IMAGES,
    MAX_STEPS,
    MAX_TOP_K,
    MODEL,
    add_gallery,
    add_seed,
    gr,
    mistakes_shown,
    refused,
)
from transfusion_mot.pipeline import TransfusionPipeline
from transfusion_mot.schedulers import fit_samplers, make_sampling_scheduler, sampler_name

HISTORY_LENGTH = 40
# Maximum side of pictures, relative to the longest side in training.
_LARGER = 2


@dataclass(frozen=True)
class Painted:
    """A picture of the history: its file, and the values of the page's fields when it was painted."""

    path: str
    settings: tuple[Any, ...]

    def __deepcopy__(self, memo: dict[int, Any]) -> "Painted":
        # Gradio copies the initial state for every visitor; this object never changes.
        return self


class PaintTab:
    """Paints prompts, with one pipeline."""

    def __init__(self, pipeline: TransfusionPipeline) -> None:
        self.pipeline = pipeline
        self.trained = pipeline.scheduler
        self.is_codes = pipeline.codec.kind == "codes"
        self._folder = tempfile.TemporaryDirectory(prefix="transfusion_mot-")
        self._numbers = itertools.count()

    def paint(
        self,
        history: list[Painted],
        prompt: str,
        negative_prompt: str,
        num_images: int,
        seed: int,
        height: int,
        width: int,
        scale: float,
        rescale: float,
        *drawing: Any,
    ) -> Iterator[tuple[Any, str, Any, Any, Any]]:
        """History and fields of the page => pictures, a line about them, the new history, its pictures, and its title.

        The last fields, `drawing`, are steps and scheduler; for a model with codes they are temperature, top-p and
        top-k.
        """
        prompt = prompt.strip()
        if not prompt:
            raise refused("Write a prompt first.")
        fields = (prompt, negative_prompt, num_images, seed, height, width, scale, rescale, *drawing)
        seeds = [int(seed) + index for index in range(int(num_images))]
        how: dict[str, Any]
        if self.is_codes:
            how = {"code_temperature": drawing[0], "code_top_p": drawing[1], "code_top_k": int(drawing[2])}
        else:
            how = {"num_inference_steps": int(drawing[0])}

        def run(on_step_end: Callable[..., dict[str, Any]]) -> list[Image.Image]:
            if not self.is_codes:
                self.pipeline.scheduler = make_sampling_scheduler(self.trained, drawing[1])
            images: list[Image.Image] = self.pipeline(
                prompt,
                height=height,
                width=width,
                guidance_scale=scale,
                num_images_per_prompt=len(seeds),
                negative_prompt=negative_prompt.strip() or None,
                guidance_rescale=rescale,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                # Codes can only be decoded when all are generated.
                callback_on_step_end=None if self.is_codes else on_step_end,
                **how,
            ).images
            return images

        with mistakes_shown():
            for images, line, finished in painted_live(run):
                if not finished:
                    yield images, line, gr.skip(), gr.skip(), gr.skip()
        new = []
        for image, own_seed in zip(images, seeds, strict=True):
            path = Path(self._folder.name) / f"{next(self._numbers):06d}.png"
            details = {"prompt": prompt, "negative_prompt": negative_prompt, "image_seed": own_seed}
            details |= {"height": height, "width": width}
            details |= {"guidance_scale": scale, "guidance_rescale": rescale, **how}
            save_png(image, path, details if self.is_codes else details | {"scheduler": drawing[1]})
            new.append(Painted(str(path), (*fields[:3], own_seed, *fields[4:])))
        history = [*new, *history]
        self.forget(history[HISTORY_LENGTH:])
        history = history[:HISTORY_LENGTH]
        past = gr.Gallery([(old.path, old.settings[0]) for old in history], visible=True)
        yield [painted.path for painted in new], line, history, past, gr.Markdown(visible=True)

    def forget(self, history: list[Painted]) -> None:
        """Remove the files of pictures that are no longer shown."""
        for painted in history:
            Path(painted.path).unlink(missing_ok=True)

    def add(self) -> None:
        """Add the tab to the page that is being built."""
        pipeline = self.pipeline
        # Without their common ending, because there is no space for it.
        schedulers = [(name.replace("Scheduler", ""), name) for name in fit_samplers(pipeline.scheduler)]
        current = sampler_name(pipeline.scheduler)
        examples = pipeline.config.examples or {}
        own_scale = pipeline.guidance_of(pipeline.image_modality)
        prompts = examples.get("prompts") or []
        example = prompts[0] if prompts else "a red apple"
        default_height, default_width = pipeline.sizes.default
        with gr.Tab("Paint"), gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=320):
                prompt = gr.Textbox(label="Prompt", placeholder=example, max_lines=4, autofocus=True, elem_id="prompt")
                if beginnings := examples.get("beginnings"):
                    style = gr.Dropdown(
                        ["", *beginnings], value="", label="Style: the words that begin the prompt", elem_id="style"
                    )
                    style.input(
                        partial(begin_with, beginnings=beginnings),
                        [style, prompt],
                        prompt,
                        show_progress="hidden",
                        queue=False,
                    )
                with gr.Row():
                    start = gr.Button("Paint", variant="primary", elem_id="paint", scale=3)
                    stop = gr.Button("Stop", elem_id="stop", scale=1, min_width=80)
                if prompts:
                    gr.Examples([[text] for text in prompts], prompt, label="Examples", elem_id="examples")
                with gr.Row():
                    num_images = gr.Slider(1, MAX_IMAGES, 4, step=1, label="Pictures")
                    if not self.is_codes:
                        steps = gr.Slider(1, MAX_STEPS, pipeline.config.num_inference_steps, step=1, label="Steps")
                scale = gr.Slider(1, 15, own_scale, step=0.1, label="Guidance scale")
                with gr.Row():
                    height = self._add_side("Height", default_height)
                    width = self._add_side("Width", default_width)
                    seed = add_seed()
                with gr.Accordion("Advanced", open=False, elem_id="advanced"):
                    negative = gr.Textbox("", label="Negative prompt", placeholder="content to avoid", max_lines=2)
                    rescale = gr.Slider(0, 1, 0, step=0.05, label="Guidance rescale")
                    if self.is_codes:
                        temperature = gr.Slider(0, 2, 1, step=0.05, label="Temperature")
                        top_p = gr.Slider(0.05, 1, 1, step=0.05, label="Top-p")
                        drawing = [temperature, top_p, gr.Slider(0, MAX_TOP_K, 0, step=1, label="Top-k (0 is all)")]
                    else:
                        drawing = [steps, gr.Dropdown(schedulers, value=current, label="Scheduler")]
            with gr.Column(scale=6, min_width=320):
                painted = add_gallery("painted")
                line = gr.Markdown(elem_id="line", min_height=24)
        self._fields = [prompt, negative, num_images, seed, height, width, scale, rescale, *drawing]
        self._start, self._stop, self._results = [start.click, prompt.submit], stop, [painted, line]

    def _add_side(self, label: str, default: int) -> Any:
        sizes = self.pipeline.sizes
        most = _LARGER * max(side for size in sizes.trained for side in size)
        return gr.Number(
            default, label=label, precision=0, minimum=sizes.multiple, maximum=most, step=sizes.multiple, min_width=90
        )

    def add_history(self) -> None:
        """Add the history below the tabs."""
        title = gr.Markdown("History: click a picture to restore its settings", elem_id="past", visible=False)
        # Hidden before the first picture.
        shown = gr.Gallery(
            show_label=False,
            columns=8,
            object_fit="contain",
            elem_id="history",
            format="png",
            allow_preview=False,
            visible=False,
            buttons=["download_all"],
        )
        history = gr.State([], time_to_live=CACHE_SECONDS[1], delete_callback=self.forget)
        painting = gr.on(
            self._start,
            self.paint,
            [history, *self._fields],
            [*self._results, history, shown, title],
            show_progress="minimal",
            show_progress_on=self._results[0],
            **MODEL,
        )
        shown.select(_settings_of, history, self._fields, show_progress="hidden")
        self._stop.click(None, cancels=[painting])


def _settings_of(history: list[Painted], clicked: "gr.SelectData") -> tuple[Any, ...]:
    return history[clicked.index].settings


def begin_with(beginning: str, prompt: str, beginnings: Sequence[str]) -> str:
    """A prompt with another beginning of captions; empty removes it."""
    prompt = prompt.strip()
    for known in sorted(beginnings, key=len, reverse=True):
        if prompt == known or prompt.startswith(f"{known} "):
            prompt = prompt[len(known) :].strip()
            break
    return f"{beginning} {prompt}".lstrip()
