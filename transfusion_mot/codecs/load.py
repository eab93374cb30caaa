"""The codec of a modality, from its section of the configuration."""

import torch
from diffusers import AutoencoderKL

from transfusion_mot.codecs.audio_codes import CLASSES as AUDIO_CLASSES
from transfusion_mot.codecs.audio_codes import AudioCodes
from transfusion_mot.codecs.autoencoder_kl import Autoencoder
from transfusion_mot.codecs.base import Codec
from transfusion_mot.codecs.checkpoint import class_name_of
from transfusion_mot.codecs.image_codes import CLASSES, ImageCodes
from transfusion_mot.config import CodecConfig, Objective
from transfusion_mot.errors import UserError


def load_codec(config: CodecConfig, objective: Objective, device: torch.device | str) -> Codec:
    """Load a codec in float32: an `AutoencoderKL` for `diffusion`, one that gives codes for `next_token`.

    Raises:
        UserError: `config.path` has no codec, it does not fit the objective, or a key is for another class.
    """
    class_name = class_name_of(config.path)
    for key, classes in {"layer": ("HubertModel",), "num_codebooks": AUDIO_CLASSES}.items():
        if getattr(config, key) is not None and class_name not in classes:
            raise UserError(
                f"codec path '{config.path}' is of class {class_name}, and its {key} is set, which is for "
                f"{', '.join(classes)}; remove that key"
            )
    if class_name == AutoencoderKL.__name__ and objective == "diffusion":
        return Autoencoder.load(config.path, device)
    if class_name in CLASSES and objective == "next_token":
        return ImageCodes.load(config.path, device)
    if class_name in AUDIO_CLASSES and objective == "next_token":
        return AudioCodes.load(config, device)
    needed, other = AutoencoderKL.__name__, "next_token"
    if objective == "next_token":
        needed, other = f"{', '.join(CLASSES)} (images) or {', '.join(AUDIO_CLASSES)} (audio)", "diffusion"
    hint = ""
    if class_name in (AutoencoderKL.__name__, *CLASSES, *AUDIO_CLASSES):
        hint = f"; give another path, or set the objective to {other}"
    elif class_name.startswith("Hubert"):
        hint = "; for a whole HuBERT, save its `hubert` in a separate folder with the k-means centroids"
    elif class_name.endswith("ForConditionalGeneration"):
        hint = "; for a whole model, save its image tokenizer, `vqmodel`, in a separate folder"
    raise UserError(
        f"codec path '{config.path}' is of class {class_name}, but the objective {objective} needs {needed}{hint}"
    )
