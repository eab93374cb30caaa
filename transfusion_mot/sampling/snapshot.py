"""A snapshot as a diffusers pipeline: its parts, loaded, checked against each other, and saved."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ModelMixin, SchedulerMixin
from transformers import HubertModel, PreTrainedModel, PreTrainedTokenizerFast

from transfusion_mot import schedulers
from transfusion_mot.codecs.audio_codes import CLASSES as AUDIO_CLASSES
from transfusion_mot.codecs.audio_codes import AudioCodes
from transfusion_mot.codecs.autoencoder_kl import Autoencoder
from transfusion_mot.codecs.base import AudioCodec, Codec, ImageCodec
from transfusion_mot.codecs.hubert_units import HubertUnits
from transfusion_mot.codecs.image_codes import CLASSES, ImageCodes
from transfusion_mot.config import TEXT, CodecConfig
from transfusion_mot.data.tokenizer import TextTokenizer
from transfusion_mot.errors import UserError
from transfusion_mot.files import ADAPTER_CONFIG, SNAPSHOT_INDEX, find_snapshot, refuse_dangling_links
from transfusion_mot.hub_names import refuse_missing_path
from transfusion_mot.models.modalities import DiffusionModality
from transfusion_mot.models.transfusion import TransfusionMoT
from transfusion_mot.sampling.lora import AdapterInfo, LoraPipeline
from transfusion_mot.sampling.sizes import ImageSizes, Size
from transfusion_mot.sampling.workspace import Workspace

MODEL_CARD = "README.md"
# Components that are codecs, and the setting that names their modality.
COMPONENT_MODALITIES = {"vae": "image_modality", "audio_tokenizer": "audio_modality"}
_NO_IMAGES = "this model has no pictures: its snapshot has no vae; use one that was trained on images"
_NO_AUDIO = "this model has no speech: its snapshot has no audio_tokenizer; use one that was trained on audio"
# Code that diffusers' own `DiffusionPipeline.from_pretrained` runs to find the class of a snapshot.
_SHIM_MODULE = "pipeline"
_SHIM = '''\
"""Lets diffusers' `DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)` find the class of this model.

The package transfusion-mot must be installed.
"""

from transfusion_mot.pipeline import TransfusionPipeline

__all__ = ["TransfusionPipeline"]
'''


class SnapshotPipeline(LoraPipeline, DiffusionPipeline):
    """The parts of a `TransfusionPipeline`.

    Args:
        transformer: The model.
        scheduler: diffusers scheduler for sampling. Another one may be assigned later, such as
            `X.from_config(pipeline.scheduler.config)`: it is adapted to the model's training, or refused.
        tokenizer: Its tokenizer, `TextTokenizer.hf`.
        vae: The codec of its pictures: `AutoencoderKL`, or for codes one of `codecs.image_codes.CLASSES`. None for a
            model without pictures.
        audio_tokenizer: The model inside the codec of its audio. None for a model without audio.
        image_size: Height and width in pixels of the images it was trained on, if there are no `image_sizes`.
        max_prompt_tokens: Longest prompt of training, without special tokens; None is no limit.
        num_inference_steps: Default reverse steps of a call.
        guidance_scale: Default classifier-free guidance of a call; 1 is off.
        image_sizes: All image sizes of training, `{"trained": [[height, width], ...], "fit": "crop"}`; see
            `ImageSizes`. (diffusers would take a list for a component.)
        trained_for: Prediction type and noise schedule of training, from `transfusion_mot.schedulers.trained_for`; None
            takes those of `scheduler`.
        image_modality: The modality of the pictures; None is the only modality besides text.
        trained_on_edits: Whether it was trained on editing pairs, and so can edit pictures.
        audio_modality: The modality of the audio.
        max_audio_seconds: Longest audio of training; None is no limit.
        examples: For the demo page: some `prompts`, and common `beginnings` of its captions, if there are any.

    Attributes:
        workspace: Memory kept for the next call of the same shape; `workspace.release()` frees it.

    Raises:
        UserError: The parts do not belong together.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae", "audio_tokenizer"]  # noqa: RUF012
    # Hooks of accelerate act on `forward`, but models of transformers are called by `encode` and `decode`.
    _exclude_from_cpu_offload = ["audio_tokenizer"]  # noqa: RUF012

    # diffusers takes arguments without a default for components, so every setting needs a default.
    def __init__(
        self,
        transformer: TransfusionMoT,
        vae: ModelMixin | PreTrainedModel | None,
        scheduler: SchedulerMixin,
        tokenizer: PreTrainedTokenizerFast,
        image_size: int | None = None,
        max_prompt_tokens: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 3.0,
        image_sizes: dict[str, Any] | None = None,
        trained_for: dict[str, Any] | None = None,
        image_modality: str | None = None,
        trained_on_edits: bool = False,
        audio_tokenizer: ModelMixin | PreTrainedModel | None = None,
        audio_modality: str | None = None,
        max_audio_seconds: float | None = None,
        examples: dict[str, list[str]] | None = None,
    ) -> None:
        super().__init__()
        self._adapters, self._put_in, self._pristine, self._editing = {}, set(), None, set()
        # Set before the scheduler, which must fit it.
        self.register_to_config(trained_for=trained_for or schedulers.trained_for(scheduler))
        self.register_modules(
            transformer=transformer, scheduler=scheduler, tokenizer=tokenizer, vae=vae, audio_tokenizer=audio_tokenizer
        )
        self.register_to_config(
            image_size=image_size,
            max_prompt_tokens=max_prompt_tokens,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            image_sizes=image_sizes,
            image_modality=image_modality,
            trained_on_edits=trained_on_edits,
            audio_modality=audio_modality,
            max_audio_seconds=max_audio_seconds,
            examples=examples,
        )
        architecture = transformer.architecture
        self.text_tokenizer = TextTokenizer(tokenizer, architecture.made)
        self.workspace = Workspace()
        # Text of its README.md.
        self.model_card: str | None = None
        self._images = _modality_of(architecture.made, "image_modality", image_modality, vae)
        self._audio = _modality_of(architecture.made, "audio_modality", audio_modality, audio_tokenizer)
        self._check_tokenizer()
        self._sizes = None
        if vae is not None:
            self._check_vae()
            own = transformer.modality(self.image_modality)
            multiple = self.codec.downsampling * (own.patch_size if isinstance(own, DiffusionModality) else 1)
            self._sizes = ImageSizes(
                multiple, **(image_sizes or {"trained": [[image_size, image_size]], "fit": "crop"})
            )
        if audio_tokenizer is not None:
            self._check_audio_tokenizer()

    @property
    def has_images(self) -> bool:
        """Whether it reads pictures."""
        return self._images is not None

    @property
    def has_audio(self) -> bool:
        """Whether it reads audio."""
        return self._audio is not None

    @property
    def image_modality(self) -> str:
        """The modality of the pictures.

        Raises:
            UserError: It has none.
        """
        if self._images is None:
            raise UserError(_NO_IMAGES)
        return self._images

    @property
    def audio_modality(self) -> str:
        """The modality of the audio.

        Raises:
            UserError: It has none.
        """
        if self._audio is None:
            raise UserError(_NO_AUDIO)
        return self._audio

    @property
    def sizes(self) -> ImageSizes:
        """The sizes of its pictures.

        Raises:
            UserError: It has none.
        """
        if self._sizes is None:
            raise UserError(_NO_IMAGES)
        return self._sizes

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "scheduler":
            value = schedulers.fit_scheduler(value, self.config.trained_for)
        super().__setattr__(name, value)

    def _check_tokenizer(self) -> None:
        size, ids = self.transformer.config.sizes[TEXT], self.text_tokenizer.vocab_size
        # A language model can have spare rows after its ids.
        has_spare = self.transformer.architecture.modalities[TEXT].vocab_size is not None
        if ids > size or (ids < size and not has_spare):
            raise UserError(
                f"the tokenizer has {ids} ids, but the transformer was trained with {size}; use the tokenizer of its "
                "training"
            )

    def _check_vae(self) -> None:
        _refuse_missing_weights(self.vae, "vae")
        if self.config.image_size is None:
            raise UserError(
                f"the snapshot has no image_size, the size of its pictures; write it into {SNAPSHOT_INDEX}, or give "
                "image_size=PIXELS"
            )
        vae_class, size = type(self.vae).__name__, self.transformer.config.sizes[self.image_modality]
        objective = self.transformer.architecture.modalities[self.image_modality].objective
        known = [AutoencoderKL.__name__] if objective == "diffusion" else list(CLASSES)
        if vae_class not in known:
            raise UserError(
                f"the vae is a {vae_class}, but pictures with the objective {objective} need {' or '.join(known)}; use "
                "the vae that the transformer was trained with"
            )
        codec = self.codec
        if codec.kind == "latents" and codec.latent_channels != size:
            raise UserError(
                f"the vae has {codec.latent_channels} latent channels, but the transformer was trained on {size}; use "
                "the vae that the transformer was trained with"
            )
        # Two more ids are the start and end of a span.
        if codec.kind == "codes" and codec.codebook_size != size - 2:
            raise UserError(
                f"the vae has {codec.codebook_size} codes, but the transformer was trained on {size - 2}; use the vae "
                "that the transformer was trained with"
            )

    def _check_audio_tokenizer(self) -> None:
        _refuse_missing_weights(self.audio_tokenizer, "audio_tokenizer")
        name, tokenizer_class = self.audio_modality, type(self.audio_tokenizer).__name__
        if (objective := self.transformer.architecture.modalities[name].objective) != "next_token":
            raise UserError(f"the modality '{name}' has the objective {objective}; audio needs next_token")
        # A folder with a HubertModel and centroids becomes one model of both.
        known = [HubertUnits.__name__ if model == HubertModel.__name__ else model for model in AUDIO_CLASSES]
        if tokenizer_class not in known:
            raise UserError(
                f"the audio_tokenizer is a {tokenizer_class}, not one of {', '.join(known)}; use the one that the "
                "transformer was trained with"
            )
        size = self.transformer.config.sizes[name] - 2
        if (codes := self.audio_codec.codebook_size) != size:
            raise UserError(
                f"the audio_tokenizer has {codes} codes, but the transformer was trained on {size}; use the one that "
                "the transformer was trained with"
            )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Self:
        """Load a snapshot, the newest one of a run folder, or a pipeline of that name from the Hugging Face hub.

        Arguments are those of diffusers. For the folder of a low-rank adapter, its base snapshot is loaded with the
        adapter.

        Weights are read only from safetensors files, unless `use_safetensors=None` is given, because a pickle can run
        code.

        Raises:
            UserError: It does not exist, is another pipeline, is incomplete, or its parts do not belong together.
        """
        refuse_missing_path(pretrained_model_name_or_path, "snapshot")
        path = str(pretrained_model_name_or_path)
        if Path(path).is_dir():
            path = str(find_snapshot(path))
        index = Path(path) / SNAPSHOT_INDEX
        kwargs.setdefault("use_safetensors", True)
        if (Path(path) / ADAPTER_CONFIG).is_file():
            return cls._with_adapter(Path(path), kwargs)
        refuse_dangling_links(Path(path))
        if is_of_version_0_1(Path(path)):
            raise UserError(
                f"{path} is a snapshot of version 0.1; convert it: python -m transfusion_mot.sampling.convert {path} "
                "NEW_FOLDER"
            )
        try:
            contents = json.loads(index.read_text()) if index.is_file() else {}
            if not isinstance(contents, dict):
                raise UserError(f"{index} is not the index of a pipeline; give a whole snapshot")
            contents = _with_plain_class(contents)
            if (class_name := contents.get("_class_name", cls.__name__)) != cls.__name__:
                raise UserError(f"{path} holds a {class_name}; give a snapshot of a {cls.__name__}")
            audio_tokenizer = Path(path) / "audio_tokenizer"
            if "audio_tokenizer" not in kwargs and audio_tokenizer.is_dir():
                # diffusers would replace missing weights by random ones.
                kwargs["audio_tokenizer"] = AudioCodes.load(CodecConfig(str(audio_tokenizer)), "cpu").model
            for name, part in contents.items():
                is_part = isinstance(part, list) and part[0] is not None
                if is_part and name not in kwargs and not (Path(path) / name).is_dir():
                    raise FileNotFoundError(f"its part '{name}' is missing; give a whole snapshot")
            # Only its own scheduler tells what an older snapshot was trained for.
            is_known = "trained_for" in {**contents, **kwargs}
            scheduler = None if is_known else kwargs.pop("scheduler", None)
            pipeline = super().from_pretrained(path, **kwargs)
            if scheduler is not None:
                pipeline.scheduler = scheduler
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            if isinstance(error, UserError):
                raise
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"no pipeline can be loaded from {path}: {reason}") from None
        for name, part in pipeline.components.items():
            if isinstance(part, torch.nn.Module):
                _refuse_bad_weights(part, f"the {name} of {path}")
        card = Path(path) / MODEL_CARD
        pipeline.model_card = card.read_text() if card.is_file() else None
        return pipeline

    @classmethod
    def _with_adapter(cls, folder: Path, kwargs: dict[str, Any]) -> Self:
        base = AdapterInfo.read(folder).base(folder)
        try:
            pipeline = cls.from_pretrained(base, **kwargs)
        except UserError as error:
            raise UserError(
                f"{folder} is an adapter of {base}, which cannot be loaded ({error}); load that model first, and then "
                "the adapter with pipeline.load_lora_weights or --lora"
            ) from None
        pipeline.load_lora_weights(folder)
        return pipeline

    @classmethod
    def _dict_from_json_file(cls, *args: Any, **kwargs: Any) -> Any:
        """model_index.json as read by diffusers; this class is found without code from the folder."""
        return _with_plain_class(super()._dict_from_json_file(*args, **kwargs))

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """As in diffusers, with the model card and the code with which diffusers' generic loader finds this class.

        Raises:
            UserError: Adapters are loaded, or `save_directory` is no path.
        """
        if not isinstance(save_directory, str | os.PathLike):
            raise UserError(f"save_directory is {save_directory!r}; give a folder")
        if self._adapters:
            raise UserError(
                f"the adapters {', '.join(self._adapters)} are loaded, but a snapshot cannot contain adapters: call "
                "fuse_lora() and unload_lora_weights() to save the model with them, or only unload_lora_weights()"
            )
        super().save_pretrained(save_directory, *args, **kwargs)
        index, shim = (Path(save_directory) / name for name in (SNAPSHOT_INDEX, f"{_SHIM_MODULE}.py"))
        contents = json.loads(index.read_text())
        contents["_class_name"] = [_SHIM_MODULE, type(self).__name__]
        index.write_text(json.dumps(contents, indent=2, sort_keys=True) + "\n")
        shim.write_text(_SHIM)
        if self.model_card is not None:
            (Path(save_directory) / MODEL_CARD).write_text(self.model_card)

    def _upload_folder(self, working_dir: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """The last step of diffusers' `push_to_hub`."""
        card = Path(working_dir) / MODEL_CARD
        # diffusers has overwritten our card: with the repository's card, which stays, or with its own card, which says
        # nothing.
        if self.model_card is not None and "automatically generated" in card.read_text():
            card.write_text(self.model_card)
        return super()._upload_folder(working_dir, *args, **kwargs)

    @property
    def _execution_device(self) -> torch.device:
        """The device of a call. diffusers searches all modules for hooks, which takes milliseconds in every call."""
        device = next(self.transformer.parameters()).device
        # Weights on an accelerator are used there, with or without hooks.
        return super()._execution_device if device.type in ("cpu", "meta") else device

    def latent_shape(self, size: Size) -> tuple[int, int, int]:
        """Latent shape [C, Y, X] of an image of this size, for a model with latents."""
        assert self.codec.kind == "latents"
        return self.codec.latent_channels, *self.grid(size)

    def grid(self, size: Size) -> tuple[int, int]:
        """Rows and columns of the latents or codes of an image of this size."""
        height, width = size
        return height // self.codec.downsampling, width // self.codec.downsampling

    @property
    def codec(self) -> ImageCodec:
        """The VAE with its normalisation of latents, or the tokenizer of images.

        Raises:
            UserError: The model has no pictures.
        """
        if self.vae is None:
            raise UserError(_NO_IMAGES)
        if isinstance(self.vae, AutoencoderKL):
            return Autoencoder(self.vae)
        # In float32 for any number format of the pipeline, because half precision changes codes.
        return ImageCodes(self.vae if self.vae.dtype == torch.float32 else self.vae.float())

    @property
    def audio_codec(self) -> AudioCodec:
        """The tokenizer of audio.

        Raises:
            UserError: The model has no audio.
        """
        if self.audio_tokenizer is None:
            raise UserError(_NO_AUDIO)
        return AudioCodes(self.audio_tokenizer)

    @property
    def codecs(self) -> dict[str, Codec]:
        """Codec of each modality that has one."""
        codecs: dict[str, Codec] = {}
        if self.has_images:
            codecs[self.image_modality] = self.codec
        if self.has_audio:
            codecs[self.audio_modality] = self.audio_codec
        return codecs


def _modality_of(media: Sequence[str], key: str, given: str | None, codec: Any) -> str | None:
    """The modality of a codec; None if there is no codec.

    Args:
        media: Modalities of the model, including text.
        key: Name of the setting.
        given: Value of the setting.
        codec: A component, or None.

    Raises:
        UserError: The model has no modality of that name, or the setting is empty and there are several.
    """
    media = [name for name in media if name != TEXT]
    if codec is None:
        return None
    if given is None and len(media) == 1:
        return media[0]
    if given not in media:
        raise UserError(
            f"{key} is {given}; it must be a modality of the transformer: {', '.join(media) or 'but it has only text'}"
        )
    return given


def is_of_version_0_1(snapshot: Path) -> bool:
    """Whether a folder holds a snapshot that `transfusion_mot.sampling.convert` converts."""
    path = snapshot / "transformer" / "config.json"
    try:
        config = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError:
        return False  # What loads it says what is wrong.
    return isinstance(config, dict) and "latent_channels" in config


def _with_plain_class(contents: dict[str, Any]) -> dict[str, Any]:
    """model_index.json with only the name of the class, without the file of the generic loader."""
    class_name = contents.get("_class_name")
    return {**contents, "_class_name": class_name[-1]} if isinstance(class_name, list) else contents


def _refuse_bad_weights(model: torch.nn.Module, what: str) -> None:
    """Refuse weights that are not finite.

    Raises:
        UserError: Names the first of them.
    """
    sums = [parameter.detach().abs().max().float() for parameter in model.parameters() if parameter.numel()]
    if not torch.stack([value.cpu() for value in sums]).isfinite().all():
        wrong = next(name for name, parameter in model.named_parameters() if not parameter.isfinite().all())
        raise UserError(f"{what} has weights that are not finite, such as {wrong}; use an earlier snapshot")


def _refuse_missing_weights(model: torch.nn.Module, name: str) -> None:
    # Checked here, because diffusers' generic loader runs none of our other code. The transformer checks its own
    # weights.
    if missing := [parameter for parameter, weight in model.named_parameters() if weight.is_meta]:
        raise UserError(f"the {name} has no weights for {', '.join(missing[:5])}; use a whole snapshot")
