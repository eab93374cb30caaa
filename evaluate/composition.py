"""Do painted pictures show the things, counts, colours and places of their prompts?

    python evaluate/benchmark.py --checkpoint runs/scenes_128 --config configs/eval/composition.yaml --output painted
    python evaluate/composition.py painted/generated --sprites data/sprites

The folder has GenEval's layout: 00012/metadata.jsonl and 00012/samples/*.png. Each part of a picture gets the name of
the most similar drawing of the sprites (docs/evaluation.md). The accuracy on real scenes is printed beside the results.
"""

import argparse
import sys
from collections.abc import Sequence

from transfusion_mot.data.sprites import Sprites
from transfusion_mot.errors import exit_on_user_error
from transfusion_mot.evaluation.command import add_device, add_output, add_painted, command_parser, publish, run_command
from transfusion_mot.path_options import PathOption


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of the command line."""
    parser = command_parser(__doc__)
    add_painted(parser)
    parser.add_argument(
        "--sprites",
        action=PathOption,
        check=Sprites,
        required=True,
        metavar="FOLDER",
        help="drawings, from python -m transfusion_mot.data.sprites",
    )
    add_device(parser)
    add_output(parser)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    # Before PyTorch loads, which takes seconds: --help, and mistakes in the options.
    with exit_on_user_error():
        parse_arguments(sys.argv[1:])

from transfusion_mot.evaluation.composition import Drawings, composition_metrics
from transfusion_mot.evaluation.features.load import load_feature_network
from transfusion_mot.evaluation.images import pick_device
from transfusion_mot.evaluation.protocol.prompts import read_painted


def main() -> None:
    arguments = parse_arguments(sys.argv[1:])
    painted = read_painted(arguments.folder)
    sprites = Sprites(arguments.sprites)
    network = load_feature_network("efficientnet", pick_device(arguments.device))
    publish(composition_metrics(painted, sprites, Drawings(sprites, network)), arguments.output)


if __name__ == "__main__":
    run_command(main)
