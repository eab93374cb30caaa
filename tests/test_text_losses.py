"""Losses on held-out texts and images, against one document at a time, and as commands on a real run."""

import json
import math
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate import PartialState
from conftest import SIZES, tiny_config, tiny_model
from process_group import run_processes
from test_validation import held_out, make_validation
from training_runs import arguments_below

from transfusion_mot.data.sources.base import share_of
from transfusion_mot.errors import UserError
from transfusion_mot.models.inputs import Slots, TokenInput
from transfusion_mot.training.text_losses import TextReader, text_losses

ROOT = Path(__file__).parents[1]
TEXTS = ["a red apple", "zwei \u00c4pfel und ein sehr langer Satz, der geschnitten wird", "x", "\u4e00 \U0001f34e"]


def _reader(tokenizer, rope="1d", slots=24, rows=2):
    return TextReader(tokenizer, rope, slots, rows)


@torch.no_grad()
def _naive(model, tokenizer, texts, end, slots):
    """(summed loss, loss of the last token, tokens) of each text, one piece at a time in a separate row."""
    rope_1d = model.architecture.rope == "1d"
    results = []
    for text in texts:
        tokens = [tokenizer.bos_id, *tokenizer.encode(text), end]
        losses = []
        for start in range(0, len(tokens) - 1, slots):
            piece = tokens[start : start + slots + 1]
            count = len(piece) - 1
            places = torch.arange(count)[None]
            rope = places if rope_1d else places[..., None].expand(1, count, 3)
            slots_of = Slots(0 * places, places, 0 * places - 1, rope, 0 * places)
            output = model({"text": TokenInput(torch.tensor([piece[:-1]]))}, slots_of)
            chances = output.predictions["text"][0].log_softmax(-1)
            losses += [-chances[index, token].item() for index, token in enumerate(piece[1:])]
        results.append((sum(losses), losses[-1], len(losses)))
    return np.array(results).T


@pytest.mark.parametrize("rope", ["1d", "3d"])
@pytest.mark.parametrize("ends_in", ["text", "image"])
def test_losses_equal_those_of_one_text_at_a_time(byte_tokenizer, rope, ends_in):
    model = tiny_model(tiny_config(rope=rope), SIZES | {"text": byte_tokenizer.vocab_size}, dtype=torch.float32)
    end = byte_tokenizer.eos_id if ends_in == "text" else byte_tokenizer.begin_ids["image"]
    sums, last, counts = _naive(model, byte_tokenizer, TEXTS, end, 24)
    num_bytes = sum(len(text.encode()) for text in TEXTS)
    loss, perplexity, bits = text_losses(model, TEXTS, ends_in, _reader(byte_tokenizer, rope))
    assert loss.value == pytest.approx(sums.sum() / counts.sum(), rel=1e-5)
    assert perplexity.value == pytest.approx(math.exp(sums.sum() / counts.sum()), rel=1e-4)
    assert bits.value == pytest.approx((sums - last).sum() / math.log(2) / num_bytes, rel=1e-5)
    assert loss.protocol["bytes"] == num_bytes
    # Without merges a token is a byte: what a tokenizer cannot change.
    assert loss.protocol["tokens"] == num_bytes + len(TEXTS)
    assert loss.interval[0] < loss.value < loss.interval[1]
    for other in (
        text_losses(model, TEXTS[::-1], ends_in, _reader(byte_tokenizer, rope)),
        text_losses(model, TEXTS, ends_in, _reader(byte_tokenizer, rope, rows=7)),
    ):
        assert [metric.value for metric in other] == pytest.approx([loss.value, perplexity.value, bits.value], rel=1e-5)


def test_nothing_to_read_is_refused(byte_tokenizer):
    with pytest.raises(UserError, match="held-out texts are empty"):
        text_losses(torch.nn.Linear(1, 1), [""], "text", _reader(byte_tokenizer))


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(byte_tokenizer, tmp_path):
    alone = _values(byte_tokenizer)
    for values in run_processes(_values, 2, {}, tmp_path, byte_tokenizer):
        assert values == pytest.approx(alone, rel=1e-6)


def _values(tokenizer):
    model = tiny_model(tiny_config(), SIZES | {"text": tokenizer.vocab_size}, dtype=torch.float32)
    metrics = text_losses(model, TEXTS[:3], "text", _reader(tokenizer), PartialState(cpu=True))
    return [metric.value for metric in metrics]


# In 18 slots captions leave no room for a second image.
@pytest.mark.parametrize("text_slots", [64, 18])
def test_image_losses_are_those_of_validation(byte_tokenizer, accelerator, text_slots):
    validation, model = make_validation(byte_tokenizer, held_out(), text_slots=text_slots)
    losses = validation.item_losses(model, accelerator, "image", [0.1, 0.3, 0.5, 0.7, 0.9])
    expected = validation.losses(model, accelerator)
    assert losses.mean().item() == pytest.approx(expected["image_loss"], rel=1e-6)
    assert losses.mean(dim=0)[3].item() == pytest.approx(expected["image_loss/t=0.7"], rel=1e-6)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, picture_folder, random_vae, emoji_cache):
    """A run of train.py of two steps."""
    folder = tmp_path_factory.mktemp("trained")
    arguments = arguments_below(folder, picture_folder, random_vae, emoji_cache)(training={"num_steps": 2})
    _run("train.py", arguments)
    return folder / "run"


def _run(script, arguments):
    before, sys.argv = sys.argv, [script, *map(str, arguments)]
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    finally:
        sys.argv = before


def _saved(path):
    return {entry["name"]: entry for entry in json.loads(path.read_text())["metrics"]}


@pytest.mark.slow
def test_text_as_a_command(run_folder, picture_folder, tmp_path, capsys):
    _run("evaluate/text.py", ["--checkpoint", run_folder, "--device", "cpu", "--output", tmp_path / "text.json"])
    saved = _saved(tmp_path / "text.json")
    names = {name.split(" (", 1)[1] for name in saved}
    assert names == {"texts.txt)", f"captions of {picture_folder.name})"}
    assert saved["perplexity (texts.txt)"]["value"] == pytest.approx(math.exp(saved["text loss (texts.txt)"]["value"]))
    assert saved["text loss (texts.txt)"]["protocol"]["texts"] == 8
    (tmp_path / "mine.txt").write_text("an apple\n\na pear")
    _run("evaluate/text.py", ["--checkpoint", run_folder, "--texts", tmp_path / "mine.txt", "--num-texts", 1])
    assert "bits per byte (mine.txt)" in capsys.readouterr().out


def test_diffusion_loss_as_a_command(run_folder, picture_folder, tmp_path, capsys):
    _run("evaluate/diffusion_loss.py", ["--checkpoint", run_folder, "--bins", 4, "--output", tmp_path / "loss.json"])
    saved = _saved(tmp_path / "loss.json")
    assert len(saved) == 10
    captions = [json.loads(line)["text"] for line in (picture_folder / "metadata.jsonl").read_text().splitlines()]
    held_out_captions = [caption for caption in captions if share_of(caption, 0) < 0.2]
    for name in ("conditional", "unconditional"):
        bins = [saved[f"diffusion loss ({name}, t = {t})"]["value"] for t in (0.125, 0.375, 0.625, 0.875)]
        assert saved[f"diffusion loss ({name})"]["value"] == pytest.approx(np.mean(bins))
        assert saved[f"diffusion loss ({name})"]["protocol"]["images"] == len(held_out_captions)
    assert saved["diffusion loss (conditional)"]["value"] != saved["diffusion loss (unconditional)"]["value"]
    capsys.readouterr()
    with pytest.raises(SystemExit):
        _run("evaluate/diffusion_loss.py", ["--checkpoint", run_folder, "--bins", 0])
    assert "--bins: '0' is not a whole number of at least 1" in capsys.readouterr().err


def test_diffusion_loss_of_a_run_with_a_clean_context(run_folder, tmp_path):
    """With one image in a row there is no image before it: the numbers do not depend on the context setting."""
    config = tmp_path / "clean.yaml"
    config.write_text((run_folder / "config.yaml").read_text().replace("noised", "clean"))
    assert "image_context: clean" in config.read_text()
    losses = []
    for more in ([], ["--config", config]):
        words = ["--checkpoint", run_folder, "--bins", 2, "--output", tmp_path / "loss.json", *more]
        _run("evaluate/diffusion_loss.py", words)
        losses.append({name: entry["value"] for name, entry in _saved(tmp_path / "loss.json").items()})
    assert losses[0] == losses[1]


def test_losses_are_of_the_checkpoint_whatever_the_configuration_says_of_its_model(run_folder, tmp_path):
    other = yaml.safe_load((run_folder / "config.yaml").read_text())
    other["model"]["rope"] = {"1d": "3d", "3d": "1d"}[other["model"]["rope"]]
    other["model"]["modalities"]["image"]["patch_size"] = 4 // other["model"]["modalities"]["image"]["patch_size"]
    assert other["diffusion"]["scheduler"] == "FlowMatchEulerDiscreteScheduler"
    other["diffusion"] |= {"scheduler": "DDPMScheduler", "scheduler_args": {"prediction_type": "epsilon"}}
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(other))
    found = []
    for more in ([], ["--config", tmp_path / "other.yaml"]):
        losses = {}
        for script, options in (("text", ["--num-texts", 4]), ("diffusion_loss", ["--bins", 2])):
            words = ["--checkpoint", run_folder, *options, "--output", tmp_path / "loss.json", *more]
            _run(f"evaluate/{script}.py", words)
            losses |= _saved(tmp_path / "loss.json")
        found.append(losses)
    assert found[0] == found[1]
