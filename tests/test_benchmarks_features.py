"""The benchmark of image features runs, on its own images and on a folder."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.features import RANDOM, load_network, main, time_network, write_images
from transfusion_mot.evaluation.images import find_images

CPU = torch.device("cpu")


def test_images_are_as_asked_for_and_always_the_same(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_images(tmp_path / name, 3, 40)
    one, two = (sorted((tmp_path / name).iterdir()) for name in ("one", "two"))
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]
    pixels = [np.asarray(Image.open(path)) for path in one]
    assert all(image.shape == (40, 40, 3) and image.std() > 10 for image in pixels)
    assert not np.array_equal(pixels[0], pixels[1])


def test_the_network_sees_every_image_that_is_counted(tmp_path: Path) -> None:
    write_images(tmp_path, 6, 24)
    network = load_network("efficientnet", CPU)
    seen = []
    network.module.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    assert time_network(network, find_images(tmp_path), 10) > 0
    # Two batches to warm up, of four and of two; then three that hold at least ten images.
    assert seen[:2] == [4, 2]
    assert sum(seen[2:]) == 10


def test_random_inception_has_the_shape_of_the_published_one() -> None:
    network = load_network(RANDOM, CPU)
    with torch.inference_mode():
        features = network.features([torch.zeros(2, 30, 30, 3, dtype=torch.uint8)])
    assert features.shape == (2, 2048)


@pytest.mark.parametrize("given", [False, True])
def test_the_benchmark_writes_what_it_measures(tmp_path: Path, given: bool) -> None:
    (tmp_path / "images").mkdir()
    write_images(tmp_path / "images", 5, 16)
    words = ["--folder", str(tmp_path / "images")] if given else ["--image-size", "20"]
    common = ["--num-images", "4", "--features", "efficientnet", "--num-workers", "0", "--device", "cpu"]
    main([*words, *common, "--output", str(tmp_path / "out")])
    report = json.loads((tmp_path / "out" / "features-cpu.json").read_text())
    assert report["command"] == " ".join(["python -m benchmarks.features", *words, *common])
    (line,) = report["lines"]
    assert (line["images"], line["pixels"]) == (4, [16, 16] if given else [20, 20])
    assert line["seconds_for_30000"] == pytest.approx(30000 / np.median(line["images_per_second"]))
    share = np.median(line["images_per_second"]) / np.median(line["network_images_per_second"])
    assert line["share_of_network"] == pytest.approx(share)
