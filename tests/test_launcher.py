"""Settings of the launcher and the shell besides the configuration: they are used, or refused with a message."""

import os
from importlib.util import find_spec
from pathlib import Path

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env
from process_group import FSDP2, run_processes

from transfusion_mot.config import TrainingConfig
from transfusion_mot.errors import UserError
from transfusion_mot.training.launcher import check_launcher
from transfusion_mot.training.parallel import make_accelerator

pytestmark = pytest.mark.slow


def launch(monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    """Have in the environment what the launcher hands to its processes."""
    monkeypatch.setattr("accelerate.utils.launch.is_port_in_use", lambda port: False)
    arguments = _validate_launch_command(launch_command_parser().parse_args([*options, "train.py"]))[0]
    is_simple = not arguments.multi_gpu and not arguments.use_fsdp
    environment = prepare_simple_launcher_cmd_env(arguments)[1] if is_simple else prepare_multi_gpu_env(arguments)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in os.environ:
        if key.startswith(("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_")):
            monkeypatch.delenv(key)


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--num_processes=1", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"],  # make quickstart
        ["--mixed_precision=bf16"],
        ["--cpu", "--gradient_accumulation_steps=1"],
        ["--multi_gpu", "--num_processes=2"],
        ["--use_fsdp", "--fsdp_version=2", "--num_processes=2"],
        ["--use_fsdp", "--fsdp_version=2", "--num_processes=2", "--fsdp_reshard_after_forward=false"],
        [
            *("--use_fsdp", "--fsdp_version=2", "--num_processes=4", "--use_parallelism_config"),
            *("--parallelism_config_dp_replicate_size=2", "--parallelism_config_dp_shard_size=2"),
        ],
    ],
    ids=str,
)
def test_what_the_launcher_sets_by_itself_passes(monkeypatch: pytest.MonkeyPatch, options: list[str]) -> None:
    launch(monkeypatch, *options)
    check_launcher(TrainingConfig())
    if "--mixed_precision=bf16" not in options:
        check_launcher(TrainingConfig(mixed_precision="no"))


FSDP_OPTIONS = ["--use_fsdp", "--fsdp_version=2", "--num_processes=2"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--mixed_precision=bf16"], ["ACCELERATE_MIXED_PRECISION is bf16", "training.mixed_precision", "is no"]),
        (["--mixed_precision=fp16"], ["ACCELERATE_MIXED_PRECISION is fp16", "training.mixed_precision"]),
        (["--dynamo_backend=inductor"], ["ACCELERATE_DYNAMO_BACKEND is INDUCTOR", "training.compile"]),
        (["--use_fsdp", "--fsdp_version=1"], ["FSDP_VERSION is 1", "fsdp_version 2"]),
        ([*FSDP_OPTIONS, "--fsdp_offload_params=true"], ["FSDP_OFFLOAD_PARAMS"]),
        (
            [*FSDP_OPTIONS, "--fsdp_activation_checkpointing=true"],
            ["FSDP_ACTIVATION_CHECKPOINTING", "training.activation_checkpointing"],
        ),
        ([*FSDP_OPTIONS, "--fsdp_auto_wrap_policy=SIZE_BASED_WRAP"], ["FSDP_AUTO_WRAP_POLICY is SIZE_BASED_WRAP"]),
        ([*FSDP_OPTIONS, "--fsdp_transformer_layer_cls_to_wrap=RMSNorm"], ["FSDP_TRANSFORMER_CLS_TO_WRAP is RMSNorm"]),
        (
            [*FSDP_OPTIONS, "--fsdp_sharding_strategy=SHARD_GRAD_OP"],
            ["FSDP_SHARDING_STRATEGY is SHARD_GRAD_OP", "fsdp_reshard_after_forward"],
        ),
    ],
)
def test_options_of_the_launcher_that_are_not_offered_are_refused(
    monkeypatch: pytest.MonkeyPatch, options: list[str], words: list[str]
) -> None:
    launch(monkeypatch, *options)
    with pytest.raises(UserError) as error:
        make_accelerator(TrainingConfig(mixed_precision="no"), Path())
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, ["is 4", "training.microbatch_rows"]),
        ({"ACCELERATE_FP8_BACKEND": "TE"}, ["is TE", "training.float8"]),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, ["fsdp2.yaml"]),
        ({"ACCELERATE_USE_MEGATRON_LM": "1"}, ["fsdp2.yaml"]),
        ({"ACCELERATE_USE_SAGEMAKER": "true"}, ["ACCELERATE_USE_SAGEMAKER"]),
        ({"ACCELERATE_TORCH_DEVICE": "cuda:1"}, ["CUDA_VISIBLE_DEVICES"]),
        ({"ACCELERATE_USE_FSDP": "1"}, ["FSDP_VERSION is 1"]),
        (FSDP2 | {"FSDP_IGNORED_MODULES": "blocks.*"}, ["FSDP_IGNORED_MODULES"]),
        (FSDP2 | {"FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": "true"}, ["training.activation_checkpointing"]),
        (FSDP2 | {"FSDP_RESHARD_AFTER_FORWARD": "perhaps"}, ["launcher's settings", "perhaps"]),
        ({"ACCELERATE_USE_CPU": "perhaps"}, ["launcher's settings", "perhaps"]),
        ({"PARALLELISM_CONFIG_DP_SHARD_SIZE": "2"}, ["PARALLELISM_CONFIG_DP_SHARD_SIZE is 2", "fsdp2.yaml"]),
    ],
)
def test_variables_that_are_not_offered_are_refused(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], words: list[str]
) -> None:
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(UserError) as error:
        make_accelerator(TrainingConfig(mixed_precision="no"), Path())
    assert all(word in str(error.value) for word in words), error.value


def refused(training: TrainingConfig) -> str:
    with pytest.raises(UserError) as error:
        make_accelerator(training, Path())
    return str(error.value)


def test_sizes_of_a_mesh_that_the_processes_do_not_fill_are_refused(tmp_path: Path) -> None:
    environment = FSDP2 | {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_DP_SHARD_SIZE": "3"}
    training = TrainingConfig(mixed_precision="no", num_rows=8, tracker=None)
    for sentence in run_processes(refused, 2, environment, tmp_path, training):
        assert "launcher's settings" in sentence
        assert "3" in sentence.split("launcher's settings")[1], "what torch says of it, in its words"


def test_rows_that_the_processes_cannot_share_evenly_are_refused(tmp_path: Path) -> None:
    training = TrainingConfig(mixed_precision="no", num_rows=3, tracker=None)
    for sentence in run_processes(refused, 2, {}, tmp_path, training):
        assert "training.num_rows is 3 and cannot be split evenly over 2 processes" in sentence


@pytest.mark.skipif(find_spec("aim") is not None, reason="the tracker aim is installed")
def test_a_tracker_that_is_not_installed_is_refused(tmp_path: Path) -> None:
    """accelerate only warns, and the run would be tracked nowhere."""
    with pytest.raises(UserError, match=r"training\.tracker is aim, which is not installed"):
        make_accelerator(TrainingConfig(mixed_precision="no", tracker="aim"), tmp_path)


def joined(training: TrainingConfig) -> int | str:
    try:
        return make_accelerator(training, Path()).num_processes
    except UserError as error:
        return str(error)


def test_processes_do_not_each_train_alone(tmp_path: Path) -> None:
    """As started by a launcher on a machine whose GPUs are not there: accelerate 1.10 joins them, 1.15 does not."""
    environment = {"ACCELERATE_USE_CPU": "false", "CUDA_VISIBLE_DEVICES": ""}
    training = TrainingConfig(mixed_precision="no", num_rows=8, tracker=None)
    for found in run_processes(joined, 2, environment, tmp_path, training):
        assert found == 2 or ("WORLD_SIZE is 2" in found and "ACCELERATE_USE_CPU=true" in found)
