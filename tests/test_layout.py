"""The format of documents, written out; test_interleaved compares packing and sampling."""

from transfusion_mot.data.layout import LatentSpan, Media, TokenRun, lay_out
from transfusion_mot.data.tokenizer import train_tokenizer
from transfusion_mot.losses import IGNORE_INDEX as NONE


def test_delimiters_labels_and_copies(byte_tokenizer) -> None:
    begin, end = byte_tokenizer.begin_ids["image"], byte_tokenizer.end_ids["image"]
    one, two = Media("image", "one", copied=True), Media("image", "two")
    assert list(lay_out([[1, 2], [3], one, two, [4]], byte_tokenizer, next_token=5)) == [
        TokenRun("text", [1, 2, 3, begin], [2, 3, begin, NONE]),
        LatentSpan(one, is_copy=False),
        LatentSpan(one, is_copy=True),
        TokenRun("text", [end, begin], [begin, NONE]),
        LatentSpan(two, is_copy=False),
        TokenRun("text", [end, 4], [4, 5]),
    ]


def test_a_document_may_begin_or_end_with_an_image_and_have_none(byte_tokenizer) -> None:
    image = Media("image", "image")
    assert list(lay_out([image], byte_tokenizer)) == [
        TokenRun("text", [byte_tokenizer.begin_ids["image"]], [NONE]),
        LatentSpan(image, is_copy=False),
        TokenRun("text", [byte_tokenizer.end_ids["image"]], [NONE]),
    ]
    assert list(lay_out([[7, 8]], byte_tokenizer)) == [TokenRun("text", [7, 8], [8, NONE])]
    assert list(lay_out([], byte_tokenizer)) == []


def test_labels_of_codes_are_codes_and_their_end() -> None:
    tokenizer = train_tokenizer(["a"], 263, ("text", "image", "speech"))
    begin, end = tokenizer.begin_ids["speech"], tokenizer.end_ids["speech"]
    assert len({begin, end, tokenizer.begin_ids["image"], tokenizer.end_ids["image"]}) == 4
    start, stop = 32, 33
    speech = Media("speech", [start, 7, 9, 7, stop])
    assert (speech.slots, Media("image", None, copied=True).slots) == ({"speech": 4}, {"image": 2})
    assert list(lay_out([[1], speech, [4]], tokenizer)) == [
        TokenRun("text", [1, begin], [begin, NONE]),
        TokenRun("speech", [start, 7, 9, 7], [7, 9, 7, stop]),
        TokenRun("text", [end, 4], [4, NONE]),
    ]
    # Codes that no text belongs to, and what a row takes of them.
    assert list(lay_out([[start, 7, 9]], tokenizer, next_token=7, stream="speech")) == [
        TokenRun("speech", [start, 7, 9], [7, 9, 7], is_last=True)
    ]


def test_only_the_last_item_of_a_document_is_last() -> None:
    tokenizer = train_tokenizer(["a"], 263, ("text", "image", "speech"))
    one, two = Media("speech", [32, 7, 33]), Media("image", [32, 8, 33])
    latents, eos = Media("image", "latents"), tokenizer.eos_id

    def last(segments: list, next_token: int = NONE) -> list[list[int]]:
        runs = lay_out(segments, tokenizer, next_token)
        return [run.ids for run in runs if isinstance(run, TokenRun) and run.is_last]

    # The end token, an empty text and EOS follow every image.
    for behind in ([], [[eos]], [[], [eos]]):
        assert last([[1], one, *behind]) == [[32, 7]]
        assert last([[1], two, one, [3], two, *behind]) == [[32, 8]]
        assert last([one, latents, *behind]) == []
    assert last([[1], one, [4, eos]]) == last([[1], one, [4], [eos]]) == []
    # Pieces: the rest may be only EOS, a text or other media.
    assert last([[1], one], eos) == [[32, 7]]
    assert last([[1], one], 4) == last([[1], one], tokenizer.begin_ids["image"]) == []
