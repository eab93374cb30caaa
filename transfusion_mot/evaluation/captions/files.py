"""Reading of caption files, and matching of captions by image."""

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transfusion_mot.errors import UserError
from transfusion_mot.files import lines_of

CAPTION_KEYS = ("captions", "text", "caption")
REFERENCES_KEY = "references"
_EXAMPLE = '{"file_name": "000.png", "caption": "a red apple"}'
_EXAMPLES = {
    REFERENCES_KEY: '{"file_name": "000.png", "caption": "an apple", "references": ["a red apple"]}, or a second file'
}


def read_captions(path: str | Path, keys: Sequence[str] = CAPTION_KEYS) -> dict[str, list[str]]:
    """Captions by image, in the order of the file.

    The file is JSON lines or a JSON list of objects with `file_name` (or `image_id`) and `caption`, `text` or
    `captions` (a list); objects of one image are merged. COCO's annotation files, with a list under `annotations`, are
    read, too. Other `keys` are tried in their order, for example `references` (a list), which the captions.jsonl of a
    benchmark has beside each caption.

    Raises:
        UserError: The file cannot be read, has another form, or has no captions.
    """
    path = Path(path)
    captions: defaultdict[str, list[str]] = defaultdict(list)
    for number, entry in enumerate(_read_objects(path), start=1):
        entry = entry if isinstance(entry, dict) else {"": entry}
        image = entry.get("file_name", entry.get("image_id"))
        found = next((entry[key] for key in keys if key in entry), None)
        found = [found] if isinstance(found, str) else found
        if image is None or not isinstance(found, list) or not all(isinstance(caption, str) for caption in found):
            raise UserError(
                f"{path}: entry {number} is {json.dumps(entry)[:80]}, but needs 'file_name' and '{keys[-1]}', for "
                f"example {_EXAMPLES.get(keys[-1], _EXAMPLE)}"
            )
        captions[str(image)] += found
    if not captions:
        raise UserError(f"{path} holds no captions")
    return dict(captions)


def _read_objects(path: Path) -> list[Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in lines_of(text) if line.strip()]
        content = json.loads(text)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid {'JSON lines' if path.suffix == '.jsonl' else 'JSON'}: {error}") from None
    content = content.get("annotations") if isinstance(content, dict) else content
    if not isinstance(content, list):
        raise UserError(f"{path} must be a JSON list of objects, or JSON lines in a file that ends in .jsonl")
    return content


def find_captioned(names: Sequence[str], folder: str | Path) -> list[Path]:
    """Files of images by their names in a file of captions: paths below the folder, or file names.

    Raises:
        UserError: A file does not exist.
    """
    found = []
    for name in names:
        places = [Path(folder) / name, Path(folder) / Path(name).name]
        there = [place for place in places if place.is_file()]
        if not there:
            raise UserError(f"image '{places[0]}' does not exist; give the folder of the images that the captions name")
        found.append(there[0])
    return found


def match_captions(
    candidates: dict[str, list[str]], references: dict[str, list[str]]
) -> tuple[list[str], list[list[str]]]:
    """Candidates and references of the same images in the same order, for `caption_metrics`.

    If the paths differ, as after `sample.py --caption folder/*.png`, images are matched by unique file names.

    Raises:
        UserError: An image has several candidates, or is in only one of the two.
    """
    for image, captions in candidates.items():
        if len(captions) != 1:
            raise UserError(f"image {image} has {len(captions)} candidate captions; exactly one is scored")
    if candidates.keys() != references.keys():
        sides = [{Path(image).name: captions for image, captions in side.items()} for side in (candidates, references)]
        if len(sides[0]) == len(candidates) and len(sides[1]) == len(references):
            candidates, references = sides
    for images, others, missing in (
        (candidates, references, "candidate captions have no reference"),
        (references, candidates, "reference images have no candidate caption"),
    ):
        lacking = [image for image in images if image not in others]
        if lacking:
            raise UserError(
                f"{len(lacking)} of {len(images)} {missing}, first {lacking[0]}; both must be about the same images"
            )
    return [captions[0] for captions in candidates.values()], [references[image] for image in candidates]
