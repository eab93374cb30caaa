"""The options of sample.py, and which of them exclude each other."""

import argparse
from pathlib import Path
from typing import Any, NoReturn

from transfusion_mot.config import DEFAULT_STRENGTH
from transfusion_mot.data.audio import audio_seconds
from transfusion_mot.data.images import displayed_size
from transfusion_mot.errors import UserError
from transfusion_mot.files import find_snapshot, read_lines
from transfusion_mot.installed import as_called
from transfusion_mot.path_options import PathOption, existing_or_on_hub

PROMPTS_FILE = "prompts file"
DTYPES = ("bf16", "fp32")
SHIPPED_CHECKPOINT = Path(__file__).resolve().parents[2] / "checkpoints" / "emoji"
# Names of tasks that other modules refer to.
PAINT, EDIT, SPEAK, TRANSCRIBE = "image", "edit", "speech", "transcribe"
TASKS = (PAINT, EDIT, "caption", "text", "auto", SPEAK, TRANSCRIBE)
# Options that only some tasks read. Ignored ones would make a wrong command look right.
_READ_BY = {
    "num_inference_steps": (PAINT, EDIT, "auto"),
    "scheduler": (PAINT, EDIT, "auto"),
    "guidance_scale": (PAINT, EDIT, "auto", SPEAK),
    "max_seconds": (SPEAK,),
}
# Other audio formats that a user may expect for speech.
_OTHER_AUDIO = (".mp3", ".flac", ".ogg", ".opus", ".m4a", ".aac")

# Default output folders of tasks that write files.
_FOLDERS = {PAINT: "samples", EDIT: "samples", "auto": "samples", SPEAK: "samples/speech"}


class OneLineParser(argparse.ArgumentParser):
    """A parser that reports an error in one sentence."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists the options")


def parse_arguments(description: str) -> argparse.Namespace:
    """The command line => options, including the task.

    Raises:
        UserError: Options are unknown, need another option, or exclude each other.
    """
    parser = OneLineParser(
        description=as_called(description),
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=30, width=110),
        usage=as_called("python sample.py [--checkpoint FOLDER] [OPTION ...] [PROMPT ...]"),
    )
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="what to paint or to say, or a text to continue")
    add = parser.add_argument
    add(
        "--checkpoint",
        action=PathOption,
        check=find_snapshot,
        metavar="FOLDER",
        help="a run folder of train.py (its newest snapshot is used), or a snapshot (default: checkpoints/emoji)",
    )
    add(
        "--lora",
        action=PathOption,
        check=existing_or_on_hub("--lora"),
        metavar="FOLDER",
        help="a low-rank adapter of the checkpoint: a run with lora, or its snapshots/step-N",
    )
    add("--lora-scale", type=float, default=1.0, metavar="X", help="factor on the adapter (default: 1)")
    add(
        "--task",
        choices=TASKS,
        help="image: paint prompts; edit: edit a picture by instruction; caption: caption images; text: continue "
        "texts; auto: the model decides when to write and when to paint; speech: speak; transcribe: transcribe audio "
        "(default: caption, edit or transcribe if that option is given, else image)",
    )
    add(
        "--prompts-file",
        action=PathOption,
        # Standard input can be read only once.
        check=lambda file: file == "-" or read_lines(file, PROMPTS_FILE),
        metavar="FILE",
        help="file with a prompt on each line; empty lines are skipped; - is standard input",
    )
    add("--num-images", type=int, default=1, metavar="N", help="results for each prompt (default: 1)")
    add("--seed", type=int, default=0, metavar="N", help="the same seed gives the same results (default: 0)")
    add(
        "--output",
        metavar="FOLDER",
        help="folder of the results (default: samples for tasks that paint, samples/speech for --task speech); for one "
        "result of --task speech also a file X.wav",
    )
    add("--batch-size", type=int, default=16, metavar="N", help="results made at a time (default: 16)")
    add("--device", help="cpu, cuda, cuda:1, mps (default: a GPU if there is one)")
    add("--dtype", choices=DTYPES, help="number format of the transformer (default: bf16 on CUDA, else fp32)")

    add = parser.add_argument_group("painting").add_argument
    add(
        "--height",
        type=int,
        metavar="N",
        help="height of the pictures in pixels (default: the trained size closest to a square)",
    )
    add("--width", type=int, metavar="N", help="width in pixels; best is a size that the model was trained on")
    add("--num-inference-steps", type=int, metavar="N", help="reverse steps (default: those of the checkpoint)")
    add(
        "--scheduler",
        metavar="NAME",
        help="diffusers scheduler to sample with; an unsuitable one is refused with a list of suitable ones (default: "
        "that of the checkpoint)",
    )
    add(
        "--guidance-scale",
        type=float,
        metavar="X",
        help="how strongly to follow the prompt; 1 is off and takes half the time (default: that of the checkpoint)",
    )
    add(
        "--guidance-interval",
        type=float,
        nargs=2,
        metavar=("FROM", "TO"),
        default=[0.0, 1.0],
        help="noise levels in [0, 1] at which guidance acts; a shorter interval takes less time (default: 0 1)",
    )
    add(
        "--guidance-rescale",
        type=float,
        default=0.0,
        metavar="X",
        help="how much of the contrast that guidance adds is removed, from 0 to 1 (default: 0)",
    )
    add(
        "--guidance-renorm",
        action="store_true",
        help="limit the norm of the guided prediction to that of the conditional one",
    )
    add("--negative-prompt", metavar="TEXT", help="what the pictures should not show (default: nothing)")
    add(
        "--code-temperature",
        type=float,
        default=1.0,
        metavar="X",
        help="sampling temperature of image and speech codes; 0 takes the most probable codes (default: 1)",
    )
    add("--code-top-p", type=float, default=1.0, metavar="X", help="top-p of image and speech codes (default: 1)")
    add("--code-top-k", type=int, default=0, metavar="N", help="top-k of image and speech codes (default: 0, all)")
    add("--strip", action="store_true", help="also write the denoising steps of each picture as a strip")
    add("--gif", action="store_true", help="also write the denoising steps as an animation")

    add = parser.add_argument_group("editing (models trained on editing pairs)").add_argument
    add(
        "--edit",
        action=PathOption,
        check=displayed_size,
        metavar="FILE",
        help='picture to edit; the prompts are instructions, such as "make it green"',
    )
    add(
        "--image-guidance-scale",
        type=float,
        metavar="X",
        help="how strongly to follow the picture; --guidance-scale is for the instruction; 1 is off (default: 1.5)",
    )

    add = parser.add_argument_group("variations (any model)").add_argument
    add(
        "--image",
        action=PathOption,
        check=displayed_size,
        metavar="FILE",
        help="picture to vary; with --task auto, the beginning of the document; with --task speech, the picture to "
        "describe",
    )
    add(
        "--strength",
        type=float,
        metavar="X",
        help="noise level to start from, above 0 and at most 1; 1 replaces the picture completely "
        f"(default: {DEFAULT_STRENGTH})",
    )
    add(
        "--mask",
        action=PathOption,
        check=displayed_size,
        metavar="FILE",
        help="mask of the size of --image: white is repainted, black is kept",
    )

    add = parser.add_argument_group("speech (models trained on audio)").add_argument
    audio: dict[str, Any] = {"action": PathOption, "check": audio_seconds, "nargs": "+", "default": []}
    add("--transcribe", **audio, metavar="AUDIO", help="audio files to transcribe: WAV, FLAC, Ogg, MP3")
    add("--speech", **audio, metavar="AUDIO", help="audio files as prompts: paint what is said")
    add(
        "--max-seconds",
        type=float,
        metavar="X",
        help="maximum length of speech; longer speech is cut (default: the longest in training)",
    )

    add = parser.add_argument_group("writing").add_argument
    add(
        "--caption",
        action=PathOption,
        check=displayed_size,
        nargs="+",
        default=[],
        metavar="IMAGE",
        help="image files to caption",
    )
    add("--max-new-tokens", type=int, default=64, metavar="N", help="maximum number of tokens of a text (default: 64)")
    add("--temperature", type=float, default=0.0, metavar="X", help="0 takes the most probable tokens (default: 0)")
    add("--top-p", type=float, default=1.0, metavar="X", help="probability mass to draw tokens from (default: 1)")
    add("--top-k", type=int, default=0, metavar="N", help="draw from the N most probable tokens (default: 0, all)")
    add(
        "--max-images",
        type=int,
        default=1,
        metavar="N",
        help="maximum pictures in a result of --task auto (default: 1)",
    )
    arguments = parser.parse_intermixed_args()
    implied = {"caption": arguments.caption, EDIT: arguments.edit, TRANSCRIBE: arguments.transcribe}
    arguments.task = arguments.task or next((task for task, given in implied.items() if given), PAINT)
    arguments.output_file = None
    if arguments.output is not None and arguments.output.lower().endswith(".wav"):
        arguments.output_file, arguments.output = arguments.output, None
    elif arguments.output is None and arguments.task in _FOLDERS:
        arguments.output = _FOLDERS[arguments.task]
    _check(arguments)
    if arguments.image_guidance_scale is None:
        arguments.image_guidance_scale = 1.5
    if arguments.strength is None:
        arguments.strength = DEFAULT_STRENGTH
    arguments.checkpoint = arguments.checkpoint or shipped_checkpoint()
    return arguments


def shipped_checkpoint() -> str:
    """The snapshot that comes with the repository, for commands without --checkpoint.

    Raises:
        UserError: It is not there: the package was installed without the repository.
    """
    if not SHIPPED_CHECKPOINT.exists():
        raise UserError("no --checkpoint is given and checkpoints/emoji does not exist; give a run folder of train.py")
    return str(SHIPPED_CHECKPOINT)


def _check(arguments: argparse.Namespace) -> None:
    task = arguments.task
    prompted = bool(arguments.prompts or arguments.prompts_file)
    for name in ("batch_size", "num_images"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(arguments, name)}; it must be at least 1")
    for index, prompt in enumerate(arguments.prompts):
        if not prompt.strip():
            raise UserError(f"prompt {index + 1} is empty; write a text, or leave it out")
    other = "prompts" if prompted else f"--task {task}"
    files = {"caption": arguments.caption, TRANSCRIBE: arguments.transcribe}
    for own in (own for own, given in files.items() if given and (prompted or task != own)):
        raise UserError(f"both {other} and --{own} are given; give them in two commands")
    if task in files and not files[task]:
        raise UserError(f"--task {task} has nothing to do; give --{task} {'IMAGE' if task == 'caption' else 'AUDIO'}")
    if not (prompted or any(files.values()) or arguments.speech or (task == SPEAK and arguments.image)):
        raise UserError(
            "there is nothing to do; give a prompt, --prompts-file with at least one line, --caption IMAGE, or "
            "--transcribe AUDIO"
        )
    if arguments.speech and (prompted or task != PAINT):
        raise UserError(f"both {other} and --speech are given; --speech replaces prompts: give one of them")
    if task == SPEAK and arguments.image and prompted:
        raise UserError("both prompts and --image are given; use two commands")
    for name, tasks in _READ_BY.items():
        if getattr(arguments, name) is not None and task not in tasks:
            raise UserError(f"--{name.replace('_', '-')} goes with --task {' or '.join(tasks)}, not with {task}")
    if task == SPEAK and str(arguments.output).lower().endswith(_OTHER_AUDIO):
        raise UserError(f"--output {arguments.output}: speech is written as WAV files; give X.wav or a folder")
    if arguments.output_file is not None:
        prompts = len(arguments.prompts) + bool(arguments.image)
        if task != SPEAK or arguments.prompts_file or prompts * arguments.num_images != 1:
            raise UserError(
                f"--output {arguments.output_file} is a file for one result of --task speech; give a folder for more"
            )
    if task == EDIT and not arguments.edit:
        raise UserError("--task edit has no picture; give --edit FILE, and instructions as prompts")
    if arguments.edit and task != EDIT:
        raise UserError(f"--edit goes with --task edit, not with {task}; leave --task out")
    if arguments.image_guidance_scale is not None and not arguments.edit:
        raise UserError("--image-guidance-scale goes with --edit FILE; add it, or leave --image-guidance-scale out")
    if arguments.strength is not None and not (arguments.image and task == PAINT):
        raise UserError("--strength needs a picture to vary; give --image FILE, with --task image")
    if arguments.edit and arguments.image:
        raise UserError("both --edit and --image are given; give --edit for instructions, or --image for variations")
    if arguments.mask and not (arguments.image and task == PAINT):
        raise UserError("--mask needs a picture to repaint; give --image FILE, with --task image")
    if arguments.image and task not in (PAINT, "auto", SPEAK):
        raise UserError(
            f"--image goes with --task image, auto or speech, not with {task}; to caption a picture give --caption"
        )
    if (arguments.height is not None or arguments.width is not None) and task not in (PAINT, EDIT, "auto"):
        raise UserError(f"--height and --width go with --task image, edit or auto, not with {task}")
    if (arguments.strip or arguments.gif) and task not in (PAINT, EDIT):
        raise UserError(f"--strip and --gif go with --task image or edit, not with {task}")
