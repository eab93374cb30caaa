"""Speech recognisers that are independent of the model and measure the intelligibility of its speech."""

import os
import tempfile
import weakref
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from transfusion_mot.data.audio import Audio, resample
from transfusion_mot.errors import UserError
from transfusion_mot.evaluation.speech import normalise
from transfusion_mot.hub_names import ask_hub

_SAMPLE_RATE = 16_000
# Silence at both ends; without it the first and last words are often missed.
_SILENCE_SECONDS = 0.25


class Recogniser(Protocol):
    """Transcribes speech.

    Attributes:
        name: Its name in protocols of metrics.
    """

    name: str

    def knows(self, text: str) -> bool:
        """Whether it knows all words of a text."""
        ...

    def transcribe(self, recordings: Sequence[Audio]) -> list[str]:
        """A transcript of each."""
        ...


class PocketSphinx:
    """CMU's recogniser with the English acoustic model of the package `pocketsphinx`.

    Its language model is made only from the given texts, so that it chooses among the words of the corpus. With its own
    model of English, it mostly guesses short names.

    Processes are forked at once, and a forked process cannot use CUDA: create it before CUDA is used.

    Args:
        texts: Texts of the corpus, including those that will be transcribed.
        workers: Number of processes.

    Raises:
        UserError: The package is missing, or it has none of the words.
    """

    def __init__(self, texts: Iterable[str], workers: int) -> None:
        try:
            import pocketsphinx
            from pocketsphinx.lm import ArpaBoLM
        except ImportError:
            raise UserError(
                "the recogniser needs the package pocketsphinx: pip install 'transfusion-mot[speech]', or name a model "
                "of transformers by --recogniser"
            ) from None
        self.name = "pocketsphinx with a language model of the corpus"
        lines = Path(pocketsphinx.get_model_path("en-us/cmudict-en-us.dict")).read_text(encoding="utf-8").splitlines()
        # A word with several pronunciations has additional lines: "read(2)".
        pronounced = [(line.split(maxsplit=1)[0].partition("(")[0], line) for line in lines]
        known = {word for word, _ in pronounced}
        sentences = [words for text in texts if known.issuperset(words := normalise(text).split()) and words]
        if not sentences:
            raise UserError("pocketsphinx knows no text of the recordings: it is for English")
        self._words = {word for words in sentences for word in words}
        self._folder = tempfile.TemporaryDirectory()
        language, dictionary = (str(Path(self._folder.name) / name) for name in ("corpus.lm", "corpus.dict"))
        model = ArpaBoLM(text="\n".join(f"<s> {' '.join(words)} </s>" for words in sentences))
        model.compute()
        model.write_file(language)
        Path(dictionary).write_text("\n".join(line for word, line in pronounced if word in self._words) + "\n")
        self._pool = ProcessPoolExecutor(
            workers, mp_context=get_context("fork"), initializer=_load, initargs=(language, dictionary)
        )
        self._pool.submit(os.getpid).result()
        # Without this, an unreferenced pool would close its pipes while the interpreter still writes to them at exit.
        weakref.finalize(self, self._pool.shutdown, cancel_futures=True)

    def knows(self, text: str) -> bool:
        """Whether its dictionary has all words of a text."""
        return self._words.issuperset(normalise(text).split())

    def transcribe(self, recordings: Sequence[Audio]) -> list[str]:
        """A transcript of each, in lower case."""
        waiting = [self._pool.submit(_recognise, audio) for audio in recordings]
        return [one.result() for one in tqdm(waiting, desc="recognising", unit="recording", leave=False)]


_decoder: Any = None


def _load(language: str, dictionary: str) -> None:
    global _decoder
    import pocketsphinx

    # Means of a whole recording.
    _decoder = pocketsphinx.Decoder(lm=language, dict=dictionary, cmn="batch", loglevel="FATAL")


def _recognise(audio: Audio) -> str:
    silence = int(_SILENCE_SECONDS * _SAMPLE_RATE)
    samples = np.pad(resample(audio, _SAMPLE_RATE), silence) if len(audio.samples) else np.zeros(silence)
    # Dither, because the logarithm of the silence between synthetic words is not finite. The decoder keeps the state of
    # its own dither and noise estimate between recordings, so transcripts would depend on earlier ones.
    dither = np.random.default_rng(0).integers(0, 2, len(samples))
    _decoder.start_stream()
    _decoder.start_utt()
    _decoder.process_raw((samples * (2**15 - 2) + dither).astype(np.int16).tobytes(), no_search=False, full_utt=True)
    _decoder.end_utt()
    hypothesis = _decoder.hyp()
    return hypothesis.hypstr if hypothesis is not None else ""


class TransformersRecogniser:
    """A model for speech recognition of the library transformers, such as "openai/whisper-small".

    Args:
        model: Name on the hub, or folder.
        device: Device of the model.

    Raises:
        UserError: There is no such model.
    """

    def __init__(self, model: str, device: str) -> None:
        from transformers import pipeline

        self.name = model
        try:
            ask_hub(model)
            self._pipeline = pipeline("automatic-speech-recognition", model=model, device=device)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"'{model}' is not a speech recogniser of transformers ({str(error).splitlines()[0]}); give a name on "
                "the hub or a folder, or 'pocketsphinx'"
            ) from None

    def knows(self, text: str) -> bool:
        """Always true: it writes letters."""
        return True

    def transcribe(self, recordings: Sequence[Audio]) -> list[str]:
        """A transcript of each."""
        rate = self._pipeline.feature_extractor.sampling_rate
        silence = np.zeros(int(_SILENCE_SECONDS * rate), np.float32)
        found = []
        for audio in tqdm(recordings, desc="recognising", unit="recording", leave=False):
            samples = np.concatenate([silence, resample(audio, rate), silence]) if len(audio.samples) else silence
            found.append(self._pipeline({"raw": samples, "sampling_rate": rate})["text"])
        return found
