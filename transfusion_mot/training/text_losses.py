"""Losses of a model on whole held-out texts, per token and per byte. Losses per byte do not depend on the tokenizer."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor, nn

from transfusion_mot.config import TEXT
from transfusion_mot.data.batch import Batch
from transfusion_mot.data.tokenizer import TextTokenizer
from transfusion_mot.errors import UserError
from transfusion_mot.evaluation.intervals import mean_interval
from transfusion_mot.evaluation.processes import shared_rows
from transfusion_mot.evaluation.report.content import Metric
from transfusion_mot.losses import IGNORE_INDEX
from transfusion_mot.models.inputs import Slots, TokenInput
from transfusion_mot.models.positions import PositionCounter
from transfusion_mot.training.step import loss_terms

# Number of documents that are packed together.
_GROUP = 256


@dataclass(frozen=True)
class TextReader:
    """How texts are laid out in rows, as in training.

    Attributes:
        tokenizer: The model's tokenizer.
        rope: Kind of rotary positions.
        text_slots: Text slots of a row; a longer text is cut, and the rest is read without the part before the cut.
        rows_at_once: Rows of one forward.
    """

    tokenizer: TextTokenizer
    rope: Literal["1d", "3d"]
    text_slots: int
    rows_at_once: int


@dataclass(frozen=True)
class _Window:
    """Tokens that are read together: input ids, label ids, and the index of their document."""

    inputs: list[int]
    labels: list[int]
    document: int


def text_losses(
    model: nn.Module,
    texts: Sequence[str],
    ends_in: str,
    reader: TextReader,
    processes: PartialState | None = None,
) -> list[Metric]:
    """Mean loss and perplexity of the tokens of texts, and bits per byte of UTF-8; called by all processes.

    Loss and perplexity include the token after a text, as in training: end of text, or after a caption the begin token
    of its media. Bits per byte do not include it.

    Args:
        model: The model, with all weights on the device.
        texts: Texts to read.
        ends_in: Modality of the item after each text; `text` means none.
        reader: Row layout for the model.
        processes: Processes that share the texts.

    Raises:
        UserError: All texts are empty.
    """
    tokenizer = reader.tokenizer
    end = tokenizer.eos_id if ends_in == TEXT else tokenizer.begin_ids[ends_in]
    sizes = np.array([len(text.encode()) for text in texts])
    if not sizes.sum():
        raise UserError(f"all {len(texts)} held-out texts are empty; bits per byte need some text")
    device = next(model.parameters()).device

    def batches(rank: int, world: int) -> Iterator[Tensor]:
        own = texts[rank::world]
        for start in range(0, len(own), _GROUP):
            documents = [
                [*tokenizer.document_start, *tokenizer.encode(text), end] for text in own[start : start + _GROUP]
            ]
            yield _document_losses(model, documents, reader, device)

    rows = shared_rows(batches, len(texts), 3, device, processes).double().cpu().numpy()
    nats, last, tokens = rows.T
    mean = nats.sum() / tokens.sum()
    protocol = {"texts": len(texts), "tokens": int(tokens.sum()), "bytes": int(sizes.sum()), "row": reader.text_slots}
    interval = mean_interval(nats, tokens)
    bits = (nats - last) / math.log(2)
    return [
        Metric("text loss", float(mean), {**protocol, "unit": "nats per token"}, interval),
        Metric("perplexity", math.exp(mean), protocol, interval and (math.exp(interval[0]), math.exp(interval[1]))),
        Metric(
            "bits per byte",
            float(bits.sum() / sizes.sum()),
            {**protocol, "without": "the end of texts"},
            mean_interval(bits, sizes),
        ),
    ]


@torch.no_grad()
def _document_losses(model: nn.Module, documents: list[list[int]], reader: TextReader, device: torch.device) -> Tensor:
    """[N, 3]: summed loss of each document's tokens, loss of its last token, and number of tokens."""
    # On the CPU, because not every device has float64.
    result = torch.zeros(len(documents), 3, dtype=torch.float64)
    result[:, 2] = torch.tensor([len(tokens) - 1 for tokens in documents])
    rows = _packed(documents, reader.text_slots)
    for start in range(0, len(rows), reader.rows_at_once):
        part = rows[start : start + reader.rows_at_once]
        losses = loss_terms(model, _batch(part, reader).to(device))[TEXT].losses.cpu().double()
        for row, windows in enumerate(part):
            place = 0
            for window in windows:
                end = place + len(window.inputs)
                result[window.document, 0] += losses[row, place:end].sum()
                # A document's windows come in order, so the remaining value is that of its last token.
                result[window.document, 1] = losses[row, end - 1]
                place = end
    return result


def _packed(documents: list[list[int]], slots: int) -> list[list[_Window]]:
    """Cut documents to `slots` and pack them into rows, one after the other."""
    rows: list[list[_Window]] = []
    free = 0
    for document, tokens in enumerate(documents):
        for start in range(0, len(tokens) - 1, slots):
            labels = tokens[start + 1 : start + 1 + slots]
            window = _Window(tokens[start : start + len(labels)], labels, document)
            if len(labels) > free:
                rows.append([])
                free = slots
            rows[-1].append(window)
            free -= len(labels)
    return rows


def _batch(rows: list[list[_Window]], reader: TextReader) -> Batch:
    """A batch of text-only rows: other modalities have no slots."""
    shape = len(rows), reader.text_slots
    ids = torch.full(shape, reader.tokenizer.pad_id)
    labels = torch.full(shape, IGNORE_INDEX)
    nothing = torch.full(shape, -1)
    document_ids = nothing.clone()
    order = torch.zeros(shape, dtype=torch.long)
    rope_positions = torch.zeros(shape if reader.rope == "1d" else (*shape, 3), dtype=torch.long)
    for row, windows in enumerate(rows):
        place = 0
        for number, window in enumerate(windows):
            where = row, slice(place, place + len(window.inputs))
            ids[where] = torch.tensor(window.inputs)
            labels[where] = torch.tensor(window.labels)
            document_ids[where] = number
            order[where], rope_positions[where] = map(
                torch.from_numpy, PositionCounter(reader.rope).text(len(window.inputs))
            )
            place += len(window.inputs)
    return Batch({TEXT: TokenInput(ids, labels)}, Slots(document_ids, order, nothing, rope_positions, nothing))
