"""The page: a line about the model, the tabs of what it can do, and the history."""

from typing import Any

from transfusion_mot.demo.caption import CaptionTab
from transfusion_mot.demo.edit import EditTab
from transfusion_mot.demo.paint import PaintTab
from transfusion_mot.demo.shared import CACHE_SECONDS, gr
from transfusion_mot.demo.speech import SpeechTab
from transfusion_mot.pipeline import TransfusionPipeline

MAX_UPLOAD = "10mb"
# Small pictures fill their place; the page has one column on a phone.
CSS = """
.gradio-container main {width: 100%; max-width: 1080px !important; margin: 0 auto !important}
#painted img, #edits img, #history img, #heard img {object-fit: contain}
#title {margin: 4px 0 0}
#title h1 {font-size: 1.5rem; margin: 0}
#title p, #line, #past, #spoken-line, #heard-line {opacity: 0.7; margin: 0}
#history .caption-label {font-size: 0.7rem}
footer {display: none !important}
"""


def build_page(pipeline: TransfusionPipeline) -> Any:
    """The page, a `gradio.Blocks`."""
    pipeline.set_progress_bar_config(disable=True)
    paint = PaintTab(pipeline) if pipeline.has_images else None
    sizes = "" if paint is None else f" {', '.join(paint.sizes)} px,"
    with gr.Blocks(title="transfusion_mot", analytics_enabled=False, delete_cache=CACHE_SECONDS) as page:
        gr.Markdown(
            f"# transfusion_mot\n{_size(pipeline)} parameters,{sizes} {pipeline.device}",
            elem_id="title",
        )
        if paint is not None:
            paint.add()
            if pipeline.config.trained_on_edits:
                EditTab(pipeline).add()
            CaptionTab(pipeline).add()
        if pipeline.has_audio:
            SpeechTab(pipeline).add()
        if paint is not None:
            paint.add_history()
    return page


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
