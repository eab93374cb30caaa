"""Measure a trained model with one command: it paints and captions, computes all numbers and makes a report.

    python evaluate/benchmark.py --checkpoint runs/quickstart --output runs/quickstart/evaluation
    accelerate launch evaluate/benchmark.py --checkpoint runs/coco --config configs/eval/coco.yaml

Without --config the model paints every held-out caption and captions every held-out image of the run's own data. With
--config it follows another protocol (configs/eval/). Every key of a protocol is also an option: --num-images 100,
--clip FOLDER, 'sweep.guidance_scale=[1,1.5,3]'. Processes share the work. To continue an interrupted benchmark, start
it again: the output folder keeps every image. The output folder has real/, reconstructed/ (the same images through the
autoencoder: the limit for any model), generated/, captions.jsonl, report.json, metrics.md and the page report.html.
docs/evaluation.md explains the numbers.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from transfusion_mot.config import RunConfig
from transfusion_mot.errors import UserError, exit_on_user_error
from transfusion_mot.evaluation.command import add_checkpoint, add_device, command_parser, run_command
from transfusion_mot.evaluation.protocol.config import (
    ProtocolConfig,
    described_keys,
    read_protocol,
    refuse_missing_paths,
)
from transfusion_mot.evaluation.report.content import Report, now, used_versions
from transfusion_mot.files import find_snapshot
from transfusion_mot.outputs import check_writable_folder
from transfusion_mot.path_options import PathOption, existing


def parse_arguments(arguments: Sequence[str]) -> tuple[argparse.Namespace, ProtocolConfig]:
    parser = command_parser(__doc__)
    parser.epilog = described_keys()
    add_checkpoint(parser)
    parser.add_argument(
        "--config",
        action=PathOption,
        check=existing("a protocol, such as configs/eval/coco.yaml"),
        metavar="FILE",
        help="protocol (default: the held-out documents of the run)",
    )
    parser.add_argument(
        "--output", metavar="FOLDER", help="folder of the results (default: evaluation/step-N of the run)"
    )
    add_device(parser)
    given, keys = parser.parse_known_args(arguments)
    if given.config is not None:
        keys = ["--config", given.config, *keys]
    protocol = read_protocol(keys)
    refuse_missing_paths(protocol.prompts, protocol.captions)
    return given, protocol


if __name__ == "__main__":
    # Before PyTorch loads, which takes seconds: --help, and mistakes in the options.
    with exit_on_user_error():
        parse_arguments(sys.argv[1:])

from accelerate import Accelerator

from transfusion_mot.data.mixture import open_documents, with_encoded
from transfusion_mot.evaluation.processes import open_processes
from transfusion_mot.evaluation.protocol.assignment import open_assignment, picture_data
from transfusion_mot.evaluation.protocol.prompts import captioned_hash, prompts_hash
from transfusion_mot.evaluation.report.page import write_report
from transfusion_mot.evaluation.report.published import own_row
from transfusion_mot.evaluation.scoring import load_networks
from transfusion_mot.pipeline import TransfusionPipeline
from transfusion_mot.sampling.benchmark import DISTANCE_TO_REFERENCE, Benchmark
from transfusion_mot.sampling.held_out_losses import code_metrics, codecs_of, diffusion_metrics, text_metrics
from transfusion_mot.sampling.painting import Painter, SamplerSettings, files_hash
from transfusion_mot.schedulers import make_sampling_scheduler, sampler_name
from transfusion_mot.training.checkpoint import read_run_config, run_config_file


def main() -> None:
    arguments, protocol = parse_arguments(sys.argv[1:])
    snapshot = find_snapshot(arguments.checkpoint)
    output = Path(arguments.output or default_output(snapshot))
    check_writable_folder(output, "output")
    try:
        evaluate(snapshot, protocol, output, arguments.device)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{output} keeps the finished images; the same command continues") from None


def evaluate(snapshot: Path, protocol: ProtocolConfig, output: Path, device_name: str | None) -> None:
    """Paint, caption and measure, and write the report.

    Args:
        snapshot: The model.
        protocol: What is painted and measured.
        output: Folder of the results.
        device_name: For `open_processes`.
    """
    processes, device = open_processes(device_name)
    # Codecs in float32, like in the sampler.
    accelerator = Accelerator(mixed_precision="no", cpu=device.type == "cpu")
    pipeline = load_pipeline(snapshot, protocol).to(device)
    networks = load_networks(protocol, device)
    config = run_config(protocol, snapshot)
    data = picture_data(config.data, pipeline.image_modality) if config is not None else None
    sources = None
    if config is not None and data is not None and (protocol.prompts.kind == "held_out" or protocol.loss_documents):
        codecs = codecs_of(pipeline, config, device)
        sources = with_encoded(open_documents(data, "held_out"), data, codecs, config.codecs, accelerator)
    assignment = open_assignment(protocol, sources, data, output)
    if protocol.cache_dir is None:
        protocol = replace(protocol, cache_dir=str(output / "features"))
    asked = (protocol.num_inference_steps, protocol.guidance_scale)
    steps, scale = pipeline.sampling_settings(pipeline.image_modality, *asked)
    sampling = SamplerSettings(
        steps,
        scale,
        protocol.guidance_interval,
        sampler_name(pipeline.scheduler),
        code_temperature=protocol.code_temperature,
        code_top_p=protocol.code_top_p,
        code_top_k=protocol.code_top_k,
    )
    painter = Painter(pipeline, files_hash(snapshot), processes, protocol.batch_size)
    benchmark = Benchmark(
        protocol, processes, painter, networks=networks, assignment=assignment, data=data, output=output
    )

    tried = benchmark.settings_to_try(sampling)
    captions = benchmark.paint(sampling)
    metrics = benchmark.measure(sampling, captions)
    notes: list[str] = []
    if sources is not None and config is not None and protocol.loss_documents:
        count = protocol.loss_documents
        losses = text_metrics(pipeline, config, sources, processes=processes, num_texts=count)
        of_run: dict[str, Any] = {"codecs": codecs, "accelerator": accelerator}
        losses += diffusion_metrics(pipeline, config, sources, num_images=count, **of_run)
        losses += code_metrics(pipeline, config, sources, num_media=count, **of_run)
        notes += [] if losses else ["There are no losses: the run's data have no held-out text or image."]
        metrics += losses
    sweep = benchmark.sweep(tried)
    pictures, score_name = benchmark.pictures(metrics)
    neighbours, reasons = benchmark.neighbours()
    if not processes.is_main_process:
        return
    notes += reasons
    shortened = sum(painter.shortened(prompt.text) != prompt.text for prompt in assignment.prompts)
    if shortened:
        limit = pipeline.config.max_prompt_tokens
        notes.append(f"{shortened} prompts are longer than the {limit} tokens that the model can read and were cut.")
    report = Report(
        title=protocol.name,
        command=shlex.join(["evaluate/benchmark.py", *sys.argv[1:]]),
        date=now(),
        settings={
            "checkpoint": str(snapshot),
            "checkpoint files": painter.checkpoint,
            "prompts painted": f"{len(assignment.prompts)}, {prompts_hash(assignment.prompts)}",
            "images captioned": f"{len(assignment.captioned)}, {captioned_hash(assignment.captioned)}",
            "device": str(device),
            "processes": processes.num_processes,
            **asdict(protocol),
            **painter.told(sampling),
        },
        versions=used_versions(),
        metrics=metrics,
        sweep=sweep,
        pictures=pictures,
        score_name=score_name,
        lower_is_better=score_name == DISTANCE_TO_REFERENCE,
        captions=benchmark.captioned_pictures(captions),
        neighbours=neighbours,
        notes=notes,
    )
    model = snapshot.parent.parent.name if config is not None else snapshot.name
    how = f"{protocol.name}, guidance {scale:g}, {len(assignment.prompts):,} images"
    print(write_report(report, output, own_row(model, how, metrics)))
    print(f"images, captions, report.html, report.json and metrics.md are in {output}")


def default_output(snapshot: Path) -> Path:
    """Folder beside the snapshots of a run.

    Raises:
        UserError: The checkpoint is not in a run's folder.
    """
    if snapshot.parent.name != "snapshots":
        raise UserError(f"'{snapshot}' is not in a run folder; give the folder of the results with --output")
    return snapshot.parent.parent / "evaluation" / snapshot.name


def load_pipeline(snapshot: Path, protocol: ProtocolConfig) -> TransfusionPipeline:
    """The model, with the scheduler of the protocol."""
    pipeline = TransfusionPipeline.from_pretrained(snapshot)
    pipeline.set_progress_bar_config(disable=True)
    if protocol.scheduler is not None:
        pipeline.scheduler = make_sampling_scheduler(pipeline.scheduler, protocol.scheduler)
    size, trained = protocol.image_size, pipeline.sizes.trained
    if size is not None and (size, size) not in trained:
        shown = ", ".join(f"{height} x {width}" for height, width in trained)
        other = next((height for height, width in trained if height == width), "null")
        raise UserError(
            f"the protocol '{protocol.name}' compares images of {size} x {size} pixels, but the model paints {shown}; "
            f"--image-size {other} measures it as another protocol"
        )
    return pipeline


def run_config(protocol: ProtocolConfig, snapshot: Path) -> RunConfig | None:
    """The configuration with the data of the run; None if there is none and none is needed."""
    given = protocol.prompts.run_config
    needed = given is not None or protocol.prompts.kind == "held_out" or protocol.loss_documents > 0
    if not needed and not run_config_file(snapshot).is_file():
        return None
    return read_run_config(snapshot, given, "--prompts.run_config")


if __name__ == "__main__":
    run_command(main)
