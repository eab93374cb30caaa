"""CLIP score: how well images match the texts they were made from, by the cosine of their CLIP embeddings."""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from transformers import AutoConfig, CLIPModel, CLIPProcessor

from transfusion_mot.errors import UserError
from transfusion_mot.evaluation.images import ImageArray, ImageSource, prepared_batches
from transfusion_mot.evaluation.report import Metric

DEFAULT_CLIP = "openai/clip-vit-large-patch14"

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


def load_clip(name_or_path: str, device: torch.device) -> Clip:
    """Load a CLIP model of `transformers` by its name on the Hugging Face hub or from a local folder.

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
            "with --clip"
        ) from None
    if loading["missing_keys"]:
        raise UserError(f"'{name_or_path}' lacks weights of CLIP, first '{sorted(loading['missing_keys'])[0]}'")
    weights = hashlib.sha256()
    for _, tensor in sorted(model.state_dict().items()):
        weights.update(tensor.contiguous().numpy().tobytes())
    model = model.to(device).eval().requires_grad_(False)
    return Clip(name_or_path, f"sha256 {weights.hexdigest()[:12]}", model, processor, device)


@torch.inference_mode()
def clip_cosines(
    images: Sequence[ImageSource], texts: Sequence[str], clip: Clip, batch_size: int | None = None, num_workers: int = 0
) -> npt.NDArray[np.float64]:
    """Cosine `[N]` between the embeddings of each image and its text, each in [-1, 1].

    A text is taken as it is, without a prefix, and cut where it is longer than the model's context.

    Args:
        images: Files or pictures.
        texts: The text of each image.
        clip: The model.
        batch_size: Images at a time; does not change the cosines. Null chooses by the device.
        num_workers: Processes that decode and resize; 0 does it in this one.

    Raises:
        UserError: There are no images, not as many texts, or an image cannot be read.
    """
    if not images or len(images) != len(texts):
        raise UserError(f"a CLIP score needs one text an image, but there are {len(images)} images, {len(texts)} texts")
    max_length = clip.model.config.text_config.max_position_embeddings
    lengths = [len(ids) for ids in clip.processor.tokenizer(list(texts), truncation=False)["input_ids"]]
    if truncated := sum(length > max_length for length in lengths):
        _logger.warning("%d of %d texts are longer than %d tokens and are cut there", truncated, len(texts), max_length)
    prepare = partial(_preprocess, image_processor=clip.processor.image_processor)
    cosines = []
    start = 0
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for pixels in prepared_batches(images, prepare, clip.device, batch_size, num_workers, "CLIP score"):
            batch_texts = list(texts[start : start + len(pixels)])
            start += len(pixels)
            tokens = clip.processor.tokenizer(
                batch_texts, padding=True, truncation=True, max_length=max_length, return_tensors="pt"
            ).to(clip.device)
            image_embeddings = clip.model.get_image_features(pixel_values=pixels).pooler_output
            text_embeddings = clip.model.get_text_features(
                input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
            ).pooler_output
            cosines.append(torch.cosine_similarity(image_embeddings, text_embeddings))
    return torch.cat(cosines).cpu().double().numpy()


def _preprocess(image: ImageArray, image_processor: Any) -> torch.Tensor:
    pixels: torch.Tensor = image_processor(images=Image.fromarray(image), return_tensors="pt")["pixel_values"][0]
    return pixels


def clip_scores(
    images: Sequence[ImageSource], texts: Sequence[str], clip: Clip, batch_size: int | None = None, num_workers: int = 0
) -> list[Metric]:
    """CLIP score on the three scales in use; arguments and errors as in `clip_cosines`.

    Returns:
        The mean cosine, the same times 100, and CLIPScore, the mean of 2.5 max(cosine, 0) (arXiv 2104.08718, eq. 1).
    """
    cosines = clip_cosines(images, texts, clip, batch_size, num_workers)
    protocol: dict[str, Any] = {
        "images": len(images),
        "clip": clip.name,
        "weights": clip.weights,
        "text prefix": "none",
    }
    return [
        Metric("CLIP cosine", float(cosines.mean()), protocol),
        Metric("CLIP score x100", float(100 * cosines.mean()), protocol),
        Metric("CLIPScore (2.5 max(cos, 0))", float(2.5 * cosines.clip(min=0).mean()), protocol),
    ]
