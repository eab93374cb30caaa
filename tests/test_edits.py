"""Editing pairs in rows: layout, losses, skipped pairs, flips; and that sampling matches training."""

import dataclasses
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import CHANNELS, ArrayImages, data_config, numbered_images, packer_of, sources_of
from test_packing import check_positions, read_row, rows_of_lane
from test_sampling import LATENT_CHANNELS, tiny_model

from transfusion_mot.config import DataConfig, EditDropoutConfig, RunConfig, SourceConfig, parse_config
from transfusion_mot.data.batch import Batch
from transfusion_mot.data.documents import Document, DocumentReader
from transfusion_mot.data.layout import Media, TokenRun, lay_out
from transfusion_mot.data.mixture import Source, Sources
from transfusion_mot.data.packing import Packer
from transfusion_mot.data.sources.base import MediaItem, Text
from transfusion_mot.data.tokenizer import TextTokenizer
from transfusion_mot.diffusion import Diffusion
from transfusion_mot.errors import UserError
from transfusion_mot.losses import IGNORE_INDEX
from transfusion_mot.models.inputs import LatentInput
from transfusion_mot.sampling.guidance import Guidance
from transfusion_mot.sampling.sampler import Making, OpenDocument, Sampler
from transfusion_mot.sampling.workspace import Workspace
from transfusion_mot.schedulers import make_scheduler
from transfusion_mot.training.step import loss_terms

TEXT_SLOTS = 96
INSTRUCTIONS = ["make it green", "mirror it", "hat", "add a crown"]
PAIRS = [SourceConfig("imagefolder", "pairs", source_image_column="before")]
NOTHING_DROPPED = EditDropoutConfig(0.0, 0.0, 0.0)
CPU = torch.device("cpu")


class ListEdits:
    """Editing pairs in memory: of pair i, image 2 i is the source and image 2 i + 1 the target."""

    is_paired = False

    def __init__(self, instructions: list[str], images: ArrayImages) -> None:
        self.name, self.documents_fingerprint, self.skipped = "edits", str(instructions), {}
        self.instructions, self.media, self.modalities = instructions, images.media, images.modalities

    def __len__(self) -> int:
        return len(self.instructions)

    def document(self, index: int) -> list[Text | MediaItem]:
        before, after = MediaItem("image", 2 * index, is_condition=True), MediaItem("image", 2 * index + 1)
        return [before, Text([self.instructions[index]]), after]


def edits_of(instructions: list[str], images: ArrayImages | None = None) -> Source:
    """A source of pairs; without `images`, the latents of image i are all i."""
    images = images or numbered_images([""] * 2 * len(instructions)).documents
    return Source(ListEdits(instructions, images), 1.0, {"image": images})


def edit_config(**changes: object) -> DataConfig:
    return data_config(**{"text_slots": TEXT_SLOTS, "images_per_row": 6, "sources": PAIRS} | changes)


def make_packer(tokenizer: TextTokenizer, sources: Sources, rope: str = "1d", **data: object) -> Packer:
    draw = Diffusion(make_scheduler("FlowMatchEulerDiscreteScheduler", {})).timesteps_from_uniform
    return packer_of(sources, tokenizer, edit_config(**data), rope=rope, timesteps_from_uniform=draw)


# --- Rows. ---


@pytest.mark.parametrize("rope", ["1d", "3d"])
@pytest.mark.parametrize("image_context", ["noised", "clean"])
def test_rows_of_edits_are_laid_out_as_written_down_here(byte_tokenizer, image_context, rope) -> None:
    sources = sources_of(edits_of(INSTRUCTIONS), numbered_images(["sun", "fox"], first=100))
    packer = make_packer(byte_tokenizer, sources, rope, image_context=image_context, edit_dropout=NOTHING_DROPPED)
    bos, boi, eoi = byte_tokenizer.bos_id, byte_tokenizer.begin_ids["image"], byte_tokenizer.end_ids["image"]
    found = Counter()
    for batch, counts in rows_of_lane(packer, 0, 8):
        text, images = batch.tokens("text"), batch.latents("image")
        assert images.conditions is not None
        assert counts["image_items"] == (images.mask | images.conditions).sum()
        assert not (images.mask & images.conditions).any()
        for document in read_row(batch, TEXT_SLOTS):
            if batch.slots.source_ids[0, document[0][0]] == 1:
                assert not any(images.conditions[0, span] for _, span, _ in document if span is not None)
                continue
            check_positions(document, rope)
            before, after = dict.fromkeys(span for _, span, _ in document if span is not None)
            pair = int(images.latents[0, before, 0, 0, 0]) // 2
            found[pair] += 1
            expected = [bos, boi, *["before"] * 4, eoi, *byte_tokenizer.encode(INSTRUCTIONS[pair]), boi]
            expected += [*["after"] * 4, eoi]
            shown = {before: "before", after: "after"}
            assert [int(text.ids[0, s]) if span is None else shown[span] for s, span, _ in document] == expected
            # The target alone has a loss.
            assert all(text.labels[0, slot] == IGNORE_INDEX for slot, span, _ in document if span is None)
            assert images.mask[0, [before, after]].tolist() == [False, True]
            assert images.conditions[0, [before, after]].tolist() == [True, False]
            assert images.timesteps[0, before] == 0
            assert images.timesteps[0, after] > 0
            assert (images.latents[0, before] == 2 * pair).all()
            assert (images.latents[0, after] == 2 * pair + 1).all()
            if images.copies is not None:
                assert not images.copies[0, [before, after]].any()
            at = batch.at(0.7).latents("image").timesteps[0, [before, after]]
            torch.testing.assert_close(at, torch.tensor([0.0, 0.7]))
    assert len(found) == len(INSTRUCTIONS)


def test_the_loss_is_that_of_the_target_alone(byte_tokenizer) -> None:
    model = tiny_model(byte_tokenizer.vocab_size)
    packer = make_packer(byte_tokenizer, sources_of(edits_of(INSTRUCTIONS)), "3d", edit_dropout=NOTHING_DROPPED)
    batch = packer.rows([0], 0, packer.initial_state()[None])[0].batch
    batch = batch.map(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)
    terms = loss_terms(model, batch)
    images = batch.latents("image")
    noisy = (1 - images.timesteps)[..., None, None, None] * images.latents
    noisy = noisy + images.timesteps[..., None, None, None] * images.noise
    given = {"text": batch.inputs["text"]._replace(labels=None), "image": LatentInput(noisy, images.timesteps)}
    predictions = model(given, batch.slots).predictions["image"]
    expected = ((predictions - (images.noise - images.latents)) ** 2).sum(dim=(2, 3, 4))
    targets = [slot for slot in range(6) if images.mask[0, slot]]
    assert len(targets) == 3
    torch.testing.assert_close(terms["image"].loss.double(), expected[0, targets].sum(), rtol=1e-5, atol=0)
    assert batch.counts().tolist() == [0, 3 * CHANNELS * 16]
    assert terms["text"].loss == 0
    # A condition is read: another one gives another loss.
    other = images.latents.clone()
    other[images.conditions] += 1
    changed = dataclasses.replace(batch, inputs={**batch.inputs, "image": images._replace(latents=other)})
    assert (loss_terms(model, changed)["image"].loss - terms["image"].loss).abs() > 1e-6


def test_a_condition_is_read_without_a_draw_from_the_posterior(byte_tokenizer) -> None:
    mean, std = np.random.default_rng(0).random((2, 8, CHANNELS, 4, 4), dtype=np.float32)
    images = ArrayImages([""] * 8, mean, std)
    packer = make_packer(byte_tokenizer, sources_of(edits_of(INSTRUCTIONS, images)), edit_dropout=NOTHING_DROPPED)
    given = packer.rows([0], 0, packer.initial_state()[None])[0].batch.latents("image")
    nearest = [np.abs(mean - latents.numpy()).max(axis=(1, 2, 3)).min() for latents in given.latents[0]]
    assert [value == 0 for value in nearest] == given.conditions[0].tolist()


@pytest.mark.parametrize("random_flip", [True, False])
def test_both_images_of_a_pair_are_mirrored_or_none(byte_tokenizer, random_flip) -> None:
    source = edits_of(["x"] * 200)
    reader = DocumentReader(byte_tokenizer, edit_config(random_flip=random_flip, edit_dropout=NOTHING_DROPPED))
    flips = Counter()
    for index in range(200):
        document = reader.read(source, index, np.random.default_rng(index))
        before, after = (part.content for part in document.segments if isinstance(part, Media))
        assert before.flipped == after.flipped
        flips[before.flipped] += 1
    assert (60 < flips[True] < 140) if random_flip else not flips[True]


def left_out(document: Document, tokenizer: TextTokenizer) -> str:
    has_source = any(isinstance(part, Media) and part.is_condition for part in document.segments)
    has_text = any(isinstance(part, list) and set(part) - {tokenizer.bos_id} for part in document.segments)
    return {(True, True): "nothing", (True, False): "instruction", (False, True): "source", (False, False): "both"}[
        has_source, has_text
    ]


def test_parts_are_left_out_with_their_chances(byte_tokenizer) -> None:
    source, count = edits_of(["make it green"]), 4000
    chances = {"instruction": 0.2, "source": 0.1, "both": 0.3, "nothing": 0.4}
    dropout = EditDropoutConfig(0.2, 0.1, 0.3)
    reader = DocumentReader(byte_tokenizer, edit_config(edit_dropout=dropout))
    found = Counter(
        left_out(reader.read(source, 0, np.random.default_rng(number)), byte_tokenizer) for number in range(count)
    )
    for what, chance in chances.items():
        assert abs(found[what] / count - chance) < 4 * (chance * (1 - chance) / count) ** 0.5, what
    for what in ("instruction", "source", "both"):
        reader = DocumentReader(byte_tokenizer, edit_config(edit_dropout=replace(NOTHING_DROPPED, **{what: 1.0})))
        documents = [reader.read(source, 0, np.random.default_rng(number)) for number in range(20)]
        assert {left_out(document, byte_tokenizer) for document in documents} == {what}
        # Whatever is left, what is painted is there, at the end.
        assert all(isinstance(document.segments[-1], Media) for document in documents)
        assert not any(document.segments[-1].is_condition for document in documents)


def test_a_pair_with_an_image_that_cannot_be_read_is_dropped_and_counted(byte_tokenizer) -> None:
    images = numbered_images([""] * 8).documents
    images.readable[[1, 4]] = False
    packer = make_packer(byte_tokenizer, sources_of(edits_of(INSTRUCTIONS, images)))
    totals = Counter()
    for _, counts in rows_of_lane(packer, 0, 8):
        totals.update(counts)
    taken, dropped = totals["sources/edits/taken"], totals["sources/edits/dropped_documents"]
    assert dropped == totals["sources/edits/unreadable_items"]
    assert taken / 2 - 2 <= dropped <= taken / 2 + 2


def test_long_instructions_are_cut_and_counted(byte_tokenizer) -> None:
    packer = make_packer(byte_tokenizer, sources_of(edits_of(["x" * 500])), edit_dropout=NOTHING_DROPPED)
    batch, counts = rows_of_lane(packer, 0, 1)[0]
    assert counts["sources/edits/cut_captions"] == 1
    (document,) = read_row(batch, TEXT_SLOTS)
    assert sum(span is None for _, span, _ in document) == TEXT_SLOTS - 1


def test_conditions_of_codes_have_no_labels(byte_tokenizer) -> None:
    start, end = 1000, 1001
    before, after = (Media("image", [start, code, code, end], is_condition=code == 7) for code in (7, 8))
    boi, eoi = byte_tokenizer.begin_ids["image"], byte_tokenizer.end_ids["image"]
    none = IGNORE_INDEX
    assert list(lay_out([[1], before, [2], after], byte_tokenizer, has_token_loss=False)) == [
        TokenRun("text", [1, boi], [none] * 2),
        TokenRun("image", [start, 7, 7], [none] * 3),
        TokenRun("text", [eoi, 2, boi], [none] * 3),
        TokenRun("image", [start, 8, 8], [8, 8, end], is_last=True),
        TokenRun("text", [eoi], [none]),
    ]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["data.slots={text: 64, image: 1}"], "data.slots.image is 1; with editing pairs it must be at least 2"),
        (["data.edit_dropout.source=1.5"], r"data.edit_dropout.source is 1.5; it must be from 0 to 1"),
        (["data.edit_dropout={instruction: 0.5, source: 0.4, both: 0.2}"], "data.edit_dropout.total is 1.1"),
    ],
)
def test_settings_that_no_run_can_have_are_refused(given, message) -> None:
    sources = "data.sources=[{kind: imagefolder, path: pairs, source_image_column: before}]"
    with pytest.raises(UserError, match=message):
        parse_config(RunConfig, [sources, *given], "")


# --- What the model sees when it samples is what it saw in training. ---


@pytest.mark.parametrize("image_context", ["noised", "clean"])
@pytest.mark.parametrize("rope", ["1d", "3d"])
@torch.no_grad()
def test_predictions_for_an_edit_are_those_of_training(byte_tokenizer, rope, image_context) -> None:
    model = tiny_model(byte_tokenizer.vocab_size, rope=rope)
    sources = sources_of(edits_of(INSTRUCTIONS), numbered_images(["sun"], first=100))
    packer = make_packer(
        byte_tokenizer, sources, rope, image_context=image_context, edit_dropout=EditDropoutConfig(0.3, 0.0, 0.3)
    )
    compared = Counter()
    for batch, _ in rows_of_lane(packer, 0, 4):
        compared += compare_with_sampling(model, batch, byte_tokenizer)
    assert len(compared) == 3
    assert compared.total() > 6


def compare_with_sampling(model: torch.nn.Module, batch: Batch, tokenizer: TextTokenizer) -> Counter[str]:
    """Every target of a row, as the row shows it and as a sampler reads the document => how many of which form."""
    text, images = batch.tokens("text"), batch.latents("image")
    slots = images.timesteps.shape[1]
    latents = torch.randn(1, slots, LATENT_CHANNELS, 4, 4, dtype=torch.float64)
    timesteps = images.timesteps.double()
    diffusion = Diffusion(make_scheduler("FlowMatchEulerDiscreteScheduler", {}))
    noisy = diffusion.add_noise(latents, images.noise.double(), timesteps)
    given = LatentInput(noisy, timesteps, copies=images.copies, conditions=images.conditions)
    predictions = model({"text": text._replace(labels=None), "image": given}, batch.slots).predictions["image"]
    compared: Counter[str] = Counter()
    for document in read_row(batch, TEXT_SLOTS):
        if batch.slots.source_ids[0, document[0][0]] == 1:
            continue
        ids = [int(text.ids[0, slot]) for slot, span, _ in document if span is None]
        specials = {tokenizer.bos_id, tokenizer.begin_ids["image"], tokenizer.end_ids["image"]}
        instruction = tokenizer.decode([token for token in ids if token not in specials])
        *before, after = dict.fromkeys(span for _, span, _ in document if span is not None)
        opened = OpenDocument([*(Media("image", latents[0, span]) for span in before), instruction])
        prediction = sampled_prediction(model, tokenizer, opened, noisy[:, after], timesteps[0, after])
        torch.testing.assert_close(prediction, predictions[:, after], rtol=0, atol=1e-6)
        compared[f"{len(before)} before, {'an' if instruction else 'no'} instruction"] += 1
    return compared


def sampled_prediction(
    model: torch.nn.Module,
    tokenizer: TextTokenizer,
    document: OpenDocument,
    noisy: torch.Tensor,
    timestep: torch.Tensor,
    guidance: Guidance | None = None,
) -> torch.Tensor:
    """What the sampler predicts for the next image of a document."""
    predictions: list[torch.Tensor] = []

    def denoise(predict, _):
        predictions.append(predict(noisy, timestep))
        return noisy

    sampler = Sampler(
        model,
        tokenizer,
        Workspace(),
        [document],
        target="image",
        device=CPU,
        making={"image": Making(1, 4, denoise)},
        guidance=guidance,
    )
    sampler.run()
    return predictions[0]


# --- Guidance. ---


@pytest.mark.parametrize(
    ("scale", "image_scale", "branches"), [(2.0, 1.5, 3), (1.0, 1.5, 3), (3.0, 1.0, 2), (1.0, 1.0, 1), (0.0, 2.0, 3)]
)
@torch.no_grad()
def test_guidance_of_edits_is_that_of_three_separate_forwards(byte_tokenizer, scale, image_scale, branches) -> None:
    """InstructPix2Pix, equation 3."""
    model = tiny_model(byte_tokenizer.vocab_size)
    torch.manual_seed(0)
    noisy, picture = torch.randn(2, 1, LATENT_CHANNELS, 4, 4, dtype=torch.float64)
    before, time = Media("image", picture[0]), torch.tensor(0.6)

    def predicted(*given: str | Media, guidance: Guidance | None = None, negative: str = "") -> torch.Tensor:
        opened = OpenDocument(list(given), negative)
        return sampled_prediction(model, byte_tokenizer, opened, noisy, time, guidance)

    for negative in ("", "ugly"):
        whole, source, nothing = predicted(before, "make it green"), predicted(before, negative), predicted(negative)
        expected = nothing + image_scale * (source - nothing) + scale * (whole - source)
        guidance = Guidance(scale, image_scale=image_scale)
        assert guidance.branches == branches
        guided = predicted(before, "make it green", guidance=guidance, negative=negative)
        torch.testing.assert_close(guided, expected, rtol=0, atol=1e-10)
    assert (whole - source).abs().max() > 1e-4
    assert (source - nothing).abs().max() > 1e-4
