"""The file `metrics.jsonl` of a run: one line of JSON for every entry of the log."""

import json
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics.jsonl"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file, without one that a crash cut off."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines


def write_metrics(path: Path, lines: list[dict[str, Any]], mode: str) -> None:
    """Write lines; `mode` is that of `open`: `w` for a new file, `a` to go on with it."""
    with path.open(mode) as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
