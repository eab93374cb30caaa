"""Intelligibility of speech after an audio codec.

    python evaluate/audio_codec.py --codec checkpoints/vq-speech --output codec.json \\
      --recordings data/speech/glosses data/speech/new_voices data/speech/human

A folder of recordings has a metadata.jsonl with the text of each; held-out recordings are used. The output has, for
each folder, the word and character error rates (WER, CER) of an independent recogniser on the recordings before and
after the codec. The recogniser makes errors, too: compare the two numbers with each other.
"""

import argparse
import sys
from collections.abc import Sequence

from transfusion_mot.cores import usable_cores
from transfusion_mot.errors import exit_on_user_error
from transfusion_mot.evaluation.command import (
    add_device,
    add_output,
    add_recordings,
    at_least_one,
    command_parser,
    publish,
    run_command,
)
from transfusion_mot.path_options import PathOption, existing_or_on_hub


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument(
        "--codec",
        action=PathOption,
        check=existing_or_on_hub("--codec"),
        required=True,
        metavar="PATH",
        help="an audio codec: a folder, or a name on the hub",
    )
    parser.add_argument("--num-codebooks", type=at_least_one, metavar="N", help="codebooks to use (default: the first)")
    add_recordings(parser)
    parser.add_argument(
        "--num-recordings",
        type=at_least_one,
        default=200,
        metavar="N",
        help="held-out recordings of each folder (default: 200)",
    )
    parser.add_argument(
        "--workers", type=at_least_one, default=usable_cores(), metavar="N", help="processes of the recogniser"
    )
    add_device(parser)
    add_output(parser)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    # Before PyTorch loads, which takes seconds: --help, and mistakes in the options.
    with exit_on_user_error():
        parse_arguments(sys.argv[1:])

from dataclasses import replace

import torch
from tqdm import tqdm

from transfusion_mot.codecs.audio_codes import AudioCodes
from transfusion_mot.config import CodecConfig
from transfusion_mot.data.audio import Audio, resample
from transfusion_mot.errors import UserError
from transfusion_mot.evaluation.images import pick_device
from transfusion_mot.evaluation.recognisers import PocketSphinx
from transfusion_mot.evaluation.report.content import Metric
from transfusion_mot.evaluation.speech import error_rates, normalise, read_recordings


def main() -> None:
    arguments = parse_arguments(sys.argv[1:])
    sets = [read_recordings(folder, arguments.num_recordings) for folder in arguments.recordings]
    recogniser = PocketSphinx((text for recordings in sets for text in recordings.texts), arguments.workers)
    config = CodecConfig(arguments.codec, num_codebooks=arguments.num_codebooks)
    codec = AudioCodes.load(config, pick_device(arguments.device))
    if not codec.has_decoder:
        raise UserError(
            f"the codec {arguments.codec} has no decoder, so its codes cannot be turned into audio; give another codec"
        )
    metrics: list[Metric] = []
    for recordings in sets:
        said = [one for one in recordings.held_out if normalise(one.text) and recogniser.knows(one.text)]
        about = {
            "recogniser": recogniser.name,
            "left out for unknown words": len(recordings.held_out) - len(said),
            "codes a second": codec.codes_per_second,
        }
        real = [one.audio() for one in said]
        rebuilt = [through_codec(codec, audio) for audio in tqdm(real, desc=recordings.name, unit="recording")]
        for what, heard in (("real audio", real), ("through the codec", rebuilt)):
            rates = error_rates([one.text for one in said], recogniser.transcribe(heard), about)
            metrics += [replace(rate, name=f"{rate.name} ({recordings.name}, {what})") for rate in rates]
    publish(metrics, arguments.output)


def through_codec(codec: AudioCodes, audio: Audio) -> Audio:
    """The recording, encoded and decoded."""
    (codes,) = codec.encode([torch.from_numpy(resample(audio, codec.sample_rate))])
    return Audio(codec.decode(codes).cpu().numpy(), codec.sample_rate)


if __name__ == "__main__":
    run_command(main)
