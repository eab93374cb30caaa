"""Training recordings of a speech codec."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from transfusion_mot.config import DataConfig
from transfusion_mot.cores import usable_cores
from transfusion_mot.data.audio import UnreadableAudio, resample
from transfusion_mot.data.sources.base import AudioSet, Documents, MediaItem, SkippedItems, Split, Text
from transfusion_mot.data.sources.open import open_source
from transfusion_mot.errors import UserError


class Recording(NamedTuple):
    """Samples float32 [T] in [-1, 1], and the transcript, if it is known."""

    samples: npt.NDArray[np.float32]
    text: str


def read_recordings(data: DataConfig, sample_rate: int, split: Split) -> list[Recording]:
    """All readable recordings of all sources, resampled.

    Raises:
        UserError: A source cannot be opened, or there are no training recordings.
    """
    recordings: list[Recording] = []
    for source in data.sources:
        if source.kind == "text":
            continue
        documents = open_source(source, data, split)
        skipped = SkippedItems()
        entries = list(_entries(documents))

        def read(entry: tuple[AudioSet, int, str]) -> Recording | UnreadableAudio:
            audio_set, index, text = entry
            try:
                return Recording(resample(audio_set.audio(index), sample_rate), text)
            except UnreadableAudio as error:
                return error

        with ThreadPoolExecutor(usable_cores()) as pool:
            results = pool.map(read, entries)
            progress = f"reading {documents.name} ({split})"
            for result in tqdm(results, desc=progress, total=len(entries), unit="recording", mininterval=1.0):
                if isinstance(result, Recording):
                    recordings.append(result)
                else:
                    skipped.add("unreadable audio", str(result))
        skipped.warn(documents.name, len(entries) - sum(skipped.counts.values()), "recording")
    if split == "train" and not recordings:
        raise UserError("data.sources holds no readable audio to train on; audio_codes needs sources with audio")
    return recordings


def _entries(documents: Documents) -> Iterator[tuple[AudioSet, int, str]]:
    """The audio in documents: its place, and the first text of its document."""
    for number in range(len(documents)):
        items = documents.document(number)
        text = next((item.choices[0] for item in items if isinstance(item, Text)), "")
        for item in items:
            if isinstance(item, MediaItem):
                media = documents.media[item.modality]
                if media.medium == "audio":
                    yield media, item.index, text
