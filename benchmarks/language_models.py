"""Compare a tower that was loaded from a language model with that model in transformers: logits and continuations.

    python benchmarks/language_models.py Qwen/Qwen2.5-0.5B path/to/another --device cuda

It prints the table of docs/finetuning.md. A distance is the norm of the differences of all logits, divided by the norm
of the logits: between the two models in float64 (with norms of torch, because those of transformers compute in float32)
and in float32, and for each model between bfloat16 and float64. Both models are in memory in float64: 16 bytes a
parameter.
"""

import argparse
import copy
import sys
from collections.abc import Sequence

from transfusion_mot.config import TEXT, DiffusionConfig, ModalityConfig, ModelConfig, TowerConfig
from transfusion_mot.errors import exit_on_user_error
from transfusion_mot.path_options import PathOption, existing_or_on_hub


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.language_models",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "models",
        action=PathOption,
        check=existing_or_on_hub("MODEL"),
        nargs="+",
        metavar="MODEL",
        help="folders, or names on the Hugging Face hub",
    )
    parser.add_argument("--device", default="cpu")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    # Before PyTorch loads, which takes seconds: --help, and mistakes in the options.
    with exit_on_user_error():
        parse_arguments(sys.argv[1:])

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from transfusion_mot.data.layout import TokenRun
from transfusion_mot.models.initial_weights import WeightReport
from transfusion_mot.models.inputs import Slots, TokenInput
from transfusion_mot.models.pretrained import LanguageModel
from transfusion_mot.models.transfusion import TransfusionMoT
from transfusion_mot.sampling.decoding import Decoding
from transfusion_mot.sampling.session import Session
from transfusion_mot.sampling.workspace import Workspace

LENGTH, PROMPT, CONTINUATION = 100, 20, 64


def tower_of(source: LanguageModel, device: torch.device) -> TransfusionMoT:
    """A model whose text tower is the language model, with an unused image tower."""
    sections = source.sections(TEXT)["model"]
    towers = {TEXT: TowerConfig(**sections.pop("towers")[TEXT]), "image": TowerConfig(16, 16)}
    modalities = {
        TEXT: ModalityConfig(**sections.pop("modalities")[TEXT]),
        "image": ModalityConfig("image", "diffusion"),
    }
    config = ModelConfig(towers=towers, modalities=modalities, **sections)
    sizes = {TEXT: source.config.vocab_size, "image": 4}
    with torch.device("meta"):
        model = TransfusionMoT.from_sections(sizes, config, DiffusionConfig())
    model.to_empty(device=device)
    report = WeightReport(source.name)
    source.fill(model, TEXT, report)
    report.check()
    return model.eval().requires_grad_(False)


def with_exact_norms(model: PreTrainedModel) -> PreTrainedModel:
    """The model in float64, including norms, which compute in float32 in transformers."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child).__name__.endswith("RMSNorm"):
                norm = nn.RMSNorm(child.weight.shape[0], eps=child.variance_epsilon)
                norm.weight = child.weight
                setattr(module, name, norm)
    return model.double()


def logits_of(model: TransfusionMoT, ids: Tensor) -> Tensor:
    order = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
    nothing = torch.full_like(ids, -1)
    positions = order[..., None].expand(-1, -1, 3)
    slots = Slots(torch.zeros_like(ids), order, nothing, positions, nothing)
    return model({TEXT: TokenInput(ids)}, slots).predictions[TEXT]


def distance(one: Tensor, two: Tensor) -> float:
    return float((one.double() - two.double()).norm() / two.double().norm())


def continuation(model: TransfusionMoT, prompt: Tensor) -> list[int]:
    """Greedy tokens after a prompt [1, T], with the KV cache."""
    session = Session(model, Workspace(), rows=1, capacity=PROMPT + CONTINUATION, device=prompt.device)
    session.feed(0, TokenRun(TEXT, prompt[0].tolist(), []))
    vocab_size = model.config["sizes"][TEXT]
    return session.write(
        TEXT,
        [[0]],
        forbidden=torch.zeros(1, vocab_size, dtype=torch.bool),
        ends=[],
        decoding=Decoding(CONTINUATION),
        uniform=torch.zeros(1, CONTINUATION),
    )[0]


@torch.no_grad()
def row_of(name: str, device: torch.device) -> str:
    """A line of the table."""
    source = LanguageModel.open(name)
    own = tower_of(source, device)
    theirs = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32, attn_implementation="sdpa")
    theirs = theirs.eval().to(device)
    ids = torch.randint(source.config.vocab_size, (2, LENGTH), generator=torch.Generator().manual_seed(0)).to(device)
    in_float32 = distance(logits_of(own, ids), theirs(ids).logits)
    prompt = ids[:1, :PROMPT]
    settings = {"max_new_tokens": CONTINUATION, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)[0, PROMPT:].tolist()
    same = sum(one == two for one, two in zip(continuation(own, prompt), expected, strict=True))
    rounded = [copy.deepcopy(own).bfloat16(), copy.deepcopy(theirs).bfloat16()]
    in_bfloat16 = [logits_of(rounded[0], ids), rounded[1](ids).logits]
    del rounded
    exact = with_exact_norms(theirs)(ids).logits
    own_exact = logits_of(own.double(), ids)
    return (
        f"| {name} | {source.family} | {distance(own_exact, exact):.0e} | {in_float32:.0e} | "
        f"{distance(in_bfloat16[0], exact):.1e}, {distance(in_bfloat16[1], exact):.1e} | {same} of {CONTINUATION} |"
    )


def main() -> None:
    arguments = parse_arguments(sys.argv[1:])
    logging.disable_progress_bar()
    print("| model | family | float64 | float32 | bfloat16: tower, source | greedy tokens |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name in arguments.models:
        print(row_of(name, torch.device(arguments.device)), flush=True)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
