"""On the GPU: rows are copied and encoded without the host waiting for the device."""

from pathlib import Path

import pytest
import torch
from conftest import data_config, loader_of, numbered_images, packer_of, sources_of, texts_of
from source_files import SIZE, shard, write_tar

from transfusion_mot.codecs.autoencoder_kl import Autoencoder
from transfusion_mot.config import CodecConfig, DataConfig, SourceConfig
from transfusion_mot.data.mixture import open_documents, with_encoded
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
        for batch, _ in loader_of(packer, 4, num_workers=workers, device=CUDA, encoder=encoder):
            batches.append(batch)
            torch.cuda.set_sync_debug_mode("error")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return batches


def test_rows_arrive_without_waiting(byte_tokenizer) -> None:
    sources = sources_of(numbered_images(["a", "bb", "ccc"] * 9), texts_of(["some text"]))
    packer = packer_of(sources, byte_tokenizer, data_config(text_slots=40), rope="3d", lanes=4)
    on_gpu = read(packer, None)
    on_host = [batch for batch, _ in loader_of(packer, 4)]
    for one, two in zip(on_gpu, on_host, strict=True):
        for name, value in one.tensors().items():
            assert value.device == CUDA
            assert torch.equal(value.cpu(), two.tensors()[name]), name


def test_images_are_encoded_on_the_gpu_without_waiting(byte_tokenizer, random_vae: Path, tmp_path: Path) -> None:
    write_tar(tmp_path / "images.tar", shard(range(0, 200, 10), "png"))
    autoencoder = Autoencoder.load(str(random_vae), CUDA)
    found = []
    for latents in ("cache", "online"):
        data = DataConfig(
            sources=[SourceConfig("webdataset", path=str(tmp_path / "images.tar"))],
            image_size=SIZE,
            held_out_fraction=0.0,
            cache_dir=str(tmp_path / "cache"),
            slots={"text": 40, "image": 4},
            latents=latents,
        )
        documents = open_documents(data, "train")
        sources = with_encoded(documents, data, {"image": autoencoder}, {"image": CodecConfig()})
        packer = packer_of(sources, byte_tokenizer, data, rope="3d", lanes=4)
        found.append(read(packer, OnlineEncoder({"image": autoencoder}, {"image": 6})))
    for cached, online in zip(*found, strict=True):
        assert torch.equal(cached.tokens("text").ids, online.tokens("text").ids)
        # Both are encoded in bfloat16, one of them compiled: single values may differ by more than they do together.
        one, two = (batch.latents("image").latents for batch in (cached, online))
        assert (one - two).norm() < 0.05 * one.norm()
