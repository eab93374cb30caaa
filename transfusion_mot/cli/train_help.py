"""Text of `train.py --help`: how to begin, and the keys of one section of the configuration."""

import dataclasses
import textwrap
from typing import Any, get_args, get_type_hints

from docstring_parser import parse

from transfusion_mot.config import CodecConfig, LoraConfig, ModalityConfig, RunConfig, SourceConfig, TowerConfig
from transfusion_mot.errors import UserError
from transfusion_mot.installed import as_called

_WIDTH = 100
_SHORT = """\
usage: python train.py --config FILE [KEY=VALUE ...]          one device
       accelerate launch train.py --config FILE [KEY=VALUE ...]    several

Begin with one of these:
  make quickstart                                             fine-tune the shipped model on a CPU, in minutes
  python train.py --config configs/finetune/mine.yaml init_from=checkpoints/emoji \\
      'data.sources=[{kind: imagefolder, path: my-images}]'   your own images
  python train.py --config configs/emoji_128.yaml             from scratch, eight minutes of one H200

To continue an interrupted run, give the same command again. Keys are read as defaults < FILE < command line.

Keys that are changed most:
"""
_OFTEN = (
    "output_dir",
    "init_from",
    "data.sources",
    "data.image_size",
    "data.slots",
    "optimizer.lr",
    "training.num_steps",
    "training.num_epochs",
    "training.num_rows",
    "training.microbatch_rows",
    "training.activation_checkpointing",
)
_PLAN = """\
With training:
  --quiet                print only lines of losses, warnings and errors

Instead of training:
  --plan                 print parameters, memory and days of the run
    --gpus N             number of GPUs (default: 8)
    --gpu NAME           kind of GPU (default: A100-80GB)
    --mfu X              share of the GPU's peak that the run reaches (default: 0.4)
"""
# Entries of lists and mappings.
_ENTRIES: dict[str, type] = {
    "data.sources": SourceConfig,
    "model.towers": TowerConfig,
    "model.modalities": ModalityConfig,
    "codecs": CodecConfig,
    "lora": LoraConfig,
}


def train_help(topic: str | None = None) -> str:
    """The help of train.py.

    Args:
        topic: A section such as `data`, or a list or mapping in it such as `data.sources`; None says how to begin.

    Raises:
        UserError: There is no such section.
    """
    topics = {**_sections(), **_ENTRIES}
    if topic is None:
        often = [_described(key, _field(key)) for key in _OFTEN]
        listed = "\n".join(f"  --help {name:<18} {_first_line(section)}" for name, section in topics.items())
        return f"{as_called(_SHORT)}{''.join(often)}\nAll keys:\n{listed}\n  --help all\n\n{_PLAN}"
    if topic == "all":
        return "\n".join(train_help(name) for name in topics)
    if topic not in topics:
        raise UserError(f"--help {topic}: there is no such section; known: {', '.join(topics)}, all")
    section = topics[topic]
    # The keys of sections in lists and mappings are printed without a prefix.
    above = f"{topic}." if topic in _sections() or topic == "lora" else ""
    keys = [_described(f"{above}{field.name}", (section, field)) for field in dataclasses.fields(section)]
    return f"{topic}: {_first_line(section)}\n{''.join(keys)}"


def _sections() -> dict[str, Any]:
    hints = get_type_hints(RunConfig)
    return {name: kind for name, kind in hints.items() if dataclasses.is_dataclass(kind)}


def _field(key: str) -> tuple[Any, Any]:
    """(section, field) of a dotted key."""
    *above, name = key.split(".")
    section: Any = _sections()[above[0]] if above else RunConfig
    return section, next(field for field in dataclasses.fields(section) if field.name == name)


def _described(key: str, found: tuple[Any, Any]) -> str:
    """A key with its type, its default and its description."""
    section, field = found
    texts = {parameter.arg_name: parameter.description or "" for parameter in parse(section.__doc__ or "").params}
    text = textwrap.fill(
        " ".join(texts[field.name].split()), _WIDTH, initial_indent="      ", subsequent_indent="      "
    )
    return f"  {key} ({_type_name(get_type_hints(section)[field.name])}{_default(field)})\n{text}\n"


def _default(field: Any) -> str:
    value = field.default
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    if value is dataclasses.MISSING:
        return ", needed"
    if dataclasses.is_dataclass(value) or (isinstance(value, list | dict) and "Config(" in repr(value)):
        return ""
    return f", default: {'null' if value is None else value if value != '' else repr(value)}"


def _type_name(kind: Any) -> str:
    options = get_args(kind)
    if options and all(isinstance(option, str) for option in options):
        return " or ".join(options)
    if type(None) in options:
        return f"{' or '.join(_type_name(option) for option in options if option is not type(None))} or null"
    name = getattr(kind, "__name__", str(kind)) if not options else str(kind)
    for module in ("transfusion_mot.config.", "typing."):
        name = name.replace(module, "")
    return name.replace("None", "null")


def _first_line(section: Any) -> str:
    return (parse(section.__doc__ or "").short_description or "").strip()
