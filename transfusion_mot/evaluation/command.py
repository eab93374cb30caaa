"""Shared options and output of the commands that print numbers."""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence

from transfusion_mot.errors import UserError, exit_on_user_error
from transfusion_mot.evaluation.defaults import default_num_workers
from transfusion_mot.evaluation.report.content import Metric, metrics_table, save_metrics
from transfusion_mot.evaluation.speech import read_recordings
from transfusion_mot.files import find_snapshot
from transfusion_mot.installed import as_called, program
from transfusion_mot.outputs import check_writable_file
from transfusion_mot.path_options import PathOption, existing


def command_parser(description: str | None, prog: str | None = None) -> argparse.ArgumentParser:
    """A parser that keeps the line breaks of the description.

    Args:
        description: What the command does.
        prog: How a module is called; None for a script.
    """
    return argparse.ArgumentParser(
        prog=prog or program(),
        description=as_called(description or ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Option `--checkpoint`."""
    parser.add_argument(
        "--checkpoint",
        action=PathOption,
        check=find_snapshot,
        required=True,
        metavar="FOLDER",
        help="a run folder of train.py, or a snapshot",
    )


def add_config(parser: argparse.ArgumentParser, what: str) -> None:
    """Option `--config`.

    Args:
        what: Help text.
    """
    needed = "the configuration that the model was trained with, to find its data"
    parser.add_argument("--config", action=PathOption, check=existing(needed), metavar="FILE", help=what)


def add_recordings(parser: argparse.ArgumentParser) -> None:
    """Option `--recordings`."""
    parser.add_argument(
        "--recordings",
        action=PathOption,
        check=lambda folder: read_recordings(folder, 1),
        nargs="+",
        required=True,
        metavar="FOLDER",
        help="folders of recordings with a metadata.jsonl",
    )


def add_painted(parser: argparse.ArgumentParser) -> None:
    """Add the folder of pictures that were painted for prompts in GenEval's format."""
    parser.add_argument(
        "folder",
        action=PathOption,
        check=existing("the folder generated/ of evaluate/benchmark.py"),
        metavar="GENERATED_FOLDER",
        help="folder of pictures in GenEval's layout",
    )


def add_run(parser: argparse.ArgumentParser) -> None:
    """Options of commands that read the held-out documents of a run: `--checkpoint`, `--config`, `--batch-size`."""
    add_checkpoint(parser)
    add_config(parser, "configuration that names the data (default: the run's)")
    parser.add_argument("--batch-size", type=at_least_one, default=8, metavar="N", help="rows at a time (default: 8)")


def add_device(parser: argparse.ArgumentParser) -> None:
    """Option `--device`."""
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")


def add_output(parser: argparse.ArgumentParser) -> None:
    """Option `--output`, for `publish`."""
    parser.add_argument(
        "--output",
        type=writable_file,
        metavar="FILE",
        help="also write the numbers with their protocols as JSON",
    )


def add_image_reading(parser: argparse.ArgumentParser) -> None:
    """Options of commands that read folders of images: `--batch-size`, `--num-workers`."""
    parser.add_argument(
        "--batch-size",
        type=at_least_one,
        metavar="N",
        help="images at a time (GPU 64, CPU 4); does not change the numbers",
    )
    parser.add_argument("--num-workers", type=int, default=default_num_workers(), help="images decoded at a time")


def at_least_one(text: str) -> int:
    """An option's value => a count.

    Raises:
        argparse.ArgumentTypeError: It is not a count.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least 1")
    return int(text)


def writable_file(text: str) -> str:
    """An option's value: a file that can be written; this is checked before hours of work.

    Raises:
        argparse.ArgumentTypeError: It cannot be written.
    """
    try:
        check_writable_file(text, "output")
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def publish(metrics: Sequence[Metric], output: str | None) -> None:
    """Print numbers as a table, and write them to a JSON file if one is given.

    Raises:
        UserError: It cannot be written.
    """
    print(metrics_table(metrics))
    if output is not None:
        save_metrics(metrics, output, sys.argv)


def run_command(main: Callable[[], None]) -> None:
    """Run a script; log messages and user errors go to standard error."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("transfusion_mot").setLevel(logging.INFO)
    with exit_on_user_error():
        main()
