"""Noise of codes: which codes are replaced, when, and that it depends only on the step; guidance of one modality."""

import pytest
import torch
from conftest import tiny_config

from transfusion_mot.config import ModalityConfig, ModelConfig, RunConfig, parse_config
from transfusion_mot.errors import UserError
from transfusion_mot.models.inputs import TokenInput
from transfusion_mot.models.modalities import TokenModality
from transfusion_mot.models.mot import check_architecture
from transfusion_mot.training.step import seed_step

CODEBOOK, PROB = 16, 0.3


def modality(prob: float = PROB) -> TokenModality:
    """Its hidden states tell which id was read: row i of the embedding is i."""
    made = TokenModality(CODEBOOK + 2, 1, code_noise_prob=prob)
    with torch.no_grad():
        made.embedding.weight.copy_(torch.arange(CODEBOOK + 2.0)[:, None])
    return made.train()


def spans(rows: int) -> TokenInput:
    """Two runs of codes a row, each with its start; the labels are what follows."""
    codes = torch.randint(CODEBOOK, (rows, 2, 101), generator=torch.Generator().manual_seed(0))
    codes[:, :, 0] = CODEBOOK
    ids = codes.flatten(1)
    return TokenInput(ids, ids.roll(-1, 1))


def read(made: TokenModality, given: TokenInput, step: int = 0) -> torch.Tensor:
    seed_step(0, step, 0)
    return made.embed(given)[0][..., 0].long()


def test_so_many_codes_are_replaced_by_any_other_and_starts_stay() -> None:
    given = spans(200)
    ids = read(modality(), given)
    is_start = given.ids == CODEBOOK
    assert (ids[is_start] == CODEBOOK).all()
    assert (ids[~is_start] < CODEBOOK).all()
    changed = (ids != given.ids)[~is_start]
    # A random code is the same one in one of 16 draws; six deviations of 40,000.
    expected = PROB * (1 - 1 / CODEBOOK)
    assert changed.double().mean().item() == pytest.approx(expected, abs=6 * (expected * (1 - expected) / 40000) ** 0.5)
    counts = torch.bincount(ids[~is_start][changed], minlength=CODEBOOK).double()
    mean = counts.mean().item()
    assert (counts - mean).abs().max().item() < 6 * mean**0.5


def test_it_follows_from_the_step() -> None:
    given = spans(2)
    first = read(modality(), given)
    assert torch.equal(read(modality(), given), first)
    assert not torch.equal(read(modality(), given, step=1), first)


def test_there_is_none_outside_of_training() -> None:
    given = spans(2)
    assert torch.equal(read(modality(0.0), given), given.ids)
    assert torch.equal(read(modality().eval(), given), given.ids), "validation"
    assert torch.equal(read(modality(), TokenInput(given.ids)), given.ids), "sampling"


def config_with(name: str, prob: float) -> ModelConfig:
    config = tiny_config()
    modalities = config.modalities | {"speech": ModalityConfig("text")}
    modalities[name].code_noise_prob = prob
    config.modalities = modalities
    return config


def test_where_it_cannot_be_is_refused() -> None:
    check_architecture(config_with("speech", PROB))
    for name in ("text", "image"):
        with pytest.raises(
            UserError, match=rf"model.modalities.{name} has code_noise_prob, which works only for codes"
        ):
            check_architecture(config_with(name, PROB))
    for prob in (1.0, -0.1, float("nan")):
        with pytest.raises(UserError, match=r"speech.code_noise_prob is \S+; it must be at least 0 and below 1"):
            check_architecture(config_with("speech", prob))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_every_replay_of_a_recorded_step_has_its_own() -> None:
    made, given = modality().cuda(), spans(2)
    given = TokenInput(given.ids.cuda(), given.labels.cuda())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        hidden, _ = made.embed(given)

    def replay(step: int) -> torch.Tensor:
        seed_step(0, step, 0)
        graph.replay()
        return hidden.clone()

    first = replay(0)
    assert torch.equal(replay(0), first)
    assert not torch.equal(replay(1), first)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["model.modalities.text.guidance_scale=2"],
            "model.modalities.text has guidance_scale, but guidance works only for media",
        ),
        (["model.modalities.image.guidance_scale=-1"], "image.guidance_scale is -1.0; it must be at least 0"),
        (
            ["data.prompt_dropout_prob=0", "diffusion.guidance_scale=1", "model.modalities.image.guidance_scale=2"],
            "image.guidance_scale is 2.0 and data.prompt_dropout_prob is 0",
        ),
    ],
)
def test_guidance_that_a_modality_cannot_have_is_refused(words: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        check_architecture(parse_config(RunConfig, words, "").model)
