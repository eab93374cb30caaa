"""A network that predicts noise with an error of a few percent paints even if sigma / alpha is 20,000."""

import pytest
import torch
from torch import Tensor

from transfusion_mot.diffusion import Diffusion
from transfusion_mot.schedulers import fit_samplers, make_sampling_scheduler, make_scheduler

COSINE = make_scheduler("DDPMScheduler", {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "epsilon"})
MEAN, SPREAD = 0.3, 0.8


def best_noise(diffusion: Diffusion, noisy: Tensor, t: Tensor) -> Tensor:
    """The best prediction when every element of the data is normal."""
    alpha, sigma = map(float, diffusion.alpha_sigma(t.double()))
    return sigma * (noisy - alpha * MEAN) / (alpha**2 * SPREAD**2 + sigma**2)


@pytest.mark.parametrize("error", [-0.03, 0.03])
@pytest.mark.parametrize("sampler", fit_samplers(COSINE))
def test_small_errors_of_predicted_noise_stay_small(sampler: str, error: float) -> None:
    """A real network has seen no noisy latents beyond those of training, and is wrong about them; none are shown."""
    diffusion = Diffusion(make_sampling_scheduler(COSINE, sampler))
    noise = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(0))

    def predict(noisy: Tensor, t: Tensor) -> Tensor:
        assert noisy.abs().max() < 6
        return best_noise(diffusion, noisy, t) * (1 + error)

    generators = [torch.Generator().manual_seed(seed) for seed in range(len(noise))]
    result = diffusion.sample(predict, noise, 50, generators)
    assert result.mean().item() == pytest.approx(MEAN, abs=0.05)
    assert result.std().item() == pytest.approx(SPREAD, abs=0.25)


@pytest.mark.parametrize("sampler", fit_samplers(COSINE))
def test_images_of_strong_colours_are_still_reached(sampler: str) -> None:
    """Clean latents that are rare, but not wrong: of 1.8 times the deviation of all, some of 20 times."""
    diffusion = Diffusion(make_sampling_scheduler(COSINE, sampler))
    generator = torch.Generator().manual_seed(0)
    noise, clean = torch.randn(2, 2, 4, 16, 16, generator=generator, dtype=torch.float64)
    clean *= 1.8 / clean.square().mean().sqrt()
    clean[1] /= 3
    clean[1, 0, :2, :2] = 20

    def predict(noisy: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = map(float, diffusion.alpha_sigma(t.double()))
        return (noisy - alpha * clean) / sigma

    result = diffusion.sample(predict, noise, 50, [torch.Generator().manual_seed(seed) for seed in range(2)])
    torch.testing.assert_close(result, clean, rtol=0, atol=0.02)
