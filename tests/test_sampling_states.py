"""What the sampler conditions on is what training sees: states of the same documents, there packed into rows."""

import pytest
import torch
from conftest import documents_of, sources_of
from test_packing import read_row
from test_sampling import LATENT_CHANNELS, tiny_model

from transfusion_mot.config import DataConfig
from transfusion_mot.data.packing import Packer
from transfusion_mot.diffusion import Diffusion, make_scheduler
from transfusion_mot.models import mot
from transfusion_mot.sampling.session import Session
from transfusion_mot.sampling.workspace import Workspace

TEXT_SLOTS = 64
# Image first, image last, images side by side, text alone; of different lengths.
DOCUMENTS = [["a red apple", 0, "sun"], [1, "an octopus"], [2, 3, "x"], ["ab"]]


@pytest.mark.parametrize("context", ["clean", "noised as in training"])
@pytest.mark.parametrize("architecture", [{}, {"rope": "1d", "num_kv_heads": 2}, {"image_attention": "causal"}])
@torch.no_grad()
def test_cached_states_are_those_of_training(byte_tokenizer, monkeypatch, architecture, context):
    model = tiny_model(byte_tokenizer.vocab_size, **architecture)
    rope = model.architecture.rope
    config = DataConfig(text_slots=TEXT_SLOTS, images_per_row=4)
    diffusion = Diffusion(make_scheduler("FlowMatchEulerDiscreteScheduler", {}))
    sources = sources_of(documents_of(DOCUMENTS))
    packer = Packer(sources, byte_tokenizer, config, rope, 2, 1, 0, diffusion.timesteps_from_uniform)
    batch = packer.rows([0], 0, packer.initial_state()[None])[0].batch
    latents = torch.randn(1, 4, LATENT_CHANNELS, 4, 4, dtype=torch.float64)
    timesteps = torch.zeros(1, 4) if context == "clean" else batch.timesteps
    timesteps = timesteps.double()
    noisy_latents = diffusion.add_noise(latents, batch.noise.double(), timesteps)

    # Keys and values [B, M, S, H] of each layer, as they enter attention in training.
    trained = []
    attend = mot.joint_attention
    monkeypatch.setattr(
        mot, "joint_attention", lambda q, k, v, mask: trained.append((k[0], v[0])) or attend(q, k, v, mask)
    )
    ids = {name: getattr(batch, name) for name in ("document_ids", "order", "span_ids", "rope_positions")}
    model(batch.text_ids, noisy_latents, timesteps, **ids)

    documents = read_row(batch, TEXT_SLOTS)
    assert sum(span is not None for slots in documents for _, span, _ in slots) == 4 * 4
    assert len(documents) > 2
    session = Session(model, Workspace(), len(documents), TEXT_SLOTS + 16, torch.device("cpu"))
    for row, slots in enumerate(documents):
        images = []
        for slot, span, _ in slots:
            if span is None:
                session.feed(row, [int(batch.text_ids[0, slot])])
            elif span not in images:
                images.append(span)
                if context == "clean":
                    session.feed(row, latents[0, span])
                else:
                    session.read([row])
                    session.read_images([row], noisy_latents[:, span], float(timesteps[0, span]))
    session.read(list(range(len(documents))))

    for layer, (keys, values) in enumerate(trained):
        for row, slots in enumerate(documents):
            places = [slot for slot, _, _ in slots]
            for cached, expected in ((session.cache.keys, keys), (session.cache.values, values)):
                held = cached[layer, row, : len(places)]
                torch.testing.assert_close(held, expected[:, places].transpose(0, 1), rtol=0, atol=1e-12)
