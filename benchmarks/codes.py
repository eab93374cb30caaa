"""Time of painting with codes by the pipeline: `python -m benchmarks.codes --checkpoint runs/chameleon`.

It includes the prompt, all codes and decoding to pixels, with guidance, which doubles the rows of the model. `not
recorded` has no CUDA graph: Python launches every kernel of every code.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Literal

from transfusion_mot.errors import UserError, exit_on_user_error
from transfusion_mot.evaluation.command import add_checkpoint, at_least_one


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.codes", description=__doc__)
    add_checkpoint(parser)
    parser.add_argument("--batch-sizes", type=at_least_one, nargs="+", default=[1, 4, 16, 64, 256], metavar="N")
    parser.add_argument("--prompt", default="noto emoji of octopus", metavar="TEXT")
    parser.add_argument(
        "--repeats", type=at_least_one, default=3, metavar="N", help="number of calls for the median (default: 3)"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    # Before PyTorch loads, which takes seconds: --help, and mistakes in the options.
    with exit_on_user_error():
        parse_arguments(sys.argv[1:])

import torch

from benchmarks.sample import seconds
from benchmarks.train_step import surroundings
from transfusion_mot.cli.loading import load_pipeline
from transfusion_mot.pipeline import TransfusionPipeline


def measure(pipeline: TransfusionPipeline, batch_size: int, prompt: str, repeats: int) -> dict[str, float]:
    """Seconds of a call for a number of pictures, of the call without the decoder, and of the call without a graph."""
    device = pipeline.device

    def paint(output_type: Literal["pt", "latent"] = "pt") -> None:
        pipeline(prompt, guidance_scale=3.0, num_images_per_prompt=batch_size, output_type=output_type)

    times = {"all": seconds(paint, device, repeats), "codes": seconds(lambda: paint("latent"), device, repeats)}
    if device.type == "cuda":
        pipeline.workspace.records = False
        times["not recorded"] = seconds(lambda: paint("latent"), device, 1)
        pipeline.workspace.records = True
    return times


def main() -> None:
    """Print a table: a row for each batch size."""
    given = parse_arguments(sys.argv[1:])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = load_pipeline(given.checkpoint, device, None)
    if pipeline.codec.kind != "codes":
        raise UserError(f"'{given.checkpoint}' paints by diffusion; benchmarks.sample measures that")
    pipeline.set_progress_bar_config(disable=True)
    rows, columns = pipeline.grid(pipeline.sizes.default)
    print(surroundings(torch.device(device)))
    print(f"{rows} x {columns} codes a picture, guidance 3, {pipeline.transformer.dtype}")
    print("pictures   seconds  pictures/s  ms a code  decoder ms  not recorded s")
    for batch_size in given.batch_sizes:
        times = measure(pipeline, batch_size, given.prompt, given.repeats)
        plain = f"{times['not recorded']:.3f}" if "not recorded" in times else "-"
        a_code, decoder = 1000 * times["codes"] / (rows * columns), 1000 * (times["all"] - times["codes"])
        rate = batch_size / times["all"]
        print(f"{batch_size:8d} {times['all']:9.3f} {rate:11.1f} {a_code:10.3f} {decoder:11.1f} {plain:>15}")


if __name__ == "__main__":
    with exit_on_user_error():
        main()
