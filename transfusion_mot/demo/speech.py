"""The tab of audio, for models with speech: text or a picture to speech, and speech to text or pictures."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from transfusion_mot.data.audio import Audio, decode_audio
from transfusion_mot.demo.live import painted_live
from transfusion_mot.demo.shared import (
    MAX_IMAGES,
    MAX_TOKENS,
    MODEL,
    UPLOADED,
    add_gallery,
    add_seed,
    add_upload,
    gr,
    mistakes_shown,
    refused,
    uploaded,
)
from transfusion_mot.pipeline import TransfusionPipeline

# Maximum seconds of speech on the page, if training had longer audio.
MAX_SECONDS = 30.0


class SpeechTab:
    """Speech output and speech input, with one pipeline."""

    def __init__(self, pipeline: TransfusionPipeline) -> None:
        self.pipeline = pipeline
        self.trained = pipeline.scheduler

    def speak(
        self, text: str, path: str | None, temperature: float, scale: float, seed: int, seconds: float
    ) -> tuple[tuple[int, NDArray[np.int16]], str]:
        """A text, or an uploaded picture if there is no text => sample rate and samples, and a line about them."""
        text = text.strip()
        if not text and path is None:
            raise refused("Write a text to say, or give a picture.")
        with mistakes_shown():
            (audio,) = self.pipeline.speak(
                text or uploaded(path),
                temperature=temperature,
                guidance_scale=scale,
                max_seconds=seconds,
                generator=torch.Generator().manual_seed(int(seed)),
            )
        if not len(audio.samples):
            raise refused("The speech is empty; try another seed.")
        return (audio.sample_rate, (audio.samples * 32767).astype(np.int16)), f"{audio.seconds:.1f} s of speech"

    def transcribe(self, path: str | None) -> str:
        """A recording => its transcript."""
        with mistakes_shown():
            (text,) = self.pipeline.transcribe(_recording(path), max_new_tokens=MAX_TOKENS)
        return text or "(nothing)"

    def paint(self, path: str | None, num_images: int, seed: int) -> Iterator[tuple[list[Image.Image], str]]:
        """A recording => pictures from its speech, and a line about them."""
        is_codes = self.pipeline.codec.kind == "codes"

        def run(on_step_end: Callable[..., dict[str, Any]]) -> list[Image.Image]:
            self.pipeline.scheduler = self.trained
            seeds = [int(seed) + index for index in range(int(num_images))]
            images: list[Image.Image] = self.pipeline(
                audio,
                num_images_per_prompt=len(seeds),
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                callback_on_step_end=None if is_codes else on_step_end,
            ).images
            return images

        with mistakes_shown():
            audio = _recording(path)
            for images, line, _ in painted_live(run):
                yield images, line

    def add(self) -> None:
        """Add the tab to the page that is being built."""
        with gr.Tab("Speech"), gr.Row(equal_height=False):
            if self.pipeline.can_speak:
                with gr.Column(min_width=320):
                    self._add_speaking()
            with gr.Column(min_width=320):
                self._add_listening()

    def _add_speaking(self) -> None:
        longest = min(MAX_SECONDS, self.pipeline.config.max_audio_seconds or MAX_SECONDS)
        own_scale = self.pipeline.guidance_of(self.pipeline.audio_modality)
        text = gr.Textbox(label="Text to say", placeholder="a red apple", max_lines=4, elem_id="said")
        # A model without pictures has no such field.
        picture = gr.State(None)
        if self.pipeline.has_images:
            with gr.Accordion("Or a picture to describe", open=False):
                picture = add_upload("spoken-picture", height=220)
        start = gr.Button("Speak", variant="primary", elem_id="speak")
        spoken = gr.Audio(label="Speech", format="wav", interactive=False, buttons=["download"], elem_id="spoken")
        line = gr.Markdown(elem_id="spoken-line", elem_classes="told", min_height=24)
        with gr.Row():
            temperature = gr.Slider(0, 2, 1, step=0.05, label="Temperature")
            scale = gr.Slider(1, 15, own_scale, step=0.1, label="Guidance scale")
        with gr.Row():
            seconds = gr.Slider(0.5, longest, longest, step=0.5, label="Max. seconds")
            seed = add_seed()
        gr.on(
            [start.click, text.submit],
            self.speak,
            [text, picture, temperature, scale, seed, seconds],
            [spoken, line],
            **MODEL,
        )

    def _add_listening(self) -> None:
        recording = gr.Audio(
            label="Recording",
            type="filepath",
            sources=["upload", "microphone"],
            buttons=["download"],
            elem_id="recording",
        )
        # The unchanged file: `decode_audio` reports what is wrong with it, while Gradio would only fail.
        recording.preprocess = lambda payload: payload and payload.path
        paints = self.pipeline.can_paint
        with gr.Row():
            transcribe = gr.Button("Transcribe", variant="primary", elem_id="transcribe")
            if paints:
                paint = gr.Button("Paint from speech", elem_id="paint-said")
        if paints:
            with gr.Row():
                num_images = gr.Slider(1, MAX_IMAGES, 4, step=1, label="Pictures")
                seed = add_seed()
        words = gr.Textbox(label="Transcript", lines=2, elem_id="transcript", interactive=False)
        transcribe.click(self.transcribe, recording, words, **MODEL)
        if paints:
            painted = add_gallery("heard")
            line = gr.Markdown(elem_id="heard-line", elem_classes="told", min_height=24)
            paint.click(
                self.paint,
                [recording, num_images, seed],
                [painted, line],
                show_progress="minimal",
                show_progress_on=painted,
                **MODEL,
            )


def _recording(path: str | None) -> Audio:
    """The audio in an uploaded file.

    Raises:
        UserError: It is not audio.
    """
    if path is None:
        raise refused("Record something, or give an audio file.")
    return decode_audio(path, UPLOADED)
