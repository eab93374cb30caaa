"""Whole runs of train.py on a CUDA device: `pytest -m gpu`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from process_group import clean_process
from test_compilation import BUCKETS, write_flat_and_upright
from test_train import interrupt_after
from training_runs import Arguments, arguments_below, assert_same, final_state

import train
from transfusion_mot.training.metrics import read_metrics

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

VAE = Path(__file__).parents[1] / "checkpoints" / "vae-emoji"
# Rows of at least 128 slots, and heads as wide as FlexAttention takes them.
MODEL = {"num_layers": 1, "head_dim": 32}


@pytest.fixture
def arguments(tmp_path: Path) -> Arguments:
    """As in other tests, but with pictures and an autoencoder that need no additional packages."""
    pictures = write_flat_and_upright(tmp_path / "pictures", 20)
    (pictures / "texts.txt").write_text("\n\n".join(f"a paragraph about the number {n}" for n in range(40)))
    return arguments_below(tmp_path, pictures, VAE, tmp_path / "cache")


def call(monkeypatch: pytest.MonkeyPatch, function: Callable[..., Any], *arguments: Any) -> None:
    """In a new process, which ends well."""
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    process = clean_process(function, *arguments)
    process.start()
    process.join(400)
    process.kill()
    assert process.exitcode == 0


def interrupted(arguments: list[str], step: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(patch, step)
        with pytest.raises(KeyboardInterrupt):
            train.main(arguments)


def test_recorded_run_resumes_and_is_the_plain_one(arguments, tmp_path: Path, monkeypatch) -> None:
    """In float32, 14 steps: the first ones record, here and when the run is resumed. Sums in another order."""
    training = {"num_steps": 14, "num_rows": 3, "save_every": 6}
    for run in ("whole", "parts", "plain"):
        words = arguments(
            run,
            data={"slots": {"text": 128, "image": 2}},
            model=MODEL,
            optimizer={"lr": 1e-3, "warmup_steps": 2},
            training=training | {"cuda_graph": run != "plain"},
        )
        if run == "parts":
            call(monkeypatch, interrupted, words, 9)
            assert final_state(tmp_path / run)["step"] == 6
        call(monkeypatch, train.main, words)
    whole, parts, plain = (final_state(tmp_path / run) for run in ("whole", "parts", "plain"))
    for other in (parts, plain):
        assert_same(whole, other, tolerance=1e-3)
    losses = [
        [[line[name] for name in ("step", "text_loss", "image_loss", "grad_norm", "lr")] for line in lines]
        for lines in (
            [line for line in read_metrics(tmp_path / run / "metrics.jsonl") if "loss" in line]
            for run in ("whole", "parts", "plain")
        )
    ]
    assert [line[0] for line in losses[0]] == list(range(1, 15))
    for other in losses[1:]:
        for one, two in zip(losses[0], other, strict=True):
            assert two == pytest.approx(one, rel=1e-3)


def train_where_one_shape_is_compiled(arguments: list[str]) -> None:
    torch._dynamo.config.recompile_limit = 1
    train.main(arguments)


def test_blocks_masks_and_attention_are_compiled_for_all_buckets(arguments, tmp_path: Path, monkeypatch) -> None:
    """Of training, in microbatches of two rows and of one, and of validation."""
    words = arguments(
        data={"buckets": BUCKETS[:2], "slots": {"text": 128, "image": 2}},
        training={"num_steps": 8, "num_rows": 3, "validate_every": 4, "mixed_precision": "bf16"},
        model=MODEL,
    )
    call(monkeypatch, train_where_one_shape_is_compiled, words)
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert lines[-1]["step"] == 8
    assert sum("validation/text_loss" in line for line in lines) == 2
