"""The cache of latents and codes: its content, when it is built again, and its state after an interruption."""

import json
import logging
import math
import os
import pickle
import re
import time

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, VQModel
from PIL import Image
from safetensors.numpy import load_file

from transfusion_mot.codecs.autoencoder_kl import Autoencoder, set_normalisation
from transfusion_mot.codecs.image_codes import ImageCodes
from transfusion_mot.config import DataConfig, SourceConfig
from transfusion_mot.data.encoded_media import encoded_media
from transfusion_mot.data.images import UnreadableImage, to_pixels
from transfusion_mot.data.sources.open import open_source
from transfusion_mot.errors import UserError

NUM_IMAGES = 7
BLOCKS = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
SIZES = {"block_out_channels": (8, 8), "latent_channels": 4, "norm_num_groups": 4}


def build_autoencoder(seed=0):
    torch.manual_seed(seed)
    vae = AutoencoderKL(**BLOCKS, **SIZES)
    set_normalisation(vae, [0.1, -0.2, 0.0, 0.3], [0.5, 1.5, 1.0, 2.0])
    return Autoencoder(vae)


def build_code_codec(seed=0, num_codes=300):
    """Codes of two bytes, many of them in use."""
    torch.manual_seed(seed)
    model = VQModel(**BLOCKS, **SIZES, num_vq_embeddings=num_codes)
    torch.nn.init.normal_(model.quantize.embedding.weight, std=0.3)
    return ImageCodes(model)


def build_codec(kind, seed=0):
    return build_autoencoder(seed) if kind == "latents" else build_code_codec(seed)


@pytest.fixture(params=["latents", "codes"])
def kind(request):
    """What codecs give."""
    return request.param


def write_images(folder, sizes):
    folder.mkdir()
    generator = np.random.default_rng(0)
    entries = []
    for number, (height, width) in enumerate(sizes):
        pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        entries.append(json.dumps({"file_name": f"{number}.png", "text": f"picture {number}"}))
    (folder / "metadata.jsonl").write_text("\n".join(entries))


@pytest.fixture
def folder(tmp_path):
    write_images(tmp_path / "images", [(16, 16)] * NUM_IMAGES)
    return tmp_path / "images"


def config(folder, **changes):
    settings = {"image_size": 16, "held_out_fraction": 0.0, "num_workers": 0, "cache_dir": str(folder.parent / "cache")}
    return DataConfig(**(settings | changes))


def open_images(folder, data, split="train"):
    return open_source(SourceConfig(kind="imagefolder", path=str(folder)), data, split)


def encode(folder, codec, batch_size=4, **changes):
    """The cache of the folder, in shards of three images."""
    data = config(folder, **changes)
    return encoded_media(open_images(folder, data), codec, data, batch_size=batch_size, shard_media=3)


def cache_folders(folder):
    return sorted((folder.parent / "cache").glob("*-cache-*"))


def counting(codec):
    """The codec, which counts the images that it encodes."""
    codec.num_encoded = 0
    plain = codec.encode

    def encode(pixels):
        codec.num_encoded += len(pixels)
        return plain(pixels)

    codec.encode = encode
    return codec


def read(cache, index, flipped=False):
    """The stored data of an image, as a separate array."""
    stored = cache.posterior(index, flipped) if cache.kind == "latents" else cache.span(index, flipped)
    return np.stack(stored)


def assert_encoded(cache, index, pixels, codec, flipped=False):
    expected = codec.encode(pixels[None])
    stored = read(cache, index, flipped)
    if codec.kind == "latents":
        assert stored.dtype == np.float16
        np.testing.assert_allclose(stored, np.concatenate(expected), atol=2e-3, rtol=2e-3)
    else:
        codes = expected.flatten().tolist()
        assert len(set(codes)) > 5
        assert stored.tolist() == [codec.codebook_size, *codes, codec.codebook_size + 1]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_cache_holds_every_image(folder, num_workers, batch_size, kind):
    codec = build_codec(kind)
    cache = encode(folder, codec, batch_size, num_workers=num_workers)
    assert cache.readable.tolist() == [True] * NUM_IMAGES
    if kind == "latents":
        assert cache.latent_shapes == [(4, 8, 8)]
    # Mean and standard deviation in half precision, or two bytes for each code.
    assert cache.num_bytes == NUM_IMAGES * 8 * 8 * (2 * 4 * 2 if kind == "latents" else 2)
    assert cache.num_encoded == NUM_IMAGES
    for index in range(NUM_IMAGES):
        assert_encoded(cache, index, to_pixels(cache.media.image(index)), codec)
    # Two bytes for a code, twice two for each channel of a latent; the rest is keys, ends of codes and headers.
    assert cache.num_bytes == NUM_IMAGES * 8 * 8 * 2 * (8 if kind == "latents" else 1)
    files = [path.stat().st_size for path in cache.folder.glob("16x16/*")]
    assert len(files) == 3
    assert 0 < sum(files) - cache.num_bytes < len(files) * 500 + NUM_IMAGES * (36 if kind == "latents" else 44)


@pytest.mark.parametrize(("num_codes", "dtype"), [(256, np.uint8), (257, np.uint16), (65_536, np.uint16)])
def test_codes_take_the_smallest_integers_that_hold_them(folder, num_codes, dtype):
    codec = build_code_codec(num_codes=num_codes)
    # The greatest code is one that is in use.
    with torch.no_grad():
        used = codec.encode(to_pixels(np.stack([open_images(folder, config(folder)).image(0)]))).max()
        weight = codec.model.quantize.embedding.weight
        weight[-1], weight[used] = weight[used].clone(), weight[-1].clone()
    cache = encode(folder, codec)
    assert max(read(cache, 0)[1:-1]) == num_codes - 1
    assert_encoded(cache, 0, to_pixels(cache.media.image(0)), codec)
    stored = [load_file(path)["codes"] for path in cache.folder.glob("16x16/*")]
    assert {codes.dtype for codes in stored} == {np.dtype(dtype)}
    assert sum(codes.nbytes for codes in stored) == cache.num_bytes


def test_folder_and_shards_of_latents_are_those_of_earlier_versions(folder):
    """Recorded with version 0.1: what users have encoded is not encoded again."""
    codec = build_autoencoder()
    codec.fingerprint = "0123456789abcdef"
    cache = encode(folder, codec, random_flip=True)
    assert cache.folder.name == "latent-cache-498ca28f0d33ab2a"
    stored = load_file(min(cache.folder.glob("16x16/*"), key=lambda path: path.stat().st_size))
    assert {name: (array.dtype.name, array.shape) for name, array in stored.items()} == {
        "stamps": ("uint64", (1, 2)),
        "contents": ("uint64", (1, 2)),
        "rows": ("int32", (1,)),
        "latents": ("float16", (1, 2, 2, 4, 8, 8)),
    }


class ImagesOfBuckets:
    """Drawn images, number i of the size of bucket `buckets[i]`."""

    name, fingerprint, skipped, medium = "drawn", "0", {}, "image"

    def __init__(self, sizes, buckets):
        self.sizes, self.buckets = sizes, np.array(buckets, dtype=np.int16)
        self.stamps = np.stack([np.arange(len(buckets), dtype=np.uint64)] * 2, axis=1)

    def __len__(self):
        return len(self.buckets)

    def content(self, index):
        return str(index).encode()

    def where(self, index):
        return f"drawing {index}"

    def image(self, index, content=None):
        if index == 3:
            raise UnreadableImage(self.where(index), "is torn")
        size = self.sizes[self.buckets[index]]
        return np.random.default_rng(index).integers(0, 256, (*size, 3), dtype=np.uint8)


@pytest.mark.parametrize("buckets", [[0, 1, 0, 2, 0, 1, 1, 2], [2, 2, 2, 0, 1, 0, 1, 1, 2], [0] * 4, [2] * 3])
def test_every_bucket_and_the_mirror_images(tmp_path, buckets, kind):
    sizes = [[16, 16], [8, 16], [16, 8]]
    images = ImagesOfBuckets(sizes, buckets)
    data = config(tmp_path / "images", buckets=sizes, random_flip=True)
    codec = build_codec(kind)
    cache = encoded_media(images, codec, data, batch_size=2, shard_media=3)
    grids = [(8, 8), (4, 8), (8, 4)]
    if kind == "latents":
        assert cache.latent_shapes == [(4, *grid) for grid in grids]
    else:
        lengths = [len(cache.span(index)) - 2 for index in np.flatnonzero(cache.readable)]
        assert lengths == [math.prod(grids[buckets[index]]) for index in np.flatnonzero(cache.readable)]
    assert cache.readable.tolist() == [index != 3 for index in range(len(buckets))]
    for index in np.flatnonzero(cache.readable):
        pixels = to_pixels(images.image(index))
        assert_encoded(cache, index, pixels, codec)
        assert_encoded(cache, index, pixels.flip(-1), codec, flipped=True)
        assert not np.array_equal(read(cache, index), read(cache, index, flipped=True))


def test_second_call_encodes_nothing(folder, kind):
    codec = counting(build_codec(kind))
    first = encode(folder, codec)
    assert codec.num_encoded == NUM_IMAGES
    second = encode(folder, codec, batch_size=2)
    assert (codec.num_encoded, second.num_encoded) == (NUM_IMAGES, 0)
    np.testing.assert_array_equal(read(first, 5), read(second, 5))
    assert len(cache_folders(folder)) == 1


def test_what_does_not_fit_is_made_again_or_refused_by_name(folder, caplog, kind):
    caplog.set_level(logging.INFO)
    first, other = build_codec(kind), build_codec(kind, seed=1)
    original = encode(folder, first)

    def encoded_because():
        return next(message for message in caplog.messages if "reading 7 images" in message)

    name = "autoencoder" if kind == "latents" else "codec"
    hashes = rf"{name} \({first.fingerprint}, and now it is {other.fingerprint}\)"
    with pytest.raises(
        UserError, match=rf"{kind} of '{re.escape(str(folder))}' in .*were made with another {hashes}.*data.cache"
    ):
        encode(folder, other, latents="prepared")
    assert len(cache_folders(folder)) == 1
    caplog.clear()
    assert not np.allclose(read(encode(folder, other), 0), read(original, 0))
    assert re.search(hashes, encoded_because())

    for change, words in (
        ({"image_size": 8}, r"other image sizes \(\[\[16, 16\]\], and now it is \[\[8, 8\]\]\)"),
        ({"image_fit": "stretch"}, r"another image_fit \(crop, and now it is stretch\)"),
        ({"random_flip": True}, r"another random_flip \(False, and now it is True\)"),
    ):
        with pytest.raises(UserError, match=f"made with {words};"):
            encode(folder, first, latents="prepared", **change)
        caplog.clear()
        encode(folder, first, **change)
        assert re.search(words, encoded_because())

    Image.new("RGB", (18, 18), "red").save(folder / "2.png")
    with pytest.raises(UserError, match=rf"has {kind} of 6 of the 7 images of .*; encode"):
        encode(folder, first, latents="prepared")
    edited = encode(folder, first)
    assert edited.num_encoded == 1
    np.testing.assert_array_equal(read(edited, 3), read(original, 3))
    assert not np.allclose(read(edited, 2), read(original, 2))
    assert encode(folder, first, latents="prepared").num_encoded == 0


def test_the_other_side_of_a_source_is_no_other_way_of_encoding(folder, caplog, kind):
    caplog.set_level(logging.INFO)
    data = config(folder, held_out_fraction=0.4)
    for split in ("train", "held_out"):
        images = open_images(folder, data, split)
        caplog.clear()
        encoded_media(images, build_codec(kind), data, batch_size=4)
        reason = next(message for message in caplog.messages if "encoding new ones" in message)
    assert 0 < len(images) < 7
    assert f"has no {kind} of these {len(images)} images of '{folder}' yet" in reason
    assert "made with" not in reason


def test_prepared_without_anything_says_what_to_do(folder, kind):
    with pytest.raises(UserError, match=rf"has no {kind} of .*python -m transfusion_mot\.data\.cache"):
        encode(folder, build_codec(kind), latents="prepared")


def test_other_captions_need_no_encoding(folder, kind):
    encode(folder, build_codec(kind))
    metadata = folder / "metadata.jsonl"
    metadata.write_text(metadata.read_text().replace("picture", "drawing"))
    cache = encode(folder, build_codec(kind))
    assert cache.num_encoded == 0
    assert cache.media.captions(3) == ["drawing 3"]


def test_corrupt_images_are_counted_and_the_rest_stays_aligned(folder, caplog, kind):
    (folder / "0.png").write_bytes((folder / "0.png").read_bytes()[:60])
    (folder / "4.png").write_bytes(b"no picture")
    (folder / "5.png").unlink()
    codec = build_codec(kind)
    with caplog.at_level(logging.WARNING):
        open_images(folder, config(folder))
        caplog.clear()
        cache = encode(folder, codec, 2)
    captions = [cache.media.captions(index)[0] for index in range(len(cache.media))]
    assert captions == [f"picture {number}" for number in (0, 1, 2, 3, 4, 6)]
    assert cache.readable.tolist() == [False, True, True, True, False, True]
    assert cache.skipped == {"missing file": 1, "unreadable image": 2}
    for index in np.flatnonzero(cache.readable):
        assert_encoded(cache, index, to_pixels(cache.media.image(index)), codec)
    (message,) = (message for message in caplog.messages if "unreadable" in message)
    assert "skipped 2 and kept 4 images: 2 unreadable images" in message
    assert "0.png" in message
    assert "4.png" in message
    assert encode(folder, codec).skipped == cache.skipped
    assert sum("unreadable" in message for message in caplog.messages) == 1, "told once"


def test_no_usable_image_is_refused(folder, kind):
    for path in folder.glob("*.png"):
        path.write_bytes(b"no picture")
    for _ in range(2):
        with pytest.raises(UserError, match=r"none of the 7 images.*0\.png"):
            encode(folder, build_codec(kind))


class EventfulImages:
    """The given images, with something happening at image number 5."""

    medium = "image"

    def __init__(self, images, event):
        self.__dict__.update(vars(images))
        self.images, self.event = images, event
        self.where, self.image = images.where, images.image

    def __len__(self):
        return len(self.images)

    def content(self, index):
        if index == 5:
            self.event()
        return self.images.content(index)


def test_an_interrupted_run_goes_on_with_the_shards_that_are_whole(folder, kind):
    def interrupt():
        raise KeyboardInterrupt

    data, codec = config(folder), counting(build_codec(kind))
    images = open_images(folder, data)
    with pytest.raises(KeyboardInterrupt):
        encoded_media(EventfulImages(images, interrupt), codec, data, batch_size=2, shard_media=3)
    (unfinished,) = cache_folders(folder)
    shards = unfinished / "16x16"
    (first,) = shards.iterdir()
    with pytest.raises(UserError, match=f"has {kind} of 3 of the 7 images"):
        encode(folder, codec, latents="prepared")

    # Killed without a chance to clean up: what was half written is still there.
    half = shards / "0123.safetensors.partial-1234"
    half.write_bytes(b"half")
    codec.num_encoded = 0
    cache = encode(folder, codec)
    assert (codec.num_encoded, cache.num_encoded) == (4, 4)
    for index in range(NUM_IMAGES):
        assert_encoded(cache, index, to_pixels(images.image(index)), codec)
    assert len({*shards.iterdir()} - {first, half}) == 2
    assert len([*unfinished.iterdir()]) == 2


def test_what_a_dead_run_left_goes_but_not_what_a_living_one_writes(folder, kind):
    folder_of_shards = encode(folder, build_codec(kind)).folder / "16x16"
    next(folder_of_shards.iterdir()).unlink()
    old, new = (folder_of_shards / f"x.partial-{name}" for name in ("old", "new"))
    for path in (old, new):
        path.write_bytes(b"half")
    two_hours_ago = time.time() - 7200
    os.utime(old, (two_hours_ago, two_hours_ago))
    assert encode(folder, build_codec(kind)).num_encoded > 0
    assert not old.exists()
    assert new.exists()


def test_two_runs_at_once_end_with_the_same_files(folder, kind):
    data = config(folder)
    images = open_images(folder, data)
    overtaking = EventfulImages(images, lambda: encode(folder, build_codec(kind), batch_size=7))
    cache = encoded_media(overtaking, build_codec(kind), data, batch_size=2, shard_media=3)
    assert cache_folders(folder) == [cache.folder]
    assert len([*cache.folder.glob("16x16/*")]) == 3
    assert cache.readable.all()


def test_a_place_that_cannot_be_written_is_told(tmp_path, kind):
    data = config(tmp_path / "images")
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match=r"cannot make the folder .*set data\.cache_dir"):
        encoded_media(ImagesOfBuckets([[16, 16]], [0, 0]), build_codec(kind), data, batch_size=4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
def test_fast_encoding_on_a_gpu_is_close_to_exact(compiled):
    autoencoder = Autoencoder(build_autoencoder().vae.to("cuda"))
    pixels = torch.rand(5, 3, 32, 32, device="cuda") * 2 - 1
    for fast, exact in zip(autoencoder.encode_fast(pixels, 2, compiled), autoencoder.encode(pixels), strict=True):
        assert fast.dtype == torch.float32
        torch.testing.assert_close(fast, exact, atol=0.05, rtol=0.05)
        assert not torch.equal(fast, exact), "computed in bfloat16"


def test_a_worker_receives_the_path_and_not_the_content(folder, kind):
    cache = encode(folder, build_codec(kind))
    read(cache, 0)
    received = pickle.loads(pickle.dumps(cache))
    if kind == "latents":
        assert len(pickle.dumps(cache)) < cache.num_bytes / 2
    np.testing.assert_array_equal(read(received, 6), read(cache, 6))


def test_an_image_that_is_listed_several_times_is_encoded_once_in_each_size(tmp_path, kind):
    sizes = [[16, 16], [8, 16]]
    images = ImagesOfBuckets(sizes, [0, 1, 0])
    images.stamps[:] = 7
    cache = encoded_media(images, build_codec(kind), config(tmp_path / "images", buckets=sizes), batch_size=2)
    places = [cache._place(index) for index in range(3)]
    assert places[0] == places[2] != places[1]
    shards = list(cache.folder.rglob("*.safetensors"))
    assert [load_file(shard)["rows"].tolist() for shard in shards] == [[0], [0]]
