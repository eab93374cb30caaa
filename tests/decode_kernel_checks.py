"""The kernels that decode few rows against the model itself."""

import pytest
import torch
from test_sampling import tiny_model

from transfusion_mot.config import ModalityConfig, TowerConfig
from transfusion_mot.models.attention import KVCache
from transfusion_mot.models.inputs import TokenInput
from transfusion_mot.models.transfusion import TransfusionMoT
from transfusion_mot.sampling.decode_step import FewRows

pytest.importorskip("triton")

ARCHITECTURES = {
    "normed heads": {},
    "grouped heads, 1d": {"rope": "1d", "num_kv_heads": 2, "head_dim": 20},
    "no norm of heads": {"qk_norm": False, "num_heads": 2},
    "as a language model": {
        "rope": "1d",
        "layers_without_rope": [1],
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        "towers": {"text": TowerConfig(32, 48, norm_eps=0.1, qk_norm=False), "image": TowerConfig(16, 24)},
        "modalities": {
            "text": ModalityConfig("text", tied_embeddings=True),
            "image": ModalityConfig("image", "diffusion"),
        },
    },
}
# Slots in use and rotary positions of three rows of the cache: none, many blocks of keys, and the last slot.
LENGTHS, POSITIONS, CAPACITY = [0, 150, 253], [0, 99, 20], 255


def cached_logits(
    model: TransfusionMoT, rows: list[int] | None, steps: int, by_kernels: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits [steps, B, V] of given tokens after a given cache, and its keys and values afterwards."""
    config, device, dtype = model.architecture, model.device, model.dtype
    generator = torch.Generator().manual_seed(0)
    kv_heads = config.num_kv_heads or config.num_heads
    cache = KVCache(config.num_layers, 4, kv_heads, config.head_dim, CAPACITY, device, dtype)
    for held in (cache.keys, cache.values):
        held.copy_(torch.randn(held.shape, generator=generator))
    tokens = torch.randint(model.config["sizes"]["text"], (steps, len(LENGTHS)), generator=generator).to(device)
    lengths, positions = torch.tensor(LENGTHS, device=device), torch.tensor(POSITIONS, device=device)
    few_rows = FewRows(model, cache, "text")
    state = {"lengths": lengths, "step": torch.zeros(1, dtype=torch.long, device=device)}
    state |= few_rows.state(positions, steps)
    index = None if rows is None else torch.tensor(rows, device=device)
    if index is not None:
        state["rows"] = index
    found = []
    for step, ids in enumerate(tokens):
        if by_kernels:
            found.append(few_rows.logits(ids, state))
            assert not state["arrived"].any()
        else:
            window = cache.window(lengths + step, 1, True, index)
            rope_positions = (positions + step)[:, None]
            if config.rope == "3d":
                rope_positions = rope_positions[..., None].expand(-1, -1, 3)
            output = model({"text": TokenInput(ids[:, None])}, cache=window, rope_positions=rope_positions)
            found.append(output.predictions["text"][:, 0])
        state["step"] += 1
    return torch.stack(found), cache.keys, cache.values


@torch.no_grad()
def compare_by_interpreter() -> None:
    """Called where Triton was imported as an interpreter."""
    from transfusion_mot.sampling import decode_kernels

    # The interpreter runs one program after the other, and a block of keys in the time of one key. The longest row has
    # two blocks for each split, the last one cut.
    decode_kernels._SPLITS = decode_kernels._PROGRAMS = 2
    decode_kernels._KEYS = 64
    for number, architecture in enumerate(ARCHITECTURES.values()):
        model = tiny_model(70, num_layers=1 + number % 2, **architecture).float()
        rows = [None, [3, 0, 2]][number % 2]
        found, expected = (cached_logits(model, rows, 2, by_kernels) for by_kernels in (True, False))
        for one, two in zip(found, expected, strict=True):
            assert (one - two).abs().max() <= 1e-5 * two.abs().max(), architecture
