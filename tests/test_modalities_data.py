"""Rows of four modalities against their documents: each read once, in order, with the labels of its own stream."""

import itertools
from collections import Counter
from typing import Any, NamedTuple

import pytest
from toy_media import (
    END,
    MIXED_SLOTS,
    MODALITIES,
    PATCHES,
    SHAPES,
    START,
    block_starts,
    four_modality_tokenizer,
    mixed_sources,
    source_of,
    toy_packer,
)

from transfusion_mot.config import TEXT, DataConfig
from transfusion_mot.data.batch import Batch
from transfusion_mot.data.lanes import LaneState, Waiting
from transfusion_mot.data.mixture import Source, counter
from transfusion_mot.data.packing import Packer
from transfusion_mot.data.sources.base import MediaItem, Text
from transfusion_mot.data.tokenizer import TextTokenizer
from transfusion_mot.losses import IGNORE_INDEX

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

# What is read: the modality, and a token or the number of the media.
Read = tuple[str, int]


class Slot(NamedTuple):
    """What is read, its label (None of latents), and whether it is a clean copy."""

    read: Read
    label: int | None
    is_copy: bool


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return four_modality_tokenizer()


# --- What documents look like, written out anew. ---


def media_of(source: Source, item: MediaItem, tokenizer: TextTokenizer) -> list[Read]:
    """Media with their delimiters."""
    name = item.modality
    begin, end = (TEXT, tokenizer.begin_ids[name]), (TEXT, tokenizer.end_ids[name])
    if name in SHAPES:
        return [begin, (name, item.index), end]
    codes = [START, *[item.index] * source.encoded[name].lengths[item.index]]
    return [begin, *((name, code) for code in codes), end]


def streams_of(source: Source, index: int, tokenizer: TextTokenizer, config: DataConfig) -> list[list[Read]]:
    """All possible layouts of a document; none if no part of it fits a row."""
    slots = config.slots
    bos, eos = (TEXT, tokenizer.bos_id), (TEXT, tokenizer.eos_id)

    def text(item: Text) -> list[Read]:
        return [(TEXT, token) for token in tokenizer.encode(item.choices[0])]

    def fits(item: Text | MediaItem) -> bool:
        if isinstance(item, Text) or item.modality in SHAPES:
            return True
        return source.encoded[item.modality].lengths[item.index] + 1 <= slots[item.modality]

    document = source.documents.document(index)
    if source.stream not in (None, TEXT):
        (item,) = document
        return [[(item.modality, code) for code in source.encoded[item.modality].span(item.index)]]
    items = [item for item in document if fits(item)]
    if not source.documents.is_paired:
        stream, space = [bos], text(Text([" "]))
        for before, item in zip([None, *items], items, strict=False):
            if isinstance(item, Text):
                # Texts between which something was left out are one text.
                stream += [*space, *text(item)] if isinstance(before, Text) else text(item)
            else:
                stream += media_of(source, item, tokenizer)
        return [[*stream, eos]] if items else []
    media = [item for item in items if isinstance(item, MediaItem)]
    (caption,) = (text(item) for item in items if isinstance(item, Text))
    caption = caption[: slots[TEXT] - 2 - 2 * len(media)]
    result = []
    for order in itertools.permutations(media) if media else ():
        shown = list(itertools.chain(*(media_of(source, item, tokenizer) for item in order)))
        # With a clean context, nothing is learnt behind latents that have no copy.
        is_hidden = config.has_copies and order[-1].modality in SHAPES
        result += [[bos, *caption, *shown, *([] if is_hidden else [eos])], [bos, *shown, *caption, eos], [bos, *shown]]
    return result


# --- What rows hold. ---


def documents_in(batch: Batch, slots: dict[str, int]) -> list[tuple[int, list[Slot]]]:
    """(source, slots in reading order) of every document of a row; latents are one slot for any number of patches."""
    blocks = block_starts(slots)
    assert list(batch.inputs) == list(MODALITIES)
    ids, order, spans, rope, sources = (tensor[0].tolist() for tensor in batch.slots)
    assert len(ids) == sum(len(block) for block in blocks.values())
    result = []
    seen_spans: list[int] = []
    for document in range(max(ids) + 1):
        here = sorted((slot for slot in range(len(ids)) if ids[slot] == document), key=lambda slot: order[slot])
        assert [order[slot] for slot in here] == list(range(len(here)))
        (source,) = {sources[slot] for slot in here}
        found: list[Slot] = []
        position = 0
        while here:
            name = next(name for name, block in blocks.items() if here[0] in block)
            place = here[0] - blocks[name].start
            if name not in SHAPES:
                assert spans[here[0]] == -1
                assert rope[here[0]] == position
                tokens, labels = (tensor[0].tolist() for tensor in batch.tokens(name))
                found.append(Slot((name, tokens[place]), labels[place], is_copy=False))
                here, position = here[1:], position + 1
                continue
            patches, media_slot = PATCHES[name], place // PATCHES[name]
            assert here[:patches] == list(range(here[0], here[0] + patches)), "an image is read patch after patch"
            given = batch.latents(name)
            is_copy = given.copies is not None and bool(given.copies[0, media_slot])
            assert bool(given.mask[0, media_slot]) == (not is_copy)
            (span,) = {spans[slot] for slot in here[:patches]}
            seen_spans.append(span)
            first = position - patches if is_copy else position
            assert [rope[slot] for slot in here[:patches]] == list(range(first, first + patches))
            values = given.latents[0, media_slot]
            assert (values == values.flatten()[0]).all()
            found.append(Slot((name, int(values.flatten()[0])), None, is_copy))
            here, position = here[patches:], first + patches
        result.append((source, found))
    assert len(set(seen_spans)) == len(seen_spans), "no two spans of a row have the same number"
    return result


def labels_of(slots: list[Slot], rest: list[Read]) -> list[int | None]:
    """The label of every slot: the next token of its own stream; no label is a token of another modality."""
    labels: list[int | None] = []
    for slot, behind in zip(slots, [*slots[1:], None], strict=True):
        name = slot.read[0]
        if name in SHAPES:
            labels.append(None)
        elif behind is None:
            labels.append(rest[0][1] if rest else IGNORE_INDEX)
        elif behind.read[0] == name:
            labels.append(behind.read[1])
        else:
            labels.append(END if name == "speech" else IGNORE_INDEX)
    return labels


class Reading(NamedTuple):
    """Complete documents of each source that a lane has read, the counters, and the last state."""

    complete: list[Counter[int]]
    counts: Counter[str]
    state: LaneState


def read_lane(packer: Packer, tokenizer: TextTokenizer, lane: int, steps: int) -> Reading:
    """Every rule of a row, and that every document is read in pieces that go on where the last one ended."""
    slots, sources = packer.config.slots, packer.sources.sources
    expected = [
        [streams_of(source, index, tokenizer, packer.config) for index in range(len(source.documents))]
        for source in sources
    ]
    begun: list[list[tuple[int, list[list[Read]], int]]] = [[] for _ in sources]
    complete: list[Counter[int]] = [Counter() for _ in sources]
    totals: Counter[str] = Counter()
    states = packer.initial_state()[None]
    for step in range(steps):
        rows, states, counts = packer.rows([lane], step, states)
        batch, used, items = rows.batch, Counter[str](), Counter[str]()
        for source, found in documents_in(batch, slots):
            used.update(slot.read[0] for slot in found)
            reads = [slot.read for slot in found if not slot.is_copy]
            items.update(name for name, _ in reads if name in SHAPES)
            # A token of text begins and one ends every run of codes between texts.
            items.update("speech" for slot in found if slot.read == (TEXT, tokenizer.begin_ids["speech"]))
            labels = [slot.label for slot in found]
            new = [(index, wholes, 0) for index, wholes in enumerate(expected[source])]
            # A piece may be one of several forms of a document, until more of it is read.
            fitting = [
                (entry, forms)
                for entry in (*begun[source], *new)
                if (
                    forms := [
                        whole
                        for whole in entry[1]
                        if whole[entry[2] :][: len(reads)] == reads
                        and labels_of(found, whole[entry[2] + len(reads) :]) == labels
                    ]
                )
            ]
            assert fitting, "a piece goes on where the one before it ended, and its labels are those of its own stream"
            entry, forms = fitting[0]
            if entry[2]:
                begun[source].remove(entry)
            # The labels say whether this is the end.
            if labels[-1] == IGNORE_INDEX:
                complete[source][entry[0]] += 1
            else:
                begun[source].append((entry[0], forms, entry[2] + len(reads)))
        for name in MODALITIES:
            assert counts[f"{name}_slots"] == PATCHES.get(name, 1) * used[name]
        assert counts["pad_slots"] == int((batch.slots.document_ids == -1).sum())
        assert {name: counts[f"{name}_items"] for name in MODALITIES if name != TEXT} == {
            name: items[name] for name in MODALITIES if name != TEXT
        }
        for name, pools in packer.sources.stream_pools.items():
            assert not pools or slots[name] - used[name] <= 1, "what is left over is filled"
        totals.update(counts)
    state = LaneState.from_array(states[0], packer.lane_sizes)
    assert sum(map(len, begun)) == sum(entry.used > 0 for entry in entries_of(state))
    return Reading(complete, totals, state)


def entries_of(state: LaneState) -> list[Waiting]:
    """Documents that a lane has taken and not yet read to the end."""
    return [*(entry for entry in state.begun if entry is not None), *itertools.chain(*state.waiting)]


def check_every_document_is_read_once(packer: Packer, tokenizer: TextTokenizer, steps: int) -> Counter[str]:
    """Lanes have read the documents that they have taken, except waiting ones, and take each document once."""
    totals: Counter[str] = Counter()
    for lane in range(packer.num_lanes):
        reading = read_lane(packer, tokenizer, lane, steps)
        totals.update(reading.counts)
        unread = {(entry.pool, entry.number) for entry in entries_of(reading.state)}
        for pool_index, pool in enumerate(packer.sources.pools):
            name = packer.sources.names[pool.source]
            taken = Counter(
                packer._position(pool, pool_index, lane, number)
                for number in range(reading.state.taken[pool_index])
                if (pool_index, number) not in unread
            )
            source = packer.sources.sources[pool.source]
            usable = {
                index: count for index, count in taken.items() if streams_of(source, index, tokenizer, packer.config)
            }
            assert reading.complete[pool.source] == usable
            assert reading.counts[counter(name, "documents")] == sum(usable.values())
            assert reading.counts[counter(name, "taken")] == reading.state.taken[pool_index]
    for pool_index, pool in enumerate(packer.sources.pools):
        epoch = [
            packer._position(pool, pool_index, position % packer.num_lanes, position // packer.num_lanes)
            for position in range(pool.length)
        ]
        assert sorted(epoch) == list(range(pool.length))
    return totals


# --- Properties. ---


def letters(number: int, length: int) -> str:
    """A text that no other number has."""
    return (chr(ord("A") + number) + "".join(chr(ord("a") + place % 26) for place in range(length)))[: max(1, length)]


MEDIA = st.one_of(
    st.tuples(st.sampled_from(sorted(SHAPES)), st.just(0)), st.tuples(st.just("speech"), st.integers(1, 24))
)
PAIRED = st.lists(st.tuples(st.integers(1, 12), st.lists(MEDIA, min_size=1, max_size=3)), max_size=5)
IN_ORDER = st.lists(st.lists(st.one_of(st.integers(1, 30), MEDIA), min_size=1, max_size=6), max_size=5)


def written(documents: list[list[Any]], first: int = 0) -> list[list[Any]]:
    """Documents with separate texts instead of lengths; two texts are never neighbours."""
    result: list[list[Any]] = []
    for number, document in enumerate(documents):
        parts: list[Any] = []
        for item in document:
            if isinstance(item, int) and parts and isinstance(parts[-1], str):
                continue
            parts.append(letters(first + number, item) if isinstance(item, int) else item)
        result.append(parts)
    return result


@given(
    paired=PAIRED,
    in_order=IN_ORDER,
    texts=st.lists(st.integers(1, 60), max_size=3),
    speech=st.lists(st.integers(1, 50), max_size=3),
    slots=st.builds(
        lambda *counts: dict(zip(MODALITIES, counts, strict=True)),
        *(st.integers(12, 40), st.integers(2, 3), st.integers(2, 4), st.integers(8, 24)),
    ),
    lookahead=st.integers(1, 4),
    lanes=st.integers(1, 2),
    image_context=st.sampled_from(["noised", "clean"]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60)
def test_every_item_of_every_modality_is_read_once(
    tokenizer, paired, in_order, texts, speech, slots, lookahead, lanes, image_context, seed
) -> None:
    # Something fits every row, or no row would ever be full.
    paired = [(3, [("image", 0)]), *paired]
    sources = [source_of("paired", written([[length, *media] for length, media in paired]), is_paired=True)]
    if in_order:
        sources.append(source_of("in order", written([[2, *document] for document in in_order], first=20)))
    if texts:
        sources.append(source_of("texts", written([[length] for length in texts], first=40)))
    if speech:
        sources.append(source_of("speech alone", [[("speech", length)] for length in speech]))
    packer = toy_packer(
        sources, tokenizer, slots, lanes=lanes, seed=seed, lookahead=lookahead, image_context=image_context
    )
    check_every_document_is_read_once(packer, tokenizer, steps=12)


# --- Examples. ---


def rows_of(packer: Packer, steps: int) -> tuple[list[list[tuple[int, list[Slot]]]], Counter[str]]:
    """Documents of every row of the only lane, and the counters."""
    states, read, totals = packer.initial_state()[None], [], Counter[str]()
    for step in range(steps):
        rows, states, counts = packer.rows([0], step, states)
        read.append(documents_in(rows.batch, packer.config.slots))
        totals.update(counts)
    return read, totals


def test_codes_without_text_fill_what_is_left_of_their_stream_and_are_cut(tokenizer) -> None:
    """As texts do, side by side with the other documents of the row."""
    sources = [
        source_of("captioned", [["sun", ("speech", 3)]], is_paired=True),
        source_of("speech", [[("speech", 13)]]),
    ]
    slots = {TEXT: 8, "depth": 1, "image": 1, "speech": 10}
    data = {"caption_first_prob": 1.0, "prompt_dropout_prob": 0.0, "lookahead": 1}
    read, counts = rows_of(toy_packer(sources, tokenizer, slots, **data), 5)
    begin, end = tokenizer.begin_ids["speech"], tokenizer.end_ids["speech"]
    sun = tokenizer.encode("sun")
    alone = [[slot for source, slots in row if source == 1 for slot in slots] for row in read]
    for row in read:
        ((_, captioned),) = (document for document in row if document[0] == 0)
        assert [(slot.read, slot.label) for slot in captioned] == [
            ((TEXT, tokenizer.bos_id), sun[0]),
            ((TEXT, sun[0]), sun[1]),
            ((TEXT, sun[1]), sun[2]),
            ((TEXT, sun[2]), begin),
            ((TEXT, begin), IGNORE_INDEX),
            (("speech", START), 0),
            *[(("speech", 0), 0)] * 2,
            (("speech", 0), END),
            ((TEXT, end), tokenizer.eos_id),
            ((TEXT, tokenizer.eos_id), IGNORE_INDEX),
        ]
    # Fifteen tokens in rows with room for six, one behind the other.
    whole = [(("speech", START), 0), *[(("speech", 0), 0)] * 12, (("speech", 0), END), (("speech", END), IGNORE_INDEX)]
    assert [len(slots) for slots in alone] == [6] * 5
    assert [(slot.read, slot.label) for slots in alone for slot in slots] == whole * 2
    assert counts["speech_documents"] == counts[counter("speech", "documents")] == 2
    assert counts[counter("speech", "tokens")] == 30
    assert counts[counter("speech", "cut_documents")] == 2
    assert counts["speech_items"] == counts[counter("captioned", "items")] == 5


def test_codes_longer_than_a_row_are_left_out_and_counted(tokenizer) -> None:
    documents = [["one", ("speech", 30)], ["two", ("speech", 9), ("image", 0)], ["three", ("speech", 10), ("image", 0)]]
    slots = {TEXT: 16, "depth": 1, "image": 2, "speech": 10}
    packer = toy_packer([source_of("captioned", documents, is_paired=True)], tokenizer, slots, lookahead=1)
    read, counts = rows_of(packer, 30)
    taken = counts[counter("captioned", "taken")]
    assert counts[counter("captioned", "too_long_items")] == pytest.approx(2 / 3 * taken, abs=2)
    assert counts[counter("captioned", "dropped_documents")] == pytest.approx(taken / 3, abs=1)
    codes = {slot.read[1] for row in read for _, slots in row for slot in slots if slot.read[0] == "speech"}
    images = {slot.read[1] for row in read for _, slots in row for slot in slots if slot.read[0] == "image"}
    assert (codes, images) == ({START, 1}, {0, 1})
    assert "too long items" in packer.sources.report(counts)


def test_rows_without_documents_of_one_modality_leave_its_slots_empty(tokenizer) -> None:
    packer = toy_packer([source_of("captioned", [["sun", ("image", 0)]], is_paired=True)], tokenizer, MIXED_SLOTS)
    rows, _, counts = packer.rows([0], 0, packer.initial_state()[None])
    assert rows.batch.counts()[1:].tolist() == [0, 3 * 48, 0]
    assert counts["image_items"] == 3
    assert counts["speech_slots"] == counts["depth_slots"] == 0
    # They are not waited for: all documents that were taken are in the row.
    assert counts[counter("captioned", "taken")] == 3


def test_every_kind_of_source_is_in_the_pools_of_its_kind(tokenizer) -> None:
    packer = toy_packer(mixed_sources(), tokenizer, MIXED_SLOTS)
    assert packer.sources.stream_pools == {TEXT: [2], "speech": [3]}
    assert packer.sources.media_pools == [[0, 1]]
    assert packer.initial_state().shape == (4 + 3 * (2 + 16),)
    assert str(packer.row_shape(0)) == (
        "40 text tokens + 2 depth slots of 2 patches + 3 image slots of 4 patches + 26 speech tokens"
    )
    check_every_document_is_read_once(packer, tokenizer, steps=20)
