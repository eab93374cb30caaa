"""The start of a run: at its first step, or after a training state of the same run."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from accelerate import Accelerator

from transfusion_mot.codecs.base import Codec
from transfusion_mot.config import (
    FREE_OF_MODALITY,
    FREE_OF_TOWER,
    ORIGINS,
    DataConfig,
    ModelConfig,
    RunConfig,
    to_dict,
)
from transfusion_mot.errors import UserError
from transfusion_mot.models.compilation import allow_shapes
from transfusion_mot.models.transfusion import check_model
from transfusion_mot.run.data import RunData
from transfusion_mot.training.checkpoint import find_state
from transfusion_mot.training.graph import why_not_recorded
from transfusion_mot.training.metrics import METRICS_FILE
from transfusion_mot.training.state import load_progress, refuse_other_run
from transfusion_mot.training.step import num_shapes
from transfusion_mot.training.tower_settings import check_lora, check_towers


@dataclass(frozen=True)
class Start:
    """The start of a new or resumed run.

    Attributes:
        state: Training state to resume from; None for a new run.
        step: Steps done.
        seen: Counters of those steps, over all processes.
        fingerprint: Fingerprint of the settings of those steps, see the function `fingerprint`.
    """

    state: Path | None = None
    step: int = 0
    seen: dict[str, int] = field(default_factory=dict)
    fingerprint: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def find(cls, config: RunConfig) -> Self:
        """The start that `resume` asks for.

        Raises:
            UserError: The state does not exist or cannot be resumed.
        """
        state = find_state(Path(config.output_dir), config.resume)
        if state is None:
            return cls()
        progress = load_progress(state)
        return cls(state, progress["step"], progress["seen"], progress["made_of"])

    @property
    def run(self) -> Path | None:
        """Folder of the resumed run."""
        return None if self.state is None else self.state.parent.parent

    @property
    def history(self) -> Path | None:
        """Metrics file of the steps done."""
        return None if self.run is None else self.run / METRICS_FILE

    def check_settings(self, config: RunConfig, codecs: Mapping[str, Codec]) -> None:
        """Refuse settings or codecs that differ from those of the steps done. It needs no data, so it comes first.

        Raises:
            UserError: Names what differs.
        """
        if self.state is not None:
            # Older states do not mention adapters.
            refuse_other_run({"lora": None, **self.fingerprint}, _settled(config, codecs), self.state)

    def check_data(self, data: RunData) -> None:
        """Refuse data that differ from those of the steps done.

        Raises:
            UserError: Names what differs.
        """
        if self.state is not None:
            refuse_other_run(self.fingerprint, _contents(data), self.state)


def check_run(config: RunConfig, accelerator: Accelerator) -> None:
    """Make the folders of a run, and check the settings that need no data; called by all processes.

    Raises:
        UserError: Names the problem.
    """
    try:
        for folder in (config.output_dir, config.data.cache_dir):
            Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {error.filename}: {error.strerror}; choose another") from None
    check_model(config.model)
    check_towers(config)
    check_lora(config)
    if config.training.ema_on_cpu and accelerator.is_fsdp2:
        raise UserError(
            "training.ema_on_cpu does not work with FSDP2, which shards the averages; set it to false, or use DDP"
        )
    allow_shapes(num_shapes(config, accelerator.num_processes))
    reason = why_not_recorded(accelerator.device.type, accelerator.num_processes)
    if config.training.cuda_graph and reason is not None:
        accelerator.print(reason)


def fingerprint(config: RunConfig, data: RunData) -> dict[str, Any]:
    """Settings and fingerprints that must not change when a run is resumed, by name."""
    return _settled(config, data.codecs) | _contents(data)


def _settled(config: RunConfig, codecs: Mapping[str, Codec]) -> dict[str, Any]:
    return {
        "model": _settled_model(config.model),
        **{f"codec of {name}": codec.fingerprint for name, codec in codecs.items()},
        "diffusion.scheduler": [config.diffusion.scheduler, config.diffusion.scheduler_args],
        "training.num_rows": config.training.num_rows,
        "training.seed": config.training.seed,
        "optimizer.name": config.optimizer.name,
        "lora": None if config.lora is None else to_dict(config.lora),
        "data": _settled_data(config.data),
    }


def _contents(data: RunData) -> dict[str, Any]:
    # Sources are compared by content, not by path: a run may move to another machine.
    return {"tokenizer": data.tokenizer.fingerprint, "list of data.sources": data.sources.contents()}


# Keys that states of earlier versions lack, with their values.
_NEW: dict[str, Any] = {"rope_scaling": None, "layers_without_rope": [], "max_position_embeddings": None}
_NEW_IN_TOWERS = {"norm_eps": None, "qk_norm": None, "qkv_bias": False, "output_bias": False}
_NEW_IN_MODALITIES = {"tied_embeddings": False, "vocab_size": None}


def _settled_data(data: DataConfig) -> dict[str, Any]:
    """Settings of the data that must not change when a run is resumed. Sources are compared by content."""
    free = ("sources", "num_workers", "cache_dir", "latents")
    kept = {key: value for key, value in to_dict(data).items() if key not in free}
    return kept | {
        "weights of sources": [source.weight for source in data.sources],
        "modalities of sources": [source.modality for source in data.sources],
    }


def _settled_model(model: ModelConfig) -> dict[str, Any]:
    """Model settings that must not change when a run is resumed: its weights depend on them."""
    kept = to_dict(model)
    free = (("towers", (*FREE_OF_TOWER, *ORIGINS)), ("modalities", FREE_OF_MODALITY))
    for section, keys in free:
        for entry in kept[section].values():
            for key in keys:
                del entry[key]
    _drop(kept, _NEW)
    for section, new in ((kept["towers"], _NEW_IN_TOWERS), (kept["modalities"], _NEW_IN_MODALITIES)):
        for entry in section.values():
            _drop(entry, new)
    return kept


def _drop(section: dict[str, Any], defaults: dict[str, Any]) -> None:
    for key in [key for key, default in defaults.items() if section[key] == default]:
        del section[key]
