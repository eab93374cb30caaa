"""Export a snapshot at half its size, or its text tower as a language model.

    python -m transfusion_mot.sampling.export --checkpoint runs/emoji_128 --output checkpoints/emoji
    python -m transfusion_mot.sampling.export --checkpoint runs/mine --output my-lm --language-model bfloat16

Weights of the transformer are rounded to bfloat16, weights of an autoencoder to float16; loading converts both to
float32. Tokenizers of images and audio keep their weights, because rounded ones give other codes. The model card is
exported, too, with the given licences of the data and numbers of an evaluation.

With --language-model the folder receives only the text tower with its embedding, head and tokenizer, in the format of
`AutoModelForCausalLM` of transformers.
"""

import argparse
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from transfusion_mot.errors import UserError, exit_on_user_error
from transfusion_mot.evaluation.command import add_checkpoint
from transfusion_mot.evaluation.report.content import metrics_table, read_report
from transfusion_mot.files import find_snapshot
from transfusion_mot.outputs import check_writable_folder, refuse_other_content
from transfusion_mot.path_options import PathOption, existing


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of the command line.

    Raises:
        UserError: The output cannot be written, or options exclude each other.
    """
    parser = argparse.ArgumentParser(
        prog="python -m transfusion_mot.sampling.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_checkpoint(parser)
    parser.add_argument(
        "--output", required=True, metavar="FOLDER", help="folder to write; an older export in it is replaced"
    )
    parser.add_argument(
        "--licences",
        action=PathOption,
        check=existing("a text file"),
        metavar="FILE",
        help="file with the card's text on the licences of the data",
    )
    parser.add_argument(
        "--evaluation",
        action=PathOption,
        check=read_report,
        metavar="FOLDER",
        help="output of evaluate/benchmark.py, whose numbers the card shows",
    )
    parser.add_argument(
        "--max-megabytes", type=float, metavar="N", help="maximum size of the weights in MB (10^6 bytes)"
    )
    parser.add_argument(
        "--language-model",
        choices=["float32", "bfloat16"],
        metavar="FORMAT",
        help="write the text tower as a language model of transformers, with weights in float32 or bfloat16",
    )
    given = parser.parse_args(arguments)
    check_writable_folder(given.output, "output")
    output = Path(given.output)
    # A language model that was exported looks like any other.
    if given.language_model is not None and output.is_dir() and any(output.iterdir()):
        raise UserError(f"--output {output} holds files; with --language-model give a folder that is new or empty")
    refuse_other_content(output, find_snapshot(given.checkpoint))
    if given.language_model is not None and any((given.licences, given.evaluation, given.max_megabytes)):
        raise UserError("--language-model writes no model card; leave out the other options")
    return given


if __name__ == "__main__":
    # Before PyTorch loads, which takes seconds: --help, and mistakes in the options.
    with exit_on_user_error():
        parse_arguments(sys.argv[1:])

import torch
from torch import Tensor

from transfusion_mot.pipeline import TransfusionPipeline
from transfusion_mot.sampling.export_language_model import export_language_model, load_fused
from transfusion_mot.training.checkpoint import atomic_folder, run_config_file


def export(
    checkpoint: str, output: Path, *, licences: str | None, evaluation: str | None, max_megabytes: float | None
) -> dict[str, int]:
    """Write a snapshot in half precision => bytes of every weights file.

    Args:
        checkpoint: A run folder or a snapshot.
        output: Folder of the new snapshot; its contents are replaced.
        licences: Text on licences that replaces that of the card.
        evaluation: Markdown with measurements for the card, placed after the losses of training.
        max_megabytes: If the weights take more, nothing is written.

    Raises:
        UserError: There is no such snapshot, or it is too large.
    """
    snapshot = find_snapshot(checkpoint)
    pipeline = load_fused(snapshot)
    # Not `to` of diffusers, which would print a warning about half precision.
    pipeline.transformer.bfloat16()
    if pipeline.has_images and pipeline.codec.kind == "latents":
        pipeline.vae.half()
    if pipeline.model_card is not None:
        if licences is not None:
            pipeline.model_card = with_section(pipeline.model_card, "Licence", licences)
        if evaluation is not None:
            pipeline.model_card = with_section(pipeline.model_card, "Evaluation", evaluation)
    megabytes = sum(part.numel() * part.element_size() for part in _weights(pipeline)) / 1e6
    if max_megabytes is not None and megabytes > max_megabytes:
        raise UserError(
            f"the weights take {megabytes:.1f} MB, more than the {max_megabytes:g} MB allowed; train a smaller model"
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(output) as folder:
        pipeline.save_pretrained(folder)
        if (config := run_config_file(snapshot)).is_file():
            # Evaluations read the data of the run from it.
            shutil.copy(config, folder / config.name)
    return {str(path.relative_to(output)): path.stat().st_size for path in sorted(output.rglob("*.safetensors"))}


def _weights(pipeline: TransfusionPipeline) -> list[Tensor]:
    modules = (part for part in pipeline.components.values() if isinstance(part, torch.nn.Module))
    return [weight for module in modules for weight in module.state_dict().values()]


def with_section(card: str, title: str, text: str) -> str:
    """The model card with `text` in the section of that title; a new section is inserted before the configuration."""
    section = f"## {title}\n\n{text.strip()}\n\n"
    pattern = rf"^## {re.escape(title)}\n.*?(?=^## |\Z)"
    if re.search(pattern, card, flags=re.MULTILINE | re.DOTALL):
        return re.sub(pattern, lambda _: section, card, count=1, flags=re.MULTILINE | re.DOTALL)
    head, mark, tail = card.partition("## Configuration\n")
    return f"{head}{section}{mark}{tail}"


def main(arguments: Sequence[str]) -> None:
    """Run the command line."""
    given = parse_arguments(arguments)
    if given.language_model is not None:
        sizes = export_language_model(given.checkpoint, Path(given.output), getattr(torch, given.language_model))
        _print_sizes(sizes, given.output)
        return
    licences = None if given.licences is None else f"```\n{_read(given.licences).strip()}\n```"
    evaluation = None if given.evaluation is None else _measured(given.evaluation)
    sizes = export(
        given.checkpoint,
        Path(given.output),
        licences=licences,
        evaluation=evaluation,
        max_megabytes=given.max_megabytes,
    )
    _print_sizes(sizes, given.output)


def _print_sizes(sizes: dict[str, int], output: str) -> None:
    for name, size in sizes.items():
        print(f"{size / 1e6:7.1f} MB  {name}")
    print(f"{sum(sizes.values()) / 1e6:7.1f} MB  in {output}")


def _measured(folder: str) -> str:
    report = read_report(Path(folder))
    return f"{report.title}, by `{report.command}`:\n\n{metrics_table(report.metrics)}"


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"'{path}' cannot be read as text: {error}") from None


if __name__ == "__main__":
    with exit_on_user_error():
        main(sys.argv[1:])
