"""docs/data.md: every configuration is parsed, and every source is opened on small files of the same names."""

import json
import re
from pathlib import Path
from typing import get_args, get_type_hints

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from audio_files import clip
from scene_sprites import make_sprites
from source_files import picture, picture_dataset, plain, shard, write_coco, write_tar

from transfusion_mot.config import RunConfig, SourceConfig, parse_config
from transfusion_mot.data.sources.open import open_source

pytestmark = pytest.mark.slow

PAGE = (Path(__file__).parents[1] / "docs" / "data.md").read_text()
YAML = re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)
KINDS = get_args(get_type_hints(SourceConfig)["kind"])


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that the examples name, except what lies on the Hugging Face hub."""
    root = tmp_path_factory.mktemp("data-docs")
    write_coco(root / "coco", 6)
    (root / "coco" / "val2017").symlink_to("train2017")
    (root / "coco/annotations/captions_val2017.json").symlink_to("captions_train2017.json")
    for folder in ("my-images", "flickr30k", "emoji", "obelics", "mmc4/images"):
        (root / folder).mkdir(parents=True)
        for number in range(3):
            (root / folder / f"{number}.jpg").write_bytes(picture(number, "jpg"))
    (root / "my-images/metadata.jsonl").write_text(
        "".join(json.dumps({"file_name": f"{n}.jpg", "text": f"p {n}"}) + "\n" for n in range(3))
    )
    write_edits(root)
    write_audio(root)
    (root / "emoji/metadata.jsonl").write_text('{"file_name": "0.jpg", "text": "noto emoji of sun", "split": "train"}')
    (root / "flickr30k/metadata.csv").write_text('image,comment\n0.jpg,one\n0.jpg,"two, or so"\n1.jpg,three\n')
    (root / "cc12m").mkdir()
    write_tar(root / "cc12m" / "00000.tar", shard(range(4)))
    (root / "shards").mkdir()
    members = {"1.json": '{"alt": "an alt text"}', "1.large.png": picture(1), "1.small.png": picture(2)}
    write_tar(root / "shards" / "part-0.tar", members)
    picture_dataset(range(3), "picture", "title").to_parquet(root / "tables.parquet")
    (root / "tables").mkdir()
    (root / "tables.parquet").rename(root / "tables" / "0.parquet")
    picture_dataset(range(3)).save_to_disk(root / "tables-arrow")
    (root / "my-texts").mkdir()
    (root / "my-texts" / "a.txt").write_text("One.\n\nTwo.\n")
    (root / "wiki.jsonl").write_text('{"body": "A text."}\n')
    document = {"texts": ["A", None, "B"], "images": [None, {"bytes": picture(0), "path": None}, None]}
    pq.write_table(pa.Table.from_pylist([document]), root / "obelics" / "0.parquet")
    info = [{"image_name": "0.jpg", "matched_text_index": 0}]
    (root / "mmc4/docs.jsonl").write_text(json.dumps({"text_list": ["A"], "image_info": info}) + "\n")
    (root / "stories.jsonl").write_text(json.dumps({"parts": ["A", None], "pictures": [None, "x/0.jpg"]}) + "\n")
    (root / "data").mkdir()
    make_sprites(root / "drawings").rename(root / "data" / "sprites")
    (root / "story-images").mkdir()
    write_tar(root / "story-images" / "0.tar", {"x/0.jpg": picture(0, "jpg")})
    return root


def write_edits(root: Path) -> None:
    """Editing pairs as a folder, a tar file and a table."""
    for folder in ("my-edits", "edit-shards", "edit-tables"):
        (root / folder).mkdir()
    (root / "my-edits/0001.jpg").write_bytes(picture(1, "jpg"))
    (root / "my-edits/0001-night.jpg").write_bytes(picture(2, "jpg"))
    (line,) = re.findall(r'\{"source_file_name".*\}$', PAGE, flags=re.MULTILINE)
    (root / "my-edits/metadata.jsonl").write_text(line)
    members = {"0001.source.png": picture(1), "0001.target.png": picture(2), "0001.txt": "make it night"}
    write_tar(root / "edit-shards" / "0.tar", members)
    row = {"input_image": {"bytes": picture(1)}, "edit_prompt": "make it night", "edited_image": {"bytes": picture(2)}}
    pq.write_table(pa.Table.from_pylist([row]), root / "edit-tables" / "0.parquet")


def write_audio(root: Path) -> None:
    """Audio as folders, a tar file and a table, and beside images."""
    (root / "my-audio").mkdir()
    (root / "my-audio" / "0001.wav").write_bytes(clip(1))
    lines = re.search(r"metadata\.csv +(\S+)\n +(\S.*)\n", PAGE)
    (root / "my-audio" / "metadata.csv").write_text("\n".join(lines.groups()))
    (root / "recordings").mkdir()
    (root / "recordings" / "1.mp3").write_bytes(clip(1, kind="MP3"))
    (root / "recordings" / "metadata.jsonl").write_text('{"clip": "1.mp3", "sentence": "one"}')
    (root / "speech-shards").mkdir()
    write_tar(root / "speech-shards" / "0.tar", {"1.flac": clip(1, kind="FLAC"), "1.txt": "one"})
    (root / "speech-tables").mkdir()
    row = {"audio": {"bytes": clip(1)}, "sentence": "one"}
    pq.write_table(pa.Table.from_pylist([row]), root / "speech-tables" / "0.parquet")
    (root / "my-things").mkdir()
    (root / "my-things" / "apple.png").write_bytes(picture(1))
    (root / "my-things" / "apple.ogg").write_bytes(clip(1, kind="OGG"))
    (line,) = re.findall(r'\{"file_name".*"audio_file_name".*\}$', PAGE, flags=re.MULTILINE)
    (root / "my-things" / "metadata.jsonl").write_text(line)


@pytest.mark.parametrize("text", YAML, ids=range(len(YAML)))
def test_every_example_is_a_configuration_and_its_sources_open(
    text: str, workplace: Path, emoji_cache: Path, draw_emoji, monkeypatch
) -> None:
    monkeypatch.chdir(workplace)
    (workplace / "example.yaml").write_text(text)
    # Small: drawing the emoji large takes long.
    small = [] if "image_size" in text or "buckets" in text else ["data.image_size=32"]
    draw_emoji(32, emoji_cache)
    arguments = ["--config", "example.yaml", "data.held_out_fraction=0.0", f"data.cache_dir={emoji_cache}"]
    config = parse_config(RunConfig, [*arguments, *small], "")
    sources = config.data.sources if "sources:" in text else []
    for source in sources:
        if source.kind == "datasets" and "/" in str(source.path):
            continue
        split = "held_out" if source.use == "held_out" else "train"
        opened = open_source(source, config.data, split)
        assert len(opened) > 0
        assert opened.skipped == {}
        for media in opened.media.values():
            if media.medium == "audio":
                assert media.audio(0).seconds == 0.5
            else:
                assert media.image(0).shape == (config.data.image_size, config.data.image_size, 3)


def test_the_page_has_an_example_of_every_kind() -> None:
    assert [kind for kind in KINDS if not any(f"kind: {kind}" in text for text in YAML)] == []
    assert len(YAML) >= len(KINDS)


def test_line_of_an_interleaved_document_is_one(tmp_path) -> None:
    (line,) = re.findall(r'^\{"texts".*$', PAGE, flags=re.MULTILINE)
    (tmp_path / "a.jsonl").write_text(line + "\n")
    (tmp_path / "lighthouse.jpg").write_bytes(picture(5, "jpg"))
    config = parse_config(RunConfig, [f"data.cache_dir={tmp_path / 'cache'}", "data.held_out_fraction=0.0"], "")
    documents = open_source(SourceConfig("interleaved", path=str(tmp_path)), config.data, "train")
    assert plain(documents.document(0)) == ["A lighthouse.", 0, "It was built in 1859."]
