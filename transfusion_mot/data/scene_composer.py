"""Unlimited scenes: scene i of a split is a pure function of the drawings, a seed and i."""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace

from transfusion_mot.data.colours import COLOURS
from transfusion_mot.data.draws import Draws
from transfusion_mot.data.scene_captions import captions_of
from transfusion_mot.data.scene_objects import UNCOLOURED, object_of_drawing
from transfusion_mot.data.scenes import PLACES, WHITE, Background, Group, Paint, Pattern, Place, Relation, Scene
from transfusion_mot.data.sources.base import Split, share_of
from transfusion_mot.data.sprites import Sprite

# Left, top, right and bottom, as shares of the picture.
Region = tuple[float, float, float, float]

# Gap between drawings, so that they are visibly separate.
_MARGIN = 0.045
# Colours with a light variant, such as "light blue".
_LIGHT = ("blue", "green", "purple", "yellow", "pink", "gray")
_GROUNDS = (*COLOURS, *(f"light {name}" for name in _LIGHT))
_GREYS = ("black", "gray")
_WHOLE: Region = (0, 0, 1, 1)
_ROW_OF_THREE: Sequence[Region] = ((0, 0, 1 / 3, 1), (1 / 3, 0, 2 / 3, 1), (2 / 3, 0, 1, 1))
_QUARTERS: Sequence[Region] = ((0, 0, 0.5, 0.5), (0.5, 0, 1, 0.5), (0, 0.5, 0.5, 1), (0.5, 0.5, 1, 1))
_MOST_TRIES = 10_000


class Composer:
    """Draws scenes.

    Held out are a share of the pairs of a thing and a colour that no drawing of it has by nature, a share of the pairs
    of things in one scene, and the drawings that are marked so. A training scene has none of these. A held-out scene
    has at least one: a held-out drawing if it is a single drawing in its frame, otherwise a held-out pair.

    Args:
        sprites: The drawings.
        seed: Seed of all scenes and of the held-out pairs.
        held_out_fraction: Share of the pairs that are held out.
        is_split: False: training scenes may show held-out pairs and drawings.
    """

    def __init__(
        self, sprites: Sequence[Sprite], *, seed: int, held_out_fraction: float, is_split: bool = True
    ) -> None:
        self.sprites = sprites
        self.seed = seed
        self.fraction = held_out_fraction if is_split else 0.0
        self._things = things = [object_of_drawing(sprite.name) for sprite in sprites]
        shown = [index for index, sprite in enumerate(sprites) if not (is_split and sprite.is_held_out)]
        self._hidden = [index for index, sprite in enumerate(sprites) if is_split and sprite.is_held_out]
        self._shown = shown
        self._by_noun: defaultdict[str, list[int]] = defaultdict(list)
        self._natural: set[tuple[str, str]] = set()
        for index in shown:
            if (thing := things[index]) is not None:
                self._by_noun[thing[0]].append(index)
                if (colour := self._own_colour(index)) is not None:
                    self._natural.add((thing[0], colour))
        self._drawn = sorted(self._by_noun)

    def scene(self, index: int, split: Split) -> Scene:
        """Scene `index` of a split."""
        draws = Draws(self.seed, split, index)
        if split == "held_out" and self._hidden and draws.chance(1 / 3):
            return self._told(self._framed(draws, self._hidden), draws)
        for _ in range(_MOST_TRIES):
            scene = self._any(draws) if split == "train" else self._composed(draws)
            if self.is_held_out(scene) == (split == "held_out"):
                return self._told(scene, draws)
        raise AssertionError(f"no {split} scene in {_MOST_TRIES} tries")

    def _told(self, scene: Scene, draws: Draws) -> Scene:
        return replace(scene, captions=captions_of(scene, self.sprites, draws))

    def asked_for(self, things: Sequence[tuple[str, str | None, int]], relation: Relation, *seed: object) -> Scene:
        """A scene of one or two things, each (noun, colour or None, count), on white; held-out pairs are allowed.

        Raises:
            KeyError: There is no such thing, or none that has or can get the colour.
        """
        draws = Draws(self.seed, *seed)
        regions = [_WHOLE] if len(things) == 1 else _halves(relation, draws)
        groups = []
        for (noun, colour, count), region in zip(things, regions, strict=True):
            sprites = self._by_noun[noun]
            if colour is not None:
                sprites = [
                    index for index in sprites if colour == self._own_colour(index) or self._takes(index, colour)
                ]
            if not sprites:
                raise KeyError(f"{colour} {noun}")
            sprite = draws.pick(sprites)
            paint = None if colour in (None, self._own_colour(sprite)) else _paint(draws, colour)
            groups.append(self._placed(draws, Group(sprite, noun, (), paint, colour), count, region))
        return self._told(Scene(tuple(groups), WHITE, relation), draws)

    def has(self, noun: str, colour: str) -> bool:
        """Whether a drawing of the thing has a colour or can get it."""
        return any(colour == self._own_colour(one) or self._takes(one, colour) for one in self._by_noun[noun])

    def _takes(self, sprite: int, colour: str) -> bool:
        """Whether a drawing can get another colour."""
        main, thing = self.sprites[sprite].main, self._things[sprite]
        is_settled = thing is not None and (thing[1] is not None or thing[0] in UNCOLOURED)
        return main.is_replaceable and not is_settled and _differs(colour, main.hue * 360 / 256)

    def is_held_out(self, scene: Scene) -> bool:
        """Whether a scene shows a held-out pair of thing and colour, or of things."""
        nouns = sorted({group.noun for group in scene.groups})
        pairs = [("together", one, other) for place, one in enumerate(nouns) for other in nouns[place + 1 :]]
        pairs += [("colour", group.noun, group.paint.name) for group in scene.groups if group.paint is not None]
        return any(map(self.is_held_out_pair, pairs))

    def is_held_out_pair(self, pair: tuple[str, ...]) -> bool:
        """Whether ("colour", noun, colour), or ("together", noun, noun) in their order, is held out."""
        is_natural = pair[0] == "colour" and pair[1:] in self._natural
        return not is_natural and share_of("\n".join(pair), self.seed) < self.fraction

    def _own_colour(self, sprite: int) -> str | None:
        """Colour of a drawing by its name or pixels; None if the two differ, as for a "black cat" drawn in purple."""
        thing, measured = self._things[sprite], self.sprites[sprite].main.name
        if thing is not None and thing[0] in UNCOLOURED:
            return None
        named = thing[1] if thing is not None else None
        return named or measured if measured in (None, named) or named is None else None

    def _any(self, draws: Draws) -> Scene:
        if draws.chance(0.34):
            sprites = self._by_noun[draws.pick(self._drawn)] if draws.chance(0.75) else self._shown
            return self._framed(draws, sprites)
        return self._composed(draws)

    def _framed(self, draws: Draws, sprites: Sequence[int]) -> Scene:
        """An unchanged drawing on white."""
        sprite = draws.pick(sprites)
        thing = self._things[sprite]
        colour = self._own_colour(sprite) if draws.chance(0.35) or (thing and thing[1]) else None
        noun = thing[0] if thing else self.sprites[sprite].name
        group = Group(sprite, noun, (Place(0.5, 0.5, 1.0),), colour=colour if thing else None)
        return Scene((group,), WHITE, is_framed=True)

    def _composed(self, draws: Draws) -> Scene:
        kinds: list[tuple[Callable[[Draws], Scene], float]] = [
            (self._single, 0.30),
            (self._counted, 0.22),
            (self._pair, 0.36),
            (self._triple, 0.12),
        ]
        scene = draws.weighted(kinds)(draws)
        return replace(scene, background=self._background(draws, scene.groups))

    def _single(self, draws: Draws) -> Scene:
        group = self._group(draws)
        size = draws.weighted([(None, 0.5), ("small", 0.3), ("big", 0.2)])
        low, high = {None: (0.5, 0.72), "small": (0.2, 0.32), "big": (0.82, 0.94)}[size]
        longest = draws.between(low, high)
        place = None
        x, y = (draws.between(0.5 - (1 - longest) / 4, 0.5 + (1 - longest) / 4) for _ in range(2))
        if size != "big" and longest < 0.4 and draws.chance(0.6):
            place = draws.pick(list(PLACES))
            x, y = (draws.between(at - 0.03, at + 0.03) for at in PLACES[place])
        return Scene((replace(group, places=(Place(x, y, longest),), size=size),), WHITE, place=place)

    def _counted(self, draws: Draws) -> Scene:
        group = self._group(draws, says_style=False)
        count = draws.weighted([(2, 0.45), (3, 0.35), (4, 0.2)])
        return Scene((self._placed(draws, group, count, _WHOLE),), WHITE)

    def _pair(self, draws: Draws) -> Scene:
        first, second = self._different(draws, 2)
        relation: Relation = draws.weighted(
            [("left of", 0.25), ("right of", 0.25), ("above", 0.12), ("below", 0.12), ("next to", 0.1), ("and", 0.16)]
        )
        halves = _halves(relation, draws)
        counts = draws.weighted([((1, 1), 0.7), ((2, 1), 0.12), ((1, 2), 0.12), ((3, 1), 0.03), ((1, 3), 0.03)])
        sizes: tuple[str | None, str | None] = (None, None)
        if counts == (1, 1):
            sizes = draws.weighted([((None, None), 0.76), (("small", "big"), 0.12), (("big", "small"), 0.12)])
        groups = [
            self._placed(draws, group, count, half, size)
            for group, count, half, size in zip((first, second), counts, halves, sizes, strict=True)
        ]
        return Scene(tuple(groups), WHITE, relation)

    def _triple(self, draws: Draws) -> Scene:
        groups = self._different(draws, 3)
        regions = draws.weighted([(_ROW_OF_THREE, 0.5), (draws.some(_QUARTERS, 3), 0.5)])
        regions = draws.some(regions, 3)
        placed = [self._placed(draws, group, 1, region) for group, region in zip(groups, regions, strict=True)]
        return Scene(tuple(placed), WHITE)

    def _different(self, draws: Draws, count: int) -> list[Group]:
        groups: list[Group] = []
        while len(groups) < count:
            group = self._group(draws, says_style=False)
            if all(group.noun != other.noun for other in groups):
                groups.append(group)
        return groups

    def _group(self, draws: Draws, says_style: bool = True) -> Group:
        """A group of one thing in one colour, not placed yet."""
        noun = draws.pick(self._drawn)
        sprite = draws.pick(self._by_noun[noun])
        paint = None
        own = self._own_colour(sprite)
        colour = own if own is not None and draws.chance(0.4) else None
        others = [name for name in COLOURS if name != own and self._takes(sprite, name)]
        if others and draws.chance(0.5):
            colour = draws.pick(others)
            paint = _paint(draws, colour)
        style = self.sprites[sprite].style if says_style and draws.chance(0.15) else None
        return Group(sprite, noun, (), paint, colour, style)

    def _placed(self, draws: Draws, group: Group, count: int, region: Region, size: str | None = None) -> Group:
        """Place a number of copies of a group in the cells of a region."""
        left, top, right, bottom = region
        width, height = right - left, bottom - top
        if count == 4 or (count == 3 and width == height and draws.chance(0.5)):
            columns = rows = 2
        else:
            is_row = width > height or (width == height and draws.chance(0.75))
            columns, rows = (count, 1) if is_row else (1, count)
        cells = draws.some([(column, row) for column in range(columns) for row in range(rows)], count)
        cell_width, cell_height = width / columns, height / rows
        room = min(cell_width, cell_height, 0.5) - _MARGIN
        scale = {None: (0.8, 1.0), "small": (0.42, 0.52), "big": (0.92, 1.0)}[size]
        longest = room * draws.between(*scale)
        places = []
        for column, row in cells:
            centre_x, centre_y = left + (column + 0.5) * cell_width, top + (row + 0.5) * cell_height
            # Anywhere in the cell, more often near its middle.
            spare_x, spare_y = (min(0.12, (side - _MARGIN - longest) / 2) for side in (cell_width, cell_height))
            x, y = draws.between(-spare_x, spare_x), draws.between(-spare_y, spare_y)
            places.append(Place(centre_x + x, centre_y + y, longest))
        return replace(group, places=tuple(places), size=size)

    def _background(self, draws: Draws, groups: Sequence[Group]) -> Background:
        if draws.chance(0.5):
            return WHITE
        shown = [self._shown_colour(group) for group in groups]
        names = [name for name in _GROUNDS if _stands_out(name.split()[-1], shown)]
        if not names:
            return WHITE
        first = _paint(draws, draws.pick(names))
        pattern: Pattern = draws.weighted(
            [("plain", 0.6), ("gradient", 0.13), ("striped", 0.1), ("dotted", 0.09), ("checkered", 0.08)]
        )
        if pattern == "plain":
            return Background(pattern, (first,))
        others = [name for name in names if name.split()[-1] != first.name.split()[-1]]
        second = WHITE.paints[0]
        if others and (pattern == "gradient" or draws.chance(0.35)):
            second = _paint(draws, draws.pick(others))
        turn = int(draws.between(0, 3))
        return Background(pattern, (first, second), turn, draws.between(0.1, 0.26))

    def _shown_colour(self, group: Group) -> tuple[str | None, float, bool]:
        """Name and hue of the visible colour of things, and whether it is a grey."""
        if group.paint is not None:
            return group.paint.name, group.paint.hsv[0], group.paint.name in _GREYS
        main, name = self.sprites[group.sprite].main, self._own_colour(group.sprite)
        return name, main.hue * 360 / 256, name in _GREYS or main.share < 0.3


def _stands_out(colour: str, shown: Sequence[tuple[str | None, float, bool]]) -> bool:
    """Whether things are visible on a background of that colour, by the results of `_shown_colour`."""
    for name, hue, is_grey in shown:
        if colour == name or (colour in _GREYS and is_grey):
            return False
        if not is_grey and colour not in _GREYS and not _differs(colour, hue, 32):
            return False
    return True


def _halves(relation: Relation, draws: Draws) -> list[Region]:
    """Regions of the first and the second of two groups."""
    is_side_by_side = relation in ("left of", "right of", "next to") or (relation == "and" and draws.chance(0.7))
    halves: list[Region] = [(0, 0, 0.5, 1), (0.5, 0, 1, 1)] if is_side_by_side else [(0, 0, 1, 0.5), (0, 0.5, 1, 1)]
    if relation in ("right of", "below") or (relation in ("next to", "and") and draws.chance(0.5)):
        halves.reverse()
    return halves


def _paint(draws: Draws, name: str) -> Paint:
    """A random shade of a named colour."""
    hue, saturation, value = COLOURS[name.split()[-1]]
    if name.startswith("light "):
        saturation, value = saturation * 0.35, 0.97 if saturation else 0.85
    turn = 0.0
    if saturation:
        turn = draws.between(-5, 5)
        saturation = min(1.0, saturation + draws.between(-0.06, 0.06))
    return Paint(name, ((hue + turn) % 360, saturation, min(1.0, value + draws.between(-0.04, 0.04))))


def _differs(name: str, hue: float, by: float = 25) -> bool:
    """Whether the hue of a colour is at least a number of degrees away from a hue; always true for greys."""
    own, saturation, _ = COLOURS[name]
    distance = math.fabs((own - hue + 180) % 360 - 180)
    return saturation == 0 or distance > by
