"""Records of scenes => pictures."""

import colorsys
from functools import cache

import numpy as np
import numpy.typing as npt
from PIL import Image

from transfusion_mot.data.colours import recoloured
from transfusion_mot.data.images import ImageArray
from transfusion_mot.data.scenes import Background, Group, Paint, Place, Scene
from transfusion_mot.data.sprites import Sprites


def draw_scene(scene: Scene, sprites: Sprites, size: tuple[int, int]) -> ImageArray:
    """A scene => `uint8 [height, width, 3]`; it fills the central square if the picture is not square."""
    picture = _ground(scene.background, size)
    for group in scene.groups:
        drawing = sprites.picture(group.sprite)
        if not scene.is_framed:
            drawing = drawing.crop(sprites.sprites[group.sprite].box)
        for place in group.places:
            left, top, right, bottom = pixel_box(place, drawing.size, size)
            shown = drawing.resize((right - left, bottom - top), Image.Resampling.BICUBIC, reducing_gap=2.0)
            if group.paint is not None:
                shown = recoloured(shown, sprites.sprites[group.sprite].main, group.paint.hsv)
            picture.paste(shown, (left, top), shown)
    return np.asarray(picture)


def pixel_box(place: Place, drawing: tuple[int, int], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a drawing (width, height) at its place in a picture (height, width)."""
    side = min(size)
    scale = place.size * side / max(drawing)
    width, height = (max(1, round(length * scale)) for length in drawing)
    left = round((size[1] - side) / 2 + place.x * side - width / 2)
    top = round((size[0] - side) / 2 + place.y * side - height / 2)
    return left, top, left + width, top + height


def boxes_of(group: Group, sprites: Sprites, size: tuple[int, int]) -> list[tuple[int, int, int, int]]:
    """The boxes of all drawings of a group that is not in its own frame."""
    left, top, right, bottom = sprites.sprites[group.sprite].box
    return [pixel_box(place, (right - left, bottom - top), size) for place in group.places]


def rgb_of(paint: Paint) -> tuple[int, int, int]:
    """RGB values from 0 to 255."""
    hue, saturation, value = paint.hsv
    red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(hue / 360, saturation, value))
    return red, green, blue


def _ground(background: Background, size: tuple[int, int]) -> Image.Image:
    height, width = size
    first, *more = (Image.new("RGB", (width, height), rgb_of(paint)) for paint in background.paints)
    if not more:
        return first
    across, down = _grid(size)
    along = (across, down, (across + down) / 2)[background.turn]
    period = background.period
    if background.pattern == "gradient":
        amount = np.float32(255) * along
    elif background.pattern == "striped":
        amount = np.where(along / period % 1 < 0.5, 255, 0)
    elif background.pattern == "checkered":
        amount = np.where((across // (period / 2) + down // (period / 2)) % 2, 255, 0)
    else:
        squared = (across % period / period - 0.5) ** 2 + (down % period / period - 0.5) ** 2
        amount = np.where(squared < 0.07, 255, 0)
    return Image.composite(more[0], first, Image.fromarray(amount.astype(np.uint8)))


@cache
def _grid(size: tuple[int, int]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Distance of each pixel from the left and from the top, as a share of the shorter side."""
    down, across = np.indices(size, dtype=np.float32) / min(size)
    return across, down
