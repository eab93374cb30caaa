"""A pipeline with speech, with or without pictures: snapshots, speaking, transcribing, painting from speech."""

import json
import logging
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_pipeline import seeds, tiny_pipeline
from test_sampling import forward_document, swap_rows_of_the_head, tiny_model
from test_sampling_modalities import Codes, Latents, Spoken, begun, segments_of
from transformers import EncodecConfig, EncodecModel, HubertConfig, HubertModel

from transfusion_mot.codecs.audio_codes import AudioCodes
from transfusion_mot.codecs.hubert_units import HubertUnits
from transfusion_mot.codecs.mel_vq import MelVQModel
from transfusion_mot.config import TEXT, DataConfig, ModalityConfig, TowerConfig
from transfusion_mot.data.audio import Audio, resample
from transfusion_mot.data.layout import Media
from transfusion_mot.data.mixture import Source, Sources
from transfusion_mot.data.packing import Packer
from transfusion_mot.data.sources.base import MediaItem, Text
from transfusion_mot.data.tokenizer import TextTokenizer, train_tokenizer
from transfusion_mot.errors import UserError
from transfusion_mot.models.inputs import LatentInput, TokenInput
from transfusion_mot.pipeline import TransfusionPipeline
from transfusion_mot.sampling import session

CODEBOOK = 16
START, END = CODEBOOK, CODEBOOK + 1
RATE, CODES_PER_SECOND = 1600, 100
SPEECH = {
    "towers": {"text": TowerConfig(32, 48), "image": TowerConfig(40, 32), "speech": TowerConfig(24, 56)},
    "modalities": {
        "text": ModalityConfig("text"),
        "image": ModalityConfig("image", "diffusion"),
        "speech": ModalityConfig("speech"),
    },
}
TEXT_AND_SPEECH = {
    "towers": {name: SPEECH["towers"][name] for name in ("text", "speech")},
    "modalities": {name: SPEECH["modalities"][name] for name in ("text", "speech")},
}


def tiny_encodec(**changes: Any) -> EncodecModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "codebook_dim": 8, "num_filters": 4, "num_lstm_layers": 1, "codebook_size": CODEBOOK}
    config = EncodecConfig(
        **{**sizes, "sampling_rate": RATE, "upsampling_ratios": [4, 4], "target_bandwidths": [0.4], **changes}
    )
    model = EncodecModel(config).eval()
    for name, weights in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith(".embed"):
            # At zero all codes were the same.
            weights.data = 0.05 * torch.randn_like(weights)
    return model


def speech_tokenizer(*media: str) -> TextTokenizer:
    return train_tokenizer(["a red apple", "an octopus", "sun"], 280, (TEXT, *media))


def speech_pipeline(*, has_images: bool = True, **replaced: Any) -> TransfusionPipeline:
    tokenizer = speech_tokenizer(*(["image"] if has_images else []), "speech")
    sizes = {"image": 3} if has_images else {}
    architecture = SPEECH if has_images else TEXT_AND_SPEECH
    model = tiny_model(tokenizer.vocab_size, {**sizes, "speech": CODEBOOK + 2}, **architecture).float()
    parts = {"transformer": model, "tokenizer": tokenizer.hf, "audio_tokenizer": tiny_encodec()}
    parts |= {"audio_modality": "speech", "max_audio_seconds": 1.0}
    parts |= {"image_modality": "image"} if has_images else {"vae": None, "image_size": None}
    return tiny_pipeline(**{**parts, **replaced})


def tone(seconds: float = 0.2, pitch: float = 90.0, rate: int = RATE) -> Audio:
    times = np.arange(int(seconds * rate)) / rate
    return Audio((0.5 * np.sin(2 * np.pi * pitch * times) * np.cos(9 * times)).astype(np.float32), rate)


def picture() -> Image.Image:
    return Image.fromarray(np.linspace(0, 255, 8 * 8 * 3).reshape(8, 8, 3).astype(np.uint8))


@pytest.fixture(scope="module")
def pipeline() -> TransfusionPipeline:
    return speech_pipeline()


@pytest.fixture(scope="module")
def saved(pipeline, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("snapshots") / "step-0000001"
    pipeline.save_pretrained(folder)
    return folder


def same(one: list[Audio], two: list[Audio]) -> bool:
    return all(np.array_equal(a.samples, b.samples) for a, b in zip(one, two, strict=True))


def test_a_modality_may_have_a_guidance_of_its_own(monkeypatch) -> None:
    pipeline = speech_pipeline(guidance_scale=3.0)
    monkeypatch.setattr(pipeline.transformer.architecture.modalities["speech"], "guidance_scale", 1.5)
    own, given, other = (
        pipeline.speak("sun", guidance_scale=scale, generator=seeds(1), max_seconds=0.4) for scale in (None, 1.5, 3.0)
    )
    assert same(own, given)
    assert not same(own, other)
    own, given, other = (
        pipeline("sun", guidance_scale=scale, generator=seeds(1), output_type="np").images for scale in (None, 3.0, 1.5)
    )
    assert np.array_equal(own, given)
    assert not np.array_equal(own, other)


# --- Snapshots. ---


def test_a_snapshot_speaks_hears_and_paints_as_before(pipeline, saved) -> None:
    index = json.loads((saved / "model_index.json").read_text())
    assert index["audio_tokenizer"] == ["transformers", "EncodecModel"]
    assert (index["image_modality"], index["audio_modality"], index["max_audio_seconds"]) == ("image", "speech", 1.0)
    loaded = TransfusionPipeline.from_pretrained(saved)
    loaded.set_progress_bar_config(disable=True)
    before, after = (one.speak(["sun", picture()], generator=seeds(1, 2)) for one in (pipeline, loaded))
    assert same(before, after)
    assert before[0].sample_rate == RATE
    assert before[0].samples.std() > 0
    assert pipeline.transcribe(tone()) == loaded.transcribe(tone())
    before, after = (one(tone(), generator=seeds(1), output_type="latent").images for one in (pipeline, loaded))
    assert torch.equal(before, after)


def test_a_snapshot_with_the_speech_codec_of_this_project(tmp_path) -> None:
    torch.manual_seed(0)
    codec = MelVQModel(block_out_channels=(8, 8, 8), num_code_layers=1, num_mels=20, num_vq_embeddings=CODEBOOK)
    pipeline = speech_pipeline(audio_tokenizer=codec)
    pipeline.save_pretrained(tmp_path)
    loaded = TransfusionPipeline.from_pretrained(tmp_path)
    before, after = (one.speak(["sun", picture()], generator=seeds(1, 2)) for one in (pipeline, loaded))
    assert same(before, after)
    assert before[0].sample_rate == 16000
    assert loaded.transcribe(tone(rate=16000)) == pipeline.transcribe(tone(rate=16000))


def test_a_snapshot_of_text_and_speech_alone(tmp_path) -> None:
    pipeline = speech_pipeline(has_images=False)
    pipeline.save_pretrained(tmp_path / "one")
    loaded = TransfusionPipeline.from_pretrained(tmp_path / "one")
    assert not (tmp_path / "one" / "vae").exists()
    assert same(*(one.speak("sun", generator=seeds(1)) for one in (pipeline, loaded)))
    assert loaded.transcribe(tone()) == pipeline.transcribe(tone())
    for ask in (lambda: loaded("sun"), lambda: loaded.caption(picture()), lambda: loaded.interleave(["sun"])):
        with pytest.raises(UserError, match="this model has no pictures: its snapshot has no vae"):
            ask()
    # Saved again it is the same.
    loaded.save_pretrained(tmp_path / "two")
    one, two = (json.loads((tmp_path / name / "model_index.json").read_text()) for name in ("one", "two"))
    assert {key: two[key] for key in two if key != "_name_or_path"} == one


def test_a_snapshot_without_speech_says_so(tmp_path) -> None:
    pipeline = tiny_pipeline()
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index.pop("audio_tokenizer", [None, None]) == [None, None]
    for key in ("audio_modality", "max_audio_seconds"):
        index.pop(key)
    # As an earlier version wrote it.
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    loaded = TransfusionPipeline.from_pretrained(tmp_path)
    for ask in (lambda: loaded.speak("sun"), lambda: loaded.transcribe(tone()), lambda: loaded(tone())):
        with pytest.raises(UserError, match="this model has no speech: its snapshot has no audio_tokenizer"):
            ask()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"audio_modality": "image"}, "the modality 'image' has the objective diffusion; audio needs next_token"),
        ({"audio_modality": "smell"}, "audio_modality is smell; it must be a modality of .*: image, speech"),
        ({"audio_modality": None}, "audio_modality is None; it must be a modality"),
        (
            {"audio_tokenizer": tiny_encodec(codebook_size=32, target_bandwidths=[0.5])},
            "the audio_tokenizer has 32 codes, but the transformer was trained on 16",
        ),
        (
            {"audio_tokenizer": torch.nn.Linear(2, 2)},
            "the audio_tokenizer is a Linear, not one of MimiModel, .*; use the one",
        ),
    ],
)
def test_a_tokenizer_of_another_model_is_refused(change, message) -> None:
    with pytest.raises(UserError, match=message):
        speech_pipeline(**change)


def test_a_damaged_tokenizer_is_refused(saved, tmp_path) -> None:
    for name, message in (("gone", "its part 'audio_tokenizer' is missing"), ("other", "class BertModel; one of Mimi")):
        shutil.copytree(saved, tmp_path / name)
        folder = tmp_path / name / "audio_tokenizer"
        if name == "gone":
            shutil.rmtree(folder)
        else:
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(config | {"architectures": ["BertModel"]}))
        with pytest.raises(UserError, match=message):
            TransfusionPipeline.from_pretrained(tmp_path / name)


def test_units_of_hubert_are_read_and_cannot_be_spoken(tmp_path) -> None:
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "num_hidden_layers": 2}
    sizes |= {"conv_dim": (8, 8), "conv_stride": (4, 4), "conv_kernel": (8, 4), "num_feat_extract_layers": 2}
    torch.manual_seed(0)
    hubert = HubertModel(HubertConfig(**sizes, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2))
    units = HubertUnits(hubert.eval(), torch.randn(CODEBOOK, 16), layer=1)
    pipeline = speech_pipeline(audio_tokenizer=units, max_audio_seconds=None)
    pipeline.save_pretrained(tmp_path)
    assert (tmp_path / "audio_tokenizer" / "kmeans.safetensors").is_file()
    loaded = TransfusionPipeline.from_pretrained(tmp_path)
    recordings = [tone(0.05, rate=16000), tone(0.02, 200, rate=16000)]
    media = pipeline.encode_audio(recordings)
    assert len(set(media[0].content)) > 5
    assert loaded.encode_audio(recordings) == media
    assert loaded.transcribe(recordings) == pipeline.transcribe(recordings)
    with pytest.raises(UserError, match="HubertUnits has no decoder, so this model reads audio but cannot speak"):
        loaded.speak("sun", max_seconds=1.0)
    with pytest.raises(UserError, match="HubertUnits has no decoder"):
        loaded.generate([["sun"]], "speech")


# --- What is written, and behind what. ---


def greedy(pipeline: TransfusionPipeline, context: list[Any], scale: float, most: int) -> list[int]:
    """Codes by forwards over whole documents, guided away from no context at all; without what ends them."""
    tokenizer, written = pipeline.text_tokenizer, []
    alone = begun(tokenizer, [[tokenizer.bos_id]], "speech")
    while len(written) < most:
        part = Media("speech", [START, *written, END])
        logits, unprompted = (
            forward_document(pipeline.transformer, [*segments, part])["speech"][0, -1]
            for segments in (begun(tokenizer, context, "speech"), alone)
        )
        logits = unprompted + scale * (logits - unprompted)
        logits[START] = -math.inf
        code = int(logits.argmax())
        if code == END:
            break
        written.append(code)
    return written


@pytest.mark.parametrize("scale", [1.0, 3.0])
@torch.no_grad()
def test_speaking_with_a_cache_equals_forwards_over_whole_documents(pipeline, scale, caplog) -> None:
    most = int(0.12 * CODES_PER_SECOND)
    tokenizer = pipeline.text_tokenizer
    prompts = ["sun", picture(), "an octopus"]
    (latents,) = pipeline._encode([picture()])
    contexts = [segments_of(tokenizer, [latents if prompt is prompts[1] else prompt]) for prompt in prompts]
    # What the first would write fifth is now the end, so that they end at different times.
    fifth = greedy(pipeline, contexts[0], scale, 5)[-1]
    changed = swap_rows_of_the_head(pipeline.transformer, fifth, END, "speech")
    speaker = speech_pipeline(transformer=changed)
    expected = [greedy(speaker, context, scale, most) for context in contexts]
    assert len({len(codes) for codes in expected}) > 1
    with caplog.at_level(logging.WARNING):
        spoken = speaker.speak(prompts, temperature=0.0, guidance_scale=scale, max_seconds=0.12)
    codec = AudioCodes(speaker.audio_tokenizer)
    for audio, codes in zip(spoken, expected, strict=True):
        assert audio.sample_rate == RATE
        decoded = codec.decode(torch.tensor(codes)).numpy() if codes else np.zeros(0, dtype=np.float32)
        assert np.array_equal(audio.samples, decoded)
    cut = sum(len(codes) == most for codes in expected)
    told = [record.getMessage() for record in caplog.records if "cut" in record.getMessage()]
    assert told == ([f"{cut} of 3 results are cut after 0.1 seconds, the longest allowed"] * bool(cut))

    # With room for its end and no more, the shortest is not cut.
    shortest = min(range(3), key=lambda place: len(expected[place]))
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        room = (len(expected[shortest]) + 1.5) / CODES_PER_SECOND
        again = speaker.speak(prompts[shortest], temperature=0.0, guidance_scale=scale, max_seconds=room)
    assert same(again, spoken[shortest : shortest + 1])
    assert not [record for record in caplog.records if "cut" in record.getMessage()]


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_one_seed_gives_one_result_whatever_the_batch_size(pipeline, scale) -> None:
    prompts = ["sun", picture(), "a red apple", "sun"]
    settings = {"guidance_scale": scale, "max_seconds": 0.3, "top_p": 0.95, "top_k": 12}
    together = pipeline.speak(prompts, generator=seeds(1, 2, 3, 4), **settings)
    alone = [pipeline.speak(prompt, generator=seeds(seed), **settings)[0] for seed, prompt in enumerate(prompts, 1)]
    assert same(together, alone)
    assert not same(together[:1], together[3:])
    recordings = [tone(), tone(0.11, 200), tone(0.3, 50)]
    written = pipeline.transcribe(recordings, temperature=1.0, max_new_tokens=9, generator=seeds(1, 2, 3))
    assert written == [
        pipeline.transcribe(one, temperature=1.0, max_new_tokens=9, generator=seeds(seed))[0]
        for seed, one in enumerate(recordings, 1)
    ]


@pytest.mark.parametrize("order", ["speech text", "text speech", "image speech", "speech image"])
@torch.no_grad()
def test_predictions_are_those_of_training_on_the_same_document(pipeline, order, monkeypatch) -> None:
    """Of a packed row, whose pictures are clean, or noised to a known timestep where they are painted."""
    tokenizer, model, time = pipeline.text_tokenizer, pipeline.transformer, 0.6
    (span,), (latents,) = (
        [media.content for media in own] for own in (pipeline.encode_audio([tone()]), pipeline._encode([picture()]))
    )
    items = {TEXT: Text(["a red apple"]), "speech": MediaItem("speech", 0), "image": MediaItem("image", 0)}
    first, last = order.split()
    encoded = {"speech": Codes([span]), "image": Latents(tuple(latents.shape))}
    spoken = Spoken([[items[first], items[last]]])
    spoken.media = {name: spoken.media[name] for name in encoded}
    source = Source(spoken, 1.0, encoded)
    slots = {"text": 60, "image": 2, "speech": 2 * len(span)}
    packer = Packer(
        Sources([source], {"image": [tuple(latents.shape)]}),
        tokenizer,
        DataConfig(slots=slots),
        model.architecture,
        num_lanes=1,
        seed=0,
        timesteps_from_uniform=lambda uniform: uniform,
    )
    batch = packer.rows([0], 0, packer.initial_state()[None])[0].batch
    noisy = torch.randn(latents.shape) if last == "image" else latents
    timesteps = torch.full((1, 2), time if last == "image" else 0.0)
    # Without labels it gives predictions in place of losses.
    inputs: dict[str, Any] = {name: TokenInput(batch.inputs[name].ids) for name in (TEXT, "speech")}
    inputs["image"] = LatentInput(noisy.expand(1, 2, *latents.shape), timesteps)
    trained = {name: given[0] for name, given in model(inputs, batch.slots).predictions.items()}
    assert int(batch.slots.document_ids.max()) > 0

    given = {TEXT: "a red apple", "speech": tone(), "image": picture()}[first]
    if last == "image":
        seen = []
        monkeypatch.setattr(
            pipeline,
            "_denoise",
            lambda predict, noise, *_, **__: seen.append(predict(noisy[None], torch.tensor(time))) or noise,
        )
        pipeline(given, guidance_scale=1.0, output_type="latent")
        assert trained["image"][0].abs().max() > 0.1
        torch.testing.assert_close(seen[0][0], trained["image"][0], rtol=0, atol=1e-5)
        return
    # What it writes is what the document holds.
    target = [*tokenizer.encode("a red apple"), tokenizer.eos_id] if last == TEXT else span[1:]
    seen, following = [], iter(target)
    monkeypatch.setattr(
        session, "choose_tokens", lambda logits, *_: seen.append(logits[0]) or torch.tensor([next(following)])
    )
    if last == TEXT:
        assert pipeline.transcribe(given, max_new_tokens=len(target)) == ["a red apple"]
        begin = inputs[TEXT].ids[0].tolist().index(tokenizer.end_ids["speech"])
    else:
        pipeline.speak(given, max_seconds=(len(target) + 0.5) / CODES_PER_SECOND, guidance_scale=1.0)
        begin = inputs["speech"].ids[0].tolist().index(START)
    expected = trained[last][begin : begin + len(target)]
    assert batch.inputs[last].labels[0, begin : begin + len(target)].tolist() == target
    for logits, other in zip(seen, expected, strict=True):
        allowed = logits.isfinite()
        assert allowed.sum() > 10
        torch.testing.assert_close(logits[allowed], other[allowed], rtol=0, atol=1e-5)


def test_audio_of_any_rate_is_read_at_that_of_the_codec(pipeline) -> None:
    fast = tone(rate=8000)
    (media,) = pipeline.encode_audio([fast])
    samples = torch.from_numpy(resample(fast, RATE))
    assert media.content == [START, *AudioCodes(pipeline.audio_tokenizer).encode([samples])[0].tolist(), END]
    assert media.modality == "speech"


def test_documents_hold_audio_and_end_with_it(pipeline) -> None:
    settings = {"max_new_tokens": 7, "guidance_scale": 1.0}
    (audio,) = pipeline.generate([["sun"]], "speech", temperature=1.0, generator=seeds(3), **settings)
    (same_audio,) = pipeline.speak("sun", max_seconds=0.07, guidance_scale=1.0, generator=seeds(3))
    assert same([audio], [same_audio])
    assert pipeline.generate([[tone()]], TEXT) == pipeline.transcribe(tone())
    beginnings = pipeline.transcribe([tone(), tone()], ["sun", "an octopus"])
    assert beginnings == pipeline.generate([[tone(), "sun"], [tone(), "an octopus"]], TEXT)
    assert beginnings != pipeline.generate([["sun", tone()], ["an octopus", tone()]], TEXT)
    (painted,) = pipeline.generate([[tone()]], "image", generator=seeds(1))
    assert np.array_equal(painted, pipeline(tone(), generator=seeds(1)).images[0])
    assert isinstance(pipeline.generate([[tone(), "sun", picture()]], "speech", max_new_tokens=3)[0], Audio)
