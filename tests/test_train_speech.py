"""Runs of text, images and speech at toy size: train.py from files, resumed, with losses of modalities and orders."""

import json
import math
import runpy
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import transformers
import yaml
from PIL import Image
from test_pipeline import tiny_vae
from test_pipeline_codes import tiny_vq
from training_runs import TOWER, assert_same, final_state

from transfusion_mot.codecs.load import load_codec
from transfusion_mot.config import RunConfig, parse_config
from transfusion_mot.data import inspect
from transfusion_mot.data.documents import DocumentReader
from transfusion_mot.data.images import to_pixels
from transfusion_mot.data.layout import Media
from transfusion_mot.data.mixture import open_documents, with_encoded
from transfusion_mot.data.tokenizer import load_tokenizer, train_tokenizer
from transfusion_mot.models.transfusion import TransfusionMoT
from transfusion_mot.reporting.plan import plan

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
ORDERS = {
    "text image": 1.0,
    "image text": 1.0,
    "text speech": 1.0,
    "speech text": 1.0,
    "image speech": 0.5,
    "speech image": 0.5,
}
RATE = 8000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Codecs with random weights, and 30 pictures with captions; 24 captions are spoken."""
    root = tmp_path_factory.mktemp("speech")
    # 20 codes a second, of 4 bits.
    config = transformers.EncodecConfig(
        sampling_rate=RATE,
        upsampling_ratios=[8, 5, 5, 2],
        num_filters=4,
        hidden_size=8,
        codebook_size=16,
        target_bandwidths=[0.08],
    )
    transformers.EncodecModel(config).save_pretrained(root / "encodec")
    tiny_vq().save_pretrained(root / "codes")
    tiny_vae().save_pretrained(root / "latents")
    rng = np.random.default_rng(0)
    lines = []
    (root / "data").mkdir()
    for i in range(30):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(root / "data" / f"{i}.png")
        tone = 0.5 * np.sin(2 * np.pi * (200 + 20 * i) * np.arange(RATE * (20 + i) // 100) / RATE)
        soundfile.write(root / "data" / f"{i}.wav", tone, RATE)
        lines.append({"file_name": f"{i}.png", "text": f"thing {i}", "spoken": f"{i}.wav" if i % 5 else ""})
    (root / "data" / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


def arguments(folder: Path, image: str, run: str, **changes: Any) -> list[str]:
    """The command line of a run whose images are codes or latents."""
    sections: dict[str, Any] = {
        "output_dir": str(folder / run),
        "data": {
            "sources": [{"kind": "imagefolder", "path": str(folder / "data"), "audio_column": "spoken"}],
            "image_size": 16,
            "orders": ORDERS,
            "max_audio_seconds": 0.6,
            "slots": {"text": 48, "image": 130 if image == "codes" else 3, "speech": 40},
            "num_workers": 0,
            "held_out_fraction": 0.3,
            "cache_dir": str(folder / "cache"),
        },
        "tokenizer": {"vocab_size": 300},
        "codecs": {"image": {"path": str(folder / image)}, "speech": {"path": str(folder / "encodec")}},
        "model": {
            "towers": dict.fromkeys(("text", "image", "speech"), TOWER),
            "modalities": {
                "text": {"tower": "text"},
                "image": {"tower": "image", "objective": "next_token" if image == "codes" else "diffusion"},
                "speech": {"tower": "speech", "objective": "next_token"},
            },
            "num_layers": 1,
            "num_heads": 2,
            "head_dim": 8,
        },
        "optimizer": {"warmup_steps": 1, "lr": 0.01},
        "training": {
            "num_steps": 3,
            "num_rows": 2,
            "mixed_precision": "no",
            "log_every": 1,
            "save_every": 2,
            "num_validation_documents": 6,
            "sample_prompts": [],
            "tracker": None,
        },
    }
    sections["training"] |= changes
    file = folder / f"{run}.yaml"
    file.write_text(yaml.safe_dump(sections))
    return ["--config", str(file)]


@pytest.fixture(scope="module")
def train() -> Any:
    return runpy.run_path(str(ROOT / "train.py"))["main"]


@pytest.mark.parametrize("image", ["codes", "latents"])
def test_a_run_of_three_modalities_learns_each_and_can_be_resumed(folder: Path, train: Any, image: str) -> None:
    run = folder / f"of-{image}"
    train(arguments(folder, image, run.name))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "text_loss" in line]
    assert len(steps) == 3
    for name in ("text_loss", "image_loss", "speech_loss"):
        assert all(line[name] > 0 for line in steps)
        assert steps[-1][name] < steps[0][name] or name == "image_loss"
    (measured,) = [line for line in lines if "validation/loss" in line]
    of_orders = {f"{order.split()[-1]}_loss/{order.replace(' ', '-')}" for order in ORDERS}
    assert of_orders <= {key.removeprefix("validation/") for key in measured}
    if image == "latents":
        # From step 2 it goes on as it did.
        state = run / "state" / "step-0000002"
        train([*arguments(folder, image, "resumed"), f"resume={state}"])
        assert_same(final_state(run), final_state(folder / "resumed"))


def test_a_run_reads_random_codes_only_in_last_items_and_in_training(
    folder: Path, train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found in what the model reads: a label is the true next code."""
    seen: list[tuple[bool, dict[str, Any], torch.Tensor, torch.Tensor]] = []
    forward = TransfusionMoT.forward

    def recorded(model: TransfusionMoT, inputs: Any, slots: Any = None, **rest: Any) -> Any:
        if slots is not None:
            seen.append((model.training, inputs, slots.document_ids, slots.order))
        return forward(model, inputs, slots, **rest)

    monkeypatch.setattr(TransfusionMoT, "forward", recorded)
    noise = [f"model.modalities.{name}.code_noise_prob={prob}" for name, prob in (("image", 0.9), ("speech", 0.8))]
    train([*arguments(folder, "codes", "noisy", num_steps=12), *noise])
    # Whether in training, modality, whether last: changed codes and all of them.
    counts: dict[tuple[bool, str, bool], list[int]] = {}
    tokenizer = load_tokenizer(str(folder / "noisy" / "tokenizer"), ("text", "image", "speech"))
    no_item = {tokenizer.eos_id, *tokenizer.end_ids.values()}
    for in_training, inputs, document_ids, order in seen:
        starts = np.cumsum([0, *(given.ids.shape[1] for given in inputs.values())])
        documents = [(row, one) for row, ids in enumerate(document_ids) for one in range(ids.max() + 1)]
        for row, document in documents:
            slots: list[tuple[str, int, int]] = []
            for slot in sorted(np.flatnonzero(document_ids[row] == document), key=lambda slot: order[row, slot]):
                place = int(np.searchsorted(starts, slot, "right")) - 1
                name, given = list(inputs)[place], list(inputs.values())[place]
                index = slot - starts[place]
                slots.append((name, int(given.ids[row, index]), int(given.labels[row, index])))
            while slots[-1][0] == "text" and slots[-1][1] in no_item:
                slots.pop()
            for number, ((name, _, label), (behind, code, _)) in enumerate(pairwise(slots)):
                if name == behind != "text":
                    is_last = all(other == name for other, _, _ in slots[number:])
                    of = counts.setdefault((in_training, name, is_last), [0, 0])
                    of[0] += code != label
                    of[1] += 1
    assert len(counts) == 8
    for (in_training, name, is_last), (changed, total) in counts.items():
        assert total > 50
        # A random code is sometimes the true one: one of 64 and one of 16.
        share = {"image": 0.9 * 63 / 64, "speech": 0.8 * 15 / 16}[name] if in_training and is_last else 0.0
        assert changed / total == pytest.approx(share, abs=6 * math.sqrt(share * (1 - share) / total))


def test_documents_are_what_a_naive_reading_of_the_files_gives(folder: Path) -> None:
    config = parse_config(RunConfig, arguments(folder, "codes", "naive"), "")
    tokenizer = train_tokenizer(["thing 1"], 300, config.model.made)
    codecs = {name: load_codec(own, "next_token", "cpu") for name, own in config.codecs.items()}
    (source,) = with_encoded(open_documents(config.data, "train"), config.data, codecs, config.codecs).sources
    reader, seen = DocumentReader(tokenizer, config.data), Counter[str]()
    for index in range(len(source.documents)):
        number = int(Path(source.documents.where(index)).stem)
        samples, _ = soundfile.read(folder / "data" / f"{number}.wav", dtype="float32")
        (codes,) = codecs["speech"].encode([torch.from_numpy(samples)])
        pixels = to_pixels(np.array(Image.open(folder / "data" / f"{number}.png")))[None]
        spans = {
            "speech": [16, *codes.tolist(), 17],
            "image": [19, *codecs["image"].encode(pixels).flatten().tolist(), 20],
        }
        for seed in range(8):
            document = reader.read(source, index, np.random.default_rng([index, seed]))
            media = [segment for segment in document.segments if isinstance(segment, Media)]
            assert all(item.content == spans[item.modality] for item in media)
            text = [token for segment in document.segments if isinstance(segment, list) for token in segment]
            caption = tokenizer.decode([token for token in text if token not in (tokenizer.bos_id, tokenizer.eos_id)])
            assert caption in ("", f"thing {number}")
            names = {item.modality for item in media}
            assert "speech" not in names or (number % 5 and len(samples) <= 0.6 * RATE)
            seen[" ".join(sorted({*names, *(["text"] if caption else [])}))] += 1
    # The last two with the prompt dropped.
    assert seen.keys() == {"image text", "speech text", "image speech", "image", "speech"}


def test_inspect_and_plan_know_codes_of_audio(folder: Path, capsys: Any) -> None:
    given = arguments(folder, "codes", "inspected")
    inspect.main([*given, "--picture", str(folder / "row.png"), "--rows", "40", "--slots", "300"])
    shown = capsys.readouterr().out
    (source,) = open_documents(parse_config(RunConfig, given, "").data, "train")
    names = [Path(source.documents.media["speech"].where(i)) for i in range(len(source.documents.media["speech"]))]
    num_codes = [math.ceil(20 * soundfile.info(name).duration) for name in names]
    assert f"{len(names)} audio clips: 0.00 hours, {sum(num_codes)} codes of speech" in shown
    assert "filled: text" in shown
    assert Image.open(folder / "row.png").size[0] == 2000
    # Layouts in the proportion of what documents take have less padding than the given one.
    own = float(shown.split(" % of the slots are padding")[0].split()[-1])
    best = float(shown.split("media a row\n")[1].split(" %")[0].split()[-1])
    assert best < own
    planned = plan(["--plan", "--gpus", "1", *given], lambda rest: parse_config(RunConfig, rest, ""))
    assert "assumed" not in planned
