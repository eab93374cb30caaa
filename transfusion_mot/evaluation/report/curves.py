"""Plots of evaluations: sweeps of sampler settings, and steps until a run reaches another run's losses."""

import io
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from transfusion_mot.errors import UserError
from transfusion_mot.evaluation.report.content import Metric, SweepPoint, shown_number, shown_range, value_and_interval
from transfusion_mot.evaluation.steps_to_match import Curve, Match

# Okabe and Ito's palette: distinguishable with colour blindness and in grey.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999")
_INK, _GRID, _EDGE = "#2b2f36", "#e3e6ea", "#b4bac3"
_OF_TIMESTEP = re.compile(r"diffusion loss \((\w+), t = ([\d.]+)\)")
_AXIS_NAMES = {"step": "steps", "flops": "FLOPs", "seconds": "seconds"}


def sweep_figure(points: Sequence[SweepPoint]) -> Figure | None:
    """Image distance against CLIP score, with a curve over guidance scales for each scheduler, number of steps and
    guidance interval.

    Without a CLIP score it is the distance against the guidance scale; without a distance there is no figure.
    """
    distance = _first_name(points, "FID", "FD-")
    if distance is None:
        return None
    clip = _first_name(points, "CLIP cosine", "CLIP score", "CLIPScore")
    curves = defaultdict(list)
    for point in points:
        values = {metric.name: metric.value for metric in point.metrics}
        scale = point.settings["guidance_scale"]
        x = scale if clip is None else values[clip]
        curves[_sampler(point)].append((scale, x, values[distance]))
    figure = Figure(figsize=(7.6, 4.6), layout="constrained")
    axes = figure.subplots()
    for index, (label, found) in enumerate(curves.items()):
        scales, xs, ys = zip(*sorted(found), strict=True)
        axes.plot(xs, ys, "o-", color=_COLOURS[index % len(_COLOURS)], linewidth=1.8, markersize=5, label=label)
        if clip is not None:
            for scale, x, y in zip(scales, xs, ys, strict=True):
                axes.annotate(
                    f"{scale:g}", (x, y), xytext=(5, 5), textcoords="offset points", color=_INK, fontsize="small"
                )
    axes.set_xlabel(clip or "guidance scale", color=_INK)
    axes.set_ylabel(f"{distance} (lower is better)", color=_INK)
    if clip is not None:
        axes.set_title("Numbers at the points are guidance scales", color=_INK, fontsize="medium", loc="left")
    axes.legend(frameon=False, labelcolor=_INK)
    _tidy(axes)
    return figure


def _sampler(point: SweepPoint) -> str:
    """The setting without its guidance scale, as text."""
    columns = setting_columns(point)
    if "temperature" in columns:
        words = f"temperature {columns['temperature']}"
        words += f", top-p {columns['top-p']}" if columns["top-p"] != "1" else ""
        return words + (f", top-k {columns['top-k']}" if columns["top-k"] != "0" else "")
    words = f"{columns['scheduler'].removesuffix('Scheduler')}, {columns['steps']} steps"
    return words if columns["at t"] == "0-1" else f"{words}, guided at t = {columns['at t']}"


def setting_columns(point: SweepPoint) -> dict[str, str]:
    """Columns of a sweep table and the values of this setting, for diffusion or for codes."""
    settings = point.settings
    columns = {"guidance": f"{settings['guidance_scale']:g}"}
    if "code_temperature" in settings:
        names = {"temperature": "code_temperature", "top-p": "code_top_p", "top-k": "code_top_k"}
        return columns | {column: f"{settings[name]:g}" for column, name in names.items()}
    # Older reports do not have the timesteps of guidance; they used all.
    at = shown_range(settings.get("guidance_interval", (0, 1)))
    return columns | {"at t": at, "steps": f"{settings['num_inference_steps']}", "scheduler": settings["scheduler"]}


def sweep_table(points: Sequence[SweepPoint]) -> str:
    """A markdown table: a row for each setting, a column for each number."""
    names = list(dict.fromkeys(metric.name for point in points for metric in point.metrics))
    columns = list(setting_columns(points[0]))
    lines = [
        f"| {' | '.join([*columns, *names])} |",
        f"|{''.join(' --- |' if column == 'scheduler' else ' ---: |' for column in [*columns, *names])}",
    ]
    for point in points:
        values = {metric.name: shown_number(metric.value) for metric in point.metrics}
        cells = [*setting_columns(point).values(), *(values.get(name, "") for name in names)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def timestep_losses(metrics: Sequence[Metric]) -> dict[str, dict[str, Metric]]:
    """Diffusion losses at single timesteps: kind (conditional, unconditional) => t => loss."""
    found: defaultdict[str, dict[str, Metric]] = defaultdict(dict)
    for metric in metrics:
        if of_timestep := _OF_TIMESTEP.fullmatch(metric.name):
            found[of_timestep[1]][of_timestep[2]] = metric
    return dict(found)


def timestep_figure(losses: Mapping[str, Mapping[str, Metric]]) -> Figure:
    """Diffusion loss against t, a curve with its intervals for each kind."""
    figure = Figure(figsize=(7.6, 3.6), layout="constrained")
    axes = figure.subplots()
    for (kind, by_timestep), colour, line in zip(losses.items(), _COLOURS, ("o-", "s--"), strict=False):
        xs = [float(t) for t in by_timestep]
        axes.plot(xs, [m.value for m in by_timestep.values()], line, color=colour, linewidth=1.8, label=kind)
        low, high = zip(*(metric.interval or (metric.value,) * 2 for metric in by_timestep.values()), strict=True)
        axes.fill_between(xs, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set_xlabel("timestep t (0 clean, 1 noise)", color=_INK)
    axes.set_ylabel("diffusion loss", color=_INK)
    axes.set_xlim(0, 1)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, labelcolor=_INK)
    _tidy(axes)
    return figure


def timestep_table(losses: Mapping[str, Mapping[str, Metric]]) -> str:
    """A markdown table: a row for each timestep, a column for each kind."""
    lines = [f"| t | {' | '.join(losses)} |", f"| ---: |{' ---: |' * len(losses)}"]
    lines += [
        f"| {t} | {' | '.join(value_and_interval(of[t]) for of in losses.values())} |"
        for t in next(iter(losses.values()))
    ]
    return "\n".join(lines)


def _first_name(points: Sequence[SweepPoint], *beginnings: str) -> str | None:
    """Name of the first metric with this beginning that all points have."""
    metrics: list[Metric] = points[0].metrics if points else []
    return next((metric.name for metric in metrics if metric.name.startswith(beginnings)), None)


def plot_matches(
    matches: Sequence[Match],
    curves: Mapping[tuple[str, str], tuple[Curve, Curve]],
    labels: tuple[str, str],
    output: Path,
) -> None:
    """Draw the losses of two runs, the final loss of A, and the point at which B reaches it.

    Raises:
        UserError: The output cannot be written.
    """
    losses = list(dict.fromkeys(found.loss for found in matches))
    axes_names = list(dict.fromkeys(found.axis for found in matches))
    figure = Figure(figsize=(4.9 * len(axes_names), 3.3 * len(losses)), layout="constrained")
    grid = figure.subplots(len(losses), len(axes_names), squeeze=False)
    for found in matches:
        axes = grid[losses.index(found.loss), axes_names.index(found.axis)]
        a, b = curves[found.loss, found.axis]
        marker = "o" if len(a.xs) < 30 else None
        for curve, colour, label in zip((a, b), _COLOURS, labels, strict=False):
            axes.plot(curve.xs, curve.losses, color=colour, linewidth=1.8, marker=marker, markersize=4, label=label)
        axes.axhline(found.target, color=_COLOURS[0], linewidth=1, linestyle="--")
        if found.reached is not None and found.fraction is not None:
            axes.axvline(found.reached, color=_COLOURS[1], linewidth=1, linestyle="--")
            axes.plot([found.reached], [found.target], "o", color=_COLOURS[1], markersize=8, markeredgecolor="white")
            title = f"{labels[1]} takes {100 * found.fraction:.1f} %"
        else:
            title = f"{labels[1]} does not reach it"
        axes.set_title(title, color=_INK, fontsize="medium", loc="left")
        axes.set_xlabel(_AXIS_NAMES[found.axis], color=_INK)
        axes.set_xlim(left=0)
        if found.axis == axes_names[0]:
            axes.set_ylabel(found.loss, color=_INK)
        _tidy(axes)
    handles, names = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=2, frameon=False)
    save_figure(figure, output)


def save_figure(figure: Figure, output: Path) -> None:
    """Write a figure.

    Raises:
        UserError: It cannot be written.
    """
    try:
        figure.savefig(output, dpi=130)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write {output}: {error}") from None


def inline_svg(figure: Figure) -> str:
    """A figure as an SVG element with the font and text colour of its page."""
    # Makes the output reproducible.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "transfusion_mot"}):
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    # The SVG fills the width of its place on the page.
    opening, rest = svg.split(">", 1)
    opening = re.sub(r' (width|height)="[^"]*"', "", opening)
    # Matplotlib before 3.10 writes size and family as one property.
    svg = re.sub(r"font: (\d+px) [^;\"]*", r"font-size: \1; font-family: inherit", f"{opening}>{rest}")
    svg = re.sub(r"font-family: [^;\"]*", "font-family: inherit", svg)
    return svg.replace(_INK, "currentColor").replace(_GRID, "var(--line)").replace(_EDGE, "var(--line)")


def _tidy(axes: Axes) -> None:
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_EDGE)
    axes.tick_params(which="both", color=_EDGE, labelcolor=_INK)
