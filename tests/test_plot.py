"""The plot of several runs, from the points it draws and the picture it writes."""

import json
import re
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

from transfusion_mot.errors import UserError
from transfusion_mot.training.metrics import METRICS_FILE, loss_units, read_metrics
from transfusion_mot.training.plot import curve, labels_of, main, smoothed

LINES = [
    {"step": 1, "seconds": 2.0, "flops": 1e12, "text_loss": 5.0, "image_loss": 2.0},
    {"step": 2, "validation/text_loss": 4.5, "validation/image_loss": 1.5},
    {"step": 3, "seconds": 6.0, "flops": 3e12, "text_loss": 4.0, "image_loss": 1.0},
    {"step": 3, "validation/text_loss": 3.5, "validation/image_loss": 0.5},
]


def make_run(folder: Path, factor: float = 1.0) -> Path:
    folder.mkdir(parents=True)
    lines = [{k: v if k == "step" else factor * v for k, v in line.items()} for line in LINES]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / METRICS_FILE).write_text(text + '{"step": 4, "text_l')
    return folder


def test_curves_lie_where_their_steps_flops_and_seconds_are(tmp_path: Path) -> None:
    lines = read_metrics(make_run(tmp_path / "run") / METRICS_FILE)
    assert curve(lines, "text_loss", "step") == ([1, 3], [5, 4])
    assert curve(lines, "image_loss", "seconds") == ([2, 6], [2, 1])
    # A validation has no seconds of its own: those of the last line before it.
    assert curve(lines, "validation/text_loss", "flops") == ([1e12, 3e12], [4.5, 3.5])
    assert curve(lines, "validation/text_loss", "step") == ([2, 3], [4.5, 3.5])
    assert curve(lines, "none", "step") == ([], [])


def test_losses_of_version_0_1_are_read_as_those_of_the_image(tmp_path: Path) -> None:
    old = {"step": 1, "text_loss": 5.0, "diffusion_loss": 2.0, "diffusion_loss/t=0.0-0.1": 3.0, "my_diffusion_loss": 1}
    held_out = {"step": 1, "validation/diffusion_loss": 4.0, "validation/diffusion_loss/t=0.5": 6.0}
    file = tmp_path / METRICS_FILE
    file.write_text(f"{json.dumps(old)}\n{json.dumps(held_out)}\n")
    lines = read_metrics(file)
    assert lines == [
        {"step": 1, "text_loss": 5.0, "image_loss": 2.0, "image_loss/t=0.0-0.1": 3.0, "my_diffusion_loss": 1},
        {"step": 1, "validation/image_loss": 4.0, "validation/image_loss/t=0.5": 6.0},
    ]
    assert loss_units(lines)["text_loss"] == "nats per token"
    assert loss_units(lines)["image_loss"] == "squared error per element"


def test_every_modality_has_its_row(tmp_path: Path) -> None:
    """Also one that another run has not."""
    heights = []
    for modalities in (["text"], ["text", "speech"], ["text", "speech", "image"]):
        run = tmp_path / "-".join(modalities)
        run.mkdir()
        line = {"step": 1, "seconds": 1.0, "flops": 1.0, **{f"{name}_loss": 2.0 for name in modalities}}
        (run / METRICS_FILE).write_text(json.dumps(line))
        main([str(run), str(make_run(tmp_path / f"{run.name} other")), "--output", str(tmp_path / "losses.png")])
        heights.append(Image.open(tmp_path / "losses.png").height)
    assert heights[0] < heights[1] == heights[2]


@pytest.mark.parametrize("width", [1, 2, 5, 9])
def test_smoothing_leaves_a_straight_line_and_keeps_the_ends(width: int) -> None:
    assert smoothed([float(i) for i in range(30)], width) == pytest.approx(range(30))
    noisy = np.random.default_rng(0).standard_normal(200)
    result = smoothed(noisy.tolist(), 9)
    assert result[100] == pytest.approx(noisy[96:105].mean())
    assert result[0] == noisy[0]


def test_runs_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    assert labels_of([tmp_path / "a" / "run", tmp_path / "b" / "run"]) == ["a/run", "b/run"]
    assert labels_of([tmp_path / "a" / "x", tmp_path / "b" / "y"]) == ["x", "y"]


def test_picture_of_two_runs_has_a_colour_for_each(tmp_path: Path, capsys) -> None:
    runs = [make_run(tmp_path / "one"), make_run(tmp_path / "two", 0.9)]
    output = tmp_path / "pictures" / "losses.png"
    main([*map(str, runs), "--output", str(output)])
    assert str(output) in capsys.readouterr().out
    main([*map(str, runs), "--output", str(output.with_suffix(""))])
    assert f"drawn in {output}\n" in capsys.readouterr().out
    colours = {tuple(colour) for colour in np.asarray(Image.open(output).convert("RGB")).reshape(-1, 3)}
    assert {(0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)} <= colours
    assert (0x00, 0x9E, 0x73) not in colours


def test_what_cannot_be_drawn_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no metrics\.jsonl"):
        main([str(tmp_path)])
    (tmp_path / METRICS_FILE).write_text("")
    with pytest.raises(UserError, match="holds no losses"):
        main([str(tmp_path)])
    run = make_run(tmp_path / "run")
    with pytest.raises(UserError, match="cannot write"):
        main([str(run), "--output", str(tmp_path / "picture.nothing")])


def test_a_loss_that_is_always_zero_is_not_drawn(tmp_path: Path) -> None:
    """A logarithmic axis has no place for it."""
    heights = []
    for zero in (0.0, 1.0):
        run = tmp_path / str(zero)
        run.mkdir()
        lines = [{"step": step, "seconds": 1, "flops": 1, "text_loss": zero, "image_loss": 2.0} for step in (1, 2)]
        (run / METRICS_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
        main([str(run), "--output", str(tmp_path / "loss.png")])
        heights.append(Image.open(tmp_path / "loss.png").height)
    assert heights[0] < 0.6 * heights[1]


def test_one_run_is_drawn_once_and_several_against_three_axes(tmp_path: Path) -> None:
    """Steps, FLOPs and seconds of one run would be the same curve three times."""
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", factor=0.5)]
    for count, axes in ((1, 1), (2, 3)):
        main([*map(str, runs[:count]), "--output", str(tmp_path / "loss.png")])
        pixels = np.asarray(Image.open(tmp_path / "loss.png").convert("L"))
        # Frames are grey lines from top to bottom of a row: the left side of each axes.
        frames = (np.abs(pixels.astype(int) - 0xB9) < 12).mean(axis=0) > 0.5
        assert np.count_nonzero(np.diff(frames.astype(int)) == 1) == axes


@pytest.mark.parametrize(
    ("count", "held_out", "expected"),
    [
        (2, False, {"training"}),
        (2, True, {"training", "held out"}),
        (60, False, {"training", "training, smoothed"}),
    ],
)
def test_the_legend_names_what_is_drawn(tmp_path: Path, count: int, held_out: bool, expected: set[str]) -> None:
    lines = [{"step": step, "text_loss": 2.0} for step in range(1, count + 1)]
    lines += [{"step": count, "validation/text_loss": 2.0}] * held_out
    (tmp_path / METRICS_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        main([str(tmp_path), "--output", str(tmp_path / "loss.svg")])
    texts = set(re.findall(r">([^<>]+)</text>", (tmp_path / "loss.svg").read_text()))
    assert texts & {"training", "training, smoothed", "held out"} == expected
