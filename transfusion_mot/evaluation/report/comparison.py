"""Comparison of reports: differences, and whether they exceed the noise."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from transfusion_mot.evaluation.intervals import mean_interval
from transfusion_mot.evaluation.report.content import Metric, Report, shown_number, value_and_interval

Verdict = Literal["better", "worse", "within noise", "unknown", "not comparable"]

# Metrics for which lower is better.
_LOWER_IS_BETTER = (
    *("FID", "FD", "KID", "KD", "CMMD", "CLIP-MMD", "feature distance"),
    *("text loss", "diffusion loss", "loss of", "perplexity", "bits per byte"),
)
# Keys that may differ between the protocols of two comparable metrics, because they are compared.
_COMPARED = {
    "steps",
    "guidance",
    "guidance at t",
    "scheduler",
    "checkpoint",
    "METEOR",
    "sentence similarity",
    "prompts",
}
# Keys that older reports do not have; they must be equal if both reports have them.
_UNSAID = {"real images", "held-out documents", "codec", "hash of texts"}
# Images are paired if both metrics have the same list of prompts or captioned images.
_LISTS = ("prompts", "captioned images")


@dataclass(frozen=True)
class Difference:
    """A metric of one report minus the same metric of the first report.

    Attributes:
        name: Name of the metric.
        value: The difference.
        verdict: Whether it exceeds the noise, and in which direction.
        reason: Reason for the verdict.
    """

    name: str
    value: float
    verdict: Verdict
    reason: str


def difference(first: Metric, other: Metric) -> Difference:
    """Decide whether a metric differs from that of the same name in the first report.

    If both have a score for every image of the same list, the interval of the mean difference must not contain zero.
    Otherwise the two intervals must not overlap, which finds fewer differences.
    """
    value = other.value - first.value
    unsaid = _UNSAID & (first.protocol.keys() ^ other.protocol.keys())
    keys = (first.protocol.keys() | other.protocol.keys()) - _COMPARED - unsaid
    if unequal := sorted(key for key in keys if first.protocol.get(key) != other.protocol.get(key)):
        return Difference(first.name, value, "not comparable", f"measured with another {', '.join(unequal)}")
    same_list = any(first.protocol.get(key) is not None for key in _LISTS) and all(
        first.protocol.get(key) == other.protocol.get(key) for key in _LISTS
    )
    if same_list and first.scores is not None and other.scores is not None and len(first.scores) == len(other.scores):
        interval = mean_interval(np.subtract(other.scores, first.scores))
        if interval is None:
            return Difference(first.name, value, "unknown", "one image has no interval")
        low, high = interval
        differs = low > 0 or high < 0
        reason = f"paired bootstrap over {len(first.scores)} images: [{shown_number(low)}, {shown_number(high)}]"
    elif first.interval is not None and other.interval is not None:
        differs = first.interval[1] < other.interval[0] or other.interval[1] < first.interval[0]
        reason = f"the intervals {'do not overlap' if differs else 'overlap'}"
    else:
        return Difference(first.name, value, "unknown", "no interval is known")
    reason += "".join(f"; one report does not say its {key}" for key in sorted(unsaid))
    if not differs:
        return Difference(first.name, value, "within noise", reason)
    better = (value < 0) == is_lower_better(first.name)
    return Difference(first.name, value, "better" if better else "worse", reason)


def is_lower_better(name: str) -> bool:
    """Whether a metric of that name is a distance or a loss."""
    return name.startswith(_LOWER_IS_BETTER)


def compare(reports: Sequence[Report]) -> list[list[Difference]]:
    """Differences of every other report from the first, for the metrics that both have."""
    first = {metric.name: metric for metric in reports[0].metrics}
    return [
        [difference(first[metric.name], metric) for metric in report.metrics if metric.name in first]
        for report in reports[1:]
    ]


def comparison_table(reports: Sequence[Report], labels: Sequence[str]) -> str:
    """A markdown table: a row for each metric, a column for each report, and a verdict on each difference."""
    names = list(dict.fromkeys(metric.name for report in reports for metric in report.metrics))
    by_name = [{metric.name: metric for metric in report.metrics} for report in reports]
    differences = [{found.name: found for found in column} for column in compare(reports)]
    headings = [labels[0]]
    for label in labels[1:]:
        headings += [label, f"{label} against {labels[0]}"]
    lines = [f"| metric | {' | '.join(headings)} |", f"| --- | ---: |{' ---: | --- |' * (len(labels) - 1)}"]
    for name in names:
        cells = [_value(by_name[0].get(name))]
        for metrics, found in zip(by_name[1:], differences, strict=True):
            cells += [_value(metrics.get(name)), _verdict(found.get(name))]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _value(metric: Metric | None) -> str:
    return "" if metric is None else value_and_interval(metric)


def _verdict(found: Difference | None) -> str:
    if found is None:
        return ""
    verdict = f"**{found.verdict}**" if found.verdict in ("better", "worse") else found.verdict
    return f"{found.value:+.4g}, {verdict} ({found.reason})"
