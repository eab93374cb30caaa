"""Inspect the data of a configuration before training.

    python -m transfusion_mot.data.inspect --config configs/emoji_small.yaml --picture row.png

It packs some hundred rows and prints the lengths of each source's documents, empty slots, cut and dropped documents,
the share of each source, and the best numbers of slots. With --picture it draws one row. Nothing is encoded. Any
setting of train.py can be given after the options as key=value.
"""

import argparse
import dataclasses
import logging
import math
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

from transfusion_mot.config import TEXT, DataConfig, ModelConfig, RunConfig
from transfusion_mot.errors import UserError, exit_on_user_error
from transfusion_mot.outputs import check_picture_name
from transfusion_mot.run.early import checked_sections


def parse_arguments(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options of the command line, and the settings of train.py after them.

    Raises:
        UserError: There are mistakes in them.
    """
    parser = argparse.ArgumentParser(
        prog="python -m transfusion_mot.data.inspect",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rows", type=int, default=400, metavar="N", help="rows to pack (default: 400)")
    parser.add_argument(
        "--slots", type=int, metavar="S", help="maximum slots of a row in suggested layouts (default: as configured)"
    )
    parser.add_argument(
        "--picture", default="row.png", metavar="FILE", help="picture of a row to write (default: row.png)"
    )
    given, rest = parser.parse_known_args(arguments)
    if given.rows < 1:
        raise UserError(f"--rows is {given.rows}; it must be at least 1")
    checked_sections(rest)
    return given, rest


if __name__ == "__main__":
    # Before PyTorch loads, which takes seconds: --help, and mistakes in the options.
    with exit_on_user_error():
        parse_arguments(sys.argv[1:])

import numpy as np
import numpy.typing as npt

from transfusion_mot.codecs.load import load_codec
from transfusion_mot.data.batch import Batch
from transfusion_mot.data.documents import join_texts
from transfusion_mot.data.encoded_media import EncodedMedia
from transfusion_mot.data.encoding import check_media_sizes
from transfusion_mot.data.images import ImageArray
from transfusion_mot.data.mixture import Source, Sources, counter, open_documents, training_texts
from transfusion_mot.data.packing import Packer
from transfusion_mot.data.row_arrays import RowShape
from transfusion_mot.data.row_picture import draw_row
from transfusion_mot.data.sources.base import Documents, MediaSet, Split, Text, counted
from transfusion_mot.data.sources.edit_pairs import EditPairs
from transfusion_mot.data.tokenizer import TextTokenizer, load_tokenizer, train_tokenizer
from transfusion_mot.models.inputs import TokenInput
from transfusion_mot.run.begin import settled_config

# Maximum number of documents of a source whose lengths are measured, evenly spaced.
_MOST_DOCUMENTS = 20_000
_NUM_LANES = 8
# Number of layouts to try, and of rows to pack for each layout.
_MOST_LAYOUTS, _ROWS_PER_LAYOUT = 8, 64
# Number of rows to pack to measure the proportion of modalities.
_ROWS_FOR_PROPORTION = 200
_BAR = 40


class _Unencoded:
    """Replaces a cache: packing only needs to know which media are readable and how many slots they take."""

    def __init__(self, media: MediaSet) -> None:
        self.readable = np.ones(len(media), dtype=np.bool_)
        self.skipped: dict[str, int] = {}


class _UnencodedLatents(_Unencoded):
    """The mean of an image is a constant that identifies its source, index and mirroring."""

    kind: Literal["latents"] = "latents"

    def __init__(self, media: MediaSet, source: int) -> None:
        super().__init__(media)
        self.source = source

    def posterior(self, index: int, flipped: bool = False) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        mean = np.array([self.source, index, flipped], dtype=np.float32)[:, None, None]
        return mean, np.zeros_like(mean)


class _UnencodedCodes(_Unencoded):
    """Codes are zeros; their number follows from the bucket of an image or the duration of audio.

    Attributes:
        num_codes: [N] number of codes of each.
    """

    kind: Literal["codes"] = "codes"

    def __init__(self, media: MediaSet, num_codes: npt.NDArray[np.int64]) -> None:
        super().__init__(media)
        self.num_codes = num_codes

    def span(self, index: int, flipped: bool = False) -> list[int]:
        return [0] * (int(self.num_codes[index]) + 2)


class Layout(NamedTuple):
    """Slots of a row, and results of packing: shares of padding and of cut captions, and media in a row."""

    slots: dict[str, int]
    pad_fraction: float
    cut_fraction: float
    mean_media: float


class Inspection:
    """The sources of a configuration, ready to be packed without their encoded media.

    Args:
        config: Configuration of the run.

    Attributes:
        data: The configuration's data section.
        sources, held_out: Sources of both splits.
        has_texts: Whether texts fill the remaining text slots.
        tokenizer: Tokenizer of the run.
        item_slots, mean_slots: Maximum and mean slots of one item in a row, for each modality except text.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.data = dataclasses.replace(config.data, latents="cache")
        modalities = config.model.modalities
        codecs = {name: load_codec(codec, modalities[name].objective, "cpu") for name, codec in config.codecs.items()}
        check_media_sizes(self.data, codecs, config.model)
        sizes = {
            name: [
                (height // codec.downsampling, width // codec.downsampling) for height, width in self.data.image_sizes
            ]
            for name, codec in codecs.items()
            if codec.medium != "audio"
        }
        shapes = {name: [(3, *size) for size in sizes[name]] for name in codecs if codecs[name].kind == "latents"}

        def unencoded(index: int, name: str, media: MediaSet) -> EncodedMedia:
            codec = codecs[name]
            if codec.kind == "latents":
                return cast(EncodedMedia, _UnencodedLatents(media, index))
            if codec.medium == "audio":
                assert media.medium == "audio"
                num_codes = np.ceil(media.seconds * codec.codes_per_second).astype(np.int64)
            else:
                num_codes = np.array([math.prod(size) for size in sizes[name]])[media.buckets]
            return cast(EncodedMedia, _UnencodedCodes(media, num_codes))

        def opened(split: Split) -> list[Source]:
            return [
                dataclasses.replace(
                    source,
                    encoded={name: unencoded(index, name, media) for name, media in source.documents.media.items()},
                )
                for index, source in enumerate(open_documents(self.data, split, config.model.readers.values()))
            ]

        self.sources = Sources(opened("train"), shapes)
        self.held_out = Sources(opened("held_out"), shapes)
        self.has_texts = bool(self.sources.stream_pools[TEXT])
        self.tokenizer = self._tokenizer(self.sources.sources)
        self.item_slots, self.mean_slots = dict[str, int](), dict[str, float]()
        for name in codecs:
            if name in shapes:
                each = np.array([math.prod(size) // modalities[name].patch_size ** 2 for size in sizes[name]])
            else:
                of_sources = [source.encoded[name] for source in self.sources.sources if name in source.encoded]
                # The start token of the span comes before them.
                each = 1 + np.concatenate([cast(_UnencodedCodes, encoded).num_codes for encoded in of_sources])
            self.item_slots[name], self.mean_slots[name] = int(each.max()), float(each.mean())

    def _tokenizer(self, documents: list[Source]) -> TextTokenizer:
        """The tokenizer of the run if it exists, else the configured one, else one trained as for the run."""
        kept = Path(self.config.output_dir) / "tokenizer"
        if kept.is_dir():
            return load_tokenizer(str(kept), self.config.model.made)
        model, modalities = self.config.model, self.config.model.made
        if self.config.tokenizer.path is not None:
            return load_tokenizer(self.config.tokenizer.path, modalities, model.has_pretrained_text)
        return train_tokenizer(training_texts(documents), self.config.tokenizer.vocab_size, modalities)

    def packer(self, data: DataConfig) -> Packer:
        """Builds rows of the layout of `data`."""
        return Packer(
            self.sources,
            self.tokenizer,
            data,
            self.config.model,
            num_lanes=_NUM_LANES,
            seed=self.config.training.seed,
            timesteps_from_uniform=lambda uniform: uniform,
        )

    def lengths(self, index: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """For a sample of a source: tokens of each caption (or of all texts of a document), and numbers of media."""
        documents = self.sources.sources[index].documents
        tokens, media = [], []
        for number in range(0, len(documents), 1 + len(documents) // _MOST_DOCUMENTS):
            items = documents.document(number)
            if has_one_text(documents):
                texts = [[caption] for item in items if isinstance(item, Text) for caption in item.choices]
            else:
                joined = join_texts(item.choices[0] if isinstance(item, Text) else item for item in items)
                texts = [[part for part in joined if isinstance(part, str)]]
            tokens += [sum(len(self.tokenizer.encode(part)) for part in text) for text in texts]
            media.append(sum(not isinstance(item, Text) for item in items))
        return np.array(tokens), np.array(media)

    def pack(self, data: DataConfig, num_rows: int) -> tuple[Counter[str], Batch, int]:
        """Pack rows => (counters, the last step's rows, number of slots)."""
        packer = self.packer(data)
        states = np.tile(packer.initial_state(), (_NUM_LANES, 1))
        counts: Counter[str] = Counter()
        num_slots = 0
        for step in range(max(1, num_rows // _NUM_LANES)):
            rows, states, step_counts = packer.rows(range(_NUM_LANES), step, states)
            counts.update(step_counts)
            num_slots += rows.batch.slots.order.numel()
        return counts, rows.batch, num_slots

    def layout(self, slots: dict[str, int], num_rows: int = _ROWS_PER_LAYOUT) -> Layout:
        """Pack rows with a layout and measure it."""
        data = dataclasses.replace(self.data, slots=slots)
        counts, batch, num_slots = self.pack(data, num_rows)
        cut = counts["truncated_captions"] / max(1, self.num_captioned(counts))
        media = sum(counts[f"{name}_items"] for name in self.item_slots)
        return Layout(slots, counts["pad_slots"] / num_slots, cut, media * batch.slots.order.shape[1] / num_slots)

    def num_captioned(self, counts: Counter[str]) -> int:
        """Number of packed documents with a caption or an instruction."""
        named = zip(self.sources.names, self.sources.sources, strict=True)
        return sum(counts[counter(name, "documents")] for name, source in named if has_one_text(source.documents))

    def most_items(self, name: str) -> int:
        """Maximum number of media of a modality in a row, if all media that can have a clean copy have one."""
        slots = self.data.slots[name]
        if self.config.model.modalities[name].objective == "next_token":
            return slots // self.item_slots[name]
        return slots // 2 if self.data.has_copies and name not in self.config.model.readers else slots

    def suggested(self, budget: int, longest: int, mean: float, clean: float = 0.0) -> list[Layout]:
        """Layouts with at most `budget` slots, the best one first.

        With several modalities besides text, slots are in the proportion in which documents use them. With one modality
        and texts, which fill the remaining slots, the best layout has about half of the slots for media (Transfusion,
        section 4.1). With one modality and no texts, it has the least padding among those that use three quarters of
        the budget.

        Args:
            longest: Text slots that a row needs so that no caption is cut.
            mean: Text slots of an average document with media, for each of its media slots.
            clean: Slots of the modality that reads clean latents, if there is one, for each media slot.
        """
        if len(self.item_slots) != 1:
            return self._in_proportion(budget, longest)
        ((name, size),) = self.item_slots.items()
        is_latents = name in self.sources.latent_shapes
        reader = self.config.model.readers.get(name)
        fewest = 2 if (self.data.has_copies or self.data.has_edits) and is_latents and reader is None else 1
        most = int((budget - longest) / (size * (1 + clean)))
        if most < fewest:
            return []
        half = min(most, max(fewest, round(budget / 2 / size)))
        layouts: list[Layout] = []
        for count in np.unique([half, *np.linspace(fewest, most, _MOST_LAYOUTS).round().astype(int)]).tolist():
            read = {} if reader is None else {reader: max(1, round(count * clean))}
            used = (count + sum(read.values())) * size
            room = budget - used
            if room < longest:
                continue
            # `count` clips of maximum length hold more clips of mean length.
            number = count if is_latents else count * size / self.mean_slots[name]
            wanted = [room] if self.has_texts else [int(number * mean * factor) for factor in (1, 1.05, 1.1, 1.2, 1.4)]
            candidates = sorted({min(room, max(longest, -(-slots // 8) * 8)) for slots in wanted})
            layouts += [
                self.layout({TEXT: text_slots, name: count if is_latents else count * size, **read})
                for text_slots in candidates
                if self.has_texts or text_slots + used >= 0.75 * budget
            ]
        if self.has_texts:
            slots_each = size if is_latents else 1
            return sorted(layouts, key=lambda layout: abs(layout.slots[name] * slots_each - budget / 2))
        return sorted(layouts, key=lambda layout: layout.pad_fraction)

    def _in_proportion(self, budget: int, longest: int) -> list[Layout]:
        """Layouts in the proportion in which documents use slots, with or without more text; least padding first."""
        counts, batch, _ = self.pack(self.data, _ROWS_FOR_PROPORTION)
        blocks = RowShape.of_batch(self.config.model, batch).blocks
        layouts = []
        for spare in (1.0, 1.05, 1.1, 1.2):
            used = {name: counts[f"{name}_slots"] * (spare if name == TEXT else 1.0) for name in blocks}
            slots = {}
            for name, block in blocks.items():
                share = budget * used[name] / sum(used.values())
                if name == TEXT:
                    slots[name] = max(longest, int(share))
                elif block.latent_shape is not None:
                    slots[name] = max(self.data.has_copies + 1, int(share / block.slots_each))
                else:
                    # A multiple of the slots of an image; audio clips have any length.
                    most = self.item_slots[name]
                    each = most if self.mean_slots[name] == most else 1
                    slots[name] = max(most, int(share) // each * each)
            if sum(slots[name] * block.slots_each for name, block in blocks.items()) <= budget:
                layouts.append(self.layout(slots))
        return sorted(layouts, key=lambda layout: layout.pad_fraction)


def has_one_text(documents: Documents) -> bool:
    """Whether a document has one text (a caption or an instruction), which is cut if it is longer than a row."""
    return documents.is_paired or isinstance(documents, EditPairs)


def histogram(values: npt.NDArray[np.int64], what: str, num_bins: int = 12) -> Iterator[str]:
    """Lines of text: quantiles, and a bar for every range of values; the last one has no upper end."""
    quantiles = ", ".join(f"{q} % {np.percentile(values, q):.0f}" for q in (50, 90, 99))
    yield f"  {what}: mean {values.mean():.1f}, {quantiles}, largest {values.max()}"
    low, high = int(values.min()), int(np.ceil(np.percentile(values, 99.5)))
    if low == values.max():
        return
    width = max(1, -(-(high - low + 1) // num_bins))
    edges = [*range(low, high + 1, width)]
    counts = np.bincount(np.searchsorted(edges, values, side="right") - 1, minlength=len(edges))
    for edge, count in zip(edges, counts, strict=True):
        is_open = edge == edges[-1] and values.max() >= edge + width
        label = f"{edge} or more" if is_open else f"{edge} to {edge + width - 1}" if width > 1 else f"{edge}"
        eighths = round(8 * _BAR * count / counts.max())
        bar = "█" * (eighths // 8) + (" ▏▎▍▌▋▊▉"[eighths % 8] if eighths % 8 else "")
        yield f"    {label:>16} {100 * count / len(values):5.1f} % {bar}"


def main(arguments: Sequence[str]) -> None:
    """Run the command line."""
    given, settings = parse_arguments(arguments)
    config = settled_config(settings)
    prepare_picture(Path(given.picture))
    inspection = Inspection(config)
    data, sources = inspection.data, inspection.sources

    # Text and media slots of all documents with one text.
    paired, media_slots, clean_slots = [], [], []
    for index, name in enumerate(sources.names):
        documents = sources.sources[index].documents
        left_out = f", left out: {counted(documents.skipped)}" if documents.skipped else ""
        print(f"{name}: {counted({'document': len(documents)})} to train on{left_out}")
        tokens, media = inspection.lengths(index)
        is_edit, is_short = isinstance(documents, EditPairs), has_one_text(documents)
        what = "tokens an instruction" if is_edit else "tokens a caption" if is_short else "tokens a document"
        if len(tokens):
            print("\n".join(histogram(tokens, what)))
        for modality, own in documents.media.items():
            if own.medium == "audio":
                num_codes = cast(_UnencodedCodes, sources.sources[index].encoded[modality]).num_codes
                print(f"  {counted({'audio clip': len(own)})}: {own.seconds.sum() / 3600:,.2f} hours", end="")
                print(f", {num_codes.sum():,} codes of {modality}")
                print("\n".join(histogram(num_codes, f"{modality} codes an audio clip")))
        if not is_short and len(documents.modalities) > 1 and media.any():
            print("\n".join(histogram(media, "media a document")))
            most = sum(inspection.most_items(name) for name in documents.media)
            if (share := (media > most).mean()) > 0:
                print(f"  {100 * share:.1f} % have more media than the {most} of a row: they are cut")
        if is_short:
            paired.append(tokens + 2 + 2 * media.max())  # BOS, EOS, begin and end tokens
            # With a clean context, latents at the beginning have a copy.
            clean = 1.0 if is_edit else 1 - data.caption_first_prob if data.has_copies else 0.0
            media_slots.append(np.full(len(tokens), 1.0 if config.model.readers else 1 + clean))
            clean_slots.append(np.full(len(tokens), clean if config.model.readers else 0.0))

    held_out = inspection.held_out
    lengths = (counted({"document": len(source.documents)}) for source in held_out.sources)
    parts = [f"{name}: {length}" for name, length in zip(held_out.names, lengths, strict=True)]
    print(f"held out: {'; '.join(parts) or 'nothing'}")

    counts, batch, num_slots = inspection.pack(data, given.rows)
    shape = RowShape.of_batch(config.model, batch)
    print(f"\npacked {max(1, given.rows // _NUM_LANES) * _NUM_LANES} rows of {shape}:")
    num_rows = num_slots / shape.num_slots
    full = (
        f"{name} {100 * counts[f'{name}_slots'] / (block.num_slots * num_rows):.1f} %"
        for name, block in shape.blocks.items()
    )
    print(f"  {100 * counts['pad_slots'] / num_slots:.2f} % of the slots are padding; filled: {', '.join(full)}")
    print(f"  {counts['truncated_captions']} of {counted({'caption': inspection.num_captioned(counts)})} are cut")
    cut = sum(counts[counter(name, "cut_documents")] for name in sources.names)
    print(f"  {counted({'document': cut})} of texts, or of texts and media, are cut and continue in a later row")
    print("  " + sources.report(counts).replace("\n", "\n  "))

    budget = given.slots or batch.slots.order.shape[1]
    captions = np.concatenate(paired) if paired else np.array([8])
    longest = -(-int(np.percentile(captions, 99)) // 8) * 8
    media_slots_each = float(np.concatenate(media_slots).mean()) if media_slots else 1.0
    clean_slots_each = float(np.concatenate(clean_slots).mean()) if clean_slots else float(bool(config.model.readers))
    mean = float(captions.mean()) / media_slots_each
    layouts = inspection.suggested(budget, longest, mean, clean_slots_each)
    print(f"\nlayouts of at most {budget} slots a row, the best first:")
    if inspection.has_texts and len(inspection.item_slots) == 1:
        print(
            "  (texts fill the remaining slots, so nothing is padding; the best layout has about half of the slots "
            "for media)"
        )
    columns = [f"data.slots.{name}" for name in shape.blocks]
    width = max(21, *(2 + len(column) for column in columns))
    header = "".join(f"{column:>{width}}" for column in columns)
    print(f"{header}{'padding':>10}{'captions cut':>14}{'media a row':>14}")
    for layout in layouts[:5]:
        print(
            "".join(f"{layout.slots[name]:>{width}}" for name in shape.blocks)
            + f"{100 * layout.pad_fraction:>8.2f} %{100 * layout.cut_fraction:>12.2f} %{layout.mean_media:>14.1f}"
        )
    if not layouts:
        what = "media and the longest captions need" if paired else "media and a text need"
        print(f"  none: {what} more; give --slots a larger number than {budget}")

    draw_row(
        batch.split(1)[0],
        config.model,
        inspection.tokenizer,
        thumbnails=thumbnails_of(batch.split(1)[0], sources, config.model),
        title=f"A row of {shape}",
        path=Path(given.picture),
    )
    print(f"\npicture of a row: {given.picture}")


def prepare_picture(path: Path) -> None:
    """Make the folder of a picture.

    Raises:
        UserError: It cannot be made, or the file name does not end like a picture's.
    """
    check_picture_name(path, "--picture")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--picture: cannot make the folder '{path.parent}': {error.strerror}") from None


def thumbnails_of(row: Batch, sources: Sources, model: ModelConfig) -> dict[str, list[ImageArray | None]]:
    """The image in every media slot, identified by its unencoded latents; None if there is none to show."""
    thumbnails: dict[str, list[ImageArray | None]] = {}
    for name, given in row.inputs.items():
        if isinstance(given, TokenInput):
            continue
        named: list[Any] = given.latents[0, :, :, 0, 0].long().tolist()
        pictures: list[ImageArray | None] = []
        for (source, index, flipped), used in zip(named, given.is_filled[0].tolist(), strict=True):
            try:
                media = sources.sources[source].documents.media
                image = media[model.content_of(name)].image(index) if used else None
            except UserError:
                image = None
            pictures.append(image[:, ::-1] if image is not None and flipped else image)
        thumbnails[name] = pictures
    return thumbnails


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    with exit_on_user_error():
        main(sys.argv[1:])
