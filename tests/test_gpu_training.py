"""Whole training steps on a CUDA device: `pytest -m gpu`."""

import dataclasses

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import data_config, numbered_images, packer_of, sources_of, texts_of, tiny_config
from torch import Tensor
from torch._dynamo.utils import counters

from transfusion_mot.config import DiffusionConfig, ModelConfig, OptimizerConfig, TowerConfig
from transfusion_mot.data.batch import Batch
from transfusion_mot.data.tokenizer import TextTokenizer
from transfusion_mot.diffusion import Diffusion
from transfusion_mot.models.attention import KernelChoice
from transfusion_mot.models.mot import Checkpointing
from transfusion_mot.models.transfusion import TransfusionMoT
from transfusion_mot.training.float8 import convert_to_float8
from transfusion_mot.training.graph import GraphedStep, make_capturable
from transfusion_mot.training.optimizer import make_optimizer, set_lr
from transfusion_mot.training.step import StepResult, loss_terms, seed_step, train_step

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CHANNELS = 3
ROWS = 8


class Run:
    """A tiny model on the rows of some lanes: on CUDA compiled and in bfloat16 by default, on the CPU eager and in
    float32."""

    def __init__(
        self,
        device: str,
        tokenizer: TextTokenizer,
        precision: str | None = None,
        optimizer: str = "adamw",
        config: ModelConfig | None = None,
        checkpointing: Checkpointing = "none",
        compiled: bool = True,
        float8: bool = False,
        lr: float = 3e-3,
        seed: int = 0,
        attention: KernelChoice = "auto",
    ) -> None:
        self.device = torch.device(device)
        on_gpu = device == "cuda"
        captions = [f"picture {number}" for number in range(20)]
        texts = ["to be or not to be, that is the question", "all the world is a stage"]
        self.packer = packer_of(
            sources_of(numbered_images(captions), texts_of(texts)),
            tokenizer,
            data_config(text_slots=64, images_per_row=16),
            rope="3d",
            lanes=ROWS,
            timesteps_from_uniform=Diffusion.from_config(DiffusionConfig()).timesteps_from_uniform,
        )
        self.states = self.packer.initial_state()[None].repeat(ROWS, axis=0)
        torch.manual_seed(seed)
        config = config or tiny_config(head_dim=32, rope="3d")
        self.loss_weights = {name: modality.loss_weight for name, modality in config.modalities.items()}
        sizes = {"text": tokenizer.vocab_size, "image": CHANNELS}
        self.bare = TransfusionMoT.from_sections(sizes, config, DiffusionConfig()).to(self.device)
        if float8:
            convert_to_float8(self.bare)
        self.optimizer = make_optimizer(self.bare, OptimizerConfig(name=optimizer, lr=lr))
        AcceleratorState._reset_state(reset_partial_state=True)
        self.accelerator = Accelerator(cpu=not on_gpu, mixed_precision=precision or ("bf16" if on_gpu else "no"))
        self.bare.checkpoint_activations(checkpointing)
        self.bare.attention = attention
        if not compiled:
            self.bare.attention = "sdpa"  # FlexAttention would compile itself
        elif on_gpu:
            self.bare.compile_blocks()
        self.model = self.accelerator.prepare_model(self.bare)
        self.done = 0

    def batch(self) -> Batch:
        rows, self.states, _ = self.packer.rows(range(ROWS), self.done, self.states)
        self.done += 1
        return rows.batch.to(self.device)

    def step(self, batch: Batch) -> StepResult:
        return train_step(
            self.model,
            batch,
            self.optimizer,
            self.accelerator,
            loss_weights=self.loss_weights,
            microbatch_rows=ROWS // 2,
            max_grad_norm=1.0,
        )


def loss_sums(result: StepResult) -> Tensor:
    """[modalities], summed losses."""
    return torch.stack([losses.sum() for losses in result.losses.values()])


def curve(run: Run, num_steps: int) -> torch.Tensor:
    """Mean loss of each modality in every step [steps, modalities]."""
    results = [run.step(run.batch()) for _ in range(num_steps)]
    return torch.stack([(loss_sums(result) / result.counts).float().cpu() for result in results])


def test_loss_curves_of_both_devices_agree(byte_tokenizer) -> None:
    """60 steps on the same rows, several seeds.

    In float32 compilation and other kernels change the curves less than a change of all initial weights by 1e-5 of
    themselves, a hundred roundings, does on one device. A larger learning rate or more steps make small differences
    grow until they say nothing: at 3e-3, 1e-6 becomes 1e-3 in 100 steps. In bfloat16 they change them about as much as
    bfloat16 does on the CPU.
    """

    def trained(device: str, precision: str, seed: int, moved: float = 0.0) -> Tensor:
        run = Run(device, byte_tokenizer, precision, seed=seed, lr=1e-3)
        with torch.no_grad():
            for parameter in run.bare.parameters():
                parameter.mul_(1 + moved * torch.randn(parameter.shape).to(parameter))
        return curve(run, 60)

    differences: dict[str, list[Tensor]] = {"moved": [], "gpu": [], "half": [], "half on gpu": []}
    for seed in range(3):
        host = trained("cpu", "no", seed)
        assert (host[-10:].mean(dim=0) < 0.9 * host[:10].mean(dim=0)).all(), "nothing was learnt, so nothing compared"
        others = {
            "moved": trained("cpu", "no", seed, 1e-5),
            "gpu": trained("cuda", "no", seed),
            "half": trained("cpu", "bf16", seed),
            "half on gpu": trained("cuda", "bf16", seed),
        }
        for name, other in others.items():
            differences[name].append((other / host - 1).abs())
    mean = {name: torch.stack(found).mean().item() for name, found in differences.items()}
    assert mean["moved"] < 0.2 * mean["half"], "the comparison in float32 is no sharper than in bfloat16"
    assert mean["gpu"] < mean["moved"], mean
    # Two draws of the same size: neither is the larger one for sure.
    assert mean["half on gpu"] < 2 * mean["half"], mean


# Heads of 64 have kernels of their own on Hopper.
INTERVALS = {head_dim: tiny_config(head_dim=head_dim, rope="3d") for head_dim in (32, 64)}


@pytest.mark.parametrize(
    ("optimizer", "attention", "head_dim"),
    [("adamw", "auto", 32), ("muon", "auto", 32), ("adamw", "interval", 32), ("adamw", "interval", 64)],
)
def test_recorded_step_is_the_plain_one(byte_tokenizer, optimizer: str, attention: KernelChoice, head_dim: int) -> None:
    """The same batches, with another learning rate each; then one that is not finite, which moves nothing."""
    plain, recorded = (
        Run("cuda", byte_tokenizer, optimizer=optimizer, config=INTERVALS[head_dim], attention=attention)
        for _ in range(2)
    )
    make_capturable(recorded.optimizer)
    take_step = GraphedStep(recorded.step)
    config = OptimizerConfig(lr=3e-3, warmup_steps=4)
    for step in range(10):
        batch = plain.batch()
        rows = batch.split(4)[0] if step % 3 == 2 else batch  # two shapes
        for run in (plain, recorded):
            set_lr(run.optimizer, config, step, 10)
        one, two = plain.step(rows), take_step(rows)
        torch.testing.assert_close(loss_sums(two), loss_sums(one), rtol=2e-3, atol=0)
        assert torch.equal(two.counts, one.counts)
        torch.testing.assert_close(two.grad_norm, one.grad_norm, rtol=2e-2, atol=0)
    before = [parameter.clone() for parameter in recorded.bare.parameters()]
    set_lr(recorded.optimizer, config, 0, 10)
    images = batch.latents("image")
    spoilt = images._replace(latents=torch.full_like(images.latents, float("nan")))
    result = take_step(dataclasses.replace(batch, inputs=batch.inputs | {"image": spoilt}))
    assert not result.grad_norm.isfinite()
    assert all(torch.equal(one, two) for one, two in zip(before, recorded.bare.parameters(), strict=True))
    take_step(batch)
    assert not all(torch.equal(one, two) for one, two in zip(before, recorded.bare.parameters(), strict=True))
    assert all(parameter.isfinite().all() for parameter in recorded.bare.parameters())


DROPPING = tiny_config(
    head_dim=32, rope="3d", towers={name: TowerConfig(16, 24, dropout=0.5) for name in ("text", "image")}
)


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "eager"])
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_every_replay_drops_by_its_seed(byte_tokenizer, checkpointing: Checkpointing, compiled: bool) -> None:
    run = Run("cuda", byte_tokenizer, config=DROPPING, checkpointing=checkpointing, compiled=compiled)
    make_capturable(run.optimizer)
    take_step = GraphedStep(run.step)
    batch = run.batch()
    for step in range(5):  # the fourth records
        seed_step(0, step, 0)
        take_step(batch)
    for group in run.optimizer.param_groups:
        group["lr"].zero_()  # the weights stay

    def losses(step: int) -> StepResult:
        seed_step(0, step, 0)
        return take_step(batch)

    one, other, again = losses(5), losses(6), losses(5)
    assert torch.equal(loss_sums(one), loss_sums(again))
    assert one.losses.keys() == other.losses.keys() == batch.inputs.keys()
    assert not any(torch.equal(one.losses[name], other.losses[name]) for name in batch.inputs)
    torch.testing.assert_close(again.grad_norm, one.grad_norm, rtol=1e-3, atol=0)
    # What is recorded drops what the step itself does.
    seed_step(0, 5, 0)
    plain = run.step(batch)
    torch.testing.assert_close(loss_sums(one), loss_sums(plain), rtol=2e-3, atol=0)
    torch.testing.assert_close(one.grad_norm, plain.grad_norm, rtol=2e-2, atol=0)


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "eager"])
@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_what_is_computed_again_drops_the_same(byte_tokenizer, checkpointing: Checkpointing, compiled: bool) -> None:
    kinds: list[Checkpointing] = ["none", checkpointing]
    plain, again = (
        Run("cuda", byte_tokenizer, config=DROPPING, checkpointing=kind, compiled=compiled) for kind in kinds
    )
    for _ in range(3):
        plain.step(plain.batch())
    again.bare.load_state_dict(plain.bare.state_dict())
    batch, results = plain.batch(), []
    for run in (plain, again):
        seed_step(0, 0, 0)
        results.append(run.step(batch))
    torch.testing.assert_close(loss_sums(results[1]), loss_sums(results[0]), rtol=2e-3, atol=0)
    torch.testing.assert_close(results[1].grad_norm, results[0].grad_norm, rtol=2e-2, atol=0)


@pytest.mark.parametrize(("attention", "head_dim"), [("auto", 32), ("interval", 32), ("interval", 64)])
def test_a_step_neither_waits_for_the_device_nor_compiles_again(
    byte_tokenizer, attention: KernelChoice, head_dim: int
) -> None:
    run = Run("cuda", byte_tokenizer, config=INTERVALS[head_dim], attention=attention)
    for _ in range(5):
        run.step(run.batch())
    batches = [run.batch() for _ in range(200)]
    torch.cuda.synchronize()
    counters.clear()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch._dynamo.config.patch(error_on_recompile=True):
            for batch in batches:
                run.step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert counters["stats"]["unique_graphs"] == 0


@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="needs 8 bits")
@pytest.mark.parametrize("checkpointing", ["none", "selective"])
def test_8_bit_products_learn_what_bfloat16_learns(byte_tokenizer, checkpointing: Checkpointing) -> None:
    """30 steps on the same rows. On the CPU, rounding to 8 bits moves the last losses of the first by 0.4 %."""
    pytest.importorskip("torchao")
    wide = {name: TowerConfig(128, 256) for name in ("text", "image")}
    config = tiny_config(towers=wide, head_dim=32, rope="3d")
    runs = [
        Run("cuda", byte_tokenizer, config=config, checkpointing=checkpointing, float8=float8, lr=1e-3)
        for float8 in (False, True)
    ]
    plain, eight = (curve(run, 30) for run in runs)
    assert (plain[-5:].mean(dim=0) < 0.9 * plain[:5].mean(dim=0)).all(), "nothing was learnt, so nothing was compared"
    torch.testing.assert_close(eight[-5:].mean(dim=0), plain[-5:].mean(dim=0), rtol=0.03, atol=0.0)
    assert not torch.equal(eight, plain), "nothing was rounded"
    # Validation and samples forward any number of rows, uncompiled.
    row, bare = runs[1].batch().split(1)[0], runs[1].bare
    runs[0].bare.load_state_dict(bare.state_dict())
    with torch.no_grad(), runs[1].accelerator.autocast():
        one, two = (torch.stack([term.loss for term in loss_terms(run.bare, row).values()]) for run in runs)
    torch.testing.assert_close(two, one, rtol=0.05, atol=0.0)
    assert not torch.equal(two, one)


@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="needs 8 bits")
def test_recorded_step_of_8_bit_products_is_the_plain_one(byte_tokenizer) -> None:
    pytest.importorskip("torchao")
    wide = {name: TowerConfig(128, 256) for name in ("text", "image")}
    config = tiny_config(towers=wide, head_dim=32, rope="3d")
    plain, recorded = (Run("cuda", byte_tokenizer, config=config, float8=True, lr=1e-3) for _ in range(2))
    make_capturable(recorded.optimizer)
    take_step = GraphedStep(recorded.step)
    for _ in range(10):
        batch = plain.batch()
        one, two = plain.step(batch), take_step(batch)
        torch.testing.assert_close(loss_sums(two), loss_sums(one), rtol=1e-2, atol=0)
