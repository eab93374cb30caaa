"""Write the prompts of configs/eval/composition.yaml. `evaluate/composition.py` judges their pictures.

    python -m benchmarks.composition_prompts --sprites data/sprites --output configs/eval/composition.jsonl

The things have at least five drawings, and 80 % of these are recognised by the other drawings. Half of the prompts with
two things, and half of the prompts with a colour, have a pair that is held out of training on `scenes` with the default
`data.split_seed` and `data.held_out_fraction`.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from transfusion_mot.config import DataConfig
from transfusion_mot.data.sprites import Sprites
from transfusion_mot.errors import exit_on_user_error
from transfusion_mot.outputs import check_writable_file
from transfusion_mot.path_options import PathOption


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.composition_prompts",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--sprites",
        action=PathOption,
        check=Sprites,
        required=True,
        metavar="FOLDER",
        help="of python -m transfusion_mot.data.sprites",
    )
    parser.add_argument("--output", required=True, metavar="FILE", help="JSON lines in GenEval's format")
    given = parser.parse_args(arguments)
    check_writable_file(given.output, "--output")
    return given


if __name__ == "__main__":
    # Before PyTorch loads, which takes seconds: --help, and mistakes in the options.
    with exit_on_user_error():
        parse_arguments(sys.argv[1:])

from transfusion_mot.data.colours import COLOURS
from transfusion_mot.data.draws import Draws
from transfusion_mot.data.scene_composer import Composer
from transfusion_mot.data.scene_objects import plural_of, with_article
from transfusion_mot.data.scenes import NUMBERS
from transfusion_mot.evaluation.composition import Drawings
from transfusion_mot.evaluation.features.load import load_feature_network
from transfusion_mot.evaluation.images import pick_device

_PROMPTS_OF_A_KIND = 100
_MOST_TRIES = 100_000
_FEWEST_DRAWINGS, _LEAST_RECOGNISED = 5, 0.8


def recognised_nouns(drawings: Drawings) -> list[str]:
    """Things whose drawings are mostly similar to other drawings of the same thing."""
    right: defaultdict[str, list[bool]] = defaultdict(list)
    for noun, found in zip(drawings.nouns.tolist(), drawings.names_of_own(), strict=True):
        right[noun].append(noun == found)
    return sorted(
        noun
        for noun, results in right.items()
        if len(results) >= _FEWEST_DRAWINGS and sum(results) >= _LEAST_RECOGNISED * len(results)
    )


def prompts(composer: Composer, nouns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Lines in GenEval's format, with the additional key `held_out`."""
    draws = Draws("composition prompts")
    seen: set[str] = set()

    def one(noun: str, colour: str | None = None) -> str:
        return with_article(noun if colour is None else f"{colour} {noun}")

    for tag in ("counting", "colors", "two_object", "position"):
        number = 0
        for _ in range(_MOST_TRIES):
            if number == _PROMPTS_OF_A_KIND:
                break
            wanted = tag != "counting" and number % 2 == 1
            first, second = draws.some(nouns, 2)
            line: dict[str, Any]
            if tag == "counting":
                count = 1 + number % 3
                text = one(first) if count == 1 else f"{NUMBERS[count]} {plural_of(first)}"
                line = {"include": [{"class": first, "count": count}], "prompt": text}
                is_held_out = False
            elif tag == "colors":
                colour = draws.pick(list(COLOURS))
                line = {"include": [{"class": first, "count": 1, "color": colour}], "prompt": one(first, colour)}
                is_held_out = composer.is_held_out_pair(("colour", first, colour))
                if not composer.has(first, colour):
                    continue
            else:
                relation = draws.pick(["left of", "right of"]) if tag == "position" else None
                middle = relation or "and"
                entries: list[dict[str, Any]] = [{"class": second, "count": 1}, {"class": first, "count": 1}]
                if relation is not None:
                    entries[1]["position"] = [relation, 0]
                line = {"include": entries, "prompt": f"{one(first)} {middle} {one(second)}"}
                is_held_out = composer.is_held_out_pair(("together", *sorted((first, second))))
            if is_held_out == wanted and line["prompt"] not in seen:
                seen.add(line["prompt"])
                number += 1
                yield {"tag": tag, **line, "held_out": is_held_out}


def main(arguments: Sequence[str]) -> None:
    """Write the prompts as JSON lines."""
    given = parse_arguments(arguments)
    sprites = Sprites(given.sprites)
    drawings = Drawings(sprites, load_feature_network("efficientnet", pick_device(None)))
    data = DataConfig()
    composer = Composer(sprites.sprites, seed=data.split_seed, held_out_fraction=data.held_out_fraction)
    nouns = recognised_nouns(drawings)
    print(f"{len(nouns)} of {len(set(drawings.nouns.tolist()))} things: {', '.join(nouns)}")
    lines = [json.dumps(line) for line in prompts(composer, nouns)]
    Path(given.output).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    with exit_on_user_error():
        main(sys.argv[1:])
