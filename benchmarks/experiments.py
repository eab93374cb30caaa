"""Train and measure the arms of configs/experiments, and compare their results.

    python -m benchmarks.experiments --output runs/experiments
    python -m benchmarks.experiments --output runs/experiments --arms base dense --seeds 0 1 2 --steps 1000 --jobs 6

For every arm it calls train.py, and evaluate/benchmark.py on the last snapshot. --jobs arms run at a time, distributed
over the visible GPUs, each on one GPU. Models of this size leave most of a GPU idle, so several runs at once take
little longer than one; but only compare the times of runs that ran alone. Finished runs are skipped, and interrupted
ones continue. The output folder has a run folder for each arm and seed, results.json, results.md and results.png. Other
arguments are keys of train.py: --training.num_rows=16.
"""

import argparse
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import cycle, pairwise
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Self

from benchmarks.arms import arms_parser
from transfusion_mot.config import RunConfig, parse_config
from transfusion_mot.cores import usable_cores
from transfusion_mot.errors import UserError, exit_on_user_error
from transfusion_mot.evaluation.report.content import read_report
from transfusion_mot.outputs import check_writable_folder
from transfusion_mot.training.metrics import METRICS_FILE, loss_units, read_metrics

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs" / "experiments"
BASE = "base"


def arm_names() -> list[str]:
    """All arms, the base first."""
    return [BASE, *sorted(path.stem for path in CONFIGS.glob("*.yaml") if path.stem != BASE)]


def parse_arguments(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options of the command line."""
    parser = arms_parser("benchmarks.experiments", __doc__, arm_names())
    parser.add_argument(
        "--protocol",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a key of evaluate/benchmark.py, any number",
    )
    # After --arms a key without dashes would be read as an arm.
    words = [
        f"--{word}" if "=" in word and not word.startswith("-") and before != "--protocol" else word
        for before, word in pairwise(["", *arguments])
    ]
    given, keys = parser.parse_known_args(words)
    check_writable_folder(given.output, "--output")
    return given, keys


if __name__ == "__main__":
    # Before PyTorch loads, which takes seconds: --help, and mistakes in the options.
    with exit_on_user_error():
        parse_arguments(sys.argv[1:])

import torch
from matplotlib.figure import Figure

from benchmarks.train_step import without_output

PROTOCOL = ROOT / "configs" / "eval" / "experiments.yaml"
# Share of a run whose training losses are averaged.
_LAST_PART = 0.05
# Columns: name of a result, its place (report or log), and its name there.
_COLUMNS = {
    "text loss": "validation/text_loss",
    "caption loss": "validation/caption_loss",
    "image loss": "validation/image_loss",
    "FD": "FD-EfficientNet (generated)",
    "CIDEr": "CIDEr",
}


@dataclass
class Result:
    """Results of one run.

    Attributes:
        arm: Name of its configuration.
        seed: Seed of the run.
        values: Numbers by name: held-out losses of the last validation, means of training losses over the last
            twentieth of the run, metrics of the report, seconds and FLOPs.
        error: Why there are no values.
    """

    arm: str
    seed: int
    values: dict[str, float] = field(default_factory=dict)
    error: str | None = None


def config_arguments(arm: str) -> list[str]:
    """The command line of train.py that makes an arm."""
    files = [CONFIGS / f"{name}.yaml" for name in dict.fromkeys((BASE, arm))]
    return [word for file in files for word in ("--config", str(file))]


@dataclass(frozen=True)
class Experiments:
    """Trains arms with common settings.

    Several runs are started from threads. Reading a configuration temporarily changes the working directory of all
    threads, so threads read no configuration and use no relative paths.

    Attributes:
        directory: Working directory of commands, to which paths are relative.
        output: Folder of the run folders, as given by the user, because reports show it.
        keys: Additional arguments of train.py.
        protocol: Additional arguments of evaluate/benchmark.py.
        threads: CPU threads of a process.
        devices: Values of CUDA_VISIBLE_DEVICES, one for each run at a time.
    """

    directory: Path
    output: Path
    keys: list[str]
    protocol: list[str]
    threads: int
    devices: SimpleQueue[str]

    @classmethod
    def here(cls, output: Path, keys: list[str], protocol: list[str], jobs: int) -> Self:
        """Arms that are trained from the working directory, `jobs` at a time."""
        devices: SimpleQueue[str] = SimpleQueue()
        for _, device in zip(range(jobs), cycle(visible_devices()), strict=False):
            devices.put(device)
        return cls(Path.cwd(), output, keys, protocol, max(1, usable_cores() // jobs), devices)

    def folder(self, arm: str, seed: int) -> Path:
        """The run folder of an arm."""
        return self.output / f"{arm}-seed-{seed}"

    def arguments(self, arm: str, seed: int) -> list[str]:
        """The command line of train.py."""
        return [
            *config_arguments(arm),
            f"--output_dir={self.folder(arm, seed)}",
            f"--training.seed={seed}",
            *self.keys,
        ]

    def snapshot(self, arm: str, seed: int) -> Path:
        """The last snapshot of a finished run; reads its configuration."""
        config = parse_config(RunConfig, self.arguments(arm, seed), "")
        return self.directory / self.folder(arm, seed) / "snapshots" / f"step-{config.training.num_steps:07d}"

    def cache(self) -> None:
        """Encode the images that all arms share, so that runs do not do it at the same time.

        Raises:
            UserError: It failed.
        """
        device = self.devices.get()
        words = ["-m", "transfusion_mot.data.cache", *self.arguments(BASE, 0)]
        self.call(words, self.output / "cache.log", device)
        self.devices.put(device)

    def run(self, arm: str, seed: int, snapshot: Path) -> Result:
        """Train an arm to its last snapshot and measure it, if that is not done yet."""
        device = self.devices.get()
        try:
            return self._run(arm, seed, snapshot, device)
        finally:
            self.devices.put(device)

    def _run(self, arm: str, seed: int, snapshot: Path, device: str) -> Result:
        folder = self.folder(arm, seed)
        (self.directory / folder).mkdir(parents=True, exist_ok=True)
        report = folder / "evaluation" / snapshot.name
        try:
            if not snapshot.exists():
                self.call([str(ROOT / "train.py"), *self.arguments(arm, seed)], folder / "train.log", device)
            if not (self.directory / report / "report.json").exists():
                command = [str(ROOT / "evaluate" / "benchmark.py"), "--checkpoint", str(folder)]
                command += ["--config", str(PROTOCOL), "--output", str(report), *self.protocol]
                self.call(command, folder / "evaluate.log", device)
        except UserError as error:
            return Result(arm, seed, error=str(error))
        return Result(arm, seed, measured(self.directory / folder, self.directory / report))

    def call(self, words: list[str], log: Path, device: str) -> None:
        """Run Python with these arguments on a device; its output goes to a file.

        Raises:
            UserError: It failed; gives the last line of its output.
        """
        environment = os.environ | {"OMP_NUM_THREADS": str(self.threads), "CUDA_VISIBLE_DEVICES": device}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        with (self.directory / log).open("w") as file:
            command = [sys.executable, *words]
            done = subprocess.run(command, cwd=self.directory, env=environment, stdout=file, stderr=subprocess.STDOUT)
        if done.returncode:
            printed = (self.directory / log).read_text(errors="replace")
            lines = [line for line in re.split(r"[\r\n]", printed) if line.strip()]
            raise UserError(f"{Path(words[0]).name} ended with {done.returncode}: {' '.join(lines[-1:])} ({log})")


def visible_devices() -> list[str]:
    """Names of this process's GPUs for CUDA_VISIBLE_DEVICES; one empty name if there is none."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = given.split(",") if given is not None else [str(index) for index in range(torch.cuda.device_count())]
    return names or [""]


def measured(folder: Path, report: Path) -> dict[str, float]:
    """The metrics of a finished run, by name."""
    lines = read_metrics(folder / METRICS_FILE)
    last = max(line["step"] for line in lines)
    values: dict[str, float] = {"steps": last}
    for name in loss_units(lines):
        found = [line[name] for line in lines if name in line and line["step"] > (1 - _LAST_PART) * last]
        values[name] = statistics.fmean(found)
    for line in lines:
        values |= {key: value for key, value in line.items() if key.startswith("validation/")}
        values |= {key: line[key] for key in ("seconds", "flops") if key in line}
    return values | {metric.name: metric.value for metric in read_report(report).metrics}


def table(results: Sequence[Result]) -> str:
    """A row for each arm: means over seeds, with the standard deviation if there are several."""
    lines = [["arm", "seeds", "TFLOPs", *_COLUMNS], ["---", *["---:"] * (2 + len(_COLUMNS))]]
    for arm in dict.fromkeys(result.arm for result in results):
        runs = [result for result in results if result.arm == arm]
        good = [result.values for result in runs if result.error is None]
        cells = [arm, f"{len(good)} of {len(runs)}" if len(good) < len(runs) else f"{len(runs)}"]
        for key, digits in (("flops", 0), *((key, 3) for key in _COLUMNS.values())):
            found = [values[key] / (1e12 if key == "flops" else 1) for values in good if key in values]
            cells.append(_mean_and_deviation(found, digits))
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _mean_and_deviation(values: Sequence[float], digits: int) -> str:
    if not values:
        return "-"
    shown = f"{statistics.fmean(values):,.{digits}f}"
    return shown if len(values) == 1 else f"{shown} ± {statistics.stdev(values):.{digits}f}"


def plot(results: Sequence[Result], path: Path) -> None:
    """A panel for each column, a row for each arm, a dot for each seed; a line marks the base."""
    arms = list(dict.fromkeys(result.arm for result in results))
    figure = Figure(figsize=(3.2 * len(_COLUMNS), 1.2 + 0.3 * len(arms)), layout="constrained")
    panels = figure.subplots(1, len(_COLUMNS), sharey=True, squeeze=False)[0]
    for axes, (name, key) in zip(panels, _COLUMNS.items(), strict=True):
        for result in results:
            if key in result.values:
                colour = "#d55e00" if result.arm == BASE else "#0072b2"
                axes.plot(result.values[key], arms.index(result.arm), "o", color=colour, alpha=0.7)
        of_base = [result.values[key] for result in results if result.arm == BASE and key in result.values]
        if of_base:
            axes.axvline(statistics.fmean(of_base), color="#d55e00", linewidth=1, alpha=0.5)
        axes.set_xlabel(name)
        axes.grid(axis="y", color="#e3e6ea")
        axes.set_axisbelow(True)
    panels[0].set_yticks(range(len(arms)), arms)
    panels[0].invert_yaxis()
    figure.savefig(path, dpi=130)


def save(results: Sequence[Result], output: Path, about: dict[str, Any]) -> None:
    """Write results.json, results.md and results.png."""
    content = {**about, "results": [asdict(result) for result in results]}
    (output / "results.json").write_text(json.dumps(content, indent=1) + "\n")
    (output / "results.md").write_text(table(results) + "\n")
    plot(results, output / "results.png")


def main(arguments: Sequence[str]) -> None:
    """Run the command line."""
    given, keys = parse_arguments(arguments)
    if given.steps is not None:
        keys.append(f"--training.num_steps={given.steps}")
    output = Path(given.output)
    output.mkdir(parents=True, exist_ok=True)
    protocol = [f"--{key.removeprefix('--')}" for key in given.protocol]
    experiments = Experiments.here(output, keys, protocol, given.jobs)
    wanted = [(arm, seed, experiments.snapshot(arm, seed)) for seed in given.seeds for arm in given.arms]
    if not all(snapshot.exists() for _, _, snapshot in wanted):
        experiments.cache()

    results: list[Result] = []
    command = shlex.join(["python", "-m", "benchmarks.experiments", *without_output(arguments)])
    about = {"command": command, "jobs": given.jobs}
    with ThreadPoolExecutor(given.jobs) as pool:
        for result in pool.map(lambda run: experiments.run(*run), wanted):
            results.append(result)
            save(results, output, about)
            shown = result.error or ", ".join(
                f"{name} {result.values[key]:.3f}" for name, key in _COLUMNS.items() if key in result.values
            )
            print(f"{result.arm}, seed {result.seed}: {shown}", flush=True)
    print(f"\n{table(results)}\n\nresults.json, results.md and results.png are in {output}")
    if failed := [result for result in results if result.error is not None]:
        raise UserError(f"{len(failed)} of {len(results)} runs failed, first {failed[0].arm}: {failed[0].error}")


if __name__ == "__main__":
    with exit_on_user_error():
        main(sys.argv[1:])
