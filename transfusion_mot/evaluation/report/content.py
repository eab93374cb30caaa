"""Measured numbers with their protocols, and reports of all numbers of a model, as JSON and as tables."""

import datetime
import json
import platform
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transfusion_mot import __version__
from transfusion_mot.errors import UserError

REPORT_FILE = "report.json"
_PACKAGES = ("torch", "diffusers", "transformers", "timm", "clean-fid", "pillow", "numpy")


@dataclass(frozen=True)
class Metric:
    """One number.

    Attributes:
        name: What is measured; metrics of different names cannot be compared.
        value: The number.
        protocol: How it was measured: counts, networks with a hash of their weights, resize, units. Plain JSON values.
        interval: 95 % confidence interval (low, high); None if it is not known.
        scores: One value per image, in the order of the images, for a number that is a mean over images.
    """

    name: str
    value: float
    protocol: dict[str, Any] = field(default_factory=dict)
    interval: tuple[float, float] | None = None
    scores: tuple[float, ...] | None = None


@dataclass(frozen=True)
class SweepPoint:
    """Results of a model with one setting of the sampler.

    Attributes:
        settings: `guidance_scale`, and `guidance_interval`, `num_inference_steps` and `scheduler`, or for codes
            `code_temperature`, `code_top_p` and `code_top_k`.
        metrics: Metrics of the images painted with this setting.
    """

    settings: dict[str, Any]
    metrics: list[Metric]


@dataclass(frozen=True)
class Picture:
    """A painted image, or a real one with its caption.

    Attributes:
        file: Path below the report's folder.
        prompt: Its prompt; for a real image the model's caption.
        score: Score to sort images by; see `Report.score_name`.
        reference: Path of the real image that belongs to the prompt, below the report's folder or absolute.
        captions: Reference captions.
    """

    file: str
    prompt: str
    score: float | None = None
    reference: str | None = None
    captions: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Neighbour:
    """A painted image and the training image that is nearest to it in the features of a network.

    Attributes:
        file: The painted image.
        prompt: Its prompt.
        training_file: The training image.
        training_caption: Its caption.
        distance: 1 - cosine of their features; 0 is the same image.
    """

    file: str
    prompt: str
    training_file: str
    training_caption: str
    distance: float


@dataclass(frozen=True)
class Report:
    """All results of a model.

    Attributes:
        title: Name of the protocol.
        command: The command that measured it.
        date: Date and time, as ISO 8601.
        settings: Settings of the protocol and the sampler, and hashes that identify the samples.
        versions: Versions of this package and those it uses.
        metrics: The metrics.
        sweep: Results of each sampler setting, if there is a sweep.
        pictures: Painted images with their prompts.
        score_name: Name of the `score` of pictures.
        lower_is_better: Whether the best picture has the lowest score.
        captions: Real images with the model's captions.
        neighbours: Nearest training images, the closest pair first.
        notes: Notes for the reader: left-out parts with reasons.
    """

    title: str
    command: str
    date: str
    settings: dict[str, Any]
    versions: dict[str, str]
    metrics: list[Metric]
    sweep: list[SweepPoint] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    score_name: str = ""
    lower_is_better: bool = False
    captions: list[Picture] = field(default_factory=list)
    neighbours: list[Neighbour] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def metrics_table(metrics: Sequence[Metric]) -> str:
    """A markdown table, aligned for reading in a terminal: metric, value to four digits, how it was measured.

    An interval follows its value. If most of a protocol is the same as in the row above, only the differences are
    shown.
    """
    lines = [("metric", "value", "measured with")]
    above: dict[str, Any] = {}
    for metric in metrics:
        agreeing = sum(metric.protocol.get(key) == value for key, value in above.items())
        same = agreeing > len(above) / 2
        shown = {key: v for key, v in metric.protocol.items() if not same or key not in above or above[key] != v}
        protocol = ["as above"] * same + [f"{key}: {shown_number(value)}" for key, value in shown.items()]
        protocol += [f"no {key}" for key in above if same and key not in metric.protocol]
        lines.append((metric.name, value_and_interval(metric), ", ".join(protocol)))
        above = metric.protocol
    widths = [max(len(line[column]) for line in lines) for column in range(2)]
    lines.insert(1, ("-" * widths[0], "-" * (widths[1] - 1) + ":", "---"))
    return "\n".join(f"| {name:<{widths[0]}} | {value:>{widths[1]}} | {how} |" for name, value, how in lines)


def value_and_interval(metric: Metric) -> str:
    """For example "31.2 [30.8, 31.5]"."""
    if metric.interval is None:
        return shown_number(metric.value)
    low, high = metric.interval
    return f"{shown_number(metric.value)} [{shown_number(low)}, {shown_number(high)}]"


def shown_number(value: Any) -> str:
    """A number with four digits, or more for large integers; other values unchanged."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"


def shown_range(ends: Sequence[float]) -> str:
    """For example "0.3-0.8"."""
    return "-".join(f"{end:g}" for end in ends)


def save_metrics(metrics: Sequence[Metric], path: str | Path, command: Sequence[str]) -> None:
    """Write metrics to a JSON file with the command, the version and the date that they come from.

    Raises:
        UserError: The file cannot be written.
    """
    content = {
        "metrics": [asdict(metric) for metric in metrics],
        "command": shlex.join(command),
        "transfusion_mot": __version__,
        "date": now(),
    }
    _write_json(content, Path(path))


def save_report(report: Report, folder: Path) -> None:
    """Write report.json.

    Raises:
        UserError: It cannot be written.
    """
    _write_json(asdict(report), folder / REPORT_FILE)


def _write_json(content: dict[str, Any], path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def read_report(path: str | Path) -> Report:
    """Read report.json, given by its path or by the path of its folder.

    Raises:
        UserError: The file does not exist or is not a report.
    """
    file = Path(path) / REPORT_FILE if Path(path).is_dir() else Path(path)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        metrics = [_metric(entry) for entry in content.pop("metrics")]
        sweep = [SweepPoint(p["settings"], [_metric(entry) for entry in p["metrics"]]) for p in content.pop("sweep")]
        pictures, captions = ([Picture(**entry) for entry in content.pop(key)] for key in ("pictures", "captions"))
        neighbours = [Neighbour(**entry) for entry in content.pop("neighbours")]
        return Report(
            **content, metrics=metrics, sweep=sweep, pictures=pictures, captions=captions, neighbours=neighbours
        )
    except OSError as error:
        raise UserError(
            f"cannot read {file}: {error.strerror}; give a {REPORT_FILE} of evaluate/benchmark.py, or its folder"
        ) from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError(
            f"{file} is not a report of evaluate/benchmark.py; give a {REPORT_FILE} that it wrote"
        ) from None


def _metric(entry: dict[str, Any]) -> Metric:
    for name in ("interval", "scores"):
        entry[name] = None if entry[name] is None else tuple(entry[name])
    return Metric(**entry)


def now() -> str:
    """The date and time, to the second, in UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def used_versions() -> dict[str, str]:
    """Versions of the packages that compute metrics."""
    packages = {name: version(name) for name in _PACKAGES}
    return {"transfusion_mot": __version__, "python": platform.python_version(), **packages}
