"""When does a run reach the final loss of another one? The measure of Mixture-of-Transformers (arXiv 2411.04996).

Loss curves are lists of points (x, loss), x in steps, FLOPs or seconds of training. Training losses are noisy, so they
are averaged over windows of steps; held-out losses are not.
"""

import statistics
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

# Width of the window over training losses, as a share of the steps of the first run.
WINDOW = 0.05


@dataclass(frozen=True)
class Curve:
    """A loss during training.

    Attributes:
        xs: Steps, FLOPs or seconds, in increasing order.
        losses: The loss at each x.
    """

    xs: list[float]
    losses: list[float]


@dataclass(frozen=True)
class Match:
    """The point at which a run B reaches the final loss of a run A.

    Attributes:
        loss: Name of the loss.
        axis: `step`, `flops` or `seconds`.
        target: Final loss of A.
        total: Steps, FLOPs or seconds of A.
        reached: Steps, FLOPs or seconds at which B first reaches the target; None if it never does.
        best: Lowest loss of B.
    """

    loss: str
    axis: str
    target: float
    total: float
    reached: float | None
    best: float

    @property
    def fraction(self) -> float | None:
        """`reached` as a share of `total`."""
        return None if self.reached is None or not self.total else self.reached / self.total


def window_means(steps: Sequence[float], curve: Curve, width: float) -> Curve:
    """Means of xs and losses over the points whose steps are in (step - width, step], for every step.

    A mean loss is placed at the mean x, so that smoothing does not delay a curve. The window is in steps on every axis,
    so that it always covers the same part of a run. A width of 0 changes nothing.
    """
    starts = [min(index, bisect_right(steps, step - width)) for index, step in enumerate(steps)]

    def means(values: list[float]) -> list[float]:
        sums = [0.0, *accumulate(values)]
        return [(sums[index + 1] - sums[start]) / (index + 1 - start) for index, start in enumerate(starts)]

    return Curve(means(curve.xs), means(curve.losses))


def first_reaching(curve: Curve, target: float) -> float | None:
    """The first x at which a loss is at most `target`, between two points by linear interpolation."""
    for index, (x, loss) in enumerate(zip(curve.xs, curve.losses, strict=True)):
        if loss <= target:
            if index == 0:
                return x
            x0, loss0 = curve.xs[index - 1], curve.losses[index - 1]
            return x0 + (x - x0) * (loss0 - target) / (loss0 - loss)
    return None


def match(loss: str, axis: str, a: Curve, b: Curve) -> Match:
    """The point at which B reaches A's final loss; both curves have at least one point."""
    target = a.losses[-1]
    return Match(loss, axis, target, a.xs[-1], first_reaching(b, target), min(b.losses))


def matches_table(pairs: Sequence[Sequence[Match]], a: str, b: str) -> str:
    """A markdown table: a row for each loss, a column for each axis.

    Args:
        pairs: Matches of a run A and a run B, for each seed.
        a: Name of the runs A.
        b: Name of the runs B.
    """
    axes = list(dict.fromkeys(found.axis for found in pairs[0]))
    lines = [
        f"| loss | final loss of {a} | lowest of {b} | {' | '.join(f'share of {_NAMES[axis]}' for axis in axes)} |",
        f"| --- | ---: | ---: |{' ---: |' * len(axes)}",
    ]
    for loss in dict.fromkeys(found.loss for found in pairs[0]):
        of_axis = {
            axis: [found for matches in pairs for found in matches if (found.loss, found.axis) == (loss, axis)]
            for axis in axes
        }
        some = next(found for found in of_axis.values() if found)
        targets, bests = (", ".join(f"{getattr(found, key):.4g}" for found in some) for key in ("target", "best"))
        cells = [_shown(found) if found else "unknown" for found in of_axis.values()]
        lines.append(f"| {loss} | {targets} | {bests} | {' | '.join(cells)} |")
    return "\n".join(lines)


_NAMES = {"step": "steps", "flops": "FLOPs", "seconds": "wall-clock"}


def _shown(seeds: Sequence[Match]) -> str:
    """The share: for one seed with its quantities, for several seeds the mean and the standard deviation."""
    shares = [100 * found.fraction for found in seeds if found.fraction is not None]
    missing = len(seeds) - len(shares)
    if missing:
        reached = f", else {statistics.fmean(shares):.1f} %" if shares else ""
        return f"not reached by {missing} of {len(seeds)}{reached}" if len(seeds) > 1 else "not reached"
    if len(seeds) > 1:
        return f"{statistics.fmean(shares):.1f} ± {statistics.stdev(shares):.1f} %"
    (found,) = seeds
    assert found.reached is not None
    return f"{shares[0]:.1f} % ({_quantity(found.reached, found.axis)} of {_quantity(found.total, found.axis)})"


def _quantity(value: float, axis: str) -> str:
    return f"{value:.3g}" if axis == "flops" else f"{value:,.0f} s" if axis == "seconds" else f"{value:,.0f}"
