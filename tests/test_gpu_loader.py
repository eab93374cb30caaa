"""On the GPU: rows arrive, and are encoded there, without the host waiting for the device."""

from pathlib import Path

import pytest
import torch
from conftest import numbered_images, sources_of, texts_of
from source_files import SIZE, shard, write_tar

from transfusion_mot.codecs.autoencoder_kl import Autoencoder
from transfusion_mot.config import AutoencoderConfig, DataConfig, SourceConfig
from transfusion_mot.data.loader import LaneLoader
from transfusion_mot.data.mixture import open_documents, with_latents
from transfusion_mot.data.online import OnlineEncoder
from transfusion_mot.data.packing import Packer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda", 0)


def read(packer: Packer, encoder: OnlineEncoder | None, workers: int = 2) -> list:
    """Batches; after the first one a wait for the device is an error."""
    batches = []
    try:
        for batch, _ in LaneLoader(packer, 0, 1, workers, None, 0, 4, CUDA, encoder):
            batches.append(batch)
            torch.cuda.set_sync_debug_mode("error")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return batches


def test_rows_arrive_without_waiting(byte_tokenizer) -> None:
    sources = sources_of(numbered_images(["a", "bb", "ccc"] * 9), texts_of(["some text"]))
    packer = Packer(sources, byte_tokenizer, DataConfig(text_slots=40), "3d", 2, 4, 0, lambda uniform: uniform)
    on_gpu = read(packer, None)
    on_host = [batch for batch, _ in LaneLoader(packer, 0, 1, 0, None, 0, 4, torch.device("cpu"))]
    for one, two in zip(on_gpu, on_host, strict=True):
        for name, value in one.tensors().items():
            assert value.device == CUDA
            assert torch.equal(value.cpu(), getattr(two, name)), name


def test_images_are_encoded_on_the_gpu_without_waiting(byte_tokenizer, random_vae: Path, tmp_path: Path) -> None:
    write_tar(tmp_path / "images.tar", shard(range(0, 200, 10), "png"))
    autoencoder = Autoencoder.load(str(random_vae), CUDA)
    found = []
    for latents in ("cache", "online"):
        data = DataConfig(
            sources=[SourceConfig("webdataset", str(tmp_path / "images.tar"))],
            image_size=SIZE,
            held_out_fraction=0.0,
            cache_dir=str(tmp_path / "cache"),
            text_slots=40,
            latents=latents,
        )
        sources = with_latents(open_documents(data, "train"), data, autoencoder, AutoencoderConfig())
        packer = Packer(sources, byte_tokenizer, data, "3d", 2, 4, 0, lambda uniform: uniform)
        found.append(read(packer, OnlineEncoder(autoencoder, 6)))
    for cached, online in zip(*found, strict=True):
        assert torch.equal(cached.text_ids, online.text_ids)
        # Both are encoded in bfloat16, one of them compiled: single values may differ by more than they do together.
        assert (cached.latents - online.latents).norm() < 0.05 * cached.latents.norm()
