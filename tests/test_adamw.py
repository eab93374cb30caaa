"""AdamW with its own kernel against torch's fused AdamW: on CUDA, and on the CPU by Triton's interpreter (see
`test_kernels`)."""

import copy

import pytest
import torch

from transfusion_mot.training import adamw
from transfusion_mot.training.adamw import AdamW
from transfusion_mot.training.graph import make_capturable

# The first two are large; the first is no multiple of what a program handles.
Shapes = list[tuple[int, ...]]
SHAPES: Shapes = [(1000, 601), (1024, 1024), (40, 30), (7,)]
BETAS, EPS = (0.9, 0.999), 1e-8


def groups(parameters: list[torch.nn.Parameter]) -> list[dict]:
    """The first tensor without weight decay, in a group of its own."""
    return [{"params": parameters[:1], "weight_decay": 0.0}, {"params": parameters[1:], "weight_decay": 0.1}]


def check_steps(device: str, shapes: Shapes) -> None:
    """Five steps with other learning rates, gradients that are divided or not, and one that is skipped; a state of
    torch is continued by ours and the other way round."""
    generator = torch.Generator().manual_seed(0)

    def drawn(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device)

    first = [drawn(shape) for shape in shapes]
    ours, theirs = ([torch.nn.Parameter(tensor.clone()) for tensor in first] for _ in range(2))
    optimizer = AdamW(groups(ours), 0.1, BETAS, EPS)
    expected = torch.optim.AdamW(groups(theirs), lr=0.1, betas=BETAS, eps=EPS, fused=True)
    for step, (scale, skipped) in enumerate([(None, None), (1.0, 0.0), (3.0, 0.0), (float("nan"), 1.0), (1.5, 0.0)]):
        grads = [drawn(shape) for shape in shapes]
        for one, two, grad in zip(ours, theirs, grads, strict=True):
            one.grad, two.grad = grad.clone(), grad.clone()
        for each in (optimizer, expected):
            each.grad_scale = None if scale is None else torch.tensor(scale, device=device)
            each.found_inf = None if skipped is None else torch.tensor(skipped, device=device)
            for group in each.param_groups:
                group["lr"] = 0.1 / (1 + step)
            each.step()
        assert all(torch.equal(one.grad, grad) for one, grad in zip(ours[:2], grads, strict=False)), "written back"
        compare(optimizer, expected)
        if step == 2:
            states = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(expected.state_dict())
            assert states[0].keys() == states[1].keys()
            assert states[0]["param_groups"] == states[1]["param_groups"]
            optimizer.load_state_dict(states[1])
            expected.load_state_dict(states[0])
            with torch.no_grad():
                for one, two in zip(ours, theirs, strict=True):
                    two.copy_(one)


def compare(optimizer: torch.optim.Optimizer, expected: torch.optim.Optimizer) -> None:
    """Parameters and states of two optimizers, to a few roundings of float32."""
    pairs = zip(optimizer.param_groups, expected.param_groups, strict=True)
    for one, two in ((one, two) for a, b in pairs for one, two in zip(a["params"], b["params"], strict=True)):
        torch.testing.assert_close(one, two, rtol=2e-6, atol=2e-6)
        state, other = optimizer.state[one], expected.state[two]
        assert state.keys() == other.keys()
        assert torch.equal(state["step"], other["step"])
        assert state["step"].dtype == other["step"].dtype
        torch.testing.assert_close(state["exp_avg"], other["exp_avg"], rtol=1e-5, atol=5e-7)
        # On the CPU torch has 1 - 0.999 in float64, which is 1.3e-5 less than in float32.
        torch.testing.assert_close(state["exp_avg_sq"], other["exp_avg_sq"], rtol=2e-5, atol=1e-9)


def check_by_interpreter() -> None:
    """On the CPU, where the optimizer would leave all tensors to torch."""
    adamw._has_kernel = lambda parameter: parameter.grad is not None and parameter.numel() >= 3000
    check_steps("cpu", [(50, 61), (64, 64), (40, 30), (7,)])


on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@on_gpu
def test_steps_are_those_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    updated = []
    update = adamw.update

    def counted(weight: torch.Tensor, *tensors: torch.Tensor, **settings) -> None:
        updated.append(weight)
        update(weight, *tensors, **settings)

    monkeypatch.setattr(adamw, "update", counted)
    check_steps("cuda", SHAPES)
    assert len(updated) == 5 * 2, "each large tensor in each step"


@pytest.mark.gpu
@on_gpu
def test_a_recorded_step_counts_and_reads_the_learning_rate() -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    ours, theirs = ([torch.nn.Parameter(torch.ones(SHAPES[0], device="cuda"))] for _ in range(2))
    optimizer = AdamW([{"params": ours, "weight_decay": 0.1}], 0.1, BETAS, EPS)
    expected = torch.optim.AdamW(theirs, betas=BETAS, eps=EPS, weight_decay=0.1)
    make_capturable(optimizer)
    optimizer.found_inf, optimizer.grad_scale = torch.zeros((), device="cuda"), torch.ones((), device="cuda")
    grad = ours[0].grad = torch.zeros_like(ours[0])
    stream = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()

    for number in range(4):
        grad.copy_(torch.randn(SHAPES[0], generator=generator, device="cuda"))
        theirs[0].grad = grad.clone()
        for group in expected.param_groups:
            group["lr"] = 0.1 / (1 + number)
        optimizer.param_groups[0]["lr"].fill_(0.1 / (1 + number))
        expected.step()
        if number == 0:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                optimizer.step()
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(graph):
                optimizer.step()
        else:
            graph.replay()
    torch.testing.assert_close(ours[0], theirs[0], rtol=5e-6, atol=5e-6)
    assert optimizer.state[ours[0]]["step"] == 4
