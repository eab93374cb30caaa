"""The latent cache: what it holds, when it is built again, and what an interruption leaves."""

import json
import logging
import pickle

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from transfusion_mot.autoencoder import Autoencoder, set_normalisation
from transfusion_mot.config import DataConfig, SourceConfig
from transfusion_mot.data.images import to_pixels
from transfusion_mot.data.latents import cached_latents
from transfusion_mot.data.sources import load_captioned_images
from transfusion_mot.errors import UserError


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


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    generator = np.random.default_rng(0)
    entries = []
    for number in range(7):
        Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        entries.append(json.dumps({"file_name": f"{number}.png", "text": f"picture {number}"}))
    (folder / "metadata.jsonl").write_text("\n".join(entries))
    return open_images(folder)


def open_images(folder, **data):
    data = DataConfig(**({"image_size": 16, "held_out_fraction": 0.0} | data))
    return load_captioned_images(SourceConfig(kind="imagefolder", path=str(folder)), data, "train")


def latent_folders(cache_dir):
    return sorted(path.name for path in cache_dir.iterdir())


class CountingAutoencoder(Autoencoder):
    """Counts the images it encodes."""

    num_encoded = 0

    def encode(self, pixels):
        self.num_encoded += len(pixels)
        return super().encode(pixels)


def test_cache_holds_the_posterior_of_every_image(images, tmp_path):
    autoencoder = build_autoencoder()
    cache = cached_latents(images, autoencoder, str(tmp_path / "cache"), batch_size=3)
    assert len(cache) == 7
    assert cache.captions == images.captions
    assert isinstance(cache.mean, np.memmap)
    assert (cache.mean.dtype, cache.mean.shape, cache.std.shape) == (np.float16, (7, 4, 8, 8), (7, 4, 8, 8))
    for index in range(7):
        mean, std = autoencoder.encode(to_pixels(images.image(index))[None])
        np.testing.assert_allclose(cache.mean[index], mean[0], atol=2e-3, rtol=2e-3)
        np.testing.assert_allclose(cache.std[index], std[0], atol=2e-3, rtol=2e-3)


def test_second_call_encodes_nothing(images, tmp_path):
    autoencoder = CountingAutoencoder(build_autoencoder().vae)
    first = cached_latents(images, autoencoder, str(tmp_path / "cache"), batch_size=4)
    assert autoencoder.num_encoded == 7
    second = cached_latents(images, autoencoder, str(tmp_path / "cache"), batch_size=2)
    assert autoencoder.num_encoded == 7
    np.testing.assert_array_equal(first.mean, second.mean)
    assert len(latent_folders(tmp_path / "cache")) == 1


def test_another_autoencoder_or_another_image_is_encoded_again(images, tmp_path):
    cache_dir = tmp_path / "cache"
    first = cached_latents(images, build_autoencoder(), str(cache_dir), batch_size=4)
    other_weights = cached_latents(images, build_autoencoder(seed=1), str(cache_dir), batch_size=4)
    assert not np.allclose(first.mean, other_weights.mean)

    other_normalisation = build_autoencoder().vae
    set_normalisation(other_normalisation, [0.0] * 4, [1.0] * 4)
    cached_latents(images, Autoencoder(other_normalisation), str(cache_dir), batch_size=4)
    assert len(latent_folders(cache_dir)) == 3

    Image.new("RGB", (18, 18), "red").save(images.paths[2])
    folder = tmp_path / "images"
    edited = cached_latents(open_images(folder), build_autoencoder(), str(cache_dir), batch_size=4)
    np.testing.assert_array_equal(edited.mean[[0, 1, 3]], first.mean[[0, 1, 3]])
    assert not np.allclose(edited.mean[2], first.mean[2])
    smaller = cached_latents(open_images(folder, image_size=8), build_autoencoder(), str(cache_dir), batch_size=4)
    assert smaller.mean.shape == (7, 4, 4, 4)
    assert len(latent_folders(cache_dir)) == 5


def test_other_captions_need_no_encoding(images, tmp_path):
    autoencoder = CountingAutoencoder(build_autoencoder().vae)
    cached_latents(images, autoencoder, str(tmp_path / "cache"), batch_size=4)
    metadata = tmp_path / "images" / "metadata.jsonl"
    metadata.write_text(metadata.read_text().replace("picture", "drawing"))
    cache = cached_latents(open_images(tmp_path / "images"), autoencoder, str(tmp_path / "cache"), batch_size=4)
    assert autoencoder.num_encoded == 7
    assert cache.captions[3] == "drawing 3"


def test_corrupt_images_are_counted_and_the_rest_stays_aligned(images, tmp_path, caplog):
    (tmp_path / "images" / "0.png").write_bytes(b"")
    (tmp_path / "images" / "4.png").write_bytes(b"no picture")
    (tmp_path / "images" / "5.png").unlink()
    images = open_images(tmp_path / "images")
    autoencoder = build_autoencoder()
    with caplog.at_level(logging.WARNING):
        caplog.clear()
        cache = cached_latents(images, autoencoder, str(tmp_path / "cache"), batch_size=2)
    assert cache.captions == [f"picture {number}" for number in (1, 2, 3, 6)]
    assert cache.skipped == {"missing file": 1, "unreadable image": 2}
    assert len(cache.mean) == 4
    for index, caption in enumerate(cache.captions):
        mean, _ = autoencoder.encode(to_pixels(images.image(images.captions.index(caption)))[None])
        np.testing.assert_allclose(cache.mean[index], mean[0], atol=2e-3, rtol=2e-3)
    (message,) = caplog.messages
    assert "skipped 2 of 6" in message
    assert "0.png" in message
    assert "4.png" in message
    again = cached_latents(images, autoencoder, str(tmp_path / "cache"), batch_size=1)
    assert again.skipped == cache.skipped
    assert len(caplog.messages) == 1, "told once"


def test_no_usable_image_is_refused(images, tmp_path):
    for path in images.paths:
        open(path, "wb").close()
    with pytest.raises(UserError, match=r"none of the 7 images.*7 unreadable image.*0\.png"):
        cached_latents(images, build_autoencoder(), str(tmp_path / "cache"), batch_size=4)
    assert latent_folders(tmp_path / "cache") == []


class InterruptedImages:
    """The given images, with something happening at image number 5."""

    def __init__(self, images, event):
        self.__dict__.update(vars(images))
        self.images, self.event = images, event

    def __len__(self):
        return len(self.images)

    def image(self, index):
        if index == 5:
            self.event()
        return self.images.image(index)


def test_an_interrupted_run_leaves_nothing_that_is_taken_for_whole(images, tmp_path):
    def interrupt():
        raise KeyboardInterrupt

    cache_dir = tmp_path / "cache"
    with pytest.raises(KeyboardInterrupt):
        cached_latents(InterruptedImages(images, interrupt), build_autoencoder(), str(cache_dir), batch_size=2)
    assert latent_folders(cache_dir) == []

    # Killed without a chance to clean up: the unfinished folder is still there.
    whole = cached_latents(images, build_autoencoder(), str(tmp_path / "other"), batch_size=2)
    unfinished = cache_dir / f"{whole.folder.name}.partial-1234"
    unfinished.mkdir()
    (unfinished / "mean.npy").write_bytes(b"half")
    cache = cached_latents(images, build_autoencoder(), str(cache_dir), batch_size=2)
    np.testing.assert_array_equal(cache.mean, whole.mean)


def test_two_processes_at_once_end_with_the_same_files(images, tmp_path):
    cache_dir = tmp_path / "cache"

    def be_overtaken():
        cached_latents(images, build_autoencoder(), str(cache_dir), batch_size=7)

    cache = cached_latents(InterruptedImages(images, be_overtaken), build_autoencoder(), str(cache_dir), batch_size=2)
    assert latent_folders(cache_dir) == [cache.folder.name]
    assert len(cache) == 7


def test_a_worker_receives_the_path_and_not_the_latents(images, tmp_path):
    cache = cached_latents(images, build_autoencoder(), str(tmp_path / "cache"), batch_size=4)
    pickled = pickle.dumps(cache)
    assert len(pickled) < cache.mean.nbytes
    received = pickle.loads(pickled)
    np.testing.assert_array_equal(received.std, cache.std)
    assert received.captions == cache.captions
