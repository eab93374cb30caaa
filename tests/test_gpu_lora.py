"""Low-rank adapters and 8-bit moments on a GPU: compiled, recorded, sampled; memory of frozen parts."""

import importlib.util
from pathlib import Path

import pytest
import torch
from conftest import tiny_config
from test_gpu_training import CHANNELS, Run
from test_lora_runs import write_adapter
from test_pipeline import seeds, tiny_pipeline
from torch import Tensor

from transfusion_mot.config import DiffusionConfig, LoraConfig, RunConfig
from transfusion_mot.data.batch import Batch
from transfusion_mot.models.attention import KVCache
from transfusion_mot.models.transfusion import TransfusionMoT, is_of_adapter
from transfusion_mot.pipeline import TransfusionPipeline
from transfusion_mot.sampling.decode_step import FewRows
from transfusion_mot.training.adamw_8bit import AdamW8bit
from transfusion_mot.training.graph import make_capturable
from transfusion_mot.training.lora import choose_trained
from transfusion_mot.training.step import loss_terms

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CUDA = torch.device("cuda")
needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao")


def adapted_model(vocab_size: int) -> TransfusionMoT:
    """As a bfloat16 run has it: frozen matrices in bfloat16, adapters that change something."""
    config = RunConfig(
        model=tiny_config(head_dim=32, rope="3d"), lora=LoraConfig(16, modules=["q", "v", "output", "gate", "down"])
    )
    with torch.device("meta"):
        sizes = {"text": vocab_size, "image": CHANNELS}
        model = TransfusionMoT.from_sections(sizes, config.model, DiffusionConfig())
        choose_trained(model, config)
    model.to_empty(device=CUDA)
    model.initialise(3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_of_adapter(name) or "adapter.output" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def gradients(model: TransfusionMoT, batch: Batch) -> list[Tensor]:
    with torch.autocast("cuda", torch.bfloat16):
        total = sum(term.loss for term in loss_terms(model, batch).values())
    total.backward()
    return [parameter.grad for parameter in model.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_compiled_blocks_with_adapters_give_the_gradients_of_plain_ones(byte_tokenizer, checkpointing: str) -> None:
    """They are compiled without a break (fullgraph); bfloat16 in another order."""
    batch = Run("cuda", byte_tokenizer).batch()
    results = []
    for is_compiled in (False, True):
        model = adapted_model(byte_tokenizer.vocab_size)
        model.checkpoint_activations(checkpointing if is_compiled else "none")
        if is_compiled:
            model.compile_blocks()
        results.append(gradients(model, batch))
    assert len(results[0]) == 2 * 2 * (2 + 2 + 2 + 2)
    for plain, compiled in zip(*results, strict=True):
        assert plain.norm() > 0
        assert (plain - compiled).norm() < 0.05 * plain.norm()


def parameters() -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape)) for shape in ((64, 128), (7,), (100, 33), (256, 96), (4096,))]


def optimizer_of(own: list[torch.nn.Parameter]) -> AdamW8bit:
    groups = [{"params": [(str(number), p) for number, p in enumerate(own)], "weight_decay": 0.1}]
    return AdamW8bit(groups, 1e-2, (0.9, 0.95), 1e-8)


@needs_torchao
def test_8_bit_moments_are_those_of_the_cpu_and_wait_for_nothing() -> None:
    on_cpu, on_gpu = parameters(), [torch.nn.Parameter(parameter.data.cuda()) for parameter in parameters()]
    optimizers = [optimizer_of(on_cpu), optimizer_of(on_gpu)]
    for step in range(12):
        for one, two in zip(on_cpu, on_gpu, strict=True):
            one.grad = torch.randn_like(one)
            two.grad = one.grad.cuda()
        for optimizer, device in zip(optimizers, ("cpu", "cuda"), strict=True):
            optimizer.found_inf = torch.tensor(float(step == 7), device=device)
            optimizer.grad_scale = torch.tensor(2.0, device=device)
        optimizers[0].step()
        # Compiled by then.
        torch.cuda.set_sync_debug_mode("error" if step > 3 else "default")
        try:
            optimizers[1].step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for one, two in zip(on_cpu, on_gpu, strict=True):
        torch.testing.assert_close(two.cpu(), one, rtol=1e-3, atol=1e-4)
        moment, other = optimizers[0].state[one]["exp_avg"], optimizers[1].state[two]["exp_avg"].cpu()
        assert (moment != other).float().mean() < 0.01 or moment.dtype == torch.float32
        assert optimizers[1].state[two]["step"].item() == 11


@needs_torchao
def test_8_bit_moments_are_recorded() -> None:
    plain, recorded = ([torch.nn.Parameter(parameter.data.cuda()) for parameter in parameters()] for _ in range(2))
    optimizers = [optimizer_of(plain), optimizer_of(recorded)]
    for own, optimizer in zip((plain, recorded), optimizers, strict=True):
        make_capturable(optimizer)
        for parameter in own:
            parameter.grad = torch.ones_like(parameter)
        for _ in range(3):
            optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizers[1].step()
    for lr in (1e-2, 3e-3, 1e-3):
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"].fill_(lr)
        optimizers[0].step()
        graph.replay()
    for one, two in zip(plain, recorded, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-7)


def painted(pipeline: TransfusionPipeline) -> Tensor:
    return pipeline(["sun", "moon"], generator=seeds(1, 2), output_type="latent").images.cpu()


def test_recorded_steps_follow_scales_fusing_and_unloading(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", LoraConfig(2, modules=["q", "v", "down"]), 1)
    recorded, plain = tiny_pipeline().to(CUDA), tiny_pipeline().to(CUDA)
    plain.workspace.records = False
    changes = (
        lambda p: None,
        lambda p: p.load_lora_weights(adapter, "one"),
        lambda p: p.set_adapters("one", 0.4),
        lambda p: p.disable_lora(),
        lambda p: p.enable_lora(),
        lambda p: p.fuse_lora(),
        lambda p: p.unfuse_lora(),
        lambda p: p.unload_lora_weights(),
    )
    results = []
    for change in changes:
        for pipeline in (recorded, plain):
            change(pipeline)
        results.append(painted(plain))
        for _ in range(2):
            torch.testing.assert_close(painted(recorded), results[-1], rtol=1e-3, atol=1e-3)
    assert (results[1] - results[0]).abs().max() > 0.1
    assert (results[2] - results[1]).abs().max() > 0.1


def test_few_rows_are_decoded_by_kernels_where_no_adapter_is(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", LoraConfig(2, modules=["q", "v", "down"]), 1)
    pipeline = tiny_pipeline().to(CUDA)
    config = pipeline.transformer.architecture
    kv_heads = config.num_kv_heads or config.num_heads
    cache = KVCache(config.num_layers, 2, kv_heads, config.head_dim, 64, CUDA, torch.float32)

    def serves() -> bool:
        return FewRows(pipeline.transformer, cache, "text").serves(2)

    assert serves()
    pipeline.load_lora_weights(adapter)
    assert not serves()
    with_adapter = pipeline.complete(["a", "sun"], max_new_tokens=8)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    assert serves()
    assert pipeline.complete(["a", "sun"], max_new_tokens=8) == with_adapter
