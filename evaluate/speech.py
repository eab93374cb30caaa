"""Word error rates of a model's transcripts, and intelligibility of its speech.

    python evaluate/speech.py --checkpoint runs/chameleon_speech --output speech.json \\
      --recordings data/speech/captions data/speech/glosses data/speech/new_voices data/speech/human

A folder of recordings has a metadata.jsonl with the text of each; held-out recordings are used. The output has, for
each folder, the word and character error rates (WER, CER) of the model's transcripts, and of an independent recogniser
on the recordings, on the recordings after the codec, and on the model's own speech of the same texts. The recogniser
makes errors, too: compare its three numbers with each other. Recordings longer than any in training are skipped, and
texts longer than any prompt are not spoken. Texts are compared in lower case, without punctuation; see docs/speech.md.
"""

import argparse
import sys
from collections.abc import Sequence

from transfusion_mot.cli.options import DTYPES
from transfusion_mot.cores import usable_cores
from transfusion_mot.errors import UserError, exit_on_user_error
from transfusion_mot.evaluation.command import (
    add_checkpoint,
    add_config,
    add_device,
    add_output,
    add_recordings,
    at_least_one,
    command_parser,
    publish,
    run_command,
)
from transfusion_mot.path_options import PathOption, existing_or_on_hub

_POCKETSPHINX, _NONE = "pocketsphinx", "none"


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = command_parser(__doc__)
    add_checkpoint(parser)
    add_recordings(parser)
    parser.add_argument(
        "--num-recordings",
        type=at_least_one,
        default=200,
        metavar="N",
        help="held-out recordings of each folder (default: 200)",
    )
    parser.add_argument(
        "--recogniser",
        action=PathOption,
        check=existing_or_on_hub("--recogniser"),
        default=_POCKETSPHINX,
        metavar="NAME",
        help=f"{_POCKETSPHINX} (default), a model of transformers by name or folder, or {_NONE}",
    )
    parser.add_argument(
        "--losses",
        action="store_true",
        help="also compute the held-out loss of each modality, on the documents of the run's configuration",
    )
    add_config(parser, "configuration that names them (default: the run's)")
    parser.add_argument(
        "--guidance-scale", type=float, metavar="X", help="guidance of its speech (default: the checkpoint's)"
    )
    parser.add_argument(
        "--temperature", type=float, default=1.0, metavar="X", help="sampling temperature of its speech (default: 1)"
    )
    parser.add_argument(
        "--top-p", type=float, default=1.0, metavar="X", help="top-p of its speech (default: 1, all codes)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="the same seed gives the same speech (default: 0)"
    )
    parser.add_argument(
        "--batch-size", type=at_least_one, default=32, metavar="N", help="recordings at a time (default: 32)"
    )
    parser.add_argument(
        "--workers", type=at_least_one, default=usable_cores(), metavar="N", help="processes of the recogniser"
    )
    parser.add_argument(
        "--save", metavar="FOLDER", help="also write the model's speech as WAV files, and its transcripts"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="number format of the transformer (default: bf16 on CUDA)")
    add_device(parser)
    add_output(parser)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    # Before PyTorch loads, which takes seconds: --help, and mistakes in the options.
    with exit_on_user_error():
        parse_arguments(sys.argv[1:])

import json
from pathlib import Path

from accelerate import Accelerator

from transfusion_mot.cli.loading import load_pipeline
from transfusion_mot.data.audio import Audio, write_wav
from transfusion_mot.data.mixture import open_documents, with_encoded
from transfusion_mot.evaluation.images import pick_device
from transfusion_mot.evaluation.recognisers import PocketSphinx, Recogniser, TransformersRecogniser
from transfusion_mot.evaluation.report.content import Metric
from transfusion_mot.evaluation.speech import RecordingSet, at_most, read_recordings
from transfusion_mot.files import find_snapshot
from transfusion_mot.outputs import check_writable_folder
from transfusion_mot.sampling.held_out_losses import codecs_of
from transfusion_mot.sampling.held_out_speech import intelligibility_metrics, loss_metrics, transcription_metrics
from transfusion_mot.training.checkpoint import read_run_config


def main() -> None:
    arguments = parse_arguments(sys.argv[1:])
    snapshot = find_snapshot(arguments.checkpoint)
    device = pick_device(arguments.device)
    config = read_run_config(snapshot, arguments.config, "--config") if arguments.losses else None
    sets = [read_recordings(folder, arguments.num_recordings) for folder in arguments.recordings]
    if arguments.save:
        check_writable_folder(arguments.save, "--save")
    recogniser = make_recogniser(arguments, sets, str(device))
    pipeline = load_pipeline(str(snapshot), device, arguments.dtype)
    if not pipeline.has_audio:
        raise UserError(f"the model in '{snapshot}' has no speech; give one that was trained on audio")
    speaking = {"temperature": arguments.temperature, "top_p": arguments.top_p}
    _, scale = pipeline.sampling_settings(pipeline.audio_modality, None, arguments.guidance_scale)
    speaking["guidance_scale"] = scale
    metrics: list[Metric] = []
    for recordings in (at_most(one, pipeline.config.max_audio_seconds) for one in sets):
        found, transcripts = transcription_metrics(pipeline, recordings, batch_size=arguments.batch_size)
        metrics += found
        spoken: list[tuple[str, Audio]] = []
        if recogniser is not None:
            found, spoken = intelligibility_metrics(
                pipeline,
                recordings,
                recogniser,
                speaking=speaking,
                seed=arguments.seed,
                batch_size=arguments.batch_size,
            )
            metrics += found
        if arguments.save:
            save(Path(arguments.save) / recordings.name, transcripts, spoken)
    if config is not None:
        accelerator = Accelerator(mixed_precision="no", cpu=device.type == "cpu")
        held_out = open_documents(config.data, "held_out")
        codecs = codecs_of(pipeline, config, device)
        sources = with_encoded(held_out, config.data, codecs, config.codecs, accelerator)
        # Codecs are still float32, and `to` would log a warning.
        pipeline.transformer.float()
        metrics += loss_metrics(pipeline, config, sources, accelerator, batch_size=arguments.batch_size)
    publish(metrics, arguments.output)


def make_recogniser(arguments: argparse.Namespace, sets: Sequence[RecordingSet], device: str) -> Recogniser | None:
    if arguments.recogniser == _NONE:
        return None
    if arguments.recogniser == _POCKETSPHINX:
        return PocketSphinx((text for recordings in sets for text in recordings.texts), arguments.workers)
    return TransformersRecogniser(arguments.recogniser, device)


def save(folder: Path, transcripts: Sequence[tuple[str, str]], spoken: Sequence[tuple[str, Audio]]) -> None:
    """Write transcripts.jsonl beside the texts, and the speech as an audio folder."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [{"text": text, "transcript": transcript} for text, transcript in transcripts]
    (folder / "transcripts.jsonl").write_text(json_lines(lines), encoding="utf-8")
    named = [(f"{index:04d}.wav", text, audio) for index, (text, audio) in enumerate(spoken)]
    for name, _, audio in named:
        write_wav(audio, folder / name)
    lines = [{"file_name": name, "text": text} for name, text, _ in named]
    (folder / "metadata.jsonl").write_text(json_lines(lines), encoding="utf-8")


def json_lines(entries: Sequence[dict[str, str]]) -> str:
    return "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)


if __name__ == "__main__":
    run_command(main)
