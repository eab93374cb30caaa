"""CLIP score: how well images match the texts they were made from, by the cosine of their CLIP embeddings."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from accelerate import PartialState
from PIL import Image
from torch.nn.functional import normalize
from transformers import AutoConfig, CLIPModel, CLIPProcessor

from transfusion_mot.errors import UserError
from transfusion_mot.evaluation.blocks import row_blocks
from transfusion_mot.evaluation.images import ImageArray, ImageSource, device_batches
from transfusion_mot.evaluation.intervals import mean_interval
from transfusion_mot.evaluation.processes import shared_rows
from transfusion_mot.evaluation.report import Metric
from transfusion_mot.evaluation.weights import weights_hash

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Clip:
    """A CLIP model with its preprocessing.

    Attributes:
        name: Name or path it was loaded from.
        weights: Hash of its parameters.
        model: The model, in float32 on `device`.
        processor: Its tokenizer and image preprocessing.
        device: Where it computes.
    """

    name: str
    weights: str
    model: CLIPModel
    processor: CLIPProcessor
    device: torch.device


def load_clip(name_or_path: str, device: torch.device, option: str = "--clip") -> Clip:
    """Load a CLIP model of `transformers` by its name on the Hugging Face hub or from a local folder.

    Args:
        name_or_path: Name or folder.
        device: Where it computes.
        option: What takes a local folder on the command line; for the message.

    Raises:
        UserError: It cannot be found or downloaded, is another kind of model, or lacks weights.
    """
    try:
        config = AutoConfig.from_pretrained(name_or_path)
        if config.model_type != "clip":
            raise UserError(
                f"'{name_or_path}' is a model of type '{config.model_type}'; a CLIP score needs type 'clip'"
            )
        model, loading = CLIPModel.from_pretrained(name_or_path, dtype=torch.float32, output_loading_info=True)
        processor = CLIPProcessor.from_pretrained(name_or_path)
    except UserError:
        raise
    # Beside OSError, broken files end in whatever their parser raises.
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
) -> ClipEmbeddings:
    """Embed images and their texts, which are cut where they are longer than the model's context.

    Args:
        images: Files, members of tar files or pictures.
        texts: The text of each image.
        clip: The model.
        batch_size: Images at a time; does not change the embeddings. Null chooses by the device.
        num_workers: Images decoded and resized at a time, by other processes; with 0 one at a time, by this process.
        prefix: Put in front of every text.
        processes: Share the images among these, which all call this and all receive all embeddings.

    Raises:
        UserError: There are no images, not as many texts, or an image cannot be read.
    """
    if not images or len(images) != len(texts):
        raise UserError(f"a CLIP score needs one text an image, but there are {len(images)} images, {len(texts)} texts")
    texts = [prefix + text for text in texts]
    max_length = clip.model.config.text_config.max_position_embeddings
    # Where a text itself holds "<|endoftext|>", it is read as these characters.
    tokenize = partial(clip.processor.tokenizer, split_special_tokens=True)
    lengths = [len(ids) for ids in tokenize(texts, truncation=False)["input_ids"]]
    if truncated := sum(length > max_length for length in lengths):
        _logger.warning("%d of %d texts are longer than %d tokens and are cut there", truncated, len(texts), max_length)
    prepare = partial(_preprocess, image_processor=clip.processor.image_processor)

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
                tokens = tokenize(
                    own_texts[start : start + len(pixels)],
                    padding=True,
                    truncation=True,
                    max_length=max_length,
                    return_tensors="pt",
                ).to(clip.device)
                start += len(pixels)
                of_images = clip.model.get_image_features(pixel_values=pixels).pooler_output
                of_texts = clip.model.get_text_features(
                    input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
                ).pooler_output
                yield torch.cat([normalize(of_images, dim=1), normalize(of_texts, dim=1)], dim=1)

    width = clip.model.config.projection_dim
    rows = shared_rows(batches, len(images), 2 * width, clip.device, processes)
    return ClipEmbeddings(rows[:, :width], rows[:, width:])


def _preprocess(image: ImageArray, image_processor: Any) -> torch.Tensor:
    pixels: torch.Tensor = image_processor(images=Image.fromarray(image), return_tensors="pt")["pixel_values"][0]
    return pixels


def retrieved(embeddings: ClipEmbeddings, texts: Sequence[str]) -> npt.NDArray[np.bool_]:
    """`[N]`, whether no other text of the set is closer to an image than its own; equal texts are one."""
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
) -> list[Metric]:
    """CLIP score on the three scales in use, and how often an image finds its text; as in `clip_embeddings`.

    Returns:
        The mean cosine, the same times 100, CLIPScore, the mean of 2.5 max(cosine, 0) (arXiv 2104.08718, eq. 1), and
        the share of images to which no other text of the set is closer.
    """
    embeddings = clip_embeddings(
        images, texts, clip, batch_size=batch_size, num_workers=num_workers, prefix=prefix, processes=processes
    )
    cosines = embeddings.cosines()
    protocol: dict[str, Any] = {
        "images": len(images),
        "clip": clip.name,
        "weights": clip.weights,
        "text prefix": prefix or "none",
    }
    among = {**protocol, "among texts": len(set(texts))}
    return [
        _mean("CLIP cosine", cosines, protocol),
        _mean("CLIP score x100", 100 * cosines, protocol),
        _mean("CLIPScore (2.5 max(cos, 0))", 2.5 * cosines.clip(min=0), protocol),
        _mean("CLIP R@1 (image to text)", retrieved(embeddings, texts).astype(np.float64), among),
    ]


def _mean(name: str, scores: npt.NDArray[np.float64], protocol: dict[str, Any]) -> Metric:
    return Metric(name, float(scores.mean()), protocol, mean_interval(scores), tuple(scores.tolist()))
