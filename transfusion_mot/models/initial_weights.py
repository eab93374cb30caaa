"""Initial weights from safetensors files, and a report of how each of them was used."""

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from transfusion_mot.config import TEXT
from transfusion_mot.errors import UserError
from transfusion_mot.models.lora import base_parameters
from transfusion_mot.models.transfusion import fill


class WeightFiles:
    """The tensors of one safetensors file, or of the shards that an index lists. They are read one at a time.

    Args:
        folder: Folder of the files.
        stem: Stem of their names: `diffusion_pytorch_model` in diffusers' folders, `model` in those of transformers.

    Raises:
        UserError: There is no such file, a shard is missing, or a file is damaged.
    """

    def __init__(self, folder: Path, stem: str) -> None:
        self.folder = folder
        self._file_of: dict[str, Path] = {}
        self._open_files: dict[Path, Any] = {}
        single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
        if single.is_file():
            self._file_of = dict.fromkeys(self._opened(single).keys(), single)
        elif index.is_file():
            try:
                shards: dict[str, str] = json.loads(index.read_text())["weight_map"]
                self._file_of = {name: folder / shard for name, shard in shards.items()}
            except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
                raise UserError(f"{index} is not an index of weights ({error}); copy it again") from None
            files = sorted(set(self._file_of.values()))
            if missing := [path.name for path in files if not path.is_file()]:
                raise UserError(
                    f"{folder} lacks {', '.join(missing)}, {len(missing)} of the {len(files)} files of weights that "
                    f"{index.name} lists; copy the folder again"
                )
            held = {path: set(self._opened(path).keys()) for path in files}
            if wrong := [name for name, path in self._file_of.items() if name not in held[path]]:
                raise UserError(f"{self._file_of[wrong[0]]} lacks {wrong[0]}, which {index.name} lists; copy it again")
        else:
            raise UserError(
                f"{folder} has no weights: neither {single.name} nor {index.name}; pickle files (.bin) are not "
                "read, because they can run code"
            )

    @property
    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return tuple(self._opened(self._file_of[name]).get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        """A tensor, on the CPU, in the number format of its file.

        Raises:
            UserError: It is not finite.
        """
        tensor: Tensor = self._opened(self._file_of[name]).get_tensor(name)
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(
                f"{self._file_of[name]}: {name} is not finite; use other weights, such as those of an earlier step"
            )
        return tensor

    def _opened(self, path: Path) -> Any:
        """Memory-mapped: a tensor takes memory when it is read."""
        if path not in self._open_files:
            try:
                self._open_files[path] = safe_open(path, framework="pt", device="cpu")
            except (OSError, SafetensorError) as error:
                raise UserError(f"{path} is damaged or not a safetensors file ({error}); copy it again") from None
        return self._open_files[path]


@dataclass
class WeightReport:
    """A report on the parameters of a model and the tensors of a source.

    Attributes:
        source: Origin of the tensors, for messages.
        taken: Parameter filled from the source => its number of elements and original number format.
        missing: Parameter that the source lacks => the reason why that is right, such as "tower image: drawn at
            random"; "" is unexplained.
        unexpected: Tensor of the source without a parameter => the reason why that is right; "" is unexplained.
        resized: Parameter with another shape than in the source => the reason and the two shapes.
        notes: Sentences about other differences from the source.
    """

    source: str
    taken: dict[str, tuple[int, str]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    unexpected: dict[str, str] = field(default_factory=dict)
    resized: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def take(self, name: str, parameter: nn.Parameter, tensor: Tensor) -> None:
        """Fill a parameter, or this process's shard of it, and record it.

        Raises:
            UserError: The shapes differ.
        """
        if parameter.shape != tensor.shape:
            raise UserError(
                f"{self.source}: its weights for {name} have the shape {list(tensor.shape)}, but the model needs "
                f"{list(parameter.shape)}; its files do not belong together"
            )
        fill(parameter, tensor)
        self.taken[name] = tensor.numel(), str(tensor.dtype).removeprefix("torch.")

    def take_rows(self, name: str, parameter: nn.Parameter, tensor: Tensor) -> None:
        """As `take`; a text embedding or head for more tokens gets rows appended.

        Raises:
            UserError: The shapes differ in another way.
        """
        is_of_tokens = name.startswith(f"modalities.{TEXT}.")
        if is_of_tokens and len(tensor) < len(parameter) and tensor.shape[1:] == parameter.shape[1:]:
            self.resized[name] = f"rows appended for tokens of this run: {len(tensor)} => {len(parameter)}"
            tensor = _with_rows(tensor, len(parameter))
        self.take(name, parameter, tensor)

    def check(self) -> None:
        """Refuse a report with unexplained entries.

        Raises:
            UserError: Names the parameters and tensors.
        """
        problems = []
        for what, names in (("no weights for", self.missing), ("unknown weights", self.unexpected)):
            if unexplained := [name for name, reason in names.items() if not reason]:
                more = f" and {len(unexplained) - 5} more" if len(unexplained) > 5 else ""
                problems.append(f"{what} {', '.join(unexplained[:5])}{more}")
        if problems:
            raise UserError(f"{self.source} has {', and '.join(problems)}; give a source whose weights fit this model")

    def __str__(self) -> str:
        """A short table: how many tensors were taken, missing, unexpected and resized, and why."""
        elements, formats = sum(count for count, _ in self.taken.values()), {kind for _, kind in self.taken.values()}
        taken = f"{elements / 1e6:.1f}M parameters in {' and '.join(sorted(formats))}" if self.taken else ""
        lines = [f"weights from {self.source}", f"  {'taken':<12}{len(self.taken):>5}  {taken}".rstrip()]
        for title in ("missing", "unexpected", "resized"):
            entries: dict[str, str] = getattr(self, title)
            reasons = Counter(reason for reason in entries.values() if reason)
            counts = "; ".join(f"{count} x {reason}" for reason, count in reasons.items())
            lines.append(f"  {title:<12}{len(entries):>5}  {counts}".rstrip())
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def take_all(model: nn.Module, files: WeightFiles, source: str) -> WeightReport:
    """Fill all parameters of a model from the tensors of the same names, and record the rest on both sides.

    Raises:
        UserError: A shape differs, or a tensor is not finite.
    """
    report = WeightReport(source)
    left = files.names
    for name, parameter in base_parameters(model).items():
        if name in left:
            report.take(name, parameter, files.read(name))
            left.remove(name)
        else:
            report.missing[name] = ""
    report.unexpected = dict.fromkeys(sorted(left), "")
    return report


def _with_rows(matrix: Tensor, rows: int) -> Tensor:
    """[V, D] => [rows, D]: new rows are drawn around the mean of the others, with their standard deviation.

    Every process draws the same.
    """
    std, mean = torch.std_mean(matrix, dim=0)
    generator = torch.Generator().manual_seed(len(matrix))
    noise = torch.randn(rows - len(matrix), matrix.shape[1], generator=generator, dtype=torch.float32)
    return torch.cat([matrix, mean + std * noise.to(matrix.dtype)])
