"""The model against a naive one that routes token by token, and the properties that joint attention must have."""

import json
import math
from dataclasses import replace

import pytest
import torch
from conftest import CHANNELS, DENSE, VOCAB_SIZE, Rows, Token, make_rows, randomise, tiny_config, tiny_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from transfusion_mot.config import ModelConfig, TowerConfig
from transfusion_mot.errors import UserError
from transfusion_mot.models.adapters import LinearAdapter, TimestepEmbedder, UNetAdapter, patchify, unpatchify
from transfusion_mot.models.layers import RMSNorm
from transfusion_mot.models.mot import check_architecture
from transfusion_mot.models.transfusion import TransfusionMoT, TransfusionOutput

# Two packed documents, an image that stands first, two images in a document, text alone; padding in each row.
SPEC = [
    [[3, "image", 2], [2, "image", 4]],
    [[2, "image", 1, "image", 2], [3]],
    [[1, "image"]],
]


def rows_of(config: ModelConfig, spec=SPEC, seed: int = 0) -> Rows:
    return make_rows(spec, 12, 3, (2, 3), config.patch_size, config.rope, seed)


# --- The naive model: one token at a time, in reading order, weights by name. ---


class Naive:
    def __init__(self, model: TransfusionMoT) -> None:
        self.model = model
        self.config: ModelConfig = model.architecture
        self.weights = dict(model.named_parameters())

    def weight(self, layer: int, module: str, component: str, token: Token, name: str) -> Tensor:
        tower = self.config.modalities["text" if token.image is None else "image"]
        owner = tower if component in self.config.untied else "shared"
        prefix = "final_norm" if module == "final_norm" else f"blocks.{layer}.{module}"
        return self.weights[f"{prefix}.owned.{owner}.{name}"]

    def norm(self, vector: Tensor, weight: Tensor) -> Tensor:
        mean_square = sum(float(x) ** 2 for x in vector.detach()) / len(vector)
        return vector / math.sqrt(mean_square + self.config.norm_eps) * weight

    def rotate(self, head: Tensor, position: tuple[int, ...]) -> Tensor:
        half = len(head) // 2
        result = head.clone()
        for j in range(half):
            angle = position[j % len(position)] * self.config.rope_theta ** (-j / half)
            a, b = head[j], head[j + half]
            result[j] = a * math.cos(angle) - b * math.sin(angle)
            result[j + half] = a * math.sin(angle) + b * math.cos(angle)
        return result

    def timestep(self, t: float) -> Tensor:
        frequencies = [math.exp(-math.log(10000) * i / 128) for i in range(128)]
        sinusoids = [math.cos(1000 * t * f) for f in frequencies] + [math.sin(1000 * t * f) for f in frequencies]
        one, two = (f"image_adapter.timestep.mlp.linear_{n}" for n in (1, 2))
        hidden = self.weights[f"{one}.weight"] @ torch.tensor(sinusoids, dtype=torch.float64)
        hidden = hidden + self.weights[f"{one}.bias"]
        return self.weights[f"{two}.weight"] @ (hidden * hidden.sigmoid()) + self.weights[f"{two}.bias"]

    def document(self, tokens: list[Token], inputs: dict[str, Tensor]) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """=> (logits by text slot, prediction by image)."""
        hidden, kept = [], {}
        p = self.config.patch_size
        for token in tokens:
            if token.image is None:
                hidden.append(self.weights["token_embedding.weight"][inputs["text_ids"][token.row, token.slot]])
                continue
            latents = inputs["noisy_latents"][token.row, token.image]
            t = inputs["timesteps"][token.row, token.image]
            if isinstance(self.model.image_adapter, LinearAdapter):
                columns = latents.shape[2] // p
                top, left = token.patch // columns * p, token.patch % columns * p
                values = torch.stack(
                    [latents[c, top + dy, left + dx] for dy in range(p) for dx in range(p) for c in range(CHANNELS)]
                )
                embedded = self.weights["image_adapter.input.weight"] @ values
                hidden.append(embedded + self.weights["image_adapter.input.bias"] + self.timestep(float(t)))
            else:
                embedded, kept[token.image] = self.model.image_adapter.embed(latents[None], t[None])
                hidden.append(embedded[0, token.patch])
        heads, kv_heads = self.config.num_heads, self.config.num_kv_heads or self.config.num_heads
        size = self.config.head_dim
        for layer in range(self.config.num_layers):
            queries, keys, values = [], [], []
            for token, vector in zip(tokens, hidden, strict=True):
                normed = self.norm(vector, self.weight(layer, "attention_norm", "norm", token, "weight"))
                projected = self.weight(layer, "qkv", "qkv", token, "linear.weight") @ normed
                parts = [projected[i * size : (i + 1) * size] for i in range(heads + 2 * kv_heads)]
                q, k, v = parts[:heads], parts[heads : heads + kv_heads], parts[heads + kv_heads :]
                if self.config.qk_norm:
                    q = [self.norm(h, self.weight(layer, "qkv", "qkv", token, "q_norm.weight")) for h in q]
                    k = [self.norm(h, self.weight(layer, "qkv", "qkv", token, "k_norm.weight")) for h in k]
                queries.append([self.rotate(h, token.position) for h in q])
                keys.append([self.rotate(h, token.position) for h in k])
                values.append(v)
            result = []
            for i, token in enumerate(tokens):
                seen = [
                    j
                    for j, other in enumerate(tokens)
                    if j <= i
                    or (
                        self.config.image_attention == "bidirectional"
                        and token.image is not None
                        and token.image == other.image
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
                vector = hidden[i] + output @ torch.cat(attended)
                normed = self.norm(vector, self.weight(layer, "ffn_norm", "norm", token, "weight"))
                gate = self.weight(layer, "ffn", "ffn", token, "gate.weight") @ normed
                up = self.weight(layer, "ffn", "ffn", token, "up.weight") @ normed
                down = self.weight(layer, "ffn", "ffn", token, "down.weight")
                result.append(vector + down @ (gate / (1 + (-gate).exp()) * up))
            hidden = result
        logits, patches = {}, {}
        for token, vector in zip(tokens, hidden, strict=True):
            normed = self.norm(vector, self.weight(0, "final_norm", "norm", token, "weight"))
            if token.image is None:
                logits[token.slot] = self.weights["text_head.weight"] @ normed
            else:
                patches.setdefault(token.image, []).append(normed)
        return logits, {image: self.paint(vectors, kept.get(image), inputs) for image, vectors in patches.items()}

    def paint(self, vectors: list[Tensor], kept, inputs: dict[str, Tensor]) -> Tensor:
        height, width = inputs["noisy_latents"].shape[-2:]
        if isinstance(self.model.image_adapter, UNetAdapter):
            return self.model.image_adapter.predict(torch.stack(vectors)[None], kept, height, width)[0]
        p = self.config.patch_size
        painted = torch.zeros(CHANNELS, height, width, dtype=torch.float64)
        for patch, vector in enumerate(vectors):
            values = self.weights["image_adapter.output.weight"] @ vector + self.weights["image_adapter.output.bias"]
            top, left = patch // (width // p) * p, patch % (width // p) * p
            for dy in range(p):
                for dx in range(p):
                    for c in range(CHANNELS):
                        painted[c, top + dy, left + dx] = values[(dy * p + dx) * CHANNELS + c]
        return painted


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
    "causal image": {"image_attention": "causal"},
    "patch 1": {"patch_size": 1},
    "towers of two widths": {"towers": {"text": TowerConfig(16, 24), "image": TowerConfig(24, 40)}},
    "unet": {"image_adapter": "unet", "unet_channels": [32, 32], "unet_num_layers": 1},
    "unet dense 3d": {**DENSE, "image_adapter": "unet", "unet_channels": [32, 64], "rope": "3d"},
}


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_streams_equal_a_naive_model(variant: str) -> None:
    config = tiny_config(**VARIANTS[variant])
    model = tiny_model(config)
    rows = rows_of(config)
    output = model(**rows.inputs)
    naive = Naive(model)
    compared = 0
    for tokens in rows.documents:
        logits, predictions = naive.document(tokens, rows.inputs)
        row = tokens[0].row
        for slot, expected in logits.items():
            torch.testing.assert_close(output.logits[row, slot], expected, rtol=1e-5, atol=1e-5)
        for image, expected in predictions.items():
            torch.testing.assert_close(output.prediction[row, image], expected, rtol=1e-5, atol=1e-5)
            assert expected.abs().max() > 0.1, "a prediction of zeros would prove nothing"
        compared += len(logits) + len(predictions)
    assert compared == 25


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
    changes = {"image_adapter": adapter, "unet_channels": [32, 32], "unet_num_layers": 1}
    dense, mot = tiny_model(tiny_config(**DENSE, **changes)), tiny_model(tiny_config(**changes))
    tied_copy(mot, dense)
    inputs = rows_of(dense.architecture).inputs
    one, two = dense(**inputs), mot(**inputs)
    torch.testing.assert_close(one.logits, two.logits, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(one.prediction, two.prediction, rtol=1e-10, atol=1e-10)
    randomise(mot, seed=2)
    assert not torch.allclose(one.logits, mot(**inputs).logits)


@pytest.mark.parametrize("rope", ["1d", "3d"])
@torch.no_grad()
def test_packed_documents_equal_each_alone(rope: str) -> None:
    config = tiny_config(rope=rope)
    model = tiny_model(config)
    packed = rows_of(config, [[[3, "image", 2], [2, "image", 4]]])
    together = model(**packed.inputs)
    first_text, first_image = 0, 0
    for tokens in packed.documents:
        texts, images = sum(t.image is None for t in tokens), 1
        alone = rows_of(config, [[[3, "image", 2]] if first_text == 0 else [[2, "image", 4]]])
        alone.inputs["text_ids"][0, :texts] = packed.inputs["text_ids"][0, first_text : first_text + texts]
        for name in ("noisy_latents", "timesteps"):
            alone.inputs[name][0, :images] = packed.inputs[name][0, first_image : first_image + images]
        output = model(**alone.inputs)
        torch.testing.assert_close(
            together.logits[0, first_text : first_text + texts], output.logits[0, :texts], rtol=1e-9, atol=1e-9
        )
        torch.testing.assert_close(together.prediction[0, first_image], output.prediction[0, 0], rtol=1e-9, atol=1e-9)
        first_text, first_image = first_text + texts, first_image + images


def changed(one: TransfusionOutput, two: TransfusionOutput, rows: Rows, patch_size: int) -> dict[Token, bool]:
    """Which tokens' outputs differ at all."""
    prediction = [torch.stack([patchify(image, patch_size) for image in output.prediction]) for output in (one, two)]
    result = {}
    for token in (token for tokens in rows.documents for token in tokens):
        if token.image is None:
            pair = [output.logits[token.row, token.slot] for output in (one, two)]
        else:
            pair = [patches[token.row, token.image, token.patch] for patches in prediction]
        result[token] = not torch.equal(*pair)
    return result


@pytest.mark.parametrize("image_attention", ["bidirectional", "causal"])
@torch.no_grad()
def test_a_change_reaches_exactly_what_may_see_it(image_attention: str) -> None:
    config = tiny_config(image_attention=image_attention)
    model = tiny_model(config)
    rows = rows_of(config, [[[3, "image", 2, "image", 1], [2, "image", 2]]])
    before = model(**rows.inputs)
    for tokens in rows.documents:
        for place, token in enumerate(tokens):
            inputs = {name: value.clone() for name, value in rows.inputs.items()}
            if token.image is None:
                inputs["text_ids"][0, token.slot] = (inputs["text_ids"][0, token.slot] + 1) % VOCAB_SIZE
            else:
                patches = patchify(inputs["noisy_latents"][0], 2)
                patches[token.image, token.patch] += 1
                inputs["noisy_latents"][0] = unpatchify(patches, 2, 4, 6)
            reached = changed(before, model(**inputs), rows, 2)
            for other, differs in reached.items():
                later = other in tokens and tokens.index(other) >= place
                together = image_attention == "bidirectional" and token.image is not None and other.image == token.image
                assert differs == (later or together), (token, other)


def grads(model: TransfusionMoT, part: str) -> list[Tensor]:
    return [p.grad for name, p in model.named_parameters() if part in name and p.grad is not None]


@pytest.mark.parametrize("with_slots", [True, False])
def test_a_modality_that_is_absent_gets_exactly_zero_gradient(with_slots: bool) -> None:
    config = tiny_config()
    model = tiny_model(config)
    inputs = rows_of(config, [[[5], [4]], [[7]]]).inputs
    if not with_slots:
        inputs |= {"noisy_latents": None, "timesteps": None}
        inputs |= {name: inputs[name][:, :12] for name in ("document_ids", "order", "span_ids", "rope_positions")}
    output = model(**inputs)
    text = inputs["document_ids"][:, :12] >= 0
    output.logits[text].square().sum().backward()
    if with_slots:
        # As in training: the image loss is taken of real images alone.
        assert output.prediction.isfinite().all()
    else:
        assert output.prediction is None
    for gradient in grads(model, ".owned.image.") + grads(model, "image_adapter"):
        assert (gradient == 0).all()
    assert len(grads(model, ".owned.text.")) > 10
    assert all((gradient != 0).any() for gradient in grads(model, ".owned.text."))

    model.zero_grad()
    inputs = rows_of(config, [[["image"], ["image"]], [["image"]]]).inputs
    output = model(**inputs)
    output.prediction[0, :2].square().sum().backward()
    for gradient in grads(model, ".owned.text.") + grads(model, "text_head") + grads(model, "token_embedding"):
        assert (gradient == 0).all()
    assert all((gradient != 0).any() for gradient in grads(model, ".owned.image."))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_padding_never_gives_nan(dtype: torch.dtype) -> None:
    config = tiny_config()
    model = tiny_model(config, dtype=dtype)
    # A row of nothing but padding, a row without text, a row without image.
    rows = make_rows([[], [["image"]], [[4]]], 6, 2, (2, 2), dtype=dtype)
    output = model(**rows.inputs)
    (output.logits.float().sum() + output.prediction.float().sum()).backward()
    assert output.logits.isfinite().all()
    assert output.prediction.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_autocast_keeps_the_output_close() -> None:
    config = tiny_config()
    model = tiny_model(config, dtype=torch.float32)
    inputs = make_rows(SPEC, 12, 3, (2, 3), dtype=torch.float32).inputs
    wide = model(**inputs)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = model(**inputs)
    for one, two in zip(wide[:2], narrow[:2], strict=True):
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
    embedder: TimestepEmbedder = model.image_adapter.timestep
    for t in (0.0, 0.125, 0.5, 0.999, 1.0):
        with torch.no_grad():
            expected = Naive(model).timestep(t)
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
    model = TransfusionMoT.from_config_section(VOCAB_SIZE, CHANNELS, tiny_config(num_layers=8))
    inputs = make_rows(SPEC, 12, 3, (2, 3), dtype=torch.float32).inputs
    output = model(**inputs)
    assert (output.prediction == 0).all()
    assert (output.logits.softmax(-1) * VOCAB_SIZE - 1).abs().max() < 0.5
    for part, expected in (("qkv", 0.02), ("gate", 0.02), ("output.owned", 0.005), ("down", 0.005)):
        weights = [p.flatten() for n, p in model.blocks.named_parameters() if part in n and p.ndim == 2]
        assert torch.cat(weights).std().item() == pytest.approx(expected, rel=0.05), part


# --- Saving and loading. ---


@pytest.mark.parametrize("variant", ["mot", "unet", "untied ffn"])
def test_saved_model_comes_back(tmp_path, variant: str) -> None:
    config = tiny_config(**VARIANTS[variant], num_kv_heads=1)
    model = tiny_model(config, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    again = TransfusionMoT.from_pretrained(tmp_path)
    assert again.architecture == config
    assert {n: tuple(p.shape) for n, p in again.named_parameters()} == {
        n: tuple(p.shape) for n, p in model.named_parameters()
    }
    inputs = make_rows(SPEC, 12, 3, (2, 3), dtype=torch.float32).inputs
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    assert torch.equal(again(**inputs).prediction, model(**inputs).prediction)


def rewritten(folder, change) -> None:
    file = folder / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


def test_missing_and_unexpected_weights_are_refused_by_name(tmp_path) -> None:
    model = tiny_model(tiny_config(), dtype=torch.float32)
    model.save_pretrained(tmp_path)
    rewritten(tmp_path, lambda weights: weights.pop("text_head.weight"))
    with pytest.raises(UserError, match=r"text_head\.weight"):
        TransfusionMoT.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    rewritten(tmp_path, lambda weights: weights.update(other_head=torch.zeros(3)))
    with pytest.raises(UserError, match="other_head"):
        TransfusionMoT.from_pretrained(tmp_path)


def test_weights_of_another_shape_are_refused(tmp_path) -> None:
    model = tiny_model(tiny_config(), dtype=torch.float32)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": VOCAB_SIZE + 1}))
    with pytest.raises(UserError, match=r"(token_embedding|text_head)\.weight"):
        TransfusionMoT.from_pretrained(tmp_path)


# --- Sizes that do not go together. ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modalities": {"text": "text", "image": "picture"}}, r"'image'.*'picture'.*text, image"),
        ({"modalities": {"text": "text"}}, "'image'"),
        ({"modalities": {"text": "text", "image": "image", "speech": "text"}}, "speech"),
        ({"modalities": {"text": "text", "image": "text"}}, "image.*no modality uses"),
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
        ({"num_heads": 3, "num_kv_heads": 2}, "num_heads 3"),
        ({"patch_size": 3}, "patch_size is 3"),
        ({"image_adapter": "unet", "unet_channels": [32]}, "at least 2"),
        ({"image_adapter": "unet", "unet_channels": [32, 40]}, "multiple of 32"),
        ({"image_adapter": "unet", "unet_channels": [0, 32]}, "multiple of 32"),
        *(
            ({"towers": {name: TowerConfig(16, 24)}, "modalities": {"text": name, "image": name}}, f"named '{name}'")
            for name in ("", "a.b", "keys")
        ),
    ],
)
def test_sizes_that_do_not_go_together_are_refused(changes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_architecture(tiny_config(**changes))


def test_good_sizes_are_accepted() -> None:
    for changes in VARIANTS.values():
        check_architecture(tiny_config(**changes))
    check_architecture(replace(tiny_config(), num_kv_heads=1))
