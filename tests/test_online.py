"""Training directly from pixels: the same batch as with a cache, and unreadable images."""

import errno
import io
import logging
import os
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CHANNELS, data_config, loader_of, packer_of
from PIL import Image
from source_files import SIZE, picture, shard, write_tar

from transfusion_mot.codecs.autoencoder_kl import Autoencoder
from transfusion_mot.config import (
    TEXT,
    CodecConfig,
    DataConfig,
    ModalityConfig,
    ModelConfig,
    SourceConfig,
    TowerConfig,
)
from transfusion_mot.data.batch import Batch, Rows
from transfusion_mot.data.images import to_pixels
from transfusion_mot.data.mixture import Sources, counter, open_documents, with_encoded
from transfusion_mot.data.online import OnlineEncoder
from transfusion_mot.data.packing import Packer
from transfusion_mot.data.sources import reading
from transfusion_mot.errors import UserError
from transfusion_mot.models.inputs import LatentInput, Slots, TokenInput

CPU = torch.device("cpu")


def data_of(folder: Path, cache: Path, **changes) -> DataConfig:
    settings = {
        "sources": [SourceConfig("webdataset", path=str(folder))],
        "image_size": SIZE,
        "held_out_fraction": 0.0,
        "cache_dir": str(cache),
        "num_workers": 0,
    }
    return data_config(40, 3, **(settings | changes))


def batches(data: DataConfig, autoencoder: Autoencoder, tokenizer, batch_size: int = 64):
    documents = open_documents(data, "train")
    sources = with_encoded(documents, data, {"image": autoencoder}, {"image": CodecConfig()}, all_documents=True)
    packer = packer_of(sources, tokenizer, data, rope="3d", lanes=2)
    encoder = OnlineEncoder({"image": autoencoder}, {"image": batch_size})
    return [batch for batch, _ in loader_of(packer, 4, num_workers=data.num_workers, encoder=encoder)]


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
        others = two.tensors()
        for name, value in one.tensors().items():
            if name == "image.latents":
                torch.testing.assert_close(value, others[name], rtol=2e-3, atol=2e-3)
            else:
                assert torch.equal(value, others[name]), name
    images = cached[0].latents("image")
    assert len({tuple(value.flatten().tolist()) for value in images.latents[images.mask]}) > 3


def random_rows(names: list[str], copies: bool) -> Rows:
    """Two rows of three slots of each modality, of images of 16 by 16 pixels."""
    generator = torch.Generator().manual_seed(0)
    inputs, media = {}, {}
    for name in names:
        mask = torch.tensor([[True, False, False], [True, True, False]])
        copied = torch.tensor([[False, True, False], [False, False, False]]) if copies else None
        noise = torch.randn(2, 3, 4, 4, 4, generator=generator)
        inputs[name] = LatentInput(noise, torch.rand(2, 3), torch.randn(2, 3, 4, 4, 4), mask, copied)
        media[name] = torch.randint(256, (2, 3, 16, 16, 3), dtype=torch.uint8, generator=generator)
    ids = torch.zeros(2, 5, dtype=torch.long)
    inputs = {TEXT: TokenInput(ids, ids)} | inputs
    return Rows(Batch(inputs, Slots(*[torch.zeros(2, 5 + 3 * 4 * len(names), dtype=torch.long)] * 5)), media)


@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize("names", [["image"], ["image", "sketch"], []])
def test_latents_are_those_of_each_codec_to_the_bit(random_vae: Path, names: list[str], copies: bool) -> None:
    """Of the codec of their modality, in the precision of a cache, and nothing in empty slots."""
    codecs = {name: Autoencoder.load(str(random_vae), CPU) for name in names}
    if "sketch" in codecs:
        with torch.no_grad():
            codecs["sketch"].vae.encoder.conv_in.weight.mul_(2)
    rows = random_rows(names, copies)
    batch = OnlineEncoder(codecs, dict.fromkeys(names, 6))(rows)
    before = rows.batch.tensors()
    for name, value in batch.tensors().items():
        assert value is before[name] or name.endswith(".latents"), name
    for name, codec in codecs.items():
        given = rows.batch.latents(name)
        filled = given.mask | given.copies if copies else given.mask
        mean, std = codec.encode(to_pixels(rows.media[name].flatten(0, 1)))
        for slot, (row, place) in enumerate(np.ndindex(2, 3)):
            latents = mean[slot].half().float() + std[slot].half().float() * given.latents[row, place]
            assert torch.equal(batch.latents(name).latents[row, place], latents * filled[row, place])
    if len(names) == 2:
        assert not torch.equal(batch.latents("image").latents, batch.latents("sketch").latents)


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
    sources = Sources(open_documents(data, "train"), {"image": [(CHANNELS, 4, 4)]})

    def stream() -> tuple[list[int], Counter]:
        packer = packer_of(sources, byte_tokenizer, data)
        state, seen, totals = packer.initial_state()[None], [], Counter()
        for step in range(8):
            rows, state, counts = packer.rows([0], step, state)
            seen += rows.media["image"][rows.batch.latents("image").mask][:, 0, 0, 0].tolist()
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
        counts[counter(name, what)] for what in ("taken", "unreadable_items", "dropped_documents")
    )
    assert unreadable == dropped == pytest.approx(taken / 6, abs=2)
    assert counts[counter(name, "items")] == len(seen)


@pytest.mark.parametrize("workers", [0, 2])
def test_source_of_which_nothing_can_be_read_ends_with_one_sentence(
    byte_tokenizer, tmp_path: Path, workers: int
) -> None:
    write_tar(tmp_path / "images.tar", shard(range(6)) | {f"{n:06d}.jpg": b"damaged" for n in range(6)})
    data = data_of(tmp_path / "images.tar", tmp_path / "cache", latents="online")
    sources = Sources(open_documents(data, "train"), {"image": [(CHANNELS, 4, 4)]})
    packer = packer_of(sources, byte_tokenizer, data, lanes=2)
    with pytest.raises(UserError, match=r"1000 successive documents.*images\.tar") as error:
        next(iter(loader_of(packer, 4, num_workers=workers)))
    assert "Traceback" not in str(error.value)


def test_of_many_images_that_cannot_be_read_the_first_are_named(byte_tokenizer, tmp_path: Path, caplog) -> None:
    members = shard(range(40)) | {f"{n:06d}.jpg": b"damaged" for n in range(39)}
    write_tar(tmp_path / "images.tar", members)
    data = data_of(tmp_path / "images.tar", tmp_path / "cache", latents="online")
    sources = Sources(open_documents(data, "train"), {"image": [(CHANNELS, 4, 4)]})
    packer = packer_of(sources, byte_tokenizer, data)
    with caplog.at_level(logging.WARNING):
        packer.rows([0], 0, packer.initial_state()[None])
    assert len(caplog.messages) == 10
    assert "more items of this source are only counted" in caplog.messages[-1]


def test_a_failure_of_the_system_is_no_unreadable_image(byte_tokenizer, tmp_path: Path, monkeypatch) -> None:
    """Another run would read it, and come by other documents."""
    write_tar(tmp_path / "images.tar", shard(range(6)))
    data = data_of(tmp_path / "images.tar", tmp_path / "cache", latents="online")
    sources = Sources(open_documents(data, "train"), {"image": [(CHANNELS, 4, 4)]})
    packer = packer_of(sources, byte_tokenizer, data, lanes=2)

    def fails(*arguments: object) -> int:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(reading.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(reading.os, "preadv", fails)
    with pytest.raises(UserError, match=r"images\.tar:00000\d\.jpg' cannot be read: Stale file handle"):
        next(iter(loader_of(packer, 4)))


def test_files_that_vanish_while_training_do_not_stop_it(byte_tokenizer, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(8):
        (folder / f"{number}.png").write_bytes(picture(number))
    lines = [f'{{"file_name": "{number}.png", "text": "picture {number}"}}\n' for number in range(8)]
    (folder / "metadata.jsonl").write_text("".join(lines))
    sources = [SourceConfig("imagefolder", path=str(folder))]
    data = data_of(folder, tmp_path / "cache", latents="online", sources=sources)
    opened = Sources(open_documents(data, "train"), {"image": [(CHANNELS, 4, 4)]})
    for number in range(4):
        (folder / f"{number}.png").unlink()
    packer = packer_of(opened, byte_tokenizer, data)
    rows, _, counts = packer.rows([0], 0, packer.initial_state()[None])
    assert set(rows.media["image"][rows.batch.latents("image").mask][:, 0, 0, 0].tolist()) <= set(range(4, 8))
    assert counts[counter(opened.names[0], "unreadable_items")] > 0


def test_document_that_waits_when_its_file_vanishes_is_dropped(byte_tokenizer, tmp_path: Path) -> None:
    """And the resumed run continues with the others."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(8):
        (folder / f"{number}.png").write_bytes(picture(number))
    lines = [f'{{"file_name": "{number}.png", "text": "{"x" * 20}"}}\n' for number in range(8)]
    (folder / "metadata.jsonl").write_text("".join(lines))
    sources = [SourceConfig("imagefolder", path=str(folder))]
    data = data_of(folder, tmp_path / "cache", latents="online", sources=sources, prompt_dropout_prob=0.0)
    opened = Sources(open_documents(data, "train"), {"image": [(CHANNELS, 4, 4)]})

    def packer() -> Packer:
        return packer_of(opened, byte_tokenizer, data)

    first, state, _ = packer().rows([0], 0, packer().initial_state()[None])
    shown = first.media["image"][first.batch.latents("image").mask][:, 0, 0, 0].tolist()
    for number in set(range(8)) - set(shown):
        (folder / f"{number}.png").unlink()
    rows, _, counts = packer().rows([0], 1, state)
    assert set(rows.media["image"][rows.batch.latents("image").mask][:, 0, 0, 0].tolist()) == set(shown)
    assert counts[counter(opened.names[0], "dropped_documents")] > 0


def test_codes_need_no_settings_of_encoding(random_vae: Path) -> None:
    # Pictures of another run's data, of a model that speaks, too.
    speech = ModalityConfig(tower="image", objective="next_token")
    pictures = ModalityConfig(tower="image", objective="diffusion")
    towers = {name: TowerConfig(8, 16) for name in (TEXT, "image")}
    model = ModelConfig(towers, {TEXT: ModalityConfig(tower=TEXT), "image": pictures, "speech": speech})
    codecs = {"image": Autoencoder.load(str(random_vae), CPU), "speech": SimpleNamespace(kind="codes")}
    encoder = OnlineEncoder.of_model(model, codecs, {"image": CodecConfig(batch_size=3)})
    assert (encoder.codecs, encoder.batch_sizes) == ({"image": codecs["image"]}, {"image": 3})
