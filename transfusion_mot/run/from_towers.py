"""Pretrained towers of a new run: a language model, towers of snapshots, and copies of other towers."""

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from transfusion_mot.config import (
    FREE_OF_MODALITY,
    FREE_OF_TOWER,
    ORIGINS,
    TEXT,
    ModelConfig,
    RunConfig,
    TowerConfig,
    to_dict,
)
from transfusion_mot.config_checks import merged
from transfusion_mot.data.tokenizer import load_tokenizer
from transfusion_mot.errors import UserError
from transfusion_mot.files import SNAPSHOT_INDEX
from transfusion_mot.models.initial_weights import WeightReport
from transfusion_mot.models.lora import base_parameters
from transfusion_mot.models.pretrained import LanguageModel
from transfusion_mot.models.transfusion import TransfusionMoT
from transfusion_mot.run.from_snapshot import SnapshotStart
from transfusion_mot.training.towers import tower_of

# Settings that a copy shares with its original tower.
_SIZES = ("hidden_size", "intermediate_size", "norm_eps", "qk_norm", "qkv_bias", "output_bias")
_COMPONENTS = {"norm", "qkv", "output", "ffn"}


class TowerStarts:
    """The towers of a configuration with pretrained or copied weights.

    Args:
        sections: Sections of the configuration that are given, nested as in YAML.

    Raises:
        UserError: A source does not exist, or does not fit.
    """

    def __init__(self, sections: dict[str, Any]) -> None:
        model = sections.get("model") or {}
        towers: dict[str, dict[str, Any]] = {name: fields or {} for name, fields in (model.get("towers") or {}).items()}
        # As in the parser, a given mapping replaces the default.
        modalities = model.get("modalities") or to_dict(ModelConfig())["modalities"]
        self._modalities: dict[str, dict[str, Any]] = {name: fields or {} for name, fields in modalities.items()}
        self._text_tower = str((modalities.get(TEXT) or {}).get("tower", TEXT))
        self.copies = {name: str(tower["copy_of"]) for name, tower in towers.items() if tower.get("copy_of")}
        self.sources: dict[str, LanguageModel | SnapshotStart] = {}
        for name, tower in towers.items():
            if not tower.get("pretrained"):
                continue
            if name in self.copies:
                raise UserError(f"model.towers.{name} has both pretrained and copy_of; keep one of them")
            self.sources[name] = self._open(name, str(tower["pretrained"]))
        known = {*towers, *(str(modality.get("tower", name)) for name, modality in self._modalities.items())}
        for name, origin in self.copies.items():
            if origin not in known or origin in self.copies:
                others = ", ".join(sorted(known - set(self.copies))) or "none"
                raise UserError(
                    f"model.towers.{name}.copy_of is {origin}; it must be another tower that is not a copy: {others}"
                )
        self._given = towers

    def _open(self, tower: str, name: str) -> LanguageModel | SnapshotStart:
        path = Path(name)
        if path.is_dir() and ((path / SNAPSHOT_INDEX).is_file() or (path / "snapshots").is_dir()):
            source = SnapshotStart(name)
            if tower not in source.model.towers:
                raise UserError(
                    f"model.towers.{tower}.pretrained is {name}, a snapshot with the towers "
                    f"{', '.join(source.model.towers)}; give the tower one of these names"
                )
            if set(source.model.untied) != _COMPONENTS and len(source.model.towers) > 1:
                raise UserError(f"model.towers.{tower}.pretrained is {name}, whose towers share weights; use init_from")
            return source
        if tower != self._text_tower:
            raise UserError(
                f"model.towers.{tower}.pretrained is {name}: a language model is for the tower of text, "
                f"{self._text_tower}; use copy_of={self._text_tower}, or the folder of a snapshot"
            )
        return LanguageModel.open(name)

    def sections(self) -> dict[str, Any]:
        """Sizes, norms, biases and rotary positions of the towers, and the tokenizer of text.

        All modalities and towers of the run are listed, because a given mapping replaces the default.
        """
        modalities = merged(self._modalities, self._wanted["model"].get("modalities", {}))
        names = {modality.get("tower", name) for name, modality in modalities.items()}
        towers = {name: to_dict(TowerConfig()) for name in names}
        towers = merged(towers, self._wanted["model"].get("towers", {}))
        for name, origin in self.copies.items():
            sizes = towers[origin] | self._given.get(origin, {})
            towers[name] = {key: sizes[key] for key in _SIZES}
        return merged(self._wanted, {"model": {"modalities": modalities, "towers": towers}})

    @cached_property
    def _wanted(self) -> dict[str, Any]:
        """Only the settings that follow from the sources."""
        result: dict[str, Any] = {"model": {}}
        for name, source in self.sources.items():
            own = source.sections(name) if isinstance(source, LanguageModel) else self._of_snapshot(name, source)
            for key, value in own["model"].items():
                if key in ("towers", "modalities") or result["model"].get(key, value) == value:
                    continue
                raise UserError(
                    f"model.towers.{name}.pretrained has {key} {value}, but another tower has "
                    f"{result['model'][key]}; give towers with the same {key}"
                )
            result = merged(result, own)
        return result

    def _of_snapshot(self, tower: str, source: SnapshotStart) -> dict[str, Any]:
        everything = source.sections()
        model = everything["model"]
        modalities = {
            name: {key: value for key, value in fields.items() if key not in FREE_OF_MODALITY}
            for name, fields in model["modalities"].items()
            if fields["tower"] == tower and name in source.model.made
        }
        free = (*FREE_OF_TOWER, *ORIGINS)
        own = {key: value for key, value in model["towers"][tower].items() if key not in free}
        # Settings that the tower inherited from its model.
        own |= {"norm_eps": source.model.norm_eps_of(tower), "qk_norm": source.model.has_qk_norm(tower)}
        shared: tuple[str, ...] = ("num_layers", "num_heads", "num_kv_heads", "head_dim", "rope_theta", "rope_scaling")
        shared += ("layers_without_rope", "max_position_embeddings")
        result: dict[str, Any] = {"model": {key: model[key] for key in shared}}
        result["model"]["num_kv_heads"] = model["num_kv_heads"] or model["num_heads"]
        result["model"] |= {"towers": {tower: own}, "modalities": modalities}
        if TEXT in modalities:
            result["tokenizer"] = everything["tokenizer"]
        if codecs := {name: codec for name, codec in everything["codecs"].items() if name in modalities}:
            result["codecs"] = codecs
        return result

    def check(self, config: RunConfig) -> None:
        """Refuse a configuration that contradicts the sources.

        Raises:
            UserError: Names the keys.
        """
        model, wanted = config.model, self._wanted
        if set(model.untied) != _COMPONENTS and len(model.towers) > 1:
            raise UserError(
                f"model.untied is {model.untied}, but a tower with pretrained or copy_of must own all its weights; set "
                "model.untied=[norm, qkv, output, ffn]"
            )
        if self._text_tower != model.modalities[TEXT].tower:
            raise UserError(
                f"model.modalities.text.tower is {model.modalities[TEXT].tower}, but model.towers.{self._text_tower} "
                "has the language model; give it to the tower of text"
            )
        for key, before, now in _differences(wanted["model"], to_dict(model)):
            tower = key.split(".")[1] if key.startswith("towers.") else next(iter(self.sources))
            raise UserError(
                f"model.{key} is {now}, but pretrained={self.sources[tower].name} has {before}; remove one of the "
                "two keys"
            )
        for name, origin in self.copies.items():
            self._check_copy(name, origin, config)
        self._check_tokenizer(config)

    def _check_copy(self, name: str, origin: str, config: RunConfig) -> None:
        own, other = config.model.towers[name], config.model.towers[origin]
        for key in _SIZES:
            if getattr(own, key) != getattr(other, key):
                raise UserError(
                    f"model.towers.{name}.{key} is {getattr(own, key)}, but its copy_of, {origin}, has "
                    f"{getattr(other, key)}; use the same value, or remove copy_of to draw the weights at random"
                )

    def _check_tokenizer(self, config: RunConfig) -> None:
        """Refuse a tokenizer with more ids than the language model's embedding has rows, or one that is not its own."""
        source, path = self.sources.get(self._text_tower), config.tokenizer.path
        if not isinstance(source, LanguageModel):
            return
        own = _tokenizer_size(source.name)
        given = own if path == source.name else _tokenizer_size(path or "")
        rows = source.config.vocab_size
        if path is None or (path != source.name and own is not None and given != own):
            raise UserError(
                f"tokenizer.path is {path}, but the language model {source.name} has its own tokenizer; remove the key"
            )
        if given is not None and given > rows:
            raise UserError(
                f"the tokenizer {path} has {given} ids, but the language model {source.name} has only {rows} rows; "
                "give the tokenizer that it was trained with"
            )

    def fill(self, model: TransfusionMoT, config: RunConfig) -> WeightReport:
        """Load the weights of the sources into a model, whole or sharded; called by all processes.

        Raises:
            UserError: They are damaged, or do not fit.
        """
        report = WeightReport(" and ".join(dict.fromkeys(source.name for source in self.sources.values())) or "copies")
        for name, source in self.sources.items():
            if isinstance(source, LanguageModel):
                source.fill(model, name, report)
            else:
                self._fill_from_snapshot(model, name, source, report)
        for name, origin in self.copies.items():
            report.notes.append(
                f"tower {name}: {_copy_tower(model, name, origin)} parameters copied from tower {origin}"
            )
        for name in base_parameters(model):
            tower = tower_of(name, model.architecture)
            if name in report.taken or (tower in self.copies and not name.startswith("modalities.")):
                continue
            if tower not in self.sources:
                report.missing.setdefault(name, f"tower {tower}: drawn at random")
            elif name.startswith("modalities."):
                report.missing.setdefault(name, f"{name.split('.')[1]} is new to tower {tower}: drawn at random")
        return report

    def _fill_from_snapshot(
        self, model: TransfusionMoT, tower: str, source: SnapshotStart, report: WeightReport
    ) -> None:
        files = source.weight_files()
        known = set(files.names)
        for name, parameter in base_parameters(model).items():
            if tower_of(name, model.architecture) != tower:
                continue
            # The adapter of a `read` modality belongs to the tower that reads.
            is_read = name.startswith("modalities.") and name.split(".")[1] not in model.architecture.made
            if name in known and not (is_read and files.shape(name) != parameter.shape):
                report.take_rows(name, parameter, files.read(name))
            elif not name.startswith("modalities."):
                report.missing[name] = ""
        others = {name for name in known if name not in report.taken}
        parameters = base_parameters(model)
        for name in others:
            modality = name.split(".")[1] if name.startswith("modalities.") else None
            of_tower = tower_of(name, source.model)
            if of_tower != tower:
                report.unexpected[name] = f"tower {of_tower} of the snapshot is not used"
            elif modality in source.model.readers.values() and name in parameters:
                report.unexpected[name] = f"{modality} of the snapshot fits a tower of another width"
            else:
                report.unexpected[name] = f"{modality} of the snapshot is not in this run" if modality else ""


@torch.no_grad()
def _copy_tower(model: TransfusionMoT, tower: str, origin: str) -> int:
    """Copy the weights of a tower to another one of the same sizes => number of parameters."""
    parameters, copied = base_parameters(model), 0
    for name, parameter in parameters.items():
        if f".owned.{tower}." not in name:
            continue
        other = parameters[name.replace(f".owned.{tower}.", f".owned.{origin}.")]
        # Towers of the same sizes are sharded in the same way.
        own, source = (p.to_local() if isinstance(p, DTensor) else p for p in (parameter, other))
        own.copy_(source)
        copied += 1
    return copied


def _tokenizer_size(path: str) -> int | None:
    """One more than the largest id of a tokenizer; None if it cannot be read, which is reported where it is used."""
    try:
        return load_tokenizer(path, (), of_language_model=True).vocab_size
    except UserError:
        return None


def _differences(before: dict[str, Any], now: dict[str, Any], key: str = "") -> list[tuple[str, Any, Any]]:
    """(Dotted key, wanted value, given value) of all given values that differ from the wanted ones."""
    found: list[tuple[str, Any, Any]] = []
    for name, value in before.items():
        inner, given = f"{key}.{name}" if key else name, now.get(name)
        if isinstance(value, dict) and isinstance(given, dict) and name != "rope_scaling":
            found += _differences(value, given, inner)
        elif value != given:
            found.append((inner, value, given))
    return found
