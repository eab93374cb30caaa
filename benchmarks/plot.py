"""Draw the results of `benchmarks.train_step`: `python -m benchmarks.plot` => benchmarks/results/train_step.png."""

import argparse
import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Patch

from transfusion_mot.errors import UserError, exit_on_user_error
from transfusion_mot.outputs import check_picture_name, check_writable_file
from transfusion_mot.path_options import PathOption, existing

RESULTS = Path(__file__).parent / "results"
COLOURS = {"mot": "#e87f2e", "dense": "#3465a4", "gather_scatter": "#888a85", "transfusion_pytorch": "#75507b"}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__)
    parser.add_argument(
        "--results",
        action=PathOption,
        check=existing("a folder that benchmarks.train_step has written to"),
        default=str(RESULTS),
        help="folder of JSON files (default: %(default)s)",
    )
    parser.add_argument("--output", type=Path, help="PNG file (default: train_step.png in the folder)")
    options = parser.parse_args(arguments)
    if options.output is not None:
        check_picture_name(options.output, "--output")
    results = Path(options.results)
    output = options.output or results / "train_step.png"
    check_writable_file(output, "--output")
    reports = {file.stem: _read(file) for file in sorted(results.glob("train_step-*.json"))}
    if not reports:
        raise UserError(f"{results} holds no train_step-*.json; run python -m benchmarks.train_step first")
    draw(reports, output)
    print(output)


def _read(file: Path) -> dict[str, Any]:
    try:
        report = json.loads(file.read_text())
    except (OSError, ValueError):
        report = None
    if not isinstance(report, dict) or not isinstance(report.get("contenders"), dict):
        raise UserError(f"{file} is not a report of python -m benchmarks.train_step; move it out of the folder")
    return report


def draw(reports: dict[str, dict[str, Any]], output: Path) -> None:
    """Tokens a second, and the time of a step next to that of `mot`, for each shape and contender."""
    shapes = [_label(name) for name in reports]
    present = {name for report in reports.values() for name in report["contenders"]}
    contenders = [name for name in COLOURS if name in present]
    figure, panels = plt.subplots(1, 2, figsize=(4 + 2.4 * len(shapes), 4.2), constrained_layout=True)
    width = 0.8 / len(contenders)
    for index, contender in enumerate(contenders):
        for position, report in enumerate(reports.values()):
            if contender not in report["contenders"]:
                continue
            result = report["contenders"][contender]
            rate = result["slots_per_step"] * report["processes"] / statistics.mean(result["milliseconds"]) * 1000
            ours = report["contenders"].get("mot")
            values = [rate / 1000, None]
            if ours is not None:
                own = ours["slots_per_step"] / statistics.mean(ours["milliseconds"]) * 1000 * report["processes"]
                values[1] = own / rate
            for panel, value in zip(panels, values, strict=True):
                if value is None:
                    continue
                place = position + (index - (len(contenders) - 1) / 2) * width
                bar = panel.bar(place, value, width * 0.92, color=COLOURS[contender])
                panel.bar_label(bar, fmt="%.0f" if panel is panels[0] else "%.2f", fontsize=8, padding=2)
    panels[0].set_title("thousand slots a second")
    panels[1].set_title("time for the same number of slots, mot = 1")
    for panel in panels:
        panel.set_xticks(range(len(shapes)), shapes)
        # Space for the numbers above the bars.
        panel.yaxis.set_visible(False)
        panel.spines[["top", "right", "left"]].set_visible(False)
    handles = [Patch(color=COLOURS[name]) for name in contenders]
    figure.legend(handles, contenders, loc="outside lower center", ncols=len(contenders), frameon=False)
    devices = sorted({f"{report['device']}, torch {report['torch']}" for report in reports.values()})
    figure.suptitle(f"A training step on {'; '.join(devices)}")
    figure.savefig(output, dpi=130)
    plt.close(figure)


def _label(name: str) -> str:
    """Model; layout, if it is not the model's own; processes, if there are several."""
    size, layout, processes = re.findall(r"^train_step-([^-]+)-(.+)-(\d+x.*)$", name)[0]
    return "\n".join([size, *([layout] if layout != size else []), *([processes] if processes != "1x" else [])])


if __name__ == "__main__":
    with exit_on_user_error():
        main(sys.argv[1:])
