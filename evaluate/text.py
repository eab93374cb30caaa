"""Loss and perplexity per token, and bits per byte, of held-out text for each source.

    python evaluate/text.py --checkpoint runs/quickstart --output text.json
    accelerate launch evaluate/text.py --checkpoint runs/quickstart --texts c4.jsonl wikipedia/*.parquet

It reads the captions and texts that the run's own configuration holds out, or with --texts other files (.txt, .jsonl or
.parquet, as for data sources of kind text). Compare perplexity only between models with the same tokenizer, bits per
byte between all models; see docs/evaluation.md.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace

from transfusion_mot.config import SourceConfig
from transfusion_mot.data.sources.paths import refuse_missing_files
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
from transfusion_mot.path_options import PathOption


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = command_parser(__doc__)
    add_run(parser)
    parser.add_argument(
        "--texts",
        action=PathOption,
        check=lambda file: refuse_missing_files(file, "text"),
        nargs="+",
        metavar="FILE",
        help="texts to read instead of the run's held-out ones",
    )
    parser.add_argument(
        "--num-texts", type=at_least_one, metavar="N", help="number of first texts of each source (default: all)"
    )
    add_device(parser)
    add_output(parser)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    # Before PyTorch loads, which takes seconds: --help, and mistakes in the options.
    with exit_on_user_error():
        parse_arguments(sys.argv[1:])

from transfusion_mot.data.mixture import Sources, open_documents
from transfusion_mot.evaluation.processes import open_processes
from transfusion_mot.files import find_snapshot
from transfusion_mot.pipeline import TransfusionPipeline
from transfusion_mot.sampling.held_out_losses import text_metrics
from transfusion_mot.training.checkpoint import read_run_config


def main() -> None:
    arguments = parse_arguments(sys.argv[1:])
    snapshot = find_snapshot(arguments.checkpoint)
    config = read_run_config(snapshot, arguments.config, "--config")
    data = config.data
    if arguments.texts is not None:
        data = replace(data, sources=[SourceConfig("text", path=file, use="held_out") for file in arguments.texts])
    sources = Sources(open_documents(data, "held_out"), {})
    processes, device = open_processes(arguments.device)
    pipeline = TransfusionPipeline.from_pretrained(snapshot).to(device)
    metrics = text_metrics(
        pipeline,
        config,
        sources,
        processes=processes,
        num_texts=arguments.num_texts,
        batch_size=arguments.batch_size,
    )
    if not metrics:
        raise UserError(
            "no text is held out; set data.held_out_fraction, or 'use' of a source to held_out, in --config, or give "
            "files with --texts"
        )
    if processes.is_main_process:
        publish(metrics, arguments.output)


if __name__ == "__main__":
    run_command(main)
