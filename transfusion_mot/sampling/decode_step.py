"""A decoding step of few rows with kernels that each read some weights once: five a layer.

Shapes: B rows, D width, N query heads, M key/value heads, H head width, V vocabulary.
"""

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from transfusion_mot.models.attention import HAS_TRITON, KVCache
from transfusion_mot.models.layers import QKVProjection, RMSNorm, SwiGLU, rotary_angles, unturned_angles
from transfusion_mot.models.modalities import TiedEmbedding, TokenModality
from transfusion_mot.models.mot import MoTBlock
from transfusion_mot.models.transfusion import TransfusionMoT
from transfusion_mot.sampling.workspace import can_record

if HAS_TRITON:
    from transfusion_mot.sampling.decode_kernels import attention, products

# Maximum rows. With more, tensor cores are faster: at 760m on an H200, 8 rows take 2.5 ms a token here and 2.2 ms
# there, 4 rows 1.6 ms and 2.2 ms.
_MOST_ROWS = 4


class _Layer(NamedTuple):
    """The modules of a block that a tower's tokens pass through."""

    attention_norm: RMSNorm
    qkv: QKVProjection
    output: nn.Linear
    ffn_norm: RMSNorm
    ffn: SwiGLU

    def linears(self) -> list[nn.Linear]:
        """All its linear layers."""
        return [self.qkv.linear, self.output, self.ffn.gate, self.ffn.up, self.ffn.down]


def _layer(block: MoTBlock, tower: str) -> _Layer:
    parts = (block.attention_norm, block.qkv, block.output, block.ffn_norm, block.ffn)
    return _Layer(*(cast(Any, part[tower]) for part in parts))


def _is_plain(matrix: nn.Module, dtype: torch.dtype) -> bool:
    if type(matrix) not in (nn.Linear, nn.Embedding, TiedEmbedding) or getattr(matrix, "bias", None) is not None:
        return False
    weight = cast(Tensor, matrix.weight)
    return weight.dtype == dtype and weight.is_contiguous()


class FewRows:
    """Decoding steps of a model with the kernels of `decode_kernels`; `serves` says where they can be used.

    Args:
        model: The model; its weights are read in place.
        cache: Cache to read and write.
        modality: Modality of the decoded tokens.
    """

    def __init__(self, model: TransfusionMoT, cache: KVCache, modality: str) -> None:
        self.model = model
        self.cache = cache
        self.tokens = cast(TokenModality, model.modality(modality))
        tower = model.architecture.modalities[modality].tower
        self._layers = [_layer(cast(MoTBlock, block), tower) for block in model.blocks]
        self._final_norm = cast(RMSNorm, model.final_norm[tower])
        device = cache.keys.device
        # From Hopper on a kernel can start before the previous one has ended.
        self._early = (
            device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device)[0] >= 9
        )

    def serves(self, rows: int) -> bool:
        """Whether the kernels decode this number of rows: few rows of an unmodified model on CUDA.

        Models that are sharded, hooked or quantised, have replaced layers, or run under autocast are not served.
        """
        cache, model = self.cache.keys, self.model
        matrices: list[nn.Module] = [self.tokens.embedding, self.tokens.head or self.tokens.embedding]
        matrices += [linear for layer in self._layers for linear in layer.linears()]
        return (
            HAS_TRITON
            and rows <= _MOST_ROWS
            and can_record(model, cache.device)
            and not torch.is_autocast_enabled(cache.device.type)
            and cache.dtype in (torch.bfloat16, torch.float16, torch.float32)
            and all(_is_plain(matrix, cache.dtype) for matrix in matrices)
        )

    def state(self, positions: Tensor, steps: int) -> dict[str, Tensor]:
        """The tensors that `logits` needs besides its rows; the next tokens have these rotary positions [B]."""
        config = self.model.architecture
        # All axes of a token have the same position.
        every_step = positions[:, None] + torch.arange(steps, device=positions.device)
        cos, sin = rotary_angles(every_step, config.head_dim, config.rope_theta, config.rope_scaling)
        arrived = torch.zeros(len(positions) * config.num_heads, dtype=torch.int32, device=positions.device)
        state = {"cos": cos, "sin": sin, "arrived": arrived}
        if config.layers_without_rope:
            state["unturned_cos"], state["unturned_sin"] = unturned_angles((cos, sin))
        return state

    def logits(self, tokens: Tensor, state: dict[str, Tensor]) -> Tensor:
        """Read a token into each row => logits [B, V] of the next.

        Args:
            tokens: [B].
            state: Result of `state`; `lengths` [B], slots of the rows before step 0; `step` [1]; `rows` [B], if they
                are not the first B rows of the cache.
        """
        early, keys, values = self._early, self.cache.keys, self.cache.values
        without_rope = self.model.architecture.layers_without_rope
        if without_rope:
            unturned = {**state, "cos": state["unturned_cos"], "sin": state["unturned_sin"]}
        hidden = self.tokens.embedding(tokens)
        for layer, (attention_norm, qkv, output, ffn_norm, ffn) in enumerate(self._layers):
            projection = products(hidden, qkv.linear.weight, norm=_weight_and_eps(attention_norm), early=early)
            norms = None
            if isinstance(qkv.q_norm, RMSNorm) and isinstance(qkv.k_norm, RMSNorm):
                norms = (qkv.q_norm.weight, qkv.k_norm.weight)
            angles = unturned if layer in without_rope else state
            attended = attention(projection, norms, qkv.eps, keys[layer], values[layer], angles, early=early)
            products(attended, output.weight, add_to=hidden, early=early)
            gated = products(hidden, ffn.gate.weight, up=ffn.up.weight, norm=_weight_and_eps(ffn_norm), early=early)
            products(gated, ffn.down.weight, add_to=hidden, early=early)
        return products(hidden, self.tokens.head_weight, norm=_weight_and_eps(self._final_norm), early=early)


def _weight_and_eps(norm: RMSNorm) -> tuple[Tensor, float]:
    return norm.weight, norm.eps
