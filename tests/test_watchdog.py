"""A hanging run is noticed, and the late process is named; with real processes."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from transfusion_mot.training.watchdog import Watchdog

pytestmark = pytest.mark.slow

OTHER = """
import sys, time
from pathlib import Path
from transfusion_mot.training.watchdog import Watchdog
with Watchdog(Path(sys.argv[1]), rank=int(sys.argv[2]), world_size=3, minutes=0.02) as watchdog:
    watchdog.at(int(sys.argv[3]), sys.argv[4])
    print("ready", flush=True)
    time.sleep(60)
"""


def other(folder: Path, rank: int, step: int, doing: str) -> subprocess.Popen:
    words = [sys.executable, "-c", OTHER, str(folder), str(rank), str(step), doing]
    process = subprocess.Popen(words, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    return process


def warning_after(capfd, seconds: float) -> str:
    capfd.readouterr()
    told, end = "", time.monotonic() + seconds
    while time.monotonic() < end:
        told += capfd.readouterr().err
        if "warning" in told and told.endswith("\n"):
            return told
        time.sleep(0.05)
    return told


def test_late_process_is_named_and_then_one_that_has_ended(tmp_path: Path, capfd) -> None:
    others = [other(tmp_path, 1, 12, "training"), other(tmp_path, 2, 11, "waiting for data")]
    try:
        # 1.2 seconds without a step.
        with Watchdog(tmp_path, rank=0, world_size=3, minutes=0.02) as watchdog:
            for step in range(1, 13):
                watchdog.at(step, "training")
                time.sleep(0.15)
            assert "warning" not in capfd.readouterr().err, "a run that moves is left in peace"
            told = warning_after(capfd, 10)
            assert f"Rank 2 (process {others[1].pid}" in told
            assert "is the furthest behind" in told
            assert "training of step 12: rank 0-1." in told
            assert "waiting for data of step 11: rank 2." in told

            others[0].send_signal(signal.SIGKILL)
            others[0].wait()
            time.sleep(2)
            told = warning_after(capfd, 10)
            assert f"Rank 1 (process {others[0].pid}" in told
            assert "has sent no sign" in told
            assert "furthest behind" not in told
        assert not (tmp_path / "rank-00000.json").exists()
        assert (tmp_path / "rank-00001.json").exists(), "what a killed process has left"
        assert warning_after(capfd, 2) == ""
    finally:
        for process in others:
            process.kill()
            process.wait()


def test_process_without_a_file_is_named(tmp_path: Path) -> None:
    with Watchdog(tmp_path / "beats", rank=0, world_size=2, minutes=10) as watchdog:
        watchdog.at(3, "training")
        assert "Rank 1 has written nothing" in watchdog.report()
    assert not (tmp_path / "beats").exists()


def test_watchdog_of_no_minutes_leaves_no_trace(tmp_path: Path) -> None:
    with Watchdog(tmp_path / "beats", rank=0, world_size=1, minutes=0.0) as watchdog:
        watchdog.at(1, "training")
    assert list(tmp_path.iterdir()) == []
