"""Clean latents read by another tower: rows, a naive model, sampling, runs, and refusals."""

import itertools
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import CHANNELS, Token, data_config, documents_of, numbered_images, sources_of, tiny_config
from conftest import tiny_model as random_model
from test_edits import NOTHING_DROPPED, PAIRS, edits_of
from test_image_context import random_images
from test_init_from import given
from test_model import Naive
from test_packing import check_positions, read_row, rows_of_lane
from training_runs import assert_same, final_state

import train
from transfusion_mot.config import ModalityConfig, ModelConfig, RunConfig, TowerConfig, parse_config
from transfusion_mot.data.batch import Batch
from transfusion_mot.data.layout import LatentSpan, Media, TokenRun
from transfusion_mot.data.mixture import Sources
from transfusion_mot.data.packing import Packer
from transfusion_mot.data.tokenizer import TextTokenizer
from transfusion_mot.diffusion import Diffusion
from transfusion_mot.errors import UserError
from transfusion_mot.files import find_snapshot
from transfusion_mot.losses import IGNORE_INDEX
from transfusion_mot.models import mot
from transfusion_mot.models.architecture import check_architecture
from transfusion_mot.models.inputs import LatentInput, ModalityInput, TokenInput
from transfusion_mot.pipeline import TransfusionPipeline
from transfusion_mot.sampling.session import Session
from transfusion_mot.sampling.workspace import Workspace
from transfusion_mot.schedulers import make_scheduler
from transfusion_mot.training.checkpoint import find_state
from transfusion_mot.training.metrics import read_metrics
from transfusion_mot.training.step import loss_terms
from transfusion_mot.training.tower_settings import trainable_parts
from transfusion_mot.training.towers import freeze_towers

TEXT_SLOTS, PATCHES = 64, 4
CAPTIONS = ["red apple", "sun", "an octopus", "fox", "moon", "a car"]
# Image first, last, side by side, alone behind text.
DOCUMENTS: list[list[str | int]] = [["a", 0, "sun"], [1, "an octopus"], [2, 3, "x", 4], ["ab", 5], ["text"]]
READ = ModalityConfig("text", "read", reads="image")
# So that nothing fits the wrong tower.
TOWERS = {"text": TowerConfig(16, 24), "image": TowerConfig(24, 40)}


def config_of(**changes: Any) -> ModelConfig:
    config = tiny_config(**{"towers": TOWERS} | changes)
    config.modalities = {**config.modalities, "clean_image": READ}
    return config


def sources() -> Sources:
    return sources_of(random_images(CAPTIONS), documents_of(DOCUMENTS), edits_of(["hat", "make it green"]))


def packer_of(tokenizer: TextTokenizer, sources: Sources, config: ModelConfig, lanes: int = 1, **data: Any) -> Packer:
    slots = {"text": TEXT_SLOTS, "image": 4, "clean_image": 3}
    given = {"image_context": "clean", "caption_first_prob": 0.5, "sources": PAIRS, "edit_dropout": NOTHING_DROPPED}
    return Packer(
        sources,
        tokenizer,
        replace(data_config(**given), **{"slots": slots, **data}),
        config,
        num_lanes=lanes,
        seed=0,
        timesteps_from_uniform=Diffusion(make_scheduler("FlowMatchEulerDiscreteScheduler", {})).timesteps_from_uniform,
    )


def rows_with(tokenizer: TextTokenizer, config: ModelConfig, count: int = 4) -> list[Batch]:
    return [batch for batch, _ in rows_of_lane(packer_of(tokenizer, sources(), config), 0, count)]


def in_double(batch: Batch) -> Batch:
    """Times so small that their sinusoids, which are float32, lose no digits."""
    given = batch.latents("image")
    image = given._replace(
        latents=given.latents.double(), noise=given.noise.double(), timesteps=given.timesteps.double() / 64
    )
    clean = batch.latents("clean_image")
    clean = clean._replace(latents=clean.latents.double(), timesteps=clean.timesteps.double())
    return replace(batch, inputs={**batch.inputs, "image": image, "clean_image": clean})


# --- Rows. ---


@pytest.mark.parametrize("rope", ["1d", "3d"])
def test_clean_images_stand_in_slots_of_their_own(byte_tokenizer, rope: str) -> None:
    config = config_of(rope=rope)
    assert config.stream_order == ["text", "clean_image", "image"], "the slots of a tower lie together"
    assert config.made == ["text", "image"]
    total, seen = Counter(), Counter()
    for batch, counts in rows_of_lane(packer_of(byte_tokenizer, sources(), config), 0, 60):
        total.update(counts)
        image, clean = batch.latents("image"), batch.latents("clean_image")
        assert clean.noise is None
        assert not clean.mask.any()
        assert not image.copies.any()
        assert not image.conditions.any()
        assert not (clean.copies & clean.conditions).any()
        number = clean.copies.shape[1]
        for document in read_row(batch, TEXT_SLOTS):
            shown = []
            for span, slots in itertools.groupby(document, key=lambda slot: slot[1]):
                where = [position for *_, position in slots]
                if span is None:
                    shown.append("text")
                elif span >= number:
                    assert image.mask[0, span - number]
                    shown.append("noised")
                    latents, place = image.latents[0, span - number], where
                elif clean.copies[0, span]:
                    assert shown[-1] == "noised"
                    assert torch.equal(clean.latents[0, span], latents)
                    assert where == place, "it has the rotary positions of its image"
                    shown.append("copy")
                else:
                    assert clean.conditions[0, span]
                    shown.append("condition")
            seen[" ".join(shown)] += 1
            if "copy" not in shown:
                check_positions(document, rope)
        assert counts["image_items"] == image.mask.sum() + clean.conditions.sum()
        assert counts["image_slots"] == PATCHES * image.mask.sum()
        assert counts["clean_image_slots"] == PATCHES * (clean.copies | clean.conditions).sum()
        assert counts["pad_slots"] == (batch.slots.document_ids == -1).sum()
        assert batch.counts().tolist() == [
            (batch.tokens("text").labels != IGNORE_INDEX).sum(),
            image.mask.sum() * image.latents[0, 0].numel(),
        ]
    wanted = ["text noised text", "text noised copy text", "text condition text noised text"]
    assert all(seen[form] > 10 for form in wanted), seen
    # Images without text between them are interleaved with their copies.
    assert any(form.count("copy") == 3 for form in seen)


def test_every_document_comes_once_an_epoch(byte_tokenizer) -> None:
    """Also where its clean images are what a row has no room for."""
    packer = packer_of(
        byte_tokenizer, sources_of(numbered_images(CAPTIONS)), config_of(), lookahead=2, random_flip=True
    )
    found: list[int] = []
    for batch, _ in rows_of_lane(packer, 0, 40):
        given = batch.latents("image")
        found += given.latents[0, :, 0, 0, 0][given.mask[0]].int().tolist()
    # A document that waits comes a little later.
    for number in range(len(CAPTIONS)):
        assert abs(found.count(number) - len(found) / len(CAPTIONS)) <= 2


def test_a_row_is_a_function_of_the_state_of_its_lane(byte_tokenizer) -> None:
    config = config_of()
    packer = packer_of(byte_tokenizer, sources(), config, lanes=3)
    state = packer.initial_state()[None]
    for step in range(5):
        again = packer_of(byte_tokenizer, sources(), config, lanes=3).rows([1], step, state)
        rows, state, _ = packer.rows([1], step, state)
        for name, tensor in rows.tensors().items():
            assert torch.equal(tensor, again[0].tensors()[name]), name


# --- The model. ---


class NaiveReader(Naive):
    """Token by token, with the tower of its modality; latents that are only read have an input but no output layer."""

    def embed(self, token: Token, given: LatentInput) -> torch.Tensor:
        if token.modality != "clean_image":
            return super().embed(token, given)
        latents = given.latents[token.row, token.item]
        top, left = token.patch // 2 * 2, token.patch % 2 * 2
        values = [latents[c, top + dy, left + dx] for dy in range(2) for dx in range(2) for c in range(CHANNELS)]
        matrix, bias = (self.weights[f"modalities.clean_image.adapter.input.{name}"] for name in ("weight", "bias"))
        return matrix @ torch.stack(values) + bias

    def paint(self, modality: str, item: int, row: int, vectors: list, inputs: dict) -> torch.Tensor:
        if modality == "clean_image":
            return torch.zeros(())
        return super().paint(modality, item, row, vectors, inputs)


def tokens_of(batch: Batch, slots: list[tuple]) -> list[Token]:
    """Slots of a document for the naive model."""
    number = batch.latents("clean_image").copies.shape[1]
    tokens, patches = [], Counter[int]()
    for slot, span, position in slots:
        if span is None:
            tokens.append(Token(0, "text", slot, slot, None, None, position))
            continue
        name, item = ("image", span - number) if span >= number else ("clean_image", span)
        tokens.append(Token(0, name, slot, slot, item, patches[span], position))
        patches[span] += 1
    return tokens


@pytest.mark.parametrize("architecture", [{}, {"rope": "3d", "num_heads": 4, "num_kv_heads": 2}])
@torch.no_grad()
def test_losses_are_those_of_a_naive_model(byte_tokenizer, architecture: dict[str, Any]) -> None:
    """Of each image given the text and the clean images before it, and of the text given these."""
    config = config_of(**architecture)
    model = random_model(config, {"text": byte_tokenizer.vocab_size, "image": CHANNELS})
    naive, compared = NaiveReader(model), Counter()
    for batch in (in_double(row) for row in rows_with(byte_tokenizer, config, 2)):
        terms, image = loss_terms(model, batch), batch.latents("image")
        assert set(terms) == {"text", "image"}
        times = image.timesteps[..., None, None, None]
        noisy = (1 - times) * image.latents + times * image.noise
        inputs: dict[str, ModalityInput] = batch.inputs | {"image": LatentInput(noisy, image.timesteps)}
        number = batch.latents("clean_image").copies.shape[1]
        for document in read_row(batch, TEXT_SLOTS):
            context: list[tuple] = []
            for span, group in itertools.groupby(document, key=lambda slot: slot[1]):
                slots = list(group)
                if span is None or span < number:
                    context += slots
                    continue
                found = naive.document(tokens_of(batch, context + slots), inputs)["image", span - number]
                error = (found - (image.noise - image.latents)[0, span - number]).square().sum()
                torch.testing.assert_close(terms["image"].losses[0, span - number].double(), error, rtol=1e-6, atol=0)
                compared["image"] += 1
            logits = naive.document(tokens_of(batch, context), inputs)
            for place in (slot for slot, span, _ in context if span is None):
                if (label := int(batch.tokens("text").labels[0, place])) != IGNORE_INDEX:
                    expected = -logits["text", place].log_softmax(0)[label]
                    torch.testing.assert_close(terms["text"].losses[0, place].double(), expected, rtol=1e-6, atol=0)
                    compared["text"] += 1
    assert compared["image"] > 5
    assert compared["text"] > 30


def test_with_one_tower_it_is_the_model_without_it(byte_tokenizer) -> None:
    """Where the tower and the way in are the same, losses and gradients are."""
    towers = {"all": TowerConfig(16, 24)}
    plain = {
        "text": ModalityConfig("all"),
        "image": ModalityConfig("all", "diffusion", loss_weight=5.0),
    }
    without = tiny_config(towers=towers, modalities=plain)
    config = replace(without, modalities={**plain, "clean_image": replace(READ, tower="all")})
    sizes = {"text": byte_tokenizer.vocab_size, "image": CHANNELS}
    other, model = random_model(without, sizes), random_model(config, sizes)
    # At t = 0 the timestep adds a constant to every patch.
    constant = other.modality("image").adapter.timestep(torch.zeros(1)).detach()[0]
    weights = dict(other.state_dict())
    way_in = weights["modalities.image.adapter.input.weight"], weights["modalities.image.adapter.input.bias"] + constant
    names = [f"modalities.clean_image.adapter.input.{name}" for name in ("weight", "bias")]
    model.load_state_dict(weights | dict(zip(names, way_in, strict=True)))

    batch = in_double(Batch.cat(rows_with(byte_tokenizer, config, 3)))
    clean, image = batch.latents("clean_image"), batch.latents("image")
    parts = [(getattr(clean, key), getattr(image, key)) for key in ("latents", "timesteps", "mask", "copies")]
    joined = [torch.cat(part, dim=1) for part in parts]
    noise = torch.cat([torch.randn_like(clean.latents), image.noise], dim=1)
    conditions = torch.cat([clean.conditions, image.conditions], dim=1)
    one = LatentInput(joined[0], joined[1], noise, joined[2], joined[3], conditions)
    same = replace(batch, inputs={"text": batch.inputs["text"], "image": one})

    gradients = []
    for case, rows in ((model, batch), (other, same)):
        terms = loss_terms(case, rows)
        case.zero_grad()
        (terms["text"].loss + 3 * terms["image"].loss).backward()
        gradients.append((terms, {name: parameter.grad for name, parameter in case.named_parameters()}))
    (found, ours), (expected, theirs) = gradients
    for name in expected:
        torch.testing.assert_close(found[name].loss, expected[name].loss, rtol=1e-6, atol=0)
    # What the one way in has learnt, the two have.
    ours["modalities.image.adapter.input.weight"] += ours.pop(names[0])
    assert ours.pop(names[1]).abs().max() > 0
    for name in (name for name in theirs if "timestep" not in name and "input.bias" not in name):
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6 * float(theirs[name].abs().max()))


def test_clean_images_go_through_the_tower_of_text_alone(byte_tokenizer) -> None:
    config = config_of()
    model = random_model(config, {"text": byte_tokenizer.vocab_size, "image": CHANNELS})
    used = {"text": 0, "image": 0}
    for tower in used:
        model.blocks[0].ffn[tower].register_forward_hook(
            lambda _, given, __, tower=tower: used.__setitem__(tower, given[0].shape[1])
        )
    (batch,) = rows_with(byte_tokenizer, config, 1)
    loss_terms(model, in_double(batch))
    assert used == {"text": TEXT_SLOTS + 3 * PATCHES, "image": 4 * PATCHES}
    assert not [name for name, _ in model.named_parameters() if "clean_image" in name and "adapter.input" not in name]


def test_its_way_in_learns_where_the_tower_that_reads_is_frozen() -> None:
    model = random_model(config_of())
    freeze_towers(model, ["text"])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[1] for name in trained if name.startswith("modalities.")} == {"image", "clean_image"}
    assert not any(".owned.text." in name for name in trained)
    assert "clean_image.adapter" in trainable_parts(model.architecture)


# --- Sampling. ---


@pytest.mark.parametrize("rope", ["1d", "3d"])
@torch.no_grad()
def test_states_and_predictions_are_those_of_training(byte_tokenizer, monkeypatch, rope: str) -> None:
    config = config_of(rope=rope)
    model = random_model(config, {"text": byte_tokenizer.vocab_size, "image": CHANNELS}).eval()
    packer = packer_of(byte_tokenizer, sources(), config, slots={"text": 200, "image": 14, "clean_image": 12})
    ((batch, _),) = rows_of_lane(packer, 0, 1)
    batch = in_double(batch)
    text, image, clean = batch.tokens("text"), batch.latents("image"), batch.latents("clean_image")
    times = image.timesteps[..., None, None, None]
    noisy = (1 - times) * image.latents + times * image.noise
    trained: list[tuple[torch.Tensor, torch.Tensor]] = []
    attend = mot.joint_attention
    monkeypatch.setattr(
        mot, "joint_attention", lambda q, k, v, mask: trained.append((k[0], v[0])) or attend(q, k, v, mask)
    )
    given = image._replace(latents=noisy, noise=None)
    output = model(batch.inputs | {"text": TokenInput(text.ids), "image": given}, batch.slots)
    assert set(output.predictions) == {"text", "image"}

    documents = read_row(batch, 200)
    session = Session(model, Workspace(), rows=len(documents), capacity=220, device=torch.device("cpu"))
    number, painted, read = clean.copies.shape[1], 0, 0
    places: list[list[int]] = []
    for row, document in enumerate(documents):
        places.append([])
        for span, group in itertools.groupby(document, key=lambda slot: slot[1]):
            slots = [slot for slot, _, _ in group]
            if span is None:
                session.feed(row, TokenRun("text", text.ids[0, slots].tolist(), []))
                places[-1] += slots
            elif span < number:
                # As the sampler is given it: media of the modality of pictures.
                session.feed(row, LatentSpan(Media("image", clean.latents[0, span]), is_copy=False))
                places[-1] += slots
                read += 1
            else:
                session.read([row])
                prediction = session.denoiser("image", [row], noisy[:, span - number])(
                    noisy[:, span - number], float(image.timesteps[0, span - number])
                )
                expected = output.predictions["image"][:, span - number]
                torch.testing.assert_close(prediction, expected, rtol=0, atol=1e-6)
                painted += 1
        if int(text.ids[0, places[-1][-1]]) == byte_tokenizer.end_ids["image"]:
            # Behind an image without a copy: nothing goes on from here.
            places[-1].pop()
    assert painted > read > 6
    session.read(list(range(len(documents))))
    for layer, (keys, values) in enumerate(trained):
        for row, slots in enumerate(places):
            for cached, expected in ((session.cache.keys, keys), (session.cache.values, values)):
                held = cached[layer, row, : len(slots)]
                torch.testing.assert_close(held, expected[:, slots].transpose(0, 1), rtol=0, atol=1e-12)


# --- Whole runs. ---


def option(**changes: Any) -> dict[str, dict[str, Any]]:
    """Changes of a tiny run."""
    modalities = {
        "text": {"tower": "text"},
        "image": {"tower": "image", "objective": "diffusion", "loss_weight": 5.0},
        "clean_image": {"tower": "text", "objective": "read", "reads": "image"},
    }
    slots = {"text": 32, "image": 2, "clean_image": 1}
    return {
        "data": {"image_context": "clean", "caption_first_prob": 0.5, "slots": slots},
        "model": {"modalities": modalities},
        **changes,
    }


@pytest.mark.slow
def test_a_run_resumes_exactly_and_its_snapshot_reads_and_paints(arguments, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    whole = arguments("whole", **option(training={"num_steps": 4}))
    train.main(whole)
    train.main(arguments("parts", **option(training={"num_steps": 4, "max_minutes": 1e-6, "save_every": 1})))
    assert find_state(tmp_path / "parts", "auto").name < "step-0000004"
    train.main(arguments("parts", **option(training={"num_steps": 4})))
    states = [final_state(tmp_path / run) for run in ("whole", "parts")]
    assert_same(*states)
    assert "model/modalities.clean_image.adapter.input.weight" in states[0]
    lines = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    assert {key for line in lines for key in line if key.endswith("_loss") and "/" not in key} == {
        "text_loss",
        "image_loss",
    }
    assert any("validation/caption_loss" in line for line in lines)
    pipeline = TransfusionPipeline.from_pretrained(find_snapshot(str(tmp_path / "whole")))
    assert "clean image items, which are only read; tower `text`" in (pipeline.model_card or "")
    picture = pipeline("sun", height=32, width=32, num_inference_steps=1).images[0]
    used: set[str] = set()
    model = pipeline.transformer
    model.register_forward_pre_hook(lambda _, given: used.update(given[0]))
    pipeline.caption(picture, max_new_tokens=2)
    assert used == {"text", "clean_image"}
    pipeline.save_pretrained(tmp_path / "again")
    again = TransfusionPipeline.from_pretrained(tmp_path / "again")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.transformer.parameters(), strict=True))


@pytest.mark.slow
def test_a_run_adds_it_to_a_snapshot_that_has_none(arguments, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    train.main(arguments("before", training={"num_steps": 1}))
    capsys.readouterr()
    way = {"modalities": {"clean_image": {"tower": "text", "objective": "read", "reads": "image"}}}
    train.main(given(tmp_path, "after", tmp_path / "before", data=option()["data"], model=way))
    assert "clean_image is new, drawn at random" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ["data.image_context=noised"],
            "reads clean latents, but with data.image_context=noised captions see",
        ),
        (
            ["data.slots={text: 64, image: 4}"],
            "data.slots has text, image, but needs one entry for each of clean_image, image, text",
        ),
        (["data.slots.clean_image=0"], "data.slots.clean_image is 0; it must be at least 1"),
        (
            ["data.caption_first_prob=1"],
            "reads clean latents of image, but data.caption_first_prob is 1, so nothing",
        ),
        (
            ["data.orders={text image: 1}"],
            "data.orders has image in the last place only, so nothing follows image",
        ),
        (["data.orders={text clean_image: 1}"], "'clean_image' is not in model.modalities, which has image, text"),
        (["model.modalities.clean_image.attention=causal"], "model.modalities.clean_image.attention is causal"),
    ],
)
def test_settings_that_no_run_can_have_are_refused(changes: list[str], message: str) -> None:
    option = [
        "model.modalities.clean_image={tower: text, objective: read, reads: image}",
        "data.slots={text: 64, image: 1, clean_image: 1}",
        "data.image_context=clean",
    ]
    assert parse_config(RunConfig, option, "").model.readers == {"image": "clean_image"}
    with pytest.raises(UserError, match=message):
        parse_config(RunConfig, [*option, *changes], "")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tower": "words"}, "clean_image.tower is 'words'; it needs one of model.towers: text, image"),
        ({"reads": None}, "clean_image has no reads; it must name a modality with the objective diffusion: image"),
        ({"reads": "sketch"}, "reads sketch, which is no modality; it must name .*: image"),
        ({"reads": "text"}, "reads text, which is codes; it must name a modality with the objective diffusion: image"),
        ({"objective": "diffusion"}, "has reads: image, but its objective is diffusion; set objective: read"),
        ({"patch_size": 4}, "patch_size is 4, but image, which it reads, has 2; give both the same"),
        ({"adapter": "unet"}, "adapter is unet, but a modality that is only read has a linear adapter; remove the key"),
        ({"tied_embeddings": True}, "but the objective read has no embeddings"),
    ],
)
def test_models_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    config = config_of()
    config.modalities["clean_image"] = replace(READ, **changes)
    with pytest.raises(UserError, match=message):
        check_architecture(config)


def test_a_tower_needs_a_loss_and_a_modality_one_reader() -> None:
    config = config_of(towers={**TOWERS, "eyes": TowerConfig(16, 24)})
    config.modalities["clean_image"] = replace(READ, tower="eyes")
    with pytest.raises(UserError, match=r"\['eyes'\] that no modality with a loss uses"):
        check_architecture(config)
    config = config_of()
    config.modalities["second"] = READ
    with pytest.raises(UserError, match="clean_image and second, which both read image; remove one"):
        check_architecture(config)
