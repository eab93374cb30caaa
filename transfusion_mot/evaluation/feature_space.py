"""Separation of modalities in the hidden states of a model: principal components, and distances to means.

The states of a layer are divided by their root mean square, as in the norms of the next layer.
Shapes: N slots, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Okabe and Ito's palette: distinguishable with colour blindness and in grey.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MOST_PANELS = 4
# Hidden states [N, D] of each modality.
States = dict[str, npt.NDArray[np.float32]]


@dataclass(frozen=True)
class LayerSpace:
    """The hidden states after a layer.

    Attributes:
        apart: Share of the states, in [0, 1], that are nearer to the mean of their own modality than to any other
            mean; 1 / (number of modalities) if modalities do not differ.
        explained: Shares of the variance along the first two principal components.
        points: Coordinates [N, 2] of the states of each modality on these components.
    """

    apart: float
    explained: tuple[float, float]
    points: dict[str, npt.NDArray[np.float32]]


def layer_space(states: States) -> LayerSpace:
    """Positions of the states of a layer; all modalities have the same number of states."""
    scaled = {name: own / np.sqrt(np.square(own).mean(axis=1, keepdims=True) + 1e-12) for name, own in states.items()}
    together = np.concatenate(list(scaled.values()))
    centre = together.mean(axis=0)
    _, singular, axes = np.linalg.svd(together - centre, full_matrices=False)
    variances = singular**2 / np.sum(singular**2)
    points = {name: ((own - centre) @ axes[:2].T).astype(np.float32) for name, own in scaled.items()}
    return LayerSpace(_apart(list(scaled.values())), (float(variances[0]), float(variances[1])), points)


def _apart(states: Sequence[npt.NDArray[np.float32]]) -> float:
    """Share of the states [N, D] of each modality whose nearest mean is their own.

    States at even places are compared with the means of states at odd places, and the other way round, because a state
    is part of its own mean.
    """
    shares = []
    for first in (0, 1):
        means = np.stack([own[1 - first :: 2].mean(axis=0) for own in states])
        for number, own in enumerate(states):
            # |state - mean|^2 without |state|^2, which is the same for all means.
            distances = (means**2).sum(axis=1) - 2 * own[first::2] @ means.T
            shares.append((distances.argmin(axis=1) == number).mean())
    return float(np.mean(shares))


def spaces_table(spaces: dict[str, list[LayerSpace]]) -> str:
    """A markdown table: a row for each layer, a column for each run."""
    lines = [f"| layer | {' | '.join(spaces)} |", f"| --- |{' ---: |' * len(spaces)}"]
    for layer in range(max(map(len, spaces.values()))):
        cells = [f"{of_run[layer].apart:.3f}" if layer < len(of_run) else "-" for of_run in spaces.values()]
        lines.append(f"| {layer} | {' | '.join(cells)} |")
    return "\n".join(lines)


def spaces_json(spaces: dict[str, list[LayerSpace]]) -> dict[str, Any]:
    """The numbers of all layers; layer 0 is the input of the first block."""
    return {
        run: [{"apart": layer.apart, "explained": list(layer.explained)} for layer in layers]
        for run, layers in spaces.items()
    }


def plot_spaces(spaces: dict[str, list[LayerSpace]], path: Path) -> None:
    """A row of panels for each run, with the states of some layers; below, the shares of all layers."""
    shown = {run: _spread(len(layers)) for run, layers in spaces.items()}
    columns = max(map(len, shown.values()))
    figure = Figure(figsize=(3 * columns, 3 * len(spaces) + 2.6), layout="constrained")
    grid = figure.add_gridspec(len(spaces) + 1, columns)
    names = list(dict.fromkeys(name for layers in spaces.values() for name in layers[0].points))
    for row, (run, layers) in enumerate(spaces.items()):
        for column, layer in enumerate(shown[run]):
            axes, space = figure.add_subplot(grid[row, column]), layers[layer]
            for name, points in space.points.items():
                colour = _COLOURS[names.index(name) % len(_COLOURS)]
                axes.plot(*points.T, ".", color=colour, markersize=2, alpha=0.5, label=name)
            axes.set_title(f"layer {layer}: {space.apart:.2f}", fontsize="medium")
            first, second = (f"{100 * share:.0f} %" for share in space.explained)
            axes.set_xlabel(f"{first} and {second} of variance", fontsize="small")
            # Without limits, a few outliers (begin tokens) would compress all others into a dot.
            together = np.concatenate(list(space.points.values()))
            low, high = np.percentile(together, [0.5, 99.5], axis=0)
            margin = 0.1 * (high - low)
            axes.set_xlim(low[0] - margin[0], high[0] + margin[0])
            axes.set_ylim(low[1] - margin[1], high[1] + margin[1])
            if column == 0:
                axes.set_ylabel(run)
            axes.set_xticks([])
            axes.set_yticks([])
            if row == column == 0:
                axes.legend(markerscale=5, fontsize="small")
    axes = figure.add_subplot(grid[len(spaces), :])
    for index, (run, layers) in enumerate(spaces.items()):
        shares = [layer.apart for layer in layers]
        axes.plot(range(len(shares)), shares, "o-", color=_COLOURS[index % len(_COLOURS)], markersize=4, label=run)
    axes.set_ylim(0, 1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("layer")
    axes.set_ylabel("nearest mean is their own")
    axes.grid(color="#e3e6ea")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


def _spread(count: int) -> Sequence[int]:
    """Up to four layers, with the first and the last."""
    return sorted({round(place) for place in np.linspace(0, count - 1, min(count, _MOST_PANELS))})
