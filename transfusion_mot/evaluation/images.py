"""Images from a folder, a tar file or memory, decoded by threads of worker processes => batches on a device.

Generated images and images from disk use the same code, at their own size unless another is given.
"""

import hashlib
import io
import itertools
import json
import logging
import tarfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import DataLoader, IterableDataset, default_collate, get_worker_info
from tqdm import tqdm

from transfusion_mot.data.images import displayed_size, load_image, refuse_empty
from transfusion_mot.errors import UserError
from transfusion_mot.files import lines_of

ImageArray = npt.NDArray[np.uint8]

METADATA = "metadata.jsonl"
_EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"})
_UNCOMPRESSED = frozenset({".bmp", ".tif", ".tiff"})
# Often an animation, which is not one picture.
_LEFT_OUT = ".gif"
# Starting a process with torch takes as long as decoding tens of images. Threads start at once, but Pillow holds
# Python's lock for an eighth of its time, so many threads would wait for it.
_THREADS = 4

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TarImage:
    """An image inside an uncompressed tar file: its name, and the place of its bytes."""

    tar: Path
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.tar}: {self.name}"

    def read(self) -> bytes:
        """The bytes of the image file."""
        with self.tar.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


ImageSource = Path | TarImage | Image.Image


def find_images(place: str | Path) -> list[Path] | list[TarImage]:
    """The images of a folder, sorted by path: those that its `metadata.jsonl` lists, if it has one; or of a tar file.

    Without that file: every .png, .jpg, .jpeg, .webp, .bmp, .tif and .tiff file under the folder. With it, pictures
    that `sample.py` adds for viewing, such as its grid, are skipped. Hidden files and files in hidden folders
    (`._a.png`, `.ipynb_checkpoints/`) are skipped, and also GIF files, with a warning.

    Raises:
        UserError: The folder does not exist or has no images, a listed image is missing, or the tar file is damaged or
            compressed.
    """
    folder = Path(place)
    if folder.is_file():
        return _images_in_tar(folder)
    if not folder.is_dir():
        raise UserError(f"'{folder}' is not a folder; give a folder of images, or a tar file of them")
    if (folder / METADATA).is_file():
        return sorted({image for _, image, _ in _listed_images(folder)})
    found = [path for path in folder.rglob("*") if path.is_file()]
    images = sorted(path for path in found if _is_image(path.relative_to(folder)))
    _check_found(folder, len(images), [path.name for path in found])
    return images


def _is_image(path: Path) -> bool:
    """Whether a path, relative to the searched folder or tar file, is an image."""
    is_hidden = any(part.startswith(".") and part != "." for part in path.parts)
    return path.suffix.lower() in _EXTENSIONS and not is_hidden


def _check_found(place: Path, num_images: int, names: Sequence[str]) -> None:
    animated = [name for name in names if name.lower().endswith(_LEFT_OUT)]
    if animated:
        _logger.warning("%s: %d %s files are left out, first %s", place, len(animated), _LEFT_OUT, animated[0])
    if not num_images:
        raise UserError(f"'{place}' holds no images ({', '.join(sorted(_EXTENSIONS))})")


def image_list_hash(images: Sequence[ImageSource]) -> str:
    """Hash of a set of images, independent of order: files by their names and sizes, pictures by their pixels.

    Reading all files would take as long as decoding them. Only uncompressed files are read, because their sizes are
    equal.
    """
    described = sorted(_described(image) for image in images)
    return f"sha256 {hashlib.sha256(json.dumps(described).encode()).hexdigest()[:12]}"


def _described(image: ImageSource) -> tuple[str, int]:
    if isinstance(image, Image.Image):
        return hashlib.sha256(image.tobytes()).hexdigest(), 0
    # A folder and a tar file of it have the same hash.
    name, size = (
        (Path(image.name).name, image.size) if isinstance(image, TarImage) else (image.name, image.stat().st_size)
    )
    if Path(name).suffix.lower() in _UNCOMPRESSED:
        content = image.read() if isinstance(image, TarImage) else image.read_bytes()
        name += f" {hashlib.sha256(content).hexdigest()}"
    return name, size


def _images_in_tar(path: Path) -> list[TarImage]:
    try:
        with tarfile.open(path, "r:") as tar:
            members = [member for member in tar if member.isfile()]
    except (OSError, tarfile.TarError) as error:
        raise UserError(
            f"'{path}' cannot be read as an uncompressed tar file ({error}); give a folder of images, or unpack it"
        ) from None
    images = [
        TarImage(path, member.name, member.offset_data, member.size)
        for member in sorted(members, key=lambda member: member.name)
        if _is_image(Path(member.name))
    ]
    _check_found(path, len(images), [member.name for member in members])
    return images


def read_prompts(folder: str | Path) -> tuple[list[Path], list[str]]:
    """Images of a folder and the texts they were made from, in the order of its `metadata.jsonl`.

    Each line is a JSON object with `file_name` and `text` (or `prompt`), as `sample.py` writes it.

    Raises:
        UserError: The file is missing, a line has another form, or an image does not exist.
    """
    folder = Path(folder)
    if not (folder / METADATA).is_file():
        raise UserError(
            f"'{folder / METADATA}' does not exist; give a folder that holds images and a {METADATA} of lines like "
            '{"file_name": "000.png", "text": "a red apple"}'
        )
    images, texts = [], []
    for where, image, entry in _listed_images(folder):
        text = entry.get("text", entry.get("prompt"))
        if not isinstance(text, str):
            raise UserError(f"{where}: has no 'text' (or 'prompt'), the text that the image was made from")
        images.append(image)
        texts.append(text)
    return images, texts


def _listed_images(folder: Path) -> list[tuple[str, Path, dict[str, Any]]]:
    """Place, image and content of each line of a folder's metadata."""
    metadata = folder / METADATA
    listed = []
    try:
        text = metadata.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"'{metadata}' cannot be read as UTF-8 text: {error}") from None
    for number, line in enumerate(lines_of(text), start=1):
        if not line.strip():
            continue
        where = f"{metadata}, line {number}"
        try:
            entry = json.loads(line)
            image = folder / entry["file_name"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{where}: not a JSON object with 'file_name'") from None
        if not image.is_file():
            raise UserError(f"{where}: image '{image}' does not exist")
        listed.append((where, image, entry))
    if not listed:
        raise UserError(f"{metadata} lists no images")
    return listed


def load_rgb(source: ImageSource, image_size: int | None = None) -> ImageArray:
    """A file or picture => RGB `uint8 [H, W, 3]`, transparency on white.

    With `image_size` the centre square is cropped at whole pixels and resized by Lanczos, as in published protocols of
    COCO. Otherwise the image keeps its size and its stored orientation, as in clean-fid.

    Raises:
        UserError: The picture cannot be read, has no pixels or more than 8 bits a channel; the message names it.
    """
    content = source.read() if isinstance(source, TarImage) else source
    if image_size is not None:
        return _centre_square(content, image_size, None if isinstance(source, Image.Image) else str(source))
    if isinstance(content, Image.Image):
        return _to_rgb(content, "the given picture")
    try:
        with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as image:
            return _to_rgb(image, str(source))
    except UnidentifiedImageError:
        raise UserError(f"image '{source}' is not in a format that Pillow reads") from None
    except UserError:
        raise
    # Pillow raises SyntaxError and ValueError, too, on damaged files.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"image '{source}' cannot be read: {error}") from None


def _centre_square(content: Path | bytes | Image.Image, size: int, name: str | None) -> ImageArray:
    image = Image.fromarray(load_image(content, displayed_size(content, name), name=name))
    side = min(image.size)
    # Like torchvision's CenterCrop; training crops at fractions of a pixel.
    left, top = round((image.width - side) / 2), round((image.height - side) / 2)
    square = image.crop((left, top, left + side, top + side))
    return np.asarray(square.resize((size, size), Image.Resampling.LANCZOS))


def _to_rgb(image: Image.Image, name: str) -> ImageArray:
    refuse_empty(image, name)
    if image.mode.startswith(("I", "F")):
        raise UserError(f"image '{name}' has more than 8 bits a channel; save it with 8")
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"), dtype=np.uint8)


_Items = list[torch.Tensor | UserError]


class _Batches(IterableDataset[list[torch.Tensor] | UserError]):
    """Batches of prepared images: all, or in one of n worker processes every n-th batch.

    For an unreadable image the batch is its error, because DataLoader hides raised errors in a traceback.
    """

    def __init__(
        self,
        images: Sequence[ImageSource],
        prepare: Callable[[ImageArray], torch.Tensor],
        image_size: int | None,
        batch_size: int,
        num_threads: int,
    ) -> None:
        self.images, self.prepare, self.image_size = images, prepare, image_size
        self.batch_size, self.num_threads = batch_size, num_threads

    def __iter__(self) -> Iterator[list[torch.Tensor] | UserError]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        starts = range(first * self.batch_size, len(self.images), step * self.batch_size)
        with ThreadPoolExecutor(self.num_threads) as threads:
            # While one batch is assembled, the next one is decoded.
            begun: deque[Iterator[_Items]] = deque()
            for start in starts:
                batch = self.images[start : start + self.batch_size]
                # A thread gets its whole part at once: passing single small images takes longer than decoding them.
                size = -(-len(batch) // self.num_threads)
                begun.append(threads.map(self._load, [batch[at : at + size] for at in range(0, len(batch), size)]))
                if len(begun) > 1:
                    yield _stack(begun.popleft())
            for parts in begun:
                yield _stack(parts)

    def _load(self, images: Sequence[ImageSource]) -> _Items:
        items: _Items = []
        for image in images:
            try:
                items.append(self.prepare(load_rgb(image, self.image_size)))
            except UserError as error:
                items.append(error)
        return items


def _stack(parts: Iterable[_Items]) -> list[torch.Tensor] | UserError:
    """Consecutive images of one size become one tensor, which a worker puts into shared memory at once."""
    tensors = []
    for item in itertools.chain.from_iterable(parts):
        if isinstance(item, UserError):
            return item
        tensors.append(item)
    groups = itertools.groupby(tensors, key=lambda tensor: tensor.shape)
    return [default_collate(list(of_size)) for _, of_size in groups]


def device_batches(
    images: Sequence[ImageSource],
    prepare: Callable[[ImageArray], torch.Tensor],
    device: torch.device,
    *,
    batch_size: int | None,
    num_workers: int,
    description: str,
    image_size: int | None = None,
    quiet: bool = False,
) -> Iterator[list[torch.Tensor]]:
    """Batches of `prepare(image)` on `device`, in the order of `images`, with a progress bar unless `quiet`.

    A batch is a list of tensors `[n, ...]`; each has consecutive images of one shape.

    The default of `batch_size` is `default_batch_size`. `num_workers` images are decoded at a time, by threads of a few
    processes; with 0, one at a time by a thread of this process.

    Raises:
        UserError: An image cannot be read, or a number is out of range.
    """
    if batch_size is None:
        batch_size = default_batch_size(device)
    for name, value, least in (
        ("batch size", batch_size, 1),
        ("number of workers", num_workers, 0),
        ("image size", image_size, 1),
    ):
        if value is not None and value < least:
            raise UserError(f"the {name} must be at least {least}, but is {value}")
    num_processes = min(-(-num_workers // _THREADS), -(-len(images) // batch_size))
    num_threads = -(-num_workers // num_processes) if num_processes else 1
    loader = DataLoader(
        _Batches(images, prepare, image_size, batch_size, num_threads),
        batch_size=None,
        num_workers=num_processes,
        pin_memory=device.type == "cuda",
    )
    with tqdm(total=len(images), desc=description, unit="image", disable=quiet) as progress:
        for batch in loader:
            if isinstance(batch, UserError):
                raise batch
            yield [of_size.to(device, non_blocking=True) for of_size in batch]
            progress.update(sum(map(len, batch)))


def pick_device(name: str | None) -> torch.device:
    """The device of that name; by default CUDA if there is one, else the CPU.

    Raises:
        UserError: There is no such device.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device '{name}' cannot be used: {str(error).splitlines()[0]}") from None
    return device


def default_batch_size(device: torch.device) -> int:
    """64 images at a time on a GPU and 4 on a CPU, where larger batches only cost memory traffic."""
    return 4 if device.type == "cpu" else 64
