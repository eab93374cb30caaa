"""Folders of low-rank adapters, and what a pipeline does with them: names and behaviour as in diffusers.

A folder has the adapter and all that was trained beside it (`adapter_model.safetensors`), and what it is an adapter of
(`adapter_config.json`).
"""

import json
import os
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

import torch
from diffusers.loaders.lora_base import LoraBaseMixin
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from transfusion_mot.config import LoraConfig
from transfusion_mot.errors import UserError
from transfusion_mot.files import ADAPTER_CONFIG
from transfusion_mot.hub_names import refuse_missing_path
from transfusion_mot.models.lora import add_adapter, base_parameters, digests, file_name, fingerprint
from transfusion_mot.models.transfusion import TransfusionMoT, is_of_adapter

ADAPTER_WEIGHTS = "adapter_model.safetensors"
# Sizes that an adapter fits or does not.
_SIZES = ("num_layers", "num_heads", "num_kv_heads", "head_dim")


@dataclass(frozen=True)
class AdapterInfo:
    """What an adapter is, and what it is an adapter of.

    Attributes:
        lora: The fields of its `LoraConfig`.
        base_model_name_or_path: The snapshot below it: a name on the hub, a path, or one relative to the adapter's
            folder.
        base_sizes: Sizes of the model below it, by name.
        base_fingerprint: Of the weights below it, see `fingerprint`.
        trained_on_edits: Whether it was trained on editing pairs, and so can edit pictures.
    """

    lora: dict[str, Any]
    base_model_name_or_path: str
    base_sizes: dict[str, Any]
    base_fingerprint: str
    trained_on_edits: bool = False

    @classmethod
    def read(cls, folder: Path) -> Self:
        """From an adapter's folder.

        Raises:
            UserError: It has none, or none of this project.
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
                f"{file} describes no adapter of this project ({type(error).__name__}: {error}); give a folder that "
                "train.py has written with lora"
            ) from None

    def base(self, folder: Path) -> str:
        """The snapshot below the adapter in a folder."""
        beside = folder / self.base_model_name_or_path
        return str(beside.resolve()) if beside.is_dir() else self.base_model_name_or_path


def sizes_of(model: TransfusionMoT) -> dict[str, Any]:
    """Sizes that an adapter fits or does not, by name."""
    architecture = model.architecture
    towers = {name: [tower.hidden_size, tower.intermediate_size] for name, tower in architecture.towers.items()}
    widths = {f"widths of tower {name}": widths for name, widths in towers.items()}
    return {size: getattr(architecture, size) for size in _SIZES} | widths


def save_adapter(folder: Path, tensors: dict[str, Tensor], info: AdapterInfo) -> None:
    """Write an adapter.

    Args:
        folder: Where to; it exists.
        tensors: By names of parameters of the model with the adapter.
        info: About it.
    """
    save_file({file_name(name): tensor.contiguous() for name, tensor in tensors.items()}, folder / ADAPTER_WEIGHTS)
    (folder / ADAPTER_CONFIG).write_text(json.dumps(asdict(info), indent=2, sort_keys=True) + "\n")


class LoraPipeline(LoraBaseMixin):
    """Loads, scales, fuses and unloads adapters; for a pipeline with a `transformer` and a `workspace`.

    What an adapter has trained as a whole (`lora.also_train`) is at work whenever it is, and has no scale.
    """

    _lora_loadable_modules = ["transformer"]  # noqa: RUF012
    transformer: TransfusionMoT
    # Adapter to the whole tensors that are kept for it: its own while it rests, those that it replaces while it works.
    _adapters: dict[str, dict[str, Tensor]]
    # Adapters that work.
    _put_in: set[str]
    # Digests of the model's tensors before any adapter.
    _pristine: dict[str, str] | None

    def load_lora_weights(
        self, pretrained_model_name_or_path: str | os.PathLike[str], adapter_name: str | None = None
    ) -> None:
        """Add an adapter and let it, with those before, be at work.

        Args:
            pretrained_model_name_or_path: Its folder, a run folder of `train.py` with `lora` (its newest adapter), or
                a name on the Hugging Face hub.
            adapter_name: For `set_adapters` and `delete_adapters`; None is default_0, default_1, ...

        Raises:
            UserError: There is no adapter, it is one of another model, or its name is taken.
        """
        folder = find_adapter(pretrained_model_name_or_path)
        info = AdapterInfo.read(folder)
        name = adapter_name or f"default_{len(self._adapters)}"
        if name in self._adapters or "." in name:
            raise UserError(f"the adapter name '{name}' is taken or has a dot; give another adapter_name")
        tensors = _read(folder)
        whole = {key: tensor for key, tensor in tensors.items() if not is_of_adapter(key)}
        self._check_base(folder, info, set(whole))
        if clash := next((other for other, kept in self._adapters.items() if kept.keys() & whole.keys()), None):
            raise UserError(
                f"{folder} replaces weights that the adapter '{clash}' replaces, too; unload that with "
                "unload_lora_weights() before"
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
            raise UserError(f"{folder}: {ADAPTER_WEIGHTS} does not have what {ADAPTER_CONFIG} says; copy it again")
        with torch.no_grad():
            for key, parameter in of_adapter.items():
                parameter.copy_(tensors[key])
        # Until they are put in, what is kept of an adapter is its own.
        self._adapters[name] = whole
        if info.trained_on_edits:
            self.register_to_config(trained_on_edits=True)
        self.set_adapters([*active, name], [*(self._scale(other) for other in active), 1.0])

    def _check_base(self, folder: Path, info: AdapterInfo, without: set[str]) -> None:
        own = sizes_of(self.transformer)
        for key in own | info.base_sizes:
            if own.get(key) != info.base_sizes.get(key):
                raise UserError(
                    f"{folder} is an adapter of another model, {info.base_model_name_or_path}: its {key} is "
                    f"{info.base_sizes.get(key)}, and that of this model {own.get(key)}"
                )
        if self._pristine is None:
            # Before an adapter is fused into the weights.
            self._pristine = digests(self.transformer)
        # Half precision of another kind rounds in another way.
        is_comparable = self.transformer.dtype in (torch.float32, torch.bfloat16)
        if is_comparable and fingerprint(self._pristine, without) != info.base_fingerprint:
            raise UserError(
                f"{folder} is an adapter of another model of the same sizes, {info.base_model_name_or_path}: the "
                "weights are not those that it was trained on; load it into that one"
            )

    def _scale(self, adapter: str) -> float:
        """What `set_adapters` has given an adapter."""
        for module in self.transformer.modules():
            if adapter in getattr(module, "scaling", {}):
                return module.scaling[adapter] / (module.lora_alpha[adapter] / module.r[adapter])
        return 1.0

    @torch.no_grad()
    def _use(self, active: set[str]) -> None:
        """Let the whole tensors of some adapters, and of no others, be in the model."""
        parameters = base_parameters(self.transformer)
        for name in (active & self._adapters.keys()) ^ self._put_in:
            for key, kept in self._adapters[name].items():
                before = parameters[key].detach().clone()
                parameters[key].copy_(kept)
                self._adapters[name][key] = before
        self._put_in = active & self._adapters.keys()

    def set_adapters(self, adapter_names: list[str] | str, adapter_weights: Any = None) -> None:
        """Let these adapters be at work, each with its scale (`adapter_weights`, 1 if not given); the others rest."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        if unknown := [name for name in names if name not in self._adapters]:
            raise UserError(f"there is no adapter '{unknown[0]}'; loaded: {', '.join(self._adapters) or 'none'}")
        super().set_adapters(names, adapter_weights)
        self._use(set(names))

    def fuse_lora(
        self,
        components: list[str] | None = None,
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add what the adapters at work change to the weights, for the speed of a model without adapters.

        With `unload_lora_weights` behind it the model stays what it is then, and can be saved.
        """
        super().fuse_lora(components or ["transformer"], lora_scale, safe_fusing, adapter_names, **kwargs)

    def unfuse_lora(self, components: list[str] | None = None, **kwargs: Any) -> None:
        """Take it out of the weights again, up to rounding."""
        super().unfuse_lora(components or ["transformer"], **kwargs)

    def disable_lora(self) -> None:
        """Let all adapters rest."""
        super().disable_lora()
        self._use(set())

    def enable_lora(self) -> None:
        """Let those work again that did."""
        super().enable_lora()
        self._use(set(self.get_active_adapters()))

    def unload_lora_weights(self) -> None:
        """Remove all adapters. What has been fused stays."""
        self._use(self.fused_loras & self._adapters.keys())
        super().unload_lora_weights()
        self._adapters.clear()
        self._put_in.clear()

    def delete_adapters(self, adapter_names: list[str] | str) -> None:
        """Remove some adapters."""
        names = {adapter_names} if isinstance(adapter_names, str) else set(adapter_names)
        self._use(self._put_in - names)
        super().delete_adapters(list(names))
        for name in names:
            self._adapters.pop(name, None)


def find_adapter(name: str | os.PathLike[str]) -> Path:
    """The folder of an adapter, as a user names it; one on the hub is downloaded.

    Raises:
        UserError: There is none.
    """
    folder = Path(name)
    if folder.is_dir():
        # Of what is neither an adapter nor a run, `AdapterInfo.read` says so.
        steps = {path: path.name[5:] for path in folder.glob("snapshots/step-*") if path.name[5:].isdigit()}
        return max(steps, key=lambda path: int(steps[path]), default=folder)
    refuse_missing_path(str(name), "adapter")
    try:
        return Path(snapshot_download(str(name), allow_patterns=[ADAPTER_CONFIG, ADAPTER_WEIGHTS]))
    except (OSError, HFValidationError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"adapter {name} is neither a folder nor on the Hugging Face hub ({reason})") from None


def _read(folder: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_file(folder / ADAPTER_WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / ADAPTER_WEIGHTS} is damaged ({error}); copy it again") from None
    if wrong := next((name for name, tensor in tensors.items() if not tensor.isfinite().all()), None):
        raise UserError(f"{folder / ADAPTER_WEIGHTS}: {wrong} is not finite; use an earlier step")
    return tensors
