"""Sampling with more than text and images: codes with a tower of their own, and a second kind of latents."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ListTexts
from test_sampling import CPU, LATENT_SHAPE, forward_document, greedy_uncached, swap_rows_of_the_head, tiny_model
from test_sampling_states import compare

from transfusion_mot.config import TEXT, DataConfig, ModalityConfig, TowerConfig
from transfusion_mot.data.layout import LatentSpan, Media, TokenRun, lay_out
from transfusion_mot.data.mixture import Source, Sources
from transfusion_mot.data.packing import Packer
from transfusion_mot.data.sources.base import MediaItem, Text
from transfusion_mot.data.tokenizer import TextTokenizer, train_tokenizer
from transfusion_mot.models import mot
from transfusion_mot.models.inputs import LatentInput
from transfusion_mot.models.transfusion import TransfusionMoT
from transfusion_mot.sampling.decoding import Decoding
from transfusion_mot.sampling.guidance import Guidance
from transfusion_mot.sampling.sampler import AUTO, Making, OpenDocument, Sampler
from transfusion_mot.sampling.session import Session
from transfusion_mot.sampling.workspace import Workspace

CODEBOOK = 19
START, END = CODEBOOK, CODEBOOK + 1
MOTION_SHAPE = (2, 3, 2)
SIZES = {"image": LATENT_SHAPE[0], "speech": CODEBOOK + 2, "motion": MOTION_SHAPE[0]}
NUM_SLOTS = {"image": 4, "motion": 6}
SHAPES = {"image": LATENT_SHAPE, "motion": MOTION_SHAPE}


def modalities(text: str, image: str, speech: str, motion: str) -> dict[str, Any]:
    """By their towers."""
    return {
        "modalities": {
            "text": ModalityConfig(text),
            "image": ModalityConfig(image, "diffusion"),
            "speech": ModalityConfig(speech),
            "motion": ModalityConfig(motion, "diffusion", attention="causal", patch_size=1),
        }
    }


ARCHITECTURES = {
    "mot": {
        "towers": {"text": TowerConfig(32, 48), "image": TowerConfig(40, 32), "speech": TowerConfig(24, 56)},
        **modalities("text", "image", "speech", "image"),
    },
    "mot 1d, partly untied": {
        "towers": {"text": TowerConfig(32, 48), "rest": TowerConfig(32, 48)},
        "untied": ["norm", "ffn"],
        "rope": "1d",
        "num_kv_heads": 2,
        **modalities("text", "rest", "text", "rest"),
    },
    "dense": {"towers": {"all": TowerConfig(32, 48)}, **modalities("all", "all", "all", "all")},
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return train_tokenizer(["a red apple", "an octopus", "sun"], 290, (TEXT, *SIZES))


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request, tokenizer) -> TransfusionMoT:
    return tiny_model(tokenizer.vocab_size, SIZES, **ARCHITECTURES[request.param])


def latents(name: str) -> Media:
    return Media(name, torch.randn(SHAPES[name], dtype=torch.float64))


def codes(*numbers: int) -> Media:
    return Media("speech", [START, *numbers, END])


def documents() -> list[list[str | Media]]:
    """Every modality before every other one, and no modality."""
    return [
        ["a red apple", codes(3, 1, 4, 1, 5), "sun"],
        [latents("image"), codes(9, 2), latents("motion")],
        [latents("motion"), "an octopus that holds", latents("image")],
        [],
    ]


def segments_of(tokenizer: TextTokenizer, items: Sequence[str | Media]) -> list[list[int] | Media]:
    """A document in reading order, spelt out by hand; it ends with text."""
    segments: list[Any] = [[tokenizer.bos_id]]
    for item in items:
        if isinstance(item, str):
            segments[-1] = segments[-1] + tokenizer.encode(item)
        else:
            segments[-1] = [*segments[-1], tokenizer.begin_ids[item.modality]]
            segments += [item, [tokenizer.end_ids[item.modality]]]
    return segments


def begun(tokenizer: TextTokenizer, segments: list[Any], name: str) -> list[Any]:
    """Followed by the begin token of a modality."""
    return [*segments[:-1], [*segments[-1], tokenizer.begin_ids[name]]]


def greedy_codes(model, contexts, scale: float, most: int, *, is_ragged: bool) -> list[int]:
    """Codes by forwards over whole documents, guided between the contexts => with the end, if one came."""
    written: list[int] = []
    while len(written) < most:
        part = Media("speech", [START, *written, END])
        whole, alone = (forward_document(model, [*context, part])["speech"][0, -1] for context in contexts)
        logits = alone + scale * (whole - alone)
        logits[START] = -math.inf
        if not is_ragged:
            logits[END] = -math.inf
        written.append(int(logits.argmax()))
        if written[-1] == END:
            break
    return written


def go_on(model, tokenizer, given: list[list[str | Media]], target: str, **settings: Any) -> list[list[str | Media]]:
    """What a sampler adds to each document."""
    documents = [OpenDocument(items) for items in given]
    Sampler(model, tokenizer, Workspace(), documents, target=target, device=CPU, **settings).run()
    return [document.added for document in documents]


def writes_codes(most: int, temperature: float = 0.0, *, is_ragged: bool = False, count: int = 1) -> dict[str, Making]:
    decoding = Decoding(most, temperature)
    return {"speech": Making(count, 1 + most, decoding=decoding, is_ragged=is_ragged)}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("scale", [1.0, 2.5])
@torch.no_grad()
def test_denoising_behind_any_modality_equals_whole_documents(model, tokenizer, name, scale) -> None:
    given = documents()

    def denoise(predict, rows):
        # The second step must not see the patches of the first.
        for timestep in (0.9, 0.3):
            noisy = torch.randn(len(given), *SHAPES[name], dtype=torch.float64)
            cached = predict(noisy, torch.tensor(timestep))
            for row, items in enumerate(given):
                contexts = [segments_of(tokenizer, part) for part in (items, ["sun"])]
                whole, alone = (
                    forward_document(model, [*begun(tokenizer, context, name), Media(name, noisy[row])], timestep)[name]
                    for context in contexts
                )
                expected = alone[0, -1] + scale * (whole[0, -1] - alone[0, -1])
                assert expected.abs().max() > 0.1
                torch.testing.assert_close(cached[row], expected, rtol=0, atol=1e-12)
        return noisy

    making = {name: Making(1, NUM_SLOTS[name], denoise)}
    whole = [OpenDocument(items, "sun") for items in given]
    Sampler(
        model, tokenizer, Workspace(), whole, target=name, device=CPU, making=making, guidance=Guidance(scale)
    ).run()
    assert [[item.modality for item in document.added] for document in whole] == [[name]] * 4


@pytest.mark.parametrize("is_ragged", [False, True])
@pytest.mark.parametrize("scale", [1.0, 3.0])
@torch.no_grad()
def test_writing_codes_behind_any_modality_equals_whole_documents(model, tokenizer, scale, is_ragged) -> None:
    given = documents()
    contexts = [[begun(tokenizer, segments_of(tokenizer, part), "speech") for part in (items, [])] for items in given]
    # What the first would write third is now the end, so that spans end at different times.
    third = greedy_codes(model, contexts[0], scale, 3, is_ragged=False)[-1]
    model = swap_rows_of_the_head(model, third, END, "speech")
    expected = [greedy_codes(model, pair, scale, 6, is_ragged=is_ragged) for pair in contexts]
    lengths = {len(ids) for ids in expected}
    assert (len(lengths) > 1 and min(lengths) < 6) if is_ragged else lengths == {6}
    making = writes_codes(6, is_ragged=is_ragged)
    added = go_on(model, tokenizer, given, "speech", making=making, guidance=Guidance(scale))
    assert [[item.content for item in items] for items in added] == [
        [[START, *(ids[:-1] if ids[-1] == END else ids), END]] for ids in expected
    ]


@torch.no_grad()
def test_text_behind_any_modality_equals_whole_documents(model, tokenizer) -> None:
    given = documents()
    expected = [
        tokenizer.decode(greedy_uncached(model, tokenizer, segments_of(tokenizer, items), 6)) for items in given
    ]
    added = go_on(model, tokenizer, given, TEXT, decoding=Decoding(6))
    assert ["".join(items) for items in added] == expected


def expected_document(model, tokenizer, items, noises, *, scale: float, tokens: int, most_codes: int):
    """A generated document by forwards over whole documents: at most two images and two speech items."""
    added: list[str | Media] = []
    left = {"image": 2, "speech": 2}
    noises = list(noises)
    segments = segments_of(tokenizer, items)
    while tokens:
        may_begin = [name for name, count in left.items() if count]
        ids = greedy_uncached(model, tokenizer, segments, tokens, may_begin)
        tokens -= len(ids)
        added += [text] if (text := tokenizer.decode(ids)) else []
        name = next((name for name in may_begin if ids[-1] == tokenizer.begin_ids[name]), None)
        if name is None:
            break
        left[name] -= 1
        segments = [*segments[:-1], segments[-1] + ids]
        contexts = segments, begun(tokenizer, [[tokenizer.bos_id]], name)
        if name == "speech":
            written = greedy_codes(model, contexts, scale, most_codes, is_ragged=True)
            media = codes(*(code for code in written if code != END))
        else:
            noise = Media(name, noises.pop(0))
            whole, alone = (forward_document(model, [*context, noise], 0.5)[name][0, -1] for context in contexts)
            media = Media(name, alone + scale * (whole - alone))
        added.append(media)
        segments = [*segments, media, [tokenizer.end_ids[name]]]
    return added


@pytest.mark.parametrize("scale", [1.0, 3.0])
@torch.no_grad()
def test_documents_that_go_on_by_themselves_equal_whole_documents(model, tokenizer, scale) -> None:
    """Rows that write text, write codes and denoise at different times, and not equally often."""
    given = documents()
    noises = torch.randn(len(given), 2, *LATENT_SHAPE, dtype=torch.float64)
    starts = [segments_of(tokenizer, items) for items in given]
    budget = {"scale": scale, "tokens": 12, "most_codes": 3}
    favoured = [tokenizer.begin_ids["speech"], tokenizer.begin_ids["image"], tokenizer.eos_id]
    # Other rows of the head in turn begin media or end the document.
    for chosen in torch.randint(20, tokenizer.vocab_size, (30, 3), generator=torch.Generator().manual_seed(0)).tolist():
        changed = model
        soon = [greedy_uncached(model, tokenizer, start, 9, ["speech", "image"]) for start in starts]
        for token, number in zip(favoured, chosen, strict=True):
            ids = soon[number % 4]
            changed = swap_rows_of_the_head(changed, token, ids[number % len(ids)])
        expected = [
            expected_document(changed, tokenizer, items, noise, **budget)
            for items, noise in zip(given, noises, strict=True)
        ]
        kinds = [[item.modality if isinstance(item, Media) else TEXT for item in items] for items in expected]
        # All phases, in another order in each document, and text behind both kinds of media.
        pairs = {pair for of_one in kinds for pair in itertools.pairwise(of_one)}
        if {("speech", TEXT), ("image", TEXT)} <= pairs and len({tuple(of_one) for of_one in kinds}) > 2:
            break
    else:
        pytest.fail("no document has all phases")
    model = changed
    whole = [OpenDocument(items) for items in given]

    def denoise(predict, rows):
        painted = [sum(getattr(item, "modality", None) == "image" for item in whole[row].added) for row in rows]
        noisy = torch.stack([noises[row, number] for row, number in zip(rows, painted, strict=True)])
        return predict(noisy, torch.tensor(0.5))

    Sampler(
        model,
        tokenizer,
        Workspace(),
        whole,
        target=AUTO,
        device=CPU,
        decoding=Decoding(12),
        making={"image": Making(2, NUM_SLOTS["image"], denoise), **writes_codes(3, is_ragged=True, count=2)},
        guidance=Guidance(scale),
    ).run()
    assert [
        [item.modality if isinstance(item, Media) else TEXT for item in document.added] for document in whole
    ] == kinds
    for document, items in zip(whole, expected, strict=True):
        for item, other in zip(document.added, items, strict=True):
            if isinstance(item, Media) and isinstance(item.content, torch.Tensor):
                torch.testing.assert_close(item.content, other.content, rtol=0, atol=1e-11)
            else:
                assert item == other


def test_codes_depend_on_their_own_generator_alone(model, tokenizer) -> None:
    given = documents()

    def written(rows: list[int], seeds: list[int]) -> list[list[str | Media]]:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        settings = {"making": writes_codes(7, 1.0), "guidance": Guidance(2.0), "generators": generators}
        return go_on(model, tokenizer, [given[row] for row in rows], "speech", **settings)

    together = written([0, 1, 2, 3], [3, 4, 5, 6])
    assert together == [written([row], [3 + row])[0] for row in range(4)]
    assert written([3], [1]) != written([3], [2])
    assert all(len(items[0].content) == 9 and set(items[0].content[1:-1]) <= set(range(CODEBOOK)) for items in together)


class Spoken:
    """Documents in memory with speech and images; their codes and latents are given."""

    is_paired = False
    modalities = (TEXT, "speech", "image")

    def __init__(self, items: list[list[Text | MediaItem]]) -> None:
        self.items, self.name, self.documents_fingerprint, self.skipped = items, "spoken", "", {}
        self.media = {name: SimpleNamespace(buckets=np.zeros(9, dtype=np.int16)) for name in SIZES}

    def __len__(self) -> int:
        return len(self.items)

    def document(self, index: int) -> list[Text | MediaItem]:
        return self.items[index]


@dataclasses.dataclass
class Codes:
    spans: list[list[int]]
    kind: str = "codes"

    def __post_init__(self) -> None:
        self.readable, self.skipped = np.ones(len(self.spans), dtype=np.bool_), {}

    def span(self, index: int, flipped: bool = False) -> list[int]:
        return self.spans[index]


@dataclasses.dataclass
class Latents:
    shape: tuple[int, ...]
    kind: str = "latents"

    def __post_init__(self) -> None:
        self.readable, self.skipped = np.ones(9, dtype=np.bool_), {}

    def posterior(self, index: int, flipped: bool = False) -> tuple[np.ndarray, np.ndarray]:
        mean = np.random.default_rng(index).standard_normal(self.shape).astype(np.float16)
        return mean, np.zeros_like(mean)


@torch.no_grad()
def test_what_is_conditioned_on_is_what_training_sees(model, tokenizer, monkeypatch) -> None:
    """Keys and values of packed rows, in all layers, with the images clean."""
    spans = [[START, *range(number + 1), END] for number in range(3)]
    items = [
        [Text(["a red apple"]), MediaItem("speech", 0), MediaItem("image", 0), Text(["sun"])],
        [MediaItem("image", 1), MediaItem("speech", 1), Text(["an octopus"])],
        [Text(["sun"]), MediaItem("motion", 2), MediaItem("speech", 2)],
    ]
    encoded = {"speech": Codes(spans), "image": Latents(LATENT_SHAPE), "motion": Latents(MOTION_SHAPE)}
    sources = Sources(
        [Source(Spoken(items), 1.0, encoded), Source(ListTexts(["an apple"]), 1.0)],
        {name: [shape] for name, shape in SHAPES.items()},
    )
    data = DataConfig(slots={"text": 60, "image": 3, "speech": 16, "motion": 2})
    settings = {"num_lanes": 1, "seed": 0, "timesteps_from_uniform": lambda uniform: uniform}
    packer = Packer(sources, tokenizer, data, model.architecture, **settings)
    batch = packer.rows([0], 0, packer.initial_state()[None])[0].batch
    trained = []
    attend = mot.joint_attention
    monkeypatch.setattr(
        mot, "joint_attention", lambda q, k, v, mask: trained.append((k[0], v[0])) or attend(q, k, v, mask)
    )
    inputs = {
        name: LatentInput(given.latents.double(), torch.zeros_like(given.timesteps).double())
        if isinstance(given, LatentInput)
        else given
        for name, given in batch.inputs.items()
    }
    model(inputs, batch.slots)

    # Slots of each document in reading order, and what is in them by modality.
    owners, order = batch.slots.document_ids[0], batch.slots.order[0]
    places = [
        sorted(torch.nonzero(owners == number)[:, 0].tolist(), key=lambda slot: int(order[slot]))
        for number in range(int(owners.max()) + 1)
    ]
    assert len(places) > 2
    held: list[tuple[str, int]] = []
    for name in model.architecture.stream_order:
        held += [(name, index) for index in range(model.num_slots(name, inputs[name]))]
    session = Session(model, Workspace(), rows=len(places), capacity=60, device=CPU)
    seen = set()
    for row, slots in enumerate(places):
        shown: set[tuple[str, int]] = set()
        for slot in slots:
            name, index = held[slot]
            given = inputs[name]
            seen.add(name)
            if not isinstance(given, LatentInput):
                session.feed(row, TokenRun(name, [int(given.ids[0, index])], []))
            elif (name, index // NUM_SLOTS[name]) not in shown:
                shown.add((name, index // NUM_SLOTS[name]))
                session.feed(row, LatentSpan(Media(name, given.latents[0, index // NUM_SLOTS[name]]), is_copy=False))
    assert seen == {TEXT, *SIZES}
    session.read(list(range(len(places))))
    compare(session, trained, places)


def test_the_sampler_lays_out_what_training_does(tokenizer) -> None:
    """By the same function, the only one that inserts delimiters."""
    items = documents()[0]
    segments = [[tokenizer.bos_id], *(tokenizer.encode(item) if isinstance(item, str) else item for item in items)]
    flat = [part.ids for part in lay_out(segments, tokenizer)]
    spelt = segments_of(tokenizer, items)
    assert flat == [spelt[0], spelt[1].content[:-1], spelt[2]]
