"""Encode the media of all sources to latents or codes once, on any number of devices.

    accelerate launch -m transfusion_mot.data.cache --config configs/emoji_small.yaml

It takes the configuration of train.py and fills `data.cache_dir`, from which training reads. Run it again after an
interruption: it encodes only the missing items. Any setting of `train.py --help` can be given as key=value.
"""

import argparse
import dataclasses
import logging
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from datetime import timedelta

from transfusion_mot.errors import exit_on_user_error
from transfusion_mot.run.early import checked_sections


def parse_arguments(arguments: Sequence[str]) -> list[str]:
    """The settings of train.py on the command line.

    Raises:
        UserError: They have mistakes.
    """
    parser = argparse.ArgumentParser(
        prog="python -m transfusion_mot.data.cache",
        usage="%(prog)s [--config FILE] [key=value ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _, rest = parser.parse_known_args(arguments)
    checked_sections(rest)
    return rest


if __name__ == "__main__":
    # Before PyTorch loads, which takes seconds: --help, and mistakes in the configuration.
    with exit_on_user_error():
        parse_arguments(sys.argv[1:])

from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from transfusion_mot.codecs.load import load_codec
from transfusion_mot.data.encoded_media import encoded_media
from transfusion_mot.data.encoding import check_media_sizes
from transfusion_mot.data.mixture import open_documents
from transfusion_mot.data.sources.base import NOUNS, Split, counted
from transfusion_mot.models.compilation import allow_shapes
from transfusion_mot.run.begin import settled_config

SPLITS: tuple[Split, Split] = ("train", "held_out")


def main(arguments: Sequence[str]) -> None:
    """Run the command line."""
    config = settled_config(parse_arguments(arguments))
    # This command encodes for runs with `prepared`.
    data = dataclasses.replace(config.data, latents="cache")
    # Processes with less work wait for the others at the end.
    accelerator = Accelerator(
        mixed_precision="no", kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=12))]
    )
    # The encoder is compiled for the images of each bucket.
    allow_shapes(len(data.image_sizes))
    codecs = {
        name: load_codec(codec, config.model.modalities[name].objective, accelerator.device)
        for name, codec in config.codecs.items()
    }
    check_media_sizes(data, codecs, config.model)
    lines = []
    num_encoded, seconds = Counter[str](), defaultdict[str, float](float)
    for split in SPLITS:
        # The first process indexes the sources; the others read the index.
        with accelerator.main_process_first():
            sources = open_documents(data, split, config.model.readers.values())
        for name, media in (named for source in sources for named in source.documents.media.items()):
            begun = time.perf_counter()
            encoded = encoded_media(
                media, codecs[name], data, batch_size=config.codecs[name].batch_size, accelerator=accelerator
            )
            noun = NOUNS[media.medium]
            num_encoded[noun] += encoded.num_encoded
            seconds[noun] += time.perf_counter() - begun
            usable = counted({noun: int(encoded.readable.sum())})
            lines.append(
                f"{media.name} ({split}): {usable}, {encoded.num_encoded:,} of them new; "
                f"skipped: {counted(encoded.skipped) or 'none'}; {encoded.num_bytes / 1e6:,.1f} MB in {encoded.folder}"
            )
    accelerator.print("\n".join(lines))
    for noun, number in num_encoded.items():
        if number:
            rate = number / seconds[noun]
            accelerator.print(f"encoded {counted({noun: number})} in {seconds[noun]:.1f} s: {rate:,.1f} {noun}s/s")
    accelerator.end_training()


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    logging.getLogger("transfusion_mot").setLevel(logging.INFO)
    with exit_on_user_error():
        main(sys.argv[1:])
