"""`--help`, wrong options and missing files are answered before PyTorch is loaded, which takes seconds."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
FOLDERS = ("transfusion_mot", "evaluate", "benchmarks", ".")
COMMANDS = sorted(
    str(path.relative_to(ROOT))
    for folder in FOLDERS
    for path in (ROOT / folder).glob("*.py" if folder == "." else "**/*.py")
    if '\nif __name__ == "__main__":' in path.read_text()
)
# Runs each command in turn, and stops each where it asks for a slow package => what came of it, as JSON: its end, what
# it printed, and the options and arguments that take a text.
RUNNER = """
import argparse, contextlib, io, json, pathlib, runpy, shlex, sys
SLOW = {"torch", "torchvision", "accelerate", "diffusers", "transformers", "datasets", "timm", "gradio"}

class Stops:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in SLOW:
            raise RuntimeError("imports " + name)

sys.meta_path.insert(0, Stops())
parse, texts = argparse.ArgumentParser.parse_known_args, []

def note_and_parse(self, *given, **how):
    if not type(self).__module__.startswith("jsonargparse"):
        texts[:] = [
            ([*action.option_strings, action.dest][0], action.nargs if isinstance(action.nargs, int) else 1)
            for action in self._actions
            if action.type in (None, pathlib.Path) and action.nargs != 0 and action.choices is None
        ]
    return parse(self, *given, **how)

argparse.ArgumentParser.parse_known_args = note_and_parse
outcomes = {}
for words in json.loads(sys.argv[1]):
    sys.argv, texts[:] = words, []
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            runpy.run_path(words[0], run_name="__main__")
        outcome = 0
    except SystemExit as end:
        outcome = end.code
    except Exception as error:
        outcome = repr(error)
    outcomes[shlex.join(words)] = [outcome, printed.getvalue(), list(texts)]
print(json.dumps(outcomes))
"""
# Texts that name nothing that is read: files to write, devices, prompts, names of other things.
NOT_READ = {
    *("--output", "--save", "--picture", "--cache-dir", "--device", "--host", "output", "prompts"),
    *("--negative-prompt", "--prompt", "--scheduler", "--dinov2", "--protocol", "--held-out"),
}
MISSING = "./nowhere/there"
# Commands that take the configuration of a run.
_OF_A_RUN = ("train.py", "transfusion_mot/data/cache.py", "transfusion_mot/data/inspect.py")
_SOURCES = shlex.quote(f"data.sources=[{{kind: imagefolder, path: {MISSING}}}]")
# Paths of a protocol.
_OF_COCO = ("prompts.path", "prompts.images", "captions.path", "captions.images")
_HERE = " ".join(f"--{key}=." for key in _OF_COCO)
# What options and files say together.
MISTAKES = {
    "sample.py": "there is nothing to do",
    "sample.py sun --checkpoint nowhere": "there is no folder 'nowhere'",
    "evaluate/benchmark.py --checkpoint nowhere": "there is no folder 'nowhere'",
    "train.py --config nowhere.yaml": "there is no configuration file",
    **{
        f"{command} --config ''": "--config is empty; give a configuration file, such as one of configs/"
        for command in (*_OF_A_RUN, "transfusion_mot/autoencoder.py")
    },
    "train.py --config=": "--config is empty; give a configuration file, such as one of configs/",
    "train.py --config configs": "configuration file 'configs' cannot be read: Is a directory; give a YAML file",
    # The later of two values wins: all other paths are there.
    **{
        f"{command} --config configs/eval/coco.yaml {_HERE} --{key}={MISSING}": f"there is no '{MISSING}' ({key})"
        for command, keys in (
            ("evaluate/benchmark.py --checkpoint checkpoints/emoji", _OF_COCO),
            ("evaluate/prompts.py --output new", _OF_COCO[:2]),
        )
        for key in keys
    },
    **{
        f"{command} {shlex.quote(mistake)}": message
        for command in _OF_A_RUN
        for mistake, message in (
            ("model.modalities.image.tower=imag", "model.modalities.image.tower is 'imag'; it needs one of"),
            ("training.frozen_towers=[imag]", "training.frozen_towers names ['imag']; the model has text, image"),
            ("lora={towers: [imag]}", "lora.towers names imag; known: text, image"),
            ("training.tracker=tensorbord", "configuration: training.tracker is 'tensorbord'; it must be one of 'all'"),
        )
    },
    **{
        f"{command} {_SOURCES}": f"imagefolder source '{MISSING}' is not a folder"
        for command in ("transfusion_mot/autoencoder.py", *_OF_A_RUN)
    },
    **{
        f"{command} {key}={MISSING}": f"{name} '{MISSING}' does not exist"
        for command in _OF_A_RUN
        for key, name in (
            ("init_from", "init_from"),
            ("model.towers.text.pretrained", "pretrained"),
            ("tokenizer.path", "tokenizer path"),
            ("codecs.image.path", "codec path"),
        )
    },
}


def run(lines: list[list[str]]) -> dict[str, list]:
    """Outcomes by command line."""
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, json.dumps(lines)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def outcomes() -> dict[str, list]:
    lines = [[command, word] for command in COMMANDS for word in ("--help", "--no-such-option=1")]
    return run(lines + [shlex.split(mistake) for mistake in MISTAKES])


def test_there_are_commands() -> None:
    assert {"train.py", "sample.py", "evaluate/fid.py", "benchmarks/train_step.py"} < set(COMMANDS)
    assert len(COMMANDS) > 30


@pytest.mark.parametrize("command", COMMANDS)
def test_help_does_not_load_pytorch(command: str, outcomes: dict[str, list]) -> None:
    outcome, printed, _ = outcomes[f"{command} --help"]
    assert outcome in (0, None), printed
    module = command.removesuffix(".py").removesuffix("/__main__").replace("/", ".")
    is_module = command.startswith(("benchmarks/", "transfusion_mot/"))
    assert f"usage: python -m {module} " in printed if is_module else "usage: " in printed


@pytest.mark.parametrize("command", COMMANDS)
def test_a_wrong_option_is_refused_before_pytorch_is_loaded(command: str, outcomes: dict[str, list]) -> None:
    outcome, printed, _ = outcomes[f"{command} --no-such-option=1"]
    assert outcome == 2, printed
    assert "error: " in printed


@pytest.mark.parametrize("line", MISTAKES)
def test_what_is_missing_is_said_before_pytorch_is_loaded(line: str, outcomes: dict[str, list]) -> None:
    outcome, printed, _ = outcomes[line]
    assert outcome == 2, printed
    assert f"error: {MISTAKES[line]}" in printed


@pytest.mark.parametrize(("path", "said"), [(MISSING, r"nowhere"), ("", r"''|is empty")])
def test_every_path_that_is_missing_is_said_before_pytorch_is_loaded(
    path: str, said: str, outcomes: dict[str, list]
) -> None:
    lines = []
    for command in COMMANDS:
        _, _, texts = outcomes[f"{command} --help"]
        arguments = [name for name, _ in texts if not name.startswith("-")]
        for name, count in texts:
            # Those before it are there.
            before = ["."] * arguments.index(name) if name in arguments else [name]
            after = [] if name in arguments else ["."] * len(arguments)
            if name not in NOT_READ:
                lines.append([command, *before, *[path] * count, *after])
    assert len(lines) > 50
    answers = {line: answer for line, (*answer, _) in run(lines).items()}
    wrong = {
        line: (outcome, printed)
        for line, (outcome, printed) in answers.items()
        if outcome != 2 or not printed.startswith("error: ") or not re.search(said, printed) or printed.count("\n") != 1
    }
    assert not wrong, "\n".join(f"{line}: {outcome} {printed}" for line, (outcome, printed) in wrong.items())
