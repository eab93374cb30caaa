"""Everything about a trained model in one command: it paints and captions, then all numbers and a report are made.

    python evaluate/benchmark.py --checkpoint runs/quickstart --output runs/quickstart/evaluation
    accelerate launch evaluate/benchmark.py --checkpoint runs/coco --config configs/eval/coco.yaml

Without --config the model paints every held-out caption and captions every held-out image of the run's own data; a
configuration describes another protocol (configs/eval/). Every key of it is also an option: --num-images 100,
--clip FOLDER, 'sweep.guidance_scale=[1,1.5,3]'. Processes share the work. A benchmark that was killed goes on when it
is started again: the output folder keeps every image. It receives real/, reconstructed/ (the same images through the
autoencoder: what a perfect model would reach), generated/, captions.jsonl, report.json, metrics.md and the page
report.html; see docs/evaluation.md for what the numbers mean.
"""

import argparse
import itertools
import logging
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from accelerate import Accelerator, PartialState
from diffusers import SchedulerMixin

from transfusion_mot.config import RunConfig, parse_config
from transfusion_mot.data.mixture import Sources, open_documents, with_latents
from transfusion_mot.data.online import OnlineEncoder
from transfusion_mot.diffusion import Diffusion, make_sampling_scheduler
from transfusion_mot.errors import UserError, exit_on_user_error
from transfusion_mot.evaluation.caption_metrics import caption_metrics
from transfusion_mot.evaluation.clip_score import clip_scores
from transfusion_mot.evaluation.images import default_num_workers
from transfusion_mot.evaluation.memorisation import nearest_captions, nearest_training_images
from transfusion_mot.evaluation.page import write_report
from transfusion_mot.evaluation.processes import open_processes
from transfusion_mot.evaluation.prompts import Prompt, captioned_hash, prompts_hash, write_geneval_metadata
from transfusion_mot.evaluation.protocol import ProtocolConfig, read_protocol
from transfusion_mot.evaluation.published import own_row
from transfusion_mot.evaluation.report import Metric, Neighbour, Picture, Report, SweepPoint, now, used_versions
from transfusion_mot.evaluation.scoring import Networks, distances, load_networks, named, normalised_features
from transfusion_mot.evaluation.work import Work, open_work
from transfusion_mot.pipeline import TransfusionPipeline
from transfusion_mot.sampling.painting import Painter, SamplerSettings, files_hash
from transfusion_mot.training.checkpoint import find_snapshot
from transfusion_mot.training.validation import TIMESTEPS, Validation

_DISTANCE_TO_REFERENCE = "feature distance to its real image"


@dataclass(frozen=True)
class Setup:
    """What all parts of a benchmark share."""

    protocol: ProtocolConfig
    processes: PartialState
    painter: Painter
    networks: Networks
    work: Work
    output: Path


def main() -> None:
    arguments, protocol = parse_arguments()
    processes, device = open_processes(arguments.device)
    accelerator = Accelerator(mixed_precision="no", cpu=device.type == "cpu")
    snapshot = find_snapshot(arguments.checkpoint)
    output = Path(arguments.output or snapshot.parent.parent / "evaluation" / snapshot.name)
    pipeline = load_pipeline(snapshot, protocol).to(device)
    networks = load_networks(protocol, device)
    config = run_config(protocol, snapshot)
    sources = None
    if config is not None and (protocol.prompts.kind == "held_out" or protocol.losses):
        documents = open_documents(config.data, "held_out")
        sources = with_latents(documents, config.data, pipeline.autoencoder, config.autoencoder, accelerator)
    work = open_work(protocol, sources, config.data if config is not None else None, output)
    if protocol.cache_dir is None:
        protocol = replace(protocol, cache_dir=str(output / "features"))
    painter = Painter(pipeline, files_hash(snapshot), processes, protocol.batch_size)
    setup = Setup(protocol, processes, painter, networks, work, output)

    steps, scale = pipeline.sampling_settings(protocol.num_inference_steps, protocol.guidance_scale)
    sampling = SamplerSettings(steps, scale, type(pipeline.scheduler).__name__)
    if work.held_out is not None:
        painter.copy(work.held_out.real, output / "real", work.held_out.make)
    if protocol.reconstructions and work.own:
        painter.reconstruct(work.own, protocol.image_size, output / "reconstructed")
    painter.paint(work.prompts, sampling, output / "generated")
    if work.geneval and processes.is_main_process:
        write_geneval_metadata(work.geneval, output / "generated")
    maximum = protocol.captions.max_new_tokens
    candidates = painter.caption(work.captioned, maximum, output) if work.captioned else []

    copied = copied_captions(setup, config)
    metrics = painted_metrics(setup, work.prompts, sampling, output / "generated") + real_metrics(setup)
    if candidates and processes.is_main_process:
        metrics += captioning_metrics(setup, candidates)
    if copied and processes.is_main_process:
        found = captioning_metrics(setup, copied)
        metrics += [replace(metric, name=f"{metric.name} (copied from the nearest training image)") for metric in found]
    if sources is not None and config is not None and protocol.losses:
        metrics += held_out_losses(pipeline, sources, config, accelerator)
    sweep = swept(setup, sampling)
    pictures, score_name = scored_pictures(setup, metrics)
    neighbours, notes = training_neighbours(setup, config)
    if not processes.is_main_process:
        return
    shortened = sum(painter.shortened(prompt.text) != prompt.text for prompt in work.prompts)
    if shortened:
        limit = pipeline.config.max_prompt_tokens
        notes.append(f"{shortened} prompts are longer than the {limit} tokens that the model knows and are cut there.")
    report = Report(
        title=protocol.name,
        command=shlex.join(["evaluate/benchmark.py", *sys.argv[1:]]),
        date=now(),
        settings={
            "checkpoint": str(snapshot),
            "checkpoint files": painter.checkpoint,
            "prompts painted": f"{len(work.prompts)}, {prompts_hash(work.prompts)}",
            "images captioned": f"{len(work.captioned)}, {captioned_hash(work.captioned)}",
            "device": str(device),
            "processes": processes.num_processes,
            **asdict(protocol),
            **vars(sampling),
        },
        versions=used_versions(),
        metrics=metrics,
        sweep=sweep,
        pictures=pictures,
        score_name=score_name,
        lower_is_better=score_name == _DISTANCE_TO_REFERENCE,
        captions=caption_pictures(setup, candidates),
        neighbours=neighbours,
        notes=notes,
    )
    model = snapshot.parent.parent.name if config is not None else snapshot.name
    how = f"{protocol.name}, guidance {scale:g}, {len(work.prompts):,} images"
    print(write_report(report, output, own_row(model, how, metrics)))
    print(f"images, captions, report.html, report.json and metrics.md are in {output}")


def parse_arguments() -> tuple[argparse.Namespace, ProtocolConfig]:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="Keys of a protocol with their meaning: transfusion_mot/evaluation/protocol.py, docs/evaluation.md.",
    )
    parser.add_argument("--checkpoint", required=True, metavar="FOLDER", help="a run folder of train.py, or a snapshot")
    parser.add_argument("--config", metavar="FILE", help="protocol (default: the held-out documents of the run)")
    parser.add_argument("--output", metavar="FOLDER", help="where results go (default: evaluation/ in the run folder)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    arguments, keys = parser.parse_known_args()
    if arguments.config is not None:
        keys = ["--config", arguments.config, *keys]
    return arguments, read_protocol(keys)


def load_pipeline(snapshot: Path, protocol: ProtocolConfig) -> TransfusionPipeline:
    """The model, with the scheduler that the protocol asks for."""
    pipeline = TransfusionPipeline.from_pretrained(snapshot)
    pipeline.set_progress_bar_config(disable=True)
    if protocol.scheduler is not None:
        pipeline.scheduler = make_sampling_scheduler(pipeline.scheduler, protocol.scheduler)
    size = pipeline.config.image_size
    if protocol.image_size not in (None, size):
        raise UserError(
            f"the protocol '{protocol.name}' compares images of {protocol.image_size} pixels and the model paints "
            f"{size}; --image-size {size} measures it at its own size, as another protocol"
        )
    return pipeline


def run_config(protocol: ProtocolConfig, snapshot: Path) -> RunConfig | None:
    """The configuration that says what the data of the run are; None if there is none and none is needed."""
    given = protocol.prompts.run_config
    file = Path(given) if given is not None else snapshot.parent.parent / "config.yaml"
    if file.is_file():
        return parse_config(RunConfig, ["--config", str(file)], "")
    if given is not None or protocol.prompts.kind == "held_out" or protocol.losses:
        raise UserError(
            f"there is no configuration {file}; give the one that the model was trained with by --prompts.run_config"
        )
    return None


def painted_metrics(setup: Setup, prompts: Sequence[Prompt], sampling: SamplerSettings, folder: Path) -> list[Metric]:
    """Image distances and CLIP score of painted images."""
    painted = [folder / prompt.file_name for prompt in prompts]
    protocol = {
        "steps": sampling.num_inference_steps,
        "guidance": sampling.guidance_scale,
        "scheduler": sampling.scheduler,
        "prompts": prompts_hash(prompts),
    }
    metrics = []
    if setup.work.references is not None:
        metrics += distances(setup.work.references, painted, setup.networks, setup.protocol, setup.processes)
    metrics += clip_metrics(setup, painted, prompts)
    return named(metrics, "generated", protocol)


def real_metrics(setup: Setup) -> list[Metric]:
    """What the best possible model would reach: distances of reconstructions, CLIP score of the real images."""
    work, metrics = setup.work, []
    if setup.protocol.reconstructions and work.own and work.references is not None:
        reconstructed = [setup.output / "reconstructed" / prompt.file_name for prompt in work.own]
        found = distances(work.references, reconstructed, setup.networks, setup.protocol, setup.processes)
        metrics += named(found, "reconstructed", {"images": prompts_hash(work.own)})
    if work.own:
        images = [prompt.image for prompt in work.own if prompt.image is not None]
        metrics += named(clip_metrics(setup, images, work.own), "real", {"prompts": prompts_hash(work.own)})
    return metrics


def clip_metrics(setup: Setup, images: Sequence[Path], prompts: Sequence[Prompt]) -> list[Metric]:
    """CLIP score of images against their prompts, if the protocol has one."""
    if setup.networks.clip is None:
        return []
    texts = [prompt.text for prompt in prompts]
    workers = default_num_workers()
    return clip_scores(images, texts, setup.networks.clip, num_workers=workers, processes=setup.processes)


def captioning_metrics(setup: Setup, candidates: Sequence[str]) -> list[Metric]:
    """Scores of captions against the references."""
    captioned = setup.work.captioned
    most = max(len(item.captions) for item in captioned)
    protocol = {
        "images": len(captioned),
        "references": f"{'up to ' * (most > 1)}{most} an image",
        "decoding": "greedy",
        "captioned images": captioned_hash(captioned),
    }
    references = [item.captions for item in captioned]
    metrics = caption_metrics(candidates, references, setup.networks.sentences)
    return [replace(metric, protocol=metric.protocol | protocol) for metric in metrics]


def copied_captions(setup: Setup, config: RunConfig | None) -> list[str]:
    """The caption of the training image that is nearest to each captioned one: what a model has to beat."""
    of_own_data = setup.work.held_out is not None and bool(setup.work.captioned)
    if not setup.protocol.training_images or config is None or not of_own_data:
        return []
    return nearest_captions(
        [item.image for item in setup.work.captioned],
        config.data,
        setup.protocol.training_images,
        setup.networks.features[0],
        setup.painter.pipeline.config.image_size,
        setup.processes,
    )


def held_out_losses(
    pipeline: TransfusionPipeline, sources: Sources, config: RunConfig, accelerator: Accelerator
) -> list[Metric]:
    """Text loss in nats per token, diffusion loss as squared error per element."""
    diffusion = Diffusion(pipeline.scheduler, config.diffusion.timestep_distribution)
    encoder = OnlineEncoder(pipeline.autoencoder, config.autoencoder.batch_size)
    validation = Validation(sources, pipeline.text_tokenizer, config, diffusion, encoder, rows_at_once=8)
    # In float32: what the sampler computes with.
    losses = validation.losses(pipeline.transformer, accelerator)
    protocol = {"rows": validation.num_rows, "prediction": diffusion.prediction_type}
    at = f"mean of t = {', '.join(map(str, TIMESTEPS))}"
    metrics = [
        Metric("text loss (captions and texts alone)", losses["text_loss"], {**protocol, "unit": "nats per token"}),
        Metric("diffusion loss", losses["diffusion_loss"], {**protocol, "unit": "squared error per element", "at": at}),
    ]
    # There is none without captioned images.
    if "caption_loss" in losses:
        caption = Metric(
            "text loss (caption of an image)", losses["caption_loss"], {**protocol, "unit": "nats per token"}
        )
        metrics.insert(1, caption)
    return metrics


def swept(setup: Setup, sampling: SamplerSettings) -> list[SweepPoint]:
    """Paint and measure with every setting that the protocol wants to be tried; none if it names none."""
    sweep, pipeline = setup.protocol.sweep, setup.painter.pipeline
    if not (sweep.guidance_scale or sweep.num_inference_steps or sweep.scheduler):
        return []
    prompts = setup.work.prompts[: sweep.num_images]
    own_scheduler: SchedulerMixin = pipeline.scheduler
    points = []
    for scheduler, steps, scale in itertools.product(
        sweep.scheduler or [sampling.scheduler],
        sweep.num_inference_steps or [sampling.num_inference_steps],
        sweep.guidance_scale or [sampling.guidance_scale],
    ):
        settings = SamplerSettings(steps, float(scale), scheduler)
        name = f"{scheduler}-{steps}-steps-guidance-{scale:g}"
        if scheduler != type(own_scheduler).__name__:
            pipeline.scheduler = make_sampling_scheduler(own_scheduler, scheduler)
        pipeline.sampling_settings(steps, scale)
        setup.painter.paint(prompts, settings, setup.output / "sweep" / name)
        pipeline.scheduler = own_scheduler
        metrics = painted_metrics(setup, prompts, settings, setup.output / "sweep" / name)
        # Of a sweep only the numbers are kept, not a score of every image.
        points.append(SweepPoint(vars(settings), [replace(metric, scores=None) for metric in metrics]))
    return points


def scored_pictures(setup: Setup, metrics: Sequence[Metric]) -> tuple[list[Picture], str]:
    """Painted images with a score each => them and its name: CLIP's cosine, or the distance to their real images."""
    prompts = setup.work.prompts
    paths = [setup.output / "generated" / prompt.file_name for prompt in prompts]
    cosine = next((metric for metric in metrics if metric.name == "CLIP cosine (generated)"), None)
    scores: list[float | None] = [None] * len(prompts)
    name = ""
    if setup.networks.clip is not None:
        if cosine is not None and cosine.scores is not None:
            scores, name = list(cosine.scores), "CLIP cosine"
    elif prompts[0].image is not None:
        size, network = setup.painter.pipeline.config.image_size, setup.networks.features[0]
        real = [prompt.image for prompt in prompts if prompt.image is not None]
        ours, theirs = (normalised_features(images, network, size, setup.processes) for images in (paths, real))
        scores, name = (1 - np.einsum("nd,nd->n", ours, theirs)).tolist(), _DISTANCE_TO_REFERENCE
    pictures = [
        Picture(
            str(path.relative_to(setup.output)),
            prompt.text,
            score,
            None if prompt.image is None else _below(prompt.image, setup.output),
        )
        for path, prompt, score in zip(paths, prompts, scores, strict=True)
    ]
    return pictures, name


def caption_pictures(setup: Setup, candidates: Sequence[str]) -> list[Picture]:
    """Captioned images with what the model says and what people wrote."""
    return [
        Picture(_below(item.image, setup.output), caption, None, None, item.captions)
        for item, caption in zip(setup.work.captioned, candidates, strict=True)
    ]


def training_neighbours(setup: Setup, config: RunConfig | None) -> tuple[list[Neighbour], list[str]]:
    """The painted images that are nearest to a training image, and why there are none."""
    if not setup.protocol.training_images:
        return [], []
    if config is None:
        return [], ["Nearest training images are not shown: the checkpoint lies in no run folder that names its data."]
    try:
        found = nearest_training_images(
            setup.work.prompts,
            setup.output / "generated",
            config.data,
            setup.protocol.training_images,
            setup.networks.features[0],
            setup.painter.pipeline.config.image_size,
            setup.processes,
            setup.output,
        )
    except UserError as error:
        return [], [f"Nearest training images are not shown: {error}."]
    return found, []


def _below(path: Path, folder: Path) -> str:
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path.resolve())


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    logging.getLogger("transfusion_mot").setLevel(logging.INFO)
    with exit_on_user_error():
        main()
