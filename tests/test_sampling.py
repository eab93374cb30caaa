"""Sampling with a cache against full forwards over the document in the layout of training."""

import copy
import math

import pytest
import torch
from torch import nn

from transfusion_mot.config import DiffusionConfig, ModalityConfig, ModelConfig, TowerConfig
from transfusion_mot.data.layout import Media
from transfusion_mot.data.tokenizer import TextTokenizer, train_tokenizer
from transfusion_mot.errors import UserError
from transfusion_mot.models.inputs import LatentInput, Slots, TokenInput
from transfusion_mot.models.transfusion import TransfusionMoT
from transfusion_mot.sampling.decoding import Decoding, choose_tokens
from transfusion_mot.sampling.guidance import Guidance
from transfusion_mot.sampling.per_row import random_rows
from transfusion_mot.sampling.sampler import Making, OpenDocument, Sampler
from transfusion_mot.sampling.workspace import Workspace

CPU = torch.device("cpu")
LATENT_SIZE = 4
LATENT_CHANNELS = 3
LATENT_SHAPE = (LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE)
PATCHES = 4
PROMPTS = ["an octopus that holds a red apple", "sun", ""]


def text_and_image(text: str, picture: str, **fields: object) -> dict[str, object]:
    """The modalities of a model by their towers, and more about its images."""
    return {"modalities": {"text": ModalityConfig(text), "image": ModalityConfig(picture, "diffusion", 5.0, **fields)}}


UNET = {"adapter": "unet", "unet_channels": [32, 32], "unet_num_layers": 1}
ONE_TOWER = {"towers": {"all": TowerConfig(32, 48)}}
CAUSAL_IMAGES = text_and_image("text", "image", attention="causal")
ARCHITECTURES = {
    "mot 3d": {},
    "mot 1d gqa": {"rope": "1d", "num_kv_heads": 2},
    "dense 3d": {**ONE_TOWER, **text_and_image("all", "all")},
    "mot unet": text_and_image("text", "image", **UNET),
    "dense 1d unet gqa": {**ONE_TOWER, **text_and_image("all", "all", **UNET), "rope": "1d", "num_kv_heads": 1},
    "mot causal": CAUSAL_IMAGES,
}


def tiny_tokenizer() -> TextTokenizer:
    return train_tokenizer(["a red apple", "an octopus", "sun"], 280, ("text", "image"))


def tiny_model(vocab_size: int, sizes: dict[str, int] | None = None, **architecture: object) -> TransfusionMoT:
    """A model of random weights in float64; nothing in it is zero, as the last layer of a new model is."""
    towers = {"text": TowerConfig(32, 48), "image": TowerConfig(32, 48)}
    config = ModelConfig(**{"towers": towers, "num_layers": 2, "num_heads": 4, "head_dim": 12, **architecture})
    sizes = {"text": vocab_size, **(sizes or {"image": LATENT_CHANNELS})}
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = TransfusionMoT.from_sections(sizes, config, DiffusionConfig()).double().eval()
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


def image(latents: torch.Tensor) -> Media:
    return Media("image", latents)


def forward_document(model, segments, timestep=0.0):
    """One uncached forward of one whole document; a segment is a list of text ids, or media.

    The last latents are at `timestep`, those before them are clean. Order and positions are counted here slot by slot,
    in reading order; then slots are put where their modality has them.
    """
    config = model.architecture
    flat = config.rope == "1d"
    # (order, span, rotary position) of each slot, and what the slots hold.
    places: dict[str, list[tuple[int, int, list[int]]]] = {}
    contents: dict[str, list] = {}
    order, position, spans = 0, 0, 0
    for segment in segments:
        name, content = (segment.modality, segment.content) if isinstance(segment, Media) else ("text", segment)
        slots, held = places.setdefault(name, []), contents.setdefault(name, [])
        if isinstance(content, list):
            # Behind the last code stands what is its label.
            content = content[:-1] if isinstance(segment, Media) else content
            for token in content:
                held.append(token)
                slots.append((order, -1, [position] if flat else [position] * 3))
                order, position = order + 1, position + 1
            continue
        rows, columns = (side // config.modalities[name].patch_size for side in content.shape[-2:])
        for y in range(rows):
            for x in range(columns):
                place = [position + y * columns + x] if flat else [position, position + y, position + x]
                slots.append((order, spans, place))
                order += 1
        held.append(content)
        spans += 1
        position += rows * columns if flat else max(rows, columns)
        last = name
    inputs = {}
    for name, held in contents.items():
        if isinstance(held[0], int):
            inputs[name] = TokenInput(torch.tensor([held]))
        else:
            timesteps = [0.0] * (len(held) - 1) + [timestep if name == last else 0.0]
            inputs[name] = LatentInput(torch.stack(held)[None], torch.tensor([timesteps]))
    slots = [slot for name in config.stream_order for slot in places.get(name, [])]
    rope_positions = torch.tensor([[place for _, _, place in slots]])
    nothing = torch.full((1, len(slots)), -1)
    return model(
        inputs,
        Slots(
            document_ids=torch.zeros(1, len(slots), dtype=torch.long),
            order=torch.tensor([[order for order, _, _ in slots]]),
            span_ids=torch.tensor([[span for _, span, _ in slots]]),
            rope_positions=rope_positions[..., 0] if flat else rope_positions,
            source_ids=nothing,
        ),
    ).predictions


def predict_uncached(model, tokenizer, context, latents, timestep):
    """Prediction for an image after `context`; items after the image must not matter."""
    begin, end = tokenizer.begin_ids["image"], tokenizer.end_ids["image"]
    segments = [*context, [begin], image(latents), [end, tokenizer.eos_id]]
    return forward_document(model, segments, timestep)["image"][0, -1]


def paint(model, tokenizer, documents, denoise, guidance):
    """Make an image in each document; `denoise` is as a sampler takes it."""
    making = {"image": Making(1, PATCHES, denoise)}
    settings = {"target": "image", "device": CPU, "making": making, "guidance": guidance}
    Sampler(model, tokenizer, Workspace(), documents, **settings).run()
    return [document.added[0].content for document in documents]


def write(model, tokenizer, documents, decoding, generators=()):
    """Run the text task => its output."""
    documents = [OpenDocument(items) for items in documents]
    settings = {"target": "text", "device": CPU, "decoding": decoding, "generators": generators}
    Sampler(model, tokenizer, Workspace(), documents, **settings).run()
    return ["".join(document.added) for document in documents]


def random_latents(*rows):
    return torch.randn(*rows, *LATENT_SHAPE, dtype=torch.float64)


@pytest.mark.parametrize("negative", ["", "sun sun"])
@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
@torch.no_grad()
def test_denoising_with_the_cache_equals_the_whole_document(model, tokenizer, guidance_scale, negative):
    def denoise(predict, rows):
        # The second step must not see the patches of the first.
        for timestep in (0.9, 0.3):
            latents = random_latents(len(PROMPTS))
            cached = predict(latents, torch.tensor(timestep))
            for row, prompt in enumerate(PROMPTS):
                contexts = [[[tokenizer.bos_id, *tokenizer.encode(text)]] for text in (prompt, negative)]
                whole, without = (
                    predict_uncached(model, tokenizer, context, latents[row], timestep) for context in contexts
                )
                expected = without + guidance_scale * (whole - without)
                assert expected.abs().max() > 0.1
                torch.testing.assert_close(cached[row], expected, rtol=0, atol=1e-12)
        return latents

    paint(model, tokenizer, [OpenDocument([prompt], negative) for prompt in PROMPTS], denoise, Guidance(guidance_scale))


@torch.no_grad()
def test_whatever_is_before_an_image_guides_it_against_an_image_alone(model, tokenizer):
    """In training an image comes at the end of its document or, with a dropped prompt, is alone."""
    one, two, three = random_latents(3)
    one, two, three = image(one), image(two), image(three)
    contents = [["a red apple", one, "sun"], [two, three], ["sun"]]
    bos, boi, eoi = tokenizer.bos_id, tokenizer.begin_ids["image"], tokenizer.end_ids["image"]
    whole = [
        [[bos, *tokenizer.encode("a red apple"), boi], one, [eoi, *tokenizer.encode("sun")]],
        [[bos, boi], two, [eoi, boi], three, [eoi]],
        [[bos, *tokenizer.encode("sun")]],
    ]

    def denoise(predict, rows):
        latents = random_latents(3)
        cached = predict(latents, torch.tensor(0.7))
        for row in range(3):
            full, alone = (
                predict_uncached(model, tokenizer, context, latents[row], 0.7) for context in (whole[row], [[bos]])
            )
            torch.testing.assert_close(cached[row], alone + 4.0 * (full - alone), rtol=0, atol=1e-11)
        return latents

    paint(model, tokenizer, [OpenDocument(items) for items in contents], denoise, Guidance(4.0))


def forwards(model):
    """A list that gets (rows, slots) of every forward of the model."""
    seen = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(kwargs["rope_positions"].shape[:2])), with_kwargs=True
    )
    return seen


@pytest.mark.parametrize(
    ("guidance", "rows"),
    [
        (Guidance(), [3, 3, 3, 3, 3]),
        (Guidance(2.0), [6, 6, 6, 6, 6]),
        (Guidance(2.0, interval=(0.3, 0.5)), [6, 3, 6, 6, 3]),
    ],
    ids=["off", "on", "interval"],
)
def test_forwards_are_as_few_as_guidance_needs(tokenizer, guidance, rows):
    """One forward over the prompts, and one over only the patches for each step."""
    model = tiny_model(tokenizer.vocab_size)
    seen = forwards(model)

    def denoise(predict, _):
        for timestep in (0.8, 0.5, 0.3, 0.1):
            predict(random_latents(3), torch.tensor(timestep, dtype=torch.float64))
        return random_latents(3)

    paint(model, tokenizer, [OpenDocument([prompt]) for prompt in PROMPTS], denoise, guidance)
    longest = max(len(tokenizer.encode(prompt)) for prompt in PROMPTS) + 2
    assert seen == [(rows[0], longest), *((count, 4) for count in rows[1:])]


def test_guidance_acts_on_all_channels(tokenizer):
    model = tiny_model(tokenizer.vocab_size)
    latents = random_latents(1)
    images = {
        scale: paint(
            model,
            tokenizer,
            [OpenDocument(["sun"])],
            lambda predict, _: predict(latents, torch.tensor(0.5)),
            Guidance(scale),
        )[0]
        for scale in (0.0, 1.0, 3.0)
    }
    step = images[1.0] - images[0.0]
    assert (step.abs().amax(dim=(1, 2)) > 1e-3).all()
    torch.testing.assert_close(images[3.0] - images[0.0], 3 * step)


def test_noise_of_an_image_depends_on_its_seed_alone():
    def noise(*seeds):
        return random_rows(torch.randn, (3, 4, 4), [torch.Generator().manual_seed(seed) for seed in seeds])

    assert torch.equal(noise(5, 6, 7)[2], noise(7)[0])
    assert not torch.equal(noise(5)[0], noise(6)[0])
    single = torch.Generator().manual_seed(5)
    both = random_rows(torch.randn, (3, 4, 4), [single, single])
    assert torch.equal(both[0], noise(5)[0])
    assert not torch.equal(both[0], both[1])


def greedy_uncached(model, tokenizer, segments, max_new_tokens, may_begin=()):
    """Greedy decoding by a forward over the whole document for every token => ids, with the end if one came."""
    delimiters = (*tokenizer.begin_ids.values(), *tokenizer.end_ids.values())
    special = {tokenizer.bos_id, tokenizer.pad_id, tokenizer.eos_id, *delimiters}
    stops = {tokenizer.eos_id, *(tokenizer.begin_ids[name] for name in may_begin)}
    *before, last = segments
    written = []
    while len(written) < max_new_tokens:
        logits = forward_document(model, [*before, last + written])["text"][0, -1]
        logits[sorted(special - stops)] = -math.inf
        written.append(int(logits.argmax()))
        if written[-1] in stops:
            break
    return written


def swap_rows_of_the_head(model, first, second, modality="text"):
    """The same model, which writes the one token where it wrote the other."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        head = model.modalities[modality].head.weight
        head[[first, second]] = head[[second, first]]
    return model


@pytest.mark.parametrize("beginning", ["", "a red"])
@torch.no_grad()
def test_captioning_equals_greedy_decoding_by_whole_documents(model, tokenizer, beginning):
    images = [image(latents) for latents in random_latents(3)]
    after = [tokenizer.end_ids["image"], *tokenizer.encode(beginning)]
    documents = [[[tokenizer.bos_id, tokenizer.begin_ids["image"]], given, after] for given in images]
    # Where the first row would write its third token it writes the end of text, so that rows end at different times.
    model = swap_rows_of_the_head(model, tokenizer.eos_id, greedy_uncached(model, tokenizer, documents[0], 3)[-1])
    expected = [greedy_uncached(model, tokenizer, document, 20) for document in documents]
    assert len({len(ids) for ids in expected}) > 1
    captions = write(model, tokenizer, [[given, beginning] for given in images], Decoding(max_new_tokens=20))
    assert captions == [tokenizer.decode(ids) for ids in expected]


@torch.no_grad()
def test_continuing_equals_greedy_decoding_by_whole_documents(model, tokenizer):
    documents = [[[tokenizer.bos_id, *tokenizer.encode(text)]] for text in PROMPTS]
    expected = [tokenizer.decode(greedy_uncached(model, tokenizer, document, 5)) for document in documents]
    assert write(model, tokenizer, [[text] for text in PROMPTS], Decoding(max_new_tokens=5)) == expected


def go_on_uncached(model, tokenizer, segments, noises, guidance, max_new_tokens):
    """The automatic task by forwards over whole documents; an image is the prediction for the next noise."""
    items, noises, left = [], list(noises), max_new_tokens
    while left:
        ids = greedy_uncached(model, tokenizer, segments, left, ("image",) if noises else ())
        left -= len(ids)
        items += [text] if (text := tokenizer.decode(ids)) else []
        if ids[-1] != tokenizer.begin_ids["image"]:
            break
        *before, last = segments
        context = [*before, last + ids[:-1]]
        noise = noises.pop(0)
        whole, alone = (
            predict_uncached(model, tokenizer, part, noise, 0.5) for part in (context, [[tokenizer.bos_id]])
        )
        items.append(image(alone + guidance.scale * (whole - alone)))
        segments = [*before, last + ids, items[-1], [tokenizer.end_ids["image"]]]
    return items


@pytest.mark.parametrize("guidance", [Guidance(1.0), Guidance(3.0)], ids=["off", "on"])
@torch.no_grad()
def test_documents_that_go_on_by_themselves_equal_whole_documents(model, tokenizer, guidance):
    """Rows that write and paint at different times, and not equally often."""
    one, two = image(random_latents()), image(random_latents())
    given = [["a red apple"], ["sun", one], [two, "an octopus that"], [""]]
    bos, boi, eoi = tokenizer.bos_id, tokenizer.begin_ids["image"], tokenizer.end_ids["image"]
    starts = [
        [[bos, *tokenizer.encode("a red apple")]],
        [[bos, *tokenizer.encode("sun"), boi], one, [eoi]],
        [[bos, boi], two, [eoi, *tokenizer.encode("an octopus that")]],
        [[bos]],
    ]
    noises = random_latents(4, 2)
    # What two of them would write soon is now the beginning of an image.
    model = swap_rows_of_the_head(model, boi, greedy_uncached(model, tokenizer, starts[0], 2)[-1])
    model = swap_rows_of_the_head(model, tokenizer.eos_id, greedy_uncached(model, tokenizer, starts[2], 4)[-1])
    expected = [
        go_on_uncached(model, tokenizer, start, noise, guidance, 9) for start, noise in zip(starts, noises, strict=True)
    ]
    shapes = [[type(item).__name__ for item in items] for items in expected]
    assert any("Media" in shape for shape in shapes)
    assert len({tuple(shape) for shape in shapes}) > 1

    documents = [OpenDocument(items) for items in given]

    def denoise(predict, rows):
        latents = torch.stack(
            [noises[row, sum(not isinstance(item, str) for item in documents[row].added)] for row in rows]
        )
        return predict(latents, torch.tensor(0.5))

    Sampler(
        model,
        tokenizer,
        Workspace(),
        documents,
        target="auto",
        device=CPU,
        decoding=Decoding(max_new_tokens=9),
        making={"image": Making(2, PATCHES, denoise)},
        guidance=guidance,
    ).run()
    assert [[type(item).__name__ for item in document.added] for document in documents] == shapes
    for document, items in zip(documents, expected, strict=True):
        for item, other in zip(document.added, items, strict=True):
            if isinstance(item, str):
                assert item == other
            else:
                torch.testing.assert_close(item.content, other.content, rtol=0, atol=1e-11)


@torch.no_grad()
def test_a_document_with_a_few_tokens_left_goes_on_beside_one_with_many(tokenizer, monkeypatch):
    """The few are written in as many steps as the many, which end beyond its row of the cache."""
    model, begin = tiny_model(tokenizer.vocab_size), tokenizer.begin_ids["image"]
    prompt, token = "sun" * 50, tokenizer.encode("sun")[0]
    made = iter(range(1, 1000))

    def choose(logits, decoding, uniform):
        step = next(made)
        return torch.tensor([begin if step == last else token for last in (55, 2)])

    monkeypatch.setattr("transfusion_mot.sampling.session.choose_tokens", choose)
    documents = [OpenDocument([prompt]) for _ in range(2)]

    def denoise(predict, rows):
        return predict(torch.zeros(len(rows), *LATENT_SHAPE, dtype=torch.float64), torch.tensor(0.5))

    making = {"image": Making(1, PATCHES, denoise)}
    decoding = Decoding(max_new_tokens=64)
    sampler = Sampler(
        model, tokenizer, Workspace(), documents, target="auto", device=CPU, decoding=decoding, making=making
    )
    longest = len(tokenizer.encode(prompt)) + 1
    assert longest + 55 + PATCHES + (64 - 2) > sampler.session.cache.capacity
    sampler.run()
    written = [[item for item in document.added if isinstance(item, str)] for document in documents]
    # The begin token is one of the 64.
    assert [[len(tokenizer.encode(text)) for text in texts] for texts in written] == [[54, 9], [1, 62]]


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
    delimiters = (tokenizer.begin_ids["image"], tokenizer.end_ids["image"])
    for favourite in (tokenizer.bos_id, tokenizer.pad_id, *delimiters):
        logits[favourite] = 100.0
    letter = tokenizer.encode("x")[0]
    logits[letter] = 50.0
    model.modalities["text"].head = FixedLogits(logits)
    documents = [[image(random_latents())], ["sun"]]
    decoding = Decoding(max_new_tokens=5, temperature=temperature)
    assert write(model, tokenizer, documents, decoding, [None] * 2) == ["xxxxx"] * 2
    logits[tokenizer.eos_id] = 80.0
    assert write(model, tokenizer, documents, decoding, [None] * 2) == ["", ""]


def test_sampled_text_depends_on_its_own_generator_alone(tokenizer):
    model = tiny_model(tokenizer.vocab_size)
    decoding = Decoding(max_new_tokens=8, temperature=1.0, top_p=0.9)

    def written(texts, seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return write(model, tokenizer, [[text] for text in texts], decoding, generators)

    together = written(PROMPTS, [3, 4, 5])
    assert together == [written([text], [seed])[0] for text, seed in zip(PROMPTS, [3, 4, 5], strict=True)]
    assert written(["sun"], [1]) != written(["sun"], [2])


def test_texts_before_and_behind_images_are_drawn_with_numbers_of_their_own(tokenizer):
    model = tiny_model(tokenizer.vocab_size)
    logits = torch.full((tokenizer.vocab_size,), -math.inf, dtype=torch.float64)
    logits[tokenizer.encode("abcdefgh")] = 0.0
    boi = tokenizer.begin_ids["image"]
    logits[boi] = 1.0
    model.modalities["text"].head = FixedLogits(logits)
    uniform = torch.rand(40, generator=torch.Generator().manual_seed(7))
    ids = choose_tokens(logits.expand(40, -1), Decoding(1, 1.0), uniform).tolist()
    expected = tokenizer.decode([token if token != boi else tokenizer.encode("|")[0] for token in ids])
    assert expected.count("|") > 3

    document = OpenDocument(["sun"])
    Sampler(
        model,
        tokenizer,
        Workspace(),
        [document],
        target="auto",
        device=CPU,
        generators=[torch.Generator().manual_seed(7)],
        decoding=Decoding(max_new_tokens=40, temperature=1.0),
        making={"image": Making(40, PATCHES, lambda predict, rows: random_latents(1))},
    ).run()
    assert "".join(item if isinstance(item, str) else "|" for item in document.added) == expected


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"),
    [
        (1.0, 1.0, 0),
        (0.6, 1.0, 0),
        (1.0, 0.7, 0),
        (1.7, 0.5, 0),
        (1.0, 1e-6, 0),
        (1.0, 1.0, 2),
        (1.3, 0.9, 3),
        (1, 1, 1),
    ],
)
def test_tokens_are_drawn_with_their_probabilities(temperature, top_p, top_k):
    logits = torch.tensor([[0.3, 2.0, -1.0, 1.2, 0.0, -math.inf], [1.0, 1.1, 1.2, 1.3, -5.0, 4.0]])
    draws = 40_000
    uniform = torch.rand(draws, generator=torch.Generator().manual_seed(0))
    for row in logits:
        weights = [math.exp(value / temperature) for value in row.tolist()]
        by_weight = sorted(range(len(weights)), key=lambda token: -weights[token])
        nucleus, mass = [], 0.0
        for token in by_weight:
            if mass >= top_p * sum(weights) or len(nucleus) == (top_k or len(weights)):
                break
            nucleus.append(token)
            mass += weights[token]
        expected = torch.tensor([weights[token] / mass if token in nucleus else 0.0 for token in range(len(weights))])
        chosen = choose_tokens(row.expand(draws, -1), Decoding(1, temperature, top_p, top_k), uniform)
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
        {"top_k": -1},
        {"top_k": 2.5},
    ],
)
def test_decoding_settings_out_of_range_are_refused(settings):
    with pytest.raises(UserError, match=next(iter(settings))):
        Decoding(**settings)
