"""CLIP score of a folder of generated images: how well each matches the text it was made from.

    python evaluate/clip_score.py GENERATED_FOLDER --output metrics.json
    accelerate launch evaluate/clip_score.py GENERATED_FOLDER --clip openai/clip-vit-base-patch32

The folder holds images and a metadata.jsonl with one line an image, as sample.py writes it:
    {"file_name": "000.png", "text": "a red apple"}
The model is downloaded once from huggingface.co, or taken from a local folder given with --clip. Scores of different
CLIP models cannot be compared; see docs/evaluation.md.
"""

import argparse
import sys
from collections.abc import Sequence

from transfusion_mot.errors import exit_on_user_error
from transfusion_mot.evaluation.command import add_device, add_output, command_parser, publish, run_command
from transfusion_mot.evaluation.defaults import CLIP_PREFIX, DEFAULT_CLIP, default_num_workers


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of the command line."""
    parser = command_parser(__doc__)
    parser.add_argument("folder", metavar="GENERATED_FOLDER", help="images and their metadata.jsonl")
    parser.add_argument("--clip", default=DEFAULT_CLIP, metavar="NAME_OR_FOLDER", help=f"CLIP model ({DEFAULT_CLIP})")
    parser.add_argument("--prefix", action="store_true", help=f"put '{CLIP_PREFIX}' in front of every text")
    parser.add_argument("--batch-size", type=int, help="images at a time (GPU 64, CPU 4); does not change the numbers")
    parser.add_argument("--num-workers", type=int, default=default_num_workers(), help="images decoded at a time")
    add_device(parser)
    add_output(parser)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    # Before PyTorch loads, which takes seconds: --help, and mistakes in the options.
    with exit_on_user_error():
        parse_arguments(sys.argv[1:])

from transfusion_mot.evaluation.clip_score import clip_scores, load_clip
from transfusion_mot.evaluation.images import read_prompts
from transfusion_mot.evaluation.processes import open_processes


def main() -> None:
    arguments = parse_arguments(sys.argv[1:])
    images, texts = read_prompts(arguments.folder)
    processes, device = open_processes(arguments.device)
    metrics = clip_scores(
        images,
        texts,
        load_clip(arguments.clip, device),
        batch_size=arguments.batch_size,
        num_workers=arguments.num_workers,
        prefix=CLIP_PREFIX if arguments.prefix else "",
        processes=processes,
    )
    if processes.is_main_process:
        publish(metrics, arguments.output)


if __name__ == "__main__":
    run_command(main)
