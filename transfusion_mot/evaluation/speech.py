"""Recordings with their texts, and word and character error rates of transcripts."""

import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from transfusion_mot.data.audio import Audio, audio_seconds, decode_audio
from transfusion_mot.errors import UserError
from transfusion_mot.evaluation.intervals import mean_interval
from transfusion_mot.evaluation.report.content import Metric
from transfusion_mot.files import lines_of

NORMALISATION = "lower case, letters, digits and apostrophes"
_NAMES = ("audio_file_name", "file_name")
_TEXTS = ("transcription", "text")
_HELD_OUT = "held_out"
_NO_WORD = re.compile(r"[^\w']|_")


@dataclass(frozen=True)
class Recording:
    """Speech whose text is known.

    Attributes:
        path: The audio file.
        text: The transcript.
    """

    path: Path
    text: str

    def audio(self) -> Audio:
        """The samples."""
        return decode_audio(self.path)


@dataclass(frozen=True)
class RecordingSet:
    """The recordings of a folder.

    Attributes:
        name: Name of the folder.
        held_out: Evenly spaced held-out recordings.
        texts: Texts of all recordings of the folder.
    """

    name: str
    held_out: list[Recording]
    texts: list[str]


def read_recordings(folder: str | Path, count: int) -> RecordingSet:
    """The held-out recordings of a folder with a `metadata.jsonl`: lines with `file_name` (or `audio_file_name`),
    `text` (or `transcription`) and `split`; without `split`, all are held out.

    Raises:
        UserError: The folder has another form, or no held-out recordings.
    """
    path = Path(folder) / "metadata.jsonl"
    try:
        lines = lines_of(path.read_text(encoding="utf-8-sig"))
        entries = [json.loads(line) for line in lines if line.strip()]
        rows = [(_first(entry, _NAMES), _first(entry, _TEXTS), entry.get("split", _HELD_OUT)) for entry in entries]
    except (OSError, ValueError, LookupError, AttributeError) as error:
        raise UserError(
            f"'{folder}' is not a folder of recordings with their texts ({error}); give one with a metadata.jsonl, as "
            "`python -m transfusion_mot.data.speech` writes them"
        ) from None
    held_out = [Recording(path.parent / name, text) for name, text, split in rows if split == _HELD_OUT]
    if not held_out:
        raise UserError(f'\'{path}\': no recording is held out; mark some with "split": "held_out"')
    places = np.unique(np.linspace(0, len(held_out) - 1, min(count, len(held_out))).round().astype(int))
    return RecordingSet(Path(folder).resolve().name, [held_out[place] for place in places], [row[1] for row in rows])


def at_most(recordings: RecordingSet, seconds: float | None) -> RecordingSet:
    """The recordings up to a duration; None keeps all.

    Raises:
        UserError: All are longer.
    """
    if seconds is None:
        return recordings
    kept = [one for one in recordings.held_out if audio_seconds(one.path) <= seconds]
    if not kept:
        raise UserError(f"all recordings of '{recordings.name}' last longer than {seconds:g} seconds; cut them")
    return replace(recordings, held_out=kept)


def _first(entry: dict[str, Any], keys: Sequence[str]) -> str:
    for key in keys:
        if isinstance(entry.get(key), str):
            return str(entry[key])
    raise LookupError(f"a line has no {' or '.join(keys)}")


def normalise(text: str) -> str:
    """The normalised text for comparison: "Login  incorrect." => "login incorrect". An accent may be a character of its
    own."""
    text = unicodedata.normalize("NFC", text)
    return " ".join(_NO_WORD.sub(" ", text.lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")).split())


def error_rates(texts: Sequence[str], transcripts: Sequence[str], protocol: dict[str, Any]) -> list[Metric]:
    """Word and character error rate: insertions, deletions and substitutions over the words or characters of all
    texts, each with an interval over the recordings; no metrics without texts.

    Args:
        texts: The true texts; each has at least one word.
        transcripts: Transcripts in the same order.
        protocol: Protocol of the transcripts; counts and the normalisation are added.

    Raises:
        UserError: The package jiwer is missing.
    """
    try:
        import jiwer
    except ImportError:
        raise UserError("word error rates need the package jiwer: pip install 'transfusion-mot[speech]'") from None
    if not texts:
        return []
    pairs = [(normalise(text), normalise(heard)) for text, heard in zip(texts, transcripts, strict=True)]
    metrics = []
    for name, process in (("WER", jiwer.process_words), ("CER", jiwer.process_characters)):
        found = [process(text, heard) for text, heard in pairs]
        errors = np.array([one.substitutions + one.deletions + one.insertions for one in found], np.float64)
        lengths = np.array([one.substitutions + one.deletions + one.hits for one in found], np.float64)
        about = protocol | {"recordings": len(pairs), "texts": NORMALISATION}
        interval = mean_interval(errors, lengths) if errors.any() else None
        metrics.append(Metric(name, float(errors.sum() / lengths.sum()), about, interval))
    return metrics
