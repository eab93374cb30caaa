"""GenEval's score of painted pictures: things, counts, colours and places of 553 prompts.

    python evaluate/benchmark.py --checkpoint runs/mine --config configs/eval/geneval.yaml --output painted
    python evaluate/geneval.py painted/generated --output geneval.json

The folder has GenEval's layout: 00012/metadata.jsonl and 00012/samples/*.png. The rules are those of GenEval's program.
The detector is a Mask2Former of transformers, so scores may differ a little; see docs/evaluation.md. Both models are
downloaded once from huggingface.co, or taken from local folders.
"""

import argparse
import sys
from collections.abc import Sequence

from transfusion_mot.errors import exit_on_user_error
from transfusion_mot.evaluation.command import add_device, add_output, add_painted, command_parser, publish, run_command
from transfusion_mot.evaluation.defaults import DEFAULT_CLIP, DEFAULT_DETECTOR
from transfusion_mot.path_options import PathOption, existing_or_on_hub


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of the command line."""
    parser = command_parser(__doc__)
    add_painted(parser)
    parser.add_argument(
        "--detector",
        action=PathOption,
        check=existing_or_on_hub("--detector"),
        default=DEFAULT_DETECTOR,
        metavar="NAME_OR_FOLDER",
        help=f"Mask2Former ({DEFAULT_DETECTOR})",
    )
    parser.add_argument(
        "--clip",
        action=PathOption,
        check=existing_or_on_hub("--clip"),
        default=DEFAULT_CLIP,
        metavar="NAME_OR_FOLDER",
        help=f"CLIP model that names colours ({DEFAULT_CLIP})",
    )
    add_device(parser)
    add_output(parser)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    # Before PyTorch loads, which takes seconds: --help, and mistakes in the options.
    with exit_on_user_error():
        parse_arguments(sys.argv[1:])

from transfusion_mot.evaluation.clip_score import load_clip
from transfusion_mot.evaluation.geneval import geneval_metrics, load_detector
from transfusion_mot.evaluation.images import pick_device
from transfusion_mot.evaluation.protocol.prompts import read_painted


def main() -> None:
    arguments = parse_arguments(sys.argv[1:])
    painted = read_painted(arguments.folder)
    device = pick_device(arguments.device)
    detector, clip = load_detector(arguments.detector, device), load_clip(arguments.clip, device)
    publish(geneval_metrics(painted, detector, clip), arguments.output)


if __name__ == "__main__":
    run_command(main)
