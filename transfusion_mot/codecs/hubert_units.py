"""Speech units: for each hidden state of a HuBERT model, the index of the nearest centroid.

They are the discrete units of textless speech models (arXiv 2102.01192): HuBERT (arXiv 2106.07447) with k-means
centroids of its hidden states.
"""

from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import HubertConfig, HubertModel, PreTrainedModel, Wav2Vec2FeatureExtractor

from transfusion_mot.codecs.checkpoint import load_model
from transfusion_mot.errors import UserError

_CENTROIDS = ("kmeans.safetensors", "kmeans.npy")
# Key of the layer in the configuration.
_LAYER = "units_layer"


# A model class of transformers, so that diffusers saves and loads it as a part of a snapshot.
class HubertUnits(PreTrainedModel):
    """Waveform => units. Units cannot be decoded.

    Args:
        hubert: The model.
        centroids: [K, D], D the width of the model.
        layer: Layer of the hidden states that the centroids belong to; 0 is the input of the first layer. None means
            the layer in the model's configuration, if `HubertUnits` has saved it, else the last.
        extractor: Preprocesses waveforms; None leaves them unchanged.

    Attributes:
        sample_rate: Samples a second of the waveforms.
        hop: Samples of a unit.
    """

    centroids: Tensor
    config_class = HubertConfig
    # The wrapped model supports these.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True

    def __init__(
        self,
        hubert: HubertModel,
        centroids: Tensor,
        layer: int | None = None,
        extractor: Wav2Vec2FeatureExtractor | None = None,
    ) -> None:
        super().__init__(hubert.config)
        self.hubert = hubert
        self.register_buffer("centroids", centroids)
        self.layer = getattr(self.config, _LAYER, self.config.num_hidden_layers) if layer is None else layer
        setattr(self.config, _LAYER, self.layer)
        self.extractor = extractor or Wav2Vec2FeatureExtractor(do_normalize=False)
        self.sample_rate: int = self.extractor.sampling_rate
        self.hop = int(np.prod(self.config.conv_stride))
        # Samples in the receptive field of the first unit; shorter waveforms have no unit.
        self._shortest = 1
        for kernel, stride in zip(reversed(self.config.conv_kernel), reversed(self.config.conv_stride), strict=True):
            self._shortest = (self._shortest - 1) * stride + kernel

    @classmethod
    def load(cls, path: str, layer: int | None) -> Self:
        """Read a folder with a `HubertModel` and its centroids, `kmeans.npy` or `kmeans.safetensors`, [K, D].

        Raises:
            UserError: They are missing, or their sizes do not match.
        """
        folder = Path(path)
        file = next((folder / name for name in _CENTROIDS if (folder / name).is_file()), None)
        if file is None:
            raise UserError(
                f"codec path '{path}' is a HubertModel, which gives no codes by itself; put the centroids of k-means "
                "into its folder as kmeans.npy or kmeans.safetensors, one row each"
            )
        try:
            if file.suffix == ".npy":
                centroids = torch.from_numpy(np.load(file, allow_pickle=False))
            else:
                (centroids,) = load_file(file).values()
        except (OSError, ValueError, TypeError, SafetensorError) as error:
            raise UserError(
                f"{file} cannot be read as one array of centroids ({' '.join(str(error).split())})"
            ) from None
        hubert = load_model(HubertModel, path)
        if centroids.shape[1:] != (hubert.config.hidden_size,):
            raise UserError(
                f"{file} has the shape {list(centroids.shape)}; centroids of this HubertModel are rows of "
                f"{hubert.config.hidden_size}"
            )
        if layer is not None and not 0 <= layer <= hubert.config.num_hidden_layers:
            raise UserError(f"layer is {layer}; this HubertModel has layers 0 to {hubert.config.num_hidden_layers}")
        has_extractor = (folder / "preprocessor_config.json").is_file()
        extractor = Wav2Vec2FeatureExtractor.from_pretrained(path) if has_extractor else None
        return cls(hubert, centroids.float(), layer, extractor)

    @classmethod
    def from_pretrained(cls, folder: str | Path, *_: Any, **__: Any) -> Self:
        """Load a folder written by `save_pretrained`."""
        return cls.load(str(folder), None)

    def save_pretrained(self, folder: str | Path, **_: Any) -> None:
        """Write a folder that `load` reads."""
        self.hubert.save_pretrained(folder)
        self.extractor.save_pretrained(folder)
        save_file({"centroids": self.centroids.contiguous()}, Path(folder) / _CENTROIDS[0])

    def forward(self, waveform: Tensor) -> Tensor:
        """[T] => units [F]."""
        if self.extractor.do_normalize:
            # Like the extractor for one waveform.
            waveform = (waveform - waveform.mean()) / (waveform.var(correction=0) + 1e-7).sqrt()
        waveform = F.pad(waveform, (0, max(0, self._shortest - len(waveform))))
        hidden = self.hubert(waveform[None], output_hidden_states=True).hidden_states[self.layer][0]
        return torch.cdist(hidden, self.centroids, compute_mode="donot_use_mm_for_euclid_dist").argmin(dim=1)
