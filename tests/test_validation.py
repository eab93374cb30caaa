"""Held-out losses against losses computed document by document."""

import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import CHANNELS, ArrayImages, documents_of, sources_of, texts_of, tiny_config, tiny_model

from transfusion_mot.config import DataConfig, RunConfig, TrainingConfig
from transfusion_mot.data.mixture import Source, Sources
from transfusion_mot.data.online import OnlineEncoder
from transfusion_mot.data.tokenizer import TextTokenizer
from transfusion_mot.diffusion import Diffusion
from transfusion_mot.models.attention import attention_kernel
from transfusion_mot.schedulers import make_scheduler
from transfusion_mot.training.validation import TIMESTEPS, Validation

CAPTIONS = ["red apple", "sun", "an octopus", "fox", "moon", "a car", "star", "x"]
TEXT_SLOTS = 40


def held_out(texts: list[str] | None = None) -> Sources:
    generator = np.random.default_rng(0)
    mean = generator.standard_normal((len(CAPTIONS), CHANNELS, 4, 4)).astype(np.float16)
    images = ArrayImages(CAPTIONS, mean, np.zeros_like(mean))
    return sources_of(Source(images, 1.0, images), *([] if texts is None else [texts_of(texts)]))


def make_validation(
    tokenizer: TextTokenizer,
    sources: Sources,
    documents: int = 8,
    images_per_row: int = 2,
    microbatch: int | None = 3,
    text_slots: int = TEXT_SLOTS,
    image_context: str = "noised",
) -> tuple[Validation, torch.nn.Module]:
    config = RunConfig(
        data=DataConfig(text_slots=text_slots, images_per_row=images_per_row, image_context=image_context),
        model=tiny_config(),
        training=TrainingConfig(num_validation_documents=documents, microbatch_rows=microbatch),
    )
    diffusion = Diffusion(make_scheduler("FlowMatchEulerDiscreteScheduler", {}))
    model = tiny_model(config.model, vocab_size=tokenizer.vocab_size, dtype=torch.float32)
    # The latents are there: nothing is left to encode.
    encoder = OnlineEncoder(None, 1)
    return Validation(sources, tokenizer, config, diffusion, encoder, microbatch or 16), model


@torch.no_grad()
def naive_text_loss(model, tokenizer: TextTokenizer, sources: Sources, caption_first: bool) -> float:
    """Mean cross-entropy of the captions, one document at a time; behind a clean image, or in front of any."""
    total, count = 0.0, 0
    bos, eos, boi, eoi = tokenizer.bos_id, tokenizer.eos_id, tokenizer.boi_id, tokenizer.eoi_id
    for caption, mean in zip(CAPTIONS, sources.sources[0].latents.mean, strict=True):
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
    elements = sources.sources[0].latents.mean.size
    assert losses["diffusion_loss"] == pytest.approx(
        1 + np.square(sources.sources[0].latents.mean.astype(float)).mean(), abs=4.5 * math.sqrt(8 / elements)
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


def choose_as_on_cuda(monkeypatch) -> None:
    """Let validation choose rows as if there were a GPU; the model goes on computing on the CPU."""
    monkeypatch.setattr(
        "transfusion_mot.training.validation.is_compiled_for_shape",
        lambda model, device, length: (
            attention_kernel(model.attention, "cuda", length, 64, torch.bfloat16, on_hopper=False)[0] == "flex"
        ),
    )


@pytest.mark.parametrize("rows_at_once", [3, 16])
def test_batches_filled_up_to_one_shape_give_the_same_losses(
    byte_tokenizer, accelerator, rows_at_once: int, monkeypatch
) -> None:
    validation, model = make_validation(byte_tokenizer, held_out(), microbatch=rows_at_once, text_slots=120)
    plain = validation.losses(model, accelerator)
    by_image = validation.image_losses(model, accelerator, [0.3, 0.7])
    choose_as_on_cuda(monkeypatch)
    batches = list(validation._batches(validation.caption_first, model, accelerator))
    assert {len(batch.text_ids) for batch in batches} == {rows_at_once}
    assert sum(int(batch.image_mask.sum()) for batch in batches) == len(CAPTIONS)
    assert validation.losses(model, accelerator) == pytest.approx(plain, rel=1e-6)
    again = validation.image_losses(model, accelerator, [0.3, 0.7])
    torch.testing.assert_close(again, by_image, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("attention", "text_slots", "is_filled"),
    # Two images of four patches make these rows of 127 and of 128 slots: the block of FlexAttention.
    [("auto", 119, False), ("auto", 120, True), ("flex", 119, True), ("sdpa", 120, False), ("interval", 120, False)],
)
def test_batches_are_filled_up_where_attention_is_compiled_for_their_shape(
    byte_tokenizer, accelerator, attention: str, text_slots: int, is_filled: bool, monkeypatch
) -> None:
    choose_as_on_cuda(monkeypatch)
    validation, model = make_validation(byte_tokenizer, held_out(), text_slots=text_slots)
    model.attention = attention
    batches = list(validation._batches(validation.caption_first, model, accelerator))
    assert [len(batch.text_ids) for batch in batches] == ([3, 3] if is_filled else [3, 1])


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


def test_no_held_out_image_is_counted_twice_where_captions_hardly_fit(byte_tokenizer, accelerator) -> None:
    """One that does not fit is not passed over for others, which belong to other rows."""
    validation, model = make_validation(byte_tokenizer, held_out(), 8, text_slots=18)
    seen = []
    original = model.forward

    def forward(**inputs):
        if (inputs["timesteps"] == TIMESTEPS[0]).all():
            seen.extend(inputs["noisy_latents"][inputs["document_ids"][:, 18::4] >= 0])
        return original(**inputs)

    model.forward = forward
    validation.losses(model, accelerator)
    assert 4 <= len(seen) < 8
    assert len({tuple(latents.flatten().tolist()) for latents in seen}) == len(seen)


def test_every_bucket_is_measured_and_no_image_twice(byte_tokenizer, accelerator) -> None:
    captioned = held_out().sources[0]
    captioned.documents.buckets[:] = [0, 1, 1, 0, 1, 0, 0, 0]
    sources = Sources([captioned], [(CHANNELS, 4, 4)] * 2)
    validation, model = make_validation(byte_tokenizer, sources, documents=100)
    inputs = []
    original = model.forward

    def forward(**given):
        if (given["timesteps"] == 0).all():
            used = given["document_ids"][:, TEXT_SLOTS::4] >= 0
            inputs.append(given["noisy_latents"][used])
        return original(**given)

    model.forward = forward
    losses = validation.losses(model, accelerator)
    seen = Counter(tuple(latents.flatten().tolist()) for latents in torch.cat(inputs))
    # With its caption in front and, for the loss of captions, behind.
    assert set(seen.values()) == {2}
    assert {bucket for bucket, _ in validation.caption_first} == {0, 1}
    assert validation.num_rows == 5 // 2 + 3 // 2
    assert len(seen) == 2 * validation.num_rows
    assert validation.losses(model, accelerator) == losses


def test_documents_without_captions_have_no_caption_loss(byte_tokenizer, accelerator) -> None:
    validation, model = make_validation(byte_tokenizer, sources_of(documents_of([["one", 0, "two", 1], ["three", 2]])))
    losses = validation.losses(model, accelerator)
    assert losses.keys() == {"text_loss", "diffusion_loss", *(f"diffusion_loss/t={t}" for t in TIMESTEPS)}
    assert all(math.isfinite(loss) for loss in losses.values())


def test_caption_loss_is_of_captions_alone(byte_tokenizer, accelerator) -> None:
    """Texts fill the rows in training; they do not belong to the loss of captions behind images."""
    sources = held_out(["some long text without any image " * 3])
    validation, model = make_validation(byte_tokenizer, sources)
    losses = validation.losses(model, accelerator)
    assert losses["caption_loss"] == pytest.approx(naive_text_loss(model, byte_tokenizer, sources, False), rel=1e-4)


def test_with_clean_context_captions_are_read_off_copies_and_all_images_have_a_loss(
    byte_tokenizer, accelerator
) -> None:
    sources = held_out()
    clean, model = make_validation(byte_tokenizer, sources, images_per_row=4, image_context="clean")
    losses = clean.losses(model, accelerator)
    assert losses["caption_loss"] == pytest.approx(naive_text_loss(model, byte_tokenizer, sources, False), rel=1e-4)
    noised, _ = make_validation(byte_tokenizer, sources, images_per_row=4)
    others = noised.losses(model, accelerator)
    # The same images, each with noise of its own place: here every place is the same.
    for name in ("diffusion_loss", *(f"diffusion_loss/t={t}" for t in TIMESTEPS)):
        assert losses[name] == pytest.approx(others[name], rel=1e-4)
    assert [packer.num_lanes for _, packer in clean.image_first] == [4]
    assert [packer.num_lanes for _, packer in clean.caption_first] == [2]


def test_copies_stay_clean_whatever_the_timestep(byte_tokenizer, accelerator) -> None:
    documents = documents_of([["one", 0, "two", 1], [2, "three", 3]])
    validation, model = make_validation(byte_tokenizer, sources_of(documents), images_per_row=8, image_context="clean")
    seen = set()
    original = model.forward

    def forward(**inputs):
        assert inputs["copies"].any()
        assert (inputs["timesteps"][inputs["copies"]] == 0).all()
        seen.update(inputs["timesteps"][~inputs["copies"]].tolist())
        return original(**inputs)

    model.forward = forward
    validation.losses(model, accelerator)
    assert sorted(seen) == pytest.approx([0, *TIMESTEPS])


def test_fewer_held_out_images_than_a_row_has_slots(byte_tokenizer, accelerator) -> None:
    validation, model = make_validation(byte_tokenizer, held_out(), images_per_row=16)
    assert all(math.isfinite(loss) for loss in validation.losses(model, accelerator).values())


def test_texts_alone_have_the_losses_of_one_at_a_time(byte_tokenizer, accelerator) -> None:
    """Where no image is held out, texts are: two of 18 bytes fill a row of 40 slots."""
    texts = [f"a text, number {n:03}" for n in range(8)]
    validation, model = make_validation(byte_tokenizer, sources_of(texts_of(texts)))
    losses = validation.losses(model, accelerator)
    assert losses.keys() == {"text_loss"}
    assert validation.num_rows == 4
    total, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([[byte_tokenizer.bos_id, *byte_tokenizer.encode(text), byte_tokenizer.eos_id]])
        places = torch.arange(ids.shape[1])[None]
        output = model(
            text_ids=ids,
            noisy_latents=None,
            timesteps=None,
            document_ids=torch.zeros_like(ids),
            order=places,
            span_ids=torch.full_like(ids, -1),
            rope_positions=places,
        )
        chances = output.logits[0].log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])
        total, count = total - chances.sum().item(), count + len(chances)
    assert losses["text_loss"] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize(("documents", "rows"), [(2, 1), (4, 2), (100, 20)])
def test_as_many_texts_are_measured_as_a_validation_uses(byte_tokenizer, documents: int, rows: int) -> None:
    sources = sources_of(*(texts_of([f"a text, number {n:03}" for n in range(20)]) for _ in range(2)))
    validation, _ = make_validation(byte_tokenizer, sources, documents)
    assert validation.num_rows == rows
