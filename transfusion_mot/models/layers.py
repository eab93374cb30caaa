"""The small parts of a tower: norm, rotary positions, query/key/value projection, feed-forward.

Shapes: B rows, S slots, D width, N query heads, M key/value heads, H head width, F feed-forward width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in float32 whatever the input's number format."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As the layers of torch have it."""
        nn.init.ones_(self.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        if not torch.is_grad_enabled() and hidden.is_cuda and hidden.dtype == self.weight.dtype:
            # One kernel that computes in float32, too; in training the compiler makes one of what follows.
            return F.rms_norm(hidden, hidden.shape[-1:], self.weight, self.eps)
        wide = hidden if hidden.dtype == torch.float64 else hidden.float()
        wide = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)
        return (wide * self.weight).type_as(hidden)


class QKVProjection(nn.Module):
    """Queries, keys and values of a tower, in one matrix product; norms of queries and keys as an option."""

    def __init__(
        self, hidden_size: int, num_heads: int, num_kv_heads: int, head_dim: int, qk_norm: bool, eps: float
    ) -> None:
        super().__init__()
        self.heads = [num_heads, num_kv_heads, num_kv_heads]
        self.head_dim = head_dim
        self.eps = eps
        self.linear = nn.Linear(hidden_size, sum(self.heads) * head_dim, bias=False)
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


def rotary_angles(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Positions [B, S] or [B, S, 3] => (cos, sin) [B, S, 1, H/2] in float32 (RoPE, arXiv 2104.09864).

    With three axes (t, y, x), frequency j turns with axis j mod 3, so that every axis has slow and fast frequencies.
    """
    half = head_dim // 2
    frequencies = theta ** (-torch.arange(half, device=positions.device, dtype=torch.float32) / half)
    if positions.ndim == 2:
        positions = positions[..., None]
    axis = torch.arange(half, device=positions.device) % positions.shape[-1]
    angles = positions.float()[..., axis] * frequencies
    return angles.cos()[:, :, None], angles.sin()[:, :, None]


def rotate(heads_BSNH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (i, i + H/2) of a head by its angle; shape and number format are kept."""
    wide = heads_BSNH if heads_BSNH.dtype == torch.float64 else heads_BSNH.float()
    first, second = wide.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).type_as(heads_BSNH)
