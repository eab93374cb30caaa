"""From the configured sources to what rows are filled from: pools of documents, and the chance of each."""

import dataclasses
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
from accelerate import Accelerator
from numpy.typing import NDArray

from transfusion_mot.autoencoder import Autoencoder
from transfusion_mot.config import AutoencoderConfig, DataConfig, SourceConfig
from transfusion_mot.data.latents import LatentCache, cached_latents
from transfusion_mot.data.sources.base import (
    CaptionedImages,
    ImageSet,
    InterleavedDocuments,
    Split,
    TextDocuments,
    counted,
)
from transfusion_mot.data.sources.open import open_source
from transfusion_mot.errors import UserError

# A vocabulary of some ten thousand merges is settled long before.
_NUM_TOKENIZER_DOCUMENTS = 1_000_000


@dataclass(frozen=True)
class Source:
    """One source of documents.

    Attributes:
        documents: What it holds.
        weight: Relative chance of its documents; see `Sources`.
        encoded: Of its media, by modality, what is read from a cache.
    """

    documents: Documents
    weight: float = 1.0
    encoded: dict[str, EncodedMedia] = dataclasses.field(default_factory=dict)

    # Kept, because to ask a protocol about every document takes as long as reading one.
    @cached_property
    def is_paired(self) -> bool:
        """Whether text and media of a document are of one thing and have no order of their own."""
        return isinstance(self.documents, CaptionedMedia)

    @cached_property
    def stream(self) -> str | None:
        """The modality of tokens that its documents fill, where they are of one alone; None where they are mixed."""
        if isinstance(self.documents, TextDocuments):
            return TEXT
        if isinstance(self.documents, MediaAlone):
            (modality,) = self.documents.media
            return modality
        return None

    def items(self, index: int) -> list[Text | MediaItem]:
        """Text and media of a document."""
        return self.documents.items(index)


@dataclass(frozen=True)
class Pool:
    """The documents of a source whose images have the same size; or all documents of a source of text.

    Attributes:
        source: Index of the source.
        items: Their indices in the source; None means all.
        length: Their number.
    """

    source: int
    items: NDArray[np.int64] | None
    length: int

    def item(self, position: int) -> int:
        """Index in the source."""
        return position if self.items is None else int(self.items[position])


class Sources:
    """What rows are filled from, or what is held out of it.

    Image slots are filled with documents of the sources that have images, each the next one with a chance in proportion
    to its weight; text slots left over with texts, chosen likewise among the sources of text. How much of a row is text
    is decided by its numbers of slots, and so a weight compares sources of the same one of these two kinds.

    A bucket is used for a share of the steps that lets all documents of a source come with the same frequency.

    Args:
        sources: To fill rows, at least one must have images.
        latent_shapes: [C, Y, X] of every bucket.
        all_documents: Whether pools hold the captioned images, too, that a cache knows to be unreadable, and which are
            dropped when they come up. They do where images are encoded while training, and nothing is known of them: so
            what lanes remember means the same with a cache and without.

    Attributes:
        names: Of the sources, the last part of their paths: a run may go on where the data lies elsewhere. A second one
            of the same name is numbered.
        pools: Of all sources.
        image_pools: Indices of the pools of every bucket.
        text_pools: Indices of the pools of text.
        shares: Share of each pool among those of its kind.
        bucket_shares: Chance of each bucket.
    """

    def __init__(
        self, sources: list[Source], latent_shapes: list[tuple[int, int, int]], all_documents: bool = False
    ) -> None:
        self.sources = sources
        self.latent_shapes = latent_shapes
        self.names: list[str] = []
        for name in (_short_name(source.documents.name) for source in sources):
            same = sum(before.split(" #")[0] == name for before in self.names)
            self.names.append(f"{name} #{same + 1}" if same else name)
        self.pools: list[Pool] = []
        self.shares: list[float] = []
        self.text_pools: list[int] = []
        self.image_pools: list[list[int]] = [[] for _ in latent_shapes]
        for index, source in enumerate(sources):
            if isinstance(source.documents, TextDocuments):
                self.text_pools.append(self._add_pool(index, None, 1.0))
                continue
            buckets = self._buckets(source)
            readable = self._readable(source)
            if not all_documents:
                buckets = np.where(readable, buckets, np.int16(-1))
            usable = int((buckets >= 0).sum())
            for bucket, pools in enumerate(self.image_pools):
                items = np.flatnonzero(buckets == bucket)
                if len(items):
                    is_all = len(items) == len(buckets)
                    # No step is to be of a size of which nothing can be read.
                    share = len(items) / usable if readable[items].any() else 0.0
                    pools.append(self._add_pool(index, None if is_all else items, share))
        totals = [sum(self.shares[pool] for pool in pools) for pools in self.image_pools]
        self.bucket_shares = [total / (sum(totals) or 1.0) for total in totals]

    def _add_pool(self, index: int, items: NDArray[np.int64] | None, share: float) -> int:
        source = self.sources[index]
        self.pools.append(Pool(index, items, len(source.documents) if items is None else len(items)))
        self.shares.append(source.weight * share)
        return len(self.pools) - 1

    def _buckets(self, source: Source) -> NDArray[np.int16]:
        """Bucket of every document."""
        if isinstance(source.documents, CaptionedImages):
            return source.images.buckets
        assert isinstance(source.documents, InterleavedDocuments)
        result = np.zeros(len(source.documents), dtype=np.int16)
        buckets = source.images.buckets
        if len(self.latent_shapes) > 1 and len(buckets):
            usual = np.bincount(buckets).argmax()
            for index in range(len(result)):
                images = (item for item in source.documents.segments(index) if isinstance(item, int))
                result[index] = next((buckets[image] for image in images), usual)
        return result

    @staticmethod
    def _readable(source: Source) -> NDArray[np.bool_]:
        """[N] whether each document can be used, as far as that is known."""
        if source.latents is not None and isinstance(source.documents, CaptionedImages):
            return source.latents.readable
        return np.ones(len(source.documents), dtype=np.bool_)

    def num_image_documents(self) -> int:
        """Documents with images that can be used."""
        return sum(self.pools[pool].length for pools in self.image_pools for pool in pools)

    def only_captions(self) -> "Sources":
        """The captioned images alone."""
        kept = [source for source in self.sources if isinstance(source.documents, CaptionedImages)]
        return Sources(kept, self.latent_shapes)

    def contents(self) -> list[str]:
        """What is in the sources, not where they lie, and in which pools: what the state of a lane depends on.

        For example "coco: 8c1f of [118287] documents".
        """
        documents = [source.documents for source in self.sources]
        hashes = [d.captions_fingerprint if isinstance(d, CaptionedImages) else d.fingerprint for d in documents]
        pools = [[pool.length for pool in self.pools if pool.source == index] for index in range(len(documents))]
        described = zip(self.names, hashes, pools, strict=True)
        return [f"{name}: {content} of {lengths} documents" for name, content, lengths in described]

    def __str__(self) -> str:
        """For example "data: coco: 118287 documents, left out: 13 unreadable images; a.txt: 1 document"."""
        parts = []
        for index, name in enumerate(self.names):
            left_out = counted(self.left_out(index))
            length = counted({"document": self._lengths()[index]})
            parts.append(f"{name}: {length}{f', left out: {left_out}' if left_out else ''}")
        return f"data: {'; '.join(parts)}"

    def _lengths(self) -> Counter[int]:
        lengths = Counter[int]()
        for pool in self.pools:
            lengths[pool.source] += pool.length
        return lengths

    def left_out(self, index: int) -> dict[str, int]:
        """What was left out of a source before training: reason to count."""
        source = self.sources[index]
        left_out = dict(source.documents.skipped)
        if not isinstance(source.documents, TextDocuments):
            left_out |= source.images.skipped | (source.latents.skipped if source.latents is not None else {})
        return left_out

    def report(self, seen: dict[str, int]) -> str:
        """A table of what each source gave to rows, by the counters of the run, and of what was left out and why."""
        lines = [
            f"{'source':<32}{'weight':>8}{'documents':>12}{'tokens':>14}{'images':>12}{'epochs':>9}  left out or cut"
        ]
        for index, (name, source) in enumerate(zip(self.names, self.sources, strict=True)):
            epochs = self.epochs(seen)[name]
            drops = {what.replace("_", " ").removesuffix("s"): seen.get(counter(name, what), 0) for what in DROPS}
            left_out = self.left_out(index)
            # Of images that are known to be unreadable, their number says more than how often they have come up.
            left_out |= {what: count for what, count in drops.items() if count and what not in left_out}
            reasons = counted(left_out) or "nothing"
            documents, tokens, images = (seen.get(counter(name, what), 0) for what in ("documents", "tokens", "images"))
            short = name if len(name) <= 31 else f"...{name[-28:]}"
            lines.append(
                f"{short:<32}{source.weight:>8g}{documents:>12}{tokens:>14}{images:>12}{epochs:>9.2f}  {reasons}"
            )
        return "\n".join(lines)

    def epochs(self, seen: dict[str, int]) -> dict[str, float]:
        """How often the documents of each source have been taken, by the counters of the run."""
        lengths = self._lengths()
        return {name: seen.get(counter(name, "taken"), 0) / lengths[index] for index, name in enumerate(self.names)}


def _short_name(name: str) -> str:
    """The last part of a path, which stays when the data is moved or its path is spelled in another way."""
    path = Path(name)
    return (path if path.name.strip(".") else path.resolve()).name


# What is counted of each source: documents taken from it, those that are wholly in rows, text slots and images of it in
# rows, and what happened to documents on the way.
DROPS = ("cut_captions", "cut_documents", "unreadable_images", "dropped_documents")
SOURCE_COUNTED = ("taken", "documents", "tokens", "images", *DROPS)


def counter(source: str, what: str) -> str:
    """Name of a counter of a source."""
    return f"sources/{source}/{what}"


def open_documents(data: DataConfig, split: Split) -> list[Source]:
    """Open every source of a split; one of which nothing is held out is left out.

    Raises:
        UserError: A source cannot be opened, two of the same data have another `use`, or none has images to train on.
    """
    _refuse_two_uses(data.sources)
    sources = [Source(open_source(source, data, split), source.weight) for source in data.sources]
    sources = [source for source in sources if len(source.documents)]
    if split == "train" and all(isinstance(source.documents, TextDocuments) for source in sources):
        if any(source.kind != "text" and source.use == "held_out" for source in data.sources):
            raise UserError(
                "all sources of data.sources that have images are held out; set 'use' of one to train or split"
            )
        kinds = ", ".join(kind for kind in get_args(get_type_hints(SourceConfig)["kind"]) if kind != "text")
        raise UserError(f"data.sources has no source with images to train on; kinds that have images are {kinds}")
    return sources


def _refuse_two_uses(sources: list[SourceConfig]) -> None:
    """Refuse data that is trained on by one entry and held out by another."""
    uses: dict[tuple[str | None, ...], str] = {}
    for source in sources:
        places = [None if path is None else str(Path(path).resolve()) for path in (source.path, source.annotations)]
        use = uses.setdefault((source.kind, *places, source.name, source.split), source.use)
        if use != source.use:
            raise UserError(
                f"two sources of kind '{source.kind}' read the same data, '{source.path or source.kind}', with 'use' "
                f"{use} and {source.use}; what is held out would be trained on: give each its own data, or one entry "
                "with 'use' split"
            )


def with_latents(
    sources: list[Source],
    data: DataConfig,
    autoencoder: Autoencoder,
    config: AutoencoderConfig,
    accelerator: Accelerator | None = None,
    all_documents: bool = False,
) -> Sources:
    """Open the latents of the sources' images, encoding what a cache lacks, unless that is done while training.

    All processes of `accelerator` call it together. `all_documents`: see `Sources`.
    """
    if data.latents != "online":
        sources = [
            source
            if isinstance(source.documents, TextDocuments)
            else dataclasses.replace(
                source, latents=cached_latents(source.images, autoencoder, data, config.batch_size, accelerator)
            )
            for source in sources
        ]
    factor = autoencoder.downsampling
    shapes = [(autoencoder.latent_channels, height // factor, width // factor) for height, width in data.image_sizes]
    return Sources(sources, shapes, all_documents)


def training_texts(sources: list[Source]) -> Iterator[str]:
    """The captions and texts, from which a tokenizer is trained; evenly spaced ones of a large source."""
    for documents in (source.documents for source in sources):
        for index in range(0, len(documents), 1 + len(documents) // _NUM_TOKENIZER_DOCUMENTS):
            if isinstance(documents, TextDocuments):
                yield documents.text(index)
            elif isinstance(documents, CaptionedImages):
                yield from documents.captions(index)
            else:
                yield from (item for item in documents.segments(index) if isinstance(item, str))
