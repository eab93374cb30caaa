"""The benchmark of image features runs, on its own images and on a folder."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.features import RANDOM, load_network, main, time_network, time_pipeline, write_images
from transfusion_mot.evaluation.images import find_images

pytestmark = pytest.mark.slow

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


def test_the_start_ends_with_the_first_batch(tmp_path: Path) -> None:
    """A network that takes its time for each of three batches, and none before them."""
    write_images(tmp_path, 12, 16)
    network = load_network("efficientnet", CPU)
    network.module.register_forward_hook(lambda module, inputs, output: time.sleep(0.5))
    start, rest = time_pipeline(network, find_images(tmp_path), 0)
    assert 0 < start < 1 < rest
    time_pipeline(network, find_images(tmp_path), 0)
    assert not network.module._forward_pre_hooks


def test_written_images_are_seen_again_where_more_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.features._WRITTEN", 3)
    common = ["--features", "efficientnet", "--image-size", "16", "--num-workers", "0", "--device", "cpu"]
    main([*common, "--num-images", "5", "--output", str(tmp_path)])
    (line,) = json.loads((tmp_path / "features-cpu.json").read_text())["lines"]
    assert line["images"] == 5


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
    whole, steady = (np.array(line[name]) for name in ("images_per_second", "images_per_second_once_started"))
    alone = np.median(line["network_images_per_second"])
    assert line["share_of_network"] == pytest.approx(np.median(whole) / alone)
    assert line["share_of_network_once_started"] == pytest.approx(np.median(steady) / alone)
    np.testing.assert_allclose(4 / whole, line["seconds_to_start"] + 4 / steady)
