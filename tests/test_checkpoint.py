"""Training states and snapshots on disk, and what is left when a write is cut off."""

from pathlib import Path

import pytest
import torch

from transfusion_mot.errors import UserError
from transfusion_mot.training.checkpoint import (
    KEPT_STATES,
    find_snapshot,
    find_state,
    load_state,
    save_state,
    written_aside,
)


def test_state_comes_back(tmp_path: Path) -> None:
    state = {"step": 3, "weights": {"a": torch.arange(3)}, "seen": {"images": 5}, "made_of": {"model": {"x": [1, 2]}}}
    save_state(tmp_path, 3, state)
    again = load_state(find_state(tmp_path, "auto"))
    assert torch.equal(again.pop("weights")["a"], state.pop("weights")["a"])
    assert again == state


def test_newest_states_are_kept_and_found(tmp_path: Path) -> None:
    for step in (1, 2, 10, 11):
        save_state(tmp_path, step, {"step": step})
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == ["step-0000010", "step-0000011"]
    assert KEPT_STATES == 2
    assert load_state(find_state(tmp_path, "auto"))["step"] == 11
    assert load_state(find_state(tmp_path, str(tmp_path / "state" / "step-0000010")))["step"] == 10


def test_states_are_ordered_by_number_beyond_seven_digits(tmp_path: Path) -> None:
    for step in (9_999_999, 10_000_000, 10_000_001):
        save_state(tmp_path, step, {"step": step})
    assert load_state(find_state(tmp_path, "auto"))["step"] == 10_000_001


def test_run_without_state_begins(tmp_path: Path) -> None:
    for resume in ("auto", "never"):
        assert find_state(tmp_path, resume) is None
        assert find_state(tmp_path / "none", resume) is None


def test_what_cannot_be_resumed_is_refused(tmp_path: Path) -> None:
    save_state(tmp_path, 5, {"step": 5})
    with pytest.raises(UserError, match=r"step-0000005.*resume=auto"):
        find_state(tmp_path, "never")
    with pytest.raises(UserError, match="no training state"):
        find_state(tmp_path, str(tmp_path / "elsewhere"))


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x80\x04garbage", b"PK\x03\x04 cut off"])
def test_damaged_state_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    save_state(tmp_path, 5, {"step": 5})
    folder = find_state(tmp_path, "auto")
    (folder / "state.pt").write_bytes(content)
    with pytest.raises(UserError, match="step-0000005"):
        load_state(folder)


def test_state_cut_in_half_is_refused(tmp_path: Path) -> None:
    save_state(tmp_path, 5, {"weights": torch.randn(1000)})
    file = find_state(tmp_path, "auto") / "state.pt"
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(UserError, match="cannot be read"):
        load_state(file.parent)


def test_write_that_is_cut_off_leaves_what_was_there(tmp_path: Path) -> None:
    folder = tmp_path / "state" / "step-0000001"
    with written_aside(folder) as aside:
        (aside / "file").write_text("old")

    def fails() -> None:
        with written_aside(folder) as aside:
            (aside / "file").write_text("new")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fails()
    assert (folder / "file").read_text() == "old"
    assert find_state(tmp_path, "auto") == folder, "what was written aside is no state"
    with written_aside(folder) as aside:
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
