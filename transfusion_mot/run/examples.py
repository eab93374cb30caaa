"""Example prompts of a snapshot, and the common beginnings of its captions, if there are any."""

from collections import Counter

from transfusion_mot.run.data import RunData
from transfusion_mot.sampling.held_out_items import captions_of

_NUM_PROMPTS, _NUM_READ = 6, 2000
# Maximum words of a beginning; maximum number of beginnings; minimum share of one, and of all together.
_MOST_WORDS, _MOST_BEGINNINGS = 4, 24
_LEAST_SHARE, _LEAST_COVERED = 0.01, 0.9


def examples_of(data: RunData, modality: str) -> dict[str, list[str]]:
    """Prompts and beginnings of captions for `SnapshotPipeline.config.examples`.

    Args:
        data: The data of the run. Prompts are held-out captions if there are any.
        modality: The captioned modality.
    """
    held_out = captions_of(data.held_out, modality, _NUM_PROMPTS)
    return {
        "prompts": held_out or captions_of(data.sources, modality, _NUM_PROMPTS),
        "beginnings": beginnings(captions_of(data.sources, modality, _NUM_READ)),
    }


def beginnings(captions: list[str]) -> list[str]:
    """The longest common beginnings of captions: "noto emoji of", "twemoji emoji of".

    Empty if there is only one beginning, or too many: free text has none.
    """
    words = [caption.split() for caption in captions]
    for length in range(_MOST_WORDS, 0, -1):
        counts = Counter(tuple(parts[:length]) for parts in words if len(parts) > length)
        found = [start for start, count in counts.most_common() if count >= _LEAST_SHARE * len(captions)]
        covered = sum(counts[start] for start in found)
        if 2 <= len(found) <= _MOST_BEGINNINGS and covered >= _LEAST_COVERED * len(captions):
            return [" ".join(_lengthened(start, words)) for start in found]
    return []


def _lengthened(start: tuple[str, ...], words: list[list[str]]) -> tuple[str, ...]:
    """A beginning extended by the words that always follow it."""
    having = [parts for parts in words if tuple(parts[: len(start)]) == start and len(parts) > len(start)]
    following = {parts[len(start)] for parts in having}
    # The last word of a caption names its content.
    is_last = any(len(parts) == len(start) + 1 for parts in having)
    return start if len(following) != 1 or is_last else _lengthened((*start, *following), words)
