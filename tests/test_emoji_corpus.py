"""The corpus of ten styles, on a package of the real format with a few drawings of our own."""

import json
import tarfile

import numpy as np
import pytest
from PIL import Image
from process_group import run_script

from transfusion_mot import outputs
from transfusion_mot.config import DataConfig, SourceConfig
from transfusion_mot.data.emoji_corpus import STYLES, Icon, held_out_icons, main
from transfusion_mot.data.sources.open import open_source
from transfusion_mot.errors import UserError

SIZE = 32
RED, BLUE = (255, 0, 0), (0, 0, 255)


def circle(colour):
    return f'<circle cx="8" cy="8" r="4" fill="{colour}"/>'


def write_package(folder):
    """All ten sets draw a red dot; twemoji has more to it."""
    (folder / "json").mkdir(parents=True)
    for icon_set in STYLES:
        icons = {"red-dot": {"body": circle("red")}}
        content = {"prefix": icon_set, "icons": icons, "width": 16, "height": 16}
        if icon_set == "twemoji":
            icons["old-dot"] = {"body": circle("black"), "hidden": True}
            # Twice as wide as high, and not at the origin: blue on the left half, red on the right.
            body = '<path fill="blue" d="M10 20h8v8h-8z"/><path fill="red" d="M18 20h8v8h-8z"/>'
            icons["flag-for-austria"] = {"body": body, "left": 10, "top": 20, "width": 16, "height": 8}
            content["chars"] = {"1f1e6-1f1f9": "flag-for-austria", "1f534": "red-dot"}
        elif icon_set == "fxemoji":
            content |= {"width": 512, "height": 512}
            icons["red-dot"] = {"body": '<circle cx="256" cy="256" r="128" fill="red"/>'}
            icons["torn"] = {"body": "<g>"}
        (folder / "json" / f"{icon_set}.json").write_text(json.dumps(content))
    about = {
        "author": {"name": "A. Painter"},
        "license": {"title": "CC BY 4.0", "spdx": "CC-BY-4.0", "url": "https://l"},
    }
    (folder / "collections.json").write_text(json.dumps({name: {"name": f"Set {name}"} | about for name in STYLES}))
    (folder / "package.json").write_text(json.dumps({"version": "9.8.7"}))


def write_tags(folder):
    (folder / "en").mkdir(parents=True)
    entries = [
        {"label": "flag: Austria", "hexcode": "1F1E6-1F1F9", "tags": ["AT", "flag"]},
        {"label": "red circle", "hexcode": "1F534", "tags": ["geometric", "red"], "skins": []},
    ]
    (folder / "en" / "data.json").write_text(json.dumps(entries))
    (folder / "package.json").write_text(json.dumps({"version": "1.2.3", "license": "MIT"}))


@pytest.fixture
def packages(tmp_path):
    write_package(tmp_path / "icons")
    write_tags(tmp_path / "tags")
    return tmp_path


def draw(packages, *more, size=SIZE, output="corpus", icons="icons"):
    arguments = ["--output", packages / output, "--iconify", packages / icons, "--size", size, "--workers", 1, *more]
    main(list(map(str, arguments)))
    return read(packages / output)


def read(folder):
    entries = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    return {entry["file_name"]: entry for entry in entries}


def test_drawings_captions_and_licences(packages, caplog, capsys):
    entries = draw(packages, "--emojibase", packages / "tags", "--held-out-fraction", 0)
    names = {f"{icon_set}/red-dot.png" for icon_set in STYLES} | {"twemoji/flag-for-austria.png"}
    assert entries.keys() == names, "neither what is hidden nor what cannot be drawn"
    assert "skipped fxemoji/torn.png" in caplog.text
    assert "11 images" in capsys.readouterr().out
    for name in names - {"twemoji/flag-for-austria.png"}:
        pixels = np.asarray(Image.open(packages / "corpus" / name))
        assert pixels.shape == (SIZE, SIZE, 3)
        y, x = np.mgrid[:SIZE, :SIZE] + 0.5
        distance = np.hypot(x - SIZE / 2, y - SIZE / 2)
        assert (pixels[distance < SIZE / 4 - 1] == RED).all(), name
        assert (pixels[distance > SIZE / 4 + 1] == 255).all(), name
    flag = np.asarray(Image.open(packages / "corpus" / "twemoji/flag-for-austria.png"))
    quarter, half = SIZE // 4, SIZE // 2
    assert (flag[quarter : 3 * quarter, :half] == BLUE).all()
    assert (flag[quarter : 3 * quarter, half:] == RED).all()
    assert (np.delete(flag, slice(quarter, 3 * quarter), axis=0) == 255).all()

    assert entries["twemoji/flag-for-austria.png"] == {
        "file_name": "twemoji/flag-for-austria.png",
        "text": ["twemoji emoji of flag for austria", "twemoji emoji of flag for austria: AT"],
        "style": "twemoji",
        "name": "flag for austria",
        "split": "train",
    }
    assert entries["noto-v1/red-dot.png"]["text"] == ["noto v1 emoji of red dot", "noto v1 emoji of red dot: geometric"]
    licences = (packages / "corpus" / "LICENSES").read_text()
    assert all(f"{name}/: Set {name}\n  author:  A. Painter" in licences for name in STYLES)
    assert "9.8.7" in licences
    assert "emojibase-data 1.2.3\n  licence: MIT" in licences


def test_a_tarball_is_as_good_as_a_folder_and_tags_can_be_left_out(packages):
    from_folder = draw(packages)
    with tarfile.open(packages / "icons.tgz", "w:gz") as tar:
        tar.add(packages / "icons", "package")
    assert draw(packages, output="other", icons="icons.tgz") == from_folder
    assert from_folder["noto/red-dot.png"]["text"] == ["noto emoji of red dot"]
    for name in from_folder:
        assert (packages / "other" / name).read_bytes() == (packages / "corpus" / name).read_bytes()


def test_an_interrupted_run_goes_on(packages, monkeypatch):
    entries = draw(packages)
    folder = packages / "corpus"
    (folder / "noto" / "red-dot.png").unlink()
    (folder / "noto" / ".red-dot.png.partial").write_bytes(b"half")
    kept = folder / "twemoji" / "red-dot.png"
    kept.write_bytes(b"not drawn again")
    assert draw(packages) == entries
    assert kept.read_bytes() == b"not drawn again"
    assert (folder / "noto" / "red-dot.png").read_bytes() == (folder / "openmoji" / "red-dot.png").read_bytes()
    assert not list(folder.rglob("*.partial"))
    (packages / "mine").mkdir()
    (packages / "mine" / "metadata.jsonl").write_text("mine")
    with pytest.raises(UserError, match=r"mine' holds files but no corpus\.json of this command"):
        draw(packages, output="mine")
    assert [path.read_text() for path in (packages / "mine").iterdir()] == ["mine"]
    with pytest.raises(UserError, match=r"'size': 32.*'size': 48.*another --output"):
        draw(packages, size=48)
    monkeypatch.setattr(outputs, "_SECONDS_BETWEEN", 0)
    (packages / "corpus" / "corpus.json").write_text("")
    with pytest.raises(UserError, match=r"corpus\.json' is not a file that this command wrote"):
        draw(packages)


def test_held_out_pairs_recombine_what_training_has_seen():
    icons = [Icon(icon_set, f"name-{n}", "") for icon_set in STYLES for n in range(200)]
    icons += [Icon("noto", f"only-noto-{n}", "") for n in range(100)]
    held_out = held_out_icons(icons, 0.2, seed=0)
    assert 0.17 * 2000 < len(held_out) < 0.23 * 2000
    training = set(icons) - held_out
    assert {icon.name for icon in training} == {icon.name for icon in icons}
    assert {icon.style for icon in training} == set(STYLES.values())
    assert held_out_icons(icons[::-1], 0.2, seed=0) == held_out
    assert held_out_icons(icons, 0.2, seed=1) != held_out
    assert held_out_icons(icons, 0.1, seed=0) < held_out, "a larger share keeps what a smaller one holds out"
    everything = held_out_icons(icons, 1.0, seed=0)
    assert len(set(icons) - everything) == 300, "one of each name stays"


def test_the_corpus_is_a_source_with_its_own_split(packages):
    entries = draw(packages, "--emojibase", packages / "tags", "--held-out-fraction", 0.5)
    data = DataConfig(image_size=SIZE, cache_dir=str(packages / "cache"), held_out_fraction=0.0)
    source = SourceConfig(kind="imagefolder", path=str(packages / "corpus"))
    for split in ("train", "held_out"):
        images = open_source(source, data, split)
        expected = [entry["text"] for entry in entries.values() if entry["split"] == split]
        assert len(expected) > 1
        assert [images.captions(index) for index in range(len(images))] == expected
        assert images.image(0).shape == (SIZE, SIZE, 3)


@pytest.mark.parametrize(
    ("iconify", "message"),
    [
        ("nowhere.tgz", "there is no '.*nowhere.tgz'; give a tarball or folder of npm @iconify/json"),
        ("tags", r"holds no collections\.json, json/openmoji\.json.*npm pack @iconify/json"),
        ("text", "cannot be read as @iconify/json.*npm pack @iconify/json"),
    ],
)
def test_what_is_no_package_is_refused(packages, iconify, message):
    (packages / "text").write_text("no tarball")
    with pytest.raises(UserError, match=message):
        draw(packages, icons=iconify)


def test_the_command_without_npm_says_what_to_do(packages):
    words, log = ["-m", "transfusion_mot.data.emoji", "--output", str(packages / "corpus")], packages / "log"
    assert run_script(words, packages, {"PATH": ""}, log) == 2
    (line,) = log.read_text().splitlines()
    assert "npm, which downloads @iconify/json, is missing" in line
    assert "--iconify" in line
