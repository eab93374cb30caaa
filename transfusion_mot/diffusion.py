"""The diffusion objective, built from a diffusers scheduler. All diffusion conventions are in this file.

A timestep t runs from 0 (clean) to 1 (noise) and `noisy = alpha(t) * clean + sigma(t) * noise`. A flow-matching
scheduler has alpha = 1 - t and sigma = t, after its shift. A DDPM-like scheduler of T training timesteps puts its
index i at t = (i + 1) / T, so that t = 0 is exactly clean.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, Self

import numpy as np
import torch
from diffusers import SchedulerMixin
from torch import Tensor

from transfusion_mot.config import DiffusionConfig
from transfusion_mot.schedulers import SMALLEST_ALPHAS_CUMPROD, is_flow, make_scheduler

PredictionType = Literal["epsilon", "sample", "v_prediction", "flow"]

# Largest root mean square, over an image, of the clean latents implied by predicted noise. Latents have unit variance,
# and their best estimates no more; the held-out images of a small model reach 1.25.
_LARGEST_CLEAN_RMS = 2.0


class Diffusion:
    """Noise, target and reverse process of one diffusers scheduler.

    Args:
        scheduler: A scheduler from `make_scheduler`, or one of a snapshot.
        timestep_distribution: Distribution of training timesteps.
        min_snr_gamma: Weighs the squared errors in training, see `loss_weight`; None is off.
    """

    def __init__(
        self,
        scheduler: SchedulerMixin,
        timestep_distribution: Literal["uniform", "logit_normal"] = "uniform",
        min_snr_gamma: float | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.timestep_distribution = timestep_distribution
        self.min_snr_gamma = min_snr_gamma
        self.num_train_timesteps: int = scheduler.config.num_train_timesteps
        self.prediction_type: PredictionType = "flow" if is_flow(scheduler) else scheduler.config.prediction_type
        if self.prediction_type != "flow":
            # sigma / alpha at t = 0, 1/T, ..., 1. Its linear interpolation is what diffusers' Euler scheduler uses
            # between training timesteps.
            alphas_cumprod = scheduler.alphas_cumprod.double()
            alphas_cumprod = torch.where(alphas_cumprod == 0, SMALLEST_ALPHAS_CUMPROD, alphas_cumprod)
            ratios = ((1 - alphas_cumprod) / alphas_cumprod).sqrt()
            self._noise_ratios = torch.cat([ratios.new_zeros(1), ratios])

    @classmethod
    def from_config(cls, config: DiffusionConfig) -> Self:
        """The objective of training; the sampler may have another scheduler."""
        scheduler = make_scheduler(config.scheduler, config.scheduler_args)
        return cls(scheduler, config.timestep_distribution, config.min_snr_gamma)

    def timesteps_from_uniform(self, uniform: Tensor) -> Tensor:
        """Uniform numbers in [0, 1) => training timesteps in (0, 1], same shape.

        `logit_normal` is sigmoid of a standard normal (Stable Diffusion 3, arXiv 2403.03206, section 3.1); a flow
        scheduler's shift is applied here as the scheduler applies it when sampling.
        """
        tiny = 1 / 2**24
        quantile = uniform.clamp(tiny, 1 - tiny)
        if self.timestep_distribution == "logit_normal":
            quantile = torch.special.ndtri(quantile).sigmoid()
        if self.prediction_type == "flow":
            shift = self.scheduler.config.shift
            return shift * quantile / (1 + (shift - 1) * quantile)
        return (quantile * self.num_train_timesteps).ceil() / self.num_train_timesteps

    def alpha_sigma(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Timesteps in [0, 1] => (alpha, sigma), same shape."""
        if self.prediction_type == "flow":
            return 1 - timesteps, timesteps
        if self._noise_ratios.device != timesteps.device:
            # Copied once: a copy in every step would make the host wait for the device.
            self._noise_ratios = self._noise_ratios.to(timesteps.device)
        ratios = self._noise_ratios.to(timesteps.dtype)
        position = timesteps * self.num_train_timesteps
        lower = position.floor().clamp(0, self.num_train_timesteps - 1)
        index = lower.long()
        ratio = torch.lerp(ratios[index], ratios[index + 1], position - lower)
        alpha = (1 + ratio**2).rsqrt()
        return alpha, ratio * alpha

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Clean latents [..., C, Y, X], noise of that shape, timesteps [...] => noisy latents."""
        alpha, sigma = (value[..., None, None, None] for value in self.alpha_sigma(timesteps))
        return alpha * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The target of the prediction; shapes as `add_noise`."""
        if self.prediction_type == "flow":
            return noise - latents
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return latents
        alpha, sigma = (value[..., None, None, None] for value in self.alpha_sigma(timesteps))
        return alpha * noise - sigma * latents

    def loss_weight(self, timesteps: Tensor) -> Tensor | None:
        """Weight of a prediction's squared error in training, of the shape of `timesteps`; None is 1 everywhere.

        Min-SNR (arXiv 2303.09556, equation 7) weighs the squared error of the clean latents by min(SNR, gamma), where
        SNR is alpha^2 / sigma^2. An error of the prediction is an error of the clean latents times 1 (sample),
        sigma / alpha (epsilon) or sigma (v and flow).
        """
        if self.min_snr_gamma is None:
            return None
        alpha, sigma = self.alpha_sigma(timesteps)
        signal, noise = alpha**2, self.min_snr_gamma * sigma**2
        if self.prediction_type == "sample":
            return (signal / sigma**2).clamp(max=self.min_snr_gamma)
        if self.prediction_type == "epsilon":
            return (noise / signal).clamp(max=1.0)
        return torch.minimum(signal, noise)

    def clean_estimate(self, prediction: Tensor, noisy_latents: Tensor, timestep: Tensor) -> Tensor:
        """The clean latents implied by a prediction [B, C, Y, X] for noisy ones; the timestep [] is on the CPU."""
        if self.prediction_type == "sample":
            return prediction
        alpha, sigma = map(float, self.alpha_sigma(timestep))
        if self.prediction_type == "flow":
            return noisy_latents - sigma * prediction
        if self.prediction_type == "epsilon":
            return (noisy_latents - sigma * prediction) / alpha
        return alpha * noisy_latents - sigma * prediction

    @torch.no_grad()
    def sample(
        self,
        predict: Callable[[Tensor, Tensor], Tensor],
        noise: Tensor,
        num_inference_steps: int,
        generators: list[torch.Generator] | None = None,
        on_step: Callable[[int, Tensor, Callable[[], Tensor]], bool | None] | None = None,
        variation: "Variation | None" = None,
    ) -> Tensor:
        """Noise [B, C, Y, X] => clean latents, by the scheduler's reverse process.

        Args:
            predict: (noisy latents [B, C, Y, X], timestep [] in [0, 1], on the CPU) => prediction [B, C, Y, X].
            noise: Standard normal.
            num_inference_steps: Reverse steps. A second-order scheduler calls `predict` twice in most of them.
            generators: One per image, for schedulers that draw noise in each step.
            on_step: Called after each call of `predict` with its index, the current latents and a function that returns
                the estimated clean latents => whether to stop.
            variation: An image to start from; None starts from noise alone.
        """
        scheduler = self.scheduler
        times = self.inference_timesteps(num_inference_steps, noise.device).to(noise.dtype)
        first = 0 if variation is None else variation.first_step(times)
        if hasattr(scheduler, "set_begin_index"):
            # Without it the first step looks its timestep up, and the host waits for the device.
            scheduler.set_begin_index(first)
        extra = {"generator": generators} if "generator" in inspect.signature(scheduler.step).parameters else {}
        latents = noise * getattr(scheduler, "init_noise_sigma", 1.0)
        if variation is not None:
            latents = self._for_solver(variation.clean, noise, times, first)
        for step in range(first, len(times)):
            timestep = scheduler.timesteps[step]
            scaled = latents
            if hasattr(scheduler, "scale_model_input"):
                scaled = scheduler.scale_model_input(latents, timestep)
            prediction = self._within_limit(predict(scaled, times[step]), scaled, times[step])
            if type(scheduler).__name__ == "DDIMScheduler":
                # It derives how far a step goes from their number, which is right where that divides the timesteps of
                # training (huggingface/diffusers#12633).
                distance = times[step] - (times[step + 1] if step + 1 < len(times) else 0)
                scheduler.num_inference_steps = Fraction(
                    self.num_train_timesteps, round(float(distance) * self.num_train_timesteps)
                )
            latents = scheduler.step(prediction, timestep, latents, **extra).prev_sample
            if variation is not None and variation.repaint is not None:
                latents = torch.where(
                    variation.repaint, latents, self._for_solver(variation.clean, noise, times, step + 1)
                )
            clean = functools.partial(self.clean_estimate, prediction, scaled, times[step])
            if on_step is not None and on_step(step, latents, clean):
                break
        return latents

    def _within_limit(self, prediction: Tensor, noisy_latents: Tensor, timestep: Tensor) -> Tensor:
        """Limit a prediction [B, C, Y, X] so that its clean latents are plausible; the timestep [] is on the CPU.

        An error of predicted noise is multiplied by sigma / alpha in the clean latents: by 20,000 at the start of a
        cosine schedule. An error of a few percent makes the first step leave latents with ten times the standard
        deviation that the network knows, and the next steps diverge further. Nichol and Dhariwal clip the clean image
        (`clip_denoised` in their code of arXiv 2102.09672). Latents have no bounds, so here they are scaled down as a
        whole; and it is done here because not all diffusers solvers can.
        """
        if self.prediction_type != "epsilon":
            return prediction
        alpha, sigma = map(float, self.alpha_sigma(timestep))
        clean = self.clean_estimate(prediction, noisy_latents, timestep)
        rms = clean.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
        # Without scaling, the prediction is unchanged to the last bit.
        return prediction + alpha / sigma * (1 - _LARGEST_CLEAN_RMS / rms).clamp(min=0) * clean

    def _for_solver(self, clean: Tensor, noise: Tensor, times: Tensor, step: int) -> Tensor:
        """Clean latents with the noise of the solver's next step, number `step`, in the solver's scale."""
        if step == len(times):
            return clean
        alpha, sigma = map(float, self.alpha_sigma(times[step]))
        noisy = alpha * clean + sigma * noise
        if not hasattr(self.scheduler, "scale_model_input"):
            return noisy
        # The model's input is proportional to the solver's latents.
        one = noise.new_ones(1)
        return noisy / self.scheduler.scale_model_input(one, self.scheduler.timesteps[step])

    def inference_timesteps(self, num_inference_steps: int, device: torch.device) -> Tensor:
        """Prepare to sample on a device => t in [0, 1] of each call of the model, on the CPU.

        All timesteps are computed in advance on the host, so no step waits for the device.
        """
        scheduler, count = self.scheduler, self.num_train_timesteps
        if self.prediction_type == "flow":
            # diffusers shifts the smallest noise of its two flow schedulers twice (huggingface/diffusers#13243).
            scheduler.sigma_min = 1 / count
            scheduler.set_timesteps(num_inference_steps, device=device)
            # The scheduler's timesteps are not used: some flow schedulers round them to integers.
            return scheduler.sigmas[: len(scheduler.timesteps)].cpu()
        if scheduler.config.get("use_karras_sigmas"):
            scheduler.set_timesteps(num_inference_steps, device=device)
            return (scheduler.timesteps.double().cpu() + 1) / count
        # Equidistant ones down from the last ("trailing" in table 2 of arXiv 2305.08891). Not those of diffusers, whose
        # rounding gives one too many for some numbers of steps, such as 61: index -1, which is pure noise again.
        last = count
        if "lambda_min_clipped" in scheduler.config:
            last = int((scheduler.lambda_t >= scheduler.config.lambda_min_clipped).sum())
        steps = min(num_inference_steps, last)
        timesteps = np.round(last - np.arange(steps) * (last / steps)).astype(np.int64) - 1
        if "timesteps" in inspect.signature(scheduler.set_timesteps).parameters:
            scheduler.set_timesteps(timesteps=timesteps.tolist(), device=device)
        else:
            scheduler.set_timesteps(steps, device=device)
            scheduler.timesteps = scheduler.timesteps[:steps]
            if hasattr(scheduler, "sigmas"):
                scheduler.sigmas = torch.cat([scheduler.sigmas[:steps], scheduler.sigmas[-1:]])
        repeats = [1] + [getattr(scheduler, "order", 1)] * (steps - 1)
        return (torch.from_numpy(timesteps).repeat_interleave(torch.tensor(repeats)).double() + 1) / count


@dataclass(frozen=True)
class Variation:
    """An image to start from, instead of noise alone.

    Attributes:
        clean: [B, C, Y, X], the latents of the image, which are noised to `strength` (SDEdit, arXiv 2108.01073).
        strength: Timestep to start at, in (0, 1]; the solver's nearest one is used.
        repaint: Bool, expands to [B, C, Y, X]: False where the image is kept. There it is restored after every step,
            with the noise level of that step.
    """

    clean: Tensor
    strength: float
    repaint: Tensor | None = None

    def first_step(self, times: Tensor) -> int:
        """Index of the first step; `times` [N] are the starts of the steps."""
        nearest = times[(times - self.strength).abs().argmin()]
        # A second-order solver has a time twice: as the end of a step, and as the beginning of the next.
        return int((times == nearest).nonzero()[-1])
