"""Documents for a model to continue: texts, pictures and other media, checked and encoded."""

from collections.abc import Sequence
from types import UnionType
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from transfusion_mot.config import TEXT
from transfusion_mot.data.audio import Audio, resample
from transfusion_mot.data.documents import join_texts
from transfusion_mot.data.images import to_pixels
from transfusion_mot.data.layout import Media
from transfusion_mot.errors import UserError, refuse_surrogates
from transfusion_mot.models.modalities import TokenModality
from transfusion_mot.sampling.decoding import Decoding
from transfusion_mot.sampling.guidance import Guidance
from transfusion_mot.sampling.sampler import OpenDocument, Sampler
from transfusion_mot.sampling.sizes import Size, by_size
from transfusion_mot.sampling.snapshot import SnapshotPipeline

Generators = torch.Generator | list[torch.Generator] | None
# Items of a document given by a caller: texts, pictures, audio, and other media as codes or latents.
Item = str | Image.Image | Audio | Media


class DocumentPipeline(SnapshotPipeline):
    """Checks and encoding of inputs, shared by all tasks of a `TransfusionPipeline`."""

    def check_prompts(self, prompts: Sequence[str | Audio]) -> None:
        """Refuse prompts that the model cannot read.

        Raises:
            UserError: There is no prompt, or one is neither text nor audio, or longer than any in training.
        """
        if not prompts:
            raise UserError("there is no prompt; give at least one")
        for prompt in prompts:
            if isinstance(prompt, Audio):
                self.check_audio(prompt)
                continue
            if not isinstance(prompt, str):
                raise UserError(f"a prompt must be text, got {type(prompt).__name__}")
            refuse_surrogates(prompt, "prompt", "write it in UTF-8")
            if not self.is_short_enough(prompt):
                shown = prompt if len(prompt) <= 40 else f"{prompt[:40]}..."
                raise UserError(
                    f"the prompt '{shown}' has {len(self.text_tokenizer.encode(prompt))} tokens; the model was trained "
                    f"on at most {self.config.max_prompt_tokens}: shorten it"
                )

    def is_short_enough(self, *document: Item) -> bool:
        """Whether the texts of a document, such as one prompt, are together no longer than a prompt of training."""
        limit = self.config.max_prompt_tokens
        return limit is None or self._num_text_tokens(document) <= limit

    def _num_text_tokens(self, document: Sequence[Item]) -> int:
        """Tokens of the texts of a document. Each media item adds two; the limit of training includes those of one."""
        parts = join_texts(document)
        texts = [part for part in parts if isinstance(part, str)]
        delimiters = 2 * max(0, len(parts) - len(texts) - 1)
        return delimiters + sum(len(self.text_tokenizer.encode(text)) for text in texts)

    def check_audio(self, audio: Audio, name: str = "the audio") -> None:
        """Refuse audio that the model cannot read.

        Raises:
            UserError: The model has no speech; or the audio is not an `Audio`, empty, not finite, or longer than any in
                training.
        """
        if not isinstance(audio, Audio):
            raise UserError(
                f"{name} must be an Audio, such as decode_audio returns for a file, got {type(audio).__name__}"
            )
        samples, limit = audio.samples, self.config.max_audio_seconds
        assert self.audio_modality
        if not isinstance(samples, np.ndarray) or samples.ndim != 1 or not len(samples):
            raise UserError(f"{name} has samples of the shape {np.shape(samples)}; give mono samples [T]")
        # This form also refuses NaN.
        if not (np.abs(samples) <= 1).all():
            raise UserError(f"{name} has samples outside of [-1, 1]; divide them by the largest")
        if limit is not None and audio.seconds > limit:
            raise UserError(
                f"{name} lasts {audio.seconds:.1f} seconds; the model was trained on at most {limit:g}: cut it"
            )

    def _check_items(self, document: Sequence[Item]) -> None:
        """Refuse a document that is not a list of texts, pictures and media that the model can read."""
        if not isinstance(document, list):
            raise UserError(f"a document must be a list of texts, pictures and media, got {document!r:.60}")
        media = [name for name in self.transformer.architecture.made if name != TEXT]
        for item in document:
            if isinstance(item, Audio):
                self.check_audio(item)
            if isinstance(item, str | Image.Image | Audio):
                continue
            if not isinstance(item, Media) or item.modality not in media:
                what = f"media of '{item.modality}'" if isinstance(item, Media) else type(item).__name__
                raise UserError(
                    f"a document is made of texts, PIL images, Audio and Media of {' or '.join(media)}, got {what}"
                )
            modality, content = self.transformer.modality(item.modality), item.content
            if isinstance(modality, TokenModality):
                is_span = isinstance(content, list) and content[:1] == [modality.start_id]
                is_span = is_span and len(content) > 2 and content[-1] == modality.end_id
                if not is_span or not all(0 <= code < modality.start_id for code in content[1:-1]):
                    raise UserError(
                        f"Media of '{item.modality}' need a list [{modality.start_id}, codes below that, "
                        f"{modality.end_id}]"
                    )
                continue
            channels, patch = modality.latent_channels, modality.patch_size
            shape = list(content.shape) if isinstance(content, Tensor) else []
            if len(shape) != 3 or shape[0] != channels or shape[1] % patch or shape[2] % patch:
                raise UserError(
                    f"Media of '{item.modality}' need latents [{channels}, Y, X], Y and X multiples of {patch}, got "
                    f"{shape or type(content).__name__}"
                )

    def _check_document(self, document: Sequence[Item]) -> None:
        """Refuse a document whose texts together are longer than a row of training."""
        if not self.is_short_enough(*document):
            raise UserError(
                f"the document has {self._num_text_tokens(document)} tokens in all; the model was trained on at most "
                f"{self.config.max_prompt_tokens}: shorten it"
            )

    def guidance_of(self, modality: str) -> float:
        """The default guidance scale of a modality."""
        own: float | None = self.transformer.architecture.modalities[modality].guidance_scale
        return float(self.config.guidance_scale if own is None else own)

    def sampling_settings(
        self, modality: str, num_inference_steps: int | None, guidance_scale: float | None
    ) -> tuple[int, float]:
        """Settings of a call, with None replaced by the pipeline's defaults.

        Args:
            modality: The generated modality.
            num_inference_steps, guidance_scale: Arguments of the call.

        Raises:
            UserError: A value is out of its range.
        """
        steps = self.config.num_inference_steps if num_inference_steps is None else num_inference_steps
        most_steps = self.scheduler.config.num_train_timesteps
        if not isinstance(steps, int) or not 1 <= steps <= most_steps:
            raise UserError(f"num_inference_steps is {steps}; it must be a whole number from 1 to {most_steps}")
        scale = self.guidance_of(modality) if guidance_scale is None else guidance_scale
        return steps, Guidance(float(scale)).scale

    def _encode(self, pictures: list[Image.Image], size: Size | None = None) -> list[Media]:
        """Pictures => clean latents or codes of each, at the size of training or a given one."""
        images_uint8 = [self.sizes.read(picture, size) for picture in pictures]
        codec = self.codec

        def encode(places: list[int], _: Size) -> Sequence[Any]:
            pixels = to_pixels(np.stack([images_uint8[place] for place in places])).to(self._execution_device)
            if codec.kind == "latents":
                return codec.encode(pixels)[0].unbind()
            tokens = cast(TokenModality, self.transformer.modality(self.image_modality))
            return [[tokens.start_id, *codes, tokens.end_id] for codes in codec.encode(pixels).flatten(1).tolist()]

        contents = by_size([image.shape[:2] for image in images_uint8], encode)
        return [Media(self.image_modality, content) for content in contents]

    def encode_audio(self, recordings: Sequence[Audio]) -> list[Media]:
        """Recordings of any sample rate => their codes.

        Raises:
            UserError: As `check_audio`; or a recording is too short to have codes.
        """
        for number, audio in enumerate(recordings, 1):
            self.check_audio(audio, f"recording {number}" if len(recordings) > 1 else "the audio")
        codec, tokens = self.audio_codec, cast(TokenModality, self.transformer.modality(self.audio_modality))
        waveforms = [
            torch.from_numpy(resample(audio, codec.sample_rate).astype(np.float32)).to(codec.device)
            for audio in recordings
        ]
        codes = [own.tolist() for own in codec.encode(waveforms)]
        for audio in (audio for audio, own in zip(recordings, codes, strict=True) if not own):
            raise UserError(f"audio of {audio.seconds:.3f} seconds is too short to have a code; give longer audio")
        return [Media(self.audio_modality, [tokens.start_id, *own, tokens.end_id]) for own in codes]

    def encode_item(self, item: Item, size: Size | None = None) -> str | Media:
        """Encode an item of a document for the model; pictures at the size of training, or a given one."""
        if isinstance(item, Image.Image):
            return self._encode([item], size)[0]
        return self.encode_audio([item])[0] if isinstance(item, Audio) else item

    def _sampler(self, documents: list[OpenDocument], target: str, **arguments: Any) -> Sampler:
        return Sampler(
            self.transformer,
            self.text_tokenizer,
            self.workspace,
            documents,
            target=target,
            device=self._execution_device,
            **arguments,
        )

    def _write(self, documents: list[OpenDocument], decoding: Decoding, generator: Generators) -> list[str]:
        generators = one_each(generator, len(documents))
        self._sampler(documents, TEXT, generators=generators, decoding=decoding).run()
        self.maybe_free_model_hooks()
        return ["".join(item for item in document.added if isinstance(item, str)) for document in documents]


def as_list(given: object, what: str, kinds: type | UnionType) -> list[Any]:
    """One thing or several => a list.

    Args:
        given: An object of one of `kinds`, or a sequence.
        what: Name of the argument, for the message.
        kinds: Types of one thing.

    Raises:
        UserError: It is neither.
    """
    if isinstance(given, kinds):
        return [given]
    if not isinstance(given, Sequence):
        raise UserError(f"{what} is {given!r}; give one, or a list of them")
    return [*given]


def one_each(generator: Generators, count: int) -> list[torch.Generator | None]:
    """A generator for each of `count` rows.

    Raises:
        UserError: There is another number of generators, or something else, such as a seed.
    """
    for one in generator if isinstance(generator, list | tuple) else [generator]:
        if not isinstance(one, torch.Generator | None):
            raise UserError(
                f"generator is {one!r}; give a torch.Generator, such as torch.Generator().manual_seed(0), or a list of "
                "them"
            )
    if not isinstance(generator, list | tuple):
        return [generator] * count
    if len(generator) != count:
        raise UserError(
            f"there are {len(generator)} generators for {count} results; give one for each, or a single one"
        )
    return list(generator)
