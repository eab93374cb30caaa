"""Training of a VQ tokenizer, and the Chameleon setting with it, at toy size."""

import json
import math
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import VQModel
from PIL import Image
from test_autoencoder import drawings, random_pixels, toy_config  # noqa: F401
from test_pipeline_codes import tiny_vq

from transfusion_mot.codec_training.bottlenecks import CodeBottleneck, codebook_use
from transfusion_mot.codec_training.train import _DecoderWithoutLast, _set_vector_length, build, train_codec
from transfusion_mot.codecs.image_codes import ImageCodes
from transfusion_mot.config import AutoencoderTrainingConfig, parse_config
from transfusion_mot.data.images import load_image, to_pixels
from transfusion_mot.errors import UserError

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def hidden_of(model, seed, batch=2):
    return torch.randn(batch, 3, 4, 4, generator=generator(seed), requires_grad=True)


# --- the bottleneck ------------------------------------------------------------------------------------------------


def test_codes_and_the_commitment_are_those_of_a_loop():
    model = tiny_vq(codebook=7)
    bottleneck = CodeBottleneck(model, weight=0.25, is_new=False)
    codebook = bottleneck.codebook.clone()
    hidden = hidden_of(model, seed=1)
    passed = bottleneck(hidden, generator())
    vectors = model.quant_conv(hidden)
    expected, squares = torch.empty(2, 3, 4, 4), []
    for image in range(2):
        for y in range(4):
            for x in range(4):
                vector = vectors[image, :, y, x] / vectors[image, :, y, x].norm()
                code = min(codebook, key=lambda entry: float((vector - entry).square().sum()))
                expected[image, :, y, x] = code
                squares += (vector - code).square().tolist()
    torch.testing.assert_close(passed.latents, model.post_quant_conv(expected))
    assert float(passed.penalty) == pytest.approx(0.25 * sum(squares) / len(squares), rel=1e-5)


def test_the_gradient_behind_the_codes_is_that_of_the_vectors():
    model = tiny_vq(codebook=7)
    hidden = hidden_of(model, seed=2)
    # Without a commitment, so that it is the decoder's alone.
    passed = CodeBottleneck(model, weight=0.0, is_new=False)(hidden, generator())
    wanted = torch.randn(2, 3, 4, 4, generator=generator(3))
    (gradient,) = torch.autograd.grad((passed.latents * wanted).sum() + passed.penalty, hidden)
    straight = model.post_quant_conv(F.normalize(model.quant_conv(hidden), dim=1))
    (expected,) = torch.autograd.grad((straight * wanted).sum(), hidden)
    torch.testing.assert_close(gradient, expected)
    assert not model.quantize.embedding.weight.requires_grad


def test_codes_follow_the_mean_of_their_vectors():
    model = tiny_vq(codebook=5)
    bottleneck = CodeBottleneck(model, weight=0.25, is_new=False, decay=0.9, dead_after=1000)
    sums = [entry.clone() for entry in bottleneck.codebook]
    for step in range(3):
        hidden = hidden_of(model, seed=step)
        vectors = F.normalize(model.quant_conv(hidden), dim=1).movedim(1, -1).reshape(-1, 3).detach()
        codebook = bottleneck.codebook.clone()
        bottleneck(hidden, generator())
        taken = [[] for _ in sums]
        for vector in vectors:
            taken[int((codebook @ vector).argmax())].append(vector)
        sums = [
            0.9 * total + 0.1 * sum(vectors, torch.zeros(3)) for total, vectors in zip(sums, taken, strict=True)
        ]  # fmt: skip
        expected = torch.stack([total / total.norm() for total in sums])
        torch.testing.assert_close(bottleneck.codebook, expected)
    assert model.quantize.embedding.weight.data_ptr() == bottleneck.codebook.data_ptr()


def test_a_code_that_nothing_takes_begins_again_at_a_vector_of_the_batch():
    model = tiny_vq(codebook=4)
    bottleneck = CodeBottleneck(model, weight=0.25, is_new=False, dead_after=3)
    # All in one half of the sphere.
    with torch.no_grad():
        model.quant_conv.bias[0] = 5.0
    hidden = hidden_of(model, seed=1)
    vectors = F.normalize(model.quant_conv(hidden), dim=1).movedim(1, -1).reshape(-1, 3).detach()
    lost = -F.normalize(vectors.mean(dim=0), dim=0)
    bottleneck.codebook.copy_(torch.stack([vectors[0], vectors[5], lost, lost]))
    bottleneck.sums.copy_(bottleneck.codebook)
    for _ in range(2):
        bottleneck(hidden, generator(1))
        torch.testing.assert_close(bottleneck.codebook[2:], torch.stack([lost, lost]))
    assert bottleneck.report()["codebook_use"] == 0.5
    bottleneck(hidden, generator(1))
    for code in bottleneck.codebook[2:]:
        assert (vectors - code).norm(dim=1).min() < 1e-5
    assert bottleneck.unused.tolist() == [0, 0, 0, 0]
    bottleneck.report()
    bottleneck(hidden, generator(1))
    assert bottleneck.report()["codebook_use"] == 1


def test_a_new_codebook_begins_at_the_vectors_that_are_furthest_from_its_codes():
    model = tiny_vq(codebook=8)
    with torch.no_grad():
        model.quant_conv.weight.copy_(torch.eye(3)[:, :, None, None])
        model.quant_conv.bias.zero_()
    bottleneck = CodeBottleneck(model, weight=0.25)
    common, rare = bottleneck.codebook[0].clone(), -bottleneck.codebook[:4].mean(dim=0)
    # Sixty-three vectors that are a code already, and a single one that is far from any.
    hidden = common.view(1, 3, 1, 1).repeat(1, 1, 8, 8)
    hidden[0, :, 3, 5] = rare
    bottleneck.codebook.copy_(
        torch.stack([common, *(F.normalize(common + 0.1 * torch.eye(3)[k % 3], dim=0) for k in range(7))])
    )
    bottleneck.sums.copy_(bottleneck.codebook)
    bottleneck(hidden, generator())
    used = int((bottleneck._counts > 0).sum())
    at_rare = (bottleneck.codebook - F.normalize(rare, dim=0)).norm(dim=1) < 1e-5
    assert int(at_rare.sum()) >= 8 - used


def test_use_and_perplexity_of_codes():
    assert codebook_use(torch.tensor([4, 4, 0, 4, 4])) == pytest.approx((0.8, 4.0))
    shares = [0.5, 0.25, 0.25]
    entropy = -sum(share * math.log(share) for share in shares)
    assert codebook_use(torch.tensor([2, 1, 1])) == pytest.approx((1.0, math.exp(entropy)))


def test_longer_vectors_take_the_same_codes():
    model = tiny_vq(codebook=31)
    CodeBottleneck(model, weight=0.25)
    pixels = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3)).astype(np.uint8)
    before = ImageCodes(model).encode(to_pixels(pixels))
    _set_vector_length(model, pixels, batch_size=6)
    assert model.encode(to_pixels(pixels)).latents.norm(dim=1).mean() == pytest.approx(8.0, rel=1e-4)
    assert torch.equal(ImageCodes(model).encode(to_pixels(pixels)), before)


def test_the_decoder_is_its_body_and_its_last_layer():
    decoder = tiny_vq().decoder
    latents = torch.randn(2, 3, 4, 4, generator=generator())
    torch.testing.assert_close(decoder.conv_out(_DecoderWithoutLast(decoder)(latents)), decoder(latents))


# --- the command ---------------------------------------------------------------------------------------------------

CODES = {"kind": "codes", "latent_channels": 4, "codebook_size": 32}


@pytest.fixture(scope="module")
def trained(drawings, tmp_path_factory):  # noqa: F811
    output_dir = tmp_path_factory.mktemp("vq")
    metrics = train_codec(toy_config(drawings, output_dir, **CODES), torch.device("cpu"))
    return output_dir, metrics


def pictures(drawings):  # noqa: F811
    return to_pixels(np.stack([load_image(path, 16) for path in sorted(drawings.glob("*.png"))]))


def test_training_learns_to_reconstruct_and_uses_its_codes(trained, drawings):  # noqa: F811
    _, metrics = trained
    pixels = pictures(drawings)
    blind = (pixels - pixels.mean(dim=0)).div(2).square().mean(dim=(1, 2, 3))
    assert metrics["psnr_held_out"] > float((-10 * blind.log10()).mean()) + 2
    last = metrics["log"][-1]
    assert last["codebook_use"] > 0.8
    assert last["perplexity"] > 8
    assert 0 < metrics["codebook_use"] <= 1 <= metrics["perplexity"] <= 32
    assert "latent_noise" not in metrics


def test_the_saved_folder_is_a_plain_model_of_diffusers_with_the_codes_of_training(trained, drawings):  # noqa: F811
    output_dir, _ = trained
    model = VQModel.from_pretrained(output_dir).float().eval()
    codec = ImageCodes.load(str(output_dir), "cpu")
    pixels = pictures(drawings)
    with torch.no_grad():
        codes = codec.encode(pixels)
        # What diffusers does from pixels to pixels, codes and all.
        torch.testing.assert_close(codec.decode(codes), model(pixels).sample.clamp(-1, 1))
        # Codes point as nearly in the direction of the vectors as those that training would give.
        vectors = F.normalize(model.encode(pixels).latents, dim=1).movedim(1, -1)
        cosines = vectors @ F.normalize(model.quantize.embedding.weight, dim=1).T
    chosen = cosines.gather(-1, codes[..., None])[..., 0]
    torch.testing.assert_close(chosen, cosines.amax(-1), rtol=0, atol=1e-3)
    assert model.config.num_vq_embeddings == codec.codebook_size == 32
    assert json.loads((output_dir / "metrics.json").read_text())["weight_bytes"] < 2.2 * 1e5


def test_training_goes_on_from_another_tokenizer(trained, drawings, tmp_path):  # noqa: F811
    begun, _ = trained
    config = toy_config(drawings, tmp_path, init_from=str(begun), num_steps=1, lr=1e-12, **CODES)
    train_codec(config, torch.device("cpu"))
    first, second = (ImageCodes.load(str(folder), "cpu") for folder in (begun, tmp_path))
    pixels = pictures(drawings)
    assert float((first.encode(pixels) == second.encode(pixels)).float().mean()) > 0.9
    with pytest.raises(UserError, match="codebook_size as num_vq_embeddings there"):
        train_codec(toy_config(drawings, tmp_path, init_from=str(begun), **CODES | {"codebook_size": 16}), "cpu")
    with pytest.raises(UserError, match="is of class VQModel; an AutoencoderKL is needed"):
        train_codec(toy_config(drawings, tmp_path, init_from=str(begun)), torch.device("cpu"))


def test_a_discriminator_trains_beside_codes(drawings, tmp_path):  # noqa: F811
    config = toy_config(drawings, tmp_path, num_steps=4, gan_weight=0.5, gan_start_step=2, **CODES)
    metrics = train_codec(config, torch.device("cpu"))
    assert math.isfinite(metrics["log"][-1]["loss"])


def test_the_published_tokenizer_is_that_of_its_configuration():
    config = parse_config(AutoencoderTrainingConfig, ["--config", str(ROOT / "configs/codecs/vq-emoji.yaml")], "")
    expected = build(config)
    folder = ROOT / "checkpoints/vq-emoji"
    codec = ImageCodes.load(str(folder), "cpu")
    assert {name: weight.shape for name, weight in codec.model.state_dict().items()} == {
        name: weight.shape for name, weight in expected.state_dict().items()
    }
    assert (codec.codebook_size, codec.downsampling) == (4096, 8)
    assert (folder / "diffusion_pytorch_model.safetensors").stat().st_size < 8e6
    # Its colours and large shapes survive: a yellow disc on white.
    pixels = torch.ones(1, 3, 64, 64)
    y, x = torch.meshgrid(torch.arange(64) - 32, torch.arange(64) - 32, indexing="ij")
    pixels[:, :, y**2 + x**2 < 400] = torch.tensor([0.9, 0.6, -0.8])[None, :, None]
    error = (codec.decode(codec.encode(pixels)) - pixels).div(2).square().mean()
    assert -10 * float(error.log10()) > 20


# --- the setting ---------------------------------------------------------------------------------------------------


def run_here(script, *words):
    """A script with arguments, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *map(str, words)])
        patch.setenv("ACCELERATE_USE_CPU", "true")
        runpy.run_path(str(ROOT / script), run_name="__main__")


def test_the_chameleon_setting_trains_paints_captions_and_is_measured(trained, drawings, tmp_path, capsys):  # noqa: F811
    pytest.importorskip("efficientnet_lite_pytorch")
    codec, _ = trained
    run = tmp_path / "run"
    tower = "{hidden_size: 32, intermediate_size: 32, dropout: 0.1}"
    small = {
        "output_dir": run,
        "data.sources": f"[{{kind: imagefolder, path: {drawings}}}]",
        "data.image_size": 16,
        # Four pictures of 64 codes and a start.
        "data.slots": "{text: 64, image: 260}",
        "data.num_workers": 0,
        "data.cache_dir": tmp_path / "cache",
        "data.held_out_fraction": 0.2,
        "codecs.image.path": codec,
        "tokenizer.vocab_size": 300,
        "model.num_layers": 1,
        "model.num_heads": 2,
        "model.head_dim": 16,
        "model.towers": f"{{text: {tower}, image: {tower}}}",
        "training.num_steps": 4,
        "training.num_rows": 2,
        "training.mixed_precision": "no",
        "training.validate_every": 0,
        "training.num_validation_documents": 4,
        "training.sample_prompts": "[shape 1]",
        "training.tracker": "null",
    }
    config = ROOT / "configs/settings/chameleon.yaml"
    run_here("train.py", "--config", config, *(f"{key}={value}" for key, value in small.items()))
    assert "image_loss" in (run / "metrics.jsonl").read_text()
    assert len(list((run / "samples").glob("*.png"))) == 2

    painted = tmp_path / "painted"
    words = ["--checkpoint", run, "shape 3", "--code-top-k", 9, "--code-temperature", 0.9, "--output", painted]
    run_here("sample.py", *words)
    line = json.loads((painted / "metadata.jsonl").read_text())
    assert (line["code_top_k"], line["guidance_scale"]) == (9, 3.0)
    assert not {"num_inference_steps", "scheduler"} & set(line)
    assert Image.open(painted / line["file_name"]).size == (16, 16)
    with pytest.raises(SystemExit):
        run_here("sample.py", *words, "--scheduler", "DDIMScheduler")
    assert "--scheduler is given, but this model writes its pictures as codes" in capsys.readouterr().err

    words = ["--checkpoint", run, "--features", "efficientnet", "--batch-size", 8, "training_images=0"]
    words += ["captions.max_new_tokens=4", "code_temperature=0.8", "--output", tmp_path / "measured"]
    run_here("evaluate/benchmark.py", *words, "sweep.guidance_scale=[1,3]", "sweep.code_top_k=[5]")
    report = (tmp_path / "measured" / "metrics.md").read_text()
    assert "| guidance | temperature | top-p | top-k | " in report
    assert "| 3 | 0.8 | 1 | 5 | " in report
    assert "loss of image codes (conditional)" in report
    with pytest.raises(SystemExit):
        run_here("evaluate/benchmark.py", *words, "sweep.num_inference_steps=[3]")
    assert "sweep.num_inference_steps is given, but has no effect on this model" in capsys.readouterr().err
