"""The page: a line about the model, a tab for each of its tasks, and the history."""

from typing import Any

from transfusion_mot.demo.caption import CaptionTab
from transfusion_mot.demo.document import DocumentTab
from transfusion_mot.demo.edit import EditTab
from transfusion_mot.demo.paint import PaintTab
from transfusion_mot.demo.repaint import RepaintTab
from transfusion_mot.demo.shared import CACHE_SECONDS, gr
from transfusion_mot.demo.speech import SpeechTab
from transfusion_mot.pipeline import TransfusionPipeline

MAX_UPLOAD = "10mb"
# The results area has the same size before and after painting, so that nothing moves. Pictures of the history are
# small, with their prompts below.
CSS = """
.gradio-container > .main {max-width: 1264px !important}
.gradio-container main {width: 100%; max-width: 1200px !important; margin: 0 auto !important}
.results {aspect-ratio: 1; height: auto !important; max-height: 640px}
.results img, #history img {object-fit: contain !important}
.results .grid-wrap {height: 100%; max-height: 100% !important}
#history .grid-wrap {min-height: 0 !important; max-height: 260px !important}
#history .grid-container {grid-template-columns: repeat(auto-fill, minmax(96px, 112px)) !important;
  height: auto !important}
#document .given {opacity: 0.6}
#document img {display: block; width: min(256px, 100%); margin: 8px 0; image-rendering: auto}
#title {margin: 4px 0 0}
#title h1 {font-size: 1.5rem; margin: 0}
#title p, #line, #past, .told {opacity: 0.7; margin: 0}
#history .caption-label {font-size: 0.65rem; max-width: 100%; padding: 0 4px}
#history .thumbnail-item img {height: calc(100% - 18px) !important; position: relative; top: -9px}
footer {display: none !important}
"""


def build_page(pipeline: TransfusionPipeline) -> Any:
    """The page, a `gradio.Blocks`."""
    pipeline.set_progress_bar_config(disable=True)
    paint = PaintTab(pipeline) if pipeline.has_images else None
    trained = [] if paint is None else pipeline.sizes.trained
    sizes = "".join(f" {height} x {width}," for height, width in trained)
    with gr.Blocks(title="transfusion_mot", analytics_enabled=False, delete_cache=CACHE_SECONDS) as page:
        gr.Markdown(
            f"# transfusion_mot\n{_size(pipeline)} parameters,{sizes} {pipeline.device}",
            elem_id="title",
        )
        if paint is not None:
            paint.add()
            if pipeline.config.trained_on_edits:
                EditTab(pipeline).add()
            if pipeline.codec.kind == "latents":
                RepaintTab(pipeline).add()
            CaptionTab(pipeline).add()
            DocumentTab(pipeline).add()
        if pipeline.has_audio:
            SpeechTab(pipeline).add()
        if paint is not None:
            paint.add_history()
    return page


def _size(pipeline: TransfusionPipeline) -> str:
    count = sum(parameter.numel() for parameter in pipeline.transformer.parameters())
    return f"{count / 1e9:.1f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"


def launch_options(host: str, port: int, share: bool) -> dict[str, Any]:
    """Arguments of `gradio.Blocks.launch` for a page without external resources."""
    return {
        "server_name": host,
        "server_port": port,
        "share": share,
        "max_file_size": MAX_UPLOAD,
        # No fonts or scripts from other servers.
        "theme": gr.themes.Default(
            primary_hue="indigo",
            neutral_hue="slate",
            font=["ui-sans-serif", "system-ui", "sans-serif"],
            font_mono=["ui-monospace", "monospace"],
        ),
        "css": CSS,
        "footer_links": [],
    }
