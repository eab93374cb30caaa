"""Snapshots of version 0.1: values that conversion keeps, and messages for other folders."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_pipeline import seeds, tiny_pipeline
from test_sampling import UNET, text_and_image, tiny_model, tiny_tokenizer

from transfusion_mot.errors import UserError
from transfusion_mot.models.transfusion import TransfusionMoT
from transfusion_mot.pipeline import TransfusionPipeline
from transfusion_mot.sampling.convert import main, new_architecture

WEIGHTS = "diffusion_pytorch_model.safetensors"
OLD_NAMES = {
    "modalities.text.embedding.": "token_embedding.",
    "modalities.text.head.": "text_head.",
    "modalities.image.adapter.": "image_adapter.",
}


def old_name(name: str) -> str:
    return next((old + name.removeprefix(new) for new, old in OLD_NAMES.items() if name.startswith(new)), name)


def write_old(folder: Path, attention: str = "causal") -> TransfusionPipeline:
    """A snapshot as version 0.1 wrote it => the pipeline that it is of."""
    fields = {"attention": "causal" if attention == "causal" else None, **UNET}
    model = tiny_model(tiny_tokenizer().vocab_size, **text_and_image("text", "image", **fields)).float()
    pipeline = tiny_pipeline(transformer=model)
    pipeline.model_card = "# A model\n"
    pipeline.save_pretrained(folder)
    (folder / "notes.txt").write_text("mine")
    config_file = folder / "transformer" / "config.json"
    config = json.loads(config_file.read_text())
    sizes, architecture = config.pop("sizes"), config["architecture"]
    image = architecture["modalities"]["image"]
    architecture["modalities"] = {"text": "text", "image": "image"}
    architecture |= {"image_attention": attention, "image_adapter": image["adapter"]}
    architecture |= {key: image[key] for key in ("patch_size", "unet_channels", "unet_num_layers")}
    del config["diffusion"]
    config |= {"vocab_size": sizes["text"], "latent_channels": sizes["image"]}
    config_file.write_text(json.dumps(config))
    weights = folder / "transformer" / WEIGHTS
    save_file({old_name(name): weight for name, weight in load_file(weights).items()}, weights, {"format": "pt"})
    for file in (folder / "tokenizer").glob("*.json"):
        text = file.read_text()
        file.write_text(text.replace("<begin_of_image>", "<boi>").replace("<end_of_image>", "<eoi>"))
    assert "<boi>" in (folder / "tokenizer" / "tokenizer.json").read_text()
    return pipeline


@pytest.fixture
def old(tmp_path: Path) -> Path:
    write_old(tmp_path / "old")
    return tmp_path / "old"


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
@pytest.mark.parametrize("in_place", [False, True])
def test_a_converted_snapshot_paints_and_writes_the_same(tmp_path, in_place, attention) -> None:
    expected = write_old(tmp_path / "old", attention)
    before = files(tmp_path / "old")
    out = tmp_path / ("old" if in_place else "new")
    main([str(tmp_path / "old"), "--in-place" if in_place else str(out)])
    converted = TransfusionPipeline.from_pretrained(out)
    image, other = (
        pipeline(["sun", ""], generator=seeds(1, 2), output_type="latent").images for pipeline in (expected, converted)
    )
    assert torch.equal(image, other)
    assert expected.complete("a red", max_new_tokens=6) == converted.complete("a red", max_new_tokens=6)
    assert converted.transformer.config.architecture == expected.transformer.config.architecture
    assert converted.config.trained_for == expected.config.trained_for
    assert converted.model_card == "# A model\n"
    after = files(out)
    changed = {name for name in before if before[name] != after[name]}
    assert after.keys() == before.keys()
    assert changed == {"transformer/config.json", f"transformer/{WEIGHTS}", "tokenizer/tokenizer.json"}
    if not in_place:
        assert files(tmp_path / "old") == before


def test_weights_in_several_files_are_renamed_with_their_index(old, tmp_path) -> None:
    weights = load_file(old / "transformer" / WEIGHTS)
    (old / "transformer" / WEIGHTS).unlink()
    names = sorted(weights)
    parts = {f"diffusion_pytorch_model-0000{part + 1}-of-00002.safetensors": names[part::2] for part in range(2)}
    for file, own in parts.items():
        save_file({name: weights[name] for name in own}, old / "transformer" / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, own in parts.items() for name in own}}
    (old / "transformer" / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    main([str(old), str(tmp_path / "new")])
    loaded = TransfusionPipeline.from_pretrained(tmp_path / "new").transformer.state_dict()
    assert all(torch.equal(loaded[new], weights[old_name(new)]) for new in loaded)


def test_links_stay_links_in_place(old) -> None:
    shutil.move(old / "vae" / WEIGHTS, old.parent / "shared.safetensors")
    (old / "vae" / WEIGHTS).symlink_to("../../shared.safetensors")
    main([str(old), "--in-place"])
    assert (old / "vae" / WEIGHTS).is_symlink()
    assert TransfusionPipeline.from_pretrained(old).config.image_size == 8


def test_what_a_snapshot_was_trained_for_may_be_known_by_its_scheduler_alone(old) -> None:
    index = json.loads((old / "model_index.json").read_text())
    del index["trained_for"]
    (old / "model_index.json").write_text(json.dumps(index))
    main([str(old), "--in-place"])
    diffusion = TransfusionPipeline.from_pretrained(old).transformer.config.diffusion
    assert diffusion["scheduler"] == "FlowMatchEulerDiscreteScheduler"
    assert diffusion["scheduler_args"] == {"num_train_timesteps": 1000, "shift": 1.0}


def test_defaults_of_an_architecture_are_not_written_out() -> None:
    fields = {"towers": {"all": {"hidden_size": 32, "intermediate_size": 48}}, "modalities": {}, "num_layers": 2}
    model = new_architecture(fields | {"modalities": {"text": "all", "image": "all"}})
    assert model.modalities["image"].attention is None
    assert model.modalities["image"].objective == "diffusion"


def test_an_old_snapshot_is_answered_with_the_command(old) -> None:
    with pytest.raises(UserError) as caught:
        TransfusionPipeline.from_pretrained(old)
    assert str(caught.value) == (
        f"{old} is a snapshot of version 0.1; convert it: python -m transfusion_mot.sampling.convert {old} NEW_FOLDER"
    )
    # As other loaders of diffusers come to it.
    with pytest.raises(UserError, match=r"^the transformer is of version 0\.1; convert its snapshot"):
        TransfusionMoT.from_pretrained(old / "transformer")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{old}"], "give either a folder OUTPUT, or --in-place"),
        (["{old}", "out", "--in-place"], "give either a folder OUTPUT, or --in-place"),
        (["{old}/vae", "out"], "is not a snapshot"),
        (["{old}", "{old}/.."], "holds the checkpoint, and what is in it would be deleted"),
    ],
)
def test_mistakes_are_named(old, tmp_path, monkeypatch, arguments, message) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        main([argument.format(old=old) for argument in arguments])
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_converted_is_told(old, tmp_path) -> None:
    main([str(old), str(tmp_path / "new")])
    with pytest.raises(UserError, match=r"is not of version 0\.1; it can be used as it is"):
        main([str(tmp_path / "new"), "--in-place"])
    (old / "transformer" / WEIGHTS).unlink()
    with pytest.raises(UserError, match="has no safetensors file"):
        main([str(old), "--in-place"])
