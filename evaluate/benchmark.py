"""Everything about a trained model on its held-out documents, in one command: image distance, CLIP score, captioning
metrics, and the losses at fixed timesteps and fixed noise.

    python evaluate/benchmark.py --checkpoint runs/quickstart --output runs/quickstart/evaluation

The model paints every held-out caption and captions every held-out image of the run's own data. The output folder
receives real/, reconstructed/ (the same images through the autoencoder: what a perfect model would reach) and
generated/, captions.jsonl, metrics.json and the table metrics.md; see docs/evaluation.md for what the numbers mean.
"""

import argparse
import itertools
import json
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from tqdm import tqdm

from transfusion_mot.config import RunConfig, parse_config
from transfusion_mot.data.images import to_pil, to_pixels
from transfusion_mot.data.mixture import Sources, open_documents, with_latents
from transfusion_mot.data.online import OnlineEncoder
from transfusion_mot.data.sources.base import CaptionedImages
from transfusion_mot.diffusion import Diffusion
from transfusion_mot.errors import UserError, exit_on_user_error
from transfusion_mot.evaluation.captioning import caption_metrics
from transfusion_mot.evaluation.clip_score import clip_scores, load_clip
from transfusion_mot.evaluation.features import image_distance, load_feature_network
from transfusion_mot.evaluation.images import pick_device
from transfusion_mot.evaluation.report import Metric, metrics_table, save_metrics
from transfusion_mot.pipeline import TransfusionPipeline
from transfusion_mot.training.checkpoint import find_snapshot
from transfusion_mot.training.validation import TIMESTEPS, Validation


def main() -> None:
    arguments = parse_arguments()
    snapshot = find_snapshot(arguments.checkpoint)
    config = run_config(arguments.config, snapshot)
    device = pick_device(arguments.device)
    pipeline = TransfusionPipeline.from_pretrained(snapshot).to(device)
    pipeline.set_progress_bar_config(disable=True)
    network = load_feature_network(arguments.features, device, arguments.inception_weights)
    clip = load_clip(arguments.clip, device) if arguments.clip is not None else None
    steps, scale = pipeline.sampling_settings(arguments.num_inference_steps, arguments.guidance_scale)
    sources = with_latents(
        open_documents(config.data, "held_out"), config.data, pipeline.autoencoder, config.autoencoder
    )
    documents = [(sources.sources[pool.source].documents, pool) for pool in sources.pools]
    items = [
        (images, pool.item(position))
        for images, pool in documents
        if isinstance(images, CaptionedImages)
        for position in range(pool.length)
    ][: arguments.num_images]
    if len(items) < 2:
        raise UserError(
            f"{len(items)} captioned images are held out, and 2 are needed; of a source with 'use: split' the share "
            f"data.held_out_fraction ({config.data.held_out_fraction}), of one with 'use: train' nothing, of one with "
            "'use: held_out' everything: raise the fraction, change 'use', or give other data by --config"
        )
    output = Path(arguments.output or snapshot.parent.parent / "evaluation" / snapshot.name)

    references = [images.captions(item) for images, item in items]
    captions = [first for first, *_ in references]
    real = [Image.fromarray(images.image(item)) for images, item in items]
    reconstructed: list[Image.Image] = []
    generated: list[Image.Image] = []
    candidates: list[str] = []
    with tqdm(total=len(items), desc="painting and captioning", unit="image") as bar:
        for start in range(0, len(items), arguments.batch_size):
            batch = slice(start, start + arguments.batch_size)
            # Of one bucket at a time; those of one stand together.
            for _, same_size in itertools.groupby(real[batch], key=lambda image: image.size):
                pixels = to_pixels(np.stack([np.asarray(image) for image in same_size])).to(device)
                latents, _ = pipeline.autoencoder.encode(pixels)
                reconstructed += to_pil(pipeline.autoencoder.decode(latents))
            generators = [torch.Generator().manual_seed(arguments.seed + start + i) for i in range(len(real[batch]))]
            generated += pipeline(captions[batch], steps, scale, generator=generators).images
            candidates += pipeline.caption(real[batch])
            bar.update(len(real[batch]))
    for name, images in (("real", real), ("reconstructed", reconstructed), ("generated", generated)):
        save_images(images, captions, output / name)
    lines = [{"file_name": f"{index:05d}.png", "caption": caption} for index, caption in enumerate(candidates)]
    (output / "captions.jsonl").write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))

    sampled = {
        "steps": steps,
        "guidance": scale,
        "scheduler": type(pipeline.scheduler).__name__,
        "seed": arguments.seed,
    }
    metrics = with_protocol(image_distance(real, generated, network), "generated", sampled)
    metrics += with_protocol(image_distance(real, reconstructed, network), "reconstructed", {})
    if clip is not None:
        metrics += with_protocol(clip_scores(generated, captions, clip), "generated", sampled)
        metrics += with_protocol(clip_scores(real, captions, clip), "real", {})
    most = max(map(len, references))
    decoded = {"images": len(items), "references": f"{'up to ' * (most > 1)}{most} an image", "decoding": "greedy"}
    scores = caption_metrics(candidates, references)
    metrics += [Metric(name, value, decoded) for name, value in scores.items()]
    metrics += held_out_losses(pipeline, sources, config)
    save_metrics(metrics, output / "metrics.json", sys.argv)
    table = metrics_table(metrics)
    (output / "metrics.md").write_text(table + "\n")
    print(table)
    print(f"images, captions, metrics.json and metrics.md are in {output}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, metavar="FOLDER", help="a run folder of train.py, or a snapshot")
    parser.add_argument("--config", metavar="FILE", help="configuration that names the data (default: the run's)")
    parser.add_argument("--output", metavar="FOLDER", help="where results go (default: evaluation/ in the run folder)")
    parser.add_argument("--num-images", type=int, metavar="N", help="held-out documents to use (default: all)")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="images at a time (default: 32)")
    parser.add_argument("--num-inference-steps", type=int, metavar="N", help="reverse steps (default: the snapshot's)")
    parser.add_argument("--guidance-scale", type=float, metavar="X", help="1 is off (default: the snapshot's)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="image i has seed N + i (default: 0)")
    parser.add_argument("--features", choices=["auto", "inception", "efficientnet"], default="auto")
    parser.add_argument("--inception-weights", metavar="FILE", help="local path of inception-2015-12-05.pt")
    parser.add_argument("--clip", metavar="NAME_OR_FOLDER", help="CLIP model for a CLIP score (default: none)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    return parser.parse_args()


def run_config(path: str | None, snapshot: Path) -> RunConfig:
    """The configuration that says what the held-out documents are."""
    file = Path(path) if path is not None else snapshot.parent.parent / "config.yaml"
    if not file.is_file():
        raise UserError(f"there is no configuration {file}; give the one that the model was trained with by --config")
    return parse_config(RunConfig, ["--config", str(file)], "")


def save_images(images: list[Image.Image], captions: list[str], folder: Path) -> None:
    """Write images and metadata.jsonl, an image folder as the other scripts read it."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for index, (image, caption) in enumerate(zip(images, captions, strict=True)):
        image.save(folder / f"{index:05d}.png")
        lines.append(json.dumps({"file_name": f"{index:05d}.png", "text": caption}, ensure_ascii=False) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))


def with_protocol(metrics: list[Metric], images: str, protocol: dict[str, Any]) -> list[Metric]:
    """The same numbers, saying which images they are of."""
    return [Metric(f"{metric.name} ({images})", metric.value, metric.protocol | protocol) for metric in metrics]


def held_out_losses(pipeline: TransfusionPipeline, sources: Sources, config: RunConfig) -> list[Metric]:
    """Text loss in nats per token, diffusion loss as squared error per element."""
    diffusion = Diffusion(pipeline.scheduler, config.diffusion.timestep_distribution)
    encoder = OnlineEncoder(pipeline.autoencoder, config.autoencoder.batch_size)
    validation = Validation(sources, pipeline.text_tokenizer, config, diffusion, encoder, rows_at_once=8)
    # One process, in float32: what the sampler computes with.
    losses = validation.losses(
        pipeline.transformer, Accelerator(mixed_precision="no", cpu=pipeline.device.type == "cpu")
    )
    protocol = {"rows": validation.num_rows, "prediction": diffusion.prediction_type}
    at = f"mean of t = {', '.join(map(str, TIMESTEPS))}"
    return [
        Metric("text loss (captions and texts alone)", losses["text_loss"], {**protocol, "unit": "nats per token"}),
        Metric("text loss (caption of an image)", losses["caption_loss"], {**protocol, "unit": "nats per token"}),
        Metric("diffusion loss", losses["diffusion_loss"], {**protocol, "unit": "squared error per element", "at": at}),
    ]


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    logging.getLogger("transfusion_mot").setLevel(logging.INFO)
    with exit_on_user_error():
        main()
