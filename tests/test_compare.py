"""Which differences of two reports exceed the noise."""

import runpy
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from transfusion_mot.errors import UserError
from transfusion_mot.evaluation.intervals import mean_interval
from transfusion_mot.evaluation.report.comparison import difference
from transfusion_mot.evaluation.report.content import Metric, Report, read_report, save_report

pytest.importorskip("scipy")
from scipy import stats

SCRIPT = Path(__file__).parents[1] / "evaluate" / "compare.py"
PROTOCOL = {"clip": "a", "prompts": "sha256 1", "guidance": 1.0}


def clip(scores: np.ndarray, **protocol: object) -> Metric:
    return Metric(
        "CLIP cosine (generated)",
        float(scores.mean()),
        PROTOCOL | protocol,
        mean_interval(scores),
        tuple(scores.tolist()),
    )


def report(*metrics: Metric) -> Report:
    return Report("test", "command", "2026", {}, {}, list(metrics))


def test_pairs_find_what_intervals_do_not() -> None:
    """Images differ by more than the models do: the difference shows only where each is compared with itself."""
    rng = np.random.default_rng(0)
    first = 0.2 + 0.05 * rng.standard_normal(400)
    other = first + 0.003 + 0.005 * rng.standard_normal(400)
    assert stats.ttest_rel(other, first).pvalue < 1e-6
    assert stats.ttest_ind(other, first).pvalue > 0.1
    paired = difference(clip(first), clip(other, guidance=3.0))
    assert paired.verdict == "better"
    assert "paired bootstrap over 400 images" in paired.reason
    assert paired.value == pytest.approx((other - first).mean())
    unpaired = difference(clip(first), clip(other, prompts="sha256 2"))
    assert unpaired.verdict == "within noise"
    assert unpaired.reason == "the intervals overlap"


def test_noise_is_called_noise() -> None:
    """Of the differences between equal models one in twenty passes for real: 10 of 200."""
    rng = np.random.default_rng(1)
    verdicts = [difference(clip(rng.standard_normal(100)), clip(rng.standard_normal(100))).verdict for _ in range(200)]
    assert 2 <= 200 - verdicts.count("within noise") <= 20


def test_lower_distances_and_losses_are_better() -> None:
    for name, verdict in (("FID (clean-fid) (generated)", "better"), ("text loss", "better"), ("CIDEr", "worse")):
        first, other = Metric(name, 20.0, {}, (19.0, 21.0)), Metric(name, 15.0, {}, (14.0, 16.0))
        assert difference(first, other).verdict == verdict
        assert difference(first, other).reason == "the intervals do not overlap"
    assert difference(Metric("FID", 20.0), Metric("FID", 15.0)).verdict == "unknown"


def test_other_protocols_do_not_compare() -> None:
    scores = np.ones(5)
    found = difference(clip(scores), clip(scores, clip="b", images=5))
    assert found.verdict == "not comparable"
    assert found.reason == "measured with another clip, images"


def test_captions_of_other_images_do_not_compare() -> None:
    """The words of CIDEr weigh by the references of the images."""
    first, other = (Metric("CIDEr", 1.0, {"captioned images": name}, (0.9, 1.1)) for name in ("sha256 a", "sha256 b"))
    assert difference(first, other).reason == "measured with another captioned images"
    assert difference(first, first).verdict == "within noise"


@pytest.mark.parametrize("key", ["real images", "held-out documents", "codec", "hash of texts"])
def test_other_references_do_not_compare_and_older_reports_do(key: str) -> None:
    first, other = (clip(np.arange(3.0), **{key: name}) for name in ("sha256 a", "sha256 b"))
    assert difference(first, other).reason == f"measured with another {key}"
    assert difference(first, first).verdict == "within noise"
    older = replace(first, protocol={name: v for name, v in first.protocol.items() if name != key})
    found = difference(older, other)
    assert found.verdict == "within noise"
    assert found.reason.endswith(f"; one report does not say its {key}")


def test_a_report_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = report(clip(np.array([0.1, 0.3])), Metric("FID", 3.0))
    save_report(written, tmp_path)
    assert read_report(tmp_path) == written
    assert read_report(tmp_path / "report.json") == written
    (tmp_path / "report.json").write_text("[]")
    with pytest.raises(UserError, match="is not a report"):
        read_report(tmp_path)
    with pytest.raises(UserError, match="cannot read"):
        read_report(tmp_path / "none")


def test_the_command(tmp_path: Path, monkeypatch, capsys) -> None:
    rng = np.random.default_rng(0)
    scores = rng.standard_normal(50)
    first = report(clip(scores), Metric("FID", 20.0, {}, (19.0, 21.0)))
    save_report(first, tmp_path / "base")
    save_report(replace(first, metrics=[clip(scores - 1), Metric("KID", 0.1)]), tmp_path / "other")

    def call(*words: object) -> int:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, words)])
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as ended:
            return ended.code
        return 0

    assert call(tmp_path / "base", tmp_path / "other", "--output", tmp_path / "table.md") == 0
    table = capsys.readouterr().out
    assert (tmp_path / "table.md").read_text() == table
    assert "| metric | base | other | other against base |" in table
    rows = {line.split(" | ")[0]: line for line in table.splitlines()}
    assert "-1, **worse** (paired bootstrap over 50 images" in rows["| CLIP cosine (generated)"]
    assert "20 [19, 21] |  |  |" in rows["| FID"]
    assert call(tmp_path / "base") == 2
    assert "give at least two" in capsys.readouterr().err
    assert call(tmp_path / "base", tmp_path / "none") == 2
    assert "cannot read" in capsys.readouterr().err
    file = tmp_path / "base" / "report.json"
    before = file.read_text()
    assert call(tmp_path / "base", tmp_path / "base", "--output", file) == 2
    assert "is the name of a report" in capsys.readouterr().err
    assert file.read_text() == before


@pytest.mark.parametrize(
    "name",
    ["FID (clean-fid)", "FD-DINOv2", "KID", "CMMD", "CLIP-MMD", "text loss", "loss of image codes (conditional)"],
)
def test_less_of_a_distance_is_better(name: str) -> None:
    first, other = (Metric(name, value, {}, (value - 0.1, value + 0.1)) for value in (5.0, 1.0))
    assert difference(first, other).verdict == "better"
    assert difference(other, first).verdict == "worse"
