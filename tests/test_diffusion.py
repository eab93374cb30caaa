"""Every scheduler and prediction type: a perfect network has zero loss and is sampled back to the image."""

import inspect
import math

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from transfusion_mot.diffusion import Diffusion
from transfusion_mot.errors import UserError
from transfusion_mot.losses import diffusion_losses
from transfusion_mot.schedulers import (
    FLOW_SCHEDULERS,
    STOCHASTIC_SOLVER,
    VARIANCE_PRESERVING_SCHEDULERS,
    fit_samplers,
    is_flow,
    make_sampling_scheduler,
    make_scheduler,
    sampler_name,
)

COSINE = {"beta_schedule": "squaredcos_cap_v2"}
SCALED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
FLOW = "FlowMatchEulerDiscreteScheduler"

TRAINED = [
    (trained, arguments, name)
    for trained, arguments in [
        (FLOW, {}),
        (FLOW, {"shift": 3.0}),
        *(
            ("DDPMScheduler", {**beta, "prediction_type": kind})
            for beta in (COSINE, SCALED)
            for kind in PREDICTION_TYPES
        ),
    ]
    for name in fit_samplers(make_scheduler(trained, arguments))
]
# Their reverse process draws no noise, so that it can be held to a trajectory.
DETERMINISTIC = [case for case in TRAINED if case[2] not in ("DDPMScheduler", STOCHASTIC_SOLVER)]


def label(value) -> str:
    return "-".join(map(str, value.values())) if isinstance(value, dict) else str(value)


def trained_and_sampler(trained: str, arguments: dict, sampler: str) -> tuple[Diffusion, Diffusion]:
    scheduler = make_scheduler(trained, arguments)
    return Diffusion(scheduler), Diffusion(make_sampling_scheduler(scheduler, sampler))


def posterior_mean(diffusion: Diffusion, noisy: Tensor, t: Tensor, mean: Tensor, variance: float) -> Tensor:
    """The best prediction when every element of the data is normal; with a variance of zero, the perfect one."""
    alpha, sigma = diffusion.alpha_sigma(t.double().reshape(1))
    gain = alpha * variance / (alpha**2 * variance + sigma**2)
    clean = mean + gain * (noisy - alpha * mean)
    noise = (noisy - alpha * clean) / sigma if sigma > 0 else torch.zeros_like(noisy)
    kind = diffusion.prediction_type
    return {"flow": noise - clean, "epsilon": noise, "sample": clean, "v_prediction": alpha * noise - sigma * clean}[
        kind
    ]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [(FLOW, {}), (FLOW, {"shift": 3.0})]
    + [
        (name, {**COSINE, "prediction_type": kind})
        for name in VARIANCE_PRESERVING_SCHEDULERS
        for kind in PREDICTION_TYPES
    ],
    ids=label,
)
def test_perfect_network_has_zero_loss(name: str, arguments: dict) -> None:
    """A network that knows the clean image can compute the target from only the noisy latents."""
    diffusion = Diffusion(make_scheduler(name, arguments))
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 4, 3, 2, 4, 4, generator=generator, dtype=torch.float64)
    uniform = torch.rand(4, 3, generator=generator, dtype=torch.float64)
    timesteps = diffusion.timesteps_from_uniform(uniform)
    noisy = diffusion.add_noise(latents, noise, timesteps)
    prediction = torch.stack(
        [
            torch.stack([posterior_mean(diffusion, noisy[b, k], timesteps[b, k], latents[b, k], 0.0) for k in range(3)])
            for b in range(4)
        ]
    )
    target = diffusion.target(latents, noise, timesteps)
    mask = torch.ones(4, 3, dtype=torch.bool)
    assert diffusion_losses(prediction, target, mask).sum() / target.numel() < 1e-9
    assert diffusion_losses(prediction + 0.1, target, mask).sum() / target.numel() == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize(("trained", "arguments", "sampler"), TRAINED, ids=label)
def test_perfect_network_is_sampled_back_to_the_image(trained: str, arguments: dict, sampler: str) -> None:
    diffusion, reverse = trained_and_sampler(trained, arguments, sampler)
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 2, 3, 4, 4, generator=generator, dtype=torch.float64)

    def predict(noisy: Tensor, t: Tensor) -> Tensor:
        assert 0 < t <= 1
        return posterior_mean(diffusion, noisy, t, clean, 0.0)

    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    result = reverse.sample(predict, noise, 20, generators)
    torch.testing.assert_close(result, clean, rtol=0, atol=2e-2)


@pytest.mark.parametrize(("trained", "arguments", "sampler"), DETERMINISTIC, ids=label)
def test_trajectory_of_a_perfect_network_is_the_forward_process(trained: str, arguments: dict, sampler: str) -> None:
    """What the network is shown at t is what it was trained on at t: alpha * clean + sigma * the same noise."""
    diffusion, reverse = trained_and_sampler(trained, arguments, sampler)
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 1, 3, 4, 4, generator=generator, dtype=torch.float64)
    seen, effective = [], []

    def predict(noisy: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = diffusion.alpha_sigma(t.double())
        # A schedule that keeps some signal at t = 1 reads its start as that signal and another noise.
        effective.append((noisy - alpha * clean) / sigma)
        torch.testing.assert_close(noisy, alpha * clean + sigma * effective[0], rtol=0, atol=2e-2)
        seen.append(float(t))
        return posterior_mean(diffusion, noisy, t, clean, 0.0)

    reverse.sample(predict, noise, 20)
    assert (effective[0] - noise).abs().max() < (0.3 if arguments.get("beta_schedule") == "scaled_linear" else 0.03)
    assert seen[0] > 0.9
    assert seen[-1] < 0.2
    assert seen == sorted(seen, reverse=True)


@pytest.mark.parametrize(("trained", "arguments", "sampler"), DETERMINISTIC, ids=label)
def test_best_network_of_normal_data_gives_the_datas_mean_and_spread(
    trained: str, arguments: dict, sampler: str
) -> None:
    """Unlike a perfect network, this one is wrong at high noise: every coefficient of the sampler matters."""
    diffusion, reverse = trained_and_sampler(trained, arguments, sampler)
    noise = torch.randn(4, 4, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean, spread = torch.tensor(0.7, dtype=torch.float64), 0.5

    first = []

    def predict(noisy: Tensor, t: Tensor) -> Tensor:
        first.append((noisy, *diffusion.alpha_sigma(t.double())))
        return posterior_mean(diffusion, noisy, t, mean, spread**2)

    result = reverse.sample(predict, noise, 200)
    # The exact flow keeps the quantile, from N(alpha mean, alpha^2 spread^2 + sigma^2) to N(mean, spread^2).
    start, alpha, sigma = first[0]
    expected = mean + spread * (start - alpha * mean) / (alpha**2 * spread**2 + sigma**2).sqrt()
    torch.testing.assert_close(result, expected, rtol=0, atol=0.05)
    if arguments.get("beta_schedule") != "scaled_linear":
        assert result.mean().item() == pytest.approx(0.7, abs=0.02)
        assert result.std().item() == pytest.approx(spread, rel=0.04)


@pytest.mark.parametrize(("trained", "arguments", "sampler"), DETERMINISTIC, ids=label)
def test_few_steps_are_imprecise_but_never_wild(trained: str, arguments: dict, sampler: str) -> None:
    """Twenty steps in float32, as a user samples; the network is never shown what no training image looks like."""
    diffusion, reverse = trained_and_sampler(trained, arguments, sampler)
    noise = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    mean = torch.tensor(0.7, dtype=torch.float64)

    def predict(noisy: Tensor, t: Tensor) -> Tensor:
        assert noisy.abs().max() <= noise.abs().max() + 0.7
        return posterior_mean(diffusion, noisy.double(), t, mean, 0.25).float()

    result = reverse.sample(predict, noise, 20)
    assert result.mean().item() == pytest.approx(0.7, abs=0.05)
    assert result.std().item() == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize(
    ("trained", "arguments", "sampler"),
    [("DDPMScheduler", {**COSINE, "prediction_type": kind}, "DDPMScheduler") for kind in PREDICTION_TYPES]
    + [("DDPMScheduler", COSINE, STOCHASTIC_SOLVER), (FLOW, {"shift": 3.0}, STOCHASTIC_SOLVER)],
    ids=label,
)
def test_stochastic_sampling_gives_the_datas_mean_and_spread(trained: str, arguments: dict, sampler: str) -> None:
    diffusion, reverse = trained_and_sampler(trained, arguments, sampler)
    noise = torch.randn(2, 4, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean, spread = torch.tensor(0.7, dtype=torch.float64), 0.5

    def sample(seed: int) -> Tensor:
        generators = [torch.Generator().manual_seed(seed + row) for row in range(2)]
        return reverse.sample(lambda x, t: posterior_mean(diffusion, x, t, mean, spread**2), noise, 500, generators)

    result = sample(0)
    assert result.mean().item() == pytest.approx(0.7, abs=0.02)
    assert result.std().item() == pytest.approx(spread, rel=0.05)
    torch.testing.assert_close(sample(0), result)
    assert (sample(2) - result).abs().mean() > 0.1


@pytest.mark.parametrize(
    ("trained", "sampler", "steps", "order"),
    [
        (FLOW, FLOW, 20, 1),
        ("DDPMScheduler", "DDIMScheduler", 20, 1),
        ("DDPMScheduler", "EulerDiscreteScheduler", 40, 1),
        (FLOW, "FlowMatchHeunDiscreteScheduler", 20, 2),
        (FLOW, "DPMSolverSinglestepScheduler", 40, 2),
        (FLOW, "DPMSolverMultistepScheduler", 80, 2),
        (FLOW, "UniPCMultistepScheduler", 40, 2),
    ],
)
def test_twice_the_steps_leave_the_part_of_the_error_that_theory_says(
    trained: str, sampler: str, steps: int, order: int
) -> None:
    """A half for a method of first order, a quarter for one of second, against the exact flow of normal data."""
    diffusion, reverse = trained_and_sampler(trained, {} if trained == FLOW else COSINE, sampler)
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean, spread = torch.tensor(0.7, dtype=torch.float64), 0.5

    def error(steps: int) -> float:
        first = []

        def predict(noisy: Tensor, t: Tensor) -> Tensor:
            first.append((noisy, *diffusion.alpha_sigma(t.double())))
            return posterior_mean(diffusion, noisy, t, mean, spread**2)

        result = reverse.sample(predict, noise, steps)
        start, alpha, sigma = first[0]
        expected = mean + spread * (start - alpha * mean) / (alpha**2 * spread**2 + sigma**2).sqrt()
        return (result - expected).abs().mean().item()

    assert math.log2(error(steps) / error(2 * steps)) == pytest.approx(order, abs=0.35)


@pytest.mark.parametrize(
    ("trained", "arguments", "sampler"),
    [case for case in TRAINED if case[1] in ({}, {**COSINE, "prediction_type": "epsilon"})],
    ids=label,
)
def test_one_step_paints_the_mean_of_the_data(trained: str, arguments: dict, sampler: str) -> None:
    """From pure noise a single step can know no more, and it must not fail."""
    diffusion, reverse = trained_and_sampler(trained, arguments, sampler)
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean = torch.tensor(0.7, dtype=torch.float64)
    result = reverse.sample(lambda x, t: posterior_mean(diffusion, x, t, mean, 0.25), noise, 1, [torch.Generator()])
    torch.testing.assert_close(result, torch.full_like(result, 0.7), rtol=0, atol=0.01)


@pytest.mark.parametrize("schedule", [COSINE, SCALED, {"beta_schedule": "linear"}], ids=label)
def test_noise_and_target_are_those_of_diffusers(schedule: dict) -> None:
    diffusion = Diffusion(make_scheduler("DDPMScheduler", {**schedule, "prediction_type": "v_prediction"}))
    reference = DDPMScheduler(**schedule, prediction_type="v_prediction")
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 1000, 2, 2, 2, generator=generator)
    index = torch.arange(1000)
    timesteps = (index + 1) / 1000
    # atol: the references compute the square root of 1 - x in float32 for x near one.
    torch.testing.assert_close(
        diffusion.add_noise(latents, noise, timesteps), reference.add_noise(latents, noise, index), rtol=0, atol=1e-4
    )
    torch.testing.assert_close(
        diffusion.target(latents, noise, timesteps), reference.get_velocity(latents, noise, index), rtol=0, atol=1e-4
    )
    alpha, sigma = diffusion.alpha_sigma(timesteps.double())
    torch.testing.assert_close(alpha**2, reference.alphas_cumprod.double(), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(1000, dtype=torch.float64))


def test_flow_noise_is_that_of_diffusers() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    diffusion = Diffusion(make_scheduler(FLOW, {"shift": 3.0}))
    latents, noise = torch.randn(2, 1000, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    expected = scheduler.scale_noise(latents, scheduler.timesteps, noise)
    torch.testing.assert_close(diffusion.add_noise(latents, noise, scheduler.timesteps / 1000), expected)


def test_cosine_schedule_is_the_papers() -> None:
    """Nichol and Dhariwal, arXiv 2102.09672, equation 17, betas capped at 0.999."""
    diffusion = Diffusion(make_scheduler("DDPMScheduler", COSINE))

    def f(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    for step in (1, 10, 250, 500, 900, 990):
        alpha, _ = diffusion.alpha_sigma(torch.tensor(step / 1000, dtype=torch.float64))
        assert alpha.item() ** 2 == pytest.approx(f(step / 1000) / f(0), rel=1e-3)


@pytest.mark.parametrize("name", [FLOW, *VARIANCE_PRESERVING_SCHEDULERS])
def test_zero_is_clean_and_noise_only_grows(name: str) -> None:
    diffusion = Diffusion(make_scheduler(name, {}))
    latents, noise = torch.randn(2, 3, 2, 2, 2)
    assert torch.equal(diffusion.add_noise(latents, noise, torch.zeros(3)), latents)
    alpha, sigma = diffusion.alpha_sigma(torch.linspace(0, 1, 3001, dtype=torch.float64))
    assert (alpha.diff() < 0).all()
    assert (sigma.diff() > 0).all()
    assert alpha.isfinite().all()


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler", "EulerDiscreteScheduler"])
def test_a_schedule_that_ends_in_pure_noise(name: str) -> None:
    """Lin et al., arXiv 2305.08891: alpha is zero at t = 1."""
    arguments = {**SCALED, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    diffusion = Diffusion(make_scheduler(name, arguments))
    latents, noise = torch.randn(2, 3, 1, 2, 2, dtype=torch.float64)
    timesteps = torch.tensor([1.0, 0.9995, 0.5], dtype=torch.float64)
    noisy = diffusion.add_noise(latents, noise, timesteps)
    assert noisy.isfinite().all()
    torch.testing.assert_close(noisy[0], noise[0], rtol=0, atol=1e-2)
    assert diffusion.target(latents, noise, timesteps).isfinite().all()


def sampled_timesteps(distribution: str, name: str = FLOW, **arguments: float) -> Tensor:
    diffusion = Diffusion(make_scheduler(name, arguments), distribution)
    uniform = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    return diffusion.timesteps_from_uniform(uniform)


def test_distributions_of_timesteps_have_their_closed_forms() -> None:
    assert sampled_timesteps("uniform").mean().item() == pytest.approx(0.5, abs=1e-4)
    assert sampled_timesteps("uniform").var().item() == pytest.approx(1 / 12, abs=1e-4)

    logit = sampled_timesteps("logit_normal").logit()
    assert logit.mean().item() == pytest.approx(0, abs=1e-3)
    assert logit.std().item() == pytest.approx(1, abs=1e-3)

    # With u uniform, P(t <= x) = x / (s - (s - 1) x).
    shifted = sampled_timesteps("uniform", shift=3.0)
    for x in (0.1, 0.5, 0.9):
        assert (shifted <= x).double().mean().item() == pytest.approx(x / (3 - 2 * x), abs=1e-4)
    # A shift adds its logarithm to the logit.
    logit = sampled_timesteps("logit_normal", shift=3.0).logit()
    assert logit.mean().item() == pytest.approx(math.log(3), abs=1e-3)
    assert logit.std().item() == pytest.approx(1, abs=1e-3)


def test_timesteps_of_a_discrete_schedule_are_its_own() -> None:
    timesteps = sampled_timesteps("uniform", "DDPMScheduler")
    index = timesteps * 1000 - 1
    torch.testing.assert_close(index, index.round(), rtol=0, atol=1e-9)
    counts = torch.bincount(index.round().long(), minlength=1000)
    assert counts.min() == counts.max() == 100


@pytest.mark.parametrize("distribution", ["uniform", "logit_normal"])
@pytest.mark.parametrize("name", [FLOW, "DDPMScheduler"])
def test_ends_of_the_uniform_interval_give_usable_timesteps(distribution: str, name: str) -> None:
    diffusion = Diffusion(make_scheduler(name, {}), distribution)
    timesteps = diffusion.timesteps_from_uniform(torch.tensor([0.0, 1 - 2**-24], dtype=torch.float32))
    assert (timesteps > 0).all()
    assert (timesteps <= 1).all()


@pytest.mark.parametrize(
    ("name", "predict_calls"), [(FLOW, 7), ("FlowMatchHeunDiscreteScheduler", 13), ("DPMSolverMultistepScheduler", 7)]
)
def test_steps_are_as_many_as_asked_for(name: str, predict_calls: int) -> None:
    _, reverse = trained_and_sampler(FLOW, {}, name)
    calls, reported = [], []

    def predict(noisy: Tensor, t: Tensor) -> Tensor:
        calls.append(t)
        return noisy

    reverse.sample(predict, torch.randn(1, 1, 2, 2), 7, on_step=lambda step, *_: reported.append(step))
    assert len(calls) == predict_calls
    assert reported == list(range(predict_calls))


@pytest.mark.parametrize("sampler", FLOW_SCHEDULERS)
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_sampling_spends_its_steps_where_the_shift_says(sampler: str, shift: float) -> None:
    _, reverse = trained_and_sampler(FLOW, {"shift": shift}, sampler)
    seen = []

    def predict(noisy: Tensor, t: Tensor) -> Tensor:
        seen.append(float(t))
        return noisy

    reverse.sample(predict, torch.randn(1, 1, 2, 2), 100)
    middle = torch.tensor(seen).median().item()
    assert middle == pytest.approx(shift * 0.5 / (1 + (shift - 1) * 0.5), abs=0.02)
    assert seen[0] == pytest.approx(1.0, abs=2e-3)


def test_scheduler_of_a_snapshot_is_recognised(tmp_path) -> None:
    """A snapshot may hold a sampling scheduler; its diffusion is that of training."""
    for trained, arguments, sampler in TRAINED:
        diffusion, reverse = trained_and_sampler(trained, arguments, sampler)
        reverse.scheduler.save_pretrained(tmp_path)
        again = Diffusion(type(reverse.scheduler).from_pretrained(tmp_path))
        assert is_flow(again.scheduler) == (trained == FLOW)
        assert again.prediction_type == diffusion.prediction_type
        t = torch.tensor([0.25, 0.75], dtype=torch.float64)
        for one, two in zip(again.alpha_sigma(t), diffusion.alpha_sigma(t), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_unknown_scheduler_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"'PNDMScheduler'.*FlowMatchEulerDiscreteScheduler, DDPMScheduler"):
        make_scheduler("PNDMScheduler", {})
    with pytest.raises(UserError, match=r"no argument 'beta_shedule'.*beta_schedule"):
        make_scheduler("DDPMScheduler", {"beta_shedule": "linear"})


@pytest.mark.parametrize(
    ("trained", "arguments", "asked", "fit"),
    [
        (FLOW, {}, "DDIMScheduler", FLOW_SCHEDULERS),
        (FLOW, {}, "Euler", FLOW_SCHEDULERS),
        (FLOW, {}, "UniPCMultistepScheduler:sde", FLOW_SCHEDULERS),
        ("DDPMScheduler", {}, FLOW, (*VARIANCE_PRESERVING_SCHEDULERS, "HeunDiscreteScheduler")),
        ("DDPMScheduler", COSINE, "HeunDiscreteScheduler", VARIANCE_PRESERVING_SCHEDULERS),
    ],
)
def test_sampler_that_does_not_fit_is_refused_with_those_that_do(trained, arguments, asked, fit) -> None:
    with pytest.raises(UserError) as error:
        make_sampling_scheduler(make_scheduler(trained, arguments), asked)
    assert all(name in str(error.value).partition("suitable: ")[2].split(", ") for name in (*fit, STOCHASTIC_SOLVER))


@pytest.mark.parametrize(("trained", "arguments"), [(FLOW, {"shift": 3.0}), ("DDPMScheduler", COSINE)], ids=label)
def test_samplers_can_be_changed_one_after_the_other(trained: str, arguments: dict) -> None:
    """Each is as if it had been made from the scheduler of training."""
    first = make_scheduler(trained, arguments)
    names = fit_samplers(first)
    current = first
    for name in (*names, *reversed(names)):
        current = make_sampling_scheduler(current, name)
        expected = make_sampling_scheduler(first, name)
        assert sampler_name(current) == sampler_name(expected) == name
        for scheduler in (current, expected):
            scheduler.set_timesteps(7)
        assert torch.equal(current.timesteps, expected.timesteps)
        for key in ("algorithm_type", "flow_shift", "shift", "prediction_type", "clip_sample", "timestep_spacing"):
            if key in inspect.signature(type(current).__init__).parameters:
                assert current.config[key] == expected.config[key], (name, key)


@pytest.mark.parametrize(("trained", "arguments", "sampler"), TRAINED, ids=label)
def test_name_of_a_sampler_makes_it(trained: str, arguments: dict, sampler: str, tmp_path) -> None:
    first = make_scheduler(trained, arguments)
    assert sampler_name(first) == trained
    made = make_sampling_scheduler(first, sampler)
    assert sampler_name(made) == sampler
    # One that keeps, among others, the arguments of a stochastic solver.
    again = make_sampling_scheduler(make_sampling_scheduler(first, STOCHASTIC_SOLVER), sampler)
    assert sampler_name(again) == sampler
    # As a snapshot has it.
    made.save_pretrained(tmp_path)
    assert sampler_name(type(made).from_pretrained(tmp_path)) == sampler


def test_unknown_prediction_type_is_refused() -> None:
    with pytest.raises(UserError, match="prediction_type"):
        make_scheduler("DDPMScheduler", {"prediction_type": "velocity"})
