"""One process, DDP, FSDP2 and hybrid: equal weights, gradients, averages, and states that each can read."""

import functools
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import SIZES, VOCAB_SIZE, randomise, tiny_config
from process_group import FSDP2, HYBRID, run_processes
from test_losses import make_batch
from torch import Tensor
from torch.distributed.tensor import DTensor

from transfusion_mot import losses
from transfusion_mot.config import DiffusionConfig, ModelConfig, OptimizerConfig, TrainingConfig
from transfusion_mot.models.inputs import TokenInput
from transfusion_mot.models.transfusion import TransfusionMoT
from transfusion_mot.training import parallel
from transfusion_mot.training.checkpoint import find_state
from transfusion_mot.training.ema import EMA
from transfusion_mot.training.optimizer import make_optimizer
from transfusion_mot.training.parallel import end_preparing, host_group, make_accelerator, place, wrap
from transfusion_mot.training.state import StateWriter, load_tensors, state_tensors
from transfusion_mot.training.step import train_step

pytestmark = pytest.mark.slow

ADAPTERS = ({}, {"image": {"adapter": "unet", "unet_channels": [32, 32], "unet_num_layers": 1}})
SEED = 3
# Of float32 sums in another order.
CLOSE = {"rtol": 1e-4, "atol": 1e-6}
# Of AdamW: with 1e-8 a gradient of about the size of its rounding error would make a step of the whole learning rate.
EPSILON = 1e-3
Values = dict[str, Tensor]


def new_model(config: ModelConfig | None = None) -> TransfusionMoT:
    return TransfusionMoT.from_sections(SIZES, config or tiny_config(), DiffusionConfig())


def whole(tensors: dict[str, Tensor]) -> Values:
    return {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()
        for name, tensor in tensors.items()
    }


def steps(
    microbatch_rows: int,
    first: int,
    last: int,
    state: Path | None,
    resume: Path | None,
    mixed_precision: str = "no",
    compiled: bool = False,
) -> dict[str, Values]:
    """Some steps, with validation by the averages between them => all that they change, gradients included."""
    training = TrainingConfig(mixed_precision=mixed_precision, num_rows=8, tracker=None)
    accelerator = make_accelerator(training, Path())
    with torch.device("meta"):
        model = new_model()
    place(model, accelerator, SEED)
    if resume is None:
        fill(model)
    ema, optimizer = EMA(model, 0.9), make_optimizer(model, OptimizerConfig(lr=0.01, eps=EPSILON))
    if resume is not None:
        assert torch.equal(load_tensors(find_state(resume, "auto"), model, ema, optimizer), torch.arange(8))
    if compiled:
        # What the compiler sees is the same with any backend; this one takes no time.
        torch.compile = functools.partial(torch.compile, backend="eager")
        model.compile_blocks()
    wrapped = wrap(model, accelerator)
    batch = make_batch(dtype=torch.float32).split(8 // accelerator.num_processes)[accelerator.process_index]
    gradients: list[Values] = []

    def note(*_: object) -> None:
        gradients.append(whole({name: p.grad for name, p in model.named_parameters()}))

    optimizer.register_step_pre_hook(note)
    norms = []
    for step in range(first, last):
        result = train_step(
            wrapped,
            batch,
            optimizer,
            accelerator,
            loss_weights={"text": 1.0, "image": 5.0},
            microbatch_rows=microbatch_rows,
            max_grad_norm=0.5,
        )
        norms.append(result.grad_norm)
        ema.update(model, step)
        with ema.in_place_of(model), accelerator.autocast(), torch.no_grad():
            forward(model, batch)
    if state is not None:
        with StateWriter(state, 2, 0) as writer:
            writer.save(last, state_tensors(model, ema, optimizer, torch.arange(8)), {"step": last})
    assert not compiled or torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, "one code for all blocks"
    moments = {name: optimizer.state[p]["exp_avg_sq"] for name, p in model.named_parameters()}
    return {
        "first gradient": gradients[0],
        "gradient": gradients[-1],
        "norm": {str(number): norm for number, norm in enumerate(norms)},
        "model": whole(dict(model.named_parameters())),
        "ema": whole(ema.weights),
        "moment": whole(moments),
    }


def fill(model: TransfusionMoT) -> None:
    """Random where a fresh model has the zeros that would hide mistakes."""
    reference = new_model()
    randomise(reference)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # As bfloat16 holds it, so that what FSDP gathers in it is the same.
            value = reference.get_parameter(name).detach().bfloat16().float()
            if isinstance(parameter, DTensor):
                mesh, placements = parameter.device_mesh, parameter.placements
                value = torch.distributed.tensor.distribute_tensor(value, mesh, placements)
            parameter.copy_(value)


def forward(model: TransfusionMoT, batch) -> None:
    model(
        {
            name: TokenInput(given.ids) if isinstance(given, TokenInput) else given._replace(noise=None)
            for name, given in batch.inputs.items()
        },
        batch.slots,
    )


def assert_close(one: dict[str, Values], two: dict[str, Values]) -> None:
    for kind, values in one.items():
        assert values.keys() == two[kind].keys()
        for name, value in values.items():
            torch.testing.assert_close(
                two[kind][name], value, **CLOSE, msg=lambda text, at=f"{kind} {name}": f"{at} {text}"
            )


class Large(torch.nn.Module):
    """0.8 GB of gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = torch.nn.ParameterList(torch.empty(30 * 2**20) for _ in range(7))


def bucket_bytes() -> list[int]:
    """What DDP exchanges at a time of a model of a few parameters, and of a large one."""
    caps = []
    for model in (torch.nn.Linear(2, 2), Large()):
        wrapped = wrap(model, make_accelerator(TrainingConfig(mixed_precision="no", num_rows=2, tracker=None), Path()))
        caps.append(wrapped.bucket_bytes_cap)
    return caps


def test_large_models_exchange_more_at_a_time(tmp_path: Path) -> None:
    small, large = run_processes(bucket_bytes, 2, {}, tmp_path)[0]
    assert small == 25 * 2**20
    assert large == 7 * 120 // 30 * 2**20


def wait_for_late_ranks() -> list[float]:
    """Seconds for which even ranks wait for odd ones that never come, in every kind of group; 0 for odd ranks."""
    parallel._TRAINING = timedelta(seconds=1)
    accelerator = make_accelerator(TrainingConfig(mixed_precision="no", num_rows=4, tracker=None), Path())
    mesh = accelerator.torch_device_mesh
    groups = [dist.group.WORLD, *(mesh.get_all_groups() if mesh is not None else [])]
    is_late = accelerator.process_index % 2 == 1
    for group in groups:  # while preparing, they wait
        time.sleep(1.5 * is_late)
        dist.all_reduce(torch.zeros(1), group=group)
    end_preparing(accelerator)
    waited = []
    for group in [*groups, host_group()]:
        begun = time.monotonic()
        if is_late or all(rank % 2 == 0 for rank in dist.get_process_group_ranks(group)):
            time.sleep(1.5)
        else:
            with pytest.raises(RuntimeError):
                dist.all_reduce(torch.zeros(1), group=group)
            waited.append(time.monotonic() - begun)
    return waited


def test_late_ranks_are_waited_for_while_preparing_and_not_in_training(tmp_path: Path) -> None:
    for rank, waited in enumerate(run_processes(wait_for_late_ranks, 4, HYBRID, tmp_path)):
        # Of all ranks, of those that share weights, and from host to host.
        assert len(waited) == (0 if rank % 2 else 3)
        assert all(0.9 < seconds < 5 for seconds in waited)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[str, Values]:
    """Two steps of one process, all rows at once."""
    return run_processes(steps, 1, {}, tmp_path_factory.mktemp("alone"), 8, 0, 2, None, None)[0]


@pytest.mark.parametrize(
    ("world_size", "environment", "microbatch_rows"),
    [(1, {}, 3), (2, {}, 3), (4, {}, 1), (1, FSDP2, 4), (2, FSDP2, 1), (4, FSDP2, 2), (4, HYBRID, 1)],
    ids=["one", "ddp2", "ddp4", "fsdp1", "fsdp2", "fsdp4", "hybrid2x2"],
)
def test_steps_are_equal_however_rows_and_weights_are_split(
    tmp_path: Path, alone, world_size: int, environment: dict[str, str], microbatch_rows: int
) -> None:
    """Gradients, clipped by their global norm; and what they make of weights, averages and moments."""
    assert alone["norm"]["0"] > 0.5
    for result in run_processes(steps, world_size, environment, tmp_path, microbatch_rows, 0, 2, None, None):
        assert_close(alone, result)


@pytest.mark.parametrize("environment", [{}, FSDP2], ids=["ddp", "fsdp"])
def test_compiled_blocks_change_nothing(tmp_path: Path, alone, environment: dict[str, str]) -> None:
    for result in run_processes(steps, 2, environment, tmp_path, 2, 0, 2, None, None, "no", True):
        assert_close(alone, result)


def relative_error(found: Values, expected: Values) -> float:
    """Of all values together."""
    ours, theirs = (torch.cat([value.flatten() for value in values.values()]) for values in (found, expected))
    return ((ours - theirs).norm() / theirs.norm()).item()


def steps_in_chunks(mixed_precision: str) -> dict[str, Values]:
    """Two steps with a chunk of logits for each text slot: 24 chunks for each microbatch of a rank."""
    losses.LOGITS_AT_ONCE = VOCAB_SIZE
    return steps(2, 0, 2, None, None, mixed_precision, True)


def test_bfloat16_is_for_computing_alone(tmp_path: Path, alone) -> None:
    results = []
    for environment in ({}, FSDP2):
        result, _ = run_processes(steps_in_chunks, 2, environment, tmp_path / str(len(results)), "bf16")
        results.append(result)
        for kind in ("gradient", "model", "ema", "moment"):
            assert all(value.dtype == torch.float32 for value in result[kind].values()), kind
        assert relative_error(result["gradient"], alone["gradient"]) < 0.05
        for name, value in alone["gradient"].items():
            # In one weight alone terms may cancel, and no rounding does. One that is missing has an error of 1.
            error = relative_error({name: result["gradient"][name]}, {name: value})
            assert error < 0.6, f"{name}: {error}"
        assert any(not torch.equal(result["gradient"][name], value) for name, value in alone["gradient"].items())
    ddp, fsdp = (result["first gradient"] for result in results)
    # FSDP's gradients are rounded to bfloat16 once for a microbatch, and those of norms on their way, too.
    assert relative_error(fsdp, ddp) < 2**-10
    # A sum of 24 chunks, in float32.
    head = "modalities.text.head.weight"
    assert relative_error({head: fsdp[head]}, {head: ddp[head]}) < 2**-9


@pytest.mark.parametrize(
    ("before", "after"),
    [((2, FSDP2), (1, {})), ((2, {}), (4, FSDP2)), ((4, HYBRID), (2, {})), ((1, {}), (2, FSDP2))],
    ids=["fsdp2-one", "ddp2-fsdp4", "hybrid-ddp2", "one-fsdp2"],
)
def test_state_is_read_by_any_other_split(tmp_path: Path, alone, before, after) -> None:
    run = tmp_path / "run"
    run_processes(steps, *before, tmp_path / "before", 2, 0, 1, run, None)
    of_last_step = ("gradient", "model", "ema", "moment")
    for result in run_processes(steps, *after, tmp_path / "after", 2, 1, 2, None, run):
        assert_close({kind: alone[kind] for kind in of_last_step}, {kind: result[kind] for kind in of_last_step})


@pytest.mark.parametrize("world_size", [1, 3])
def test_weights_of_a_seed_are_the_same_sharded_or_not(tmp_path: Path, world_size: int) -> None:
    """Bit for bit; three processes do not divide anything."""
    expected = []
    for changes in ADAPTERS:
        model = new_model(tiny_config(**changes))
        model.initialise(SEED)
        expected.append(dict(model.named_parameters()))
    for results in run_processes(weights_for, world_size, FSDP2, tmp_path, 8 * world_size):
        for one, two in zip(expected, results, strict=True):
            assert one.keys() == two.keys()
            assert all(torch.equal(one[name], two[name]) for name in one)


def weights_for(num_rows: int) -> list[Values]:
    accelerator = make_accelerator(TrainingConfig(mixed_precision="no", num_rows=num_rows, tracker=None), Path())
    result = []
    for changes in ADAPTERS:
        with torch.device("meta"):
            model = new_model(tiny_config(**changes))
        place(model, accelerator, SEED)
        result.append(whole(dict(model.named_parameters())))
    return result


def test_weights_depend_on_the_seed_alone() -> None:
    def drawn(seed: int) -> TransfusionMoT:
        torch.randn(seed + 1)
        model = new_model(tiny_config(**ADAPTERS[1]))
        state = torch.get_rng_state()
        model.initialise(seed)
        assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"
        return model

    one, two, other = drawn(1), drawn(1), drawn(2)
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, two.get_parameter(name))
        constant = "norm" in name or "conv_out" in name
        assert torch.equal(parameter, other.get_parameter(name)) == constant, name
    values = torch.cat([p.flatten() for p in one.parameters() if p.std() > 0])
    assert len(values.unique()) > 0.95 * len(values), "no two modules draw the same"


def test_new_models_differ() -> None:
    one, two = (new_model() for _ in range(2))
    assert not torch.equal(one.modality("text").head.weight, two.modality("text").head.weight)
