"""`data.orders`: documents with some of the items in one of several orders, against documents written out."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
from test_modalities_data import Read, media_of
from test_validation import CAPTIONS, CODES, ListCodes, codes_validation, naive_losses_of_codes
from toy_media import SHAPES, four_modality_tokenizer, source_of

from transfusion_mot.config import TEXT, DataConfig
from transfusion_mot.data.documents import Document, DocumentReader
from transfusion_mot.data.layout import LatentSpan, Media, lay_out
from transfusion_mot.data.mixture import Source
from transfusion_mot.data.sources.base import MediaItem, Text
from transfusion_mot.data.tokenizer import TextTokenizer, train_tokenizer
from transfusion_mot.losses import IGNORE_INDEX

SLOTS = {TEXT: 24, "depth": 2, "image": 2, "speech": 10}


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return four_modality_tokenizer()


def slots_of(document: Document, tokenizer: TextTokenizer) -> list[tuple[Read, int | None, bool]]:
    """(What is read, label or None, whether it is a copy) of every slot, latents being one."""
    found: list[tuple[Read, int | None, bool]] = []
    for part in lay_out(document.segments, tokenizer):
        if isinstance(part, LatentSpan):
            found.append(((part.media.modality, part.media.content.index), None, part.is_copy))
        else:
            slots = zip(part.ids, part.labels, strict=True)
            found += [((part.modality, token), label, False) for token, label in slots]
    return found


def naive(source: Source, index: int, order: str, tokenizer: TextTokenizer, copies: bool) -> list[Any]:
    """The same of an order, written out: BOS, the items, and EOS unless latents end it that nothing may see."""
    items = {item.modality if isinstance(item, MediaItem) else TEXT: item for item in source.documents.document(index)}
    reads: list[tuple[Read, bool]] = [((TEXT, tokenizer.bos_id), False)]
    names = order.split()
    for name in names:
        item = items[name]
        if isinstance(item, Text):
            reads += [((TEXT, token), False) for token in tokenizer.encode(item.choices[0])]
            continue
        begin, *content, end = media_of(source, item, tokenizer)
        copied = [(content[0], True)] if copies and name in SHAPES and name != names[-1] else []
        reads += [(begin, False), *((read, False) for read in content), *copied, (end, False)]
    if not (copies and names[-1] in SHAPES):
        reads.append(((TEXT, tokenizer.eos_id), False))
    labelled = []
    for place, (read, is_copy) in enumerate(reads):
        name, _ = read
        behind = reads[place + 1][0] if place + 1 < len(reads) else (TEXT, IGNORE_INDEX)
        label: int | None = behind[1] if behind[0] == name else 1001 if name == "speech" else IGNORE_INDEX
        labelled.append((read, None if name in SHAPES else label, is_copy))
    return labelled


def read_many(source: Source, index: int, tokenizer: TextTokenizer, count: int, **data: Any) -> list[Document]:
    reader = DocumentReader(tokenizer, DataConfig(slots=SLOTS, **data))
    return [reader.read(source, index, np.random.default_rng(seed)) for seed in range(count)]


@pytest.mark.parametrize("image_context", ["noised", "clean"])
def test_documents_are_those_of_the_orders_whose_items_they_have(tokenizer: TextTokenizer, image_context: Any) -> None:
    """As often as their chances say."""
    documents = [["sun", ("image", 0), ("speech", 4), ("depth", 0)], ["a fox", ("speech", 9)], [("image", 1), "x"]]
    source = source_of("paired", documents, is_paired=True)
    orders = {
        "text image": 4.0,
        "image text": 2.0,
        "text speech": 1.0,
        "speech image": 3.0,
        "image text speech": 2.0,
        "depth image": 1.0,
        "depth speech": 0.0,
    }
    for index, possible in enumerate([list(orders)[:6], ["text speech"], ["text image", "image text"]]):
        forms = {str(naive(source, index, order, tokenizer, image_context == "clean")): order for order in possible}
        assert len(forms) == len(possible)
        count = 400
        data = {"orders": orders, "prompt_dropout_prob": 0.0, "image_context": image_context}
        read = read_many(source, index, tokenizer, count, **data)
        found = Counter(forms[str(slots_of(document, tokenizer))] for document in read)
        total = sum(orders[order] for order in possible)
        for order in possible:
            share = orders[order] / total
            assert found[order] / count == pytest.approx(share, abs=4.5 * np.sqrt(share * (1 - share) / count) + 1e-9)
        assert all(document.unreadable == document.too_long == 0 for document in read)


def test_a_dropped_prompt_leaves_the_last_item_alone(tokenizer: TextTokenizer) -> None:
    source = source_of("paired", [["sun", ("image", 0), ("speech", 4)]], is_paired=True)
    orders = {"text image speech": 1.0}
    read = read_many(source, 0, tokenizer, 300, orders=orders, prompt_dropout_prob=0.3)
    # Without a label behind it.
    alone = naive(source, 0, "speech", tokenizer, False)[:-1]
    alone[-1] = (alone[-1][0], IGNORE_INDEX, False)
    forms = [slots_of(document, tokenizer) for document in read]
    share = sum(form == alone for form in forms) / 300
    assert share == pytest.approx(0.3, abs=0.12)
    whole = naive(source, 0, "text image speech", tokenizer, False)
    assert all(form in (alone, whole) for form in forms)
    # Text is not guided: nothing is dropped before it.
    behind = read_many(source, 0, tokenizer, 50, orders={"speech text": 1.0}, prompt_dropout_prob=1.0)
    assert {str(slots_of(document, tokenizer)) for document in behind} == {
        str(naive(source, 0, "speech text", tokenizer, False))
    }


def test_images_are_noised_less_where_something_stands_behind_them(tokenizer: TextTokenizer) -> None:
    source = source_of("paired", [["sun", ("image", 0), ("depth", 0)]], is_paired=True)
    limits = {}
    for order in ("image depth", "depth text image"):
        (document,) = read_many(source, 0, tokenizer, 1, orders={order: 1.0}, prompt_dropout_prob=0.0)
        limits[order] = [part.content.max_timestep for part in document.segments if isinstance(part, Media)]
    assert limits == {"image depth": [0.5, 1.0], "depth text image": [0.5, 1.0]}


def test_codes_that_cannot_be_used_are_no_item(tokenizer: TextTokenizer) -> None:
    """Unreadable, or longer than a row; they are counted."""
    documents = [["sun", ("speech", 4), ("image", 0)], ["sun", ("speech", 10), ("image", 0)], ["sun", ("speech", 9)]]
    source = source_of("paired", documents, is_paired=True)
    source.encoded["speech"].readable[0] = False
    data = {"orders": {"text speech": 5.0, "text image": 1.0}, "prompt_dropout_prob": 0.0}
    for index, counted in enumerate([(1, 0), (0, 1)]):
        for document in read_many(source, index, tokenizer, 5, **data):
            assert slots_of(document, tokenizer) == naive(source, index, "text image", tokenizer, False)
            assert (document.unreadable, document.too_long) == counted
    (whole,) = read_many(source, 2, tokenizer, 1, **data)
    assert slots_of(whole, tokenizer) == naive(source, 2, "text speech", tokenizer, False)
    # Of what has no order nothing is read.
    (nothing,) = read_many(source, 2, tokenizer, 1, orders={"text image": 1.0})
    assert nothing.segments == []


def test_validation_has_a_loss_for_each_order(accelerator: Any) -> None:
    """And one of each modality over all of them, against documents one at a time."""
    tokenizer = train_tokenizer(["a"], 261, ("text", "speech"))
    validation, model = codes_validation(
        tokenizer, ListCodes(CODES, CAPTIONS), orders={"text speech": 3.0, "speech text": 1.0, "speech": 0.0}
    )
    losses = validation.losses(model, accelerator)
    assert losses.keys() == {"text_loss", "speech_loss", "speech_loss/text-speech", "text_loss/speech-text"}
    begin, end = tokenizer.begin_ids["speech"], tokenizer.end_ids["speech"]
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    measured: dict[str, list[tuple[float, int, float, int]]] = {}
    for order, packers in validation.orders.items():
        measured[order] = []
        for batch in validation._batches(packers, model, accelerator):
            for row in range(batch.num_rows):
                for document in range(int(batch.slots.document_ids[row].max()) + 1):
                    is_text = batch.slots.document_ids[row, : batch.tokens("text").ids.shape[1]] == document
                    member = batch.slots.document_ids[row, batch.tokens("text").ids.shape[1] :] == document
                    codes = batch.tokens("speech").ids[row][member].tolist()[1:]
                    caption = tokenizer.encode(CAPTIONS[CODES.index(codes)])
                    before, behind = [bos, *caption, begin], [end, eos]
                    if order == "speech text":
                        before, behind = [bos, begin], [end, *caption, eos]
                    assert batch.tokens("text").ids[row][is_text].tolist() == [*before, *behind]
                    measured[order].append(naive_losses_of_codes(model, tokenizer, before, codes, behind))
    sums = {order: [sum(values) for values in zip(*of_order, strict=True)] for order, of_order in measured.items()}
    spans, num_codes, texts, num_tokens = (sum(values) for values in zip(*sums.values(), strict=True))
    assert losses["speech_loss"] == pytest.approx(spans / num_codes, rel=1e-4)
    assert losses["text_loss"] == pytest.approx(texts / num_tokens, rel=1e-4)
    first, second = sums["text speech"], sums["speech text"]
    assert losses["speech_loss/text-speech"] == pytest.approx(first[0] / first[1], rel=1e-4)
    assert losses["text_loss/speech-text"] == pytest.approx(second[2] / second[3], rel=1e-4)
