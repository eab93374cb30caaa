"""All captioning metrics of a model's captions, as numbers with intervals."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from transfusion_mot.errors import UserError
from transfusion_mot.evaluation.captions.java import JavaMissing
from transfusion_mot.evaluation.captions.meteor import meteor
from transfusion_mot.evaluation.captions.scores import bleu, cider_d, rouge_l
from transfusion_mot.evaluation.captions.sentence_similarity import SentenceEncoder, sentence_similarity
from transfusion_mot.evaluation.captions.tokenizer import tokenize_captions
from transfusion_mot.evaluation.intervals import mean_interval
from transfusion_mot.evaluation.report.content import Metric

_FEW_IMAGES = 1000

_logger = logging.getLogger(__name__)


def caption_metrics(
    candidates: Sequence[str], references: Sequence[Sequence[str]], encoder: SentenceEncoder | None = None
) -> list[Metric]:
    """Score one caption for each image against the references of the image.

    Args:
        candidates: One caption for each image, untokenised; an empty one scores 0.
        references: For each image, at least one reference caption.
        encoder: Model of sentence embeddings; None if no model is installed.

    Returns:
        `CIDEr` (0 to 10; 10 needs captions of four words and more that equal all their references), `CIDEr x100` (as
        in papers), `BLEU-1` to `BLEU-4`, `ROUGE-L` and `METEOR` (0 to 1), and `sentence similarity`. If Java,
        pycocoevalcap or a sentence model is missing, the protocols of the others say what was not measured and why.

    Raises:
        UserError: There are no candidates, their number differs from that of the references, or an image has none.
    """
    if not candidates:
        raise UserError("there are no candidate captions; captioning metrics need at least one image")
    if len(candidates) != len(references):
        raise UserError(f"{len(candidates)} candidate captions but references for {len(references)} images")
    for index, image_references in enumerate(references):
        if not image_references:
            raise UserError(f"image {index} (counted from 0) has no reference caption; every image needs at least one")
    if len(candidates) < _FEW_IMAGES:
        _logger.warning(
            "CIDEr of only %d images: its word weights depend on their references, so compare it only on the same "
            "images (COCO's test split has 5,000)",
            len(candidates),
        )
    flat = [caption for captions in references for caption in captions]
    (words, flat_words), tokenizer = tokenize_captions(candidates, flat)
    left = iter(flat_words)
    reference_words = [[next(left) for _ in captions] for captions in references]
    protocol: dict[str, Any] = {
        "images": len(candidates),
        "references": sum(map(len, references)),
        "tokenizer": tokenizer,
    }
    of_meteor: list[Metric] = []
    try:
        corpus, per_image = meteor(words, reference_words)
        # The corpus score is not a mean over images, so there is no interval.
        of_meteor.append(Metric("METEOR", corpus, {**protocol, "program": "METEOR 1.5"}, None, tuple(per_image)))
    except JavaMissing as missing:
        protocol["METEOR"] = f"not measured: {missing}"
    if encoder is None:
        protocol["sentence similarity"] = "not measured: pip install transfusion-mot[evaluation]"
    # COCO's scorers of n-grams also split at no-break spaces; those of METEOR and ROUGE-L do not.
    cut, reference_cut = [_cut(w) for w in words], [[_cut(w) for w in captions] for captions in reference_words]
    cider = np.array(cider_d(cut, reference_cut))
    metrics = [_mean("CIDEr", cider, protocol), _mean("CIDEr x100", 100 * cider, protocol)]
    metrics += [
        Metric(f"BLEU-{order}", value, protocol) for order, value in enumerate(bleu(cut, reference_cut), start=1)
    ]
    metrics += [_mean("ROUGE-L", np.array(rouge_l(words, reference_words)), protocol), *of_meteor]
    if encoder is not None:
        similarity = np.array(sentence_similarity(candidates, references, encoder))
        measured = {**protocol, "sentence model": encoder.name, "weights": encoder.weights}
        metrics.append(_mean("sentence similarity", similarity, measured))
    return metrics


def _cut(words: Sequence[str]) -> list[str]:
    return [part for word in words for part in word.split()]


def _mean(name: str, scores: np.ndarray[Any, np.dtype[np.float64]], protocol: dict[str, Any]) -> Metric:
    return Metric(name, float(scores.mean()), protocol, mean_interval(scores), tuple(scores.tolist()))
