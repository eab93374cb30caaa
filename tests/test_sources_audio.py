"""Sources of audio: their items against the files and the library `datasets`, and skipped items."""

import io
import json
import logging
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from audio_files import LevelCodec, clip, numbers_heard
from safetensors.numpy import load_file
from source_files import SIZE, numbers_of, open_with, picture, plain, write_tar
from test_pipeline import tiny_vae

from transfusion_mot.codecs.autoencoder_kl import Autoencoder
from transfusion_mot.config import DataConfig, SourceConfig
from transfusion_mot.data.encoded_media import encoded_media
from transfusion_mot.data.encoding import check_media_sizes
from transfusion_mot.data.mixture import open_documents
from transfusion_mot.data.sources import stored_audio
from transfusion_mot.data.sources.base import CaptionedImages, MediaItem, Text
from transfusion_mot.errors import UserError


def write_folder(folder: Path, metadata: str, rows: list[dict[str, Any]]) -> Path:
    """Metadata in the format of its file name."""
    folder.mkdir(exist_ok=True)
    path = folder / metadata
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".csv":
        datasets.Dataset.from_list(rows).to_csv(path)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return folder


def rows_of(count: int, text_column: str = "transcription", **more: Any) -> list[dict[str, Any]]:
    return [{"file_name": f"{i}.wav", text_column: f"number {i}", **more} for i in range(count)]


def texts_of(documents: Any) -> list[list[str]]:
    return [documents.captions(index) for index in range(len(documents))]


@pytest.mark.parametrize("metadata", ["metadata.csv", "metadata.jsonl", "metadata.parquet"])
@pytest.mark.parametrize("text_column", ["transcription", "text"])
def test_an_audiofolder_holds_what_the_library_datasets_reads(
    tmp_path: Path, monkeypatch: Any, metadata: str, text_column: str
) -> None:
    folder = write_folder(tmp_path / "a", metadata, rows_of(4, text_column))
    for i in range(4):
        (folder / f"{i}.wav").write_bytes(clip(i))
    documents = open_with({"kind": "audiofolder", "path": folder}, tmp_path / "cache")
    # For this the library needs another package, although it encodes nothing here.
    monkeypatch.setattr(datasets.Audio, "encode_example", lambda self, path: {"path": path, "bytes": None})
    library = datasets.load_dataset("audiofolder", data_dir=str(folder), split="train", streaming=True)
    library = library.cast_column("audio", datasets.Audio(decode=False))
    read = {Path(row["audio"]["path"]).name: row[text_column] for row in library}
    own = {Path(documents.where(i)).name: documents.captions(i)[0] for i in range(len(documents))}
    assert own == read
    assert numbers_heard(documents) == [0, 1, 2, 3]
    assert documents.seconds.tolist() == [0.5] * 4
    assert documents.document(2) == [Text(["number 2"]), MediaItem("speech", 2)]
    assert documents.modalities == ("text", "speech")
    assert documents.is_paired
    assert not isinstance(documents, CaptionedImages)


def test_folders_without_metadata(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "speaker"
    folder.mkdir(parents=True)
    for i, kind in enumerate(("WAV", "FLAC", "OGG", "MP3")):
        (folder / f"{i}.{kind.lower()}").write_bytes(clip(i, kind=kind))
    alone = open_with({"kind": "audiofolder", "path": tmp_path / "a"}, tmp_path / "cache")
    assert len(alone) == 4
    assert (alone.modalities, alone.is_paired) == (("speech",), False)
    assert alone.document(3) == [MediaItem("speech", 3)]
    (folder / "1.txt").write_text(" said\nin two lines ")
    spoken = open_with({"kind": "audiofolder", "path": tmp_path / "a", "audio_modality": "x"}, tmp_path / "cache")
    assert spoken.document(0) == [Text(["said in two lines"]), MediaItem("x", 0)]
    assert numbers_heard(spoken) == [1]
    assert spoken.skipped == {"empty caption": 3}


def webdataset(path: Path, text: str | None) -> dict[str, Any]:
    members: dict[str, bytes | str] = {}
    for i in range(5):
        members[f"{i:03d}.flac"] = clip(i, kind="FLAC")
        if text is not None:
            said = f"number {i}"
            members[f"{i:03d}.{text}"] = said if text == "txt" else json.dumps({"transcription": said, "text": "no"})
    write_tar(path, members)
    return {"kind": "webdataset", "path": path, "audio_column": "flac"}


def table(path: Path, text: str | None) -> dict[str, Any]:
    rows = {"audio": [{"bytes": clip(i), "path": None} for i in range(5)]}
    if text is not None:
        rows[text] = [f"number {i}" for i in range(5)]
    # As a data set of the hub has it; to make one of such a feature the library needs another package.
    dataset = datasets.Dataset.from_dict(rows).cast_column("audio", datasets.Audio())
    if path.suffix == ".parquet":
        dataset.to_parquet(path)
        return {"kind": "parquet", "path": path, "audio_column": "audio"}
    dataset.save_to_disk(path)
    return {"kind": "datasets", "path": path, "audio_column": "audio"}


@pytest.mark.parametrize(
    ("write", "name", "texts"),
    [
        (webdataset, "a.tar", ("txt", "json")),
        (table, "a.parquet", ("transcription", "text")),
        (table, "arrow", ("text",)),
    ],
)
def test_archives_and_tables_with_texts_and_without(tmp_path: Path, write: Any, name: str, texts: Any) -> None:
    for text in texts:
        documents = open_with(write(tmp_path / name, text), tmp_path / "cache")
        assert numbers_heard(documents) == [0, 1, 2, 3, 4]
        assert texts_of(documents) == [[f"number {i}"] for i in range(5)]
    (tmp_path / "b").mkdir()
    alone = open_with(write(tmp_path / "b" / name, None), tmp_path / "cache")
    assert numbers_heard(alone) == [0, 1, 2, 3, 4]
    assert alone.modalities == ("speech",)


def test_documents_of_text_image_and_speech(tmp_path: Path) -> None:
    """The audio of line 2 is missing, line 3 names no audio, and line 4 repeats the text of line 0."""
    rows = [{"file_name": f"{i}.png", "text": f"thing {i % 4}", "audio": f"{i}.wav"} for i in range(5)]
    rows[3]["audio"] = ""
    folder = write_folder(tmp_path / "a", "metadata.csv", rows)
    for i in range(5):
        (folder / f"{i}.png").write_bytes(picture(i))
    for i in (0, 1, 4):
        (folder / f"{i}.wav").write_bytes(clip(10 + i))
    members: dict[str, bytes | str] = {}
    for i in range(5):
        members |= {f"{i}.jpg": picture(i, "jpg"), f"{i}.txt": f"thing {i % 4}"}
        members |= {f"{i}.wav": clip(10 + i)} if i in (0, 1, 4) else {}
    write_tar(tmp_path / "a.tar", members)
    columns = {
        "image": [{"bytes": picture(i), "path": None} for i in range(5)],
        "text": [f"thing {i % 4}" for i in range(5)],
        "a": [{"bytes": clip(10 + i), "path": None} if i in (0, 1, 4) else None for i in range(5)],
    }
    dataset = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    dataset = dataset.cast_column("a", datasets.Audio())
    dataset.to_parquet(tmp_path / "a.parquet")
    dataset.save_to_disk(tmp_path / "arrow")
    for source in (
        {"kind": "imagefolder", "path": folder, "audio_column": "audio"},
        {"kind": "webdataset", "path": tmp_path / "a.tar", "image_column": "jpg", "audio_column": "wav"},
        {"kind": "parquet", "path": tmp_path / "a.parquet", "image_column": "image", "audio_column": "a"},
        {"kind": "datasets", "path": tmp_path / "arrow", "image_column": "image", "audio_column": "a"},
    ):
        documents = open_with(source, tmp_path / "cache")
        assert isinstance(documents, CaptionedImages)
        assert documents.modalities == ("text", "image", "speech")
        assert numbers_of(documents) == [0, 1, 2, 3, 4]
        assert texts_of(documents) == [["thing 0"], ["thing 1"], ["thing 2"], ["thing 3"], ["thing 0"]]
        clips = documents.media["speech"]
        if source["kind"] in ("parquet", "datasets"):
            # What a table holds is seen when it is read.
            encoded = encoded_media(
                clips, LevelCodec(), DataConfig(cache_dir=str(tmp_path / source["kind"]), num_workers=0), batch_size=2
            )
            assert encoded.readable.tolist() == [True, True, False, False, True]
            assert encoded.skipped == {"unreadable audio clip": 2}
            continue
        assert numbers_heard(clips) == [10, 11, 14]
        heard = [[item.index for item in documents.document(i)[2:]] for i in range(5)]
        assert heard == [[0], [1], [], [], [2]]
        assert plain(documents.document(4)) == ["thing 0", 4, 2]
        assert clips.skipped == ({"missing audio file": 1} if source["kind"] == "imagefolder" else {})


def test_a_text_is_on_one_side_whoever_speaks_it(tmp_path: Path) -> None:
    """And where its picture is, too, although other pictures have that caption."""
    rows = [{"file_name": f"{i}.png", "a": f"{i}.wav", "text": f"thing {i % 20}"} for i in range(80)]
    folder = write_folder(tmp_path / "a", "metadata.jsonl", rows)
    audio = write_folder(
        tmp_path / "b", "metadata.jsonl", [{"file_name": row["a"], "text": row["text"]} for row in rows]
    )
    for i in range(80):
        (folder / f"{i}.png").write_bytes(picture(i))
        for where in (folder, audio):
            (where / f"{i}.wav").write_bytes(clip(i, 0.1))
    found = []
    triples = {"kind": "imagefolder", "path": folder, "audio_column": "a"}
    for source in (triples, {"kind": "audiofolder", "path": audio}):
        sides = []
        for side in ("train", "held_out"):
            documents = open_with(source, tmp_path / "cache", side, held_out_fraction=0.3)
            texts = [text for (text,) in texts_of(documents)]
            assert len(texts) == 4 * len(set(texts)) > 0
            sides.append(set(texts))
        assert not sides[0] & sides[1]
        found.append(sides)
    assert found[0] == found[1]


# --- Encoding. ---


def settings(tmp_path: Path, **more: Any) -> DataConfig:
    return DataConfig(cache_dir=str(tmp_path / "cache"), held_out_fraction=0.0, num_workers=0, **more)


def naive_codes(content: bytes) -> list[int]:
    """What `LevelCodec` makes of a flat clip that is as loud everywhere: its level for every tenth of a second."""
    samples, rate = soundfile.read(io.BytesIO(content), always_2d=True)
    return [round(100 * float(np.median(samples.mean(1))))] * int(10 * len(samples) / rate)


def test_every_kind_of_file_is_encoded_once_or_counted(tmp_path: Path, caplog: Any, monkeypatch: Any) -> None:
    contents = {
        "a-8bit.wav": clip(50, 1.0, subtype="PCM_U8"),
        "b-stereo.wav": clip(20, 0.7, channels=2),
        "c-192kHz.wav": clip(30, 0.55, rate=192000),
        "d.mp3": b"ID3 no music",
        "e-empty.wav": b"",
        "f-silent.wav": clip(0, 0),
        "g-short.wav": clip(10, 0.05),
        "h-long.wav": clip(10, 2.1),
        "i-limit.ogg": clip(0, 2.0, kind="OGG"),
        "j-cut.flac": clip(40, 1.0, kind="FLAC", subtype="PCM_16")[:-20],
        "k-same.wav": clip(20, 0.7, channels=2),
        "l.wav": clip(77, 0.3),
    }
    folder = tmp_path / "a"
    folder.mkdir()
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    data = settings(tmp_path, max_audio_seconds=2.0)
    source = SourceConfig(kind="audiofolder", path=str(folder))
    with caplog.at_level(logging.WARNING):
        clips = open_with({"kind": "audiofolder", "path": folder}, tmp_path / "cache", max_audio_seconds=2.0)
        codec = LevelCodec()
        encoded = encoded_media(clips, codec, data, batch_size=3)
    assert encoded.skipped == {
        "empty audio file": 1,
        "audio clip of more than 2 seconds": 1,
        "unreadable audio clip": 4,
    }
    for problem in ("is shorter than the 0.100 seconds", "Format not recognised", "is empty", "h-long.wav"):
        assert problem in caplog.text
    names = [Path(clips.where(index)).name for index in range(len(clips))]
    for index, name in enumerate(names):
        if encoded.readable[index]:
            # At 192 kHz the ends ring.
            expected = naive_codes(contents[name])
            assert encoded.span(index)[0 :: len(expected) + 1] == [101, 102]
            assert np.abs(np.array(encoded.span(index)[1:-1]) - expected).max() <= (3 if "192" in name else 0)
            # Audio has no mirror image.
            assert encoded.span(index, flipped=True) == encoded.span(index)
    assert [name[0] for name, readable in zip(names, encoded.readable, strict=True) if readable] == list("abcikl")
    # Similar lengths together.
    lengths = [length for call in codec.lengths for length in call]
    assert lengths == sorted(lengths)
    # Equal content is there once.
    spans = {contents[names[index]]: encoded.span(index) for index in np.flatnonzero(encoded.readable)}
    assert encoded.num_bytes == sum(len(span) - 2 for span in spans.values())

    def refuse(*arguments: Any) -> None:
        raise AssertionError("read again")

    monkeypatch.setattr(stored_audio, "audio_seconds", refuse)
    (other,) = open_documents(settings(tmp_path, sources=[source], slots={"text": 8, "speech": 20}), "train")
    assert len(other.documents) == len(clips) + 1
    again = LevelCodec()
    assert encoded_media(clips, again, data, batch_size=3).num_encoded == 0
    assert again.lengths == []


def test_one_image_that_several_voices_name_is_encoded_once(tmp_path: Path) -> None:
    rows = [{"file_name": "a.png", "a": f"{i}.wav", "text": "a thing"} for i in range(3)]
    folder = write_folder(tmp_path / "a", "metadata.jsonl", rows)
    (folder / "a.png").write_bytes(picture(9))
    for i in range(3):
        (folder / f"{i}.wav").write_bytes(clip(i))
    source = {"kind": "imagefolder", "path": folder, "audio_column": "a"}
    documents = open_with(source, tmp_path / "cache")
    assert [plain(documents.document(i)) for i in range(3)] == [["a thing", i, i] for i in range(3)]
    data = settings(tmp_path, image_size=SIZE)
    encoded = encoded_media(documents, Autoencoder(tiny_vae()), data, batch_size=4)
    (shard,) = encoded.folder.rglob("*.safetensors")
    (latents,) = load_file(shard)["latents"]
    mean, _ = encoded.posterior(2)
    assert (latents[0, 0] == mean).all()
    assert encoded.num_bytes == latents.nbytes


def test_mistakes_are_told_in_one_sentence(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a", "metadata.jsonl", rows_of(2))
    for i in range(2):
        (folder / f"{i}.wav").write_bytes(clip(i))
        (folder / f"{i}.png").write_bytes(picture(i))
    table(tmp_path / "a.parquet", "text")
    slots = {"text": 16, "speech": 301}

    def refused(source: dict[str, Any], match: str, **more: Any) -> None:
        sources = [SourceConfig(**{key: str(value) for key, value in source.items()})]
        with pytest.raises(UserError, match=match) as caught:
            open_documents(settings(tmp_path, sources=sources, **({"slots": slots} | more)), "train")
        assert "\n" not in str(caught.value)

    audio = {"kind": "audiofolder", "path": folder}
    refused(audio | {"text_column": "said"}, r"needs a field 'said'; it has \['file_name', 'transcription'\]")
    refused(audio | {"audio_column": "wav"}, "needs a field 'wav'")
    refused(audio | {"image_column": "x"}, "kind 'audiofolder' has no key 'image_column'")
    refused(
        audio | {"audio_modality": "voice"}, "'voice', but model.modalities has only speech besides .* 'audio_modality'"
    )
    refused(audio | {"path": tmp_path / "cache"}, r"audio folder '.*' has no audio clips; known: \.wav")
    refused({"kind": "parquet", "path": tmp_path / "a.parquet", "audio_column": "text2"}, "needs a field 'text2'")
    refused(
        {"kind": "imagefolder", "path": folder, "audio_column": "a", "source_image_column": "b"},
        "source_image_column and audio_column",
        slots={"text": 16, "image": 2, "speech": 301},
    )
    refused(
        audio,
        "data.orders has no order for the source '.*', which has only text and speech; add one, such as 'text speech'",
        orders={"text image": 1.0},
    )
    for content in (folder / "0.wav", folder / "1.wav"):
        content.unlink()
    refused(audio, r"it lists 2 audio clips, but none exists \(2 missing audio files\), for example '.*0\.wav'")
    model: Any = None
    codecs: Any = {"speech": LevelCodec()}
    check_media_sizes(settings(tmp_path, slots=slots), codecs, model)
    with pytest.raises(UserError, match=r"is 300, but audio of 30 seconds .* takes 301 slots .* to 301, or .* to 29.9"):
        check_media_sizes(settings(tmp_path, slots=slots | {"speech": 300}), codecs, model)


def test_codecs_of_another_medium_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "fox"
    folder.mkdir(parents=True)
    (folder / "a.png").write_bytes(picture(1))
    images = open_with({"kind": "imagefolder", "path": tmp_path / "a"}, tmp_path / "cache")
    with pytest.raises(
        UserError, match="has images, but the codec of their modality reads audio clips; set 'modality'"
    ):
        encoded_media(images, LevelCodec(), settings(tmp_path), batch_size=1)
