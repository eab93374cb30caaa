"""Snapshots in half precision: files, sizes, and that they paint the same as the full snapshot."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_pipeline import seeds, tiny_pipeline

from transfusion_mot.config import RunConfig, parse_config, save_config
from transfusion_mot.errors import UserError
from transfusion_mot.models.transfusion import TransfusionMoT
from transfusion_mot.pipeline import TransfusionPipeline
from transfusion_mot.sampling.export import export, main, with_section
from transfusion_mot.training.checkpoint import read_run_config

ROOT = Path(__file__).parents[1]
CARD = """---
tags: [a]
---

# emoji

## Data

Emoji.

## Licence

Not stated yet.

## Configuration

seed: 0
"""


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pipeline = tiny_pipeline()
    pipeline.model_card = CARD
    folder = tmp_path_factory.mktemp("run") / "snapshots" / "step-0000003"
    pipeline.save_pretrained(folder)
    return folder


def test_an_exported_snapshot_is_half_as_large_and_paints_the_same(
    snapshot: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "emoji"
    main(["--checkpoint", str(snapshot.parents[1]), "--output", str(out)])
    whole, half = (
        {path.parent.name: load_file(path) for path in sorted(folder.rglob("*.safetensors"))}
        for folder in (snapshot, out)
    )
    assert {weight.dtype for weight in half["transformer"].values()} == {torch.bfloat16}
    assert {weight.dtype for weight in half["vae"].values()} == {torch.float16}
    for name, weight in whole["transformer"].items():
        assert torch.equal(half["transformer"][name], weight.bfloat16())

    loaded = TransfusionPipeline.from_pretrained(out)
    assert loaded.transformer.dtype == loaded.vae.dtype == torch.float32
    images = [
        pipeline("sun", generator=seeds(1), output_type="latent").images
        for pipeline in (loaded, TransfusionPipeline.from_pretrained(snapshot))
    ]
    torch.testing.assert_close(*images, rtol=0.05, atol=0.05)
    assert not torch.equal(*images)

    counted = sum(path.stat().st_size for path in out.rglob("*.safetensors"))
    assert f"{counted / 1e6:.1f} MB  in {out}" in capsys.readouterr().out
    assert not list(out.parent.glob(".*"))


def test_an_exported_snapshot_brings_the_configuration_of_its_run(snapshot: Path, tmp_path: Path) -> None:
    """So that an evaluation finds its data; also where it is exported again."""
    run = tmp_path / "run"
    shutil.copytree(snapshot, run / "snapshots" / snapshot.name)
    config = parse_config(RunConfig, ["output_dir=runs/of_another_name"], "")
    save_config(config, run / "config.yaml")
    for checkpoint, out in ((run, tmp_path / "out"), (tmp_path / "out", tmp_path / "again")):
        main(["--checkpoint", str(checkpoint), "--output", str(out)])
        assert read_run_config(out, None, "--config") == config


def test_the_card_says_licences_and_measurements(snapshot: Path, tmp_path: Path) -> None:
    licences = tmp_path / "LICENSES"
    licences.write_text("twemoji/: CC BY 4.0, \\1\n")
    report = tmp_path / "evaluation"
    report.mkdir()
    metric = {"name": "CIDEr", "value": 2.5, "protocol": {}, "interval": None, "scores": None}
    fields = {"title": "Held-out", "command": "evaluate/benchmark.py", "date": "", "settings": {}, "versions": {}}
    fields |= {"score_name": "", "lower_is_better": False, "notes": []}
    empty = {key: [] for key in ("sweep", "pictures", "captions", "neighbours")}
    (report / "report.json").write_text(json.dumps({**fields, **empty, "metrics": [metric]}))
    words = {"checkpoint": snapshot, "output": tmp_path / "out", "licences": licences, "evaluation": report}
    main([f"--{key}={value}" for key, value in words.items()])
    card = (tmp_path / "out" / "README.md").read_text()
    assert re.findall("^## (.*)$", card, flags=re.MULTILINE) == ["Data", "Licence", "Evaluation", "Configuration"]
    assert "twemoji/: CC BY 4.0, \\1" in card
    assert "Not stated yet" not in card
    assert re.search(r"\| CIDEr +\| +2\.5", card)
    assert card.endswith("## Configuration\n\nseed: 0\n")


def test_sections_of_a_card() -> None:
    assert with_section(CARD, "Licence", "MIT") == CARD.replace("Not stated yet.", "MIT")
    assert with_section("# a\n", "Licence", "MIT") == "# a\n## Licence\n\nMIT\n\n"


def test_too_large_a_model_is_refused(snapshot: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the weights take 0\.\d MB, more than the 0\.001 MB allowed"):
        export(str(snapshot), tmp_path / "out", licences=None, evaluation=None, max_megabytes=0.001)
    assert not list(tmp_path.iterdir())


def test_what_is_no_export_is_not_deleted(snapshot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = snapshot.parents[1]
    for output in (run, snapshot, snapshot / ".."):
        with pytest.raises(UserError, match="holds the checkpoint, and what is in it would be deleted"):
            main(["--checkpoint", str(run), "--output", str(output)])
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds files but no model_index\.json, and they would be deleted"):
        main(["--checkpoint", str(run), "--output", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(UserError, match=r"holds files; with --language-model give a folder that is new or empty"):
        main(["--checkpoint", str(run), "--output", str(tmp_path), "--language-model", "float32"])
    # Such as a repository of the hub, which an export is put into.
    shutil.copytree(snapshot, tmp_path / "hub")
    (tmp_path / "hub" / ".git").mkdir()
    with pytest.raises(UserError, match=r"hub holds \.git beside a snapshot, which would be deleted"):
        main(["--checkpoint", str(run), "--output", str(tmp_path / "hub")])
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(UserError, match=r"contains the working directory"):
        main(["--checkpoint", str(run), "--output", "."])
    for _ in range(2):
        main(["--checkpoint", str(run), "--output", str(tmp_path / "again")])


def test_the_shipped_model_is_that_of_its_configuration_and_fits_its_limit() -> None:
    """64 MB with the autoencoder, as they are stored."""
    config = parse_config(RunConfig, ["--config", str(ROOT / "configs" / "emoji_128.yaml")], "")
    shipped = ROOT / "checkpoints" / "emoji"
    transformer = json.loads((shipped / "transformer" / "config.json").read_text())
    with torch.device("meta"):
        # Keys of later versions have their defaults.
        assert TransfusionMoT.from_config(transformer).architecture == config.model
    assert transformer["sizes"] == {"text": config.tokenizer.vocab_size, "image": 4}
    assert json.loads((shipped / "model_index.json").read_text())["image_size"] == config.data.image_size
    with torch.device("meta"):
        model = TransfusionMoT.from_sections(transformer["sizes"], config.model, config.diffusion)
    assert read_run_config(shipped, None, "--config").data == config.data
    assert sum(parameter.numel() for parameter in model.parameters()) < 28e6
    assert sum(path.stat().st_size for path in shipped.rglob("*.safetensors")) < 63.5e6


@pytest.mark.parametrize("name", ["emoji", "emoji_large", "emoji_128"])
def test_rows_of_the_emoji_corpus_are_whole_blocks_of_attention(name: str) -> None:
    config = parse_config(RunConfig, ["--config", str(ROOT / "configs" / f"{name}.yaml")], "")
    # An autoencoder of 4 x 4 pixels and patches of 2 x 2 latents.
    slots = config.data.slots["text"] + config.data.slots["image"] * (config.data.image_size // 8) ** 2
    assert slots % 128 == 0
