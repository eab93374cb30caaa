"""Previews of a run, and the model card of its snapshots."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from conftest import numbered_images, sources_of, texts_of
from diffusers.utils import hub_utils
from huggingface_hub import ModelCard
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_pipeline import IMAGE_SIZE, tiny_pipeline

from transfusion_mot.config import DataConfig, RunConfig, SourceConfig, TrainingConfig
from transfusion_mot.data.mixture import Source, Sources
from transfusion_mot.data.sources.open import open_source
from transfusion_mot.pipeline import TransfusionPipeline
from transfusion_mot.reporting.model_card import model_card
from transfusion_mot.sampling.held_out_items import pictures_of
from transfusion_mot.sampling.previews import BEFORE_AND_AFTER, Previews


@pytest.fixture
def held_out(tmp_path: Path) -> Sources:
    """Twenty pictures of one colour each, some of them wide."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    lines = []
    for number in range(20):
        shape = (12, 12 + 6 * (number % 2), 3)
        Image.fromarray(np.full(shape, 10 * number, dtype=np.uint8)).save(folder / f"{number:02}.png")
        lines.append(json.dumps({"file_name": f"{number:02}.png", "text": f"number {number}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    data = DataConfig(image_size=12, held_out_fraction=0.0, cache_dir=str(tmp_path / "cache"))
    source = Source(open_source(SourceConfig("imagefolder", path=str(folder)), data, "train"))
    return Sources([source, texts_of(["a text"])], {"image": [(3, 4, 4)]})


def test_pictures_to_caption_are_evenly_spaced_and_have_their_captions(held_out: Sources) -> None:
    pictures, captions = pictures_of(held_out, "image", 5)
    numbers = [int(caption.removeprefix("number ")) for caption in captions]
    assert len(set(numbers)) == 5
    # As training reads them.
    assert all(picture.size == (12, 12) for picture in pictures)
    assert [picture.getpixel((3, 3))[0] for picture in pictures] == [10 * number for number in numbers]
    assert len(pictures_of(held_out, "image", 50)[0]) == 20
    assert pictures_of(sources_of(texts_of(["a text"])), "image", 5) == ([], [])
    # Latents without their pictures: there is nothing to show.
    with pytest.raises(NotImplementedError):
        pictures_of(sources_of(numbered_images(["a"])), "image", 5)


def test_pictures_of_before_the_first_step_stand_beside_the_newest(tmp_path: Path, held_out: Sources) -> None:
    accelerator, pipeline = Accelerator(cpu=True), tiny_pipeline()
    previews = Previews(pipeline, ["red", "sun"], held_out, tmp_path / "samples")
    both = tmp_path / "samples" / BEFORE_AND_AFTER
    previews.make(0, accelerator)
    assert not both.exists()
    previews.make(1, accelerator)
    # In a cell of the sheet: a picture, a line, and the same picture again.
    side = pipeline.sizes.trained[0][0]
    sheet = np.array(Image.open(both))
    grey = np.argwhere((sheet == 0x99).all(axis=2))
    factor = (grey[:, 1] == grey[0, 1]).sum() // side
    top, left = grey.min(axis=0)
    before = sheet[top : top + factor * side, left - factor * side : left]
    after = sheet[top : top + factor * side, left + 2 * factor :][:, : factor * side]
    assert before.shape == after.shape == (factor * side, factor * side, 3)
    assert np.array_equal(before, after)
    with torch.no_grad():
        for parameter in pipeline.transformer.parameters():
            parameter.mul_(1.5)
    previews.make(2, accelerator)
    sheet = np.array(Image.open(both))
    assert np.array_equal(before, sheet[top : top + factor * side, left - factor * side : left])
    assert not np.array_equal(before, sheet[top : top + factor * side, left + 2 * factor :][:, : factor * side])


def test_grids_are_the_same_for_the_same_weights_and_stand_in_tensorboard(tmp_path: Path, held_out: Sources) -> None:
    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=str(tmp_path))
    accelerator.init_trackers("run")
    pipeline = tiny_pipeline()
    previews = Previews(pipeline, ["red", "sun"], held_out, tmp_path / "samples")
    previews.make(1, accelerator)
    torch.manual_seed(5)
    previews.make(2, accelerator)
    for name in ("step-000000{}.png", "step-000000{}-captions.png"):
        one, two = (Image.open(tmp_path / "samples" / name.format(step)) for step in (1, 2))
        assert np.array_equal(one, two)
    with torch.no_grad():
        for parameter in pipeline.transformer.parameters():
            parameter.mul_(1.5)
    previews.make(3, accelerator)
    assert not np.array_equal(one, Image.open(tmp_path / "samples" / "step-0000003-captions.png"))
    accelerator.end_training()
    events = EventAccumulator(str(next(tmp_path.rglob("events.out*")).parent))
    events.Reload()
    assert set(events.Tags()["images"]) == {"samples", "captions"}
    assert [event.step for event in events.Images("captions")] == [1, 2, 3]
    assert events.Images("samples")[0].width == Image.open(tmp_path / "samples" / "step-0000001.png").width


def test_prompts_are_held_out_captions_unless_some_are_given(tmp_path: Path, held_out: Sources) -> None:
    pipeline = tiny_pipeline()
    pipeline.register_to_config(max_prompt_tokens=None)
    previews = Previews(pipeline, None, held_out, tmp_path / "samples")
    numbers = [int(prompt.removeprefix("number ")) for prompt in previews.prompts]
    assert len(numbers) == 4
    assert np.ptp(np.diff(sorted(numbers))) <= 1
    assert Previews(pipeline, [], held_out, tmp_path / "samples").prompts == []
    # Captions that are too long for a prompt are cut in training, and are no prompts.
    pipeline.register_to_config(max_prompt_tokens=len(pipeline.text_tokenizer.encode("number 1")))
    lengths = [len(pipeline.text_tokenizer.encode(f"number {number}")) for number in sorted(numbers)]
    kept = Previews(pipeline, None, held_out, tmp_path / "samples").prompts
    assert len(kept) == lengths.count(lengths[0]) < 4
    # Without pictures there is nothing to ask for.
    assert Previews(pipeline, None, sources_of(texts_of(["b"])), tmp_path / "samples").prompts == []


def test_prompts_are_painted_at_all_sizes_in_turn(tmp_path: Path, monkeypatch) -> None:
    sizes = [[8, 8], [4, 16], [16, 4]]
    pipeline = tiny_pipeline(image_sizes={"trained": sizes, "fit": "crop"})
    previews = Previews(pipeline, ["red", "sun", "a", "moon"], sources_of(texts_of(["b"])), tmp_path / "samples")
    shown = []
    monkeypatch.setattr(previews, "_show", lambda images, *rest, **more: shown.extend(images))
    previews.make(1, Accelerator(cpu=True))
    assert [(image.height, image.width) for image in shown] == [(8, 8), (4, 16), (16, 4), (8, 8)]
    third = pipeline("a", height=16, width=4, generator=torch.Generator().manual_seed(2)).images[0]
    assert np.abs(np.asarray(shown[2]).astype(int) - np.asarray(third)).max() <= 1


def card(folder: Path) -> str:
    sources = sources_of(numbered_images(["a"] * 4), texts_of(["b"] * 10, weight=2.0))
    seen = {"image_items": 6, "text_slots": 1234, "sources/images from 0/items": 6, "sources/images from 0/taken": 6}
    lines = [
        {"step": 3, "text_loss": 2.5, "image_loss": 1.25},
        {"step": 3, "validation/text_loss": 2.75, "validation/image_loss": 1.5},
        {"step": 9, "text_loss": 0.1},
    ]
    config = RunConfig(output_dir=str(folder / "my-run"), training=TrainingConfig(sample_prompts=["red"], num_steps=9))
    return model_card(config, parameters=12_345_678, sources=sources, seen=seen, lines=lines, step=3, prompt="red")


def test_card_is_one_of_the_hub_and_says_what_was_counted_and_measured(tmp_path: Path) -> None:
    text = card(tmp_path)
    parsed = ModelCard(text)
    parsed.validate = None
    assert parsed.data.library_name == "diffusers"
    assert parsed.data.pipeline_tag == "text-to-image"
    assert parsed.data.license is None
    assert "| images from 0 | 1 | 0 | 0 | 6 | 1.50 |" in text
    assert "12.3 M parameters" in text
    assert "| text loss in nats per token | 2.5000 (step 3) | 2.7500 (step 3) |" in text
    assert "0.1" not in text.split("## Measured")[1].split("## Licence")[0]
    settings = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, flags=re.DOTALL)[1])
    assert settings["training"]["sample_prompts"] == ["red"]


def test_snippet_of_the_card_runs(tmp_path: Path) -> None:
    pipeline = tiny_pipeline()
    pipeline.model_card = card(tmp_path)
    pipeline.save_pretrained(tmp_path / "snapshot")
    text = (tmp_path / "snapshot" / "README.md").read_text()
    (snippet,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    names: dict = {}
    snippet = snippet.replace("PATH_OR_NAME_OF_THIS_MODEL", str(tmp_path / "snapshot")).replace("Once upon a time", "a")
    exec(snippet, names)
    assert names["image"].size == (IMAGE_SIZE, IMAGE_SIZE)
    assert isinstance(names["caption"], str)


@pytest.mark.parametrize("on_the_hub", [None, "---\nlicense: mit\n---\nmine\n"])
def test_card_goes_to_the_hub_with_the_pipeline_unless_there_is_one(tmp_path, monkeypatch, on_the_hub) -> None:
    """Without a network: what the hub's client would send is read where it would send it."""
    pipeline = tiny_pipeline()
    pipeline.model_card = card(tmp_path)
    pipeline.save_pretrained(tmp_path / "snapshot")
    sent = {}

    def upload_folder(repo_id, folder_path, **_):
        sent.update({p.relative_to(folder_path): p.read_bytes() for p in Path(folder_path).rglob("*") if p.is_file()})
        sent["to"] = repo_id

    class Repository:
        repo_id = "somebody/my-run"

    monkeypatch.setattr(hub_utils, "create_repo", lambda *_, **__: Repository)
    monkeypatch.setattr(hub_utils, "upload_folder", upload_folder)
    if on_the_hub:
        monkeypatch.setattr(hub_utils.ModelCard, "load", lambda *_, **__: ModelCard(on_the_hub))
    TransfusionPipeline.from_pretrained(tmp_path / "snapshot").push_to_hub("my-run")
    assert sent.pop("to") == "somebody/my-run"
    readme = sent.pop(Path("README.md")).decode()
    if on_the_hub:
        assert "mine" in readme
        assert "license: mit" in readme
    else:
        assert readme == card(tmp_path)
    saved = tmp_path / "snapshot"
    files = {p.relative_to(saved): p.read_bytes() for p in saved.rglob("*") if p.is_file() and p.name != "README.md"}
    assert sent.keys() == files.keys()
    assert all(sent[name] == files[name] for name in files if name.suffix == ".safetensors")
