"""Compare reports side by side, and show which differences exceed the noise.

    python evaluate/compare.py runs/a/evaluation runs/b/evaluation --output comparison.md

Each report is a report.json of evaluate/benchmark.py, or its folder. All are compared with the first. If two reports
have the same prompts or images, images of the same prompt are compared (paired bootstrap over scores). Otherwise
intervals of 95 % must not overlap. Numbers of different protocols are not compared; see docs/evaluation.md.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from transfusion_mot.errors import UserError, exit_on_user_error
from transfusion_mot.evaluation.command import command_parser, run_command, writable_file
from transfusion_mot.evaluation.report.content import REPORT_FILE, read_report
from transfusion_mot.path_options import PathOption


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of the command line."""
    parser = command_parser(__doc__)
    parser.add_argument(
        "reports",
        action=PathOption,
        check=read_report,
        nargs="+",
        metavar="REPORT",
        help="report.json, or the folder that holds it",
    )
    parser.add_argument("--output", type=writable_file, metavar="FILE", help="also write the table as markdown")
    given = parser.parse_args(arguments)
    if len(given.reports) < 2:
        raise UserError("only one report is given; give at least two: the others are compared with the first")
    if given.output is not None and Path(given.output).name == REPORT_FILE:
        raise UserError(f"--output {given.output} is the name of a report; give another name, such as comparison.md")
    return given


if __name__ == "__main__":
    # Before PyTorch loads, which takes seconds: --help, and mistakes in the options.
    with exit_on_user_error():
        parse_arguments(sys.argv[1:])

from transfusion_mot.evaluation.report.comparison import comparison_table
from transfusion_mot.training.plot import labels_of


def main() -> None:
    arguments = parse_arguments(sys.argv[1:])
    reports = [read_report(path) for path in arguments.reports]
    folders = [path if path.is_dir() else path.parent for path in map(Path, arguments.reports)]
    table = comparison_table(reports, labels_of(folders))
    print(table)
    if arguments.output:
        try:
            Path(arguments.output).write_text(table + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot write {arguments.output}: {error.strerror}") from None


if __name__ == "__main__":
    run_command(main)
