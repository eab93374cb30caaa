"""Train a codec: an AutoencoderKL for images, with kind=codes a VQModel, with kind=audio_codes a speech codec.

    python -m transfusion_mot.autoencoder --config configs/codecs/vq-emoji.yaml

The output folder receives the codec, its metrics and a picture of reconstructions; for speech also WAV files.
"""

import json
import logging
import sys
from collections.abc import Sequence

from transfusion_mot.config import AutoencoderTrainingConfig, parse_config
from transfusion_mot.data.sources.paths import refuse_missing_sources
from transfusion_mot.errors import exit_on_user_error


def main(arguments: Sequence[str]) -> None:
    """Run the command line."""
    config = parse_config(AutoencoderTrainingConfig, arguments, __doc__ or "")
    refuse_missing_sources(config.data.sources)
    # PyTorch takes seconds to load; --help and mistakes in the configuration end before it.
    import torch

    from transfusion_mot.codec_training.train import train_codec

    metrics = train_codec(config, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    print(json.dumps({key: value for key, value in metrics.items() if key != "log"}, indent=2))


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    with exit_on_user_error():
        main(sys.argv[1:])
