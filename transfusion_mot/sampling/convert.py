"""Convert a snapshot of version 0.1 to the format of this version.

    python -m transfusion_mot.sampling.convert OLD_SNAPSHOT OUTPUT
    python -m transfusion_mot.sampling.convert OLD_SNAPSHOT --in-place

Weights keep their values. Only the names of some weights and the modalities in the configuration change. The model card
and all other files are copied unchanged.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transfusion_mot.config import TEXT, DiffusionConfig, ModalityConfig, ModelConfig, TowerConfig, to_dict
from transfusion_mot.errors import UserError, exit_on_user_error
from transfusion_mot.files import SNAPSHOT_INDEX
from transfusion_mot.outputs import check_writable_folder, refuse_other_content
from transfusion_mot.path_options import PathOption, existing


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of the command line.

    Raises:
        UserError: Neither or both of OUTPUT and --in-place are given.
    """
    parser = argparse.ArgumentParser(
        prog="python -m transfusion_mot.sampling.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "snapshot",
        action=PathOption,
        check=existing("the folder of a snapshot of version 0.1"),
        metavar="OLD_SNAPSHOT",
        help="folder of a snapshot of version 0.1",
    )
    parser.add_argument("output", nargs="?", metavar="OUTPUT", help="folder to write; its contents are replaced")
    parser.add_argument("--in-place", action="store_true", help="write over OLD_SNAPSHOT")
    given = parser.parse_args(arguments)
    if (given.output is None) is not given.in_place:
        raise UserError("give either a folder OUTPUT, or --in-place to overwrite the old snapshot")
    if given.output is not None:
        refuse_other_content(Path(given.output), Path(given.snapshot))
    return given


if __name__ == "__main__":
    # PyTorch takes seconds to load; --help and mistakes in the options end before it.
    with exit_on_user_error():
        parse_arguments(sys.argv[1:])

import diffusers
from safetensors import safe_open
from safetensors.torch import save_file

from transfusion_mot.sampling.snapshot import is_of_version_0_1
from transfusion_mot.schedulers import trained_for
from transfusion_mot.training.checkpoint import atomic_folder

# The other modality of every model of version 0.1.
_IMAGE = "image"
# Beginnings of parameter names.
_WEIGHTS = {
    "token_embedding.": f"modalities.{TEXT}.embedding.",
    "text_head.": f"modalities.{TEXT}.head.",
    "image_adapter.": f"modalities.{_IMAGE}.adapter.",
}
_TOKENS = {"<boi>": f"<begin_of_{_IMAGE}>", "<eoi>": f"<end_of_{_IMAGE}>"}


def convert(snapshot: Path, output: Path) -> None:
    """Convert a snapshot of version 0.1 to the format of this version.

    Args:
        snapshot: Folder of the old snapshot.
        output: Folder of the new snapshot, possibly the same; its contents are replaced.

    Raises:
        UserError: It is not a snapshot of version 0.1, or its weights are not safetensors.
    """
    if not (snapshot / SNAPSHOT_INDEX).is_file():
        raise UserError(f"{snapshot} is not a snapshot: it has no {SNAPSHOT_INDEX}; give a folder snapshots/step-N")
    if not is_of_version_0_1(snapshot):
        raise UserError(f"{snapshot} is not of version 0.1; it can be used as it is")
    if not list((snapshot / "transformer").glob("*.safetensors")):
        raise UserError(f"{snapshot}/transformer has no safetensors file; save the model in this format first")
    with atomic_folder(output) as folder:
        # If the new snapshot replaces the old one, links stay links.
        shutil.copytree(snapshot, folder, symlinks=output.resolve() == snapshot.resolve(), dirs_exist_ok=True)
        _convert_config(folder)
        for path in (folder / "transformer").iterdir():
            if path.suffix == ".safetensors":
                _rename_weights(path)
            elif path.name.endswith(".safetensors.index.json"):
                index = json.loads(path.read_text())
                index["weight_map"] = {_renamed(name): file for name, file in index["weight_map"].items()}
                path.write_text(json.dumps(index, indent=2) + "\n")
        for path in (folder / "tokenizer").glob("*.json"):
            text = path.read_text(encoding="utf-8")
            for old, new in _TOKENS.items():
                text = text.replace(json.dumps(old), json.dumps(new))
            path.write_text(text, encoding="utf-8")


def _convert_config(folder: Path) -> None:
    path = folder / "transformer" / "config.json"
    config: dict[str, Any] = json.loads(path.read_text())
    sizes = {TEXT: config.pop("vocab_size"), _IMAGE: config.pop("latent_channels")}
    model = new_architecture(config["architecture"])
    config |= {"sizes": sizes, "architecture": to_dict(model), "diffusion": to_dict(_diffusion(folder))}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def new_architecture(old: dict[str, Any]) -> ModelConfig:
    """The section `model` of version 0.1 => that of this version. It lacks the weight of the image loss: the default is
    set."""
    old = dict(old)
    towers = {name: TowerConfig(**fields) for name, fields in old.pop("towers").items()}
    tower_of = old.pop("modalities")
    names = {
        "patch_size": "patch_size",
        "image_adapter": "adapter",
        "unet_channels": "unet_channels",
        "unet_num_layers": "unet_num_layers",
    }
    fields = {new: old.pop(name) for name, new in names.items() if name in old}
    # The default is bidirectional in both versions and need not be written.
    fields["attention"] = "causal" if old.pop("image_attention", None) == "causal" else None
    loss_weight = ModelConfig().modalities[_IMAGE].loss_weight
    modalities = {
        TEXT: ModalityConfig(tower_of[TEXT]),
        _IMAGE: ModalityConfig(tower_of[_IMAGE], "diffusion", loss_weight, **fields),
    }
    return ModelConfig(**old, towers=towers, modalities=modalities)


def _diffusion(folder: Path) -> DiffusionConfig:
    """The diffusion settings that the pipeline stores; the distribution of timesteps is not among them."""
    index: dict[str, Any] = json.loads((folder / SNAPSHOT_INDEX).read_text())
    trained = index.get("trained_for")
    if trained is None:
        scheduler_class = getattr(diffusers, index["scheduler"][1])
        trained = trained_for(scheduler_class.from_pretrained(folder / "scheduler"))
    is_flow = trained["prediction_type"] == "flow"
    arguments = {key: value for key, value in trained.items() if not (is_flow and key == "prediction_type")}
    asked = {key: index[key] for key in ("num_inference_steps", "guidance_scale") if key in index}
    return DiffusionConfig("FlowMatchEulerDiscreteScheduler" if is_flow else "DDPMScheduler", arguments, **asked)


def _rename_weights(path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {_renamed(name): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    mode = path.stat().st_mode
    save_file(tensors, path, metadata)
    path.chmod(mode)


def _renamed(name: str) -> str:
    old = next((old for old in _WEIGHTS if name.startswith(old)), "")
    return _WEIGHTS.get(old, "") + name.removeprefix(old)


def main(arguments: Sequence[str]) -> None:
    """Run the command line."""
    given = parse_arguments(arguments)
    output = given.output or given.snapshot
    check_writable_folder(output, "output")
    convert(Path(given.snapshot), Path(output))
    print(f"the converted snapshot is in {output}")


if __name__ == "__main__":
    with exit_on_user_error():
        main(sys.argv[1:])
