"""Distances of a model's edits to the targets of held-out editing pairs, compared with the unedited picture.

    python evaluate/edit.py --checkpoint runs/edit --pictures edits.png --output edits.json

For each source of editing pairs, and for all of them, the output has three distances to the target: of the unedited
source image, of the model's edit, and of the encoded and decoded target (the limit for any model). Distances are
measured in pixels (mean absolute difference, from 0 to 1) and in features (1 - cosine), each a mean over the pairs with
an interval.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from transfusion_mot.cli.options import DTYPES
from transfusion_mot.errors import UserError, exit_on_user_error
from transfusion_mot.evaluation.command import (
    add_device,
    add_output,
    add_run,
    at_least_one,
    command_parser,
    publish,
    run_command,
    writable_file,
)
from transfusion_mot.evaluation.report.content import Metric
from transfusion_mot.outputs import check_picture_name


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = command_parser(__doc__)
    add_run(parser)
    parser.add_argument(
        "--num-pairs", type=at_least_one, default=256, metavar="N", help="held-out pairs of each source (default: 256)"
    )
    parser.add_argument(
        "--num-inference-steps", type=int, metavar="N", help="reverse steps (default: the checkpoint's)"
    )
    parser.add_argument(
        "--guidance-scale", type=float, metavar="X", help="guidance by the instruction (default: the checkpoint's)"
    )
    parser.add_argument(
        "--image-guidance-scale",
        type=float,
        default=1.5,
        metavar="X",
        help="guidance by the source image (default: 1.5)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="the same seed gives the same results (default: 0)"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="number format of the transformer (default: bf16 on CUDA)")
    parser.add_argument(
        "--pictures", type=writable_file, metavar="FILE", help="also draw source, result and target of some pairs"
    )
    parser.add_argument(
        "--shown", type=at_least_one, default=4, metavar="N", help="pairs of each source in --pictures (default: 4)"
    )
    add_device(parser)
    add_output(parser)
    given = parser.parse_args(arguments)
    if given.pictures is not None:
        check_picture_name(given.pictures, "--pictures")
    return given


if __name__ == "__main__":
    # Before PyTorch loads, which takes seconds: --help, and mistakes in the options.
    with exit_on_user_error():
        parse_arguments(sys.argv[1:])

from PIL import Image

from transfusion_mot.cli.loading import load_pipeline
from transfusion_mot.data.images import grid
from transfusion_mot.data.mixture import Sources, open_documents
from transfusion_mot.evaluation.features.load import load_feature_network
from transfusion_mot.evaluation.images import pick_device
from transfusion_mot.files import find_snapshot
from transfusion_mot.sampling.held_out_edits import (
    Distances,
    edit_metrics,
    edited,
    feature_distance,
    held_out_edits,
    joined,
    pixel_distance,
    through_codec,
)
from transfusion_mot.training.checkpoint import read_run_config


def main() -> None:
    arguments = parse_arguments(sys.argv[1:])
    config = read_run_config(find_snapshot(arguments.checkpoint), arguments.config, "--config")
    device = pick_device(arguments.device)
    pipeline = load_pipeline(arguments.checkpoint, device, arguments.dtype)
    pipeline.check_can_edit()
    pipeline.set_progress_bar_config(disable=True)
    network = load_feature_network("efficientnet", device)
    sources = Sources(open_documents(config.data, "held_out"), {})
    found = [
        edits
        for name, source in zip(sources.names, sources.sources, strict=True)
        if (edits := held_out_edits(pipeline, name, source, arguments.num_pairs)) is not None and edits.before
    ]
    if not found:
        raise UserError(
            "no editing pair is held out; raise data.held_out_fraction, or give --config with a source that has "
            "source_image_column"
        )
    steps, scale = pipeline.sampling_settings(
        pipeline.image_modality, arguments.num_inference_steps, arguments.guidance_scale
    )
    settings = {
        "num_inference_steps": steps,
        "guidance_scale": scale,
        "image_guidance_scale": arguments.image_guidance_scale,
    }
    measures = {
        "pixel distance": pixel_distance,
        f"{network.name} distance": feature_distance(network, arguments.batch_size),
    }
    distances: dict[str, list[Distances]] = {measure: [] for measure in measures}
    metrics: list[Metric] = []
    shown: list[tuple[Image.Image, str]] = []
    for edits in found:
        results = edited(pipeline, edits, batch_size=arguments.batch_size, seed=arguments.seed, **settings)
        images = {
            "unedited": edits.before,
            "edited": results,
            "through the codec": through_codec(pipeline, edits.after, arguments.batch_size),
        }
        for measure, distance in measures.items():
            of_source = {what: distance(pictures, edits.after) for what, pictures in images.items()}
            distances[measure].append(of_source)
            metrics += edit_metrics(edits.name, of_source, measure, {"seed": arguments.seed, **settings})
        for number in range(0, len(results), -(-len(results) // arguments.shown)):
            labels = (edits.instructions[number], "result", "target")
            shown += zip((edits.before[number], results[number], edits.after[number]), labels, strict=True)
    if len(found) > 1:
        for measure, parts in distances.items():
            metrics += edit_metrics("all", joined(parts), measure, {"seed": arguments.seed, **settings})
    publish(metrics, arguments.output)
    if arguments.pictures is not None:
        Path(arguments.pictures).parent.mkdir(parents=True, exist_ok=True)
        grid([image for image, _ in shown], [label for _, label in shown], 6).save(arguments.pictures)


if __name__ == "__main__":
    run_command(main)
