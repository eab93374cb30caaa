"""Many images and captions: stored, continued, and bit-identical for any division of the work."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState
from PIL import Image
from test_pipeline import tiny_pipeline

from transfusion_mot.data.emoji import emoji_captions, render_emoji
from transfusion_mot.data.images import to_pil
from transfusion_mot.errors import UserError
from transfusion_mot.evaluation.images import load_rgb
from transfusion_mot.evaluation.protocol.prompts import CaptionedImage, Prompt, prompts_of
from transfusion_mot.evaluation.protocol.sample_files import claim_folder, write_images
from transfusion_mot.sampling.painting import Painter, SamplerSettings
from transfusion_mot.schedulers import STOCHASTIC_SOLVER, make_sampling_scheduler, sampler_name

PROMPTS = prompts_of(["a sun", "an owl", "an octopus, red", "a sun", "a", "", "rain"], 1, seed=0)


@pytest.fixture(scope="module")
def painter() -> Painter:
    pipeline = tiny_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    return Painter(pipeline, "sha256 0", PartialState(cpu=True), batch_size=3)


def settings(painter: Painter, scale: float = 2.0) -> SamplerSettings:
    return SamplerSettings(2, scale, [0.0, 1.0], sampler_name(painter.pipeline.scheduler))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}


class Killed(Exception):
    """Stands for the kill of a process."""


def making(painter: Painter, batches: int) -> Callable[[Sequence[Prompt]], list[Image.Image]]:
    """Paints so many batches and is killed in the next one."""
    left = iter(range(batches))

    def make(batch: Sequence[Prompt]) -> list[Image.Image]:
        if next(left, None) is None:
            raise Killed
        generators = [torch.Generator().manual_seed(prompt.image_seed) for prompt in batch]
        return painter.pipeline([prompt.text for prompt in batch], 2, 2.0, generator=generators).images

    return make


def test_a_killed_run_goes_on_to_the_same_bits(painter: Painter, tmp_path: Path) -> None:
    painter.paint(PROMPTS, settings(painter), tmp_path / "whole")
    whole = files(tmp_path / "whole")
    assert list(whole) == [prompt.file_name for prompt in PROMPTS]
    assert len(set(whole.values())) == len(PROMPTS)
    part = tmp_path / "part"
    part.mkdir()
    with pytest.raises(Killed):
        write_images(PROMPTS, part, making(painter, 1), batch_size=3, description="painting")
    # One of the second batch was written, and half of the next one.
    (part / PROMPTS[3].file_name).write_bytes(whole[PROMPTS[3].file_name])
    (part / PROMPTS[4].file_name).with_suffix(".partial").write_bytes(b"half of it")
    before = {name: (part / name).stat().st_mtime_ns for name in files(part)}
    write_images(PROMPTS, part, making(painter, 2), batch_size=3, description="painting")
    assert files(part) == whole
    assert not list(part.glob("*.partial"))
    unchanged = [name for name, changed in before.items() if (part / name).stat().st_mtime_ns == changed]
    assert unchanged == [prompt.file_name for prompt in PROMPTS[:3]]


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_processes_share_batches(painter: Painter, tmp_path: Path, ranks: int) -> None:
    write_images(PROMPTS, tmp_path / "one", making(painter, 3), batch_size=3, description="painting")
    for rank in reversed(range(ranks)):
        write_images(
            PROMPTS,
            tmp_path / "many",
            making(painter, 2),
            batch_size=3,
            description="painting",
            rank=rank,
            num_ranks=ranks,
        )
        painted = {index for index in range(len(PROMPTS)) if PROMPTS[index].file_name in files(tmp_path / "many")}
        assert painted == {index for index in range(len(PROMPTS)) if index // 3 % ranks >= rank}
    assert files(tmp_path / "many") == files(tmp_path / "one")


def test_a_folder_belongs_to_its_settings(painter: Painter, tmp_path: Path) -> None:
    painter.paint(PROMPTS[:3], settings(painter), tmp_path / "out")
    painter.paint(PROMPTS[:3], settings(painter), tmp_path / "out")
    with pytest.raises(UserError, match=r"other settings: guidance_scale \(2\.0 there, 3\.0 now\)"):
        painter.paint(PROMPTS[:3], settings(painter, 3.0), tmp_path / "out")
    with pytest.raises(UserError, match=r"other settings: prompts \(sha256"):
        painter.paint(PROMPTS[:2], settings(painter), tmp_path / "out")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "a.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"holds files but no settings\.json"):
        claim_folder(tmp_path / "foreign", {})


def test_a_folder_knows_the_stochastic_form_of_a_scheduler(tmp_path: Path) -> None:
    pipeline = tiny_pipeline()
    painter = Painter(pipeline, "sha256 0", PartialState(cpu=True), batch_size=3)
    for name in (STOCHASTIC_SOLVER.removesuffix(":sde"), STOCHASTIC_SOLVER):
        pipeline.scheduler = make_sampling_scheduler(pipeline.scheduler, name)
        painter.paint(PROMPTS[:3], SamplerSettings(2, 2.0, [0.0, 1.0], name), tmp_path / name)
        assert json.loads((tmp_path / name / "settings.json").read_text())["scheduler"] == name
    plain, stochastic = (files(folder) for folder in sorted(tmp_path.iterdir()))
    assert plain.keys() == stochastic.keys()
    assert set(plain.values()).isdisjoint(stochastic.values())


def test_a_prompt_is_read_as_far_as_the_model_can(painter: Painter, tmp_path: Path) -> None:
    limit = painter.pipeline.config.max_prompt_tokens
    words = "a sun " * limit
    short = painter.shortened(words)
    assert words.startswith(short)
    assert len(painter.pipeline.text_tokenizer.encode(short)) <= limit
    assert painter.shortened("a sun") == "a sun"
    long = prompts_of([words], 1, seed=0)
    painter.paint(long, settings(painter), tmp_path / "long")
    painter.paint([Prompt("00000.png", short, long[0].image_seed)], settings(painter), tmp_path / "short")
    assert files(tmp_path / "long") == files(tmp_path / "short")
    assert json.loads((tmp_path / "long" / "metadata.jsonl").read_text())["text"] == words


def test_captions_are_those_of_the_pipeline_and_gone_on_with(painter: Painter, tmp_path: Path) -> None:
    images = []
    for number, (stem, caption) in enumerate(list(emoji_captions().items())[::800]):
        path = tmp_path / f"{number}.png"
        Image.fromarray(render_emoji(stem, 40)).save(path)
        images.append(CaptionedImage(path, [caption], str(number)))
    captions = painter.caption(images, 4, tmp_path / "out")
    expected = painter.pipeline.caption([Image.open(item.image) for item in images], max_new_tokens=4)
    assert captions == expected
    parts = sorted((tmp_path / "out" / "captions").glob("0*.json"))
    assert len(parts) == -(-len(images) // 3)
    parts[1].unlink()
    kept = parts[0].stat().st_mtime_ns
    assert painter.caption(images, 4, tmp_path / "out") == captions
    assert parts[0].stat().st_mtime_ns == kept
    lines = [json.loads(line) for line in (tmp_path / "out" / "captions.jsonl").read_text().splitlines()]
    assert [line["caption"] for line in lines] == captions
    assert lines[2]["references"] == images[2].captions
    with pytest.raises(UserError, match=r"max_new_tokens \(4 there, 5 now\)"):
        painter.caption(images, 5, tmp_path / "out")


def test_prompts_with_images_are_painted_and_reconstructed_at_their_sizes(tmp_path: Path, monkeypatch) -> None:
    pipeline = tiny_pipeline(image_sizes={"trained": [[8, 8], [4, 16]], "fit": "crop"})
    painter = Painter(pipeline, "sha256 0", PartialState(cpu=True), batch_size=3)
    emoji = Image.fromarray(render_emoji("1F34E", 32))
    shapes, expected = [(16, 16), (64, 16), (8, 8), (40, 12), (9, 9)], [(8, 8), (16, 4), (8, 8), (16, 4), (8, 8)]
    prompts = []
    for number, shape in enumerate(shapes):
        emoji.resize(shape).save(tmp_path / f"{number}.png")
        prompts.append(Prompt(f"{number:05d}.png", "a sun", number, tmp_path / f"{number}.png", str(number)))
    painter.paint(prompts, settings(painter), tmp_path / "painted")
    painter.reconstruct(prompts, None, tmp_path / "reconstructed")
    for folder in ("painted", "reconstructed"):
        assert [Image.open(tmp_path / folder / prompt.file_name).size for prompt in prompts] == expected
    wide = pipeline("a sun", 2, 2.0, height=4, width=16, generator=torch.Generator().manual_seed(3)).images[0]
    painted = Image.open(tmp_path / "painted" / prompts[3].file_name)
    assert np.abs(np.asarray(painted).astype(int) - np.asarray(wide)).max() <= 1
    painter.paint(prompts, settings(painter), tmp_path / "square", 8)
    painter.reconstruct(prompts, 8, tmp_path / "square-reconstructed")
    for folder in ("square", "square-reconstructed"):
        assert {Image.open(path).size for path in (tmp_path / folder).glob("*.png")} == {(8, 8)}
    # The square that references are cut to, too: whole pixels, where training cuts at fractions.
    pixels = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "uneven.png")
    seen: list[torch.Tensor] = []
    name = "transfusion_mot.sampling.painting.reconstruct_pixels"
    monkeypatch.setattr(name, lambda codec, pixels: seen.append(pixels) or pixels)
    painter.reconstruct([Prompt("0.png", "", 0, tmp_path / "uneven.png")], 8, tmp_path / "uneven")
    np.testing.assert_array_equal(np.asarray(to_pil(seen[0])[0]), load_rgb(tmp_path / "uneven.png", 8))
    with pytest.raises(UserError, match=r"other settings: image_size \(8 there, None now\)"):
        painter.paint(prompts, settings(painter), tmp_path / "square")
