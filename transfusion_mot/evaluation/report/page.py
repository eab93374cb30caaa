"""A report as a single self-contained HTML page with embedded pictures."""

import base64
import io
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from PIL import Image

from transfusion_mot.evaluation.report.comparison import is_lower_better
from transfusion_mot.evaluation.report.content import Metric, Picture, Report, metrics_table, save_report, shown_number
from transfusion_mot.evaluation.report.curves import (
    inline_svg,
    save_figure,
    setting_columns,
    sweep_figure,
    sweep_table,
    timestep_figure,
    timestep_losses,
    timestep_table,
)
from transfusion_mot.evaluation.report.published import CAVEAT, HEADINGS, PUBLISHED, Row, cells, published_table

PAGE_FILE = "report.html"
# Maximum side of an embedded picture, for screens with two device pixels for each pixel; smaller ones are unchanged.
_THUMBNAIL = 256
_TEXT = "text: "
_EXTREMES, _RANDOM, _CAPTIONS, _NEIGHBOURS = 16, 48, 24, 16
# Metrics at the top of the page: the first one of each line that a report has.
_HEADLINES = (
    *(("FID", "FD-"), ("CLIP score x100", "CLIP cosine"), ("CIDEr x100",)),
    *(("diffusion loss", "loss of"), ("text loss",)),
)


def render_page(report: Report, folder: Path, own: Row) -> str:
    """The page of a report.

    Args:
        report: The report.
        folder: Folder of the relative paths of its pictures.
        own: The model's row beside the published ones.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["number"] = shown_number
    environment.filters["picture"] = lambda path: embedded(folder / path)
    template = environment.from_string((files(__package__) / "report.html.jinja").read_text(encoding="utf-8"))
    losses = timestep_losses(report.metrics)
    figure = sweep_figure(report.sweep)
    sweep_names = list(dict.fromkeys(metric.name for point in report.sweep for metric in point.metrics))
    return template.render(
        report=report,
        headlines=[(metric, is_lower_better(metric.name)) for metric in headlines(report.metrics)],
        metric_groups=metric_groups(in_main_table(report.metrics)),
        timesteps=losses,
        timesteps_svg=inline_svg(timestep_figure(losses)) if losses else None,
        groups=picture_groups(report),
        captions=spread(report.captions, _CAPTIONS),
        neighbours=report.neighbours[:_NEIGHBOURS],
        sweep_svg=inline_svg(figure) if figure is not None else None,
        sweep_names=sweep_names,
        sweep_rows=[(setting_columns(point), {m.name: m.value for m in point.metrics}) for point in report.sweep],
        headings=HEADINGS,
        own=cells(replace(own, model=own.model.strip("*"))),
        published=[cells(row) for row in PUBLISHED],
        caveat=CAVEAT,
    )


def headlines(metrics: Sequence[Metric]) -> list[Metric]:
    """The few metrics at the top."""
    found = []
    for beginnings in _HEADLINES:
        # Metrics of painted images come first.
        matching = [metric for beginning in beginnings for metric in metrics if metric.name.startswith(beginning)]
        found += matching[:1]
    return found


def in_main_table(metrics: Sequence[Metric]) -> list[Metric]:
    """The metrics without those of single timesteps, which have a separate table."""
    apart = {metric.name for of_kind in timestep_losses(metrics).values() for metric in of_kind.values()}
    return [metric for metric in metrics if metric.name not in apart]


@dataclass(frozen=True)
class MetricGroup:
    """Consecutive metrics of the same images with a similar protocol.

    Attributes:
        title: The images.
        shared: Common part of their protocols.
        rows: (name without the images, metric, remaining part of its protocol) of each.
    """

    title: str
    shared: dict[str, Any]
    rows: list[tuple[str, Metric, dict[str, Any]]]


def metric_groups(metrics: Sequence[Metric]) -> list[MetricGroup]:
    """The rows of the table of metrics, grouped."""
    groups: list[list[Metric]] = []
    for metric in metrics:
        if groups and _alike(groups[-1][0], metric):
            groups[-1].append(metric)
        else:
            groups.append([metric])
    result = []
    for group in groups:
        shared = {
            key: value
            for key, value in group[0].protocol.items()
            if all(metric.protocol.get(key) == value for metric in group)
        }
        rows = [(_split(m.name)[0], m, {k: v for k, v in m.protocol.items() if k not in shared}) for m in group]
        result.append(MetricGroup(_title(group[0]), shared, rows))
    return result


def _title(metric: Metric) -> str:
    of = _split(metric.name)[1]
    if of.startswith(_TEXT):
        return f"Held-out text, {of.removeprefix(_TEXT)}"
    if of:
        return f"{of.capitalize()} images"
    return "Captions of real images" if "captioned images" in metric.protocol else "Held-out images"


def _split(name: str) -> tuple[str, str]:
    """ "FID (generated)" => ("FID", "generated"); "perplexity (books)" => ("perplexity", "text: books")."""
    if found := re.fullmatch(r"(text loss|perplexity|bits per byte) \((.*)\)", name):
        return found[1], _TEXT + found[2]
    found = re.fullmatch(r"(.*) \((generated|reconstructed|real)\)", name)
    return (found[1], found[2]) if found else (name, "")


def _alike(first: Metric, other: Metric) -> bool:
    same = sum(other.protocol.get(key) == value for key, value in first.protocol.items())
    return _split(first.name)[1] == _split(other.name)[1] and same > len(first.protocol) / 2


def picture_groups(report: Report) -> list[tuple[str, str, list[Picture]]]:
    """(title, explanation, pictures) of the grids: best, random and worst; only random if there is no score."""
    scored = [picture for picture in report.pictures if picture.score is not None]
    groups = []
    if len(scored) > 1:
        ordered = sorted(scored, key=lambda picture: picture.score or 0.0, reverse=not report.lower_is_better)
        count = min(_EXTREMES, len(ordered) // 2)
        best, worst = ordered[:count], ordered[-count:][::-1]
        groups = [("Best", f"by {report.score_name}", best), ("Worst", f"by {report.score_name}", worst)]
    drawn = spread(report.pictures, _RANDOM)
    if drawn:
        groups.append(("Random", "drawn without looking at any score", drawn))
    return groups


def spread(pictures: Sequence[Picture], count: int) -> list[Picture]:
    """At most `count` fixed random items, in their order."""
    chosen = random.Random(0).sample(range(len(pictures)), min(count, len(pictures)))
    return [pictures[index] for index in sorted(chosen)]


def embedded(path: Path) -> str:
    """A picture as a data URL; large ones are reduced."""
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    image.thumbnail((_THUMBNAIL, _THUMBNAIL), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    # Small pictures are drawings or pixelated, and take a few hundred bytes as PNG.
    kind = "png" if max(image.size) <= 128 else "webp"
    image.save(file, format=kind, **({"quality": 85} if kind == "webp" else {"optimize": True}))
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def write_report(report: Report, folder: Path, own: Row) -> str:
    """Write report.json, the tables metrics.md, the page report.html and, for a sweep, sweep.png.

    Returns:
        The table of the numbers.

    Raises:
        UserError: A file cannot be written, or a picture of the report cannot be read.
    """
    save_report(report, folder)
    table = metrics_table(in_main_table(report.metrics))
    parts = [f"# {report.title}", table]
    if losses := timestep_losses(report.metrics):
        parts += ["## Diffusion loss by timestep", timestep_table(losses)]
    figure = sweep_figure(report.sweep)
    if report.sweep:
        parts += ["## Sweep of the sampler", sweep_table(report.sweep)]
    if figure is not None:
        save_figure(figure, folder / "sweep.png")
        parts.append("![image distance of each setting](sweep.png)")
    parts += ["## Beside published numbers", published_table(own), CAVEAT]
    (folder / "metrics.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    (folder / PAGE_FILE).write_text(render_page(report, folder, own), encoding="utf-8")
    return table
