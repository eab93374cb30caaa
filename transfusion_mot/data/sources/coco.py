"""COCO captions in their original form: a folder of images, and a JSON file of `images` and `annotations`."""

import os
from collections import defaultdict
from pathlib import Path
from typing import Any

from transfusion_mot.config import DataConfig, SourceConfig
from transfusion_mot.data.sources.arrays import ArrayWriter, StoredArrays, file_stamp, stored_arrays
from transfusion_mot.data.sources.stored_media import CaptionWriter
from transfusion_mot.data.sources.tables import from_json, texts_in
from transfusion_mot.errors import UserError


def index_coco(source: SourceConfig, data: DataConfig) -> StoredArrays:
    """File names and captions of the images that the annotations list.

    Raises:
        UserError: `annotations` is missing or has another form.
    """
    if source.annotations is None:
        raise UserError(
            "a source of kind 'coco' needs 'annotations', a file such as annotations/captions_train2017.json"
        )
    path = Path(source.annotations)

    def build(writer: ArrayWriter) -> None:
        annotations = _read(path)
        captions: dict[Any, list[str]] = defaultdict(list)
        for number, annotation in enumerate(annotations["annotations"]):
            where = f"{path}: annotation {number}"
            image_id, caption = (_field(annotation, name, where) for name in ("image_id", "caption"))
            captions[image_id] += texts_in(caption, "caption", where)
        # A file is one image, even if it is listed several times or with different spellings of its path.
        listed: dict[str, tuple[str, list[str]]] = {}
        for number, image in enumerate(annotations["images"]):
            where = f"{path}: image {number}"
            name = _field(image, "file_name", where)
            if not isinstance(name, str):
                raise UserError(f"{where}: the field 'file_name' must be the name of a file, got {name!r:.100}")
            _, own = listed.setdefault(os.path.normpath(name), (name, []))
            own += captions.pop(_field(image, "id", where), [])
        items = CaptionWriter(writer, data.split_seed)
        for name, own in listed.values():
            items.add(name, own, name)
        for image_id in captions:
            writer.skipped.add("caption without an image", f"image_id {image_id}")

    return stored_arrays(data.cache_dir, "coco", [file_stamp(path), data.split_seed], build)


def _read(path: Path) -> dict[str, Any]:
    content = from_json(path.read_bytes(), f"'{path}' is not a complete JSON file")
    for name in ("images", "annotations"):
        if not isinstance(content, dict) or not isinstance(content.get(name), list):
            has = sorted(content) if isinstance(content, dict) else type(content).__name__
            raise UserError(f"'{path}' needs the lists 'images' and 'annotations' of COCO captions; it has {has}")
    return content


def _field(entry: Any, name: str, where: str) -> Any:
    if not isinstance(entry, dict) or name not in entry:
        has = sorted(entry) if isinstance(entry, dict) else type(entry).__name__
        raise UserError(f"{where}: needs a field '{name}'; it has {has}. Give the captions, not the instances")
    return entry[name]
