"""Shared parts of the tabs: Gradio, if installed, limits, uploads and error messages for visitors."""

import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from PIL import Image

from transfusion_mot.data.images import displayed_size, load_image
from transfusion_mot.errors import UserError

gr: Any = importlib.import_module("gradio") if importlib.util.find_spec("gradio") else None

MAX_IMAGES = 8
MAX_STEPS = 250
MAX_TOP_K = 500
MAX_TOKENS = 128
MAX_QUEUE = 16
MAX_SEED = 2**31
# Name of an uploaded file in messages.
UPLOADED = "your file"
# Gradio stores a file for each shown result: it checks every hour and removes files after a day.
CACHE_SECONDS = (3600, 86400)
# Calls that share one model take turns.
MODEL: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model"}


@contextmanager
def mistakes_shown() -> Iterator[None]:
    """Turn a `UserError` into a message on the page."""
    try:
        yield
    except UserError as error:
        raise gr.Error(f"{error}", print_exception=False) from None


def refused(message: str) -> Exception:
    """An exception that shows a message on the page."""
    error: Exception = gr.Error(message, print_exception=False)
    return error


def add_seed() -> Any:
    """A field for the seed, with a button that draws one."""
    draw = gr.Button("Random", size="sm")
    seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, min_width=130, buttons=[draw])
    read = seed.preprocess

    def filled_in(payload: float | None) -> Any:
        # An empty field is None.
        if payload is None:
            raise refused(f"Give a seed first, a whole number from 0 to {MAX_SEED}.")
        return read(payload)

    seed.preprocess = filled_in
    # Drawn in the browser, which need not wait for the model.
    draw.click(None, None, seed, js=f"() => Math.floor(Math.random() * {MAX_SEED})")
    return seed


def add_gallery(element: str, columns: int = 2) -> Any:
    """The results area; its size is the same before and after painting."""
    return gr.Gallery(
        show_label=False,
        columns=columns,
        object_fit="contain",
        elem_id=element,
        elem_classes="results",
        format="png",
        buttons=["download", "download_all", "fullscreen"],
    )


def add_upload(element: str, height: int = 320) -> Any:
    """The field to upload a picture."""
    picture = gr.Image(
        label="Picture", type="filepath", sources=["upload", "clipboard"], height=height, elem_id=element
    )
    # The unchanged file: `load_image` reports what is wrong with it, while Gradio would only fail.
    picture.preprocess = lambda payload: payload and payload.path
    return picture


def uploaded(path: str | None) -> Image.Image:
    """The picture in an uploaded file.

    Raises:
        UserError: It is not a picture.
    """
    if path is None:
        raise refused("Give a picture first.")
    return Image.fromarray(load_image(path, displayed_size(path, UPLOADED), name=UPLOADED))
