"""The speech tab in a real browser, on a tiny model."""

import io
import socket
import wave
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_demo import BROWSER
from test_pipeline import tiny_pipeline
from test_pipeline_speech import speech_pipeline, tiny_encodec, tone

from transfusion_mot.data.audio import write_wav
from transfusion_mot.demo.page import build_page, launch_options
from transfusion_mot.demo.shared import MAX_TOKENS
from transfusion_mot.pipeline import TransfusionPipeline

gr = pytest.importorskip("gradio", reason="the page needs gradio: pip install 'transfusion-mot[demo]'")
api = pytest.importorskip("playwright.sync_api", reason="the page is tested with playwright: pip install playwright")

pytestmark = pytest.mark.slow

# Browsers play nothing below 3 kHz.
RATE = 16000


@pytest.fixture(scope="module")
def pipeline() -> TransfusionPipeline:
    return speech_pipeline(audio_tokenizer=tiny_encodec(sampling_rate=RATE, target_bandwidths=[4.0]))


@pytest.fixture(scope="module")
def address(pipeline) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    page = build_page(pipeline).queue()
    page.launch(**launch_options("127.0.0.1", port, share=False), prevent_thread_lock=True, quiet=True)
    yield f"http://127.0.0.1:{port}"
    page.close(verbose=False)


@pytest.fixture
def page(address):
    """A visitor of the tab; every request of the page to another server is an error."""
    if BROWSER is None:
        pytest.skip("the page is tested in Chromium, which is not installed: apt-get install chromium")
    elsewhere = []
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        visit = chromium.new_page(viewport={"width": 1280, "height": 900})
        visit.on(
            "request",
            lambda asked: (
                elsewhere.append(asked.url) if not asked.url.startswith((address, "data:", "blob:")) else None
            ),
        )
        visit.set_default_timeout(20_000)
        visit.goto(address)
        visit.get_by_role("tab", name="Speech").click()
        yield visit
        chromium.close()
    assert elsewhere == []


def test_speech_transcripts_and_pictures(page, pipeline, tmp_path) -> None:
    page.fill("#said textarea", "sun")
    with page.expect_response(lambda answer: answer.url.endswith(".wav")) as answered:
        page.click("#speak")
    with wave.open(io.BytesIO(page.request.get(answered.value.url).body())) as file:
        assert file.getframerate() == RATE
        samples = np.frombuffer(file.readframes(file.getnframes()), dtype="<i2")
    (expected,) = pipeline.speak("sun", generator=torch.Generator().manual_seed(0))
    assert np.abs(samples - 32767 * expected.samples).max() <= 1
    page.wait_for_function(f"document.querySelector('#spoken-line').innerText == '{expected.seconds:.1f} s of speech'")

    recording = tone(0.5, 400, rate=RATE)
    write_wav(recording, tmp_path / "a.wav")
    page.set_input_files("#recording input[type=file]", tmp_path / "a.wav")
    page.wait_for_selector("#recording [aria-label=Clear], #recording [title=Clear]")
    page.click("#transcribe")
    page.wait_for_function("document.querySelector('#transcript textarea').value")
    (heard,) = pipeline.transcribe(recording, max_new_tokens=MAX_TOKENS)
    shown = page.input_value("#transcript textarea")
    assert shown.replace("\n", "") == heard.replace("\r", "").replace("\n", "").replace("\0", "�")
    page.click("#paint-said")
    page.wait_for_function(r"/^\d+\.\d s$/.test(document.querySelector('#heard-line').innerText.trim())")
    page.wait_for_function("document.querySelectorAll('#heard img').length == 4")
    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
    images = pipeline(recording, num_images_per_prompt=4, generator=generators).images
    sources = page.eval_on_selector_all("#heard img", "all => all.map(i => i.src)")
    for source, image in zip(sources, images, strict=True):
        painted = np.asarray(Image.open(io.BytesIO(page.request.get(source).body())).convert("RGB")).astype(int)
        assert np.abs(painted - np.asarray(image)).max() <= 1


def test_mistakes_are_told_on_the_page(page, tmp_path: Path) -> None:
    def told() -> str:
        page.wait_for_selector(".toast-body")
        text = page.inner_text(".toast-body")
        page.click(".toast-close")
        page.wait_for_selector(".toast-body", state="detached")
        return text

    page.click("#speak")
    assert "Write a text to say, or give a picture." in told()
    page.click("#transcribe")
    assert "Record something, or give an audio file." in told()
    write_wav(tone(1.5, rate=RATE), tmp_path / "long.wav")
    page.set_input_files("#recording input[type=file]", tmp_path / "long.wav")
    page.wait_for_selector("#recording [aria-label=Clear], #recording [title=Clear]")
    page.click("#transcribe")
    assert "lasts 1.5 seconds; the model was trained on at most 1: cut it" in told()


def test_only_models_with_speech_have_the_tab() -> None:
    def tabs(pipeline: TransfusionPipeline) -> list[str]:
        return [block.label for block in build_page(pipeline).blocks.values() if isinstance(block, gr.Tab)]

    assert "Speech" not in tabs(tiny_pipeline())
    assert tabs(speech_pipeline(has_images=False)) == ["Speech"]
