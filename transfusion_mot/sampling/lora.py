"""Folders of low-rank adapters, and their use in a pipeline; names and behaviour are those of diffusers.

A folder has the adapter with all weights trained beside it (`adapter_model.safetensors`), and a description of its base
model (`adapter_config.json`).
"""

import itertools
import json
import math
import os
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

import torch
from diffusers.loaders.lora_base import LoraBaseMixin
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from transfusion_mot.config import LoraConfig
from transfusion_mot.errors import UserError
from transfusion_mot.files import ADAPTER_CONFIG, step_folders
from transfusion_mot.hub_names import download, refuse_missing_path
from transfusion_mot.models.lora import add_adapter, base_parameters, digests, file_name, fingerprint
from transfusion_mot.models.transfusion import TransfusionMoT, is_of_adapter

ADAPTER_WEIGHTS = "adapter_model.safetensors"
# Sizes of the base model that an adapter depends on.
_SIZES = ("num_layers", "num_heads", "num_kv_heads", "head_dim")


@dataclass(frozen=True)
class AdapterInfo:
    """Description of an adapter and its base model.

    Attributes:
        lora: The fields of its `LoraConfig`.
        base_model_name_or_path: The base snapshot: a name on the hub, a path, or a path relative to the adapter's
            folder.
        base_sizes: Sizes of the base model, by name.
        base_fingerprint: Fingerprint of the base weights, see `fingerprint`.
        trained_on_edits: Whether it was trained on editing pairs, and so can edit pictures.
    """

    lora: dict[str, Any]
    base_model_name_or_path: str
    base_sizes: dict[str, Any]
    base_fingerprint: str
    trained_on_edits: bool = False

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read it from an adapter's folder.

        Raises:
            UserError: The folder has no adapter, or none of this project.
        """
        file = folder / ADAPTER_CONFIG
        if not file.is_file() or not (folder / ADAPTER_WEIGHTS).is_file():
            missing = ADAPTER_WEIGHTS if file.is_file() else ADAPTER_CONFIG
            raise UserError(
                f"{folder} holds no adapter: it has no {missing}; give a folder snapshots/step-N of a run with lora"
            )
        try:
            content = json.loads(file.read_text())
            needed = [field.name for field in fields(cls) if field.default is MISSING or field.name in content]
            info = cls(**{name: content[name] for name in needed})
            LoraConfig(**info.lora)
            return info
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{file} does not describe an adapter of this project ({type(error).__name__}: {error}); give a folder "
                "that train.py wrote with lora"
            ) from None

    def base(self, folder: Path) -> str:
        """The base snapshot of the adapter in a folder."""
        beside = folder / self.base_model_name_or_path
        return str(beside.resolve()) if beside.is_dir() else self.base_model_name_or_path


def sizes_of(model: TransfusionMoT) -> dict[str, Any]:
    """Sizes of a base model that an adapter depends on, by name."""
    architecture = model.architecture
    towers = {name: [tower.hidden_size, tower.intermediate_size] for name, tower in architecture.towers.items()}
    widths = {f"widths of tower {name}": widths for name, widths in towers.items()}
    return {size: getattr(architecture, size) for size in _SIZES} | widths


def save_adapter(folder: Path, tensors: dict[str, Tensor], info: AdapterInfo) -> None:
    """Write an adapter.

    Args:
        folder: Existing folder to write to.
        tensors: Tensors by parameter names of the model with the adapter.
        info: Description of the adapter.
    """
    save_file({file_name(name): tensor.contiguous() for name, tensor in tensors.items()}, folder / ADAPTER_WEIGHTS)
    (folder / ADAPTER_CONFIG).write_text(json.dumps(asdict(info), indent=2, sort_keys=True) + "\n")


class LoraPipeline(LoraBaseMixin):
    """Loads, scales, fuses and unloads adapters; for a pipeline with a `transformer` and a `workspace`.

    Fully trained weights of an adapter (`lora.also_train`) are active whenever the adapter is, and have no scale.
    """

    _lora_loadable_modules = ["transformer"]  # noqa: RUF012
    transformer: TransfusionMoT
    # Adapter => whole tensors stored for it: its own while it is inactive, those that it replaces while it is active.
    _adapters: dict[str, dict[str, Tensor]]
    # Active adapters.
    _put_in: set[str]
    # Digests of the model's tensors before any adapter.
    _pristine: dict[str, str] | None
    # Adapters without which the model would not edit pictures.
    _editing: set[str]

    def load_lora_weights(
        self, pretrained_model_name_or_path: str | os.PathLike[str], adapter_name: str | None = None
    ) -> None:
        """Add an adapter and activate it beside those already active.

        Args:
            pretrained_model_name_or_path: Its folder, a run folder of `train.py` with `lora` (its newest adapter), or
                a name on the Hugging Face hub.
            adapter_name: For `set_adapters` and `delete_adapters`; None is default_0, default_1, ...

        Raises:
            UserError: There is no adapter, it is one of another model, or its name is taken.
        """
        folder = find_adapter(pretrained_model_name_or_path)
        info = AdapterInfo.read(folder)
        name = adapter_name or next(
            free for number in itertools.count() if (free := f"default_{number}") not in self._adapters
        )
        if name in self._adapters or "." in name:
            raise UserError(f"the adapter name '{name}' is taken or has a dot; give another adapter_name")
        tensors = _read(folder)
        whole = {key: tensor for key, tensor in tensors.items() if not is_of_adapter(key)}
        self._check_base(folder, info, set(whole))
        if clash := next((other for other, kept in self._adapters.items() if kept.keys() & whole.keys()), None):
            raise UserError(
                f"{folder} replaces the same weights as the adapter '{clash}'; call unload_lora_weights() first"
            )
        active = self.get_active_adapters()
        add_adapter(self.transformer, LoraConfig(**info.lora), name)
        of_adapter = {
            file_name(key, name): parameter
            for key, parameter in self.transformer.named_parameters()
            if is_of_adapter(key) and f".{name}." in key
        }
        if of_adapter.keys() != tensors.keys() - whole.keys():
            self.transformer.delete_adapters(name)
            raise UserError(
                f"{folder}: the tensors of {ADAPTER_WEIGHTS} do not match {ADAPTER_CONFIG}; copy the folder again"
            )
        with torch.no_grad():
            for key, parameter in of_adapter.items():
                parameter.copy_(tensors[key])
        # Before activation, the stored tensors are the adapter's own.
        self._adapters[name] = whole
        if info.trained_on_edits and (self._editing or not self.config.trained_on_edits):
            self._editing.add(name)
            self.register_to_config(trained_on_edits=True)
        self.set_adapters([*active, name], [*(self._scale(other) for other in active), 1.0])

    def _check_base(self, folder: Path, info: AdapterInfo, without: set[str]) -> None:
        own = sizes_of(self.transformer)
        for key in own | info.base_sizes:
            if own.get(key) != info.base_sizes.get(key):
                raise UserError(
                    f"{folder} is an adapter of another model, {info.base_model_name_or_path}: its {key} is "
                    f"{info.base_sizes.get(key)}, but this model has {own.get(key)}"
                )
        if self._pristine is None:
            # Taken before an adapter is fused into the weights.
            self._pristine = digests(self.transformer)
        # bfloat16 and float16 round differently.
        is_comparable = self.transformer.dtype in (torch.float32, torch.bfloat16)
        if is_comparable and fingerprint(self._pristine, without) != info.base_fingerprint:
            raise UserError(
                f"{folder} is an adapter of another model of the same sizes, {info.base_model_name_or_path}; load "
                "it into that model"
            )

    def _scale(self, adapter: str) -> float:
        """The scale of an adapter from `set_adapters`."""
        for module in self.transformer.modules():
            if adapter in getattr(module, "scaling", {}):
                return module.scaling[adapter] / (module.lora_alpha[adapter] / module.r[adapter])
        return 1.0

    @torch.no_grad()
    def _use(self, active: set[str]) -> None:
        """Put the whole tensors of these adapters, and no others, into the model."""
        parameters = base_parameters(self.transformer)
        for name in (active & self._adapters.keys()) ^ self._put_in:
            for key, kept in self._adapters[name].items():
                before = parameters[key].detach().clone()
                parameters[key].copy_(kept)
                self._adapters[name][key] = before
        self._put_in = active & self._adapters.keys()

    def set_adapters(self, adapter_names: list[str] | str, adapter_weights: Any = None) -> None:
        """Activate these adapters, each with its scale (`adapter_weights`, 1 if not given), and deactivate the
        others.

        Raises:
            UserError: An adapter is not loaded, or a scale is not a finite number.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        scales = adapter_weights if isinstance(adapter_weights, list | tuple) else [adapter_weights] * len(names)
        if len(scales) != len(names):
            raise UserError(f"there are {len(scales)} adapter_weights for {len(names)} adapters; give one, or one each")
        for scale in scales:
            for number in scale.values() if isinstance(scale, dict) else [scale]:
                if number is not None:
                    _check_scale(number, "adapter_weights")
        if unknown := [name for name in names if name not in self._adapters]:
            raise UserError(f"there is no adapter '{unknown[0]}'; loaded: {', '.join(self._adapters) or 'none'}")
        super().set_adapters(names, [*scales])
        self._use(set(names))

    def fuse_lora(
        self,
        components: list[str] | None = None,
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the active adapters to the weights, so that the model is as fast as one without adapters.

        Call `unload_lora_weights` afterwards to make the change permanent, so that the model can be saved.

        Raises:
            UserError: `lora_scale` is not a finite number.
        """
        _check_scale(lora_scale, "lora_scale")
        super().fuse_lora(components or ["transformer"], lora_scale, safe_fusing, adapter_names, **kwargs)

    def unfuse_lora(self, components: list[str] | None = None, **kwargs: Any) -> None:
        """Subtract fused adapters from the weights, up to rounding."""
        super().unfuse_lora(components or ["transformer"], **kwargs)

    def disable_lora(self) -> None:
        """Deactivate all adapters."""
        super().disable_lora()
        self._use(set())

    def enable_lora(self) -> None:
        """Activate the previously active adapters again."""
        super().enable_lora()
        self._use(set(self.get_active_adapters()))

    def unload_lora_weights(self) -> None:
        """Remove all adapters. Fused weights stay."""
        fused = self.fused_loras & self._adapters.keys()
        self._use(fused)
        super().unload_lora_weights()
        # A later adapter of the same name is not fused.
        self._merged_adapters: set[str] = set()
        self._adapters.clear()
        self._put_in.clear()
        if self._editing and not self._editing & fused:
            self.register_to_config(trained_on_edits=False)
        self._editing.clear()

    def delete_adapters(self, adapter_names: list[str] | str) -> None:
        """Remove some adapters."""
        names = {adapter_names} if isinstance(adapter_names, str) else set(adapter_names)
        self._use(self._put_in - names)
        super().delete_adapters(list(names))
        for name in names:
            self._adapters.pop(name, None)
        if self._editing and not self._editing - names:
            self.register_to_config(trained_on_edits=False)
        self._editing -= names


def find_adapter(name: str | os.PathLike[str]) -> Path:
    """The folder of an adapter named by the user; one on the hub is downloaded.

    Raises:
        UserError: There is none.
    """
    refuse_missing_path(name, "adapter")
    folder = Path(name)
    if folder.is_dir():
        # `AdapterInfo.read` refuses a folder that is neither an adapter nor a run.
        return [folder, *step_folders(folder / "snapshots")][-1]
    return download(str(name), [ADAPTER_CONFIG, ADAPTER_WEIGHTS], "adapter")


def _check_scale(scale: Any, what: str) -> None:
    if not isinstance(scale, int | float) or not math.isfinite(scale):
        raise UserError(f"{what} has {scale!r}; a scale must be a finite number, such as 1.0")


def _read(folder: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_file(folder / ADAPTER_WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / ADAPTER_WEIGHTS} is damaged ({error}); copy it again") from None
    if wrong := next((name for name, tensor in tensors.items() if not tensor.isfinite().all()), None):
        raise UserError(f"{folder / ADAPTER_WEIGHTS}: {wrong} is not finite; use an earlier step")
    return tensors
