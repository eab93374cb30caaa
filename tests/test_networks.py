"""Feature networks other than FID's, reference statistics, tar files and several processes."""

import logging
import os
import shutil
import tarfile

import numpy as np
import pytest
import timm
import torch
from accelerate import PartialState
from cleanfid import fid as cleanfid
from cleanfid import inception_pytorch
from cleanfid.features import feature_extractor
from PIL import Image
from process_group import run_processes
from safetensors.torch import save_file
from tiny_clip import save_tiny_clip
from torchmetrics.image.fid import NoTrainInceptionV3
from torchvision.transforms.functional import to_tensor

from transfusion_mot.data.emoji import emoji_captions, render_emoji
from transfusion_mot.errors import UserError
from transfusion_mot.evaluation.clip_score import load_clip
from transfusion_mot.evaluation.distances.metrics import image_distance, pairs_device, set_distance
from transfusion_mot.evaluation.features import inception
from transfusion_mot.evaluation.features.load import load_feature_network
from transfusion_mot.evaluation.features.sets import feature_set, image_features, open_reference
from transfusion_mot.evaluation.images import find_images, load_rgb
from transfusion_mot.evaluation.weights import file_sha256

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two folders of 8 emoji each, of two sizes."""
    found = []
    for offset in (0, 100):
        folder = tmp_path_factory.mktemp("emoji")
        for index, stem in enumerate(list(emoji_captions())[offset::400][:8]):
            Image.fromarray(render_emoji(stem, (48, 320)[index % 2])).save(folder / f"{index}.png")
        found.append(folder)
    return found


@pytest.fixture(scope="module")
def efficientnet():
    return load_feature_network("efficientnet", CPU)


def _values(metrics):
    return {metric.name: metric.value for metric in metrics}


@pytest.fixture
def legacy_file(tmp_path, monkeypatch):
    """pytorch-fid's network with random weights, under the name of the published file."""
    path = tmp_path / inception.STATE_DICT.name
    torch.manual_seed(0)
    # The network itself writes its file: its own loading is what is left out.
    monkeypatch.setattr(inception_pytorch, "load_state_dict_from_url", lambda *args, **kwargs: {})
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", lambda self, state, strict=True: None)
    network = inception_pytorch.fid_inception_v3()
    monkeypatch.undo()
    # Activations of random weights vanish, unless the layers' statistics are those of an input.
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    network.train()(torch.randn(4, 3, 299, 299))
    torch.save(network.state_dict(), path)
    digest = file_sha256(path)
    monkeypatch.setattr(
        inception,
        "file_sha256",
        lambda path: inception.STATE_DICT.sha256 if file_sha256(path) == digest else file_sha256(path),
    )
    return path


def test_legacy_features_equal_clean_fid(folders, legacy_file, monkeypatch):
    monkeypatch.setattr(inception_pytorch, "load_state_dict_from_url", lambda *args, **kwargs: torch.load(legacy_file))
    model = feature_extractor("pytorch_inception", CPU, use_dataparallel=False)
    images = find_images(folders[0])[:3]
    expected = cleanfid.get_files_features(
        [str(path) for path in images], model, num_workers=0, device=CPU, mode="legacy_pytorch", verbose=False
    )
    network = load_feature_network("legacy", CPU, legacy_weights=legacy_file)
    assert expected.std() > 0.1
    np.testing.assert_allclose(image_features(images, network), expected, rtol=1e-4, atol=1e-4)
    assert network.frechet_name == "FID (legacy_pytorch)"
    legacy_file.write_bytes(legacy_file.read_bytes() + b" ")
    with pytest.raises(UserError, match=r"not the Inception of FID.*--other-weights"):
        load_feature_network("legacy", CPU, legacy_weights=legacy_file)
    other = load_feature_network("legacy", CPU, legacy_weights=legacy_file, other_weights=True)
    assert other.frechet_name == "FD-Inception of other weights (legacy_pytorch)"
    assert other.name == "Inception, legacy, other weights"
    legacy_file.write_bytes(b"nothing")
    with pytest.raises(UserError, match="does not hold an Inception"):
        load_feature_network("legacy", CPU, legacy_weights=legacy_file, other_weights=True)


@pytest.mark.parametrize("program", ["torch-fidelity", "torchmetrics"])
def test_tensorflow_features_equal_those_of_other_programs(folders, legacy_file, program):
    """Also images of 640 x 427, where the two resizes of the legacy modes differ most."""
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    given = {"features_list": ["2048"], "feature_extractor_weights_path": str(legacy_file)}
    if program == "torch-fidelity":
        extractor = module.FeatureExtractorInceptionV3("inception", **given)
    else:
        extractor = NoTrainInceptionV3("inception", **given, antialias=False)
        extractor.forward = extractor._torch_fidelity_forward
    images = [Image.open(path).convert("RGB") for path in find_images(folders[0])[:2]]
    images.append(Image.fromarray(np.random.default_rng(0).integers(0, 256, (427, 640, 3), dtype=np.uint8)))
    with torch.inference_mode():
        expected = torch.cat([extractor(torch.tensor(np.array(i)).permute(2, 0, 1)[None])[0] for i in images])
    network = load_feature_network("legacy_tensorflow", CPU, legacy_weights=legacy_file)
    np.testing.assert_allclose(image_features(images, network), expected, rtol=1e-4, atol=1e-4)
    assert network.frechet_name == "FID (legacy_tensorflow)"
    other = image_features(images, load_feature_network("legacy", CPU, legacy_weights=legacy_file))
    assert np.abs(other - expected.numpy()).max() > 0.01


def test_either_file_serves_every_mode(folders, legacy_file, tmp_path):
    """One network in both layouts; each mode prefers the file that its publishers use."""
    network = inception.legacy_architecture()
    network.load_state_dict(torch.load(legacy_file))
    network.dropout = network.fc = torch.nn.Identity()
    whole = torch.nn.Module()
    whole.layers = torch.jit.trace(network.eval(), torch.zeros(1, 3, 299, 299), check_trace=False)
    script = tmp_path / "script.pt"
    torch.jit.script(whole).save(str(script))
    image = find_images(folders[0])[:1]
    for mode in ("inception", "legacy", "legacy_tensorflow"):
        by_script, by_state = (
            inception.load_inception(mode, file, CPU, other_weights=True) for file in (script, legacy_file)
        )
        ours, theirs = image_features(image, by_script), image_features(image, by_state)
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
        assert by_script.resize == by_state.resize
        assert by_script.weights != by_state.weights
        assert inception.find_inception(mode, script, None) == script
        assert inception.find_inception(mode, None, legacy_file) == legacy_file
        both = inception.find_inception(mode, script, legacy_file)
        assert both == (script if mode == "inception" else legacy_file)


def test_dinov2_from_a_local_file(folders, tmp_path):
    name = "vit_small_patch14_dinov2"
    torch.manual_seed(0)
    # At the size of the published weights, whose table of positions is resampled to 16 x 16 patches.
    published = timm.create_model(name, num_classes=0)
    save_file(published.state_dict(), tmp_path / "model.safetensors")
    network = load_feature_network("dinov2", CPU, dinov2=name, dinov2_weights=tmp_path / "model.safetensors")
    images = find_images(folders[0])[:3]
    ours = image_features(images, network)
    direct = timm.create_model(name, num_classes=0, dynamic_img_size=True).eval()
    direct.load_state_dict(published.state_dict())
    for path, features in zip(images, ours, strict=True):
        picture = Image.fromarray(load_rgb(path)).resize((224, 224), Image.Resampling.BICUBIC)
        pixels = (to_tensor(picture) - torch.tensor(timm.data.IMAGENET_DEFAULT_MEAN)[:, None, None]) / torch.tensor(
            timm.data.IMAGENET_DEFAULT_STD
        )[:, None, None]
        with torch.inference_mode():
            expected = direct.forward_features(pixels[None])[0, 0]
        # The picture is rounded to 8 bits here.
        assert torch.cosine_similarity(torch.from_numpy(features), expected, dim=0) > 0.9999
    assert network.frechet_name == f"FD-{name}"
    state = published.state_dict()
    save_file({key: state[key] for key in state if key != "norm.weight"}, tmp_path / "part.safetensors")
    save_file(timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict(), tmp_path / "other.safetensors")
    for file, message in (("part", "lacks weights of .* 'norm.weight'"), ("other", "does not hold")):
        with pytest.raises(UserError, match=message):
            load_feature_network("dinov2", CPU, dinov2=name, dinov2_weights=tmp_path / f"{file}.safetensors")
    with pytest.raises(UserError, match=r"--dinov2-weights"):
        load_feature_network("dinov2", CPU, dinov2=name)
    with pytest.raises(UserError, match="not a vision transformer"):
        load_feature_network("dinov2", CPU, dinov2="resnet18", dinov2_weights="any.pth")
    with pytest.raises(UserError, match="does not hold"):
        load_feature_network("dinov2", CPU, dinov2=name, dinov2_weights=tmp_path / "missing.pth")


def test_cmmd_is_of_clips_image_embeddings(folders, tmp_path):
    path = str(save_tiny_clip(tmp_path / "clip"))
    network = load_feature_network("clip", CPU, clip=path)
    # Another CLIP than the paper's gives another number.
    assert network.kernel_name == "CLIP-MMD"
    images = find_images(folders[0])[:3]
    clip = load_clip(path, CPU)
    pictures = [Image.fromarray(load_rgb(image)).resize((32, 32), Image.Resampling.BICUBIC) for image in images]
    pixels = clip.processor.image_processor(images=pictures, do_resize=False, return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        expected = clip.model.get_image_features(pixel_values=pixels).pooler_output
    np.testing.assert_allclose(image_features(images, network), expected.numpy(), rtol=0.02, atol=0.02)
    same = _values(image_distance(images, images, network))
    assert same["CLIP-MMD"] == pytest.approx(0, abs=1e-9)
    with pytest.raises(UserError, match="--cmmd-clip"):
        load_feature_network("clip", CPU, clip="./no/clip")


def test_a_tar_file_gives_the_numbers_of_its_folder(folders, efficientnet, tmp_path):
    real, generated = folders
    with tarfile.open(tmp_path / "real.tar", "w") as tar:
        for path in sorted(real.iterdir(), reverse=True):
            tar.add(path, f"images/{path.name}")
    by_folder = image_distance(find_images(real), find_images(generated), efficientnet, image_size=40)
    by_tar = image_distance(
        open_reference(tmp_path / "real.tar"), find_images(generated), efficientnet, image_size=40, num_workers=2
    )
    assert _values(by_tar) == pytest.approx(_values(by_folder), rel=1e-5)
    (real / "broken.png").write_bytes(b"no image")
    with tarfile.open(tmp_path / "broken.tar", "w") as tar:
        tar.add(real / "broken.png", "images/broken.png")
    (real / "broken.png").unlink()
    for size in (None, 32):
        with pytest.raises(UserError, match=r"broken\.tar: images/broken\.png"):
            load_rgb(find_images(tmp_path / "broken.tar")[0], size)
    with tarfile.open(tmp_path / "small.tar.gz", "w:gz") as tar:
        tar.add(real, "images")
    with pytest.raises(UserError, match="uncompressed tar"):
        find_images(tmp_path / "small.tar.gz")
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    with pytest.raises(UserError, match="holds no images"):
        find_images(tmp_path / "empty.tar")


def test_numbers_say_which_references_they_are_of(folders, efficientnet, tmp_path, capsys):
    """Also features from a cache, and the file of a cache; a copy of a folder is the same, another picture is not."""
    real, generated = (find_images(folder)[:2] for folder in folders)
    for folder in ("real", "copy"):
        (tmp_path / folder).mkdir()
        for image in real:
            shutil.copy(image, tmp_path / folder)

    def named(place, **options):
        of_real = feature_set(open_reference(place), efficientnet, **options)
        return set_distance(of_real, of_generated, efficientnet, None)[0].protocol["real images"]

    of_generated = feature_set(generated, efficientnet)
    expected = named(tmp_path / "real")
    assert named(tmp_path / "copy", cache_dir=tmp_path / "cache") == expected
    assert named(tmp_path / "copy", cache_dir=tmp_path / "cache") == expected
    (kept,) = (tmp_path / "cache").iterdir()
    assert named(kept) == expected
    # As older versions wrote it.
    with np.load(kept) as arrays:
        older = {name: arrays[name] for name in arrays.files if name != "real_images"}
    np.savez(kept, **older)
    assert named(tmp_path / "copy", cache_dir=tmp_path / "cache") == expected
    shutil.copy(generated[0], tmp_path / "copy" / real[0].name)
    assert named(tmp_path / "copy") != expected
    assert "EfficientNet: distances" in capsys.readouterr().err


def test_pairs_are_compared_where_there_is_float64():
    assert pairs_device(torch.device("mps")) == CPU
    assert pairs_device(torch.device("cuda:1")) == torch.device("cuda:1")


def test_published_statistics(folders, efficientnet, tmp_path):
    real, generated = map(find_images, folders)
    features = image_features(real, efficientnet).astype(np.float64)
    mean, covariance = features.mean(0), np.cov(features, rowvar=False)
    np.savez(tmp_path / "published.npz", mu=mean, sigma=covariance)
    by_images = image_distance(real, generated, efficientnet)[0]
    (metric,) = image_distance(open_reference(tmp_path / "published.npz"), generated, efficientnet)
    assert metric.value == pytest.approx(by_images.value, rel=1e-6)
    assert metric.protocol["real statistics"].startswith("published.npz, sha256 ")
    for name, arrays, message in (
        ("small", {"mu": np.zeros(2048), "sigma": np.eye(2048)}, "1280 features"),
        ("nan", {"mu": mean * np.nan, "sigma": covariance}, "not finite"),
        ("nothing", {"mean": mean}, "no array 'mu"),
        ("other", {"mu": mean, "sigma": covariance, "weights": "sha256 0"}, "weights 'sha256 0'"),
    ):
        np.savez(tmp_path / f"{name}.npz", **arrays)
        with pytest.raises(UserError, match=message):
            feature_set(open_reference(tmp_path / f"{name}.npz"), efficientnet)
    (tmp_path / "text.npz").write_text("no statistics")
    for path in (tmp_path / "text.npz", tmp_path / "missing.npz"):
        with pytest.raises(UserError, match=path.name):
            feature_set(open_reference(path), efficientnet)


def test_reference_features_are_kept(folders, efficientnet, tmp_path, caplog):
    real = tmp_path / "real"
    shutil.copytree(folders[0], real)
    generated = find_images(folders[1])
    cache = tmp_path / "cache"
    first = image_distance(find_images(real), generated, efficientnet, cache_dir=cache)
    (kept,) = cache.iterdir()
    # Read again: with every pixel of the images gone, as long as sizes and times say they are the same.
    for path in real.iterdir():
        times = path.stat()
        path.write_bytes(b"\0" * times.st_size)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with caplog.at_level(logging.INFO, "transfusion_mot"):
        again = image_distance(find_images(real)[::-1], generated, efficientnet, cache_dir=cache)
    assert _values(again) == pytest.approx(_values(first), rel=1e-12)
    assert str(kept) in caplog.text
    # The file is a reference, too.
    by_file = image_distance(open_reference(kept), generated, efficientnet)
    assert _values(by_file) == pytest.approx(_values(first), rel=1e-12)
    # Another size of images is another reference, and so are changed files.
    with pytest.raises(UserError, match="not in a format"):
        image_distance(find_images(real), generated, efficientnet, image_size=40, cache_dir=cache)
    (real / "0.png").touch()
    with pytest.raises(UserError, match=r"0\.png"):
        image_distance(find_images(real), generated, efficientnet, cache_dir=cache)
    assert list(cache.iterdir()) == [kept]


def test_two_processes_give_the_numbers_of_one(folders, efficientnet, tmp_path):
    real, generated = map(find_images, folders)
    alone = _values(image_distance(real[:7], generated, efficientnet))
    first, second = run_processes(_distances, 2, {}, tmp_path / "group", folders)
    assert first == pytest.approx(alone, rel=1e-6)
    assert second == {}
    features = image_features(generated, efficientnet)
    for shared in run_processes(_features, 2, {}, tmp_path / "features", folders):
        np.testing.assert_allclose(shared, features, atol=1e-4)
    (folders[1] / "broken.png").write_bytes(b"no image")
    messages = run_processes(_failure, 2, {}, tmp_path / "broken", folders)
    (folders[1] / "broken.png").unlink()
    assert all("broken.png" in message for message in messages)


def _distances(folders):
    network = load_feature_network("efficientnet", CPU)
    real, generated = map(find_images, folders)
    return _values(image_distance(real[:7], generated, network, batch_size=3, processes=PartialState(cpu=True)))


def _features(folders):
    network = load_feature_network("efficientnet", CPU)
    return image_features(find_images(folders[1]), network, processes=PartialState(cpu=True))


def _failure(folders):
    network = load_feature_network("efficientnet", CPU)
    with pytest.raises(UserError) as error:
        image_features(find_images(folders[1]), network, processes=PartialState(cpu=True))
    return str(error.value)
