"""Start a run from a snapshot: settings that follow from it, and its weights."""

import json
import shutil
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from transfusion_mot.codecs.load import load_codec
from transfusion_mot.config import (
    FREE_OF_MODALITY,
    FREE_OF_TOWER,
    ORIGINS,
    TEXT,
    CodecConfig,
    DiffusionConfig,
    ModalityConfig,
    ModelConfig,
    RunConfig,
    TowerConfig,
    to_dict,
)
from transfusion_mot.data.tokenizer import load_tokenizer
from transfusion_mot.errors import UserError
from transfusion_mot.files import ADAPTER_CONFIG, SNAPSHOT_INDEX, find_snapshot, refuse_dangling_links
from transfusion_mot.hub_names import download, refuse_missing_path
from transfusion_mot.models.initial_weights import WeightFiles, WeightReport, take_all
from transfusion_mot.models.transfusion import TransfusionMoT
from transfusion_mot.sampling.snapshot import COMPONENT_MODALITIES, is_of_version_0_1
from transfusion_mot.schedulers import make_scheduler, trained_for
from transfusion_mot.training.checkpoint import atomic_folder

# Patterns of the model settings that may differ from those of the snapshot.
_FREE = (*(f"towers.*.{key}" for key in FREE_OF_TOWER), *(f"modalities.*.{key}" for key in FREE_OF_MODALITY))


class SnapshotStart:
    """A snapshot to start a run from.

    Args:
        name: Its folder, a run folder, or a name on the Hugging Face hub.

    Raises:
        UserError: It does not exist, is not a snapshot, or is one of version 0.1.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.folder = _find(name)
        self.index = _read_json(self.folder / SNAPSHOT_INDEX)
        if is_of_version_0_1(self.folder):
            raise UserError(
                f"init_from={name} is a snapshot of version 0.1; convert it: python -m "
                f"transfusion_mot.sampling.convert {name} NEW_FOLDER"
            )
        contents = _read_json(self.folder / "transformer" / "config.json")
        try:
            self.model = _model_config(contents["architecture"])
            self.diffusion = DiffusionConfig(**contents["diffusion"])
        except (KeyError, TypeError) as error:
            raise UserError(
                f"init_from={name}: this version does not know the model in transformer/config.json ({error}); give a "
                "snapshot of train.py"
            ) from None
        for key in ("num_inference_steps", "guidance_scale"):
            setattr(self.diffusion, key, self.index.get(key, getattr(self.diffusion, key)))
        media = [modality for modality in self.model.made if modality != TEXT]
        # Folder of each modality's codec.
        self.codecs = {
            self.index.get(key) or media[0]: str(self.folder / part)
            for part, key in COMPONENT_MODALITIES.items()
            if self.index.get(part, [None])[0] is not None
        }

    def sections(self) -> dict[str, Any]:
        """Sizes, tokenizer, codecs and objective, the sizes of its images and the length of its audio."""
        sizes = self.index.get("image_sizes") or {"trained": [[self.index["image_size"]] * 2], "fit": "crop"}
        (height, width), *others = sizes["trained"]
        is_square = not others and height == width
        data = {"image_fit": sizes["fit"]} | ({"image_size": height} if is_square else {"buckets": sizes["trained"]})
        if (seconds := self.index.get("max_audio_seconds")) is not None:
            data["max_audio_seconds"] = seconds
        return {
            "model": to_dict(self.model),
            "tokenizer": {"path": str(self.folder / "tokenizer")},
            "codecs": {name: {"path": path} for name, path in self.codecs.items()},
            "diffusion": to_dict(self.diffusion),
            "data": data,
        }

    def check(self, config: RunConfig) -> None:
        """Refuse sizes, a tokenizer or a codec that differ from those of the weights' training.

        Raises:
            UserError: Names the keys.
        """
        differing = [
            f"model.{key}, which they do not have" if before is None else f"model.{key} is {now} and was {before}"
            for key, before, now in _differences(to_dict(self.model), to_dict(config.model))
            if not any(fnmatch(key, free) for free in [*_FREE, *(f"modalities.{name}" for name in self._new(config))])
        ]
        if differing:
            raise UserError(
                f"the weights of init_from={self.name} are of another model: {'; '.join(differing)}; remove the keys, "
                "or train without init_from"
            )
        self._check_tokenizer(config)
        self._check_codecs(config)

    def _check_tokenizer(self, config: RunConfig) -> None:
        own, given = str(self.folder / "tokenizer"), config.tokenizer.path
        if given == own:
            return
        names = config.model.made
        if given is None or load_tokenizer(given, names).fingerprint != load_tokenizer(own, names).fingerprint:
            raise UserError(
                f"tokenizer.path is {given}, but the weights of init_from={self.name} were trained with another "
                "tokenizer; remove the key to use theirs"
            )

    def _check_codecs(self, config: RunConfig) -> None:
        for name, path in self.codecs.items():
            given = config.codecs[name]
            if given.path == path:
                continue
            objective = config.model.modalities[name].objective
            fingerprints = {load_codec(codec, objective, "cpu").fingerprint for codec in (CodecConfig(path), given)}
            if len(fingerprints) > 1:
                raise UserError(
                    f"codecs.{name}.path is {given.path}, but the weights of init_from={self.name} were trained with "
                    "another codec; remove the key to use theirs"
                )

    def fill(self, model: TransfusionMoT, config: RunConfig) -> WeightReport:
        """Load its weights into a model, whole or sharded; called by all processes.

        Raises:
            UserError: They are damaged, or do not fit.
        """
        source = self.name if str(self.folder) == self.name else f"{self.name} ({self.folder.name})"
        report = take_all(model, self.weight_files(), source)
        new = self._new(config)
        for name in (name for name in report.missing if name.startswith("modalities.")):
            if (modality := name.split(".")[1]) in new:
                report.missing[name] = f"{modality} is new, drawn at random"
        report.notes += self._notes(config)
        return report

    def _new(self, config: RunConfig) -> list[str]:
        """`read` modalities that are new in this run; they add only an input layer."""
        return [name for name in config.model.readers.values() if name not in self.model.modalities]

    def weight_files(self) -> WeightFiles:
        """The weight files of its transformer, downloaded if they are on the hub.

        Raises:
            UserError: A file is missing or damaged.
        """
        is_local = Path(self.name).exists()
        folder = (
            self.folder
            if is_local
            else download(self.name, ["transformer/*.safetensors", "transformer/*.json"], "init_from")
        )
        return WeightFiles(folder / "transformer", "diffusion_pytorch_model")

    def _notes(self, config: RunConfig) -> list[str]:
        """Sentences about differences between this run's objective and the snapshot's."""
        if not config.model.of_objective("diffusion"):
            return []
        before, now = (
            trained_for(make_scheduler(diffusion.scheduler, diffusion.scheduler_args))
            for diffusion in (self.diffusion, config.diffusion)
        )
        if before["prediction_type"] != now["prediction_type"]:
            return [
                f"the snapshot was trained to predict {before['prediction_type']}, but this run predicts "
                f"{now['prediction_type']} (diffusion.scheduler): the first diffusion losses will be those of an "
                "untrained model, and training needs many more steps"
            ]
        if before != now:
            parts = [f"{key} was {before[key]} and is {now.get(key)}" for key in before if before[key] != now.get(key)]
            return [f"not the noise schedule of the snapshot (diffusion.scheduler_args): {', '.join(parts)}"]
        return []


def keep_codecs(config: RunConfig, accelerator: Accelerator) -> RunConfig:
    """Copy the codecs of the initial snapshot into the run folder; called by all processes.

    So the run can be continued without the snapshot.

    Returns:
        The configuration with the paths of the copies.
    """
    if config.init_from is None:
        return config
    start = SnapshotStart(config.init_from)
    codecs = dict(config.codecs)
    for name, path in start.codecs.items():
        if codecs[name].path != path:
            continue
        own = Path(config.output_dir) / "codecs" / name
        codecs[name] = replace(codecs[name], path=str(own))
        if accelerator.is_main_process:
            with atomic_folder(own) as folder:
                shutil.copytree(path, folder, dirs_exist_ok=True)
    accelerator.wait_for_everyone()
    return replace(config, codecs=codecs)


def _find(name: str) -> Path:
    """The folder of a snapshot; from the hub it is downloaded without its large weights.

    Raises:
        UserError: There is none.
    """
    folder = Path(name)
    if folder.exists():
        refuse_dangling_links(folder)
        if (folder / "config.json").is_file() and not (folder / SNAPSHOT_INDEX).is_file():
            raise UserError(
                f"init_from={name} is a model alone, such as a codec or a transformer; give the whole snapshot, the "
                f"folder with {SNAPSHOT_INDEX}"
            )
        found = find_snapshot(name)
        if (found / ADAPTER_CONFIG).is_file():
            raise UserError(
                f"init_from={name} is a low-rank adapter; give its base model, or a whole snapshot with the fused "
                "adapter (fuse_lora, unload_lora_weights, save_pretrained)"
            )
        return found
    refuse_missing_path(name, "init_from")
    parts = [f"{part}/*" for part in ("tokenizer", *COMPONENT_MODALITIES)]
    found = download(name, ["*.json", "*.txt", *parts], "init_from")
    if not (found / SNAPSHOT_INDEX).is_file():
        raise UserError(
            f"init_from={name} on the Hugging Face hub has no {SNAPSHOT_INDEX}; give a snapshot of train.py"
        )
    return found


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
        if isinstance(content, dict):
            return content
        reason = "it holds no object"
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
    raise UserError(f"the snapshot has no usable {path} ({reason}); copy the whole snapshot again")


def _model_config(architecture: dict[str, Any]) -> ModelConfig:
    towers = {
        name: TowerConfig(**{key: value for key, value in fields.items() if key not in ORIGINS})
        for name, fields in architecture["towers"].items()
    }
    modalities = {name: ModalityConfig(**fields) for name, fields in architecture["modalities"].items()}
    return ModelConfig(**{**architecture, "towers": towers, "modalities": modalities})


def _differences(before: Any, now: Any, key: str = "") -> list[tuple[str, Any, Any]]:
    """(Dotted key, value before, value now) of all differences between two nested sections."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return [] if before == now else [(key, before, now)]
    found: list[tuple[str, Any, Any]] = []
    for name in before | now:
        found += _differences(before.get(name), now.get(name), f"{key}.{name}" if key else name)
    return found
