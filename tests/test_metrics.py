"""What a run reports: means over steps, counts, FLOPs by hand, and the stop at a loss that is not finite."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import DENSE, numbered_images, sources_of, texts_of, tiny_config, tiny_model
from test_losses import SPEC, make_batch

from transfusion_mot.config import RunConfig
from transfusion_mot.training.metrics import (
    RunLog,
    active_parameters,
    convolution_flops,
    flops_per_row,
    peak_flops,
    read_metrics,
)
from transfusion_mot.training.plot import plot_losses
from transfusion_mot.training.step import StepResult


def make_log(accelerator, run: Path, first_step: int = 0, seen: dict[str, int] | None = None) -> RunLog:
    config = RunConfig(model=tiny_config())
    config.training.tracker = None
    config.training.num_rows = 8
    config.training.diffusion_loss_weight = 2.0
    sources = sources_of(numbered_images(["a"] * 4), texts_of(["b"] * 10))
    sources.sources[1].documents.skipped = {"empty text": 2}
    return RunLog(accelerator, run, config, tiny_model(config.model), first_step, seen or {}, sources)


def result(text: float, tokens: float, image: float, elements: float, norm: float = 1.0) -> StepResult:
    counts = torch.tensor([tokens, elements], dtype=torch.float64)
    return StepResult(torch.tensor([text, image]), counts, torch.tensor(norm), {"text": torch.tensor(0.6 * norm)})


def test_losses_are_sums_over_counts_of_all_steps_since_the_last_line(accelerator, tmp_path: Path) -> None:
    log, batch = make_log(accelerator, tmp_path), make_batch()
    log.add(result(10.0, 4.0, 30.0, 10.0), batch, Counter(images=3, text_tokens=50, pad_slots=16))
    log.add(result(20.0, 16.0, 0.0, 0.0, norm=7.0), batch, Counter(images=1, texts=2, pad_slots=16))
    shown = log.write(2, 0.5)
    log.add(result(3.0, 1.0, 8.0, 2.0), batch, Counter(images=2, truncated_captions=1))
    log.write(3, 0.25)
    first, second = read_metrics(tmp_path / "metrics.jsonl")
    assert first["step"] == 2
    assert first["text_loss"] == pytest.approx(30 / 20)
    assert first["diffusion_loss"] == pytest.approx(30 / 10)
    assert first["loss"] == pytest.approx(1.5 + 2 * 3.0)
    assert (first["grad_norm"], first["lr"]) == (7.0, 0.5)
    assert (first["images_seen"], first["texts_seen"], first["text_tokens_seen"]) == (4, 2, 50)
    # Two steps of 8 rows of 12 + 2 * 4 slots.
    assert first["pad_fraction"] == pytest.approx(32 / (2 * 8 * 20))
    assert first["tokens_per_second"] * first["seconds_per_step"] * 2 == pytest.approx(2 * 8 * 20 - 32)
    assert first["images_per_second"] * first["seconds_per_step"] * 2 == pytest.approx(4)
    assert (second["text_loss"], second["diffusion_loss"]) == pytest.approx((3.0, 4.0))
    assert (second["images_seen"], second["truncated_captions_seen"]) == (6, 1)
    assert shown["text"] == "1.500"


@pytest.mark.parametrize("bad", [(float("nan"), 1.0), (1.0, float("inf"))])
def test_loss_that_is_not_finite_stops_and_names_the_steps(accelerator, tmp_path: Path, bad) -> None:
    log, batch = make_log(accelerator, tmp_path, first_step=40), make_batch()
    log.add(result(bad[0], 4.0, bad[1], 10.0), batch, Counter())
    with pytest.raises(FloatingPointError, match=r"between steps 41 and 45"):
        log.write(45, 0.1)
    assert read_metrics(tmp_path / "metrics.jsonl") == [], "every line is JSON that any reader takes"


def test_sources_are_counted_apart(accelerator, tmp_path: Path) -> None:
    log = make_log(accelerator, tmp_path, seen={"sources/texts/taken": 5, "sources/texts/documents": 4})
    log.add(
        result(1.0, 1.0, 1.0, 1.0),
        make_batch(),
        Counter({"sources/texts/taken": 10, "sources/images from 0/images": 3, "sources/images from 0/taken": 3}),
    )
    log.write(1, 0.1)
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    assert line["sources/images from 0/images_seen"] == 3
    assert line["sources/images from 0/epochs"] == 3 / 4
    assert (line["sources/texts/taken_seen"], line["sources/texts/documents_seen"]) == (15, 4)
    assert line["sources/texts/epochs"] == 1.5
    assert line["sources/texts/unreadable_images_seen"] == 0
    assert line["sources/texts/left_out/empty text"] == 2


def test_batch_without_labels_has_a_loss_of_zero(accelerator, tmp_path: Path) -> None:
    log = make_log(accelerator, tmp_path)
    log.add(result(0.0, 0.0, 5.0, 5.0), make_batch(), Counter())
    log.write(1, 0.1)
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["text_loss"] == 0


def test_lines_behind_the_resumed_step_are_dropped_and_counts_go_on(accelerator, tmp_path: Path) -> None:
    lines = [{"step": step, "loss": step} for step in (1, 2, 3)]
    text = "\n".join(json.dumps(line) for line in lines) + '\n{"step": 4, "lo'
    (tmp_path / "metrics.jsonl").write_text(text)
    log = make_log(accelerator, tmp_path, first_step=2, seen={"images": 100})
    assert read_metrics(tmp_path / "metrics.jsonl") == lines[:2]
    log.add(result(1.0, 1.0, 1.0, 1.0), make_batch(), Counter(images=5))
    log.write(3, 0.1)
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["images_seen"] == 105


def test_new_run_in_an_old_folder_begins_a_new_file(accelerator, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    make_log(accelerator, tmp_path)
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_validation_lines_have_their_prefix(accelerator, tmp_path: Path, capsys) -> None:
    log = make_log(accelerator, tmp_path)
    log.write_validation(7, {"text_loss": 1.0, "caption_loss": 2.0, "diffusion_loss": 3.0})
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    assert line == {
        "step": 7,
        "validation/text_loss": 1.0,
        "validation/caption_loss": 2.0,
        "validation/diffusion_loss": 3.0,
    }
    assert "step 7: held-out text_loss 1.0000" in capsys.readouterr().out


@pytest.mark.parametrize("validate_at", [3, 4])
def test_validation_between_two_lines_loses_no_step(accelerator, tmp_path: Path, validate_at: int) -> None:
    """Each line is the mean over all steps since the line before, whatever else happened in between."""
    log, batch = make_log(accelerator, tmp_path), make_batch()
    for step in range(1, 5):
        log.add(result(float(step), 1.0, 1.0, 1.0), batch, Counter(images=1))
        if step == validate_at:
            if step == 4:
                log.write(4, 0.1)
            log.write_validation(step, {"text_loss": 1.0, "caption_loss": 2.0, "diffusion_loss": 3.0})
    if validate_at == 3:
        log.write(4, 0.1)
    line = next(line for line in read_metrics(tmp_path / "metrics.jsonl") if "text_loss" in line)
    assert line["text_loss"] == pytest.approx((1 + 2 + 3 + 4) / 4)
    assert line["images_seen"] == 4


def test_flops_are_six_per_active_parameter_and_twelve_per_pair() -> None:
    config = tiny_config(num_kv_heads=1)
    model, batch = tiny_model(config), make_batch()
    block = 16 * (2 + 1 + 1) * 8 + 16 * 16 + 3 * 16 * 24
    patch = 2 * 2 * 3
    timestep = 256 * 16 + 16 * 16
    assert active_parameters(model, config, "text") == 2 * block + 29 * 16
    assert active_parameters(model, config, "image") == 2 * block + 2 * 16 * patch + timestep
    pairs = 0
    for row in range(8):
        ids = [batch.document_ids[row].tolist(), batch.order[row].tolist(), batch.span_ids[row].tolist()]
        slots = list(zip(*ids, strict=True))
        pairs += sum(d == e and (o <= p or (s == t and s >= 0)) for d, p, s in slots for e, o, t in slots)
    weights = 6 * (12 * (2 * block + 29 * 16) + 8 * (2 * block + 2 * 16 * patch + timestep))
    assert flops_per_row(model, config, batch) == pytest.approx(weights + 12 * 2 * 16 * pairs / len(SPEC))


def test_dense_and_mixture_have_the_same_active_parameters() -> None:
    dense, mixture = tiny_config(**DENSE), tiny_config()
    for modality in ("text", "image"):
        assert active_parameters(tiny_model(dense), dense, modality) == active_parameters(
            tiny_model(mixture), mixture, modality
        )
    partly = tiny_config(untied=["ffn"])
    assert active_parameters(tiny_model(partly), partly, "text") == active_parameters(tiny_model(dense), dense, "text")


def test_convolutions_are_counted_pixel_by_pixel() -> None:
    """6 FLOPs for each weight and each pixel that it makes, forward and backward; halved by the stride where it is."""
    config = tiny_config(image_adapter="unet", unet_channels=[32, 64], unet_num_layers=1)
    adapter = tiny_model(config).image_adapter
    total = 0
    for name, parameter in adapter.named_parameters():
        if parameter.ndim == 4:
            # Latents of 4 x 8; everything behind the stride is 2 x 4, and the way up is wide again behind `upsamplers`.
            small = name.startswith("down.1.") or "downsamplers" in name or name.startswith("up.0.resnets")
            total += 6 * parameter.numel() * (8 if small else 32)
    assert convolution_flops(config, torch.Size((3, 4, 8))) == total
    assert convolution_flops(tiny_config(), torch.Size((3, 4, 8))) == 0


def test_peak_flops_are_known_of_gpus_alone() -> None:
    assert peak_flops(torch.device("cpu")) is None


def test_plot_is_drawn_from_any_lines(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "text_loss": 5.0, "diffusion_loss": 2.0}\n{"step": 2, "validation/text_loss": 4.0}\n{"step"'
    )
    plot_losses(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    plot_losses(tmp_path / "none.jsonl", tmp_path / "empty.png")
