"""Shared options of commands that train several arms. Nothing here loads PyTorch."""

import argparse
from collections.abc import Sequence


def arms_parser(module: str, description: str | None, arms: Sequence[str]) -> argparse.ArgumentParser:
    """A parser of the options for arms, seeds, steps and the output folder.

    Args:
        module: Name of the module after `python -m`.
        arms: Names of all arms.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--output", required=True, metavar="FOLDER", help="folder of runs and results")
    parser.add_argument("--arms", nargs="+", choices=arms, default=arms, metavar="ARM", help="(all)")
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0], metavar="N", help="seeds of the runs of each arm (0)"
    )
    parser.add_argument("--steps", type=int, metavar="N", help="optimizer steps, instead of the configuration's")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time (1)")
    return parser
