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

from transfusion_mot.config import ModalityConfig, ModelConfig
from transfusion_mot.errors import UserError
from transfusion_mot.models.adapters import UNET_GROUPS
from transfusion_mot.models.attention import (
    HAS_TRITON,
    AttentionMask,
    LayerCache,
    cached_attention,
    joint_attention,
)
from transfusion_mot.models.layers import ROPE_TYPES, QKVProjection, RMSNorm, SwiGLU, attention_factor, rotate

if HAS_TRITON:
    from transfusion_mot.models.kernels import join_heads
    from transfusion_mot.models.norm_kernels import add_rms_norm, rms_norm, rms_norm_beside

Streams = dict[str, Tensor]
# Tower => dropout masks [B, slots, D] of the outputs of its attention and of its feed-forward.
DropoutMasks = dict[str, tuple[Tensor, Tensor]]
SHARED = "shared"
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
    """A stream [B, slots, D], to be used from now on, and its norm, whose backward adds the gradients of both."""
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


# Names reserved by `slots.order`, `media.NAME`, `caption_loss` and `pad_slots`.
_TAKEN_NAMES = {"slots", "media", "caption", "pad"}


def check_architecture(config: ModelConfig) -> None:
    """Refuse sizes that do not fit together.

    Raises:
        UserError: Names the key, its value and the valid values.
    """
    for name, modality in config.modalities.items():
        if modality.tower not in config.towers:
            raise UserError(
                f"model.modalities.{name}.tower is {modality.tower!r}; it needs one of model.towers: "
                f"{', '.join(config.towers)}"
            )
        if modality.objective != "next_token" and modality.tied_embeddings:
            raise UserError(
                f"model.modalities.{name} has tied_embeddings, but the objective {modality.objective} has no "
                "embeddings; remove that key"
            )
        if modality.code_noise_prob and (modality.objective != "next_token" or name == "text"):
            raise UserError(
                f"model.modalities.{name} has code_noise_prob, which works only for codes (objective next_token, not "
                "text); remove that key"
            )
        if not 0 <= modality.code_noise_prob < 1:
            raise UserError(
                f"model.modalities.{name}.code_noise_prob is {modality.code_noise_prob}; it must be at least 0 and "
                "below 1"
            )
        if modality.guidance_scale is not None and (modality.objective == "read" or name == "text"):
            raise UserError(
                f"model.modalities.{name} has guidance_scale, but guidance works only for media; remove that key"
            )
        if modality.vocab_size is not None and name != "text":
            raise UserError(f"model.modalities.{name} has vocab_size, which works only for text; remove that key")
        if modality.objective == "next_token" and modality.is_bidirectional:
            raise UserError(
                f"model.modalities.{name} has the objective next_token and bidirectional attention, so a token would "
                "see the one it predicts; set attention to causal"
            )
    text = config.modalities.get("text")
    if text is None or text.objective != "next_token":
        raise UserError(
            f"model.modalities has {', '.join(config.modalities) or 'nothing'}; 'text' with the objective next_token "
            "must be one of them"
        )
    _check_read(config)
    if idle := set(config.towers) - {config.modalities[name].tower for name in config.made}:
        raise UserError(
            f"model.towers has {sorted(idle)} that no modality with a loss uses; remove them or use them in modalities"
        )
    for key, names in (("towers", config.towers), ("modalities", config.modalities)):
        for name in names:
            if not name or "." in name or hasattr(nn.ModuleDict, name):
                raise UserError(
                    f"model.{key} has the name '{name}', which torch does not allow for weights; give another one"
                )
    if len(config.made) == 1:
        raise UserError("model.modalities has only text; add another modality")
    if SHARED in config.towers and len(config.towers) > 1:
        raise UserError(
            f"model.towers has the name '{SHARED}' beside {sorted(set(config.towers) - {SHARED})}; it is reserved for "
            "the weights that towers share; give another one"
        )
    if taken := set(config.modalities) & _TAKEN_NAMES:
        raise UserError(
            f"model.modalities has the name '{min(taken)}', which is reserved for batches and the log; give another one"
        )
    widths = {tower.hidden_size for tower in config.towers.values()}
    if len(widths) > 1 and len(set(config.untied)) < 4:
        raise UserError(
            f"model.untied is {config.untied}, but towers of different hidden_size {sorted(widths)} cannot share "
            "weights; use [norm, qkv, output, ffn]"
        )
    _check_shared(config)
    if config.head_dim % 2:
        raise UserError(f"model.head_dim is {config.head_dim}; rotary positions need an even number")
    if config.num_heads % (config.num_kv_heads or config.num_heads):
        raise UserError(
            f"model.num_heads {config.num_heads} is not a multiple of model.num_kv_heads {config.num_kv_heads}"
        )
    for name, modality in config.modalities.items():
        if modality.objective != "next_token":
            _check_patches(name, modality)
    _check_rope(config)


def _check_read(config: ModelConfig) -> None:
    """Refuse `read` modalities whose source does not exist or has other settings."""
    latents = config.of_objective("diffusion")
    readers: dict[str, str] = {}
    for name, modality in config.modalities.items():
        key = f"model.modalities.{name}"
        if modality.objective != "read":
            if modality.reads is not None:
                raise UserError(
                    f"{key} has reads: {modality.reads}, but its objective is {modality.objective}; set objective: "
                    "read, or remove reads"
                )
            continue
        if modality.reads not in latents:
            what = "codes" if modality.reads in config.modalities else "no modality"
            given = "has no reads" if modality.reads is None else f"reads {modality.reads}, which is {what}"
            raise UserError(
                f"{key} {given}; it must name a modality with the objective diffusion: {', '.join(latents) or 'none'}"
            )
        other = readers.setdefault(modality.reads, name)
        if other != name:
            raise UserError(f"model.modalities has {other} and {name}, which both read {modality.reads}; remove one")
        patch_size = config.modalities[modality.reads].patch_size
        if modality.patch_size != patch_size:
            raise UserError(
                f"{key}.patch_size is {modality.patch_size}, but {modality.reads}, which it reads, has {patch_size}; "
                "give both the same"
            )
        if modality.adapter != "linear":
            raise UserError(
                f"{key}.adapter is {modality.adapter}, but a modality that is only read has a linear adapter; remove "
                "the key"
            )


def _check_shared(config: ModelConfig) -> None:
    """Refuse towers that share a component but have different settings for it."""
    of_tower = {
        name: {
            "intermediate_size": ("ffn", tower.intermediate_size),
            "norm_eps": ("norm", config.norm_eps_of(name)),
            # The norms of queries and keys are part of their projection.
            "norm_eps of queries and keys": ("qkv", config.has_qk_norm(name) and config.norm_eps_of(name)),
            "qk_norm": ("qkv", config.has_qk_norm(name)),
            "qkv_bias": ("qkv", tower.qkv_bias),
            "output_bias": ("output", tower.output_bias),
        }
        for name, tower in config.towers.items()
    }
    for key, (component, _) in next(iter(of_tower.values())).items():
        if len({settings[key][1] for settings in of_tower.values()}) > 1 and component not in config.untied:
            raise UserError(f"model.towers differ in {key}; then model.untied needs '{component}'")


def _check_rope(config: ModelConfig) -> None:
    """Refuse invalid rotary positions."""
    scaling = config.rope_scaling
    if scaling is not None:
        if scaling.get("rope_type") not in ROPE_TYPES:
            raise UserError(f"model.rope_scaling is {scaling}; its rope_type must be one of {', '.join(ROPE_TYPES)}")
        try:
            attention_factor(config.head_dim, config.rope_theta, scaling)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"model.rope_scaling is {scaling}, which transformers cannot read ({error!r})") from None
    if wrong := [layer for layer in config.layers_without_rope if not 0 <= layer < config.num_layers]:
        raise UserError(f"model.layers_without_rope has {wrong}; the model has the layers 0 to {config.num_layers - 1}")


def _check_patches(name: str, modality: ModalityConfig) -> None:
    if modality.patch_size not in (1, 2, 4, 8):
        raise UserError(f"model.modalities.{name}.patch_size is {modality.patch_size}; known: 1, 2, 4, 8")
    widths, widths_needed = modality.unet_channels, modality.patch_size.bit_length()
    has_bad_width = any(width < 1 or width % UNET_GROUPS for width in widths)
    if modality.adapter == "unet" and (len(widths) < widths_needed or has_bad_width):
        raise UserError(
            f"model.modalities.{name}.unet_channels is {widths}; patch_size {modality.patch_size} needs "
            f"at least {widths_needed} widths, each a multiple of {UNET_GROUPS}"
        )
