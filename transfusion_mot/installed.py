"""The commands of an installed package: transfusion-train, transfusion-sample and transfusion-eval.

They run train.py, sample.py and evaluate/NAME.py of the repository. A wheel contains these scripts and configs/.
"""

import ast
import re
import runpy
import sys
from pathlib import Path

from transfusion_mot.errors import UserError, exit_on_user_error

_PACKAGE = Path(__file__).parent
# Folder of the repository's scripts in a wheel (pyproject.toml). In a clone it is the repository itself.
_ROOT = _PACKAGE / "shipped" if (_PACKAGE / "shipped").is_dir() else _PACKAGE.parent
# The installed command that runs; empty if the user called a script.
_command = ""


def train() -> None:
    """The command transfusion-train."""
    _run("transfusion-train", _ROOT / "train.py")


def sample() -> None:
    """The command transfusion-sample."""
    _run("transfusion-sample", _ROOT / "sample.py")


def evaluate() -> None:
    """The command transfusion-eval, whose first argument is the name of an evaluation."""
    scripts = {path.stem: path for path in sorted((_ROOT / "evaluate").glob("*.py"))}
    name = sys.argv.pop(1) if len(sys.argv) > 1 else "--help"
    if name in ("--help", "-h"):
        print("usage: transfusion-eval NAME [OPTION ...]\n\nEvaluations; transfusion-eval NAME --help says more:")
        for known, path in scripts.items():
            summary = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n")[0]
            print(f"  {known:<16} {summary}")
        return
    with exit_on_user_error():
        if name not in scripts:
            raise UserError(f"there is no evaluation '{name}'; known: {', '.join(scripts)}")
    _run(f"transfusion-eval {name}", scripts[name])


def _run(name: str, script: Path) -> None:
    global _command
    _command = name
    # Of key=value only the value is a path.
    sys.argv[1:] = [re.sub(r"(?<![^=])configs/.*", lambda found: shipped(found[0]), word) for word in sys.argv[1:]]
    runpy.run_path(str(script), run_name="__main__")


def shipped(path: str) -> str:
    """The path itself, or the package's copy of a file in configs/ that the user does not have."""
    is_own = not path.startswith("configs/") or Path(path).exists() or not (_ROOT / path).is_file()
    return path if is_own else str(_ROOT / path)


def program() -> str | None:
    """The name of the installed command that runs, for its help; None if the user called a script."""
    return _command or None


def as_called(text: str) -> str:
    """A help text for scripts => the same text for the installed command, if one runs."""
    if not _command:
        return text
    text = re.sub(r"python (train|sample)\.py", r"transfusion-\1", text)
    text = re.sub(r"python evaluate/(\w+)\.py", r"transfusion-eval \1", text)
    # accelerate needs a file.
    text = re.sub(r"accelerate launch (train|sample)\.py", r"accelerate launch $(which transfusion-\1)", text)
    text = re.sub(r"(?m)^ *make .*\n", "", text)
    return text.replace("init_from=checkpoints/emoji", "init_from=SNAPSHOT")
