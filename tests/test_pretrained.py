"""Language models of transformers as a tower: equal to their source in logits, continuations, training and export."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import make_rows, tiny_config, tiny_model
from language_models import (
    CASES,
    SIZES,
    VOCAB_SIZE,
    language_model,
    save_language_model,
    tokenizer,
)
from process_group import run_processes
from safetensors.torch import load_file
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from training_runs import arguments_below
from transformers import AutoModelForCausalLM, AutoTokenizer, GemmaConfig, LlamaConfig, Olmo2Config, PreTrainedModel
from transformers.utils import logging

import train
from benchmarks.language_models import with_exact_norms
from transfusion_mot.config import RunConfig, to_dict
from transfusion_mot.data.layout import TokenRun
from transfusion_mot.data.tokenizer import TextTokenizer, load_tokenizer
from transfusion_mot.errors import UserError
from transfusion_mot.files import find_snapshot
from transfusion_mot.models.attention import dense_mask, slot_ids
from transfusion_mot.models.inputs import Slots, TokenInput
from transfusion_mot.models.layers import rotary_angles
from transfusion_mot.models.pretrained import LanguageModel
from transfusion_mot.models.transfusion import TransfusionMoT
from transfusion_mot.pipeline import TransfusionPipeline
from transfusion_mot.reporting.plan import open_model, parameter_table
from transfusion_mot.run import snapshots
from transfusion_mot.run.begin import settled_config
from transfusion_mot.run.from_towers import TowerStarts
from transfusion_mot.sampling import export
from transfusion_mot.sampling.decoding import Decoding
from transfusion_mot.sampling.session import Session
from transfusion_mot.sampling.workspace import Workspace

CPU = torch.device("cpu")
IMAGE = ("model.towers.image.hidden_size=24", "model.towers.image.intermediate_size=40")

logging.disable_progress_bar()


def configured(folder: Path, *arguments: str) -> RunConfig:
    """The configuration of a run whose text tower is the language model in a folder."""
    return settled_config([f"model.towers.text.pretrained={folder}", "output_dir=nowhere", *IMAGE, *arguments])


def begun(config: RunConfig, vocab_size: int = VOCAB_SIZE) -> TransfusionMoT:
    """The model of a run before its first step."""
    model = TransfusionMoT.from_sections({"text": vocab_size, "image": 3}, config.model, config.diffusion)
    report = TowerStarts(to_dict(config)).fill(model, config)
    report.check()
    return model.eval()


def text_slots(ids: torch.Tensor, rope: str) -> Slots:
    """Each row of ids is one document."""
    order = torch.arange(ids.shape[1]).expand(ids.shape)
    nothing = torch.full(ids.shape, -1)
    positions = order if rope == "1d" else order[..., None].expand(-1, -1, 3)
    return Slots(torch.zeros_like(ids), order, nothing, positions, nothing)


@torch.no_grad()
def logits_of(model: TransfusionMoT, ids: torch.Tensor) -> torch.Tensor:
    return model({"text": TokenInput(ids)}, text_slots(ids, model.architecture.rope)).predictions["text"]


def some_ids(rows: int, length: int) -> torch.Tensor:
    return torch.randint(VOCAB_SIZE, (rows, length), generator=torch.Generator().manual_seed(0))


def distance(one: torch.Tensor, two: torch.Tensor) -> float:
    return float((one - two).abs().max() / two.abs().max())


@pytest.mark.parametrize("rope", ["1d", "3d"])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_logits_are_those_of_the_source(case: str, rope: str, tmp_path: Path) -> None:
    source = save_language_model(tmp_path, case)
    model = begun(configured(tmp_path, f"model.rope={rope}"))
    ids = some_ids(2, 100)
    assert distance(logits_of(model, ids), source(ids).logits) <= 1e-6
    exact = with_exact_norms(source)(ids).logits
    assert distance(logits_of(model.double(), ids), exact) <= 1e-10
    # Rounded weights and activations: as far from the exact logits as the source itself.
    own, theirs = logits_of(model.bfloat16(), ids), language_model(case).bfloat16()(ids).logits
    assert (own - exact).norm() <= 1.2 * (theirs - exact).norm() <= 0.1 * exact.norm()


@pytest.mark.parametrize("case", ["Llama, biases, wide heads", "Qwen2, yarn", "Qwen3", "Mistral, window", "SmolLM3"])
@torch.no_grad()
def test_greedy_continuations_with_the_cache_are_those_of_the_source(case: str, tmp_path: Path) -> None:
    source = save_language_model(tmp_path, case)
    model = begun(configured(tmp_path))
    ids = some_ids(1, 20)
    settings = {"max_new_tokens": 64, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = source.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, 20:].tolist()
    session = Session(model, Workspace(), rows=1, capacity=90, device=CPU)
    session.feed(0, TokenRun("text", ids[0].tolist(), []))
    nothing = torch.zeros(1, VOCAB_SIZE, dtype=torch.bool)
    (found,) = session.write(
        "text", [[0]], forbidden=nothing, ends=[], decoding=Decoding(64), uniform=torch.zeros(1, 64)
    )
    assert found == expected
    assert len(set(found)) > 5


def test_rotary_angles_without_scaling_are_those_of_earlier_versions() -> None:
    """The formula of transformers rounds otherwise; snapshots of models that were trained without it keep theirs."""
    positions = torch.arange(300)[None]
    cos, sin = rotary_angles(positions, 24, 10000.0)
    angles = positions[..., None].float() * 10000.0 ** (-torch.arange(12, dtype=torch.float32) / 12)
    assert torch.equal(cos[:, :, 0], angles.cos())
    assert torch.equal(sin[:, :, 0], angles.sin())
    other = rotary_angles(positions, 24, 10000.0, {"rope_type": "default"})[0]
    assert not torch.equal(other, cos)
    assert (other - cos).abs().max() < 1e-4


# --- The vocabulary and the tokenizer. ---


def test_begin_and_end_tokens_take_spare_rows_and_nothing_shrinks(tmp_path: Path) -> None:
    source = save_language_model(tmp_path, "Qwen2, tied", begins_with_bos=False)
    ids_before = len(AutoTokenizer.from_pretrained(tmp_path))
    config = configured(tmp_path)
    own = load_tokenizer(str(tmp_path), config.model.stream_order, config.model.has_pretrained_text)
    assert (own.begin_ids, own.end_ids) == ({"image": ids_before}, {"image": ids_before + 1})
    model = begun(config, own.vocab_size)
    assert own.vocab_size < VOCAB_SIZE == model.modality("text").vocab_size
    assert model.modality("text").head is None
    assert torch.equal(model.modality("text").embedding.weight, source.get_input_embeddings().weight)


def test_rows_are_appended_where_none_are_spare(tmp_path: Path) -> None:
    source = save_language_model(tmp_path, "Llama", spare=0)
    config = configured(tmp_path)
    own = load_tokenizer(str(tmp_path), config.model.stream_order, config.model.has_pretrained_text)
    model = TransfusionMoT.from_sections({"text": own.vocab_size, "image": 3}, config.model, config.diffusion)
    report = TowerStarts(to_dict(config)).fill(model, config)
    report.check()
    assert own.vocab_size == VOCAB_SIZE + 2
    assert f"2 x rows appended for tokens of this run: {VOCAB_SIZE} => {VOCAB_SIZE + 2}" in str(report)
    for own_matrix, theirs in (
        (model.modality("text").embedding.weight, source.get_input_embeddings().weight),
        (model.modality("text").head.weight, source.get_output_embeddings().weight),
    ):
        assert torch.equal(own_matrix[:VOCAB_SIZE], theirs)
        added = own_matrix[VOCAB_SIZE:]
        assert 0.3 < added.std() / theirs.std() < 3
        assert not torch.equal(added[0], added[1])
    ids = some_ids(1, 30)
    assert distance(logits_of(model, ids)[..., :VOCAB_SIZE], source(ids).logits) <= 1e-6


@pytest.mark.parametrize(("begins_with_bos", "has_bos"), [(False, False), (True, True), (False, True)])
def test_documents_begin_and_end_as_the_source_expects(begins_with_bos: bool, has_bos: bool, tmp_path: Path) -> None:
    theirs = tokenizer(begins_with_bos, has_bos=has_bos)
    theirs.save_pretrained(tmp_path / "source")
    before = theirs.get_vocab()
    own = load_tokenizer(str(tmp_path / "source"), ["text", "image"], of_language_model=True)
    text = "red apple <|im_end|>"
    assert [*own.document_start, *own.encode("red apple")] == theirs("red apple").input_ids
    assert own.eos_id == own.pad_id == before["<|endoftext|>"]
    assert set(own.hf.get_vocab()) - set(before) == {"<begin_of_image>", "<end_of_image>"}
    assert before["<|im_end|>"] not in own.encode(text)
    own.save(tmp_path / "saved")
    again = load_tokenizer(str(tmp_path / "saved"), ["text", "image"])
    assert (again.document_start, again.vocab_size) == (own.document_start, own.vocab_size)
    assert again.fingerprint == own.fingerprint
    # With another modality, the tokens that it lacks are added, and no begin of text.
    more = TextTokenizer(again.hf, ["text", "image", "speech"])
    assert more.document_start == own.document_start
    # A tokenizer of no language model begins documents with a token of its own.
    assert load_tokenizer(str(tmp_path / "source"), ["text", "image"]).document_start


# --- Sharded weights, copies, towers of snapshots. ---


def copying(folder: Path) -> list[str]:
    """Arguments of a run whose tower of images is a copy of its tower of text."""
    return [f"model.towers.text.pretrained={folder}", "model.towers.image.copy_of=text", "output_dir=nowhere"]


def fill_sharded(folder: Path) -> None:
    """Called by each process of a group."""
    config = settled_config(copying(folder))
    with torch.device("meta"):
        model = TransfusionMoT.from_sections({"text": VOCAB_SIZE + 2, "image": 3}, config.model, config.diffusion)
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    model.to_empty(device="cpu")
    model.initialise(0)
    TowerStarts(to_dict(config)).fill(model, config).check()
    expected = dict(begun(config, VOCAB_SIZE + 2).named_parameters())
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        if not name.startswith("modalities.image."):
            assert torch.equal(parameter.full_tensor(), expected[name]), name


@pytest.mark.slow
def test_weights_go_into_sharded_parameters(tmp_path: Path) -> None:
    save_language_model(tmp_path / "source", "Qwen2, tied", max_shard_size="20KB")
    assert len(list((tmp_path / "source").glob("*.safetensors"))) > 2
    run_processes(fill_sharded, 2, {}, tmp_path / "group", tmp_path / "source")


def test_a_copy_has_the_weights_and_sizes_of_its_tower(tmp_path: Path) -> None:
    save_language_model(tmp_path, "Qwen2, tied")
    model = begun(settled_config(copying(tmp_path)))
    parameters = dict(model.named_parameters())
    copied = {name: name.replace(".owned.image.", ".owned.text.") for name in parameters if ".owned.image." in name}
    assert len(copied) > 20
    assert all(torch.equal(parameters[one], parameters[two]) for one, two in copied.items())


# --- A run. ---


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory, picture_folder: Path, random_vae: Path, emoji_cache: Path) -> Any:
    """Command lines of tiny runs that begin with a language model."""
    folder = tmp_path_factory.mktemp("runs")
    arguments = arguments_below(folder, picture_folder, random_vae, emoji_cache)

    def with_model(source: Path, **training: Any) -> list[str]:
        found = arguments(
            training={"num_steps": 20, "num_rows": 2, "microbatch_rows": None, "log_every": 20} | training,
            optimizer={"lr": 0.003},
        )
        sections = yaml.safe_load(Path(found[1]).read_text())
        del sections["tokenizer"]
        sections["model"] = {"towers": {"text": {"pretrained": str(source)}, "image": {"hidden_size": 24}}}
        Path(found[1]).write_text(yaml.safe_dump(sections))
        return found

    return with_model


def plain_bits_per_byte(model: PreTrainedModel, folder: Path, texts: list[str]) -> float:
    """Computed only with transformers: the loss of every token after the first one of a text."""
    own, nats = AutoTokenizer.from_pretrained(folder), 0.0
    for text in texts:
        ids = torch.tensor([own(text).input_ids])
        with torch.no_grad():
            chances = model(ids).logits[0, :-1].double().log_softmax(-1)
        nats -= float(chances.gather(1, ids[0, 1:, None]).sum())
    return nats / math.log(2) / sum(len(text.encode()) for text in texts)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["Qwen2, tied", "Llama 3, tied"])
def test_a_frozen_tower_is_its_source_after_training_and_exports_to_it(
    case: str, build: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(snapshots, "plot_runs", lambda *_: None)
    has_bos = case.startswith("Llama")
    source = save_language_model(tmp_path / "source", case, begins_with_bos=has_bos)
    arguments = build(tmp_path / "source", frozen_towers=["text"], insulated_towers=["text"])
    run = tmp_path / "run"
    train.main([*arguments, f"output_dir={run}"])
    snapshot = find_snapshot(str(run))
    text = (snapshot / "transformer" / "config.json").read_text()
    assert str(tmp_path) not in text, "a snapshot does not tell where its weights came from"

    export.main(["--checkpoint", str(run), "--output", str(tmp_path / "exported"), "--language-model", "float32"])
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("source", "exported"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    assert type(exported) is type(source)
    ids = some_ids(2, 50)
    with torch.no_grad():
        assert torch.equal(exported(ids).logits, source(ids).logits)
    ids_before, ids_after = (
        AutoTokenizer.from_pretrained(tmp_path / name)("red apple").input_ids for name in ("source", "exported")
    )
    assert ids_after == ids_before

    texts = ["a red apple, and a large sun", "octopus", "blue"]
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    found = bits_per_byte(run, tmp_path / "texts.jsonl", monkeypatch)
    assert found == pytest.approx(plain_bits_per_byte(source, tmp_path / "source", texts), rel=1e-6)

    # The trained tower of images beside the language model, in a new run, and both from the snapshot.
    weights = load_file(snapshot / "transformer" / "diffusion_pytorch_model.safetensors")
    for text in (tmp_path / "source", run):
        towers = [f"model.towers.text.pretrained={text}", f"model.towers.image.pretrained={run}"]
        config = settled_config([*towers, "output_dir=nowhere"])
        model = TransfusionMoT.from_sections({"text": VOCAB_SIZE, "image": 4}, config.model, config.diffusion)
        report = TowerStarts(to_dict(config)).fill(model, config)
        report.check()
        assert not report.missing
        assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())
    with pytest.raises(UserError, match=r"a snapshot with the towers image, text; give the tower one of these names"):
        settled_config(["model.towers.speech={pretrained: " + str(run) + "}"])

    # It goes on without the language model.
    (tmp_path / "source").rename(tmp_path / "gone")
    train.main([*arguments, f"output_dir={run}", "training.num_steps=21"])
    with pytest.raises(UserError, match=r"continues with its own weights"):
        train.main([*arguments, f"output_dir={run}", f"model.towers.text.pretrained={tmp_path / 'gone'}"])


@pytest.mark.slow
def test_adapters_on_a_language_model_are_part_of_what_is_exported(
    build: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(snapshots, "plot_runs", lambda *_: None)
    source = save_language_model(tmp_path / "source", "Qwen3")
    run = tmp_path / "run"
    lora = "lora={rank: 4, towers: [text]}"
    train.main([*build(tmp_path / "source", num_steps=4), f"output_dir={run}", "optimizer.lr=0.1", lora])
    export.main(["--checkpoint", str(run), "--output", str(tmp_path / "exported"), "--language-model", "float32"])
    ids = some_ids(2, 50)
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")(ids).logits
        own = logits_of(TransfusionPipeline.from_pretrained(find_snapshot(str(run))).transformer, ids)
        assert distance(found, own) <= 1e-5
        assert distance(found, source(ids).logits) > 1e-2


def bits_per_byte(run: Path, texts: Path, monkeypatch: pytest.MonkeyPatch) -> float:
    """As computed by `evaluate/text.py`."""
    import runpy
    import sys

    output = run / "text.json"
    words = ["text.py", "--checkpoint", str(run), "--texts", str(texts), "--device", "cpu", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", words)
    runpy.run_path(str(Path(__file__).parent.parent / "evaluate" / "text.py"), run_name="__main__")
    metrics = json.loads(output.read_text())["metrics"]
    return next(metric["value"] for metric in metrics if metric["name"].startswith("bits per byte"))


# --- Knowledge insulation. ---


@pytest.mark.parametrize("insulated", [["text"], ["text", "image"]])
def test_insulation_is_that_of_a_naive_attention(insulated: list[str]) -> None:
    """One query at a time, in float64: keys and values of other, insulated towers are constants."""
    config = tiny_config(num_heads=4, num_kv_heads=2)
    model = tiny_model(config)
    rows = make_rows([[[3, "image", 2], [2]], [[2, "image"]]], {"text": 8, "image": 1}, config)
    slots = slot_ids(model.architecture, rows.inputs, rows.slots)
    mask = dense_mask(slots, slots)
    generator = torch.Generator().manual_seed(0)
    count, length = mask.shape[0], mask.shape[1]
    q, k, v = (
        torch.randn(count, length, heads, 8, generator=generator, dtype=torch.float64).requires_grad_()
        for heads in (4, 2, 2)
    )
    lengths = [8, length - 8]
    tower_of = ["text"] * 8 + ["image"] * (length - 8)
    upstream = torch.randn(count, length, 32, generator=generator, dtype=torch.float64)

    model.insulate(insulated)
    found = torch.cat(list(model.blocks[0]._attend(["text", "image"], lengths, q, k, v, mask).values()), dim=1)
    parts = []
    for row in range(count):
        for query in range(length):
            seen = [key for key in range(length) if mask[row, query, key]]
            closed = [tower_of[key] in insulated and tower_of[key] != tower_of[query] for key in seen]
            for head in range(4):
                keys, values = (
                    [own.detach() if c else own for own, c in zip(x[row, seen, head // 2], closed, strict=True)]
                    for x in (k, v)
                )
                scores = torch.stack([q[row, query, head] @ key for key in keys]) / math.sqrt(8)
                parts.append(scores.softmax(0) @ torch.stack(values))
    expected = torch.stack(parts).view(count, length, 32)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    gradients = [torch.autograd.grad(result, (q, k, v), upstream) for result in (found, expected)]
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_losses_of_images_send_nothing_into_an_insulated_tower(checkpointing: str) -> None:
    config = tiny_config()
    rows = make_rows([[[3, "image", 2], [2, "image"]]], {"text": 8, "image": 2}, config)

    def gradients(insulated: list[str], of: str) -> dict[str, torch.Tensor | None]:
        model = tiny_model(config)
        model.checkpoint_activations(checkpointing)
        model.insulate(insulated)
        prediction = model(rows.inputs, rows.slots).predictions[of]
        prediction.square().sum().backward()
        return {name: parameter.grad for name, parameter in model.named_parameters() if ".text." in name}

    assert any(gradient.abs().max() > 0 for gradient in gradients([], "image").values() if gradient is not None)
    for gradient in gradients(["text"], "image").values():
        assert gradient is None or not gradient.any()


# --- Published sizes. ---

# Millions of parameters on the models' cards, which are sums over these tensors.
PUBLISHED = {
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.1-8b": 8_030_261_248,
}
DATA = Path(__file__).parent / "data" / "language_models"


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_plan_knows_published_sizes(name: str) -> None:
    config = configured(DATA / name)
    model, _, assumed = open_model(config)
    (line,) = (line for line in parameter_table(model, config).splitlines() if line.startswith("tower text"))
    assert float(line.split()[-1]) == round(PUBLISHED[name] / 1e6, 2)
    rows = json.loads((DATA / name / "config.json").read_text())["vocab_size"]
    assert f"{rows} tokens: {DATA / name} has no tokenizer that can be read" in assumed


def test_a_plan_needs_no_weights(capsys: pytest.CaptureFixture[str]) -> None:
    train.main(["--plan", f"model.towers.text.pretrained={DATA / 'qwen2.5-0.5b'}", "--gpus", "1", "output_dir=nowhere"])
    assert "active matrices: text token" in capsys.readouterr().out


# --- What is refused. ---


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_other_families_are_refused_with_the_reason(tmp_path: Path) -> None:
    for config, words in (
        (GemmaConfig(), "GemmaForCausalLM, which does not fit: its norms multiply by 1"),
        (Olmo2Config(), "Olmo2ForCausalLM, which does not fit: its norms come after"),
        (LlamaConfig(**SIZES, mlp_bias=True), "it has biases in its feed-forwards"),
        (LlamaConfig(**SIZES, hidden_act="gelu"), "it has the activation gelu"),
    ):
        config.save_pretrained(tmp_path)
        edit_config(tmp_path, architectures=[type(config).__name__.replace("Config", "ForCausalLM")])
        with pytest.raises(UserError, match=words):
            LanguageModel.open(str(tmp_path))
    LlamaConfig(**SIZES).save_pretrained(tmp_path)
    edit_config(tmp_path, architectures=["BertForMaskedLM"])
    with pytest.raises(UserError, match=r"is a BertForMaskedLM; a tower can be one of LlamaForCausalLM"):
        LanguageModel.open(str(tmp_path))
    edit_config(tmp_path, architectures=["LlamaForCausalLM"], quantization_config={"quant_method": "gptq"})
    with pytest.raises(UserError, match="is quantised; give the model in bfloat16"):
        LanguageModel.open(str(tmp_path))
    with pytest.raises(UserError, match="has no config"):
        LanguageModel.open(str(tmp_path.parent))
    with pytest.raises(UserError, match=r"is not a folder and cannot be downloaded from the Hugging Face hub"):
        LanguageModel.open("nobody/no-such-model")
    (tmp_path / "model.gguf").touch()
    with pytest.raises(UserError, match="is in GGUF"):
        LanguageModel.open(str(tmp_path / "model.gguf"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["model.num_layers=6"], r"model.num_layers is 6, but pretrained=.* has 3; remove one of the two keys"),
        (["model.towers.text.hidden_size=64"], r"model.towers.text.hidden_size is 64, but pretrained=.* has 32"),
        (
            ["model.towers.image.copy_of=text"],
            r"image.hidden_size is 24, but its copy_of, text, has 32",
        ),
        (
            ["model.towers.image.copy_of=speech"],
            r"copy_of is speech; it must be another tower that is not a copy: text",
        ),
        (["model.towers.text.copy_of=image"], r"model.towers.text has both pretrained and copy_of"),
        (["model.untied=[ffn]"], r"must own all its weights; set model.untied=\[norm, qkv, output, ffn\]"),
        (["tokenizer.path=null"], "has its own tokenizer; remove the key"),
        (
            ["init_from=checkpoints/emoji"],
            "both init_from and model.towers.text.pretrained are given",
        ),
        (["model.rope_scaling={rope_type: linear}"], "model.rope_scaling is .* but pretrained"),
    ],
)
def test_contradictions_are_refused_by_name(arguments: list[str], words: str, tmp_path: Path) -> None:
    save_language_model(tmp_path, "Llama")
    with pytest.raises(UserError, match=words):
        configured(tmp_path, *arguments)


def test_towers_of_a_snapshot_leave_the_settings_free_that_no_weight_depends_on() -> None:
    snapshot = "checkpoints/emoji"
    towers = [f"model.towers.{name}.pretrained={snapshot}" for name in ("text", "image")]
    free = {"guidance_scale": 2.0, "code_noise_prob": 0.1, "loss_weight": 2.0}
    given = [f"model.modalities.image.{key}={value}" for key, value in free.items()]
    config = settled_config([*towers, "output_dir=nowhere", "model.towers.image.dropout=0.1", *given])
    assert {key: getattr(config.model.modalities["image"], key) for key in free} == free
    assert config.model.towers["image"].dropout == 0.1
    with pytest.raises(UserError, match=r"model.modalities.image.patch_size is 4, but pretrained=checkpoints/emoji"):
        settled_config([*towers, "output_dir=nowhere", "model.modalities.image.patch_size=4"])


def test_a_language_model_is_for_the_tower_of_text(tmp_path: Path) -> None:
    save_language_model(tmp_path, "Llama")
    with pytest.raises(UserError, match=r"is for the tower of text, text; use copy_of=text, or the folder of a snap"):
        settled_config([f"model.towers.image.pretrained={tmp_path}"])


def test_weights_and_tokenizers_that_do_not_fit(tmp_path: Path) -> None:
    save_language_model(tmp_path, "Qwen3", max_shard_size="20KB")
    config = configured(tmp_path)
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.rename(tmp_path / "aside")
    with pytest.raises(UserError, match=rf"lacks {shard.name}, 1 of the \d+ files of weights"):
        begun(config)
    for file in tmp_path.glob("*.safetensors*"):
        file.unlink()
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(UserError, match=r"has no weights: .*\.bin.* are not read"):
        begun(config)
    tokenizer(True, spare=0).save_pretrained(tmp_path)
    edit_config(tmp_path, vocab_size=VOCAB_SIZE - 1)
    with pytest.raises(
        UserError, match=r"has 307 ids, but the language model .* has only 306 rows; give the tokenizer"
    ):
        configured(tmp_path)


def test_rows_beyond_a_window_or_dynamic_scaling_are_refused(
    build: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    for case, limit in (("Mistral, window", 128), ("Llama, dynamic", 256)):
        save_language_model(tmp_path / case, case)
        with pytest.raises(
            UserError, match=rf"a row has up to 3\d\d rotary positions, but its language model supports only {limit}"
        ):
            train.main([*build(tmp_path / case), f"output_dir={tmp_path / 'run'}", "data.slots.text=320"])
