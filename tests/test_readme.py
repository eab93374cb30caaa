"""Every command and example of the README, docs/sampling.md and docs/tutorial.md runs, at toy size, in their order."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from process_group import run_script

from transfusion_mot.data.emoji import emoji_captions, render_emoji

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SAMPLING = (ROOT / "docs" / "sampling.md").read_text()
TUTORIAL = (ROOT / "docs" / "tutorial.md").read_text()
# What makes any training command of the README a matter of seconds; the autoencoder is the real one.
TOY = [
    "data.cache_dir=cache",
    "data.held_out_fraction=0.3",
    "data.slots={text: 40, image: 2}",
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
# Of a run that begins with a snapshot, which settles the sizes of the model.
TOY_IMAGES = ["data.image_size=32"]
# Of other commands, but for captions.
FAST = {
    "sample.py": ["--num-inference-steps", "2"],
    "evaluate/benchmark.py": [
        *("--features", "efficientnet", "--num-images", "3", "--num-inference-steps", "2", "training_images=0")
    ],
}
# Of sample.py, where the prompt alone says what is painted.
SMALL = ["--height", "64", "--width", "64"]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, flags=re.DOTALL)


def commands(page: str) -> list[list[str]]:
    """Commands in order, without comments, continued lines joined."""
    lines = "".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like a clone, with a dozen real emoji as `my-images` and a text as `my-texts`."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("configs", "evaluate", "checkpoints", "train.py", "sample.py"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "my-images").mkdir()
    lines = []
    for stem, caption in list(emoji_captions().items())[:240:10]:
        Image.fromarray(render_emoji(stem, 64)).save(folder / "my-images" / f"{stem}.png")
        lines.append(json.dumps({"file_name": f"{stem}.png", "text": caption}) + "\n")
    (folder / "my-images" / "metadata.jsonl").write_text("".join(lines))
    for name in ("photo.png", "drawing.png"):
        Image.fromarray(render_emoji(stem, 64)).save(folder / name)
    (folder / "my-texts").mkdir()
    (folder / "my-texts" / "one.txt").write_text("A lighthouse at dusk.\n\nThe sea is calm.\n\nA ship goes by.\n")
    return folder


def run(words: list[str], folder: Path, in_new_interpreter: bool) -> None:
    """`python WORDS`."""
    environment = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    log = folder / "log.txt"
    if in_new_interpreter:
        path = os.pathsep.join([str(ROOT), os.environ["PYTHONPATH"]])
        environment = os.environ | environment | {"PYTHONPATH": path}
        with log.open("w") as file:
            command, streams = [sys.executable, *words], {"stdout": file, "stderr": file}
            status = subprocess.run(command, cwd=folder, env=environment, timeout=300, **streams).returncode
    else:
        status = run_script(words, folder, environment, log)
    assert status == 0, f"{shlex.join(words)}\n{log.read_text()[-6000:]}"


@pytest.mark.usefixtures("without_java")
@pytest.mark.parametrize("page", [pytest.param(README, id="README"), pytest.param(SAMPLING, id="sampling")])
def test_commands_and_examples_run(workplace: Path, page: str) -> None:
    ran: list[str] = []
    for words in commands(page):
        words = words[1:] if words[:2] == ["accelerate", "launch"] else words
        # The drawings come from npm, the page serves until it is stopped, and the sources of training are replaced.
        if words[0] in ("make", "pip") or words[1:3] in (
            ["-m", "transfusion_mot.data.emoji"],
            ["-m", "transfusion_mot.demo"],
        ):
            continue
        if words[1] == "train.py":
            # Later keys win: the toy size over the command's own, and the command's sources over these.
            source = "data.sources=[{kind: imagefolder, path: my-images}]"
            is_new = not any(word.startswith("init_from=") for word in words)
            toy = [word for word in TOY if is_new or not word.startswith(("model.", "tokenizer."))]
            words = ["train.py", *words[2:4], source, *words[4:], *toy, *([] if is_new else TOY_IMAGES)]
        else:
            assert words[0] == "python", words
            is_small = words[1] == "sample.py" and not {"--caption", "--image", "--task"} & {*words}
            words = [*words[1:], *FAST.get(words[1], []) * ("--caption" not in words), *SMALL * is_small]
        # Once as a user runs it; later commands without the seconds of their imports.
        run(words, workplace, in_new_interpreter=page == README and words[0] not in ("evaluate/benchmark.py", *ran))
        ran.append(words[0])
    assert len(ran) >= 4
    for example in blocks(page, "python"):
        run(["-c", example], workplace, in_new_interpreter=False)


# What makes the commands of docs/tutorial.md short. The model stays the shipped one.
SHORT = {
    "train.py": [
        *("data.image_size=32", "diffusion.num_inference_steps=2", "training.num_steps=2", "training.num_rows=2"),
        *("training.sample_prompts=[sun]", "training.validate_every=0"),
    ],
    "transfusion_mot.data.line_drawings": ["--count", "12"],
    "transfusion_mot.data.inspect": ["--rows", "8"],
}


@pytest.mark.usefixtures("without_java")
def test_the_tutorial_runs(workplace: Path) -> None:
    ran = []
    for words in commands(TUTORIAL):
        what = words[2] if words[1] == "-m" else words[1]
        if words[0] == "pip" or what == "transfusion_mot.demo":
            continue
        short = SHORT | (FAST if "--caption" not in words else {})
        is_small = what == "sample.py" and "--caption" not in words
        words = [*words[1:], *short.get(what, []), *SMALL * is_small]
        run(words, workplace, in_new_interpreter=False)
        ran.append(what)
    assert ran.count("sample.py") == 3
    assert {*SHORT, "evaluate/benchmark.py"} <= set(ran)
    for name in ("row.png", "runs/drawings/loss.png", "runs/drawings/samples/before-and-after.png"):
        assert (workplace / name).is_file(), name
    assert (workplace / "runs" / "drawings" / "evaluation" / "report.html").is_file()
    for example in blocks(TUTORIAL, "python"):
        run(["-c", example.replace("num_inference_steps=10", "num_inference_steps=2")], workplace, False)
    assert (workplace / "key.png").is_file()


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"`make ([\w-]+)", README + SAMPLING)
    assert targets
    assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in targets)


def headings(file: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    page = re.sub(r"```.*?```", "", file.read_text(), flags=re.DOTALL)
    lines = re.findall(r"^#+ (.*)$", page, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


def test_links_and_pictures_exist() -> None:
    files = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")]
    for file in [*files, *ROOT.glob("checkpoints/*/README.md")]:
        for target, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", file.read_text()):
            if target.startswith("https://"):
                continue
            linked = file.parent / target if target else file
            assert linked.exists(), f"{file.name}: {target}"
            assert not anchor or anchor in headings(linked), f"{file.name}: {target}#{anchor}"
