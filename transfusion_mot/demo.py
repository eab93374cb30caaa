"""A page to play with a trained model: prompts to pictures, watched as they appear, pictures to captions, and edits.

python -m transfusion_mot.demo --checkpoint runs/emoji
"""

import itertools
import queue
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from transfusion_mot.cli.loading import load_pipeline
from transfusion_mot.cli.options import DTYPES, OneLineParser
from transfusion_mot.cli.outputs import save_png
from transfusion_mot.data.images import displayed_size, load_image
from transfusion_mot.errors import UserError, exit_on_user_error
from transfusion_mot.pipeline import TransfusionPipeline
from transfusion_mot.sampling.sizes import Size
from transfusion_mot.schedulers import fit_samplers, make_sampling_scheduler, sampler_name

try:
    import gradio as gr
except ImportError:
    gr = None

MAX_IMAGES = 8
MAX_STEPS = 250
MAX_TOP_K = 500
MAX_CAPTION_TOKENS = 128
NUM_PREVIEWS = 8
HISTORY_LENGTH = 40
MAX_UPLOAD = "10mb"
MAX_QUEUE = 16
# Name of the thread that paints.
PAINTING = "painting"
# What a file is called that a visitor gave.
UPLOADED = "your file"
# Gradio keeps a file of each picture shown: looked for every hour, removed after a day.
CACHE_SECONDS = (3600, 86400)
# What shares one model takes turns.
MODEL: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model"}
# Small pictures fill their place; the page has one column on a phone.
CSS = """
.gradio-container main {width: 100%; max-width: 1080px !important; margin: 0 auto !important}
#painted img, #edits img, #history img {object-fit: contain}
#title {margin: 4px 0 0}
#title h1 {font-size: 1.5rem; margin: 0}
#title p, #line, #past {opacity: 0.7; margin: 0}
#history .caption-label {font-size: 0.7rem}
footer {display: none !important}
"""

# Pictures, a line about them, and whether they are finished.
Update = tuple[list[Image.Image], str, bool]


class _Stopped(Exception):
    """Nobody waits for the pictures any more."""


def painted_live(paint: Callable[[Callable[..., dict[str, Any]]], list[Image.Image]]) -> Iterator[Update]:
    """Run a painting => pictures as they are so far with a line about them, then the finished ones.

    Args:
        paint: Takes a `callback_on_step_end` of a pipeline and returns the pictures. It runs in a thread of its own;
            when nobody takes the next update any more, it is stopped at its next step.
    """
    updates: queue.Queue[Update | BaseException | None] = queue.Queue()
    stop = threading.Event()
    start = time.perf_counter()

    def on_step_end(pipeline: TransfusionPipeline, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if stop.is_set():
            raise _Stopped
        total = len(pipeline.scheduler.timesteps)
        if step % max(1, total // NUM_PREVIEWS) == 0 and step + 1 < total:
            updates.put((pipeline.decode_latents(tensors["clean"]), f"Step {step + 1} of {total}", False))
        return {}

    def work() -> None:
        try:
            images = paint(on_step_end)
            updates.put((images, f"{time.perf_counter() - start:.1f} s", True))
            updates.put(None)
        # Whatever it is, it is raised where it can be shown.
        except BaseException as error:
            updates.put(error)

    thread = threading.Thread(target=work, name=PAINTING, daemon=True)
    thread.start()
    try:
        while (update := updates.get()) is not None:
            if isinstance(update, BaseException):
                raise update
            yield update
    finally:
        stop.set()
        thread.join()


@dataclass(frozen=True)
class Painted:
    """A picture of the history: its file, and what the page's fields held when it was painted."""

    path: str
    settings: tuple[Any, ...]

    def __deepcopy__(self, memo: dict[int, Any]) -> "Painted":
        # Gradio copies the first state of every visitor; there is nothing here that changes.
        return self


class Studio:
    """What the page does, on one pipeline."""

    def __init__(self, pipeline: TransfusionPipeline) -> None:
        self.pipeline = pipeline
        self.trained = pipeline.scheduler
        self.is_codes = pipeline.codec.kind == "codes"
        self.sizes = {_size_name(size): size for size in pipeline.sizes.trained}
        self._folder = tempfile.TemporaryDirectory(prefix="transfusion_mot-")
        self._numbers = itertools.count()

    def paint(
        self,
        history: list[Painted],
        prompt: str,
        negative_prompt: str,
        num_images: int,
        seed: int,
        size: str,
        scale: float,
        rescale: float,
        *drawing: Any,
    ) -> Iterator[tuple[Any, str, Any, Any]]:
        """History and fields of the page => pictures, a line about them, the history as kept, and as shown.

        The last fields, `drawing`, are steps and scheduler; of a model whose pictures are codes temperature, top-p and
        top-k.
        """
        prompt = prompt.strip()
        if not prompt:
            raise gr.Error("Say what to paint.", print_exception=False)
        fields = (prompt, negative_prompt, num_images, seed, size, scale, rescale, *drawing)
        height, width = self.sizes[size]
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
                # Codes are not seen until they are all written.
                callback_on_step_end=None if self.is_codes else on_step_end,
                **how,
            ).images
            return images

        try:
            for images, line, finished in painted_live(run):
                if not finished:
                    yield images, line, gr.skip(), gr.skip()
        except UserError as error:
            raise gr.Error(f"{error}", print_exception=False) from None
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
        yield [painted.path for painted in new], line, history, [(old.path, old.settings[0]) for old in history]

    def forget(self, history: list[Painted]) -> None:
        """Remove the files of pictures that nobody sees any more."""
        for painted in history:
            Path(painted.path).unlink(missing_ok=True)

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
        """An uploaded file and what to do with it => results, and a line about them."""
        instruction = instruction.strip()
        if not instruction:
            raise gr.Error("Say what to change.", print_exception=False)
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

        try:
            picture = _uploaded(path)
            for images, line, _ in painted_live(run):
                yield images, line
        except UserError as error:
            raise gr.Error(f"{error}", print_exception=False) from None

    def caption(self, path: str | None, temperature: float, seed: int, max_new_tokens: int) -> str:
        """An uploaded file => what the model says about it."""
        try:
            image = _uploaded(path)
            generator = torch.Generator().manual_seed(int(seed))
            (text,) = self.pipeline.caption(
                image, max_new_tokens=int(max_new_tokens), temperature=temperature, generator=generator
            )
        except UserError as error:
            raise gr.Error(f"{error}", print_exception=False) from None
        return text or "(nothing)"


def _uploaded(path: str | None) -> Image.Image:
    """The picture in an uploaded file.

    Raises:
        UserError: It is none.
    """
    if path is None:
        raise gr.Error("Give a picture first.", print_exception=False)
    return Image.fromarray(load_image(path, displayed_size(path, UPLOADED), name=UPLOADED))


def _upload(element: str) -> Any:
    """Where a visitor puts a picture."""
    picture = gr.Image(label="Picture", type="filepath", sources=["upload", "clipboard"], height=320, elem_id=element)
    # The uploaded file as it is: `load_image` says what is wrong with it, and Gradio would only fail.
    picture.preprocess = lambda payload: payload and payload.path
    return picture


def build_page(pipeline: TransfusionPipeline) -> Any:
    """The page, a `gradio.Blocks`."""
    pipeline.set_progress_bar_config(disable=True)
    studio = Studio(pipeline)
    # Without the end that all of them share, which has no place.
    schedulers = [(name.replace("Scheduler", ""), name) for name in fit_samplers(pipeline.scheduler)]
    current = sampler_name(pipeline.scheduler)
    with gr.Blocks(title="transfusion_mot", analytics_enabled=False, delete_cache=CACHE_SECONDS) as page:
        gr.Markdown(
            f"# transfusion_mot\n{_size(pipeline)} parameters, {', '.join(studio.sizes)} px, {pipeline.device}",
            elem_id="title",
        )
        with gr.Tab("Paint"), gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=320):
                prompt = gr.Textbox(
                    label="Prompt", placeholder="a red apple", max_lines=4, autofocus=True, elem_id="prompt"
                )
                negative = gr.Textbox(label="Negative prompt", placeholder="what to lead away from", max_lines=2)
                with gr.Row():
                    start = gr.Button("Paint", variant="primary", elem_id="paint", scale=3)
                    stop = gr.Button("Stop", elem_id="stop", scale=1, min_width=80)
                with gr.Row():
                    scale = gr.Slider(1, 15, pipeline.config.guidance_scale, step=0.1, label="Guidance scale")
                    rescale = gr.Slider(0, 1, 0, step=0.05, label="Guidance rescale")
                with gr.Row():
                    num_images = gr.Slider(1, MAX_IMAGES, 4, step=1, label="Pictures")
                    if not studio.is_codes:
                        steps = gr.Slider(1, MAX_STEPS, pipeline.config.num_inference_steps, step=1, label="Steps")
                with gr.Row():
                    seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**31, min_width=90)
                    size = gr.Dropdown(
                        list(studio.sizes),
                        value=_size_name(pipeline.sizes.default),
                        label="Width x height",
                        min_width=130,
                    )
                if studio.is_codes:
                    with gr.Row():
                        temperature = gr.Slider(0, 2, 1, step=0.05, label="Temperature")
                        top_p = gr.Slider(0.05, 1, 1, step=0.05, label="Top-p")
                        drawing = [temperature, top_p, gr.Slider(0, MAX_TOP_K, 0, step=1, label="Top-k (0 is all)")]
                else:
                    drawing = [steps, gr.Dropdown(schedulers, value=current, label="Scheduler")]
            with gr.Column(scale=6, min_width=320):
                painted = gr.Gallery(
                    show_label=False, columns=2, height=530, object_fit="contain", elem_id="painted", format="png"
                )
                line = gr.Markdown(elem_id="line", min_height=24)
        if pipeline.config.trained_on_edits:
            _edit_tab(studio)
        with gr.Tab("Caption"), gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=320):
                picture = _upload("picture")
                describe = gr.Button("Caption", variant="primary", elem_id="caption")
            with gr.Column(scale=7, min_width=320):
                words = gr.Textbox(label="Caption", lines=4, elem_id="words", interactive=False)
                with gr.Row():
                    temperature = gr.Slider(0, 2, 0, step=0.05, label="Temperature")
                    caption_seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**31)
                length = gr.Slider(1, MAX_CAPTION_TOKENS, 64, step=1, label="Longest caption, in tokens")
        gr.Markdown("History: a click puts the settings of a picture back", elem_id="past")
        shown = gr.Gallery(
            show_label=False,
            columns=8,
            height=260,
            object_fit="contain",
            elem_id="history",
            format="png",
            allow_preview=False,
        )
        history = gr.State([], time_to_live=CACHE_SECONDS[1], delete_callback=studio.forget)

        fields = [prompt, negative, num_images, seed, size, scale, rescale, *drawing]
        painting = gr.on(
            [start.click, prompt.submit],
            studio.paint,
            [history, *fields],
            [painted, line, history, shown],
            show_progress="minimal",
            **MODEL,
        )
        shown.select(_settings_of, history, fields, show_progress="hidden")
        stop.click(None, cancels=[painting])
        describe.click(studio.caption, [picture, temperature, caption_seed, length], words, **MODEL)
    return page


def _edit_tab(studio: Studio) -> None:
    """The tab that edits a picture; of models that were trained on editing pairs."""
    config = studio.pipeline.config
    with gr.Tab("Edit"), gr.Row(equal_height=False):
        with gr.Column(scale=5, min_width=320):
            picture = _upload("edited")
            instruction = gr.Textbox(
                label="Instruction", placeholder="make it green", max_lines=2, elem_id="instruction"
            )
            with gr.Row():
                start = gr.Button("Edit", variant="primary", elem_id="edit", scale=3)
                stop = gr.Button("Stop", scale=1, min_width=80)
            with gr.Row():
                scale = gr.Slider(1, 15, config.guidance_scale, step=0.1, label="Guidance by the instruction")
                image_scale = gr.Slider(1, 5, 1.5, step=0.1, label="Guidance by the picture")
            with gr.Row():
                num_images = gr.Slider(1, MAX_IMAGES, 4, step=1, label="Results")
                steps = gr.Slider(1, MAX_STEPS, config.num_inference_steps, step=1, label="Steps")
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**31)
        with gr.Column(scale=6, min_width=320):
            results = gr.Gallery(
                show_label=False, columns=2, height=530, object_fit="contain", elem_id="edits", format="png"
            )
            line = gr.Markdown(min_height=24)
    editing = gr.on(
        [start.click, instruction.submit],
        studio.edit,
        [picture, instruction, num_images, seed, steps, scale, image_scale],
        [results, line],
        show_progress="minimal",
        **MODEL,
    )
    stop.click(None, cancels=[editing])


def _settings_of(history: list[Painted], clicked: "gr.SelectData") -> tuple[Any, ...]:
    return history[clicked.index].settings


def _size_name(size: Size) -> str:
    height, width = size
    return f"{width} x {height}"


def _size(pipeline: TransfusionPipeline) -> str:
    count = sum(parameter.numel() for parameter in pipeline.transformer.parameters())
    return f"{count / 1e9:.1f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"


def launch_options(host: str, port: int, share: bool) -> dict[str, Any]:
    """Arguments of `gradio.Blocks.launch` for a page that keeps to itself."""
    return {
        "server_name": host,
        "server_port": port,
        "share": share,
        "max_file_size": MAX_UPLOAD,
        # No font and no script comes from elsewhere.
        "theme": gr.themes.Default(
            primary_hue="indigo",
            neutral_hue="slate",
            font=["ui-sans-serif", "system-ui", "sans-serif"],
            font_mono=["ui-monospace", "monospace"],
        ),
        "css": CSS,
        "footer_links": [],
    }


def main() -> None:
    """Serve the page until it is interrupted."""
    parser = OneLineParser(prog="python -m transfusion_mot.demo", description="A page to play with a trained model.")
    add = parser.add_argument
    add("--checkpoint", metavar="FOLDER", help="a run folder of train.py, or a snapshot (default: checkpoints/emoji)")
    add("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 lets others in (default: 127.0.0.1)")
    add("--port", type=int, default=7860, help="port to listen at (default: 7860)")
    add("--share", action="store_true", help="open a public link through Gradio's servers")
    add("--device", help="cpu, cuda, cuda:1, mps (default: a GPU if there is one)")
    add("--dtype", choices=DTYPES, help="number format of the transformer (default: bf16 on CUDA, else fp32)")
    arguments = parser.parse_args()
    if gr is None:
        raise UserError("the page needs gradio; install it with pip install 'transfusion-mot[demo]'")
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    page = build_page(load_pipeline(arguments.checkpoint, device, arguments.dtype)).queue(max_size=MAX_QUEUE)
    try:
        page.launch(**launch_options(arguments.host, arguments.port, arguments.share))
    except OSError as error:
        raise UserError(f"port {arguments.port} of {arguments.host} cannot be used: {error}") from None


if __name__ == "__main__":
    with exit_on_user_error():
        main()
