"""Launcher files, read as accelerate reads them."""

import os
from argparse import Namespace
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env

from transfusion_mot.models.mot import MoTBlock
from transfusion_mot.models.transfusion import TransfusionMoT

FOLDER = Path(__file__).parents[1] / "configs" / "accelerate"
TYPES = {
    "cpu": DistributedType.NO,
    "ddp": DistributedType.MULTI_GPU,
    "fsdp2": DistributedType.FSDP,
    "fsdp2_multinode": DistributedType.FSDP,
}


def launched(name: str, *options: str) -> Namespace:
    """The launcher's arguments, with the values of the file."""
    parser = launch_command_parser()
    arguments = parser.parse_args(["--config_file", str(FOLDER / f"{name}.yaml"), *options, "train.py"])
    return _validate_launch_command(arguments)[0]


def environment(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the launcher hands to the processes."""
    monkeypatch.setattr("accelerate.utils.launch.is_port_in_use", lambda port: False)
    for key, value in prepare_multi_gpu_env(launched(name, "--machine_rank", "0", "--main_process_ip", "::1")).items():
        if key.startswith(("FSDP", "PARALLELISM", "ACCELERATE")):
            monkeypatch.setenv(key, value)


def test_every_file_is_tested() -> None:
    assert sorted(path.stem for path in FOLDER.iterdir()) == sorted(TYPES)


@pytest.mark.parametrize("name", TYPES)
def test_file_loads_and_has_no_key_that_the_launcher_does_not_know(name: str) -> None:
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    assert config.distributed_type == TYPES[name]
    known = vars(launch_command_parser().parse_args(["train.py"]))
    # The loader refuses unknown keys itself, but not those inside of a section.
    assert set(config.fsdp_config) | set(config.parallelism_config) <= set(known)
    arguments = launched(name)
    assert arguments.num_processes == config.num_processes
    assert arguments.use_cpu == (name == "cpu")


@pytest.mark.parametrize("name", ["fsdp2", "fsdp2_multinode"])
def test_blocks_are_wrapped_in_the_second_version(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    environment(name, monkeypatch)
    assert os.environ["ACCELERATE_USE_FSDP"] == "true"
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.transformer_cls_names_to_wrap == [MoTBlock.__name__] == TransfusionMoT._no_split_modules
    assert not plugin.activation_checkpointing


def test_many_machines_shard_inside_and_average_between(monkeypatch: pytest.MonkeyPatch) -> None:
    environment("fsdp2_multinode", monkeypatch)
    parallelism = ParallelismConfig()
    assert (parallelism.dp_replicate_size, parallelism.dp_shard_size) == (4, 8)
    arguments = launched("fsdp2_multinode")
    assert (arguments.num_machines, arguments.num_processes) == (4, 32)
    assert parallelism.total_size == arguments.num_processes


def test_options_win_over_the_file() -> None:
    arguments = launched("fsdp2_multinode", "--num_processes", "16", "--parallelism_config_dp_replicate_size", "2")
    assert arguments.num_processes == 16
    assert arguments.parallelism_config_dp_shard_size == 8
