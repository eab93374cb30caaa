"""docs/python.md: its examples run one after the other, with the model that comes with the repository."""

import re
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]


def test_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "python.md").read_text()
    examples = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    names: dict = {}
    # What they show stays the same with fewer steps.
    exec("\n".join(examples).replace("num_inference_steps=10", "num_inference_steps=2"), names)
    assert (tmp_path / "pizza.png").is_file()
    assert names["same"][0] != names["same"][1]
    assert len(names["captions"]) == 2
    assert all(caption.isprintable() for caption in names["captions"])
