"""The page of a report: its content, and how a browser shows it."""

import base64
import io
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from transfusion_mot.data.emoji import emoji_captions, render_emoji
from transfusion_mot.evaluation.report.content import Metric, Neighbour, Picture, Report, SweepPoint, metrics_table
from transfusion_mot.evaluation.report.curves import sweep_figure
from transfusion_mot.evaluation.report.page import PAGE_FILE, embedded, headlines, picture_groups, spread, write_report
from transfusion_mot.evaluation.report.published import own_row, published_table

pytestmark = pytest.mark.slow

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
in_browser = pytest.mark.skipif(BROWSER is None, reason=f"no browser is installed ({', '.join(BROWSERS)})")
TITLE = "Held-out emoji <& friends>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty real emoji, large and small."""
    folder = tmp_path_factory.mktemp("report")
    for number, stem in enumerate(list(emoji_captions())[::90][:40]):
        Image.fromarray(render_emoji(stem, 300 if number % 2 else 48)).save(folder / f"{number:02d}.png")
    return folder


@pytest.fixture(scope="module")
def report(folder: Path) -> Report:
    rng = np.random.default_rng(0)
    captions = list(emoji_captions().values())[::90][:40]
    scores = rng.random(40).round(4).tolist()
    protocol = {"real": 40, "generated": 40, "weights": "sha256 0", "guidance": 3.0}
    metrics = [
        Metric("FD-EfficientNet (generated)", 48.13, protocol, (45.0, 51.0)),
        Metric("KD-EfficientNet (generated)", -0.0012, {**protocol, "pairs": "all"}, (-0.01, 0.007)),
        Metric("CLIP cosine (generated)", 0.25, {"images": 40}, (0.24, 0.26), tuple(scores)),
        Metric("CLIP score x100 (generated)", 25.0, {"images": 40}),
        Metric("CIDEr x100", 547.0, {"captioned images": "sha256 1"}),
        Metric("text loss (books)", 2.5, {"texts": 8, "row": 64}, (2.4, 2.6)),
        Metric("perplexity (books)", 12.18, {"texts": 8, "row": 64}, (11.0, 13.5)),
        *(
            Metric(f"diffusion loss ({kind}{at})", 1.36 + place / 10, {"images": 8}, (1.2, 1.4 + place / 10))
            for kind in ("conditional", "unconditional")
            for place, at in enumerate(("", ", t = 0.25", ", t = 0.75"))
        ),
    ]
    sweep = [
        SweepPoint(
            {"guidance_scale": scale, "num_inference_steps": steps, "scheduler": "FlowMatchEulerDiscreteScheduler"},
            [Metric("FD-EfficientNet (generated)", 50 - scale * steps), Metric("CLIP cosine (generated)", scale / 20)],
        )
        for steps in (4, 8)
        for scale in (1.0, 2.0, 3.0)
    ]
    pictures = [
        Picture(f"{n:02d}.png", captions[n], scores[n], f"{(n + 1) % 40:02d}.png", [captions[n]]) for n in range(40)
    ]
    return Report(
        TITLE,
        "evaluate/benchmark.py --checkpoint run",
        "2026-01-01T00:00:00+00:00",
        {"checkpoint": "runs/emoji", "sweep": {"num_images": None}, "clip": None},
        {"transfusion_mot": "0.1.0"},
        metrics,
        sweep,
        pictures,
        "CLIP cosine",
        False,
        [replace(picture, prompt=f"said of {picture.prompt}", score=None) for picture in pictures],
        [Neighbour("00.png", "one", "01.png", "another", 0.125)],
        ["3 prompts are cut."],
    )


@pytest.fixture(scope="module")
def page(report: Report, folder: Path) -> Path:
    write_report(report, folder, own_row("emoji", "guidance 3", report.metrics))
    return folder / PAGE_FILE


class Elements(HTMLParser):
    """Elements with their attributes, and the text between them; checks that all elements are closed."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_needs_nothing_beside_itself(page: Path) -> None:
    elements = Elements()
    elements.feed(page.read_text())
    assert elements.open == []
    assert TITLE in elements.text
    tags = [tag for tag, _ in elements.found]
    assert "script" not in tags
    assert "link" not in tags
    sources = [attributes["src"] for tag, attributes in elements.found if tag == "img"]
    # Best and worst with their real images, random ones, captions, and a pair of neighbours.
    assert len(sources) == 2 * 2 * 16 + 40 + 24 + 2
    assert all(source.startswith("data:image/") for source in sources)
    references = re.findall(r'(?:href|src|url\()="?([^"\s>]+)', page.read_text())
    assert all(reference.startswith(("#", "data:image/")) for reference in references)
    ids = {attributes["id"] for tag, attributes in elements.found if tag == "section"}
    links = {attributes["href"] for tag, attributes in elements.found if tag == "a"}
    assert links == {f"#{name}" for name in ids}
    assert all(attributes.get("alt") for tag, attributes in elements.found if tag == "img")


def test_thumbnails_are_small_and_pictures_of_the_files(folder: Path) -> None:
    for name, size in (("00.png", 48), ("01.png", 256)):
        picture = Image.open(io.BytesIO(base64.b64decode(embedded(folder / name).split(",")[1])))
        assert picture.size == (size, size)
        expected = Image.open(folder / name).resize((size, size), Image.Resampling.LANCZOS)
        difference = np.abs(np.asarray(picture.convert("RGB"), float) - np.asarray(expected.convert("RGB"), float))
        assert difference.mean() < 3


def test_grids(report: Report) -> None:
    best, worst, drawn = (pictures for _, _, pictures in picture_groups(report))
    ordered = sorted(report.pictures, key=lambda picture: picture.score)
    assert worst == ordered[:16]
    assert best == ordered[::-1][:16]
    assert len({picture.file for picture in drawn}) == 40
    by_distance = picture_groups(replace(report, lower_is_better=True))
    assert by_distance[0][2] == worst
    unscored = replace(report, pictures=[replace(picture, score=None) for picture in report.pictures])
    assert [title for title, _, _ in picture_groups(unscored)] == ["Random"]
    assert spread(report.pictures, 5) == spread(report.pictures, 5)
    assert picture_groups(replace(report, pictures=[])) == []


@pytest.mark.parametrize(
    ("names", "axis"),
    [
        (["FD-CLIP", "CLIP-MMD", "precision (CLIP)"], "guidance scale"),
        (["FD-CLIP", "CLIP-MMD", "CLIP cosine"], "CLIP cosine (generated)"),
        (["FD-CLIP", "PickScore"], "guidance scale"),
    ],
)
def test_a_distance_in_features_of_clip_is_no_clip_score(report: Report, names: list[str], axis: str) -> None:
    points = [
        replace(point, metrics=[Metric(f"{name} (generated)", float(place)) for place, name in enumerate(names)])
        for point in report.sweep
    ]
    figure = sweep_figure(points)
    assert figure is not None
    assert figure.axes[0].get_xlabel() == axis


def test_tables(report: Report, page: Path) -> None:
    text = (page.parent / "metrics.md").read_text()
    single = [metric for metric in report.metrics if ", t = " in metric.name]
    assert metrics_table([metric for metric in report.metrics if metric not in single]) in text
    assert "| t | conditional | unconditional |\n| ---: | ---: | ---: |\n| 0.25 | 1.46 [1.2, 1.5] | 1.46" in text
    assert "| KD-EfficientNet (generated) | -0.0012 [-0.01, 0.007] | as above, pairs: all |" in re.sub(" +", " ", text)
    assert "![image distance of each setting](sweep.png)" in text
    assert Image.open(page.parent / "sweep.png").size[0] > 500
    own = published_table(own_row("emoji", "guidance 3", report.metrics)).splitlines()
    assert own[2] == "| **emoji** | guidance 3 | 48.13 (FD-EfficientNet, no FID) | 25 | 547 |  | this evaluation |"
    assert len(own) == 3 + 17
    assert {line.count("|") for line in own} == {8}


@pytest.mark.parametrize("loss", ["diffusion loss", "loss of image codes"])
def test_the_top_of_the_page_has_the_loss_of_pictures(loss: str) -> None:
    names = ["FD-EfficientNet (generated)", "text loss (captions of emoji)", f"{loss} (conditional)"]
    names += [f"{loss} (unconditional)", "FD-EfficientNet (reconstructed)"]
    found = [metric.name for metric in headlines([Metric(name, 1.0) for name in names])]
    assert found == ["FD-EfficientNet (generated)", f"{loss} (conditional)", "text loss (captions of emoji)"]


def browse(page: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    assert BROWSER is not None
    common = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-dev-shm-usage"]
    profile = f"--user-data-dir={page.parent / 'profile'}"
    command = [BROWSER, *common, profile, *arguments, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


@in_browser
def test_a_browser_shows_it_light_and_dark(page: Path) -> None:
    shots = {}
    for name, scheme in (("light", 1), ("dark", 0)):
        file = page.parent / f"{name}-shot.png"
        browse(
            page,
            f"--blink-settings=preferredColorScheme={scheme}",
            "--window-size=1200,3200",
            f"--screenshot={file}",
        )
        shots[name] = np.asarray(Image.open(file).convert("L"), float)
    # The corners are paper, and the whole is mostly that.
    assert shots["light"][5, 5] > 240
    assert shots["dark"][5, 5] < 40
    assert np.median(shots["light"]) > 240
    assert np.median(shots["dark"]) < 50
    # Something is drawn all the way down.
    bands = np.array_split(shots["light"][:3000], 6)
    assert all(band.std() > 5 for band in bands)


@in_browser
@pytest.mark.parametrize("width", [360, 800, 1400])
def test_nothing_is_wider_than_the_window_and_all_pictures_load(page: Path, width: int) -> None:
    """Measured by a script in a page that holds the report in a frame of that width."""
    probe = page.with_name("probe.html")
    # The policy of the page forbids scripts, so the frame is looked into from outside.
    probe.write_text(
        f'<iframe id="f" style="width:{width}px;height:900px;border:0" srcdoc="{_quoted(page.read_text())}"></iframe>'
        """<pre id="out"></pre><script>
        f.onload = () => {
          const d = f.contentDocument, i = [...d.images];
          out.textContent = JSON.stringify({
            width: d.documentElement.scrollWidth, window: f.clientWidth, images: i.length,
            broken: i.filter(x => !x.complete || !x.naturalWidth).length,
            requests: d.defaultView.performance.getEntriesByType('resource')
              .map(x => x.name).filter(x => !x.startsWith('data:')).length,
            svg: d.querySelectorAll('svg').length, title: d.title,
            font: getComputedStyle(d.querySelector('svg text')).fontFamily == getComputedStyle(d.body).fontFamily,
          });
        };</script>"""
    )
    dom = browse(probe, "--window-size=1500,1000", "--virtual-time-budget=5000", "--dump-dom").stdout
    found = json.loads(unescape(re.search(r'<pre id="out">(\{.*?\})</pre>', dom)[1]))
    assert found["width"] <= found["window"] == width
    assert found["images"] > 100
    assert found["broken"] == found["requests"] == 0
    assert found["svg"] == 2
    assert found["font"]
    assert found["title"].startswith(TITLE)


def _quoted(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;")
