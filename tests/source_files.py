"""Small real files in the formats that sources read; picture number i is flat and has the grey value i."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import datasets
from PIL import Image

from transfusion_mot.config import DataConfig, SourceConfig
from transfusion_mot.data.sources.base import MediaItem, Text
from transfusion_mot.data.sources.open import open_source

SIZE = 16


def picture(number: int, extension: str = "png", size: tuple[int, int] = (20, 24)) -> bytes:
    """A file's content; `size` is (width, height). JPEG and WebP keep flat grey as it is."""
    buffer = io.BytesIO()
    format_name = {"png": "PNG", "jpg": "JPEG", "jpeg": "JPEG", "webp": "WEBP"}[extension]
    Image.new("RGB", size, (number,) * 3).save(
        buffer, format_name, **({"lossless": True} if extension == "webp" else {})
    )
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes | str], **options: Any) -> None:
    """A tar file of these members, in order."""
    with tarfile.open(path, "w", **options) as tar:
        for name, content in members.items():
            content = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def shard(numbers: range, extension: str = "jpg", caption: str = "picture {}") -> dict[str, bytes | str]:
    """Members of a WebDataset shard."""
    members: dict[str, bytes | str] = {}
    for number in numbers:
        members[f"{number:06d}.{extension}"] = picture(number, extension)
        members[f"{number:06d}.txt"] = caption.format(number)
    return members


def write_coco(folder: Path, num_images: int, captions_per_image: int = 5) -> Path:
    """Images and annotations in the layout of the COCO archives; the annotations are in no particular order."""
    (folder / "train2017").mkdir(parents=True)
    (folder / "annotations").mkdir()
    images, annotations = [], []
    for number in range(num_images):
        name = f"{number + 1000:012d}.jpg"
        (folder / "train2017" / name).write_bytes(picture(number, "jpg"))
        images.append({"license": 3, "file_name": name, "height": 24, "width": 20, "id": number + 1000})
    for turn in range(captions_per_image):
        for number in reversed(range(num_images)):
            annotations.append(
                {"image_id": number + 1000, "id": len(annotations), "caption": f"Picture {number}, described {turn}.\n"}
            )
    path = folder / "annotations" / "captions_train2017.json"
    path.write_text(json.dumps({"info": {}, "licenses": [], "images": images, "annotations": annotations}))
    return path


def picture_dataset(numbers: range, column: str = "image", text_column: str = "text") -> datasets.Dataset:
    """A data set with a column of images."""
    features = datasets.Features({column: datasets.Image(), text_column: datasets.Value("string")})
    rows = {
        column: [{"bytes": picture(number), "path": None} for number in numbers],
        text_column: [f"picture {number}" for number in numbers],
    }
    return datasets.Dataset.from_dict(rows, features=features)


def open_with(source: dict[str, Any], cache: Path, split: str = "train", **data: Any) -> Any:
    """One side of a source, at `SIZE` pixels; nothing is held out unless asked for."""
    defaults: dict[str, Any] = {"image_size": SIZE, "held_out_fraction": 0.0, "cache_dir": str(cache)}
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in source.items()}
    return open_source(SourceConfig(**settings), DataConfig(**(defaults | data)), split)


def numbers_of(images: Any) -> list[int]:
    """Which pictures there are, read from their pixels."""
    return [int(images.image(index)[0, 0, 0]) for index in range(len(images))]


def all_captions(images: Any) -> list[list[str]]:
    """The captions of every image."""
    return [images.captions(index) for index in range(len(images))]


def plain(document: list[Text | MediaItem]) -> list[str | int]:
    """A document as its texts and the indices of its media."""
    return [item.index if isinstance(item, MediaItem) else item.choices[0] for item in document]
