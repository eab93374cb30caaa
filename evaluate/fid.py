"""Distances between real and generated images: FID, KID, precision, recall, density, coverage, FD-DINOv2, CMMD.

    python evaluate/fid.py REAL GENERATED --output metrics.json
    accelerate launch evaluate/fid.py REAL GENERATED --features inception legacy dinov2 clip --cache-dir cache

REAL is a folder, an uncompressed tar file, or an .npz file of statistics (mu, sigma); GENERATED a folder or a tar file.
Each network needs its weights, downloaded once or given by path. One of the first two files is enough for all three
FIDs:
    inception          FID of clean-fid                    --inception-weights inception-2015-12-05.pt
    legacy             FID of pytorch-fid                  --legacy-weights pt_inception-2015-12-05-6726825d.pth
    legacy_tensorflow  FID of torch-fidelity               either of the two
    dinov2             FD-DINOv2                           --dinov2-weights model.safetensors
    clip               CMMD                                --cmmd-clip FOLDER
    efficientnet       FD-EfficientNet, not FID; its weights come with a Python package
    auto               inception if its weights are available, else efficientnet
Compare numbers only if they have the same number of images; docs/evaluation.md says what else must be the same.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import get_args

from transfusion_mot.errors import exit_on_user_error
from transfusion_mot.evaluation.command import (
    add_device,
    add_image_reading,
    add_output,
    command_parser,
    publish,
    run_command,
)
from transfusion_mot.evaluation.defaults import DEFAULT_CMMD_CLIP, DEFAULT_DINOV2, FeatureChoice
from transfusion_mot.evaluation.report.content import Metric
from transfusion_mot.outputs import check_writable_folder
from transfusion_mot.path_options import PathOption, existing, existing_or_on_hub


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument(
        "real",
        action=PathOption,
        check=existing("a folder of images, a tar file of them, or statistics"),
        metavar="REAL",
        help="real images: of a folder those in its metadata.jsonl, else every .png, .jpg, .jpeg, .webp, .bmp and "
        ".tiff, in subfolders too; a tar file; or statistics (.npz with mu and sigma)",
    )
    parser.add_argument(
        "generated",
        action=PathOption,
        check=existing("a folder of images, or a tar file of them"),
        metavar="GENERATED",
        help="generated images, as many as possible",
    )
    parser.add_argument(
        "--features",
        nargs="+",
        choices=get_args(FeatureChoice),
        default=["auto"],
        help="networks to compare images in (auto)",
    )
    parser.add_argument(
        "--inception-weights",
        action=PathOption,
        check=existing("the file inception-2015-12-05.pt"),
        metavar="FILE",
        help="local path of inception-2015-12-05.pt",
    )
    parser.add_argument(
        "--legacy-weights",
        action=PathOption,
        check=existing("the file pt_inception-2015-12-05-6726825d.pth"),
        metavar="FILE",
        help="local path of pt_inception-2015-12-05-6726825d.pth",
    )
    parser.add_argument(
        "--other-weights",
        action="store_true",
        help="accept files with other weights of FID's network; their numbers are not called FID",
    )
    parser.add_argument("--dinov2", default=DEFAULT_DINOV2, metavar="NAME", help=f"network of timm ({DEFAULT_DINOV2})")
    parser.add_argument(
        "--dinov2-weights",
        action=PathOption,
        check=existing("the file of the weights of --dinov2"),
        metavar="FILE",
        help="local path of its weights",
    )
    parser.add_argument(
        "--cmmd-clip",
        action=PathOption,
        check=existing_or_on_hub("--cmmd-clip"),
        default=DEFAULT_CMMD_CLIP,
        metavar="NAME_OR_FOLDER",
        help=f"CLIP model ({DEFAULT_CMMD_CLIP})",
    )
    parser.add_argument(
        "--image-size",
        type=int,
        metavar="PIXELS",
        help="first crop every image to its centre square by whole pixels and resize it to this size; without it "
        "images keep their size, so both sides should have the same size",
    )
    parser.add_argument("--cache-dir", metavar="FOLDER", help="folder in which the features of REAL are cached")
    add_image_reading(parser)
    add_device(parser)
    add_output(parser)
    given = parser.parse_args(arguments)
    if given.cache_dir is not None:
        check_writable_folder(given.cache_dir, "--cache-dir")
    return given


if __name__ == "__main__":
    # Before PyTorch loads, which takes seconds: --help, and mistakes in the options.
    with exit_on_user_error():
        parse_arguments(sys.argv[1:])

from transfusion_mot.evaluation.distances.metrics import image_distance
from transfusion_mot.evaluation.features.load import load_feature_networks
from transfusion_mot.evaluation.features.sets import open_reference
from transfusion_mot.evaluation.images import find_images
from transfusion_mot.evaluation.processes import open_processes


def main() -> None:
    arguments = parse_arguments(sys.argv[1:])
    real = open_reference(arguments.real)
    generated = find_images(arguments.generated)
    processes, device = open_processes(arguments.device)
    networks = load_feature_networks(
        arguments.features,
        device,
        arguments.inception_weights,
        legacy_weights=arguments.legacy_weights,
        other_weights=arguments.other_weights,
        dinov2=arguments.dinov2,
        dinov2_weights=arguments.dinov2_weights,
        clip=arguments.cmmd_clip,
    )
    metrics: list[Metric] = []
    for network in networks:
        metrics += image_distance(
            real,
            generated,
            network,
            batch_size=arguments.batch_size,
            num_workers=arguments.num_workers,
            image_size=arguments.image_size,
            processes=processes,
            cache_dir=arguments.cache_dir,
        )
    if processes.is_main_process:
        publish(metrics, arguments.output)


if __name__ == "__main__":
    run_command(main)
