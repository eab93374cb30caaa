"""The file `metrics.jsonl` of a run: one JSON line for every entry of the log."""

import json
import re
from pathlib import Path
from typing import Any

from transfusion_mot.files import written_whole

METRICS_FILE = "metrics.jsonl"
VALIDATION = "validation/"
# Only in validation: captions after their media.
CAPTION_LOSS = "caption_loss"
TOKEN_UNIT, LATENT_UNIT = "nats per token", "squared error per element"

Lines = list[dict[str, Any]]

# Version 0.1 had one modality of latents, and named its loss after the objective.
_LOSS_OF_VERSION_0_1 = re.compile(r"^(validation/)?diffusion_loss(?=$|/)")


def loss_name(modality: str) -> str:
    """Name of a modality's mean loss."""
    return f"{modality}_loss"


def loss_units(lines: Lines) -> dict[str, str]:
    """Names of the losses of a run, in the order of its log => their units."""
    keys = dict.fromkeys(key for line in lines for key in line)
    # Only latents have losses by timestep.
    by_timestep = {key.removeprefix(VALIDATION).split("/t=")[0] for key in keys if "/t=" in key}
    return {
        key: LATENT_UNIT if key in by_timestep else TOKEN_UNIT
        for key in keys
        if key.endswith("_loss") and "/" not in key
    }


def read_metrics(path: Path) -> Lines:
    """The lines of a metrics file, without a last line that a crash cut off.

    `diffusion_loss` of version 0.1 is read as `image_loss`.
    """
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            values: dict[str, Any] = json.loads(line)
        except json.JSONDecodeError:
            continue
        lines.append({_LOSS_OF_VERSION_0_1.sub(r"\1image_loss", name): value for name, value in values.items()})
    return lines


def replace_metrics(path: Path, lines: Lines) -> None:
    """Write a metrics file anew; a run that is killed meanwhile keeps the old one."""
    with written_whole(path) as file:
        file.write_text(_as_text(lines))


def append_metrics(path: Path, lines: Lines) -> None:
    """Add lines at the end of a metrics file."""
    with path.open("a") as file:
        file.write(_as_text(lines))


def _as_text(lines: Lines) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)
