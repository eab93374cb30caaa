"""Image files => uint8 arrays => pixels in [-1, 1], and back to images."""

import errno
import io
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError

from transfusion_mot.errors import UnreadableMedia, UserError

# Commands that only read or draw files do not wait for PyTorch to load.
if TYPE_CHECKING:
    import torch

ImageArray = npt.NDArray[np.uint8]
ImageFit = Literal["crop", "stretch", "pad"]
# Inputs of Pillow: a path, a file's content, an open file, or a picture.
ImageInput = str | Path | bytes | BinaryIO | Image.Image

_CELL = 128
_MARGIN = 12
_FONT_SIZE = 13
# Pillow's name of a sample format => its bits. Pillow does not scale a transparent colour to 8 bits as it scales
# pixels.
_SAMPLE_BITS = {"L;2": 2, "L;4": 4, "I;12": 12, "I;16": 16, "I;16B": 16, "RGB;16B": 16}
# Error numbers for an offset outside of the file. Only damaged content sends a decoder there.
_PLACES_THAT_ARE_NOT = (errno.EINVAL, errno.EOVERFLOW)


class UnreadableImage(UnreadableMedia):
    """The image of an `UnreadableMedia`."""

    what = "image"
    file = "file"


def load_image(
    source: ImageInput,
    image_size: int | tuple[int, int],
    fit: ImageFit = "crop",
    name: str | None = None,
) -> ImageArray:
    """A picture of any mode and size => `uint8 [height, width, 3]`, RGB.

    The EXIF orientation is applied, transparency becomes white, 16-bit grey is reduced to 8 bits, and the picture is
    resized with antialiased Lanczos. The first frame of an animation is used.

    Args:
        source: A file, its path or its content, or a picture.
        image_size: (height, width), or one number for both.
        fit: `crop` cuts the edges, `stretch` changes the proportions, `pad` adds white.
        name: Name of the picture in messages; None is its path.

    Raises:
        UnreadableImage: The file is missing, truncated or not an image, has no pixels or more than Pillow's limit
            against decompression bombs, or has values of unknown range (floating-point, signed or 32-bit integers).
        UserError: The system failed to read the file.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    with _opened(source, name) as (image, name):
        if not isinstance(source, Image.Image):
            # Decoding a JPEG at a half, quarter or eighth is faster; at twice the final size or more it does not show.
            image.draft(None, (2 * max(size), 2 * max(size)))
        return _bring_to_size(image, size, fit, name)


def displayed_size(source: ImageInput, name: str | None = None) -> tuple[int, int]:
    """(height, width) of a picture as displayed, read only from its header.

    Raises:
        UnreadableImage, UserError: As `load_image`, but only the header is checked.
    """
    if isinstance(source, BufferedReader):
        with _errors_told(_name_of(source, name)):
            if (size := _webp_size(source)) is not None:
                return size
    with _opened(source, name) as (image, _):
        # Pillow's method for PNG files would decode the whole picture to find a tag after it.
        return _turned(image.size, Image.Image.getexif(image))


def _turned(size: tuple[int, int], exif: Image.Exif) -> tuple[int, int]:
    """(width, height) as stored => (height, width) as seen."""
    width, height = size
    return (width, height) if exif.get(ExifTags.Base.Orientation, 1) >= 5 else (height, width)


def _webp_size(file: BufferedReader) -> tuple[int, int] | None:
    """`displayed_size` of a WebP file without reading all of it, as Pillow would; None if Pillow must read the file.

    The container is described in RFC 9649, section 2.
    """
    head = file.read(30)
    file.seek(0)
    if len(head) < 30 or head[:4] != b"RIFF" or head[8:12] != b"WEBP":
        return None
    kind, content = head[12:16], head[20:]
    exif = Image.Exif()
    if kind == b"VP8 " and content[3:6] == b"\x9d\x01\x2a":
        width, height = (int.from_bytes(content[place : place + 2], "little") & 0x3FFF for place in (6, 8))
    elif kind == b"VP8L" and content[0] == 0x2F:
        bits = int.from_bytes(content[1:5], "little")
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    elif kind == b"VP8X":
        width, height = (int.from_bytes(content[place : place + 3], "little") + 1 for place in (4, 7))
        if content[0] & 0x08:
            # The tag comes after the picture: skip from chunk to chunk, each of an even length.
            place = 12
            while len(chunk := _read_at(file, place, 8)) == 8:
                length = int.from_bytes(chunk[4:], "little")
                if chunk[:4] == b"EXIF":
                    exif.load(_read_at(file, place + 8, length))
                place += 8 + length + length % 2
            file.seek(0)
    else:
        return None
    return _turned((width, height), exif) if width and height else None


def _read_at(file: BufferedReader, place: int, length: int) -> bytes:
    file.seek(place)
    return file.read(length)


def nearest_buckets(sizes: npt.NDArray[np.integer], buckets: Sequence[tuple[int, int]]) -> npt.NDArray[np.int16]:
    """Index of the bucket (height, width) with the closest aspect ratio, for each of `sizes` `[N, 2]`."""
    proportions = np.log(sizes[:, 0] / sizes[:, 1])
    wanted = np.log([height / width for height, width in buckets])
    nearest = np.zeros(len(sizes), dtype=np.int16)
    distance = np.abs(proportions - wanted[0])
    # One bucket at a time: an array of N times the number of buckets would not fit into memory.
    for index in range(1, len(buckets)):
        other = np.abs(proportions - wanted[index])
        nearest[other < distance] = index
        np.minimum(distance, other, out=distance)
    return nearest


@contextmanager
def _opened(source: ImageInput, name: str | None) -> Iterator[tuple[Image.Image, str]]:
    """An open picture that is not decoded yet, and its name; every error becomes a `UserError` with this name."""
    name = _name_of(source, name)
    with _errors_told(name), ExitStack() as stack:
        if isinstance(source, Image.Image):
            image = source
        else:
            image = stack.enter_context(Image.open(io.BytesIO(source) if isinstance(source, bytes) else source))
        refuse_empty(image, name)
        width, height = image.size
        if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
            raise UnreadableImage(
                name, f"has {width} x {height} pixels, more than the limit of {Image.MAX_IMAGE_PIXELS}"
            )
        yield image, name


def refuse_empty(image: Image.Image, name: str) -> None:
    """Refuse a picture without pixels. Pillow does not open such files, but such pictures can be made in memory.

    Raises:
        UnreadableImage: Its height or width is 0.
    """
    if not all(image.size):
        raise UnreadableImage(name, f"has {image.width} x {image.height} pixels; it needs at least one")


def _name_of(source: ImageInput, name: str | None) -> str:
    return name or (str(source) if isinstance(source, str | Path) else "the given picture")


@contextmanager
def _errors_told(name: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise UnreadableImage(name, "does not exist") from None
    except UnidentifiedImageError:
        raise UnreadableImage(name, "is not in a format that Pillow reads") from None
    except UserError:
        raise
    # Decoders raise any error, also RuntimeError and AttributeError; one damaged file of millions must not end a run.
    except Exception as error:
        # Decoders give errors of the content without an error number. System errors have one and may be temporary.
        if isinstance(error, OSError) and error.errno not in (None, *_PLACES_THAT_ARE_NOT):
            raise UserError(f"image '{name}' cannot be read: {error.strerror}") from None
        raise UnreadableImage(name, f"cannot be read: {error}") from None


def _bring_to_size(image: Image.Image, size: tuple[int, int], fit: ImageFit, name: str) -> ImageArray:
    # Before the next line decodes the file and Pillow forgets how its samples were stored.
    samples = _samples_of(image)
    image = _to_rgb(ImageOps.exif_transpose(image), samples, name)
    width_and_height = (size[1], size[0])
    lanczos = Image.Resampling.LANCZOS
    if fit == "crop":
        image = ImageOps.fit(image, width_and_height, lanczos)
    elif fit == "stretch":
        image = image.resize(width_and_height, lanczos)
    else:
        image = _padded(image, width_and_height)
    return np.array(image, dtype=np.uint8)


def _padded(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The whole picture, scaled to fit into `size` and centred on white; a side is at least one pixel."""
    scale = min(size[0] / image.width, size[1] / image.height)
    width, height = (max(1, round(side * scale)) for side in image.size)
    padded = Image.new("RGB", size, "white")
    left, top = round((size[0] - width) * 0.5), round((size[1] - height) * 0.5)
    padded.paste(image.resize((width, height), Image.Resampling.LANCZOS), (left, top))
    return padded


def _samples_of(image: Image.Image) -> str:
    """Pillow's name of the sample format of a file that is not decoded yet, such as "I;16B"; "" if unknown."""
    tiles = getattr(image, "tile", None)
    arguments = tiles[0][3] if tiles else ""
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return first if isinstance(first, str) else ""


def _to_rgb(image: Image.Image, samples: str, name: str) -> Image.Image:
    """RGB with transparency on white; `samples` is from `_samples_of` the file."""
    bits = _SAMPLE_BITS.get(samples, 16 if image.mode.startswith("I") else 8)
    transparent = image.info.get("transparency")
    if image.mode == "F" or (image.mode == "I" and samples not in ("", *_SAMPLE_BITS)):
        raise _of_unknown_range(name)
    if image.mode.startswith("I"):
        # Grey of more than 8 bits ("I;16", "I;16B"; "I" is of 32 bits): Pillow's own convert would clip.
        values = np.asarray(image).astype(np.float64)
        if values.min() < 0 or values.max() > 65535:
            raise _of_unknown_range(name)
        grey = (values * (255 / (2**bits - 1))).round().astype(np.uint8)
        image = Image.fromarray(np.where(values == transparent, np.uint8(255), grey))
    elif image.mode == "L" and isinstance(transparent, int):
        image.info["transparency"] = transparent * 255 // (2**bits - 1)
    elif image.mode == "RGB" and isinstance(transparent, tuple):
        # Pillow keeps the upper 8 of 16 bits.
        image.info["transparency"] = tuple(value >> (bits - 8) for value in transparent)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def _of_unknown_range(name: str) -> UnreadableImage:
    return UnreadableImage(
        name,
        "holds floating-point values, signed or 32-bit integers, whose range is unknown; save it with 8 or 16 bits a "
        "channel",
    )


def draw_svg(svg: str, size: int) -> Image.Image:
    """An SVG on white => RGB picture `size` pixels high and wide; needs the package resvg-py."""
    import resvg_py

    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, background="#ffffff")
    return Image.open(io.BytesIO(png)).convert("RGB")


def draw_transparent_svg(svg: str, size: int) -> Image.Image:
    """An SVG without a background => RGBA picture `size` pixels high and wide; needs the package resvg-py."""
    import resvg_py

    return Image.open(io.BytesIO(resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size))).convert("RGBA")


def to_pixels(images_uint8: "ImageArray | torch.Tensor") -> "torch.Tensor":
    """`uint8 [..., H, W, 3]` => `pixels` in [-1, 1], float32 `[..., 3, H, W]`, on the device of the input."""
    import torch

    return torch.as_tensor(images_uint8).movedim(-1, -3).float().div(127.5).sub(1.0)


def to_pil(pixels: "torch.Tensor") -> list[Image.Image]:
    """`pixels` in [-1, 1] `[B, 3, H, W]` => RGB pictures; values outside the range are clamped."""
    import torch

    images_uint8 = pixels.detach().float().add(1.0).mul(127.5).round().clamp(0, 255).to("cpu", torch.uint8)
    return [Image.fromarray(image) for image in images_uint8.movedim(1, -1).numpy()]


def grid(images: Sequence[Image.Image], labels: Sequence[str] | None, columns: int) -> Image.Image:
    """A contact sheet on white: `columns` pictures a line, each with its label wrapped underneath.

    Small pictures are enlarged by a whole factor without smoothing, so that every pixel stays visible.
    """
    import matplotlib

    factor = max(1, _CELL // max(image.width for image in images))
    enlarged = [
        image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST) for image in images
    ]
    cell_width = max(image.width for image in enlarged)
    cell_height = max(image.height for image in enlarged)

    # Pillow's built-in font knows Latin letters only; matplotlib brings DejaVu Sans.
    font = ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", _FONT_SIZE)
    line_length = max(1, int(cell_width / font.getlength("n")))
    wrapped = [textwrap.wrap(label, line_length) for label in labels or [""] * len(images)]
    line_height = _FONT_SIZE + 3

    lines = [range(start, min(start + columns, len(images))) for start in range(0, len(images), columns)]
    heights = [cell_height + line_height * max(len(wrapped[index]) for index in line) + _MARGIN for line in lines]
    sheet_width = min(columns, len(images)) * (cell_width + _MARGIN) + _MARGIN
    sheet = Image.new("RGB", (sheet_width, sum(heights) + _MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    top = _MARGIN
    for line, height in zip(lines, heights, strict=True):
        for column, index in enumerate(line):
            left = _MARGIN + column * (cell_width + _MARGIN)
            sheet.paste(enlarged[index], (left, top))
            for row, text in enumerate(wrapped[index]):
                draw.text((left, top + cell_height + 2 + row * line_height), text, fill="#333333", font=font)
        top += height
    return sheet
