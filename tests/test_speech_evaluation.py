"""Word error rates, recognisers, and evaluate/speech.py on a tiny model."""

import json
import runpy
import sys
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import pytest
import torch
from test_pipeline_speech import RATE, speech_pipeline, tone

from transfusion_mot.data.audio import Audio, write_wav
from transfusion_mot.data.espeak import speak
from transfusion_mot.errors import UserError
from transfusion_mot.evaluation.recognisers import PocketSphinx
from transfusion_mot.evaluation.speech import at_most, error_rates, normalise, read_recordings
from transfusion_mot.sampling.held_out_speech import intelligibility_metrics, through_codec, transcription_metrics

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[1] / "evaluate" / "speech.py"
TEXTS = ["a red apple", "an octopus", "the sun is a star", "small bird", "green house", "seven wooden chairs"]


def edits(one, other):
    """Levenshtein's distance of two sequences."""
    row = list(range(len(other) + 1))
    for index, left in enumerate(one, 1):
        new = [index]
        for place, right in enumerate(other, 1):
            new.append(min(row[place] + 1, new[-1] + 1, row[place - 1] + (left != right)))
        row = new
    return row[-1]


def test_texts_are_compared_by_their_words():
    assert normalise("  Login incorrect. Don\N{RIGHT SINGLE QUOTATION MARK}t -- press 1_now!") == (
        "login incorrect don't press 1 now"
    )
    assert normalise("Café") == "café"
    assert normalise("Cafe\N{COMBINING ACUTE ACCENT}") == "café"
    assert normalise("...") == ""


def test_error_rates_are_edits_over_lengths():
    rng = np.random.default_rng(0)
    words = ["red", "apple", "octopus", "sun", "a", "bird"]
    texts, heard = ([" ".join(rng.choice(words, rng.integers(least, 7))) for _ in range(40)] for least in (1, 0))
    wer, cer = error_rates(texts, [text.upper() + "." for text in heard], {"judge": "x"})
    pairs = list(zip(texts, heard, strict=True))
    expected = sum(edits(t.split(), h.split()) for t, h in pairs) / sum(len(t.split()) for t in texts)
    assert (wer.name, wer.value) == ("WER", pytest.approx(expected))
    assert cer.value == pytest.approx(sum(edits(t, h) for t, h in pairs) / sum(map(len, texts)))
    assert wer.interval[0] < wer.value < wer.interval[1]
    assert wer.protocol["judge"] == "x"
    assert wer.protocol["recordings"] == 40
    assert [metric.value for metric in error_rates(texts, texts, {})] == [0, 0]
    assert error_rates([], [], {}) == []


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """An audio folder: half of it held out, and one recording that is too long for the model."""
    folder = tmp_path_factory.mktemp("names")
    lines = []
    for index, text in enumerate([*TEXTS, "much too long"]):
        write_wav(tone(0.2 if index < len(TEXTS) else 3.0), folder / f"{index}.wav")
        split = "held_out" if index % 2 == 0 else "train"
        lines.append(json.dumps({"file_name": f"{index}.wav", "transcription": text, "split": split}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))
    return folder


def test_recordings_of_a_folder(recordings, tmp_path):
    found = read_recordings(recordings, 100)
    assert found.name == recordings.name
    assert found.texts == [*TEXTS, "much too long"]
    assert [one.text for one in found.held_out] == [*TEXTS[::2], "much too long"]
    assert [one.text for one in read_recordings(recordings, 2).held_out] == [TEXTS[0], "much too long"]
    assert found.held_out[0].audio().sample_rate == RATE
    assert [one.text for one in at_most(found, 1.0).held_out] == TEXTS[::2]
    assert at_most(found, None) == found
    with pytest.raises(UserError, match="last longer than"):
        at_most(found, 0.1)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.wav", "text": "a", "split": "train"}\n')
    with pytest.raises(UserError, match="no recording is held out"):
        read_recordings(tmp_path, 1)
    # As editors write it: a mark in front, and an empty line.
    line = '{"file_name": "a.wav", "text": "a\u2028b"}'
    (tmp_path / "metadata.jsonl").write_text(f"{line}\n\n{line}\n", encoding="utf-8-sig")
    assert read_recordings(tmp_path, 9).texts == ["a\u2028b"] * 2
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.wav"}\n')
    with pytest.raises(UserError, match="a line has no transcription or text"):
        read_recordings(tmp_path, 1)


def test_pocketsphinx_understands_the_engine_and_no_noise():
    recogniser = PocketSphinx([*TEXTS, "of xyzzyx"], workers=1)
    assert recogniser.knows("A red octopus!")
    assert not recogniser.knows("of xyzzyx")
    spoken = [speak(text, "en-us+f5", words_per_minute=150, pitch=50) for text in TEXTS]
    heard = recogniser.transcribe(spoken)
    assert heard == TEXTS
    noise = Audio(np.random.default_rng(0).standard_normal(16000).astype(np.float32) * 0.1, 16000)
    assert recogniser.transcribe([noise, Audio(np.zeros(0, np.float32), 16000)])[0] not in TEXTS
    with pytest.raises(UserError, match="knows no text"):
        PocketSphinx(["xyzzyx"], workers=1)
    # Its processes end with it: at the end of the interpreter they would write into closed pipes.
    children = active_children()
    assert children
    del recogniser
    assert not set(children) & set(active_children())


def test_what_is_heard_does_not_depend_on_what_was_heard_before():
    words = ("red", "bread", "bed", "head", "dead", "led", "said", "shed", "fed", "wed")
    texts = [f"{one} {two} {three}" for one, two, three in zip(words, words[3:], words[5:], strict=False)]
    recogniser = PocketSphinx(texts, workers=1)
    rng = np.random.default_rng(0)
    mumbled = []
    for text in texts * 4:
        spoken = speak(text, "en-us+steph", words_per_minute=170, pitch=40)
        noise = rng.standard_normal(len(spoken.samples)) * 10 ** rng.uniform(-3, -1)
        mumbled.append(Audio((spoken.samples + noise).astype(np.float32), spoken.sample_rate))
    heard = recogniser.transcribe(mumbled)
    assert len(set(heard)) > 5
    assert recogniser.transcribe(mumbled[::-1])[::-1] == heard


class Listening:
    """A recogniser that writes down how long things are."""

    name = "lengths"

    def __init__(self):
        self.heard = []

    def knows(self, text):
        return text != TEXTS[2]

    def transcribe(self, recordings):
        self.heard.append(recordings)
        return [f"{audio.seconds:.1f}" for audio in recordings]


def test_a_long_text_is_transcribed_to_its_end(tmp_path, monkeypatch):
    pipeline, text = speech_pipeline(), " ".join(TEXTS * 2)
    written = [*pipeline.text_tokenizer.encode(text), pipeline.text_tokenizer.eos_id]
    assert len(written) > 65
    # A model that knows what is said.
    left = iter(written)
    monkeypatch.setattr(
        "transfusion_mot.sampling.session.choose_tokens",
        lambda logits, decoding, uniform: torch.tensor([next(left, written[-1])]),
    )
    write_wav(tone(0.2), tmp_path / "a.wav")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.wav", "text": text}))
    metrics, pairs = transcription_metrics(pipeline, read_recordings(tmp_path, 1), batch_size=1)
    assert pairs == [(text, text)]
    assert [metric.value for metric in metrics] == [0, 0]


def test_a_recogniser_hears_the_real_the_rebuilt_and_the_spoken(recordings):
    pipeline, listening = speech_pipeline(max_prompt_tokens=32), Listening()
    own = at_most(read_recordings(recordings, 100), 1.0)
    speaking = {"temperature": 1.0, "top_p": 1.0, "guidance_scale": 1.0}
    metrics, spoken = intelligibility_metrics(pipeline, own, listening, speaking=speaking, seed=3, batch_size=2)
    expected = [text for text in TEXTS[::2] if text != TEXTS[2]]
    assert [text for text, _ in spoken] == expected
    real, rebuilt, said = listening.heard
    for audio in real:
        np.testing.assert_allclose(audio.samples, tone(0.2).samples, atol=1e-4)
    for before, after in zip(real, rebuilt, strict=True):
        np.testing.assert_array_equal(through_codec(pipeline, before).samples, after.samples)
        assert after.seconds == pytest.approx(before.seconds, abs=0.02)
    assert [audio.samples.tobytes() for audio in said] == [audio.samples.tobytes() for _, audio in spoken]
    names = [metric.name.partition(", ")[2] for metric in metrics]
    assert names == [f"{what})" for what in ("real audio", "through the codec", "spoken by the model") for _ in "WC"]
    assert metrics[0].protocol["left out for unknown words"] == 1
    # Each text has its own seed, whatever is spoken beside it.
    _, again = intelligibility_metrics(pipeline, own, Listening(), speaking=speaking, seed=3, batch_size=1)
    for (_, one), (_, other) in zip(spoken, again, strict=True):
        np.testing.assert_allclose(one.samples, other.samples, atol=1e-4)


def test_a_text_that_is_longer_than_any_prompt_is_left_out(recordings):
    """Training cuts it, and painting or speaking refuses it."""
    own = at_most(read_recordings(recordings, 100), 1.0)
    tokens = speech_pipeline().text_tokenizer.encode
    lengths = [len(tokens(text)) for text in TEXTS[::2]]
    pipeline, listening = speech_pipeline(max_prompt_tokens=max(lengths) - 1), Listening()
    listening.knows = lambda text: True
    speaking = {"temperature": 1.0, "top_p": 1.0, "guidance_scale": 1.0}
    metrics, spoken = intelligibility_metrics(pipeline, own, listening, speaking=speaking, seed=3, batch_size=2)
    expected = [text for text in TEXTS[::2] if len(tokens(text)) < max(lengths)]
    assert [text for text, _ in spoken] == expected
    assert {metric.protocol["left out for length"] for metric in metrics} == {3 - len(expected)}
    assert {metric.protocol["left out for unknown words"] for metric in metrics} == {0}


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Call the script; status, output, errors."""
    checkpoint = tmp_path / "run"
    speech_pipeline(max_prompt_tokens=32).save_pretrained(checkpoint / "snapshots" / "step-0000001")

    capsys.readouterr()

    def call(*words):
        words = ["--checkpoint", checkpoint, "--device", "cpu", "--workers", 1, *words]
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, words)])
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
            status = 0
        except SystemExit as ended:
            status = ended.code
        return status, *capsys.readouterr()

    return call


def test_the_script_on_a_tiny_model(run, recordings, tmp_path):
    output, said = tmp_path / "speech.json", tmp_path / "said"
    status, shown, errors = run("--recordings", recordings, "--output", output, "--save", said)
    assert status == 0, errors
    metrics = {entry["name"]: entry for entry in json.loads(output.read_text())["metrics"]}
    what = ("transcribed by the model", "real audio", "through the codec", "spoken by the model")
    assert set(metrics) == {f"{rate} ({recordings.name}, {one})" for rate in ("WER", "CER") for one in what}
    transcribed = metrics[f"WER ({recordings.name}, transcribed by the model)"]
    assert transcribed["protocol"]["recordings"] == 3
    folder = said / recordings.name
    lines = [json.loads(line) for line in (folder / "transcripts.jsonl").read_text().splitlines()]
    assert [line["text"] for line in lines] == TEXTS[::2]
    (expected, _) = error_rates([line["text"] for line in lines], [line["transcript"] for line in lines], {})
    assert transcribed["value"] == pytest.approx(expected.value)
    spoken = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert [line["text"] for line in spoken] == TEXTS[::2]
    assert all((folder / line["file_name"]).exists() for line in spoken)
    assert "real audio" in shown


def test_mistakes(run, recordings, tmp_path):
    status, _, errors = run("--recordings", tmp_path / "nowhere")
    assert (status, errors.count("\n")) == (2, 1)
    assert "is not a folder of recordings with their texts" in errors
    status, _, errors = run("--recordings", recordings, "--recogniser", "nobody/nothing")
    assert status == 2
    assert "is not a speech recogniser of transformers" in errors
