"""The demo page in a real browser, on a tiny model."""

import base64
import io
import re
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_pipeline import IMAGE_SIZE, tiny_pipeline
from test_pipeline_codes import codes_pipeline

from transfusion_mot.demo import __main__ as demo
from transfusion_mot.demo import shared
from transfusion_mot.demo.document import DocumentTab, as_html
from transfusion_mot.demo.live import NUM_PREVIEWS, PAINTING, painted_live
from transfusion_mot.demo.page import build_page, launch_options
from transfusion_mot.demo.paint import PaintTab, begin_with
from transfusion_mot.demo.repaint import RepaintTab, mask_of, on_white
from transfusion_mot.demo.shared import MAX_QUEUE, gr
from transfusion_mot.errors import UserError
from transfusion_mot.pipeline import TransfusionPipeline
from transfusion_mot.schedulers import STOCHASTIC_SOLVER, make_sampling_scheduler

pytestmark = pytest.mark.slow

BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
STEPS = 20


def test_updates_come_while_it_paints_and_the_last_is_finished():
    pipeline = tiny_pipeline()
    generator = torch.Generator().manual_seed(3)
    updates = list(
        painted_live(
            lambda on_step_end: pipeline("sun", STEPS, generator=generator, callback_on_step_end=on_step_end).images
        )
    )
    assert len(updates) > NUM_PREVIEWS
    assert [finished for *_, finished in updates] == [False] * (len(updates) - 1) + [True]
    assert updates[0][1] == f"Step 1 of {STEPS}"
    assert re.fullmatch(r"\d+\.\d s", updates[-1][1])
    expected = pipeline("sun", STEPS, generator=torch.Generator().manual_seed(3)).images[0]
    assert np.array_equal(updates[-1][0][0], expected)
    distance = [np.abs(np.asarray(images[0]).astype(int) - np.asarray(expected)).mean() for images, *_ in updates]
    assert distance[0] > distance[-2]


def test_painting_that_nobody_waits_for_stops():
    steps = []

    def paint(on_step_end):
        def count(*step: object) -> dict:
            steps.append(step)
            return on_step_end(*step)

        return tiny_pipeline()("sun", 1000, callback_on_step_end=count).images

    updates = painted_live(paint)
    next(updates)
    updates.close()
    assert not painting()
    assert len(steps) < 500


def test_what_goes_wrong_in_painting_is_raised_where_it_can_be_shown():
    with pytest.raises(UserError, match="the model was trained on at most 8"):
        list(painted_live(lambda on_step_end: tiny_pipeline()("octopus " * 9).images))


@pytest.mark.parametrize(
    ("arguments", "missing", "message"),
    [
        (["--checkpoint", "nothing"], False, "there is no folder 'nothing'"),
        (["--colour"], False, "unrecognized arguments: --colour"),
        ([], True, r"pip install 'transfusion-mot\[demo\]'"),
    ],
)
def test_mistakes_end_with_one_sentence(monkeypatch, arguments, missing, message):
    if missing:
        monkeypatch.setattr(shared, "gr", None)
    elif gr is None:
        monkeypatch.setattr(shared, "gr", object())
    monkeypatch.setattr("sys.argv", ["demo", *arguments])
    with pytest.raises(UserError, match=message):
        demo.main()


def test_the_page_begins_with_the_scheduler_of_the_model():
    if gr is None:
        pytest.skip("the page needs gradio: pip install 'transfusion-mot[demo]'")
    pipeline = tiny_pipeline()
    pipeline.scheduler = make_sampling_scheduler(pipeline.scheduler, STOCHASTIC_SOLVER)
    blocks = build_page(pipeline).blocks.values()
    assert [block.value for block in blocks if getattr(block, "label", "") == "Scheduler"] == [STOCHASTIC_SOLVER]


def test_the_page_of_a_model_of_codes_draws_them_as_the_fields_say():
    if gr is None:
        pytest.skip("the page needs gradio: pip install 'transfusion-mot[demo]'")
    pipeline = codes_pipeline()
    labels = {getattr(block, "label", "") for block in build_page(pipeline).blocks.values()}
    assert {"Temperature", "Top-p", "Top-k (0 is all)"} <= labels
    assert not {"Steps", "Scheduler"} & labels
    tab = PaintTab(pipeline)
    (files, *_), *_ = list(tab.paint([], "sun", "", 2, 5, *pipeline.sizes.default, 2.0, 0.0, 0.8, 0.9, 6))
    settings = {"code_temperature": 0.8, "code_top_p": 0.9, "code_top_k": 6, "guidance_scale": 2.0}
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    expected = pipeline("sun", num_images_per_prompt=2, generator=generators, **settings).images
    assert all(np.array_equal(Image.open(file), image) for file, image in zip(files, expected, strict=True))
    assert Image.open(files[0]).text["code_top_k"] == "6"


@pytest.mark.parametrize(
    ("beginning", "prompt", "expected"),
    [
        ("noto emoji of", "octopus", "noto emoji of octopus"),
        ("noto emoji of", "noto v1 emoji of octopus", "noto emoji of octopus"),
        ("noto v1 emoji of", "noto emoji of", "noto v1 emoji of "),
        ("", "noto emoji of octopus ", "octopus"),
        ("noto emoji of", "noto emoji office", "noto emoji of noto emoji office"),
    ],
)
def test_a_prompt_takes_another_beginning(beginning, prompt, expected):
    assert begin_with(beginning, prompt, ["noto emoji of", "noto v1 emoji of"]) == expected


def test_the_page_has_the_examples_of_the_snapshot():
    if gr is None:
        pytest.skip("the page needs gradio: pip install 'transfusion-mot[demo]'")
    examples = {"prompts": ["red sun"], "beginnings": ["red", "blue"]}
    blocks = list(build_page(tiny_pipeline(examples=examples)).blocks.values())
    (style,) = (block for block in blocks if getattr(block, "elem_id", "") == "style")
    assert [value for _, value in style.choices] == ["", "red", "blue"]
    assert [["red sun"]] in [getattr(block, "samples", None) for block in blocks]
    without = build_page(tiny_pipeline()).blocks.values()
    assert "style" not in [getattr(block, "elem_id", "") for block in without]


def test_what_is_drawn_on_a_picture_is_painted_anew_and_the_rest_stays():
    if gr is None:
        pytest.skip("the page needs gradio: pip install 'transfusion-mot[demo]'")
    pipeline = tiny_pipeline()
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8))
    layer = Image.new("RGBA", picture.size)
    layer.paste((225, 29, 72, 255), (0, 0, IMAGE_SIZE // 2, IMAGE_SIZE))
    drawn = {"background": picture.convert("RGBA"), "layers": [layer]}
    *_, ((result,), _) = RepaintTab(pipeline).repaint(drawn, "sun", 1.0, 1, 3, 2, 1.0)
    mask = Image.fromarray(np.repeat([255, 0], IMAGE_SIZE // 2)[None].repeat(IMAGE_SIZE, 0).astype(np.uint8))
    settings = {"image": picture, "mask_image": mask, "strength": 1.0, "num_inference_steps": 2, "guidance_scale": 1.0}
    (expected,) = pipeline("sun", **settings, generator=torch.Generator().manual_seed(3)).images
    assert np.array_equal(result, expected)
    assert np.array_equal(np.asarray(result)[:, IMAGE_SIZE // 2 :], np.asarray(picture)[:, IMAGE_SIZE // 2 :])
    assert not np.array_equal(result, picture)


def test_transparent_parts_of_a_picture_are_white_and_nothing_drawn_is_no_mask():
    assert on_white(Image.new("RGBA", (2, 2), (9, 9, 9, 0))).getpixel((0, 0)) == (255, 255, 255)
    assert mask_of([Image.new("RGBA", (2, 2))]) is None
    assert mask_of([]) is None


def test_a_document_is_shown_in_reading_order():
    if gr is None:
        pytest.skip("the page needs gradio: pip install 'transfusion-mot[demo]'")
    pipeline = tiny_pipeline()
    shown = DocumentTab(pipeline).go_on("<sun>", None, 1, 4, 5, 2, 1.0, 1.0)
    settings = {"max_images": 1, "max_new_tokens": 4, "num_inference_steps": 2, "guidance_scale": 1.0}
    generator = torch.Generator().manual_seed(5)
    follows = pipeline.interleave(["<sun>"], **settings, temperature=1.0, generator=generator)
    assert shown == as_html(["<sun>"], follows)
    assert shown.startswith('<span class="given">&lt;sun&gt;</span>')
    (source,) = re.findall(r'src="data:image/png;base64,([^"]+)"', as_html([], [Image.new("RGB", (2, 3), "red")]))
    assert Image.open(io.BytesIO(base64.b64decode(source))).size == (2, 3)


# --- In a browser. ---


@pytest.fixture(scope="module")
def pipeline() -> TransfusionPipeline:
    return tiny_pipeline(num_inference_steps=STEPS)


@pytest.fixture(scope="module")
def address(pipeline) -> Iterator[str]:
    """A server of the page."""
    if gr is None:
        pytest.skip("the page needs gradio: pip install 'transfusion-mot[demo]'")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    page = build_page(pipeline).queue(max_size=MAX_QUEUE)
    options = launch_options("127.0.0.1", port, share=False)
    page.launch(**options, prevent_thread_lock=True, quiet=True)
    yield f"http://127.0.0.1:{port}"
    page.close(verbose=False)


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip(
        "playwright.sync_api", reason="the page is tested with playwright: pip install playwright"
    )
    if BROWSER is None:
        pytest.skip("the page is tested in Chromium, which is not installed: apt-get install chromium")
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(address, browser):
    """A new visitor; every request of the page to another server is an error."""
    visit = browser.new_page(viewport={"width": 1280, "height": 900})
    elsewhere = []
    visit.on(
        "request",
        lambda asked: elsewhere.append(asked.url) if not asked.url.startswith((address, "data:", "blob:")) else None,
    )
    visit.set_default_timeout(20_000)
    visit.goto(address)
    yield visit
    visit.close()
    assert elsewhere == []


def painted(page, count: int) -> list[np.ndarray]:
    """Wait until it is finished => the pictures as the page's files hold them."""
    page.wait_for_function(r"/^\d+\.\d s$/.test(document.querySelector('#line').innerText.trim())")
    page.wait_for_function(
        f"(all => all.length == {count} && all.every(i => i.complete && i.naturalWidth == {IMAGE_SIZE}))"
        "([...document.querySelectorAll('#painted img')])"
    )
    sources = page.eval_on_selector_all("#painted img", "all => all.map(i => i.src)")
    files = [page.request.get(source).body() for source in sources]
    return [np.asarray(Image.open(io.BytesIO(file)).convert("RGB")).astype(int) for file in files]


def test_a_prompt_becomes_pictures(page, pipeline, tmp_path):
    # What is seen on the way.
    page.evaluate(
        "() => {window.said = []; new MutationObserver(() => window.said.push(document.body.innerText))"
        ".observe(document.body, {childList: true, subtree: true, characterData: true})}"
    )
    before = page.locator("#painted").bounding_box()
    page.fill("#prompt textarea", "sun")
    page.click("#paint")
    images = painted(page, 4)
    # Nothing moves, and all of the pictures is seen.
    assert page.locator("#painted").bounding_box() == before
    last = page.locator("#painted img").nth(3).bounding_box()
    assert last["y"] + last["height"] <= before["y"] + before["height"]
    expected = pipeline("sun", num_images_per_prompt=4, generator=[torch.Generator().manual_seed(i) for i in range(4)])
    for image, other in zip(images, expected.images, strict=True):
        assert np.abs(image - np.asarray(other)).max() <= 1
    assert any(f"of {STEPS}" in text for text in page.evaluate("window.said"))
    page.wait_for_function("document.querySelectorAll('#history img').length == 4")

    page.fill("#prompt textarea", "moon")
    page.press("#prompt textarea", "Enter")
    page.wait_for_function("document.querySelectorAll('#history img').length == 8")
    assert np.abs(painted(page, 4)[0] - images[0]).max() > 1
    # The second picture of the first prompt.
    page.locator("#history button").filter(has=page.locator("img")).nth(5).click()
    page.wait_for_function("document.querySelector('#prompt textarea').value == 'sun'")
    assert page.get_by_label("Seed").first.input_value() == "1"

    page.screenshot(path=tmp_path / "page.png")
    screenshot = np.asarray(Image.open(tmp_path / "page.png").convert("RGB"))
    assert screenshot.shape[:2] == (900, 1280)
    assert screenshot.std() > 10


@pytest.mark.parametrize(("width", "columns"), [(390, 1), (1180, 2), (1280, 2), (1920, 2)])
def test_the_page_fits_its_window(page, width, columns):
    page.set_viewport_size({"width": width, "height": 900})
    form, results = page.locator("#prompt").bounding_box(), page.locator("#painted").bounding_box()
    assert (results["x"] > form["x"] + form["width"]) == (columns == 2)
    assert results["width"] > (500 if columns == 2 else 300)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    # Nothing is there before the first picture.
    assert not page.locator("#history").is_visible()


@pytest.mark.parametrize(("width", "expected"), [(390, 326), (960, 896), (1920, 1200)])
def test_the_page_uses_the_width_of_its_window_up_to_1200_pixels(page, width, expected):
    page.set_viewport_size({"width": width, "height": 900})
    # A margin of 32 pixels on both sides.
    assert page.locator("main").bounding_box()["width"] == expected


def test_a_seed_is_drawn_in_the_browser(page):
    page.get_by_role("button", name="Random").first.click()
    page.wait_for_function("[...document.querySelectorAll('input[type=number]')].some(i => Number(i.value) > 1000)")


def painting() -> bool:
    return PAINTING in [thread.name for thread in threading.enumerate()]


def test_a_painting_can_be_stopped(page, pipeline, monkeypatch):
    decode = pipeline.decode_latents

    def slowly(latents: torch.Tensor) -> list[Image.Image]:
        time.sleep(1)
        return decode(latents)

    monkeypatch.setattr(pipeline, "decode_latents", slowly)
    page.fill("#prompt textarea", "sun")
    page.click("#paint")
    page.wait_for_function("document.querySelector('#line')?.innerText.startsWith('Step ')")
    assert painting()
    page.click("#stop")
    deadline = time.monotonic() + 5
    while painting() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not painting()
    # The model is free again, and what was stopped is no part of the history.
    monkeypatch.undo()
    page.get_by_label("number input for Pictures").fill("2")
    page.click("#paint")
    painted(page, 2)
    page.wait_for_function("document.querySelectorAll('#history img').length == 2")


def test_a_picture_becomes_a_caption(page, pipeline, tmp_path):
    gradient = np.linspace(0, 255, 3 * IMAGE_SIZE**2).reshape(IMAGE_SIZE, IMAGE_SIZE, 3).astype(np.uint8)
    Image.fromarray(gradient).save(tmp_path / "picture.png")
    page.get_by_role("tab", name="Caption").click()
    page.set_input_files("input[type=file]", tmp_path / "picture.png")
    page.wait_for_selector("#picture img")
    page.click("#caption")
    page.wait_for_function("document.querySelector('#words textarea').value")
    shown = page.input_value("#words textarea")
    assert shown == pipeline.caption(Image.fromarray(gradient))[0].replace("\r", "\n")


def test_mistakes_are_told_on_the_page(page, tmp_path):
    def told() -> str:
        page.wait_for_selector(".toast-body")
        text = page.inner_text(".toast-body")
        page.click(".toast-close")
        page.wait_for_selector(".toast-body", state="detached")
        return text

    page.click("#paint")
    assert "Write a prompt first." in told()
    # In one place, not in each of the fields that a painting fills.
    assert page.locator(".error:visible").count() == 1
    page.fill("#prompt textarea", "octopus " * 9)
    page.click("#paint")
    assert "the model was trained on at most 8: shorten it" in told()
    page.fill("#prompt textarea", "sun")
    page.get_by_label("Seed").first.fill("")
    page.click("#paint")
    assert "Give a seed first, a whole number from 0" in told()
    page.get_by_role("tab", name="Caption").click()
    page.click("#caption")
    assert "Give a picture first." in told()
    (tmp_path / "picture.png").write_bytes(b"no picture")
    page.set_input_files("input[type=file]", tmp_path / "picture.png")
    page.wait_for_selector("#picture img", state="attached")
    page.click("#caption")
    assert "your file" in told()


def test_files_that_are_too_large_are_refused(page, tmp_path):
    large = Path(tmp_path / "large.png")
    large.write_bytes(bytes(11 * 2**20))
    page.get_by_role("tab", name="Caption").click()
    page.set_input_files("input[type=file]", large)
    page.wait_for_selector(".toast-body")
    # In Gradio's words.
    assert "size" in page.inner_text(".toast-body")
    assert page.locator("#picture img").count() == 0
