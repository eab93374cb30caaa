"""sample.py after its options are read: make the results, shared with other processes, and show them."""

import argparse
import hashlib
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from PIL import Image
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from transfusion_mot.cli.items import Maker, plan, read_prompts
from transfusion_mot.cli.loading import load_pipeline
from transfusion_mot.cli.makers import captioner, document_writer, painter, writer
from transfusion_mot.cli.options import EDIT, PAINT, SPEAK, TRANSCRIBE
from transfusion_mot.cli.outputs import ResultFolder
from transfusion_mot.cli.speech import speaker, transcriber
from transfusion_mot.data.audio import decode_audio
from transfusion_mot.data.images import grid
from transfusion_mot.errors import UserError
from transfusion_mot.outputs import check_writable_file, check_writable_folder
from transfusion_mot.pipeline import TransfusionPipeline

GRID_IMAGES = 64
GRID_COLUMNS = 8
# At the end every process waits for the slowest one.
TIMEOUT = timedelta(hours=24)

# For each task: its maker, its metadata file, and a word for the progress bar.
TASKS: dict[str, tuple[Callable[..., tuple[Maker, dict[str, Any]]], str, str]] = {
    PAINT: (painter, "metadata.jsonl", "painting"),
    EDIT: (painter, "metadata.jsonl", "editing"),
    "caption": (captioner, "captions.jsonl", "captioning"),
    "text": (writer, "texts.jsonl", "writing"),
    "auto": (document_writer, "documents.jsonl", "writing"),
    SPEAK: (speaker, "metadata.jsonl", "speaking"),
    TRANSCRIBE: (transcriber, "transcripts.jsonl", "transcribing"),
}


def sample(
    pipeline: TransfusionPipeline, prompts: list[str], arguments: argparse.Namespace, state: PartialState
) -> None:
    """Make all requested results, shared with the other processes."""
    task = arguments.task
    make_maker, file_name, verb = TASKS[task]
    # All checks come before the first result, so that mistakes are found at once.
    if arguments.speech or task == TRANSCRIBE:
        for path in prompts:
            pipeline.check_audio(decode_audio(path), f"audio clip '{path}'")
    elif not files_of(arguments):
        pipeline.check_prompts(prompts)
    make, settings = make_maker(pipeline, arguments)
    count = len(prompts) * arguments.num_images
    folder = None
    if arguments.output is not None:
        digest = hashlib.sha256("\n".join(prompts).encode()).hexdigest()
        command = {
            "task": task,
            "prompts": f"{len(prompts)} with SHA-256 {digest[:16]}",
            "checkpoint": str(pipeline.name_or_path),
            "dtype": str(pipeline.transformer.dtype).removeprefix("torch."),
            **{name: getattr(arguments, name) for name in ("num_images", "seed", "strip", "gif")},
            **settings,
        }
        folder = ResultFolder(arguments.output, command, file_name, count, state)
    first = 0 if folder is None else folder.first
    items = plan(prompts, arguments.num_images, arguments.seed, first, are_files=bool(files_of(arguments)))
    missing = range(count) if folder is None else folder.missing()
    lines: list[dict[str, Any]] = []
    # Warnings stand in lines of their own, above the bar.
    with logging_redirect_tqdm(), tqdm(total=len(missing), desc=verb, disable=not state.is_main_process) as bar:
        for start in range(0, len(missing), arguments.batch_size):
            batch = missing[start : start + arguments.batch_size]
            made = make([items[index] for index in batch], folder)
            if folder is None:
                lines += made
            else:
                folder.add(dict(zip(batch, made, strict=True)))
            bar.update(len(batch))
    if folder is not None:
        folder.finish()
    if state.is_main_process:
        show(task, lines if folder is None else folder.read(), folder)


def show(task: str, lines: Iterable[dict[str, Any]], folder: ResultFolder | None) -> None:
    """Print what was written, and put the first pictures side by side."""
    count = 0
    shown: list[dict[str, Any]] = []
    for line in lines:
        count += 1
        if task in (PAINT, EDIT):
            shown += [line] if len(shown) < GRID_IMAGES else []
        elif task in ("caption", TRANSCRIBE):
            print(f"{line['file_name']}: {line['text']}")
        elif task == SPEAK:
            print(f"{line['file_name']}: {line['seconds']:.1f} s")
        elif task == "text":
            print(f"{line['prompt']}{line['text']}")
        else:
            print(
                "".join([line["prompt"], *(part.get("text") or f"[{part['file_name']}]" for part in line["segments"])])
            )
    if folder is None:
        return
    plural = "" if count == 1 else "s"
    said = f"{count} result{plural} in {folder.results}"
    if task in (PAINT, EDIT):
        images = [Image.open(folder.path / line["file_name"]) for line in shown]
        labels = [line.get("text") or Path(line["audio"]).name for line in shown]
        sheet = grid(images, labels, columns=min(GRID_COLUMNS, len(shown)))
        sheet.save(folder.path / "grid.png")
        said = (
            f"{count} image{plural} and metadata.jsonl in {folder.path}; "
            f"{'an overview' if len(shown) == count else f'the first {len(shown)}'} in {folder.path / 'grid.png'}"
        )
    print(said)


def files_of(arguments: argparse.Namespace) -> list[str]:
    """The files given instead of prompts; empty if there are prompts."""
    pictures = [arguments.image] if arguments.task == SPEAK and arguments.image else []
    files: list[str] = arguments.caption or arguments.transcribe or arguments.speech or pictures
    return files


def run(arguments: argparse.Namespace) -> None:
    """Run sample.py with its options."""
    cpu = arguments.device == "cpu" or parse_flag_from_env("ACCELERATE_USE_CPU")
    state = PartialState(cpu=cpu, timeout=TIMEOUT)
    prompts = files_of(arguments) or read_prompts(arguments, state)
    if arguments.device not in (None, "cpu") and state.num_processes > 1:
        raise UserError(f"--device {arguments.device} is one device for several processes; leave it out")
    if arguments.output is None and state.num_processes > 1:
        raise UserError("several processes need a folder to write into; give --output FOLDER")
    if arguments.output is not None:
        check_writable_folder(arguments.output, "output")
    if arguments.output_file is not None:
        check_writable_file(arguments.output_file, "output")
    pipeline = load_pipeline(
        arguments.checkpoint,
        arguments.device or state.device,
        arguments.dtype,
        lora=arguments.lora,
        lora_scale=arguments.lora_scale,
    )
    pipeline.set_progress_bar_config(desc="step", leave=False, disable=not state.is_main_process)
    sample(pipeline, prompts, arguments, state)
    state.destroy_process_group()
