"""Interleaved documents: every token and image once and in order in any row, and cut only at permitted places."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import data_config, documents_of, packer_of, sources_of, texts_of
from test_packing import check_positions, read_row
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from transfusion_mot.config import DataConfig
from transfusion_mot.data.batch import Batch
from transfusion_mot.data.documents import DocumentReader, join_texts
from transfusion_mot.data.lanes import LaneState
from transfusion_mot.data.layout import LatentSpan, Media
from transfusion_mot.data.mixture import counter
from transfusion_mot.data.tokenizer import TextTokenizer
from transfusion_mot.losses import IGNORE_INDEX
from transfusion_mot.sampling.sampler import Sampler

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

# What a slot holds: a token, or the number of an image.
Stream = list[int | str]


def stream_of(document: list[str | int], tokenizer: TextTokenizer) -> Stream:
    """A document as one sequence."""
    stream: Stream = [tokenizer.bos_id]
    for before, item in zip(["", *document], document, strict=False):
        if isinstance(item, str):
            follows_a_text = isinstance(before, str) and before
            stream += tokenizer.encode(f" {item}" if follows_a_text else item)
        else:
            stream += [tokenizer.begin_ids["image"], f"image {item}", tokenizer.end_ids["image"]]
    return [*stream, tokenizer.eos_id]


def pieces_of(batch: Batch, text_slots: int, rope: str) -> list[tuple[Stream, int]]:
    """What a row holds of documents, in its order: (sequence, label of its last token), after checking labels."""
    pieces = []
    ids, labels = (tensor[0].tolist() for tensor in batch.tokens("text"))
    latents = batch.latents("image").latents
    for slots in read_row(batch, text_slots):
        check_positions(slots, rope)
        stream: Stream = []
        of: list[int | None] = []
        for slot, span, _ in slots:
            if span is None:
                stream.append(ids[slot])
                of.append(slot)
            elif stream[-1] != (image := f"image {int(latents[0, span, 0, 0, 0])}"):
                stream.append(image)
                of.append(None)
        for place, slot in enumerate(of[:-1]):
            if slot is not None:
                following = stream[place + 1]
                assert labels[slot] == (following if isinstance(following, int) else IGNORE_INDEX)
        assert of[-1] is not None, "no piece ends with an image: EOI belongs to it"
        pieces.append((stream, labels[of[-1]]))
    return pieces


def letters(number: int, length: int) -> str:
    """A text that is unique to a number and has no repeated long substrings."""
    return "".join(chr(ord("A") + number) + chr(ord("a") + place % 26) for place in range(-(-length // 2)))[:length]


SEGMENTS = st.lists(st.one_of(st.integers(1, 40), st.just("image")), min_size=1, max_size=9)


@given(
    shapes=st.lists(SEGMENTS, min_size=6, max_size=16),
    text_slots=st.integers(8, 30),
    images_per_row=st.integers(1, 4),
    lookahead=st.integers(1, 4),
    lanes=st.integers(1, 2),
    rope=st.sampled_from(["1d", "3d"]),
    with_text=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=150)
def test_every_token_and_image_comes_once_and_in_order(
    byte_tokenizer, shapes, text_slots, images_per_row, lookahead, lanes, rope, with_text, seed
) -> None:
    documents: list[list[str | int]] = []
    next_image = 0
    for number, shape in enumerate(shapes):
        document: list[str | int] = []
        for segment in shape:
            if segment == "image":
                document.append(next_image)
                next_image += 1
            else:
                document.append(letters(number, segment))
        documents.append(document)
    sources = [documents_of(documents)] + ([texts_of(["0" * 5000])] if with_text else [])
    config = data_config(text_slots=text_slots, images_per_row=images_per_row, lookahead=lookahead)
    packer = packer_of(sources_of(*sources), byte_tokenizer, config, rope=rope, lanes=lanes, seed=seed)
    name = packer.sources.names[0]
    streams = [stream_of(document, byte_tokenizer) for document in documents]
    read: dict[int, Stream] = {}
    complete, waiting, totals = set(), 0, Counter()
    for lane in range(lanes):
        state = packer.initial_state()[None]
        # The first epoch alone: there every document is read once.
        for step in range(60):
            rows, new_state, counts = packer.rows([lane], step, state)
            # The last document taken stood behind the first epoch: leave it, and the whole row.
            last = LaneState.from_array(new_state[0], packer.lane_sizes).taken[0] - 1
            if lane + last * lanes >= len(streams):
                break
            state = new_state
            totals.update(counts)
            pieces = pieces_of(rows.batch, text_slots, rope)
            for stream, label in pieces:
                if "0" in byte_tokenizer.decode([token for token in stream if isinstance(token, int)]):
                    continue  # The endless text.
                candidates = [
                    number
                    for number, whole in enumerate(streams)
                    if number not in complete
                    and whole[len(read.get(number, [])) :][: len(stream)] == stream
                    and (len(read.get(number, [])) > 0) == (stream[0] != byte_tokenizer.bos_id)
                ]
                assert candidates, "a piece goes on where the one before it ended"
                number = candidates[0]
                read[number] = read.get(number, []) + stream
                whole, done = streams[number], len(read[number])
                if done == len(whole):
                    assert label == IGNORE_INDEX
                    complete.add(number)
                else:
                    assert label == whole[done], "the label of the last token is the first token of the rest"
        waiting += len(LaneState.from_array(state[0], packer.lane_sizes).waiting[0])
    assert totals[counter(name, "documents")] == len(complete)
    assert totals[counter(name, "taken")] == len(complete) + waiting
    assert set(read) >= complete
    used = sum(len([item for item in stream if isinstance(item, int)]) for stream in read.values())
    assert totals[counter(name, "tokens")] == used
    assert totals[counter(name, "items")] == sum(isinstance(item, str) for stream in read.values() for item in stream)


def rows_of(tokenizer: TextTokenizer, document: list[str | int], steps: int, **data) -> list[list[tuple[Stream, int]]]:
    """Rows of a source of one document."""
    packer = packer_of(sources_of(documents_of([document])), tokenizer, data_config(**data))
    state, result = packer.initial_state()[None], []
    for step in range(steps):
        rows, state, _ = packer.rows([0], step, state)
        result.append(pieces_of(rows.batch, data["text_slots"], "1d"))
    return result


def test_document_that_is_too_long_is_cut_between_segments(byte_tokenizer) -> None:
    bos, eos = byte_tokenizer.bos_id, byte_tokenizer.eos_id
    boi, eoi = byte_tokenizer.begin_ids["image"], byte_tokenizer.end_ids["image"]
    encode = byte_tokenizer.encode
    document = ["four", 0, "more", 1, 2, "ten letter", "x" * 21, 3]
    rows = rows_of(byte_tokenizer, document, 5, text_slots=16, images_per_row=2, lookahead=1)
    text = encode("ten letter " + "x" * 21)
    assert rows[:4] == [
        # The third image has no slot, and so the piece ends before it.
        [([bos, *encode("four"), boi, "image 0", eoi, *encode("more"), boi, "image 1", eoi], boi)],
        # The text behind it does not fit whole.
        [([boi, "image 2", eoi], text[0])],
        # Longer than a row by itself: the only place where a segment is cut.
        [(text[:16], text[16])],
        [(text[16:], boi)],
    ]
    # What is left, and the document once more.
    assert rows[4][0] == ([boi, "image 3", eoi, eos], IGNORE_INDEX)


def test_document_that_fits_a_row_is_not_cut(byte_tokenizer) -> None:
    """It waits for the next row instead of being cut to the remaining slots of this one."""
    for row in rows_of(byte_tokenizer, ["ten letter", 0, "x"], 20, text_slots=24, images_per_row=3, lookahead=2):
        (piece,) = row
        assert (piece[0][0], piece[0][-1]) == (byte_tokenizer.bos_id, byte_tokenizer.eos_id)


def test_images_that_cannot_be_read_are_left_out_and_counted(byte_tokenizer) -> None:
    source = documents_of([["one", 0, "two", 1], [2], ["three", 3]])
    source.encoded["image"].readable[[0, 2]] = False
    config = data_config(text_slots=40, images_per_row=2)
    packer = packer_of(sources_of(source), byte_tokenizer, config)
    state, totals, read = packer.initial_state()[None], Counter(), []
    for step in range(30):
        rows, state, counts = packer.rows([0], step, state)
        totals.update(counts)
        read += [tuple(stream) for stream, _ in pieces_of(rows.batch, 40, "1d")]
    expected = {tuple(stream_of(document, byte_tokenizer)) for document in (["one two", 1], ["three", 3])}
    assert set(read) == expected
    assert totals[counter("documents", "documents")] == len(read)
    dropped, unreadable = (totals[counter("documents", what)] for what in ("dropped_documents", "unreadable_items"))
    epochs = packer.sources.epochs(totals)["documents"]
    assert dropped == pytest.approx(epochs, abs=1)
    assert unreadable == pytest.approx(2 * epochs, abs=2)


def test_document_of_text_alone_is_read_like_the_others(byte_tokenizer) -> None:
    rows = rows_of(byte_tokenizer, ["text and nothing else"], 4, text_slots=30, images_per_row=2, lookahead=2)
    assert all(row == [(stream_of(["text and nothing else"], byte_tokenizer), IGNORE_INDEX)] for row in rows)


def test_neighbouring_texts_are_joined_as_one_text(byte_tokenizer) -> None:
    """By a space, if neither has white space; the sampler joins its input in the same way."""
    document = ["It sleeps.", "Then it wakes.", 0, "And\n", "eats.", " Then", "", "sleeps."]
    texts = ["It sleeps. Then it wakes.", "And\neats. Then sleeps."]
    assert join_texts(document) == [texts[0], 0, texts[1]]
    bos, eos = byte_tokenizer.bos_id, byte_tokenizer.eos_id
    boi, eoi = byte_tokenizer.begin_ids["image"], byte_tokenizer.end_ids["image"]
    before, behind = (byte_tokenizer.encode(text) for text in texts)
    ((piece,),) = rows_of(byte_tokenizer, document, 1, text_slots=64, images_per_row=1, lookahead=1)
    assert piece[0] == [bos, *before, boi, "image 0", eoi, *behind, eos]
    image = Media("image", torch.zeros(4, 2, 2))
    sampler = SimpleNamespace(tokenizer=byte_tokenizer)
    given = Sampler._laid_out(sampler, [image if isinstance(item, int) else item for item in document])
    assert [part if isinstance(part, LatentSpan) else part.ids for part in given] == [
        [bos, *before, boi],
        LatentSpan(image, is_copy=False),
        [eoi, *behind],
    ]


def test_texts_are_joined_before_they_are_encoded() -> None:
    """A tokenizer that puts a space before every text puts none inside."""
    model = models.Unigram([("<unk>", 0.0), ("\u2581", -1.0), ("\u2581a", -1.0), ("b", -1.0)], unk_id=0)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    wrapped = TextTokenizer(PreTrainedTokenizerFast(tokenizer_object=tokenizer), ("text", "image"))
    document = DocumentReader(wrapped, DataConfig()).read(documents_of([["a", "a", "b"]]), 0, np.random.default_rng(0))
    assert document.segments == [[wrapped.bos_id, 2, 2, 1, 3, wrapped.eos_id]]


def test_all_images_of_a_document_are_mirrored_or_none(byte_tokenizer) -> None:
    """A picture and its edit stay a pair; over many documents each comes about as often."""
    source = documents_of([["make it red", *range(6)]])
    for random_flip in (True, False):
        reader = DocumentReader(byte_tokenizer, DataConfig(random_flip=random_flip))
        read = [reader.read(source, 0, np.random.default_rng(seed)) for seed in range(60)]
        flips = [{part.content.flipped for part in document.segments if isinstance(part, Media)} for document in read]
        assert all(len(flipped) == 1 for flipped in flips)
        assert (15 < sum(flipped == {True} for flipped in flips) < 45) is random_flip
