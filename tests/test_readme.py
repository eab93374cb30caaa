"""Every command and every Python example of the README runs, at toy size, in the order in which it stands there."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from transfusion_mot.config import DataConfig, SourceConfig
from transfusion_mot.data.sources.open import open_source

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
# What makes any training command of the README a matter of seconds; the autoencoder is the real one.
TOY = [
    "data.cache_dir=cache",
    "data.held_out_fraction=0.3",
    "data.text_slots=40",
    "data.images_per_row=2",
    "data.num_workers=0",
    "model.num_layers=1",
    "model.num_heads=2",
    "model.head_dim=16",
    "model.towers={text: {hidden_size: 32, intermediate_size: 64}, image: {hidden_size: 32, intermediate_size: 64}}",
    "diffusion.num_inference_steps=2",
    "training.num_steps=2",
    "training.num_rows=2",
    "training.sample_prompts=[sun]",
    "training.mixed_precision=no",
    "training.cuda_graph=false",
    "tokenizer.vocab_size=300",
]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[list[str]]:
    """Commands in order, without comments, continued lines joined."""
    lines = "".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like a clone, with a dozen real emoji as `my-images` and a text as `my-texts`."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("configs", "evaluate", "checkpoints", "train.py", "sample.py"):
        (folder / name).symlink_to(ROOT / name)
    data = DataConfig(image_size=64, cache_dir=str(folder / "emoji"))
    emoji = open_source(SourceConfig("openmoji"), data, "train")
    (folder / "my-images").mkdir()
    lines = []
    for index in range(0, 240, 10):
        Image.fromarray(emoji.image(index)).save(folder / "my-images" / f"{index}.png")
        lines.append(json.dumps({"file_name": f"{index}.png", "text": emoji.captions(index)[0]}) + "\n")
    (folder / "my-images" / "metadata.jsonl").write_text("".join(lines))
    (folder / "my-texts").mkdir()
    (folder / "my-texts" / "one.txt").write_text("A lighthouse at dusk.\n\nThe sea is calm.\n\nA ship goes by.\n")
    return folder


def run(words: list[str], folder: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    finished = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, f"{shlex.join(words)}\n{finished.stdout[-2000:]}\n{finished.stderr[-4000:]}"


def test_commands_and_examples_run(workplace: Path) -> None:
    ran = []
    for words in commands():
        # The drawings come from npm, and the sources of every training command are replaced.
        if words[0] in ("make", "pip") or words[:3] == ["python", "-m", "transfusion_mot.data.emoji"]:
            continue
        if words[:3] == ["accelerate", "launch", "train.py"]:
            # Later keys win: the toy size over the command's own, and the command's sources over these.
            source = "data.sources=[{kind: imagefolder, path: my-images}]"
            run([sys.executable, "train.py", *words[3:5], source, *words[5:], *TOY], workplace)
        else:
            assert words[0] == "python", words
            fast = ["--features", "efficientnet", "--num-images", "3"] if "evaluate/benchmark.py" in words else []
            run([sys.executable, *words[1:], *fast], workplace)
        ran.append(words)
    assert len(ran) >= 6
    examples = blocks("python")
    assert examples
    for example in examples:
        run([sys.executable, "-c", example], workplace)


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = [words[1] for words in commands() if words[0] == "make"]
    assert targets
    assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in targets)


def test_links_and_pictures_exist() -> None:
    for file in [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "checkpoints").glob("*/README.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", file.read_text()):
            assert target.startswith("https://") or (file.parent / target).exists(), f"{file.name}: {target}"
