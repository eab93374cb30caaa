"""The autoencoder: its normalisation, loading, and training at toy size."""

import copy
import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
import yaml
from accelerate import cpu_offload
from diffusers import AutoencoderKL
from PIL import Image, ImageDraw
from process_group import run_script
from torchmetrics.functional.image import peak_signal_noise_ratio

from transfusion_mot.autoencoder import main
from transfusion_mot.codec_training.bottlenecks import GaussianBottleneck
from transfusion_mot.codec_training.images import augment, measured
from transfusion_mot.codec_training.losses import Objective, discriminator
from transfusion_mot.codec_training.train import build, train_codec
from transfusion_mot.codecs.autoencoder_kl import Autoencoder, set_normalisation
from transfusion_mot.config import AutoencoderTrainingConfig, DataConfig, SourceConfig, parse_config
from transfusion_mot.data.images import load_image, to_pixels
from transfusion_mot.errors import UserError

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
MEAN, STD = [0.3, -1.0, 0.0, 2.0], [0.5, 2.0, 1.0, 0.1]


def build_vae(seed=0, **config):
    torch.manual_seed(seed)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 16),
        latent_channels=4,
        norm_num_groups=4,
        **config,
    )


def random_pixels(batch=2, size=16):
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


# --- normalisation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "shift", "scale"),
    [
        ({"scaling_factor": 0.18215}, 0.0, 0.18215),
        ({"scaling_factor": 0.3611, "shift_factor": 0.1159}, 0.1159, 0.3611),
        ({"latents_mean": MEAN, "latents_std": STD}, torch.tensor(MEAN), 1 / torch.tensor(STD)),
    ],
)
def test_latents_are_those_of_the_bare_model_shifted_and_scaled(config, shift, scale):
    vae = build_vae(**config)
    autoencoder = Autoencoder(vae)
    pixels = random_pixels()
    shift, scale = (torch.as_tensor(value).view(-1, 1, 1) for value in (shift, scale))
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
        mean, std = autoencoder.encode(pixels)
        torch.testing.assert_close(mean, (posterior.mean - shift) * scale)
        torch.testing.assert_close(std, posterior.std * scale)
        latents = torch.randn(2, 4, 4, 4)
        torch.testing.assert_close(autoencoder.decode(latents), vae.decode(latents / scale + shift).sample.clamp(-1, 1))
    assert (autoencoder.latent_channels, autoencoder.downsampling) == (4, 4)
    assert mean.shape == (2, 4, 4, 4)


def test_decoded_pixels_are_in_range_and_nothing_is_trained():
    autoencoder = Autoencoder(build_vae())
    pixels = autoencoder.decode(1e3 * torch.randn(2, 4, 4, 4))
    assert pixels.shape == (2, 3, 16, 16)
    assert pixels.abs().max() == 1.0
    mean, _ = autoencoder.encode(random_pixels().requires_grad_())
    assert not mean.requires_grad
    assert not autoencoder.vae.training
    assert not any(parameter.requires_grad for parameter in autoencoder.vae.parameters())


def test_half_precision_takes_and_gives_float32():
    autoencoder = Autoencoder(build_vae().to(torch.bfloat16))
    mean, std = autoencoder.encode(random_pixels())
    pixels = autoencoder.decode(mean)
    assert mean.dtype == std.dtype == pixels.dtype == torch.float32


def test_fingerprint_follows_weights_and_normalisation(tmp_path):
    first = Autoencoder(build_vae()).fingerprint
    assert re.fullmatch(r"[0-9a-f]{16}", first)
    assert Autoencoder(build_vae()).fingerprint == first
    assert Autoencoder(build_vae(seed=1)).fingerprint != first
    normalised = build_vae()
    set_normalisation(normalised, MEAN, STD)
    assert Autoencoder(normalised).fingerprint != first
    nudged = build_vae()
    with torch.no_grad():
        nudged.decoder.conv_out.bias[0] += 1e-6
    assert Autoencoder(nudged).fingerprint != first

    # A copy elsewhere, and another number format that holds the same values, are the same autoencoder.
    rounded = build_vae().half()
    rounded.save_pretrained(tmp_path / "a")
    rounded.save_pretrained(tmp_path / "b")
    loaded = [
        Autoencoder.load(str(tmp_path / name), "cpu", dtype)
        for name, dtype in (("a", torch.float32), ("b", torch.float32), ("a", torch.float16))
    ]
    assert loaded[0].vae.dtype == torch.float32
    assert loaded[2].vae.dtype == torch.float16
    assert len({autoencoder.fingerprint for autoencoder in loaded}) == 1


# --- loading -------------------------------------------------------------------------------------------------------


def test_saved_and_loaded_is_the_same(tmp_path):
    vae = build_vae()
    set_normalisation(vae, MEAN, STD)
    vae.save_pretrained(tmp_path)
    loaded, original = Autoencoder.load(str(tmp_path), "cpu"), Autoencoder(vae)
    mean, std = original.encode(random_pixels())
    loaded_mean, loaded_std = loaded.encode(random_pixels())
    assert loaded_mean.equal(mean)
    assert loaded_std.equal(std)
    assert loaded.decode(mean).equal(original.decode(mean))


def test_folders_that_hold_no_autoencoder(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"no codec at 'nobody/missing'"):
        Autoencoder.load("nobody/missing", "cpu")
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / "missing", "./missing", "~/missing", "runs/missing", "a/b/missing"):
        with pytest.raises(UserError, match=r"codec path '.*missing' does not exist; there is"):
            Autoencoder.load(str(path), "cpu")
    with pytest.raises(UserError, match=r"no config\.json"):
        Autoencoder.load(str(tmp_path), "cpu")
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(UserError, match="is of class UNet2DModel"):
        Autoencoder.load(str(tmp_path), "cpu")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="no codec at"):
        Autoencoder.load(str(tmp_path), "cpu")
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(UserError, match="subfolder 'vae'"):
        Autoencoder.load(str(tmp_path), "cpu")


def test_missing_weights_are_not_left_at_random(tmp_path):
    from safetensors.torch import load_file, save_file

    build_vae().save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    del weights["decoder.conv_out.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"no weights for decoder\.conv_out\.weight"):
        Autoencoder.load(str(tmp_path), "cpu")
    file.unlink()
    with pytest.raises(UserError, match="no codec at"):
        Autoencoder.load(str(tmp_path), "cpu")


# --- training ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawings(tmp_path_factory):
    """A folder of coloured shapes on white."""
    folder = tmp_path_factory.mktemp("drawings")
    generator = np.random.default_rng(0)
    entries = []
    for number in range(60):
        image = Image.new("RGB", (16, 16), "white")
        left, top, width, height = generator.integers(0, 8, 4)
        colour = tuple(int(value) for value in generator.integers(0, 256, 3))
        draw = ImageDraw.Draw(image)
        shape = draw.ellipse if number % 2 else draw.rectangle
        shape((left, top, left + width + 3, top + height + 3), fill=colour)
        image.save(folder / f"{number}.png")
        entries.append(json.dumps({"file_name": f"{number}.png", "text": f"shape {number}"}))
    (folder / "metadata.jsonl").write_text("\n".join(entries))
    return folder


def toy_config(drawings, output_dir, **changes):
    settings = {
        "output_dir": str(output_dir),
        "data": DataConfig(
            sources=[SourceConfig(kind="imagefolder", path=str(drawings))], image_size=16, held_out_fraction=0.2
        ),
        "block_out_channels": [8, 16],
        "norm_num_groups": 4,
        "num_steps": 200,
        "batch_size": 8,
        "lr": 3e-3,
        "warmup_steps": 10,
        "ema_decay": 0.95,
        "mixed_precision": "no",
    }
    return AutoencoderTrainingConfig(**(settings | changes))


@pytest.fixture(scope="module")
def trained(drawings, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("vae")
    metrics = train_codec(toy_config(drawings, output_dir), torch.device("cpu"))
    return output_dir, metrics


def drawing_arrays(drawings):
    return np.stack([load_image(path, 16) for path in sorted(drawings.glob("*.png"))])


def test_training_learns_to_reconstruct(trained, drawings):
    output_dir, metrics = trained
    images = drawing_arrays(drawings)
    # What somebody who knows only the mean image would score.
    blind = (to_pixels(images) - to_pixels(images).mean(dim=0)).div(2).square().mean(dim=(1, 2, 3))
    assert metrics["psnr_held_out"] > float((-10 * blind.log10()).mean()) + 3
    assert metrics["log"][-1]["l1"] < 0.2
    assert abs(metrics["psnr_train"] - metrics["psnr_held_out"]) < 4
    assert metrics["num_train_images"] + metrics["num_held_out_images"] == 60
    assert 0 < metrics["latent_noise"] < 0.5
    assert json.loads((output_dir / "metrics.json").read_text()) == metrics
    assert yaml.safe_load((output_dir / "config.yaml").read_text())["batch_size"] == 8
    assert Image.open(output_dir / "reconstructions.png").width > 1000
    # Stored as asked, in half precision.
    assert metrics["weight_bytes"] < 2.2 * metrics["num_parameters"] + 20_000


def test_latents_of_the_training_images_are_normalised(trained, drawings):
    output_dir, _ = trained
    autoencoder = Autoencoder.load(str(output_dir), "cpu")
    mean, std = autoencoder.encode(to_pixels(drawing_arrays(drawings)))
    torch.manual_seed(0)
    latents = (mean + std * torch.randn_like(mean)).transpose(0, 1).flatten(1)
    # A fifth of these images were held out when the statistics were taken.
    torch.testing.assert_close(latents.mean(dim=1), torch.zeros(4), atol=0.1, rtol=0)
    torch.testing.assert_close(latents.std(dim=1), torch.ones(4), atol=0.1, rtol=0)


def test_psnr_agrees_with_torchmetrics(trained, drawings):
    output_dir, _ = trained
    autoencoder = Autoencoder.load(str(output_dir), "cpu")
    images = drawing_arrays(drawings)[:10]
    values, reconstructions = measured(autoencoder, images, batch_size=4)
    expected = peak_signal_noise_ratio(
        (reconstructions + 1) / 2, torch.as_tensor(images).movedim(-1, 1) / 255, data_range=1.0, dim=(1, 2, 3),
        reduction="none",
    )  # fmt: skip
    torch.testing.assert_close(values, expected, atol=1e-3, rtol=1e-4)


def test_training_is_reproducible(drawings, tmp_path):
    fingerprints = []
    for name in ("a", "b"):
        train_codec(toy_config(drawings, tmp_path / name, num_steps=5), torch.device("cpu"))
        fingerprints.append(Autoencoder.load(str(tmp_path / name), "cpu").fingerprint)
    assert fingerprints[0] == fingerprints[1]


def test_training_goes_on_from_another_autoencoder(trained, drawings, tmp_path):
    begun, _ = trained
    # So short a step that nothing but the beginning is left.
    config = toy_config(drawings, tmp_path / "on", init_from=str(begun), num_steps=1, lr=1e-12, save_dtype="float32")
    train_codec(config, torch.device("cpu"))
    first, second = (Autoencoder.load(str(folder), "cpu").vae.state_dict() for folder in (begun, tmp_path / "on"))
    for name, weight in first.items():
        torch.testing.assert_close(second[name], weight, rtol=0, atol=1e-6)
    with pytest.raises(UserError, match="has other sizes than the configuration"):
        train_codec(dataclasses.replace(config, latent_channels=3), torch.device("cpu"))


def test_training_with_a_discriminator_runs(drawings, tmp_path):
    config = toy_config(drawings, tmp_path, num_steps=6, gan_weight=0.5, gan_start_step=3)
    assert math.isfinite(train_codec(config, torch.device("cpu"))["log"][-1]["loss"])


def test_discriminator_pulls_as_hard_as_it_should(drawings, tmp_path):
    config = toy_config(drawings, tmp_path, gan_weight=0.5, gan_start_step=3, kl_weight=0.0)
    torch.manual_seed(0)
    objective = Objective(config, torch.device("cpu"))
    last_layer = torch.nn.Parameter(torch.randn(3, 3, 1, 1))
    features, pixels = random_pixels(4), random_pixels(4).flip(0)

    def pull(step):
        reconstruction = F.conv2d(features, last_layer)
        losses = objective(pixels, reconstruction, torch.zeros(()), last_layer=last_layer, step=step)
        return torch.autograd.grad(losses.total, last_layer)[0]

    without, with_it = pull(step=2), pull(step=3)
    torch.testing.assert_close((with_it - without).norm(), 0.5 * without.norm(), rtol=1e-2, atol=0)


def test_discriminator_learns_to_tell(drawings, tmp_path):
    objective = Objective(toy_config(drawings, tmp_path, gan_weight=0.5), torch.device("cpu"))
    real, fake = torch.ones(4, 3, 16, 16), random_pixels(4)
    for _ in range(30):
        objective.train_discriminator(real, fake)
    assert objective.discriminator(real).mean() > 0.5
    assert objective.discriminator(fake).mean() < -0.5
    assert discriminator()(torch.zeros(1, 3, 64, 64)).shape[-1] == 15


def test_kl_is_weighed_against_summed_l1(drawings, tmp_path):
    vae = build(toy_config(drawings, tmp_path))
    pixels, reconstruction = random_pixels(4), random_pixels(4).flip(0)
    hidden = torch.randn(4, 8, 2, 2, generator=torch.Generator().manual_seed(1))
    bottleneck = GaussianBottleneck(vae, pixels=3 * 16 * 16, weight=0.25)
    _, penalty = bottleneck(hidden, torch.Generator().manual_seed(0))
    objective = Objective(toy_config(drawings, tmp_path), torch.device("cpu"))
    losses = objective(pixels, reconstruction, penalty, last_layer=torch.nn.Parameter(pixels), step=0)
    mean, log_variance = hidden.chunk(2, dim=1)
    kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum(dim=(1, 2, 3))
    summed = (pixels - reconstruction).abs().sum(dim=(1, 2, 3)) + 0.25 * kl
    torch.testing.assert_close(losses.total, summed.mean() / (3 * 16 * 16))
    assert bottleneck.report()["kl"] == pytest.approx(float(kl.mean()) / (3 * 16 * 16))


def test_perceptual_distance_comes_from_a_local_file(drawings, tmp_path):
    with pytest.raises(UserError, match=r"needs perceptual_path.*vgg16"):
        Objective(toy_config(drawings, tmp_path, perceptual_weight=1.0), torch.device("cpu"))
    vgg = torchvision.models.vgg16()
    weights = {name: value for name, value in vgg.state_dict().items() if name.startswith("features")}
    torch.save(weights, tmp_path / "vgg16.pth")
    config = toy_config(
        drawings, tmp_path, perceptual_weight=1.0, perceptual_path=str(tmp_path / "vgg16.pth"), kl_weight=0.0
    )
    objective = Objective(config, torch.device("cpu"))
    pixels = random_pixels(2, 32)
    other = pixels.flip(0).requires_grad_()

    # LPIPS (Zhang et al. 2018, equation 1), written down once more.
    from torchmetrics.functional.image import lpips

    heads = torch.load(Path(lpips.__file__).parent / "lpips_models" / "vgg.pth", map_location="cpu", weights_only=True)
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    first, second = (((images - shift.view(3, 1, 1)) / scale.view(3, 1, 1)) for images in (pixels, other))
    expected, level = torch.zeros(2), 0
    for number, layer in enumerate(vgg.features):
        first, second = layer(first), layer(second)
        if number in (3, 8, 15, 22, 29):
            difference = (F.normalize(first, dim=1) - F.normalize(second, dim=1)).square()
            expected = expected + F.conv2d(difference, heads[f"lin{level}.model.1.weight"]).mean(dim=(1, 2, 3))
            level += 1
    losses = objective(pixels, other, torch.zeros(()), last_layer=torch.nn.Parameter(pixels), step=0)
    torch.testing.assert_close(losses.total - losses.l1, expected.mean(), rtol=1e-3, atol=1e-6)
    losses.total.backward()
    assert other.grad.abs().sum() > 0

    torch.save({"x": torch.zeros(1)}, tmp_path / "vgg16.pth")
    with pytest.raises(UserError, match="not a state dict"):
        Objective(config, torch.device("cpu"))


def test_configurations_that_do_not_fit(drawings, tmp_path):
    cpu = torch.device("cpu")
    with pytest.raises(UserError, match="multiple of 4"):
        train_codec(toy_config(drawings, tmp_path, data=DataConfig(image_size=18), block_out_channels=[8, 8, 8]), cpu)
    with pytest.raises(UserError, match="norm_num_groups 3"):
        train_codec(toy_config(drawings, tmp_path, norm_num_groups=3), cpu)
    config = toy_config(drawings, tmp_path)
    config.data.held_out_fraction = 0.0
    with pytest.raises(UserError, match="no image is held out"):
        train_codec(config, cpu)
    config.data.sources = [SourceConfig(kind="text", path="x")]
    with pytest.raises(UserError, match="no readable image"):
        train_codec(config, cpu)
    with pytest.raises(UserError, match="not finite at step 3"):
        train_codec(toy_config(drawings, tmp_path, lr=1e30, num_steps=3, warmup_steps=0), cpu)


def test_published_config_fits_its_promise():
    config = parse_config(AutoencoderTrainingConfig, ["--config", str(ROOT / "configs/vae/emoji.yaml")], "")
    vae = build(config)
    assert sum(parameter.numel() for parameter in vae.parameters()) <= 4_000_000
    autoencoder = Autoencoder(vae)
    assert (autoencoder.latent_channels, autoencoder.downsampling) == (4, 4)


def test_command_ends_on_a_user_error_with_one_line(tmp_path):
    words, log = ["-m", "transfusion_mot.autoencoder", "num_stepz=3", f"output_dir={tmp_path}"], tmp_path / "log"
    assert run_script(words, ROOT, {}, log) == 2
    assert "num_steps" in log.read_text()
    assert "Traceback" not in log.read_text()


def test_a_codec_or_a_run_is_not_written_over(tmp_path):
    for name in ("config.json", "model_index.json", "state"):
        (tmp_path / name).mkdir()
        with pytest.raises(UserError, match=rf"holds .*\({name}\), which would be overwritten; choose another"):
            main([f"output_dir={tmp_path}", "data.sources=[{kind: openmoji}]"])
        (tmp_path / name).rmdir()


# --- augmentation --------------------------------------------------------------------------------------------------


def augmented(image, batch, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return augment(image.expand(batch, -1, -1, -1).clone(), generator)


def flag_shape():
    """An asymmetric grey drawing with room around it: pixels [1, 3, 32, 32]."""
    drawing = torch.ones(1, 3, 32, 32)
    drawing[..., 8:24, 10] = -1.0
    drawing[..., 8:14, 11:20] = 0.25
    return drawing


def test_augmentation_makes_all_eight_symmetries_and_all_shifts():
    drawing = flag_shape()
    symmetries = [flipped.rot90(turns, (-2, -1)) for flipped in (drawing, drawing.flip(-1)) for turns in range(4)]
    expected = {
        (number, down, right): symmetry.roll((down, right), (-2, -1))[0]
        for number, symmetry in enumerate(symmetries)
        for down in range(-2, 3)
        for right in range(-2, 3)
    }
    seen = []
    for result in augmented(drawing, 400):
        if result.unique().numel() == 3 and result.min() == -1.0:
            matching = [key for key, candidate in expected.items() if candidate.equal(result)]
            assert len(matching) == 1, "a symmetry and a shift, without blur"
            seen += matching
    assert len(seen) > 100, "about half of the images keep their colours"
    assert {key[0] for key in seen} == set(range(8))
    assert {key[1] for key in seen} == {key[2] for key in seen} == set(range(-2, 3))


def test_augmentation_keeps_white_white_and_changes_colours():
    assert augmented(torch.ones(1, 3, 32, 32), 50).eq(1.0).all()
    red = torch.ones(1, 3, 32, 32)
    red[:, 1:] = -1.0
    centres = augmented(red, 400)[:, :, 16, 16]
    assert centres.min() >= -1.0
    assert centres.max() <= 1.0
    kept = (centres == red[:, :, 16, 16]).all(dim=1)
    assert 0.4 < kept.float().mean() < 0.6
    strongest = centres[~kept].argmax(dim=1)
    assert set(strongest.tolist()) == {0, 1, 2}, "channels change places"


def test_augmentation_depends_on_the_generator_alone():
    drawing = flag_shape()
    assert augmented(drawing, 8, seed=3).equal(augmented(drawing, 8, seed=3))
    assert not augmented(drawing, 8, seed=3).equal(augmented(drawing, 8, seed=4))
    same = drawing.expand(8, -1, -1, -1)
    before = same.clone()
    augment(same, torch.Generator().manual_seed(0))
    assert same.equal(before), "the input is left alone"


def test_weights_that_are_brought_part_by_part_encode_and_decode_the_same(random_vae) -> None:
    """As diffusers' sequential offload does it: between calls the weights are on `meta`."""
    plain = Autoencoder.load(str(random_vae), "cpu")
    vae = cpu_offload(copy.deepcopy(plain.vae), execution_device=torch.device("cpu"))
    assert vae.device.type == "meta"
    brought = Autoencoder(vae)
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    for one, two in zip(plain.encode(pixels), brought.encode(pixels), strict=True):
        torch.testing.assert_close(one, two)
    latents = torch.randn(2, plain.latent_channels, 4, 4)
    torch.testing.assert_close(plain.decode(latents), brought.decode(latents))
