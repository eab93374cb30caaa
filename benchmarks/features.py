"""Speed of feature computation: `python -m benchmarks.features --features efficientnet`.

It compares evaluate/fid.py from files to features with the feature network alone on prepared batches on its device. The
time until the network has its first batch is given separately. Without --folder it writes images itself: smooth colours
with a little noise, which take as long to decode as photographs. Each of them is read several times.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice
from pathlib import Path
from typing import Any, get_args

from transfusion_mot.errors import exit_on_user_error
from transfusion_mot.evaluation.command import add_device, at_least_one, command_parser
from transfusion_mot.evaluation.defaults import FeatureChoice, default_num_workers
from transfusion_mot.outputs import check_writable_folder
from transfusion_mot.path_options import PathOption, existing

# An untrained Inception, as fast as the published one, if that is not available.
RANDOM = "random-inception"


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of the command line."""
    parser = command_parser(__doc__, "python -m benchmarks.features")
    parser.add_argument(
        "--folder",
        action=PathOption,
        check=existing("a folder of images"),
        metavar="FOLDER",
        help="images (default: PNG files that it writes)",
    )
    parser.add_argument(
        "--num-images",
        type=at_least_one,
        default=30000,
        metavar="N",
        help="maximum images (30000, as in papers)",
    )
    parser.add_argument(
        "--image-size", type=at_least_one, default=256, metavar="PIXELS", help="size of the images that it writes (256)"
    )
    parser.add_argument(
        "--features",
        nargs="+",
        choices=[*get_args(FeatureChoice), RANDOM],
        default=["efficientnet", RANDOM],
        help=f"networks (default: those that need no download, efficientnet and {RANDOM})",
    )
    parser.add_argument("--num-workers", type=int, default=default_num_workers(), help="images decoded at a time")
    add_device(parser)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder for the JSON")
    given = parser.parse_args(arguments)
    check_writable_folder(given.output, "--output")
    return given


if __name__ == "__main__":
    # Before PyTorch loads, which takes seconds: --help, and mistakes in the options.
    with exit_on_user_error():
        parse_arguments(sys.argv[1:])

import numpy as np
import torch
from PIL import Image

from benchmarks.train_step import surroundings, without_output
from transfusion_mot.evaluation.features.inception import legacy_architecture, load_inception
from transfusion_mot.evaluation.features.load import load_feature_network
from transfusion_mot.evaluation.features.network import FeatureNetwork
from transfusion_mot.evaluation.features.sets import image_features
from transfusion_mot.evaluation.images import (
    ImageSource,
    default_batch_size,
    find_images,
    load_rgb,
    pick_device,
)

TURNS = 3
# Number of images on which the network alone runs repeatedly.
_PREPARED = 256
# Number of different images to write; they fit into the file cache of the system.
_WRITTEN = 4096


def write_images(folder: Path, count: int, size: int) -> None:
    """Write PNG files of `size` pixels."""
    rows, columns = np.mgrid[0:size, 0:size] / size

    def write(number: int) -> None:
        rng = np.random.default_rng(number)
        waves = np.stack([np.sin(rng.normal(0, 9) * rows + rng.normal(0, 9) * columns) for _ in range(3)], axis=-1)
        pixels = 127 + 100 * waves + rng.normal(0, 4, waves.shape)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{number:06d}.png")

    with ThreadPoolExecutor() as pool:
        list(pool.map(write, range(count)))


def load_network(name: str, device: torch.device) -> FeatureNetwork:
    """A feature network by its name in evaluate/fid.py, or an Inception without training."""
    if name != RANDOM:
        (choice,) = (choice for choice in get_args(FeatureChoice) if choice == name)
        return load_feature_network(choice, device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "random.pth"
        network = legacy_architecture()
        for module in network.modules():
            if isinstance(module, torch.nn.Conv2d):
                # Otherwise activations vanish, and subnormal numbers are slow on a CPU.
                torch.nn.init.kaiming_normal_(module.weight)
        torch.save(network.state_dict(), path)
        return load_inception("legacy", path, device, other_weights=True)


def time_network(network: FeatureNetwork, images: Sequence[ImageSource], count: int) -> float:
    """Seconds of the network alone for `count` images, which are already on the device."""
    size = default_batch_size(network.device)
    pixels = [torch.tensor(load_rgb(image))[None].to(network.device) for image in images[:_PREPARED]]
    prepared = torch.cat([network.prepare(image) for image in pixels]).split(size)
    batches = list(islice(cycle(prepared), -(-count // size)))
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for batch in prepared[:2]:
            network.module(batch)
        _wait(network.device)
        start = time.perf_counter()
        for batch in batches:
            network.module(batch)
        _wait(network.device)
        return (time.perf_counter() - start) * count / sum(map(len, batches))


def time_pipeline(network: FeatureNetwork, images: Sequence[ImageSource], num_workers: int) -> tuple[float, float]:
    """Seconds until the network has its first batch, and from then until all features are computed."""
    batches: list[float] = []
    hook = network.module.register_forward_pre_hook(lambda module, inputs: batches.append(time.perf_counter()))
    start = time.perf_counter()
    image_features(images, network, num_workers=num_workers)
    end = time.perf_counter()
    hook.remove()
    return batches[0] - start, end - batches[0]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(network: FeatureNetwork, images: Sequence[ImageSource], num_workers: int) -> dict[str, Any]:
    """Images a second of the network alone and of the whole pipeline, measured in turns."""
    count = len(images)
    # Afterwards the file cache and the chosen kernels are the same for all.
    image_features(images[: min(count, _PREPARED)], network, num_workers=num_workers)
    alone, starts, steady, whole = [], [], [], []
    for _ in range(TURNS):
        alone.append(count / time_network(network, images, count))
        start, rest = time_pipeline(network, images, num_workers)
        starts.append(start)
        steady.append(count / rest)
        whole.append(count / (start + rest))
    network_rate = statistics.median(alone)
    return {
        "network": network.description,
        "images": count,
        "pixels": list(load_rgb(images[0]).shape[:2]),
        "workers": num_workers,
        "batch": default_batch_size(network.device),
        "network_images_per_second": alone,
        "seconds_to_start": starts,
        "images_per_second_once_started": steady,
        "images_per_second": whole,
        "share_of_network_once_started": statistics.median(steady) / network_rate,
        "share_of_network": statistics.median(whole) / network_rate,
    }


def shown(line: dict[str, Any]) -> str:
    """A readable line."""
    names = ("network_images_per_second", "images_per_second", "images_per_second_once_started")
    alone, whole, steady = (f"{statistics.median(line[name]):,.1f}" for name in names)
    return (
        f"{line['network']}: {line['images']:,} images of {line['pixels'][0]} px, network alone {alone} images/s, "
        f"from files {whole} images/s ({line['share_of_network']:.3f} of that), "
        f"{statistics.median(line['seconds_to_start']):.2f} s to start, then {steady} images/s "
        f"({line['share_of_network_once_started']:.3f})"
    )


def main(arguments: list[str]) -> None:
    options = parse_arguments(arguments)
    device = pick_device(options.device)
    command = " ".join(["python -m benchmarks.features", *without_output(arguments)])
    report = {"command": command, **surroundings(device), "lines": []}
    images: Sequence[ImageSource]
    with tempfile.TemporaryDirectory() as temporary:
        if options.folder is None:
            write_images(Path(temporary), min(options.num_images, _WRITTEN), options.image_size)
            images = list(islice(cycle(find_images(temporary)), options.num_images))
        else:
            images = find_images(options.folder)[: options.num_images]
        for name in options.features:
            report["lines"].append(measure(load_network(name, device), images, options.num_workers))
            print(shown(report["lines"][-1]), flush=True)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / f"features-{device.type}.json").write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    with exit_on_user_error():
        main(sys.argv[1:])
