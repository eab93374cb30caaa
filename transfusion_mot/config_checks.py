"""Checks of the values of a configuration, each with a one-sentence message."""

import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from transfusion_mot.errors import UserError

# Smallest valid value of each key; 0 is excluded where it has no meaning.
_AT_LEAST = {
    "data.image_size": 8,
    "data.lookahead": 1,
    "data.num_workers": 0,
    "training.num_steps": 1,
    "training.num_rows": 1,
    "training.microbatch_rows": 1,
    "training.seed": 0,
    "training.log_every": 1,
    "training.validate_every": 0,
    "training.sample_every": 0,
    "training.save_every": 0,
    "training.keep_last": 1,
    "training.keep_every": 0,
    "training.max_minutes": 0,
    "training.num_validation_documents": 1,
    "training.watchdog_minutes": 0,
    "optimizer.warmup_steps": 0,
    "data.split_seed": 0,
    "training.z_loss_weight": 0,
    "optimizer.weight_decay": 0,
    "diffusion.guidance_scale": 0,
    "model.num_layers": 1,
    "model.num_heads": 1,
    "model.num_kv_heads": 1,
    "model.head_dim": 2,
    "diffusion.num_inference_steps": 1,
    "tokenizer.vocab_size": 1,
    "num_steps": 1,
    "batch_size": 1,
    "latent_channels": 1,
    "codebook_size": 2,
    "commitment_weight": 0,
    "layers_per_block": 1,
    "norm_num_groups": 1,
    "warmup_steps": 0,
    "kl_weight": 0,
    "perceptual_weight": 0,
    "gan_weight": 0,
    "gan_start_step": 0,
    "audio.sample_rate": 1,
    "audio.hop_length": 1,
    "audio.num_mels": 1,
    "audio.num_code_layers": 0,
}
# Where a value that is not from a file is from, in messages.
COMMAND_LINE = "the command line"
# NumPy's generators take seeds of 32 bits. Larger images are a slip: one takes more than the memory of a machine.
_MOST_PIXELS = 8192
_AT_MOST = {"training.seed": 2**32 - 1, "seed": 2**32 - 1, "data.image_size": _MOST_PIXELS, "training.num_rows": 2**20}
_SHARES = (
    "data.held_out_fraction",
    "data.caption_first_prob",
    "data.image_first_max_timestep",
    "data.prompt_dropout_prob",
    "data.edit_dropout.instruction",
    "data.edit_dropout.source",
    "data.edit_dropout.both",
    "data.edit_dropout.total",
    "optimizer.min_lr_ratio",
    "optimizer.decay_fraction",
    "training.ema_decay",
    "ema_decay",
)


def check_ranges(config: Any) -> None:
    """Refuse numbers out of range.

    Raises:
        UserError: Names the key, its value and the valid range.
    """

    def value(key: str) -> Any:
        return functools.reduce(lambda section, name: getattr(section, name, None), key.split("."), config)

    for key, smallest in _AT_LEAST.items():
        if (given := value(key)) is not None and not given >= smallest:  # nor is "not a number"
            raise UserError(f"configuration: {key} is {given}; it must be at least {smallest}")
    for key, largest in _AT_MOST.items():
        if (given := value(key)) is not None and given > largest:
            raise UserError(f"configuration: {key} is {given}; it must be at most {largest}")
    if not all(0 <= beta < 1 for beta in value("optimizer.betas") or ()):
        raise UserError(
            f"configuration: optimizer.betas is {value('optimizer.betas')}; each must be at least 0 and below 1"
        )
    for key in _SHARES:
        if (given := value(key)) is not None and not 0 <= given <= 1:
            raise UserError(f"configuration: {key} is {given}; it must be from 0 to 1")
    for key in (
        "optimizer.lr",
        "optimizer.eps",
        "optimizer.max_grad_norm",
        "data.image_first_max_timestep",
        "data.max_audio_seconds",
        "diffusion.min_snr_gamma",
        "model.rope_theta",
        "model.norm_eps",
        "lr",
        "training.num_epochs",
    ):
        if (given := value(key)) is not None and not given > 0:
            raise UserError(f"configuration: {key} is {given}; it must be above 0")
    scales = {"diffusion.guidance_scale": value("diffusion.guidance_scale")}
    for name, modality in (value("model.modalities") or {}).items():
        scales[f"model.modalities.{name}.guidance_scale"] = modality.guidance_scale
    for key, scale in scales.items():
        if value("data.prompt_dropout_prob") == 0 and scale not in (None, 1):
            raise UserError(
                f"configuration: {key} is {scale} and data.prompt_dropout_prob is 0; guidance needs a model that was "
                f"also trained without prompts: set {key}=1, or data.prompt_dropout_prob above 0"
            )
    # If text is missing, `check_architecture` reports it.
    if "text" in (modalities := value("model.modalities") or {}):
        _check_modalities(config, modalities)
    for key in ("output_dir", "data.cache_dir"):
        if value(key) == "":
            raise UserError(f"configuration: {key} is empty; give a folder")
    for name, tower in (value("model.towers") or {}).items():
        for key in ("hidden_size", "intermediate_size"):
            if getattr(tower, key) < 1:
                raise UserError(
                    f"configuration: model.towers.{name}.{key} is {getattr(tower, key)}; it must be at least 1"
                )
        if tower.norm_eps is not None and not tower.norm_eps > 0:
            raise UserError(f"configuration: model.towers.{name}.norm_eps is {tower.norm_eps}; it must be above 0")
        if not 0 <= tower.dropout < 1:
            raise UserError(
                f"configuration: model.towers.{name}.dropout is {tower.dropout}; it must be at least 0 and below 1"
            )
    if (widths := value("block_out_channels")) is not None and (not widths or min(widths) < 1):
        raise UserError(f"configuration: block_out_channels is {widths}; it must have widths, each at least 1")
    for source in value("data.sources") or []:
        if source.weight <= 0:
            raise UserError(f"configuration: data.sources has a weight of {source.weight}; it must be above 0")
        if source.num_items is not None and source.num_items < 1:
            raise UserError(f"configuration: data.sources has num_items of {source.num_items}; it must be at least 1")
    for size in value("data.buckets") or []:
        if len(size) != 2 or min(size) < 8 or max(size) > _MOST_PIXELS:
            raise UserError(
                f"configuration: data.buckets has {size}; a bucket is [height, width], each from 8 to {_MOST_PIXELS}"
            )
    for key, number in _numbers(config):
        if not math.isfinite(number):
            raise UserError(f"configuration: {key} is {number}; it must be a finite number")


def _numbers(value: Any, key: str = "") -> Iterator[tuple[str, float]]:
    """(Dotted key, number) of every float in a section."""
    items: Iterable[tuple[Any, Any]]
    if dataclasses.is_dataclass(value):
        items = [(entry.name, getattr(value, entry.name)) for entry in dataclasses.fields(value)]
    elif isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    else:
        if isinstance(value, float):
            yield key, value
        return
    for name, item in items:
        yield from _numbers(item, f"{key}.{name}" if key else str(name))


def _check_modalities(config: Any, modalities: dict[str, Any]) -> None:
    """Refuse modalities without slots or codec, slots and codecs without modality, and numbers out of range."""
    read = {name: modality.reads for name, modality in modalities.items() if modality.objective == "read"}
    for section, given, needed in (
        ("data.slots", config.data.slots, set(modalities)),
        ("codecs", config.codecs, set(modalities) - {"text", *read}),
    ):
        if set(given) != needed:
            raise UserError(
                f"configuration: {section} has {', '.join(given) or 'nothing'}, but needs one entry for each of "
                f"{', '.join(sorted(needed)) or 'no modality'} (from model.modalities)"
            )
    _check_orders(config.data.orders, set(modalities) - set(read))
    least = {f"data.slots.{name}": (slots, 8 if name == "text" else 1) for name, slots in config.data.slots.items()}
    least |= {f"codecs.{name}.batch_size": (codec.batch_size, 1) for name, codec in config.codecs.items()}
    for name, modality in modalities.items():
        least[f"model.modalities.{name}.loss_weight"] = modality.loss_weight, 0
        least[f"model.modalities.{name}.unet_num_layers"] = modality.unet_num_layers, 1
        if modality.guidance_scale is not None:
            least[f"model.modalities.{name}.guidance_scale"] = modality.guidance_scale, 0
    for key, (number, smallest) in least.items():
        if not number >= smallest:
            raise UserError(f"configuration: {key} is {number}; it must be at least {smallest}")
    _check_read(config.data, read)
    for name in (name for name, modality in modalities.items() if modality.objective != "next_token"):
        is_apart = name in read or name in read.values()
        if config.data.has_copies and config.data.slots[name] < 2 and not is_apart:
            raise UserError(
                f"configuration: data.slots.{name} is {config.data.slots[name]}; with data.image_context=clean it must "
                "be at least 2, for an image and its clean copy"
            )
        if config.data.has_edits and config.data.slots[name] < 2 and not is_apart:
            raise UserError(
                f"configuration: data.slots.{name} is {config.data.slots[name]}; with editing pairs it must be at "
                "least 2, for a source image and its result"
            )
        if config.data.has_copies and not modalities[name].is_bidirectional:
            raise UserError(
                f"configuration: model.modalities.{name}.attention is causal, but data.image_context=clean needs "
                "bidirectional attention; set it to bidirectional, or data.image_context=noised"
            )


def _check_read(data: Any, read: dict[str, str]) -> None:
    """Refuse modalities that read clean latents if the data never have any."""
    for name, media in read.items():
        if not data.has_copies:
            raise UserError(
                f"configuration: model.modalities.{name} reads clean latents, but with data.image_context=noised "
                "captions see noised ones; set data.image_context=clean"
            )
        if data.orders is None:
            key, is_read = "data.caption_first_prob is 1", data.caption_first_prob < 1
            is_read |= any(source.audio_column is not None for source in data.sources)
        else:
            key = f"data.orders has {media} in the last place only"
            is_read = any(chance > 0 and media in order.split()[:-1] for order, chance in data.orders.items())
        if not (is_read or data.has_edits or any(source.kind == "interleaved" for source in data.sources)):
            raise UserError(
                f"configuration: model.modalities.{name} reads clean latents of {media}, but {key}, so nothing follows "
                f"{media}; change that, or remove {name}"
            )


def _check_orders(orders: dict[str, float] | None, modalities: set[str]) -> None:
    """Refuse orders that no document can have."""
    if orders is None:
        return
    example = 'such as {"text image": 4, "image text": 1}'
    for order, chance in orders.items():
        names = order.split()
        if unknown := [name for name in names if name not in modalities]:
            raise UserError(
                f"configuration: data.orders has '{order}', and '{unknown[0]}' is not in model.modalities, which has "
                f"{', '.join(sorted(modalities))}; write names with a space between them, {example}"
            )
        if len(set(names)) < len(names) or set(names) <= {"text"}:
            raise UserError(
                f"configuration: data.orders has '{order}'; an order names each modality once, and one besides text, "
                f"{example}"
            )
        if not 0 <= chance < math.inf:
            raise UserError(f"configuration: data.orders has the chance {chance} for '{order}'; it must be at least 0")
    if not sum(orders.values()) > 0:
        raise UserError(f"configuration: data.orders has no order with a chance above 0; give some, {example}, or null")


def given_values(arguments: Sequence[str]) -> dict[str, Any]:
    """Values set by the command line and its configuration files, nested as in YAML; later ones win.

    Not for checks: unreadable files are skipped.
    """
    given: dict[str, Any] = {}
    for _, content in layers(arguments):
        given = merged(given, content)
    return given


def ends_by_epochs(arguments: Sequence[str]) -> bool:
    """Whether `training.num_epochs` sets the length of a run; the later of it and `training.num_steps` wins.

    Raises:
        UserError: A configuration file has both, or the command line.
    """
    keys = {"num_steps", "num_epochs"}
    found: dict[str, set[str]] = {}
    last = ""
    for place, content in layers(arguments):
        training = content.get("training")
        given = {key for key in keys if isinstance(training, dict) and training.get(key) is not None}
        found[place] = found.get(place, set()) | given
        if found[place] == keys:
            raise UserError(
                f"configuration: {place} gives both training.num_steps and training.num_epochs; remove one of them"
            )
        last = next(iter(given), last)
    return last == "num_epochs"


def pairs(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(Key, value) of each argument `key=value`, `--key=value` or `--key value`."""
    words = iter(arguments)
    for word in words:
        key, equals, value = word.partition("=")
        if equals or key.startswith("--"):
            yield key.removeprefix("--"), value if equals else next(words, "")


def layers(arguments: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(Name of the file, or `COMMAND_LINE`, and what it sets) of each argument, nested as in YAML."""
    for key, value in pairs(arguments):
        try:
            content = yaml.safe_load(Path(value).read_text() if key == "config" else value)
        except (OSError, ValueError, yaml.YAMLError):
            if key == "config":
                continue
            content = value
        if key != "config":
            for name in reversed(key.split(".")):
                content = {name: content}
        if isinstance(content, dict):
            yield value if key == "config" else COMMAND_LINE, content


def refuse_unsettled(arguments: Sequence[str]) -> None:
    """Refuse `init_from` in commands that do not fill in the settings of the snapshot.

    Raises:
        UserError: `init_from` is given without a codec.
    """
    given = given_values(arguments)
    if given.get("init_from") is not None and "codecs" not in given:
        raise UserError(
            f"configuration: init_from={given['init_from']} works with train.py only; give this command the "
            "config.yaml of the run, or, instead of init_from, the settings of the snapshot: "
            "codecs.image.path=FOLDER/vae, tokenizer.path=FOLDER/tokenizer, data.image_size and the sizes of the model"
        )


def merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Merge two nested sections; values of `above` win."""
    both = {
        key: merged(below[key], value) if isinstance(value, dict) and isinstance(below.get(key), dict) else value
        for key, value in above.items()
    }
    return below | both
