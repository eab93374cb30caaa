"""Scenes as records: drawings with their places and colours, and the caption.

`data/scene_composer.py` composes them, `data/scene_captions.py` writes the captions, and `data/scene_drawing.py` draws
them.
"""

from dataclasses import dataclass
from typing import Literal

from transfusion_mot.data.scene_objects import plural_of, with_article

Relation = Literal["left of", "right of", "above", "below", "next to", "and"]
Pattern = Literal["plain", "gradient", "striped", "dotted", "checkered"]

OPPOSITE: dict[Relation, Relation] = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four"}
# Words for a place => centre of a thing at this place.
PLACES = {
    "on the left": (0.2, 0.5),
    "on the right": (0.8, 0.5),
    "at the top": (0.5, 0.2),
    "at the bottom": (0.5, 0.8),
    "in the top left corner": (0.2, 0.2),
    "in the top right corner": (0.8, 0.2),
    "in the bottom left corner": (0.2, 0.8),
    "in the bottom right corner": (0.8, 0.8),
}


@dataclass(frozen=True)
class Paint:
    """A colour with its name.

    Attributes:
        name: For example "light blue".
        hsv: Hue in degrees, saturation and value in [0, 1].
    """

    name: str
    hsv: tuple[float, float, float]


@dataclass(frozen=True)
class Place:
    """Place of a drawing, as shares of the picture: its centre and its longer side."""

    x: float
    y: float
    size: float


@dataclass(frozen=True)
class Group:
    """One or several copies of a thing, all with the same drawing.

    Attributes:
        sprite: Index of the drawing.
        noun: Noun of the thing, or the name of the drawing if it is not a thing of `scene_objects`.
        places: Place of each copy.
        paint: Replaces the main colour of the drawing; None keeps it.
        colour: Name of its colour, if captions name it; else None.
        style: Name of the drawing's style, if captions name it.
        size: "small" or "big", if captions name it.
    """

    sprite: int
    noun: str
    places: tuple[Place, ...]
    paint: Paint | None = None
    colour: str | None = None
    style: str | None = None
    size: str | None = None

    @property
    def terse(self) -> str:
        """Without an article: "two small red apples"."""
        count = len(self.places)
        noun = self.noun if count == 1 else plural_of(self.noun)
        words = [NUMBERS[count] if count > 1 else None, self.size, self.colour, self.style, noun]
        return " ".join(word for word in words if word)

    @property
    def phrase(self) -> str:
        """With an article: "a small red apple"."""
        return self.terse if len(self.places) > 1 else with_article(self.terse)


@dataclass(frozen=True)
class Background:
    """The background of the drawings.

    Attributes:
        pattern: A plain pattern has one paint, others have two.
        paints: White is the paint named "white".
        turn: Direction of stripes and gradients: 0 horizontal, 1 vertical, 2 diagonal.
        period: Period of a repeating pattern, as a share of the picture.
    """

    pattern: Pattern
    paints: tuple[Paint, ...]
    turn: int = 0
    period: float = 0.2

    @property
    def words(self) -> str:
        """ "blue and white striped background"; "" for plain white, which captions do not mention."""
        names = " and ".join(paint.name for paint in self.paints)
        if self.pattern == "plain":
            return "" if names == "white" else f"{names} background"
        return f"{names} {self.pattern} background"


@dataclass(frozen=True)
class Scene:
    """The contents of a picture.

    Attributes:
        groups: One to three groups.
        background: The background.
        relation: Relation of the first of two groups to the second; "and" is no relation.
        place: Words for the place of a single thing, if captions name it.
        is_framed: Whether it is a single unplaced drawing in its own frame, like an icon.
        captions: Captions of the scene; none before they are written.
    """

    groups: tuple[Group, ...]
    background: Background
    relation: Relation = "and"
    place: str | None = None
    is_framed: bool = False
    captions: tuple[str, ...] = ()


WHITE = Background("plain", (Paint("white", (0.0, 0.0, 1.0)),))
