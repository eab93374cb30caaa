"""Train a codec: an AutoencoderKL for images, with kind=codes a VQModel, with kind=audio_codes a speech codec.

    python -m transfusion_mot.autoencoder --config configs/codecs/vq-emoji.yaml

The output folder receives the codec, its metrics and a picture of reconstructions; for speech also WAV files.
"""

import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from transfusion_mot.config import AutoencoderTrainingConfig, parse_config
from transfusion_mot.data.sources.paths import refuse_missing_sources
from transfusion_mot.errors import UserError, exit_on_user_error
from transfusion_mot.files import SNAPSHOT_INDEX


def main(arguments: Sequence[str]) -> None:
    """Run the command line."""
    config = parse_config(
        AutoencoderTrainingConfig, arguments, __doc__ or "", prog="python -m transfusion_mot.autoencoder"
    )
    refuse_missing_sources(config.data.sources)
    for name, what in (("config.json", "a codec"), (SNAPSHOT_INDEX, "a snapshot"), ("state", "a run of train.py")):
        if (Path(config.output_dir) / name).exists():
            raise UserError(
                f"output_dir {config.output_dir} holds {what} ({name}), which would be overwritten; choose another "
                "folder, or remove it"
            )
    # PyTorch takes seconds to load; --help and mistakes in the configuration end before it.
    import torch

    from transfusion_mot.codec_training.train import train_codec

    metrics = train_codec(config, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    print(json.dumps({key: value for key, value in metrics.items() if key != "log"}, indent=2))


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    with exit_on_user_error():
        main(sys.argv[1:])
