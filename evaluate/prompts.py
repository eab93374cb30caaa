"""Write the prompts of a protocol to a file, to paint the same list with another program.

    python evaluate/prompts.py --config configs/eval/coco.yaml --output coco_prompts.jsonl

Each line has the text, the seed of its noise, the file name of its picture and, for COCO, its image. Every number of
evaluate/benchmark.py with the same protocol shows the printed hash as "prompts". Keys of a protocol are also options
here: --num-images 5000.
"""

import argparse
import sys
from collections.abc import Sequence

from transfusion_mot.errors import exit_on_user_error
from transfusion_mot.evaluation.command import command_parser, run_command, writable_file
from transfusion_mot.evaluation.protocol.config import ProtocolConfig, read_protocol, refuse_missing_paths
from transfusion_mot.path_options import PathOption, existing


def parse_arguments(arguments: Sequence[str]) -> tuple[argparse.Namespace, ProtocolConfig]:
    """The options of the command line."""
    parser = command_parser(__doc__)
    parser.add_argument(
        "--config",
        action=PathOption,
        check=existing("a protocol, such as configs/eval/coco.yaml"),
        required=True,
        metavar="FILE",
        help="protocol whose prompts are in a file",
    )
    parser.add_argument("--output", required=True, type=writable_file, metavar="FILE", help="JSON lines to write")
    given, keys = parser.parse_known_args(arguments)
    protocol = read_protocol(["--config", given.config, *keys])
    refuse_missing_paths(protocol.prompts)
    return given, protocol


if __name__ == "__main__":
    # Before PyTorch loads, which takes seconds: --help, and mistakes in the options.
    with exit_on_user_error():
        parse_arguments(sys.argv[1:])

from pathlib import Path

from transfusion_mot.evaluation.protocol.assignment import listed_prompts
from transfusion_mot.evaluation.protocol.prompts import prompts_hash
from transfusion_mot.evaluation.protocol.sample_files import write_metadata


def main() -> None:
    arguments, protocol = parse_arguments(sys.argv[1:])
    prompts, _, _ = listed_prompts(protocol)
    write_metadata(prompts, Path(arguments.output))
    images = {prompt.image_id for prompt in prompts if prompt.image_id is not None}
    of_images = f" of {len(images):,} distinct images" if images else ""
    print(f"{len(prompts):,} prompts{of_images}, {prompts_hash(prompts)}, in {arguments.output}")


if __name__ == "__main__":
    run_command(main)
