"""Snapshots of a run: diffusers pipelines with averaged weights."""

from pathlib import Path
from typing import cast

import torch

from transfusion_mot.codecs.autoencoder_kl import Autoencoder
from transfusion_mot.codecs.image_codes import ImageCodes
from transfusion_mot.config import RunConfig
from transfusion_mot.diffusion import Diffusion
from transfusion_mot.models.transfusion import TransfusionMoT
from transfusion_mot.pipeline import TransfusionPipeline
from transfusion_mot.reporting.model_card import model_card
from transfusion_mot.run.data import RunData
from transfusion_mot.sampling.previews import captions_of
from transfusion_mot.training.checkpoint import written_aside
from transfusion_mot.training.ema import EMA
from transfusion_mot.training.log import RunLog
from transfusion_mot.training.metrics import METRICS_FILE, read_metrics
from transfusion_mot.training.plot import plot_runs


def make_pipeline(model: TransfusionMoT, config: RunConfig, data: RunData) -> TransfusionPipeline:
    """What samples, and what a snapshot is. Its pictures are of the first modality in `codecs`."""
    name, codec = next(iter(data.codecs.items()))
    return TransfusionPipeline(
        transformer=model,
        vae=codec.vae if isinstance(codec, Autoencoder) else cast(ImageCodes, codec).model,
        scheduler=Diffusion.from_config(config.diffusion).scheduler,
        tokenizer=data.tokenizer.hf,
        image_size=config.data.image_size,
        max_prompt_tokens=config.data.max_caption_tokens,
        num_inference_steps=config.diffusion.num_inference_steps,
        guidance_scale=config.diffusion.guidance_scale,
        image_sizes={"trained": [list(size) for size in config.data.image_sizes], "fit": config.data.image_fit},
        image_modality=name,
        trained_on_edits=config.data.has_edits,
    )


def averaged_model(model: TransfusionMoT, ema: EMA, *, is_main_process: bool) -> TransfusionMoT | None:
    """A model of its own with the averaged weights, whole and on the CPU; on the main process alone."""
    weights = ema.gathered(model, is_main_process)
    if not is_main_process:
        return None
    with torch.device("meta"):
        averaged = TransfusionMoT.from_config(dict(model.config))
    averaged.load_state_dict(weights, assign=True)
    return averaged


def save_snapshot(model: TransfusionMoT, config: RunConfig, data: RunData, *, log: RunLog, step: int) -> None:
    """Write a snapshot after `step` steps, with a model card, and draw the losses so far; on the main process.

    Args:
        model: With averaged weights.
        config: Of the run.
        data: Of the run.
        log: Of the run; everything up to `step` is written.
        step: Steps done.
    """
    run = Path(config.output_dir)
    with written_aside(run / "snapshots" / f"step-{step:07d}") as folder:
        snapshot = make_pipeline(model, config, data)
        modality = snapshot.image_modality
        snapshot.model_card = model_card(
            config,
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            sources=data.sources,
            seen=log.seen,
            lines=read_metrics(run / METRICS_FILE),
            step=step,
            prompt=[*(config.training.sample_prompts or []), *captions_of(data.held_out, modality, 1), "a red apple"][
                0
            ],
        )
        snapshot.save_pretrained(folder)
    plot_runs({run.name: run / METRICS_FILE}, run / "loss.png")
