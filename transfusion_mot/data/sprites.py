"""Make drawings for scenes, with a transparent background: `python -m transfusion_mot.data.sprites --output DIR`.

The drawings come from the npm package `@iconify/json`, without the skin tones of people. The folder has `sprites.bin`
(concatenated lossless WebP files) and `sprites.jsonl` with a line for each drawing: offset and size, style, name, box,
main colour, and whether it is held out. The same pairs of style and name are held out as in the output of `python -m
transfusion_mot.data.emoji`.
"""

import argparse
import hashlib
import io
import json
import os
import re
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from transfusion_mot.data.colours import MainColour, main_colour
from transfusion_mot.data.emoji_corpus import (
    STYLES,
    Icon,
    add_options,
    check_options,
    emoji_packages,
    held_out_icons,
    icons_of,
    licences_of,
)
from transfusion_mot.data.images import draw_transparent_svg
from transfusion_mot.errors import UserError
from transfusion_mot.outputs import refuse_files_of_others

_INDEX, _PICTURES = "sprites.jsonl", "sprites.bin"
# "woman medium light skin tone"; in one set "woman light". Lamps also have names that end with "light", without a tone.
_TONE = re.compile(r" (skin tone|(medium )?(light|dark)|medium)\b.*$")
_FAINT = 8
_SMALLEST = 0.15


@dataclass(frozen=True)
class Sprite:
    """A drawing with a transparent background.

    Attributes:
        style: For example "fluent flat".
        name: For example "red apple".
        box: Left, top, right and bottom of the drawn area, in pixels.
        main: Its main colour.
        is_held_out: Whether it is held out.
        place: Place of its picture in the file: (offset, bytes).
    """

    style: str
    name: str
    box: tuple[int, int, int, int]
    main: MainColour
    is_held_out: bool
    place: tuple[int, int]


class Sprites:
    """The drawings of a folder.

    Attributes:
        sprites: All of them.
        size: Height and width of their pictures.
        fingerprint: Hash of the folder's content.

    Raises:
        UserError: The folder has no sprites.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            lines = (self.folder / _INDEX).read_bytes()
            self._pictures = np.memmap(self.folder / _PICTURES, dtype=np.uint8, mode="r")
            about, *entries = (json.loads(line) for line in lines.splitlines())
            self.size: int = about["size"]
            self.sprites = [_sprite(entry) for entry in entries]
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(
                f"'{folder}' holds no sprites; give the folder that `python -m transfusion_mot.data.sprites --output "
                "FOLDER` has written"
            ) from None
        self.fingerprint = hashlib.sha256(lines).hexdigest()[:16]
        needed = sum(sprite.place[1] for sprite in self.sprites)
        if len(self._pictures) != needed:
            raise UserError(
                f"'{self.folder / _PICTURES}' has {len(self._pictures):,} bytes, but {needed:,} are listed; make the "
                "folder again"
            )

    def __len__(self) -> int:
        return len(self.sprites)

    def picture(self, index: int) -> Image.Image:
        """One drawing in RGBA."""
        offset, length = self.sprites[index].place
        content = io.BytesIO(self._pictures[offset : offset + length].tobytes())
        return Image.open(content, formats=["WEBP"]).convert("RGBA")

    def __reduce__(self) -> tuple[type["Sprites"], tuple[Path]]:
        # A worker process maps the file again; pickle would send it the bytes.
        return type(self), (self.folder,)


def _sprite(entry: dict[str, Any]) -> Sprite:
    main = MainColour(**entry.pop("main"))
    return Sprite(**entry | {"main": main, "box": tuple(entry["box"]), "place": tuple(entry["place"])})


def drawing_names(icons: Sequence[Icon]) -> dict[Icon, str]:
    """Icon => its name in the spelling of most sets, without skin tones.

    One set writes names without spaces ("alarmclock"), one numbers the drawings of a name ("bird 2").
    """
    known = {icon.name for icon in icons}
    spaced = {name.replace(" ", ""): name for name in sorted(known) if " " in name}
    names = {}
    for icon in icons:
        name = icon.name
        toneless = _TONE.sub("", name)
        if toneless != name and (toneless in known or "skin tone" in name):
            continue
        name = re.sub(r"(?<=[a-z]) \d+$", "", name)
        names[icon] = spaced.get(name, name)
    return names


def _draw(task: tuple[Icon, int]) -> tuple[bytes, tuple[int, int, int, int], MainColour] | None:
    """Icon and size => its picture, the box of its drawn area, its main colour; None if it is empty."""
    icon, size = task
    try:
        drawing = draw_transparent_svg(icon.svg, size)
    except ValueError:  # the renderer raises it for a drawing that it cannot parse
        return None
    box = drawing.getchannel("A").point(lambda alpha: 255 * (alpha > _FAINT)).getbbox()
    if box is None or max(box[2] - box[0], box[3] - box[1]) < _SMALLEST * size:
        return None
    content = io.BytesIO()
    drawing.save(content, format="WEBP", lossless=True, quality=70, method=4)
    return content.getvalue(), box, main_colour(drawing)


def write_sprites(
    package: Path, output: Path, *, size: int, fraction: float, seed: int, workers: int
) -> Counter[tuple[str, str]]:
    """Draw every icon of the package and write the folder => (style, split) => count."""
    icons = [icon for icon_set in STYLES for icon in icons_of(package, icon_set)]
    held_out = held_out_icons(icons, fraction, seed)
    names = drawing_names(icons)
    output.mkdir(parents=True, exist_ok=True)
    version = json.loads((package / "package.json").read_bytes())["version"]
    lines = [json.dumps({"size": size, "drawings": version, "held_out_fraction": fraction, "seed": seed})]
    counts: Counter[tuple[str, str]] = Counter()
    partial = {name: output / f"{name}.partial" for name in (_PICTURES, _INDEX)}
    with ProcessPoolExecutor(workers) as pool, partial[_PICTURES].open("wb") as file:
        drawn = pool.map(_draw, [(icon, size) for icon in names], chunksize=16)
        for icon, result in tqdm(
            zip(names, drawn, strict=True), total=len(names), desc=f"drawing sprites at {size} px", unit="sprite"
        ):
            if result is None:
                counts[icon.style, "left out"] += 1
                continue
            content, box, main = result
            place = (file.tell(), file.write(content))
            sprite = Sprite(icon.style, names[icon], box, main, icon in held_out, place)
            counts[icon.style, "held out" if sprite.is_held_out else "train"] += 1
            lines.append(json.dumps(asdict(sprite), ensure_ascii=False))
    partial[_INDEX].write_text("\n".join(lines) + "\n", encoding="utf-8")
    # Renamed when complete, so that partial files of a killed command are never read.
    for name, path in partial.items():
        os.replace(path, output / name)
    (output / "LICENSES").write_text(licences_of(package, None), encoding="utf-8")
    return counts


def main(arguments: Sequence[str]) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m transfusion_mot.data.sprites", description=__doc__)
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write")
    add_options(parser)
    given = parser.parse_args(arguments)
    check_options(given)
    refuse_files_of_others(Path(given.output), _INDEX, f"{_INDEX}.partial", f"{_PICTURES}.partial")
    begun = time.perf_counter()
    with emoji_packages(given.iconify, None) as (package, _):
        counts = write_sprites(
            package,
            Path(given.output),
            size=given.size,
            fraction=given.held_out_fraction,
            seed=given.seed,
            workers=given.workers,
        )
    totals: defaultdict[str, int] = defaultdict(int)
    for (_, side), count in counts.items():
        totals[side] += count
    megabytes = (Path(given.output) / _PICTURES).stat().st_size / 1e6
    shown = ", ".join(f"{count:,} {side}" for side, count in totals.items())
    print(f"{shown}; {megabytes:.1f} MB, {time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
    import logging
    import sys

    from transfusion_mot.errors import exit_on_user_error

    logging.basicConfig(format="%(message)s")
    with exit_on_user_error():
        main(sys.argv[1:])
