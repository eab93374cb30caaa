"""The colour emoji of ten styles as an image folder: `python -m transfusion_mot.data.emoji --output DIR`.

The drawings come from the npm package `@iconify/json`, the tags of a second caption from `emojibase-data`. A caption
is "{style} emoji of {name}". Held-out pairs of style and name have names that another style has in training: to paint
them, a model must combine a known style and name.
"""

import argparse
import json
import logging
import re
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from transfusion_mot.cores import usable_cores
from transfusion_mot.data.images import draw_svg
from transfusion_mot.data.npm import fetch_package, package_folder
from transfusion_mot.data.sources.base import share_of
from transfusion_mot.errors import UserError
from transfusion_mot.files import written_whole
from transfusion_mot.outputs import check_writable_folder, claim_output
from transfusion_mot.path_options import PathOption, existing

# Icon set of the package => the style's name in captions.
STYLES = {
    "openmoji": "openmoji",
    "twemoji": "twemoji",
    "noto": "noto",
    "fluent-emoji-flat": "fluent flat",
    "fluent-emoji": "fluent",
    "noto-v1": "noto v1",
    "emojione": "emojione",
    "emojione-v1": "emojione v1",
    "fxemoji": "fxemoji",
    "streamline-emojis": "streamline",
}
_ICONS, _TAGS = "@iconify/json", "emojibase-data"
# Default box of an icon, by the format's definition.
_BOX = {"left": 0, "top": 0, "width": 16, "height": 16}

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Icon:
    """A drawing: its icon set, its name in the set ("red-apple"), its SVG."""

    icon_set: str
    icon: str
    svg: str

    @property
    def style(self) -> str:
        """For example "fluent flat"."""
        return STYLES[self.icon_set]

    @property
    def name(self) -> str:
        """For example "red apple"."""
        return self.icon.replace("-", " ")

    @property
    def file_name(self) -> str:
        """Path below the corpus folder."""
        return f"{self.icon_set}/{self.icon}.png"


def _read(file: Path) -> Any:
    return json.loads(file.read_bytes())


def icons_of(package: Path, icon_set: str) -> list[Icon]:
    """The icons of a set, without those replaced by newer ones (marked as hidden)."""
    content = _read(package / "json" / f"{icon_set}.json")
    icons = []
    for name, icon in content["icons"].items():
        if icon.get("hidden"):
            continue
        box = [icon.get(key, content.get(key, default)) for key, default in _BOX.items()]
        # With equal width and height an icon that is not square is centred in a square.
        opening = f'<svg xmlns="http://www.w3.org/2000/svg" width="1" height="1" viewBox="{" ".join(map(str, box))}">'
        icons.append(Icon(icon_set, name, f"{opening}{icon['body']}</svg>"))
    return icons


def tags_by_icon(tags: Path, package: Path) -> dict[str, list[str]]:
    """Icon name => tags in English. Most sets list the code points of an icon; otherwise it is matched by its label."""
    by_code: dict[str, list[str]] = {}
    by_label: dict[str, list[str]] = {}
    for entry in _read(tags / "en" / "data.json"):
        for variant in (entry, *entry.get("skins", ())):
            # An emoji with a skin tone has the tags of the emoji without it.
            by_code[_without_selector(variant["hexcode"])] = entry.get("tags", [])
            by_label["-".join(re.findall(r"\w+", variant["label"].lower()))] = entry.get("tags", [])
    found = dict(by_label)
    for icon_set in STYLES:
        for code, icon in _read(package / "json" / f"{icon_set}.json").get("chars", {}).items():
            if (key := _without_selector(code)) in by_code:
                found[icon] = by_code[key]
    return found


def _without_selector(code_points: str) -> str:
    return "-".join(part for part in code_points.upper().split("-") if part != "FE0F")


def held_out_icons(icons: Sequence[Icon], fraction: float, seed: int) -> set[Icon]:
    """About `fraction` of the (style, name) pairs, never all of a name; independent of order and number of icons."""
    by_name = defaultdict(list)
    for icon in icons:
        by_name[icon.name].append((share_of(f"{icon.style}\n{icon.name}", seed), icon.icon_set, icon))
    held_out = set()
    for pairs in by_name.values():
        *others, _last = sorted(pairs, key=lambda pair: pair[:2])
        held_out |= {icon for share, _, icon in others if share < fraction}
    return held_out


def captions_of(icon: Icon, tags: Sequence[str]) -> list[str]:
    """One caption, and a second with tags if it has tags that the name does not contain."""
    caption = f"{icon.style} emoji of {icon.name}"
    more = [tag for tag in tags if tag not in icon.name.split() and tag != icon.name]
    return [caption, f"{caption}: {', '.join(more)}"] if more else [caption]


def _render_to_file(task: tuple[Icon, int, Path]) -> tuple[Icon, str | None]:
    """Draw one icon => (icon, error message)."""
    icon, size, folder = task
    try:
        drawing = draw_svg(icon.svg, size)
    except ValueError as error:  # the renderer raises it for a drawing that it cannot parse
        return icon, str(error)
    with written_whole(folder / icon.file_name) as file:
        drawing.save(file, format="PNG")
    return icon, None


def write_corpus(
    package: Path, tags: Path | None, output: Path, size: int, fraction: float, seed: int, workers: int
) -> Counter[tuple[str, str]]:
    """Draw every icon that `output` does not have yet, and write metadata and licences => (style, split) => count.

    Raises:
        UserError: `output` has drawings of another size or package version, or other files.
    """
    settings = {"size": size, _ICONS: _read(package / "package.json")["version"]}
    icons = [icon for icon_set in STYLES for icon in icons_of(package, icon_set)]
    claim_output(output, "corpus.json", settings, "emoji of")
    for icon_set in STYLES:
        (output / icon_set).mkdir(exist_ok=True)

    missing = [(icon, size, output) for icon in icons if not (output / icon.file_name).exists()]
    failed = {}
    with ProcessPoolExecutor(workers) as pool:
        drawn = pool.map(_render_to_file, missing, chunksize=16)
        for icon, problem in tqdm(drawn, total=len(missing), desc=f"drawing emoji at {size} px", unit="image"):
            if problem is not None:
                failed[icon] = problem
                _logger.warning("skipped %s: %s", icon.file_name, problem)

    icons = [icon for icon in icons if icon not in failed]
    held_out = held_out_icons(icons, fraction, seed)
    tags_of = tags_by_icon(tags, package) if tags is not None else {}
    counts: Counter[tuple[str, str]] = Counter()
    lines = []
    for icon in icons:
        split = "held_out" if icon in held_out else "train"
        counts[icon.style, split] += 1
        entry = {
            "file_name": icon.file_name,
            "text": captions_of(icon, tags_of.get(icon.icon, [])),
            "style": icon.style,
            "name": icon.name,
            "split": split,
        }
        lines.append(json.dumps(entry, ensure_ascii=False) + "\n")
    with written_whole(output / "metadata.jsonl") as file:
        file.write_text("".join(lines), encoding="utf-8")
    (output / "LICENSES").write_text(licences_of(package, tags), encoding="utf-8")
    return counts


def licences_of(package: Path, tags: Path | None) -> str:
    """Style, author and licence of every set: all require attribution or a copy of the licence."""
    collections = _read(package / "collections.json")
    lines = [f"Drawings: npm {_ICONS} {_read(package / 'package.json')['version']}, rendered to PNG on white.\n"]
    for icon_set in STYLES:
        about = collections[icon_set]
        author, licence = about["author"], about["license"]
        lines.append(
            f"{icon_set}/: {about['name']}\n"
            f"  author:  {author['name']}, {author.get('url', '')}\n"
            f"  licence: {licence['title']} ({licence.get('spdx', 'no SPDX name')}), {licence.get('url', '')}\n"
        )
    if tags is not None:
        about = _read(tags / "package.json")
        lines.append(f"Tags in captions: npm {_TAGS} {about['version']}\n  licence: {about['license']}\n")
    return "\n".join(lines)


@contextmanager
def emoji_packages(iconify: str | None, emojibase: str | None) -> Iterator[tuple[Path, Path | None]]:
    """Folders of the drawings and the tags: given by the user, or fetched and unpacked to a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        if iconify is None:
            iconify = fetch_package(_ICONS, folder, "--iconify")
            emojibase = emojibase or fetch_package(_TAGS, folder, "--emojibase")
        drawings = ["package.json", "collections.json", *(f"json/{icon_set}.json" for icon_set in STYLES)]
        package = package_folder(Path(iconify), _ICONS, drawings, Path(folder) / "icons")
        labels = ["package.json", "en/data.json"]
        yield (
            package,
            None if emojibase is None else package_folder(Path(emojibase), _TAGS, labels, Path(folder) / "tags"),
        )


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of commands that draw the emoji of all sets, except `--output`."""
    parser.add_argument("--size", type=int, default=128, metavar="PX", help="height and width (default: 128)")
    parser.add_argument(
        "--iconify",
        action=PathOption,
        check=existing(f"a tarball or folder of npm {_ICONS}"),
        metavar="PATH",
        help=f"tarball or folder of npm {_ICONS} (default: npm fetches it)",
    )
    parser.add_argument("--held-out-fraction", type=float, default=0.05, metavar="X", help="default: 0.05")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the held-out split (default: 0)")
    parser.add_argument("--workers", type=int, default=usable_cores(), metavar="N", help="default: one a CPU")


def check_options(given: argparse.Namespace) -> None:
    """Refuse invalid values of these options and an output that cannot be written, before long work.

    Raises:
        UserError: An option is wrong, or a package is missing.
    """
    if given.size < 8 or given.workers < 1 or not 0 <= given.held_out_fraction < 1:
        raise UserError("--size must be at least 8, --workers at least 1, --held-out-fraction in [0, 1)")
    try:
        import resvg_py  # noqa: F401
    except ImportError:
        raise UserError("drawing needs the package resvg-py: pip install 'transfusion-mot[emoji]'") from None

    check_writable_folder(given.output, "--output")


def main(arguments: Sequence[str]) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m transfusion_mot.data.emoji", description=__doc__)
    parser.add_argument("--output", required=True, metavar="DIR", help="image folder to write or to continue")
    add_options(parser)
    parser.add_argument(
        "--emojibase",
        action=PathOption,
        check=existing(f"a tarball or folder of npm {_TAGS}"),
        metavar="PATH",
        help=f"tarball or folder of npm {_TAGS}, for a second caption with tags (default: fetched if the drawings are)",
    )
    given = parser.parse_args(arguments)
    check_options(given)
    begun = time.perf_counter()
    with emoji_packages(given.iconify, given.emojibase) as (package, tags):
        counts = write_corpus(
            package, tags, Path(given.output), given.size, given.held_out_fraction, given.seed, given.workers
        )
    print(f"{'style':<12} {'train':>7} {'held out':>9}")
    for style in dict.fromkeys(style for style, _ in counts):
        print(f"{style:<12} {counts[style, 'train']:>7,} {counts[style, 'held_out']:>9,}")
    train, held_out = (sum(n for (_, side), n in counts.items() if side == split) for split in ("train", "held_out"))
    print(f"{'all':<12} {train:>7,} {held_out:>9,}  ({train + held_out:,} images, {time.perf_counter() - begun:.0f} s)")
    print(f"use it as a source: {{kind: imagefolder, path: {given.output}}}", file=sys.stderr)
