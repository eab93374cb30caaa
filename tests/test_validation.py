"""Held-out losses against losses computed document by document."""

import math
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import CHANNELS, ArrayImages, data_config, documents_of, sources_of, texts_of, tiny_config, tiny_model

from transfusion_mot.config import DataConfig, ModalityConfig, RunConfig, TowerConfig, TrainingConfig
from transfusion_mot.data.mixture import Source, Sources
from transfusion_mot.data.online import OnlineEncoder
from transfusion_mot.data.sources.base import MediaItem, Text
from transfusion_mot.data.tokenizer import TextTokenizer, train_tokenizer
from transfusion_mot.losses import IGNORE_INDEX
from transfusion_mot.models.attention import attention_kernel
from transfusion_mot.models.inputs import LatentInput, Slots, TokenInput
from transfusion_mot.training.validation import TIMESTEPS, Validation

CAPTIONS = ["red apple", "sun", "an octopus", "fox", "moon", "a car", "star", "x"]
TEXT_SLOTS = 40


def held_out(texts: list[str] | None = None) -> Sources:
    generator = np.random.default_rng(0)
    mean = generator.standard_normal((len(CAPTIONS), CHANNELS, 4, 4)).astype(np.float16)
    images = ArrayImages(CAPTIONS, mean, np.zeros_like(mean))
    return sources_of(Source(images, 1.0, {"image": images}), *([] if texts is None else [texts_of(texts)]))


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
        data=data_config(text_slots, images_per_row, image_context=image_context),
        model=tiny_config(),
        training=TrainingConfig(num_validation_documents=documents, microbatch_rows=microbatch),
    )
    model = tiny_model(config.model, {"text": tokenizer.vocab_size, "image": CHANNELS}, dtype=torch.float32)
    # The latents are there: nothing is left to encode.
    encoder = OnlineEncoder({}, {})
    return Validation(sources, tokenizer, config, encoder=encoder, rows_at_once=microbatch or 16), model


@torch.no_grad()
def naive_text_loss(model, tokenizer: TextTokenizer, sources: Sources, caption_first: bool) -> float:
    """Mean cross-entropy of the captions, one document at a time: after a clean image, or before any image."""
    total, count = 0.0, 0
    bos, eos, boi, eoi = tokenizer.bos_id, tokenizer.eos_id, tokenizer.begin_ids["image"], tokenizer.end_ids["image"]
    for caption, mean in zip(CAPTIONS, sources.sources[0].encoded["image"].mean, strict=True):
        ids = tokenizer.encode(caption)
        before, behind = ([bos, *ids, boi], [eoi, eos]) if caption_first else ([bos, boi], [eoi, *ids, eos])
        text = torch.tensor([before + behind])
        places = [*range(len(before)), *range(len(before) + 4, len(before) + 4 + len(behind))]
        places += range(len(before), len(before) + 4)
        start = len(before)
        rope = [(p,) * 3 for p in range(start)] + [(start + 2 + i,) * 3 for i in range(len(behind))]
        rope += [(start, start + y, start + x) for y in range(2) for x in range(2)]
        latents = torch.from_numpy(mean.astype(np.float32))[None, None]
        output = model(
            {"text": TokenInput(text), "image": LatentInput(latents, torch.zeros(1, 1))},
            Slots(
                document_ids=torch.zeros(1, len(places), dtype=torch.long),
                order=torch.tensor([places]),
                span_ids=torch.tensor([[-1] * text.shape[1] + [0] * 4]),
                rope_positions=torch.tensor([rope if model.architecture.rope == "3d" else places]),
                source_ids=torch.zeros(1, len(places), dtype=torch.int16),
            ),
        )
        chances = output.predictions["text"][0].log_softmax(-1)
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
        torch.nn.init.zeros_(model.modality("image").adapter.get_parameter(name))
    losses = validation.losses(model, accelerator)
    assert losses["text_loss"] == pytest.approx(naive_text_loss(model, byte_tokenizer, sources, True), rel=1e-4)
    _, model = make_validation(byte_tokenizer, sources)
    losses = validation.losses(model, accelerator)
    assert losses["caption_loss"] == pytest.approx(naive_text_loss(model, byte_tokenizer, sources, False), rel=1e-4)


def test_diffusion_losses_of_known_predictions(byte_tokenizer, accelerator) -> None:
    """A model that predicts zero has the mean square of the target, noise less latents, at every timestep."""
    sources = held_out()
    validation, model = make_validation(byte_tokenizer, sources)
    torch.nn.init.zeros_(model.modality("image").adapter.output.weight)
    torch.nn.init.zeros_(model.modality("image").adapter.output.bias)
    losses = validation.losses(model, accelerator)
    per_timestep = [losses[f"image_loss/t={t}"] for t in TIMESTEPS]
    assert per_timestep == pytest.approx([per_timestep[0]] * len(TIMESTEPS), rel=1e-5)
    assert losses["image_loss"] == pytest.approx(sum(per_timestep) / len(per_timestep))
    elements = sources.sources[0].encoded["image"].mean.size
    assert losses["image_loss"] == pytest.approx(
        1 + np.square(sources.sources[0].encoded["image"].mean.astype(float)).mean(), abs=4.5 * math.sqrt(8 / elements)
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
    """Let validation choose rows as if there were a GPU; the model still computes on the CPU."""
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
    by_image = validation.item_losses(model, accelerator, "image", [0.3, 0.7])
    choose_as_on_cuda(monkeypatch)
    batches = list(validation._batches(validation.caption_first, model, accelerator))
    assert {batch.num_rows for batch in batches} == {rows_at_once}
    assert sum(int(batch.latents("image").mask.sum()) for batch in batches) == len(CAPTIONS)
    assert validation.losses(model, accelerator) == pytest.approx(plain, rel=1e-6)
    again = validation.item_losses(model, accelerator, "image", [0.3, 0.7])
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
    assert [batch.num_rows for batch in batches] == ([3, 3] if is_filled else [3, 1])


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
    # Both have some of both kinds of rows, of those with the caption first at every timestep.
    for own in kept[1:]:
        assert (own[:, 0] > 0).all()
        assert (own[1] > 0).all()


@pytest.mark.parametrize(("documents", "rows"), [(8, 4), (4, 2), (5, 2), (100, 4), (1, 1)])
def test_no_held_out_image_is_counted_twice(byte_tokenizer, accelerator, documents: int, rows: int) -> None:
    validation, model = make_validation(byte_tokenizer, held_out(), documents)
    seen = []
    original = model.forward

    def forward(inputs, slots, **options):
        if (inputs["image"].timesteps == TIMESTEPS[0]).all():
            seen.extend(inputs["image"].latents.flatten(0, 1))
        return original(inputs, slots, **options)

    model.forward = forward
    validation.losses(model, accelerator)
    assert len(seen) == 2 * rows, "two images a row"
    assert len({tuple(latents.flatten().tolist()) for latents in seen}) == len(seen)


def test_no_held_out_image_is_counted_twice_where_captions_hardly_fit(byte_tokenizer, accelerator) -> None:
    """One that does not fit is not passed over for others, which belong to other rows."""
    validation, model = make_validation(byte_tokenizer, held_out(), 8, text_slots=18)
    seen = []
    original = model.forward

    def forward(inputs, slots, **options):
        if (inputs["image"].timesteps == TIMESTEPS[0]).all():
            seen.extend(inputs["image"].latents[slots.document_ids[:, 18::4] >= 0])
        return original(inputs, slots, **options)

    model.forward = forward
    validation.losses(model, accelerator)
    assert 4 <= len(seen) < 8
    assert len({tuple(latents.flatten().tolist()) for latents in seen}) == len(seen)


def test_every_bucket_is_measured_and_no_image_twice(byte_tokenizer, accelerator) -> None:
    captioned = held_out().sources[0]
    captioned.documents.buckets[:] = [0, 1, 1, 0, 1, 0, 0, 0]
    sources = Sources([captioned], {"image": [(CHANNELS, 4, 4)] * 2})
    validation, model = make_validation(byte_tokenizer, sources, documents=100)
    found = []
    original = model.forward

    def forward(inputs, slots, **options):
        if (inputs["image"].timesteps == 0).all():
            used = slots.document_ids[:, TEXT_SLOTS::4] >= 0
            found.append(inputs["image"].latents[used])
        return original(inputs, slots, **options)

    model.forward = forward
    losses = validation.losses(model, accelerator)
    seen = Counter(tuple(latents.flatten().tolist()) for latents in torch.cat(found))
    # With its caption in front and, for the loss of captions, behind.
    assert set(seen.values()) == {2}
    assert {bucket for bucket, _ in validation.caption_first} == {0, 1}
    assert validation.num_rows == 5 // 2 + 3 // 2
    assert len(seen) == 2 * validation.num_rows
    assert validation.losses(model, accelerator) == losses


def test_documents_without_captions_have_no_caption_loss(byte_tokenizer, accelerator) -> None:
    validation, model = make_validation(byte_tokenizer, sources_of(documents_of([["one", 0, "two", 1], ["three", 2]])))
    losses = validation.losses(model, accelerator)
    assert losses.keys() == {"text_loss", "image_loss", *(f"image_loss/t={t}" for t in TIMESTEPS)}
    assert all(math.isfinite(loss) for loss in losses.values())


def test_caption_loss_is_of_captions_alone(byte_tokenizer, accelerator) -> None:
    """Texts fill the rows in training; they are not a part of the loss of captions after images."""
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
    for name in ("image_loss", *(f"image_loss/t={t}" for t in TIMESTEPS)):
        assert losses[name] == pytest.approx(others[name], rel=1e-4)
    assert [packer.num_lanes for _, packer in clean.media_first] == [4]
    assert [packer.num_lanes for _, packer in clean.caption_first] == [2]


def test_copies_stay_clean_whatever_the_timestep(byte_tokenizer, accelerator) -> None:
    documents = documents_of([["one", 0, "two", 1], [2, "three", 3]])
    validation, model = make_validation(byte_tokenizer, sources_of(documents), images_per_row=8, image_context="clean")
    seen = set()
    original = model.forward

    def forward(inputs, slots, **options):
        image = inputs["image"]
        assert image.copies.any()
        assert (image.timesteps[image.copies] == 0).all()
        seen.update(image.timesteps[~image.copies].tolist())
        return original(inputs, slots, **options)

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
        slots = Slots(torch.zeros_like(ids), places, torch.full_like(ids, -1), places, torch.zeros_like(ids))
        chances = (
            model({"text": TokenInput(ids)}, slots)
            .predictions["text"][0]
            .log_softmax(-1)[:-1]
            .gather(1, ids[0, 1:, None])
        )
        total, count = total - chances.sum().item(), count + len(chances)
    assert losses["text_loss"] == pytest.approx(total / count, rel=1e-5)


class ListCodes:
    """Captions and the codes of their media in memory; without captions, only codes."""

    kind, skipped, name = "codes", {}, "codes"

    def __init__(self, codes: list[list[int]], captions: list[str] | None = None) -> None:
        self.codes, self.all_captions = codes, captions
        self.is_paired = captions is not None
        self.documents_fingerprint = str(codes)
        self.modalities = ("text", "speech") if captions is not None else ("speech",)
        self.media = {"speech": self}
        self.readable = np.ones(len(codes), dtype=np.bool_)
        self.buckets = np.zeros(len(codes), dtype=np.int16)

    def __len__(self) -> int:
        return len(self.codes)

    def document(self, index: int) -> list[Text | MediaItem]:
        caption = [] if self.all_captions is None else [Text([self.all_captions[index]])]
        return [*caption, MediaItem("speech", index)]

    def span(self, index: int, flipped: bool = False) -> list[int]:
        return [NUM_CODES, *self.codes[index], NUM_CODES + 1]


NUM_CODES, CODES = 10, [[n % 10, 3, (3 * n) % 10, 7, 1][: 3 + n % 3] for n in range(8)]


def codes_validation(tokenizer: TextTokenizer, documents: ListCodes, **data: Any) -> tuple[Validation, torch.nn.Module]:
    towers = {name: TowerConfig(16, 24) for name in ("text", "speech")}
    modalities = {"text": ModalityConfig("text"), "speech": ModalityConfig("speech")}
    config = RunConfig(
        data=DataConfig(slots={"text": TEXT_SLOTS, "speech": 13}, **data),
        model=tiny_config(towers=towers, modalities=modalities),
        training=TrainingConfig(num_validation_documents=8),
    )
    model = tiny_model(config.model, {"text": tokenizer.vocab_size, "speech": NUM_CODES + 2}, dtype=torch.float32)
    sources = Sources([Source(documents, 1.0, {"speech": documents})], {})
    return Validation(sources, tokenizer, config, encoder=OnlineEncoder({}, {}), rows_at_once=2), model


@torch.no_grad()
def naive_losses_of_codes(model, tokenizer: TextTokenizer, before: list[int], codes: list[int], behind: list[int]):
    """(sum of the loss of codes, their number, sum of the loss of the text around them, its number)."""
    text, span = torch.tensor([before + behind]), torch.tensor([[NUM_CODES, *codes]])
    first, length = len(before), span.shape[1]
    order = [*range(first), *range(first + length, first + length + len(behind)), *range(first, first + length)]
    assert model.architecture.stream_order == ["text", "speech"]
    order = torch.tensor([order])
    nothing = torch.full_like(order, -1)
    predictions = model(
        {"text": TokenInput(text), "speech": TokenInput(span)},
        Slots(torch.zeros_like(order), order, nothing, order, torch.zeros_like(order)),
    ).predictions
    following = torch.tensor([*codes, NUM_CODES + 1])
    of_codes = -predictions["speech"][0].log_softmax(-1).gather(1, following[:, None])
    chances = predictions["text"][0].log_softmax(-1)
    of_text = [-chances[place, token] for place, token in enumerate(before[1:])]
    of_text += [-chances[first + place, token] for place, token in enumerate(behind[1:])]
    return of_codes.sum().item(), len(following), torch.stack(of_text).sum().item(), len(of_text)


@pytest.fixture(scope="module")
def speech_tokenizer() -> TextTokenizer:
    return train_tokenizer(["a"], 261, ("text", "speech"))


def test_losses_of_codes_equal_those_of_one_document_at_a_time(speech_tokenizer, accelerator) -> None:
    validation, model = codes_validation(speech_tokenizer, ListCodes(CODES, CAPTIONS))
    losses = validation.losses(model, accelerator)
    assert losses.keys() == {"text_loss", "caption_loss", "speech_loss"}
    begin, end = speech_tokenizer.begin_ids["speech"], speech_tokenizer.end_ids["speech"]
    bos, eos = speech_tokenizer.bos_id, speech_tokenizer.eos_id
    # At most four spans of four tokens and more fit 13 slots.
    assert validation.num_rows == 8 // 3
    measured: dict[bool, list[tuple[float, int, float, int]]] = {True: [], False: []}
    for caption_first, packers in ((True, validation.caption_first), (False, validation.media_first)):
        for batch in validation._batches(packers, model, accelerator):
            assert batch.tokens("speech").labels.ne(IGNORE_INDEX).any()
            for row in range(batch.num_rows):
                for document in range(int(batch.slots.document_ids[row].max()) + 1):
                    member = batch.slots.document_ids[row, TEXT_SLOTS:] == document
                    codes = batch.tokens("speech").ids[row][member].tolist()[1:]
                    caption = speech_tokenizer.encode(CAPTIONS[CODES.index(codes)])
                    before, behind = (
                        ([bos, *caption, begin], [end, eos]) if caption_first else ([bos, begin], [end, *caption, eos])
                    )
                    measured[caption_first].append(
                        naive_losses_of_codes(model, speech_tokenizer, before, codes, behind)
                    )
    spans, num_codes, texts, num_tokens = (sum(values) for values in zip(*measured[True], strict=True))
    assert losses["speech_loss"] == pytest.approx(spans / num_codes, rel=1e-4)
    assert losses["text_loss"] == pytest.approx(texts / num_tokens, rel=1e-4)
    _, _, texts, num_tokens = (sum(values) for values in zip(*measured[False], strict=True))
    assert losses["caption_loss"] == pytest.approx(texts / num_tokens, rel=1e-4)


def test_codes_alone_are_measured_where_there_is_nothing_else(speech_tokenizer, accelerator) -> None:
    validation, model = codes_validation(speech_tokenizer, ListCodes(CODES))
    assert validation.losses(model, accelerator).keys() == {"speech_loss"}
    # All spans, of 4 to 6 tokens and an end that has no label behind it, in rows of 13.
    assert validation.num_rows == sum(len(codes) + 2 for codes in CODES) // 13


@pytest.mark.parametrize(("documents", "rows"), [(2, 1), (4, 2), (100, 20)])
def test_as_many_texts_are_measured_as_a_validation_uses(byte_tokenizer, documents: int, rows: int) -> None:
    sources = sources_of(*(texts_of([f"a text, number {n:03}" for n in range(20)]) for _ in range(2)))
    validation, _ = make_validation(byte_tokenizer, sources, documents)
    assert validation.num_rows == rows
