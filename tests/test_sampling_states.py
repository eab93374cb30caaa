"""The sampler conditions on the same hidden states as training: the same documents, packed into rows there."""

import pytest
import torch
from conftest import data_config, documents_of, numbered_images, sources_of
from test_packing import read_row
from test_sampling import CAUSAL_IMAGES, LATENT_CHANNELS, tiny_model

from transfusion_mot.config import DataConfig
from transfusion_mot.data.batch import Batch
from transfusion_mot.data.layout import LatentSpan, Media, TokenRun
from transfusion_mot.data.mixture import Sources
from transfusion_mot.data.packing import Packer
from transfusion_mot.data.tokenizer import TextTokenizer
from transfusion_mot.diffusion import Diffusion
from transfusion_mot.losses import IGNORE_INDEX
from transfusion_mot.models import mot
from transfusion_mot.models.inputs import LatentInput
from transfusion_mot.models.transfusion import TransfusionMoT
from transfusion_mot.sampling.session import Session
from transfusion_mot.sampling.workspace import Workspace
from transfusion_mot.schedulers import make_scheduler

TEXT_SLOTS = 64
# Image first, image last, images side by side, text alone; of different lengths.
DOCUMENTS = [["a red apple", 0, "sun"], [1, "an octopus"], [2, 3, "x"], ["ab"]]


def one_row(
    model: TransfusionMoT, sources: Sources, tokenizer: TextTokenizer, data: DataConfig, diffusion: Diffusion
) -> Batch:
    packer = Packer(
        sources,
        tokenizer,
        data,
        model.architecture,
        num_lanes=1,
        seed=0,
        timesteps_from_uniform=diffusion.timesteps_from_uniform,
    )
    return packer.rows([0], 0, packer.initial_state()[None])[0].batch


def text_of(token: int) -> TokenRun:
    return TokenRun("text", [token], [IGNORE_INDEX])


def clean(latents: torch.Tensor) -> LatentSpan:
    return LatentSpan(Media("image", latents), is_copy=False)


@pytest.mark.parametrize("context", ["clean", "noised as in training"])
@pytest.mark.parametrize("architecture", [{}, {"rope": "1d", "num_kv_heads": 2}, CAUSAL_IMAGES])
@torch.no_grad()
def test_cached_states_are_those_of_training(byte_tokenizer, monkeypatch, architecture, context):
    model = tiny_model(byte_tokenizer.vocab_size, **architecture)
    diffusion = Diffusion(make_scheduler("FlowMatchEulerDiscreteScheduler", {}))
    batch = one_row(model, sources_of(documents_of(DOCUMENTS)), byte_tokenizer, data_config(TEXT_SLOTS, 4), diffusion)
    text, images = batch.inputs["text"], batch.inputs["image"]
    latents = torch.randn(1, 4, LATENT_CHANNELS, 4, 4, dtype=torch.float64)
    timesteps = torch.zeros(1, 4) if context == "clean" else images.timesteps
    timesteps = timesteps.double()
    noisy_latents = diffusion.add_noise(latents, images.noise.double(), timesteps)

    # Keys and values [B, M, S, H] of each layer, as they enter attention in training.
    trained = []
    attend = mot.joint_attention
    monkeypatch.setattr(
        mot, "joint_attention", lambda q, k, v, mask: trained.append((k[0], v[0])) or attend(q, k, v, mask)
    )
    model({"text": text, "image": LatentInput(noisy_latents, timesteps)}, batch.slots)

    documents = read_row(batch, TEXT_SLOTS)
    assert sum(span is not None for slots in documents for _, span, _ in slots) == 4 * 4
    assert len(documents) > 2
    session = Session(model, Workspace(), rows=len(documents), capacity=TEXT_SLOTS + 16, device=torch.device("cpu"))
    for row, slots in enumerate(documents):
        seen = []
        for slot, span, _ in slots:
            if span is None:
                session.feed(row, text_of(int(text.ids[0, slot])))
            elif span not in seen:
                seen.append(span)
                if context == "clean":
                    session.feed(row, clean(latents[0, span]))
                else:
                    session.read([row])
                    session.read_latents("image", [row], noisy_latents[:, span], timestep=float(timesteps[0, span]))
    session.read(list(range(len(documents))))
    compare(session, trained, [[slot for slot, _, _ in slots] for slots in documents])


def compare(session: Session, trained: list[tuple[torch.Tensor, torch.Tensor]], documents: list[list[int]]) -> None:
    """Keys and values of the cache with those of the slots of documents in a row, in all layers."""
    for layer, (keys, values) in enumerate(trained):
        for row, places in enumerate(documents):
            for cached, expected in ((session.cache.keys, keys), (session.cache.values, values)):
                held = cached[layer, row, : len(places)]
                torch.testing.assert_close(held, expected[:, places].transpose(0, 1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("architecture", [{}, {"rope": "1d", "num_kv_heads": 2}])
@torch.no_grad()
def test_with_clean_context_states_and_predictions_are_those_of_training(byte_tokenizer, monkeypatch, architecture):
    """Nothing is set for it: rows as they are trained on, with every image at its own timestep."""
    model = tiny_model(byte_tokenizer.vocab_size, **architecture)
    data = data_config(160, 18, image_context="clean", caption_first_prob=0.5)
    diffusion = Diffusion(make_scheduler("FlowMatchEulerDiscreteScheduler", {}))
    sources = sources_of(documents_of(DOCUMENTS), numbered_images(["fox", "moon", "a car"]))
    batch = one_row(model, sources, byte_tokenizer, data, diffusion)
    text, images = batch.inputs["text"], batch.inputs["image"]
    latents = torch.randn(1, 18, LATENT_CHANNELS, 4, 4, dtype=torch.float64)
    latents = torch.where(images.copies[:, :, None, None, None], latents.roll(1, 1), latents)
    timesteps = images.timesteps.double()
    noisy_latents = diffusion.add_noise(latents, images.noise.double(), timesteps)

    trained = []
    attend = mot.joint_attention
    monkeypatch.setattr(
        mot, "joint_attention", lambda q, k, v, mask: trained.append((k[0], v[0])) or attend(q, k, v, mask)
    )
    given = LatentInput(noisy_latents, timesteps, copies=images.copies)
    predictions = model({"text": text, "image": given}, batch.slots).predictions["image"]

    documents = read_row(batch, 160)
    session = Session(model, Workspace(), rows=len(documents), capacity=160, device=torch.device("cpu"))
    places: list[list[int]] = []
    painted, read = 0, 0
    for row, slots in enumerate(documents):
        places.append([])
        shown = None
        for slot, span, _ in slots:
            if span is not None and not images.copies[0, span]:
                if span != shown:
                    session.read([row])
                    predict = session.denoiser("image", [row], noisy_latents[:, span])
                    prediction = predict(noisy_latents[:, span], float(timesteps[0, span]))
                    torch.testing.assert_close(prediction, predictions[:, span], rtol=0, atol=1e-6)
                    assert 0 < timesteps[0, span] <= 1
                    painted += 1
            elif span is None:
                session.feed(row, text_of(int(text.ids[0, slot])))
            elif span != shown:
                session.feed(row, clean(latents[0, span]))
                read += 1
            if span is None or images.copies[0, span]:
                places[-1].append(slot)
            shown = span
        if text.labels[0, slot] == IGNORE_INDEX and int(text.ids[0, slot]) == byte_tokenizer.end_ids["image"]:
            # Behind an image without a copy stands an EOI without a label: nothing goes on from it.
            places[-1].pop()
    assert painted > read > 6
    spans, owners = batch.slots.span_ids[0], batch.slots.document_ids[0]
    assert any(len(set(spans[owners == row].tolist())) == 5 for row in range(len(documents)))
    session.read(list(range(len(documents))))
    compare(session, trained, places)
