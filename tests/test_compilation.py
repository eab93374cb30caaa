"""Compiled blocks for all shapes of rows that a run can have."""

import functools
import json
import types
from pathlib import Path

import pytest
import torch
from source_files import picture
from torch._dynamo.utils import counters

import train
from transfusion_mot.models.mot import MoTBlock
from transfusion_mot.models.transfusion import TransfusionMoT
from transfusion_mot.run import training as run_training
from transfusion_mot.training.metrics import read_metrics

pytestmark = pytest.mark.slow

# Of 5, 3, 4, 2 and 6 patches.
BUCKETS = [[8, 40], [8, 24], [16, 16], [16, 8], [48, 8]]


def write_flat_and_upright(folder: Path, number: int) -> Path:
    """Pictures in the proportions of one bucket after the other."""
    folder.mkdir()
    lines = []
    for index in range(number):
        height, width = BUCKETS[index % len(BUCKETS)]
        (folder / f"{index}.png").write_bytes(picture(index, size=(width, height)))
        lines.append(json.dumps({"file_name": f"{index}.png", "text": f"picture {index}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def test_a_run_compiles_its_blocks_for_all_buckets_and_microbatches(
    arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five buckets in microbatches of two rows and of one are ten shapes, where PyTorch allows eight."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    # Compiled code is kept with a function's code; what other tests have compiled stays with the original.
    code = MoTBlock.forward.__code__.replace()
    monkeypatch.setattr(MoTBlock, "forward", types.FunctionType(code, MoTBlock.forward.__globals__))
    # What the compiler sees is the same with any backend; this one takes no time.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    wrap = run_training.wrap

    def compiled(model: TransfusionMoT, accelerator: object) -> torch.nn.Module:
        model.compile_blocks()  # without a GPU nothing else asks for it
        return wrap(model, accelerator)

    monkeypatch.setattr(run_training, "wrap", compiled)
    run = arguments(
        data={
            "sources": [{"kind": "imagefolder", "path": str(write_flat_and_upright(tmp_path / "pictures", 10))}],
            "buckets": BUCKETS,
            "held_out_fraction": 0.0,
        },
        training={"num_steps": 20, "num_rows": 3, "log_every": 20, "sample_prompts": []},
        model={"num_layers": 1},
    )
    counters.clear()
    with torch._dynamo.config.patch(recompile_limit=8, accumulated_recompile_limit=256):
        train.main(run)
    assert counters["stats"]["unique_graphs"] == 10
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == 20
