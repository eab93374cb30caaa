"""What a new run begins with, settled while its configuration is read: a snapshot, or nothing.

A start gives sections of the configuration. They stand between the defaults and what the user gives:
defaults < start < YAML file < command line.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import yaml
from accelerate import Accelerator

from transfusion_mot.config import RunConfig, parse_config, to_dict
from transfusion_mot.config_checks import given_values, merged
from transfusion_mot.errors import UserError
from transfusion_mot.models.initial_weights import WeightReport
from transfusion_mot.models.transfusion import TransfusionMoT
from transfusion_mot.run.from_snapshot import SnapshotStart
from transfusion_mot.run.from_towers import TowerStarts
from transfusion_mot.training.checkpoint import find_state, run_config_file

# Mappings whose entries the user may give in part: the start has the rest.
_MAPPINGS = (("model", "towers"), ("model", "modalities"), ("codecs",))
# Of a run that is continued, what its start had given.
_SETTLED = ("tokenizer", "codecs", "model", "diffusion")
_SETTLED_DATA = ("image_size", "buckets", "image_fit", "max_audio_seconds")


class InitialWeights(Protocol):
    """Something that a run begins with."""

    def sections(self) -> dict[str, Any]:
        """What it says about the configuration, nested as in YAML."""
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
    """Dotted keys of a configuration that name a start, and what they name."""
    named = {"init_from": str(sections["init_from"])} if sections.get("init_from") is not None else {}
    for name, tower in _at(sections, ("model", "towers")).items():
        for key in ("pretrained", "copy_of"):
            if isinstance(tower, dict) and tower.get(key) is not None:
                named[f"model.towers.{name}.{key}"] = str(tower[key])
    return named


def find_starts(sections: dict[str, Any]) -> list[InitialWeights]:
    """The starts that a configuration names.

    Args:
        sections: Of the configuration, nested as in YAML; as far as they are given.

    Raises:
        UserError: One is not there or cannot be used, or they exclude each other.
    """
    names = named_starts(sections)
    if "init_from" not in names:
        return [TowerStarts(sections)] if names else []
    if len(names) > 1:
        raise UserError(
            f"init_from takes all weights of a snapshot, and {min(set(names) - {'init_from'})} those of one tower; "
            "remove one of them"
        )
    return [SnapshotStart(names["init_from"])]


def settled_config(arguments: Sequence[str]) -> RunConfig:
    """Read the configuration of a run, with what its start says; see `parse_config`.

    A run that is continued needs its start no more: what it said is in the `config.yaml` of the run folder.

    Raises:
        UserError: A mistake in the configuration, a start that cannot be used, or one that it contradicts.
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
                    f"{key} is {name}, and the run in {run} {began}: it goes on with its own weights; remove the key, "
                    "or choose another output_dir to begin a new run"
                )
    else:
        starts = find_starts(given)
        sections = {}
        for start in starts:
            sections = merged(sections, start.sections())
        # Buckets come before an image size: those of the start would hide the one that is given. Arguments are those of
        # their scheduler.
        for section, key, goes in (("data", "image_size", "buckets"), ("diffusion", "scheduler", "scheduler_args")):
            if key in (given.get(section) or {}):
                sections.get(section, {}).pop(goes, None)
    config = parse_config(RunConfig, _with_sections(arguments, sections, given), "")
    for start in starts:
        start.check(config)
    return config


def fill_initial_weights(model: TransfusionMoT, config: RunConfig, accelerator: Accelerator) -> bool:
    """Put the weights of the starts that the configuration names into a model, and print a table of each.

    Called by all processes, with a model whose weights are drawn and lie where they will be.

    Returns:
        Whether there was any start.

    Raises:
        UserError: Weights are damaged, do not fit, or something in the table is unexplained.
    """
    starts = find_starts(to_dict(config))
    for start in starts:
        report = start.fill(model, config)
        report.check()
        accelerator.print(report)
    return bool(starts)


def _config_before(run: Path, resume: str) -> dict[str, Any]:
    """`config.yaml` of the run that would be continued; empty if there is none."""
    file = run / "config.yaml" if resume in ("auto", "never") else run_config_file(Path(resume))
    try:
        content = yaml.safe_load(file.read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


def _sections_of(before: dict[str, Any]) -> dict[str, Any]:
    """What the start of a run had settled, from the `config.yaml` of the run."""
    sections = {key: before[key] for key in (*named_starts(before), *_SETTLED) if key in before}
    return sections | {"data": {key: value for key, value in before["data"].items() if key in _SETTLED_DATA}}


def _with_sections(arguments: Sequence[str], sections: dict[str, Any], given: dict[str, Any]) -> list[str]:
    """Arguments in which what a start says stands below what the user gives.

    The parser merges the keys of an entry of a mapping, and drops entries that a file does not have. So those of the
    start are given again behind each file, without the keys that the user sets.
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
    # The parser takes a string as it stands.
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
    """Dotted keys and values. Mappings with names of the user's own are values."""
    result: list[tuple[str, Any]] = []
    for key, value in sections.items():
        path = (*above, key)
        is_section = isinstance(value, dict) and path not in _MAPPINGS and len(path) == 1
        result += _flat(value, path) if is_section else [(".".join(path), value)]
    return result
