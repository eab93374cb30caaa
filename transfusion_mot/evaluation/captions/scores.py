"""Captioning scores in pure Python: CIDEr-D, BLEU-1 to 4 and ROUGE-L with the conventions of COCO's evaluation.

Each scorer takes one tokenised candidate for each image and its tokenised references, in the same order, and equals the
scorer of that name in pycocoevalcap. Scores depend on the corpus: the inverse document frequencies of CIDEr and the
lengths of BLEU come from all images, so scores of different sets of images cannot be compared.
"""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

Words = Sequence[str]
_Ngram = tuple[str, ...]

_MAX_ORDER = 4


def _ngram_counts(words: Words) -> list[Counter[_Ngram]]:
    """Counts of n-grams; entry n - 1 has the n-grams of n words."""
    return [
        Counter(tuple(words[start : start + order]) for start in range(len(words) - order + 1))
        for order in range(1, _MAX_ORDER + 1)
    ]


def cider_d(candidates: Sequence[Words], references: Sequence[Sequence[Words]], sigma: float = 6.0) -> list[float]:
    """CIDEr-D (arXiv 1411.5726, section 6) of each image, 0 to 10; the corpus's is their mean.

    The weight of an n-gram is (its count) x log(number of images / number of images with it in a reference). A
    candidate's weights are clipped at the reference's, the cosine is damped by exp(-(length difference)^2 / 2 sigma^2),
    averaged over the references and n = 1..4, and multiplied by 10. A single image has weights of zero and a score of
    zero.
    """
    document_frequency: Counter[_Ngram] = Counter()
    reference_counts = [[_ngram_counts(words) for words in captions] for captions in references]
    for captions in reference_counts:
        document_frequency.update({ngram for counts in captions for order in counts for ngram in order})
    log_images = math.log(len(references))

    def weigh(counts: list[Counter[_Ngram]]) -> list[dict[_Ngram, float]]:
        return [
            {ngram: n * (log_images - math.log(max(1, document_frequency[ngram]))) for ngram, n in order.items()}
            for order in counts
        ]

    def similarity(candidate: list[Counter[_Ngram]], reference: list[Counter[_Ngram]]) -> float:
        total = 0.0
        for ours, theirs in zip(weigh(candidate), weigh(reference), strict=True):
            norms = math.hypot(*ours.values()) * math.hypot(*theirs.values())
            if norms:
                total += (
                    sum(min(w, theirs[ngram]) * theirs[ngram] for ngram, w in ours.items() if ngram in theirs) / norms
                )
        length_difference = candidate[0].total() - reference[0].total()
        return total / _MAX_ORDER * math.exp(-(length_difference**2) / (2 * sigma**2))

    scores = []
    for words, captions in zip(candidates, reference_counts, strict=True):
        candidate = _ngram_counts(words)
        scores.append(10 * sum(similarity(candidate, reference) for reference in captions) / len(captions))
    return scores


def bleu(candidates: Sequence[Words], references: Sequence[Sequence[Words]]) -> list[float]:
    """BLEU-1 to BLEU-4 of the corpus, each 0 to 1, without smoothing (Papineni et al. 2002).

    The brevity penalty uses, for each image, the length of the reference that is closest to the candidate's, the
    shorter one of two equally close.
    """
    correct, guessed = np.zeros(_MAX_ORDER), np.zeros(_MAX_ORDER)
    candidate_length = reference_length = 0
    for words, captions in zip(candidates, references, strict=True):
        candidate_length += len(words)
        reference_length += min((abs(len(caption) - len(words)), len(caption)) for caption in captions)[1]
        reference_counts = [_ngram_counts(caption) for caption in captions]
        for order, counts in enumerate(_ngram_counts(words)):
            # | of counters is the maximum, & the minimum.
            most: Counter[_Ngram] = Counter()
            for caption_counts in reference_counts:
                most |= caption_counts[order]
            correct[order] += (counts & most).total()
            guessed[order] += counts.total()
    # COCO's constants against division by zero; they affect scores if no n-gram of an order matches or exists.
    precisions = (correct + 1e-15) / (guessed + 1e-9)
    ratio = (candidate_length + 1e-15) / (reference_length + 1e-9)
    penalty = math.exp(min(0.0, 1 - 1 / ratio))
    return [float(penalty * np.prod(precisions[:order]) ** (1 / order)) for order in range(1, _MAX_ORDER + 1)]


def rouge_l(candidates: Sequence[Words], references: Sequence[Sequence[Words]], beta: float = 1.2) -> list[float]:
    """ROUGE-L (Lin 2004) of each image, 0 to 1; the corpus's is their mean.

    F-measure, with recall weighted by `beta`, of the best precision and the best recall of the longest common
    subsequence over the references. Like in COCO's code, an empty caption counts as one empty word.
    """
    scores = []
    for words, captions in zip(candidates, references, strict=True):
        common = [_common_subsequence_length(words or [""], caption or [""]) for caption in captions]
        precision = max(common) / max(1, len(words))
        recall = max(length / max(1, len(caption)) for length, caption in zip(common, captions, strict=True))
        scores.append((1 + beta**2) * precision * recall / (recall + beta**2 * precision) if precision else 0.0)
    return scores


def _common_subsequence_length(first: Words, second: Words) -> int:
    lengths = [0] * (len(second) + 1)
    for word in first:
        diagonal = 0
        for index, other in enumerate(second, start=1):
            above = lengths[index]
            lengths[index] = diagonal + 1 if word == other else max(above, lengths[index - 1])
            diagonal = above
    return lengths[-1]
