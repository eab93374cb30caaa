"""Shares of sources: weights, buckets, captions, epochs, padding, and documents that are never drawn."""

import dataclasses
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CHANNELS, data_config, documents_of, numbered_images, packer_of, sources_of, texts_of
from source_files import SIZE, picture, shard, write_tar
from test_packing import read_row

from transfusion_mot.config import DataConfig, SourceConfig
from transfusion_mot.data.batch import Batch
from transfusion_mot.data.mixture import Source, Sources, counter, open_documents, training_texts
from transfusion_mot.data.packing import Packer
from transfusion_mot.data.tokenizer import TextTokenizer
from transfusion_mot.errors import UserError


def make_packer(sources: Sources, tokenizer: TextTokenizer, lanes: int = 1, **data) -> Packer:
    return packer_of(sources, tokenizer, data_config(**data), lanes=lanes)


def read(packer: Packer, steps: int) -> tuple[list[Batch], Counter]:
    """All lanes' rows of every step, and the counters."""
    lanes = range(packer.num_lanes)
    states, batches, totals = np.tile(packer.initial_state(), (len(lanes), 1)), [], Counter()
    for step in range(steps):
        rows, states, counts = packer.rows(lanes, step, states)
        batches.append(rows.batch)
        totals.update(counts)
    return batches, totals


def images_of(batch: Batch) -> list[int]:
    """Numbers of the images of a step."""
    given = batch.latents("image")
    return [int(latents[0, 0, 0]) for latents in given.latents[given.mask]]


def within(count: int, total: int, share: float) -> bool:
    """Whether a count of independent draws is within 4.5 standard deviations."""
    return abs(count - total * share) <= 4.5 * (total * share * (1 - share)) ** 0.5


# --- Weights and epochs. ---


def test_weights_hold_among_all_kinds_of_documents_with_images(byte_tokenizer) -> None:
    sources = sources_of(
        numbered_images(["a caption"] * 7, weight=3.0),
        documents_of([["one", 0, "two", 1], ["three", 2]], weight=1.0),
        numbered_images(["x" * 30] * 50, first=100, weight=2.0),
        texts_of(["some text"]),
    )
    packer = make_packer(sources, byte_tokenizer, lanes=2, text_slots=60, images_per_row=4)
    _, counts = read(packer, 500)
    taken = [counts[counter(name, "taken")] for name in sources.names[:3]]
    assert all(within(count, sum(taken), weight / 6) for count, weight in zip(taken, (3, 1, 2), strict=True))
    assert counts["image_items"] == sum(counts[counter(name, "items")] for name in sources.names)
    assert counts["text_slots"] == sum(counts[counter(name, "tokens")] for name in sources.names)
    epochs = sources.epochs(counts)
    assert [epochs[name] for name in sources.names[:3]] == [taken[0] / 7, taken[1] / 2, taken[2] / 50]


def test_weights_of_texts_do_not_change_the_images(byte_tokenizer) -> None:
    """Text fills the remaining slots, with any weight."""

    def images(weight: float) -> list[list[int]]:
        sources = sources_of(numbered_images(["a caption"] * 7), texts_of(["some text"], weight))
        return [images_of(batch) for batch in read(make_packer(sources, byte_tokenizer), 20)[0]]

    assert images(0.1) == images(10.0)


def test_captions_of_an_image_take_turns_at_random(byte_tokenizer) -> None:
    captions = ["aaa", "bb", "c", "dddd", "eeeee"]
    sources = sources_of(numbered_images(["\n".join(captions)]))
    packer = make_packer(sources, byte_tokenizer, text_slots=40, caption_first_prob=1.0, prompt_dropout_prob=0.0)
    found: Counter[str] = Counter()
    for batch in read(packer, 400)[0]:
        for document in read_row(batch, 40):
            tokens = [int(batch.tokens("text").ids[0, slot]) for slot, span, _ in document if span is None]
            found[byte_tokenizer.decode(tokens)] += 1
    assert found.keys() == set(captions)
    assert all(within(count, found.total(), 1 / 5) for count in found.values())


def test_images_are_mirrored_half_the_time_if_asked_for(byte_tokenizer) -> None:
    source = numbered_images(["a"] * 4)
    source.encoded["image"].mean = np.broadcast_to(np.arange(4, dtype=np.float16), (4, CHANNELS, 4, 4))
    interleaved = documents_of([["a", 0, 1]])
    interleaved.encoded["image"].mean = source.encoded["image"].mean
    for one in (source, interleaved):
        for flips in (False, True):
            packer = make_packer(sources_of(one), byte_tokenizer, random_flip=flips)
            latents = torch.cat([b.latents("image").latents[b.latents("image").mask] for b in read(packer, 200)[0]])
            mirrored = int((latents[:, 0, 0, 0] == 3).sum())
            assert within(mirrored, len(latents), 0.5) if flips else mirrored == 0
            assert ((latents[:, 0, 0, 0] == 3) | (latents[:, 0, 0, 3] == 3)).all()


# --- Buckets. ---


def test_a_step_has_one_bucket_and_all_images_come_equally_often(byte_tokenizer) -> None:
    buckets = [0] * 10 + [1] * 25 + [2] * 5
    sources = Sources(
        [
            numbered_images(["a"] * 40, buckets=buckets, weight=2.0),
            numbered_images(["b"] * 20, first=100, buckets=[0, 1] * 10),
        ],
        {"image": [(CHANNELS, 4, 4)] * 3},
    )
    assert sources.bucket_shares == pytest.approx([(2 * 10 / 40 + 0.5) / 3, (2 * 25 / 40 + 0.5) / 3, 2 * 5 / 40 / 3])
    packer = make_packer(sources, byte_tokenizer, lanes=2, images_per_row=2)
    steps = 1500
    batches, counts = read(packer, steps)
    used = Counter(packer.bucket(step) for step in range(steps))
    assert all(within(used[bucket], steps, share) for bucket, share in enumerate(sources.bucket_shares))
    seen: Counter[int] = Counter()
    bucket_of = {**dict(enumerate(buckets)), **{100 + i: i % 2 for i in range(20)}}
    for step, batch in enumerate(batches):
        images = images_of(batch)
        assert {bucket_of[image] for image in images} == {packer.bucket(step)}
        seen.update(images)
    total = seen.total()
    # A step's four images come together, which spreads the counts twice as far.
    for image, count in seen.items():
        share = (2 / 3) / 40 if image < 100 else (1 / 3) / 20
        assert abs(count - total * share) < 2 * 4.5 * (total * share) ** 0.5
    assert len(seen) == 60
    assert counts[counter(sources.names[0], "documents")] == sum(count for image, count in seen.items() if image < 100)


def test_batches_have_the_shape_of_their_bucket(byte_tokenizer) -> None:
    sources = Sources(
        [numbered_images(["a"] * 4, buckets=[0] * 4), numbered_images(["b"] * 4, first=9, side=8, buckets=[1] * 4)],
        {"image": [(CHANNELS, 4, 4), (CHANNELS, 8, 8)]},
    )
    packer = make_packer(sources, byte_tokenizer, images_per_row=2, text_slots=20)
    shapes = {(batch.latents("image").latents.shape[1:], batch.slots.order.shape[1]) for batch in read(packer, 20)[0]}
    assert shapes == {((2, CHANNELS, 4, 4), 20 + 2 * 4), ((2, CHANNELS, 8, 8), 20 + 2 * 16)}


def test_document_takes_the_bucket_of_its_first_image() -> None:
    """And one without images that of most images."""
    source = documents_of([["a", 0, 1], ["b", 2], ["no image"]])
    source.encoded["image"].buckets[:] = [1, 1, 0]
    sources = Sources([source], {"image": [(CHANNELS, 4, 4)] * 2})
    assert [[sources.pools[pool].items.tolist() for pool in pools] for pools in sources.media_pools] == [
        [[1]],
        [[0, 2]],
    ]


# --- Small data. ---


@pytest.mark.parametrize("images", [1, 2, 5])
def test_data_smaller_than_a_row_is_read_again(byte_tokenizer, images: int) -> None:
    sources = sources_of(numbered_images(["a"] * images), texts_of(["b"]))
    packer = make_packer(sources, byte_tokenizer, lanes=3, text_slots=40, images_per_row=4)
    batches, counts = read(packer, 10)
    assert counts["image_items"] == 3 * 4 * 10
    seen = Counter(image for batch in batches for image in images_of(batch))
    assert all(abs(count - 120 / images) <= 6 for count in seen.values())
    assert counts["pad_slots"] <= 3 * 10


def test_fewer_shards_than_lanes(byte_tokenizer, tmp_path: Path) -> None:
    """Lanes share images, not files: three shards, one of them empty, feed four lanes."""
    for name, numbers in (("a", range(5)), ("b", range(0)), ("c", range(5, 12))):
        write_tar(tmp_path / f"{name}.tar", shard(numbers))
    data = DataConfig(
        sources=[SourceConfig("webdataset", path=str(tmp_path))],
        image_size=SIZE,
        held_out_fraction=0.0,
        cache_dir=str(tmp_path / "cache"),
        latents="online",
        slots={"text": 40, "image": 2},
        lookahead=1,
    )
    sources = Sources(open_documents(data, "train"), {"image": [(CHANNELS, 4, 4)]})
    packer = packer_of(sources, byte_tokenizer, data, lanes=4)
    states = np.tile(packer.initial_state(), (4, 1))
    seen: Counter[int] = Counter()
    for step in range(3):
        rows, states, _ = packer.rows(range(4), step, states)
        seen.update(rows.media["image"][rows.batch.latents("image").mask][:, 0, 0, 0].tolist())
    assert seen == dict.fromkeys(range(12), 2)


# --- Padding. ---


def coco_like_captions(count: int) -> list[str]:
    """As long as those of COCO in a vocabulary of words: 12 tokens on average, few below 9 or above 17."""
    lengths = np.random.default_rng(0).lognormal(math.log(11.8), 0.2, count).round().clip(7, 50).astype(int)
    return ["x" * length for length in lengths]


def pad_fraction(sources: Sources, tokenizer: TextTokenizer, **data) -> float:
    batches, counts = read(make_packer(sources, tokenizer, lanes=2, **data), 60)
    return counts["pad_slots"] / sum(batch.slots.order.numel() for batch in batches)


@pytest.mark.parametrize(("side", "images_per_row"), [(8, 8), (16, 4), (32, 4)])
def test_little_is_left_empty(byte_tokenizer, side: int, images_per_row: int) -> None:
    """With captions of COCO's lengths, and 5 % more text slots than they need on average."""
    captions = coco_like_captions(2000)
    images = numbered_images(captions, side=side)
    # A caption, dropped one time in twelve, and four more tokens.
    average = 4 + (1 - 0.08) * sum(map(len, captions)) / len(captions)
    budget = {"text_slots": round(1.05 * images_per_row * average), "images_per_row": images_per_row}
    assert pad_fraction(sources_of(images, side=side), byte_tokenizer, **budget) < 0.10
    mixed = sources_of(images, texts_of(["some text " * 30, "more"]), side=side)
    assert pad_fraction(mixed, byte_tokenizer, **budget) < 0.02


# --- What never comes, and what is reported. ---


def test_held_out_items_never_appear(byte_tokenizer, tmp_path: Path) -> None:
    write_tar(tmp_path / "images.tar", shard(range(60), caption="[caption {}]"))
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": f"[text {n}]"}) + "\n" for n in range(60)))
    data = DataConfig(
        sources=[
            SourceConfig("webdataset", path=str(tmp_path / "images.tar")),
            SourceConfig("text", path=str(tmp_path / "texts.jsonl")),
        ],
        image_size=SIZE,
        held_out_fraction=0.3,
        cache_dir=str(tmp_path / "cache"),
        latents="online",
        slots={"text": 100, "image": 4},
    )
    read_on_side = {}
    for side in ("train", "held_out"):
        sources = Sources(open_documents(data, side), {"image": [(CHANNELS, 4, 4)]})
        packer = packer_of(sources, byte_tokenizer, data, lanes=2)
        batches, _ = read(packer, 60)
        # A text that was cut comes in two rows.
        words = byte_tokenizer.decode(
            [int(i) for lane in range(2) for batch in batches for i in batch.tokens("text").ids[lane]]
        )
        read_on_side[side] = {f"{part.split(']')[0]}]" for part in words.split("[") if "]" in part}
    everything = {f"{kind} {n}]" for kind in ("caption", "text") for n in range(60)}
    assert read_on_side["train"] | read_on_side["held_out"] == everything
    assert read_on_side["train"] & read_on_side["held_out"] == set()
    assert len(read_on_side["held_out"]) > 20


def test_report_says_what_each_source_gave(byte_tokenizer) -> None:
    sources = sources_of(
        numbered_images(["a", "x" * 99]), numbered_images(["b"]), texts_of(["t" * 10]), texts_of(["u"], 2.0)
    )
    assert sources.names == ["images from 0", "images from 0 #2", "texts", "texts #2"]
    sources.sources[0].encoded["image"].skipped = {"unreadable image": 3}
    _, counts = read(make_packer(sources, byte_tokenizer, text_slots=40), 50)
    header, first, second, third, fourth = sources.report(counts).splitlines()
    assert header.split()[:6] == ["source", "weight", "documents", "tokens", "media", "epochs"]
    documents, tokens, images = (counts[counter("images from 0", what)] for what in ("documents", "tokens", "items"))
    assert first.split()[3:8] == [
        "1",
        *map(str, (documents, tokens, images)),
        f"{counts[counter('images from 0', 'taken')] / 2:.2f}",
    ]
    assert "3 unreadable images" in first
    assert f"{counts[counter('images from 0', 'cut_captions')]} cut captions" in first
    assert second.startswith("images from 0 #2")
    assert second.endswith("nothing")
    assert "cut documents" in third
    assert fourth.split()[2] == "2"
    assert "images from 0: 2 documents, left out: 3 unreadable images; images from 0 #2: 1 document;" in str(sources)


def test_sources_of_other_content_are_told_apart(byte_tokenizer) -> None:
    def contents(captions: list[str], buckets: list[int]) -> list[str]:
        return Sources([numbered_images(captions, buckets=buckets)], {"image": [(CHANNELS, 4, 4)] * 2}).contents()

    first = contents(["a", "b", "c"], [0, 0, 1])
    assert first == contents(["a", "b", "c"], [0, 1, 0]), "as many documents in each pool"
    assert first != contents(["a", "b", "d"], [0, 0, 1])
    assert first != contents(["a", "b", "c"], [0, 1, 1])
    assert first[0].startswith("images from 0: ")


def test_sources_are_named_by_the_last_part_of_their_path(monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    sources = [numbered_images([caption]) for caption in "abcd"]
    for source, name in zip(sources, ("/data/coco/train", "./train/", "owner/name", "."), strict=True):
        source.documents.name = name
    assert Sources(sources, {"image": [(CHANNELS, 4, 4)]}).names == ["train", "train #2", "name", tmp_path.name]


def test_a_source_with_images_is_needed(tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("nothing but words")
    data = DataConfig(
        sources=[SourceConfig("text", path=str(tmp_path / "texts.txt"))],
        held_out_fraction=0.0,
        cache_dir=str(tmp_path / "c"),
    )
    with pytest.raises(
        UserError, match=r"no source with image media .* are openmoji, imagefolder, audiofolder, webdataset,"
    ):
        open_documents(data, "train")
    data.sources.append(SourceConfig("imagefolder", path=str(tmp_path / "images"), use="held_out"))
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "0.png").write_bytes(picture(0))
    (tmp_path / "images" / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "a"}')
    with pytest.raises(UserError, match=r"all sources of data\.sources that have image media are held out"):
        open_documents(data, "train")


def test_a_source_of_a_modality_that_the_model_has_not_is_refused(tmp_path: Path) -> None:
    sources = [SourceConfig("imagefolder", path=str(tmp_path / "nowhere"), modality="sketch")]
    data = DataConfig(sources=sources, cache_dir=str(tmp_path / "c"))
    message = r"kind 'imagefolder' has the modality 'sketch', but model\.modalities has only image besides text; set"
    with pytest.raises(UserError, match=message):
        open_documents(data, "train")
    sources[0].modality = "text"
    with pytest.raises(
        UserError, match=r"has the modality 'text', but model\.modalities has only image besides text; set"
    ):
        open_documents(data, "train")
    # Every modality needs something to train on; texts may be all there is to a model of text.
    (tmp_path / "texts.txt").write_text("words")
    data.sources = [SourceConfig("text", path=str(tmp_path / "texts.txt"))]
    with pytest.raises(UserError, match="no source with image media to train on"):
        open_documents(dataclasses.replace(data, held_out_fraction=0.0), "train")
    (source,) = open_documents(dataclasses.replace(data, held_out_fraction=0.0, slots={"text": 64}), "train")
    assert list(training_texts([source])) == ["words"]


@pytest.mark.parametrize("uses", [("train", "held_out"), ("split", "train"), ("held_out", "split")])
def test_data_that_one_entry_trains_on_and_another_holds_out_is_refused(tmp_path: Path, uses) -> None:
    (tmp_path / "texts.txt").write_text("words")
    paths = (tmp_path / "texts.txt", tmp_path / ".." / tmp_path.name / "texts.txt")
    sources = [SourceConfig("text", path=str(path), use=use) for path, use in zip(paths, uses, strict=True)]
    with pytest.raises(UserError, match=rf"read the same data.*with 'use' {uses[0]} and {uses[1]}"):
        open_documents(DataConfig(sources=sources, cache_dir=str(tmp_path / "c")), "train")


def test_every_slot_names_the_source_it_was_filled_from(byte_tokenizer) -> None:
    sources = sources_of(numbered_images(["a"] * 5), texts_of(["zzzz"] * 9), numbered_images(["b"] * 5, first=100))
    config = data_config(text_slots=24, images_per_row=3)
    packer = packer_of(sources, byte_tokenizer, config, lanes=4)
    states = np.tile(packer.initial_state(), (4, 1))
    found = Counter()
    for step in range(4):
        rows, states, _ = packer.rows(range(4), step, states)
        batch = rows.batch
        for row in range(4):
            for document in range(int(batch.slots.document_ids[row].max()) + 1):
                slots = batch.slots.document_ids[row] == document
                (source,) = batch.slots.source_ids[row][slots].unique().tolist()
                images = (slots[24:].view(3, 4)[:, 0]).nonzero().flatten().tolist()
                values = {int(batch.latents("image").latents[row, image].max()) for image in images}
                assert source == (1 if not values else 2 if min(values) >= 100 else 0)
                found[source] += 1
        assert ((batch.slots.source_ids == -1) == (batch.slots.document_ids == -1)).all()
    assert min(found[source] for source in range(3)) > 3


def test_unreadable_images_stay_in_the_pools_of_training(byte_tokenizer) -> None:
    """So that the state of lanes is the same with and without a cache, which knows the unreadable items."""
    source = numbered_images(["a", "b", "c", "d"], buckets=[0, 0, 1, 0])
    shapes = {"image": [(CHANNELS, 4, 4)] * 2}
    online = Sources([Source(source.documents)], shapes)
    source.encoded["image"].readable[[1, 2]] = False
    cached = Sources([source], shapes, all_documents=True)
    assert cached.contents() == online.contents()
    assert [pool.length for pool in cached.pools] == [3, 1]
    # Nothing of the second size can be read: there is no step of it.
    assert cached.bucket_shares == [1.0, 0.0]
    packer = make_packer(cached, byte_tokenizer)
    batches, counts = read(packer, 20)
    assert {image for batch in batches for image in images_of(batch)} == {0, 3}
    assert counts[counter("images from 0", "dropped_documents")] > 0
    # What is held out is never gone on with.
    held_out = Sources([source], shapes)
    assert [(pool.items.tolist(), pool.length) for pool in held_out.pools] == [([0, 3], 2)]
    assert held_out.num_media_documents() == 2
