"""Whole runs with low-rank adapters, the folders that they leave, and pipelines that load those."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from process_group import FSDP2, run_processes
from test_pipeline import seeds, tiny_pipeline
from test_train import interrupt_after
from torch import Tensor
from training_runs import assert_same, final_state

import train
from transfusion_mot.config import LoraConfig, to_dict
from transfusion_mot.errors import UserError
from transfusion_mot.files import ADAPTER_CONFIG, find_snapshot
from transfusion_mot.models.lora import add_adapter, digests, fingerprint
from transfusion_mot.models.transfusion import base_name, is_of_adapter
from transfusion_mot.pipeline import TransfusionPipeline
from transfusion_mot.sampling.export import export
from transfusion_mot.sampling.lora import ADAPTER_WEIGHTS, AdapterInfo, save_adapter, sizes_of

pytestmark = pytest.mark.slow

LORA = ["lora.rank=2", "lora.alpha=3", "lora.modules=[q, v, output, down]", "lora.also_train=[image.adapter]"]


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


def merged_by_hand(state: dict[str, Tensor], num_layers: int = 2) -> dict[str, Tensor]:
    """Parameters of the model that averages of a state make: W + alpha / r * B A, written out for each map."""
    own = {base_name(name).removeprefix("model/"): value for name, value in state.items() if name.startswith("model/")}
    averages = {name.removeprefix("ema/"): value for name, value in state.items() if name.startswith("ema/")}
    result = {name: value for name, value in own.items() if not is_of_adapter(name)}
    result |= {name: value for name, value in averages.items() if not is_of_adapter(name)}
    for name in [name for name in averages if ".lora_A." in name]:
        down, up = averages[name], averages[name.replace("lora_A", "lora_B")]
        target = result[f"{name.split('.lora_A')[0]}.weight"] = result[f"{name.split('.lora_A')[0]}.weight"].clone()
        if ".qkv." in name:
            # Two heads of 8: queries are the first 16 rows, values the last.
            target[:16] += 1.5 * up[:16] @ down[:2]
            target[32:] += 1.5 * up[16:] @ down[2:]
        else:
            target += 1.5 * up @ down
    return result


def test_a_run_goes_on_exactly_and_leaves_adapters_that_are_its_averages(arguments, tmp_path, monkeypatch) -> None:
    train.main([*arguments("whole"), *LORA])
    with monkeypatch.context() as patch:
        interrupt_after(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            train.main([*arguments("parts", training={"save_every": 3, "validate_every": 2, "sample_every": 2}), *LORA])
    train.main([*arguments("parts"), *LORA])
    whole, parts = final_state(tmp_path / "whole"), final_state(tmp_path / "parts")
    assert_same(whole, parts)
    ups = {name: value for name, value in whole.items() if name.startswith("ema/") and ".lora_B." in name}
    assert len(ups) == 2 * 2 * 3
    assert all(value.abs().sum() > 0 for value in ups.values())

    folder = find_snapshot(str(tmp_path / "whole"))
    assert {path.name for path in folder.iterdir()} == {ADAPTER_CONFIG, ADAPTER_WEIGHTS, "README.md"}
    assert 'load_lora_weights("PATH' in (folder / "README.md").read_text()
    pipeline = TransfusionPipeline.from_pretrained(folder)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    merged = merged_by_hand(whole)
    found = dict(pipeline.transformer.named_parameters())
    assert found.keys() == merged.keys()
    for name, value in merged.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)
    export(str(tmp_path / "whole"), tmp_path / "out", licences=None, evaluation=None, max_megabytes=None)
    exported = TransfusionPipeline.from_pretrained(tmp_path / "out", torch_dtype=torch.float32)
    for name, value in exported.transformer.named_parameters():
        torch.testing.assert_close(value, merged[name].bfloat16().float(), rtol=1e-2, atol=1e-6, msg=name)

    with pytest.raises(UserError, match=r"was trained with another lora: {'rank': 2}, and now it is {'rank': 3}"):
        train.main([*arguments("whole", training={"num_steps": 7}), *LORA, "lora.rank=3"])
    with pytest.raises(UserError, match="was trained with another lora"):
        train.main(arguments("whole", training={"num_steps": 7}))
    shutil.rmtree(tmp_path / "whole" / "base")
    with pytest.raises(UserError, match=r"is an adapter of .*, which cannot be loaded"):
        TransfusionPipeline.from_pretrained(folder)


def test_two_processes_sharded_or_not_equal_one(arguments, tmp_path: Path) -> None:
    # Steps of AdamW are of the size of the learning rate also where a gradient is a rounding error.
    optimizer = {"optimizer": {"eps": 1.0e-3, "warmup_steps": 2, "lr": 0.01}}
    train.main([*arguments("one", **optimizer), *LORA])
    one = final_state(tmp_path / "one")
    for run, environment in (("ddp", {}), ("fsdp", FSDP2)):
        run_processes(train.main, 2, environment, tmp_path / f"{run}-processes", [*arguments(run, **optimizer), *LORA])
        assert_same(one, final_state(tmp_path / run), tolerance=2e-5)
        infos = [AdapterInfo.read(find_snapshot(str(tmp_path / name))) for name in ("one", run)]
        assert infos[0] == infos[1]


# --- Pipelines. ---


def write_adapter(folder: Path, lora: LoraConfig, seed: int, **sizes: object) -> Path:
    """An adapter of the tiny pipeline that changes it a lot."""
    pipeline = tiny_pipeline()
    model, before = pipeline.transformer, digests(pipeline.transformer)
    add_adapter(model, lora)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, parameter in model.named_parameters():
        if is_of_adapter(name) or name.startswith(tuple(f"modalities.{part}." for part in lora.also_train)):
            drawn = 0.3 * torch.randn(parameter.shape, generator=generator)
            tensors[name] = drawn if is_of_adapter(name) else parameter.detach() + drawn
    whole = {name for name in tensors if not is_of_adapter(name)}
    folder.mkdir()
    info = AdapterInfo(to_dict(lora), "somewhere/else", sizes_of(model) | sizes, fingerprint(before, whole))
    save_adapter(folder, tensors, info)
    return folder


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return [
        write_adapter(folder / "one", LoraConfig(2, modules=["q", "v", "down"]), 1),
        write_adapter(folder / "two", LoraConfig(3, towers=["image"], also_train=["image.adapter"]), 2),
    ]


def painted(pipeline: TransfusionPipeline) -> Tensor:
    return pipeline("sun", generator=seeds(1), output_type="latent").images


def test_adapters_are_loaded_scaled_fused_and_unloaded(adapters: list[Path]) -> None:
    pipeline = tiny_pipeline()
    plain = painted(pipeline)
    pipeline.load_lora_weights(adapters[0], adapter_name="one")
    with_one = painted(pipeline)
    assert (with_one - plain).abs().max() > 0.1
    pipeline.set_adapters("one", 0.0)
    assert torch.equal(painted(pipeline), plain)
    pipeline.set_adapters("one", 0.5)
    half = painted(pipeline)
    assert not torch.equal(half, with_one)
    for refused in (float("nan"), float("inf"), [float("nan")], {"transformer": float("nan")}, "1.0"):
        with pytest.raises(UserError, match=r"adapter_weights has .*a scale must be a finite number"):
            pipeline.set_adapters("one", refused)
    with pytest.raises(UserError, match="there are 2 adapter_weights for 1 adapters"):
        pipeline.set_adapters(["one"], [0.5, 0.5])
    with pytest.raises(UserError, match="lora_scale has nan"):
        pipeline.fuse_lora(lora_scale=float("nan"))
    assert torch.equal(painted(pipeline), half), "what was refused has changed nothing"
    pipeline.fuse_lora()
    torch.testing.assert_close(painted(pipeline), half, rtol=0, atol=1e-4)
    pipeline.unfuse_lora()
    torch.testing.assert_close(painted(pipeline), half, rtol=0, atol=1e-4)
    pipeline.disable_lora()
    torch.testing.assert_close(painted(pipeline), plain, rtol=0, atol=1e-4)
    with pytest.raises(UserError, match="the adapters one are loaded, but a snapshot cannot contain adapters"):
        pipeline.save_pretrained("nowhere")


def test_what_was_trained_as_a_whole_comes_and_goes_with_its_adapter(adapters: list[Path], tmp_path: Path) -> None:
    pipeline = tiny_pipeline()
    plain = painted(pipeline)
    pipeline.load_lora_weights(adapters[1])
    with_two = painted(pipeline)
    pipeline.load_lora_weights(adapters[0])
    assert pipeline.get_list_adapters() == {"transformer": ["default_0", "default_1"]}
    assert pipeline.get_active_adapters() == ["default_0", "default_1"]
    assert not torch.equal(painted(pipeline), with_two)
    pipeline.set_adapters("default_0")
    assert torch.equal(painted(pipeline), with_two)
    pipeline.disable_lora()
    assert torch.equal(painted(pipeline), plain)
    pipeline.enable_lora()
    assert torch.equal(painted(pipeline), with_two)
    with pytest.raises(UserError, match="replaces the same weights as the adapter 'default_0'"):
        pipeline.load_lora_weights(adapters[1], "again")
    pipeline.delete_adapters("default_0")
    pipeline.set_adapters("default_1")
    alone = tiny_pipeline()
    alone.load_lora_weights(adapters[0])
    assert torch.equal(painted(pipeline), painted(alone))
    pipeline.unload_lora_weights()
    assert torch.equal(painted(pipeline), plain)

    pipeline.load_lora_weights(adapters[1])
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    pipeline.save_pretrained(tmp_path)
    loaded = TransfusionPipeline.from_pretrained(tmp_path)
    torch.testing.assert_close(painted(loaded), with_two, rtol=0, atol=1e-4)
    # On top of what has been fused.
    pipeline.load_lora_weights(adapters[0])


def test_an_adapter_of_the_name_of_one_fused_before_leaves_with_all_its_weights(adapters: list[Path]) -> None:
    pipeline = tiny_pipeline()
    pipeline.load_lora_weights(adapters[0])
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    fused = painted(pipeline)
    pipeline.load_lora_weights(adapters[1])
    assert not torch.equal(painted(pipeline), fused)
    pipeline.unload_lora_weights()
    assert torch.equal(painted(pipeline), fused)


def test_an_adapter_without_a_name_gets_a_free_one(adapters: list[Path]) -> None:
    pipeline = tiny_pipeline()
    pipeline.load_lora_weights(adapters[1])
    pipeline.load_lora_weights(adapters[0])
    pipeline.delete_adapters("default_0")
    pipeline.load_lora_weights(adapters[1])
    assert set(pipeline.get_active_adapters()) == {"default_0", "default_1"}


def test_what_is_no_adapter_of_the_model_is_refused(adapters: list[Path], tmp_path: Path) -> None:
    pipeline = tiny_pipeline()
    narrow = write_adapter(tmp_path / "narrow", LoraConfig(2), 3, num_layers=7)
    other = write_adapter(tmp_path / "other", LoraConfig(2), 3)
    info = json.loads((other / ADAPTER_CONFIG).read_text())
    (other / ADAPTER_CONFIG).write_text(json.dumps(info | {"base_fingerprint": "of other weights"}))
    empty, damaged, foreign = tmp_path / "empty", tmp_path / "damaged", tmp_path / "foreign"
    empty.mkdir()
    shutil.copytree(adapters[0], damaged)
    (damaged / ADAPTER_WEIGHTS).write_bytes(b"no safetensors")
    shutil.copytree(adapters[0], foreign)
    (foreign / ADAPTER_CONFIG).write_text('{"peft_type": "LORA"}')
    for folder, sentence in (
        (narrow, "is an adapter of another model, somewhere/else: its num_layers is 7, but this model has"),
        (other, "is an adapter of another model of the same sizes, somewhere/else"),
        (empty, f"empty holds no adapter: it has no {ADAPTER_CONFIG}"),
        (damaged, "is damaged"),
        (foreign, "does not describe an adapter of this project"),
        (tmp_path / "missing", "does not exist"),
    ):
        with pytest.raises(UserError, match=sentence):
            pipeline.load_lora_weights(folder)
    assert not pipeline.get_active_adapters()
    pipeline.load_lora_weights(adapters[0], "one")
    with pytest.raises(UserError, match="the adapter name 'one' is taken"):
        pipeline.load_lora_weights(adapters[0], "one")
    with pytest.raises(UserError, match="there is no adapter 'two'; loaded: one"):
        pipeline.set_adapters("two")
