"""The small parts of a tower: norm, rotary positions, query/key/value projection, feed-forward.

Shapes: B rows, S slots, D width, N query heads, M key/value heads, H head width, F feed-forward width.
"""

import functools
import json
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in float32 for any number format of the input."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Named as in the layers of torch."""
        nn.init.ones_(self.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        if not torch.is_grad_enabled() and hidden.is_cuda and hidden.dtype == self.weight.dtype:
            # One kernel that computes in float32, too. In training there are `norm_kernels`, or the compiler makes one.
            return F.rms_norm(hidden, hidden.shape[-1:], self.weight, self.eps)
        wide = hidden if hidden.dtype == torch.float64 else hidden.float()
        wide = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)
        return (wide * self.weight).type_as(hidden)


class QKVProjection(nn.Module):
    """Queries, keys and values of a tower, in one matrix product; norms of queries and keys, and a bias, as options."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        qk_norm: bool,
        eps: float,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.heads = [num_heads, num_kv_heads, num_kv_heads]
        self.head_dim = head_dim
        self.eps = eps
        self.linear = nn.Linear(hidden_size, sum(self.heads) * head_dim, bias=bias)
        self.q_norm = RMSNorm(head_dim, eps) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(head_dim, eps) if qk_norm else nn.Identity()

    def forward(self, hidden_BSD: Tensor) -> Tensor:
        """Hidden states => projection [B, S, (N + 2M) * H]."""
        return self.linear(hidden_BSD)

    def split(self, projection: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Projection => normed queries [B, S, N, H], keys and values [B, S, M, H]."""
        q_BSNH, k_BSMH, v_BSMH = projection.unflatten(-1, (-1, self.head_dim)).split(self.heads, dim=2)
        return self.q_norm(q_BSNH), self.k_norm(k_BSMH), v_BSMH


class SwiGLU(nn.Module):
    """Gated feed-forward (Shazeer, arXiv 2002.05202): [B, S, D] => [B, S, D]."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, hidden_BSD: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(hidden_BSD)) * self.up(hidden_BSD))


def rotary_angles(
    positions: Tensor, head_dim: int, theta: float, scaling: dict[str, Any] | None = None
) -> tuple[Tensor, Tensor]:
    """Positions [B, S] or [B, S, 3] => (cos, sin) [B, S, 1, H/2] in float32 (RoPE, arXiv 2104.09864).

    With three axes (t, y, x), frequency j turns with axis j mod 3, so that every axis has slow and fast frequencies.

    Args:
        scaling: `ModelConfig.rope_scaling`; cos and sin are then multiplied by the attention factor of its `rope_type`.
    """
    half = head_dim // 2
    if scaling is None:
        frequencies = theta ** (-torch.arange(half, device=positions.device, dtype=torch.float32) / half)
    else:
        described = json.dumps(scaling, sort_keys=True)
        frequencies = _scaled_frequencies(head_dim, theta, described, positions.device)
    if positions.ndim == 2:
        positions = positions[..., None]
    axis = torch.arange(half, device=positions.device) % positions.shape[-1]
    angles = positions.float()[..., axis] * frequencies
    factor = 1.0 if scaling is None else attention_factor(head_dim, theta, scaling)
    cos, sin = angles.cos()[:, :, None], angles.sin()[:, :, None]
    return (cos, sin) if factor == 1 else (cos * factor, sin * factor)


def unturned_angles(rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """(cos, sin) of zero rotation, for layers without rotary positions."""
    return torch.ones_like(rotary[0]), torch.zeros_like(rotary[1])


def attention_factor(head_dim: int, theta: float, scaling: dict[str, Any]) -> float:
    """Factor on cos and sin; it differs from 1 only for `yarn`."""
    return _of_transformers(head_dim, theta, json.dumps(scaling, sort_keys=True))[1]


@functools.cache
def _scaled_frequencies(head_dim: int, theta: float, scaling: str, device: torch.device) -> Tensor:
    """Frequencies [H/2] on a device. Cached there, because a copy would make the host wait and cannot be recorded."""
    return _of_transformers(head_dim, theta, scaling)[0].to(device)


@functools.cache
def _of_transformers(head_dim: int, theta: float, scaling: str) -> tuple[Tensor, float]:
    """Frequencies [H/2] and attention factor of transformers, to the last bit."""
    parameters = {**json.loads(scaling), "rope_theta": theta}
    with torch.device("cpu"):
        if parameters["rope_type"] == "default":
            return 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim)), 1.0
        config = LlamaConfig(hidden_size=head_dim, num_attention_heads=1, head_dim=head_dim)
        # Assigned, not passed on: transformers would warn of lengths that say nothing here.
        config.rope_parameters = parameters
        frequencies, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, torch.device("cpu"))
    return frequencies, float(factor)


def rotate(heads_BSNH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (i, i + H/2) of a head by its angle; shape and number format are kept."""
    wide = heads_BSNH if heads_BSNH.dtype == torch.float64 else heads_BSNH.float()
    first, second = wide.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).type_as(heads_BSNH)
