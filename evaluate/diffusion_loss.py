"""Diffusion loss on held-out images at fixed timesteps and with fixed noise, with and without their captions.

    python evaluate/diffusion_loss.py --checkpoint runs/quickstart --output diffusion.json
    accelerate launch evaluate/diffusion_loss.py --checkpoint runs/quickstart --num-images 5000

The timesteps are the middles of equal bins of (0, 1), t = 0 clean and t = 1 noise. Conditional is with the caption
before the image, unconditional without one; both see the same images and noise. A loss compares only with one of the
same autoencoder and prediction type; see docs/evaluation.md.
"""

import argparse
import logging
import sys
from dataclasses import replace

from accelerate import Accelerator

from transfusion_mot.data.mixture import open_documents, with_latents
from transfusion_mot.data.online import OnlineEncoder
from transfusion_mot.diffusion import Diffusion
from transfusion_mot.errors import UserError, exit_on_user_error
from transfusion_mot.evaluation.bootstrap import bootstrap_interval
from transfusion_mot.evaluation.processes import open_processes
from transfusion_mot.evaluation.report import Metric, metrics_table, save_metrics
from transfusion_mot.pipeline import TransfusionPipeline
from transfusion_mot.training.checkpoint import find_snapshot, read_run_config
from transfusion_mot.training.validation import Validation


def main() -> None:
    arguments = parse_arguments()
    if arguments.bins < 1 or arguments.batch_size < 1:
        raise UserError(f"--bins is {arguments.bins} and --batch-size {arguments.batch_size}; both must be at least 1")
    snapshot = find_snapshot(arguments.checkpoint)
    config = read_run_config(snapshot, arguments.config)
    processes, device = open_processes(arguments.device)
    # In float32: what the sampler computes with.
    accelerator = Accelerator(mixed_precision="no", cpu=device.type == "cpu")
    pipeline = TransfusionPipeline.from_pretrained(snapshot).to(device)
    held_out = open_documents(config.data, "held_out")
    sources = with_latents(held_out, config.data, pipeline.autoencoder, config.autoencoder, accelerator)
    available = sources.num_image_documents()
    if not available:
        raise UserError("no image is held out; raise data.held_out_fraction, or set 'use' of a source, in --config")
    training = replace(config.training, num_validation_documents=arguments.num_images or available)
    # An image a row: every one is measured, and with the same noise, whatever its caption takes of a row.
    config = replace(config, training=training, data=replace(config.data, images_per_row=1))
    diffusion = Diffusion(pipeline.scheduler, config.diffusion.timestep_distribution)
    encoder = OnlineEncoder(pipeline.autoencoder, config.autoencoder.batch_size)
    timesteps = [(index + 0.5) / arguments.bins for index in range(arguments.bins)]
    metrics: list[Metric] = []
    for name, dropout in (("conditional", 0.0), ("unconditional", 1.0)):
        validation = Validation(
            sources,
            pipeline.text_tokenizer,
            config,
            diffusion,
            encoder,
            arguments.batch_size,
            dropout,
        )
        losses = validation.image_losses(pipeline.transformer, accelerator, timesteps).numpy()
        protocol = {
            "images": len(losses),
            "prediction": diffusion.prediction_type,
            "unit": "squared error per element",
            "noise": "fixed",
        }
        means = losses.mean(axis=1)
        shown = ", ".join(f"{t:.3g}" for t in timesteps)
        over_all = {**protocol, "mean of t": shown}
        metrics.append(Metric(f"diffusion loss ({name})", float(means.mean()), over_all, bootstrap_interval(means)))
        metrics += [
            Metric(f"diffusion loss ({name}, t = {t:.3g})", float(column.mean()), protocol, bootstrap_interval(column))
            for t, column in zip(timesteps, losses.T, strict=True)
        ]
    if processes.is_main_process:
        print(metrics_table(metrics))
        if arguments.output:
            save_metrics(metrics, arguments.output, sys.argv)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, metavar="FOLDER", help="a run folder of train.py, or a snapshot")
    parser.add_argument("--config", metavar="FILE", help="configuration that names the data (default: the run's)")
    parser.add_argument("--num-images", type=int, metavar="N", help="held-out images (default: all)")
    parser.add_argument("--bins", type=int, default=10, metavar="N", help="timesteps (default: 10)")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="rows at a time (default: 8)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (cuda if there is one)")
    parser.add_argument("--output", metavar="FILE", help="also write the numbers as JSON, with how they were measured")
    return parser.parse_args()


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    with exit_on_user_error():
        main()
