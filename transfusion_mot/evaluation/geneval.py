"""GenEval (arXiv 2310.11513): do photographs show the things, counts, colours and places of their prompts?

The rules are those of github.com/djghosh13/geneval, evaluation/evaluate_images.py: a detector of COCO's 80 classes
finds things, and CLIP names their colours. The detector is a Mask2Former of transformers, with inputs and boxes as in
mmdetection's configuration mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco. Its published weights are from another
training run than those of mmdetection, so scores may differ a little from those of the published program.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn.functional import interpolate, normalize, pad
from tqdm import tqdm
from transformers import Mask2FormerForUniversalSegmentation

from transfusion_mot.errors import UserError
from transfusion_mot.evaluation.clip_score import Clip, text_embeddings
from transfusion_mot.evaluation.intervals import mean_interval
from transfusion_mot.evaluation.protocol.prompts import list_hash
from transfusion_mot.evaluation.report.content import Metric
from transfusion_mot.evaluation.weights import weights_hash
from transfusion_mot.hub_names import ask_hub

# COCO's classes in their order, by the names of GenEval's prompts.
_CLASS_NAMES = (
    "person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign, "
    "parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, "
    "handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, "
    "surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, "
    "broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, "
    "laptop, computer mouse, tv remote, computer keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, "
    "book, clock, vase, scissors, teddy bear, hair drier, toothbrush"
)
CLASSES = tuple(_CLASS_NAMES.split(", "))
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
_COLOUR_TEXTS = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object")

# Minimum score of a thing, and minimum score in prompts about counts.
_THRESHOLD, _COUNTING_THRESHOLD = 0.3, 0.9
# Maximum number of things of a class, and of detections of all classes.
_MOST_OF_A_CLASS, _MOST = 16, 100
# Two things have a relation of position if their centres are farther apart than this share of their sizes.
_POSITION_SHARE = 0.1
# Sides of the detector's input: the shorter one, the maximum of the longer one, and the multiple to which both are
# padded.
_INPUT_SIZES, _MULTIPLE = (800, 1333), 32
_MEAN, _STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
_BACKGROUND = "#999"

# A line of GenEval's `evaluation_metadata.jsonl`.
Line = Mapping[str, Any]
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Thing:
    """A thing that the detector found.

    Attributes:
        box: Left, top, right and bottom.
        score: Confidence of the detector, from 0 to 1.
        mask: `[H, W]`, area of the thing.
    """

    box: Box
    score: float
    mask: npt.NDArray[np.bool_]


# Things of a picture and their class => the colour of each.
NameColours = Callable[[Sequence[Thing], str], list[str]]


def is_right(line: Line, things: Mapping[str, Sequence[Thing]], name_colours: NameColours) -> bool:
    """Whether a picture shows the content that the line of its prompt requires; other things may be in it, too.

    Each entry of `include` requires at least `count` of a `class`. Only the `count` with the highest scores are
    checked: all must have its `color` and its `position`, [relation, number of an earlier entry], relative to all
    things of that entry. Each entry of `exclude` forbids `count` or more of a `class`.

    Args:
        line: Line of the prompt.
        things: Things by class, highest score first.
        name_colours: Names the colours of things.
    """
    groups: list[Sequence[Thing]] = []
    for entry in line.get("include", []):
        found = list(things.get(entry["class"], []))[: entry["count"]]
        if len(found) < entry["count"]:
            return False
        if "color" in entry and set(name_colours(found, entry["class"])) != {entry["color"]}:
            return False
        if "position" in entry:
            relation, other = entry["position"]
            if not all(relation in relations(one.box, two.box) for one in found for two in groups[other]):
                return False
        groups.append(found)
    return all(len(things.get(entry["class"], [])) < entry["count"] for entry in line.get("exclude", []))


def relations(first: Box, second: Box) -> set[str]:
    """Relations of the first box to the second (left of, right of, above, below): none, one or two."""
    corners = np.array([first, second]).reshape(2, 2, 2)
    centres, sizes = corners.mean(axis=1), np.abs(corners[:, 1] - corners[:, 0])
    offset = centres[0] - centres[1]
    apart = np.maximum(np.abs(offset) - _POSITION_SHARE * sizes.sum(axis=0), 0) * np.sign(offset)
    if (np.abs(apart) < 1e-3).all():
        return set()
    x, y = apart / np.linalg.norm(offset)
    names = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {name for name, holds in names.items() if holds}


@dataclass(frozen=True)
class Detector:
    """A Mask2Former for the instances of COCO.

    Attributes:
        name: Name or path it was loaded from.
        weights: Hash of its parameters.
        model: The model, in float32 on `device`.
        device: Device of the model.
        input_sizes: The shorter side of its input, and the maximum of the longer one.
    """

    name: str
    weights: str
    model: Mask2FormerForUniversalSegmentation
    device: torch.device
    input_sizes: tuple[int, int] = _INPUT_SIZES

    @torch.inference_mode()
    def things(self, image: Image.Image, threshold: float) -> dict[str, list[Thing]]:
        """The things in an RGB picture with a score above a threshold, by class, highest score first."""
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float().to(self.device)
        height, width = pixels.shape[2:]
        scale = min(self.input_sizes[0] / min(height, width), self.input_sizes[1] / max(height, width))
        size = int(height * scale + 0.5), int(width * scale + 0.5)
        mean, std = (torch.tensor(values, device=self.device).view(3, 1, 1) for values in (_MEAN, _STD))
        inputs = (interpolate(pixels, size=size, mode="bilinear", align_corners=False) - mean) / std
        inputs = pad(inputs, (0, -size[1] % _MULTIPLE, 0, -size[0] % _MULTIPLE))
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            output = self.model(pixel_values=inputs)
        logits = interpolate(output.masks_queries_logits, size=inputs.shape[2:], mode="bilinear", align_corners=False)
        logits = interpolate(logits[..., : size[0], : size[1]], size=(height, width), mode="bilinear")[0]
        return things_of(output.class_queries_logits[0], logits, threshold)


def things_of(class_logits: Tensor, mask_logits: Tensor, threshold: float) -> dict[str, list[Thing]]:
    """Logits of queries, `[Q, 81]` of classes and `[Q, H, W]` of masks => things with a score above a threshold."""
    scores = class_logits.softmax(dim=-1)[:, :-1].flatten()
    best = scores.topk(min(_MOST, len(scores)))
    found: defaultdict[str, list[Thing]] = defaultdict(list)
    for score, place in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        logits = mask_logits[place // len(CLASSES)]
        mask = logits > 0
        # A mask's own score is at most 1.
        if score <= threshold or not mask.any():
            continue
        score *= (logits.sigmoid()[mask].sum() / (mask.sum() + 1e-6)).item()
        if score > threshold:
            rows, columns = (mask.any(dim=dim).nonzero()[:, 0] for dim in (1, 0))
            box = (columns[0].item(), rows[0].item(), columns[-1].item() + 1, rows[-1].item() + 1)
            found[CLASSES[place % len(CLASSES)]].append(Thing(box, score, mask.cpu().numpy()))
    return {name: sorted(things, key=lambda thing: -thing.score)[:_MOST_OF_A_CLASS] for name, things in found.items()}


def load_detector(name_or_path: str, device: torch.device) -> Detector:
    """Load a Mask2Former of `transformers` by its name on the Hugging Face hub or from a local folder.

    Raises:
        UserError: It cannot be found, downloaded or read, or has other classes.
    """
    try:
        ask_hub(name_or_path)
        model, loading = Mask2FormerForUniversalSegmentation.from_pretrained(
            name_or_path, dtype=torch.float32, output_loading_info=True
        )
    # Besides OSError, parsers of damaged files raise any error.
    except Exception as error:
        reason = " ".join(str(error).split()).split(". ")[0][:200]
        raise UserError(
            f"detector '{name_or_path}' cannot be loaded ({reason}); download config.json and model.safetensors of "
            "facebook/mask2former-swin-small-coco-instance elsewhere and give their folder with --detector"
        ) from None
    if loading["missing_keys"]:
        raise UserError(f"'{name_or_path}' lacks weights of its Mask2Former, first '{min(loading['missing_keys'])}'")
    if model.config.num_labels != len(CLASSES):
        raise UserError(
            f"detector '{name_or_path}' knows {model.config.num_labels} classes; GenEval needs one of COCO's "
            f"{len(CLASSES)} instances"
        )
    weights = weights_hash(model)
    return Detector(name_or_path, weights, model.to(device).eval().requires_grad_(False), device)


class ColourNames:
    """Colours of things by CLIP, from their part of the picture on grey.

    Args:
        clip: The model.

    Attributes:
        of_class: For each used class, embeddings `[colours, D]`: the mean over the texts of each colour, at length one.
    """

    def __init__(self, clip: Clip) -> None:
        self.clip = clip
        self.of_class: dict[str, Tensor] = {}

    def of(self, image: Image.Image) -> NameColours:
        """A function that names the colours of things in an RGB picture."""
        return lambda things, name: self._name(image, things, name)

    @torch.inference_mode()
    def _name(self, image: Image.Image, things: Sequence[Thing], name: str) -> list[str]:
        ground = Image.new("RGB", image.size, _BACKGROUND)
        crops = [Image.composite(image, ground, Image.fromarray(t.mask)).crop(_corners(t.box)) for t in things]
        pixels = self.clip.processor.image_processor(images=crops, return_tensors="pt")["pixel_values"]
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            found = self.clip.model.get_image_features(pixel_values=pixels.to(self.clip.device)).pooler_output
        best = (normalize(found, dim=1) @ self._texts_of(name).T).argmax(dim=1)
        return [COLOURS[place] for place in best.tolist()]

    def _texts_of(self, name: str) -> Tensor:
        if name not in self.of_class:
            texts = [text.format(colour=colour, name=name) for colour in COLOURS for text in _COLOUR_TEXTS]
            of_texts = text_embeddings(texts, self.clip).unflatten(0, (len(COLOURS), len(_COLOUR_TEXTS)))
            self.of_class[name] = normalize(of_texts.mean(dim=1), dim=1)
        return self.of_class[name]


def _corners(box: Box) -> tuple[int, int, int, int]:
    left, top, right, bottom = map(round, box)
    return left, top, right, bottom


def geneval_metrics(painted: Sequence[tuple[Line, Path]], detector: Detector, clip: Clip) -> list[Metric]:
    """Share of correct pictures for each task, and GenEval's score, which is the mean over the tasks.

    Intervals are over prompts, because the pictures of a prompt are correlated.

    Raises:
        UserError: A picture cannot be read, or a line requires a class that the detector does not have.
    """
    for line, _ in painted:
        asked = {entry["class"] for key in ("include", "exclude") for entry in line.get(key, [])}
        if unknown := sorted(asked - set(CLASSES)):
            raise UserError(
                f"the prompt '{line['prompt']}' asks for '{unknown[0]}', which is none of COCO's classes; pictures of "
                "configs/eval/composition.yaml are judged by evaluate/composition.py"
            )
    colours = ColourNames(clip)
    # For each task and prompt, whether each picture is correct.
    tasks: defaultdict[str, defaultdict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for line, path in tqdm(painted, desc="GenEval", unit="image"):
        image = _read(path)
        things = detector.things(image, _COUNTING_THRESHOLD if line["tag"] == "counting" else _THRESHOLD)
        right = is_right(line, things, colours.of(image))
        tasks[line["tag"]][str(line["prompt"])].append(float(right))
    protocol: dict[str, Any] = {
        "detector": detector.name,
        "detector weights": detector.weights,
        "detector input": f"{detector.input_sizes[0]} to {detector.input_sizes[1]} px",
        "clip": clip.name,
        "weights": clip.weights,
        "prompts": list_hash((line["tag"], line["prompt"], path.name) for line, path in painted),
    }
    metrics: list[Metric] = []
    shares: list[float] = []
    halves: list[float] = []
    for tag, prompts in tasks.items():
        means = [float(np.mean(values)) for values in prompts.values()]
        pictures = [value for values in prompts.values() for value in values]
        shares.append(float(np.mean(pictures)))
        interval = mean_interval(means)
        halves.append(math.inf if interval is None else (interval[1] - interval[0]) / 2)
        measured = {**protocol, "images": len(pictures), "of prompts": len(means)}
        metrics.append(Metric(f"GenEval, {tag}", shares[-1], measured, interval, tuple(pictures)))
    score = float(np.mean(shares))
    # Half-widths of independent tasks; not their variances, which are 0 if all prompts of a task are correct or wrong.
    half = math.hypot(*halves) / len(shares)
    interval = (max(0.0, score - half), min(1.0, score + half)) if math.isfinite(half) else None
    whole = {**protocol, "images": len(painted), "tasks": len(shares)}
    return [Metric("GenEval", score, whole, interval), *metrics]


def _read(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    # Pillow raises SyntaxError and ValueError, too, on damaged files.
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"image '{path}' cannot be read: {error}") from None
