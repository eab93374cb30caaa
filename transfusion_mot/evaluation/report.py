"""A measured number with how it was measured; as a JSON file and as a table."""

import datetime
import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transfusion_mot import __version__
from transfusion_mot.errors import UserError


@dataclass(frozen=True)
class Metric:
    """One number.

    Attributes:
        name: What is measured; two numbers of different names cannot be compared.
        value: The number.
        protocol: How it was measured: counts, networks with a hash of their weights, resize, units. Plain JSON values.
    """

    name: str
    value: float
    protocol: dict[str, Any] = field(default_factory=dict)


def metrics_table(metrics: Sequence[Metric]) -> str:
    """A markdown table, aligned for reading in a terminal: metric, value to four digits, how it was measured.

    Of a protocol only what differs from the row above is written out.
    """
    lines = [("metric", "value", "measured with")]
    above: dict[str, Any] = {}
    for metric in metrics:
        same = bool(above) and all(metric.protocol.get(key) == value for key, value in above.items())
        shown = {key: value for key, value in metric.protocol.items() if not same or key not in above}
        protocol = ["as above"] * same + [f"{key}: {_short(value)}" for key, value in shown.items()]
        lines.append((metric.name, _short(metric.value), ", ".join(protocol)))
        above = metric.protocol
    widths = [max(len(line[column]) for line in lines) for column in range(2)]
    lines.insert(1, ("-" * widths[0], "-" * (widths[1] - 1) + ":", "---"))
    return "\n".join(f"| {name:<{widths[0]}} | {value:>{widths[1]}} | {how} |" for name, value, how in lines)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) and abs(value) < 1000 else str(value)


def save_metrics(metrics: Sequence[Metric], path: str | Path, command: Sequence[str]) -> None:
    """Write metrics to a JSON file with the command, the version and the date that they come from.

    Raises:
        UserError: The file cannot be written.
    """
    content = {
        "metrics": [asdict(metric) for metric in metrics],
        "command": shlex.join(command),
        "transfusion_mot": __version__,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
