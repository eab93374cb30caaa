"""Snapshots of a run: diffusers pipelines with averaged weights, or adapters alone."""

from pathlib import Path
from typing import cast

import torch
from accelerate import PartialState

from transfusion_mot.codecs.audio_codes import AudioCodes
from transfusion_mot.codecs.autoencoder_kl import Autoencoder
from transfusion_mot.codecs.base import Codec
from transfusion_mot.codecs.image_codes import ImageCodes
from transfusion_mot.config import RunConfig, to_dict
from transfusion_mot.diffusion import Diffusion
from transfusion_mot.files import ADAPTER_CONFIG, find_snapshot
from transfusion_mot.models.lora import digests, fingerprint
from transfusion_mot.models.transfusion import TransfusionMoT, base_name, is_of_adapter
from transfusion_mot.pipeline import TransfusionPipeline
from transfusion_mot.reporting.model_card import model_card
from transfusion_mot.run.data import RunData
from transfusion_mot.run.examples import examples_of
from transfusion_mot.sampling.held_out_items import captions_of
from transfusion_mot.sampling.lora import AdapterInfo, save_adapter, sizes_of
from transfusion_mot.sampling.snapshot import MODEL_CARD
from transfusion_mot.training.checkpoint import atomic_folder
from transfusion_mot.training.ema import EMA
from transfusion_mot.training.log import RunLog
from transfusion_mot.training.metrics import METRICS_FILE, read_metrics
from transfusion_mot.training.plot import plot_runs


def make_pipeline(model: TransfusionMoT, config: RunConfig, data: RunData) -> TransfusionPipeline:
    """The pipeline that samples and is saved as a snapshot. It takes the first image codec and the first audio
    codec."""
    first = {codec.medium: name for name, codec in reversed(data.codecs.items())}
    images, audio = first.get(Autoencoder.medium), first.get(AudioCodes.medium)
    return TransfusionPipeline(
        transformer=model,
        scheduler=Diffusion.from_config(config.diffusion).scheduler,
        tokenizer=data.tokenizer.hf,
        vae=None if images is None else _model_in(data.codecs[images]),
        audio_tokenizer=None if audio is None else _model_in(data.codecs[audio]),
        image_size=config.data.image_size,
        max_prompt_tokens=config.data.max_caption_tokens,
        num_inference_steps=config.diffusion.num_inference_steps,
        guidance_scale=config.diffusion.guidance_scale,
        image_sizes={"trained": [list(size) for size in config.data.image_sizes], "fit": config.data.image_fit},
        image_modality=images,
        trained_on_edits=config.data.has_edits,
        audio_modality=audio,
        max_audio_seconds=None if audio is None else config.data.max_audio_seconds,
        examples=None if images is None else examples_of(data, images),
    )


def _model_in(codec: Codec) -> torch.nn.Module:
    """The model of a codec that `save_pretrained` of a pipeline saves."""
    return codec.vae if isinstance(codec, Autoencoder) else cast(ImageCodes | AudioCodes, codec).model


def averaged_model(model: TransfusionMoT, ema: EMA, *, is_main_process: bool) -> TransfusionMoT | None:
    """A new CPU model with the averaged weights and without adapters; on the main process only."""
    weights = ema.gathered(model, is_main_process)
    if not is_main_process:
        return None
    with torch.device("meta"):
        averaged = TransfusionMoT.from_config(dict(model.config))
    own = {base_name(name): weight for name, weight in weights.items() if not is_of_adapter(name)}
    averaged.load_state_dict(own, assign=True)
    return averaged


def describe_adapter(model: TransfusionMoT, ema: EMA, config: RunConfig, data: RunData) -> AdapterInfo | None:
    """Description of the run's adapters and their base model; None without adapters. Called by all processes.

    The base model is the snapshot of `init_from`; a run without `init_from` saves its own in `base`.
    """
    if config.lora is None:
        return None
    run, is_main_process = Path(config.output_dir), PartialState().is_main_process
    base = "../../base"
    towers = config.model.towers.values()
    if config.init_from is not None and not any(tower.pretrained or tower.copy_of for tower in towers):
        base = config.init_from
        if earlier := sorted((run / "snapshots").glob(f"step-*/{ADAPTER_CONFIG}")):
            # A run folder may have newer snapshots by now.
            base = AdapterInfo.read(earlier[-1].parent).base_model_name_or_path
        elif Path(base).exists():
            base = str(find_snapshot(base))
    elif not (run / "base").exists():
        below = averaged_model(model, ema, is_main_process=is_main_process)
        if below is not None:
            with atomic_folder(run / "base") as folder:
                make_pipeline(below, config, data).save_pretrained(folder)
    written_over = {base_name(name) for name in ema.weights if not is_of_adapter(name)}
    below_it = fingerprint(digests(model), written_over)
    return AdapterInfo(to_dict(config.lora), base, sizes_of(model), below_it, config.data.has_edits)


def _example_prompt(config: RunConfig, data: RunData) -> str:
    """An example prompt for a model of the run."""
    if config.training.sample_prompts:
        return config.training.sample_prompts[0]
    return next(iter(captions_of(data.held_out, next(iter(data.codecs)), 1)), "a red apple")


def save_snapshot(
    model: TransfusionMoT,
    ema: EMA,
    config: RunConfig,
    data: RunData,
    *,
    adapter: AdapterInfo | None,
    log: RunLog,
    step: int,
) -> None:
    """Write a snapshot after `step` steps, with a model card, and draw the losses so far; called by all processes.

    Args:
        model: The model.
        ema: Its averaged weights.
        config: The run's configuration.
        data: The run's data.
        adapter: Description of the adapters, or None. A snapshot of adapters does not contain their base model.
        log: The run's log, written up to `step`.
        step: Steps done.
    """
    is_main_process = PartialState().is_main_process
    averaged, weights = None, {}
    if adapter is None:
        averaged = averaged_model(model, ema, is_main_process=is_main_process)
    else:
        weights = ema.gathered(model, is_main_process, with_frozen=False)
    if not is_main_process:
        return
    run = Path(config.output_dir)
    card = model_card(
        config,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        sources=data.sources,
        seen=log.seen,
        lines=read_metrics(run / METRICS_FILE),
        step=step,
        base=None if adapter is None else adapter.base_model_name_or_path,
        prompt=_example_prompt(config, data),
        media={codec.medium for codec in data.codecs.values()},
    )
    with atomic_folder(run / "snapshots" / f"step-{step:07d}") as folder:
        if adapter is not None:
            save_adapter(folder, weights, adapter)
            (folder / MODEL_CARD).write_text(card)
        else:
            snapshot = make_pipeline(cast(TransfusionMoT, averaged), config, data)
            snapshot.model_card = card
            snapshot.save_pretrained(folder)
    plot_runs({run.name: run / METRICS_FILE}, run / "loss.png")
