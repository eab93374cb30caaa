"""The text tokenizer and its special tokens."""

import hashlib
import json
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from transfusion_mot.config import TEXT
from transfusion_mot.errors import UserError
from transfusion_mot.hub_names import ask_hub, refuse_missing_path

BOS, EOS, PAD = "<bos>", "<eos>", "<pad>"
_NUM_BYTES = 256
# Setting of a language model's tokenizer: whether documents begin with the begin of text.
_BEGINS_WITH_BOS = "documents_begin_with_bos"


class TextTokenizer:
    """A Hugging Face tokenizer with the special tokens that documents need.

    The begin and end tokens of each modality are added after its largest id, and so are begin of text, end of text and
    padding if they are missing. Existing ids do not change.

    The tokenizer of a pretrained language model gets no begin of text and no padding. Documents begin like its own
    texts: with its begin of text if it puts one before each text, else with their first token.

    Args:
        hf: The tokenizer to wrap.
        modalities: Modalities of the model; text needs no delimiters and may be included.
        of_language_model: Whether it belongs to a pretrained language model. Saved tokenizers store it themselves.

    Attributes:
        hf: The wrapped tokenizer.
        document_start: Ids that each document begins with: the begin of text, or none.
        bos_id, eos_id: Begin of text, which the tokenizer of a language model may lack, and end of a document.
        begin_ids, end_ids: Begin and end token of each modality but text.
        pad_id: Id of unused text slots.
        special_ids: All ids that do not represent text, in order.
        vocab_size: One more than the largest id.
        fingerprint: Hash of everything that decides the ids.
    """

    def __init__(self, hf: PreTrainedTokenizerFast, modalities: Sequence[str], of_language_model: bool = False) -> None:
        self.hf = hf
        if of_language_model and _BEGINS_WITH_BOS not in hf.init_kwargs:
            # Saved with the tokenizer.
            begins_with_bos = hf.bos_token_id is not None and hf("a").input_ids[:1] == [hf.bos_token_id]
            hf.init_kwargs[_BEGINS_WITH_BOS] = begins_with_bos
        delimiters = delimiters_of(modalities)
        # The tokenizer of a run or snapshot keeps the ids that its model was trained with.
        if not set(delimiters) <= set(hf.get_vocab()):
            _fill_unused_ids(hf)
        of_language_model = _BEGINS_WITH_BOS in hf.init_kwargs
        roles = {"eos_token": EOS} if of_language_model else {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
        missing = {role: _special(name) for role, name in roles.items() if getattr(hf, role) is None}
        if missing:
            hf.add_special_tokens(missing)
        hf.add_tokens([_special(name) for name in delimiters], special_tokens=True)
        self.bos_id: int | None = hf.bos_token_id
        self.eos_id: int = hf.eos_token_id
        # Unused slots have no loss, and no slot attends to them.
        self.pad_id: int = self.eos_id if hf.pad_token_id is None else hf.pad_token_id
        begins_with_bos = hf.init_kwargs.get(_BEGINS_WITH_BOS, True)
        self.document_start = [self.bos_id] if begins_with_bos and self.bos_id is not None else []
        media = [name for name in modalities if name != TEXT]
        self.begin_ids: dict[str, int] = {name: hf.convert_tokens_to_ids(_begin(name)) for name in media}
        self.end_ids: dict[str, int] = {name: hf.convert_tokens_to_ids(_end(name)) for name in media}
        self.special_ids = sorted(number for number, token in hf.added_tokens_decoder.items() if token.special)
        self.vocab_size = max(hf.get_vocab().values()) + 1
        special_ids = [self.bos_id, self.eos_id, self.pad_id, *self.begin_ids.values(), *self.end_ids.values()]
        content = hf.backend_tokenizer.to_str()
        self.fingerprint = hashlib.sha256(f"{content} {special_ids}".encode()).hexdigest()[:16]
        # The call of the wrapper takes three times as long as encoding a caption.
        self._encoder = Tokenizer.from_str(_without_special_tokens(content))
        self._encoder.encode_special_tokens = True
        self._encoder.no_truncation()
        self._encoder.no_padding()

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without special tokens: a typed "<bos>" is five characters, not a special token."""
        return self._encoder.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """Text of ids; special tokens are left out."""
        return self.hf.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def save(self, path: str | Path) -> None:
        """Write a folder that `load_tokenizer` and `AutoTokenizer.from_pretrained` read."""
        self.hf.save_pretrained(path)


def train_tokenizer(texts: Iterable[str], vocab_size: int, modalities: Sequence[str]) -> TextTokenizer:
    """Train a byte-level BPE: every Unicode text is encoded and decoded without loss.

    Args:
        texts: Training texts.
        vocab_size: Number of ids, of which 256 are bytes, 3 special tokens, and 2 delimiters of each modality but text;
            fewer come out if `texts` have fewer distinct words.
        modalities: Those of the model.

    Raises:
        UserError: `vocab_size` has no room for the bytes and the special tokens.
    """
    special_tokens = [PAD, BOS, EOS, *delimiters_of(modalities)]
    smallest = _NUM_BYTES + len(special_tokens)
    if vocab_size < smallest:
        raise UserError(f"tokenizer.vocab_size is {vocab_size}; a byte-level tokenizer needs at least {smallest}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        show_progress=False,
        special_tokens=[_special(name) for name in special_tokens],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return TextTokenizer(
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD),
        modalities,
    )


def load_tokenizer(path_or_name: str, modalities: Sequence[str], of_language_model: bool = False) -> TextTokenizer:
    """Load a tokenizer from a folder or, by name, from the Hugging Face hub; see `TextTokenizer`.

    Raises:
        UserError: It does not exist, cannot be loaded, or has no fast (Rust) implementation.
    """
    refuse_missing_path(path_or_name, "tokenizer path")
    try:
        ask_hub(path_or_name)
        hf = AutoTokenizer.from_pretrained(path_or_name)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"no tokenizer at '{path_or_name}' ({' '.join(str(error).split())[:300]}); give a folder written by "
            "save_pretrained, or the name of one on the Hugging Face hub"
        ) from None
    if not hf.is_fast:
        raise UserError(f"the tokenizer '{path_or_name}' has no fast implementation; give one that has")
    if not set(hf.get_vocab()) - set(hf.added_tokens_encoder):
        # transformers returns such a tokenizer for a folder with a model's configuration but no tokenizer files.
        raise UserError(f"'{path_or_name}' has no tokenizer files; give a folder that has them")
    return TextTokenizer(hf, modalities, of_language_model)


def delimiters_of(modalities: Sequence[str]) -> list[str]:
    """The begin and end token of each modality except text, which has none."""
    return [token for name in modalities if name != TEXT for token in (_begin(name), _end(name))]


def _begin(modality: str) -> str:
    return f"<begin_of_{modality}>"


def _end(modality: str) -> str:
    return f"<end_of_{modality}>"


def _special(name: str) -> AddedToken:
    return AddedToken(name, special=True, normalized=False)


def _fill_unused_ids(hf: PreTrainedTokenizerFast) -> None:
    """Name the unused ids below the largest one.

    The library gives an added token the number of tokens as its id: with gaps, the id of another token.
    """
    used = set(hf.backend_tokenizer.get_vocab(with_added_tokens=False).values())
    unused = set(range(max(used, default=-1) + 1)) - used
    if unused:
        content = json.loads(hf.backend_tokenizer.to_str())
        content["model"]["vocab"] |= {f"<unused id {number}>": number for number in sorted(unused)}
        hf._tokenizer = Tokenizer.from_str(json.dumps(content))


def _without_special_tokens(content: str) -> str:
    """The JSON of a tokenizer => that of one that finds no special tokens in any text; ids stay the same.

    With `encode_special_tokens` special tokens are not parsed in texts, but they stay in the vocabulary, where Unigram,
    WordLevel and WordPiece find them by their spelling. So they get random spellings. A BPE only finds merges, which
    never give a special token, unless it looks up whole words first.
    """
    tokenizer: dict[str, Any] = json.loads(content)
    model = tokenizer["model"]
    if model["type"] == "BPE" and not model["ignore_merges"]:
        return content
    # Results of merges and single characters are ordinary text.
    merged = {left + right for left, right in model.get("merges", ())}
    special = {token["content"] for token in tokenizer["added_tokens"] if token["special"]}
    hidden = {token: uuid.uuid4().hex for token in special - merged if len(token) > 1}
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {hidden.get(token, token): number for token, number in vocabulary.items()}
    else:
        model["vocab"] = [(hidden.get(token, token), score) for token, score in vocabulary]
    if "unk_token" in model:
        model["unk_token"] = hidden.get(model["unk_token"], model["unk_token"])
    for token in tokenizer["added_tokens"]:
        token["content"] = hidden.get(token["content"], token["content"])
    return json.dumps(tokenizer)
