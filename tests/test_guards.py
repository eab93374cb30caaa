"""Steps that are not finite, spikes and mis-wired starts, on real rows."""

import copy
import statistics
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import CHANNELS, ArrayImages, data_config, loader_of, sources_of, texts_of, tiny_config
from process_group import FSDP2, run_processes
from torch import nn

from transfusion_mot.config import DiffusionConfig, RunConfig, TowerConfig, TrainingConfig
from transfusion_mot.data.mixture import Source
from transfusion_mot.data.online import OnlineEncoder
from transfusion_mot.data.packing import Packer
from transfusion_mot.errors import NotFiniteError, UserError
from transfusion_mot.models.transfusion import TransfusionMoT
from transfusion_mot.training.guards import Guards, SpikeDetector
from transfusion_mot.training.log import StepRecord
from transfusion_mot.training.muon import MuonAdamW
from transfusion_mot.training.parallel import make_accelerator, place, wrap
from transfusion_mot.training.step import StepResult, clipped_step, train_step

CAPTIONS = ["red apple", "sun", "an octopus", "fox", "moon", "a car", "star", "tree"]


def parameters_of(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(3, 4, generator=generator)) for _ in range(2)]


OPTIMIZERS = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.1, fused=True),
    "muon": lambda groups: MuonAdamW([groups[0] | {"row_splits": [1, 2]}], groups[1:], 0.1, (0.9, 0.95), 1e-8),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_step_with_a_gradient_that_is_not_finite_changes_nothing(name: str, bad: float) -> None:
    parameters = parameters_of()
    named = enumerate(parameters)
    optimizer = OPTIMIZERS[name]([{"params": [(str(place), one)], "weight_decay": 0.1} for place, one in named])
    gradients = parameters_of(1)
    for step in range(4):
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.detach().clone()
        if step == 2:
            parameters[0].grad[1, 1] = bad
        before = copy.deepcopy((parameters, optimizer.state_dict()["state"]))
        norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters])
        clipped_step(optimizer, norm, 1.0)
        same = [torch.equal(one, two) for one, two in zip(before[0], parameters, strict=True)]
        assert same == [step == 2] * 2
        for index, state in before[1].items():
            for key, value in state.items():
                assert torch.equal(value, optimizer.state_dict()["state"][index][key]) == (step == 2), key
    assert all(parameter.isfinite().all() for parameter in parameters)


class Run:
    """A tiny run: real rows of captions and texts, the step, and its guards."""

    def __init__(
        self, tokenizer, accelerator, mean: np.ndarray, is_new=False, diffusion=None, images=2, width=16, **training
    ):
        captions = [CAPTIONS[i % 8] + "!" * (i // 8) for i in range(len(mean))]
        pictures = ArrayImages(captions, mean, np.zeros_like(mean), name="pictures")
        sources = sources_of(
            Source(pictures, 1.0, {"image": pictures}), texts_of(["some longer text about nothing"] * 20)
        )
        data = data_config(40, images, prompt_dropout_prob=0.0)
        model = tiny_config(towers={name: TowerConfig(width, 24) for name in ("text", "image")})
        self.config = RunConfig(
            data=data,
            model=model,
            diffusion=diffusion or DiffusionConfig(),
            training=TrainingConfig(num_rows=4, **training),
        )
        torch.manual_seed(0)
        with torch.device("meta"):
            self.bare = TransfusionMoT.from_sections(
                {"text": tokenizer.vocab_size, "image": CHANNELS}, model, self.config.diffusion
            )
        place(self.bare, accelerator, 0)
        draw = self.bare.modality("image").diffusion.timesteps_from_uniform
        self.packer = Packer(sources, tokenizer, data, model, num_lanes=4, seed=0, timesteps_from_uniform=draw)
        self.encoder, self.accelerator = OnlineEncoder({}, {}), accelerator
        self.model: nn.Module = wrap(self.bare, accelerator)
        self.is_new = is_new

    def new_guards(self, lanes: range) -> Guards:
        """Guards that have seen nothing."""
        return Guards(
            self.accelerator,
            self.model,
            {name: self.bare.modality(name) for name in self.bare.modalities},
            packer=self.packer,
            encoder=self.encoder,
            lanes=lanes,
            config=self.config,
            is_new=self.is_new,
        )

    def steps(self, count: int) -> Counter[str]:
        """Train and check all steps at once, as at the end of an interval."""
        rank, world_size = self.accelerator.process_index, self.accelerator.num_processes
        loader = loader_of(self.packer, count, rank=rank, world_size=world_size, encoder=self.encoder)
        self.guards = self.new_guards(loader.lanes)
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, fused=True)
        records = []
        for step, (batch, _) in enumerate(loader, 1):
            result = train_step(
                self.model,
                batch,
                optimizer,
                self.accelerator,
                loss_weights=self.guards.loss_weights,
                microbatch_rows=4 // world_size,
                max_grad_norm=1.0,
            )
            self.guards.add(step, batch, loader.states_before)
            records.append(record(step, result, self.accelerator))
        return self.guards.check(records)


def record(step: int, result: StepResult, accelerator: Accelerator) -> StepRecord:
    """What the log makes of a step."""
    by_row = {name: accelerator.gather(losses.sum(1)).tolist() for name, losses in result.losses.items()}
    counts = dict(zip(result.losses, result.counts.tolist(), strict=True))
    return StepRecord(step, by_row, counts, result.grad_norm.item())


def normal_latents(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((len(CAPTIONS), CHANNELS, 4, 4)).astype(np.float32)


def test_document_whose_latents_are_not_finite_is_named(byte_tokenizer, accelerator) -> None:
    mean = normal_latents()
    mean[CAPTIONS.index("an octopus")] = np.nan
    run = Run(byte_tokenizer, accelerator, mean)
    with pytest.raises(NotFiniteError) as stop:
        run.steps(3)
    assert "pictures 'an octopus" in str(stop.value)
    assert "text loss" in str(stop.value)
    assert all(parameter.isfinite().all() for parameter in run.model.parameters())


def test_document_of_a_later_step_is_named(byte_tokenizer, accelerator) -> None:
    """The rows of any step are made again, not those of the first one."""
    mean = np.tile(normal_latents(), (4, 1, 1, 1))
    numbered = np.broadcast_to(np.arange(32, dtype=np.float32)[:, None, None, None], mean.shape)
    packer = Run(byte_tokenizer, accelerator, numbered).packer
    states = np.tile(packer.initial_state(), (4, 1))
    for step in range(3):
        rows, states, _ = packer.rows(range(4), step, states)
    index = int(rows.batch.latents("image").latents[2, 1].max())
    mean[index] = np.nan
    with pytest.raises(NotFiniteError) as stop:
        Run(byte_tokenizer, accelerator, mean).steps(4)
    assert "step 3 is not finite" in str(stop.value)
    assert "row 2: " in str(stop.value)
    assert f"pictures '{CAPTIONS[index % 8] + '!' * (index // 8)}'" in str(stop.value)


def test_skipped_steps_are_counted_and_the_others_train(byte_tokenizer, accelerator, capfd) -> None:
    """The run equals one without the bad steps, except for the rows in them."""
    mean = normal_latents()
    mean[CAPTIONS.index("fox")] = np.inf
    run = Run(byte_tokenizer, accelerator, mean, on_non_finite="skip")
    before = copy.deepcopy(run.model)
    noticed = run.steps(4)
    # 8 images a step of 8: each of them once a step.
    assert noticed["skipped_steps"] == 4
    assert "pictures 'fox'" in capfd.readouterr().out
    for one, two in zip(before.parameters(), run.model.parameters(), strict=True):
        assert torch.equal(one, two)
    assert Run(byte_tokenizer, accelerator, normal_latents()).steps(4) == Counter(skipped_steps=0, spikes=0)


def test_run_that_only_skips_is_given_up(byte_tokenizer, accelerator) -> None:
    run = Run(byte_tokenizer, accelerator, np.full_like(normal_latents(), np.nan), on_non_finite="skip")
    with pytest.raises(NotFiniteError, match="the last 20 steps were skipped"):
        run.steps(25)


class InfiniteGradient(torch.autograd.Function):
    """Passes a loss on, and an infinite gradient back."""

    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, upstream):
        return upstream * float("inf")


class Trap(nn.Module):
    """A model whose gradient, and nothing else, is infinite for texts with a certain token."""

    def __init__(self, model: nn.Module, token: int) -> None:
        super().__init__()
        self.model, self.token = model, token

    def forward(self, inputs, **others):
        output = self.model(inputs=inputs, **others)
        ids, labels = inputs["text"]
        if (ids[labels >= 0] == self.token).any():
            text = output.terms["text"]
            output.terms["text"] = text._replace(loss=InfiniteGradient.apply(text.loss))
        return output


def test_row_is_found_by_its_gradient_alone(byte_tokenizer, accelerator) -> None:
    run = Run(byte_tokenizer, accelerator, normal_latents())
    (token,) = byte_tokenizer.encode("x")  # of "fox" and of nothing else but the texts behind it
    run.packer.sources.sources[1].documents.texts = ["no such letter at all"] * 20
    run.model = Trap(run.model, token)
    with pytest.raises(NotFiniteError) as stop:
        run.steps(1)
    assert "pictures 'fox'" in str(stop.value)
    assert str(stop.value).count("row ") == 1
    assert all(parameter.grad is None for parameter in run.model.parameters())


def stopped_by(tokenizer, latents: np.ndarray, token: int | None, folder: Path) -> str:
    """The sentence with which a run ends in this process."""
    run = Run(
        tokenizer, make_accelerator(TrainingConfig(num_rows=4, mixed_precision="no", tracker=None), folder), latents
    )
    if token is not None:
        run.packer.sources.sources[1].documents.texts = ["no such letter at all"] * 20
        run.model = Trap(run.model, token)
    with pytest.raises(NotFiniteError) as stop:
        run.steps(2)
    assert all(parameter.isfinite().all() for parameter in run.model.parameters())
    return str(stop.value)


@pytest.mark.slow
@pytest.mark.parametrize("environment", [{}, FSDP2], ids=["ddp", "fsdp2"])
@pytest.mark.parametrize("by", ["loss", "gradient"])
def test_two_processes_name_what_one_names(byte_tokenizer, tmp_path, monkeypatch, environment: dict, by: str) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    latents, token = normal_latents(), None
    if by == "loss":
        latents[CAPTIONS.index("moon")] = np.nan
    else:
        (token,) = byte_tokenizer.encode("x")
    alone = stopped_by(byte_tokenizer, latents, token, tmp_path)
    both = run_processes(stopped_by, 2, environment, tmp_path / "group", byte_tokenizer, latents, token, tmp_path)
    assert "row " in alone
    for sentence in both:
        # The numbers in brackets are rounded.
        assert sentence.split(")", 1)[1] == alone.split(")", 1)[1]


def test_spike_is_above_the_median_by_ten_deviations() -> None:
    generator = np.random.default_rng(0)
    values = (1 + 0.1 * generator.standard_normal(400)).tolist()
    values[250], values[300], values[20] = 2.0, 1.5, 50.0
    detector = SpikeDetector()
    found = {index for index, value in enumerate(values) if detector.median_if_spike(value) is not None}
    expected = set()
    for index in range(50, 400):
        window = values[max(0, index - 200) : index]
        median = statistics.median(window)
        if values[index] > median + 10 * statistics.median([abs(value - median) for value in window]):
            expected.add(index)
    assert found == expected
    assert 250 in found
    assert 20 not in found, "there is nothing yet to compare with"


def test_spike_names_step_and_rows(byte_tokenizer, accelerator, capfd) -> None:
    run = Run(byte_tokenizer, accelerator, normal_latents())
    run.steps(1)

    def of(step: int, text: list[float], grad_norm: float) -> StepRecord:
        return StepRecord(step, {"text": text, "image": [0.0] * 4}, {"text": 4.0, "image": 1.0}, grad_norm)

    quiet = [of(step, [1.0, 1.0, 1.0, 1.0], 0.5 + 0.01 * (step % 5)) for step in range(60)]
    loud = of(60, [1.0, 1.0, 30.0, 1.0], 0.5)
    assert run.guards.check([*quiet, loud])["spikes"] == 1
    told = capfd.readouterr().out
    assert "step 60 is a spike: loss is 8.25, the median of the steps before 1" in told
    assert "rows with most of the loss: 2 (91 %)" in told


SCHEDULERS = {
    "flow": ("FlowMatchEulerDiscreteScheduler", {}),
    "epsilon": ("DDPMScheduler", {"prediction_type": "epsilon"}),
    "sample": ("DDPMScheduler", {"prediction_type": "sample"}),
    "v_prediction": ("DDPMScheduler", {"prediction_type": "v_prediction", "beta_schedule": "squaredcos_cap_v2"}),
}


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_new_model_starts_within_the_band(byte_tokenizer, accelerator, kind: str) -> None:
    diffusion = DiffusionConfig(*SCHEDULERS[kind])
    # More slots for images than there is text for: some stay empty.
    run = Run(byte_tokenizer, accelerator, normal_latents(), is_new=True, diffusion=diffusion, images=5)
    assert run.steps(2) == Counter(skipped_steps=0, spikes=0)
    nn.init.ones_(run.bare.modality("image").adapter.output.bias)
    with pytest.raises(UserError, match="mean square of its target"):
        run.steps(1)
    run.is_new = False
    run.steps(1)


def test_mis_wired_text_is_refused(byte_tokenizer, accelerator) -> None:
    run = Run(byte_tokenizer, accelerator, normal_latents(), is_new=True)
    nn.init.normal_(run.bare.modality("text").head.weight, std=1.0)
    with pytest.raises(UserError, match=r"text loss of the first step is .* about 5\.5"):
        run.steps(1)


def test_latents_that_are_not_normalised_are_refused(byte_tokenizer, accelerator) -> None:
    run = Run(byte_tokenizer, accelerator, 5 * normal_latents(), is_new=True)
    with pytest.raises(UserError, match="scaling factor"):
        run.steps(1)


def test_first_text_loss_of_a_wide_model_is_known(byte_tokenizer, accelerator) -> None:
    """Above ln V, by half the variance of the logits: here more than the guard lets pass."""
    run = Run(byte_tokenizer, accelerator, normal_latents(), is_new=True, width=4096)
    assert run.steps(1) == Counter(skipped_steps=0, spikes=0)
    assert run.guards.first_losses["text"] > np.log(byte_tokenizer.vocab_size) + 0.5
