"""Pictures of every mode and condition => arrays of one size, and back."""

import io
import math
import struct
import zlib
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image, features

from transfusion_mot.data.images import ImageFit, displayed_size, grid, load_image, nearest_buckets, to_pil, to_pixels
from transfusion_mot.errors import UserError
from transfusion_mot.evaluation.images import load_rgb

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

RED, BLUE = (220, 20, 60), (30, 60, 200)


def halves(left=RED, right=BLUE, width=64, height=64) -> Image.Image:
    """A picture with two flat halves."""
    image = Image.new("RGB", (width, height), left)
    image.paste(right, (width // 2, 0, width, height))
    return image


def test_rgb_of_the_asked_size_is_unchanged(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(array).save(tmp_path / "a.png")
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(array)):
        loaded = load_image(source, 32)
        assert loaded.dtype == np.uint8
        np.testing.assert_array_equal(loaded, array)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "CMYK", "YCbCr", "HSV", "RGBX"])
def test_colour_modes_keep_their_colours(mode):
    loaded = load_image(halves().convert(mode), 16).astype(int)
    # Palette and colour space conversions round.
    assert np.abs(loaded[:, :7] - RED).max() <= 6
    assert np.abs(loaded[:, 9:] - BLUE).max() <= 6


@pytest.mark.parametrize(("name", "mode"), [("a.jpg", "CMYK"), ("a.tif", "CMYK"), ("a.gif", "P"), ("a.webp", "RGBA")])
def test_files_of_other_formats(tmp_path, name, mode):
    halves().convert(mode).save(tmp_path / name)
    loaded = load_image(tmp_path / name, 16).astype(int)
    assert np.abs(loaded[:, :6] - RED).max() <= 12


@pytest.mark.parametrize("mode", ["L", "LA", "1", "I", "I;16"])
def test_grey_modes(mode):
    image = Image.new("L", (8, 8), 0)
    image.paste(255, (4, 0, 8, 8))
    if mode.startswith("I"):
        image = Image.fromarray(np.asarray(image).astype(np.int32) * 257).convert(mode)
    else:
        image = image.convert(mode)
    expected = np.repeat(np.where(np.arange(8) < 4, 0, 255)[None, :, None], 3, axis=2).repeat(8, axis=0)
    np.testing.assert_array_equal(load_image(image, 8), expected)


def test_sixteen_bit_file_keeps_its_range(tmp_path):
    values = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(values).save(tmp_path / "deep.png")
    loaded = load_image(tmp_path / "deep.png", 8)
    assert np.abs(loaded[..., 0] - values / 257).max() <= 0.5
    np.testing.assert_array_equal(loaded[..., 0], loaded[..., 2])


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparency_is_laid_on_white(mode):
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (4, 0, 8, 8))
    laid = image.convert("RGB").convert(mode)
    laid.putalpha(image.getchannel("A"))  # Pillow 11.0 loses it in a conversion to PA.
    loaded = load_image(laid, 8)
    assert (loaded[:, :4] == 255).all()
    assert (loaded[:, 4:] == 0).all()


def test_half_transparent_colour_and_transparent_palette_entry(tmp_path):
    loaded = load_image(Image.new("RGBA", (4, 4), (255, 0, 0, 128)), 4)
    assert np.abs(loaded[0, 0].astype(int) - (255, 127, 127)).max() <= 1

    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([10, 200, 10, 0, 0, 0])
    palette.paste(1, (4, 0, 8, 8))
    palette.save(tmp_path / "p.png", transparency=1)
    loaded = load_image(tmp_path / "p.png", 8)
    assert tuple(loaded[0, 0]) == (10, 200, 10)
    assert tuple(loaded[0, 7]) == (255, 255, 255)


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees clockwise to view": left becomes top.
    halves().save(tmp_path / "turned.jpg", exif=exif, quality=100, subsampling=0)
    loaded = load_image(tmp_path / "turned.jpg", 16).astype(int)
    assert np.abs(loaded[:6] - RED).max() <= 6
    assert np.abs(loaded[10:] - BLUE).max() <= 6


def test_centre_square_is_taken(tmp_path):
    wide = Image.new("RGB", (300, 100), "green")
    wide.paste(halves(width=100, height=100), (100, 0))
    loaded = load_image(wide, 100)
    np.testing.assert_array_equal(loaded, np.asarray(halves(width=100, height=100)))
    np.testing.assert_array_equal(load_image(wide.transpose(Image.Transpose.ROTATE_90), 100), np.rot90(loaded))


def test_shrinking_is_antialiased_and_growing_works():
    checkerboard = (np.indices((512, 512)).sum(axis=0) % 2 * 255).astype(np.uint8)
    shrunk = load_image(Image.fromarray(checkerboard), 32).astype(int)
    assert np.abs(shrunk - 127.5).max() < 4
    assert load_image(Image.new("RGB", (3, 2), RED), 64).shape == (64, 64, 3)


def test_extreme_proportions_cost_no_memory():
    # Resizing the short side first would make a picture of 64 x 1,280,000 pixels.
    assert load_image(Image.new("L", (1, 20000), 7), 64).mean() == 7


def png_of(samples: list[int], bits: int, channels: int = 1, transparent: tuple[int, ...] | None = None) -> bytes:
    """A PNG of one row that Pillow cannot write: of 2, 4 or 16 bits, with a transparent colour (chunk tRNS)."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    packed = sum(sample << bits * place for place, sample in enumerate(reversed(samples)))
    row = packed.to_bytes(len(samples) * bits // 8)
    header = struct.pack(">IIBBBBB", len(samples) // channels, 1, bits, 0 if channels == 1 else 2, 0, 0, 0)
    content = chunk(b"IHDR", header)
    if transparent is not None:
        content += chunk(b"tRNS", struct.pack(f">{channels}H", *transparent))
    return b"\x89PNG\r\n\x1a\n" + content + chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")


def test_sixteen_bit_colour_is_brought_to_eight():
    values = np.linspace(0, 65535, 48).astype(int)
    loaded = load_image(png_of(values.tolist(), 16, 3), (1, 16))
    assert np.abs(loaded[0] - values.reshape(16, 3) / 257).max() < 1


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_a_transparent_grey_is_white_whatever_its_bits(bits):
    """The second of four greys; its neighbour, whose upper bits are the same, is not."""
    largest = 2**bits - 1
    samples = [0, 1, 2, largest]
    loaded = load_image(png_of(samples, bits, transparent=(1,)), (1, 4))
    expected = [255 if sample == 1 else round(sample * 255 / largest) for sample in samples]
    np.testing.assert_array_equal(loaded[0], np.repeat(np.array(expected)[:, None], 3, axis=1))


@pytest.mark.parametrize("bits", [8, 16])
def test_a_transparent_colour_is_white_whatever_its_bits(bits):
    factor = 256 if bits == 16 else 1
    colours = [(0, 0, 0), (10, 20, 30), (90, 80, 70), (255, 255, 255)]
    samples = [value * factor for colour in colours for value in colour]
    loaded = load_image(png_of(samples, bits, 3, tuple(samples[3:6])), (1, 4))
    np.testing.assert_array_equal(loaded[0], [colours[0], (255, 255, 255), *colours[2:]])


def tiff_of(content: bytes, width: int, bits: int, sample_format: int) -> bytes:
    """A TIFF of one row of grey samples: 1 unsigned, 2 signed, 3 floating point."""
    tags = {256: width, 257: 1, 258: bits, 259: 1, 262: 1, 273: 8, 277: 1, 278: 1, 279: len(content)}
    tags[339] = sample_format
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    start = 8 + len(content)
    return b"II*\0" + struct.pack("<I", start) + content + struct.pack("<H", len(tags)) + entries + bytes(4)


def test_greys_of_12_and_16_bits_in_a_tiff_keep_their_range():
    sixteen = np.array([0, 257, 32896, 65535], dtype="<u2")
    assert load_image(tiff_of(sixteen.tobytes(), 4, 16, 1), (1, 4))[0, :, 0].tolist() == [0, 1, 128, 255]
    twelve = bytes.fromhex("000fff800010")
    assert load_image(tiff_of(twelve, 4, 12, 1), (1, 4))[0, :, 0].tolist() == [0, 255, 128, 1]


@pytest.mark.parametrize(("dtype", "sample_format"), [("<i4", 2), ("<u4", 1), ("<i2", 2), ("<f4", 3)])
def test_values_of_an_unknown_range_are_refused_and_not_black(dtype, sample_format):
    values = np.array([0, 100, 255], dtype=dtype)
    content = tiff_of(values.tobytes(), 3, 8 * values.itemsize, sample_format)
    with pytest.raises(UserError, match=r"scan\.tif' holds .* whose range is unknown; save it with 8 or 16 bits"):
        load_image(content, (1, 3), name="scan.tif")
    for outside in (-1, 70000):
        with pytest.raises(UserError, match="range is unknown"):
            load_image(Image.fromarray(np.array([[0, outside]], dtype=np.int32)), 8)


@pytest.mark.parametrize(("height", "width"), [(40, 40), (20, 40), (60, 30)])
def test_fits_against_their_definitions(height, width):
    """A picture of 120 x 60 with a flat border of 10, brought to sizes of other proportions."""
    picture = Image.new("RGB", (120, 60), RED)
    picture.paste(BLUE, (10, 10, 110, 50))
    lanczos = Image.Resampling.LANCZOS
    stretched = load_image(picture, (height, width), "stretch")
    np.testing.assert_array_equal(stretched, np.asarray(picture.resize((width, height), lanczos)))

    # The largest centred piece in the wanted proportions.
    scale = min(120 / width, 60 / height)
    box = (60 - scale * width / 2, 30 - scale * height / 2, 60 + scale * width / 2, 30 + scale * height / 2)
    cropped = load_image(picture, (height, width), "crop")
    np.testing.assert_allclose(cropped, np.asarray(picture.resize((width, height), lanczos, box=box)), atol=1)

    # The whole picture in the middle of white.
    scale = min(width / 120, height / 60)
    inner = (round(120 * scale), round(60 * scale))
    expected = Image.new("RGB", (width, height), "white")
    expected.paste(picture.resize(inner, lanczos), ((width - inner[0]) // 2, (height - inner[1]) // 2))
    padded = load_image(picture, (height, width), "pad")
    np.testing.assert_array_equal(padded, np.asarray(expected))
    assert {array.shape for array in (stretched, cropped, padded)} == {(height, width, 3)}


@pytest.mark.parametrize(("width", "height"), [(1, 2000), (2000, 1), (40, 2000), (1, 1)])
def test_the_longest_pictures_are_padded_to_at_least_a_line(width, height):
    padded = load_image(Image.new("L", (width, height), 7), (32, 64), "pad")
    scale = min(64 / width, 32 / height)
    inner = max(1, round(height * scale)), max(1, round(width * scale))
    assert padded.shape == (32, 64, 3)
    assert (padded == 7).sum() == 3 * inner[0] * inner[1]
    assert (padded == 255).sum() == padded.size - 3 * inner[0] * inner[1]


def test_the_content_of_a_file_is_as_good_as_its_path(tmp_path):
    halves().save(tmp_path / "a.jpg")
    content = (tmp_path / "a.jpg").read_bytes()
    np.testing.assert_array_equal(load_image(content, 16), load_image(tmp_path / "a.jpg", 16))
    with pytest.raises(UserError, match=r"shard\.tar:a\.jpg"):
        load_image(content[:300], 16, name="shard.tar:a.jpg")


def test_large_jpegs_are_decoded_small_without_a_visible_difference():
    """Against the whole picture, decoded at its full size; and a picture in memory is not changed."""
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize((1600, 1200), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=95)
    whole = Image.open(io.BytesIO(buffer.getvalue()))
    expected = load_image(whole, 64).astype(int)
    assert whole.size == (1600, 1200)
    difference = np.abs(load_image(buffer.getvalue(), 64) - expected)
    assert 0 < difference.max() <= 6


def test_displayed_size_is_that_of_the_decoded_picture(tmp_path):
    exif = Image.Exif()
    for orientation in range(1, 9):
        exif[0x0112] = orientation
        for extension in ("jpg", "png", "webp"):
            path = tmp_path / f"{orientation}.{extension}"
            Image.new("RGB", (30, 20)).save(path, exif=exif)
            assert displayed_size(path) == ((30, 20) if orientation >= 5 else (20, 30)), path
    assert displayed_size(Image.new("L", (7, 9))) == (9, 7)
    (tmp_path / "cut.png").write_bytes((tmp_path / "1.png").read_bytes()[:20])
    with pytest.raises(UserError, match=r"cut\.png"):
        displayed_size(tmp_path / "cut.png")


@pytest.mark.parametrize("orientation", [None, 1, 6])
@pytest.mark.parametrize(("mode", "lossless"), [("RGB", False), ("RGBA", False), ("RGB", True), ("RGBA", True)])
def test_sizes_of_webp_files_against_pillow(orientation, mode, lossless):
    exif = Image.Exif()
    if orientation is not None:
        exif[0x010E], exif[0x0112] = "odd", orientation
    for size in ((1, 1), (33, 17), (300, 301)):
        buffer = io.BytesIO()
        Image.new(mode, size, (9, 200, 3, 4)[: len(mode)]).save(buffer, "WEBP", lossless=lossless, exif=exif)
        assert displayed_size(io.BufferedReader(buffer)) == displayed_size(buffer.getvalue())


@given(
    sizes=st.lists(st.tuples(st.integers(1, 5000), st.integers(1, 5000)), min_size=1, max_size=20),
    buckets=st.lists(st.tuples(st.integers(8, 512), st.integers(8, 512)), min_size=1, max_size=8),
)
def test_nearest_bucket_against_every_bucket(sizes, buckets):
    found = nearest_buckets(np.array(sizes), buckets)
    for (height, width), index in zip(sizes, found, strict=True):
        distances = [abs(math.log(height / width * w / h)) for h, w in buckets]
        assert distances[index] <= min(distances) + 1e-9


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "I;16"])
@pytest.mark.parametrize("size", [(0, 5), (5, 0), (0, 0)])
def test_pictures_without_pixels_are_refused(mode, size):
    reads = [partial(load_image, image_size=8, fit=fit) for fit in get_args(ImageFit)]
    for read in (*reads, displayed_size, load_rgb, partial(load_rgb, image_size=8)):
        with pytest.raises(UserError, match=f"image 'the given picture' has {size[0]} x {size[1]} pixels; it needs at"):
            read(Image.new(mode, size))


def test_a_webp_file_without_pixels_is_refused():
    buffer = io.BytesIO()
    Image.new("RGB", (4, 5)).save(buffer, "WEBP")
    content = bytearray(buffer.getvalue())
    assert content[12:16] == b"VP8 "
    # The width.
    content[26:28] = bytes(2)
    with pytest.raises(UserError, match="cannot be read"):
        displayed_size(io.BufferedReader(io.BytesIO(content)))


def test_bad_files_are_refused_by_name(tmp_path, monkeypatch):
    halves(width=200, height=200).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:150])
    halves().save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:400])
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "empty.png").touch()
    Image.new("F", (4, 4), 0.5).save(tmp_path / "float.tif")
    for name in ("cut.png", "cut.jpg", "text.png", "empty.png", "float.tif", "missing.png"):
        with pytest.raises(UserError, match=name):
            load_image(tmp_path / name, 16)
    with pytest.raises(UserError, match=tmp_path.name):
        load_image(tmp_path, 16)

    # Between the limit and twice the limit Pillow only warns, beyond it raises.
    for limit in (30_000, 10_000):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(UserError, match=r"whole\.png.*(limit|decompression bomb)"):
            load_image(tmp_path / "whole.png", 16)


@pytest.mark.parametrize("mode", ["JPEG RGB", "JPEG CMYK", "PNG RGBA", "PNG P", "WEBP RGB", "AVIF RGB"])
@given(data=st.data())
@settings(max_examples=30)
def test_a_damaged_file_is_read_or_refused_and_nothing_else(mode, data):
    format_name, mode = mode.split()
    if format_name == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "described"
    buffer = io.BytesIO()
    halves(width=24, height=20).convert(mode).save(buffer, format_name, exif=exif)
    content = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content
    with suppress(UserError):
        assert load_image(bytes(content), 16).shape == (16, 16, 3)
    for source in (bytes(content), io.BufferedReader(io.BytesIO(content))):
        with suppress(UserError):
            assert min(displayed_size(source)) >= 1


def test_pixels_and_back_is_the_identity():
    values = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    pixels = to_pixels(values)
    assert pixels.shape == (1, 3, 16, 16)
    assert pixels.dtype == torch.float32
    assert (pixels.min(), pixels.max()) == (-1.0, 1.0)
    np.testing.assert_array_equal(np.asarray(to_pil(pixels)[0]), values[0])
    assert to_pixels(torch.as_tensor(values[0])).equal(pixels[0])
    # What lies outside is clamped, not wrapped.
    assert np.asarray(to_pil(torch.full((1, 3, 2, 2), 1.3))[0]).min() == 255


def test_grid_shows_every_picture_and_label():
    images = [Image.new("RGB", (64, 64), RED), Image.new("RGB", (64, 64), BLUE), Image.new("RGB", (64, 64), "green")]
    sheet = np.asarray(grid(images, ["one", "a label that is much too long for one line", "three"], columns=2))
    for colour in (RED, BLUE, (0, 128, 0)):
        assert (sheet == colour).all(axis=2).sum() == 128 * 128
    assert (sheet[0] == 255).all()
    bare = np.asarray(grid(images, None, columns=3))
    assert bare.shape[0] < bare.shape[1]
    painted = (sheet != 255).any(axis=2).sum() - 3 * 128 * 128
    assert painted > 200, "labels are drawn"


def test_grid_keeps_large_pictures(tmp_path: Path):
    sheet = grid([halves(width=300, height=300)], None, columns=4)
    assert 300 < sheet.width < 340
