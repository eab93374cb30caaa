"""Named colours: the main colour of a drawing, and recolouring of its flat areas."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
from PIL import Image

# Name => hue in degrees, saturation and value in [0, 1] of a typical colour with that name.
COLOURS = {
    "red": (0, 0.85, 0.88),
    "orange": (27, 0.92, 0.98),
    "yellow": (51, 0.85, 1.0),
    "green": (122, 0.68, 0.72),
    "blue": (216, 0.78, 0.90),
    "purple": (274, 0.62, 0.74),
    "pink": (334, 0.48, 1.0),
    "brown": (24, 0.62, 0.50),
    "black": (0, 0.0, 0.17),
    "gray": (0, 0.0, 0.58),
}
# Colours in these ranges of hue (from, to), saturation and value surely have this name. Colours between the ranges are
# ambiguous.
_NAMED = (
    ("red", (350, 368), (0.62, 1.0), (0.55, 1.0)),
    ("orange", (20, 36), (0.65, 1.0), (0.8, 1.0)),
    ("yellow", (41, 62), (0.5, 1.0), (0.8, 1.0)),
    ("green", (85, 160), (0.35, 1.0), (0.3, 0.9)),
    ("blue", (195, 240), (0.4, 1.0), (0.4, 1.0)),
    ("purple", (258, 295), (0.3, 1.0), (0.35, 1.0)),
    ("pink", (315, 350), (0.25, 0.65), (0.8, 1.0)),
    ("brown", (10, 36), (0.4, 1.0), (0.3, 0.62)),
)
# Limits in Pillow's HSV, where all three values are from 0 to 255.
_OPAQUE, _COLOURED, _LIT = 128, 56, 48
_OUTLINE = 80
_WINDOW = 13  # about 18 degrees of hue in both directions


@dataclass(frozen=True)
class MainColour:
    """The colour that covers most of a drawing.

    Attributes:
        hue: From 0 to 255, as in Pillow.
        saturation: Mean over pixels of this hue, from 0 to 255.
        value: Likewise.
        share: Share of pixels with this hue, among those outside of outlines.
    """

    hue: int
    saturation: int
    value: int
    share: float

    @cached_property
    def name(self) -> str | None:
        """Its unambiguous name; None if it is ambiguous, or the drawing has no main colour."""
        if self.share < 0.6:
            return None
        hue, saturation, value = self.hue * 360 / 256, self.saturation / 255, self.value / 255
        for name, hues, saturations, values in _NAMED:
            in_hues = any(hues[0] <= turned <= hues[1] for turned in (hue, hue + 360))
            if in_hues and saturations[0] <= saturation <= saturations[1] and values[0] <= value <= values[1]:
                return name
        return None

    @property
    def is_replaceable(self) -> bool:
        """Whether recolouring the areas of this hue changes the colour of the drawing."""
        return self.share >= 0.6


def main_colour(drawing: Image.Image) -> MainColour:
    """Main colour of an RGBA drawing; the share is 0 for a grey one."""
    pixels = np.asarray(drawing.convert("RGB").convert("HSV")).reshape(-1, 3)[_opaque(drawing)]
    hues, saturations, values = pixels.T
    is_coloured = (saturations >= _COLOURED) & (values >= _LIT)
    # Dark outlines do not count; a drawing that is completely dark has no main colour.
    is_area = is_coloured | (values >= _OUTLINE)
    counts = np.bincount(hues[is_coloured], minlength=256)
    near = np.convolve(np.concatenate([counts[-_WINDOW:], counts, counts[:_WINDOW]]), np.ones(2 * _WINDOW + 1), "valid")
    if not near.any():
        return MainColour(0, 0, 0, 0.0)
    # The mean hue in the window with most pixels: several windows can contain all pixels of a flat area.
    start = int(near.argmax()) - _WINDOW
    chosen = is_coloured & _is_near(hues, start + _WINDOW, _WINDOW)
    hue = round(start + float((hues[chosen] - np.uint8(start % 256)).mean())) % 256
    chosen = is_coloured & _is_near(hues, hue, _WINDOW)
    share = chosen.sum() / is_area.sum()
    return MainColour(hue, int(saturations[chosen].mean()), int(values[chosen].mean()), round(float(share), 3))


def recoloured(drawing: Image.Image, main: MainColour, colour: tuple[float, float, float]) -> Image.Image:
    """Recolour the areas of the main colour of an RGBA drawing, and keep their shading.

    Args:
        drawing: The drawing.
        main: Its main colour.
        colour: Hue in degrees, saturation and value in [0, 1] of the new colour.
    """
    hsv: npt.NDArray[np.uint8] = np.array(drawing.convert("RGB").convert("HSV"))
    hues, saturations, values = hsv[..., 0], hsv[..., 1], hsv[..., 2]
    # A wider range than for the main colour, because soft edges of areas are darker or paler.
    chosen = _is_near(hues, main.hue, _WINDOW + 5) & (saturations >= 28) & (values >= 24)
    hue, saturation, value = colour[0] / 360 * 256, colour[1] * 255, colour[2] * 255
    levels = np.arange(256)
    new_saturation = np.clip(levels * (saturation / max(1, main.saturation)), 0, 255).astype(np.uint8)
    new_value = np.clip(value * np.clip(levels / max(1, main.value), 0, 1.35), 0, 255).astype(np.uint8)
    hues[chosen] = round(hue) % 256
    saturations[chosen] = new_saturation[saturations[chosen]]
    values[chosen] = new_value[values[chosen]]
    result = Image.fromarray(hsv, "HSV").convert("RGB")
    result.putalpha(drawing.getchannel("A"))
    return result


def _opaque(drawing: Image.Image) -> npt.NDArray[np.bool_]:
    return np.asarray(drawing.getchannel("A")).reshape(-1) >= _OPAQUE


def _is_near(hues: npt.NDArray[np.uint8], hue: int, distance: int) -> npt.NDArray[np.bool_]:
    """Whether hues are within a distance of a hue; hues wrap around at 256."""
    # Unsigned bytes wrap around in the same way.
    return (hues - np.uint8((hue - distance) % 256)) <= 2 * distance
