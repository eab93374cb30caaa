"""Tiny runs of train.py, and their states compared."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load

from transfusion_mot.data.emoji import emoji_captions, render_emoji
from transfusion_mot.training.checkpoint import find_state
from transfusion_mot.training.state import load_progress

TOWER = {"hidden_size": 16, "intermediate_size": 32}
Arguments = Callable[..., list[str]]


def write_pictures(folder: Path) -> None:
    """Forty real emoji as an image folder, and a file of texts."""
    lines = []
    captions = list(emoji_captions().items())
    step = len(captions) // 40
    for number, (stem, caption) in enumerate(captions[: 40 * step : step]):
        Image.fromarray(render_emoji(stem, 32)).save(folder / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    (folder / "texts.txt").write_text("\n\n".join(f"a paragraph about the number {n}, and no image" for n in range(40)))


def arguments_below(folder: Path, pictures: Path, vae: Path, cache: Path) -> Arguments:
    """Builds the command line of a tiny run into a folder below `folder`; keyword arguments change sections."""
    sections: dict[str, Any] = {
        "data": {
            "sources": [
                {"kind": "imagefolder", "path": str(pictures)},
                {"kind": "text", "path": str(pictures / "texts.txt")},
            ],
            "image_size": 32,
            "held_out_fraction": 0.2,
            "slots": {"text": 32, "image": 2},
            "num_workers": 0,
            "cache_dir": str(cache),
        },
        "tokenizer": {"vocab_size": 300},
        "codecs": {"image": {"path": str(vae)}},
        "model": {"towers": {"text": TOWER, "image": TOWER}, "num_layers": 2, "num_heads": 2, "head_dim": 8},
        "diffusion": {"num_inference_steps": 2},
        "optimizer": {"warmup_steps": 2, "lr": 0.01},
        "training": {
            "num_steps": 6,
            "num_rows": 4,
            "microbatch_rows": 2,
            "mixed_precision": "no",
            "log_every": 1,
            "num_validation_documents": 4,
            "sample_prompts": ["sun"],
            "tracker": None,
        },
    }

    def build(run: str = "run", resume: str = "auto", **changes: dict[str, Any]) -> list[str]:
        merged = {name: section | changes.get(name, {}) for name, section in sections.items()}
        file = folder / f"{run}.yaml"
        file.write_text(yaml.safe_dump({"output_dir": str(folder / run), "resume": resume, **merged}))
        return ["--config", str(file)]

    return build


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """Leaves of nested dicts and lists by path."""
    if isinstance(value, dict):
        return {name: leaf for key, inner in value.items() for name, leaf in flat(inner, f"{path}/{key}").items()}
    if isinstance(value, list | tuple):
        return {name: leaf for key, inner in enumerate(value) for name, leaf in flat(inner, f"{path}/{key}").items()}
    return {path: value}


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a training state, whole and on the CPU, without any model."""
    entries = FileSystemReader(folder).read_metadata().state_dict_metadata
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries.items()}
    load(tensors, checkpoint_id=folder, no_dist=True)
    return tensors


def final_state(run: Path) -> dict[str, Any]:
    """All of the newest training state."""
    folder = find_state(run, "auto")
    return load_all(folder) | load_progress(folder)


def assert_same(one: dict[str, Any], two: dict[str, Any], tolerance: float | None = None) -> None:
    """The same training state: bit for bit, or with its parameters as close as `tolerance`."""
    leaves, others = flat(one), flat(two)
    assert leaves.keys() == others.keys()
    for name, leaf in leaves.items():
        if not isinstance(leaf, torch.Tensor):
            assert leaf == others[name], name
        elif tolerance is None or not leaf.is_floating_point():
            assert torch.equal(leaf, others[name]), name
        elif name.split("/")[1] in ("model", "ema"):
            torch.testing.assert_close(leaf, others[name], rtol=0, atol=tolerance, msg=name)
