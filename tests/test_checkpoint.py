"""Training states and snapshots on disk, and the files after an interrupted write."""

import json
import pickle
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import yaml
from conftest import tiny_config, tiny_model
from training_runs import load_all

from transfusion_mot.config import OptimizerConfig, TokenizerConfig
from transfusion_mot.data.tokenizer import load_tokenizer, train_tokenizer
from transfusion_mot.errors import UserError
from transfusion_mot.files import find_snapshot
from transfusion_mot.training.checkpoint import atomic_folder, begin_aside, clear_behind, find_state, held_alone
from transfusion_mot.training.ema import EMA
from transfusion_mot.training.optimizer import make_optimizer
from transfusion_mot.training.state import (
    StateWriter,
    load_progress,
    load_tensors,
    refuse_other_run,
    refuse_other_tokenizer,
    state_tensors,
)


def save(
    run: Path,
    *steps: int,
    keep_last: int = 2,
    keep_every: int = 0,
    best_step: int | None = None,
    **tensors: torch.Tensor,
) -> None:
    with StateWriter(run, keep_last, keep_every) as writer:
        for step in steps:
            writer.save(step, tensors or {"lanes": torch.full((2,), step)}, {"step": step}, best_step)


def trained(steps: int, **settings) -> tuple[torch.nn.Module, EMA, torch.optim.Optimizer]:
    model = tiny_model(tiny_config())
    ema, optimizer = EMA(model, 0.9), make_optimizer(model, OptimizerConfig(**settings))
    for step in range(steps):
        sum(((step + 1) * parameter).sin().sum() for parameter in model.parameters()).backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update(model, step)
    return model, ema, optimizer


def test_state_comes_back(tmp_path: Path) -> None:
    model, ema, optimizer = trained(3)
    lanes = torch.arange(6).view(2, 3)
    tensors = state_tensors(model, ema, optimizer, lanes)
    kept = {name: tensor.clone() for name, tensor in tensors.items()}
    with StateWriter(tmp_path, 2, 0) as writer:
        writer.save(3, tensors, {"step": 3, "seen": {"images": 5}, "made_of": {"model": {"x": [1, 2]}}})
        # What is trained while it is written is not in it.
        for tensor in tensors.values():
            tensor += 1
    folder = find_state(tmp_path, "auto")
    progress = {"step": 3, "seen": {"images": 5}, "made_of": {"model": {"x": [1, 2]}}}
    assert load_progress(folder) == {"format": 2, **progress}
    other = trained(1, weight_decay=0.3, betas=(0.8, 0.9))
    assert torch.equal(load_tensors(folder, *other), kept["lanes"])
    again = state_tensors(*other, kept["lanes"])
    everything = load_all(folder)
    assert again.keys() == kept.keys() == everything.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in kept.items())
    assert all(torch.equal(everything[name], tensor) for name, tensor in kept.items())
    assert {group["weight_decay"] for group in other[2].param_groups} == {0.3, 0.0}, "settings stay those of the config"
    assert other[2].param_groups[0]["betas"] == (0.8, 0.9)


def test_parameter_that_was_not_trained_before_starts_without_moments(tmp_path: Path) -> None:
    model, ema, optimizer = trained(0)
    model.modality("text").head.weight.requires_grad_(False)
    optimizer = make_optimizer(model, OptimizerConfig())
    sum(parameter.sin().sum() for parameter in model.parameters()).backward()
    optimizer.step()
    save(tmp_path, 1, **state_tensors(model, ema, optimizer, torch.zeros(1)))
    other, ema, optimizer = trained(0)
    load_tensors(find_state(tmp_path, "auto"), other, ema, optimizer)
    assert other.modality("text").head.weight not in optimizer.state
    assert optimizer.state[other.modality("text").embedding.weight]["step"] == 1


def test_newest_states_are_kept_and_found(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 10, 11)
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == ["step-0000010", "step-0000011"]
    assert load_progress(find_state(tmp_path, "auto"))["step"] == 11
    assert load_progress(find_state(tmp_path, str(tmp_path / "state" / "step-0000010")))["step"] == 10


def test_states_and_snapshots_of_every_so_many_steps_are_kept(tmp_path: Path) -> None:
    for step in range(2, 13, 2):
        (tmp_path / "snapshots" / f"step-{step:07d}").mkdir(parents=True)
        save(tmp_path, step, keep_last=1, keep_every=6)
    for folder in ("state", "snapshots"):
        assert sorted(int(path.name[5:]) for path in (tmp_path / folder).iterdir()) == [6, 12]


def test_snapshot_of_the_best_step_is_kept(tmp_path: Path) -> None:
    for step in range(1, 6):
        (tmp_path / "snapshots" / f"step-{step:07d}").mkdir(parents=True)
        save(tmp_path, step, keep_last=1, best_step=2 if step > 2 else step)
    assert sorted(int(path.name[5:]) for path in (tmp_path / "snapshots").iterdir()) == [2, 5]
    assert sorted(int(path.name[5:]) for path in (tmp_path / "state").iterdir()) == [5]


def test_states_are_ordered_by_number_beyond_seven_digits(tmp_path: Path) -> None:
    save(tmp_path, 9_999_999, 10_000_000, 10_000_001)
    assert load_progress(find_state(tmp_path, "auto"))["step"] == 10_000_001


def test_what_lies_behind_a_step_or_was_being_written_is_cleared(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3, keep_last=3)
    (tmp_path / "state" / ".step-0000004.partial").mkdir()
    (tmp_path / "snapshots" / ".step-0000004.partial").mkdir(parents=True)
    assert clear_behind(tmp_path, 2) == ["state/step-0000003"]
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == ["step-0000001", "step-0000002"]
    assert list((tmp_path / "snapshots").iterdir()) == []


def test_a_folder_that_holds_another_run_or_a_model_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "one", 1)
    save(tmp_path / "other", 1, 2)
    state = str(tmp_path / "one" / "state" / "step-0000001")
    assert find_state(tmp_path / "one" / ".." / "one", state) == find_state(tmp_path / "new", state) == Path(state)
    with pytest.raises(UserError, match=r"is a state of another run\. Output_dir .*other holds"):
        find_state(tmp_path / "other", state)
    for name in ("model_index.json", "config.json", "adapter_config.json"):
        folder = tmp_path / name.removesuffix(".json")
        folder.mkdir()
        (folder / name).write_text("{}")
        for resume in ("auto", "never", state):
            with pytest.raises(UserError, match=rf"holds a model \({name}\), whose files a run would overwrite"):
                find_state(folder, resume)
    # A run that began before is continued whatever lies beside it.
    (tmp_path / "one" / "config.json").write_text("{}")
    assert find_state(tmp_path / "one", "auto") is not None


def test_a_second_run_in_a_folder_is_refused_as_long_as_the_first_lives(tmp_path: Path) -> None:
    code = f"""from pathlib import Path
from transfusion_mot.training.checkpoint import held_alone
with held_alone(Path({str(tmp_path)!r})):
    pass
"""
    with held_alone(tmp_path):
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "another process trains in output_dir" in other.stderr
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_state_that_cannot_be_written_is_one_sentence_and_the_one_before_survives(tmp_path: Path) -> None:
    save(tmp_path, 1)
    writer = StateWriter(tmp_path, 2, 0)
    writer.save(2, {"lanes": torch.zeros(2)}, {"step": 2})
    writer.wait()
    # A file where the folder must come.
    (tmp_path / "state" / "step-0000003").write_text("")
    writer.save(3, {"lanes": torch.zeros(2)}, {"step": 3})
    with pytest.raises(UserError, match=r"could not be written.*NotADirectoryError"):
        writer.wait()
    (tmp_path / "state" / "step-0000003").unlink()
    assert find_state(tmp_path, "auto").name == "step-0000002"


def test_run_without_state_begins(tmp_path: Path) -> None:
    for resume in ("auto", "never"):
        assert find_state(tmp_path, resume) is None
        assert find_state(tmp_path / "none", resume) is None


def test_what_cannot_be_resumed_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 5)
    with pytest.raises(UserError, match=r"step-0000005.*resume=auto"):
        find_state(tmp_path, "never")
    with pytest.raises(UserError, match="not a training state"):
        find_state(tmp_path, str(tmp_path / "elsewhere"))


@pytest.mark.parametrize("kills", [1, 2])
def test_run_killed_while_its_first_states_were_written_begins_anew(tmp_path: Path, kills: int) -> None:
    for step in range(1, kills + 1):
        (tmp_path / "snapshots" / f"step-{step:07d}").mkdir(parents=True)
        begin_aside(tmp_path / "state" / f"step-{step:07d}")
    assert find_state(tmp_path, "auto") is None
    # Its state was there once: nothing says that it was being written.
    (tmp_path / "snapshots" / "step-0000009").mkdir()
    with pytest.raises(UserError, match="holds step-0000009 of a run but no training state"):
        find_state(tmp_path, "auto")


MADE_OF = {
    "tokenizer": "1a2b",
    "model": {"num_layers": 2, "rope": "3d"},
    "diffusion.scheduler": ["DDPMScheduler", {}],
    "towers": {"image": {"width": 8, "dropout": 0.1}, "text": {"width": 8}},
}


@pytest.mark.parametrize(
    ("before", "message"),
    [
        (
            MADE_OF | {"tokenizer": "3c4d"},
            r"step-5 was trained with another tokenizer: 3c4d, and now it is 1a2b; continue with "
            r"--config .*config\.yaml, or use another output_dir",
        ),
        (
            MADE_OF | {"model": {"num_layers": 4, "rope": "3d"}},
            r"another model: {'num_layers': 4}, and now it is {'num_layers': 2};",
        ),
        # A key that only this version has, and one that only the other had.
        (
            MADE_OF | {"model": {"rope": "3d", "gate": True}},
            r"another model: {'num_layers': None, 'gate': True}, and now it is {'num_layers': 2, 'gate': None};",
        ),
        # Of what is nested, that alone which differs.
        (
            MADE_OF | {"towers": {"image": {"width": 4, "dropout": 0.1}, "text": {"width": 8}}},
            r"another towers: {'image': {'width': 4}}, and now it is {'image': {'width': 8}};",
        ),
        # What an older version left out, of either kind, and what it wrote in another form.
        (
            {name: part for name, part in MADE_OF.items() if name != "model"},
            r"step-5 does not say with which model it was trained, so an older version wrote it; continue with that "
            "version, or use another output_dir",
        ),
        ({}, r"step-5 does not say with which tokenizer it was trained"),
        (MADE_OF | {"model": "small"}, r"another model: small, and now it is {'num_layers': 2, 'rope': '3d'};"),
    ],
)
def test_state_of_another_run_is_refused_in_one_sentence(before: dict, message: str) -> None:
    refuse_other_run(MADE_OF, MADE_OF | {"diffusion.scheduler": ("DDPMScheduler", {})}, Path("step-5"))
    with pytest.raises(UserError, match=message):
        refuse_other_run(before, MADE_OF, Path("step-5"))


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        ({"path": None, "vocab_size": 300}, {"vocab_size": 300}, None),
        (
            {"path": None, "vocab_size": 300},
            {"vocab_size": 400},
            "tokenizer.vocab_size is 400, and was 300; continue with",
        ),
        # It is the same, or what it was trained on is, whatever its path; beside one, the size says nothing.
        ({"path": "gone", "vocab_size": 300}, {"path": "gone", "vocab_size": 400}, None),
        ({"path": "gone", "vocab_size": 300}, {"path": "{kept}"}, None),
        ({"path": None, "vocab_size": 300}, {"path": "{kept}"}, None),
        ({"path": "gone", "vocab_size": 300}, {"vocab_size": 300}, "tokenizer.path is null, and was gone"),
        ({"path": "gone", "vocab_size": 300}, {"path": "{other}"}, "tokenizer.path={other} is another tokenizer"),
        # A run whose configuration was removed.
        (None, {"vocab_size": 400}, None),
        (None, {"path": "{other}"}, "tokenizer.path={other} is another tokenizer"),
    ],
)
def test_another_tokenizer_is_refused(tmp_path: Path, byte_tokenizer, before, now: dict, message: str | None) -> None:
    places = {"kept": tmp_path / "tokenizer", "other": tmp_path / "other"}
    byte_tokenizer.save(places["kept"])
    train_tokenizer(["a word"], 263, ("text", "image")).save(places["other"])
    if before is not None:
        (tmp_path / "config.yaml").write_text(yaml.safe_dump({"tokenizer": before}))
    config = TokenizerConfig(**now)
    config.path = None if config.path is None else config.path.format(**places)
    kept = load_tokenizer(str(places["kept"]), ("text", "image"))
    with nullcontext() if message is None else pytest.raises(UserError, match=re.escape(message.format(**places))):
        refuse_other_tokenizer(config, kept, tmp_path / "state" / "step-5")


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x80\x04garbage", b"PK\x03\x04 cut off", pickle.dumps([1])])
@pytest.mark.parametrize("file", [".metadata", "__0_0.distcp"])
def test_damaged_state_is_refused_by_name(tmp_path: Path, file: str, content: bytes) -> None:
    parts = trained(1)
    save(tmp_path, 5, **state_tensors(*parts, torch.zeros(2)))
    folder = find_state(tmp_path, "auto")
    load_tensors(folder, *parts)
    (folder / file).write_bytes(content)
    with pytest.raises(UserError, match=r"step-0000005 cannot be read"):
        load_tensors(folder, *parts)


def test_damaged_progress_is_refused_by_name(tmp_path: Path) -> None:
    save(tmp_path, 5)
    folder = find_state(tmp_path, "auto")
    (folder / "progress.json").write_text("{")
    with pytest.raises(UserError, match=r"step-0000005 cannot be read"):
        load_progress(folder)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (None, ["a training state of version 0.1", "python -m transfusion_mot.sampling.convert"]),
        (99, ["has the format 99, but this version reads 2"]),
    ],
)
def test_state_of_another_version_is_refused_in_one_sentence(
    tmp_path: Path, number: int | None, words: list[str]
) -> None:
    save(tmp_path, 5)
    folder = find_state(tmp_path, "auto")
    progress = json.loads((folder / "progress.json").read_text())
    del progress["format"]
    (folder / "progress.json").write_text(json.dumps(progress | ({} if number is None else {"format": number})))
    with pytest.raises(UserError) as refused:
        load_progress(folder)
    assert all(word in str(refused.value) for word in [str(folder), "another output_dir", *words])


def test_state_cut_in_half_is_refused(tmp_path: Path) -> None:
    parts = trained(1)
    save(tmp_path, 5, **state_tensors(*parts, torch.zeros(2)))
    file = find_state(tmp_path, "auto") / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(UserError, match="cannot be read"):
        load_tensors(file.parent, *parts)


def test_write_that_is_cut_off_leaves_what_was_there(tmp_path: Path) -> None:
    folder = tmp_path / "state" / "step-0000001"
    with atomic_folder(folder) as aside:
        (aside / "file").write_text("old")

    def fails() -> None:
        with atomic_folder(folder) as aside:
            (aside / "file").write_text("new")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fails()
    assert (folder / "file").read_text() == "old"
    assert find_state(tmp_path, "auto") == folder, "what was written aside is no state"
    with atomic_folder(folder) as aside:
        assert list(aside.iterdir()) == []
        (aside / "other").write_text("newer")
    assert [path.name for path in folder.iterdir()] == ["other"]
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_snapshots_are_found_in_a_run_and_by_themselves(tmp_path: Path) -> None:
    for step in (2, 10):
        folder = tmp_path / "snapshots" / f"step-{step:07d}"
        folder.mkdir(parents=True)
        (folder / "model_index.json").write_text("{}")
    assert find_snapshot(str(tmp_path)).name == "step-0000010"
    older = tmp_path / "snapshots" / "step-0000002"
    assert find_snapshot(str(older)) == older


def test_missing_snapshot_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no folder"):
        find_snapshot(str(tmp_path / "none"))
    with pytest.raises(UserError, match="no snapshot"):
        find_snapshot(str(tmp_path))
