"""The latent cache: what it holds, when it is built again, and what an interruption leaves."""

import json
import logging
import os
import pickle
import re
import time

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from transfusion_mot.codecs.autoencoder_kl import Autoencoder, set_normalisation
from transfusion_mot.config import DataConfig, SourceConfig
from transfusion_mot.data.images import UnreadableImage, to_pixels
from transfusion_mot.data.latents import cached_latents
from transfusion_mot.data.sources.open import open_source
from transfusion_mot.errors import UserError

NUM_IMAGES = 7


def build_autoencoder(seed=0):
    torch.manual_seed(seed)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=4,
        norm_num_groups=4,
    )
    set_normalisation(vae, [0.1, -0.2, 0.0, 0.3], [0.5, 1.5, 1.0, 2.0])
    return Autoencoder(vae)


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


def encode(folder, autoencoder=None, batch_size=4, **changes):
    """The cache of the folder, in shards of three images."""
    data = config(folder, **changes)
    return cached_latents(open_images(folder, data), autoencoder or build_autoencoder(), data, batch_size, None, 3)


def cache_folders(folder):
    return sorted((folder.parent / "cache").glob("latent-cache-*"))


class CountingAutoencoder(Autoencoder):
    """Counts the images it encodes."""

    num_encoded = 0

    def encode(self, pixels):
        self.num_encoded += len(pixels)
        return super().encode(pixels)


def assert_posterior(cache, index, pixels, autoencoder, flipped=False):
    expected = autoencoder.encode(pixels[None])
    for part, whole in zip(cache.posterior(index, flipped), expected, strict=True):
        assert part.dtype == np.float16
        np.testing.assert_allclose(part, whole[0], atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_cache_holds_the_posterior_of_every_image(folder, num_workers, batch_size):
    autoencoder = build_autoencoder()
    cache = encode(folder, autoencoder, batch_size, num_workers=num_workers)
    assert cache.readable.tolist() == [True] * NUM_IMAGES
    assert cache.latent_shapes == [(4, 8, 8)]
    assert cache.num_encoded == NUM_IMAGES
    for index in range(NUM_IMAGES):
        assert_posterior(cache, index, to_pixels(cache.images.image(index)), autoencoder)
    # Two numbers of two bytes for each latent; the rest is keys and headers.
    assert cache.num_bytes == NUM_IMAGES * 2 * 2 * 4 * 8 * 8
    files = [path.stat().st_size for path in cache.folder.glob("16x16/*")]
    assert len(files) == 3
    assert 0 < sum(files) - cache.num_bytes < len(files) * 500 + NUM_IMAGES * 36


class ImagesOfBuckets:
    """Drawn images, number i of the size of bucket `buckets[i]`."""

    name, fingerprint, skipped = "drawn", "0", {}

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
def test_every_bucket_and_the_mirror_images(tmp_path, buckets):
    sizes = [[16, 16], [8, 16], [16, 8]]
    images = ImagesOfBuckets(sizes, buckets)
    data = config(tmp_path / "images", buckets=sizes, random_flip=True)
    autoencoder = build_autoencoder()
    cache = cached_latents(images, autoencoder, data, 2, None, 3)
    assert cache.latent_shapes == [(4, 8, 8), (4, 4, 8), (4, 8, 4)]
    assert cache.readable.tolist() == [index != 3 for index in range(len(buckets))]
    for index in np.flatnonzero(cache.readable):
        pixels = to_pixels(images.image(index))
        assert_posterior(cache, index, pixels, autoencoder)
        assert_posterior(cache, index, pixels.flip(-1), autoencoder, flipped=True)
        assert not np.array_equal(cache.posterior(index)[0], cache.posterior(index, flipped=True)[0])


def test_second_call_encodes_nothing(folder):
    autoencoder = CountingAutoencoder(build_autoencoder().vae)
    first = encode(folder, autoencoder)
    assert autoencoder.num_encoded == NUM_IMAGES
    second = encode(folder, autoencoder, batch_size=2)
    assert (autoencoder.num_encoded, second.num_encoded) == (NUM_IMAGES, 0)
    np.testing.assert_array_equal(first.posterior(5), second.posterior(5))
    assert len(cache_folders(folder)) == 1


def test_latents_that_do_not_fit_are_made_again_or_refused_by_name(folder, caplog):
    caplog.set_level(logging.INFO)
    first, other = build_autoencoder(), build_autoencoder(seed=1)
    original = encode(folder, first)

    def encoded_because():
        return next(message for message in caplog.messages if "reading 7 images" in message)

    hashes = rf"autoencoder \({first.fingerprint}, and now it is {other.fingerprint}\)"
    with pytest.raises(
        UserError, match=rf"'{re.escape(str(folder))}' in .*were made with another {hashes}.*data.cache"
    ):
        encode(folder, other, latents="prepared")
    assert len(cache_folders(folder)) == 1
    caplog.clear()
    assert not np.allclose(encode(folder, other).posterior(0)[0], original.posterior(0)[0])
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
    with pytest.raises(UserError, match=r"has latents of 6 of the 7 images of .*; encode"):
        encode(folder, first, latents="prepared")
    edited = encode(folder, first)
    assert edited.num_encoded == 1
    np.testing.assert_array_equal(edited.posterior(3), original.posterior(3))
    assert not np.allclose(edited.posterior(2)[0], original.posterior(2)[0])
    assert encode(folder, first, latents="prepared").num_encoded == 0


def test_the_other_side_of_a_source_is_no_other_way_of_making_latents(folder, caplog):
    caplog.set_level(logging.INFO)
    data = config(folder, held_out_fraction=0.4)
    for split in ("train", "held_out"):
        images = open_images(folder, data, split)
        caplog.clear()
        cached_latents(images, build_autoencoder(), data, 4)
        reason = next(message for message in caplog.messages if "encoding what is new" in message)
    assert 0 < len(images) < 7
    assert f"has no latents of these {len(images)} images of '{folder}' yet" in reason
    assert "made with" not in reason


def test_prepared_without_any_latents_says_what_to_do(folder):
    with pytest.raises(UserError, match=r"has no latents of .*python -m transfusion_mot\.data\.cache"):
        encode(folder, latents="prepared")


def test_other_captions_need_no_encoding(folder):
    encode(folder)
    metadata = folder / "metadata.jsonl"
    metadata.write_text(metadata.read_text().replace("picture", "drawing"))
    cache = encode(folder)
    assert cache.num_encoded == 0
    assert cache.images.captions(3) == ["drawing 3"]


def test_corrupt_images_are_counted_and_the_rest_stays_aligned(folder, caplog):
    (folder / "0.png").write_bytes((folder / "0.png").read_bytes()[:60])
    (folder / "4.png").write_bytes(b"no picture")
    (folder / "5.png").unlink()
    autoencoder = build_autoencoder()
    with caplog.at_level(logging.WARNING):
        open_images(folder, config(folder))
        caplog.clear()
        cache = encode(folder, autoencoder, 2)
    captions = [cache.images.captions(index)[0] for index in range(len(cache.images))]
    assert captions == [f"picture {number}" for number in (0, 1, 2, 3, 4, 6)]
    assert cache.readable.tolist() == [False, True, True, True, False, True]
    assert cache.skipped == {"missing file": 1, "unreadable image": 2}
    for index in np.flatnonzero(cache.readable):
        assert_posterior(cache, index, to_pixels(cache.images.image(index)), autoencoder)
    (message,) = (message for message in caplog.messages if "unreadable" in message)
    assert "skipped 2 and kept 4 images: 2 unreadable images" in message
    assert "0.png" in message
    assert "4.png" in message
    assert encode(folder, autoencoder).skipped == cache.skipped
    assert sum("unreadable" in message for message in caplog.messages) == 1, "told once"


def test_no_usable_image_is_refused(folder):
    for path in folder.glob("*.png"):
        path.write_bytes(b"no picture")
    for _ in range(2):
        with pytest.raises(UserError, match=r"none of the 7 images.*0\.png"):
            encode(folder)


class EventfulImages:
    """The given images, with something happening at image number 5."""

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


def test_an_interrupted_run_goes_on_with_the_shards_that_are_whole(folder):
    def interrupt():
        raise KeyboardInterrupt

    data, autoencoder = config(folder), CountingAutoencoder(build_autoencoder().vae)
    images = open_images(folder, data)
    with pytest.raises(KeyboardInterrupt):
        cached_latents(EventfulImages(images, interrupt), autoencoder, data, 2, None, 3)
    (unfinished,) = cache_folders(folder)
    shards = unfinished / "16x16"
    (first,) = shards.iterdir()
    with pytest.raises(UserError, match="has latents of 3 of the 7 images"):
        encode(folder, autoencoder, latents="prepared")

    # Killed without a chance to clean up: what was half written is still there.
    half = shards / "0123.safetensors.partial-1234"
    half.write_bytes(b"half")
    autoencoder.num_encoded = 0
    cache = encode(folder, autoencoder)
    assert (autoencoder.num_encoded, cache.num_encoded) == (4, 4)
    for index in range(NUM_IMAGES):
        assert_posterior(cache, index, to_pixels(images.image(index)), autoencoder)
    assert len({*shards.iterdir()} - {first, half}) == 2
    assert len([*unfinished.iterdir()]) == 2


def test_what_a_dead_run_left_goes_but_not_what_a_living_one_writes(folder):
    folder_of_shards = encode(folder).folder / "16x16"
    next(folder_of_shards.iterdir()).unlink()
    old, new = (folder_of_shards / f"x.partial-{name}" for name in ("old", "new"))
    for path in (old, new):
        path.write_bytes(b"half")
    two_hours_ago = time.time() - 7200
    os.utime(old, (two_hours_ago, two_hours_ago))
    assert encode(folder).num_encoded > 0
    assert not old.exists()
    assert new.exists()


def test_two_runs_at_once_end_with_the_same_files(folder):
    data = config(folder)
    images = open_images(folder, data)
    overtaking = EventfulImages(images, lambda: encode(folder, batch_size=7))
    cache = cached_latents(overtaking, build_autoencoder(), data, 2, None, 3)
    assert cache_folders(folder) == [cache.folder]
    assert len([*cache.folder.glob("16x16/*")]) == 3
    assert cache.readable.all()


def test_a_place_that_cannot_be_written_is_told(tmp_path):
    data = config(tmp_path / "images")
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match=r"cannot make the folder .*set data\.cache_dir"):
        cached_latents(ImagesOfBuckets([[16, 16]], [0, 0]), build_autoencoder(), data, 4)


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


def test_a_worker_receives_the_path_and_not_the_latents(folder):
    cache = encode(folder)
    cache.posterior(0)
    received = pickle.loads(pickle.dumps(cache))
    assert len(pickle.dumps(cache)) < cache.num_bytes / 2
    np.testing.assert_array_equal(received.posterior(6), cache.posterior(6))
