"""How fast images are evaluated: `python -m benchmarks.features --features efficientnet`.

The whole way of evaluate/fid.py from files to features, against the feature network alone on batches that lie prepared
on its device. Without --folder it writes images itself: smooth colours under a little noise, which take as long to
decode as photographs.
"""

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

import numpy as np
import torch
from PIL import Image

from benchmarks.train_step import surroundings, without_output
from transfusion_mot.evaluation.command import add_device, at_least_one, command_parser
from transfusion_mot.evaluation.feature_network import FeatureNetwork
from transfusion_mot.evaluation.features import image_features
from transfusion_mot.evaluation.images import (
    ImageSource,
    default_batch_size,
    default_num_workers,
    find_images,
    load_rgb,
    pick_device,
)
from transfusion_mot.evaluation.inception import legacy_architecture, load_legacy
from transfusion_mot.evaluation.networks import FeatureChoice, load_feature_network

# As fast as the published one, where that cannot be had.
RANDOM = "random-inception"
TURNS = 3
# Images that the network alone sees again and again.
_PREPARED = 256


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
                # Or else activations vanish, and numbers near zero take their own time on a CPU.
                torch.nn.init.kaiming_normal_(module.weight)
        torch.save(network.state_dict(), path)
        return load_legacy(path, device)


def time_network(network: FeatureNetwork, images: Sequence[ImageSource], count: int) -> float:
    """Seconds that the network alone needs for `count` images, which it has seen before."""
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


def time_pipeline(network: FeatureNetwork, images: Sequence[ImageSource], num_workers: int) -> float:
    """Seconds from the files of images to their features."""
    start = time.perf_counter()
    image_features(images, network, num_workers=num_workers)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(network: FeatureNetwork, images: Sequence[ImageSource], num_workers: int) -> dict[str, Any]:
    """Images a second of the network alone and of the whole way, which take turns."""
    count = len(images)
    # What of the files is in memory and which kernels are chosen is then the same for all.
    image_features(images[: min(count, _PREPARED)], network, num_workers=num_workers)
    alone, whole = [], []
    for _ in range(TURNS):
        alone.append(count / time_network(network, images, count))
        whole.append(count / time_pipeline(network, images, num_workers))
    rate = statistics.median(whole)
    return {
        "network": network.description,
        "images": count,
        "pixels": list(load_rgb(images[0]).shape[:2]),
        "workers": num_workers,
        "batch": default_batch_size(network.device),
        "network_images_per_second": alone,
        "images_per_second": whole,
        "share_of_network": rate / statistics.median(alone),
        "seconds_for_30000": 30000 / rate,
    }


def shown(line: dict[str, Any]) -> str:
    """A line for people."""
    rates = [f"{statistics.median(line[key]):,.1f}" for key in ("network_images_per_second", "images_per_second")]
    return (
        f"{line['network']}: {line['images']} images of {line['pixels'][0]} px, {rates[0]} images/s the network alone, "
        f"{rates[1]} images/s from files ({line['share_of_network']:.3f} of it), 30,000 take "
        f"{line['seconds_for_30000']:.0f} s"
    )


def main(arguments: list[str]) -> None:
    parser = command_parser(__doc__)
    parser.add_argument("--folder", metavar="FOLDER", help="images (default: PNG files that it writes)")
    parser.add_argument("--num-images", type=at_least_one, default=4096, metavar="N", help="most images (4096)")
    parser.add_argument(
        "--image-size", type=at_least_one, default=256, metavar="PIXELS", help="of what it writes (256)"
    )
    parser.add_argument(
        "--features",
        nargs="+",
        choices=[*get_args(FeatureChoice), RANDOM],
        default=["efficientnet", RANDOM],
        help=f"networks (default: those that need no download, efficientnet and {RANDOM})",
    )
    parser.add_argument("--num-workers", type=int, default=default_num_workers(), help="processes that decode images")
    add_device(parser)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder for the JSON")
    options = parser.parse_args(arguments)
    device = pick_device(options.device)
    command = " ".join(["python -m benchmarks.features", *without_output(arguments)])
    report = {"command": command, **surroundings(device), "lines": []}
    with tempfile.TemporaryDirectory() as temporary:
        if options.folder is None:
            write_images(Path(temporary), options.num_images, options.image_size)
        images = find_images(options.folder or temporary)[: options.num_images]
        for name in options.features:
            report["lines"].append(measure(load_network(name, device), images, options.num_workers))
            print(shown(report["lines"][-1]), flush=True)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / f"features-{device.type}.json").write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
