"""Audio as integer codes: one interface for audio tokenizers of transformers and of this project.

They compute in full float32, because lower precision changes codes.

Shapes: T samples, F frames, Q codebooks, N = F * Q codes.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from transfusion_mot.codecs.base import fingerprint_of, full_precision, settings_of
from transfusion_mot.codecs.checkpoint import class_name_of, load_model
from transfusion_mot.codecs.hubert_units import HubertUnits
from transfusion_mot.codecs.mel_vq import MelVQModel
from transfusion_mot.config import CodecConfig
from transfusion_mot.errors import UserError

# Key in the configuration of a model, which is saved with it, for the number of used codebooks.
_USED_CODEBOOKS = "used_codebooks"


class AudioCodes:
    """A frozen tokenizer of audio.

    Residual tokenizers have several codebooks; each adds detail to the previous ones. The codes of a frame then follow
    each other, and those of codebook q start at `q * K`, with K codes in each codebook.

    Args:
        model: A model of a class in `CLASSES`, or `HubertUnits`.
        num_codebooks: Number of used codebooks, from the first. None means the number in the model's configuration, if
            `AudioCodes` has saved it, else 1.

    Attributes:
        model: The same, in float32, in evaluation mode and without gradients.
        num_codebooks: Q.
        codebook_size: Number of codes, of all codebooks together.
        sample_rate: Samples a second of the waveforms.
        codes_per_second: Average number of codes for a second of audio.
    """

    kind: Literal["codes"] = "codes"
    medium: Literal["audio"] = "audio"

    def __init__(self, model: nn.Module, num_codebooks: int | None = None) -> None:
        self.model = model.float().eval().requires_grad_(False)
        config: Any = model.config
        if num_codebooks is None:
            num_codebooks = getattr(config, _USED_CODEBOOKS, 1)
        self._parts = _ADAPTERS[type(model).__name__](model, num_codebooks)
        if not self._parts.fewest <= num_codebooks <= self._parts.most:
            raise UserError(
                f"num_codebooks is {num_codebooks}; this {type(model).__name__} gives {self._parts.fewest} to "
                f"{self._parts.most}"
            )
        if num_codebooks != getattr(config, _USED_CODEBOOKS, 1):
            # Saved with the model for snapshots.
            setattr(config, _USED_CODEBOOKS, num_codebooks)
        self.num_codebooks = num_codebooks
        self.codebook_size = num_codebooks * self._parts.codebook_size
        self.sample_rate = self._parts.sample_rate
        self.codes_per_second = num_codebooks * self._parts.sample_rate / self._parts.hop

    @classmethod
    def load(cls, config: CodecConfig, device: torch.device | str) -> Self:
        """Load a folder written by `save_pretrained`, or a tokenizer of that name from the Hugging Face hub.

        Raises:
            UserError: It does not exist, is not in `CLASSES`, is incomplete, or does not have `config.num_codebooks`.
        """
        class_name = class_name_of(config.path)
        if class_name not in CLASSES:
            raise UserError(
                f"codec path '{config.path}' is of class {class_name}; one of {', '.join(CLASSES)} is needed"
            )
        if class_name == "HubertModel":
            model: nn.Module = HubertUnits.load(config.path, config.layer)
        else:
            model_class = MelVQModel if class_name == MelVQModel.__name__ else getattr(transformers, class_name)
            model = load_model(model_class, config.path)
        return cls(model.to(device), config.num_codebooks)

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return next(self.model.parameters()).device

    @property
    def has_decoder(self) -> bool:
        """Whether codes can be decoded to audio."""
        return self._parts.decode is not None

    @cached_property
    def fingerprint(self) -> str:
        """Hash of weights, configuration and number of codebooks."""
        settings = settings_of(self.model)
        settings.pop(_USED_CODEBOOKS, None)
        return fingerprint_of(self.model, settings | {"num_codebooks": self.num_codebooks})

    @torch.no_grad()
    def encode(self, waveforms: Sequence[Tensor]) -> list[Tensor]:
        """Mono waveforms, float32 [T] in [-1, 1] at `sample_rate` => codes [N] of each.

        The codes of a waveform do not depend on the others. Models of transformers encode each alone, because padding
        would change the codes of most of them.
        """
        with full_precision(self.device):
            frames_QF = self._parts.encode([waveform.float().to(self.device) for waveform in waveforms])
        first_of_codebook = torch.arange(self.num_codebooks, device=self.device) * self._parts.codebook_size
        return [(codes.T + first_of_codebook).flatten() for codes in frames_QF]

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Codes [N] => a waveform [T] clamped to [-1, 1].

        A code from the range of another codebook is read as the same entry of the expected codebook. An incomplete last
        frame is dropped; without a complete frame the waveform is empty.

        Raises:
            UserError: The tokenizer has no decoder.
        """
        if self._parts.decode is None:
            raise UserError(
                f"{type(self.model).__name__} has no decoder, so its codes cannot become audio; use it to read speech, "
                "or another tokenizer to speak"
            )
        frames = len(codes) // self.num_codebooks
        if not frames:
            return torch.zeros(0, device=codes.device)
        frames_QF = codes[: frames * self.num_codebooks].view(frames, self.num_codebooks).T % self._parts.codebook_size
        with full_precision(codes.device):
            return self._parts.decode(frames_QF).float().clamp(-1.0, 1.0)


class _Parts(NamedTuple):
    """A tokenizer: size of a codebook, sample rate, samples of a frame, waveforms [T] => codes [Q, F], and back."""

    codebook_size: int
    sample_rate: int
    hop: int
    encode: Callable[[Sequence[Tensor]], list[Tensor]]
    decode: Callable[[Tensor], Tensor] | None
    fewest: int = 1
    most: int = 1


def _each(encode: Callable[[Tensor], Tensor]) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    return lambda waveforms: [encode(waveform) for waveform in waveforms]


def _whole_frames(waveform: Tensor, hop: int) -> Tensor:
    """The waveform padded with silence to whole frames, with batch and channel dimensions: [1, 1, T]."""
    return F.pad(waveform, (0, -len(waveform) % hop))[None, None]


def _mimi(model: Any, num_codebooks: int) -> _Parts:
    def encode(waveform: Tensor) -> Tensor:
        return model.encode(waveform[None, None], num_quantizers=num_codebooks).audio_codes[0]

    config = model.config
    return _Parts(
        config.codebook_size,
        config.sampling_rate,
        round(config.sampling_rate / config.frame_rate),
        _each(encode),
        lambda codes: model.decode(codes[None]).audio_values.flatten(),
        config.num_semantic_quantizers,
        config.num_quantizers,
    )


def _encodec(model: Any, num_codebooks: int) -> _Parts:
    config = model.config
    if config.audio_channels != 1 or config.normalize or config.chunk_length is not None:
        raise UserError(
            "this EncodecModel is stereo or stores the loudness of each second separately, which codes alone "
            "cannot restore; use one like facebook/encodec_24khz, with audio_channels 1, normalize false and without "
            "chunk_length_s"
        )

    def encode(waveform: Tensor) -> Tensor:
        # Each codebook encodes the residual of the previous ones, so the first ones are the same at every bandwidth.
        codes = model.encode(waveform[None, None], bandwidth=config.target_bandwidths[-1]).audio_codes
        return codes[0, 0, :num_codebooks]

    def decode(codes: Tensor) -> Tensor:
        return model.decode(codes[None, None], [None]).audio_values.flatten()

    most = model.quantizer.get_num_quantizers_for_bandwidth(config.target_bandwidths[-1])
    return _Parts(config.codebook_size, config.sampling_rate, config.hop_length, _each(encode), decode, most=most)


def _dac(model: Any, num_codebooks: int) -> _Parts:
    config = model.config

    def encode(waveform: Tensor) -> Tensor:
        return model.encode(_whole_frames(waveform, config.hop_length), num_codebooks).audio_codes[0]

    def decode(codes: Tensor) -> Tensor:
        return model.decode(audio_codes=codes[None]).audio_values.flatten()

    return _Parts(
        config.codebook_size, config.sampling_rate, config.hop_length, _each(encode), decode, most=config.n_codebooks
    )


def _xcodec(model: Any, num_codebooks: int) -> _Parts:
    config = model.config

    def encode(waveform: Tensor) -> Tensor:
        codes = model.encode(_whole_frames(waveform, config.hop_length), bandwidth=config.target_bandwidths[-1])
        return codes.audio_codes[0, :num_codebooks]

    def decode(codes: Tensor) -> Tensor:
        return model.decode(codes[None]).audio_values.flatten()

    most = model.quantizer.get_num_quantizers_for_bandwidth(config.target_bandwidths[-1])
    return _Parts(config.codebook_size, config.sample_rate, config.hop_length, _each(encode), decode, most=most)


def _xcodec2(model: Any, _: int) -> _Parts:
    config = model.config
    # `Xcodec2FeatureExtractor` needs torchaudio for the same features.
    extractor = transformers.SeamlessM4TFeatureExtractor(sampling_rate=config.sampling_rate)

    def encode(waveform: Tensor) -> Tensor:
        # One sample and half a frame of silence at both ends, as in `Xcodec2FeatureExtractor`.
        padded = _whole_frames(F.pad(waveform, (0, 1)), config.hop_length)
        around = F.pad(padded[0, 0], (config.hop_length // 2,) * 2).cpu().numpy()
        features = extractor(around, sampling_rate=config.sampling_rate, return_tensors="pt")
        return model.encode(
            padded,
            input_features=features["input_features"].to(waveform.device),
            input_features_mask=features["attention_mask"].to(waveform.device),
        ).audio_codes[0]

    def decode(codes: Tensor) -> Tensor:
        return model.decode(codes[None]).audio_values.flatten()

    codebook_size = torch.tensor(config.quantization_levels).prod().item()
    return _Parts(int(codebook_size), config.sampling_rate, config.hop_length, _each(encode), decode)


def _wav_tokenizer(model: Any, _: int) -> _Parts:
    config = model.config
    return _Parts(
        config.codebook_size,
        config.sampling_rate,
        config.hop_length,
        _each(lambda waveform: model.encode(waveform[None, None]).audio_codes[0]),
        lambda codes: model.decode(codes[None]).audio_values.flatten(),
    )


def _hubert(model: HubertUnits, _: int) -> _Parts:
    return _Parts(
        len(model.centroids), model.sample_rate, model.hop, _each(lambda waveform: model(waveform)[None]), None
    )


def _mel_vq(model: MelVQModel, _: int) -> _Parts:
    config = model.config
    return _Parts(
        config.num_vq_embeddings,
        config.sample_rate,
        model.samples_per_code,
        lambda waveforms: [codes[None] for codes in model.encode(waveforms)],
        lambda codes: model.decode(codes[0]),
    )


_ADAPTERS: dict[str, Callable[[Any, int], _Parts]] = {
    "MimiModel": _mimi,
    "EncodecModel": _encodec,
    "DacModel": _dac,
    "XcodecModel": _xcodec,
    "Xcodec2Model": _xcodec2,
    "WavTokenizerModel": _wav_tokenizer,
    "HubertUnits": _hubert,
    "MelVQModel": _mel_vq,
}
# Called once, because it takes 0.2 s; `hasattr` would import all of them.
_KNOWN = {*dir(transformers), MelVQModel.__name__}
# By the class in a folder's configuration; the oldest supported transformers lacks some of them.
CLASSES = [name for name in (*_ADAPTERS, "HubertModel") if name in _KNOWN]
