"""Nearest training images: against numpy, with an unreadable image, in one process and in two."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState
from PIL import Image
from process_group import run_processes

from transfusion_mot.config import DataConfig, SourceConfig
from transfusion_mot.data.sources import stored_images
from transfusion_mot.errors import UserError
from transfusion_mot.evaluation.features.network import FeatureNetwork
from transfusion_mot.evaluation.memorisation import TrainingImages

SIZE, COUNT, QUERIES = 16, 9, 5
FEATURES = 4 * 4 * 3
MISSING = 4


def pixels() -> np.ndarray:
    """Training images, uint8 [COUNT, SIZE, SIZE, 3]."""
    return np.random.default_rng(0).integers(0, 256, (COUNT, SIZE, SIZE, 3), dtype=np.uint8)


def queries() -> np.ndarray:
    return np.random.default_rng(1).random((QUERIES, FEATURES), dtype=np.float32)


def corners(images: torch.Tensor) -> torch.Tensor:
    """The upper left corner of images uint8 [B, H, W, 3]."""
    return images[:, :4, :4].permute(0, 3, 1, 2).float()


def nearest_of(folder: Path) -> tuple[list[str], list[str], np.ndarray]:
    """Files that this process has decoded; captions of the nearest training images, and their distances."""
    network = FeatureNetwork(
        "n", "f", "k", "", "", "", corners, torch.nn.Flatten(), num_features=FEATURES, device=torch.device("cpu")
    )
    source = SourceConfig("imagefolder", str(folder))
    data = DataConfig([source], image_size=SIZE, held_out_fraction=0.0, cache_dir=str(folder / "cache"))
    decoded, load = [], stored_images.load_image

    def noted(content, size, fit, name):
        decoded.append(Path(name).name)
        return load(content, size, fit, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stored_images, "load_image", noted)
        patch.setattr("transfusion_mot.evaluation.memorisation._BYTES_AT_ONCE", 2 * 3 * SIZE**2)
        training = TrainingImages(data, 1000, network, None, PartialState(cpu=True))
        items, distances = training.nearest(queries())
        again, _ = training.nearest(queries()[::-1])
    assert again == items[::-1]
    return decoded, [images.captions(index)[0] for images, index in items], distances


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    lines = []
    for number, image in enumerate(pixels()):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": f"picture {number}"}))
    (tmp_path / f"{MISSING}.png").write_bytes(b"no image")
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    return tmp_path


@pytest.mark.parametrize("world_size", [1, 2])
def test_each_image_is_decoded_once_and_the_nearest_are_those_of_numpy(folder: Path, world_size: int) -> None:
    features = pixels()[:, :4, :4].transpose(0, 3, 1, 2).reshape(COUNT, -1).astype(np.float64)
    features, asked = (values / np.linalg.norm(values, axis=1, keepdims=True) for values in (features, queries()))
    cosines = asked @ features.T
    cosines[:, MISSING] = -1
    found = run_processes(nearest_of, world_size, {}, folder / "group", folder)
    assert sorted(name for decoded, *_ in found for name in decoded) == [f"{number}.png" for number in range(COUNT)]
    for _, captions, distances in found:
        assert captions == [f"picture {number}" for number in cosines.argmax(axis=1)]
        np.testing.assert_allclose(distances, 1 - cosines.max(axis=1), atol=1e-6)


def test_data_without_a_readable_image_are_refused(folder: Path) -> None:
    for number in range(COUNT):
        (folder / f"{number}.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="the training data have no image with a caption that can be read"):
        nearest_of(folder)
