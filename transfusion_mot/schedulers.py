"""The diffusers schedulers that can train and sample a model, their accepted arguments, and conversion between them."""

import inspect
import math
from typing import Any

import diffusers
import numpy as np
from diffusers import SchedulerMixin

from transfusion_mot.errors import UserError

# Samplers for each kind of noise schedule. Those of the second kind can also define a training objective.
FLOW_SCHEDULERS = (
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
)
VARIANCE_PRESERVING_SCHEDULERS = (
    "DDPMScheduler",
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
    "EulerDiscreteScheduler",
)
# SDE-DPM-Solver++, which adds noise in every step: an argument of the class, which a snapshot or a command line names.
STOCHASTIC_SOLVER = "DPMSolverMultistepScheduler:sde"
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
# Arguments of a noise schedule without flow. Every class of diffusers knows these three schedules.
_NOISE_SCHEDULE = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
    "prediction_type",
)
_BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
# Other arguments and values with which a perfect network reproduces the image in any number of steps: a test runs each.
# The missing arguments of diffusers clip latents, leave noise, start or end elsewhere, or fail.
_ORDERS: dict[str, tuple[Any, ...]] = {"solver_order": (1, 2, 3)}
_KARRAS: dict[str, tuple[Any, ...]] = {"use_karras_sigmas": (False, True)}
_SAMPLING_ARGUMENTS: dict[str, dict[str, tuple[Any, ...]]] = {
    "FlowMatchEulerDiscreteScheduler": _KARRAS,
    "FlowMatchHeunDiscreteScheduler": {},
    "DPMSolverMultistepScheduler": {
        **_ORDERS,
        **_KARRAS,
        "solver_type": ("midpoint", "heun"),
        "lower_order_final": (False, True),
        "euler_at_final": (False, True),
    },
    "DPMSolverSinglestepScheduler": {**_ORDERS, **_KARRAS, "solver_type": ("midpoint", "heun")},
    "UniPCMultistepScheduler": {**_ORDERS, **_KARRAS},
    "DDPMScheduler": {"variance_type": ("fixed_small", "fixed_large")},
    "DDIMScheduler": {},
    "EulerDiscreteScheduler": _KARRAS,
    "HeunDiscreteScheduler": _KARRAS,
}
# Largest sigma / alpha that Heun's method starts from in few steps. Up to that of the linear schedule (157) it is as
# precise as the others; that of the cosine schedule (20,000) falls by orders of magnitude in the first step, and a
# perfect network for normal data of deviation 0.5 is sampled with 5.2 in 10 steps, 1.2 with Karras' noise levels.
_LARGEST_NOISE_RATIO_OF_HEUN = 200
# Solvers in log(alpha / sigma) start where it is at least this; at the end of a cosine schedule it is -10.
_SMALLEST_LOG_RATIO = -5.1
# The value that diffusers' Euler scheduler uses for an alpha^2 of zero, with which sigma / alpha would be infinite.
SMALLEST_ALPHAS_CUMPROD = 2**-24


def make_scheduler(name: str, arguments: dict[str, Any]) -> SchedulerMixin:
    """Build the scheduler that defines a training objective.

    DDPM-like schedulers get two defaults that latents need: no clipping of the predicted sample to [-1, 1], and
    sampling steps that start at pure noise (Lin et al., arXiv 2305.08891, section 3.3).

    Raises:
        UserError: An unknown class, an argument that breaks the conventions of this module, or an invalid noise
            schedule.
    """
    known = ("FlowMatchEulerDiscreteScheduler", *VARIANCE_PRESERVING_SCHEDULERS)
    if name not in known:
        raise UserError(f"diffusion.scheduler '{name}' cannot define a training objective; known: {', '.join(known)}")
    if arguments.get("prediction_type", "epsilon") not in PREDICTION_TYPES:
        raise UserError(
            f"diffusion.scheduler_args has prediction_type '{arguments['prediction_type']}'; {name} knows "
            f"{', '.join(PREDICTION_TYPES)} (flow comes with FlowMatchEulerDiscreteScheduler)"
        )
    flow = name.startswith("FlowMatch")
    accepted = inspect.signature(getattr(diffusers, name).__init__).parameters
    schedule = [key for key in (("num_train_timesteps", "shift") if flow else _NOISE_SCHEDULE) if key in accepted]
    sampling = sampling_arguments(name, flow)
    taken = f"it takes {', '.join(filter(None, (*schedule, _listed(sampling))))}"
    if unknown := sorted(set(arguments) - set(accepted)):
        raise UserError(f"diffusion.scheduler_args: {name} has no argument '{unknown[0]}'; {taken}")
    trained = {key: value for key, value in arguments.items() if key in schedule}
    trained["prediction_type"] = "flow" if flow else arguments.get("prediction_type", "epsilon")
    kept = {key: value for key, value in arguments.items() if value in sampling.get(key, ())}
    try:
        if arguments.get("num_train_timesteps", 2) < 2:
            raise ValueError("num_train_timesteps must be at least 2")
        scheduler = _build(name, trained, kept)
        _check_noise_schedule(scheduler)
        scheduler.set_timesteps(2)
    except (TypeError, ValueError, NotImplementedError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"diffusion.scheduler_args {arguments} do not make a {name}: {error}") from None
    for key in arguments.keys() - trained.keys() - kept.keys():
        # An argument that equals the default is harmless.
        if scheduler.config[key] != arguments[key]:
            raise UserError(
                f"diffusion.scheduler_args: {name} with {key}={arguments[key]!r} would make sampling differ from "
                f"training; leave it out ({taken})"
            )
    if name not in (fit := fit_samplers(scheduler)):
        raise UserError(
            f"diffusion.scheduler {name} cannot sample a model that it trains with {arguments}; use one of "
            f"{', '.join(other for other in known if other in fit)}"
        )
    return scheduler


def _listed(sampling: dict[str, tuple[Any, ...]]) -> str:
    return ", ".join(f"{key} ({', '.join(map(str, values))})" for key, values in sampling.items())


def sampling_arguments(name: str, flow: bool) -> dict[str, tuple[Any, ...]]:
    """Arguments and values of a sampler that match the training of a model.

    Args:
        name: From `fit_samplers`.
        flow: Whether the model predicts flow.
    """
    known = dict(_SAMPLING_ARGUMENTS[name.partition(":")[0]])
    if flow and not name.startswith("FlowMatch"):
        # These classes compute Karras' noise levels from betas.
        known.pop("use_karras_sigmas", None)
    if name == STOCHASTIC_SOLVER:
        # With order 3 the images have too much contrast, the more the more steps.
        known["solver_order"] = (1, 2)
    return known


def _check_noise_schedule(scheduler: SchedulerMixin) -> None:
    config = scheduler.config
    if is_flow(scheduler):
        _check_shift(config.shift)
        return
    if config.beta_schedule not in _BETA_SCHEDULES:
        raise UserError(
            f"diffusion.scheduler_args: beta_schedule is '{config.beta_schedule}'; known: {', '.join(_BETA_SCHEDULES)}"
        )
    if config.get("rescale_betas_zero_snr") and config.prediction_type == "epsilon":
        raise UserError(
            "diffusion.scheduler_args: rescale_betas_zero_snr needs prediction_type v_prediction or sample; at pure "
            "noise, epsilon has no information about the image (arXiv 2305.08891, section 3.2)"
        )
    alphas_cumprod = scheduler.alphas_cumprod
    # The last one may be zero, or a small value in place of zero.
    before, last = alphas_cumprod[:-1], alphas_cumprod[-1]
    falls = before[0] < 1 and before[-1] > 0 and (before.diff() < 0).all() and 0 <= last < 1
    if len(alphas_cumprod) != config.num_train_timesteps or not falls:
        raise UserError(
            f"diffusion.scheduler_args: the betas must be {config.num_train_timesteps} numbers, as many as "
            "num_train_timesteps, above 0 and below 1"
        )


def _check_shift(shift: Any) -> None:
    if not isinstance(shift, int | float) or not 0 < shift < math.inf:
        raise UserError(f"the scheduler's shift is {shift}; it must be a number above 0, 1 for none")


def trained_for(scheduler: SchedulerMixin) -> dict[str, Any]:
    """Prediction type and noise schedule of a scheduler, as JSON values: what a model is trained for."""
    config = scheduler.config
    if is_flow(scheduler):
        shift = config.get("shift", config.get("flow_shift"))
        return {"prediction_type": "flow", "num_train_timesteps": config.num_train_timesteps, "shift": shift}
    betas = config.trained_betas
    return {
        **{key: config.get(key, False) for key in _NOISE_SCHEDULE},
        "trained_betas": betas if betas is None else [float(beta) for beta in betas],
    }


def fit_samplers(trained: SchedulerMixin) -> tuple[str, ...]:
    """Names that `make_sampling_scheduler` accepts for a model trained with the noise schedule of `trained`."""
    if is_flow(trained):
        return *FLOW_SCHEDULERS, STOCHASTIC_SOLVER
    more = ("DPMSolverSinglestepScheduler", "HeunDiscreteScheduler", STOCHASTIC_SOLVER)
    before_last, last = trained.alphas_cumprod[-2:].double()
    unfit: set[str] = set()
    if ((1 - last) / last).sqrt() > _LARGEST_NOISE_RATIO_OF_HEUN:
        unfit.add("HeunDiscreteScheduler")
    if trained.config.get("rescale_betas_zero_snr"):
        # This class has no such argument.
        unfit.add("DPMSolverSinglestepScheduler")
        if before_last <= SMALLEST_ALPHAS_CUMPROD:
            # Its last timestep has less noise than the one before.
            unfit.add("EulerDiscreteScheduler")
        if trained.config.prediction_type == "epsilon":
            # These classes divide by alpha.
            unfit |= {"DDPMScheduler", "DDIMScheduler"}
    return tuple(name for name in (*VARIANCE_PRESERVING_SCHEDULERS, *more) if name not in unfit)


def make_sampling_scheduler(trained: SchedulerMixin, name: str) -> SchedulerMixin:
    """A scheduler that reverses the noise schedule of `trained`.

    Args:
        trained: The scheduler of training, or one that this function made from it.
        name: One of `fit_samplers`: a class of diffusers, with the suffix `:sde` for its stochastic form.

    Raises:
        UserError: The class does not fit what the model was trained to predict.
    """
    _refuse_unfit(name, trained)
    return trained if name == sampler_name(trained) else _build(name, trained_for(trained))


def fit_scheduler(scheduler: SchedulerMixin, trained: dict[str, Any]) -> SchedulerMixin:
    """The scheduler if it fits the model's training, else one of the same class that does.

    `X.from_config(pipeline.scheduler.config)` loses arguments that X names differently or lacks; they are restored.
    Other arguments stay if they keep the conventions.

    Args:
        scheduler: A scheduler of any class.
        trained: From `trained_for`.

    Raises:
        UserError: The class or an argument does not fit; the message lists suitable ones.
    """
    flow = trained["prediction_type"] == "flow"
    name = sampler_name(scheduler)
    _refuse_unfit(name, _build(FLOW_SCHEDULERS[0] if flow else VARIANCE_PRESERVING_SCHEDULERS[0], trained))
    class_name = type(scheduler).__name__
    accepted = inspect.signature(type(scheduler).__init__).parameters
    left_out = {"self", *scheduler.config.get("_use_default_values", ())}
    plain, sampling, kept = _build(name, trained), sampling_arguments(name, flow), {}
    for key in accepted.keys() - left_out:
        value = scheduler.config[key]
        if key in ("shift", "flow_shift") and flow:
            # These arguments place the steps; they do not change what the model predicts.
            _check_shift(value)
            kept[key] = value
        elif key in _NOISE_SCHEDULE or np.array_equal(value, plain.config[key]):
            continue
        elif value in sampling.get(key, ()):
            kept[key] = value
        elif not np.array_equal(value, accepted[key].default):
            raise UserError(
                f"scheduler {class_name} with {key}={value!r} does not fit the training of this model; "
                f"leave it out (accepted: {_listed(sampling) or 'no others'})"
            )
    fit = _build(name, trained, kept)
    is_fit = all(np.array_equal(scheduler.config[key], fit.config[key]) for key in accepted if key != "self")
    return scheduler if is_fit else fit


def _refuse_unfit(name: str, trained: SchedulerMixin) -> None:
    fit = fit_samplers(trained)
    if name not in fit:
        kind = "flow" if is_flow(trained) else trained.config.prediction_type
        raise UserError(
            f"scheduler '{name}' does not fit a model trained with {kind} prediction and this noise schedule; "
            f"suitable: {', '.join(fit)}"
        )


def _build(name: str, trained: dict[str, Any], sampling: dict[str, Any] | None = None) -> SchedulerMixin:
    """The scheduler of that name that fits the training of a model, with sampling arguments of its class."""
    class_name, _, form = name.partition(":")
    scheduler_class = getattr(diffusers, class_name)
    accepted = inspect.signature(scheduler_class.__init__).parameters
    schedule = {key: value for key, value in trained.items() if key != "prediction_type" and key in accepted}
    arguments: dict[str, Any] = {}
    if class_name.startswith("DPMSolver"):
        arguments["algorithm_type"] = "sde-dpmsolver++" if form else "dpmsolver++"
    if class_name == "DPMSolverSinglestepScheduler":
        # Without this argument the class warns each time that it turns it on.
        arguments["lower_order_final"] = True
    if trained["prediction_type"] != "flow":
        # All arguments are given by name: classes have different defaults.
        ours = {"clip_sample": False, "timestep_spacing": "trailing", "lambda_min_clipped": _SMALLEST_LOG_RATIO}
        arguments |= {key: value for key, value in ours.items() if key in accepted}
        arguments["prediction_type"] = trained["prediction_type"]
    elif not class_name.startswith("FlowMatch"):
        arguments |= {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
        arguments["flow_shift"] = trained["shift"]
    return scheduler_class(**schedule | arguments | (sampling or {}))


def sampler_name(scheduler: SchedulerMixin) -> str:
    """The name from which `make_sampling_scheduler` makes this scheduler."""
    class_name = type(scheduler).__name__
    # Other classes may carry an unused algorithm argument: diffusers keeps arguments of the source scheduler.
    stochastic = class_name.startswith("DPMSolver") and scheduler.config.get("algorithm_type", "").startswith("sde")
    return f"{class_name}:sde" if stochastic else class_name


def is_flow(scheduler: SchedulerMixin) -> bool:
    """Whether the scheduler mixes data and noise along a straight line."""
    return type(scheduler).__name__.startswith("FlowMatch") or bool(scheduler.config.get("use_flow_sigmas", False))
