"""Speed of the data loader: rows from cached latents, and from JPEG files whose images the device would encode.

    python -m benchmarks.data --workers 1 2 4 8 --consumption 250

It makes its own data: photograph-like JPEG files of 640 x 480, captions as long as COCO's, and texts. It reads them
with the loader of train.py, into pinned memory and to the GPU if there is one. The default shape is for a
163M-parameter model: 32 rows of 1024 text slots and 4 images of 256 patches, latents 8 x 32 x 32. `--consumption` is
the speed of training in rows a second (rows of a step / seconds a step); the last column is the speed of the loader
relative to it. A table is printed, and written with its settings to a JSON file.
"""

import argparse
import contextlib
import io
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from transfusion_mot.config import TEXT, CodecConfig, DataConfig, ModelConfig, SourceConfig
from transfusion_mot.cores import usable_cores
from transfusion_mot.errors import UserError, exit_on_user_error
from transfusion_mot.evaluation.report.content import Metric, save_metrics
from transfusion_mot.outputs import check_writable_file
from transfusion_mot.path_options import PathOption, existing


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--workers", type=int, nargs="+", default=[1, 2, 4, 8], metavar="N", help="numbers of worker processes to try")
    add("--consumption", type=float, default=250.0, metavar="X", help="rows a second that training uses (250)")
    add("--rows", type=int, default=32, metavar="B", help="rows of a step (32)")
    add("--text-slots", type=int, default=1024, metavar="T", help="text slots of a row (1024)")
    add("--images-per-row", type=int, default=4, metavar="K", help="image slots of a row (4)")
    add("--image-size", type=int, default=256, metavar="PX", help="height and width of images after resizing (256)")
    add("--latent-channels", type=int, default=8, metavar="C", help="channels of the latents (8)")
    add("--downsampling", type=int, default=8, metavar="F", help="pixels a latent, along a side (8)")
    add("--num-images", type=int, default=2000, metavar="N", help="JPEG files to write (2000)")
    add("--seconds", type=float, default=20.0, metavar="S", help="how long each number is measured (20)")
    add(
        "--folder",
        action=PathOption,
        check=existing("a folder to write into"),
        metavar="DIR",
        help="folder for temporary data (default: the system's)",
    )
    add("--device", help="cpu, cuda, ... (default: cuda if there is one)")
    add("--output", default="benchmarks/results/data.json", metavar="FILE", help="JSON file to write")
    given = parser.parse_args(arguments)
    check_writable_file(given.output, "--output")
    return given


if __name__ == "__main__":
    # Before PyTorch loads, which takes seconds: --help, and mistakes in the options.
    with exit_on_user_error():
        parse_arguments(sys.argv[1:])

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image

from benchmarks.train_step import without_output
from transfusion_mot.codecs.autoencoder_kl import Autoencoder, set_normalisation
from transfusion_mot.data.loader import LaneLoader
from transfusion_mot.data.mixture import Sources, open_documents, training_texts, with_encoded
from transfusion_mot.data.packing import Packer
from transfusion_mot.data.tokenizer import TextTokenizer, train_tokenizer

_JPEG_SIZE = (480, 640)
_MODALITY = SourceConfig().modality
_WARM_UP_STEPS = 3


def main() -> None:
    given = parse_arguments(sys.argv[1:])
    device = torch.device(given.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    metrics = []
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        write_data(Path(folder), given.num_images)
        autoencoder = random_autoencoder(given.latent_channels, given.downsampling, device)
        data = DataConfig(
            sources=[
                SourceConfig(kind="imagefolder", path=f"{folder}/images"),
                SourceConfig(kind="text", path=f"{folder}/texts.jsonl"),
            ],
            image_size=given.image_size,
            held_out_fraction=0.0,
            slots={TEXT: given.text_slots, _MODALITY: given.images_per_row},
            num_workers=max(given.workers),
            cache_dir=f"{folder}/cache",
        )
        documents = open_documents(data, "train")
        tokenizer = train_tokenizer(training_texts(documents), 8192, list(data.slots))
        for latents in ("cache", "online"):
            data.latents = latents
            sources = with_encoded(documents, data, {_MODALITY: autoencoder}, {_MODALITY: CodecConfig(batch_size=32)})
            for workers in given.workers:
                data.num_workers = workers
                rows, loaded = speed(sources, tokenizer, data, given.rows, given.seconds, device)
                protocol = {
                    "from": "cached latents" if latents == "cache" else "JPEG files",
                    "workers": loaded,
                    "images a second": round(rows * given.images_per_row, 1),
                    "rows a second and worker": round(rows / max(1, loaded), 2),
                    "times the consumption": round(rows / given.consumption, 2),
                }
                metrics.append(Metric("rows a second", rows, protocol))
                print(f"{protocol['from']}, {loaded} workers: {rows:,.1f} rows a second")
    shape = f"{given.text_slots} text slots + {given.images_per_row} images of {data.image_size} px"
    settings = {
        "rows a step": given.rows,
        "row": shape,
        "latents": list(sources.latent_shapes[_MODALITY][0]),
        "consumption (rows a second)": given.consumption,
        "seconds": given.seconds,
        "device": name,
        "CPUs": usable_cores(),
    }
    metrics = [Metric(metric.name, metric.value, metric.protocol | settings) for metric in metrics]
    save_metrics(metrics, given.output, ["python", "-m", "benchmarks.data", *without_output(sys.argv[1:])])
    print(f"\n{table(metrics)}\n\n{json.dumps(settings)}\nthe numbers are in {given.output}")


def write_data(folder: Path, num_images: int) -> None:
    """Write JPEG files with captions, and the same number of texts, with the word frequencies of English."""
    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = ["".join(rng.choice(letters, length)) for length in rng.integers(2, 10, 5000)]
    frequencies = 1 / np.arange(1, len(words) + 1)
    frequencies /= frequencies.sum()

    def sentence(length: int) -> str:
        return " ".join(rng.choice(words, length, p=frequencies))

    (folder / "images").mkdir()
    # COCO's captions have 10.5 words on average, nearly all of them between 8 and 15.
    lines = [
        {"file_name": f"{i}.jpg", "text": [sentence(n) for n in np.clip(rng.poisson(10.5, 5), 7, 40)]}
        for i in range(num_images)
    ]
    (folder / "images" / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with (folder / "texts.jsonl").open("w") as file:
        for length in rng.integers(100, 1500, num_images):
            file.write(json.dumps({"text": sentence(length)}) + "\n")
    with ThreadPoolExecutor() as pool:
        for number, content in enumerate(pool.map(jpeg, range(num_images))):
            (folder / "images" / f"{number}.jpg").write_bytes(content)


def jpeg(seed: int) -> bytes:
    """A picture with a spectrum like that of a photograph and a similar file size (about 100 kB)."""
    rng = np.random.default_rng(seed)
    height, width = _JPEG_SIZE
    picture = np.zeros((height, width, 3), dtype=np.float32)
    for side in (4, 16, 64, 256):
        noise = rng.integers(0, 256, (side * 3 // 4, side, 3), dtype=np.uint8)
        resized = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
        picture += (np.asarray(resized, dtype=np.float32) - 128) * (4 / side) ** 0.5
    file = io.BytesIO()
    Image.fromarray((picture * 0.7 + 128).clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def random_autoencoder(channels: int, downsampling: int, device: torch.device) -> Autoencoder:
    """A narrow autoencoder: the content of latents and the time of encoding do not matter."""
    blocks = downsampling.bit_length()
    if downsampling != 2 ** (blocks - 1):
        raise UserError(f"--downsampling is {downsampling}; it must be a power of two")
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=(4,) * blocks,
        latent_channels=channels,
        norm_num_groups=2,
        mid_block_add_attention=False,
    )
    set_normalisation(vae, [0.0] * channels, [1.0] * channels)
    return Autoencoder(vae.to(device))


def speed(
    sources: Sources, tokenizer: TextTokenizer, data: DataConfig, rows: int, seconds: float, device: torch.device
) -> tuple[float, int]:
    """Maximum rows a second of a rank's loader => (rows, workers)."""
    packer = Packer(
        sources, tokenizer, data, ModelConfig(), num_lanes=rows, seed=0, timesteps_from_uniform=lambda uniform: uniform
    )
    # Without an encoder: the batch is on the device with its pixels; the speed of the autoencoder is not measured.
    loader = LaneLoader(
        packer,
        rank=0,
        world_size=1,
        num_workers=data.num_workers,
        states=None,
        first_step=0,
        num_steps=sys.maxsize,
        device=device,
    )
    with contextlib.closing(iter(loader)) as steps:
        for _ in itertools.islice(steps, _WARM_UP_STEPS * max(1, loader.num_workers)):
            pass
        synchronise(device)
        begun, done = time.perf_counter(), 0
        while (taken := time.perf_counter() - begun) < seconds:
            next(steps)
            synchronise(device)
            done += 1
    return done * rows / taken, loader.num_workers


def synchronise(device: torch.device) -> None:
    """Wait for copies to the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def table(metrics: list[Metric]) -> str:
    """A markdown table of the numbers."""
    columns = ("from", "workers", "images a second", "rows a second and worker", "times the consumption")
    lines = [
        "| " + " | ".join(("rows a second", *columns)) + " |",
        "| ---: | --- " + "| ---: " * (len(columns) - 1) + "|",
    ]
    for metric in metrics:
        cells = [f"{metric.value:,.1f}", *(str(metric.protocol[column]) for column in columns)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
