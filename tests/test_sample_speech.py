"""sample.py with speech, called from a shell."""

import runpy
import wave
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_pipeline import tiny_pipeline
from test_pipeline_speech import RATE, picture, speech_pipeline, tone
from test_sample_script import SCRIPT, lines, pixels

from transfusion_mot.data.audio import decode_audio, write_wav
from transfusion_mot.pipeline import TransfusionPipeline


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    speech_pipeline().save_pretrained(folder / "snapshots" / "step-0000020")
    return folder


@pytest.fixture(scope="module")
def pipeline(run) -> TransfusionPipeline:
    pipeline = TransfusionPipeline.from_pretrained(run / "snapshots" / "step-0000020")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def sample(run, monkeypatch) -> Callable[..., None]:
    """Call the script with these arguments on the run."""

    def call(*arguments: object, checkpoint: Path = run) -> None:
        words = ["sample.py", "--checkpoint", checkpoint, "--device", "cpu", *arguments]
        monkeypatch.setattr("sys.argv", [str(word) for word in words])
        runpy.run_path(str(SCRIPT), run_name="__main__")

    return call


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    """A folder with recordings and a picture, as the current one."""
    monkeypatch.chdir(tmp_path)
    write_wav(tone(), tmp_path / "a.wav")
    write_wav(tone(0.1, 200, rate=8000), tmp_path / "b.wav")
    write_wav(tone(3.0), tmp_path / "long.wav")
    (tmp_path / "text.wav").write_text("no audio")
    picture().save(tmp_path / "picture.png")
    return tmp_path


def samples_of(path: Path) -> np.ndarray:
    """16 bits as the standard library reads them."""
    with wave.open(str(path)) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, RATE)
        return np.frombuffer(file.readframes(file.getnframes()), dtype="<i2")


def spoken(pipeline: TransfusionPipeline, prompt, seed: int, **settings) -> np.ndarray:
    (audio,) = pipeline.speak(prompt, generator=torch.Generator().manual_seed(seed), **settings)
    return audio.samples * 32768


def test_speech_of_texts_and_what_is_written_about_it(sample, pipeline, workplace, capsys) -> None:
    words = ["--task", "speech", "sun", "an octopus", "--num-images", 2, "--max-seconds", 0.3, "--code-top-k", 9]
    sample(*words)
    told = lines(workplace / "samples" / "speech")
    assert [line["file_name"] for line in told] == [
        "0000-sun.wav",
        "0001-sun.wav",
        "0002-an-octopus.wav",
        "0003-an-octopus.wav",
    ]
    assert [line["transcription"] for line in told] == ["sun", "sun", "an octopus", "an octopus"]
    for line in told:
        samples = samples_of(workplace / "samples" / "speech" / line["file_name"])
        assert line["seconds"] == round(len(samples) / RATE, 2) <= 0.3
        expected = spoken(pipeline, line["transcription"], line["audio_seed"], max_seconds=0.3, top_k=9)
        assert np.abs(samples - expected).max(initial=0) <= 1
    assert f"0000-sun.wav: {told[0]['seconds']:.1f} s" in capsys.readouterr().out

    # The same command has nothing left to do; what was lost is not made again.
    before = {path: path.stat().st_mtime_ns for path in (workplace / "samples" / "speech").glob("*.wav")}
    sample(*words)
    assert {path: path.stat().st_mtime_ns for path in (workplace / "samples" / "speech").glob("*.wav")} == before
    # Another one adds to it, in whatever batches.
    sample(*words[:4], *words[6:], "--batch-size", 1)
    added = lines(workplace / "samples" / "speech")[4:]
    assert [line["file_name"] for line in added] == ["0004-sun.wav", "0005-an-octopus.wav"]
    assert [line["audio_seed"] for line in added] == [told[0]["audio_seed"], told[2]["audio_seed"]]


def test_speech_is_one_file_if_that_is_asked_for(sample, pipeline, workplace, capsys) -> None:
    sample("--task", "speech", "sun", "--output", "new/x.wav", "--max-seconds", 0.2, "--guidance-scale", 1)
    assert capsys.readouterr().out.startswith("new/x.wav: 0.")
    assert [path.name for path in workplace.iterdir() if path.is_dir()] == ["new"]
    sample("--task", "speech", "sun", "--output", "folder", "--max-seconds", 0.2, "--guidance-scale", 1)
    assert np.array_equal(samples_of(workplace / "new/x.wav"), samples_of(workplace / "folder/0000-sun.wav"))
    sample("--task", "speech", "--image", "picture.png", "--output", "y.wav", "--max-seconds", 0.2)
    sample("--task", "speech", "--image", "picture.png", "--output", "folder", "--max-seconds", 0.2)
    line = lines(workplace / "folder")[-1]
    assert (line["file_name"], line["image"]) == ("0001-picture.wav", "picture.png")
    expected = spoken(pipeline, picture(), line["audio_seed"], max_seconds=0.2)
    assert np.abs(samples_of(workplace / "y.wav") - expected).max(initial=0) <= 1


def test_recordings_become_transcripts_and_pictures(sample, pipeline, workplace, capsys) -> None:
    sample("--transcribe", "a.wav", "b.wav", "--max-new-tokens", 5, "--output", "out")
    expected = pipeline.transcribe([decode_audio("a.wav"), decode_audio("b.wav")], max_new_tokens=5)
    assert lines(workplace / "out", "transcripts.jsonl") == [
        {"file_name": name, "text": text} for name, text in zip(("a.wav", "b.wav"), expected, strict=True)
    ]
    assert "a.wav: " in capsys.readouterr().out
    sample("--speech", "a.wav", "b.wav", "--output", "painted")
    for line, name in zip(lines(workplace / "painted"), ("a.wav", "b.wav"), strict=True):
        assert line["audio"] == name
        generator = torch.Generator().manual_seed(line["image_seed"])
        again = pipeline(decode_audio(name), generator=generator).images[0]
        assert np.abs(np.asarray(again).astype(int) - pixels(workplace / "painted", line)).max() <= 1
    assert Image.open("painted/grid.png").width > 8


MISTAKES = [
    (["--transcribe", "text.wav"], "audio clip 'text.wav' cannot be read"),
    (["--transcribe", "none.wav"], "audio clip 'none.wav' does not exist"),
    (
        ["--transcribe", "long.wav"],
        "audio clip 'long.wav' lasts 3.0 seconds; the model was trained on at most 1: cut it",
    ),
    (["--transcribe", "a.wav", "--task", "caption"], "both --task caption and --transcribe are given"),
    (["--task", "transcribe"], "--task transcribe has nothing to do; give --transcribe AUDIO"),
    (["--speech", "long.wav"], "audio clip 'long.wav' lasts 3.0 seconds"),
    (["sun", "--speech", "a.wav"], "both prompts and --speech are given; --speech replaces prompts"),
    (["--speech", "a.wav", "--task", "speech"], "both --task speech and --speech are given"),
    (["--task", "speech"], "there is nothing to do; give a prompt"),
    (["--task", "speech", "sun", "--image", "picture.png"], "both prompts and --image are given"),
    (["--task", "speech", "sun", "moon", "--output", "x.wav"], "--output x.wav is a file for one result"),
    (["sun", "--output", "x.wav"], "--output x.wav is a file for one result of --task speech"),
    (["sun", "--max-seconds", 2], "--max-seconds goes with --task speech, not with image"),
    (["--task", "speech", "sun", "--max-seconds", 0], "max_seconds is 0.0; it must be a positive number"),
    (["--task", "speech", "sun", "--code-top-p", 2], "top_p is 2.0"),
    (["--task", "speech", " "], "prompt 1 is empty; write a text"),
    (["--task", "speech", "sun", "--output", "x.mp3"], "--output x.mp3: speech is written as WAV files"),
    (
        ["--task", "speech", "sun", "--scheduler", "Euler"],
        "--scheduler goes with --task image or edit or auto, not",
    ),
    (["--transcribe", "a.wav", "--guidance-scale", 2], "--guidance-scale goes with --task image or edit or auto or sp"),
]


def test_mistakes_end_with_one_sentence(sample, workplace, capsys) -> None:
    for arguments, message in MISTAKES:
        with pytest.raises(SystemExit) as ended:
            sample(*arguments)
        assert ended.value.code == 2
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(said) == 1
        assert message in said[0]
        assert not (workplace / "samples").exists()


def test_a_model_without_speech_says_so(sample, workplace, capsys, tmp_path) -> None:
    tiny_pipeline().save_pretrained(tmp_path / "none")
    for arguments in (["--task", "speech", "sun"], ["--transcribe", "a.wav"], ["--speech", "a.wav"]):
        with pytest.raises(SystemExit):
            sample(*arguments, checkpoint=tmp_path / "none")
        assert "error: this model has no speech" in capsys.readouterr().err
