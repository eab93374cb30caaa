"""Compare loss curves of runs: `python -m transfusion_mot.training.plot RUN... [--output FILE]`.

The plot has the loss of each modality: for one run against steps, for several runs against steps, FLOPs and seconds of
training. Held-out losses are dotted lines with points.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogFormatter

from transfusion_mot.errors import UserError, exit_on_user_error
from transfusion_mot.training.metrics import METRICS_FILE, VALIDATION, Lines, loss_units, read_metrics

_AXES = ("step", "flops", "seconds")
# Okabe and Ito's palette: distinguishable with colour blindness and in grey.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
_INK, _GRID = "#2b2f36", "#e3e6ea"
# Points of a smoothed curve; the raw curve stays visible behind it.
_SMOOTHED_POINTS = 30
_UNITS = ((3600.0, "hours of training"), (60.0, "minutes of training"), (1.0, "seconds of training"))


def curve(lines: Lines, loss: str, axis: str) -> tuple[list[float], list[float]]:
    """(x, y) of a loss against `step`, `flops` or `seconds`; a validation takes x from the end of the training before
    it."""
    xs, ys = [], []
    latest = None
    for line in lines:
        latest = line.get(axis, latest)
        if loss in line and latest is not None:
            xs.append(float(latest))
            ys.append(float(line[loss]))
    return xs, ys


def smoothed(values: list[float], width: int) -> list[float]:
    """Means over windows of at most `width` values around each."""
    half = width // 2
    means = []
    for index in range(len(values)):
        # Symmetric windows, so that the ends of a falling curve are not shifted.
        side = min(half, index, len(values) - 1 - index)
        window = values[index - side : index + side + 1]
        means.append(sum(window) / len(window))
    return means


def plot_runs(runs: dict[str, Path], output: Path) -> None:
    """Draw the losses of runs.

    Args:
        runs: Label to metrics file.
        output: PNG, or whatever its suffix says.

    Raises:
        UserError: A file holds no losses, or the output cannot be written.
    """
    all_lines = {label: read_metrics(path) for label, path in runs.items()}
    for label, lines in all_lines.items():
        if not any(line.get(loss) for line in lines for loss in loss_units(lines)):
            raise UserError(f"{runs[label]} holds no losses; give run folders of train.py that have trained")
    together = [line for lines in all_lines.values() for line in lines]
    # A loss that is always zero belongs to a modality without labels, such as the instructions of editing pairs.
    units = {loss: unit for loss, unit in loss_units(together).items() if any(line.get(loss) for line in together)}
    # For one run, FLOPs and seconds would show the same curve again.
    shown = _AXES if len(runs) > 1 else ("step",)
    figure = Figure(figsize=(9 if len(shown) == 1 else 15, 0.6 + 3.8 * len(units)), layout="constrained")
    grid = figure.subplots(len(units), len(shown), sharey="row", squeeze=False)
    for row, (loss, unit) in enumerate(units.items()):
        for column, axis in enumerate(shown):
            axes = grid[row, column]
            scale, name = _unit(axis, together)
            for colour, lines in zip(_colours(len(runs)), all_lines.values(), strict=True):
                _draw(axes, lines, loss, axis=axis, scale=scale, colour=colour)
            axes.set_xlabel(name, color=_INK)
            if column == 0:
                axes.set_ylabel(f"{loss.replace('_', ' ')}\n{unit}", color=_INK)
            _tidy(axes)
    labels = list(runs) if len(runs) > 1 else []
    handles = [
        Line2D([], [], color=colour, linewidth=2.2, label=label)
        for colour, label in zip(_colours(len(labels)), labels, strict=True)
    ]
    ink = _INK if labels else _COLOURS[0]
    # The legend lists only what is drawn: short runs are not smoothed, and some runs have no held-out losses.
    if any(_smoothing(curve(lines, loss, "step")[1]) > 1 for lines in all_lines.values() for loss in units):
        handles.append(Line2D([], [], color=ink, linewidth=0.8, alpha=0.5, label="training"))
        handles.append(Line2D([], [], color=ink, linewidth=1.8, label="training, smoothed"))
    else:
        handles.append(Line2D([], [], color=ink, linewidth=1.8, label="training"))
    if any(f"{VALIDATION}{loss}" in line for line in together for loss in units):
        handles.append(
            Line2D([], [], color=ink, linewidth=1.2, linestyle=":", marker="o", markersize=4, label="held out")
        )
    figure.legend(handles=handles, loc="outside upper center", ncols=min(6, len(handles)), frameon=False)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(output, dpi=130)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write {output}: {error}") from None


def _unit(axis: str, lines: Lines) -> tuple[float, str]:
    """Unit and label of an axis."""
    longest = max((line.get(axis, 0.0) for line in lines), default=0.0)
    if axis == "seconds":
        return next(((unit, name) for unit, name in _UNITS if longest >= unit), _UNITS[-1])
    if axis == "flops" and longest >= 1:
        exponent = math.floor(math.log10(longest))
        return 10.0**exponent, f"training FLOPs / $10^{{{exponent}}}$"
    return 1.0, "steps" if axis == "step" else "training FLOPs"


def _smoothing(values: list[float]) -> int:
    """Number of points of the smoothing window; 1 is no smoothing."""
    return len(values) // _SMOOTHED_POINTS * 2 + 1


def _colours(count: int) -> list[str]:
    return [_COLOURS[index % len(_COLOURS)] for index in range(count)]


def _draw(axes: Axes, lines: Lines, loss: str, *, axis: str, scale: float, colour: str) -> None:
    xs, ys = curve(lines, loss, axis)
    xs = [x / scale for x in xs]
    width = _smoothing(ys)
    if width > 1:
        axes.plot(xs, ys, color=colour, alpha=0.25, linewidth=0.8)
    axes.plot(xs, smoothed(ys, width), color=colour, linewidth=1.8, marker="." if len(ys) < 3 else None)
    xs, ys = curve(lines, f"{VALIDATION}{loss}", axis)
    xs = [x / scale for x in xs]
    axes.plot(xs, ys, color=colour, linewidth=1.2, linestyle=":", marker="o", markersize=4, markeredgecolor="white")


class _PlainLogFormatter(LogFormatter):
    """Plain numbers at ticks between powers of ten."""

    def _num_to_string(self, x: float, vmin: float, vmax: float) -> str:
        return f"{x:g}"


def _tidy(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    # Most curves stay between two powers of ten.
    axes.yaxis.set_minor_formatter(_PlainLogFormatter(minor_thresholds=(2, 0.5)))
    axes.set_xlim(left=0)
    axes.grid(color=_GRID, which="both", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#b4bac3")
    axes.tick_params(which="both", color="#b4bac3", labelcolor=_INK)


def main(arguments: Sequence[str]) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m transfusion_mot.training.plot",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder of train.py")
    parser.add_argument("--output", default="loss.png", metavar="FILE", help="picture to write (default: loss.png)")
    given = parser.parse_args(arguments)
    for run in given.runs:
        if not (Path(run) / METRICS_FILE).is_file():
            raise UserError(f"'{run}' holds no {METRICS_FILE}; give run folders of train.py")
    labels = labels_of([Path(run) for run in given.runs])
    runs = {label: Path(run) / METRICS_FILE for label, run in zip(labels, given.runs, strict=True)}
    output = Path(given.output)
    if not output.suffix:
        output = output.with_name(f"{output.name}.png")
    plot_runs(runs, output)
    print(f"drawn in {output}")


def labels_of(runs: list[Path]) -> list[str]:
    """The names of run folders, with as many parent folders as are needed to distinguish them."""
    parts = [run.resolve().parts for run in runs]
    for depth in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(names[-depth:]) for names in parts]
        if len(set(labels)) == len(set(parts)):
            return labels
    return [str(run) for run in runs]


if __name__ == "__main__":
    with exit_on_user_error():
        main(sys.argv[1:])
