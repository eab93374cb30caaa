"""Runs over text, images and a toy modality of only codes: two token streams are cut, killed and resumed."""

import dataclasses
import itertools
import os
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from process_group import clean_process, run_processes
from training_runs import TOWER, Arguments, assert_same, final_state

import train
from transfusion_mot.config import CodecConfig, DataConfig
from transfusion_mot.data.mixture import Source, Sources
from transfusion_mot.data.sources.base import MediaItem, Split
from transfusion_mot.run import data as run_data
from transfusion_mot.training.checkpoint import find_state
from transfusion_mot.training.ema import EMA
from transfusion_mot.training.metrics import read_metrics

pytestmark = pytest.mark.slow

NUM_CODES = 16
# Beside the text tower, one of its own width.
CHANGES: dict[str, dict[str, Any]] = {
    "data": {"slots": {"text": 40, "image": 1, "speech": 12}, "num_workers": 1},
    "codecs": {"speech": {"path": "of this test"}},
    "model": {
        "towers": {"text": TOWER, "image": TOWER, "speech": {"hidden_size": 24, "intermediate_size": 40}},
        "modalities": {
            "text": {"tower": "text"},
            "image": {"tower": "image", "objective": "diffusion", "loss_weight": 5.0},
            "speech": {"tower": "speech", "loss_weight": 0.5},
        },
    },
    "optimizer": {"lr_schedule": "constant"},
}


class Units:
    """A source of codes that no text belongs to, most of them longer than what a row has for them."""

    kind, name, is_paired = "codes", "units", False
    modalities = ("speech",)

    def __init__(self, split: Split) -> None:
        self.skipped: dict[str, int] = {}
        rng = np.random.default_rng(split == "train")
        self.codes = [rng.integers(NUM_CODES, size=rng.integers(5, 30)).tolist() for _ in range(30)]
        self.documents_fingerprint = str(self.codes)
        self.readable = np.ones(len(self.codes), dtype=np.bool_)
        self.media = {"speech": self}

    def __len__(self) -> int:
        return len(self.codes)

    def document(self, index: int) -> list[MediaItem]:
        return [MediaItem("speech", index)]

    def span(self, index: int, flipped: bool = False) -> list[int]:
        return [NUM_CODES, *self.codes[index], NUM_CODES + 1]


class UnitsCodec:
    """What a run asks of a codec whose codes are there already."""

    kind, medium, codebook_size, downsampling, fingerprint = "codes", "units", NUM_CODES, 1, "units"


@contextmanager
def speech() -> Iterator[None]:
    """A source and a codec of speech in addition to those of the configuration."""
    load_codec, open_documents, with_encoded = run_data.load_codec, run_data.open_documents, run_data.with_encoded

    def load(config: CodecConfig, *arguments: Any) -> Any:
        return UnitsCodec() if config.path == "of this test" else load_codec(config, *arguments)

    def open_others(data: DataConfig, split: Split, readers: Iterable[str] = ()) -> list[Source]:
        others = {name: slots for name, slots in data.slots.items() if name != "speech"}
        return [*open_documents(dataclasses.replace(data, slots=others), split, readers), Source(Units(split))]

    def encode(sources: list[Source], *arguments: Any, all_documents: bool = False) -> Sources:
        *others, units = sources
        encoded = with_encoded(others, *arguments, all_documents=all_documents)
        units = dataclasses.replace(units, encoded=units.documents.media)
        return Sources([*encoded.sources, units], encoded.latent_shapes, all_documents)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_data, "load_codec", load)
        patch.setattr(run_data, "open_documents", open_others)
        patch.setattr(run_data, "with_encoded", encode)
        yield


def train_with_speech(arguments: list[str], killed_in_step: int = 0) -> None:
    """Train, and be killed without warning in a step."""
    original, steps = EMA.update, itertools.count(1)

    def update(*args: Any) -> None:
        if next(steps) == killed_in_step:
            os.kill(os.getpid(), signal.SIGKILL)
        original(*args)

    with speech(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(EMA, "update", update)
        train.main(arguments)


def test_run_that_is_killed_goes_on_exactly_also_on_two_processes(
    arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    train_with_speech(arguments("whole", **CHANGES))
    for run in ("one", "two"):
        command = arguments(run, **CHANGES, training={"save_every": 1})
        process = clean_process(train_with_speech, command, 5)
        process.start()
        process.join(120)
        assert process.exitcode == -signal.SIGKILL
        state = find_state(tmp_path / run, "auto")
        assert state is not None
        assert state.name in ("step-0000003", "step-0000004")
        # [rows, streams, 3] behind the three pools: what each stream has begun and not ended.
        begun = final_state(tmp_path / run)["lanes"][:, 3 : 3 + 6].view(-1, 2, 3)
        assert (begun[:, :, 0] >= 0).any(dim=0).all(), "both streams are cut where the run is"
    train_with_speech(arguments("one", **CHANGES))
    whole = final_state(tmp_path / "whole")
    assert_same(whole, final_state(tmp_path / "one"))
    run_processes(train_with_speech, 2, {}, tmp_path / "group", arguments("two", **CHANGES))
    assert_same(whole, final_state(tmp_path / "two"), tolerance=2e-5)

    lines = read_metrics(tmp_path / "one" / "metrics.jsonl")
    last = [line for line in lines if "loss" in line][-1]
    assert last["loss"] == pytest.approx(last["text_loss"] + 5 * last["image_loss"] + 0.5 * last["speech_loss"])
    assert last["sources/units/speech_loss"] == pytest.approx(last["speech_loss"])
    assert last["speech_slots_seen"] == last["sources/units/tokens_seen"] > 0
    assert not any(key.startswith("sources/units/text") for key in last)
    assert "validation/speech_loss" in lines[-1]
    moved = [name for name in whole if name.startswith("optimizer/modalities.speech.")]
    assert all(whole[name].isfinite().all() for name in moved)
    assert any(torch.count_nonzero(whole[name]) for name in moved)
