"""Shared options of commands that train several arms. Nothing here loads PyTorch."""

import argparse
from collections.abc import Sequence


def arms_parser(module: str, description: str | None, arms: Sequence[str]) -> argparse.ArgumentParser:
    """A parser of the options that say which arms are trained, how often, for how long and where.

    Args:
        module: What stands behind `python -m`.
        arms: All that there are.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--output", required=True, metavar="FOLDER", help="where runs and results go")
    parser.add_argument("--arms", nargs="+", choices=arms, default=arms, metavar="ARM", help="(all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="N", help="a run of each arm for each (0)")
    parser.add_argument("--steps", type=int, metavar="N", help="optimizer steps, in place of the configuration's")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time (1)")
    return parser
