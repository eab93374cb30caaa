"""Every accepted scheduler with every accepted argument and any number of steps; others are refused."""

import math
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    PNDMScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)
from test_diffusion import COSINE, FLOW, SCALED, label, posterior_mean
from torch import Tensor

from transfusion_mot.diffusion import Diffusion
from transfusion_mot.errors import UserError
from transfusion_mot.schedulers import (
    STOCHASTIC_SOLVER,
    fit_samplers,
    fit_scheduler,
    make_sampling_scheduler,
    make_scheduler,
    sampling_arguments,
    trained_for,
)

ROOT = Path(__file__).parents[1]
ZERO_SNR = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
TRAINED = [
    (FLOW, {"shift": 3.0}),
    ("DDPMScheduler", COSINE),
    ("DDPMScheduler", {**SCALED, "prediction_type": "v_prediction"}),
    ("DDPMScheduler", ZERO_SNR),
]
SAMPLED = [(*case, name) for case in TRAINED for name in fit_samplers(make_scheduler(*case))]
WITH_ARGUMENTS = [
    (*case, {key: value})
    for case in SAMPLED
    if case[1] != ZERO_SNR
    for key, values in sampling_arguments(case[2], case[0] == FLOW).items()
    for value in values
    if make_sampling_scheduler(make_scheduler(*case[:2]), case[2]).config[key] != value
]
STOCHASTIC = ("DDPMScheduler", STOCHASTIC_SOLVER)
MEAN, SPREAD = 0.7, 0.5


def sampled(scheduler: SchedulerMixin, steps: int, trained: SchedulerMixin, size: int = 8) -> tuple[Tensor, Tensor]:
    """What the best network of normal data paints, and what the exact flow makes of the same noise."""
    diffusion, noise = Diffusion(trained), torch.randn(2, 2, size, size, generator=torch.Generator().manual_seed(0))
    first = []

    def predict(noisy: Tensor, t: Tensor) -> Tensor:
        first.append((noisy, *diffusion.alpha_sigma(t.double())))
        return posterior_mean(diffusion, noisy, t, torch.tensor(MEAN), SPREAD**2)

    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    result = Diffusion(scheduler).sample(predict, noise.double(), steps, generators)
    start, alpha, sigma = first[0]
    return result, MEAN + SPREAD * (start - alpha * MEAN) / (alpha**2 * SPREAD**2 + sigma**2).sqrt()


def check(scheduler: SchedulerMixin, steps: int, trained: SchedulerMixin, name: str) -> None:
    if name in STOCHASTIC:
        result, _ = sampled(scheduler, steps, trained, size=32)
        assert result.mean().item() == pytest.approx(MEAN, abs=0.05)
        assert result.std().item() == pytest.approx(SPREAD, abs=0.06)
    else:
        result, expected = sampled(scheduler, steps, trained)
        assert (result - expected).abs().mean() < 0.04


# 61: of diffusers' own timesteps the last is -1. 400 does not divide 1,000.
@pytest.mark.parametrize("steps", [61, 400])
@pytest.mark.parametrize(("trained", "arguments", "sampler"), SAMPLED, ids=label)
def test_any_number_of_steps_gives_the_datas_distribution(trained, arguments, sampler, steps) -> None:
    scheduler = make_scheduler(trained, arguments)
    check(make_sampling_scheduler(scheduler, sampler), steps, scheduler, sampler)


@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"])
def test_about_a_step_for_every_timestep_of_training(name: str) -> None:
    trained = make_scheduler("DDPMScheduler", COSINE)
    check(make_sampling_scheduler(trained, name), 999, trained, name)


@pytest.mark.parametrize(("trained", "arguments", "sampler"), SAMPLED, ids=label)
def test_timesteps_are_as_many_as_asked_for_and_fall(trained, arguments, sampler) -> None:
    diffusion = Diffusion(make_sampling_scheduler(make_scheduler(trained, arguments), sampler))
    order = getattr(diffusion.scheduler, "order", 1)
    alpha, sigma = diffusion.alpha_sigma(torch.arange(1, 1001) / 1000)
    usable = int((alpha / sigma > math.exp(-5.1)).sum())
    for steps in (1, 2, 10, 61, 103, 223, 400, 600, 994, 999, 1000):
        times = diffusion.inference_timesteps(steps, torch.device("cpu"))
        # Solvers in log(alpha / sigma) begin where there is some signal.
        most = usable if "lambda_min_clipped" in diffusion.scheduler.config and trained != FLOW else 1000
        assert len(times) == 1 + order * (min(steps, most) - 1)
        assert 0 < times.min() <= times.max() <= 1
        assert (times[::order].diff() < 0).all()
        # What is said to the network, and what the solver takes it for.
        if trained != FLOW:
            torch.testing.assert_close((diffusion.scheduler.timesteps.double() + 1) / 1000, times.double())


@pytest.mark.parametrize(("trained", "arguments", "sampler", "more"), WITH_ARGUMENTS, ids=label)
def test_arguments_that_are_let_through_keep_the_conventions(trained, arguments, sampler, more) -> None:
    scheduler = make_scheduler(trained, arguments)
    own = make_sampling_scheduler(scheduler, sampler)
    changed = fit_scheduler(type(own).from_config(own.config, **more), trained_for(scheduler))
    assert {key: changed.config[key] for key in more} == more
    check(changed, 100, scheduler, sampler)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        *((FLOW, {key: True}) for key in ("use_dynamic_shifting", "invert_sigmas", "stochastic_sampling")),
        (FLOW, {"shift_terminal": 0.1}),
        ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True}),
        ("DPMSolverMultistepScheduler", {"variance_type": "learned_range"}),
        ("DPMSolverMultistepScheduler", {"final_sigmas_type": "sigma_min"}),
        ("UniPCMultistepScheduler", {"predict_x0": False}),
        ("UniPCMultistepScheduler", {"lower_order_final": False}),
        ("EulerDiscreteScheduler", {"interpolation_type": "log_linear"}),
        ("EulerDiscreteScheduler", {"timestep_type": "continuous"}),
        *(("DDPMScheduler", {"variance_type": kind}) for kind in ("fixed_large_log", "learned", "learned_range")),
        *(("DDIMScheduler", {"timestep_spacing": spacing}) for spacing in ("leading", "linspace")),
        ("DDIMScheduler", {"clip_sample": True}),
        ("DDIMScheduler", {"thresholding": True}),
    ],
    ids=label,
)
def test_other_arguments_are_refused_with_those_that_are_taken(name: str, arguments: dict) -> None:
    (key,) = arguments
    with pytest.raises(UserError, match=rf"{name} with {key}=.*; leave it out \(it takes num_train_timesteps, "):
        make_scheduler(name, arguments)


@pytest.mark.parametrize("shift", [0, -1.0, float("nan"), float("inf"), "2"])
def test_a_shift_that_is_none_is_refused(shift) -> None:
    with pytest.raises(UserError, match=r"shift"):
        make_scheduler(FLOW, {"shift": shift})


@pytest.mark.parametrize(
    "arguments",
    [
        {"beta_end": 1.5},
        {"beta_start": 0.0},
        {"beta_start": -0.1},
        {"trained_betas": [0.1, 0.2]},
        {"num_train_timesteps": 0},
        {"num_train_timesteps": 10.5},
        {"beta_schedule": "sigmoid"},
        {**ZERO_SNR, "prediction_type": "epsilon"},
    ],
    ids=label,
)
def test_a_noise_schedule_that_is_none_is_refused(arguments: dict) -> None:
    with pytest.raises(UserError, match=r"diffusion\.scheduler_args"):
        make_scheduler("DDPMScheduler", arguments)


def test_schedulers_that_cannot_end_in_pure_noise_are_not_offered() -> None:
    """Linear betas fall below what diffusers' Euler scheduler takes for zero: more noise before the last timestep."""
    fit = fit_samplers(make_scheduler("DDPMScheduler", ZERO_SNR))
    assert not {"EulerDiscreteScheduler", "DPMSolverSinglestepScheduler", "HeunDiscreteScheduler"} & set(fit)
    assert "EulerDiscreteScheduler" in fit_samplers(make_scheduler("DDPMScheduler", {**SCALED, **ZERO_SNR}))
    with pytest.raises(UserError, match=r"EulerDiscreteScheduler cannot sample a model that it trains.*DDPMScheduler"):
        make_scheduler("EulerDiscreteScheduler", ZERO_SNR)


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"])
def test_the_smallest_noise_is_shifted_once(name: str) -> None:
    diffusion = Diffusion(make_sampling_scheduler(make_scheduler(FLOW, {"shift": 12.0}), name))
    assert diffusion.inference_timesteps(50, torch.device("cpu"))[-1].item() == pytest.approx(12 / (1000 + 11))


@pytest.mark.parametrize("trained", ["DDPMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"])
def test_a_sampler_is_the_same_whichever_class_trained(trained: str) -> None:
    """diffusers fills up what a class does not have with the defaults of the other one, such as clipped latents."""
    config = make_sampling_scheduler(make_scheduler(trained, COSINE), "DDIMScheduler").config
    assert not config.clip_sample
    assert config.timestep_spacing == "trailing"


# The idiom of diffusers; each with what must come of it.
FLOW_3 = {"prediction_type": "flow", "num_train_timesteps": 1000, "shift": 3.0}


@pytest.mark.parametrize(
    "scheduler_class", [DPMSolverMultistepScheduler, UniPCMultistepScheduler, FlowMatchHeunDiscreteScheduler]
)
def test_from_config_of_another_scheduler_is_put_right_for_flow(scheduler_class) -> None:
    trained = make_scheduler(FLOW, {"shift": 3.0})
    assert trained_for(trained) == FLOW_3
    careless = scheduler_class.from_config(trained.config)
    fit = fit_scheduler(careless, trained_for(trained))
    check(fit, 60, trained, scheduler_class.__name__)
    assert trained_for(fit) == FLOW_3
    # One that fits stays as it is.
    assert fit_scheduler(fit, FLOW_3) is fit


@pytest.mark.parametrize(
    "scheduler_class", [DPMSolverMultistepScheduler, DDIMScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler]
)
def test_from_config_of_another_scheduler_is_put_right_for_noise(scheduler_class) -> None:
    trained = make_scheduler("UniPCMultistepScheduler", {**COSINE, "prediction_type": "v_prediction"})
    for careless in (scheduler_class.from_config(trained.config), scheduler_class()):
        fit = fit_scheduler(careless, trained_for(trained))
        check(fit, 60, trained, scheduler_class.__name__)
        assert trained_for(fit) == trained_for(trained)


def test_what_the_user_asks_for_stays() -> None:
    made = DPMSolverMultistepScheduler.from_config(
        make_scheduler(FLOW, {"shift": 3.0}).config, solver_order=3, algorithm_type="sde-dpmsolver++"
    )
    with pytest.raises(UserError, match=r"solver_order=3 does not fit.*solver_order \(1, 2\)"):
        fit_scheduler(made, FLOW_3)
    fit = fit_scheduler(DPMSolverMultistepScheduler.from_config(made.config, solver_order=1), FLOW_3)
    assert (fit.config.solver_order, fit.config.algorithm_type, fit.config.flow_shift) == (1, "sde-dpmsolver++", 3.0)
    # Where the steps lie is a matter of sampling.
    moved = FlowMatchEulerDiscreteScheduler.from_config(make_scheduler(FLOW, {}).config, shift=5.0)
    assert fit_scheduler(moved, FLOW_3) is moved


@pytest.mark.parametrize(
    ("careless", "message"),
    [
        (
            lambda config: EulerDiscreteScheduler.from_config(config),
            "'EulerDiscreteScheduler' does not fit.*suitable: ",
        ),
        (lambda config: PNDMScheduler.from_config(config), "'PNDMScheduler' does not fit"),
        (lambda config: diffusers.LCMScheduler.from_config(config), "'LCMScheduler' does not fit"),
        (lambda config: DDPMScheduler.from_config(config), "'DDPMScheduler' does not fit"),
        (lambda config: UniPCMultistepScheduler.from_config(config, use_karras_sigmas=True), "use_karras_sigmas=True"),
        (lambda config: FlowMatchEulerDiscreteScheduler.from_config(config, invert_sigmas=True), "invert_sigmas=True"),
        (lambda config: FlowMatchEulerDiscreteScheduler.from_config(config, shift=0.0), "shift is 0.0"),
    ],
)
def test_a_scheduler_that_cannot_be_put_right_is_refused(careless, message: str) -> None:
    with pytest.raises(UserError, match=message):
        fit_scheduler(careless(make_scheduler(FLOW, {"shift": 3.0}).config), FLOW_3)


def test_the_scheduler_of_the_shipped_model_stays_as_it_is() -> None:
    """It was saved before pipelines said what they were trained for."""
    shipped = FlowMatchEulerDiscreteScheduler.from_pretrained(ROOT / "checkpoints" / "emoji" / "scheduler")
    assert fit_scheduler(shipped, trained_for(shipped)) is shipped
    assert trained_for(shipped)["shift"] == 2.0
