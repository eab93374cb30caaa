"""The parts of the sampler alone: guidance, memory, and steps that are recorded on a GPU."""

import math

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from test_sampling import CPU, LATENT_SHAPE, PATCHES, PROMPTS, tiny_model, tiny_tokenizer
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from transfusion_mot.data.layout import TokenRun
from transfusion_mot.errors import UserError
from transfusion_mot.sampling.decoding import Decoding
from transfusion_mot.sampling.guidance import Guidance
from transfusion_mot.sampling.sampler import Making, OpenDocument, Sampler
from transfusion_mot.sampling.session import Session
from transfusion_mot.sampling.workspace import Step, Workspace, can_record


@pytest.fixture
def predictions() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    whole, without = torch.randn(2, 3, 4, 5, 5, dtype=torch.float64)
    return whole, without


@pytest.mark.parametrize("rescale", [0.3, 1.0])
def test_rescaling_is_that_of_diffusers(predictions, rescale) -> None:
    whole, without = predictions
    plain = Guidance(4.0).combine(predictions)
    torch.testing.assert_close(plain, without + 4 * (whole - without))
    expected = rescale_noise_cfg(plain, whole, rescale)
    torch.testing.assert_close(Guidance(4.0, rescale=rescale).combine(predictions), expected)


def test_renormed_predictions_are_never_longer_than_the_conditional_one(predictions) -> None:
    whole, _ = predictions
    plain, renormed = (Guidance(4.0, renorm=renorm).combine(predictions) for renorm in (False, True))
    for before, after, conditional in zip(plain, renormed, whole, strict=True):
        assert before.norm() > conditional.norm()
        torch.testing.assert_close(after, before / before.norm() * conditional.norm())
    shorter = (whole, -whole)
    # Half way between them there is nothing to shorten.
    torch.testing.assert_close(Guidance(0.75, renorm=True).combine(shorter), 0.5 * whole)


def test_rows_are_guided_each_by_itself(predictions) -> None:
    guidance = Guidance(4.0, rescale=0.5, renorm=True)
    both = guidance.combine(predictions)
    alone = guidance.combine([part[1:2] for part in predictions])
    torch.testing.assert_close(both[1:2], alone)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": math.nan}, "guidance_scale is nan; it must be a finite number"),
        ({"scale": math.inf}, "guidance_scale is inf"),
        ({"interval": (0.5, 0.2)}, r"guidance_interval is \(0.5, 0.2\)"),
        ({"interval": (-0.1, 1.0)}, "from 0"),
        ({"interval": (math.nan, 1.0)}, "guidance_interval"),
        ({"interval": (0.5,)}, "guidance_interval"),
        ({"rescale": 1.5}, "guidance_rescale is 1.5"),
        ({"rescale": math.nan}, "guidance_rescale is nan"),
    ],
)
def test_settings_out_of_range_are_refused(arguments, message) -> None:
    with pytest.raises(UserError, match=message):
        Guidance(**arguments)


def run(workspace: Workspace, model, tokenizer, prompts: list[str], steps: int = 2) -> torch.Tensor:
    """Images of prompts by a few predictions, followed by a few tokens."""
    documents = [OpenDocument([prompt]) for prompt in prompts]
    noise = torch.arange(len(prompts) * math.prod(LATENT_SHAPE), dtype=torch.float64).sin()

    def denoise(predict, rows):
        latents = noise.view(-1, *LATENT_SHAPE)
        for step in range(steps):
            latents = latents - predict(latents, torch.tensor(1 - step / steps)) / steps
        return latents

    settings = {"making": {"image": Making(1, PATCHES, denoise)}, "guidance": Guidance(2.0)}
    Sampler(model, tokenizer, workspace, documents, target="image", device=CPU, **settings).run()
    written = [OpenDocument([prompt]) for prompt in prompts]
    decoding = Decoding(max_new_tokens=3)
    Sampler(model, tokenizer, workspace, written, target="text", device=CPU, decoding=decoding).run()
    return torch.stack([document.added[0].content for document in documents])


def test_calls_of_one_shape_share_their_memory_and_nothing_else() -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer.vocab_size)
    workspace = Workspace()

    def cache(rows: int, capacity: int):
        return workspace.cache(model, rows, capacity, CPU)

    first = cache(6, 70)
    assert first.capacity > 70
    assert cache(6, 75) is first
    assert cache(5, 70) is not first
    assert cache(5, 200).capacity > 200

    fresh = [run(Workspace(), model, tokenizer, prompts) for prompts in (PROMPTS, PROMPTS[::-1])]
    again = [run(workspace, model, tokenizer, prompts) for prompts in (PROMPTS, PROMPTS[::-1])]
    assert all(torch.equal(one, two) for one, two in zip(fresh, again, strict=True))
    workspace.records = False
    workspace.finish()
    assert workspace.cache(model, 5, 200, CPU) is not first


def test_values_that_are_not_finite_do_not_stay() -> None:
    """A mask does not hide them: zero times them is not a number."""
    tokenizer, workspace = tiny_tokenizer(), Workspace()
    model = tiny_model(tokenizer.vocab_size)

    def painted(prompts: list[str], noise: float) -> torch.Tensor:
        documents = [OpenDocument([prompt]) for prompt in prompts]

        def denoise(predict, rows):
            return predict(torch.full((len(rows), *LATENT_SHAPE), noise, dtype=torch.float64), torch.tensor(0.5))

        making = {"image": Making(1, PATCHES, denoise)}
        Sampler(model, tokenizer, workspace, documents, target="image", device=CPU, making=making).run()
        return torch.stack([document.made[0] for document in documents])

    expected = painted(PROMPTS[:2], 0.5)
    assert not painted([PROMPTS[0]] * 2, math.nan).isfinite().any()
    assert torch.equal(painted(PROMPTS[:2], 0.5), expected)


def flash_attention(q, k, v, q_begin, k_begin, most_q, most_k, dropout, causal, mask, *, seqused_k) -> tuple[Tensor]:
    """FlashAttention of rows of any lengths, in plain torch: the last query of a row sees its last used key."""
    result = torch.empty_like(q)
    for row, used in enumerate(seqused_k.tolist()):
        queries = slice(q_begin[row], q_begin[row + 1])
        keys = slice(k_begin[row], k_begin[row] + used)
        count = q_begin[row + 1] - q_begin[row]
        seen = torch.ones(count, used, dtype=torch.bool)
        seen = seen.tril(used - count) if causal else seen
        heads = (part.transpose(0, 1) for part in (q[queries], k[keys], v[keys]))
        result[queries] = scaled_dot_product_attention(*heads, attn_mask=seen).transpose(0, 1)
    return (result,)


def test_a_short_segment_beside_a_long_one_sees_its_document(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where its filler would end beyond the row, with the kernel that counts slots, and with masks."""
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", flash_attention)
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer.vocab_size)
    ids = torch.randint(tokenizer.vocab_size, (500,), generator=torch.Generator().manual_seed(0)).tolist()
    segments = {0: [ids[:300], ids[300:303]], 1: [ids[:20], ids[100:300]], 2: [ids[:150], ids[150:152]]}

    def read(rows: list[int], *, counts_slots: bool) -> list[torch.Tensor]:
        """The keys of these documents."""
        session = Session(model, Workspace(), rows=len(rows), capacity=310, device=CPU)
        session.cache.counts_slots = counts_slots
        for number in range(2):
            for place, row in enumerate(rows):
                session.feed(place, TokenRun("text", segments[row][number], []))
            session.read(range(len(rows)))
        lengths = [sum(map(len, segments[row])) for row in rows]
        return [session.cache.keys[:, place, :length] for place, length in enumerate(lengths)]

    alone = [read([row], counts_slots=False)[0] for row in segments]
    for counts_slots in (False, True):
        for one, two in zip(read([*segments], counts_slots=counts_slots), alone, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)


def test_a_step_reads_its_state_in_every_run() -> None:
    """As recorded kernels do: tensors are overwritten, never replaced."""
    state = {"count": torch.zeros(1), "by": torch.ones(())}

    def body(state):
        return state["count"].add_(state["by"]).sum()

    step = Step(body, state, None)
    assert [float(step()) for _ in range(3)] == [1, 2, 3]
    addresses = [tensor.data_ptr() for tensor in step.state.values()]
    step.fill(count=torch.tensor([10.0]), by=0.5)
    assert float(step()) == 10.5
    assert [tensor.data_ptr() for tensor in step.state.values()] == addresses


def test_steps_are_recorded_only_where_every_forward_is_the_same() -> None:
    model = tiny_model(tiny_tokenizer().vocab_size)
    assert not can_record(model, CPU)
    device = torch.device("cuda")
    assert can_record(model, device)
    handle = model.blocks[0].register_forward_hook(lambda *_: None)
    assert not can_record(model, device)
    handle.remove()
    assert can_record(model, device)
    for name in ("_hf_hook", "_diffusers_hook"):  # What accelerate and diffusers leave there.
        setattr(model.blocks[1].ffn, name, object())
        assert not can_record(model, device)
        delattr(model.blocks[1].ffn, name)
    assert can_record(model, device)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [{}, {"rope": "1d", "num_kv_heads": 2}])
def test_compiled_blocks_sample_the_same(architecture) -> None:
    """`compile_repeated_blocks` of diffusers; texts of all lengths are read uncompiled."""
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer.vocab_size, **architecture)
    expected, reversed_images = (run(Workspace(), model, tokenizer, order) for order in (PROMPTS, PROMPTS[::-1]))
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    model.compile_repeated_blocks(fullgraph=True, dynamic=False, backend=backend)
    for prompts, images in ((PROMPTS, expected), (PROMPTS[::-1], reversed_images)):
        torch.testing.assert_close(run(Workspace(), model, tokenizer, prompts), images)
    # One for denoising and one for writing: no more for other prompts or other layers.
    assert len(compiled) == 2
