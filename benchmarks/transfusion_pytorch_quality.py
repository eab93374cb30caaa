"""Quality of the package transfusion-pytorch 0.20.0 after the training time of a run of this project.

    pip install transfusion-pytorch==0.20.0
    python -m benchmarks.transfusion_pytorch_quality --run runs/emoji --minutes 4.5 --output runs/transfusion-pytorch

It trains on the latents and captions of the run, with the run's tokenizer and share of captions before images. Then it
paints the prompts and captions the images of the run's evaluation (evaluate/benchmark.py), with the same metrics. Its
settings are those of its README (width 512, 8 layers, 10 % of the prompts dropped, midpoint sampling, guidance 3), with
its two-dimensional positions for images and its averaged weights; learning rate and documents a step are options.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from transfusion_mot.config import RunConfig, parse_config
from transfusion_mot.errors import UserError, exit_on_user_error
from transfusion_mot.evaluation.report.content import metrics_table, read_report, save_metrics
from transfusion_mot.files import lines_of
from transfusion_mot.outputs import check_writable_folder
from transfusion_mot.path_options import PathOption, existing


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.transfusion_pytorch_quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--run",
        action=PathOption,
        check=existing("a run folder of train.py"),
        required=True,
        metavar="FOLDER",
        help="run folder of train.py",
    )
    parser.add_argument(
        "--evaluation",
        action=PathOption,
        check=existing("a folder that evaluate/benchmark.py has written"),
        metavar="FOLDER",
        help="evaluation of the run by evaluate/benchmark.py (the newest)",
    )
    parser.add_argument(
        "--output", required=True, metavar="FOLDER", help="folder for generated/, captions and metrics.json"
    )
    parser.add_argument("--minutes", type=float, default=8.0, metavar="N", help="of training (8)")
    parser.add_argument("--rows", type=int, default=128, metavar="N", help="documents a step (128)")
    parser.add_argument("--lr", type=float, default=3e-4, metavar="X", help="learning rate (3e-4)")
    parser.add_argument("--hidden-size", type=int, default=512, metavar="N", help="a multiple of 64 (512)")
    parser.add_argument("--num-layers", type=int, default=8, metavar="N", help="layers (8)")
    parser.add_argument("--num-inference-steps", type=int, default=25, metavar="N", help="two evaluations each (25)")
    parser.add_argument("--guidance-scale", type=float, default=3.0, metavar="X", help="(3)")
    parser.add_argument("--batch-size", type=int, default=128, metavar="N", help="images painted at a time (128)")
    parser.add_argument(
        "--every", type=int, default=4, metavar="N", help="caption every N-th image: it writes slowly (4)"
    )
    given = parser.parse_args(arguments)
    check_writable_folder(given.output, "--output")
    return given


if __name__ == "__main__":
    # Before PyTorch loads, which takes seconds: --help, and mistakes in the options.
    with exit_on_user_error():
        parse_arguments(sys.argv[1:])

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.optim import AdamW
from tqdm import tqdm
from transfusion_pytorch import Transfusion

from transfusion_mot.codecs.base import LatentCodec
from transfusion_mot.codecs.load import load_codec
from transfusion_mot.data.images import to_pil, to_pixels
from transfusion_mot.data.mixture import open_documents, with_encoded
from transfusion_mot.data.sources.base import CaptionedImages
from transfusion_mot.data.tokenizer import TextTokenizer, load_tokenizer
from transfusion_mot.evaluation.captions.metrics import caption_metrics
from transfusion_mot.evaluation.distances.metrics import image_distance
from transfusion_mot.evaluation.features.load import load_feature_network
from transfusion_mot.models.adapters import patchify, unpatchify

_WARMUP_STEPS = 100
# Its tokens around an image and for the image's size, with a margin.
_MARKS = 16


@dataclass(frozen=True)
class Captioned:
    """Training images on the device.

    Attributes:
        mean, std: Posterior of the latents, [N, C, Y, X] each.
        captions: Token ids of each image's captions.
    """

    mean: Tensor
    std: Tensor
    captions: list[list[Tensor]]


def read_run(config: RunConfig, codec: LatentCodec, tokenizer: TextTokenizer, device: torch.device) -> Captioned:
    """All captioned training images of a run."""
    (modality,) = config.codecs
    sources = with_encoded(open_documents(config.data, "train"), config.data, {modality: codec}, config.codecs)
    means, stds, captions = [], [], []
    for source in sources.sources:
        if not isinstance(source.documents, CaptionedImages):
            continue
        encoded = source.encoded[modality]
        assert encoded.kind == "latents"
        for index in np.flatnonzero(encoded.readable):
            mean, std = encoded.posterior(int(index))
            means.append(mean)
            stds.append(std)
            texts = source.documents.captions(int(index))
            captions.append([torch.tensor(tokenizer.encode(text), device=device) for text in texts])
    posterior = [torch.from_numpy(np.stack(part)).to(device) for part in (means, stds)]
    return Captioned(posterior[0], posterior[1], captions)


class Peer:
    """Its model, optimizer and averaged weights.

    Args:
        config: Configuration of the run: patch size, share of captions before images.
        num_text_tokens: Number of ids of the tokenizer.
        latent_shape: [C, Y, X].
        hidden_size, num_layers: Sizes of its transformer, whose heads have width 64.
        lr: Learning rate after warm-up.
        device: Device of training.
    """

    def __init__(
        self,
        config: RunConfig,
        num_text_tokens: int,
        latent_shape: torch.Size,
        hidden_size: int,
        num_layers: int,
        lr: float,
        device: torch.device,
    ) -> None:
        channels, height, width = latent_shape
        self.config = config
        (modality,) = config.model.of_objective("diffusion")
        self.patch = config.model.modalities[modality].patch_size
        self.grid = (height // self.patch, width // self.patch)
        self.elements = self.patch**2 * channels
        self.num_text_tokens = num_text_tokens
        self.device = device
        self.lr = lr
        self.model = Transfusion(
            num_text_tokens=num_text_tokens,
            dim_latent=self.elements,
            modality_default_shape=self.grid,
            modality_num_dim=2,
            add_pos_emb=True,
            transformer={"dim": hidden_size, "depth": num_layers, "dim_head": 64, "heads": max(1, hidden_size // 64)},
        ).to(device)
        self.optimizer = AdamW(self.model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
        self.averaged = self.model.create_ema(0.999)
        # The default of every tenth step would leave early weights in the averages of a run of minutes.
        self.averaged.update_every = 1

    def patches(self, latents: Tensor) -> Tensor:
        """Latents [B, C, Y, X] => its images [B, rows, columns, elements]."""
        return patchify(latents, self.patch).unflatten(1, self.grid)

    def latents(self, images: Tensor) -> Tensor:
        """The reverse of `patches`."""
        height, width = (side * self.patch for side in self.grid)
        return unpatchify(images.flatten(1, 2), self.patch, height, width)

    def documents(self, data: Captioned, rows: int) -> list[list[Tensor]]:
        """Randomly drawn documents of a caption and an image, or of an image and a caption."""
        chosen = torch.randint(len(data.captions), (rows,))
        mean, std = (part[chosen.to(self.device)].float() for part in (data.mean, data.std))
        images = self.patches(mean + std * torch.randn_like(mean))
        documents = []
        for image, index in zip(images, chosen.tolist(), strict=True):
            captions = data.captions[index]
            caption = captions[int(torch.randint(len(captions), ()))]
            first = torch.rand(()) < self.config.data.caption_first_prob
            documents.append([caption, image] if first else [image, caption])
        return documents

    def train(self, data: Captioned, minutes: float, rows: int) -> int:
        """Train for a number of minutes => steps."""
        begun = time.monotonic()
        steps = 0
        with tqdm(desc="transfusion-pytorch", unit="step") as progress:
            while time.monotonic() - begun < 60 * minutes:
                for group in self.optimizer.param_groups:
                    group["lr"] = self.lr * min(1.0, (steps + 1) / _WARMUP_STEPS)
                with torch.autocast(self.device.type, torch.bfloat16):
                    loss = self.model(self.documents(data, rows))
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
                self.averaged.update()
                steps += 1
                if steps % 50 == 0:
                    progress.set_postfix(loss=f"{loss.item():.3f}")
                progress.update()
        return steps

    @torch.no_grad()
    def paint(self, prompts: Sequence[Tensor], num_steps: int, guidance_scale: float) -> Tensor:
        """Token ids of prompts => latents [B, C, Y, X]. A step is two evaluations, as in its midpoint method."""
        samples = self.averaged.sample_many(
            list(prompts),
            # No text is written after the image.
            max_length=1,
            force_modality_at_start=0,
            fixed_modality_shape=self.grid,
            modality_steps=num_steps,
            cfg_scale=guidance_scale,
            return_without_prompt=True,
        )
        return self.latents(torch.stack([sample[0].tensor for sample in samples]))

    @torch.no_grad()
    def caption(self, latents: Tensor, max_new_tokens: int) -> list[list[int]]:
        """Latents [B, C, Y, X] => token ids of greedy captions."""
        length = self.grid[0] * self.grid[1] + _MARKS + max_new_tokens
        prompts = [(0, image) for image in self.patches(latents)]
        samples = self.averaged.sample_many(prompts, max_length=length, text_temperature=0.0)
        return [list(self._words(sample)) for sample in samples]

    def _words(self, sample: Sequence[object]) -> Iterator[int]:
        """The text after the image, up to its end."""
        for part in sample[2:]:
            if not isinstance(part, Tensor):
                return
            for token in part.tolist():
                if token == self.model.eos_id:
                    return
                if token < self.num_text_tokens:
                    yield token


def main(arguments: Sequence[str]) -> None:
    """Train, paint, caption and measure."""
    given = parse_arguments(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run, output = Path(given.run), Path(given.output)
    evaluation = find_evaluation(run) if given.evaluation is None else Path(given.evaluation)
    report = read_report(evaluation)
    config = parse_config(RunConfig, ["--config", str(run / "config.yaml")], "")
    tokenizer = load_tokenizer(str(run / "tokenizer"), config.model.stream_order)
    (section,) = config.codecs.values()
    codec = cast(LatentCodec, load_codec(section, "diffusion", device))
    data = read_run(config, codec, tokenizer, device)

    torch.manual_seed(config.training.seed)
    peer = Peer(
        config, tokenizer.vocab_size, data.mean.shape[1:], given.hidden_size, given.num_layers, given.lr, device
    )
    parameters = sum(parameter.numel() for parameter in peer.model.parameters())
    print(f"{parameters / 1e6:.1f}M parameters, {len(data.captions):,} images, {given.rows} documents a step")
    steps = peer.train(data, given.minutes, given.rows)
    # The output folder does not affect results.
    options = {name: value for name, value in vars(given).items() if name != "output"}
    settings = {"parameters": parameters, "steps": steps, **options}

    (output / "generated").mkdir(parents=True, exist_ok=True)
    lines = [
        json.loads(line) for line in lines_of((evaluation / "generated" / "metadata.jsonl").read_text(encoding="utf-8"))
    ]
    for start in range(0, len(lines), given.batch_size):
        batch = lines[start : start + given.batch_size]
        prompts = [torch.tensor(tokenizer.encode(line["text"]), device=device) for line in batch]
        latents = peer.paint(prompts, given.num_inference_steps, given.guidance_scale)
        for line, image in zip(batch, to_pil(codec.decode(latents.float())), strict=True):
            image.save(output / "generated" / line["file_name"])
    (output / "generated" / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    real = [evaluation / "real" / line["file_name"] for line in lines]
    painted = [output / "generated" / line["file_name"] for line in lines]
    metrics = image_distance(real, painted, load_feature_network("efficientnet", device))
    named_settings = [f"{key}={value}" for key, value in settings.items()]
    # It writes captions token by token without a cache, which may take longer than everything else.
    save_metrics(metrics, str(output / "metrics.json"), named_settings)
    pictures = report.captions[:: given.every]
    captions = write_captions(
        peer, [evaluation / picture.file for picture in pictures], codec, tokenizer, given.batch_size
    )
    (output / "captions.json").write_text(json.dumps(captions, indent=1) + "\n")
    metrics += caption_metrics(captions, [picture.captions for picture in pictures])
    save_metrics(metrics, str(output / "metrics.json"), named_settings)
    print(f"{steps:,} steps of {given.rows} documents in {given.minutes:g} minutes\n{metrics_table(metrics)}")


def find_evaluation(run: Path) -> Path:
    """The newest evaluation of a run.

    Raises:
        UserError: There is none.
    """
    found = sorted((run / "evaluation").glob("*/report.json"))
    if not found:
        raise UserError(f"{run} has no evaluation; make one with evaluate/benchmark.py, or give it by --evaluation")
    return found[-1].parent


def write_captions(
    peer: Peer,
    files: Sequence[Path],
    codec: LatentCodec,
    tokenizer: TextTokenizer,
    batch_size: int,
    max_new_tokens: int = 64,
) -> list[str]:
    """Its captions of images, in their order."""
    captions = []
    for start in range(0, len(files), batch_size):
        opened = [Image.open(file).convert("RGB") for file in files[start : start + batch_size]]
        pixels = to_pixels(np.stack([np.asarray(image) for image in opened]))
        latents, _ = codec.encode(pixels.to(peer.device))
        captions += [tokenizer.decode(ids) for ids in peer.caption(latents, max_new_tokens)]
    return captions


if __name__ == "__main__":
    with exit_on_user_error():
        main(sys.argv[1:])
