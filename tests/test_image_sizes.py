"""A model with several image sizes: what it paints and reads, and how pictures are resized."""

import json
import logging
import sys
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_pipeline import seeds, tiny_pipeline
from test_sampling import ARCHITECTURES, CPU, LATENT_CHANNELS, predict_uncached, tiny_model, tiny_tokenizer

import sample
from transfusion_mot.config import DataConfig, SourceConfig
from transfusion_mot.data.images import to_pixels
from transfusion_mot.data.sources.open import open_source
from transfusion_mot.demo.page import build_page
from transfusion_mot.demo.paint import PaintTab
from transfusion_mot.demo.shared import gr
from transfusion_mot.errors import UserError
from transfusion_mot.pipeline import TransfusionPipeline
from transfusion_mot.sampling.guidance import Guidance
from transfusion_mot.sampling.sampler import Making, OpenDocument, Sampler
from transfusion_mot.sampling.sizes import ImageSizes, by_size
from transfusion_mot.sampling.workspace import Workspace

# (height, width); whole patches are multiples of 4 pixels.
SIZES = [(4, 16), (8, 8), (16, 4)]


@pytest.fixture(scope="module")
def pipeline() -> TransfusionPipeline:
    return pipeline_of("crop")


def pipeline_of(fit: str) -> TransfusionPipeline:
    return tiny_pipeline(image_sizes={"trained": [list(size) for size in SIZES], "fit": fit})


def noise_picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(256, size=(height, width, 3), dtype=np.uint8))


def size_of(image: Image.Image) -> tuple[int, int]:
    return image.height, image.width


def test_a_snapshot_knows_the_sizes_of_training_and_an_old_one_its_single_one(pipeline, tmp_path) -> None:
    pipeline_of("pad").save_pretrained(tmp_path)
    loaded = TransfusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert (loaded.sizes.trained, loaded.sizes.fit) == (SIZES, "pad")
    for size in SIZES:
        settings = {"height": size[0], "width": size[1], "generator": seeds(1)}
        (image,) = loaded("sun", **settings).images
        assert size_of(image) == size
    assert size_of(loaded("sun").images[0]) == (8, 8)

    index = json.loads((tmp_path / "model_index.json").read_text())
    del index["image_sizes"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    old = TransfusionPipeline.from_pretrained(tmp_path)
    old.set_progress_bar_config(disable=True)
    assert (old.sizes.trained, old.sizes.fit) == ([(8, 8)], "crop")
    old, new = (p("sun", generator=seeds(1), output_type="latent").images for p in (old, tiny_pipeline()))
    assert torch.equal(old, new)


@pytest.mark.parametrize("size", [(2, 8), (8, 2), (4, 6)])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_an_oblong_image_is_predicted_as_in_the_whole_document(architecture, size) -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer.vocab_size, **ARCHITECTURES[architecture])
    prompts = ["an octopus", ""]

    def denoise(predict, rows):
        for timestep in (0.9, 0.3):
            latents = torch.randn(2, LATENT_CHANNELS, *size, dtype=torch.float64)
            cached = predict(latents, torch.tensor(timestep))
            for row, prompt in enumerate(prompts):
                context = [[tokenizer.bos_id, *tokenizer.encode(prompt)]]
                expected = predict_uncached(model, tokenizer, context, latents[row], timestep)
                torch.testing.assert_close(cached[row], expected, rtol=0, atol=1e-12)
        return latents

    documents = [OpenDocument([prompt]) for prompt in prompts]
    making = {"image": Making(1, size[0] * size[1] // 4, denoise)}
    settings = {"target": "image", "device": CPU, "making": making, "guidance": Guidance()}
    Sampler(model, tokenizer, Workspace(), documents, **settings).run()


def test_other_sizes_are_painted_with_a_warning_and_patches_stay_whole(caplog) -> None:
    pipeline = pipeline_of("crop")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert size_of(pipeline("sun", height=12, width=20).images[0]) == (12, 20)
        # The other side is that of the default.
        assert size_of(pipeline("sun", width=16).images[0]) == (8, 16)
        pipeline("sun", height=16, width=4)
    assert [record.getMessage().split(" and ")[1] for record in caplog.records] == [
        "paints 12 x 20, which may be worse",
        "paints 8 x 16, which may be worse",
    ]
    for sides in ({"height": 10}, {"width": 10}, {"height": 0}, {"width": -4}, {"height": 8.0}):
        ((name, side),) = sides.items()
        with pytest.raises(UserError, match=f"{name} is {side}; it must be a multiple of 4 pixels, a patch's side"):
            pipeline("sun", **sides)
    with pytest.raises(UserError, match=r"latents have the shape \[1, 3, 4, 4\]; they must have \[1, 3, 2, 8\]"):
        pipeline("sun", height=4, width=16, latents=torch.zeros(1, 3, 4, 4))


@pytest.mark.parametrize("fit", ["crop", "stretch", "pad"])
def test_pictures_are_read_as_training_reads_them(fit, tmp_path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    shapes = [(40, 10), (10, 40), (20, 20), (21, 30), (30, 21), (8, 8), (16, 4)]
    lines = []
    for number, (width, height) in enumerate(shapes):
        noise_picture(width, height, number).save(folder / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": f"number {number}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    buckets = [list(size) for size in SIZES]
    data = DataConfig(buckets=buckets, image_fit=fit, held_out_fraction=0.0, cache_dir=str(tmp_path / "cache"))
    trained = open_source(SourceConfig("imagefolder", path=str(folder)), data, "train")
    sizes = ImageSizes(4, data.image_sizes, fit)
    assert len(set(trained.buckets.tolist())) == 3
    for index in range(len(trained)):
        number = trained.captions(index)[0].removeprefix("number ")
        np.testing.assert_array_equal(sizes.read(folder / f"{number}.png"), trained.image(index))
        np.testing.assert_array_equal(sizes.read(Image.open(folder / f"{number}.png")), trained.image(index))
        # What is read once stays as it is.
        np.testing.assert_array_equal(sizes.read(Image.fromarray(trained.image(index))), trained.image(index))


def test_pictures_of_all_sizes_are_captioned_together(pipeline) -> None:
    pictures = [noise_picture(*shape, seed=9) for shape in ((40, 10), (20, 20), (10, 40), (12, 12), (64, 16))]
    alone = [pipeline.caption(picture, max_new_tokens=12)[0] for picture in pictures]
    assert len(set(alone)) == len(alone)
    assert pipeline.caption(pictures, max_new_tokens=12) == alone
    (media,) = pipeline._encode(pictures[:1])
    pixels = to_pixels(pipeline.sizes.read(pictures[0]))
    assert pixels.shape == (3, 4, 16)
    torch.testing.assert_close(media.content, pipeline.codec.encode(pixels[None])[0][0])


def test_variations_have_the_size_that_training_gives_the_picture(pipeline) -> None:
    wide, tall = noise_picture(40, 10), noise_picture(10, 40)
    kept = np.zeros((10, 40), dtype=np.uint8)
    kept[:, 20:] = 255
    settings = {"mask_image": Image.fromarray(kept), "generator": seeds(1)}
    (painted,) = pipeline("sun", image=wide, **settings).images
    assert size_of(painted) == (4, 16)
    before, after = pipeline.sizes.read(wide), np.asarray(painted)
    assert np.array_equal(before[:, :8], after[:, :8])
    assert not np.array_equal(before[:, 8:], after[:, 8:])
    (square,) = pipeline("sun", image=wide, height=8, width=8, **settings).images
    assert np.array_equal(pipeline.sizes.read(wide, (8, 8))[:, :4], np.asarray(square)[:, :4])
    with pytest.raises(UserError, match=r"different sizes \(height 4, width 16; height 16, width 4\); give height and"):
        pipeline(["sun", "moon"], image=[wide, tall])
    both = pipeline(["sun", "moon"], image=[wide, tall], height=8, width=8).images
    assert [size_of(image) for image in both] == [(8, 8), (8, 8)]


def test_what_is_added_beside_a_picture_is_not_repainted() -> None:
    pipeline = tiny_pipeline(image_sizes={"trained": [[8, 8]], "fit": "pad"})
    picture = noise_picture(16, 8)
    (painted,) = pipeline("sun", image=picture, mask_image=Image.new("L", (16, 8), 255), strength=1.0).images
    painted = np.asarray(painted)
    assert (painted[:2] == 255).all()
    assert (painted[-2:] == 255).all()
    assert not (painted[2:-2] == 255).all()


def test_images_of_a_document_have_the_size_of_the_first(pipeline, monkeypatch) -> None:
    encoded = []
    encode = pipeline._encode
    monkeypatch.setattr(pipeline, "_encode", lambda *arguments: encoded.append(encode(*arguments)) or encoded[-1])
    settings = {"max_new_tokens": 4, "num_inference_steps": 1}
    pipeline.interleave([noise_picture(40, 10), "sun", noise_picture(10, 40)], **settings)
    pipeline.interleave(["sun", noise_picture(10, 40)], **settings)
    pipeline.interleave(["sun", noise_picture(10, 40)], height=8, width=8, **settings)
    assert [tuple(media[0].content.shape) for media in encoded] == [(3, 2, 8), (3, 2, 8), (3, 8, 2), (3, 4, 4)]


def test_results_by_size_stand_in_the_order_of_the_items() -> None:
    calls = []

    def make(places, size):
        calls.append((places, size))
        return [f"{place} at {size[0]}" for place in places]

    assert by_size([(1, 1), (2, 1), (1, 1)], make) == ["0 at 1", "1 at 2", "2 at 1"]
    assert calls == [([0, 2], (1, 1)), ([1], (2, 1))]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"trained": [[8, 10]], "fit": "crop"}, "image_size is 10; it must be a multiple of 4"),
        ({"trained": [[8, 8]], "fit": "squeeze"}, "image_fit is 'squeeze'; known: crop, stretch, pad"),
    ],
)
def test_sizes_that_cannot_be_are_refused(arguments, message) -> None:
    with pytest.raises(UserError, match=message):
        tiny_pipeline(image_sizes=arguments)


def test_the_command_paints_and_captions_at_the_sizes_of_the_model(tmp_path, monkeypatch, capsys) -> None:
    pipeline_of("stretch").save_pretrained(tmp_path / "snapshot")
    pipeline = TransfusionPipeline.from_pretrained(tmp_path / "snapshot")
    pipeline.set_progress_bar_config(disable=True)
    noise_picture(40, 10).save(tmp_path / "wide.png")

    def command(*words: object) -> None:
        given = ["sample.py", "--checkpoint", tmp_path / "snapshot", "--device", "cpu", *words]
        monkeypatch.setattr(sys, "argv", [str(word) for word in given])
        sample.main()

    def painted(folder: str) -> dict[str, Any]:
        (line,) = (json.loads(line) for line in (tmp_path / folder / "metadata.jsonl").read_text().splitlines())
        with Image.open(tmp_path / folder / line["file_name"]) as image:
            return line | {"size": size_of(image), "pixels": np.asarray(image).astype(int)}

    command("sun", "--height", 4, "--width", 16, "--output", tmp_path / "wide")
    found = painted("wide")
    assert (found["size"], found["height"], found["width"]) == ((4, 16), 4, 16)
    again = pipeline("sun", height=4, width=16, generator=seeds(found["image_seed"])).images[0]
    assert np.abs(np.asarray(again) - found["pixels"]).max() <= 1
    command("sun", "--image", tmp_path / "wide.png", "--output", tmp_path / "varied")
    assert painted("varied")["size"] == (4, 16)
    assert "height" not in painted("varied")
    capsys.readouterr()
    command("--caption", tmp_path / "wide.png", "--max-new-tokens", 6)
    assert capsys.readouterr().out.endswith(
        f"wide.png: {pipeline.caption(Image.open(tmp_path / 'wide.png'), max_new_tokens=6)[0]}\n"
    )
    with pytest.raises(UserError, match="height is 9; it must be a multiple of 4"):
        command("sun", "--height", 9, "--output", tmp_path / "refused")
    with pytest.raises(UserError, match="--height and --width go with --task image, edit or auto, not with text"):
        command("sun", "--task", "text", "--width", 0)
    assert not (tmp_path / "refused").exists()


def test_the_page_offers_the_sizes_of_training(pipeline) -> None:
    if gr is None:
        pytest.skip("the page needs gradio: pip install 'transfusion-mot[demo]'")
    sides = {
        block.label: block
        for block in build_page(pipeline).blocks.values()
        if getattr(block, "label", "") in ("Height", "Width")
    }
    assert [sides[name].value for name in ("Height", "Width")] == [8, 8]
    drawing = [2, "FlowMatchEulerDiscreteScheduler"]
    tab = PaintTab(pipeline)
    *_, (paths, _, history, *_) = tab.paint([], "sun", "", 1, 1, 4, 16, 1.0, 0.0, *drawing)
    with Image.open(paths[0]) as image:
        assert (image.height, image.width) == (4, 16)
    assert history[0].settings[4:6] == (4, 16)
