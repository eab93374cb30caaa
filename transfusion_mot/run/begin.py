"""The initial weights of a new run, and the settings that follow from them when its configuration is read.

A start (a snapshot or pretrained towers) gives sections of the configuration. The order of precedence is
defaults < start < YAML file < command line.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import yaml
from accelerate import Accelerator

from transfusion_mot.config import ORIGINS, RunConfig, parse_config, to_dict
from transfusion_mot.config_checks import given_values, merged
from transfusion_mot.errors import UserError
from transfusion_mot.files import RUN_CONFIG
from transfusion_mot.models.initial_weights import WeightReport
from transfusion_mot.models.transfusion import TransfusionMoT
from transfusion_mot.run.from_snapshot import SnapshotStart
from transfusion_mot.run.from_towers import TowerStarts
from transfusion_mot.training.checkpoint import find_state, run_config_file

# Mappings whose entries the user may give partly: the start gives the rest.
_MAPPINGS = (("model", "towers"), ("model", "modalities"), ("codecs",))
# Settings that a continued run has from its start.
_SETTLED = ("tokenizer", "codecs", "model", "diffusion")
_SETTLED_DATA = ("image_size", "buckets", "image_fit", "max_audio_seconds")


class InitialWeights(Protocol):
    """A source of initial weights."""

    def sections(self) -> dict[str, Any]:
        """Sections of the configuration that follow from it, nested as in YAML."""
        ...

    def check(self, config: RunConfig) -> None:
        """Refuse a configuration that contradicts it.

        Raises:
            UserError: Names the keys.
        """
        ...

    def fill(self, model: TransfusionMoT, config: RunConfig) -> WeightReport:
        """Put its weights into a model, whole or sharded; called by all processes.

        Raises:
            UserError: The weights are damaged, or do not fit.
        """
        ...


def named_starts(sections: dict[str, Any]) -> dict[str, str]:
    """Dotted keys of a configuration that name a start => the names."""
    named = {"init_from": str(sections["init_from"])} if sections.get("init_from") is not None else {}
    for name, tower in _at(sections, ("model", "towers")).items():
        for key in ORIGINS:
            if isinstance(tower, dict) and tower.get(key) is not None:
                named[f"model.towers.{name}.{key}"] = str(tower[key])
    return named


def find_starts(sections: dict[str, Any]) -> list[InitialWeights]:
    """The starts that a configuration names.

    Args:
        sections: Sections of the configuration that are given, nested as in YAML.

    Raises:
        UserError: A start does not exist or cannot be used, or two starts exclude each other.
    """
    names = named_starts(sections)
    if "init_from" not in names:
        return [TowerStarts(sections)] if names else []
    if len(names) > 1:
        raise UserError(
            f"both init_from and {min(set(names) - {'init_from'})} are given; init_from already sets all weights: "
            "remove one of them"
        )
    return [SnapshotStart(names["init_from"])]


def settled_config(arguments: Sequence[str]) -> RunConfig:
    """Read the configuration of a run, including the settings from its start; see `parse_config`.

    A continued run does not need its start: the settings are in `config.yaml` of the run folder.

    Raises:
        UserError: A mistake in the configuration, an unusable start, or a start that contradicts the configuration.
    """
    given = given_values(arguments)
    run, resume = Path(str(given.get("output_dir", RunConfig.output_dir))), str(given.get("resume", RunConfig.resume))
    before = _config_before(run, resume)
    named, named_before = named_starts(given), named_starts(before)
    if not (named or named_before):
        return parse_config(RunConfig, arguments, "")
    starts: list[InitialWeights] = []
    if find_state(run, resume) is not None:
        sections = _sections_of(before)
        for key, name in named.items():
            if named_before.get(key) != name:
                began = f"began with {key}={named_before[key]}" if key in named_before else f"began without {key}"
                raise UserError(
                    f"{key} is {name}, but the run in {run} {began} and continues with its own weights; remove the "
                    "key, or choose another output_dir to start a new run"
                )
    else:
        starts = find_starts(given)
        sections = {}
        for start in starts:
            sections = merged(sections, start.sections())
        # Buckets override an image size: those of the start would hide a given image size. Arguments are those of their
        # scheduler.
        for section, key, goes in (("data", "image_size", "buckets"), ("diffusion", "scheduler", "scheduler_args")):
            if key in (given.get(section) or {}):
                sections.get(section, {}).pop(goes, None)
    config = parse_config(RunConfig, _with_sections(arguments, sections, given), "")
    for start in starts:
        start.check(config)
    return config


def fill_initial_weights(model: TransfusionMoT, config: RunConfig, accelerator: Accelerator) -> bool:
    """Load the weights of the configured starts into a model, and print a table for each.

    Called by all processes. The model's weights are already drawn on their final device.

    Returns:
        Whether there was any start.

    Raises:
        UserError: Weights are damaged, do not fit, or are left over without a reason.
    """
    starts = find_starts(to_dict(config))
    for start in starts:
        report = start.fill(model, config)
        report.check()
        accelerator.print(report)
    return bool(starts)


def _config_before(run: Path, resume: str) -> dict[str, Any]:
    """`config.yaml` of the run to continue; empty if there is none."""
    file = run / RUN_CONFIG if resume in ("auto", "never") else run_config_file(Path(resume))
    try:
        content = yaml.safe_load(file.read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


def _sections_of(before: dict[str, Any]) -> dict[str, Any]:
    """Settings that a run has from its start, read from its `config.yaml`."""
    sections = {key: before[key] for key in (*named_starts(before), *_SETTLED) if key in before}
    return sections | {"data": {key: value for key, value in before["data"].items() if key in _SETTLED_DATA}}


def _with_sections(arguments: Sequence[str], sections: dict[str, Any], given: dict[str, Any]) -> list[str]:
    """Arguments in which the user's settings override those of a start.

    The parser merges the keys of a mapping's entries, but drops entries that a file lacks. So the entries of the start
    are repeated after each file, without the keys that the user sets.
    """
    again = []
    for path in _MAPPINGS:
        own, users = _at(sections, path), _at(given, path)
        if own and users:
            entries = {
                name: {key: value for key, value in own.get(name, {}).items() if key not in (users.get(name) or {})}
                for name in own | users
            }
            again.append(f"--{'.'.join(path)}={json.dumps(entries)}")
    # The parser takes strings without quotes.
    result = [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in _flat(sections)]
    for position, word in enumerate(arguments):
        result.append(word)
        if word.startswith("--config=") or (position and arguments[position - 1] == "--config"):
            result += again
    return [*result, *again]


def _at(sections: dict[str, Any], path: Sequence[str]) -> dict[str, Any]:
    for key in path:
        value = sections.get(key)
        sections = value if isinstance(value, dict) else {}
    return sections


def _flat(sections: dict[str, Any], above: tuple[str, ...] = ()) -> list[tuple[str, Any]]:
    """Dotted keys and values. Mappings with user-defined names are values."""
    result: list[tuple[str, Any]] = []
    for key, value in sections.items():
        path = (*above, key)
        is_section = isinstance(value, dict) and path not in _MAPPINGS and len(path) == 1
        result += _flat(value, path) if is_section else [(".".join(path), value)]
    return result
