"""Speaking and transcribing: texts and pictures to audio, audio to texts."""

import logging
from collections.abc import Sequence

import torch
from PIL import Image

from transfusion_mot.data.audio import Audio
from transfusion_mot.errors import UserError
from transfusion_mot.sampling.decoding import Decoding
from transfusion_mot.sampling.documents import DocumentPipeline, Generators, as_list, one_each
from transfusion_mot.sampling.guidance import Guidance
from transfusion_mot.sampling.sampler import Making, OpenDocument

_logger = logging.getLogger(__name__)


class SpeechPipeline(DocumentPipeline):
    """Audio methods of a `TransfusionPipeline`."""

    @property
    def can_speak(self) -> bool:
        """Whether its codes can be decoded to audio; k-means units of HuBERT are only read."""
        return self.has_audio and self.audio_codec.has_decoder

    def check_can_speak(self) -> None:
        """Refuse to make audio with a model that has no audio or only reads it.

        Raises:
            UserError: It cannot.
        """
        if not self.audio_codec.has_decoder:
            raise UserError(
                f"{type(self.audio_tokenizer).__name__} has no decoder, so this model reads audio but cannot speak; "
                "transcribe with it, or train with another codec"
            )

    def most_codes(self, max_seconds: float | None) -> int:
        """Number of codes of audio of this duration; None is the longest of training.

        Raises:
            UserError: It is not a positive number.
        """
        seconds = self.config.max_audio_seconds if max_seconds is None else max_seconds
        if seconds is None:
            raise UserError("the snapshot does not say how long its audio may be; give max_seconds")
        if not 0 < seconds < float("inf"):
            raise UserError(f"max_seconds is {max_seconds}; it must be a positive number of seconds")
        return max(1, int(seconds * self.audio_codec.codes_per_second))

    @torch.no_grad()
    def speak(
        self,
        prompt: str | Image.Image | Sequence[str | Image.Image],
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        guidance_scale: float | None = None,
        max_seconds: float | None = None,
        generator: Generators = None,
    ) -> list[Audio]:
        """Speak texts, or describe pictures aloud. The model decides how long it speaks.

        Args:
            prompt: One prompt or several: a text, or a picture of any size.
            temperature: Divides the logits; 0 takes the most probable code.
            top_k: Codes are drawn from this many most probable ones; 0 is all.
            top_p: Codes are drawn from the smallest set with a total probability of at least this, in (0, 1].
            guidance_scale: Classifier-free guidance of the logits, 1 is off; None is the pipeline's own.
            max_seconds: Maximum duration; longer speech is cut with a warning. None is the longest of training.
            generator: As for images: one for each prompt, or one for all.

        Returns:
            Audio for each prompt, at the sample rate of the codec.

        Raises:
            UserError: The model cannot speak, an argument is out of its range, or a prompt cannot be used.
        """
        self.check_can_speak()
        prompts = as_list(prompt, "prompt", str | Image.Image)
        if texts := [item for item in prompts if not isinstance(item, Image.Image)]:
            self.check_prompts(texts)
        if not prompts:
            raise UserError("there is nothing to say; give a text or a picture")
        most = self.most_codes(max_seconds)
        decoding = Decoding(1, temperature, top_p, top_k)
        _, scale = self.sampling_settings(self.audio_modality, None, guidance_scale)
        documents = [OpenDocument([self.encode_item(item)]) for item in prompts]
        self._sampler(
            documents,
            self.audio_modality,
            generators=one_each(generator, len(documents)),
            making={self.audio_modality: Making(1, 1 + most, decoding=decoding, is_ragged=True)},
            guidance=Guidance(scale),
        ).run()
        codes = [content[1:-1] for document in documents for content in document.made]
        if cut := sum(len(own) == most for own in codes):
            _logger.warning(
                "%d of %d results are cut after %.1f seconds, the longest allowed",
                cut,
                len(codes),
                most / self.audio_codec.codes_per_second,
            )
        self.maybe_free_model_hooks()
        return [self.decode_audio(own) for own in codes]

    @torch.no_grad()
    def transcribe(
        self,
        audio: Audio | Sequence[Audio],
        prompt: str | list[str] = "",
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        generator: Generators = None,
        top_k: int = 0,
    ) -> list[str]:
        """Transcribe recordings.

        Args:
            audio: One recording or several, of any sample rate; `decode_audio` reads files.
            prompt: The beginning of every transcript, or one for each; the result does not repeat it.
            max_new_tokens, temperature, top_p, generator, top_k: As for `caption`.

        Raises:
            UserError: The model has no speech, an argument is out of its range, or a recording cannot be used.
        """
        recordings = as_list(audio, "audio", Audio)
        if not recordings:
            raise UserError("there is no audio to transcribe; give at least one recording")
        beginnings = [prompt] * len(recordings) if isinstance(prompt, str) else as_list(prompt, "prompt", str)
        if len(beginnings) != len(recordings):
            raise UserError(
                f"there are {len(beginnings)} prompts for {len(recordings)} recordings; give one, or one each"
            )
        self.check_prompts(beginnings)
        encoded = self.encode_audio(recordings)
        documents = [OpenDocument([*pair]) for pair in zip(encoded, beginnings, strict=True)]
        return self._write(documents, Decoding(max_new_tokens, temperature, top_p, top_k), generator)

    def decode_audio(self, codes: Sequence[int]) -> Audio:
        """Codes => audio; fewer codes than a frame has give empty audio."""
        codec = self.audio_codec
        samples = codec.decode(torch.tensor(codes, dtype=torch.long, device=codec.device))
        return Audio(samples.float().cpu().numpy(), codec.sample_rate)
