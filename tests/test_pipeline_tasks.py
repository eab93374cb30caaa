"""What a pipeline does beyond painting a prompt: guidance, previews, documents of text and images."""

import pytest
import torch
from PIL import Image
from test_pipeline import IMAGE_SIZE, seeds, tiny_pipeline
from test_sampling import FixedLogits

from transfusion_mot.pipeline import TransfusionPipeline
from transfusion_mot.sampling import pictures as pictures_module


@pytest.fixture(scope="module")
def pipeline() -> TransfusionPipeline:
    return tiny_pipeline()


def latents(pipeline: TransfusionPipeline, prompt: str | list[str], **settings: object) -> torch.Tensor:
    count = 1 if isinstance(prompt, str) else len(prompt)
    return pipeline(prompt, generator=seeds(*range(count)), output_type="latent", **settings).images


def test_guidance_leads_away_from_the_negative_prompt(pipeline) -> None:
    plain = latents(pipeline, "sun", guidance_scale=1.0)
    # Away from itself is nowhere, and all the way to the other prompt is that prompt.
    torch.testing.assert_close(latents(pipeline, "sun", guidance_scale=5.0, negative_prompt="sun"), plain)
    toward = latents(pipeline, "sun", guidance_scale=0.0, negative_prompt="an octopus")
    torch.testing.assert_close(toward, latents(pipeline, "an octopus", guidance_scale=1.0))
    both = latents(pipeline, ["sun", "a red apple"], negative_prompt=["an octopus", ""])
    first = latents(pipeline, "sun", negative_prompt="an octopus")
    torch.testing.assert_close(both[:1], first, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(first, latents(pipeline, "sun"), atol=1e-2)


def test_outside_of_its_interval_there_is_no_guidance(pipeline) -> None:
    rows = []
    handle = pipeline.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len(kwargs["rope_positions"])), with_kwargs=True
    )
    nowhere = latents(pipeline, "sun", guidance_scale=5.0, guidance_interval=(0.0, 0.0))
    handle.remove()
    assert rows == [2, 1, 1, 1, 1]
    torch.testing.assert_close(nowhere, latents(pipeline, "sun", guidance_scale=1.0))
    somewhere = latents(pipeline, "sun", guidance_scale=5.0, guidance_interval=(0.3, 0.9))
    assert not torch.allclose(somewhere, nowhere, atol=1e-2)
    assert not torch.allclose(somewhere, latents(pipeline, "sun", guidance_scale=5.0), atol=1e-2)


def test_rescaled_and_renormed_guidance_is_tamer(pipeline) -> None:
    plain, rescaled, renormed = (
        latents(pipeline, "sun", guidance_scale=30.0, **settings).norm()
        for settings in ({}, {"guidance_rescale": 1.0}, {"guidance_renorm": True})
    )
    assert rescaled < plain / 2
    assert renormed < plain / 2


def test_a_callback_sees_what_the_model_expects(pipeline) -> None:
    expected = []

    def record(pipe, step, timestep, tensors):
        expected.append(tensors["clean"])
        assert pipe.decode_latents(tensors["clean"])[0].size == (IMAGE_SIZE, IMAGE_SIZE)

    final = latents(pipeline, ["sun", "an octopus"], callback_on_step_end=record)
    assert len(expected) == 4
    # From the last noise, the solver goes straight there.
    torch.testing.assert_close(expected[-1], final, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(expected[0], final, atol=1e-2)


def test_images_are_decoded_some_at_a_time(pipeline, monkeypatch) -> None:
    prompts = ["sun", "an octopus", "a red apple"]
    together = pipeline(prompts, generator=seeds(1, 2, 3), output_type="pt").images
    batches = []
    decode = pipeline.vae._decode
    monkeypatch.setattr(pipeline.vae, "_decode", lambda z, **rest: batches.append(len(z)) or decode(z, **rest))
    monkeypatch.setattr(pictures_module, "_PIXELS_AT_ONCE", 2 * IMAGE_SIZE**2)
    torch.testing.assert_close(pipeline(prompts, generator=seeds(1, 2, 3), output_type="pt").images, together)
    assert batches == [2, 1]
    batches.clear()
    pipeline.enable_vae_slicing()
    torch.testing.assert_close(pipeline(prompts, generator=seeds(1, 2, 3), output_type="pt").images, together)
    assert batches == [1, 1, 1]
    pipeline.disable_vae_slicing()
    pipeline.enable_vae_tiling()
    assert pipeline.vae.use_tiling
    pipeline.disable_vae_tiling()


def test_no_memory_is_kept_where_it_is_not_wanted(pipeline) -> None:
    pipeline("sun")
    cache = pipeline.workspace.cache(pipeline.transformer, 2, 1, torch.device("cpu"))
    pipeline("an octopus")
    assert pipeline.workspace.cache(pipeline.transformer, 2, 1, torch.device("cpu")) is cache
    pipeline.workspace.release()
    assert pipeline.workspace.cache(pipeline.transformer, 2, 1, torch.device("cpu")) is not cache


@pytest.fixture(scope="module")
def painter() -> TransfusionPipeline:
    """It would rather begin an image than write an x, and an x than end."""
    pipeline = tiny_pipeline()
    logits = torch.zeros(pipeline.text_tokenizer.vocab_size)
    logits[pipeline.text_tokenizer.begin_ids["image"]] = 10.0
    logits[pipeline.text_tokenizer.encode("x")[0]] = 5.0
    pipeline.transformer.modalities["text"].head = FixedLogits(logits)
    return pipeline


def shown(items: list[str | Image.Image]) -> list[str]:
    return [item if isinstance(item, str) else f"image of {item.size}" for item in items]


def test_a_document_goes_on_with_text_and_images(painter) -> None:
    picture = Image.new("RGB", (20, 10), "red")
    image = f"image of {(IMAGE_SIZE, IMAGE_SIZE)}"
    for document in ([], ["sun"], [picture, "sun"], ["a red apple", picture, picture]):
        settings = {"max_new_tokens": 5, "num_inference_steps": 2}
        assert shown(painter.interleave(document, max_images=0, **settings)) == ["xxxxx"]
        assert shown(painter.interleave(document, max_images=1, **settings)) == [image, "xxxx"]
        assert shown(painter.interleave(document, max_images=2, **settings)) == [image, image, "xxx"]
        # The images take the last token.
        assert shown(painter.interleave(document, max_images=9, **settings)) == [image] * 5


def test_an_image_of_a_document_depends_on_what_is_before_it(painter) -> None:
    def painted(colour: str = "red", text: str = "sun", seed: int = 3, **settings: float) -> bytes:
        document = [Image.new("RGB", (8, 8), colour), text]
        result = painter.interleave(
            document, generator=torch.Generator().manual_seed(seed), **{"guidance_scale": 1.0, **settings}
        )
        return result[0].tobytes()

    plain = painted()
    assert painted() == plain
    others = [
        painted(colour="blue"),
        painted(text="an octopus"),
        painted(seed=4),
        painted(guidance_scale=3.0),
    ]
    assert len({plain, *others}) == 5
