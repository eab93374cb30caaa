"""Metrics of a run: means over steps, counts, FLOPs by hand, and the stop at a loss that is not finite."""

import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import DENSE, numbered_images, sources_of, texts_of, tiny_config, tiny_model
from test_losses import make_batch

from transfusion_mot.config import RunConfig
from transfusion_mot.data.row_arrays import RowShape
from transfusion_mot.losses import IGNORE_INDEX
from transfusion_mot.reporting.flops import (
    active_parameters,
    attending_pairs,
    flops_per_pair,
    peak_flops,
    weight_flops_per_row,
)
from transfusion_mot.training.log import RunLog
from transfusion_mot.training.metrics import append_metrics, read_metrics, replace_metrics
from transfusion_mot.training.step import StepResult


def make_log(accelerator, run: Path, first_step: int = 0, seen=None, history: Path | None = None) -> RunLog:
    config = RunConfig(model=tiny_config())
    config.training.tracker = None
    config.training.num_rows = 8
    config.model.modalities["image"].loss_weight = 2.0
    sources = sources_of(numbered_images(["a"] * 4), texts_of(["b"] * 10))
    sources.sources[1].documents.skipped = {"empty text": 2}
    return RunLog(
        accelerator,
        run,
        config,
        model=tiny_model(config.model),
        sources=sources,
        first_step=first_step,
        seen=seen or {},
        history=history,
    )


def result(text: float, tokens: float, image: float, elements: float, norm: float = 1.0) -> StepResult:
    counts = torch.tensor([tokens, elements], dtype=torch.float64)
    text_losses, image_losses = torch.zeros(8, 12), torch.zeros(8, 2)
    text_losses[2, 5], image_losses[1, 0] = text, image  # a labelled slot, and a real image
    of_towers = {"text": torch.tensor(norm), "image": torch.tensor(norm)}
    return StepResult({"text": text_losses, "image": image_losses}, counts, torch.tensor(norm), of_towers)


def write(log: RunLog, lr: float) -> str:
    return log.write(log.collect(), lr, Counter())


def test_losses_are_sums_over_counts_of_all_steps_since_the_last_line(accelerator, tmp_path: Path) -> None:
    log, batch = make_log(accelerator, tmp_path), make_batch()
    log.add(result(10.0, 4.0, 30.0, 10.0), batch, Counter(image_items=3, text_slots=50, pad_slots=16))
    log.add(result(20.0, 16.0, 0.0, 0.0, norm=7.0), batch, Counter(image_items=1, text_documents=2, pad_slots=16))
    shown = write(log, 0.5)
    log.add(result(3.0, 1.0, 8.0, 2.0), batch, Counter(image_items=2, truncated_captions=1))
    write(log, 0.25)
    first, second = read_metrics(tmp_path / "metrics.jsonl")
    assert first["step"] == 2
    assert first["text_loss"] == pytest.approx(30 / 20)
    assert first["image_loss"] == pytest.approx(30 / 10)
    assert first["loss"] == pytest.approx(1.5 + 2 * 3.0)
    assert (first["grad_norm"], first["grad_norm/text"], first["lr"]) == (7.0, 7.0, 0.5)
    assert (first["image_items_seen"], first["text_documents_seen"], first["text_slots_seen"]) == (4, 2, 50)
    # Two steps of 8 rows of 12 + 2 * 4 slots.
    assert first["pad_fraction"] == pytest.approx(32 / (2 * 8 * 20))
    assert first["tokens_per_second"] * first["seconds_per_step"] * 2 == pytest.approx(2 * 8 * 20 - 32)
    assert first["image_items_per_second"] * first["seconds_per_step"] * 2 == pytest.approx(4)
    assert (second["text_loss"], second["image_loss"]) == pytest.approx((3.0, 4.0))
    assert (second["image_items_seen"], second["truncated_captions_seen"]) == (6, 1)
    assert "text  1.500" in shown


@pytest.mark.parametrize("bad", [(float("nan"), 1.0, 1.0), (1.0, float("inf"), 1.0), (1.0, 1.0, float("inf"))])
def test_step_that_is_not_finite_hides_no_other(accelerator, tmp_path: Path, bad) -> None:
    log, batch = make_log(accelerator, tmp_path, first_step=40), make_batch()
    log.add(result(10.0, 4.0, 30.0, 10.0), batch, Counter())
    log.add(result(bad[0], 4.0, bad[1], 10.0, norm=bad[2]), batch, Counter())
    interval = log.collect()
    assert [(record.step, record.is_finite) for record in interval.steps] == [(41, True), (42, False)]
    log.write(interval, 0.1, Counter(skipped_steps=1))
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    assert (line["text_loss"], line["image_loss"], line["skipped_steps"]) == (2.5, 3.0, 1)
    assert all(math.isfinite(value) for value in line.values()), "every line is JSON that any reader takes"


def test_losses_of_sources_and_timesteps_are_means_over_their_own_slots(accelerator, tmp_path: Path) -> None:
    log, batch = make_log(accelerator, tmp_path), make_batch()
    generator = torch.Generator().manual_seed(0)
    by_source, by_bin = Counter[int](), Counter[int]()
    labels, elements = Counter[int](), Counter[int]()
    for seed in range(2):
        timesteps = torch.rand(8, 2, generator=torch.Generator().manual_seed(seed))
        text, image = batch.tokens("text"), batch.latents("image")._replace(timesteps=timesteps)
        batch.inputs["image"] = image
        text_losses = torch.rand(8, 12, generator=generator) * (text.labels != IGNORE_INDEX)
        image_losses = torch.rand(8, 2, generator=generator) * image.mask
        losses = {"text": text_losses, "image": image_losses}
        log.add(StepResult(losses, torch.ones(2), torch.tensor(1.0), {}), batch, Counter())
        for row in range(8):
            for slot in range(12):
                if text.labels[row, slot] != IGNORE_INDEX:
                    by_source[int(batch.slots.source_ids[row, slot])] += text_losses[row, slot].item()
                    labels[int(batch.slots.source_ids[row, slot])] += 1
            for place in range(2):
                if image.mask[row, place]:
                    number = math.ceil(timesteps[row, place].item() * 10)
                    by_bin[number] += image_losses[row, place].item()
                    elements[number] += 3 * 4 * 4
    write(log, 0.1)
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    names = ["images from 0", "texts"]
    assert [line[f"sources/{name}/text_loss"] for name in names] == pytest.approx(
        [by_source[index] / labels[index] for index in range(2)], rel=1e-5
    )
    shown = {key: value for key, value in line.items() if key.startswith("image_loss/")}
    expected = {f"image_loss/t={(p - 1) / 10}-{p / 10}": by_bin[p] / elements[p] for p in range(1, 11) if by_bin[p]}
    assert shown == pytest.approx(expected, rel=1e-5)
    assert len(shown) > 4


def test_sources_are_counted_apart(accelerator, tmp_path: Path) -> None:
    log = make_log(accelerator, tmp_path, seen={"sources/texts/taken": 5, "sources/texts/documents": 4})
    log.add(
        result(1.0, 1.0, 1.0, 1.0),
        make_batch(),
        Counter({"sources/texts/taken": 10, "sources/images from 0/items": 3, "sources/images from 0/taken": 3}),
    )
    write(log, 0.1)
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    assert line["sources/images from 0/items_seen"] == 3
    assert line["sources/images from 0/epochs"] == 3 / 4
    assert (line["sources/texts/taken_seen"], line["sources/texts/documents_seen"]) == (15, 4)
    assert line["sources/texts/epochs"] == 1.5
    assert line["sources/texts/unreadable_items_seen"] == 0
    assert line["sources/texts/left_out/empty text"] == 2


def test_batch_without_labels_has_a_loss_of_zero(accelerator, tmp_path: Path) -> None:
    log = make_log(accelerator, tmp_path)
    log.add(result(0.0, 0.0, 5.0, 5.0), make_batch(), Counter())
    write(log, 0.1)
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["text_loss"] == 0


def test_lines_behind_the_resumed_step_are_dropped_and_counts_go_on(accelerator, tmp_path: Path) -> None:
    lines = [{"step": step, "loss": step, "seconds": 10.0 * step, "flops": 1e9 * step} for step in (1, 2, 3)]
    text = "\n".join(json.dumps(line) for line in lines) + '\n{"step": 4, "lo'
    (tmp_path / "metrics.jsonl").write_text(text)
    log = make_log(accelerator, tmp_path, first_step=2, seen={"image_items": 100})
    assert read_metrics(tmp_path / "metrics.jsonl") == lines[:2]
    log.add(result(1.0, 1.0, 1.0, 1.0), make_batch(), Counter(image_items=5))
    write(log, 0.1)
    last = read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert last["image_items_seen"] == 105
    assert 20 < last["seconds"] < 25
    config, batch = log.config.model, make_batch()
    row = RowShape.of_batch(config, batch)
    of_step = 8 * weight_flops_per_row(log.model, row) + attending_pairs(batch, log.model) * flops_per_pair(log.model)
    assert last["flops"] == pytest.approx(2e9 + of_step.item())


def test_run_that_goes_on_in_another_folder_takes_the_history_with_it(accelerator, tmp_path: Path) -> None:
    (tmp_path / "old.jsonl").write_text('{"step": 1, "seconds": 7.0}\n{"step": 2, "seconds": 9.0}\n')
    log = make_log(accelerator, tmp_path, first_step=1, history=tmp_path / "old.jsonl")
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "seconds": 7.0}]
    assert log.running["seconds"] == 7


def test_a_kill_while_the_history_is_written_again_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "metrics.jsonl"
    append_metrics(file, [{"step": 1, "loss": 2.0}])
    append_metrics(file, [{"step": 2, "loss": 1.0}])

    def killed_in_the_middle(path: Path, text: str) -> None:
        with path.open("w") as opened:
            opened.write(text[:9])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", killed_in_the_middle)
    with pytest.raises(KeyboardInterrupt):
        replace_metrics(file, [{"step": 1, "loss": 2.0}])
    monkeypatch.undo()
    assert [line["step"] for line in read_metrics(file)] == [1, 2]
    replace_metrics(file, [{"step": 1, "loss": 2.0}])
    assert file.read_text() == '{"step": 1, "loss": 2.0}\n'
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_new_run_in_an_old_folder_begins_a_new_file(accelerator, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    make_log(accelerator, tmp_path)
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_validation_lines_have_their_prefix(accelerator, tmp_path: Path) -> None:
    log = make_log(accelerator, tmp_path)
    shown = log.write_validation(7, {"text_loss": 1.0, "caption_loss": 2.0, "image_loss": 3.0})
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    assert line == {
        "step": 7,
        "validation/text_loss": 1.0,
        "validation/caption_loss": 2.0,
        "validation/image_loss": 3.0,
        "validation/loss": 1.0 + 2.0 * 3.0,
    }
    text = "step 7 held-out text_loss 1.0000 caption_loss 2.0000 image_loss 3.0000 (lowest so far)"
    assert " ".join(shown.split()) == text


def test_lowest_held_out_loss_is_known_also_to_a_run_that_goes_on(accelerator, tmp_path: Path) -> None:
    log = make_log(accelerator, tmp_path)
    assert log.best is None
    for step, text in ((2, 3.0), (4, 1.0), (6, 2.0), (8, 0.5)):
        shown = log.write_validation(step, {"text_loss": text, "image_loss": 1.0})
        assert ("lowest" in shown) == (step != 6)
    assert log.best == (2.5, 8)
    again = make_log(accelerator, tmp_path, first_step=6)
    assert again.best == (3.0, 4)
    assert "lowest" not in again.write_validation(8, {"text_loss": 1.0, "image_loss": 1.0})


@pytest.mark.parametrize("validate_at", [3, 4])
def test_validation_between_two_lines_loses_no_step(accelerator, tmp_path: Path, validate_at: int) -> None:
    """Each line is the mean over all steps since the previous line, for any events in between."""
    log, batch = make_log(accelerator, tmp_path), make_batch()
    for step in range(1, 5):
        log.add(result(float(step), 1.0, 1.0, 1.0), batch, Counter(image_items=1))
        if step == validate_at:
            if step == 4:
                write(log, 0.1)
            log.write_validation(step, {"text_loss": 1.0, "caption_loss": 2.0, "image_loss": 3.0})
    if validate_at == 3:
        write(log, 0.1)
    line = next(line for line in read_metrics(tmp_path / "metrics.jsonl") if "text_loss" in line)
    assert line["text_loss"] == pytest.approx((1 + 2 + 3 + 4) / 4)
    assert line["image_items_seen"] == 4


def test_flops_are_six_per_active_parameter_and_twelve_per_pair() -> None:
    config = tiny_config(num_kv_heads=1)
    model, batch = tiny_model(config), make_batch()
    block = 16 * (2 + 1 + 1) * 8 + 16 * 16 + 3 * 16 * 24
    patch = 2 * 2 * 3
    assert active_parameters(model, config, "text") == 2 * block + 29 * 16
    assert active_parameters(model, config, "image") == 2 * block
    pairs = 0
    for row in range(8):
        ids = [ids[row].tolist() for ids in (batch.slots.document_ids, batch.slots.order, batch.slots.span_ids)]
        slots = list(zip(*ids, strict=True))
        pairs += sum(d == e >= 0 and (o <= p or (s == t and s >= 0)) for d, p, s in slots for e, o, t in slots)
    weights = 6 * (12 * (2 * block + 29 * 16) + 8 * (2 * block + 16 * patch))
    # Patches and timesteps have no gradient. A timestep is embedded once an image, of which there are two.
    weights += 4 * 8 * 16 * patch + 2 * (4 * 256 * 16 + 6 * 16 * 16)
    assert weight_flops_per_row(model, RowShape.of_batch(config, batch)) == weights
    assert attending_pairs(batch, model) == pairs
    assert flops_per_pair(model) == 12 * 2 * 16
    lengths = torch.stack([(batch.slots.document_ids == document).sum(1) for document in range(2)])
    causal = tiny_model(tiny_config({"attention": "causal"}))
    assert attending_pairs(batch, causal) == (lengths * (lengths + 1) // 2).sum()


def test_dense_and_mixture_have_the_same_active_parameters() -> None:
    dense, mixture = tiny_config(**DENSE), tiny_config()
    for modality in ("text", "image"):
        assert active_parameters(tiny_model(dense), dense, modality) == active_parameters(
            tiny_model(mixture), mixture, modality
        )
    partly = tiny_config(untied=["ffn"])
    assert active_parameters(tiny_model(partly), partly, "text") == active_parameters(tiny_model(dense), dense, "text")


def test_peak_flops_are_known_of_gpus_alone() -> None:
    assert peak_flops(torch.device("cpu")) is None
