"""Diffusion loss on held-out images at fixed timesteps and with fixed noise, with and without their captions.

    python evaluate/diffusion_loss.py --checkpoint runs/quickstart --output diffusion.json
    accelerate launch evaluate/diffusion_loss.py --checkpoint runs/quickstart --num-images 5000

The timesteps are the middles of equal bins of (0, 1), t = 0 clean and t = 1 noise. The conditional loss has the caption
before the image, the unconditional loss does not; images and noise are the same. Only compare losses with the same
autoencoder and prediction type; see docs/evaluation.md.
"""

import argparse
import sys
from collections.abc import Sequence

from transfusion_mot.errors import UserError, exit_on_user_error
from transfusion_mot.evaluation.command import (
    add_device,
    add_output,
    add_run,
    at_least_one,
    command_parser,
    publish,
    run_command,
)
from transfusion_mot.evaluation.defaults import TIMESTEP_BINS


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = command_parser(__doc__)
    add_run(parser)
    parser.add_argument("--num-images", type=at_least_one, metavar="N", help="held-out images (default: all)")
    parser.add_argument(
        "--bins",
        type=at_least_one,
        default=TIMESTEP_BINS,
        metavar="N",
        help=f"number of timesteps (default: {TIMESTEP_BINS})",
    )
    add_device(parser)
    add_output(parser)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    # Before PyTorch loads, which takes seconds: --help, and mistakes in the options.
    with exit_on_user_error():
        parse_arguments(sys.argv[1:])

from accelerate import Accelerator

from transfusion_mot.data.mixture import open_documents, with_encoded
from transfusion_mot.evaluation.processes import open_processes
from transfusion_mot.files import find_snapshot
from transfusion_mot.pipeline import TransfusionPipeline
from transfusion_mot.sampling.held_out_losses import codecs_of, diffusion_metrics
from transfusion_mot.training.checkpoint import read_run_config


def main() -> None:
    arguments = parse_arguments(sys.argv[1:])
    snapshot = find_snapshot(arguments.checkpoint)
    config = read_run_config(snapshot, arguments.config, "--config")
    processes, device = open_processes(arguments.device)
    # In float32: what the sampler computes with.
    accelerator = Accelerator(mixed_precision="no", cpu=device.type == "cpu")
    pipeline = TransfusionPipeline.from_pretrained(snapshot).to(device)
    if not pipeline.transformer.architecture.of_objective("diffusion"):
        raise UserError(
            "no modality of the model has the objective diffusion, so there is no diffusion loss; "
            "evaluate/benchmark.py measures the loss of codes"
        )
    held_out = open_documents(config.data, "held_out")
    codecs = codecs_of(pipeline, config, device)
    sources = with_encoded(held_out, config.data, codecs, config.codecs, accelerator)
    metrics = diffusion_metrics(
        pipeline,
        config,
        sources,
        codecs=codecs,
        accelerator=accelerator,
        num_images=arguments.num_images,
        bins=arguments.bins,
        batch_size=arguments.batch_size,
    )
    if not metrics:
        raise UserError("no image is held out; raise data.held_out_fraction, or set 'use' of a source, in --config")
    if processes.is_main_process:
        publish(metrics, arguments.output)


if __name__ == "__main__":
    run_command(main)
