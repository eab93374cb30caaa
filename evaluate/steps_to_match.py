"""When does run B reach the final losses of run A? The share of A's steps, FLOPs and wall-clock time.

    python evaluate/steps_to_match.py RUN_A RUN_B --output steps_to_match
    python evaluate/steps_to_match.py dense-seed-0 mot-seed-0 --seed dense-seed-1 mot-seed-1

Give run folders of train.py. The results are for the loss of each modality that both have, in training (means over a
twentieth of A's steps) and held out (if both runs have validated). With several seeds the table has means and standard
deviations. The output folder has steps_to_match.json, the table steps_to_match.md, and steps_to_match.png, a plot of
the first two runs; see docs/evaluation.md.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

from transfusion_mot.errors import UserError, exit_on_user_error
from transfusion_mot.evaluation.command import command_parser, run_command
from transfusion_mot.outputs import check_writable_folder
from transfusion_mot.path_options import PathOption, existing
from transfusion_mot.training.metrics import METRICS_FILE, VALIDATION, Lines, loss_units, read_metrics


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of the command line."""
    parser = command_parser(__doc__)
    run: dict[str, Any] = {"action": PathOption, "check": existing("a run folder of train.py")}
    parser.add_argument("run_a", **run, metavar="RUN_A", help="run folder whose final losses are the targets")
    parser.add_argument("run_b", **run, metavar="RUN_B", help="run folder that is compared with the targets")
    parser.add_argument(
        "--seed",
        nargs=2,
        action="append",
        default=[],
        metavar=("RUN_A", "RUN_B"),
        help="the same two runs with another seed; can be repeated",
    )
    parser.add_argument(
        "--output", default="steps_to_match", metavar="FOLDER", help="folder of the results (default: steps_to_match)"
    )
    given = parser.parse_args(arguments)
    for path in chain(*given.seed):
        run["check"](path)
    return given


if __name__ == "__main__":
    # Before PyTorch loads, which takes seconds: --help, and mistakes in the options.
    with exit_on_user_error():
        parse_arguments(sys.argv[1:])

from transfusion_mot.evaluation.report.curves import plot_matches
from transfusion_mot.evaluation.steps_to_match import WINDOW, Curve, Match, match, matches_table, window_means
from transfusion_mot.training.plot import curve, labels_of

AXES = ("step", "flops", "seconds")


def main() -> None:
    arguments = parse_arguments(sys.argv[1:])
    check_writable_folder(arguments.output, "output")
    pairs = [(arguments.run_a, arguments.run_b), *map(tuple, arguments.seed)]
    logs = [[read_run(run) for run in pair] for pair in pairs]
    labels = labels_of([Path(arguments.run_a), Path(arguments.run_b)])
    compared = [compare_runs(a, b) for a, b in logs]
    output = Path(arguments.output)
    try:
        output.mkdir(parents=True, exist_ok=True)
        content = [
            {"run_a": a, "run_b": b, "matches": [asdict(found) | {"fraction": found.fraction} for found in matches]}
            for (a, b), (matches, _) in zip(pairs, compared, strict=True)
        ]
        (output / "steps_to_match.json").write_text(json.dumps({"seeds": content}, indent=2) + "\n")
        table = matches_table([matches for matches, _ in compared], *labels)
        (output / "steps_to_match.md").write_text(table + "\n")
        matches, curves = compared[0]
        plot_matches(matches, curves, (labels[0], labels[1]), output / "steps_to_match.png")
    except OSError as error:
        raise UserError(f"cannot write to '{output}': {error.strerror}") from None
    print(table)
    print(f"steps_to_match.json, .md and .png are in {output}")


def read_run(run: str) -> Lines:
    """The log of a run.

    Raises:
        UserError: It has none, has not trained, or does not say at which step, FLOPs and seconds.
    """
    file = Path(run) / METRICS_FILE
    lines = read_metrics(file)
    losses = loss_units(lines)
    if not losses:
        raise UserError(f"'{run}' holds no {METRICS_FILE} with losses; give run folders of train.py that have trained")
    for axis in AXES:
        if any(losses.keys() & line.keys() and axis not in line for line in lines):
            raise UserError(f"'{file}' has losses without {axis}; give run folders of train.py")
    return lines


def compare_runs(a: Lines, b: Lines) -> tuple[list[Match], dict[tuple[str, str], tuple[Curve, Curve]]]:
    """Every loss and axis that both runs have, with the two curves (A, B) that were compared."""
    matches, curves = [], {}
    names = {}
    for loss in loss_units(a):
        names[loss.replace("_", " ")] = loss
        names[f"{loss.replace('_', ' ')}, held out"] = f"{VALIDATION}{loss}"
    for name, key in names.items():
        for axis in AXES:
            pair = [Curve(*curve(lines, key, axis)) for lines in (a, b)]
            if not all(found.xs for found in pair):
                continue
            if not key.startswith(VALIDATION):
                steps = [curve(lines, key, "step")[0] for lines in (a, b)]
                pair = [window_means(of, found, WINDOW * steps[0][-1]) for of, found in zip(steps, pair, strict=True)]
            curves[name, axis] = (pair[0], pair[1])
            matches.append(match(name, axis, *curves[name, axis]))
    return matches, curves


if __name__ == "__main__":
    run_command(main)
