"""Classifier-free guidance by the prompt and, for edits, by the source image.

Shapes: B documents, C latent channels, Y and X latent height and width.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from transfusion_mot.errors import UserError


@dataclass(frozen=True)
class Guidance:
    """Combines predictions with and without context; it acts on all channels.

    Attributes:
        scale: uncond + scale * (cond - uncond) (Ho & Salimans, arXiv 2207.12598); 1 is off.
        interval: Lowest and highest timestep of guidance (Kynkäänniemi et al., arXiv 2404.07724); outside of it only
            the conditional forward is run.
        rescale: Share of the result that is rescaled to the standard deviation of the conditional prediction (Lin et
            al., arXiv 2305.08891, section 3.4).
        renorm: Limit the norm of the result to that of the conditional prediction (BAGEL, arXiv 2505.14683).
        image_scale: For edits: guidance by the source image, with `scale` for the instruction:
            uncond + image_scale * (image - uncond) + scale * (cond - image), where `image` is predicted from the source
            without the instruction (InstructPix2Pix, arXiv 2211.09800, equation 3). None is guidance without a source.

    Raises:
        UserError: A value is out of its range.
    """

    scale: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    rescale: float = 0.0
    renorm: bool = False
    image_scale: float | None = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise UserError(f"guidance_scale is {self.scale}; it must be a finite number, 1 for no guidance")
        if self.image_scale is not None and not math.isfinite(self.image_scale):
            raise UserError(f"image_guidance_scale is {self.image_scale}; it must be finite, 1 for no guidance")
        if len(self.interval) != 2 or not 0 <= self.interval[0] <= self.interval[1] <= 1:
            raise UserError(
                f"guidance_interval is {self.interval}; it must be the lowest and the highest timestep with guidance, "
                "both from 0 (clean) to 1 (noise)"
            )
        if not 0 <= self.rescale <= 1:
            raise UserError(f"guidance_rescale is {self.rescale}; it must be from 0 (off) to 1")

    @property
    def _scales(self) -> list[float]:
        """Factors on the difference between each prediction and the next one with less context."""
        scales = [self.scale] if self.image_scale is None else [self.scale, self.image_scale]
        # With a scale of 1 the prediction with less context cancels out.
        while scales and scales[-1] == 1:
            scales.pop()
        return scales

    @property
    def branches(self) -> int:
        """Number of predictions: with the context, for edits with the source image alone, and without context."""
        return 1 + len(self._scales)

    def has_source(self, branch: int) -> bool:
        """Whether the context of a branch contains the source image."""
        return branch == 0 or (self.image_scale is not None and branch == 1)

    def at(self, timestep: float) -> bool:
        """Whether guidance is active at that timestep."""
        return self.branches > 1 and self.interval[0] <= timestep <= self.interval[1]

    def combine(self, predictions: Sequence[Tensor]) -> Tensor:
        """The predictions of `branches` in order, each [B, ...] => the guided prediction: latents or logits."""
        whole, guided = predictions[0], predictions[-1]
        for scale, more, less in reversed(list(zip(self._scales, predictions[:-1], predictions[1:], strict=True))):
            guided = guided + scale * (more - less)
        if self.rescale:
            deviations = [_per_row(part.flatten(1).std(dim=1), part) for part in (whole, guided)]
            guided = guided * (1 - self.rescale + self.rescale * deviations[0] / deviations[1])
        if self.renorm:
            norms = [_per_row(part.flatten(1).norm(dim=1), part) for part in (whole, guided)]
            guided = guided * (norms[0] / norms[1].clamp(min=1e-8)).clamp(max=1.0)
        return guided


def _per_row(values: Tensor, like: Tensor) -> Tensor:
    """[B] => [B, 1, ...], to multiply a tensor [B, ...]."""
    return values.view(-1, *[1] * (like.ndim - 1))
