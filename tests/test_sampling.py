"""Sampling with a cache against full forwards over the document as training lays it out."""

import copy
import math

import pytest
import torch
from torch import nn

from transfusion_mot.config import ModelConfig, TowerConfig, to_dict
from transfusion_mot.data.tokenizer import TextTokenizer, train_tokenizer
from transfusion_mot.errors import UserError
from transfusion_mot.models.transfusion import TransfusionMoT
from transfusion_mot.sampling.images import read_prompts
from transfusion_mot.sampling.slots import random_rows
from transfusion_mot.sampling.text import Decoding, caption_latents, choose_tokens, complete

CPU = torch.device("cpu")
LATENT_SIZE = 4
LATENT_CHANNELS = 3
PROMPTS = ["an octopus that holds a red apple", "sun", ""]

ARCHITECTURES = {
    "mot 3d": {},
    "mot 1d gqa": {"rope": "1d", "num_kv_heads": 2},
    "dense 3d": {"towers": {"all": TowerConfig(32, 48)}, "modalities": {"text": "all", "image": "all"}},
    "mot unet": {"image_adapter": "unet", "unet_channels": [32, 32], "unet_num_layers": 1},
    "dense 1d unet gqa": {
        "towers": {"all": TowerConfig(32, 48)},
        "modalities": {"text": "all", "image": "all"},
        "rope": "1d",
        "num_kv_heads": 1,
        "image_adapter": "unet",
        "unet_channels": [32, 32],
        "unet_num_layers": 1,
    },
    "mot causal": {"image_attention": "causal"},
}


def tiny_tokenizer() -> TextTokenizer:
    return train_tokenizer(["a red apple", "an octopus", "sun"], vocab_size=280)


def tiny_model(vocab_size: int, latent_channels: int = LATENT_CHANNELS, **architecture: object) -> TransfusionMoT:
    """A model of random weights in float64; nothing in it is zero, as the last layer of a new model is."""
    sizes = {
        "towers": {"text": TowerConfig(32, 48), "image": TowerConfig(32, 48)},
        "num_layers": 2,
        "num_heads": 4,
        "head_dim": 12,
    }
    config = ModelConfig(**{**sizes, **architecture})
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = TransfusionMoT(vocab_size, latent_channels, to_dict(config)).double().eval()
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.15)
    return model


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return tiny_tokenizer()


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request, tokenizer) -> TransfusionMoT:
    return tiny_model(tokenizer.vocab_size, **ARCHITECTURES[request.param])


def forward_document(model, segments, timestep=0.0):
    """One uncached forward of one whole document; a segment is a list of ids, or latents [C, Y, X].

    Order and positions are counted here slot by slot, in reading order; then text is put before patches.
    """
    text, patches, ids, image, order, position = [], [], [], None, 0, 0
    flat = model.architecture.rope == "1d"
    for segment in segments:
        if isinstance(segment, list):
            for token in segment:
                ids.append(token)
                text.append((order, -1, [position] if flat else [position] * 3))
                order, position = order + 1, position + 1
        else:
            image = segment
            side = segment.shape[-1] // model.architecture.patch_size
            for y in range(side):
                for x in range(side):
                    place = [position + y * side + x] if flat else [position, position + y, position + x]
                    patches.append((order, 0, place))
                    order += 1
            position += side * side if flat else side
    slots = text + patches
    places = torch.tensor([[place for _, _, place in slots]])
    return model(
        torch.tensor([ids]),
        None if image is None else image[None, None],
        None if image is None else torch.tensor([[timestep]]),
        document_ids=torch.zeros(1, len(slots), dtype=torch.long),
        order=torch.tensor([[order for order, _, _ in slots]]),
        span_ids=torch.tensor([[span for _, span, _ in slots]]),
        rope_positions=places[..., 0] if flat else places,
    )


def predict_uncached(model, tokenizer, prompt_ids, latents, timestep):
    before = [tokenizer.bos_id, *prompt_ids, tokenizer.boi_id]
    segments = [before, latents, [tokenizer.eoi_id, tokenizer.eos_id]]
    return forward_document(model, segments, timestep).prediction[0, 0]


@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
@torch.no_grad()
def test_denoising_with_the_cache_equals_the_whole_document(model, tokenizer, guidance_scale):
    predict = read_prompts(model, tokenizer, PROMPTS, guidance_scale, LATENT_SIZE, CPU)
    # The second step must not see the patches of the first.
    for timestep in (0.9, 0.3):
        latents = torch.randn(len(PROMPTS), LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE, dtype=torch.float64)
        cached = predict(latents, torch.tensor(timestep))
        for row, prompt in enumerate(PROMPTS):
            with_prompt = predict_uncached(model, tokenizer, tokenizer.encode(prompt), latents[row], timestep)
            without = predict_uncached(model, tokenizer, [], latents[row], timestep)
            expected = without + guidance_scale * (with_prompt - without)
            assert expected.abs().max() > 0.1
            torch.testing.assert_close(cached[row], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("guidance_scale", "rows"), [(1.0, 3), (2.0, 6)])
def test_guidance_of_one_runs_no_second_pass(tokenizer, guidance_scale, rows):
    model = tiny_model(tokenizer.vocab_size)
    seen = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(kwargs["order"].shape)), with_kwargs=True
    )
    predict = read_prompts(model, tokenizer, PROMPTS, guidance_scale, LATENT_SIZE, CPU)
    for _ in range(4):
        predict(torch.zeros(3, LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE), torch.tensor(0.5))
    longest = max(len(tokenizer.encode(prompt)) for prompt in PROMPTS) + 2
    assert seen == [(rows, longest)] + [(rows, 4)] * 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_denoising_never_waits_for_the_device(tokenizer):
    device = torch.device("cuda")
    model = tiny_model(tokenizer.vocab_size).float().to(device)
    predict = read_prompts(model, tokenizer, PROMPTS, 2.0, LATENT_SIZE, device)
    latents = torch.zeros(3, LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE, device=device)
    timestep = torch.tensor(0.5, device=device)
    # The first call loads kernels, which waits.
    predict(latents, timestep)
    torch.cuda.set_sync_debug_mode("error")
    try:
        predict(latents, timestep)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_guidance_acts_on_all_channels(tokenizer):
    model = tiny_model(tokenizer.vocab_size)
    latents = torch.randn(1, LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE, dtype=torch.float64)
    predictions = {
        scale: read_prompts(model, tokenizer, ["sun"], scale, LATENT_SIZE, CPU)(latents, torch.tensor(0.5))
        for scale in (0.0, 1.0, 3.0)
    }
    step = predictions[1.0] - predictions[0.0]
    assert (step.abs().amax(dim=(0, 2, 3)) > 1e-3).all()
    torch.testing.assert_close(predictions[3.0] - predictions[0.0], 3 * step)


def test_noise_of_an_image_depends_on_its_seed_alone():
    def noise(*seeds):
        return random_rows(torch.randn, (3, 4, 4), [torch.Generator().manual_seed(seed) for seed in seeds])

    assert torch.equal(noise(5, 6, 7)[2], noise(7)[0])
    assert not torch.equal(noise(5)[0], noise(6)[0])
    single = torch.Generator().manual_seed(5)
    both = random_rows(torch.randn, (3, 4, 4), [single, single])
    assert torch.equal(both[0], noise(5)[0])
    assert not torch.equal(both[0], both[1])


def greedy_uncached(model, tokenizer, segments, max_new_tokens):
    """Greedy decoding by a forward over the whole document for every token."""
    special = [tokenizer.bos_id, tokenizer.pad_id, tokenizer.boi_id, tokenizer.eoi_id]
    *before, last = segments
    written = []
    while len(written) < max_new_tokens:
        logits = forward_document(model, [*before, last + written]).logits[0, -1]
        logits[special] = -math.inf
        token = int(logits.argmax())
        if token == tokenizer.eos_id:
            break
        written.append(token)
    return written


@torch.no_grad()
def test_captioning_equals_greedy_decoding_by_whole_documents(model, tokenizer):
    latents = torch.randn(3, LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE, dtype=torch.float64)
    documents = [[[tokenizer.bos_id, tokenizer.boi_id], image, [tokenizer.eoi_id]] for image in latents]
    # Where the first row would write its third token it writes the end of text, so that rows end at different times.
    swapped = [tokenizer.eos_id, greedy_uncached(model, tokenizer, documents[0], 3)[-1]]
    model = copy.deepcopy(model)
    model.text_head.weight[swapped] = model.text_head.weight[swapped[::-1]]
    expected = [greedy_uncached(model, tokenizer, document, 8) for document in documents]
    assert len({len(ids) for ids in expected}) > 1
    captions = caption_latents(model, tokenizer, latents, Decoding(max_new_tokens=8), [None] * 3)
    assert captions == [tokenizer.decode(ids) for ids in expected]


@torch.no_grad()
def test_continuing_equals_greedy_decoding_by_whole_documents(model, tokenizer):
    documents = [[[tokenizer.bos_id, *tokenizer.encode(text)]] for text in PROMPTS]
    expected = [tokenizer.decode(greedy_uncached(model, tokenizer, document, 5)) for document in documents]
    assert complete(model, tokenizer, PROMPTS, Decoding(max_new_tokens=5), [None] * 3, CPU) == expected


class FixedLogits(nn.Module):
    """A text head that likes special tokens best."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.logits.expand(*hidden.shape[:-1], -1)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_special_tokens_other_than_the_end_are_never_written(tokenizer, temperature):
    model = tiny_model(tokenizer.vocab_size)
    logits = torch.zeros(tokenizer.vocab_size, dtype=torch.float64)
    for favourite in (tokenizer.bos_id, tokenizer.pad_id, tokenizer.boi_id, tokenizer.eoi_id):
        logits[favourite] = 100.0
    letter = tokenizer.encode("x")[0]
    logits[letter] = 50.0
    model.text_head = FixedLogits(logits)
    latents = torch.zeros(2, LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE, dtype=torch.float64)
    decoding = Decoding(max_new_tokens=5, temperature=temperature)
    assert caption_latents(model, tokenizer, latents, decoding, [None] * 2) == ["xxxxx"] * 2
    assert complete(model, tokenizer, ["sun"], decoding, [None], CPU) == ["xxxxx"]
    logits[tokenizer.eos_id] = 80.0
    assert caption_latents(model, tokenizer, latents, decoding, [None] * 2) == ["", ""]


def test_sampled_text_depends_on_its_own_generator_alone(tokenizer):
    model = tiny_model(tokenizer.vocab_size)
    decoding = Decoding(max_new_tokens=8, temperature=1.0, top_p=0.9)

    def write(texts, seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return complete(model, tokenizer, texts, decoding, generators, CPU)

    together = write(PROMPTS, [3, 4, 5])
    assert together == [write([text], [seed])[0] for text, seed in zip(PROMPTS, [3, 4, 5], strict=True)]
    assert write(["sun"], [1]) != write(["sun"], [2])


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (1.0, 0.7), (1.7, 0.5), (1.0, 1e-6)])
def test_tokens_are_drawn_with_their_probabilities(temperature, top_p):
    logits = torch.tensor([[0.3, 2.0, -1.0, 1.2, 0.0, -math.inf], [1.0, 1.1, 1.2, 1.3, -5.0, 4.0]])
    draws = 40_000
    uniform = torch.rand(draws, generator=torch.Generator().manual_seed(0))
    for row in logits:
        weights = [math.exp(value / temperature) for value in row.tolist()]
        by_weight = sorted(range(len(weights)), key=lambda token: -weights[token])
        nucleus, mass = [], 0.0
        for token in by_weight:
            if mass >= top_p * sum(weights):
                break
            nucleus.append(token)
            mass += weights[token]
        expected = torch.tensor([weights[token] / mass if token in nucleus else 0.0 for token in range(len(weights))])
        chosen = choose_tokens(row.expand(draws, -1), Decoding(1, temperature, top_p), uniform)
        frequency = torch.bincount(chosen, minlength=len(weights)) / draws
        assert ((frequency > 0) <= (expected > 0)).all()
        # Four standard deviations of a binomial share.
        assert ((frequency - expected).abs() <= 4 * (expected * (1 - expected) / draws).sqrt() + 1e-6).all()


def test_draws_at_both_ends_choose_tokens_that_can_be_chosen():
    logits = torch.tensor([[0.0, 1.0, -math.inf]]).expand(2, -1)
    ends = torch.tensor([0.0, 1 - 2**-24])
    assert choose_tokens(logits, Decoding(1, 1.0, 1.0), ends).tolist() == [1, 0]
    assert choose_tokens(logits, Decoding(1, 0.0, 1.0), ends).tolist() == [1, 1]


@pytest.mark.parametrize(
    "settings",
    [
        {"max_new_tokens": 0},
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_p": math.nan},
    ],
)
def test_decoding_settings_out_of_range_are_refused(settings):
    with pytest.raises(UserError, match=next(iter(settings))):
        Decoding(**settings)
