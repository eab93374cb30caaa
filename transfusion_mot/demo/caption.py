"""The tab that describes a picture."""

import torch

from transfusion_mot.demo.shared import MAX_TOKENS, MODEL, add_seed, add_upload, gr, mistakes_shown, uploaded
from transfusion_mot.pipeline import TransfusionPipeline


class CaptionTab:
    """Captions of a picture, with one pipeline."""

    def __init__(self, pipeline: TransfusionPipeline) -> None:
        self.pipeline = pipeline

    def caption(self, path: str | None, temperature: float, seed: int, max_new_tokens: int) -> str:
        """An uploaded file => its caption."""
        with mistakes_shown():
            image = uploaded(path)
            generator = torch.Generator().manual_seed(int(seed))
            (text,) = self.pipeline.caption(
                image, max_new_tokens=int(max_new_tokens), temperature=temperature, generator=generator
            )
        return text or "(nothing)"

    def add(self) -> None:
        """Add the tab to the page that is being built."""
        with gr.Tab("Caption"), gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=320):
                picture = add_upload("picture")
                describe = gr.Button("Caption", variant="primary", elem_id="caption")
            with gr.Column(scale=7, min_width=320):
                words = gr.Textbox(label="Caption", lines=4, elem_id="words", interactive=False)
                with gr.Row():
                    temperature = gr.Slider(0, 2, 0, step=0.05, label="Temperature")
                    seed = add_seed()
                length = gr.Slider(1, MAX_TOKENS, 64, step=1, label="Max. tokens")
        describe.click(self.caption, [picture, temperature, seed, length], words, **MODEL)
