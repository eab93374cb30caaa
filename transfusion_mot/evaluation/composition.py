"""Does a picture show the things, counts, colours and places of its prompt? Judged by comparison with drawings.

It is for pictures of drawings on white, as painted by models of `scenes`. Prompts and rules are those of GenEval (arXiv
2310.11513), whose own detector only knows photographs. Here a picture is cut into parts at white areas. Each part gets
the name of the nearest drawing in a folder of sprites, compared in grey in the features of a network. Colours are
counted in pixels.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import ndimage

from transfusion_mot.data.scene_composer import Composer
from transfusion_mot.data.scene_drawing import draw_scene
from transfusion_mot.data.scene_objects import object_of_drawing
from transfusion_mot.data.scenes import OPPOSITE, Scene
from transfusion_mot.data.sprites import Sprites
from transfusion_mot.evaluation.features.network import FeatureNetwork
from transfusion_mot.evaluation.features.sets import FeatureArray, image_features
from transfusion_mot.evaluation.images import load_rgb
from transfusion_mot.evaluation.intervals import mean_interval
from transfusion_mot.evaluation.report.content import Metric
from transfusion_mot.evaluation.scoring import unit_length

# Minimum difference from the background, of 255.
_CONTRAST = 22
# Parts are joined over gaps up to the first share of the picture, and dropped if they cover less than the second.
_GAP, _LEAST_AREA = 0.016, 0.004
# Drawings are compared at their size in scenes, with this margin.
_COMPARED_AT, _MARGIN = 56, 0.12
# Real scenes are drawn at this size.
_REAL_SIZE = (128, 128)

Box = tuple[int, int, int, int]
# A line of GenEval's `evaluation_metadata.jsonl`.
Line = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """A thing in a picture.

    Attributes:
        box: Left, top, right and bottom.
        picture: The part alone, on a white square.
        colour: Its main colour.
    """

    box: Box
    picture: Image.Image
    colour: str

    @property
    def centre(self) -> tuple[float, float]:
        """x and y."""
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2


@dataclass(frozen=True)
class Found:
    """A part with its name."""

    noun: str
    part: Part


class Drawings:
    """All things of a folder of sprites, which give names to parts.

    Args:
        sprites: The folder.
        network: Network whose features are compared.
    """

    def __init__(self, sprites: Sprites, network: FeatureNetwork) -> None:
        self.network = network
        things = [object_of_drawing(sprite.name) for sprite in sprites.sprites]
        self.indices = np.array([index for index, thing in enumerate(things) if thing is not None])
        self.nouns = np.array([plain_noun(thing[0]) for thing in things if thing is not None])
        pictures = [
            _in_square(sprites.picture(index).crop(sprites.sprites[index].box)) for index in self.indices.tolist()
        ]
        self._features = self._of(pictures, "drawings")

    def _of(self, pictures: Sequence[Image.Image], what: str) -> FeatureArray:
        grey = [picture.convert("L").convert("RGB") for picture in pictures]
        return unit_length(image_features(grey, self.network, description=what))

    def likeness(self, parts: Sequence[Part]) -> FeatureArray:
        """Cosines [parts, drawings] of the features of parts and drawings."""
        if not parts:
            return np.empty((0, len(self.indices)), dtype=np.float32)
        return self._of([part.picture for part in parts], "parts") @ self._features.T

    def names(self, likeness: FeatureArray) -> list[str]:
        """The nouns of the most similar drawings."""
        return [str(noun) for noun in self.nouns[likeness.argmax(axis=1)]]

    def names_of_own(self) -> list[str]:
        """The noun of each drawing, by its nearest other drawing."""
        likeness = self._features @ self._features.T
        np.fill_diagonal(likeness, -1)
        return self.names(likeness)


def plain_noun(noun: str) -> str:
    """The thing of a face: "dog face" => "dog"; "smiling face" is itself a thing."""
    thing = noun.removesuffix(" face")
    return thing if object_of_drawing(thing) is not None else noun


def parts_of(picture: Image.Image) -> list[Part]:
    """The things in a picture with a plain background."""
    pixels = np.asarray(picture.convert("RGB")).astype(np.int16)
    side = min(pixels.shape[:2])
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    is_thing = np.abs(pixels - np.median(border, axis=0)).max(axis=2) > _CONTRAST
    radius = max(1, round(_GAP * side))
    labels, count = ndimage.label(ndimage.binary_dilation(is_thing, iterations=radius))
    labels = np.where(is_thing, labels, 0)
    boxes = [(across.start, down.start, across.stop, down.stop) for down, across in ndimage.find_objects(labels, count)]
    areas = np.bincount(labels.reshape(-1), minlength=count + 1)[1:]
    kept = sorted(np.flatnonzero(areas >= _LEAST_AREA * side**2).tolist(), key=lambda place: -areas[place])
    owners: list[list[int]] = []
    for place in kept:
        # A part inside the box of a larger part belongs to it, like the lenses of a pair of glasses.
        inside = [owner for owner in owners if _share_inside(boxes[place], boxes[owner[0]]) > 0.8]
        if inside:
            inside[0].append(place)
        else:
            owners.append([place])
    parts = []
    for owner in owners:
        mask = np.isin(labels, [place + 1 for place in owner])
        left, top, right, bottom = _around([boxes[place] for place in owner])
        cut = np.where(mask[..., None], pixels, 255)[top:bottom, left:right].astype(np.uint8)
        colour = colour_of(cut[mask[top:bottom, left:right]])
        parts.append(Part((left, top, right, bottom), _in_square(Image.fromarray(cut)), colour))
    return parts


def colour_of(pixels: npt.NDArray[np.uint8]) -> str:
    """Colour name of most of `pixels` [N, 3]; dark outlines and white count only if they dominate."""
    hsv = np.asarray(Image.fromarray(pixels[None]).convert("HSV"))[0].astype(np.float32)
    hue, saturation, value = hsv[:, 0] * 360 / 256, hsv[:, 1] / 255, hsv[:, 2] / 255
    names = np.select(
        [
            value < 0.28,
            (saturation < 0.18) & (value > 0.92),
            saturation < 0.18,
            ((hue < 14) | (hue >= 345)) & (saturation < 0.55) & (value > 0.8),
            (hue >= 300) & (hue < 345),
            (hue < 12) | (hue >= 345),
            (hue < 44) & (value < 0.68),
            hue < 39,
            hue < 68,
            hue < 168,
            hue < 252,
        ],
        ["black", "white", "gray", "pink", "pink", "red", "brown", "orange", "yellow", "green", "blue"],
        "purple",
    )
    counts = Counter(names.tolist())
    areas = {name: count for name, count in counts.items() if name not in ("black", "white")}
    usual = areas if sum(areas.values()) >= 0.5 * len(names) else counts
    return max(usual, key=usual.__getitem__)


def is_right(line: Line, found: Sequence[Found]) -> bool:
    """Whether a picture shows exactly the content that the line of its prompt requires.

    Each entry of `include` requires a number (`count`) of a thing (`class`), all with its `color` and its `position`,
    [relation, number of the other entry], if it has these. GenEval accepts additional things; on a plain background
    they are mistakes.
    """
    named: list[list[Found]] = []
    for entry in line["include"]:
        of_it = [thing for thing in found if thing.noun == plain_noun(entry["class"])]
        if len(of_it) != entry["count"] or any(
            thing.part.colour != entry.get("color", thing.part.colour) for thing in of_it
        ):
            return False
        named.append(of_it)
    if len(found) != sum(map(len, named)):
        return False
    for entry, of_it in zip(line["include"], named, strict=True):
        if "position" in entry:
            relation, other = entry["position"]
            if not all(_stands(relation, one.part, two.part) for one in of_it for two in named[other]):
                return False
    return True


def composition_metrics(painted: Sequence[tuple[Line, Path]], sprites: Sprites, drawings: Drawings) -> list[Metric]:
    """Shares of correct pictures, by kind of prompt, and the same for real scenes, which should all be correct.

    Real scenes are drawn from the same lines. "real scenes, unknown drawings" are the same scenes, judged without the
    drawings in them, because pictures of a model may be unlike all of them. "real scenes, wrong prompts" are judged by
    another prompt of the same kind.
    """
    lines = [line for line, _ in painted]
    found, _ = _found([Image.fromarray(load_rgb(picture)) for _, picture in painted], drawings)
    composer = Composer(sprites.sprites, seed=0, held_out_fraction=0.0, is_split=False)
    scenes = [_scene_of(line, composer, number) for number, line in enumerate(lines)]
    real = [Image.fromarray(draw_scene(scene, sprites, _REAL_SIZE)) for scene in scenes]
    known, unknown = _found(real, drawings, [[group.sprite for group in scene.groups] for scene in scenes])
    judged: dict[str, list[bool]] = {
        "painted": [is_right(line, things) for line, things in zip(lines, found, strict=True)],
        "real scenes": [is_right(line, things) for line, things in zip(lines, known, strict=True)],
        "real scenes, unknown drawings": [is_right(line, things) for line, things in zip(lines, unknown, strict=True)],
        "real scenes, wrong prompts": [
            is_right(lines[other], things) for other, things in zip(_next_of_its_kind(lines), known, strict=True)
        ],
    }
    kinds: defaultdict[str, list[int]] = defaultdict(list)
    for place, line in enumerate(lines):
        kinds[line["tag"]].append(place)
        if line.get("held_out"):
            kinds[f"{line['tag']}, held-out pairs"].append(place)
    metrics = []
    for of, right in judged.items():
        for kind, places in kinds.items():
            values = [float(right[place]) for place in places]
            protocol = {"pictures": len(values), "drawings": sprites.fingerprint, "network": drawings.network.weights}
            share = sum(values) / len(values)
            metrics.append(Metric(f"{kind} ({of})", share, protocol, mean_interval(values), tuple(values)))
    return metrics


def _found(
    pictures: Sequence[Image.Image], drawings: Drawings, without: Sequence[Sequence[int]] | None = None
) -> tuple[list[list[Found]], list[list[Found]]]:
    """The things in each picture, named by all drawings, and by all except those of `without`."""
    parts = [parts_of(picture) for picture in pictures]
    likeness = drawings.likeness([part for some in parts for part in some])
    known = _named(parts, drawings.names(likeness))
    left_out = [some for of_picture, some in zip(parts, without or [()] * len(parts), strict=True) for _ in of_picture]
    for row, some in enumerate(left_out):
        likeness[row, np.isin(drawings.indices, some)] = -1
    return known, _named(parts, drawings.names(likeness))


def _named(parts: Sequence[Sequence[Part]], names: Sequence[str]) -> list[list[Found]]:
    left = iter(names)
    return [[Found(next(left), part) for part in some] for some in parts]


def _scene_of(line: Line, composer: Composer, number: int) -> Scene:
    things = [(entry["class"], entry.get("color"), entry["count"]) for entry in line["include"]]
    relations = [entry["position"][0] for entry in line["include"] if "position" in entry]
    # Of the second entry, in GenEval's lines.
    relation = OPPOSITE[relations[0]] if relations else "and"
    return composer.asked_for(things, relation, "real", number)


def _next_of_its_kind(lines: Sequence[Line]) -> list[int]:
    """For each line another line of its kind, with another prompt."""
    others = []
    for place, line in enumerate(lines):
        turned = [*range(place + 1, len(lines)), *range(place)]
        same = (o for o in turned if lines[o]["tag"] == line["tag"] and lines[o]["prompt"] != line["prompt"])
        others.append(next(same, place))
    return others


def _stands(relation: str, one: Part, two: Part) -> bool:
    right, down = (mine - theirs for mine, theirs in zip(one.centre, two.centre, strict=True))
    distances = {"left of": -right, "right of": right, "above": -down, "below": down}
    # Rather there than anywhere else.
    return distances[relation] > 0 and distances[relation] == max(distances.values())


def _in_square(drawing: Image.Image) -> Image.Image:
    """A drawing, with or without transparency, centred on a white square with a margin."""
    scale = _COMPARED_AT / max(drawing.size)
    small = drawing.convert("RGBA").resize(
        (max(1, round(drawing.width * scale)), max(1, round(drawing.height * scale))), Image.Resampling.BICUBIC
    )
    side = round(_COMPARED_AT * (1 + _MARGIN))
    square = Image.new("RGB", (side, side), "white")
    square.paste(small, ((side - small.width) // 2, (side - small.height) // 2), small)
    return square


def _share_inside(inner: Box, outer: Box) -> float:
    width = max(0, min(inner[2], outer[2]) - max(inner[0], outer[0]))
    height = max(0, min(inner[3], outer[3]) - max(inner[1], outer[1]))
    return width * height / ((inner[2] - inner[0]) * (inner[3] - inner[1]))


def _around(boxes: Sequence[Box]) -> Box:
    lefts, tops, rights, bottoms = zip(*boxes, strict=True)
    return min(lefts), min(tops), max(rights), max(bottoms)
