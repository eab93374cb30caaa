"""Training straight from pixels: the same batch as with a cache, and images that cannot be read."""

import errno
import io
import logging
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CHANNELS
from PIL import Image
from source_files import SIZE, picture, shard, write_tar

from transfusion_mot.codecs.autoencoder_kl import Autoencoder
from transfusion_mot.config import AutoencoderConfig, DataConfig, SourceConfig
from transfusion_mot.data.loader import LaneLoader
from transfusion_mot.data.mixture import Sources, counter, open_documents, with_latents
from transfusion_mot.data.online import OnlineEncoder
from transfusion_mot.data.packing import Packer
from transfusion_mot.data.sources import reading
from transfusion_mot.errors import UserError

CPU = torch.device("cpu")


def data_of(folder: Path, cache: Path, **changes) -> DataConfig:
    settings = {
        "sources": [SourceConfig("webdataset", str(folder))],
        "image_size": SIZE,
        "held_out_fraction": 0.0,
        "cache_dir": str(cache),
        "text_slots": 40,
        "images_per_row": 3,
        "num_workers": 0,
    }
    return DataConfig(**(settings | changes))


def batches(data: DataConfig, autoencoder: Autoencoder, tokenizer, batch_size: int = 64):
    sources = with_latents(open_documents(data, "train"), data, autoencoder, AutoencoderConfig(), all_documents=True)
    packer = Packer(sources, tokenizer, data, "3d", 2, 4, 0, lambda uniform: uniform)
    encoder = OnlineEncoder(autoencoder, batch_size)
    return [batch for batch, _ in LaneLoader(packer, 0, 1, data.num_workers, None, 0, 4, CPU, encoder)]


@pytest.mark.parametrize(
    ("flip", "workers", "image_context"), [(False, 0, "noised"), (True, 2, "noised"), (False, 0, "clean")]
)
def test_batches_from_pixels_are_those_from_a_cache(
    byte_tokenizer, random_vae: Path, tmp_path: Path, flip: bool, workers: int, image_context: str
) -> None:
    members = shard(range(0, 200, 20), "png")
    gradient = np.zeros((20, 24, 3), dtype=np.uint8) + np.arange(0, 240, 10, dtype=np.uint8)[None, :, None]
    for name in [name for name in members if name.endswith(".png")][::2]:
        members[name] = encoded(gradient)
    members["000060.png"] = picture(60)[:50]
    write_tar(tmp_path / "images.tar", members)
    autoencoder = Autoencoder.load(str(random_vae), CPU)
    changes = {"random_flip": flip, "num_workers": workers, "image_context": image_context}
    cached = batches(data_of(tmp_path / "images.tar", tmp_path / "cache", **changes), autoencoder, byte_tokenizer)
    online = data_of(tmp_path / "images.tar", tmp_path / "cache", latents="online", **changes)
    from_pixels = batches(online, autoencoder, byte_tokenizer, batch_size=5)
    for one, two in zip(cached, from_pixels, strict=True):
        for name, value in one.tensors().items():
            if name == "latents":
                torch.testing.assert_close(value, two.latents, rtol=2e-3, atol=2e-3)
            else:
                assert torch.equal(value, getattr(two, name)), name
    assert len({tuple(value.flatten().tolist()) for value in cached[0].latents[cached[0].image_mask]}) > 3


def encoded(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def test_images_that_cannot_be_read_are_skipped_counted_and_named(byte_tokenizer, tmp_path: Path, caplog) -> None:
    members = shard(range(12))
    members["000003.jpg"] = picture(3, "jpg")[:200]
    members["000007.jpg"] = b"no image at all"
    write_tar(tmp_path / "images.tar", members)
    data = data_of(tmp_path / "images.tar", tmp_path / "cache", latents="online", lookahead=1)
    sources = Sources(open_documents(data, "train"), [(CHANNELS, 4, 4)])

    def stream() -> tuple[list[int], Counter]:
        packer = Packer(sources, byte_tokenizer, data, "1d", 2, 1, 0, lambda uniform: uniform)
        state, seen, totals = packer.initial_state()[None], [], Counter()
        for step in range(8):
            rows, state, counts = packer.rows([0], step, state)
            seen += rows.images_uint8[rows.batch.image_mask][:, 0, 0, 0].tolist()
            totals.update(counts)
        return seen, totals

    with caplog.at_level(logging.WARNING):
        seen, counts = stream()
    assert set(seen) == set(range(12)) - {3, 7}
    assert len(caplog.messages) == 2, "each once, though they come in every epoch"
    for name in ("images.tar:000003.jpg", "images.tar:000007.jpg"):
        assert sum(name in message for message in caplog.messages) == 1
    assert stream() == (seen, counts), "the same rows again"
    name = sources.names[0]
    taken, unreadable, dropped = (
        counts[counter(name, what)] for what in ("taken", "unreadable_images", "dropped_documents")
    )
    assert unreadable == dropped == pytest.approx(taken / 6, abs=2)
    assert counts[counter(name, "images")] == len(seen)


@pytest.mark.parametrize("workers", [0, 2])
def test_source_of_which_nothing_can_be_read_ends_with_one_sentence(
    byte_tokenizer, tmp_path: Path, workers: int
) -> None:
    write_tar(tmp_path / "images.tar", shard(range(6)) | {f"{n:06d}.jpg": b"damaged" for n in range(6)})
    data = data_of(tmp_path / "images.tar", tmp_path / "cache", latents="online")
    sources = Sources(open_documents(data, "train"), [(CHANNELS, 4, 4)])
    packer = Packer(sources, byte_tokenizer, data, "1d", 2, 2, 0, lambda uniform: uniform)
    with pytest.raises(UserError, match=r"nothing of 1000 documents.*images\.tar") as error:
        next(iter(LaneLoader(packer, 0, 1, workers, None, 0, 4, CPU)))
    assert "Traceback" not in str(error.value)


def test_of_many_images_that_cannot_be_read_the_first_are_named(byte_tokenizer, tmp_path: Path, caplog) -> None:
    members = shard(range(40)) | {f"{n:06d}.jpg": b"damaged" for n in range(39)}
    write_tar(tmp_path / "images.tar", members)
    data = data_of(tmp_path / "images.tar", tmp_path / "cache", latents="online")
    sources = Sources(open_documents(data, "train"), [(CHANNELS, 4, 4)])
    packer = Packer(sources, byte_tokenizer, data, "1d", 2, 1, 0, lambda uniform: uniform)
    with caplog.at_level(logging.WARNING):
        packer.rows([0], 0, packer.initial_state()[None])
    assert len(caplog.messages) == 10
    assert "more of this source are counted only" in caplog.messages[-1]


def test_a_failure_of_the_system_is_no_unreadable_image(byte_tokenizer, tmp_path: Path, monkeypatch) -> None:
    """Another run would read it, and come by other documents."""
    write_tar(tmp_path / "images.tar", shard(range(6)))
    data = data_of(tmp_path / "images.tar", tmp_path / "cache", latents="online")
    sources = Sources(open_documents(data, "train"), [(CHANNELS, 4, 4)])
    packer = Packer(sources, byte_tokenizer, data, "1d", 2, 2, 0, lambda uniform: uniform)

    def fails(*arguments: object) -> int:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(reading.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(reading.os, "preadv", fails)
    with pytest.raises(UserError, match=r"images\.tar:00000\d\.jpg' cannot be read: Stale file handle"):
        next(iter(LaneLoader(packer, 0, 1, 0, None, 0, 4, CPU)))


def test_files_that_vanish_while_training_do_not_stop_it(byte_tokenizer, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(8):
        (folder / f"{number}.png").write_bytes(picture(number))
    lines = [f'{{"file_name": "{number}.png", "text": "picture {number}"}}\n' for number in range(8)]
    (folder / "metadata.jsonl").write_text("".join(lines))
    sources = [SourceConfig("imagefolder", str(folder))]
    data = data_of(folder, tmp_path / "cache", latents="online", sources=sources)
    opened = Sources(open_documents(data, "train"), [(CHANNELS, 4, 4)])
    for number in range(4):
        (folder / f"{number}.png").unlink()
    packer = Packer(opened, byte_tokenizer, data, "1d", 2, 1, 0, lambda uniform: uniform)
    rows, _, counts = packer.rows([0], 0, packer.initial_state()[None])
    assert set(rows.images_uint8[rows.batch.image_mask][:, 0, 0, 0].tolist()) <= set(range(4, 8))
    assert counts[counter(opened.names[0], "unreadable_images")] > 0


def test_document_that_waits_when_its_file_vanishes_is_dropped(byte_tokenizer, tmp_path: Path) -> None:
    """And the resumed run goes on with the others."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(8):
        (folder / f"{number}.png").write_bytes(picture(number))
    lines = [f'{{"file_name": "{number}.png", "text": "{"x" * 20}"}}\n' for number in range(8)]
    (folder / "metadata.jsonl").write_text("".join(lines))
    sources = [SourceConfig("imagefolder", str(folder))]
    data = data_of(folder, tmp_path / "cache", latents="online", sources=sources, prompt_dropout_prob=0.0)
    opened = Sources(open_documents(data, "train"), [(CHANNELS, 4, 4)])

    def packer() -> Packer:
        return Packer(opened, byte_tokenizer, data, "1d", 2, 1, 0, lambda uniform: uniform)

    first, state, _ = packer().rows([0], 0, packer().initial_state()[None])
    shown = first.images_uint8[first.batch.image_mask][:, 0, 0, 0].tolist()
    for number in set(range(8)) - set(shown):
        (folder / f"{number}.png").unlink()
    rows, _, counts = packer().rows([0], 1, state)
    assert set(rows.images_uint8[rows.batch.image_mask][:, 0, 0, 0].tolist()) == set(shown)
    assert counts[counter(opened.names[0], "dropped_documents")] > 0
