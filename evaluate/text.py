"""How well a model predicts held-out text: loss and perplexity per token, and bits per byte, of each source.

    python evaluate/text.py --checkpoint runs/quickstart --output text.json
    accelerate launch evaluate/text.py --checkpoint runs/quickstart --texts c4.jsonl wikipedia/*.parquet

Held out are the captions and texts that the run's own configuration sets aside, or with --texts the whole of other
files (.txt, .jsonl or .parquet, as for data sources of kind text). Bits per byte compare models of different
tokenizers, perplexity only those of one tokenizer; see docs/evaluation.md.
"""

import argparse
import logging
import sys
from dataclasses import replace
from typing import Literal

from transfusion_mot.config import RunConfig, SourceConfig
from transfusion_mot.data.mixture import Sources, open_documents
from transfusion_mot.data.sources.base import CaptionedImages, TextDocuments
from transfusion_mot.diffusion import Diffusion
from transfusion_mot.errors import UserError, exit_on_user_error
from transfusion_mot.evaluation.processes import open_processes
from transfusion_mot.evaluation.report import Metric, metrics_table, save_metrics
from transfusion_mot.pipeline import TransfusionPipeline
from transfusion_mot.training.checkpoint import find_snapshot, read_run_config
from transfusion_mot.training.text_losses import TextReader, text_losses

_logger = logging.getLogger("transfusion_mot.evaluate")


def main() -> None:
    arguments = parse_arguments()
    snapshot = find_snapshot(arguments.checkpoint)
    config = read_run_config(snapshot, arguments.config)
    processes, device = open_processes(arguments.device)
    pipeline = TransfusionPipeline.from_pretrained(snapshot).to(device)
    patch = config.model.patch_size
    reader = TextReader(
        pipeline.text_tokenizer,
        Diffusion(pipeline.scheduler, config.diffusion.timestep_distribution),
        config.model.rope,
        config.data.text_slots,
        (pipeline.autoencoder.latent_channels, patch, patch),
        arguments.batch_size,
    )
    metrics: list[Metric] = []
    for name, ends_in, texts in held_out_texts(config, arguments.texts):
        of_source = text_losses(pipeline.transformer, texts[: arguments.num_texts], ends_in, reader, processes)
        metrics += [replace(metric, name=f"{metric.name} ({name})") for metric in of_source]
    if processes.is_main_process:
        print(metrics_table(metrics))
        if arguments.output:
            save_metrics(metrics, arguments.output, sys.argv)


def held_out_texts(config: RunConfig, files: list[str] | None) -> list[tuple[str, Literal["text", "image"], list[str]]]:
    """(name, what follows a text, texts) of each source: texts, and all captions of images.

    Raises:
        UserError: A source cannot be opened, or nothing is held out.
    """
    data = config.data
    if files is not None:
        data = replace(data, sources=[SourceConfig("text", path=file, use="held_out") for file in files])
    sources = Sources(open_documents(data, "held_out"), [])
    found: list[tuple[str, Literal["text", "image"], list[str]]] = []
    for name, source in zip(sources.names, sources.sources, strict=True):
        documents = source.documents
        if isinstance(documents, TextDocuments):
            found.append((name, "text", [documents.text(index) for index in range(len(documents))]))
        elif isinstance(documents, CaptionedImages):
            captions = [caption for index in range(len(documents)) for caption in documents.captions(index)]
            found.append((f"captions of {name}", "image", captions))
        else:
            _logger.warning("%s is left out: the texts of interleaved documents depend on their images", name)
    if not found:
        raise UserError(
            "no text is held out; set data.held_out_fraction, or 'use' of a source to held_out, in --config, or give "
            "files with --texts"
        )
    return found


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, metavar="FOLDER", help="a run folder of train.py, or a snapshot")
    parser.add_argument("--config", metavar="FILE", help="configuration that names the data (default: the run's)")
    parser.add_argument("--texts", nargs="+", metavar="FILE", help="texts to read instead of the run's held-out ones")
    parser.add_argument("--num-texts", type=int, metavar="N", help="first texts of each source (default: all)")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="rows at a time (default: 8)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (cuda if there is one)")
    parser.add_argument("--output", metavar="FILE", help="also write the numbers as JSON, with how they were measured")
    return parser.parse_args()


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    with exit_on_user_error():
        main()
