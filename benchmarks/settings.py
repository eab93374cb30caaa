"""Train the settings of the Mixture-of-Transformers paper, dense and with a tower for each modality, and compare them.

    python -m benchmarks.settings --output runs/settings --seeds 0 1 --jobs 6
    python -m benchmarks.settings --output runs/settings --arms chameleon_speech chameleon_speech_dense --steps 1000

An arm is a setting of configs/experiments/settings, with `_wide` for the wider size, and `_dense` if all modalities
share all weights; or a setting in which two modalities share a tower, such as chameleon_speech_text_image. --jobs arms
are trained at a time, distributed over the visible GPUs. Finished runs are skipped, and interrupted ones continue. The
output folder has a run folder for each arm and seed, results.md with all held-out losses, results.png with their
curves, and a folder of evaluate/steps_to_match.py for each arm that has a dense version. Other arguments are keys of
train.py.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.arms import arms_parser
from transfusion_mot.errors import UserError, exit_on_user_error
from transfusion_mot.outputs import check_writable_folder

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs" / "experiments" / "settings"
_WIDE, _DENSE = "_wide", "_dense"
SETTINGS = ("chameleon", "chameleon_speech", "transfusion_speech")


def arm_names() -> list[str]:
    """All arms: each setting in two sizes, MoT and dense, and the arms with a tower that two modalities share."""
    names = [f"{setting}{size}{kind}" for setting in SETTINGS for size in ("", _WIDE) for kind in ("", _DENSE)]
    files = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
    return names + [name for name in files if name not in names and name != _DENSE.removeprefix("_")]


def config_files(arm: str) -> list[Path]:
    """The configurations of an arm, in their order."""
    own = arm.removesuffix(_DENSE)
    setting = max((name for name in SETTINGS if own.startswith(name)), key=len)
    names = [*dict.fromkeys((setting, own)), *["dense"] * (own != arm)]
    return [CONFIGS / f"{name}.yaml" for name in names]


def twin_of(arm: str) -> str | None:
    """The dense arm of equal FLOPs; None for a dense arm."""
    if arm.endswith(_DENSE):
        return None
    if f"{arm}{_DENSE}" in arm_names():
        return f"{arm}{_DENSE}"
    return f"{max((name for name in SETTINGS if arm.startswith(name)), key=len)}{_DENSE}"


def parse_arguments(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options of the command line."""
    parser = arms_parser("benchmarks.settings", __doc__, arm_names())
    # After --arms a key without dashes would be read as an arm.
    words = [f"--{word}" if "=" in word and not word.startswith("-") else word for word in arguments]
    given, keys = parser.parse_known_args(words)
    check_writable_folder(given.output, "--output")
    return given, keys


if __name__ == "__main__":
    # Before PyTorch loads, which takes seconds: --help, and mistakes in the options.
    with exit_on_user_error():
        parse_arguments(sys.argv[1:])

from matplotlib.figure import Figure

from benchmarks.experiments import Experiments
from transfusion_mot.training.metrics import METRICS_FILE, VALIDATION, Lines, loss_units, read_metrics


class Runs:
    """Trains arms.

    Args:
        output: Folder of the run folders.
        keys: Additional arguments of train.py.
        jobs: Runs at a time.
    """

    def __init__(self, output: Path, keys: list[str], jobs: int) -> None:
        self.output = output
        self.keys = keys
        self.python = Experiments.here(output, keys, [], jobs)
        self.devices = self.python.devices

    def folder(self, arm: str, seed: int) -> Path:
        """The run folder of an arm."""
        return self.output / f"{arm}-seed-{seed}"

    def arguments(self, arm: str, seed: int) -> list[str]:
        """The command line of train.py."""
        files = [word for file in config_files(arm) for word in ("--config", str(file))]
        return [*files, f"--output_dir={self.folder(arm, seed)}", f"--training.seed={seed}", *self.keys]

    def encode(self, arms: Sequence[str]) -> None:
        """Encode the media of each setting, so that runs do not do it at the same time.

        Raises:
            UserError: It failed.
        """
        device = self.devices.get()
        for file in dict.fromkeys(config_files(arm)[0] for arm in arms):
            words = ["-m", "transfusion_mot.data.cache", *self.arguments(file.stem, 0)]
            self.python.call(words, self.output / f"encode-{file.stem}.log", device)
        self.devices.put(device)

    def train(self, arm: str, seed: int) -> str | None:
        """Train an arm, or continue it => error message, if it failed."""
        device = self.devices.get()
        folder = self.folder(arm, seed)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self.python.call([str(ROOT / "train.py"), *self.arguments(arm, seed)], folder / "train.log", device)
        except UserError as error:
            return str(error)
        finally:
            self.devices.put(device)
        return None

    def log(self, arm: str, seed: int) -> Lines:
        """The log of a run."""
        return read_metrics(self.folder(arm, seed) / METRICS_FILE)

    def compare(self, arm: str, seeds: Sequence[int]) -> None:
        """Write when an arm reaches the final losses of its dense counterpart, over all seeds.

        Raises:
            UserError: It failed.
        """
        twin = twin_of(arm)
        assert twin is not None
        pairs = [[str(self.folder(name, seed)) for name in (twin, arm)] for seed in seeds]
        further = [word for pair in pairs[1:] for word in ("--seed", *pair)]
        words = [str(ROOT / "evaluate" / "steps_to_match.py"), *pairs[0], *further]
        folder = self.output / "steps_to_match" / arm
        folder.parent.mkdir(exist_ok=True)
        self.python.call([*words, "--output", str(folder)], folder.with_suffix(".log"), "")


def table(runs: Runs, arms: Sequence[str], seeds: Sequence[int]) -> str:
    """A row for each arm: FLOPs of a run and held-out losses of each modality, over seeds."""
    logs = {arm: [runs.log(arm, seed) for seed in seeds] for arm in arms}
    losses = list(dict.fromkeys(name for found in logs.values() for log in found for name in loss_units(log)))
    lines = [f"| arm | TFLOPs | {' | '.join(name.replace('_', ' ') for name in losses)} |"]
    lines.append(f"| --- |{' ---: |' * (1 + len(losses))}")
    for arm, found in logs.items():
        cells = [_mean_and_deviation(found, "flops", 1e12, 0)]
        cells += [_mean_and_deviation(found, f"{VALIDATION}{name}", 1, 3) for name in losses]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(runs: Runs, arms: Sequence[str], seeds: Sequence[int], path: Path) -> None:
    """Held-out losses over the steps: a row for each dense arm and its counterparts, a column for each modality.

    Nothing is written if no run has held-out losses.
    """
    groups: dict[str, list[str]] = {}
    for arm in arms:
        groups.setdefault(twin_of(arm) or arm, []).append(arm)
    logs = {arm: [runs.log(arm, seed) for seed in seeds] for arm in arms}
    # Only held-out losses; with training.validate_every=0 there are none.
    losses = {
        twin: [
            name
            for name in dict.fromkeys(name for arm in group for log in logs[arm] for name in loss_units(log))
            if all(any(f"{VALIDATION}{name}" in line for line in log) for arm in group for log in logs[arm])
        ]
        for twin, group in groups.items()
    }
    groups = {twin: group for twin, group in groups.items() if losses[twin]}
    if not groups:
        return
    columns = max(len(losses[twin]) for twin in groups)
    figure = Figure(figsize=(4 * columns, 3 * len(groups)), layout="constrained")
    panels = figure.subplots(len(groups), columns, squeeze=False)
    for row, (twin, group) in zip(panels, groups.items(), strict=True):
        for axes in row[len(losses[twin]) :]:
            axes.set_axis_off()
        for axes, name in zip(row, losses[twin], strict=False):
            seen: list[float] = []
            for number, arm in enumerate(sorted(group, key=lambda arm: arm != twin)):
                for place, log in enumerate(logs[arm]):
                    points = [(line["step"], line[key]) for line in log if (key := f"{VALIDATION}{name}") in line]
                    label = None if place else arm
                    axes.plot(*zip(*points, strict=True), color=f"C{number}", label=label, linewidth=1)
                    # With the first steps the differences would not be visible.
                    seen += [loss for step, loss in points if 5 * step >= points[-1][0]]
            axes.set_ylim(min(seen) - 0.02, max(seen))
            axes.set_title(f"{name.replace('_', ' ')}, held out", fontsize="medium")
            axes.set_xlabel("step")
            axes.grid(color="#e3e6ea")
        row[0].legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=110)


def _mean_and_deviation(logs: Sequence[Lines], key: str, unit: float, digits: int) -> str:
    last = [[line[key] for line in log if key in line][-1:] for log in logs]
    values = [value / unit for (value,) in filter(None, last)]
    if not values:
        return "-"
    shown = f"{statistics.fmean(values):,.{digits}f}"
    return shown if len(values) == 1 else f"{shown} ± {statistics.stdev(values):.{digits}f}"


def main(arguments: Sequence[str]) -> None:
    """Run the command line."""
    given, keys = parse_arguments(arguments)
    if given.steps is not None:
        keys.append(f"--training.num_steps={given.steps}")
    output = Path(given.output)
    output.mkdir(parents=True, exist_ok=True)
    runs = Runs(output, keys, given.jobs)
    runs.encode(given.arms)
    wanted = [(arm, seed) for seed in given.seeds for arm in given.arms]
    failed: dict[str, str] = {}
    with ThreadPoolExecutor(given.jobs) as pool:
        for (arm, seed), problem in zip(wanted, pool.map(lambda run: runs.train(*run), wanted), strict=True):
            print(f"{arm}, seed {seed}: {problem or 'trained'}", flush=True)
            if problem is not None:
                failed[arm] = problem
    trained = [arm for arm in given.arms if arm not in failed]
    (output / "results.md").write_text(table(runs, trained, given.seeds) + "\n")
    if trained:
        plot(runs, trained, given.seeds, output / "results.png")
    for arm in trained:
        if twin_of(arm) in trained:
            runs.compare(arm, given.seeds)
            print(f"\n{arm}\n\n{(output / 'steps_to_match' / arm / 'steps_to_match.md').read_text()}")
    print(f"\n{(output / 'results.md').read_text()}\nresults.md, results.png and steps_to_match are in {output}")
    if failed:
        arm = next(iter(failed))
        raise UserError(f"{len(failed)} of {len(given.arms)} arms failed, first {arm}: {failed[arm]}")


if __name__ == "__main__":
    with exit_on_user_error():
        main(sys.argv[1:])
