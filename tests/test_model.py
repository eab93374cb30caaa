"""The model against a naive one that routes each token, and the properties of joint attention."""

import json
import math
from dataclasses import replace

import pytest
import torch
from conftest import CHANNELS, DENSE, SIZES, VOCAB_SIZE, Rows, Token, make_rows, randomise, tiny_config, tiny_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from transfusion_mot.config import DiffusionConfig, ModalityConfig, ModelConfig, TowerConfig
from transfusion_mot.errors import UserError
from transfusion_mot.models.adapters import TimestepEmbedder, UNetAdapter, patchify, unpatchify
from transfusion_mot.models.inputs import LatentInput, ModalityInput, Slots, TokenInput
from transfusion_mot.models.layers import RMSNorm
from transfusion_mot.models.modalities import DiffusionModality
from transfusion_mot.models.transfusion import TransfusionMoT, TransfusionOutput, check_model

# Two packed documents, an image that stands first, two images in a document, text alone; padding in each row.
SPEC = [
    [[3, "image", 2], [2, "image", 4]],
    [[2, "image", 1, "image", 2], [3]],
    [[1, "image"]],
]
COUNTS = {"text": 12, "image": 3}


def rows_of(config: ModelConfig, spec=SPEC, seed: int = 0) -> Rows:
    return make_rows(spec, COUNTS, config, grid=(2, 3), seed=seed)


# --- The naive model: one token at a time, in reading order, weights by name. ---


class Naive:
    """Any modalities: tokens, and latents by their adapters."""

    def __init__(self, model: TransfusionMoT) -> None:
        self.model = model
        self.config: ModelConfig = model.architecture
        self.weights = dict(model.named_parameters())

    def weight(self, layer: int, module: str, component: str, token: Token, name: str) -> Tensor:
        tower = self.config.modalities[token.modality].tower
        owner = tower if component in self.config.untied else "shared"
        prefix = "final_norm" if module == "final_norm" else f"blocks.{layer}.{module}"
        return self.weights[f"{prefix}.owned.{owner}.{name}"]

    def bias(self, layer: int, module: str, token: Token, name: str) -> Tensor | float:
        """Zero if there is none."""
        tower = self.config.modalities[token.modality].tower
        owner = tower if module in self.config.untied else "shared"
        return self.weights.get(f"blocks.{layer}.{module}.owned.{owner}.{name}", 0.0)

    def norm(self, vector: Tensor, weight: Tensor, token: Token) -> Tensor:
        mean_square = sum(float(x) ** 2 for x in vector.detach()) / len(vector)
        own = self.config.towers[self.config.modalities[token.modality].tower].norm_eps
        return vector / math.sqrt(mean_square + (self.config.norm_eps if own is None else own)) * weight

    def rotate(self, head: Tensor, position: tuple[int, ...]) -> Tensor:
        half = len(head) // 2
        result = head.clone()
        for j in range(half):
            angle = position[j % len(position)] * self.config.rope_theta ** (-j / half)
            a, b = head[j], head[j + half]
            result[j] = a * math.cos(angle) - b * math.sin(angle)
            result[j + half] = a * math.sin(angle) + b * math.cos(angle)
        return result

    def timestep(self, modality: str, t: float) -> Tensor:
        frequencies = [math.exp(-math.log(10000) * i / 128) for i in range(128)]
        sinusoids = [math.cos(1000 * t * f) for f in frequencies] + [math.sin(1000 * t * f) for f in frequencies]
        one, two = (f"modalities.{modality}.adapter.timestep.mlp.linear_{n}" for n in (1, 2))
        hidden = self.weights[f"{one}.weight"] @ torch.tensor(sinusoids, dtype=torch.float64)
        hidden = hidden + self.weights[f"{one}.bias"]
        return self.weights[f"{two}.weight"] @ (hidden * hidden.sigmoid()) + self.weights[f"{two}.bias"]

    def embed(self, token: Token, given: LatentInput) -> Tensor:
        """Noisy latents => the hidden state of a patch."""
        latents, t = given.latents[token.row, token.item], given.timesteps[token.row, token.item]
        modality = self.model.modality(token.modality)
        if isinstance(modality.adapter, UNetAdapter):
            return modality.adapter.embed(latents[None], t[None])[0][0, token.patch]
        p = self.config.modalities[token.modality].patch_size
        columns = latents.shape[2] // p
        top, left = token.patch // columns * p, token.patch % columns * p
        values = [latents[c, top + dy, left + dx] for dy in range(p) for dx in range(p) for c in range(len(latents))]
        embedded = self.weights[f"modalities.{token.modality}.adapter.input.weight"] @ torch.stack(values)
        bias = self.weights[f"modalities.{token.modality}.adapter.input.bias"]
        return embedded + bias + self.timestep(token.modality, float(t))

    def document(self, tokens: list[Token], inputs: dict[str, ModalityInput]) -> dict[tuple[str, int], Tensor]:
        """=> by modality: logits of each place of tokens, prediction of each item of latents."""
        hidden = []
        for token in tokens:
            given = inputs[token.modality]
            if isinstance(given, TokenInput):
                embedding = self.weights[f"modalities.{token.modality}.embedding.weight"]
                hidden.append(embedding[given.ids[token.row, token.place]])
            else:
                hidden.append(self.embed(token, given))
        heads, kv_heads = self.config.num_heads, self.config.num_kv_heads or self.config.num_heads
        size = self.config.head_dim
        for layer in range(self.config.num_layers):
            queries, keys, values = [], [], []
            for token, vector in zip(tokens, hidden, strict=True):
                normed = self.norm(vector, self.weight(layer, "attention_norm", "norm", token, "weight"), token)
                projected = self.weight(layer, "qkv", "qkv", token, "linear.weight") @ normed
                projected = projected + self.bias(layer, "qkv", token, "linear.bias")
                parts = [projected[i * size : (i + 1) * size] for i in range(heads + 2 * kv_heads)]
                q, k, v = parts[:heads], parts[heads : heads + kv_heads], parts[heads + kv_heads :]
                own = self.config.towers[self.config.modalities[token.modality].tower].qk_norm
                if self.config.qk_norm if own is None else own:
                    q = [self.norm(h, self.weight(layer, "qkv", "qkv", token, "q_norm.weight"), token) for h in q]
                    k = [self.norm(h, self.weight(layer, "qkv", "qkv", token, "k_norm.weight"), token) for h in k]
                turns = layer not in self.config.layers_without_rope
                queries.append([self.rotate(h, token.position) if turns else h for h in q])
                keys.append([self.rotate(h, token.position) if turns else h for h in k])
                values.append(v)
            result = []
            for i, token in enumerate(tokens):
                seen = [
                    j
                    for j, other in enumerate(tokens)
                    if j <= i
                    or (
                        self.config.modalities[token.modality].is_bidirectional
                        and token.item is not None
                        and (token.modality, token.item) == (other.modality, other.item)
                    )
                ]
                attended = []
                for head in range(heads):
                    group = head // (heads // kv_heads)
                    scores = torch.stack([queries[i][head] @ keys[j][group] for j in seen]) / math.sqrt(size)
                    chances = (scores - scores.max()).exp()
                    chances = chances / chances.sum()
                    attended.append(sum(c * values[j][group] for c, j in zip(chances, seen, strict=True)))
                output = self.weight(layer, "output", "output", token, "weight")
                vector = hidden[i] + output @ torch.cat(attended) + self.bias(layer, "output", token, "bias")
                normed = self.norm(vector, self.weight(layer, "ffn_norm", "norm", token, "weight"), token)
                gate = self.weight(layer, "ffn", "ffn", token, "gate.weight") @ normed
                up = self.weight(layer, "ffn", "ffn", token, "up.weight") @ normed
                down = self.weight(layer, "ffn", "ffn", token, "down.weight")
                result.append(vector + down @ (gate / (1 + (-gate).exp()) * up))
            hidden = result
        result, patches = {}, {}
        for token, vector in zip(tokens, hidden, strict=True):
            normed = self.norm(vector, self.weight(0, "final_norm", "norm", token, "weight"), token)
            if token.item is None:
                matrix = "embedding" if self.config.modalities[token.modality].tied_embeddings else "head"
                logits = self.weights[f"modalities.{token.modality}.{matrix}.weight"] @ normed
                result[token.modality, token.place] = logits
            else:
                patches.setdefault((token.modality, token.item), []).append(normed)
        row = tokens[0].row
        return result | {key: self.paint(*key, row, vectors, inputs) for key, vectors in patches.items()}

    def paint(self, modality: str, item: int, row: int, vectors: list[Tensor], inputs) -> Tensor:
        """Hidden states of all patches of an item => its prediction."""
        given, adapter = inputs[modality], self.model.modality(modality).adapter
        channels, height, width = given.latents.shape[-3:]
        if isinstance(adapter, UNetAdapter):
            _, kept = adapter.embed(given.latents[row, item][None], given.timesteps[row, item][None])
            return adapter.predict(torch.stack(vectors)[None], kept, height, width)[0]
        p = self.config.modalities[modality].patch_size
        painted = torch.zeros(channels, height, width, dtype=torch.float64)
        for patch, vector in enumerate(vectors):
            values = self.weights[f"modalities.{modality}.adapter.output.weight"] @ vector
            values = values + self.weights[f"modalities.{modality}.adapter.output.bias"]
            top, left = patch // (width // p) * p, patch % (width // p) * p
            for dy in range(p):
                for dx in range(p):
                    for c in range(channels):
                        painted[c, top + dy, left + dx] = values[(dy * p + dx) * channels + c]
        return painted


@torch.no_grad()
def compare_with_naive(model: TransfusionMoT, rows: Rows) -> int:
    """Every prediction of a model with the naive one's => their number."""
    predictions = model(rows.inputs, rows.slots).predictions
    compared = 0
    for tokens in rows.documents:
        for (modality, place), expected in Naive(model).document(tokens, rows.inputs).items():
            found = predictions[modality][tokens[0].row, place]
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
            assert expected.abs().max() > 0.1, "a prediction of zeros would prove nothing"
            compared += 1
    return compared


VARIANTS = {
    "mot": {},
    "dense": DENSE,
    "untied ffn": {"untied": ["ffn"]},
    "untied qkv": {"untied": ["qkv"]},
    "untied output": {"untied": ["output"]},
    "untied norm": {"untied": ["norm"]},
    "untied attention": {"untied": ["qkv", "output"]},
    "grouped": {"num_heads": 4, "num_kv_heads": 2},
    "no qk norm": {"qk_norm": False},
    "3d": {"rope": "3d"},
    "causal image": {"image": {"attention": "causal"}},
    "patch 1": {"image": {"patch_size": 1}},
    "towers of two widths": {"towers": {"text": TowerConfig(16, 24), "image": TowerConfig(24, 40)}},
    "towers of two kinds": {
        "towers": {
            "text": TowerConfig(16, 24, norm_eps=0.1, qk_norm=False, qkv_bias=True),
            "image": TowerConfig(24, 40, output_bias=True),
        }
    },
    "all norms and biases": {
        "towers": {name: TowerConfig(16, 24, qkv_bias=True, output_bias=True) for name in ("text", "image")},
        "untied": ["norm", "ffn"],
    },
    "tied embeddings": {
        "modalities": {
            "text": ModalityConfig("text", tied_embeddings=True),
            "image": ModalityConfig("image", "diffusion"),
        }
    },
    "a layer without rope": {"layers_without_rope": [1], "num_layers": 2},
    "unet": {"image": {"adapter": "unet", "unet_channels": [32, 32], "unet_num_layers": 1}},
    "unet dense 3d": {**DENSE, "image": {"adapter": "unet", "unet_channels": [32, 64]}, "rope": "3d"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_streams_equal_a_naive_model(variant: str) -> None:
    config = tiny_config(**VARIANTS[variant])
    assert compare_with_naive(tiny_model(config), rows_of(config)) == 25


def tied_copy(mot: TransfusionMoT, dense: TransfusionMoT) -> None:
    """Give both towers of `mot` the weights of the one of `dense`."""
    weights = dense.state_dict()
    mot.load_state_dict(
        {
            name: weights[name.replace(".owned.text.", ".owned.shared.").replace(".owned.image.", ".owned.shared.")]
            for name in mot.state_dict()
        }
    )


@pytest.mark.parametrize("adapter", ["linear", "unet"])
def test_tied_towers_equal_the_dense_model(adapter: str) -> None:
    image = {"adapter": adapter, "unet_channels": [32, 32], "unet_num_layers": 1}
    dense, mot = tiny_model(tiny_config(**DENSE, image=image)), tiny_model(tiny_config(image=image))
    tied_copy(mot, dense)
    rows = rows_of(dense.architecture)
    one, two = (model(rows.inputs, rows.slots).predictions for model in (dense, mot))
    for name, prediction in one.items():
        torch.testing.assert_close(prediction, two[name], rtol=1e-10, atol=1e-10)
    randomise(mot, seed=2)
    assert not torch.allclose(one["text"], mot(rows.inputs, rows.slots).predictions["text"])


@pytest.mark.parametrize("rope", ["1d", "3d"])
@torch.no_grad()
def test_packed_documents_equal_each_alone(rope: str) -> None:
    config = tiny_config(rope=rope)
    model = tiny_model(config)
    packed = rows_of(config, [[[3, "image", 2], [2, "image", 4]]])
    together = model(packed.inputs, packed.slots).predictions
    first_text, first_image = 0, 0
    for tokens in packed.documents:
        texts, images = sum(t.item is None for t in tokens), 1
        alone = rows_of(config, [[[3, "image", 2]] if first_text == 0 else [[2, "image", 4]]])
        pairs = [(alone.inputs["text"].ids, packed.inputs["text"].ids, texts, first_text)]
        pairs += [
            (one, other, images, first_image)
            for one, other in zip(alone.inputs["image"][:2], packed.inputs["image"][:2], strict=True)
        ]
        for one, other, count, first in pairs:
            one[0, :count] = other[0, first : first + count]
        predictions = model(alone.inputs, alone.slots).predictions
        for name, count, first in (("text", texts, first_text), ("image", images, first_image)):
            torch.testing.assert_close(
                together[name][0, first : first + count], predictions[name][0, :count], rtol=1e-9, atol=1e-9
            )
        first_text, first_image = first_text + texts, first_image + images


def changed(one: TransfusionOutput, two: TransfusionOutput, rows: Rows, config: ModelConfig) -> dict[Token, bool]:
    """Which tokens' outputs differ at all."""
    pairs = {}
    for name, modality in config.modalities.items():
        pairs[name] = one.predictions[name], two.predictions[name]
        if modality.objective == "diffusion":
            pairs[name] = tuple(
                torch.stack([patchify(images, modality.patch_size) for images in predictions]).flatten(1, 2)
                for predictions in pairs[name]
            )
    return {
        token: not torch.equal(*(predictions[token.row, token.place] for predictions in pairs[token.modality]))
        for token in (token for tokens in rows.documents for token in tokens)
    }


@torch.no_grad()
def check_reach(model: TransfusionMoT, rows: Rows) -> None:
    """A change of each token and patch reaches what may see it, and nothing else."""
    config = model.architecture
    before = model(rows.inputs, rows.slots)
    for tokens in rows.documents:
        for place, token in enumerate(tokens):
            given, modality = rows.inputs[token.modality], config.modalities[token.modality]
            here = token.row, token.place
            if isinstance(given, TokenInput):
                ids = given.ids.clone()
                ids[here] = (ids[here] + 1) % model.modality(token.modality).vocab_size
                other_input: ModalityInput = TokenInput(ids)
            else:
                latents = given.latents.clone()
                height, width = latents.shape[-2:]
                patches = patchify(latents[token.row], modality.patch_size)
                patches[token.item, token.patch] += 1
                latents[token.row] = unpatchify(patches, modality.patch_size, height, width)
                other_input = given._replace(latents=latents)
            after = model({**rows.inputs, token.modality: other_input}, rows.slots)
            for other, differs in changed(before, after, rows, config).items():
                later = other in tokens and tokens.index(other) >= place
                together = (
                    modality.is_bidirectional
                    and token.item is not None
                    and (other.row, other.modality, other.item) == (token.row, token.modality, token.item)
                )
                assert differs == (later or together), (token, other)


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_a_change_reaches_exactly_what_may_see_it(attention: str) -> None:
    config = tiny_config(image={"attention": attention})
    check_reach(tiny_model(config), rows_of(config, [[[3, "image", 2, "image", 1], [2, "image", 2]]]))


def grads(model: TransfusionMoT, part: str) -> list[Tensor]:
    return [p.grad for name, p in model.named_parameters() if part in name and p.grad is not None]


@pytest.mark.parametrize("with_slots", [True, False])
def test_a_modality_that_is_absent_gets_exactly_zero_gradient(with_slots: bool) -> None:
    config = tiny_config()
    model = tiny_model(config)
    rows = rows_of(config, [[[5], [4]], [[7]]])
    inputs, slots = rows.inputs, rows.slots
    if not with_slots:
        inputs = {"text": inputs["text"]}
        slots = Slots(*(ids[:, :12] for ids in slots))
    predictions = model(inputs, slots).predictions
    predictions["text"][slots.document_ids[:, :12] >= 0].square().sum().backward()
    if with_slots:
        # As in training: the image loss is taken of real images alone.
        assert predictions["image"].isfinite().all()
    else:
        assert "image" not in predictions
    for gradient in grads(model, ".owned.image.") + grads(model, "modalities.image."):
        assert (gradient == 0).all()
    assert len(grads(model, ".owned.text.")) > 10
    assert all((gradient != 0).any() for gradient in grads(model, ".owned.text."))

    model.zero_grad()
    rows = rows_of(config, [[["image"], ["image"]], [["image"]]])
    model(rows.inputs, rows.slots).predictions["image"][0, :2].square().sum().backward()
    for gradient in grads(model, ".owned.text.") + grads(model, "modalities.text."):
        assert (gradient == 0).all()
    assert all((gradient != 0).any() for gradient in grads(model, ".owned.image."))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_padding_never_gives_nan(dtype: torch.dtype) -> None:
    config = tiny_config()
    model = tiny_model(config, dtype=dtype)
    # A row of nothing but padding, a row without text, a row without image.
    rows = make_rows([[], [["image"]], [[4]]], {"text": 6, "image": 2}, dtype=dtype)
    predictions = model(rows.inputs, rows.slots).predictions
    sum(prediction.float().sum() for prediction in predictions.values()).backward()
    assert all(prediction.isfinite().all() for prediction in predictions.values())
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_autocast_keeps_the_output_close() -> None:
    config = tiny_config()
    model = tiny_model(config, dtype=torch.float32)
    rows = make_rows(SPEC, COUNTS, grid=(2, 3), dtype=torch.float32)
    wide = model(rows.inputs, rows.slots).predictions
    with torch.autocast("cpu", torch.bfloat16):
        narrow = model(rows.inputs, rows.slots).predictions
    for one, two in zip(wide.values(), narrow.values(), strict=True):
        assert (one - two.float()).square().mean() < 1e-3 * one.square().mean()
        assert not torch.equal(one, two.float())


@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_patches_are_squares_of_the_latents(patch_size: int) -> None:
    latents = torch.randn(2, CHANNELS, 8, 4)
    patches = patchify(latents, patch_size)
    columns = 4 // patch_size
    assert patches.shape == (2, 32 // patch_size**2, patch_size**2 * CHANNELS)
    for patch in range(patches.shape[1]):
        y, x = patch // columns * patch_size, patch % columns * patch_size
        square = latents[:, :, y : y + patch_size, x : x + patch_size]
        assert torch.equal(patches[:, patch], square.permute(0, 2, 3, 1).flatten(1))
    assert torch.equal(unpatchify(patches, patch_size, 8, 4), latents)


def test_timestep_embedding_over_the_whole_range() -> None:
    model = tiny_model(tiny_config())
    embedder: TimestepEmbedder = model.modality("image").adapter.timestep
    for t in (0.0, 0.125, 0.5, 0.999, 1.0):
        with torch.no_grad():
            expected = Naive(model).timestep("image", t)
            torch.testing.assert_close(
                embedder(torch.tensor([t], dtype=torch.float64))[0], expected, rtol=1e-3, atol=1e-3
            )


def test_norm_is_computed_in_float32_and_keeps_the_format() -> None:
    norm = RMSNorm(64, 1e-5)
    hidden = 100 + torch.randn(3, 64)
    narrow = norm(hidden.bfloat16())
    assert narrow.dtype == torch.bfloat16
    expected = hidden.bfloat16().double()
    expected = expected / (expected.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(narrow, expected.bfloat16(), rtol=0, atol=2**-8)


def test_fresh_model_predicts_the_mean_image_and_nearly_uniform_text() -> None:
    torch.manual_seed(0)
    model = TransfusionMoT.from_sections(SIZES, tiny_config(num_layers=8), DiffusionConfig())
    rows = make_rows(SPEC, COUNTS, grid=(2, 3), dtype=torch.float32)
    predictions = model(rows.inputs, rows.slots).predictions
    assert (predictions["image"] == 0).all()
    assert (predictions["text"].softmax(-1) * VOCAB_SIZE - 1).abs().max() < 0.5
    for part, expected in (("qkv", 0.02), ("gate", 0.02), ("output.owned", 0.005), ("down", 0.005)):
        weights = [p.flatten() for n, p in model.blocks.named_parameters() if part in n and p.ndim == 2]
        assert torch.cat(weights).std().item() == pytest.approx(expected, rel=0.05), part


# --- Saving and loading. ---


@pytest.mark.parametrize("variant", ["mot", "unet", "untied ffn"])
def test_saved_model_comes_back(tmp_path, variant: str) -> None:
    config = tiny_config(**VARIANTS[variant], num_kv_heads=1)
    diffusion = DiffusionConfig(timestep_distribution="logit_normal", min_snr_gamma=5.0)
    model = tiny_model(config, diffusion=diffusion, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    again = TransfusionMoT.from_pretrained(tmp_path)
    assert again.architecture == config
    modality = again.modality("image")
    assert isinstance(modality, DiffusionModality)
    assert (modality.diffusion.timestep_distribution, modality.diffusion.min_snr_gamma) == ("logit_normal", 5.0)
    assert {n: tuple(p.shape) for n, p in again.named_parameters()} == {
        n: tuple(p.shape) for n, p in model.named_parameters()
    }
    rows = make_rows(SPEC, COUNTS, grid=(2, 3), dtype=torch.float32)
    for name, prediction in model(rows.inputs, rows.slots).predictions.items():
        assert torch.equal(again(rows.inputs, rows.slots).predictions[name], prediction)


def rewritten(folder, change) -> None:
    file = folder / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


def test_missing_and_unexpected_weights_are_refused_by_name(tmp_path) -> None:
    model = tiny_model(tiny_config(), dtype=torch.float32)
    model.save_pretrained(tmp_path)
    rewritten(tmp_path, lambda weights: weights.pop("modalities.text.head.weight"))
    with pytest.raises(UserError, match=r"modalities\.text\.head\.weight"):
        TransfusionMoT.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    rewritten(tmp_path, lambda weights: weights.update(other_head=torch.zeros(3)))
    with pytest.raises(UserError, match="other_head"):
        TransfusionMoT.from_pretrained(tmp_path)


def test_weights_of_another_shape_are_refused(tmp_path) -> None:
    model = tiny_model(tiny_config(), dtype=torch.float32)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"sizes": SIZES | {"text": VOCAB_SIZE + 1}}))
    with pytest.raises(UserError, match=r"modalities\.text\.(embedding|head)\.weight"):
        TransfusionMoT.from_pretrained(tmp_path)


# --- Sizes that do not go together. ---

TEXT, IMAGE = ModalityConfig("text"), ModalityConfig("image", "diffusion")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modalities": {"text": TEXT, "image": ModalityConfig("picture")}}, r"image.*'picture'.*text, image"),
        ({"modalities": {"image": ModalityConfig("image"), "speech": TEXT}}, "image, speech.*'text'"),
        ({"modalities": {"text": ModalityConfig("text", "diffusion"), "image": IMAGE}}, "'text' with.*next_token"),
        ({"modalities": {"text": TEXT, "image": TEXT}}, "image.*no modality with a loss uses"),
        ({"modalities": {"text": TEXT, "image": ModalityConfig("image", attention="bidirectional")}}, "set attention"),
        *(
            ({"modalities": {"text": TEXT, "image": IMAGE, name: TEXT}}, f"name '{name}'")
            for name in ("", "a.b", "keys")
        ),
        ({"towers": {"text": TowerConfig(16, 24), "image": TowerConfig(32, 24)}, "untied": ["ffn"]}, "hidden_size"),
        (
            {
                "towers": {"text": TowerConfig(16, 24), "image": TowerConfig(32, 24)},
                "untied": ["norm", "qkv", "output", "output"],
            },
            "hidden_size",
        ),
        (
            {"towers": {"text": TowerConfig(16, 24), "image": TowerConfig(16, 32)}, "untied": ["qkv"]},
            "intermediate_size",
        ),
        ({"head_dim": 7}, "head_dim is 7"),
        ({"rope_scaling": {"rope_type": "su"}}, "rope_type must be one of default, linear, dynamic, llama3, yarn"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "which transformers cannot read"),
        ({"num_heads": 3, "num_kv_heads": 2}, "num_heads 3"),
        ({"image": {"patch_size": 3}}, "image.patch_size is 3"),
        ({"image": {"adapter": "unet", "unet_channels": [32]}}, "at least 2"),
        ({"image": {"adapter": "unet", "unet_channels": [32, 40]}}, "multiple of 32"),
        ({"image": {"adapter": "unet", "unet_channels": [0, 32]}}, "multiple of 32"),
        *(
            ({"towers": {name: TowerConfig(16, 24)}, "modalities": {"text": ModalityConfig(name)}}, f"name '{name}'")
            for name in ("", "a.b", "keys")
        ),
    ],
)
def test_sizes_that_do_not_go_together_are_refused(changes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_model(tiny_config(**changes))


def test_good_sizes_are_accepted() -> None:
    for changes in VARIANTS.values():
        check_model(tiny_config(**changes))
    check_model(replace(tiny_config(), num_kv_heads=1))
