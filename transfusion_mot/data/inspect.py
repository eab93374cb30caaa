"""Look at the data of a configuration before training on it.

    python -m transfusion_mot.data.inspect --config configs/quickstart.yaml --picture row.png

Prints how long the documents of each source are, what packing some hundred rows of the configuration leaves empty,
cuts and drops, what each source gives to them, and the numbers of text and image slots that would fit the documents
best; and draws one row. Nothing is encoded. Any setting of train.py can be given behind the options, as key=value.
"""

import argparse
import dataclasses
import logging
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
from PIL import Image

from transfusion_mot.codecs.autoencoder_kl import Autoencoder
from transfusion_mot.config import DataConfig, RunConfig, parse_config
from transfusion_mot.data.batch import Batch
from transfusion_mot.data.documents import join_texts
from transfusion_mot.data.encoding import check_image_sizes
from transfusion_mot.data.images import ImageArray
from transfusion_mot.data.latents import LatentCache
from transfusion_mot.data.mixture import Source, Sources, counter, open_documents, training_texts
from transfusion_mot.data.packing import Packer
from transfusion_mot.data.row_picture import draw_row
from transfusion_mot.data.sources.base import CaptionedImages, TextDocuments, counted
from transfusion_mot.data.tokenizer import TextTokenizer, load_tokenizer, train_tokenizer
from transfusion_mot.errors import UserError, exit_on_user_error

# Documents of a source whose lengths are looked at, evenly spaced.
_MOST_DOCUMENTS = 20_000
_NUM_LANES = 8
# Numbers of image slots that are tried, and rows packed for each layout that is.
_MOST_LAYOUTS, _ROWS_PER_LAYOUT = 8, 64
_BAR = 40


class _UnencodedLatents:
    """Stands in for a latent cache: the mean of an image is a constant for each of source, index and mirroring."""

    def __init__(self, source: int, num_images: int, latent_shapes: Sequence[tuple[int, int, int]]) -> None:
        self.source = source
        self.readable = np.ones(num_images, dtype=np.bool_)
        self.skipped: dict[str, int] = {}
        self.latent_shapes = latent_shapes

    def posterior(self, index: int, flipped: bool = False) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        mean = np.array([self.source, index, flipped], dtype=np.float32)[:, None, None]
        return mean, np.zeros_like(mean)


class Layout(NamedTuple):
    """Slots of a row, and what packing makes of them: shares of all slots, and of the captions; and images in a row."""

    text_slots: int
    images_per_row: int
    pad_fraction: float
    cut_fraction: float
    mean_images: float


class Inspection:
    """The sources of a configuration, ready to be packed without their latents.

    Args:
        config: Of the run.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        # What packing sees of an image is whether it can be read and how many patches it has.
        self.data = dataclasses.replace(config.data, latents="cache")
        autoencoder = Autoencoder.load(config.autoencoder.path, "cpu")
        check_image_sizes(self.data, autoencoder, config.model.patch_size)
        scale = autoencoder.downsampling
        shapes = [(3, height // scale, width // scale) for height, width in self.data.image_sizes]
        documents = open_documents(self.data, "train")
        self.sources = Sources(
            [
                source
                if isinstance(source.documents, TextDocuments)
                else dataclasses.replace(
                    source,
                    latents=cast(LatentCache, _UnencodedLatents(index, len(source.images), shapes)),
                )
                for index, source in enumerate(documents)
            ],
            shapes,
        )
        self.held_out = Sources(open_documents(self.data, "held_out"), shapes)
        self.has_texts = bool(self.sources.text_pools)
        self.tokenizer = self._tokenizer(documents)

    def _tokenizer(self, documents: list[Source]) -> TextTokenizer:
        """The run's if there is one, else the configured one, else one trained as the run would."""
        kept = Path(self.config.output_dir) / "tokenizer"
        if kept.is_dir():
            return load_tokenizer(str(kept))
        if self.config.tokenizer.path is not None:
            return load_tokenizer(self.config.tokenizer.path)
        return train_tokenizer(training_texts(documents), self.config.tokenizer.vocab_size)

    def packer(self, data: DataConfig) -> Packer:
        """Builds rows of the layout of `data`."""
        model, seed = self.config.model, self.config.training.seed
        return Packer(
            self.sources, self.tokenizer, data, model.rope, model.patch_size, _NUM_LANES, seed, lambda uniform: uniform
        )

    def lengths(self, index: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Tokens of every caption, or of all text of a document; images of every document, of a sample of a source."""
        documents = self.sources.sources[index].documents
        tokens, images = [], []
        for item in range(0, len(documents), 1 + len(documents) // _MOST_DOCUMENTS):
            if isinstance(documents, TextDocuments):
                texts, num_images = [[documents.text(item)]], 0
            elif isinstance(documents, CaptionedImages):
                texts, num_images = [[caption] for caption in documents.captions(item)], 1
            else:
                segments = documents.segments(item)
                texts = [[segment for segment in join_texts(segments) if isinstance(segment, str)]]
                num_images = sum(isinstance(segment, int) for segment in segments)
            tokens += [sum(len(self.tokenizer.encode(part)) for part in text) for text in texts]
            images.append(num_images)
        return np.array(tokens), np.array(images)

    def pack(self, data: DataConfig, num_rows: int) -> tuple[Counter[str], Batch, int]:
        """Pack rows => (what was counted, the last step's rows, all slots)."""
        packer = self.packer(data)
        states = np.tile(packer.initial_state(), (_NUM_LANES, 1))
        counts: Counter[str] = Counter()
        num_slots = 0
        for step in range(max(1, num_rows // _NUM_LANES)):
            rows, states, step_counts = packer.rows(range(_NUM_LANES), step, states)
            counts.update(step_counts)
            num_slots += rows.batch.order.numel()
        return counts, rows.batch, num_slots

    def layout(self, text_slots: int, images_per_row: int, num_rows: int = _ROWS_PER_LAYOUT) -> Layout:
        """What packing makes of a layout."""
        data = dataclasses.replace(self.data, text_slots=text_slots, images_per_row=images_per_row)
        counts, batch, num_slots = self.pack(data, num_rows)
        cut = counts["truncated_captions"] / max(1, self.num_captioned(counts))
        mean_images = counts["images"] * batch.order.shape[1] / num_slots
        return Layout(text_slots, images_per_row, counts["pad_slots"] / num_slots, cut, mean_images)

    def num_captioned(self, counts: Counter[str]) -> int:
        """Images with a caption among what was packed."""
        named = zip(self.sources.names, self.sources.sources, strict=True)
        return sum(
            counts[counter(name, "images")] for name, source in named if isinstance(source.documents, CaptionedImages)
        )

    def suggested(self, budget: int, longest: int, mean: float) -> list[Layout]:
        """Layouts of at most `budget` slots, the best one first.

        With texts, which fill what is left, that is the one whose images take closest to half of the slots
        (Transfusion, section 4.1); without, the one with the least padding that uses three quarters of the budget.

        Args:
            longest: Text slots that a row must have, for captions to be whole.
            mean: Text slots of an average document with an image, for each image slot that it takes.
        """
        fewest = 2 if self.data.has_copies else 1
        shapes = range(len(self.sources.latent_shapes))
        grid = self.packer(self.data).patch_grid
        patches = max(height * width for height, width in map(grid, shapes))
        most = (budget - longest) // patches
        if most < fewest:
            return []
        half = min(most, max(fewest, round(budget / 2 / patches)))
        layouts: list[Layout] = []
        for images in np.unique([half, *np.linspace(fewest, most, _MOST_LAYOUTS).round().astype(int)]).tolist():
            room = budget - images * patches
            wanted = [room] if self.has_texts else [int(images * mean * factor) for factor in (1, 1.05, 1.1, 1.2, 1.4)]
            candidates = sorted({min(room, max(longest, -(-slots // 8) * 8)) for slots in wanted})
            layouts += [
                self.layout(text_slots, images)
                for text_slots in candidates
                if self.has_texts or text_slots + images * patches >= 0.75 * budget
            ]
        if self.has_texts:
            return sorted(layouts, key=lambda layout: abs(layout.images_per_row * patches - budget / 2))
        return sorted(layouts, key=lambda layout: layout.pad_fraction)


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
    """Print and draw, as the command line says."""
    parser = argparse.ArgumentParser(
        prog="python -m transfusion_mot.data.inspect",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rows", type=int, default=400, metavar="N", help="rows to pack (default: 400)")
    parser.add_argument("--slots", type=int, metavar="S", help="slots a row may have (default: as configured)")
    parser.add_argument("--picture", default="row.png", metavar="FILE", help="where to draw a row (default: row.png)")
    given, rest = parser.parse_known_args(arguments)
    if given.rows < 1:
        raise UserError(f"--rows is {given.rows}; it must be at least 1")
    prepare_picture(Path(given.picture))
    config = parse_config(RunConfig, rest, __doc__ or "")
    inspection = Inspection(config)
    data, sources = inspection.data, inspection.sources

    with_images = []
    for index, name in enumerate(sources.names):
        documents = sources.sources[index].documents
        left_out = f", left out: {counted(documents.skipped)}" if documents.skipped else ""
        print(f"{name}: {counted({'document': len(documents)})} to train on{left_out}")
        tokens, images = inspection.lengths(index)
        is_captioned = isinstance(documents, CaptionedImages)
        print("\n".join(histogram(tokens, "tokens a caption" if is_captioned else "tokens a document")))
        if not is_captioned and images.any():
            print("\n".join(histogram(images, "images a document")))
            most = data.images_per_row // 2 if data.has_copies else data.images_per_row
            if (share := (images > most).mean()) > 0:
                print(f"  {100 * share:.1f} % have more images than the {most} of a row: they are cut")
        if is_captioned:
            with_images.append(tokens + 4)  # BOS, BOI, EOI, EOS

    held_out = inspection.held_out
    lengths = (counted({"document": len(source.documents)}) for source in held_out.sources)
    parts = [f"{name}: {length}" for name, length in zip(held_out.names, lengths, strict=True)]
    print(f"held out: {'; '.join(parts) or 'nothing'}")

    counts, batch, num_slots = inspection.pack(data, given.rows)
    print(f"\npacked {max(1, given.rows // _NUM_LANES) * _NUM_LANES} rows of {layout_of(data, batch)}:")
    print(f"  {100 * counts['pad_slots'] / num_slots:.2f} % of the slots are padding")
    print(f"  {counts['truncated_captions']} of {counted({'caption': inspection.num_captioned(counts)})} are cut")
    cut = sum(counts[counter(name, "cut_documents")] for name in sources.names)
    print(f"  {counted({'document': cut})} of texts, or of texts and images, are cut and go on in a later row")
    print("  " + sources.report(counts).replace("\n", "\n  "))

    budget = given.slots or batch.order.shape[1]
    captions = np.concatenate(with_images) if with_images else np.array([8])
    longest = -(-int(np.percentile(captions, 99)) // 8) * 8
    print(f"\nlayouts of at most {budget} slots a row, the best first:")
    if inspection.has_texts:
        print(
            "  (texts fill what is left over, so nothing is padding; best is closest to half of the slots for images)"
        )
    print(
        f"  {'data.text_slots':>16}{'data.images_per_row':>21}{'padding':>10}{'captions cut':>14}{'images a row':>14}"
    )
    # Where the image stands first it has a copy.
    slots_per_image = 2 - data.caption_first_prob if data.has_copies else 1
    layouts = inspection.suggested(budget, longest, float(captions.mean()) / slots_per_image)
    for layout in layouts[:5]:
        print(
            f"  {layout.text_slots:>16}{layout.images_per_row:>21}{100 * layout.pad_fraction:>8.2f} %"
            f"{100 * layout.cut_fraction:>12.2f} %{layout.mean_images:>14.1f}"
        )
    if not layouts:
        what = "an image and the longest captions need" if with_images else "an image and a text need"
        print(f"  none: {what} more; give --slots a larger number than {budget}")

    row = batch.split(1)[0]
    draw_row(
        row,
        inspection.tokenizer,
        thumbnails_of(row, sources),
        f"A row of {layout_of(data, batch)}",
        Path(given.picture),
    )
    print(f"\na row is drawn in {given.picture}")


def prepare_picture(path: Path) -> None:
    """Make the folder of a picture.

    Raises:
        UserError: It cannot be made, or the name ends on no format of pictures.
    """
    formats = Image.registered_extensions()
    if formats.get(path.suffix.lower()) not in Image.SAVE:
        raise UserError(f"--picture is '{path}'; its name must end like a picture's, such as .png")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--picture: cannot make the folder '{path.parent}': {error.strerror}") from None


def layout_of(data: DataConfig, batch: Batch) -> str:
    """For example "88 text slots + 8 images of 64 patches"."""
    patches = (batch.order.shape[1] - data.text_slots) // data.images_per_row
    return f"{data.text_slots} text slots + {data.images_per_row} images of {patches} patches"


def thumbnails_of(row: Batch, sources: Sources) -> list[ImageArray | None]:
    """The image in every image slot, as its unencoded latents name it; None where there is none to be seen."""
    thumbnails: list[ImageArray | None] = []
    named: list[Any] = row.latents[0, :, :, 0, 0].long().tolist()
    for (source, index, flipped), is_used in zip(named, row.filled_images[0].tolist(), strict=True):
        try:
            image = sources.sources[source].images.image(index) if is_used else None
        except UserError:
            image = None
        thumbnails.append(image[:, ::-1] if image is not None and flipped else image)
    return thumbnails


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    with exit_on_user_error():
        main(sys.argv[1:])
