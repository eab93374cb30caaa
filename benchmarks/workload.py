"""Training rows of the benchmarks: emoji with their names and English text, at a given shape."""

import json
from pathlib import Path
from pydoc_data.topics import topics

from accelerate import Accelerator
from PIL import Image

from benchmarks.shapes import IMAGE, Layout, Size
from transfusion_mot.codecs.autoencoder_kl import Autoencoder
from transfusion_mot.config import TEXT, CodecConfig, DataConfig, DiffusionConfig, SourceConfig
from transfusion_mot.data.emoji import emoji_captions, render_emoji
from transfusion_mot.data.loader import LaneLoader
from transfusion_mot.data.mixture import open_documents, with_encoded
from transfusion_mot.data.packing import Packer
from transfusion_mot.data.tokenizer import train_tokenizer
from transfusion_mot.diffusion import Diffusion

AUTOENCODER = Path(__file__).parent.parent / "checkpoints" / "vae-emoji"
# Latent channels of the repository's autoencoder.
CHANNELS = 4
# The objective of the emoji.
DIFFUSION = DiffusionConfig(timestep_distribution="logit_normal")


def make_loader(
    layout: Layout, size: Size, accelerator: Accelerator, *, folder: Path, num_steps: int, num_workers: int
) -> LaneLoader:
    """Batches of `layout` on each device, through the tokenizer, latent cache, packer and workers of training.

    Args:
        layout: Layout of the rows of each device.
        size: Size of a model for these rows.
        accelerator: Accelerator of the run.
        folder: Folder for sources and latents.
        num_steps: Number of batches.
        num_workers: Processes that prepare rows.
    """
    data = DataConfig(
        sources=[SourceConfig("imagefolder", str(folder / "images")), SourceConfig("text", str(folder / "text.jsonl"))],
        image_size=layout.image_size,
        held_out_fraction=0.0,
        slots={TEXT: layout.text_slots, IMAGE: layout.images},
        cache_dir=str(folder / "cache"),
    )
    with accelerator.main_process_first():
        if not (folder / "text.jsonl").exists():
            write_sources(folder, layout.image_size)
        documents = open_documents(data, "train")
    autoencoder = Autoencoder.load(str(AUTOENCODER), accelerator.device)
    sources = with_encoded(documents, data, {IMAGE: autoencoder}, {IMAGE: CodecConfig()}, accelerator)
    model = size.model(dense=False)
    packer = Packer(
        sources,
        train_tokenizer(topics.values(), 512, model.stream_order),
        data,
        model,
        num_lanes=layout.rows * accelerator.num_processes,
        seed=0,
        timesteps_from_uniform=Diffusion.from_config(DIFFUSION).timesteps_from_uniform,
    )
    return LaneLoader(
        packer,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        num_workers=num_workers,
        states=None,
        first_step=0,
        num_steps=num_steps,
        device=accelerator.device,
    )


def write_sources(folder: Path, image_size: int, num_images: int = 64) -> None:
    """Write a folder of emoji with their names, and the topics of Python's own help as texts."""
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    lines = []
    for stem, caption in list(emoji_captions().items())[:num_images]:
        Image.fromarray(render_emoji(stem, image_size)).save(images / f"{stem}.png")
        lines.append(json.dumps({"file_name": f"{stem}.png", "text": caption}))
    (images / "metadata.jsonl").write_text("\n".join(lines))
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in topics.values()))
