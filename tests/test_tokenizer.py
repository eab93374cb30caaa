"""The tokenizer loses nothing, and special ids come from us alone."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from transfusion_mot.data.emoji import emoji_captions
from transfusion_mot.data.tokenizer import BOI, EOI, TextTokenizer, load_tokenizer, train_tokenizer
from transfusion_mot.errors import UserError

CAPTIONS = list(emoji_captions().values())
TOKENIZER = train_tokenizer(CAPTIONS, 1024)
SPECIAL_IDS = {TOKENIZER.bos_id, TOKENIZER.eos_id, TOKENIZER.boi_id, TOKENIZER.eoi_id, TOKENIZER.pad_id}


def test_emoji_captions_round_trip():
    for caption in CAPTIONS:
        ids = TOKENIZER.encode(caption)
        assert TOKENIZER.decode(ids) == caption
        assert not SPECIAL_IDS & set(ids)
    num_ids = sum(len(TOKENIZER.encode(caption)) for caption in CAPTIONS)
    assert num_ids < 0.3 * sum(len(caption) for caption in CAPTIONS), "merges were learnt"


@given(st.text())
def test_any_text_round_trips(text):
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert not SPECIAL_IDS & set(ids)
    assert all(0 <= token < TOKENIZER.vocab_size for token in ids)


@pytest.mark.parametrize("special", ["<boi>", "<eoi>", "<bos>", "<eos>", "<pad>"])
def test_a_typed_special_token_is_text(special):
    text = f"a {special} b{special}"
    ids = TOKENIZER.encode(text)
    assert not SPECIAL_IDS & set(ids)
    assert TOKENIZER.decode(ids) == text


@given(st.text())
def test_ids_are_those_of_transformers(text):
    assert TOKENIZER.encode(text) == TOKENIZER.hf.encode(text, add_special_tokens=False, split_special_tokens=True)


def test_what_a_tokenizer_was_saved_to_cut_and_fill_is_neither():
    hf = train_tokenizer(CAPTIONS, 1024).hf
    hf.backend_tokenizer.enable_truncation(3)
    hf.backend_tokenizer.enable_padding(length=40)
    text = "a text that is longer than three tokens"
    assert TextTokenizer(hf).encode(text) == TOKENIZER.encode(text)


def test_special_ids_are_distinct_and_left_out_of_text():
    assert len(SPECIAL_IDS) == 5
    assert TOKENIZER.vocab_size == 1024
    ids = [TOKENIZER.bos_id, *TOKENIZER.encode("red apple"), TOKENIZER.boi_id, TOKENIZER.eoi_id, TOKENIZER.eos_id]
    assert TOKENIZER.decode([*ids, TOKENIZER.pad_id]) == "red apple"
    assert TOKENIZER.encode("") == []


def test_saved_and_loaded_is_the_same(tmp_path):
    TOKENIZER.save(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.fingerprint == TOKENIZER.fingerprint
    assert loaded.vocab_size == TOKENIZER.vocab_size
    for text in (*CAPTIONS[::100], " spaces  kept .", "<boi>", "naïve 🦑"):
        assert loaded.encode(text) == TOKENIZER.encode(text)
        assert loaded.decode(loaded.encode(text)) == text
    plain = AutoTokenizer.from_pretrained(tmp_path)
    assert plain.convert_tokens_to_ids([BOI, EOI]) == [TOKENIZER.boi_id, TOKENIZER.eoi_id]


def test_fingerprint_follows_what_was_learnt():
    assert train_tokenizer(CAPTIONS, 1024).fingerprint == TOKENIZER.fingerprint
    assert train_tokenizer(CAPTIONS[:2000], 1024).fingerprint != TOKENIZER.fingerprint


def word_tokenizer(**special_tokens) -> PreTrainedTokenizerFast:
    vocabulary = {"[UNK]": 0, "[START]": 1, "[STOP]": 2, "red": 3, "apple": 4}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", **special_tokens)


def test_tokens_are_added_to_a_foreign_tokenizer(tmp_path):
    word_tokenizer(bos_token="[START]", eos_token="[STOP]").save_pretrained(tmp_path / "foreign")
    loaded = load_tokenizer(str(tmp_path / "foreign"))
    assert (loaded.bos_id, loaded.eos_id) == (1, 2), "its own stay"
    assert loaded.encode("red apple") == [3, 4], "ids stay"
    assert sorted([loaded.pad_id, loaded.boi_id, loaded.eoi_id]) == [5, 6, 7]
    assert loaded.vocab_size == 8
    loaded.save(tmp_path / "ours")
    again = load_tokenizer(str(tmp_path / "ours"))
    assert (again.boi_id, again.pad_id, again.vocab_size) == (loaded.boi_id, loaded.pad_id, 8), "added once"

    bare = TextTokenizer(word_tokenizer())
    assert len({bare.bos_id, bare.eos_id, bare.pad_id, bare.boi_id, bare.eoi_id}) == 5


def test_refusals(tmp_path):
    with pytest.raises(UserError, match=r"261"):
        train_tokenizer(CAPTIONS, 260)
    assert train_tokenizer(["a"], 261).decode(train_tokenizer(["a"], 261).encode("ü")) == "ü"
    with pytest.raises(UserError, match=r"tokenizer path .* does not exist"):
        load_tokenizer(str(tmp_path / "runs" / "tokenizer"))
    with pytest.raises(UserError, match="no tokenizer at"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(UserError, match="no tokenizer at"):
        load_tokenizer("no-such-tokenizer")
