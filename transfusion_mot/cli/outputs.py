"""Outputs of sampling commands: a folder to which each command adds its results, and pictures of the denoising."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from transfusion_mot.data.images import grid
from transfusion_mot.errors import UserError
from transfusion_mot.files import lines_of, written_whole
from transfusion_mot.outputs import claim, read_claim
from transfusion_mot.pipeline import TransfusionPipeline

# For every command in a folder: N.json describes it, N.jsonl holds its lines once it is done, and N.parts those of each
# process before. N is the number of its first result.
_COMMANDS = ".commands"
_STRIP_FRAMES = 8
_GIF_FRAMES = 24
_GIF_MILLISECONDS = 120
_GIF_LAST_MILLISECONDS = 1500


class ResultFolder:
    """Numbered results of commands. Several processes can write one command's results, and a kill loses none of them.

    A command adds its results after the existing ones, with their own numbers. Each of its processes writes a line for
    every finished result to its own file; `finish` joins them in order. The same command in the same folder makes only
    the missing results, also with another number of processes.

    Args:
        path: A folder that is new, has no files, or has results of other commands.
        command: Everything that the results depend on, as JSON values.
        file_name: JSON Lines file of the results.
        count: Number of results of the command.
        state: The processes that share the work; all of them open the folder.

    Attributes:
        first: Number of the first result.

    Raises:
        UserError: The folder holds something else.
    """

    def __init__(self, path: str, command: dict[str, Any], file_name: str, count: int, state: PartialState) -> None:
        self.path = Path(path)
        self.results = self.path / file_name
        self._commands = self.path / _COMMANDS
        self._state = state
        self._count = count
        # As JSON gives it back: lists for tuples.
        self._claim: dict[str, Any] = json.loads(json.dumps({"results": file_name, "count": count, "command": command}))
        # Subfolders are results of other commands, such as samples/first in samples.
        is_used = self.path.exists() and (not self.path.is_dir() or any(file.is_file() for file in self.path.iterdir()))
        if is_used and not self._commands.is_dir():
            raise UserError(
                f"output '{self.path}' holds files that sample.py did not write; give another --output, or remove them"
            )
        claims = {int(file.stem): read_claim(file) for file in sorted(self._commands.glob("*.json"))}
        same = [first for first, claimed in claims.items() if claimed == self._claim]
        self.first = (
            same[-1] if same else max((first + int(c.get("count", 0)) for first, c in claims.items()), default=0)
        )
        self._is_claimed = False
        name = f"{self.first:06d}"
        self._file, self._lines = (self._commands / f"{name}{suffix}" for suffix in (".json", ".jsonl"))
        self._part = self._commands / f"{name}.parts" / f"{state.process_index:05d}.jsonl"
        self._done = {int(line["index"]) for line in self._lines_of_parts()}
        # All processes read before one writes.
        state.wait_for_everyone()

    def make(self) -> None:
        """Make the folder if it does not exist. Called with the first results, so that a mistake leaves no folder.

        Raises:
            UserError: It cannot be made, or a command that began at the same time has taken the numbers.
        """
        try:
            # Checked every time: a second run of the same command removes the folder when it has finished.
            self._part.parent.mkdir(parents=True, exist_ok=True)
            if not self._is_claimed and claim(self._file, self._claim) != self._claim:
                raise UserError(
                    f"another command that began at the same time writes into '{self.path}'; give this one another "
                    "--output, or start it again when the other has ended"
                )
            self._is_claimed = True
        except OSError as error:
            raise UserError(f"output folder '{self.path}' cannot be made: {error}") from None

    def _lines_of_parts(self) -> Iterator[dict[str, Any]]:
        for part in sorted(self._part.parent.glob("*.jsonl")):
            for line in lines_of(part.read_text(encoding="utf-8", errors="replace")):
                try:
                    yield json.loads(line)
                except ValueError:
                    # Empty, or cut off by the end of its process.
                    continue

    def missing(self) -> list[int]:
        """Numbers of the command's results that this process still has to make."""
        if self._lines.exists():
            return []
        left = [index for index in range(self._count) if index not in self._done]
        return left[self._state.process_index :: self._state.num_processes]

    def add(self, lines: dict[int, dict[str, Any]]) -> None:
        """Record results by their number in the command; the files that they name must exist."""
        self.make()
        with self._part.open("a", encoding="utf-8") as file:
            # The line feed comes first: the last line may have been cut off.
            file.writelines(
                "\n" + json.dumps({"index": index, **line}, ensure_ascii=False) for index, line in lines.items()
            )

    def finish(self) -> None:
        """Join the lines of all processes; each process calls it when it is done."""
        self._state.wait_for_everyone()
        if self._state.is_main_process:
            if not self._lines.exists():
                # One line for each number: two runs of the command at the same time make the same results twice.
                lines = {int(line.pop("index")): line for line in self._lines_of_parts()}
                with written_whole(self._lines, is_shared=True) as file:
                    text = "".join(f"{json.dumps(lines[i], ensure_ascii=False)}\n" for i in sorted(lines))
                    file.write_text(text, encoding="utf-8")
            claims = [file for file in sorted(self._commands.glob("*.json")) if file.with_suffix(".jsonl").exists()]
            ended = [file for file in claims if read_claim(file).get("results") == self.results.name]
            texts = [file.with_suffix(".jsonl").read_text(encoding="utf-8") for file in ended]
            with written_whole(self.results, is_shared=True) as file:
                file.write_text("".join(texts), encoding="utf-8")
            shutil.rmtree(self._part.parent, ignore_errors=True)
        self._state.wait_for_everyone()

    def read(self) -> Iterator[dict[str, Any]]:
        """The lines of the command when it is finished, in order."""
        with self._lines.open(encoding="utf-8") as file:
            for line in file:
                yield json.loads(line)


def save_png(image: Image.Image, path: Path, details: dict[str, Any]) -> None:
    """Write a picture with its settings in PNG text chunks."""
    chunks = PngInfo()
    for key, value in details.items():
        chunks.add_text(key, str(value))
    image.save(path, pnginfo=chunks)


class Denoising:
    """A `callback_on_step_end` that keeps the model's estimate of the clean images after every step."""

    def __init__(self) -> None:
        self._clean: list[torch.Tensor] = []

    def __call__(
        self, pipeline: TransfusionPipeline, step: int, timestep: Any, tensors: dict[str, Any]
    ) -> dict[str, Any]:
        self._clean.append(tensors["clean"].detach().cpu())
        return {}

    def save(
        self, pipeline: TransfusionPipeline, images: list[Image.Image], paths: list[Path], strip: bool, gif: bool
    ) -> None:
        """Write PATH.png and PATH.gif of each image, from its first estimate to the final image."""
        steps = np.unique(
            np.linspace(0, len(self._clean) - 1, _GIF_FRAMES if gif else _STRIP_FRAMES).round().astype(int)
        )
        decoded = [pipeline.decode_latents(self._clean[step].to(pipeline.device)) for step in steps[:-1]]
        for number, (image, path) in enumerate(zip(images, paths, strict=True)):
            frames = [*(frame[number] for frame in decoded), image]
            path.parent.mkdir(exist_ok=True)
            if strip:
                shown = np.unique(np.linspace(0, len(frames) - 1, _STRIP_FRAMES).round().astype(int))
                labels = [f"step {steps[place] + 1}" for place in shown]
                grid([frames[place] for place in shown], labels, len(shown)).save(path.with_suffix(".png"))
            if gif:
                durations = [_GIF_MILLISECONDS] * (len(frames) - 1) + [_GIF_LAST_MILLISECONDS]
                frames[0].save(
                    path.with_suffix(".gif"), save_all=True, append_images=frames[1:], duration=durations, loop=0
                )
