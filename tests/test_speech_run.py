"""A run on documents of text, image and speech, one that starts from its snapshot, and their files."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from test_pipeline import IMAGE_SIZE, seeds, tiny_vae
from test_pipeline_speech import picture, tiny_encodec, tone
from training_runs import TOWER

import train
from transfusion_mot.data.audio import write_wav
from transfusion_mot.errors import UserError
from transfusion_mot.pipeline import TransfusionPipeline
from transfusion_mot.run import snapshots
from transfusion_mot.sampling.export import export

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Codecs, and twenty pictures with spoken captions."""
    folder = tmp_path_factory.mktemp("triples")
    tiny_vae().save_pretrained(folder / "vae")
    for name, seed in (("tokenizer", 0), ("other", 1)):
        model = tiny_encodec()
        with torch.no_grad():
            model.decoder.layers[0].conv.bias.add_(seed)
        model.save_pretrained(folder / name)
    (folder / "data").mkdir()
    lines = []
    for number in range(20):
        noise = np.random.default_rng(number).integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3)).astype(np.uint8)
        Image.fromarray(noise).save(folder / "data" / f"{number}.png")
        write_wav(tone(0.1 + number / 100, 50 + 20 * number), folder / "data" / f"{number}.wav")
        line = {"file_name": f"{number}.png", "text": f"number {number}", "sound": f"{number}.wav"}
        lines.append(json.dumps(line))
    (folder / "data" / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def command(folder: Path, name: str, **sections: Any) -> list[str]:
    data = {
        "sources": [{"kind": "imagefolder", "path": str(folder / "data"), "audio_column": "sound"}],
        "slots": {"text": 64, "image": 2, "speech": 96},
        "orders": {"text speech": 1, "speech text": 1, "image speech": 1, "speech image": 1},
        "held_out_fraction": 0.3,
        "num_workers": 0,
        "cache_dir": str(folder / "cache"),
    }
    training = {"num_steps": 2, "num_rows": 2, "mixed_precision": "no", "log_every": 1, "num_validation_documents": 4}
    training |= {"sample_every": 2, "save_every": 2, "validate_every": 2}
    settings = {"output_dir": str(folder / name), "data": data | sections.pop("data", {}), "training": training}
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(settings | sections))
    return ["--config", str(file)]


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    """Folder of a run that has ended."""
    modalities = {"text": {"tower": "text"}, "speech": {"tower": "speech"}}
    modalities["image"] = {"tower": "image", "objective": "diffusion"}
    model = {"towers": dict.fromkeys(modalities, TOWER), "modalities": modalities}
    model |= {"num_layers": 2, "num_heads": 2, "head_dim": 8}
    sections = {
        "data": {"image_size": IMAGE_SIZE, "max_audio_seconds": 0.5},
        "model": model,
        "codecs": {"image": {"path": str(folder / "vae")}, "speech": {"path": str(folder / "tokenizer")}},
        "tokenizer": {"vocab_size": 280},
        "diffusion": {"num_inference_steps": 2, "guidance_scale": 1.5},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setattr(snapshots, "plot_runs", lambda *_: None)
        train.main(command(folder, "before", **sections))
    return folder / "before"


def test_a_run_is_heard_and_leaves_a_snapshot_of_both_codecs(trained: Path, folder: Path, capsys) -> None:
    shown = sorted(path.name for path in (trained / "samples").iterdir())
    assert shown == ["step-0000002-captions.png", "step-0000002-speech", "step-0000002-speech.png", "step-0000002.png"]
    assert len(list((trained / "samples" / "step-0000002-speech").glob("*.wav"))) == 4
    pipeline = TransfusionPipeline.from_pretrained(trained / "snapshots" / "step-0000002")
    assert pipeline.config.max_audio_seconds == 0.5
    weights = tiny_encodec().state_dict()
    assert all(torch.equal(weights[name], own) for name, own in pipeline.audio_tokenizer.state_dict().items())
    card = (trained / "snapshots" / "step-0000002" / "README.md").read_text()
    for said in ("text-to-speech", "| longest audio | 0.5 s |", "transcript = pipeline.transcribe(audio)[0]"):
        assert said in card
    # Exported in half precision it keeps the tokenizer as it is: it hears the same codes.
    export(str(trained), folder / "exported", licences=None, evaluation=None, max_megabytes=1.0)
    exported = TransfusionPipeline.from_pretrained(folder / "exported")
    assert exported.encode_audio([tone()]) == pipeline.encode_audio([tone()])
    spoken = exported.speak(picture(), max_seconds=0.1, guidance_scale=1.0, generator=seeds(1))
    assert spoken[0].samples.std() >= 0


def test_a_run_that_begins_with_the_snapshot_keeps_both_codecs(trained: Path, folder: Path, monkeypatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(snapshots, "plot_runs", lambda *_: None)
    with pytest.raises(UserError, match=r"codecs.speech.path is .*other, but .* were trained with another codec"):
        train.main(
            command(folder, "refused", init_from=str(trained), codecs={"speech": {"path": str(folder / "other")}})
        )
    moved = shutil.copytree(trained, folder / "moved")
    train.main(command(folder, "after", init_from=str(moved)))
    own = folder / "after" / "codecs"
    config = yaml.safe_load((folder / "after" / "config.yaml").read_text())
    assert {name: codec["path"] for name, codec in config["codecs"].items()} == {
        name: str(own / name) for name in ("image", "speech")
    }
    assert config["data"]["max_audio_seconds"] == 0.5
    # It goes on without the snapshot.
    shutil.rmtree(moved)
    settings = yaml.safe_load((folder / "after.yaml").read_text())
    settings["training"]["num_steps"] = 3
    (folder / "after.yaml").write_text(yaml.safe_dump(settings))
    train.main(["--config", str(folder / "after.yaml")])
    loaded = TransfusionPipeline.from_pretrained(folder / "after" / "snapshots" / "step-0000003")
    assert (loaded.has_images, loaded.has_audio) == (True, True)
