"""The image objective, built from a diffusers scheduler: the only place that knows a diffusion convention.

A timestep t runs from 0 (clean) to 1 (noise) and `noisy = alpha(t) * clean + sigma(t) * noise`. A flow-matching
scheduler has alpha = 1 - t and sigma = t, after its shift. A DDPM-like scheduler of T training timesteps puts its
index i at t = (i + 1) / T, so that t = 0 is exactly clean.
"""

import inspect
from collections.abc import Callable
from typing import Any, Literal

import diffusers
import torch
from diffusers import SchedulerMixin
from torch import Tensor

from transfusion_mot.errors import UserError

PredictionType = Literal["epsilon", "sample", "v_prediction", "flow"]

# What each prediction type can be trained with, and sampled with.
FLOW_SCHEDULERS = (
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
)
VARIANCE_PRESERVING_SCHEDULERS = (
    "DDPMScheduler",
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
    "EulerDiscreteScheduler",
)
# HeunDiscreteScheduler is missing on purpose: on a cosine schedule its first step jumps over most of the noise, and a
# perfect network for normal data of deviation 0.5 is sampled with 5.2 in 10 steps.
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")


def make_scheduler(name: str, arguments: dict[str, Any]) -> SchedulerMixin:
    """Build the scheduler that defines a training objective.

    DDPM-like schedulers get two defaults that latents need: no clipping of the predicted sample to [-1, 1], and
    sampling steps that start at pure noise (Lin et al., arXiv 2305.08891, section 3.3).

    Raises:
        UserError: An unknown class or argument.
    """
    known = ("FlowMatchEulerDiscreteScheduler", *VARIANCE_PRESERVING_SCHEDULERS)
    if name not in known:
        raise UserError(f"diffusion.scheduler '{name}' cannot define a training objective; known: {', '.join(known)}")
    scheduler_class = getattr(diffusers, name)
    accepted = inspect.signature(scheduler_class.__init__).parameters
    if unknown := set(arguments) - set(accepted):
        raise UserError(
            f"diffusion.scheduler_args: {name} has no argument {sorted(unknown)}; it has {list(accepted)[1:]}"
        )
    if arguments.get("prediction_type", "epsilon") not in PREDICTION_TYPES:
        raise UserError(
            f"diffusion.scheduler_args has prediction_type '{arguments['prediction_type']}'; {name} knows "
            f"{', '.join(PREDICTION_TYPES)} (flow comes with FlowMatchEulerDiscreteScheduler)"
        )
    defaults = {"clip_sample": False, "timestep_spacing": "trailing"}
    try:
        scheduler = scheduler_class(**{key: value for key, value in defaults.items() if key in accepted} | arguments)
        scheduler.set_timesteps(2)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise UserError(f"diffusion.scheduler_args {arguments} do not make a {name}: {error}") from None
    return scheduler


def make_sampling_scheduler(trained: SchedulerMixin, name: str) -> SchedulerMixin:
    """A scheduler of class `name` that reverses the noise schedule of `trained`.

    Raises:
        UserError: The class does not fit what the model was trained to predict.
    """
    flow = is_flow(trained)
    fit = FLOW_SCHEDULERS if flow else VARIANCE_PRESERVING_SCHEDULERS
    if name not in fit:
        kind = "flow" if flow else trained.config.prediction_type
        raise UserError(
            f"scheduler '{name}' does not fit a model trained with {kind} prediction; fit: {', '.join(fit)}"
        )
    scheduler_class = getattr(diffusers, name)
    if not flow:
        # The terminal signal-to-noise ratio of a cosine schedule is near zero; solvers in log-SNR need it bounded.
        bounded = {"lambda_min_clipped": -5.1} if name == "DPMSolverMultistepScheduler" else {}
        return scheduler_class.from_config(trained.config, **bounded)
    if name.startswith("FlowMatch"):
        return scheduler_class.from_config(trained.config)
    return scheduler_class(
        num_train_timesteps=trained.config.num_train_timesteps,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=trained.config.shift,
    )


def is_flow(scheduler: SchedulerMixin) -> bool:
    """Whether the scheduler mixes data and noise along a straight line."""
    return type(scheduler).__name__.startswith("FlowMatch") or bool(scheduler.config.get("use_flow_sigmas", False))


class Diffusion:
    """Noise, target and reverse process of one diffusers scheduler.

    Args:
        scheduler: A scheduler from `make_scheduler`, or one of a snapshot.
        timestep_distribution: Distribution of training timesteps.
    """

    def __init__(
        self,
        scheduler: SchedulerMixin,
        timestep_distribution: Literal["uniform", "logit_normal"] = "uniform",
    ) -> None:
        self.scheduler = scheduler
        self.timestep_distribution = timestep_distribution
        self.num_train_timesteps: int = scheduler.config.num_train_timesteps
        self.prediction_type: PredictionType = "flow" if is_flow(scheduler) else scheduler.config.prediction_type
        if self.prediction_type != "flow":
            # sigma / alpha at t = 0, 1/T, ..., 1. Its linear interpolation is what diffusers' Euler scheduler uses
            # between training timesteps.
            alphas_cumprod = scheduler.alphas_cumprod.double()
            # Pure noise at the end would give infinity; diffusers' Euler scheduler takes this number instead.
            alphas_cumprod = torch.where(alphas_cumprod == 0, 2**-24, alphas_cumprod)
            ratios = ((1 - alphas_cumprod) / alphas_cumprod).sqrt()
            self._noise_ratios = torch.cat([ratios.new_zeros(1), ratios])

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
            # Once: a copy from the host in every step would make it wait for the device.
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
        """What a perfect network predicts; shapes as `add_noise`."""
        if self.prediction_type == "flow":
            return noise - latents
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return latents
        alpha, sigma = (value[..., None, None, None] for value in self.alpha_sigma(timesteps))
        return alpha * noise - sigma * latents

    @torch.no_grad()
    def sample(
        self,
        predict: Callable[[Tensor, Tensor], Tensor],
        noise: Tensor,
        num_inference_steps: int,
        generators: list[torch.Generator] | None = None,
        on_step: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """Noise [B, C, Y, X] => clean latents, by the scheduler's reverse process.

        Args:
            predict: (noisy latents [B, C, Y, X], timestep [] in [0, 1]) => prediction [B, C, Y, X].
            noise: Standard normal.
            num_inference_steps: Reverse steps. A second-order scheduler calls `predict` twice in most of them.
            generators: One per image, for schedulers that draw noise in each step.
            on_step: Called after each call of `predict` with its index and the current latents.
        """
        scheduler = self.scheduler
        scheduler.set_timesteps(num_inference_steps, device=noise.device)
        if hasattr(scheduler, "set_begin_index"):
            # Else the first step looks its timestep up, and the host waits for the device.
            scheduler.set_begin_index(0)
        # All at once, for the same reason.
        times = self._network_times().to(noise)
        extra = {"generator": generators} if "generator" in inspect.signature(scheduler.step).parameters else {}
        latents = noise * getattr(scheduler, "init_noise_sigma", 1.0)
        for step, timestep in enumerate(scheduler.timesteps):
            scaled = latents
            if hasattr(scheduler, "scale_model_input"):
                scaled = scheduler.scale_model_input(latents, timestep)
            prediction = predict(scaled, times[step])
            latents = scheduler.step(prediction, timestep, latents, **extra).prev_sample
            if on_step is not None:
                on_step(step, latents)
        return latents

    def _network_times(self) -> Tensor:
        """t in [0, 1] of each of the scheduler's timesteps."""
        if self.prediction_type == "flow":
            # Not from its timesteps: some flow schedulers round those to integers.
            return self.scheduler.sigmas[: len(self.scheduler.timesteps)]
        return (self.scheduler.timesteps.double() + 1) / self.num_train_timesteps
