"""Configured sources => pools of documents, and the chance of each pool."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
from accelerate import Accelerator
from numpy.typing import NDArray

from transfusion_mot.codecs.base import Codec
from transfusion_mot.config import TEXT, CodecConfig, DataConfig, SourceConfig
from transfusion_mot.data.encoded_media import EncodedMedia, encoded_media
from transfusion_mot.data.sources.base import CaptionedImages, Documents, MediaItem, Split, Text, counted, own_media
from transfusion_mot.data.sources.open import media_of, open_source
from transfusion_mot.data.sources.scenes import Scenes
from transfusion_mot.errors import UserError

# Maximum number of texts: more would not change ten thousand merges.
_NUM_TOKENIZER_DOCUMENTS = 1_000_000
# Far fewer captions are enough if they consist of a few hundred words.
_NUM_TOKENIZER_SCENES = 50_000


@dataclass(frozen=True)
class Source:
    """One source of documents.

    Attributes:
        documents: Its documents.
        weight: Relative chance of its documents; see `Sources`.
        encoded: Cached encoded media, by modality.
    """

    documents: Documents
    weight: float = 1.0
    encoded: dict[str, EncodedMedia] = dataclasses.field(default_factory=dict)

    @cached_property
    def stream(self) -> str | None:
        """The modality of tokens of its documents if they have only one; None if they are mixed."""
        if len(self.documents.modalities) != 1:
            return None
        (name,) = self.documents.modalities
        is_codes = name in self.encoded and self.encoded[name].kind == "codes"
        return name if name == TEXT or is_codes else None


@dataclass(frozen=True)
class Pool:
    """The documents of a source with latents of one size; or all documents of a source of only one stream.

    Attributes:
        source: Index of the source.
        items: Indices of the documents in the source; None means all.
        length: Number of documents.
    """

    source: int
    items: NDArray[np.int64] | None
    length: int

    def item(self, position: int) -> int:
        """Index in the source."""
        return position if self.items is None else int(self.items[position])


class Sources:
    """Sources of one split, from which rows are filled.

    The next document with media comes from a source with a chance in proportion to its weight. The remaining slots of a
    modality of tokens are filled with documents of only that modality, such as texts, chosen in the same way among
    their sources. Slots decide how much of a row that is, so weights only compare sources of the same kind.

    Buckets have shares of the steps such that all documents of a source have the same frequency.
    Documents without latents are in the most frequent bucket of their source.

    Args:
        sources: The sources; to fill rows, at least one must have media.
        latent_shapes: [C, Y, X] of every bucket, of each modality of latents.
        all_documents: Whether pools include captioned images that a cache knows to be unreadable; these are dropped
            when they are drawn. Without a cache (images are encoded during training) nothing is known about them. With
            this option the state of lanes has the same meaning with and without a cache.

    Attributes:
        names: Names of the sources: the last part of their paths, so that a run can be resumed with moved data. A
            second source of the same name is numbered.
        pools: Pools of all sources.
        media_pools: Indices of the pools of every bucket.
        stream_pools: Indices of the pools of documents of only one modality of tokens, by modality.
        shares: Share of each pool among the pools of its kind.
        bucket_shares: Probability of each bucket.
    """

    def __init__(
        self,
        sources: list[Source],
        latent_shapes: dict[str, list[tuple[int, int, int]]],
        all_documents: bool = False,
    ) -> None:
        self.sources = sources
        self.latent_shapes = latent_shapes
        self.names: list[str] = []
        for name in (_short_name(source.documents.name) for source in sources):
            same = sum(before.split(" #")[0] == name for before in self.names)
            self.names.append(f"{name} #{same + 1}" if same else name)
        self.pools: list[Pool] = []
        self.shares: list[float] = []
        self.stream_pools: dict[str, list[int]] = {TEXT: []}
        num_buckets = max((len(shapes) for shapes in latent_shapes.values()), default=1)
        self.media_pools: list[list[int]] = [[] for _ in range(num_buckets)]
        for index, source in enumerate(sources):
            if source.stream is not None:
                self.stream_pools.setdefault(source.stream, []).append(self._add_pool(index, None, 1.0))
                continue
            if len(self.media_pools) == 1 and not source.encoded and len(source.documents):
                # No code here may loop over documents, because there may be any number of them.
                self.media_pools[0].append(self._add_pool(index, None, 1.0))
                continue
            buckets = self._buckets(source)
            readable = self._readable(source)
            if not all_documents:
                buckets = np.where(readable, buckets, np.int16(-1))
            usable = int((buckets >= 0).sum())
            for bucket, pools in enumerate(self.media_pools):
                items = np.flatnonzero(buckets == bucket)
                if len(items):
                    is_all = len(items) == len(buckets)
                    # A bucket without readable documents gets no steps.
                    share = len(items) / usable if readable[items].any() else 0.0
                    pools.append(self._add_pool(index, None if is_all else items, share))
        totals = [sum(self.shares[pool] for pool in pools) for pools in self.media_pools]
        self.bucket_shares = [total / (sum(totals) or 1.0) for total in totals]

    def _add_pool(self, index: int, items: NDArray[np.int64] | None, share: float) -> int:
        source = self.sources[index]
        self.pools.append(Pool(index, items, len(source.documents) if items is None else len(items)))
        self.shares.append(source.weight * share)
        return len(self.pools) - 1

    def _buckets(self, source: Source) -> NDArray[np.int16]:
        """Bucket of every document: that of its first latents."""
        documents = source.documents
        result = np.zeros(len(documents), dtype=np.int16)
        buckets = {name: media.buckets for name, media in documents.media.items() if name in self.latent_shapes}
        all_buckets = np.concatenate([result[:0], *buckets.values()])
        if len(self.media_pools) == 1 or not len(all_buckets):
            return result
        if isinstance(documents, CaptionedImages):
            return documents.buckets
        usual = np.bincount(all_buckets).argmax()
        for index in range(len(result)):
            media = (item for item in documents.document(index) if isinstance(item, MediaItem))
            found = (buckets[item.modality][item.index] for item in media if item.modality in buckets)
            result[index] = next(found, usual)
        return result

    @staticmethod
    def _readable(source: Source) -> NDArray[np.bool_]:
        """[N] whether each document is usable, as far as is known."""
        own = own_media(source.documents)
        if own in source.encoded:
            return source.encoded[own].readable
        return np.ones(len(source.documents), dtype=np.bool_)

    def num_media_documents(self) -> int:
        """Documents with media that can be used."""
        return sum(self.pools[pool].length for pools in self.media_pools for pool in pools)

    def num_documents(self) -> int:
        """Documents of all sources that can be used."""
        return self._lengths().total()

    def only(self, is_wanted: Callable[[Documents], bool]) -> "Sources":
        """The collection with only some of the sources."""
        return Sources([source for source in self.sources if is_wanted(source.documents)], self.latent_shapes)

    def contents(self) -> list[str]:
        """Contents of the sources (not their paths) and their pools, on which the state of a lane depends.

        For example "coco: 8c1f of [118287] documents".
        """
        described = []
        for index, (name, source) in enumerate(zip(self.names, self.sources, strict=True)):
            lengths = [pool.length for pool in self.pools if pool.source == index]
            described.append(f"{name}: {source.documents.documents_fingerprint} of {lengths} documents")
        return described

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
        """Items of a source skipped before training: reason => count."""
        source = self.sources[index]
        left_out = dict(source.documents.skipped)
        for part in (*source.documents.media.values(), *source.encoded.values()):
            left_out |= part.skipped
        return left_out

    def report(self, seen: dict[str, int]) -> str:
        """A table of each source's share of the rows, by the counters of the run, and of skipped items with reasons."""
        lines = [
            f"{'source':<32}{'weight':>8}{'documents':>12}{'tokens':>14}{'media':>12}{'epochs':>9}  left out or cut"
        ]
        for index, (name, source) in enumerate(zip(self.names, self.sources, strict=True)):
            epochs = self.epochs(seen)[name]
            drops = {what.replace("_", " ").removesuffix("s"): seen.get(counter(name, what), 0) for what in DROPS}
            if source.documents.media.keys() <= source.encoded.keys():
                # The number of unreadable encoded media is more useful than how often they were drawn.
                del drops["unreadable item"]
            left_out = self.left_out(index) | {what: count for what, count in drops.items() if count}
            reasons = counted(left_out) or "nothing"
            documents, tokens, media = (seen.get(counter(name, what), 0) for what in ("documents", "tokens", "items"))
            short = name if len(name) <= 31 else f"...{name[-28:]}"
            lines.append(
                f"{short:<32}{source.weight:>8g}{documents:>12}{tokens:>14}{media:>12}{epochs:>9.2f}  {reasons}"
            )
        return "\n".join(lines)

    def epochs(self, seen: dict[str, int]) -> dict[str, float]:
        """Epochs of each source, by the counters of the run."""
        lengths = self._lengths()
        return {name: seen.get(counter(name, "taken"), 0) / lengths[index] for index, name in enumerate(self.names)}


def _short_name(name: str) -> str:
    """The last part of a path, which does not change when the data is moved."""
    path = Path(name)
    return (path if path.name.strip(".") else path.resolve()).name


# Counters of each source: documents taken from it, documents that are completely in rows, tokens in rows (of text, or
# codes of documents with only codes), media in rows, and skipped or cut documents.
DROPS = ("cut_captions", "cut_documents", "unreadable_items", "too_long_items", "dropped_documents")
SOURCE_COUNTED = ("taken", "documents", "tokens", "items", *DROPS)


def counter(source: str, what: str) -> str:
    """Name of a counter of a source."""
    return f"sources/{source}/{what}"


def open_documents(data: DataConfig, split: Split, readers: Collection[str] = ()) -> list[Source]:
    """Open every source of a split; sources without held-out documents are left out of the held-out split.

    Args:
        data: The sources, and the slots of each modality.
        split: Split of the documents.
        readers: Modalities whose slots hold media of other modalities, so that no source has them.

    Raises:
        UserError: A source cannot be opened or has a modality that rows do not have, two sources of the same data have
            different `use`, or a modality has no training documents.
    """
    for config in data.sources:
        media = [name for name in data.slots if name != TEXT and name not in readers]
        for modality, medium in media_of(config).items():
            if modality not in media:
                key = "audio_modality" if medium == "audio" else "modality"
                raise UserError(
                    f"a source of kind '{config.kind}' has the modality '{modality}', but model.modalities has only "
                    f"{', '.join(media) or 'none'} besides text; set '{key}' of the source to one of them"
                )
    _refuse_two_uses(data.sources)
    sources = [Source(open_source(source, data, split), source.weight) for source in data.sources]
    sources = [source for source in sources if len(source.documents)]
    if split == "train":
        _refuse_without_media(sources, data, readers)
    if data.orders is not None:
        _refuse_without_order(sources, data.orders)
    return sources


def _refuse_without_media(sources: list[Source], data: DataConfig, readers: Collection[str]) -> None:
    """Refuse modalities without training documents."""
    found = {TEXT, *readers, *(name for source in sources for name in source.documents.modalities)}
    for missing in (name for name in data.slots if name not in found):
        if any(missing in media_of(s) and s.use == "held_out" for s in data.sources):
            raise UserError(
                f"all sources of data.sources that have {missing} media are held out; set 'use' of one to train or "
                "split"
            )
        kinds = ", ".join(kind for kind in get_args(get_type_hints(SourceConfig)["kind"]) if kind != "text")
        raise UserError(
            f"data.sources has no source with {missing} media to train on; kinds that have media are {kinds}"
        )


def _refuse_without_order(sources: list[Source], orders: dict[str, float]) -> None:
    """Refuse sources whose documents do not fit any order."""
    for documents in (source.documents for source in sources if source.documents.is_paired):
        has = set(documents.modalities)
        if not any(chance > 0 and set(order.split()) <= has for order, chance in orders.items()):
            raise UserError(
                f"data.orders has no order for the source '{documents.name}', which has only "
                f"{' and '.join(documents.modalities)}; add one, such as '{' '.join(documents.modalities)}'"
            )


def _refuse_two_uses(sources: list[SourceConfig]) -> None:
    """Refuse data that one source uses for training and another holds out."""
    uses: dict[tuple[str | None, ...], str] = {}
    for source in sources:
        places = [None if path is None else str(Path(path).resolve()) for path in (source.path, source.annotations)]
        use = uses.setdefault((source.kind, *places, source.name, source.split), source.use)
        if use != source.use:
            raise UserError(
                f"two sources of kind '{source.kind}' read the same data, '{source.path or source.kind}', with 'use' "
                f"{use} and {source.use}, so training would see held-out data; give each its own data, or one entry "
                "with 'use' split"
            )


def with_encoded(
    sources: list[Source],
    data: DataConfig,
    codecs: dict[str, Codec],
    codec_configs: dict[str, CodecConfig],
    accelerator: Accelerator | None = None,
    *,
    all_documents: bool = False,
) -> Sources:
    """Open the encoded media of the sources, encoding what a cache lacks.

    Latents are not opened if they are encoded during training (`data.latents: online`). All processes of `accelerator`
    must call this together.

    Args:
        sources: The documents of one split.
        data: The transform of media, and the cache folder.
        codecs: Codec of each modality except text.
        codec_configs: Configuration of each codec; it sets the batch size of encoding.
        accelerator: Its processes share the work.
        all_documents: See `Sources`.
    """
    _refuse_cached_scenes(sources, data, codecs)
    opened = []
    for source in sources:
        encoded: dict[str, EncodedMedia] = {
            name: encoded_media(
                media, codecs[name], data, batch_size=codec_configs[name].batch_size, accelerator=accelerator
            )
            for name, media in source.documents.media.items()
            if codecs[name].kind == "codes" or data.latents != "online"
        }
        opened.append(dataclasses.replace(source, encoded=encoded))
    latent_shapes = {
        name: [
            (codec.latent_channels, height // codec.downsampling, width // codec.downsampling)
            for height, width in data.image_sizes
        ]
        for name, codec in codecs.items()
        if codec.kind == "latents"
    }
    return Sources(opened, latent_shapes, all_documents)


def _refuse_cached_scenes(sources: list[Source], data: DataConfig, codecs: dict[str, Codec]) -> None:
    for documents in (source.documents for source in sources if isinstance(source.documents, Scenes)):
        kind = codecs[documents.modality].kind
        if not documents.is_storable and (kind == "codes" or data.latents != "online"):
            online = f", or set data.latents to online (now {data.latents})" if kind == "latents" else ""
            raise UserError(
                f"the source '{documents.name}' of kind 'scenes' has {len(documents):,} pictures, too many to store "
                f"their {kind}; set its num_items, for example to 300000{online}"
            )


def training_texts(sources: list[Source]) -> Iterator[str]:
    """Captions and texts to train a tokenizer; evenly spaced documents of a large source."""
    for documents in (source.documents for source in sources):
        most = _NUM_TOKENIZER_SCENES if isinstance(documents, Scenes) else _NUM_TOKENIZER_DOCUMENTS
        for index in range(0, len(documents), 1 + len(documents) // most):
            for item in documents.document(index):
                if isinstance(item, Text):
                    yield from item.choices
