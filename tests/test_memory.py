"""The predicted memory of a step against the tensors that torch keeps."""

import functools
import inspect
import textwrap

import pytest
import torch
from conftest import DENSE, tiny_config
from functorch.compile import min_cut_rematerialization_partition
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode

from transfusion_mot.config import (
    DiffusionConfig,
    LoraConfig,
    ModalityConfig,
    ModelConfig,
    RunConfig,
    TowerConfig,
    TrainingConfig,
)
from transfusion_mot.data.row_arrays import RowShape
from transfusion_mot.models import mot
from transfusion_mot.models.transfusion import TransfusionMoT, is_of_adapter
from transfusion_mot.reporting.memory import (
    Learning,
    Setting,
    kept_by_adapter,
    kept_by_block,
    logits_memory,
    step_memory,
)
from transfusion_mot.training.lora import choose_trained

pytestmark = pytest.mark.slow


def meta_model(config: ModelConfig, **sizes: int) -> TransfusionMoT:
    with torch.device("meta"):
        return TransfusionMoT.from_sections({"text": 29, "image": 3} | sizes, config, DiffusionConfig())


def shape_of(
    config: ModelConfig, text_slots: int, images: int, latents: tuple[int, int, int], **slots: int
) -> RowShape:
    return RowShape.of(config, {"text": text_slots, "image": images} | slots, {"image": [latents]}, 0)


def test_parts_that_follow_from_counts() -> None:
    config = tiny_config()
    model = meta_model(config)
    shape = shape_of(config, 12, 2, (3, 4, 4))
    count = sum(parameter.numel() for parameter in model.parameters())
    ddp = step_memory(model, shape, Setting(4, gpus=8))
    assert (ddp.weights, ddp.gradients, ddp.optimizer, ddp.ema) == (4 * count, 4 * count, 8 * count, 4 * count)
    fsdp = step_memory(model, shape, Setting(4, gpus=8, parallelism="fsdp2"))
    assert (fsdp.weights, fsdp.gradients, fsdp.optimizer, fsdp.ema) == tuple(n * count / 8 for n in (4, 4, 8, 4))
    matrices = sum(p.numel() for n, p in model.named_parameters() if n.startswith("blocks.") and p.ndim == 2)
    assert step_memory(model, shape, Setting(4, optimizer="muon")).optimizer == 8 * count - 4 * matrices
    for parameter in model.blocks.parameters():
        parameter.requires_grad_(False)
    blocks = sum(parameter.numel() for parameter in model.blocks.parameters())
    frozen = step_memory(model, shape, Setting(4))
    assert (frozen.gradients, frozen.optimizer) == (4 * (count - blocks), 8 * (count - blocks))


def test_gradients_are_there_with_the_activations_only_if_they_stay() -> None:
    model, shape = meta_model(tiny_config(), image=4), shape_of(tiny_config(), 8, 1, (4, 2, 2))
    alone = step_memory(model, shape, Setting(64))
    several = step_memory(model, shape, Setting(64, microbatches=2))
    assert several.peak - alone.peak == pytest.approx(alone.gradients)
    few = step_memory(model, shape, Setting(1))
    assert few.peak == few.weights + few.optimizer + few.ema + few.gradients + few.copies


def test_adapter_keeps_what_autograd_saves() -> None:
    """Counted on `meta`, and in a real pass in float32."""
    config = tiny_config(image={"adapter": "unet", "unet_channels": [32, 64], "unet_num_layers": 1})
    model = meta_model(config)
    adapter = type(model.modality("image").adapter)(3, 16, 2, [32, 64], 1)
    weights = {parameter.data_ptr() for parameter in adapter.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden, skips = adapter.embed(torch.randn(1, 3, 4, 8), torch.rand(1))
        adapter.predict(hidden, skips, 4, 8)
    expected = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    blocks = shape_of(config, 12, 1, (3, 4, 8)).blocks
    assert kept_by_adapter(model, "image", blocks["image"], 4) == expected
    assert kept_by_adapter(model, "text", blocks["text"], 4) == 0


def test_what_losses_keep_of_one_modality_waits_for_the_next() -> None:
    speech = ModalityConfig("text")
    config = tiny_config(modalities=tiny_config().modalities | {"speech": speech})
    model = meta_model(config, speech=13)
    # Gradients of 12 and 20 hidden states and of two heads in float32 stay; logits, twice, and two narrow heads go.
    stay = 2 * (12 + 20) * 16 + 4 * (29 + 13) * 16
    go = [2 * (2 * slots * size + 2 * size * 16) for slots, size in ((12, 29), (20, 13))]
    assert logits_memory(model, shape_of(config, 12, 2, (3, 4, 4), speech=20), 1, 2) == stay + max(go)


# --- What the compiler keeps of a block. ---


@torch.library.custom_op("test_memory::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """In place of FlexAttention, whose backward cannot be traced without a GPU; it keeps the same."""
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("test_memory::attention_backward", mutates_args=())
def attention_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, s: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


attention.register_fake(lambda q, k, v: (torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)))
attention_backward.register_fake(lambda g, q, k, v, o, s: tuple(map(torch.empty_like, (q, k, v))))
attention.register_autograd(
    lambda ctx, g, _: attention_backward(g, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, *output),
)


def kept_by_compiler(
    config: ModelConfig,
    slots: dict[str, int],
    rows: int,
    checkpointing: str,
    monkeypatch: pytest.MonkeyPatch,
    insulated: tuple[str, ...] = (),
    block: mot.MoTBlock | None = None,
) -> int:
    """Bytes of the tensors, weights aside, that a block's compiled forward hands to its backward."""
    monkeypatch.setattr(mot, "joint_attention", lambda q, k, v, mask: attention(q, k, v)[0])
    monkeypatch.setattr(mot, "_EXPENSIVE", mot._EXPENSIVE | {torch.ops.test_memory.attention.default})
    # The kernel for CUDA devices, which is one operation to the compiler.
    source = textwrap.dedent(inspect.getsource(mot.MoTBlock._joint_heads))
    scope = dict(vars(mot))
    exec(source.replace("projected[0].is_cuda", "True"), scope)
    monkeypatch.setattr(mot.MoTBlock, "_joint_heads", scope["_joint_heads"])
    kept = []

    def forward_graph(graph, inputs):
        (output,) = (node for node in graph.graph.nodes if node.op == "output")
        kept.extend(node.meta["val"] for node in output.args[0] if node is not None and node.op != "placeholder")
        return graph

    backend = aot_autograd(
        fw_compiler=forward_graph,
        bw_compiler=lambda graph, inputs: graph,
        partition_fn=functools.partial(min_cut_rematerialization_partition, compiler="inductor"),
        decompositions=select_decomp_table(),
    )
    with FakeTensorMode(allow_non_fake_inputs=True), torch.autocast("cpu", torch.bfloat16):
        if block is None:
            block = mot.MoTBlock(config)
        for module in block.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                like = torch.empty(parameter.shape, dtype=parameter.dtype)
                setattr(module, name, torch.nn.Parameter(like, parameter.requires_grad))
        block.checkpointing, block.insulated = checkpointing, insulated
        streams = {
            tower: torch.empty(rows, count, config.towers[tower].hidden_size, dtype=torch.bfloat16, requires_grad=True)
            for tower, count in slots.items()
        }
        angles = torch.empty(rows, sum(slots.values()), 1, config.head_dim // 2)
        torch.compile(block, backend=backend, fullgraph=True, dynamic=False)(streams, (angles, angles), angles)
    shapes = {tuple(p.shape) for p in block.parameters()}
    weights = shapes | {shape[::-1] for shape in shapes}
    # What a block returns is the next one's input, which is what `kept_by_block` counts of the two. Views are one.
    storages = {
        value.untyped_storage()._cdata: value.untyped_storage() for value in kept if tuple(value.shape) not in weights
    }
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize(
    ("changes", "slots"),
    [
        ({"towers": {"text": TowerConfig(32, 80), "image": TowerConfig(32, 80)}}, {"text": 128, "image": 256}),
        ({"towers": {"text": TowerConfig(48, 80), "image": TowerConfig(16, 96)}}, {"text": 128, "image": 256}),
        (
            {"towers": {"text": TowerConfig(32, 80), "image": TowerConfig(32, 80)}, "untied": []},
            {"text": 128, "image": 256},
        ),
        (
            {"towers": {"shared": TowerConfig(32, 80)}, "modalities": DENSE["modalities"]},
            {"shared": 384},
        ),
        ({"towers": {"text": TowerConfig(32, 80), "image": TowerConfig(32, 80, 0.5)}}, {"text": 128, "image": 256}),
        (
            {"towers": {"text": TowerConfig(32, 80, qkv_bias=True, qk_norm=False), "image": TowerConfig(32, 80)}},
            {"text": 128, "image": 256},
        ),
    ],
    ids=["mot", "other widths", "tied", "dense", "dropout", "bias, mixed norms"],
)
def test_block_keeps_what_the_compiler_keeps(changes, slots, checkpointing, monkeypatch) -> None:
    config = tiny_config(**changes, num_heads=4, num_kv_heads=2)
    expected = kept_by_compiler(config, slots, 5, checkpointing, monkeypatch)
    predicted = kept_by_block(config, {tower: 5 * count for tower, count in slots.items()}, checkpointing, 2)
    assert predicted == expected


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("insulated", [("text",), ("text", "image")])
def test_block_with_insulated_towers_keeps_two_attentions(insulated, checkpointing, monkeypatch) -> None:
    config = tiny_config(
        towers={"text": TowerConfig(32, 80), "image": TowerConfig(32, 80)}, num_heads=4, num_kv_heads=2
    )
    expected = kept_by_compiler(config, {"text": 128, "image": 256}, 5, checkpointing, monkeypatch, insulated)
    assert kept_by_block(config, {"text": 640, "image": 1280}, checkpointing, 2, attentions=2) == expected


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize(
    ("lora", "frozen"),
    [
        (None, ["text"]),
        (LoraConfig(4, towers=["text"], also_train=["image"]), []),
        (LoraConfig(4, modules=["q", "v"]), []),
    ],
    ids=["frozen text", "lora on text and image", "lora on q and v"],
)
def test_block_that_is_not_trained_as_a_whole_keeps_less(lora, frozen, checkpointing, monkeypatch) -> None:
    towers = {"text": TowerConfig(48, 80), "image": TowerConfig(16, 96)}
    config = tiny_config(towers=towers, num_heads=4, num_kv_heads=2)
    model = meta_model(config)
    with torch.device("meta"):
        choose_trained(model, RunConfig(model=config, lora=lora, training=TrainingConfig(frozen_towers=frozen)))
    block, slots = model.blocks[0], {"text": 128, "image": 256}
    learning = {tower: Learning.of(block, tower) for tower in slots}
    expected = kept_by_compiler(config, slots, 5, checkpointing, monkeypatch, block=block)
    predicted = kept_by_block(config, {tower: 5 * count for tower, count in slots.items()}, checkpointing, 2, learning)
    # Parts of the second matrices in bfloat16 are no activations.
    adapters = sum(parameter.numel() for name, parameter in block.named_parameters() if is_of_adapter(name))
    assert predicted <= expected <= predicted + 2 * adapters


def test_parts_of_a_step_that_trains_adapters() -> None:
    config = tiny_config(num_layers=1)
    run = RunConfig(model=config, lora=LoraConfig(2, also_train=["text.head"]), training=TrainingConfig())
    model, shape = meta_model(config), shape_of(config, 12, 2, (3, 4, 4))
    choose_trained(model, run)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    narrow = sum(p.numel() for p in model.parameters() if not p.requires_grad and p.ndim > 1)
    count = sum(parameter.numel() for parameter in model.parameters())
    memory = step_memory(model, shape, Setting(4, optimizer="adamw_8bit", ema=False))
    assert (memory.weights, memory.gradients, memory.ema) == (4 * count - 2 * narrow, 4 * trained, 0)
    # Too small for codes.
    assert memory.optimizer == 8 * trained
    assert step_memory(model, shape, Setting(4)).ema == 4 * trained
