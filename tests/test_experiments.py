"""The arms of configs/experiments differ only in their named keys; the runner trains, measures and continues."""

import json
import os
import re
import shlex
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace

import pytest
import torch
from process_group import run_script
from training_runs import flat

from benchmarks.experiments import CONFIGS, Experiments, Result, arm_names, config_arguments, main, table
from transfusion_mot.config import RunConfig, parse_config, to_dict
from transfusion_mot.data.row_arrays import RowShape
from transfusion_mot.data.wordnet import Entry, parse_entry
from transfusion_mot.evaluation.protocol.config import read_protocol
from transfusion_mot.models.architecture import check_architecture
from transfusion_mot.models.transfusion import TransfusionMoT
from transfusion_mot.reporting.flops import weight_flops_per_row
from transfusion_mot.schedulers import make_scheduler

pytestmark = pytest.mark.slow

TOWERS = {"model.towers", "model.num_heads"}
UNET = {f"model.modalities.image.{key}" for key in ("adapter", "unet_channels", "unet_num_layers")}
ATTENTION = {"model.modalities.image.attention"}
DISCRETE = {"diffusion.scheduler", "diffusion.scheduler_args", "diffusion.timestep_distribution"}
# What an arm changes: everything else is as in the base.
CHANGES = {
    "base": set(),
    "causal": ATTENTION,
    "caption_any_noise": {"data.image_first_max_timestep"},
    "clean_context": {"data.image_context", "data.slots.image"},
    "dense": {"model.untied"},
    "ema_off": {"training.ema_decay"},
    "ema_short": {"training.ema_decay"},
    "epsilon": DISCRETE | {"diffusion.num_inference_steps"},
    "epsilon_min_snr": DISCRETE | {"diffusion.num_inference_steps", "diffusion.min_snr_gamma"},
    "flow_min_snr": {"diffusion.min_snr_gamma"},
    "flow_shift": {"diffusion.scheduler_args"},
    "flow_uniform": {"diffusion.timestep_distribution"},
    "half": TOWERS,
    "muon": {"optimizer.name"},
    "no_qk_norm": {"model.qk_norm"},
    "patch_1": {"model.modalities.image.patch_size"},
    "patch_4": {"model.modalities.image.patch_size"},
    "rope_1d": {"model.rope"},
    "unet": UNET,
    "unet_causal": UNET | ATTENTION,
    "unet_equal": UNET | {"model.num_layers"},
    "untie_attention": {"model.untied"},
    "untie_ffn": {"model.untied"},
    "untie_norms": {"model.untied"},
    "v": DISCRETE,
    "v_min_snr": DISCRETE | {"diffusion.min_snr_gamma"},
    "wide": TOWERS,
    "wide_dense": TOWERS | {"model.untied"},
}
SAME_FLOPS = [
    ("base", "dense"),
    ("base", "untie_ffn"),
    ("base", "untie_attention"),
    ("base", "untie_norms"),
    ("base", "causal"),
    ("base", "no_qk_norm"),
    ("base", "rope_1d"),
    ("unet", "unet_causal"),
    ("wide", "wide_dense"),
]


def config_of(arm: str) -> RunConfig:
    return parse_config(RunConfig, config_arguments(arm), "")


def model_of(arm: str) -> TransfusionMoT:
    config = config_of(arm)
    with torch.device("meta"):
        sizes = {"text": config.tokenizer.vocab_size, "image": 4}
        return TransfusionMoT.from_sections(sizes, config.model, config.diffusion)


def parameters(arm: str) -> int:
    return sum(parameter.numel() for parameter in model_of(arm).parameters())


def flops(arm: str) -> int:
    config = config_of(arm)
    return config.training.num_rows * weight_flops_per_row(model_of(arm), row_shape(config))


def row_shape(config: RunConfig) -> RowShape:
    """With the repository's autoencoder."""
    side = config.data.image_size // 4
    return RowShape.of(config.model, config.data.slots, {"image": [(4, side, side)]}, 0)


def test_every_arm_is_here() -> None:
    assert arm_names()[0] == "base"
    assert set(arm_names()) == set(CHANGES)


@pytest.mark.parametrize("arm", CHANGES)
def test_an_arm_can_be_built_and_says_what_it_is_for(arm: str) -> None:
    config = config_of(arm)
    check_architecture(config.model)
    assert parameters(arm) > 1e6
    make_scheduler(config.diffusion.scheduler, config.diffusion.scheduler_args)
    assert config.output_dir == f"runs/experiments/{arm}"
    assert row_shape(config).num_slots % 128 == 0
    header = (CONFIGS / f"{arm}.yaml").read_text()
    assert "# question:  " in header
    if arm != "base":
        files = " ".join(f"--config configs/experiments/{name}.yaml" for name in ("base", arm))
        assert f"# command:   python train.py {files}\n" in header
        compared = re.search(r"# compare:   with (.*)\n", header)
        assert compared is not None
        assert set(re.findall(r"\w+", compared[1])) & (set(CHANGES) - {arm})


@pytest.mark.parametrize("arm", CHANGES)
def test_an_arm_changes_what_it_says_and_nothing_else(arm: str) -> None:
    """In particular not its sources, rows, seeds and steps."""
    ours, base = (flat(to_dict(config_of(name))) for name in (arm, "base"))
    differing = {path for path in ours.keys() | base.keys() if ours.get(path) != base.get(path)} - {"/output_dir"}
    keys = {f"{path.removeprefix('/').replace('/', '.')}." for path in differing}
    said = {change: {key for key in keys if key.startswith(f"{change}.")} for change in CHANGES[arm]}
    assert all(said.values()), said
    assert keys == set().union(*said.values())


@pytest.mark.parametrize(("one", "other"), SAME_FLOPS)
def test_what_is_compared_at_equal_flops_has_equal_flops(one: str, other: str) -> None:
    assert flops(one) == pytest.approx(flops(other), rel=0.02)


def test_what_is_compared_at_equal_parameters_or_half_the_size_is_so() -> None:
    assert parameters("unet_equal") == pytest.approx(parameters("base"), rel=0.02)
    # 760M against 1.4B.
    assert flops("half") / flops("wide_dense") == pytest.approx(0.55, abs=0.02)
    blocks = {
        arm: sum(p.numel() for name, p in model_of(arm).named_parameters() if name.startswith("blocks."))
        for arm in ("base", "dense", "wide", "wide_dense")
    }
    assert blocks["base"] == 2 * blocks["dense"]
    assert blocks["wide"] == 2 * blocks["wide_dense"]
    assert parameters("wide") > 3 * parameters("base")


def test_protocols_paint_as_many_as_the_bars_ask_for() -> None:
    for name in ("experiments", "emoji_corpus"):
        protocol = read_protocol(["--config", str(CONFIGS.parent / "eval" / f"{name}.yaml")])
        assert (protocol.num_images, protocol.features, protocol.prompts.kind) == (1024, "efficientnet", "held_out")
        assert protocol.captions.kind == "prompts"


def test_entries_of_wordnet_are_words_and_their_meaning() -> None:
    line = "01558594 05 n 02 robin 0 robin_redbreast 1 002 @ 01557962 n 0000 ~ 1 n 0000 | small Old World songbird  "
    assert parse_entry(line) == Entry(["robin", "robin redbreast"], "small Old World songbird")
    line = '00014358 00 s 01 galore(ip) 0 001 & 00013887 a 0000 | in great numbers; "daffodils galore"  '
    assert parse_entry(line) == Entry(["galore"], 'in great numbers; "daffodils galore"')


def test_table_has_means_and_deviations_over_seeds() -> None:
    values = [{"flops": 2e15, "validation/text_loss": loss, "CIDEr": 1.0} for loss in (1.0, 2.0, 4.0)]
    results = [Result("base", seed, value) for seed, value in enumerate(values)]
    results += [Result("dense", 0, values[0]), Result("dense", 1, error="no memory")]
    lines = table(results).splitlines()
    # The standard deviation of 1, 2, 4 is sqrt(7 / 3).
    assert lines[2] == "| base | 3 | 2,000 ± 0 | 2.333 ± 1.528 | - | - | - | 1.000 ± 0.000 |"
    assert lines[3] == "| dense | 1 of 2 | 2,000 | 1.000 | - | - | - | 1.000 |"


@contextmanager
def configurations_being_read() -> Iterator[None]:
    """Another thread reads one after the other, for which the working directory is changed."""
    over = threading.Event()

    def read() -> None:
        while not over.is_set():
            config_of("dense")

    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read)
        try:
            yield
        finally:
            over.set()
            reading.result()


def test_runs_at_the_same_time_start_where_the_command_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    experiments = Experiments(Path.cwd(), Path(), [], [], 1, SimpleQueue())
    logs = [Path(f"{number}.log") for number in range(20)]
    words = ["-c", "import os; print(os.getcwd())"]
    with configurations_being_read(), ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda log: experiments.call(words, log, ""), logs))
    assert {(tmp_path / log).read_text().strip() for log in logs} == {str(tmp_path.resolve())}


def run_from_server(command: list[str], cwd: Path, env: dict[str, str], stdout: TextIOWrapper, **_: object) -> object:
    """As subprocess.run, without the seconds of imports."""
    return SimpleNamespace(returncode=run_script(command[1:], cwd, env, Path(stdout.name).resolve()))


@pytest.mark.usefixtures("without_java")
def test_an_arm_is_trained_measured_and_not_trained_again(
    picture_folder: Path,
    random_vae: Path,
    emoji_cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in (("ACCELERATE_USE_CPU", "true"), ("HF_HUB_OFFLINE", "1"), ("CUDA_VISIBLE_DEVICES", "")):
        monkeypatch.setenv(name, value)
    tower = "{hidden_size: 16, intermediate_size: 32}"
    words = [
        "--output",
        str(tmp_path / "out"),
        "--arms",
        "dense",
        "training.log_every=1",
        "--steps",
        "3",
        "--jobs",
        "2",
        "--protocol",
        "num_images=6",
        "--protocol=device=cpu",
        f"--data.sources=[{{kind: imagefolder, path: {picture_folder}}}]",
        f"--data.cache_dir={emoji_cache}",
        "--data.image_size=32",
        "--data.held_out_fraction=0.2",
        "--data.slots={text: 48, image: 2}",
        "--data.num_workers=0",
        f"--codecs={{image: {{path: {random_vae}}}}}",
        "--tokenizer.vocab_size=300",
        f"--model.towers={{text: {tower}, image: {tower}}}",
        "--model.num_layers=1",
        "--model.num_heads=2",
        "--model.head_dim=8",
        "--diffusion.num_inference_steps=2",
        "--training.num_rows=2",
        "--training.sample_prompts=[sun]",
        "--training.mixed_precision=no",
        "--training.cuda_graph=false",
    ]
    monkeypatch.setattr("benchmarks.experiments.subprocess.run", run_from_server)
    change, changing = os.chdir, set()

    def chdir(path: str) -> None:
        changing.add(threading.current_thread())
        change(path)

    monkeypatch.setattr(os, "chdir", chdir)
    main(words)
    # To read a configuration; what it changes counts in all threads.
    assert changing == {threading.main_thread()}
    first = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [(result["arm"], result["error"]) for result in first["results"]] == [("dense", None)]
    assert first["command"] == shlex.join(["python", "-m", "benchmarks.experiments", *words[2:]])
    lines = (tmp_path / "out" / "dense-seed-0" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line) for line in lines]
    values = first["results"][0]["values"]
    assert values["validation/image_loss"] == losses[-1]["validation/image_loss"]
    assert values["text_loss"] == next(line["text_loss"] for line in reversed(losses) if "text_loss" in line)
    report = json.loads((tmp_path / "out" / "dense-seed-0/evaluation/step-0000003/report.json").read_text())
    named = {metric["name"]: metric["value"] for metric in report["metrics"]}
    assert values["FD-EfficientNet (generated)"] == named["FD-EfficientNet (generated)"]
    assert (tmp_path / "out" / "results.png").stat().st_size > 5000
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.log")}
    assert len(written) == 3
    main(words)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.log")} == written
    assert json.loads((tmp_path / "out" / "results.json").read_text())["results"] == first["results"]
    assert "| dense | 1 |" in capsys.readouterr().out
