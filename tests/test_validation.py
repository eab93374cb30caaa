"""Held-out losses against losses computed document by document."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import CHANNELS, ArrayImages, ListTexts, tiny_config, tiny_model

from transfusion_mot.config import DataConfig, RunConfig, TrainingConfig
from transfusion_mot.data.packing import Sources
from transfusion_mot.data.tokenizer import TextTokenizer
from transfusion_mot.diffusion import Diffusion, make_scheduler
from transfusion_mot.training.validation import TIMESTEPS, Validation

CAPTIONS = ["red apple", "sun", "an octopus", "fox", "moon", "a car", "star", "x"]
TEXT_SLOTS = 40


def held_out(texts: list[str] | None = None) -> Sources:
    generator = np.random.default_rng(0)
    mean = generator.standard_normal((len(CAPTIONS), CHANNELS, 4, 4)).astype(np.float16)
    images = ArrayImages(CAPTIONS, mean, np.zeros_like(mean))
    return Sources([images], [1.0], [] if texts is None else [ListTexts(texts)], [] if texts is None else [1.0])


def make_validation(
    tokenizer: TextTokenizer, sources: Sources, documents: int = 8, images_per_row: int = 2, microbatch: int | None = 3
) -> tuple[Validation, torch.nn.Module]:
    config = RunConfig(
        data=DataConfig(text_slots=TEXT_SLOTS, images_per_row=images_per_row),
        model=tiny_config(),
        training=TrainingConfig(num_validation_documents=documents, microbatch_rows=microbatch),
    )
    diffusion = Diffusion(make_scheduler("FlowMatchEulerDiscreteScheduler", {}))
    model = tiny_model(config.model, vocab_size=tokenizer.vocab_size, dtype=torch.float32)
    return Validation(sources, tokenizer, config, diffusion, microbatch or 16), model


@torch.no_grad()
def naive_text_loss(model, tokenizer: TextTokenizer, sources: Sources, caption_first: bool) -> float:
    """Mean cross-entropy of the captions, one document at a time; behind a clean image, or in front of any."""
    total, count = 0.0, 0
    bos, eos, boi, eoi = tokenizer.bos_id, tokenizer.eos_id, tokenizer.boi_id, tokenizer.eoi_id
    for caption, mean in zip(CAPTIONS, sources.images[0].mean, strict=True):
        ids = tokenizer.encode(caption)
        before, behind = ([bos, *ids, boi], [eoi, eos]) if caption_first else ([bos, boi], [eoi, *ids, eos])
        text = torch.tensor([before + behind])
        places = [*range(len(before)), *range(len(before) + 4, len(before) + 4 + len(behind))]
        places += range(len(before), len(before) + 4)
        start = len(before)
        rope = [(p,) * 3 for p in range(start)] + [(start + 2 + i,) * 3 for i in range(len(behind))]
        rope += [(start, start + y, start + x) for y in range(2) for x in range(2)]
        output = model(
            text_ids=text,
            noisy_latents=torch.from_numpy(mean.astype(np.float32))[None, None],
            timesteps=torch.zeros(1, 1),
            document_ids=torch.zeros(1, len(places), dtype=torch.long),
            order=torch.tensor([places]),
            span_ids=torch.tensor([[-1] * text.shape[1] + [0] * 4]),
            rope_positions=torch.tensor([rope if model.architecture.rope == "3d" else places]),
        )
        chances = output.logits[0].log_softmax(-1)
        for part, offset in ((before, 0), (behind, len(before))):
            for i, following in enumerate(part[1:]):
                total -= chances[offset + i, following].item()
                count += 1
    return total / count


def test_text_losses_equal_those_of_one_document_at_a_time(byte_tokenizer, accelerator) -> None:
    sources = held_out()
    validation, model = make_validation(byte_tokenizer, sources)
    # EOI stands behind its image: make it indifferent to how noisy the image is.
    for name in ("input.weight", "timestep.mlp.linear_2.weight"):
        torch.nn.init.zeros_(model.image_adapter.get_parameter(name))
    losses = validation.losses(model, accelerator)
    assert losses["text_loss"] == pytest.approx(naive_text_loss(model, byte_tokenizer, sources, True), rel=1e-4)
    _, model = make_validation(byte_tokenizer, sources)
    losses = validation.losses(model, accelerator)
    assert losses["caption_loss"] == pytest.approx(naive_text_loss(model, byte_tokenizer, sources, False), rel=1e-4)


def test_diffusion_losses_of_known_predictions(byte_tokenizer, accelerator) -> None:
    """A model that predicts zero has the mean square of the target, noise less latents, at every timestep."""
    sources = held_out()
    validation, model = make_validation(byte_tokenizer, sources)
    torch.nn.init.zeros_(model.image_adapter.output.weight)
    torch.nn.init.zeros_(model.image_adapter.output.bias)
    losses = validation.losses(model, accelerator)
    per_timestep = [losses[f"diffusion_loss/t={t}"] for t in TIMESTEPS]
    assert per_timestep == pytest.approx([per_timestep[0]] * len(TIMESTEPS), rel=1e-5)
    assert losses["diffusion_loss"] == pytest.approx(sum(per_timestep) / len(per_timestep))
    elements = sources.images[0].mean.size
    assert losses["diffusion_loss"] == pytest.approx(
        1 + np.square(sources.images[0].mean.astype(float)).mean(), abs=4.5 * math.sqrt(8 / elements)
    )


def test_losses_do_not_change_from_call_to_call_or_with_the_rows_at_once(byte_tokenizer, accelerator) -> None:
    sources = held_out()
    validation, model = make_validation(byte_tokenizer, sources)
    first = validation.losses(model, accelerator)
    torch.manual_seed(123)
    assert validation.losses(model, accelerator) == first
    other, _ = make_validation(byte_tokenizer, sources, microbatch=None)
    assert other.losses(model, accelerator) == pytest.approx(first, rel=1e-5)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_ranks_share_the_rows(byte_tokenizer, accelerator) -> None:
    """Two ranks, one after the other: their sums together are those of one."""
    sources = held_out()
    validation, model = make_validation(byte_tokenizer, sources, microbatch=1)
    kept: list[torch.Tensor] = []

    def rank(index: int, world_size: int) -> SimpleNamespace:
        def reduce(sums: torch.Tensor, reduction: str) -> torch.Tensor:
            kept.append(sums)
            return sums

        return SimpleNamespace(
            device=torch.device("cpu"),
            process_index=index,
            num_processes=world_size,
            autocast=Accelerator.autocast.__get__(accelerator),
            reduce=reduce,
        )

    for index, world_size in ((0, 1), (0, 2), (1, 2)):
        validation.losses(model, rank(index, world_size))
    torch.testing.assert_close(kept[1] + kept[2], kept[0])
    assert (kept[1][:, 1] > 0).all()
    assert (kept[2][:, 1] > 0).all()


@pytest.mark.parametrize(("documents", "rows"), [(8, 4), (4, 2), (5, 2), (100, 4), (1, 1)])
def test_no_held_out_image_is_counted_twice(byte_tokenizer, accelerator, documents: int, rows: int) -> None:
    validation, model = make_validation(byte_tokenizer, held_out(), documents)
    seen = []
    original = model.forward

    def forward(**inputs):
        if (inputs["timesteps"] == TIMESTEPS[0]).all():
            seen.extend(inputs["noisy_latents"].flatten(0, 1))
        return original(**inputs)

    model.forward = forward
    validation.losses(model, accelerator)
    assert len(seen) == 2 * rows, "two images a row"
    assert len({tuple(latents.flatten().tolist()) for latents in seen}) == len(seen)


def test_caption_loss_is_of_captions_alone(byte_tokenizer, accelerator) -> None:
    """Texts fill the rows in training; they do not belong to the loss of captions behind images."""
    sources = held_out(["some long text without any image " * 3])
    validation, model = make_validation(byte_tokenizer, sources)
    losses = validation.losses(model, accelerator)
    assert losses["caption_loss"] == pytest.approx(naive_text_loss(model, byte_tokenizer, sources, False), rel=1e-4)


def test_fewer_held_out_images_than_a_row_has_slots(byte_tokenizer, accelerator) -> None:
    validation, model = make_validation(byte_tokenizer, held_out(), images_per_row=16)
    assert all(math.isfinite(loss) for loss in validation.losses(model, accelerator).values())
