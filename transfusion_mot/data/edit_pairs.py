"""Make editing pairs from emoji, to teach a model to edit.

    python -m transfusion_mot.data.edit_pairs --output data/edits --size 128

Each kind of edit is a separate image folder with the source image, the instruction and the target image of each pair.
So each kind can be a source with its own weight:

    recolour   "make it green": another hue, or grey
    mirror     "mirror it", "turn it upside down"
    hat        "add a top hat": a hat is laid on the drawing
    style      "draw it as a noto emoji": the drawing of that name in another set

The drawings are made with `python -m transfusion_mot.data.emoji`, if they are missing. A held-out name is held out in
all styles and kinds. The same drawings give the same pairs.
"""

import argparse
import hashlib
import json
import logging
import shutil
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageOps
from tqdm import tqdm

from transfusion_mot.cores import usable_cores
from transfusion_mot.data import emoji_corpus
from transfusion_mot.data.sources.base import picked, share_of
from transfusion_mot.data.sources.tables import rows_of
from transfusion_mot.errors import UserError, exit_on_user_error
from transfusion_mot.files import written_whole
from transfusion_mot.outputs import check_writable_folder, claim_output
from transfusion_mot.path_options import PathOption, existing

KINDS = ("recolour", "mirror", "hat", "style")
# The styles with most names in common; PNG files of the three-dimensional `fluent` are twice as large.
STYLES = ("openmoji", "twemoji", "noto", "fluent flat", "noto v1", "emojione")
# Hue of Pillow's HSV, 0 to 255.
_HUES = {"red": 0, "orange": 20, "yellow": 38, "green": 85, "blue": 150, "purple": 195, "pink": 230}
_GREY = "black and white"
_RECOLOUR = ("make it {}", "paint it {}", "turn it {}", "change it to {}")
_MIRROR = ("mirror it", "flip it left to right", "show its mirror image")
_FLIP = ("turn it upside down", "flip it upside down", "put it on its head")
_HAT = ("add a {}", "put a {} on it", "give it a {}")
_STYLE = ("draw it as a {} emoji", "make it a {} emoji", "redraw it in the style of {}", "in {} style")
# A pair whose images hardly differ teaches nothing: mean difference of 8-bit values.
_LEAST_DIFFERENCE = 4.0
# Number of other styles of its name that each drawing is paired with.
_OTHER_STYLES = 2
_DRAWINGS = "drawings"


@dataclass(frozen=True)
class Drawing:
    """A drawing of the emoji folder: its file, style and name."""

    file_name: str
    style: str
    name: str

    def draw(self, what: str) -> float:
        """A random number in [0, 1) that depends only on the drawing and the purpose."""
        return share_of(f"{what}\n{self.file_name}", 0)

    def pick(self, what: str, among: Sequence[str]) -> str:
        """A random choice that depends only on the drawing and the purpose."""
        return picked(among, f"{what}\n{self.file_name}", 0)


# Phrases of an instruction, and the target image.
Edit = tuple[list[str], Image.Image]


def recoloured(drawing: Drawing, image: Image.Image) -> Edit | None:
    """The drawing in another colour or in greys; None if it has hardly any colour itself."""
    hsv = np.array(image.convert("HSV"))
    colourful = hsv[..., 1] > 64
    if colourful.mean() < 0.05:
        return None
    own = np.bincount(hsv[..., 0][colourful], minlength=256)
    # The colours that differ from most of the drawing.
    others = [name for name, hue in _HUES.items() if _circular(int(own.argmax()), hue) > 24]
    colour = drawing.pick("colour", [*others, _GREY])
    if colour == _GREY:
        target = ImageOps.grayscale(image).convert("RGB")
    else:
        # Without saturation there is no hue: white, grey and black stay.
        hsv[..., 0] = _HUES[colour]
        target = Image.fromarray(hsv, "HSV").convert("RGB")
    return [phrase.format(colour) for phrase in _RECOLOUR], target


def _circular(first: int, second: int) -> int:
    distance = abs(first - second)
    return min(distance, 256 - distance)


def mirrored(drawing: Drawing, image: Image.Image) -> Edit:
    """The drawing mirrored, or upside down."""
    is_mirrored = drawing.draw("mirror") < 0.5
    return (list(_MIRROR), ImageOps.mirror(image)) if is_mirrored else (list(_FLIP), ImageOps.flip(image))


def with_hat(drawing: Drawing, image: Image.Image) -> Edit | None:
    """The drawing with a hat on top, over the middle of its upper quarter; None if there is nothing below it."""
    filled = np.array(ImageOps.grayscale(image)) < 250
    rows = np.flatnonzero(filled.any(axis=1))
    if len(rows) < image.height // 4:
        return None
    top, height = int(rows[0]), int(rows[-1] - rows[0] + 1)
    upper = np.flatnonzero(filled[top : top + height // 4].any(axis=0))
    name = drawing.pick("hat", list(_HATS))
    side = round(image.width * 0.44)
    hat = hat_picture(name, side)
    left = round(float(upper.mean()) - side / 2)
    # The brim touches the drawing, and the whole hat is in the picture.
    bottom = max(side, top + round(0.2 * height))
    target = image.copy()
    target.paste(hat, (min(max(left, 0), image.width - side), bottom - side), hat)
    return [phrase.format(name) for phrase in _HAT], target


@cache
def hat_picture(name: str, side: int) -> Image.Image:
    """A hat in RGBA, drawn large and then reduced."""
    large = Image.new("RGBA", (256, 256))
    _HATS[name](ImageDraw.Draw(large))
    return large.resize((side, side), Image.Resampling.LANCZOS)


def _top_hat(draw: ImageDraw.ImageDraw) -> None:
    draw.rounded_rectangle((58, 40, 198, 226), 14, fill=(38, 38, 46))
    draw.rectangle((58, 168, 198, 206), fill=(206, 44, 52))
    draw.rounded_rectangle((10, 206, 246, 244), 18, fill=(38, 38, 46))


def _party_hat(draw: ImageDraw.ImageDraw) -> None:
    draw.polygon([(128, 40), (42, 246), (214, 246)], fill=(250, 200, 40))
    for low, high in ((0.28, 0.45), (0.64, 0.81)):
        corners = [(128 - 86 * share, 40 + 206 * share) for share in (low, high)]
        mirrored_corners = [(256 - x, y) for x, y in reversed(corners)]
        draw.polygon(corners + mirrored_corners, fill=(226, 60, 120))
    draw.ellipse((100, 12, 156, 68), fill=(70, 140, 230))


def _crown(draw: ImageDraw.ImageDraw) -> None:
    points = [(22, 246), (12, 84), (76, 150), (128, 50), (180, 150), (244, 84), (234, 246)]
    draw.polygon(points, fill=(244, 190, 40))
    draw.rectangle((22, 208, 234, 246), fill=(222, 150, 20))
    for x, y in ((12, 84), (128, 50), (244, 84)):
        draw.ellipse((x - 14, y - 14, x + 14, y + 14), fill=(220, 50, 60))


_HATS: dict[str, Callable[[ImageDraw.ImageDraw], None]] = {
    "top hat": _top_hat,
    "party hat": _party_hat,
    "crown": _crown,
}
_MADE: dict[str, Callable[[Drawing, Image.Image], Edit | None]] = {
    "recolour": recoloured,
    "mirror": mirrored,
    "hat": with_hat,
}


def difference(first: Image.Image, second: Image.Image) -> float:
    """Mean absolute difference of 8-bit values."""
    return float(np.asarray(ImageChops.difference(first, second), dtype=np.float32).mean())


def read_drawings(folder: Path) -> list[Drawing]:
    """The drawings of an emoji folder in the used styles, with names that several of these styles have.

    Raises:
        UserError: The metadata are not those of `transfusion_mot.data.emoji`.
    """
    drawings = []
    for where, row in rows_of(folder / "metadata.jsonl"):
        try:
            drawings.append(Drawing(row["file_name"], row["style"], row["name"]))
        except KeyError as error:
            raise UserError(
                f"{where}: has no {error}; --emoji must be a folder of `python -m transfusion_mot.data.emoji`"
            ) from None
    drawings = [drawing for drawing in drawings if drawing.style in STYLES and "skin" not in drawing.name.split()]
    counts = Counter(drawing.name for drawing in drawings)
    return [drawing for drawing in drawings if counts[drawing.name] > 1]


def style_pairs(drawings: Sequence[Drawing]) -> Iterator[tuple[Drawing, Drawing]]:
    """Pairs of drawings of one name, in two styles."""
    by_name = defaultdict(list)
    for drawing in drawings:
        by_name[drawing.name].append(drawing)
    for drawing in drawings:
        others = [other for other in by_name[drawing.name] if other is not drawing]
        others.sort(key=lambda other: drawing.draw(f"style {other.style}"))
        yield from ((drawing, other) for other in others[:_OTHER_STYLES])


def _write(drawing: Drawing, emoji: Path, output: Path) -> dict[str, tuple[str, list[str]]]:
    """Write a drawing and its targets => file of the target and instruction for each kind."""
    with Image.open(emoji / drawing.file_name) as opened:
        image = opened.convert("RGB")
    _save(image, output / _DRAWINGS / drawing.file_name)
    made = {}
    for kind, make in _MADE.items():
        edit = make(drawing, image)
        if edit is not None and difference(image, edit[1]) >= _LEAST_DIFFERENCE:
            _save(edit[1], output / kind / drawing.file_name)
            made[kind] = drawing.file_name, edit[0]
    return made


def _save(image: Image.Image, path: Path) -> None:
    with written_whole(path) as file:
        image.save(file, format="PNG")


def write_pairs(
    emoji: Path, output: Path, *, fraction: float, seed: int, most: int | None, workers: int
) -> Counter[tuple[str, str]]:
    """Write all pairs => (kind, split) to count.

    Args:
        emoji: Folder of drawings.
        output: Folder of the kinds; created, or overwritten if it has the same pairs.
        fraction: Share of the names that are held out.
        seed: Seed of the held-out names.
        most: Maximum number of drawings, evenly chosen; None means all.
        workers: Number of processes.

    Raises:
        UserError: `output` holds pairs of other drawings, or another held-out split.
    """
    drawings = read_drawings(emoji)
    if most is not None:
        names = sorted({drawing.name for drawing in drawings}, key=lambda name: share_of(f"most\n{name}", seed))
        counts = Counter(drawing.name for drawing in drawings)
        fitting = np.cumsum([counts[name] for name in names]) <= max(most, counts[names[0]])
        kept = {name for name, fits in zip(names, fitting, strict=True) if fits}
        drawings = [drawing for drawing in drawings if drawing.name in kept]
    listed = "\n".join(drawing.file_name for drawing in drawings)
    settings = {
        "drawings": hashlib.sha256(listed.encode()).hexdigest()[:16],
        "held_out_fraction": fraction,
        "seed": seed,
        "emoji": _read_json(emoji / "corpus.json"),
    }
    claim_output(output, "edits.json", settings, "editing pairs of other drawings or another split,")
    for folder in {Path(drawing.file_name).parent for drawing in drawings}:
        for kind in (_DRAWINGS, *_MADE):
            (output / kind / folder).mkdir(parents=True, exist_ok=True)
    (output / "style").mkdir(exist_ok=True)

    lines: dict[str, list[str]] = {kind: [] for kind in KINDS}
    counts_by_split: Counter[tuple[str, str]] = Counter()

    def add(kind: str, drawing: Drawing, target: str, phrases: list[str]) -> None:
        split = "held_out" if share_of(drawing.name, seed) < fraction else "train"
        counts_by_split[kind, split] += 1
        entry = {
            "source_file_name": f"../{_DRAWINGS}/{drawing.file_name}",
            "file_name": target,
            "text": phrases,
            "name": drawing.name,
            "style": drawing.style,
            "split": split,
        }
        lines[kind].append(json.dumps(entry, ensure_ascii=False) + "\n")

    with ProcessPoolExecutor(workers) as pool:
        made = pool.map(partial(_write, emoji=emoji, output=output), drawings, chunksize=32)
        for drawing, edits in zip(
            drawings, tqdm(made, total=len(drawings), desc="editing", unit="drawing"), strict=True
        ):
            for kind, (target, phrases) in edits.items():
                add(kind, drawing, target, phrases)
    for drawing, other in style_pairs(drawings):
        add("style", drawing, f"../{_DRAWINGS}/{other.file_name}", [phrase.format(other.style) for phrase in _STYLE])
    for kind in KINDS:
        with written_whole(output / kind / "metadata.jsonl") as file:
            file.write_text("".join(lines[kind]), encoding="utf-8")
    shutil.copyfile(emoji / "LICENSES", output / "LICENSES")
    return counts_by_split


def _read_json(file: Path) -> Any:
    return json.loads(file.read_bytes())


def main(arguments: Sequence[str]) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m transfusion_mot.data.edit_pairs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--output", required=True, metavar="DIR", help="folder of the four kinds of pairs")
    add("--size", type=int, default=128, metavar="PX", help="height and width (default: 128)")
    add(
        "--emoji",
        action=PathOption,
        check=existing("a folder that `python -m transfusion_mot.data.emoji` has written"),
        metavar="DIR",
        help="drawings of `python -m transfusion_mot.data.emoji` (default: data/emojiPX, drawn if it is missing)",
    )
    add("--most", type=int, metavar="N", help="maximum number of drawings (default: all)")
    add("--held-out-fraction", type=float, default=0.05, metavar="X", help="share of the names (default: 0.05)")
    add("--seed", type=int, default=0, metavar="N", help="seed of the held-out split (default: 0)")
    add("--workers", type=int, default=usable_cores(), metavar="N", help="default: one a CPU")
    given = parser.parse_args(arguments)
    if given.size < 8 or given.workers < 1 or not 0 <= given.held_out_fraction < 1:
        raise UserError("--size must be at least 8, --workers at least 1, --held-out-fraction in [0, 1)")
    if given.most is not None and given.most < 1:
        raise UserError(f"--most is {given.most}; it must be at least 1")
    check_writable_folder(given.output, "--output")
    emoji = Path(given.emoji or f"data/emoji{given.size}")
    if given.emoji is None and not (emoji / "metadata.jsonl").is_file():
        emoji_corpus.main(["--output", str(emoji), "--size", str(given.size), "--workers", str(given.workers)])
    for name in ("metadata.jsonl", "corpus.json", "LICENSES"):
        if not (emoji / name).is_file():
            raise UserError(
                f"'{emoji}' has no {name}; make it with `python -m transfusion_mot.data.emoji --output {emoji}`"
            )
    if (size := _read_json(emoji / "corpus.json").get("size")) != given.size:
        raise UserError(f"'{emoji}' holds drawings of {size} px, but --size is {given.size}; give --size {size}")
    begun = time.perf_counter()
    counts = write_pairs(
        emoji,
        Path(given.output),
        fraction=given.held_out_fraction,
        seed=given.seed,
        most=given.most,
        workers=given.workers,
    )
    print(f"{'kind':<10} {'train':>7} {'held out':>9}")
    for kind in KINDS:
        print(f"{kind:<10} {counts[kind, 'train']:>7,} {counts[kind, 'held_out']:>9,}")
    train, held_out = (sum(n for (_, side), n in counts.items() if side == split) for split in ("train", "held_out"))
    print(f"{'all':<10} {train:>7,} {held_out:>9,}  ({time.perf_counter() - begun:.0f} s)")
    print(
        "use a kind as a source: {kind: imagefolder, path: "
        f"{Path(given.output) / KINDS[0]}, source_image_column: source_file_name}}",
        file=sys.stderr,
    )


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    with exit_on_user_error():
        main(sys.argv[1:])
