"""Items that sample.py makes: prompts from the command line and files, and a name and a seed for each result."""

import argparse
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from transfusion_mot.cli.options import PROMPTS_FILE
from transfusion_mot.cli.outputs import ResultFolder
from transfusion_mot.errors import UserError
from transfusion_mot.evaluation.protocol.prompts import derived_seed
from transfusion_mot.files import read_lines

SLUG_LENGTH = 48


@dataclass(frozen=True)
class Item:
    """One result to make: its prompt, its own seed, and the prefix of its file names."""

    prompt: str
    seed: int
    name: str

    def generator(self) -> torch.Generator:
        """Its own generator, on the CPU, so that every device draws the same numbers."""
        return torch.Generator().manual_seed(self.seed)


# A maker writes the files of some items into the folder and returns their metadata lines.
Maker = Callable[[list[Item], ResultFolder | None], list[dict[str, Any]]]


def read_prompts(arguments: argparse.Namespace, state: PartialState) -> list[str]:
    """Prompts from the command line, then those from the file or standard input.

    Raises:
        UserError: The file cannot be read, or there are none at all.
    """
    prompts = [prompt.strip() for prompt in arguments.prompts]
    if arguments.prompts_file is not None:
        prompts += [line.strip() for line in _lines_of(arguments.prompts_file, state) if line.strip()]
    if not prompts:
        raise UserError(f"there is nothing to do: {arguments.prompts_file} has no line with a prompt")
    return prompts


def _lines_of(file: str, state: PartialState) -> list[str]:
    if file == "-" and state.num_processes > 1:
        raise UserError("several processes cannot share standard input; write the prompts into a file")
    return read_lines(file, PROMPTS_FILE)


def plan(prompts: list[str], num_images: int, seed: int, first: int = 0, *, are_files: bool = False) -> list[Item]:
    """All results to make, grouped by prompt; the results of a repeated prompt are numbered on.

    Args:
        prompts: Prompts, or paths of pictures or audio files.
        num_images: Results for each prompt.
        seed: Seed of the command.
        first: Number in the name of the first result.
        are_files: Whether the prompts are paths; results are then named like the files.
    """
    counts: Counter[str] = Counter()
    digits = max(4, len(str(first + len(prompts) * num_images - 1)))
    items: list[Item] = []
    for prompt in prompts:
        name = Path(prompt).stem if are_files else prompt
        slug = re.sub(r"[\W_]+", "-", name.lower()).strip("-")[:SLUG_LENGTH].strip("-") or "image"
        for _ in range(num_images):
            items.append(
                Item(prompt, derived_seed(seed, prompt, counts[prompt]), f"{first + len(items):0{digits}d}-{slug}")
            )
            counts[prompt] += 1
    return items
