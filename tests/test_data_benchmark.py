"""The benchmark of the data path runs, at toy size."""

import json
import shlex
import sys

import pytest

from benchmarks.data import main

pytestmark = pytest.mark.slow


def test_the_benchmark_measures_both_ways_to_an_image(tmp_path, monkeypatch, capsys):
    output = tmp_path / "results" / "data.json"
    arguments = [
        *("--workers", "0", "2", "--rows", "4", "--text-slots", "64", "--images-per-row", "2", "--image-size", "16"),
        *("--num-images", "24", "--seconds", "0.3", "--device", "cpu", "--consumption", "10", "--output", str(output)),
    ]
    monkeypatch.setattr(sys, "argv", ["data.py", *arguments])
    main()
    content = json.loads(output.read_text())
    metrics = content["metrics"]
    assert [(metric["protocol"]["from"], metric["protocol"]["workers"]) for metric in metrics] == [
        *(("cached latents", 0), ("cached latents", 2), ("JPEG files", 0), ("JPEG files", 2)),
    ]
    for metric in metrics:
        assert metric["value"] > 0
        assert abs(metric["protocol"]["times the consumption"] - metric["value"] / 10) < 0.01
    assert content["command"] == shlex.join(["python", "-m", "benchmarks.data", *arguments[:-2]])
    assert capsys.readouterr().out.count("\n| ") >= 5
