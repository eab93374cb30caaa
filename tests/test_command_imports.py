"""`--help` and mistakes in the options come before PyTorch is loaded, which takes seconds: of every command."""

import json
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
# Runs each command in turn, and stops each where it asks for a slow package => what came of it, as JSON.
RUNNER = """
import contextlib, io, json, runpy, sys
SLOW = {"torch", "torchvision", "accelerate", "diffusers", "transformers", "datasets", "timm", "gradio"}

class Stops:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in SLOW:
            raise RuntimeError("imports " + name)

sys.meta_path.insert(0, Stops())
outcomes = {}
for words in json.loads(sys.argv[1]):
    sys.argv = words
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            runpy.run_path(words[0], run_name="__main__")
        outcome = 0
    except SystemExit as end:
        outcome = end.code
    except RuntimeError as error:
        outcome = str(error)
    outcomes[" ".join(words)] = [outcome, printed.getvalue()]
print(json.dumps(outcomes))
"""
# What files and options say together.
MISTAKES = {
    "sample.py": "there is nothing to do",
    "sample.py sun --checkpoint nowhere": "there is no folder nowhere",
    "evaluate/benchmark.py --checkpoint nowhere": "there is no folder nowhere",
    "train.py --config nowhere.yaml": "there is no configuration file",
}


@pytest.fixture(scope="module")
def outcomes() -> dict[str, list]:
    lines = [[command, word] for command in COMMANDS for word in ("--help", "--no-such-option=1")]
    lines += [mistake.split() for mistake in MISTAKES]
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, json.dumps(lines)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def test_there_are_commands() -> None:
    assert {"train.py", "sample.py", "evaluate/fid.py", "benchmarks/train_step.py"} < set(COMMANDS)
    assert len(COMMANDS) > 30


@pytest.mark.parametrize("command", COMMANDS)
def test_help_does_not_load_pytorch(command: str, outcomes: dict[str, list]) -> None:
    outcome, printed = outcomes[f"{command} --help"]
    assert outcome in (0, None), printed
    assert "usage: " in printed


@pytest.mark.parametrize("command", COMMANDS)
def test_a_wrong_option_is_refused_before_pytorch_is_loaded(command: str, outcomes: dict[str, list]) -> None:
    outcome, printed = outcomes[f"{command} --no-such-option=1"]
    assert outcome == 2, printed
    assert "error: " in printed


@pytest.mark.parametrize("line", MISTAKES)
def test_what_is_missing_is_said_before_pytorch_is_loaded(line: str, outcomes: dict[str, list]) -> None:
    outcome, printed = outcomes[line]
    assert outcome == 2, printed
    assert f"error: {MISTAKES[line]}" in printed
