"""When a run reaches another one's losses: curves with a known answer, and two real runs."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import train
from transfusion_mot.evaluation.steps_to_match import Curve, first_reaching, window_means

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[1] / "evaluate" / "steps_to_match.py"


def write_run(
    folder: Path,
    rate: float,
    steps: int = 1000,
    seconds_per_step: float = 0.5,
    noise: float = 0.0,
    image: str = "image_loss",
) -> Path:
    """Losses that fall along a straight line from 5 and 2, `rate` times as fast as 0.004 and 0.0016 a step."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    lines = []
    for step in range(10, steps + 1, 10):
        text, diffusion = 5 - 0.004 * rate * step, 2 - 0.0016 * rate * step
        jitter = 1 + noise * rng.standard_normal()
        lines.append(
            {
                "step": step,
                "seconds": seconds_per_step * step,
                "flops": 1e12 * step,
                "text_loss": text * jitter,
                image: diffusion * jitter,
            }
        )
        if step % 100 == 0:
            lines.append({"step": step, "validation/text_loss": text, f"validation/{image}": diffusion})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Call the script; status, output, errors."""

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, words), "--output", str(tmp_path / "out")])
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
            status = 0
        except SystemExit as ended:
            status = ended.code
        return status, *capsys.readouterr()

    return call


def test_means_over_windows_are_those_of_numpy() -> None:
    rng = np.random.default_rng(0)
    steps, seconds, losses = np.arange(10.0, 1010, 10), rng.random(100).cumsum(), rng.standard_normal(100)
    found = window_means(steps.tolist(), Curve(seconds.tolist(), losses.tolist()), 50)
    windows = [slice(max(0, i - 4), i + 1) for i in range(100)]
    np.testing.assert_allclose(found.losses, [losses[window].mean() for window in windows], atol=1e-12)
    np.testing.assert_allclose(found.xs, [seconds[window].mean() for window in windows], atol=1e-12)
    assert window_means([1.0, 2.0], Curve([1.0, 2.0], [3.0, 4.0]), 0).losses == [3, 4]


def test_first_point_at_the_target() -> None:
    curve = Curve([0.0, 10.0, 20.0, 30.0], [4.0, 2.0, 3.0, 1.0])
    assert first_reaching(curve, 3) == 5
    assert first_reaching(curve, 2) == 10
    assert first_reaching(curve, 1.5) == pytest.approx(27.5)
    assert first_reaching(curve, 9) == 0
    assert first_reaching(curve, 0.5) is None


def test_a_run_that_learns_twice_as_fast(run, tmp_path: Path) -> None:
    """It needs half the steps; at a third of the time a step, a sixth of the time."""
    # As version 0.1 called it.
    a = write_run(tmp_path / "slow", 0.5, image="diffusion_loss")
    b = write_run(tmp_path / "fast", 1.0, seconds_per_step=0.5 / 3)
    status, output, errors = run(a, b)
    assert status == 0, errors
    found = json.loads((tmp_path / "out" / "steps_to_match.json").read_text())["seeds"][0]["matches"]
    fractions = {(match["loss"], match["axis"]): match["fraction"] for match in found}
    assert len(fractions) == 12
    for (loss, axis), fraction in fractions.items():
        assert fraction == pytest.approx(1 / 6 if axis == "seconds" else 1 / 2), (loss, axis)
    assert "| text loss, held out | 3 |" in output
    assert "50.0 % (500 of 1,000)" in output
    pixels = np.asarray(Image.open(tmp_path / "out" / "steps_to_match.png").convert("RGB")).reshape(-1, 3)
    colours = {tuple(colour) for colour in pixels}
    assert {(0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)} <= colours


def test_a_slower_run_does_not_reach_it_and_noise_does_not_matter_much(run, tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "fast", 1.0), write_run(tmp_path / "slow", 0.5)
    _, output, _ = run(a, b)
    assert output.count("not reached") == 12
    c = write_run(tmp_path / "noisy", 2.0, steps=600, noise=0.02)
    run(a, c)
    found = json.loads((tmp_path / "out" / "steps_to_match.json").read_text())["seeds"][0]["matches"]
    in_training = next(match for match in found if (match["loss"], match["axis"]) == ("text loss", "step"))
    assert in_training["fraction"] == pytest.approx(0.5, abs=0.03)


def test_several_seeds_and_modalities(run, tmp_path: Path) -> None:
    """Any modality's loss counts; over seeds there are means and standard deviations."""
    slow, fast, faster = (
        write_run(tmp_path / name, rate, image="speech_loss") for name, rate in (("a", 0.5), ("b", 1.0), ("c", 2.0))
    )
    status, output, errors = run(slow, fast, "--seed", slow, faster)
    assert status == 0, errors
    # 1 / 2 and 1 / 4 of the steps.
    assert "| speech loss, held out | 1.2, 1.2 | 0.4, -1.2 | 37.5 ± 17.7 % |" in output
    seeds = json.loads((tmp_path / "out" / "steps_to_match.json").read_text())["seeds"]
    assert [Path(seed["run_b"]).name for seed in seeds] == ["b", "c"]
    _, output, _ = run(fast, faster, "--seed", fast, slow)
    assert "not reached by 1 of 2, else 50.0 %" in output


@pytest.mark.parametrize(("axis", "lines"), [("step", 20), ("flops", 20), ("seconds", 20), ("flops", 1000)])
def test_a_log_without_an_axis_is_refused(run, tmp_path: Path, axis: str, lines: int) -> None:
    """Of all steps, or of the first, which its sums would lack."""
    a, b = write_run(tmp_path / "a", 1.0), write_run(tmp_path / "b", 1.0)
    log = [json.loads(line) for line in (b / "metrics.jsonl").read_text().splitlines()]
    for line in log[:lines]:
        line.pop(axis, None)
    (b / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    status, _, errors = run(a, b)
    assert status == 2
    assert errors == f"error: '{b / 'metrics.jsonl'}' has losses without {axis}; give run folders of train.py\n"


def test_mistakes(run, tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", 1.0)
    status, _, errors = run(a, tmp_path / "nothing")
    assert status == 2
    assert "nothing'; give a run folder of train.py" in errors
    (tmp_path / "nothing").mkdir()
    status, _, errors = run(a, tmp_path / "nothing")
    assert status == 2
    assert "nothing' holds no metrics.jsonl with losses" in errors
    assert run("--help")[0] == 0


def test_two_real_runs(run, arguments, tmp_path: Path, monkeypatch) -> None:
    """The same run twice, longer the second time and with another rate of learning."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    train.main(arguments("a", training={"num_steps": 4, "validate_every": 1}))
    train.main(arguments("b", training={"num_steps": 8, "validate_every": 1}, optimizer={"lr": 0.03}))
    status, output, errors = run(tmp_path / "a", tmp_path / "b")
    assert status == 0, errors
    found = json.loads((tmp_path / "out" / "steps_to_match.json").read_text())["seeds"][0]["matches"]
    lines = [json.loads(line) for line in (tmp_path / "b" / "metrics.jsonl").read_text().splitlines()]
    for match in (match for match in found if match["axis"] == "step" and match["loss"] == "text loss, held out"):
        losses = [line["validation/text_loss"] for line in lines if "validation/text_loss" in line]
        reached = next(step for step, loss in enumerate(losses, start=1) if loss <= match["target"])
        assert reached - 1 < match["reached"] <= reached
    assert len(found) == 12
    assert "| image loss, held out |" in output
