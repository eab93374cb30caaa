"""The two losses, each as a sum and a count, so that any split of a batch gives the same gradient."""

from typing import Any

import torch
from torch import Tensor

# Label of a slot without text loss: padding, the input BOI (Transfusion, footnote 8), the end of a document.
IGNORE_INDEX = -100

# Logits in memory at a time: 0.5 GiB in bfloat16. With a large vocabulary, all logits would take most of the memory.
LOGITS_AT_ONCE = 2**28


def next_token_loss(
    hidden: Tensor, weight: Tensor, labels: Tensor, z_loss_weight: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Cross-entropy in nats of the logits `hidden @ weight.T`, summed over labelled slots.

    Slots are processed in chunks: each chunk becomes its loss and its gradient before the next one is computed. So the
    logits of all slots are never in memory at once, none are kept in float32, and nothing is computed twice.

    Args:
        hidden: [B, T, D]; its number format is that of the logits.
        weight: [V, D], in any number format.
        labels: [B, T], `IGNORE_INDEX` where there is no loss.
        z_loss_weight: The gradient is that of cross-entropy + weight * log(Z)^2, where Z is the sum of the
            exponentiated logits (PaLM, arXiv 2204.02311, section 5). The value is the cross-entropy alone, so
            it can be compared between runs and with held-out text.

    Returns:
        (sum [], its terms [B, T], without a gradient and 0 where there is no label), in float32 (float64 if `hidden`
        is).
    """
    flat_hidden, flat_labels = hidden.flatten(0, 1), labels.flatten()
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        total, losses = _LinearCrossEntropy.apply(flat_hidden, weight, flat_labels, z_loss_weight)
    else:
        narrow = weight.to(hidden.dtype)
        parts = _chunks(flat_hidden, flat_labels, len(weight))
        losses = torch.cat([_losses(h @ narrow.T, target)[0] for h, target in parts])
        total = losses.sum()
    return total, losses.view(labels.shape)


def _chunks(hidden: Tensor, labels: Tensor, vocab_size: int) -> list[tuple[Tensor, Tensor]]:
    """Split the slots into equal parts (except the last) that respect the limit on logits."""
    slots = max(1, LOGITS_AT_ONCE // vocab_size)
    count = -(-len(labels) // slots)
    return list(zip(hidden.chunk(count), labels.chunk(count), strict=True))


def _losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [N, V], labels [N] => cross-entropies [N]; log(Z) [N, 1] and logits [N, V], at least in float32."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    log_sum = wide.logsumexp(dim=-1, keepdim=True)
    losses = log_sum[:, 0] - wide.gather(1, labels.clamp(min=0)[:, None])[:, 0]
    return torch.where(labels != IGNORE_INDEX, losses, 0.0), log_sum, wide


def _losses_and_gradient(logits: Tensor, labels: Tensor, z_loss_weight: float) -> tuple[Tensor, Tensor]:
    """Logits [N, V], labels [N] => cross-entropies [N], gradient of their sum and the z-loss by the logits [N, V]."""
    losses, log_sum, wide = _losses(logits, labels)
    is_target = torch.arange(logits.shape[1], device=logits.device) == labels[:, None]
    probability = (wide - log_sum).exp()
    if z_loss_weight:
        probability = probability * (1 + 2 * z_loss_weight * log_sum)
    gradient = torch.where((labels != IGNORE_INDEX)[:, None], probability - is_target.to(wide.dtype), 0.0)
    return losses, gradient.to(logits.dtype)


# Compiled, the GPU reads the softmax once for the sum and once for the gradient; eager kernels read it nine times.
_compiled_losses_and_gradient = torch.compile(_losses_and_gradient)


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes its gradients in the forward pass, while the logits are in memory.

    The loss is a sum, so the backward pass only scales them.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, z_loss_weight: float
    ) -> tuple[Tensor, Tensor]:
        narrow = weight.to(hidden.dtype)
        losses_and_gradient = _compiled_losses_and_gradient if hidden.is_cuda else _losses_and_gradient
        parts, hidden_gradients = [], []
        # A frozen head has no gradient. FSDP gathers the weight in bfloat16, where a sum over chunks would lose
        # precision.
        wide = torch.promote_types(weight.dtype, torch.float32)
        weight_gradient = torch.zeros_like(weight, dtype=wide) if weight.requires_grad else None
        for part, target in _chunks(hidden, labels, len(weight)):
            part_losses, gradient = losses_and_gradient(part @ narrow.T, target, z_loss_weight)
            parts.append(part_losses)
            hidden_gradients.append(gradient @ narrow)
            if weight_gradient is not None:
                weight_gradient += gradient.T @ part
        ctx.save_for_backward(torch.cat(hidden_gradients), weight_gradient)
        ctx.weight_dtype = weight.dtype
        losses = torch.cat(parts)
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        hidden_gradient, weight_gradient = ctx.saved_tensors
        by_weight = None if weight_gradient is None else (weight_gradient * upstream).to(ctx.weight_dtype)
        return hidden_gradient * upstream, by_weight, None, None


def diffusion_losses(prediction: Tensor, target: Tensor, image_mask: Tensor) -> Tensor:
    """Squared error summed over the elements of each real image: two [B, K, C, Y, X] and [B, K] bool => [B, K]."""
    per_image = (prediction.float() - target.float()).square().sum(dim=(2, 3, 4))
    return torch.where(image_mask, per_image, 0.0)
