"""Match of images and texts by the cosine of CLIP embeddings: CLIP score, PickScore, HPSv2, CLIPScore of captions."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from accelerate import PartialState
from PIL import Image
from torch.nn.functional import normalize
from transformers import AutoConfig, CLIPModel, CLIPProcessor

from transfusion_mot.errors import UserError
from transfusion_mot.evaluation.defaults import CLIP_PREFIX
from transfusion_mot.evaluation.images import ImageArray, ImageSource, device_batches
from transfusion_mot.evaluation.intervals import mean_interval
from transfusion_mot.evaluation.processes import shared_rows
from transfusion_mot.evaluation.protocol.prompts import list_hash
from transfusion_mot.evaluation.report.content import Metric
from transfusion_mot.evaluation.row_blocks import row_blocks
from transfusion_mot.evaluation.weights import weights_hash
from transfusion_mot.hub_names import ask_hub

PreferenceChoice = Literal["PickScore", "HPSv2 x100"]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Clip:
    """A CLIP model with its preprocessing.

    Attributes:
        name: Name or path it was loaded from.
        weights: Hash of its parameters.
        model: The model, in float32 on `device`.
        processor: Its tokenizer and image preprocessing.
        device: Device of the model.
    """

    name: str
    weights: str
    model: CLIPModel
    processor: CLIPProcessor
    device: torch.device

    @property
    def context(self) -> int:
        """Maximum number of tokens of a text."""
        length: int = self.model.config.text_config.max_position_embeddings
        return length


def load_clip(name_or_path: str, device: torch.device, option: str = "--clip") -> Clip:
    """Load a CLIP model of `transformers` by its name on the Hugging Face hub or from a local folder.

    Args:
        name_or_path: Name or folder.
        device: Device of the model.
        option: Command-line option that takes a local folder; for the message.

    Raises:
        UserError: It cannot be found or downloaded, is another kind of model, or lacks weights.
    """
    try:
        ask_hub(name_or_path)
        config = AutoConfig.from_pretrained(name_or_path)
        if config.model_type != "clip":
            raise UserError(
                f"'{name_or_path}' is a model of type '{config.model_type}'; a CLIP score needs type 'clip'"
            )
        model, loading = CLIPModel.from_pretrained(name_or_path, dtype=torch.float32, output_loading_info=True)
        processor = CLIPProcessor.from_pretrained(name_or_path)
    except UserError:
        raise
    # Besides OSError, parsers of damaged files raise any error.
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        where = "that folder" if Path(name_or_path).is_dir() else "huggingface.co, and there is no such folder"
        reason = " ".join(str(error).split()).split(". ")[0]
        raise UserError(
            f"CLIP model '{name_or_path}' cannot be loaded from {where} ({reason}); download config.json, "
            "model.safetensors, preprocessor_config.json and the tokenizer files elsewhere and give their folder "
            f"with {option}"
        ) from None
    if loading["missing_keys"]:
        raise UserError(f"'{name_or_path}' lacks weights of CLIP, first '{sorted(loading['missing_keys'])[0]}'")
    weights = weights_hash(model)
    model = model.to(device).eval().requires_grad_(False)
    return Clip(name_or_path, weights, model, processor, device)


@dataclass(frozen=True)
class ClipEmbeddings:
    """Embeddings of length one of images and their texts, `[N, D]` each, in their order."""

    images: torch.Tensor
    texts: torch.Tensor

    def cosines(self) -> npt.NDArray[np.float64]:
        """`[N]`, of each image and its text, in [-1, 1]."""
        return (self.images * self.texts).sum(dim=1).cpu().double().numpy()


@torch.inference_mode()
def clip_embeddings(
    images: Sequence[ImageSource],
    texts: Sequence[str],
    clip: Clip,
    *,
    batch_size: int | None = None,
    num_workers: int = 0,
    prefix: str = "",
    processes: PartialState | None = None,
    pad: bool = False,
) -> ClipEmbeddings:
    """Embed images and their texts; texts longer than the model's context are cut.

    Args:
        images: Files, members of tar files or pictures.
        texts: The text of each image.
        clip: The model.
        batch_size: Images at a time; does not change the embeddings. Null chooses by the device.
        num_workers: Images decoded and resized at a time, by other processes; with 0 one at a time, by this process.
        prefix: Text in front of every text.
        processes: Processes that share the images; all call this, and all receive all embeddings.
        pad: Resize the longer side of an image to the model's size and pad with black, instead of cropping.

    Raises:
        UserError: There are no images, the number of texts differs, or an image cannot be read.
    """
    if not images or len(images) != len(texts):
        raise UserError(f"a CLIP score needs one text an image, but there are {len(images)} images, {len(texts)} texts")
    texts = [prefix + text for text in texts]
    _warn_of_long(texts, clip)
    prepare = partial(_preprocess, image_processor=clip.processor.image_processor, pad=pad)

    def batches(rank: int, world: int) -> Iterator[torch.Tensor]:
        own_texts = texts[rank::world]
        part = device_batches(
            images[rank::world],
            prepare,
            clip.device,
            batch_size=batch_size,
            num_workers=num_workers,
            description="CLIP score",
            quiet=rank > 0,
        )
        start = 0
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            for (pixels,) in part:
                of_texts = _embed_texts(own_texts[start : start + len(pixels)], clip)
                start += len(pixels)
                of_images = clip.model.get_image_features(pixel_values=pixels).pooler_output
                yield torch.cat([normalize(of_images, dim=1), of_texts], dim=1)

    width = clip.model.config.projection_dim
    rows = shared_rows(batches, len(images), 2 * width, clip.device, processes)
    return ClipEmbeddings(rows[:, :width], rows[:, width:])


@torch.inference_mode()
def text_embeddings(texts: Sequence[str], clip: Clip) -> torch.Tensor:
    """Embeddings `[N, D]` of length one of texts; texts longer than the model's context are cut."""
    _warn_of_long(texts, clip)
    return torch.cat([_embed_texts(texts[start : start + 64], clip) for start in range(0, len(texts), 64)])


def _tokenize(texts: Sequence[str], clip: Clip, **options: Any) -> Any:
    # A "<|endoftext|>" in a text is read as ordinary characters.
    return clip.processor.tokenizer(list(texts), split_special_tokens=True, **options)


def _warn_of_long(texts: Sequence[str], clip: Clip) -> None:
    lengths = [len(ids) for ids in _tokenize(texts, clip, truncation=False)["input_ids"]]
    if truncated := sum(length > clip.context for length in lengths):
        _logger.warning(
            "%d of %d texts are longer than %d tokens and are cut there", truncated, len(texts), clip.context
        )


def _embed_texts(texts: Sequence[str], clip: Clip) -> torch.Tensor:
    cut = {"padding": True, "truncation": True, "max_length": clip.context}
    tokens = _tokenize(texts, clip, return_tensors="pt", **cut).to(clip.device)
    found = clip.model.get_text_features(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
    return normalize(found.pooler_output, dim=1)


def _preprocess(image: ImageArray, image_processor: Any, pad: bool) -> torch.Tensor:
    if pad:
        image = _padded(image, image_processor.crop_size["height"])
    pixels: torch.Tensor = image_processor(images=Image.fromarray(image), return_tensors="pt")["pixel_values"][0]
    return pixels


def _padded(image: ImageArray, size: int) -> ImageArray:
    """The longer side resized to `size`, centred on black, as in HPSv2's own preprocessing."""
    height, width = image.shape[:2]
    scale = size / max(height, width)
    height, width = round(height * scale), round(width * scale)
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
    square = Image.new("RGB", (size, size))
    square.paste(resized, ((size - width) // 2, (size - height) // 2))
    return np.asarray(square)


def retrieved(embeddings: ClipEmbeddings, texts: Sequence[str]) -> npt.NDArray[np.bool_]:
    """`[N]` whether an image is closer to its own text than to all other texts; equal texts count as one."""
    first = {text: index for index, text in reversed(list(enumerate(texts)))}
    places = {text: place for place, text in enumerate(first)}
    candidates = embeddings.texts[list(first.values())]
    own = torch.tensor([places[text] for text in texts], device=candidates.device)
    found = []
    for rows in row_blocks(len(texts), len(candidates)):
        similarity = embeddings.images[rows] @ candidates.T
        found.append(similarity.gather(1, own[rows, None])[:, 0] >= similarity.amax(dim=1))
    return torch.cat(found).cpu().numpy()


def clip_scores(
    images: Sequence[ImageSource],
    texts: Sequence[str],
    clip: Clip,
    *,
    batch_size: int | None = None,
    num_workers: int = 0,
    prefix: str = "",
    processes: PartialState | None = None,
    suffix: str = "",
) -> list[Metric]:
    """CLIP score on the three usual scales, and the retrieval rate of texts; arguments as in `clip_embeddings`.

    A `suffix` after their names distinguishes the numbers of several models.

    Returns:
        The mean cosine, the same times 100, CLIPScore, the mean of 2.5 max(cosine, 0) (arXiv 2104.08718, eq. 1), and
        the share of images that are closer to their own text than to all others.
    """
    embeddings = clip_embeddings(
        images, texts, clip, batch_size=batch_size, num_workers=num_workers, prefix=prefix, processes=processes
    )
    cosines = embeddings.cosines()
    protocol = {**_protocol(images, clip), "text prefix": prefix or "none"}
    distinct = sorted(set(texts))
    among = {**protocol, "among texts": len(distinct), "hash of texts": list_hash([distinct])}
    return [
        _mean(f"CLIP cosine{suffix}", cosines, protocol),
        _mean(f"CLIP score x100{suffix}", 100 * cosines, protocol),
        _mean(f"CLIPScore (2.5 max(cos, 0)){suffix}", 2.5 * cosines.clip(min=0), protocol),
        _mean(f"CLIP R@1 (image to text){suffix}", retrieved(embeddings, texts).astype(np.float64), among),
    ]


def suffixes(clips: Sequence[Clip]) -> list[str]:
    """Suffixes of the numbers of several CLIP models: empty for the first, names for the others."""
    return [f", {Path(clip.name).name}" if place else "" for place, clip in enumerate(clips)]


def preference_score(
    kind: PreferenceChoice,
    images: Sequence[ImageSource],
    texts: Sequence[str],
    clip: Clip,
    *,
    batch_size: int | None = None,
    num_workers: int = 0,
    processes: PartialState | None = None,
) -> Metric:
    """A score by a CLIP model that was trained on human choices between images of one prompt; higher is preferred.

    PickScore (arXiv 2305.01569) is the cosine times the model's own scale, with centre crops. HPSv2 (arXiv 2306.09341)
    is the cosine times 100, as in its tables, with images padded with black.
    """
    pad = kind == "HPSv2 x100"
    found = clip_embeddings(
        images, texts, clip, batch_size=batch_size, num_workers=num_workers, processes=processes, pad=pad
    )
    scale = 100.0 if pad else clip.model.logit_scale.exp().item()
    return _mean(kind, scale * found.cosines(), _protocol(images, clip))


def caption_clip_scores(
    images: Sequence[ImageSource],
    captions: Sequence[str],
    references: Sequence[Sequence[str]],
    clip: Clip,
    *,
    num_workers: int = 0,
) -> list[Metric]:
    """CLIPScore and RefCLIPScore of one caption an image (arXiv 2104.08718, equations 1 and 2).

    RefCLIPScore is the harmonic mean of CLIPScore and of the largest cosine, not below 0, between the caption and a
    reference. All texts have the prefix "A photo depicts ".
    """
    embeddings = clip_embeddings(images, captions, clip, num_workers=num_workers, prefix=CLIP_PREFIX)
    flat = [CLIP_PREFIX + text for texts in references for text in texts]
    of_references = text_embeddings(flat, clip).split([len(texts) for texts in references])
    nearest = torch.stack([(own @ text).max() for own, text in zip(of_references, embeddings.texts, strict=True)])
    to_image, to_texts = 2.5 * embeddings.cosines().clip(min=0), nearest.cpu().double().numpy().clip(min=0)
    both = to_image + to_texts
    harmonic = 2 * to_image * to_texts / np.where(both > 0, both, 1)
    protocol = {**_protocol(images, clip), "text prefix": CLIP_PREFIX}
    with_references = {**protocol, "references": len(flat)}
    return [_mean("CLIPScore of captions", to_image, protocol), _mean("RefCLIPScore", harmonic, with_references)]


def _protocol(images: Sequence[ImageSource], clip: Clip) -> dict[str, Any]:
    return {"images": len(images), "clip": clip.name, "weights": clip.weights}


def _mean(name: str, scores: npt.NDArray[np.float64], protocol: dict[str, Any]) -> Metric:
    return Metric(name, float(scores.mean()), protocol, mean_interval(scores), tuple(scores.tolist()))
