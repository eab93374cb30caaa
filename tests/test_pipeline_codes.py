"""A pipeline whose pictures are codes, and one with more modalities than text and pictures."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import VQModel
from PIL import Image
from safetensors.torch import load_file
from test_pipeline import IMAGE_SIZE, seeds, tiny_pipeline, tiny_vae
from test_sampling import FixedLogits, tiny_model

from transfusion_mot.codecs.image_codes import ImageCodes
from transfusion_mot.config import TEXT, ModalityConfig, TowerConfig
from transfusion_mot.data.images import load_image, to_pixels
from transfusion_mot.data.layout import Media
from transfusion_mot.data.tokenizer import train_tokenizer
from transfusion_mot.errors import UserError
from transfusion_mot.pipeline import TransfusionPipeline
from transfusion_mot.sampling.export import export

CODEBOOK = 19
CODES = {"modalities": {"text": ModalityConfig("text"), "image": ModalityConfig("image")}}
SIDE = IMAGE_SIZE // 2


def tiny_vq(codebook: int = CODEBOOK) -> VQModel:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return VQModel(
        **blocks, block_out_channels=(8, 8), latent_channels=3, num_vq_embeddings=codebook, norm_num_groups=4
    )


def codes_pipeline(**replaced: object) -> TransfusionPipeline:
    vocab_size = tiny_pipeline().text_tokenizer.vocab_size
    model = tiny_model(vocab_size, {"image": CODEBOOK + 2}, **CODES).float()
    return tiny_pipeline(**{"transformer": model, "vae": tiny_vq().eval(), **replaced})


@pytest.fixture(scope="module")
def pipeline() -> TransfusionPipeline:
    return codes_pipeline()


@pytest.fixture(scope="module")
def saved(pipeline, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("snapshots") / "step-0000001"
    pipeline.save_pretrained(folder)
    return folder


def test_a_snapshot_of_codes_paints_the_same_pictures(pipeline, saved) -> None:
    index = json.loads((saved / "model_index.json").read_text())
    assert index["vae"] == ["diffusers", "VQModel"]
    loaded = TransfusionPipeline.from_pretrained(saved)
    before, after = (p(["sun", ""], generator=seeds(1, 2)).images for p in (pipeline, loaded))
    assert [np.array_equal(one, two) for one, two in zip(before, after, strict=True)] == [True, True]
    assert before[0].size == (IMAGE_SIZE, IMAGE_SIZE)
    assert np.asarray(before[0]).std() > 1


def test_pictures_are_what_the_codec_makes_of_the_codes(pipeline) -> None:
    codes, pixels = (pipeline("sun", generator=seeds(1), output_type=kind).images for kind in ("latent", "pt"))
    assert codes.shape == (1, SIDE, SIDE)
    assert codes.dtype == torch.long
    torch.testing.assert_close(pixels, ImageCodes(pipeline.vae).decode(codes) / 2 + 0.5)


def test_the_same_seed_gives_the_same_codes_whatever_the_batch_size(pipeline) -> None:
    prompts = ["sun", "an octopus", "a red apple", "", "sun"]
    settings = {"output_type": "latent", "code_top_p": 0.95}
    together = pipeline(prompts, generator=seeds(1, 2, 3, 4, 5), **settings).images
    for number, prompt in enumerate(prompts):
        alone = pipeline(prompt, generator=seeds(number + 1), **settings).images
        assert torch.equal(together[number : number + 1], alone)
    assert not torch.equal(together[0], together[4])


def test_guidance_of_codes(pipeline) -> None:
    def codes(prompt: str, **settings: object) -> torch.Tensor:
        return pipeline(prompt, generator=seeds(1), output_type="latent", **settings).images

    # No guidance of a prompt is that prompt, and guidance 0 is no prompt, or the negative one.
    assert torch.equal(codes("sun", guidance_scale=0.0), codes("", guidance_scale=1.0))
    plain = codes("an octopus", guidance_scale=1.0)
    assert torch.equal(codes("sun", guidance_scale=0.0, negative_prompt="an octopus"), plain)
    assert not torch.equal(codes("sun", guidance_scale=6.0), codes("sun", guidance_scale=1.0))
    # The most probable code alone is what temperature 0 takes.
    assert torch.equal(codes("sun", code_top_k=1), codes("sun", code_temperature=0.0))
    assert torch.equal(codes("sun", code_temperature=0.0), codes("sun", code_temperature=0.0, num_inference_steps=9))


def test_captions_are_read_off_the_codes_of_a_picture(pipeline) -> None:
    gradient = np.linspace(0, 255, 24 * 16 * 3).reshape(24, 16, 3).astype(np.uint8)
    pictures = [Image.fromarray(gradient), Image.fromarray(255 - gradient)]
    pixels = to_pixels(np.stack([load_image(picture, IMAGE_SIZE) for picture in pictures]))
    expected = ImageCodes(pipeline.vae).encode(pixels).flatten(1).tolist()
    assert [media.content for media in pipeline._encode(pictures)] == [
        [CODEBOOK, *codes, CODEBOOK + 1] for codes in expected
    ]
    first, second = pipeline.caption(pictures)
    assert first != second
    assert pipeline.generate([[picture] for picture in pictures], TEXT) == [first, second]


def test_a_document_goes_on_with_text_and_pictures() -> None:
    painter = codes_pipeline()
    logits = torch.zeros(painter.text_tokenizer.vocab_size)
    logits[painter.text_tokenizer.begin_ids["image"]] = 10.0
    logits[painter.text_tokenizer.encode("x")[0]] = 5.0
    painter.transformer.modalities[TEXT].head = FixedLogits(logits)
    picture = Image.new("RGB", (20, 10), "red")
    for document in ([], ["sun"], [picture, "sun"]):
        image, again, text = painter.interleave(
            document, max_images=2, max_new_tokens=5, generator=torch.Generator().manual_seed(1)
        )
        assert image.size == again.size == (IMAGE_SIZE, IMAGE_SIZE)
        assert not np.array_equal(image, again)
        assert text == "xxx"


def test_a_tokenizer_of_images_computes_in_float32(saved) -> None:
    half = TransfusionPipeline.from_pretrained(saved, torch_dtype=torch.bfloat16)
    assert half.transformer.dtype == torch.bfloat16
    picture = Image.fromarray(np.linspace(0, 255, 8 * 8 * 3).reshape(8, 8, 3).astype(np.uint8))
    assert len(half.caption(picture, max_new_tokens=4)) == 1
    assert half("sun", generator=seeds(1)).images[0].size == (IMAGE_SIZE, IMAGE_SIZE)
    assert half.vae.dtype == torch.float32


def test_an_exported_snapshot_keeps_its_codes(saved, tmp_path) -> None:
    export(str(saved), tmp_path / "out", licences=None, evaluation=None, max_megabytes=None)
    dtypes = {
        part: {weight.dtype for weight in load_file(next((tmp_path / "out" / part).glob("*.safetensors"))).values()}
        for part in ("transformer", "vae")
    }
    assert dtypes == {"transformer": {torch.bfloat16}, "vae": {torch.float32}}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image": Image.new("RGB", (8, 8))}, "image is given, but this model writes its pictures as codes"),
        ({"latents": torch.zeros(1, 3, 4, 4)}, "latents is given"),
        ({"guidance_interval": (0.2, 0.8)}, "guidance_interval is given"),
        ({"callback_on_step_end": lambda *_: {}}, "callback_on_step_end is given"),
        ({"code_temperature": -1.0}, "temperature is -1.0"),
        ({"height": 9}, "height is 9; it must be a multiple of 2"),
    ],
)
def test_what_codes_cannot_do_is_refused(pipeline, arguments, message) -> None:
    with pytest.raises(UserError, match=message):
        pipeline("sun", **arguments)


def test_a_codec_that_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match="the vae has 12 codes, but the transformer was trained on 19"):
        codes_pipeline(vae=tiny_vq(12))
    with pytest.raises(UserError, match="the vae is a AutoencoderKL, but pictures with the objective next_token need"):
        codes_pipeline(vae=tiny_vae())
    with pytest.raises(UserError, match="the vae is a VQModel, but pictures with the objective diffusion need Auto"):
        tiny_pipeline(vae=tiny_vq())


# --- More modalities. ---


SIZES = {"image": 3, "speech": 7, "motion": 2}


@pytest.fixture(scope="module")
def rich() -> TransfusionPipeline:
    """Pictures are latents; there are speech as codes and motion as latents, too."""
    tokenizer = train_tokenizer(["a red apple", "an octopus", "sun"], 290, (TEXT, *SIZES))
    towers = {name: TowerConfig(32, 48) for name in ("text", "image", "speech")}
    modalities = {
        "text": ModalityConfig("text"),
        "image": ModalityConfig("image", "diffusion"),
        "speech": ModalityConfig("speech"),
        "motion": ModalityConfig("image", "diffusion", patch_size=1),
    }
    model = tiny_model(tokenizer.vocab_size, SIZES, towers=towers, modalities=modalities).float()
    return tiny_pipeline(transformer=model, tokenizer=tokenizer.hf, image_modality="image")


def test_every_modality_is_generated(rich, tmp_path) -> None:
    rich.save_pretrained(tmp_path)
    loaded = TransfusionPipeline.from_pretrained(tmp_path)
    assert loaded.image_modality == "image"
    documents = [["sun"], [Image.new("RGB", (9, 9)), Media("speech", [5, 1, 2, 6])], []]
    for target, settings in {
        "text": {"max_new_tokens": 4},
        "image": {"num_inference_steps": 2},
        "speech": {"max_new_tokens": 6},
        "motion": {"height": 3, "width": 2, "num_inference_steps": 2},
    }.items():
        made, again = (p.generate(documents, target, generator=seeds(1, 2, 3), **settings) for p in (rich, loaded))
        assert len(made) == 3
        for one, other in zip(made, again, strict=True):
            match target:
                case "text":
                    assert isinstance(one, str)
                case "image":
                    assert one.size == (IMAGE_SIZE, IMAGE_SIZE)
                case "speech":
                    assert len(one) <= 6
                    assert set(one) <= set(range(5))
                case "motion":
                    assert one.shape == (2, 3, 2)
                    # Loaded weights can have another alignment in memory; on some processors this changes a last digit.
                    torch.testing.assert_close(one, other)
                    continue
            assert one == other
    painted = rich.generate([["sun"]], "image", generator=seeds(1))[0]
    assert np.array_equal(painted, rich("sun", generator=seeds(1)).images[0])


def test_what_cannot_be_generated_is_named(rich) -> None:
    with pytest.raises(UserError, match="target is 'video'; the model has text, "):
        rich.generate([["sun"]], "video")
    with pytest.raises(UserError, match="there is no document"):
        rich.generate([], "speech")
    with pytest.raises(UserError, match="height and width are None and 2; for 'motion' they count latents"):
        rich.generate([["sun"]], "motion", width=2)


def test_which_modality_the_pictures_are_must_be_known(rich) -> None:
    with pytest.raises(UserError, match=r"image_modality is None; it must be a modality of .*: image, motion, speech"):
        TransfusionPipeline(**rich.components, image_size=IMAGE_SIZE)
    with pytest.raises(UserError, match="image_modality is text"):
        TransfusionPipeline(**rich.components, image_size=IMAGE_SIZE, image_modality="text")


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ("sun", r"a document must be a list of texts, pictures and media, got 'sun'"),
        (["sun", 3], r"made of texts, PIL images, Audio and Media of image or motion or speech, got int"),
        ([Media("smell", [1])], r"got media of 'smell'"),
        ([Media("text", [1])], r"got media of 'text'"),
        ([Media("speech", [1, 2])], r"Media of 'speech' need a list \[5, codes below that, 6\]"),
        ([Media("speech", [5, 7, 6])], r"Media of 'speech' need a list"),
        ([Media("motion", torch.zeros(3, 2, 2))], r"Media of 'motion' need latents \[2, Y, X\], .* got \[3, 2, 2\]"),
        ([Media("motion", [5, 1, 6])], r"Media of 'motion' need latents \[2, Y, X\], .* got list"),
    ],
)
def test_documents_that_cannot_be_read_are_refused(rich, document, words) -> None:
    with pytest.raises(UserError, match=words):
        rich.generate([document], "text")


def test_a_model_whose_codec_has_no_decoder_reads_pictures_and_paints_none(pipeline, monkeypatch) -> None:
    monkeypatch.setattr(ImageCodes, "has_decoder", False)
    message = "VQModel has no decoder, so this model reads pictures but cannot paint them"
    for paint in (
        lambda: pipeline("sun"),
        lambda: pipeline.generate([["sun"]], "image"),
        lambda: pipeline.interleave(["sun"]),
    ):
        with pytest.raises(UserError, match=message):
            paint()
    assert isinstance(pipeline.caption(Image.new("RGB", (8, 8)), max_new_tokens=2)[0], str)
    assert pipeline("sun", output_type="latent").images.shape == (1, SIDE, SIDE)
    assert isinstance(pipeline.interleave(["sun"], max_images=0, max_new_tokens=2), list)


def test_what_a_codec_cannot_is_said(pipeline) -> None:
    with pytest.raises(UserError, match="VQModel has no enable_tiling; leave it out"):
        pipeline.enable_vae_tiling()
