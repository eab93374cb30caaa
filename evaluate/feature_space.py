"""Separation of modalities in the hidden states of models, layer by layer, for example of a dense model and a MoT.

    python evaluate/feature_space.py runs/settings/chameleon-dense-seed-0 runs/settings/chameleon-seed-0 --output spaces

For each run and each layer: the share of hidden states that are closest to the mean of their own modality, on the run's
held-out documents, with latents at t = 0.5. A share of 1 means that modalities are separate. A share of 1 / (number of
modalities) means that they are mixed.

The output folder receives feature_space.json, the table feature_space.md, and feature_space.png with the states of some
layers on their first two principal components.
"""

import argparse
import sys
from collections.abc import Sequence

from transfusion_mot.errors import UserError, exit_on_user_error
from transfusion_mot.evaluation.command import add_config, add_device, at_least_one, command_parser, run_command
from transfusion_mot.files import find_snapshot
from transfusion_mot.path_options import PathOption


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument(
        "runs",
        action=PathOption,
        check=find_snapshot,
        nargs="+",
        metavar="RUN",
        help="run folders of train.py, or snapshots",
    )
    parser.add_argument(
        "--output", default="feature_space", metavar="FOLDER", help="folder of the results (default: feature_space)"
    )
    add_config(parser, "configuration that names the data (default: each run's)")
    parser.add_argument(
        "--num-documents", type=at_least_one, default=256, metavar="N", help="held-out documents (default: 256)"
    )
    parser.add_argument(
        "--num-states", type=at_least_one, default=1000, metavar="N", help="states of each modality (default: 1000)"
    )
    parser.add_argument("--batch-size", type=at_least_one, default=4, metavar="N", help="rows at a time (default: 4)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the choice of states (default: 0)")
    add_device(parser)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    # Before PyTorch loads, which takes seconds: --help, and mistakes in the options.
    with exit_on_user_error():
        parse_arguments(sys.argv[1:])

import json
from dataclasses import replace
from pathlib import Path

from accelerate import Accelerator

from transfusion_mot.data.mixture import open_documents, with_encoded
from transfusion_mot.data.online import OnlineEncoder
from transfusion_mot.evaluation.feature_space import LayerSpace, layer_space, plot_spaces, spaces_json, spaces_table
from transfusion_mot.evaluation.images import pick_device
from transfusion_mot.outputs import check_writable_folder
from transfusion_mot.pipeline import TransfusionPipeline
from transfusion_mot.sampling.held_out_losses import codecs_of, of_checkpoint
from transfusion_mot.sampling.hidden_states import check_one_width, hidden_states
from transfusion_mot.training.checkpoint import read_run_config
from transfusion_mot.training.plot import labels_of
from transfusion_mot.training.validation import Validation


def main() -> None:
    arguments = parse_arguments(sys.argv[1:])
    check_writable_folder(arguments.output, "output")
    labels = labels_of([Path(run) for run in arguments.runs])
    spaces = {label: spaces_of(run, arguments) for label, run in zip(labels, arguments.runs, strict=True)}
    output = Path(arguments.output)
    table = spaces_table(spaces)
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / "feature_space.json").write_text(json.dumps(spaces_json(spaces), indent=1) + "\n")
        (output / "feature_space.md").write_text(table + "\n")
        plot_spaces(spaces, output / "feature_space.png")
    except OSError as error:
        raise UserError(f"cannot write to '{output}': {error.strerror}") from None
    print(
        "share of states whose nearest mean is that of their modality, by layer; layer 0 is the input of the first "
        f"block\n\n{table}\n"
    )
    print(f"feature_space.json, .md and .png are in {output}")


def spaces_of(run: str, arguments: argparse.Namespace) -> list[LayerSpace]:
    """Feature spaces of every layer of a run's model."""
    snapshot = find_snapshot(run)
    config = read_run_config(snapshot, arguments.config, "--config")
    device = pick_device(arguments.device)
    accelerator = Accelerator(mixed_precision="no", cpu=device.type == "cpu")
    pipeline = TransfusionPipeline.from_pretrained(snapshot).to(device)
    config = of_checkpoint(config, pipeline)
    check_one_width(config.model)
    config.training = replace(config.training, num_validation_documents=arguments.num_documents)
    codecs = codecs_of(pipeline, config, device)
    sources = with_encoded(open_documents(config.data, "held_out"), config.data, codecs, config.codecs, accelerator)
    validation = Validation(
        sources,
        pipeline.text_tokenizer,
        config,
        encoder=OnlineEncoder.of_model(config.model, codecs, config.codecs),
        rows_at_once=arguments.batch_size,
    )
    states = hidden_states(
        pipeline.transformer, validation, accelerator, most=arguments.num_states, seed=arguments.seed
    )
    return [layer_space(of_layer) for of_layer in states]


if __name__ == "__main__":
    run_command(main)
