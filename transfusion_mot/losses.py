"""The two losses, each as a sum and a count, so that any split of a batch gives the same gradient."""

import torch
import torch.nn.functional as F
from torch import Tensor

# Label of a slot without text loss: padding, the input BOI (Transfusion, footnote 8), the end of a document.
IGNORE_INDEX = -100


def text_loss_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy in nats, summed over labelled slots: logits [B, T, V], labels [B, T] => []."""
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")


def diffusion_loss_sum(prediction: Tensor, target: Tensor, image_mask: Tensor) -> Tensor:
    """Squared error summed over the elements of real images: two [B, K, C, Y, X] and [B, K] bool => []."""
    per_image = (prediction.float() - target.float()).square().sum(dim=(2, 3, 4))
    return torch.where(image_mask, per_image, 0.0).sum()
