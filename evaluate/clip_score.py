"""CLIP score of a folder of generated images: how well each image matches its prompt.

    python evaluate/clip_score.py GENERATED_FOLDER --output metrics.json
    accelerate launch evaluate/clip_score.py GENERATED_FOLDER --clip openai/clip-vit-base-patch32 --pickscore FOLDER

The folder has images and a metadata.jsonl with one line for each image, as sample.py writes it:
    {"file_name": "000.png", "text": "a red apple"}
The model is downloaded once from huggingface.co, or taken from a local folder given with --clip. Scores of different
CLIP models cannot be compared; see docs/evaluation.md.
"""

import argparse
import sys
from collections.abc import Sequence

from transfusion_mot.errors import exit_on_user_error
from transfusion_mot.evaluation.command import (
    add_device,
    add_image_reading,
    add_output,
    command_parser,
    publish,
    run_command,
)
from transfusion_mot.evaluation.defaults import CLIP_PREFIX, DEFAULT_CLIP
from transfusion_mot.path_options import PathOption, existing, existing_or_on_hub


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of the command line."""
    parser = command_parser(__doc__)
    parser.add_argument(
        "folder",
        action=PathOption,
        check=existing("a folder with images and a metadata.jsonl, as sample.py writes it"),
        metavar="GENERATED_FOLDER",
        help="images and their metadata.jsonl",
    )
    parser.add_argument(
        "--clip",
        action=PathOption,
        check=existing_or_on_hub("--clip"),
        nargs="+",
        metavar="NAME_OR_FOLDER",
        help=f"CLIP models (default: {DEFAULT_CLIP}, or none if only preference scores are given)",
    )
    parser.add_argument(
        "--pickscore",
        action=PathOption,
        check=existing_or_on_hub("--pickscore"),
        metavar="NAME_OR_FOLDER",
        help="also compute PickScore, for example with PickScore_v1",
    )
    parser.add_argument(
        "--hpsv2",
        action=PathOption,
        check=existing_or_on_hub("--hpsv2"),
        metavar="FILE_OR_FOLDER",
        help="also compute HPSv2, with its published file (HPS_v2.1_compressed.pt or HPS_v2_compressed.pt) and the "
        "tokenizer of --clip, or with a folder in the format of transformers",
    )
    parser.add_argument("--prefix", action="store_true", help=f"put '{CLIP_PREFIX}' in front of every text")
    add_image_reading(parser)
    add_device(parser)
    add_output(parser)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    # Before PyTorch loads, which takes seconds: --help, and mistakes in the options.
    with exit_on_user_error():
        parse_arguments(sys.argv[1:])

from transfusion_mot.evaluation.clip_score import clip_scores, load_clip, preference_score, suffixes
from transfusion_mot.evaluation.images import read_prompts
from transfusion_mot.evaluation.processes import open_processes
from transfusion_mot.evaluation.scoring import load_preferences


def main() -> None:
    arguments = parse_arguments(sys.argv[1:])
    images, texts = read_prompts(arguments.folder)
    processes, device = open_processes(arguments.device)
    preferences = load_preferences(arguments.pickscore, arguments.hpsv2, arguments.clip or [], device)
    names = arguments.clip or ([] if preferences else [DEFAULT_CLIP])
    clips = [load_clip(name, device) for name in names]
    shared = {"batch_size": arguments.batch_size, "num_workers": arguments.num_workers, "processes": processes}
    prefix = CLIP_PREFIX if arguments.prefix else ""
    metrics = [
        metric
        for clip, suffix in zip(clips, suffixes(clips), strict=True)
        for metric in clip_scores(images, texts, clip, prefix=prefix, suffix=suffix, **shared)
    ]
    metrics += [preference_score(kind, images, texts, clip, **shared) for kind, clip in preferences.items()]
    if processes.is_main_process:
        publish(metrics, arguments.output)


if __name__ == "__main__":
    run_command(main)
