"""Held-out losses as numbers of a benchmark: of codes, and of models with modalities that the data do not have."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CHANNELS, data_config, tiny_config, tiny_model
from test_validation import (
    CAPTIONS,
    CODES,
    NUM_CODES,
    TEXT_SLOTS,
    ListCodes,
    codes_validation,
    held_out,
    naive_losses_of_codes,
    speech_tokenizer,  # noqa: F401 (a fixture)
)

from transfusion_mot.config import DataConfig, ModalityConfig, RunConfig, TowerConfig, TrainingConfig
from transfusion_mot.data.mixture import Source, Sources
from transfusion_mot.data.tokenizer import TextTokenizer, train_tokenizer
from transfusion_mot.evaluation.report.comparison import difference
from transfusion_mot.models.transfusion import TransfusionMoT
from transfusion_mot.sampling.held_out_losses import code_metrics, diffusion_metrics
from transfusion_mot.sampling.held_out_speech import loss_metrics

CODEC: Any = SimpleNamespace(kind="codes", fingerprint="0123456789abcdef")


def pipeline_of(model: TransfusionMoT, tokenizer: TextTokenizer) -> Any:
    """What the losses need of a pipeline."""
    return SimpleNamespace(transformer=model, text_tokenizer=tokenizer)


def codes_run(tokenizer: TextTokenizer, codes: list[list[int]] = CODES) -> tuple[Any, RunConfig, Sources]:
    documents = ListCodes(codes, CAPTIONS)
    _, model = codes_validation(tokenizer, documents)
    # Slots for three spans: a benchmark does not depend on the rows of training.
    config = RunConfig(data=data_config(40, 3, caption_first_prob=0.5))
    return pipeline_of(model, tokenizer), config, Sources([Source(documents, 1.0, {"speech": documents})], {})


# In the second, several short ones fit into the row of the longest.
@pytest.mark.parametrize("all_codes", [CODES, [[n % 10, 3, 1] * (1 + 2 * n) for n in range(8)]])
def test_losses_of_codes_equal_those_of_one_document_at_a_time(speech_tokenizer, accelerator, all_codes) -> None:  # noqa: F811
    pipeline, config, sources = codes_run(speech_tokenizer, all_codes)
    begin, end = speech_tokenizer.begin_ids["speech"], speech_tokenizer.end_ids["speech"]
    bos, eos = speech_tokenizer.bos_id, speech_tokenizer.eos_id
    given: dict[str, Any] = {"codecs": {"speech": CODEC}, "accelerator": accelerator, "batch_size": 3}
    conditional, unconditional = code_metrics(pipeline, config, sources, **given)
    for metric, is_captioned in ((conditional, True), (unconditional, False)):
        sums, labels = 0.0, 0
        for caption, codes in zip(CAPTIONS, all_codes, strict=True):
            before = [bos, *(speech_tokenizer.encode(caption) if is_captioned else []), begin]
            nats, count, _, _ = naive_losses_of_codes(pipeline.transformer, speech_tokenizer, before, codes, [end, eos])
            sums, labels = sums + nats, labels + count
        assert metric.value == pytest.approx(sums / labels, rel=1e-5)
        assert metric.protocol["codes"] == labels == sum(len(codes) + 1 for codes in all_codes)
        assert metric.interval[0] < metric.value < metric.interval[1]
    assert conditional.name == "loss of speech codes (conditional)"
    assert conditional.value != pytest.approx(unconditional.value, rel=1e-3)
    few, _ = code_metrics(pipeline, config, sources, num_media=3, **given)
    assert few.protocol["codes"] < conditional.protocol["codes"]


def test_losses_of_speech_are_those_of_validation(speech_tokenizer, accelerator) -> None:  # noqa: F811
    """Of the checkpoint's model, whatever the configuration says of it."""
    documents = ListCodes(CODES, CAPTIONS)
    validation, model = codes_validation(speech_tokenizer, documents)
    pipeline = pipeline_of(model, speech_tokenizer)
    pipeline.codecs = {"speech": CODEC}
    data = DataConfig(slots={"text": TEXT_SLOTS, "speech": 13})
    config = RunConfig(data=data, training=TrainingConfig(num_validation_documents=8))
    sources = Sources([Source(documents, 1.0, {"speech": documents})], {})
    metrics = loss_metrics(pipeline, config, sources, accelerator, batch_size=2)
    expected = validation.losses(model, accelerator)
    assert {metric.name: metric.value for metric in metrics} == {f"held-out {name}": v for name, v in expected.items()}


def test_losses_of_other_data_or_another_codec_are_not_compared(speech_tokenizer, accelerator) -> None:  # noqa: F811
    found = []
    for codes, fingerprint in ((CODES, "a"), (CODES[::-1], "a"), (CODES, "b")):
        pipeline, config, sources = codes_run(speech_tokenizer, codes)
        codec: Any = SimpleNamespace(kind="codes", fingerprint=fingerprint)
        found.append(code_metrics(pipeline, config, sources, codecs={"speech": codec}, accelerator=accelerator)[0])
    assert difference(found[0], found[0]).verdict == "within noise"
    assert difference(found[0], found[1]).reason == "measured with another held-out documents"
    assert difference(found[0], found[2]).reason == "measured with another codec"


def test_a_model_with_speech_is_measured_on_pictures_alone(accelerator) -> None:
    """A model that predicts zero has the mean square of the target, noise less latents."""
    names = ("text", "image", "speech")
    tokenizer = train_tokenizer(["a"], 263, names)
    towers = {name: TowerConfig(16, 24) for name in names}
    modalities = {
        "text": ModalityConfig("text"),
        "image": ModalityConfig("image", "diffusion"),
        "speech": ModalityConfig("speech"),
    }
    model_config = tiny_config(towers=towers, modalities=modalities)
    sizes = {"text": tokenizer.vocab_size, "image": CHANNELS, "speech": NUM_CODES + 2}
    model = tiny_model(model_config, sizes, dtype=torch.float32)
    torch.nn.init.zeros_(model.modality("image").adapter.output.weight)
    torch.nn.init.zeros_(model.modality("image").adapter.output.bias)
    sources = held_out()
    codec: Any = SimpleNamespace(kind="latents", fingerprint="0123456789abcdef")
    metrics = diffusion_metrics(
        pipeline_of(model, tokenizer),
        # No slots of speech: the benchmark leaves out what the pictures' data do not have.
        RunConfig(data=data_config(40, 2), model=model_config),
        sources,
        codecs={"image": codec},
        accelerator=accelerator,
        bins=2,
    )
    assert [metric.name for metric in metrics][:2] == [
        "diffusion loss (conditional)",
        "diffusion loss (conditional, t = 0.25)",
    ]
    mean = sources.sources[0].encoded["image"].mean.astype(float)
    for metric in metrics:
        assert metric.protocol["images"] == len(CAPTIONS)
        assert metric.value == pytest.approx(1 + np.square(mean).mean(), abs=4.5 * (8 / mean.size) ** 0.5)
