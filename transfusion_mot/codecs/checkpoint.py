"""Loading of codec models from a folder of `save_pretrained` or from the Hugging Face hub."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from huggingface_hub import hf_hub_download

from transfusion_mot.errors import UserError
from transfusion_mot.files import SNAPSHOT_INDEX, refuse_dangling_links
from transfusion_mot.hub_names import ask_hub, refuse_missing_path

_HINT = (
    "give a folder or the name on the Hugging Face hub of a model that diffusers or transformers loads, or train an "
    "AutoencoderKL: python -m transfusion_mot.autoencoder --config configs/vae/emoji.yaml"
)


def class_name_of(path: str) -> str:
    """Class of the model at `path`, a folder or a name on the hub.

    Raises:
        UserError: There is none, or the model is only a part of a pipeline in this folder.
    """
    refuse_missing_path(path, "codec path")
    folder = Path(path)
    if (folder / SNAPSHOT_INDEX).is_file():
        raise UserError(f"codec path '{path}' is a whole diffusers pipeline; give its subfolder 'vae'")
    refuse_dangling_links(folder)
    if folder.exists() and not (folder / "config.json").is_file():
        raise UserError(f"codec path '{path}' has no config.json; {_HINT}")
    try:
        ask_hub(path)
        file = folder / "config.json" if folder.exists() else Path(hf_hub_download(path, "config.json"))
        config = json.loads(file.read_text())
        name: str = config["_class_name"] if "_class_name" in config else config["architectures"][0]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise _no_codec(path, error) from None
    return name


def load_model(model_class: Any, path: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model with all its weights, on the CPU.

    Raises:
        UserError: Its weights are missing, incomplete or of other sizes.
    """
    # With low memory usage, diffusers would leave missing weights without storage before they can be reported.
    library = (
        {"torch_dtype": dtype, "low_cpu_mem_usage": False} if issubclass(model_class, ModelMixin) else {"dtype": dtype}
    )
    try:
        # No pickle files: they can run code.
        model, loading = model_class.from_pretrained(path, output_loading_info=True, use_safetensors=True, **library)
    except (OSError, ValueError, LookupError, TypeError, RuntimeError) as error:
        raise _no_codec(path, error) from None
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])[:5]
        raise UserError(f"the {model_class.__name__} at '{path}' has no weights for {', '.join(missing)}")
    return model


def _no_codec(path: str, error: Exception) -> UserError:
    return UserError(f"no codec at '{path}' ({' '.join(str(error).split())[:300]}); {_HINT}")
