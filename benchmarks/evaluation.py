"""Time of an evaluation of 30,000 images, from the model to the metrics: `python -m benchmarks.evaluation`.

It calls evaluate/benchmark.py twice. The first call paints the images and computes the features of the same number of
references and all distances in the features of EfficientNet-Lite0. The second call reuses the images and the features
of references, so it takes the time of everything else. Prompts and references are made here, so only the checkpoint is
needed.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from transfusion_mot.errors import UserError, exit_on_user_error
from transfusion_mot.evaluation.command import add_device, at_least_one, command_parser
from transfusion_mot.files import find_snapshot
from transfusion_mot.outputs import check_writable_folder
from transfusion_mot.path_options import PathOption

ROOT = Path(__file__).parents[1]
PROMPTS = (
    *("noto emoji of octopus", "twemoji emoji of pizza", "openmoji emoji of rocket", "fluent emoji of sun"),
    *("noto emoji of red apple", "emojione emoji of fox", "fxemoji emoji of umbrella", "twemoji emoji of guitar"),
    *("openmoji emoji of snail", "noto emoji of tulip"),
)


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of the command line."""
    parser = command_parser(__doc__, "python -m benchmarks.evaluation")
    shipped = str(ROOT / "checkpoints" / "emoji")
    parser.add_argument("--checkpoint", action=PathOption, check=find_snapshot, default=shipped, metavar="FOLDER")
    parser.add_argument("--num-images", type=at_least_one, default=30000, metavar="N", help="painted images (30000)")
    parser.add_argument("--steps", type=at_least_one, default=25, metavar="N", help="reverse steps (25)")
    parser.add_argument("--batch-size", type=at_least_one, default=256, metavar="N", help="painted at a time (256)")
    add_device(parser)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder for the JSON")
    given = parser.parse_args(arguments)
    check_writable_folder(given.output, "--output")
    if given.num_images % len(PROMPTS):
        raise UserError(f"--num-images is {given.num_images}; it must be a multiple of the {len(PROMPTS)} prompts")
    return given


if __name__ == "__main__":
    # Before PyTorch loads, which takes seconds: --help, and mistakes in the options.
    with exit_on_user_error():
        parse_arguments(sys.argv[1:])

from benchmarks.features import write_images
from benchmarks.train_step import surroundings, without_output
from transfusion_mot.evaluation.images import pick_device


def seconds_of(command: Sequence[str]) -> float:
    """Seconds of a command.

    Raises:
        UserError: It failed and has printed the reason.
    """
    begun = time.perf_counter()
    if subprocess.run(command, cwd=ROOT).returncode:
        raise UserError("evaluate/benchmark.py failed; its message is above")
    return time.perf_counter() - begun


def main(arguments: list[str]) -> None:
    """Run the command line."""
    options = parse_arguments(arguments)
    device = pick_device(options.device)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "references").mkdir()
        write_images(folder / "references", options.num_images, 128)
        (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
        keys = {
            "prompts.kind": "text",
            "prompts.path": folder / "prompts.txt",
            "captions.kind": "none",
            "images-per-prompt": options.num_images // len(PROMPTS),
            "references": folder / "references",
            "features": "efficientnet",
            "num-inference-steps": options.steps,
            "batch-size": options.batch_size,
            "loss-documents": 0,
            "training-images": 0,
        }
        command = [sys.executable, "evaluate/benchmark.py", "--checkpoint", options.checkpoint, "--device", str(device)]
        command += ["--output", str(folder / "evaluation"), *(f"--{key}={value}" for key, value in keys.items())]
        whole, rest = seconds_of(command), seconds_of(command)
    report = {
        "command": " ".join(["python -m benchmarks.evaluation", *without_output(arguments)]),
        **surroundings(device),
        "images": options.num_images,
        "steps": options.steps,
        "seconds": whole,
        "seconds_without_painting_and_references": rest,
    }
    print(f"{options.num_images:,} images in {whole:,.0f} s, of which {rest:,.0f} s are the numbers and the report")
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / f"evaluation-{device.type}.json").write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    with exit_on_user_error():
        main(sys.argv[1:])
