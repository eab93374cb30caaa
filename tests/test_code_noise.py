"""Noise of codes: which codes are replaced, how many, and that it depends only on lane and step; guidance of one
modality."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_config
from toy_media import START, Media, ToyDocuments, four_modality_tokenizer, source_of, toy_packer

from transfusion_mot.config import TEXT, ModalityConfig, ModelConfig, RunConfig, parse_config
from transfusion_mot.data.batch import Batch
from transfusion_mot.data.mixture import Source
from transfusion_mot.data.packing import Packer
from transfusion_mot.data.row_arrays import CodeNoise
from transfusion_mot.data.sources.base import MediaItem, Text
from transfusion_mot.data.tokenizer import TextTokenizer
from transfusion_mot.errors import UserError
from transfusion_mot.losses import IGNORE_INDEX
from transfusion_mot.models.architecture import check_architecture

# Nearly every replaced code differs: the codes of toy media are all their index.
PROB, NUM_CODES = 0.9, START
SLOTS = {TEXT: 24, "depth": 2, "image": 2, "speech": 24}


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return four_modality_tokenizer()


def steps(packer: Packer, count: int, lanes: range = range(1)) -> Iterator[Batch]:
    """Rows of the first steps."""
    states = np.tile(packer.initial_state(), (len(lanes), 1))
    for step in range(count):
        rows, states, _ = packer.rows(lanes, step, states)
        yield rows.batch


def noisy_and_clean(
    source: Source, tokenizer: TextTokenizer, count: int, slots: dict[str, int] = SLOTS, **data: Any
) -> list[tuple[Batch, Batch]]:
    """The same rows with and without noise; only codes of speech may differ."""
    noisy, clean = (toy_packer([source], tokenizer, slots, **data) for _ in range(2))
    noisy.code_noise = {"speech": CodeNoise(PROB, NUM_CODES)}
    pairs = list(zip(steps(noisy, count), steps(clean, count), strict=True))
    for with_noise, without in pairs:
        tensors = without.tensors()
        assert with_noise.tensors().keys() == tensors.keys()
        for name, tensor in with_noise.tensors().items():
            assert name == "speech.ids" or torch.equal(tensor, tensors[name]), name
        is_start = tensors["speech.ids"] == START
        assert (with_noise.tokens("speech").ids[is_start] == START).all()
    return pairs


def runs_of(noisy: Batch, clean: Batch) -> list[tuple[int, int, int, int]]:
    """(document, media, codes, changed codes) of every run of codes in a row, whose codes are all the media's index."""
    ids, now = (batch.tokens("speech").ids[0].tolist() for batch in (clean, noisy))
    documents = clean.slots.document_ids[0, -len(ids) :].tolist()
    runs: list[tuple[int, int, int, int]] = []
    for document, code, changed in zip(documents, ids, now, strict=True):
        if document < 0:
            assert code == changed == 0, "padding"
        elif code != START:
            if not runs or runs[-1][:2] != (document, code):
                runs.append((document, code, 0, 0))
            *run, codes, replaced = runs[-1]
            runs[-1] = (*run, codes + 1, replaced + (code != changed))
    return runs


@pytest.mark.parametrize(
    "order",
    ["speech text", "text speech", "image speech", "speech image", "text speech image", "speech"],
)
def test_codes_of_the_last_item_have_noise(tokenizer: TextTokenizer, order: str) -> None:
    documents = [["sun", ("image", 0), ("speech", 11)], ["a fox", ("image", 0), ("speech", 9)]]
    source = source_of("paired", documents, is_paired=True)
    found = 0
    for noisy, clean in noisy_and_clean(source, tokenizer, 8, orders={order: 1.0}, prompt_dropout_prob=0.0):
        for _, _, codes, changed in runs_of(noisy, clean):
            found += 1
            # Nine codes with a chance of 0.1 each to stay.
            assert changed >= codes / 3 if order.endswith("speech") else changed == 0
    assert found > 8


def test_a_dropped_prompt_leaves_a_last_item(tokenizer: TextTokenizer) -> None:
    source = source_of("paired", [["sun", ("speech", 9)]], is_paired=True)
    for first, has_noise in ((1.0, True), (0.0, False)):
        rows = noisy_and_clean(source, tokenizer, 8, caption_first_prob=first, prompt_dropout_prob=1.0)
        changed = [changed for noisy, clean in rows for _, _, _, changed in runs_of(noisy, clean)]
        assert len(changed) > 8
        assert all(number >= 3 if has_noise else number == 0 for number in changed)


def test_in_documents_with_several_media_only_the_last_item_has_noise(tokenizer: TextTokenizer) -> None:
    """Also where a document is cut into pieces: everywhere, between media and text or only EOS, or inside a text."""
    documents: list[list[Any]] = [
        [("speech", 9), "one", ("speech", 8), ("image", 0), "two", ("speech", 10)],
        ["x" * 30, ("speech", 9), "y" * 30],
        [("speech", 9), ("speech", 8)],
        ["x" * 30, ("speech", 10), "y" * 15, ("speech", 7), ("image", 0)],
        ["x" * 13, ("speech", 12)],
    ]
    source = source_of("in order", documents)
    # The last item of each document, from what the source says.
    last = {
        item.index
        for item in (source.documents.document(index)[-1] for index in range(len(documents)))
        if isinstance(item, MediaItem) and item.modality == "speech"
    }
    assert last == {2, 5, 8}
    ends_a_piece = set()
    for text_slots in (16, 17, 24, 64):
        found: set[int] = set()
        for noisy, clean in noisy_and_clean(source, tokenizer, 20, SLOTS | {TEXT: text_slots}):
            text_of = clean.slots.document_ids[0, :text_slots]
            for document, media, codes, changed in runs_of(noisy, clean):
                assert codes >= 7
                assert changed >= codes / 3 if media in last else changed == 0
                found.add(media)
                token, label = (tensor[0][text_of == document][-1].item() for tensor in clean.tokens(TEXT))
                if token == tokenizer.end_ids["speech"]:
                    ends_a_piece.add((media, label))
        assert found == set(range(9))
    # Both a last item whose EOS is in the next row, and one that a text in the next row follows.
    assert (8, tokenizer.eos_id) in ends_a_piece
    assert any(label not in (tokenizer.eos_id, IGNORE_INDEX) for _, label in ends_a_piece)


def test_source_codes_of_edits_are_clean(tokenizer: TextTokenizer) -> None:
    media = {"speech": Media("speech", [9, 8])}
    items = [MediaItem("speech", 0, is_condition=True), Text(["higher"]), MediaItem("speech", 1)]
    source = Source(ToyDocuments("edits", [items], media, is_paired=False), 1.0, dict(media))
    changed: dict[int, list[int]] = {0: [], 1: []}
    for noisy, clean in noisy_and_clean(source, tokenizer, 40):
        for _, number, _, replaced in runs_of(noisy, clean):
            changed[number].append(replaced)
    assert len(changed[0]) > 20
    assert set(changed[0]) == {0}
    assert len(changed[1]) >= 40
    assert min(changed[1]) >= 3


def test_codes_alone_have_noise_in_every_piece(tokenizer: TextTokenizer) -> None:
    captioned = source_of("captioned", [["sun", ("image", 0)]], is_paired=True)
    spoken = source_of("speech", [[("speech", 40)], [("speech", 31)]])
    noisy, clean = (toy_packer([captioned, spoken], tokenizer, SLOTS) for _ in range(2))
    noisy.code_noise = {"speech": CodeNoise(PROB, NUM_CODES)}
    pieces = 0
    for with_noise, without in zip(steps(noisy, 9), steps(clean, 9), strict=True):
        assert torch.equal(with_noise.tokens("speech").labels, without.tokens("speech").labels)
        runs = [run for run in runs_of(with_noise, without) if run[2] > 6]
        pieces += len(runs)
        assert all(replaced >= codes / 3 for _, _, codes, replaced in runs)
    assert pieces >= 9


def test_so_many_codes_are_replaced_by_any_other_and_starts_stay(tokenizer: TextTokenizer) -> None:
    captioned = source_of("captioned", [["sun", ("image", 0)]], is_paired=True)
    spoken = source_of("speech", [[("speech", 999)] for _ in range(16)])
    packers = [toy_packer([captioned, spoken], tokenizer, SLOTS | {"speech": 1000}) for _ in range(2)]
    prob, num_codes = 0.3, 16
    packers[0].code_noise = {"speech": CodeNoise(prob, num_codes)}
    counts, total = torch.zeros(num_codes), 0
    for noisy, clean in zip(*(steps(packer, 40) for packer in packers), strict=True):
        ids, codes = noisy.tokens("speech").ids, clean.tokens("speech").ids
        is_code = codes < num_codes
        assert torch.equal(ids[~is_code], codes[~is_code])
        total += int(is_code.sum())
        counts += torch.bincount(ids[is_code & (ids != codes)], minlength=num_codes)
    # A random code is the same one in one of 16 draws. Six deviations.
    expected = prob * (1 - 1 / num_codes)
    assert total > 39000
    assert counts.sum() / total == pytest.approx(expected, abs=6 * math.sqrt(expected * (1 - expected) / total))
    mean = counts.mean().item()
    assert (counts - mean).abs().max().item() < 6 * math.sqrt(mean)


def test_it_depends_only_on_lane_and_step(tokenizer: TextTokenizer) -> None:
    """So it does not depend on processes and workers; a resumed run has the same noise."""
    source = source_of("paired", [["sun", ("speech", 20)]], is_paired=True)

    def ids(lanes: range, count: int = 2) -> list[torch.Tensor]:
        packer = toy_packer([source], tokenizer, SLOTS, lanes=4, orders={"text speech": 1.0})
        packer.code_noise = {"speech": CodeNoise(PROB, NUM_CODES)}
        return [batch.tokens("speech").ids for batch in steps(packer, count, lanes)]

    together, again = ids(range(4)), ids(range(4))
    apart = [torch.cat(rows) for rows in zip(ids(range(1)), ids(range(1, 4)), strict=True)]
    for one, two, three in zip(together, again, apart, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)
        assert len({str(row.tolist()) for row in one}) == 4, "lanes"
    assert not torch.equal(together[0], together[1]), "steps"


def config_with(name: str, prob: float) -> ModelConfig:
    config = tiny_config()
    modalities = config.modalities | {"speech": ModalityConfig("text")}
    modalities[name].code_noise_prob = prob
    config.modalities = modalities
    return config


def test_where_it_cannot_be_is_refused() -> None:
    check_architecture(config_with("speech", PROB))
    for name in ("text", "image"):
        with pytest.raises(
            UserError, match=rf"model.modalities.{name} has code_noise_prob, which works only for codes"
        ):
            check_architecture(config_with(name, PROB))
    for prob in (1.0, -0.1, float("nan")):
        with pytest.raises(UserError, match=r"speech.code_noise_prob is \S+; it must be at least 0 and below 1"):
            check_architecture(config_with("speech", prob))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["model.modalities.text.guidance_scale=2"],
            "model.modalities.text has guidance_scale, but guidance works only for media",
        ),
        (["model.modalities.image.guidance_scale=-1"], "image.guidance_scale is -1.0; it must be at least 0"),
        (
            ["data.prompt_dropout_prob=0", "diffusion.guidance_scale=1", "model.modalities.image.guidance_scale=2"],
            "image.guidance_scale is 2.0 and data.prompt_dropout_prob is 0",
        ),
    ],
)
def test_guidance_that_a_modality_cannot_have_is_refused(words: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        check_architecture(parse_config(RunConfig, words, "").model)
