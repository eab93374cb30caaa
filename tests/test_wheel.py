"""The wheel: its commands run from an empty folder, in an environment with the dependencies and without a clone."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from transfusion_mot import installed

pytest.importorskip("hatchling")

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def commands(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the commands."""
    environment = tmp_path_factory.mktemp("environment")
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(subprocess.run([python, "-c", where], capture_output=True, text=True, check=True).stdout.strip())
    # The dependencies; .pth files in there, such as that of a clone, are not read.
    (packages / "shared.pth").write_text(sysconfig.get_path("purelib"))
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--ignore-installed", "--quiet", str(wheel)], check=True, capture_output=True)
    return environment / "bin"


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(command: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run([command, *arguments], capture_output=True, text=True, env=environment)


def test_the_wheel_holds_scripts_configurations_and_types(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("configs", "evaluate"):
        for path in (ROOT / folder).rglob("*.*"):
            if "__pycache__" not in path.parts:
                assert f"transfusion_mot/shipped/{path.relative_to(ROOT)}" in names
    assert {"transfusion_mot/py.typed", "transfusion_mot/shipped/train.py"} <= names
    assert not [name for name in names if name.split("/")[0] in ("tests", "checkpoints", "benchmarks")]
    assert wheel.stat().st_size < 2e6


def test_a_configuration_of_the_users_own_comes_first(empty: Path) -> None:
    name = "configs/eval/composition.jsonl"
    assert installed.shipped(name) == str(ROOT / name)
    (empty / "configs" / "eval").mkdir(parents=True)
    (empty / name).touch()
    assert installed.shipped(name) == name
    assert installed.shipped("configs/none.yaml") == "configs/none.yaml"
    assert installed.shipped("mine.yaml") == "mine.yaml"


def test_help_names_the_commands(commands: Path, empty: Path) -> None:
    for command in ("transfusion-train", "transfusion-sample", "transfusion-eval"):
        done = run(commands / command, "--help")
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"usage: {command}")
        assert ".py " not in done.stdout.split("\n\n")[0]
    assert "transfusion-eval fid REAL GENERATED" in run(commands / "transfusion-eval", "fid", "--help").stdout
    refused = run(commands / "transfusion-eval", "fidd")
    assert refused.returncode == 2
    assert "known: " in refused.stderr
    assert "benchmark, captioning" in refused.stderr


def test_a_configuration_of_the_package_trains_on_images_of_ones_own(commands: Path, empty: Path) -> None:
    for name, colour in (("red", "#f00"), ("green", "#0f0"), ("blue", "#00f"), ("white", "#fff")):
        (empty / "mine" / name).mkdir(parents=True)
        Image.new("RGB", (16, 16), colour).save(empty / "mine" / name / "1.png")
    trained = run(
        commands / "transfusion-train",
        *("--config", "configs/emoji_small.yaml", "data.sources=[{kind: imagefolder, path: mine}]"),
        *("output_dir=run", f"codecs.image.path={ROOT / 'checkpoints' / 'vae-emoji'}", "data.image_size=16"),
        *("model.towers={text: {hidden_size: 32, intermediate_size: 64}, image: {hidden_size: 32}}",),
        *("model.num_layers=1", "model.num_heads=2", "model.head_dim=16", "tokenizer.vocab_size=300"),
        *("training.num_steps=2", "training.num_rows=2", "training.microbatch_rows=2", "data.num_workers=0"),
        *("training.compile=false", "training.validate_every=0", "training.sample_every=0"),
        *("data.slots={text: 32, image: 2}", "data.held_out_fraction=0"),
    )
    assert trained.returncode == 0, trained.stderr
    painted = run(commands / "transfusion-sample", "--checkpoint", "run", "red", "--num-inference-steps", "2")
    assert painted.returncode == 0, painted.stderr
    assert (empty / "samples" / "grid.png").is_file()
