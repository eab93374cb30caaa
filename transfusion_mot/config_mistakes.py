"""Mistakes in the form of a configuration, each with a one-sentence message: files, keys and types of values."""

import dataclasses
import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

import yaml

from transfusion_mot.config_checks import COMMAND_LINE, layers, pairs
from transfusion_mot.errors import UserError

# Keys of earlier versions, and the keys that replace them.
_MOVED = {
    "data.text_slots": "data.slots.text",
    "data.images_per_row": "data.slots.image",
    "training.diffusion_loss_weight": "model.modalities.image.loss_weight",
    "model.patch_size": "model.modalities.image.patch_size",
    "model.image_attention": "model.modalities.image.attention",
    "model.image_adapter": "model.modalities.image.adapter",
    "model.unet_channels": "model.modalities.image.unet_channels",
    "model.unet_num_layers": "model.modalities.image.unet_num_layers",
    "autoencoder.path": "codecs.image.path",
    "autoencoder.batch_size": "codecs.image.batch_size",
}
# What a type is called in messages.
_TYPES = {
    "float": "a number",
    "int": "a whole number",
    "bool": "true or false",
    "str": "a text",
    "list": "a list",
    "tuple": "a list",
    "dict": "a mapping of names to values",
    "NoneType": "null",
}
_SECTION = "a mapping of keys to values"


def refuse_mistakes(arguments: Sequence[str], config_class: type) -> None:
    """Refuse arguments and files that are not a configuration, unknown keys, and null for a key that needs a value.

    Raises:
        UserError: Names the argument, or the file and the key.
    """
    if {"-h", "--help"} & set(arguments):
        return
    names = _key_names(config_class)
    _check_words(arguments, names)
    for key, value in pairs(arguments):
        if key == "config":
            _check_file(value)
    given = list(layers(arguments))
    if moved := [key for key in _keys_in(content for _, content in given) if key in _MOVED]:
        parts = ", ".join(f"{key} (now {_MOVED[key]})" for key in moved)
        raise UserError(f"configuration: {'a key' if len(moved) == 1 else 'keys'} of an earlier version: {parts}")
    for place, content in given:
        _check_section(content, config_class, "", place=place, names=names)


def explain(message: str, arguments: Sequence[str]) -> str:
    """The parser's message about the type of a value, in one sentence."""
    keys = list(dict.fromkeys(re.findall(r'Parser key "([\w.]+)"', message)))
    about = message.rpartition("Parser key ")[2]
    # The alternatives of a type are listed, each with what it needs.
    is_union = "Does not validate against any" in about
    found = re.findall(
        r"Expected a (?:<class '(?P<type>\w+)'>|typing\.Literal\[(?P<one>.*)\]|(?P<tuple>tuple) with (?P<count>\d+))"
        r"|(?P<section>dot import path|Not a valid subclass|Unable to load config)",
        about,
    )
    needed = [
        _TYPES.get(kind, kind) or (f"one of {one}" if one else f"a list of {count}" if count else _SECTION)
        for kind, one, _, count, _ in (found if is_union else found[:1])
    ]
    given = re.search(
        r"""(?:Got value:|Given value:|path string:|Unable to load config) ?["']?(.*?)["']?$""", about, re.M
    )
    if not keys or not needed or given is None:
        return f"configuration: {' '.join(message.replace('Parser key ', '').split())}"
    if keys[0] == "model.modalities" and "import path" in message:
        return (
            "configuration: model.modalities gives only the name of a tower, as in an earlier version; write "
            "NAME: {tower: TOWER, objective: next_token or diffusion}"
        )
    key, place = _located(keys, given[1], arguments)
    value = "null" if given[1] in ("None", "null") else f"'{given[1]}'"
    return f"configuration: {key} is {value}{place}; it must be {' or '.join(dict.fromkeys(needed))}"


def _located(keys: Sequence[str], value: str, arguments: Sequence[str]) -> tuple[str, str]:
    """Full name of the key that has a value of a wrong type, and the file that gives it, for a message.

    Args:
        keys: Its section, and for an item of a list or mapping the key of the item.
        value: The value, as text.
        arguments: The command line.
    """
    section, inner = keys[0], ".".join(keys[1:])
    found = []
    for place, content in layers(arguments):
        items: Any = content
        for name in section.split("."):
            items = items.get(name) if isinstance(items, dict) else None
        where = _in_file(place)
        if inner:
            entries = [
                (f"{name}.{inner}", item[inner])
                for name, item in _items(items)
                if isinstance(item, dict) and inner in item
            ]
        else:
            entries = [("", items), *_items(items)]
        found += [(name, where) for name, item in entries if str(item) == value]
    name, where = min(found, key=lambda entry: entry[0] != "", default=(f".{inner}" if inner else "", ""))
    return section + name, where


def _in_file(place: str) -> str:
    """Where a value is from, for a message; nothing for the command line."""
    return "" if place == COMMAND_LINE else f" (in {place})"


def _items(value: Any) -> list[tuple[str, Any]]:
    """Items of a list or mapping, with what follows their section in the name of their keys."""
    if isinstance(value, dict):
        return [(f".{name}", item) for name, item in value.items()]
    return [(f"[{index}]", item) for index, item in enumerate(value)] if isinstance(value, list) else []


def _check_words(arguments: Sequence[str], names: Sequence[str]) -> None:
    """Refuse arguments that are no pairs of a key and a value."""
    words = iter(arguments)
    for word in words:
        key, equals, _ = word.partition("=")
        if equals and re.fullmatch(r"(--)?\w[\w.+-]*", key):
            continue
        if word.startswith("--") and not equals:
            value = next(words, None)
            if value is None or value.startswith("--"):
                raise UserError(f"{word} has no value; write {word}=VALUE")
            continue
        name = key.strip()
        if name in names:
            raise UserError(f"'{word}' is not KEY=VALUE; write {name}=VALUE, without spaces around =")
        if Path(word).suffix in (".yaml", ".yml") or Path(word).is_file():
            raise UserError(f"'{word}' is not KEY=VALUE; to read a configuration file, write --config {word}")
        raise UserError(f"'{word}' is not KEY=VALUE; --help says how to set a key")


def _check_file(path: str) -> None:
    """Refuse a file that is not a mapping in YAML, or that gives a key twice."""
    if not path:
        raise UserError("--config is empty; give a configuration file, such as one of configs/")
    try:
        text = Path(path).read_text(encoding="utf-8")
        loader = yaml.SafeLoader(text)
        if (root := loader.get_single_node()) is not None:
            loader.construct_document(root)
    except FileNotFoundError:
        raise UserError(f"there is no configuration file '{path}'; configs/ has those of this project") from None
    except OSError as error:
        raise UserError(f"configuration file '{path}' cannot be read: {error.strerror}; give a YAML file") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(
            f"configuration file '{path}' is not UTF-8 text (line {line}); give a YAML file, or save it as UTF-8"
        ) from None
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        what = getattr(error, "problem", None) or " ".join(str(error).split())
        tab = "; YAML is indented with spaces, not tabs" if r"'\t'" in what else ""
        at = "" if mark is None else f", line {mark.line + 1}"
        raise UserError(f"configuration file '{path}'{at} is not YAML: {what}{tab}") from None
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"configuration file '{path}' has no keys; write KEY: VALUE, as the files in configs/ do")
    for key, number in _repeated(root):
        raise UserError(f"configuration file '{path}', line {number}: {key} is given twice; remove one of them")


def _repeated(node: yaml.Node) -> Iterator[tuple[str, int]]:
    """(Key, line) of each key that a mapping has again."""
    if isinstance(node, yaml.MappingNode):
        names = [key.value for key, _ in node.value]
        for position, (key, value) in enumerate(node.value):
            if key.value in names[:position]:
                yield key.value, key.start_mark.line + 1
            yield from _repeated(value)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _repeated(item)


def _check_section(content: dict[str, Any], section: type, path: str, *, place: str, names: Sequence[str]) -> None:
    """Refuse unknown keys of a section and of those in it, and null where a key needs a value.

    Args:
        content: Given keys and values.
        section: Its dataclass.
        path: Name of the section with a dot, or "".
        place: File, or `COMMAND_LINE`.
        names: Names of all keys.
    """
    kinds = get_type_hints(section)
    where = _in_file(place)
    for given, value in content.items():
        # `--data.sources+=` adds to the list.
        key = str(given).removesuffix("+")
        if key not in kinds:
            _refuse_key(path, key, list(kinds), names=names, where=where)
        kind, inner = kinds[key], _section_in(kinds[key])
        is_section = dataclasses.is_dataclass(kind)
        # Where the command line gives a text, nothing and `null` are texts.
        is_text = kind is str and not where and "[" not in path
        has_other_length = key == "num_steps" and content.get("num_epochs") is not None
        if value is None and type(None) not in get_args(kind) and not (is_text or has_other_length):
            remedy = "give it keys or remove it" if is_section else "give a value, or remove the key for its default"
            raise UserError(f"configuration: {path}{key} is null{where}; {remedy}")
        if is_section and not isinstance(value, dict):
            raise UserError(f"configuration: {path}{key} is '{value}'{where}; it must be {_SECTION}")
        if inner is None:
            continue
        is_one = is_section or get_origin(kind) not in (dict, list)
        for name, item in [("", value)] if is_one else _items([value] if str(given).endswith("+") else value):
            if isinstance(item, dict):
                _check_section(item, inner, f"{path}{key}{name}.", place=place, names=names)


def _section_in(kind: Any) -> Any:
    """The dataclass that a type is or contains, or None."""
    return next((one for one in (kind, *get_args(kind)) if dataclasses.is_dataclass(one)), None)


def _refuse_key(path: str, key: str, known: Sequence[str], *, names: Sequence[str], where: str) -> NoReturn:
    """Refuse an unknown key, with the nearest valid names: those of its section before those of others."""
    if "." in key and where:
        raise UserError(
            f"configuration: '{path}{key}' has a dot{where}; in a file write each section on its own line, and its "
            "keys indented below it"
        )
    near = [path + name for name in difflib.get_close_matches(key, known, n=3, cutoff=0.6)]
    if not near:
        last = {name: name.split(".")[-1] for name in names}
        others = difflib.get_close_matches(key, list(last.values()), n=3, cutoff=0.6)
        near = sorted((name for name in names if last[name] in others), key=lambda name: others.index(last[name]))
    hint = (
        f"nearest valid: {', '.join(near[:3])}" if near else f"{path[:-1] or 'a configuration'} has {', '.join(known)}"
    )
    raise UserError(f"configuration: unknown key '{path}{key}'{where}; {hint}")


def _keys_in(contents: Iterable[dict[str, Any]]) -> list[str]:
    """Dotted keys of contents nested as in YAML, down to those of a section; each once."""
    keys: list[str] = []
    for section, values in (entry for content in contents for entry in content.items()):
        keys += [f"{section}.{key}" for key in values] if isinstance(values, dict) else [str(section)]
    return list(dict.fromkeys(keys))


def _key_names(config_class: Any, prefix: str = "") -> list[str]:
    """Dotted names of every key, sections included; items of lists and dicts by their own names."""
    names = []
    for key, kind in get_type_hints(config_class).items():
        names.append(prefix + key)
        if inner := _section_in(kind):
            names += _key_names(inner, f"{prefix}{key}.")
    return names
