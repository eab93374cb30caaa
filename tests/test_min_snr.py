"""Min-SNR weights: against the paper's formulas with diffusers' signal-to-noise ratio, and in a training step."""

import pytest
import torch
from conftest import tiny_config, tiny_model
from diffusers.training_utils import compute_snr
from test_losses import make_batch
from test_validation import held_out, make_validation

from transfusion_mot.config import DiffusionConfig
from transfusion_mot.data.tokenizer import train_tokenizer
from transfusion_mot.diffusion import Diffusion
from transfusion_mot.models.inputs import LatentInput, TokenInput
from transfusion_mot.models.modalities import Terms
from transfusion_mot.models.transfusion import TransfusionMoT
from transfusion_mot.schedulers import make_scheduler
from transfusion_mot.training.step import loss_terms

FLOW = "FlowMatchEulerDiscreteScheduler"
COSINE = {"beta_schedule": "squaredcos_cap_v2"}
KINDS = [
    (FLOW, {}),
    (FLOW, {"shift": 3.0}),
    *(("DDPMScheduler", {**COSINE, "prediction_type": kind}) for kind in ("epsilon", "sample", "v_prediction")),
]
GAMMA = 5.0


@pytest.mark.parametrize(("scheduler", "arguments"), KINDS)
def test_weighs_the_error_of_the_clean_latents(scheduler: str, arguments: dict) -> None:
    """Whatever is predicted, weight x squared error is min(SNR, gamma) x squared error of the clean latents."""
    diffusion = Diffusion(make_scheduler(scheduler, arguments), min_snr_gamma=GAMMA)
    generator = torch.Generator().manual_seed(0)
    latents, noise, error = torch.randn(3, 1, 2, 4, 4, generator=generator, dtype=torch.float64)
    for t in torch.tensor([0.005, 0.1, 0.3, 0.5, 0.7, 0.95], dtype=torch.float64):
        noisy = diffusion.add_noise(latents, noise, t[None])
        prediction = diffusion.target(latents, noise, t[None]) + error
        clean = diffusion.clean_estimate(prediction, noisy, t)
        signal = (noisy - diffusion.add_noise(0 * latents, noise, t[None])).norm() / latents.norm()
        deviation = diffusion.add_noise(0 * latents, noise, t[None]).norm() / noise.norm()
        expected = min(float(signal / deviation) ** 2, GAMMA) * (clean - latents).square().sum()
        found = diffusion.loss_weight(t[None]) * error.square().sum()
        torch.testing.assert_close(found[0], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_formulas_of_the_paper(kind: str) -> None:
    scheduler = make_scheduler("DDPMScheduler", {**COSINE, "prediction_type": kind})
    index = torch.tensor([0, 10, 200, 500, 900, 998])
    snr = compute_snr(scheduler, index).double()
    capped = snr.clamp(max=GAMMA)
    expected = {"epsilon": capped / snr, "sample": capped, "v_prediction": capped / (snr + 1)}[kind]
    found = Diffusion(scheduler, min_snr_gamma=GAMMA).loss_weight((index.double() + 1) / 1000)
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-9)


@pytest.mark.parametrize(("scheduler", "arguments"), KINDS)
def test_both_ends_have_a_weight(scheduler: str, arguments: dict) -> None:
    diffusion = Diffusion(make_scheduler(scheduler, arguments), min_snr_gamma=GAMMA)
    weights = diffusion.loss_weight(torch.tensor([0.0, 1.0]))
    assert weights.isfinite().all()
    assert (weights >= 0).all()


def test_off_is_off() -> None:
    assert Diffusion(make_scheduler(FLOW, {})).loss_weight(torch.rand(2, 3)) is None


def bias_of(model: TransfusionMoT) -> torch.Tensor:
    return model.modality("image").adapter.output.bias


def gradient_and_terms(gamma: float | None) -> tuple[torch.Tensor, dict[str, Terms]]:
    model = tiny_model(tiny_config(), diffusion=DiffusionConfig(min_snr_gamma=gamma))
    terms = loss_terms(model, make_batch())
    terms["image"].loss.backward()
    return bias_of(model).grad, terms


def test_training_is_weighted_and_the_log_is_not() -> None:
    batch = make_batch()
    model = tiny_model(tiny_config())
    _, plain = gradient_and_terms(None)
    gradient, terms = gradient_and_terms(GAMMA)
    torch.testing.assert_close(terms["image"].losses, plain["image"].losses)
    torch.testing.assert_close(terms["text"].loss, plain["text"].loss)
    given = batch.latents("image")
    t = given.timesteps
    weights = torch.minimum((1 - t) ** 2, GAMMA * t**2)
    torch.testing.assert_close(terms["image"].loss, (weights * terms["image"].losses).sum())

    # The gradient is the sum of those of each image alone, times its weight.
    expected = torch.zeros_like(gradient)
    noisy = (1 - t[..., None, None, None]) * given.latents + t[..., None, None, None] * given.noise
    inputs = {"text": TokenInput(batch.tokens("text").ids), "image": LatentInput(noisy, t)}
    for row, image in given.mask.nonzero().tolist():
        model.zero_grad()
        alone = torch.zeros_like(t)
        alone[row, image] = weights[row, image]
        prediction = model(inputs, batch.slots).predictions["image"]
        errors = (prediction - (given.noise - given.latents)).square().sum(dim=(2, 3, 4))
        (alone * errors).sum().backward()
        expected += bias_of(model).grad
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


def test_held_out_losses_are_not_weighted(accelerator) -> None:
    tokenizer = train_tokenizer(["a red apple"], 300, ("text", "image"))
    validation, model = make_validation(tokenizer, held_out())
    plain = validation.losses(model, accelerator)
    model.modality("image").diffusion.min_snr_gamma = GAMMA
    assert validation.losses(model, accelerator) == plain
