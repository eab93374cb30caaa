"""The Mixture-of-Transformers: untied weights per tower, one joint attention (arXiv 2411.04996, algorithm 1).

Hidden states are streams: tower name to [B, slots, D]. A tower's slots are contiguous, so its weights are applied by
plain dense products. The streams are concatenated along the slots only for attention. Reading order is not a matter of
layout: the mask and the rotary positions encode it.

Norms come before attention and feed-forward, as in Llama, which the papers' Transfusion setting follows.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from transfusion_mot.config import ModelConfig
from transfusion_mot.models.architecture import SHARED
from transfusion_mot.models.attention import (
    HAS_TRITON,
    AttentionMask,
    LayerCache,
    cached_attention,
    joint_attention,
)
from transfusion_mot.models.layers import QKVProjection, RMSNorm, SwiGLU, rotate

if HAS_TRITON:
    from transfusion_mot.models.kernels import join_heads
    from transfusion_mot.models.norm_kernels import add_rms_norm, rms_norm, rms_norm_beside

Streams = dict[str, Tensor]
# Tower => dropout masks [B, slots, D] of the outputs of its attention and of its feed-forward.
DropoutMasks = dict[str, tuple[Tensor, Tensor]]
Checkpointing = Literal["none", "selective", "full"]

# The most expensive results to compute again, by their names on each device.
_EXPENSIVE = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.higher_order.flex_attention,
}
if HAS_TRITON:
    _EXPENSIVE.add(torch.ops.transfusion_mot.interval_attention.default)


def _policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in _EXPENSIVE else CheckpointPolicy.PREFER_RECOMPUTE


class TowerModules(nn.Module):
    """One component of a block: a module for each tower if it is untied, else a single one that all towers call."""

    def __init__(self, config: ModelConfig, component: str, build: Callable[[str], nn.Module]) -> None:
        super().__init__()
        untied = component in config.untied
        self.owner = {tower: tower if untied else SHARED for tower in config.towers}
        self.owned = nn.ModuleDict()
        for tower, owner in self.owner.items():
            if owner not in self.owned:
                self.owned[owner] = build(tower)

    def __getitem__(self, tower: str) -> nn.Module:
        return self.owned[self.owner[tower]]


class MoTBlock(nn.Module):
    """A transformer block over all streams."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        num_kv_heads = config.num_kv_heads or config.num_heads
        attention_size = config.num_heads * config.head_dim
        towers = config.towers

        def norm(tower: str) -> RMSNorm:
            return RMSNorm(towers[tower].hidden_size, config.norm_eps_of(tower))

        def qkv(tower: str) -> QKVProjection:
            return QKVProjection(
                towers[tower].hidden_size,
                config.num_heads,
                num_kv_heads,
                config.head_dim,
                qk_norm=config.has_qk_norm(tower),
                eps=config.norm_eps_of(tower),
                bias=towers[tower].qkv_bias,
            )

        def output(tower: str) -> nn.Linear:
            return nn.Linear(attention_size, towers[tower].hidden_size, bias=towers[tower].output_bias)

        def ffn(tower: str) -> SwiGLU:
            return SwiGLU(towers[tower].hidden_size, towers[tower].intermediate_size)

        self.attention_norm = TowerModules(config, "norm", norm)
        self.qkv = TowerModules(config, "qkv", qkv)
        self.output = TowerModules(config, "output", output)
        self.ffn_norm = TowerModules(config, "norm", norm)
        self.ffn = TowerModules(config, "ffn", ffn)
        self.dropout = {name: tower.dropout for name, tower in towers.items() if tower.dropout}
        self.checkpointing: Checkpointing = "none"
        # Towers whose keys and values the others read without a gradient.
        self.insulated: tuple[str, ...] = ()

    def forward(
        self,
        streams: Streams,
        rotary: tuple[Tensor, Tensor],
        mask: AttentionMask | None,
        cache: LayerCache | None = None,
    ) -> Streams:
        """Streams => streams. With a cache, attention reads the cache and needs no mask."""
        dropout_masks = self._draw_masks(streams) if self.training and cache is None else {}
        if self.checkpointing == "none" or cache is not None or not torch.is_grad_enabled():
            return self._transform(streams, rotary, mask, cache, dropout_masks)
        kept: dict[str, Any] = {}
        if self.checkpointing == "selective":
            kept["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _policy)
        # Inside the compiled function, so that the compiler sees which operations to keep. Nothing is drawn at random
        # here: what a compiled block draws again comes from generators of the compiler, which no seed of ours reaches.
        return checkpoint(
            lambda: self._transform(streams, rotary, mask, None, dropout_masks),
            use_reentrant=False,
            preserve_rng_state=False,
            **kept,
        )

    def _draw_masks(self, streams: Streams) -> DropoutMasks:
        """Masks for the towers that have dropout."""
        masks = {}
        for tower, rate in self.dropout.items():
            if tower in streams:
                of_attention, of_ffn = torch.rand(2, *streams[tower].shape, device=streams[tower].device)
                masks[tower] = of_attention >= rate, of_ffn >= rate
        return masks

    def _transform(
        self,
        streams: Streams,
        rotary: tuple[Tensor, Tensor],
        mask: AttentionMask | None,
        cache: LayerCache | None,
        dropout_masks: DropoutMasks,
    ) -> Streams:
        lengths = [hidden.shape[1] for hidden in streams.values()]
        pairs = {
            tower: _kept_and_norm(hidden, cast(RMSNorm, self.attention_norm[tower]))
            for tower, hidden in streams.items()
        }
        projected = [self.qkv[tower](normed) for tower, (_, normed) in pairs.items()]
        q_BSNH, k_BSMH, v_BSMH = self._joint_heads(list(streams), projected, rotary)
        if cache is None:
            assert mask is not None
            attended = self._attend(list(streams), lengths, q_BSNH, k_BSMH, v_BSMH, mask)
        else:
            parts = cached_attention(q_BSNH, k_BSMH, v_BSMH, cache).flatten(2).split(lengths, dim=1)
            attended = dict(zip(streams, parts, strict=True))
        result = {}
        for tower, (hidden, _) in pairs.items():
            of_attention, of_ffn = dropout_masks.get(tower, (None, None))
            rate = self.dropout.get(tower, 0.0)
            added = _dropped(self.output[tower](attended[tower]), of_attention, rate)
            hidden, normed = _sum_and_norm(hidden, added, cast(RMSNorm, self.ffn_norm[tower]))
            result[tower] = hidden + _dropped(self.ffn[tower](normed), of_ffn, rate)
        return result

    def closed_to(self, tower: str) -> tuple[str, ...]:
        """Towers whose keys and values a tower reads without a gradient."""
        return tuple(name for name in self.insulated if name != tower)

    @property
    def num_attentions(self) -> int:
        """Number of attentions computed in training."""
        return len({self.closed_to(tower) for tower in self.qkv.owner})

    def _attend(
        self,
        towers: list[str],
        lengths: list[int],
        q_BSNH: Tensor,
        k_BSMH: Tensor,
        v_BSMH: Tensor,
        mask: AttentionMask,
    ) -> Streams:
        """Joint attention => outputs for the slots of each tower, [B, slots, N * H].

        With insulated towers it is computed several times with the same result, but with gradients to different keys
        and values. Each tower uses the result whose keys and values of the other insulated towers are detached.
        """
        results: dict[tuple[str, ...], tuple[Tensor, ...]] = {}
        attended = {}
        for place, tower in enumerate(towers):
            closed = self.closed_to(tower) if torch.is_grad_enabled() else ()
            if closed not in results:
                k, v = (_without_gradient(heads, towers, lengths, closed) for heads in (k_BSMH, v_BSMH))
                result = joint_attention(q_BSNH.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask)
                results[closed] = result.transpose(1, 2).flatten(2).split(lengths, dim=1)
            attended[tower] = results[closed][place]
        return attended

    def _joint_heads(
        self, towers: list[str], projected: list[Tensor], rotary: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Each tower's projection [B, slots, (N + 2M) * H] => normed and rotated q [B, S, N, H], k, v [B, S, M, H]."""
        modules = cast(list[QKVProjection], [self.qkv[tower] for tower in towers])
        if HAS_TRITON and projected[0].is_cuda and projected[0].dtype != torch.float64:
            q_weights = [module.q_norm.weight for module in modules if isinstance(module.q_norm, RMSNorm)]
            k_weights = [module.k_norm.weight for module in modules if isinstance(module.k_norm, RMSNorm)]
            heads, kv_heads, _ = modules[0].heads
            # Sequential offload loads a weight only while its own module is called; otherwise it has no values.
            if all(weight.device.type != "meta" for weight in q_weights):
                normed, eps = [isinstance(m.q_norm, RMSNorm) for m in modules], [module.eps for module in modules]
                return join_heads(projected, q_weights, k_weights, *rotary, heads, kv_heads, normed, eps)
        angles = zip(*(angle.split([part.shape[1] for part in projected], dim=1) for angle in rotary), strict=True)
        parts = []
        for module, projection, (cos, sin) in zip(modules, projected, angles, strict=True):
            q_BSNH, k_BSMH, v_BSMH = module.split(projection)
            parts.append((rotate(q_BSNH, cos, sin), rotate(k_BSMH, cos, sin), v_BSMH))
        q_BSNH, k_BSMH, v_BSMH = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
        return q_BSNH, k_BSMH, v_BSMH


def _sum_and_norm(hidden: Tensor, added: Tensor, norm: RMSNorm) -> tuple[Tensor, Tensor]:
    """Sum of two streams [B, slots, D], and its norm."""
    if _has_norm_kernel(hidden) and hidden.dtype == added.dtype:
        return add_rms_norm(hidden, added, norm.weight, norm.eps)
    hidden = hidden + added
    return hidden, norm(hidden)


def _kept_and_norm(hidden: Tensor, norm: RMSNorm) -> tuple[Tensor, Tensor]:
    """A stream [B, slots, D] and its norm. Use the returned stream: one backward adds the gradients of both."""
    if _has_norm_kernel(hidden):
        return rms_norm_beside(hidden, norm.weight, norm.eps)
    return hidden, norm(hidden)


def eager_norm(hidden: Tensor, norm: RMSNorm) -> Tensor:
    """Norm of a stream [B, slots, D] in code that is not compiled, where `RMSNorm` takes one kernel an operation."""
    return rms_norm(hidden, norm.weight, norm.eps) if _has_norm_kernel(hidden) else norm(hidden)


def _has_norm_kernel(hidden: Tensor) -> bool:
    """Whether norms use the kernels of `norm_kernels`: in training on CUDA."""
    return HAS_TRITON and torch.is_grad_enabled() and hidden.is_cuda and hidden.dtype != torch.float64


def _dropped(added: Tensor, mask: Tensor | None, rate: float) -> Tensor:
    """Apply a dropout mask and rescale to keep the mean; without a mask, return the input."""
    return added if mask is None else added * mask / (1 - rate)


def _without_gradient(heads_BSMH: Tensor, towers: list[str], lengths: list[int], closed: tuple[str, ...]) -> Tensor:
    """The same heads, detached at the slots of some towers."""
    if not closed:
        return heads_BSMH
    parts = zip(towers, heads_BSMH.split(lengths, dim=1), strict=True)
    return torch.cat([part.detach() if tower in closed else part for tower, part in parts], dim=1)
