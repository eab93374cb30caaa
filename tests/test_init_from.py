"""Runs that start from a snapshot: its weights, sizes, tokenizer, codec and objective, and refusals."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from process_group import FSDP2, run_processes
from safetensors.torch import load_file, save_file
from test_pipeline_codes import SIDE, codes_pipeline
from training_runs import TOWER, arguments_below, assert_same, final_state

import train
from transfusion_mot.config import RunConfig, parse_config
from transfusion_mot.config_checks import given_values, merged
from transfusion_mot.data import cache, inspect
from transfusion_mot.errors import UserError
from transfusion_mot.files import find_snapshot
from transfusion_mot.models.initial_weights import WeightFiles
from transfusion_mot.pipeline import TransfusionPipeline
from transfusion_mot.run import snapshots
from transfusion_mot.run.begin import settled_config
from transfusion_mot.run.data import RunData, load_codecs
from transfusion_mot.run.start import Start, check_run
from transfusion_mot.run.training import Training
from transfusion_mot.sampling.previews import BEFORE_AND_AFTER
from transfusion_mot.training.checkpoint import find_state
from transfusion_mot.training.metrics import read_metrics
from transfusion_mot.training.parallel import make_accelerator

pytestmark = pytest.mark.slow

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


@pytest.fixture(autouse=True)
def without_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes most of the time of a run, and nothing depends on it."""
    monkeypatch.setattr(snapshots, "plot_runs", lambda *_: None)


def train_without_figure(arguments: list[str]) -> None:
    """For separate processes."""
    snapshots.plot_runs = lambda *_: None
    train.main(arguments)


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, picture_folder: Path, random_vae: Path, emoji_cache: Path
) -> Path:
    """Folder of a run that has ended."""
    folder = tmp_path_factory.mktemp("trained")
    build = arguments_below(folder, picture_folder, random_vae, emoji_cache)
    diffusion = {"scheduler_args": {"shift": 3.0}, "guidance_scale": 1.5, "num_inference_steps": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        train.main(build("before", diffusion=diffusion, training={"num_steps": 4, "validate_every": 4}))
    return folder / "before"


@pytest.fixture
def before(trained: Path, tmp_path: Path) -> Path:
    """The same, to begin with, or to damage."""
    return Path(shutil.copytree(trained, tmp_path / "before"))


def given(folder: Path, name: str, init_from: Path | str, **changes: dict[str, Any]) -> list[str]:
    """Command line of a run that starts from a snapshot, without the snapshot's own settings."""
    sections = yaml.safe_load((folder / "before" / "config.yaml").read_text())
    data = {key: sections["data"][key] for key in ("sources", "held_out_fraction", "slots", "num_workers", "cache_dir")}
    kept = {"data": data, "optimizer": sections["optimizer"], "training": sections["training"]}
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(merged({"output_dir": str(folder / name), **kept}, changes)))
    return ["--config", str(file), f"init_from={init_from}"]


def lines_of(run: Path, key: str) -> list[dict[str, Any]]:
    return [line for line in read_metrics(run / "metrics.jsonl") if key in line]


def test_a_run_begins_with_the_weights_of_a_snapshot(before: Path, tmp_path: Path, capsys) -> None:
    command = given(tmp_path, "after", before, training={"num_steps": 1}, optimizer={"lr": 1e-12, "weight_decay": 0.0})
    train.main(command)
    shown = capsys.readouterr().out
    assert "weights from" in shown
    assert "missing         0" in shown
    # What it takes from the snapshot, and what it was not given.
    own, config = (yaml.safe_load((tmp_path / run / "config.yaml").read_text()) for run in ("before", "after"))
    assert config["model"] == own["model"]
    assert config["diffusion"] == own["diffusion"]
    assert config["data"]["image_size"] == own["data"]["image_size"] == 32
    # Losses on what is held out are what they were at the end of the snapshot's run: before the first step, and with
    # the averages after one that changes nothing.
    (last,) = lines_of(before, "validation/text_loss")
    validations = lines_of(tmp_path / "after", "validation/text_loss")
    assert [line["step"] for line in validations] == [0, 1]
    for key in ("validation/text_loss", "validation/image_loss", "validation/caption_loss"):
        assert [line[key] for line in validations] == pytest.approx([last[key]] * 2, rel=1e-5), key
    assert (tmp_path / "after" / "samples" / BEFORE_AND_AFTER).is_file()
    # The first step, computed by the pipeline that anyone would load, on the same rows.
    config = settled_config([*command[:2], f"init_from={before}", f"output_dir={tmp_path / 'rows'}"])
    accelerator = make_accelerator(config.training, Path(config.output_dir))
    check_run(config, accelerator)
    start = Start()
    training = Training.build(
        config, accelerator, RunData.open(config, accelerator, load_codecs(config, accelerator.device), None), start
    )
    batch, _ = next(iter(training.loader))
    pipeline = TransfusionPipeline.from_pretrained(find_snapshot(str(before)))
    with torch.no_grad():
        terms = pipeline.transformer(inputs=batch.inputs, slots=batch.slots).terms
    (first,) = lines_of(tmp_path / "after", "text_loss")
    for (name, term), count in zip(terms.items(), batch.counts().tolist(), strict=True):
        assert first[f"{name}_loss"] == pytest.approx(float(term.losses.sum()) / count, rel=1e-4), name


def test_it_is_resumed_without_the_snapshot(before: Path, tmp_path: Path, capsys) -> None:
    snapshot = find_snapshot(str(before))
    train.main(given(tmp_path, "whole", snapshot, training={"num_steps": 4}))
    # Killed before its first state: begun anew, with the same weights.
    train.main(given(tmp_path, "parts", snapshot, training={"num_steps": 2}))
    shutil.rmtree(tmp_path / "parts" / "state")
    shutil.rmtree(tmp_path / "parts" / "snapshots")
    # The schedule of learning rates is that of four steps.
    train.main(given(tmp_path, "parts", snapshot, training={"num_steps": 4, "max_minutes": 1e-9}))
    assert find_state(tmp_path / "parts", "auto").name == "step-0000001"
    moved = snapshot.rename(tmp_path / "moved")
    train.main(given(tmp_path, "parts", snapshot, training={"num_steps": 4, "max_minutes": 0}))
    whole, parts = final_state(tmp_path / "whole"), final_state(tmp_path / "parts")
    assert_same(whole, parts)
    assert "resuming" in capsys.readouterr().out
    # Nor has the command to name it, and another one is refused.
    command = given(tmp_path, "parts", snapshot, training={"num_steps": 5})
    train.main(command[:2])
    with pytest.raises(UserError, match=r"init_from is .*moved, but the run in .*parts began with init_from=.*step-"):
        train.main([*command[:2], f"init_from={moved}"])
    with pytest.raises(UserError, match="began without init_from"):
        train.main(given(tmp_path, "before", moved))


def test_other_images_rows_and_regularisation(before: Path, tmp_path: Path) -> None:
    command = given(
        tmp_path,
        "smaller",
        before,
        data={"image_size": 16, "slots": {"text": 48, "image": 3}},
        model={"towers": {"image": {"dropout": 0.1}}, "modalities": {"image": {"loss_weight": 2.0}}},
        training={"num_steps": 2, "num_rows": 2},
    )
    train.main([*command, "model.towers.text.dropout=0.2"])
    config = yaml.safe_load((tmp_path / "smaller" / "config.yaml").read_text())
    assert config["data"]["image_size"] == 16
    assert [config["model"]["towers"][name]["dropout"] for name in ("image", "text")] == [0.1, 0.2]
    assert [config["model"]["towers"][name]["hidden_size"] for name in ("image", "text")] == [TOWER["hidden_size"]] * 2
    assert [config["model"]["modalities"][name]["loss_weight"] for name in ("image", "text")] == [2.0, 1.0]
    pipeline = TransfusionPipeline.from_pretrained(find_snapshot(str(tmp_path / "smaller")))
    assert pipeline("sun", num_inference_steps=2).images[0].size == (16, 16)


def test_another_objective_is_told(before: Path, tmp_path: Path, capsys) -> None:
    other = {"scheduler": "DDPMScheduler", "scheduler_args": {"prediction_type": "v_prediction"}}
    train.main(given(tmp_path, "other", before, diffusion=other, training={"num_steps": 1}))
    shown = capsys.readouterr().out
    assert "note: the snapshot was trained to predict flow, but this run predicts v_prediction" in shown
    # The arguments of a scheduler go with it.
    config = settled_config([*given(tmp_path, "ddpm", before), "diffusion.scheduler=DDPMScheduler"])
    assert config.diffusion.scheduler_args == {}
    train.main([*given(tmp_path, "shift", before, training={"num_steps": 1}), "diffusion.scheduler_args={shift: 1.0}"])
    assert "not the noise schedule of the snapshot" in capsys.readouterr().out


def test_sharded_parameters_are_filled(before: Path, tmp_path: Path) -> None:
    """By two processes under FSDP2, as by one."""
    changes: Any = {"training": {"num_steps": 1}, "optimizer": {"lr": 1e-12, "weight_decay": 0.0}}
    command = given(tmp_path, "sharded", before, **changes)
    run_processes(train_without_figure, 2, FSDP2, tmp_path / "group", command)
    taken = load_file(find_snapshot(str(before)) / "transformer" / WEIGHTS)
    state = final_state(tmp_path / "sharded")
    assert len(taken) == sum(name.startswith("model/") for name in state)
    for name, tensor in taken.items():
        torch.testing.assert_close(state[f"model/{name}"], tensor, rtol=0, atol=1e-9, msg=name)
        torch.testing.assert_close(state[f"ema/{name}"], tensor, rtol=0, atol=1e-9, msg=name)


def split_in_shards(folder: Path) -> None:
    """Weights as diffusers saves large ones."""
    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    shards = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    for file, own in shards.items():
        save_file({name: tensors[name] for name in own}, folder / file)
    index = {"weight_map": {name: file for file, own in shards.items() for name in own}}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    (folder / WEIGHTS).unlink()


def test_shards_are_read_as_one_file(before: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(find_snapshot(str(before)) / "transformer", tmp_path / "shards"))
    whole = load_file(folder / WEIGHTS)
    split_in_shards(folder)
    files = WeightFiles(folder, "diffusion_pytorch_model")
    assert files.names == set(whole)
    assert all(torch.equal(files.read(name), tensor) for name, tensor in whole.items())
    (folder / "two.safetensors").unlink()
    with pytest.raises(UserError, match=r"lacks two\.safetensors, 1 of the 2 files of weights"):
        WeightFiles(folder, "diffusion_pytorch_model")
    (folder / "two.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"two\.safetensors is damaged or not a safetensors file"):
        WeightFiles(folder, "diffusion_pytorch_model")


def change_weights(snapshot: Path, change: str) -> None:
    file = snapshot / "transformer" / WEIGHTS
    tensors = load_file(file)
    name = "blocks.0.attention.qkv.owned.text.weight"
    name = name if name in tensors else next(iter(tensors))
    if change == "missing":
        del tensors[name]
    elif change == "unexpected":
        tensors["blocks.9.weight"] = torch.zeros(2)
    elif change == "not finite":
        tensors[name][0] = torch.nan
    elif change == "shape":
        tensors[name] = tensors[name][:1].clone()
    save_file(tensors, file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", "has no weights for .*; give a source whose weights fit"),
        ("unexpected", r"has unknown weights blocks\.9\.weight"),
        ("not finite", "is not finite; use other weights"),
        ("shape", "its weights for .* have the shape .*, but the model needs"),
    ],
)
def test_weights_that_do_not_fit_are_refused(before: Path, tmp_path: Path, change: str, message: str) -> None:
    snapshot = shutil.copytree(find_snapshot(str(before)), tmp_path / "changed")
    change_weights(Path(snapshot), change)
    with pytest.raises(UserError, match=message):
        train.main(given(tmp_path, "after", snapshot))


def test_misuse_is_told_in_a_sentence(before: Path, tmp_path: Path) -> None:
    snapshot = find_snapshot(str(before))
    old = Path(shutil.copytree(snapshot, tmp_path / "old"))
    (old / "transformer" / "config.json").write_text(json.dumps({"latent_channels": 4}))
    cut = Path(shutil.copytree(snapshot, tmp_path / "cut"))
    (cut / "transformer" / "config.json").unlink()
    empty = tmp_path / "empty"
    empty.mkdir()
    for source, extra, message in (
        (tmp_path / "nothing", [], "init_from '.*nothing' does not exist"),
        (empty, [], "holds no snapshot"),
        (snapshot / "vae", [], "is a model alone, such as a codec"),
        (old, [], "is a snapshot of version 0.1; convert it"),
        (cut, [], r"no usable .*transformer/config\.json"),
        (snapshot, ["model.num_layers=3"], "model.num_layers is 3 and was 2; remove the keys"),
        (snapshot, ["model.towers.image.hidden_size=8"], "model.towers.image.hidden_size is 8 and was 16"),
        (snapshot, ["model.towers.other={}"], "model.towers.other, which they do not have"),
        (snapshot, ["codecs.image.path=checkpoints/vae-emoji"], "codecs.image.path is .* trained with another codec"),
        (snapshot, ["tokenizer.path=checkpoints/emoji/tokenizer"], "tokenizer.path is .* with another tokenizer"),
    ):
        with pytest.raises(UserError, match=message):
            settled_config([*given(tmp_path, "after", source), *extra])


def test_equal_codecs_and_tokenizers_of_other_folders_are_taken(before: Path, tmp_path: Path) -> None:
    snapshot = find_snapshot(str(before))
    copies = {part: shutil.copytree(snapshot / part, tmp_path / f"own-{part}") for part in ("vae", "tokenizer")}
    extra = [f"codecs.image.path={copies['vae']}", f"tokenizer.path={copies['tokenizer']}"]
    config = settled_config([*given(tmp_path, "after", snapshot), *extra])
    assert config.codecs["image"].path == str(copies["vae"])


def test_a_name_on_the_hub(before: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large weights are fetched when they are needed, not by `--plan`."""
    asked: list[list[str]] = []

    def download(name: str, repo_type: str, allow_patterns: list[str]) -> str:
        assert (name, repo_type) == ("someone/emoji", "model")
        asked.append(allow_patterns)
        return str(find_snapshot(str(before)))

    monkeypatch.setattr("transfusion_mot.hub_names.snapshot_download", download)
    command = given(tmp_path, "after", "someone/emoji", training={"num_steps": 1})
    assert settled_config(command).model.num_layers == 2
    assert not any("safetensors" in pattern for patterns in asked for pattern in patterns)
    train.main(command)
    assert any("safetensors" in pattern for patterns in asked for pattern in patterns)


def test_what_is_given_is_read_as_the_parser_reads_it(tmp_path: Path) -> None:
    file = tmp_path / "some.yaml"
    file.write_text("training: {num_steps: 3, num_rows: 4}\ninit_from: a/b\n")
    words = ["--config", str(file), "training.num_steps=5", "--data.image_size", "64", "--init_from=c/d"]
    found = given_values(words)
    assert found == {"training": {"num_steps": 5, "num_rows": 4}, "data": {"image_size": 64}, "init_from": "c/d"}


def test_commands_that_do_not_settle_it_say_so(before: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"works with train\.py only; give this command the config.yaml of the run"):
        parse_config(RunConfig, given(tmp_path, "after", before), "")
    # Of a run it is settled.
    train.main(given(tmp_path, "run", before, training={"num_steps": 1}))
    parse_config(RunConfig, ["--config", str(tmp_path / "run" / "config.yaml")], "")


def test_data_are_inspected_and_encoded_as_the_run_reads_them(before: Path, tmp_path: Path, capsys) -> None:
    own = {"cache_dir": str(tmp_path / "cache"), "latents": "prepared"}
    command = given(tmp_path, "after", before, data=own, training={"num_steps": 1})
    picture = tmp_path / "row.png"
    inspect.main([*command, "--rows", "8", "--picture", str(picture)])
    assert picture.is_file()
    shown = capsys.readouterr().out
    assert "packed 8 rows of 32 text tokens + 2 image slots of 16 patches" in shown
    cache.main(command)
    train.main(command)
    # A run that has begun needs no snapshot, and has its tokenizer.
    (before / "snapshots").rename(tmp_path / "elsewhere")
    capsys.readouterr()
    cache.main(command)
    assert "(train): 33 images, 0 of them new" in capsys.readouterr().out
    inspect.main([*command, "--rows", "8", "--picture", str(picture)])
    assert capsys.readouterr().out == shown


def test_a_snapshot_whose_pictures_are_codes(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline = codes_pipeline()
    pipeline.save_pretrained(tmp_path / "codes")
    sections = yaml.safe_load((trained / "config.yaml").read_text())
    data = {key: sections["data"][key] for key in ("sources", "num_workers", "cache_dir")}
    slots = SIDE**2 + 1  # and the start of the codes
    file = tmp_path / "after.yaml"
    training = sections["training"] | {"num_steps": 1}
    file.write_text(
        yaml.safe_dump(
            {"output_dir": str(tmp_path / "after"), "init_from": str(tmp_path / "codes"), "training": training}
        )
    )
    command = ["--config", str(file), f"data={json.dumps(data)}", "optimizer.lr=1e-12"]
    with pytest.raises(UserError, match=r"takes 17 slots as codes; set data\.slots\.image"):
        train.main(command)
    train.main([*command, f"data.slots={json.dumps({'text': 64, 'image': slots})}"])
    assert "unexpected      0" in capsys.readouterr().out
    weights = TransfusionPipeline.from_pretrained(find_snapshot(str(tmp_path / "after"))).transformer.state_dict()
    for name, tensor in pipeline.transformer.state_dict().items():
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=1e-8, msg=name)
