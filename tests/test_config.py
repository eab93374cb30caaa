"""Configurations: valid ones, refused ones with their messages, and every file in configs/."""

import dataclasses
import re
from pathlib import Path
from typing import get_args

import pytest
import torch
import yaml
from accelerate.utils import LoggerType

import train
from transfusion_mot.config import (
    AutoencoderTrainingConfig,
    DiffusionConfig,
    ModalityConfig,
    ModelConfig,
    RunConfig,
    TowerConfig,
    Tracker,
    parse_config,
    save_config,
    to_dict,
)
from transfusion_mot.config_checks import given_values
from transfusion_mot.errors import UserError
from transfusion_mot.models.architecture import check_architecture
from transfusion_mot.models.transfusion import TransfusionMoT
from transfusion_mot.run.begin import settled_config
from transfusion_mot.run.early import checked_sections
from transfusion_mot.schedulers import make_scheduler

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(
    path.relative_to(ROOT)
    for path in (ROOT / "configs").rglob("*.yaml")
    # Those of configs/experiments/settings are parts of arms (test_settings.py).
    if path.parent.name not in ("accelerate", "eval") and path.parent.parent.name != "experiments"
)


MODALITIES = "{text: {tower: text}, speech: {tower: text}}"
SLOTS = "{text: 32, speech: 16}"
CODECS = "{speech: {path: units}}"


def parse(*arguments: str) -> RunConfig:
    return parse_config(RunConfig, list(arguments), "")


def refusal(*arguments: str) -> str:
    with pytest.raises(UserError) as error:
        parse(*arguments)
    message = str(error.value)
    assert "\n" not in message, "one sentence"
    return message


def test_defaults() -> None:
    assert parse() == RunConfig()


@pytest.mark.parametrize(
    "arguments", [["training.num_steps=7"], ["--training.num_steps=7"], ["--training.num_steps", "7"]]
)
def test_three_ways_to_set_a_key(arguments: list[str]) -> None:
    config = parse(*arguments)
    assert config.training.num_steps == 7
    assert dataclasses.replace(config.training, num_steps=1000) == RunConfig().training


def test_values_of_every_kind() -> None:
    config = parse(
        "output_dir=a/b=c",
        "data.sources=[{kind: imagefolder, path: some/folder, weight: 2}, {kind: text, path: t.txt}]",
        "model.towers={text: {hidden_size: 8, intermediate_size: 16}, image: {hidden_size: 4, intermediate_size: 8}}",
        "model.untied=[ffn]",
        "optimizer.betas=[0.8, 0.9]",
        "optimizer.lr=1e-3",
        "training.tracker=null",
        "training.compile=false",
        "diffusion.scheduler_args={shift: 3.0}",
        "training.sample_prompts=['a, b', c]",
    )
    assert config.output_dir == "a/b=c"
    assert [(s.kind, s.path, s.weight) for s in config.data.sources] == [
        ("imagefolder", "some/folder", 2.0),
        ("text", "t.txt", 1.0),
    ]
    assert config.model.towers["image"].hidden_size == 4
    assert config.model.untied == ["ffn"]
    assert tuple(config.optimizer.betas) == (0.8, 0.9)
    assert config.optimizer.lr == 1e-3
    assert config.training.tracker is None
    assert config.training.compile is False
    assert config.diffusion.scheduler_args == {"shift": 3.0}
    assert config.training.sample_prompts == ["a, b", "c"]


def test_list_of_sources_replaces_the_one_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("data:\n  sources:\n  - {kind: imagefolder, path: a, weight: 3}\n  - {kind: text, path: b}\n")
    sources = "[{kind: text, path: c}, {kind: imagefolder, path: d}]"
    for given in ([f"data.sources={sources}"], [f"--data.sources={sources}"], ["--data.sources", sources]):
        parsed = parse("--config", str(file), *given).data.sources
        assert [(s.kind, s.path, s.weight) for s in parsed] == [("text", "c", 1.0), ("imagefolder", "d", 1.0)]


def test_command_line_wins_over_file_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("training:\n  num_steps: 5\n  seed: 9\n")
    config = parse("--config", str(file), "training.num_steps=6")
    assert (config.training.num_steps, config.training.seed, config.training.num_rows) == (6, 9, 16)
    assert parse(f"--config={file}").training.num_steps == 5


def test_saved_configuration_comes_back(tmp_path: Path) -> None:
    config = parse(
        "training.num_steps=7",
        "training.tracker=null",
        "optimizer.lr=1e-5",
        "model.towers={shared: {hidden_size: 8, intermediate_size: 16}}",
        "model.modalities={text: {tower: shared}, image: {tower: shared, objective: diffusion}}",
        "data.sources=[{kind: text, path: 'x: y'}]",
    )
    save_config(config, tmp_path / "config.yaml")
    again = parse("--config", str(tmp_path / "config.yaml"))
    assert to_dict(again) == to_dict(config)
    assert list(yaml.safe_load((tmp_path / "config.yaml").read_text())) == [
        entry.name for entry in dataclasses.fields(RunConfig)
    ]


@pytest.mark.parametrize(
    ("argument", "named"),
    [
        ("training.num_step=3", ("training.num_step", "training.num_steps")),
        ("num_steps=3", ("num_steps", "training.num_steps")),
        ("--model.num_layer=3", ("model.num_layer", "model.num_layers")),
        ("model.towers={text: {hidden: 3}}", ("model.towers.text.hidden", "model.towers.text.hidden_size")),
        ("data.sources=[{kind: openmoji, pat: x}]", ("data.sources[0].pat", "data.sources[0].path")),
        ("--data.sources+={kind: openmoji, pat: x}", ("data.sources[0].pat", "data.sources[0].path")),
        (
            "model.modalities.image.patch_sise=1",
            ("model.modalities.image.patch_sise", "model.modalities.image.patch_size"),
        ),
        ("lora={rnk: 3}", ("lora.rnk", "lora.rank")),
    ],
)
def test_unknown_key_is_refused_with_the_nearest(argument: str, named: tuple[str, str]) -> None:
    message = refusal(argument)
    assert f"unknown key '{named[0]}'" in message
    assert named[1] in message.split("nearest valid:")[1]


def test_abbreviations_are_unknown_keys() -> None:
    assert "unknown key" in refusal("--out", "x")


def test_unknown_key_in_a_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("training:\n  num_stepz: 3\n")
    assert "training.num_steps" in refusal("--config", str(file)).split("nearest valid:")[1]


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("training.num_steps=many", "a whole number"),
        ("training.num_steps=3.5", "a whole number"),
        ("optimizer.lr=fast", "a number"),
        ("training.compile=perhaps", "true or false"),
        ("training.num_epochs=few", "a number or null"),
        ("training.frozen_towers=text", "a list"),
        ("data.slots=64", "a mapping of names to values"),
        ("optimizer=5", "a mapping of keys to values"),
        ("model.towers.text=32", "a mapping of keys to values"),
        ("model.towers.text.norm_eps=small", "a number or null"),
        ("model.modalities.image.attention=full", "one of 'causal', 'bidirectional' or null"),
        ("model.rope=4d", "'1d', '3d'"),
        ("model.untied=[fnn]", "'norm', 'qkv', 'output', 'ffn'"),
        ("optimizer.lr_schedule=linear", "'cosine', 'constant', 'wsd'"),
    ],
)
def test_wrong_type_is_refused_with_key_value_and_what_is_expected(argument: str, expected: str) -> None:
    key, value = argument.split("=")
    message = refusal(argument)
    assert f"configuration: {key}" in message
    assert f"is '{value.strip('[]')}'; it must be " in message
    assert expected in message


def test_wrong_values_in_files_are_found_in_them(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("data:\n  sources:\n  - {kind: text, path: a}\n  - {kind: text, weight: heavy}\n")
    second.write_text("training:\n  learning_rate: 3\n")
    assert (
        refusal("training.num_steps=1", "--config", str(first))
        == f"configuration: data.sources[1].weight is 'heavy' (in {first}); it must be a number"
    )
    message = refusal("training.num_steps=1", "--config", str(second))
    assert f"unknown key 'training.learning_rate' (in {second}); training has num_steps, num_epochs, " in message


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("optimizer:\n  lr:\n", "optimizer.lr"),
        ("data:\n  sources: null\n", "data.sources"),
        ("data:\n  sources:\n  - {kind: null}\n", "data.sources[0].kind"),
        ("model:\n  towers:\n    text: {hidden_size: null}\n", "model.towers.text.hidden_size"),
        ("training:\n", "training"),
    ],
)
def test_null_is_refused_where_a_key_needs_a_value(tmp_path: Path, text: str, key: str) -> None:
    # The parser itself accepts it in files, and a run would crash on it later.
    file = tmp_path / "run.yaml"
    file.write_text(text)
    assert f"configuration: {key} is null (in {file}); give " in refusal("--config", str(file))
    file.write_text("training: {tracker: null}\n")
    assert parse("--config", str(file)).training.tracker is None


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["training.num_steps"], "'training.num_steps' is not KEY=VALUE; write training.num_steps=VALUE"),
        (["training.num_steps", "5"], "'training.num_steps' is not KEY=VALUE; write training.num_steps=VALUE"),
        (["training.num_steps = 5"], "write training.num_steps=VALUE, without spaces around ="),
        (["--training.num_steps"], "--training.num_steps has no value"),
        (["--training.num_steps", "--config"], "--training.num_steps has no value"),
        (["configs/emoji.yaml"], "write --config configs/emoji.yaml"),
        (["-v"], "'-v' is not KEY=VALUE; --help says"),
    ],
)
def test_words_that_set_no_key_are_refused_with_the_way_to_write_them(arguments: list[str], told: str) -> None:
    assert told in refusal(*arguments)


@pytest.mark.parametrize(
    ("argument", "needed"),
    [
        ("model.num_kv_heads=0", "at least 1"),
        ("model.num_kv_heads=-2", "at least 1"),
        ("model.rope_theta=0", "above 0"),
        ("model.norm_eps=-1", "above 0"),
        ("optimizer.lr=.nan", "above 0"),
        ("training.max_minutes=.nan", "at least 0"),
        ("data.slots.text=7", "at least 8"),
        ("data.slots.image=0", "at least 1"),
        ("codecs.image.batch_size=0", "at least 1"),
        ("model.modalities.image.loss_weight=-1", "at least 0"),
        ("model.modalities.image.unet_num_layers=0", "at least 1"),
        ("optimizer.lr=.inf", "a finite number"),
        ("optimizer.lr=1e400", "a finite number"),
        ("optimizer.tower_lr_scale.text=.nan", "a finite number"),
        ("model.modalities.image.loss_weight=.inf", "a finite number"),
        ("diffusion.scheduler_args.shift=.inf", "a finite number"),
        ("training.max_minutes=.inf", "a finite number"),
        ("training.seed=4294967296", "at most 4294967295"),
        ("data.image_size=100000", "at most 8192"),
        ("training.num_rows=100000000", "at most 1048576"),
        ("model.towers.text.hidden_size=0", "at least 1"),
        ("model.towers.text.norm_eps=-1", "above 0"),
    ],
)
def test_number_that_no_run_can_have_is_refused(argument: str, needed: str) -> None:
    message = refusal(argument)
    assert f"{argument.split('=')[0]} is " in message
    assert f"must be {needed}" in message


@pytest.mark.parametrize(
    ("argument", "needed"),
    [
        ("block_out_channels=[]", "must have widths, each at least 1"),
        ("block_out_channels=[64, 0]", "must have widths, each at least 1"),
        ("layers_per_block=0", "must be at least 1"),
        ("norm_num_groups=0", "must be at least 1"),
        ("kl_weight=-1", "must be at least 0"),
        ("audio.hop_length=0", "must be at least 1"),
    ],
)
def test_number_that_no_codec_can_have_is_refused(argument: str, needed: str) -> None:
    with pytest.raises(UserError) as error:
        parse_config(AutoencoderTrainingConfig, [argument], "")
    assert f"configuration: {argument.split('=')[0]} is " in str(error.value)
    assert needed in str(error.value)


def test_decay_rates_of_moments_are_below_1() -> None:
    assert "optimizer.betas is (0.9, 1.0); each must be at least 0 and below 1" in refusal("optimizer.betas=[0.9,1]")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"a: [1", "', line 1 is not YAML: "),
        (b"- 1\n- 2\n", "' has no keys; write KEY: VALUE"),
        (b"just a word\n", "' has no keys; write KEY: VALUE"),
        (b"# nothing yet\n", "' has no keys; write KEY: VALUE"),
        (b"b\0ad", "' is not YAML: "),
        (b"data:\n\timage_size: 64\n", "', line 2 is not YAML: .*spaces, not tabs"),
        (b"training:\n  seed: 3\n  # caf\xe9\n", r"' is not UTF-8 text \(line 3\)"),
        (b"training:\n  seed: 3\n  compile: true\n  seed: 4\n", "', line 4: seed is given twice"),
        (b"data:\n  sources:\n  - kind: text\n    kind: coco\n", "', line 4: kind is given twice"),
        (b"training.seed: 3\n", "'training.seed' has a dot"),
    ],
)
def test_file_that_is_no_configuration_is_refused(tmp_path: Path, content: bytes, told: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_bytes(content)
    message = refusal("--config", str(file))
    assert str(file) in message
    assert re.search(told, message)


def test_one_key_of_a_modality_is_changed_with_a_file_and_without(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"model:\n  modalities: {MODALITIES}\ndata:\n  slots: {SLOTS}\ncodecs: {CODECS}\n")
    plain = ModelConfig().modalities
    alone = parse("model.modalities.image.patch_size=1", "data.slots.image=3", "codecs.image.path=x")
    assert alone.model.modalities == {**plain, "image": dataclasses.replace(plain["image"], patch_size=1)}
    assert (alone.data.slots, alone.codecs["image"].path) == ({"text": 64, "image": 3}, "x")
    config = parse("--config", str(file), "model.modalities.speech.loss_weight=2", "data.slots.speech=9")
    assert list(config.model.modalities) == ["text", "speech"], "a mapping of a file takes the place of the default"
    assert config.model.modalities["speech"].loss_weight == 2
    assert config.data.slots == {"text": 32, "speech": 9}
    assert config.codecs["speech"].path == "units"


@pytest.mark.parametrize(
    ("changed", "missing"),
    [
        ({"data.slots": "{text: 32}"}, "data.slots has text, but needs one entry for each of"),
        ({"codecs": "{}"}, "codecs has nothing, but needs one entry for each of"),
        (
            {"codecs": "{speech: {path: x}, image: {path: y}}"},
            "codecs has speech, image, but needs one entry for each of",
        ),
    ],
)
def test_each_modality_has_its_slots_and_its_codec(changed: dict[str, str], missing: str) -> None:
    whole = {"model.modalities": MODALITIES, "data.slots": SLOTS, "codecs": CODECS}
    parse(*(f"{key}={value}" for key, value in whole.items()))
    message = refusal(*(f"{key}={value}" for key, value in (whole | changed).items()))
    assert missing in message
    assert "(from model.modalities)" in message


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("data.text_slots=48", "data.slots.text"),
        ("training.diffusion_loss_weight=5", "model.modalities.image.loss_weight"),
        ("model.image_attention=causal", "model.modalities.image.attention"),
        ("autoencoder.path=x", "codecs.image.path"),
    ],
)
def test_a_key_of_an_earlier_version_is_answered_with_the_new_one(tmp_path: Path, old: str, new: str) -> None:
    key, value = old.split("=")
    section, name = key.split(".")
    file = tmp_path / "run.yaml"
    file.write_text(f"{section}:\n  {name}: {value}\n")
    told = f"a key of an earlier version: {key} (now {new})"
    assert told in refusal(old)
    assert told in refusal("--config", str(file))


def test_all_keys_of_an_earlier_version_are_told_at_once(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "data: {text_slots: 48, images_per_row: 4}\nautoencoder: {path: x}\nmodel: {patch_size: 2, rope: 1d}\n"
    )
    assert refusal("--config", str(file), "training.diffusion_loss_weight=5").endswith(
        "keys of an earlier version: data.text_slots (now data.slots.text), "
        "data.images_per_row (now data.slots.image), autoencoder.path (now codecs.image.path), "
        "model.patch_size (now model.modalities.image.patch_size), "
        "training.diffusion_loss_weight (now model.modalities.image.loss_weight)"
    )


def test_a_key_that_other_sections_have_is_no_key_of_an_earlier_version(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    for section, name in (("training", "batch_size"), ("data", "path")):
        file.write_text(f"{section}:\n  {name}: 3\n")
        assert f"unknown key '{section}.{name}'" in refusal("--config", str(file))


def test_the_tower_of_a_modality_alone_is_answered_with_the_new_form() -> None:
    assert "write NAME: {tower: TOWER" in refusal("model.modalities={text: shared, image: shared}")


@pytest.mark.parametrize(
    ("modalities", "words"),
    [
        ({"text": ModalityConfig("a")}, "has only text; add"),
        ({"text": ModalityConfig("a"), "caption": ModalityConfig("a")}, "has the name 'caption'"),
        ({"text": ModalityConfig("a"), "media": ModalityConfig("a")}, "has the name 'media'"),
    ],
)
def test_modalities_that_no_model_can_have(modalities: dict[str, ModalityConfig], words: str) -> None:
    with pytest.raises(UserError, match=words):
        check_architecture(ModelConfig(towers={"a": TowerConfig(8, 8)}, modalities=modalities))


def test_one_of_several_towers_is_not_named_like_the_weights_that_they_share() -> None:
    modalities = {"text": ModalityConfig("shared"), "image": ModalityConfig("b", "diffusion")}
    with pytest.raises(UserError, match="the name 'shared' beside"):
        check_architecture(
            ModelConfig(towers={"shared": TowerConfig(8, 8), "b": TowerConfig(8, 8)}, modalities=modalities)
        )


def test_missing_file_is_named(tmp_path: Path) -> None:
    assert str(tmp_path / "none.yaml") in refusal("--config", str(tmp_path / "none.yaml"))


@pytest.mark.parametrize("section", ["training", "data", "model"])
def test_section_whose_keys_are_all_commented_out_is_not_a_crash(tmp_path: Path, section: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"{section}:\n  # seed: 3\n")
    assert f"{section} is null (in {file}); give it keys or remove it" in refusal("--config", str(file))


def test_there_are_configs() -> None:
    assert Path("configs/vae/emoji.yaml") in CONFIGS


@pytest.mark.parametrize("path", CONFIGS, ids=str)
def test_config_file_parses_and_its_model_can_be_built(path: Path) -> None:
    arguments = ["--config", str(ROOT / path)]
    assert (ROOT / path).read_text().startswith("#"), "a header with command, hardware, time and expected numbers"
    if path.parent.name in ("vae", "codecs"):
        assert isinstance(parse_config(AutoencoderTrainingConfig, arguments, ""), AutoencoderTrainingConfig)
        return
    # A language model lies on the hub; snapshots that files name are in the repository.
    begins_with_snapshot = given_values(arguments).get("init_from") is not None
    config = settled_config(arguments) if begins_with_snapshot else parse(*arguments)
    with torch.device("meta"):
        sizes = {name: config.tokenizer.vocab_size if name == "text" else 4 for name in config.model.modalities}
        model = TransfusionMoT.from_sections(sizes, config.model, config.diffusion)
    assert sum(parameter.numel() for parameter in model.parameters()) > 0
    make_scheduler(config.diffusion.scheduler, config.diffusion.scheduler_args)


def test_model_section_is_what_a_model_keeps() -> None:
    config = ModelConfig(num_layers=1)
    with torch.device("meta"):
        model = TransfusionMoT.from_sections({"text": 10, "image": 4}, config, DiffusionConfig())
    assert model.architecture == config
    assert to_dict(model.architecture) == to_dict(config)


@pytest.mark.parametrize("config_class", [RunConfig, AutoencoderTrainingConfig])
def test_help_explains_every_key(config_class, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_config(config_class, ["--help"], "What it does.")
    assert stop.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "What it does." in shown

    def leaves(config, prefix: str) -> list[str]:
        names = []
        for entry in dataclasses.fields(config):
            value = getattr(config, entry.name)
            names += (
                leaves(value, f"{prefix}{entry.name}.") if dataclasses.is_dataclass(value) else [prefix + entry.name]
            )
        return names

    for name in leaves(config_class(), ""):
        assert f"--{name}" in shown, name
        assert name.split(".")[-1] in shown


def test_guidance_away_from_what_is_never_trained_is_refused() -> None:
    message = refusal("data.prompt_dropout_prob=0", "diffusion.guidance_scale=2")
    assert "set diffusion.guidance_scale=1, or data.prompt_dropout_prob above 0" in message
    parse("data.prompt_dropout_prob=0", "diffusion.guidance_scale=1")


def test_a_configuration_written_by_hand_is_not_overwritten(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    words = ["--config", str(file), "data.sources=[{kind: openmoji}]", f"output_dir={tmp_path}"]
    codec = f"codecs.image.path={ROOT / 'checkpoints' / 'vae-emoji'}"
    save_config(parse_config(RunConfig, [*words[2:], codec], ""), file)
    checked_sections(words)
    file.write_text(f"# the best one\n{file.read_text()}")
    with pytest.raises(UserError, match=r"config\.yaml was written by hand, and the run would overwrite it"):
        checked_sections(words)
    (tmp_path / "state" / "step-0000001").mkdir(parents=True)
    checked_sections(words)


def test_folders_that_cannot_be_written_and_sources_given_twice_end_a_run_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "images").mkdir()
    given = f"{{kind: imagefolder, path: {tmp_path / 'images'}}}"
    again = f"{{kind: imagefolder, path: {tmp_path / 'images'}/, weight: 2}}"
    other = f"{{kind: imagefolder, path: {tmp_path / 'images'}, text_column: title}}"
    words = [f"output_dir={tmp_path / 'run'}", f"codecs.image.path={ROOT / 'checkpoints' / 'vae-emoji'}"]
    for key in ("output_dir", "data.cache_dir"):
        with pytest.raises(UserError, match=f"{re.escape(key)} '.*file/x' cannot be written"):
            train.main([*words, f"data.sources=[{given}]", f"{key}={tmp_path / 'file' / 'x'}"])
        assert refusal(f"{key}=") == f"configuration: {key} is empty; give a folder"
    with pytest.raises(UserError, match=r"data\.sources\[1\] and data\.sources\[2\] are the same imagefolder source"):
        checked_sections([*words, f"data.sources=[{other}, {given}, {again}]"])
    checked_sections([*words, f"data.sources=[{given}, {other}]"])


def test_trackers_are_those_of_accelerate() -> None:
    assert set(get_args(Tracker)) == {str(tracker) for tracker in LoggerType}
