"""Names on the Hugging Face hub without a network: one request, one message."""

import socket
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError

from transfusion_mot.codecs.checkpoint import class_name_of
from transfusion_mot.config import SourceConfig
from transfusion_mot.data.sources.media_tables import open_dataset
from transfusion_mot.data.tokenizer import load_tokenizer
from transfusion_mot.errors import UserError
from transfusion_mot.evaluation.captions.sentence_similarity import load_sentence_encoder
from transfusion_mot.evaluation.clip_score import load_clip
from transfusion_mot.evaluation.features.load import load_feature_network
from transfusion_mot.evaluation.geneval import load_detector
from transfusion_mot.evaluation.recognisers import TransformersRecogniser
from transfusion_mot.hub_names import refuse_missing_path
from transfusion_mot.models.pretrained import LanguageModel

CPU = torch.device("cpu")
DINOV2 = "vit_large_patch14_dinov2.lvd142m"
LOADERS: dict[str, tuple[Callable[[str], object], str]] = {
    "CLIP": (lambda name: load_clip(name, CPU), "owner/model"),
    "detector": (lambda name: load_detector(name, CPU), "owner/model"),
    "recogniser": (lambda name: TransformersRecogniser(name, "cpu"), "owner/model"),
    "sentences": (load_sentence_encoder, "owner/model"),
    "sentences, short name": (lambda name: load_sentence_encoder(name.split("/")[1]), "sentence-transformers/model"),
    "tokenizer": (lambda name: load_tokenizer(name, ["text"]), "owner/model"),
    "codec": (class_name_of, "owner/model"),
    "DINOv2": (lambda name: load_feature_network("dinov2", CPU, dinov2=name.split("/")[1]), f"timm/{DINOV2}"),
    "data set": (lambda name: open_dataset(SourceConfig("datasets", name)), "owner/data"),
    "language model": (LanguageModel.open, "owner/model"),
}


@pytest.mark.parametrize("kind", LOADERS)
def test_the_hub_is_asked_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind.startswith("sentences"):
        pytest.importorskip("sentence_transformers")
    load, asked = LOADERS[kind]
    names = []

    def unreachable(name: str, **_: object) -> None:
        names.append(name)
        raise LocalEntryNotFoundError("Got: ConnectError: [Errno -2] Name or service not known. A second sentence.")

    monkeypatch.setattr("transfusion_mot.hub_names.snapshot_download", unreachable)
    with pytest.raises(UserError, match="it is not in the cache, and the hub cannot be reached, or HF_HUB_OFFLINE is"):
        load(asked)
    assert names == [asked]


def test_an_empty_name_is_refused() -> None:
    with pytest.raises(UserError, match="init_from is empty; give a folder or a name on the Hugging Face hub"):
        refuse_missing_path("", "init_from")


def closed_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def test_a_data_set_that_was_loaded_before_needs_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor do both take the half a minute for which the library would try to reach the hub."""
    for module in ("huggingface_hub.constants", "datasets.config"):
        monkeypatch.setattr(f"{module}.HF_HUB_OFFLINE", False)
    for name in ("huggingface_hub.constants.ENDPOINT", "datasets.config.HF_ENDPOINT"):
        monkeypatch.setattr(name, f"http://localhost:{closed_port()}")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "texts.txt").write_text("one\ntwo\n")
    datasets.load_dataset(str(tmp_path / "data"), split="train")
    # As if it had been loaded by its name on the hub.
    (tmp_path / "cache" / "data").rename(tmp_path / "cache" / "owner___data")
    begun = time.perf_counter()
    assert open_dataset(SourceConfig("datasets", "owner/data"))["text"] == ["one", "two"]
    with pytest.raises(UserError, match=r"cannot load 'owner/other'.*the hub cannot be reached"):
        open_dataset(SourceConfig("datasets", "owner/other"))
    assert time.perf_counter() - begun < 10
    assert not datasets.config.HF_HUB_OFFLINE
