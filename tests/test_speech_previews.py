"""Audio previews of a run with speech, and the model card of its snapshots."""

import json
import wave
from pathlib import Path

import numpy as np
import pytest
from accelerate import Accelerator
from conftest import texts_of
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_pipeline import seeds, tiny_pipeline
from test_pipeline_speech import RATE, speech_pipeline, tone

from transfusion_mot.config import DataConfig, SourceConfig
from transfusion_mot.data.audio import write_wav
from transfusion_mot.data.mixture import Source, Sources
from transfusion_mot.data.sources.open import open_source
from transfusion_mot.sampling.previews import Previews
from transfusion_mot.sampling.speech_previews import recordings_of


@pytest.fixture
def held_out(tmp_path: Path) -> Sources:
    """Twelve recordings that encode their number n; each is n hundredths of a second longer."""
    folder = tmp_path / "recordings"
    folder.mkdir()
    for number in range(12):
        write_wav(tone(0.1 + number / 100), folder / f"{number:02}.wav")
    lines = [json.dumps({"file_name": f"{number:02}.wav", "transcription": f"sun {number}"}) for number in range(12)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    data = DataConfig(held_out_fraction=0.0, cache_dir=str(tmp_path / "cache"), max_audio_seconds=1.0)
    source = Source(open_source(SourceConfig("audiofolder", path=str(folder)), data, "train"))
    return Sources([source, texts_of(["a text"])], {})


def test_recordings_are_evenly_spaced_and_have_their_texts(held_out) -> None:
    recordings, texts = recordings_of(held_out, "speech", 4)
    numbers = [int(text.removeprefix("sun ")) for text in texts]
    assert len(numbers) == 4
    assert np.ptp(np.diff(sorted(numbers))) <= 1
    assert [len(audio.samples) for audio in recordings] == [int((0.1 + number / 100) * RATE) for number in numbers]


@pytest.mark.parametrize("has_images", [True, False])
def test_speech_of_held_out_texts_and_transcripts(held_out, tmp_path, has_images) -> None:
    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=str(tmp_path))
    accelerator.init_trackers("run")
    pipeline = speech_pipeline(has_images=has_images)
    previews = Previews(pipeline, None, held_out, tmp_path / "samples")
    said = previews.make(7, accelerator)
    recordings, texts = recordings_of(held_out, "speech", 4)
    transcripts = pipeline.transcribe(recordings)
    assert all(line.endswith(f", said '{text}'") for line, text in zip(said, texts, strict=True))
    shown = ["".join(c if c.isprintable() else "?" for c in text) or "(nothing)" for text in transcripts]
    assert [line.split("', said '")[0].removeprefix("heard '") for line in said] == shown
    spoken = pipeline.speak(texts, generator=seeds(0, 1, 2, 3))
    files = sorted((tmp_path / "samples" / "step-0000007-speech").iterdir())
    assert [path.name for path in files] == [f"{i}-{text.replace(' ', '-')}.wav" for i, text in enumerate(texts)]
    for path, audio in zip(files, spoken, strict=True):
        with wave.open(str(path)) as file:
            samples = np.frombuffer(file.readframes(file.getnframes()), dtype="<i2")
        assert np.abs(samples - audio.samples * 32768).max(initial=0) <= 1
    picture = Image.open(tmp_path / "samples" / "step-0000007-speech.png").convert("RGB")
    assert np.asarray(picture).std() > 10
    accelerator.end_training()
    events = EventAccumulator(str(next(tmp_path.rglob("events.out*")).parent))
    events.Reload()
    assert events.Tags()["audio"] == [f"speech/{place}" for place in range(4)]
    # There are no pictures to paint for.
    assert not (tmp_path / "samples" / "step-0000007.png").exists()


def test_prompts_of_the_run_are_said(held_out, tmp_path) -> None:
    Previews(speech_pipeline(), ["sun", "an octopus"], held_out, tmp_path / "samples").make(1, Accelerator(cpu=True))
    folder = tmp_path / "samples" / "step-0000001-speech"
    assert sorted(path.name for path in folder.iterdir()) == ["0-sun.wav", "1-an-octopus.wav"]


def test_a_model_without_speech_is_not_heard(held_out, tmp_path) -> None:
    previews = Previews(tiny_pipeline(), [], held_out, tmp_path / "samples")
    assert previews.make(1, Accelerator(cpu=True)) == []
    assert not (tmp_path / "samples").exists()
