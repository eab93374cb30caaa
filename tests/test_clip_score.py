"""CLIP score on a CLIP of random weights, against the model's own forward pass and torchmetrics."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import PartialState
from PIL import Image
from process_group import run_processes
from safetensors.torch import load_file, save_file
from tiny_clip import save_tiny_clip
from torchmetrics.functional.multimodal import clip_score as torchmetrics_clip_score
from torchvision.transforms.functional import InterpolationMode, normalize, resize, to_tensor
from torchvision.transforms.functional import pad as torch_pad
from transformers import BertConfig, CLIPModel, CLIPProcessor

from transfusion_mot.data.emoji import emoji_captions, render_emoji
from transfusion_mot.errors import UserError
from transfusion_mot.evaluation.clip_score import (
    caption_clip_scores,
    clip_embeddings,
    clip_scores,
    load_clip,
    preference_score,
    retrieved,
    suffixes,
)
from transfusion_mot.evaluation.report.comparison import difference

CPU = torch.device("cpu")


def clip_cosines(*arguments, **options):
    return clip_embeddings(*arguments, **options).cosines()


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory):
    return save_tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def clip(tiny_clip):
    return load_clip(str(tiny_clip), CPU)


@pytest.fixture(scope="module")
def pairs():
    stems = list(emoji_captions())[::250][:15]
    images = [Image.fromarray(render_emoji(stem, 40 + index)) for index, stem in enumerate(stems)]
    return images, [emoji_captions()[stem][:12] for stem in stems]


def test_cosines_equal_the_models_forward_pass(tiny_clip, clip, pairs):
    images, texts = pairs
    model, processor = CLIPModel.from_pretrained(tiny_clip).eval(), CLIPProcessor.from_pretrained(tiny_clip)
    with torch.inference_mode():
        inputs = processor(text=texts, images=images, padding=True, return_tensors="pt")
        logits = model(**inputs).logits_per_image.diagonal() / model.logit_scale.exp()
    cosines = clip_cosines(images, texts, clip)
    np.testing.assert_allclose(cosines, logits.numpy(), atol=1e-6)
    assert cosines.std() > 0.01


def test_scores_on_three_scales(clip, pairs):
    images, texts = pairs
    cosines = clip_cosines(images, texts, clip)
    raw, percent, hessel, _ = clip_scores(images, texts, clip)
    assert cosines.min() < 0 < cosines.max()
    assert raw.value == pytest.approx(cosines.mean())
    assert percent.value == pytest.approx(100 * cosines.mean())
    assert hessel.value == pytest.approx(2.5 * np.maximum(cosines, 0).mean())
    assert raw.protocol["images"] == 15
    assert raw.protocol["weights"].startswith("sha256 ")
    assert raw.scores == pytest.approx(cosines)
    assert raw.interval[0] < raw.value < raw.interval[1]


def test_a_prefix_is_part_of_the_text(clip, pairs):
    images, texts = pairs
    written = clip_cosines(images, [f"A photo depicts {text}" for text in texts], clip)
    np.testing.assert_allclose(clip_cosines(images, texts, clip, prefix="A photo depicts "), written, atol=1e-6)
    score = clip_scores(images, texts, clip, prefix="A photo depicts ")[0]
    assert score.protocol["text prefix"] == "A photo depicts "
    assert score.value == pytest.approx(written.mean())


def test_retrieval_among_the_texts(tiny_clip, clip, pairs):
    images, texts = pairs
    # Two images of one text: either is right with it.
    texts = [*texts[:-1], texts[0]]
    model, processor = CLIPModel.from_pretrained(tiny_clip).eval(), CLIPProcessor.from_pretrained(tiny_clip)
    with torch.inference_mode():
        logits = model(**processor(text=texts, images=images, padding=True, return_tensors="pt")).logits_per_image
    expected = [texts[best] == text for best, text in zip(logits.argmax(1).tolist(), texts, strict=True)]
    embeddings = clip_embeddings(images, texts, clip)
    assert retrieved(embeddings, texts).tolist() == expected
    score = clip_scores(images, texts, clip)[-1]
    assert score.value == pytest.approx(np.mean(expected))
    assert score.protocol["among texts"] == 14
    # The rate depends on the texts, whatever their order.
    backwards = clip_scores(images[::-1], texts[::-1], clip)[-1]
    assert difference(score, backwards).verdict == "within noise"
    others = clip_scores(images, [*texts[:-1], "another text"], clip)[-1]
    assert (
        difference(score, replace(others, protocol=others.protocol | {"among texts": 14})).verdict == "not comparable"
    )
    # An embedding of its own text for every image is always right.
    own = type(embeddings)(embeddings.texts, embeddings.texts)
    assert retrieved(own, texts).all()


@pytest.mark.slow
def test_two_processes_give_the_scores_of_one(tiny_clip, clip, pairs, tmp_path):
    images, texts = pairs
    alone = np.array([metric.scores for metric in clip_scores(images, texts, clip)])
    for values in run_processes(_scores, 2, {}, tmp_path, str(tiny_clip), images, texts):
        np.testing.assert_allclose(values, alone, atol=1e-4)


def _scores(tiny_clip, images, texts):
    metrics = clip_scores(images, texts, load_clip(tiny_clip, CPU), batch_size=4, processes=PartialState(cpu=True))
    return np.array([metric.scores for metric in metrics])


class _TensorClip(CLIPModel):
    """torchmetrics expects tensors, which `transformers` returned before version 5."""

    def get_image_features(self, pixel_values):
        return super().get_image_features(pixel_values).pooler_output

    def get_text_features(self, input_ids, attention_mask):
        return super().get_text_features(input_ids, attention_mask).pooler_output


def test_score_equals_torchmetrics(tiny_clip, clip, pairs):
    images, texts = pairs
    # torchmetrics does not go below zero, so take those of all pairs that are above.
    images, texts = [image for image in images for _ in texts], [text for _ in images for text in texts]
    cosines = clip_cosines(images, texts, clip)
    chosen = np.flatnonzero(cosines > 0)[:8]
    tensors = [torch.from_numpy(np.array(images[index])).permute(2, 0, 1) for index in chosen]
    expected = torchmetrics_clip_score(
        tensors,
        [texts[index] for index in chosen],
        lambda: (_TensorClip.from_pretrained(tiny_clip), CLIPProcessor.from_pretrained(tiny_clip)),
    )
    assert len(chosen) == 8
    assert 100 * cosines[chosen].mean() == pytest.approx(expected.item(), rel=1e-5)


def test_cosines_depend_on_the_pair_only(clip, pairs, tmp_path):
    images, texts = pairs
    cosines = clip_cosines(images, texts, clip, batch_size=15)
    np.testing.assert_allclose(clip_cosines(images, texts, clip, batch_size=4, num_workers=1), cosines, atol=1e-6)
    reverse = clip_cosines(images[::-1], texts[::-1], clip, batch_size=1)
    np.testing.assert_allclose(reverse[::-1], cosines, atol=1e-6)
    paths = []
    for index, image in enumerate(images):
        paths.append(tmp_path / f"{index}.png")
        image.save(paths[-1])
    np.testing.assert_allclose(clip_cosines(paths, texts, clip), cosines, atol=1e-6)


def test_long_texts_are_cut_with_a_warning(clip, pairs, caplog):
    images, _ = pairs
    clip_cosines(images[:2], ["x" * 500, "a"], clip)
    assert "1 of 2 texts are longer than 32 tokens" in caplog.text


def test_pick_score_is_the_models_own_logit(tiny_clip, clip, pairs):
    images, texts = pairs
    model, processor = CLIPModel.from_pretrained(tiny_clip).eval(), CLIPProcessor.from_pretrained(tiny_clip)
    with torch.inference_mode():
        logits = model(**processor(text=texts, images=images, padding=True, return_tensors="pt")).logits_per_image
    metric = preference_score("PickScore", images, texts, clip)
    np.testing.assert_allclose(metric.scores, logits.diagonal().numpy(), atol=1e-4)
    assert (metric.name, metric.value) == ("PickScore", pytest.approx(logits.diagonal().mean().item(), abs=1e-4))


def test_hpsv2_sees_whole_images_on_black(tiny_clip, clip):
    """Its preprocessing by torchvision: the longer side is resized, the rest is padded."""
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in ((90, 41), (33, 64))]
    model, processor = CLIPModel.from_pretrained(tiny_clip).eval(), CLIPProcessor.from_pretrained(tiny_clip)
    pixels = []
    for image in images:
        height, width = (round(side * 32 / max(image.size)) for side in (image.height, image.width))
        resized = resize(image, [height, width], InterpolationMode.BICUBIC)
        left, top = (32 - width) // 2, (32 - height) // 2
        whole = to_tensor(torch_pad(resized, [left, top, 32 - width - left, 32 - height - top]))
        pixels.append(normalize(whole, processor.image_processor.image_mean, processor.image_processor.image_std))
    with torch.inference_mode():
        tokens = processor(text=["a cat", "two dogs"], padding=True, return_tensors="pt")
        output = model(**tokens, pixel_values=torch.stack(pixels))
        cosines = output.logits_per_image.diagonal() / model.logit_scale.exp()
    metric = preference_score("HPSv2 x100", images, ["a cat", "two dogs"], clip)
    np.testing.assert_allclose(metric.scores, 100 * cosines.numpy(), atol=1e-3)


@pytest.mark.parametrize("sign", [1, -1])
def test_scores_of_captions_by_their_definitions(tiny_clip, pairs, sign):
    """With one sign all cosines between images and texts are positive, with the other negative."""
    images, texts = pairs
    clip = load_clip(str(tiny_clip), CPU)
    captions, references = texts[:4], [[texts[1]], texts[2:5], [texts[2]], texts[5:7]]
    model, processor = CLIPModel.from_pretrained(tiny_clip).eval(), CLIPProcessor.from_pretrained(tiny_clip)
    for one in (clip.model, model):
        one.visual_projection.weight.data *= sign

    def embed(text):
        with torch.inference_mode():
            return model.get_text_features(**processor(text=f"A photo depicts {text}", return_tensors="pt"))[1][0]

    scores, both = caption_clip_scores(images[:4], captions, references, clip)
    assert (scores.name, both.name) == ("CLIPScore of captions", "RefCLIPScore")
    expected = []
    for image, caption, own in zip(images, captions, references, strict=False):
        with torch.inference_mode():
            of_image = model.get_image_features(**processor(images=image, return_tensors="pt"))[1][0]
        to_image = 2.5 * max(0.0, torch.cosine_similarity(of_image, embed(caption), dim=0).item())
        to_texts = max(0.0, *(torch.cosine_similarity(embed(caption), embed(text), dim=0).item() for text in own))
        expected.append((to_image, 2 / (1 / to_image + 1 / to_texts) if to_image > 0 < to_texts else 0.0))
    np.testing.assert_allclose(np.transpose([scores.scores, both.scores]), expected, atol=1e-5)
    assert (scores.value > 0) == (both.value > 0) == (sign < 0)


def test_several_models_have_numbers_of_their_own(clip, pairs):
    images, texts = pairs
    other = replace(clip, name="folder/of another")
    assert suffixes([clip, other]) == ["", ", of another"]
    names = [metric.name for metric in clip_scores(images, texts, other, suffix=", of another")]
    assert names[0] == "CLIP cosine, of another"


def test_a_text_with_a_special_token_is_read_as_written(clip, pairs):
    images, _ = pairs
    texts = ["a <|endoftext|> b", "a", "a <|endoftext|> c"]
    embeddings = clip_embeddings(images[:3], texts, clip).texts
    cosines = embeddings @ embeddings.T
    assert cosines.triu(1).max() < 0.9999


def test_mistakes_of_the_user(tiny_clip, clip, pairs, tmp_path, monkeypatch):
    images, texts = pairs
    with pytest.raises(UserError, match="15 images, 1 texts"):
        clip_cosines(images, texts[:1], clip)
    with pytest.raises(UserError, match="0 images"):
        clip_cosines([], [], clip)
    with pytest.raises(UserError, match=r"'/no/such/clip'.*huggingface\.co.*--clip"):
        load_clip("/no/such/clip", CPU)
    with pytest.raises(UserError, match=r"config\.json.*--clip"):
        load_clip(str(tmp_path), CPU)
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="type 'bert'"):
        load_clip(str(tmp_path), CPU)
    for file in tiny_clip.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    del weights["text_projection.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks weights of CLIP, first 'text_projection\.weight'"):
        load_clip(str(tmp_path), CPU)
